r"""The cross-attention stack: embeddings of an image given another one, for all pairs of a batch (sections 3.2-3.6).

Kotovenko, Ma, Milbich, Ommer, "Cross-Image-Attention for Conditional Embeddings in Deep Metric Learning", CVPR 2023.
The stack exists in training only. Symbols: ``X_i`` the ``n`` tokens of image ``i``, ``u_i`` its embedding before
normalisation, ``z_i`` after; ``p^n[i|j]`` the embedding of ``i`` given ``j`` after ``n`` blocks, ``S^n`` the
similarities on that level. A partner is the *query position* of an attention over one image's tokens, so that keys
and values are made once per image, never per pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from attnmap_core.errors import InputError
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .distributed import processes, sum_across

Hierarchy = Literal["mutual", "running"]
Mode = Literal["block", "no_ffn", "ca_only"]
Similarity = Literal["mutual", "target", "anchor"]
Positions = Literal["none", "sincos2d_keys"]
Init = Literal["zero_out", "xavier"]


class CrossAttentionBlock(nn.Module):
    r"""One block: a query vector reads the tokens of one image, and what it finds updates a stream.

    .. math::
        A_{h,t} = \mathrm{softmax}_t \langle \tilde q_h, k_{t,h} \rangle / \sqrt{e}, \qquad
        s = o + W_O\, \mathrm{concat}_h \sum_t A_{h,t} v_{t,h}, \qquad
        out = s + W_2\, \mathrm{GELU}(W_1\, LN(s))

    with :math:`\tilde q = W_Q LN(q)` and :math:`k_t, v_t = W_{K,V} LN(X_t)`.

    Args:
        dim: channels of the stream.
        memory_dim: channels of the tokens.
        heads: contiguous slices of ``dim``.
        mode: ``"block"``; ``"no_ffn"`` gives ``s``; ``"ca_only"`` what is added to ``o`` in it, and nothing else.
        dropout: rate on both branches.
        init: ``"zero_out"`` starts with branches that add nothing, ``"xavier"`` does not.

    Example:
        >>> block = CrossAttentionBlock(8, 12, heads=2)
        >>> own, queries = torch.randn(3, 1, 8), torch.randn(3, 5, 8)
        >>> out = block(own, block.queries(queries), *block.keys_values(torch.randn(3, 6, 12)))
        >>> out.shape, bool((out == own).all())
        (torch.Size([3, 5, 8]), True)
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        *,
        heads: int = 8,
        mode: Mode = "block",
        dropout: float = 0.0,
        init: Init = "zero_out",
    ) -> None:
        super().__init__()
        self.heads, self.mode = heads, mode
        self.norm_query, self.norm_memory = nn.LayerNorm(dim), nn.LayerNorm(memory_dim)
        self.query = nn.Linear(dim, dim)
        self.key, self.value = nn.Linear(memory_dim, dim), nn.Linear(memory_dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        linears, last = [self.query, self.key, self.value, self.out], [self.out]
        if mode == "block":
            self.norm = nn.LayerNorm(dim)
            self.expand, self.contract = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
            linears += [self.expand, self.contract]
            last += [self.contract]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if init == "zero_out":
            for linear in last:
                nn.init.zeros_(linear.weight)

    def queries(self, stream: Tensor) -> Tensor:
        """``(b, heads, q, e)`` queries of the vectors ``stream (b, q, dim)``."""
        return self._split(self.query(self.norm_query(stream)))

    def keys_values(self, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(b, heads, n, e)`` keys and values of ``tokens (b, n, memory_dim)``; keys get ``positions (n, dim)``."""
        memory = self.norm_memory(tokens)
        keys = self.key(memory)
        return self._split(keys if positions is None else keys + positions), self._split(self.value(memory))

    def weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        """``(b, heads, q, n)`` attention weights, which the block itself never holds; each row sums to 1."""
        return (queries @ keys.mT * keys.shape[-1] ** -0.5).softmax(-1)

    def forward(self, own: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The updated stream ``(b, q, dim)``.

        Args:
            own: ``(b, q, dim)``, or anything that broadcasts to it.
            queries: ``(b or 1, heads, q, e)`` of :meth:`queries`; one set may serve all images.
            keys, values: ``(b, heads, n, e)`` of :meth:`keys_values`.
        """
        queries = queries.expand(len(keys), -1, -1, -1)
        read = functional.scaled_dot_product_attention(queries, keys, values)
        found = self.out(rearrange(read, "b h q e -> b q (h e)"))
        if self.mode == "ca_only":
            return found
        stream = own + self.dropout(found)
        if self.mode == "no_ffn":
            return stream
        return stream + self.dropout(self.contract(functional.gelu(self.expand(self.norm(stream)))))

    def _split(self, vectors: Tensor) -> Tensor:
        return rearrange(vectors, "b q (h e) -> b h q e", h=self.heads)


class CrossAttentionStack(nn.Module):
    r"""Blocks that turn embeddings into conditional ones, and the similarities of all pairs on each level.

    ``hierarchy="mutual"``: each image keeps its own stream; the partner's current one decides where to look in its
    tokens. Both directions of a pair move on together, from the level before:

    .. math:: p^n[i|j] = \mathrm{Block}_n(p^{n-1}[i|j],\; p^{n-1}[j|i],\; X_i), \qquad p^0[i|j] = u_i

    ``"running"``: one stream for each ordered pair starts at ``u_j`` and reads the tokens of ``i``; it stays an
    embedding of ``j``. For ``ca_only`` and one block both are the same attention.

    Similarity of anchor ``a`` and candidate ``j``, of normalised vectors:
    ``"mutual"`` :math:`\langle p[a|j], p[j|a] \rangle`, symmetric; ``"target"`` :math:`\langle z_a, p[j|a] \rangle`;
    ``"anchor"`` :math:`\langle p[a|a], p[j|a] \rangle`.

    Args:
        dim: channels ``d`` of the embeddings.
        memory_dim: channels of the tokens.
        blocks: ``N``.
        heads: of each block; divide ``width``.
        width: channels inside the stack where other than ``dim``: orthogonal maps lead there and back.
        hierarchy, similarity: above.
        mode: see :class:`CrossAttentionBlock`; ``"ca_only"`` needs ``init="xavier"``, as its zeros have no direction.
        share_blocks: use one block ``N`` times.
        positions: ``"sincos2d_keys"`` adds a fixed sine-cosine code of the grid to the keys; ``width`` a multiple of 4.
        init: with ``"zero_out"`` every level equals level 0 at first, so that training starts where it would without
            the stack (with ``width >= dim``).
        dropout: of the blocks.
        tile: process pairs in tiles of so many images squared and recompute each in the backward pass: the same
            result, and a peak memory for one tile's pairs instead of all. By default all pairs at once.

    Raises:
        InputError: for options outside of their range, or that contradict each other.

    Example:
        >>> stack = CrossAttentionStack(8, 12, blocks=2, heads=2)
        >>> u, tokens = torch.randn(5, 8), torch.randn(5, 6, 12)
        >>> S = stack(u, tokens, levels=(0, 2))
        >>> S[2].shape, torch.allclose(S[2], S[0], atol=1e-6)  # zero_out
        (torch.Size([5, 5]), True)
    """

    def __init__(
        self,
        dim: int = 512,
        memory_dim: int = 2048,
        *,
        blocks: int = 6,
        heads: int = 8,
        width: int | None = None,
        hierarchy: Hierarchy = "mutual",
        similarity: Similarity = "mutual",
        mode: Mode = "block",
        share_blocks: bool = False,
        positions: Positions = "none",
        init: Init = "zero_out",
        dropout: float = 0.0,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        width = width or dim
        _expect("blocks", blocks, blocks >= 1, "1 or more")
        _expect("heads", heads, heads >= 1 and width % heads == 0, f"a divisor of the width {width}")
        _expect("tile", tile, tile is None or tile >= 1, "1 or more images, or none")
        _expect("dropout", dropout, 0 <= dropout < 1, "0 to below 1")
        _among("hierarchy", hierarchy, ("mutual", "running"))
        _among("similarity", similarity, ("mutual", "target", "anchor"))
        _among("mode", mode, ("block", "no_ffn", "ca_only"))
        _among("positions", positions, ("none", "sincos2d_keys"))
        _among("init", init, ("zero_out", "xavier"))
        if mode == "ca_only" and init == "zero_out":
            raise InputError(
                'init zero_out: ca_only would give zero vectors, which have no direction; use "xavier"'
            )
        if positions != "none":
            _expect("width", width, width % 4 == 0, "a multiple of 4 for sincos2d_keys")
        self.dim, self.memory_dim, self.width, self.depth = dim, memory_dim, width, blocks
        self.hierarchy: Hierarchy = hierarchy
        self.similarity: Similarity = similarity
        self.positions: Positions = positions
        self.tile = tile
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(width, memory_dim, heads=heads, mode=mode, dropout=dropout, init=init)
            for _ in range(1 if share_blocks else blocks)
        )
        self.enter: nn.Module = nn.Identity()
        self.leave: nn.Module = nn.Identity()
        if width != dim:
            enter, leave = nn.Linear(dim, width), nn.Linear(width, dim)
            nn.init.orthogonal_(enter.weight)
            with torch.no_grad():
                leave.weight.copy_(enter.weight.T)
            nn.init.zeros_(enter.bias)
            nn.init.zeros_(leave.bias)
            self.enter, self.leave = enter, leave

    # --- What it gives ---

    def forward(
        self,
        embeddings: Tensor,
        tokens: Tensor,
        *,
        levels: Sequence[int] | None = None,
        pairs: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        distributed: bool = False,
    ) -> dict[int, Tensor]:
        """Similarities of all pairs of the batch.

        Args:
            embeddings: ``(b, dim)``, ``u``, not normalised.
            tokens: ``(b, n, memory_dim)``.
            levels: of ``0..N``; default the last.
            pairs: ``(b, b)`` bool, the only pairs to compute, together with their mirrors: see :func:`closed`.
            grid: ``(h, w)`` of the tokens, for positions.
            distributed: divide the tiles among the processes, all of which must hold the same rows, see
                :func:`~crossattn_dml.distributed.gather_rows`; each gets all similarities.

        Returns:
            ``(b, b)`` for each level: row anchor, column candidate, in ``[-1, 1]``, at least float32. The diagonal
            means nothing. Pairs that were not to be computed are NaN: give the loss the mask as well.

        Raises:
            ValueError: for shapes that do not fit, or levels that there are not.
        """
        levels = self._levels(levels)
        work = self._begin(embeddings, tokens, grid, last=max(levels))
        z = unit(work.embeddings)
        wanted = None if pairs is None else closed(pairs)
        found: dict[int, Tensor] = {}
        if 0 in levels:
            found[0] = cosines(z)
        above = [level for level in levels if level]
        if above:
            stacked = self._all_tiles(work, z, above, wanted, distributed)
            found |= dict(zip(above, stacked))
        if wanted is not None:
            found = {level: S.masked_fill(~wanted, torch.nan) for level, S in found.items()}
        return found

    def between(
        self,
        embeddings: Tensor,
        tokens: Tensor,
        others: Tensor,
        other_tokens: Tensor,
        *,
        levels: Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> dict[int, Tensor]:
        """Similarities of some images with others: queries with what they may find.

        Args:
            embeddings, tokens: of the anchors, ``(b, dim)`` and ``(b, n, memory_dim)``.
            others, other_tokens: of the candidates, ``m`` of them.
            levels, grid: as in :meth:`forward`.

        Returns:
            ``(b, m)`` for each level: row anchor, column candidate, in ``[-1, 1]``.

        Example:
            >>> stack = CrossAttentionStack(8, 12, blocks=2, heads=2)
            >>> u, X = torch.randn(5, 8), torch.randn(5, 6, 12)
            >>> whole, part = stack(u, X)[2], stack.between(u[:2], X[:2], u[2:], X[2:])[2]
            >>> torch.allclose(part, whole[:2, 2:], atol=1e-6)
            True
        """
        levels = self._levels(levels)
        anchors = self._begin(embeddings, tokens, grid, last=max(levels))
        candidates = self._begin(others, other_tokens, grid, last=max(levels))
        z, other_z = unit(anchors.embeddings), unit(candidates.embeddings)
        found: dict[int, Tensor] = {}
        if 0 in levels:
            with torch.autocast(z.device.type, enabled=False):
                found[0] = z @ other_z.mT
        above = [level for level in levels if level]
        if above:
            own = self.similarity == "anchor"
            ends, other_ends = (
                self._own(images, above) if own else ends.expand(len(above), -1, -1)
                for images, ends in ((anchors, z), (candidates, other_z))
            )
            tile, _ = self._tile(anchors, candidates, ends, other_ends, above, None, same=False)
            found |= dict(zip(above, tile))
        return found

    def conditional(
        self,
        embeddings: Tensor,
        tokens: Tensor,
        *,
        partners: Tensor | None = None,
        levels: Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> dict[int, Tensor]:
        """The conditional embeddings themselves, not normalised.

        Args:
            embeddings, tokens, levels, grid: as in :meth:`forward`.
            partners: ``(m,)`` indices of the images to condition on; default all of the batch.

        Returns:
            ``(b, m, dim)`` for each level: ``p[i|j]`` of every image ``i`` given each partner ``j``.
        """
        levels = self._levels(levels)
        work = self._begin(embeddings, tokens, grid, last=max(levels))
        every = partners is None
        other = work if partners is None else work.map(lambda values: values[partners])
        found: dict[int, Tensor] = {}
        for level, ij, ji in self._climb(work, other, same=every):
            if level == 0 and 0 in levels:
                found[0] = work.embeddings[:, None].expand(-1, len(other.stream), -1)
            elif level in levels:
                found[level] = self.leave(ij if self.hierarchy == "mutual" else ji.transpose(0, 1))
        return found

    def attention_maps(
        self,
        embeddings: Tensor,
        tokens: Tensor,
        *,
        levels: Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> dict[int, Tensor]:
        """Where each block looks: ``(b, b, heads, n)`` weights over the tokens of the first image, asked by the second.

        For diagnostics: unlike the fused attention of training it holds all weights. Arguments as in :meth:`forward`,
        levels from 1.
        """
        levels = self._levels(levels)
        work = self._begin(embeddings, tokens, grid, last=max(levels))
        b, found = len(work.embeddings), dict[int, Tensor]()
        for level, ij, ji in self._climb(work, work, same=True):
            if level + 1 in levels:
                query = ji.transpose(0, 1) if self.hierarchy == "mutual" else ij
                block = self.block(level + 1)
                weights = block.weights(block.queries(query), work.memory[level][0])
                found[level + 1] = rearrange(weights, "i h j n -> i j h n").expand(b, b, -1, -1)
        return found

    def block(self, level: int) -> CrossAttentionBlock:
        """The block that leads to ``level``, from 1."""
        module: Any = self.blocks[min(level, len(self.blocks)) - 1]
        return module

    # --- Pairs (section 3.6) ---

    def _begin(self, embeddings: Tensor, tokens: Tensor, grid: tuple[int, int] | None, last: int) -> _Images:
        """Streams at level 0, keys and values of every block, once per image."""
        b, n = tokens.shape[:2]
        if embeddings.shape != (b, self.dim) or tokens.shape != (b, n, self.memory_dim):
            raise ValueError(
                f"expected embeddings (b, {self.dim}) and tokens (b, n, {self.memory_dim}), "
                f"got {tuple(embeddings.shape)} and {tuple(tokens.shape)}"
            )
        # Streams and similarities stay in float32 where autocast gives less.
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        entered = self.enter(embeddings)
        positions = self._positions(grid, n, tokens)
        memory: list[tuple[Tensor, Tensor]] = []
        for level in range(1, last + 1):
            again = level > 1 and len(self.blocks) == 1
            memory.append(memory[0] if again else self.block(level).keys_values(tokens, positions))
        return _Images(embeddings, entered.to(embeddings.dtype), memory)

    def _climb(self, images: _Images, partners: _Images, *, same: bool) -> Any:
        """Yield ``(level, p, mirror)`` from level 0: ``(i, j, width)`` with memory ``images`` and the mirror
        ``(j, i, width)`` with memory ``partners``. On level 0 they only broadcast to that: the first block's queries
        are those of single images, made once."""
        if self.hierarchy == "mutual":
            ij, ji = images.stream[:, None], partners.stream[:, None]
        else:
            ij, ji = partners.stream[None], images.stream[None]
        yield 0, ij, ji
        for level, (memory_i, memory_j) in enumerate(zip(images.memory, partners.memory), start=1):
            block = self.block(level)
            mutual = self.hierarchy == "mutual"
            # Both directions read the level below: neither may be replaced before the other is done.
            new = block(ij, block.queries(ji.transpose(0, 1) if mutual else ij), *memory_i)
            ji = new if same else block(ji, block.queries(ij.transpose(0, 1) if mutual else ji), *memory_j)
            ij = new
            yield level, ij, ji

    def _all_tiles(
        self, work: _Images, z: Tensor, levels: list[int], wanted: Tensor | None, distributed: bool
    ) -> Tensor:
        """``(levels, b, b)``, tile by tile."""
        b = len(z)
        rank, number = processes() if distributed else (0, 1)
        tile = min(self.tile or b, -(-b // number))
        tiled = tile < b
        parts = work.split(tile)
        ends = (z if self.similarity != "anchor" else self._own(work, levels)).expand(len(levels), b, -1)
        end_parts = ends.split(tile, dim=1)
        masks = None if wanted is None else [row.split(tile, dim=1) for row in wanted.cpu().split(tile)]
        blocks: list[list[Tensor]] = [
            [z.new_zeros(len(levels), len(i.stream), len(j.stream)) for j in parts] for i in parts
        ]
        computed = False
        for i, j in _share(len(parts), number)[rank]:
            mask = None if masks is None else masks[i][j]
            if mask is not None and not mask.any():
                continue

            def similarities(i: int = i, j: int = j, mask: Tensor | None = mask) -> tuple[Tensor, Tensor]:
                return self._tile(parts[i], parts[j], end_parts[i], end_parts[j], levels, mask, same=i == j)

            if tiled and torch.is_grad_enabled():
                result: Any = checkpoint(similarities, use_reentrant=False)
                blocks[i][j], blocks[j][i] = result
            else:
                blocks[i][j], blocks[j][i] = similarities()
            computed = True
        S = torch.cat([torch.cat(row, dim=2) for row in blocks], dim=1)
        if not computed:  # nothing to do here, and yet distributed training waits for every gradient
            S = S + 0 * sum(parameter.sum() for parameter in self.parameters())
        return sum_across(S) if distributed else S

    def _tile(
        self,
        images: _Images,
        partners: _Images,
        ends_i: Tensor,
        ends_j: Tensor,
        levels: list[int],
        mask: Tensor | None,
        *,
        same: bool,
    ) -> tuple[Tensor, Tensor]:
        """``(levels, i, j)`` similarities of a tile and ``(levels, j, i)`` of its mirror."""
        if mask is not None and not mask.all():
            return self._listed(images, partners, ends_i, ends_j, levels, mask, same=same)
        found: list[tuple[Tensor, Tensor]] = []
        for level, ij, ji in self._climb(images, partners, same=same):
            if level not in levels:
                continue
            place = levels.index(level)
            p, mirror = self._unit(ij), self._unit(ji)
            with torch.autocast(p.device.type, enabled=False):
                if self.similarity == "mutual":
                    S = torch.einsum("ijd,jid->ij", p, mirror)
                    found.append((S, S.mT))
                    continue
                if (
                    self.hierarchy == "mutual"
                ):  # the candidate's embedding given the anchor lies in the mirror
                    p, mirror = mirror.transpose(0, 1), p.transpose(0, 1)
                S = torch.einsum("id,ijd->ij", ends_i[place], p)
                found.append((S, torch.einsum("jd,jid->ji", ends_j[place], mirror)))
        tile, mirrored = (torch.stack(values) for values in zip(*found))
        return tile, mirrored

    def _listed(
        self,
        images: _Images,
        partners: _Images,
        ends_i: Tensor,
        ends_j: Tensor,
        levels: list[int],
        mask: Tensor,
        *,
        same: bool,
    ) -> tuple[Tensor, Tensor]:
        """The same for the pairs of ``mask (i, j)`` alone: for each image a padded list of its partners."""
        rows = images if same else _Images.joined(images, partners)
        ends = ends_i if same else torch.cat([ends_i, ends_j], dim=1)
        n_i, n_j = mask.shape
        if not same:
            whole = mask.new_zeros(n_i + n_j, n_i + n_j)
            whole[:n_i, n_i:], whole[n_i:, :n_i] = mask, mask.mT
            mask = whole
        m, slots = len(mask), int(mask.sum(1).max())
        first, second = mask.nonzero(as_tuple=True)  # sorted by image
        slot = mask.cumsum(1)[first, second] - 1
        mirror = torch.arange(m * slots).reshape(m, slots)  # padding asks with itself, and is never read
        partner = torch.arange(m)[:, None].repeat(1, slots)
        partner[first, slot] = second
        mirror[first, slot] = second * slots + (mask.cumsum(1)[second, first] - 1)
        device = rows.stream.device
        first, second, slot, mirror, partner = (
            index.to(device, non_blocking=True) for index in (first, second, slot, mirror.flatten(), partner)
        )
        mutual = self.hierarchy == "mutual"
        stream = rows.stream[:, None].expand(m, slots, -1) if mutual else rows.stream[partner]
        found: list[Tensor] = []
        for level, memory in enumerate(rows.memory, start=1):
            block = self.block(level)
            asking = stream.flatten(0, 1)[mirror].unflatten(0, (m, slots)) if mutual else stream
            stream = block(stream, block.queries(asking), *memory)
            if level not in levels:
                continue
            p = self._unit(stream).flatten(0, 1)
            here = first * slots + slot
            if self.similarity == "mutual":
                values = (p[here] * p[mirror[here]]).sum(-1)
            else:
                candidate = p[mirror[here]] if mutual else p[here]
                values = (ends[levels.index(level)][first] * candidate).sum(-1)
            found.append(values.new_zeros(m, m).index_put((first, second), values))
        S = torch.stack(found)
        return (S, S) if same else (S[:, :n_i, n_i:], S[:, n_i:, :n_i])

    def _own(self, work: _Images, levels: list[int]) -> Tensor:
        """``(levels, b, dim)``: each image given itself, normalised."""
        stream, found = work.stream[:, None], list[Tensor]()
        for level, memory in enumerate(work.memory, start=1):
            block = self.block(level)
            stream = block(stream, block.queries(stream), *memory)
            if level in levels:
                found.append(self._unit(stream[:, 0]))
        return torch.stack(found)

    def _unit(self, stream: Tensor) -> Tensor:
        vectors = self.leave(stream)
        return unit(vectors.to(torch.promote_types(vectors.dtype, torch.float32)))

    def _levels(self, levels: Sequence[int] | None) -> list[int]:
        known = sorted(set(levels)) if levels is not None else [self.depth]
        if not known or not 0 <= known[0] <= known[-1] <= self.depth:
            raise ValueError(f"levels must be in 0..{self.depth}, got {levels}")
        return known

    def _positions(self, grid: tuple[int, int] | None, n: int, tokens: Tensor) -> Tensor | None:
        if self.positions == "none":
            return None
        if grid is None or grid[0] * grid[1] != n:
            raise ValueError(f"positions need the (h, w) grid of {n} tokens, got {grid}")
        from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return build_sincos2d_pos_embed(list(grid), self.width, dtype=dtype, device=tokens.device)


class _Images(NamedTuple):
    """Some images of the batch: embeddings, streams at level 0 ``(b, width)``, keys and values of each block."""

    embeddings: Tensor
    stream: Tensor
    memory: list[tuple[Tensor, Tensor]]

    def map(self, change: Callable[[Tensor], Tensor]) -> _Images:
        memory = [(change(keys), change(values)) for keys, values in self.memory]
        return _Images(change(self.embeddings), change(self.stream), memory)

    def split(self, size: int) -> list[_Images]:
        # Tensor.split gathers the gradients of all parts at once; an index for each part would fill a whole tensor.
        embeddings, streams = self.embeddings.split(size), self.stream.split(size)
        memory = [(keys.split(size), values.split(size)) for keys, values in self.memory]
        return [
            _Images(embeddings[part], streams[part], [(keys[part], values[part]) for keys, values in memory])
            for part in range(len(streams))
        ]

    @staticmethod
    def joined(first: _Images, second: _Images) -> _Images:
        memory = [
            (torch.cat([k, k2]), torch.cat([v, v2])) for (k, v), (k2, v2) in zip(first.memory, second.memory)
        ]
        embeddings = torch.cat([first.embeddings, second.embeddings])
        return _Images(embeddings, torch.cat([first.stream, second.stream]), memory)


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis; zeros stay zeros.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    return functional.normalize(vectors, dim=-1, eps=1e-12)


def cosines(z: Tensor) -> Tensor:
    """``(b, b)`` inner products of ``z (b, d)``, unit vectors, in their own precision also under autocast: ``S^0``.

    Example:
        >>> cosines(torch.eye(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    with torch.autocast(z.device.type, enabled=False):
        return z @ z.mT


def closed(pairs: Tensor) -> Tensor:
    """``pairs (b, b)`` and their mirrors, without the diagonal: what a stack computes, and what its loss may use.

    Example:
        >>> closed(torch.tensor([[True, True], [False, False]])).tolist()
        [[False, True], [True, False]]
    """
    both = pairs | pairs.mT
    return both & ~torch.eye(len(both), dtype=torch.bool, device=both.device)


def _share(parts: int, number: int) -> list[list[tuple[int, int]]]:
    """Tiles ``(i, j)``, ``i <= j``, for each of ``number`` processes: those off the diagonal cost twice as much."""
    shares: list[list[tuple[int, int]]] = [[] for _ in range(number)]
    loads = [0] * number
    tiles = [(i, j) for i in range(parts) for j in range(i, parts)]
    for i, j in sorted(tiles, key=lambda tile: tile[0] == tile[1]):
        least = loads.index(min(loads))
        shares[least].append((i, j))
        loads[least] += 1 if i == j else 2
    return shares


def _expect(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} {value}: expected {expected}; change {name}")


def _among(name: str, value: str, known: tuple[str, ...]) -> None:
    _expect(name, value, value in known, " or ".join(known))
