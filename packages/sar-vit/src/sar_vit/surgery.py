r"""SAR on any vision transformer: the change of its last block, and the collector that feeds the loss.

Peruzzo et al., "Spatial Entropy as an Inductive Bias for Vision Transformers", arXiv 2206.04636, section 3.2. The
standard block and SAR's, which has neither the skip connection around the attention nor the norm before the MLP:

.. math:: z' = \mathrm{MSA}(\mathrm{LN}_1(z)) + z \;(1), \qquad z_{out} = \mathrm{MLP}(\mathrm{LN}_2(z')) + z' \;(2)
.. math:: z' = \mathrm{MSA}(\mathrm{LN}_1(z)) \;(10), \qquad z_{out} = \mathrm{MLP}(z') + z' \;(11)

Two lines change a training::

    model = apply_sar(timm.create_model("deit_small_patch16_224"))
    ...
    loss = cross_entropy(model(images), labels) + 0.01 * spatial_entropy_loss(model)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from attnmap_core.backbones import AttentionRecord, AttentionTap, Backbone
from torch import Tensor, nn

from .entropy import Query, Similarity, SpatialEntropyLoss, maps_of_logits, similarity_maps

_Model = TypeVar("_Model", bound=nn.Module)


class Ablation(NamedTuple):
    """A row of the paper's Table 1b.

    Attributes:
        switches: of :func:`apply_sar`: ``msa_skip``, ``mlp_norm`` and ``mlp_skip``.
        weight: λ of the spatial entropy loss.
        top1: published accuracy in percent (ViT-S/16, IN-100, 100 epochs).
    """

    switches: Mapping[str, bool]
    weight: float
    top1: float


def _row(msa_skip: bool, mlp_norm: bool, mlp_skip: bool, weight: float, top1: float) -> Ablation:
    switches = {"msa_skip": msa_skip, "mlp_norm": mlp_norm, "mlp_skip": mlp_skip}
    return Ablation(MappingProxyType(switches), weight, top1)


ABLATION: Mapping[str, Ablation] = MappingProxyType({
    "A": _row(True, True, True, 0.0, 74.22),  # the plain model
    "B": _row(False, True, True, 0.0, 74.64),
    "C": _row(False, False, True, 0.0, 75.72),
    "D": _row(False, False, False, 0.0, 73.76),
    "E": _row(True, True, True, 0.01, 74.78),
    "F": _row(False, False, True, 0.01, 76.72),  # SAR
})  # fmt: skip
"""Rows A to F of Table 1b: ``apply_sar(model, **ABLATION["F"].switches)`` with ``ABLATION["F"].weight``."""


def apply_sar(
    model: _Model,
    msa_skip: bool = False,
    mlp_norm: bool = False,
    mlp_skip: bool = True,
    query: Query = "cls",
    *,
    collect: bool = True,
) -> _Model:
    """Change the last block of ``model`` in place and have its queries and keys collected for the loss.

    Names in the state dict stay; with ``mlp_norm=False`` the last block's ``norm2.*`` disappear, 2 numbers for each
    channel. Attention stays fused: one query row of logits is computed when the loss asks for it. Every forward pass
    in training mode with gradient is collected, and none other unless asked for (:meth:`Collector.collecting`).

    Do this before ``torch.compile`` and before wrapping for distributed training. A deep copy, such as an average of
    the weights, has its own collector. Gradient checkpointing works (not in its reentrant form).

    Besides timm's ViT, DeiT, DINOv2 and DINOv3, and without class token Swin and PVT-v2, this takes any network with
    ``last_block``, ``set_last_block(msa_skip, mlp_norm, mlp_skip)`` and ``key_grid(image_size)``, such as those of
    :mod:`sar_vit.architectures`, whose last block's attention an :class:`attnmap_core.backbones.AttentionTap` reads.

    Args:
        model: a timm model, a :class:`attnmap_core.backbones.Backbone`, or one of :mod:`sar_vit.architectures`.
        msa_skip: keep the skip connection around the last attention.
        mlp_norm: keep the norm before the last MLP.
        mlp_skip: keep the skip connection around the last MLP.
        query: whose similarity to the patches counts: ``"cls"`` the class token, ``"avg"`` the mean patch, for
            networks without class token.
        collect: False leaves the collector out, to train in this form without the loss.

    Returns:
        The model itself.

    Raises:
        ValueError: for a network without a known last block, ``query="cls"`` without class token, a model changed
            before, or one that is compiled or wrapped already.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
        >>> before = set(model.state_dict())
        >>> model = apply_sar(model)
        >>> sorted(before - set(model.state_dict()))
        ['blocks.1.norm2.bias', 'blocks.1.norm2.weight']
        >>> logits = model(torch.randn(2, 3, 64, 64))
        >>> loss = logits.logsumexp(1).mean() + 0.01 * spatial_entropy_loss(model)
        >>> loss.backward()
    """
    for wrapper in ("_orig_mod", "module"):
        if hasattr(model, wrapper):
            raise ValueError(
                f"{type(model).__name__} wraps the model already; call apply_sar on the model, then compile or wrap it"
            )
    net: Any = model.model if isinstance(model, Backbone) else model
    if isinstance(net.__dict__.get("sar"), Collector):
        raise ValueError(
            f"this {type(net).__name__} went through apply_sar before; create it anew to change switches"
        )
    if query not in ("cls", "avg"):
        raise ValueError(f"query must be cls or avg, got {query!r}")
    block = _last_block(net)
    switches = {"msa_skip": msa_skip, "mlp_norm": mlp_norm, "mlp_skip": mlp_skip}
    own = hasattr(net, "set_last_block")
    if not own:
        from . import blocks

        blocks.switched_class(block)  # refuses what it does not know, before anything is changed
    if own or hasattr(block.attn, "q_norm"):
        net.sar = Collector(model, net, block, query, switches, collect)  # refuses likewise
    elif query == "cls":
        raise ValueError(
            f"this {type(net).__name__} has no class token; use query='avg' instead of query='cls'"
        )
    if own:
        net.set_last_block(**switches)
    else:
        blocks.switch(block, **switches)  # pyright: ignore[reportPossiblyUnboundVariable]
    if "sar" not in net.__dict__:  # these tell their queries and keys only now
        net.sar = Collector(model, net, block, query, switches, collect)
    return model


def spatial_entropy_loss(model: nn.Module, **options: Any) -> Tensor:
    """``L_se`` (Eq. 9) of the forward passes since the last call; see :class:`SpatialEntropyLoss`.

    Args:
        model: changed by :func:`apply_sar`, bare, wrapped or part of another.
        **options: of :class:`SpatialEntropyLoss`.

    Returns:
        A scalar with gradient, unless the options ask for another reduction.

    Raises:
        ValueError: if ``model`` has no part that went through :func:`apply_sar`.
        RuntimeError: if no forward pass was collected.

    Example:
        >>> import timm, torch
        >>> model = apply_sar(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1))
        >>> _ = model(torch.randn(1, 3, 64, 64))
        >>> bool(spatial_entropy_loss(model) >= 0)
        True
    """
    return SpatialEntropyLoss(**options)(model)


class Collector:
    """Queries and keys of the last block, forward pass after forward pass, until the loss takes them.

    :func:`apply_sar` puts it on the network as ``.sar``. It is no module: no weight, nothing in the state dict.

    Args:
        model: what was given to :func:`apply_sar`.
        net: the network itself.
        block: its last block.
        query: ``"cls"`` or ``"avg"``.
        switches: that the last block has now.
        active: collect in training.

    Attributes:
        query: as given.
        switches: as given.
        heads: of the last block.
        block: the last block.
    """

    def __init__(
        self,
        model: nn.Module,
        net: nn.Module,
        block: nn.Module,
        query: Query,
        switches: Mapping[str, bool],
        active: bool = True,
    ) -> None:
        self.query: Query = query
        self.switches = dict(switches)
        self._net: Any = net
        self.block = block
        self._attention: Any = getattr(block, "attn", block)
        self.heads = int(self._attention.num_heads)
        self._tap = AttentionTap(model, block, query, keep_keys=True).attach(in_training=active)
        self._asked: list[AttentionRecord] = []

    def __len__(self) -> int:
        """Forward passes collected and not yet taken."""
        return len(self._tap) + len(self._asked)

    def __deepcopy__(self, memo: dict[int, Any]) -> Collector:
        # The copy of a model collects its own passes; those that wait stay with the original.
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__ | {"_asked": []}, memo))
        return copied

    def clear(self) -> None:
        """Drop what was collected, with the graphs it holds."""
        self._tap.clear()
        self._asked = []

    @contextmanager
    def collecting(self) -> Generator[None]:
        """Collect the one forward pass that runs inside, also in evaluation mode and without gradient.

        Example:
            >>> import timm, torch
            >>> model = apply_sar(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)).eval()
            >>> with torch.no_grad(), model.sar.collecting():
            ...     _ = model(torch.randn(1, 3, 64, 64))
            >>> spatial_entropy_loss(model, reduction="none").shape
            torch.Size([1, 3])
        """
        with self.recording() as record:
            yield
        self._asked.append(record)

    def recording(self) -> AbstractContextManager[AttentionRecord]:
        """Record the one forward pass that runs inside, apart from those for the loss; :meth:`maps` reads it."""
        return self._tap.recording()

    def take(self, similarity: Similarity = "dot") -> list[Tensor]:
        """Similarity maps of each forward pass since the last call, oldest first; the collector is empty then.

        Args:
            similarity: as in :func:`sar_vit.entropy.similarity_maps`.

        Returns:
            For each pass ``(b, heads, h, w)`` in float32 or float64, each on its own grid.

        Raises:
            ValueError: if the keys do not make up the grid, as with patch dropout.
        """
        records, self._asked = self._asked, []
        try:
            while len(self._tap):
                records.append(self._tap.pop())
            return [self.maps(record, similarity) for record in records]
        finally:
            self.clear()

    def maps(self, record: AttentionRecord, similarity: Similarity = "dot") -> Tensor:
        """Similarity maps ``(b, heads, h, w)`` of one forward pass.

        Args:
            record: of the tap.
            similarity: as in :func:`sar_vit.entropy.similarity_maps`.

        Returns:
            On the grid of that pass.

        Raises:
            ValueError: as :meth:`take`.
        """
        if similarity == "cosine":
            [(q, k)] = record.queries_and_keys()
            return similarity_maps(q, k, self._grid(record, k.shape[2]), kind="cosine")
        logits = record.logits()[:, 0]
        return maps_of_logits(logits, self._grid(record, logits.shape[2]), similarity)

    def key_grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of the last block's patch keys.

        Args:
            image_size: ``(height, width)`` in pixels; default: what the network is made for.

        Returns:
            The grid of the maps.

        Raises:
            ValueError: without a size, if the network has none of its own.
        """
        net = self._net
        embed: Any = getattr(net, "patch_embed", None)
        size: Any = image_size or getattr(net, "img_size", None) or getattr(embed, "img_size", None)
        if size is None:
            raise ValueError(f"{type(net).__name__} is made for no particular size; give image_size")
        h, w = (size, size) if isinstance(size, int) else size
        if hasattr(net, "key_grid"):
            return net.key_grid((h, w))
        if hasattr(net, "blocks"):
            h, w = embed.dynamic_feat_size((h, w))
            return int(h), int(w)
        reduction: int = net.feature_info[-1]["reduction"]
        h, w = -(-h // reduction), -(-w // reduction)
        if getattr(self._attention, "pool", None) is not None:  # PVT-v2's linear attention
            return self._attention.pool.output_size, self._attention.pool.output_size
        if getattr(self._attention, "sr", None) is not None:
            h, w = (side // stride for side, stride in zip((h, w), self._attention.sr.stride))
        return h, w

    def _grid(self, record: AttentionRecord, keys: int) -> tuple[int, int]:
        patches = keys - self._tap.num_prefix_tokens
        if record.image_size is not None:
            h, w = self.key_grid(record.image_size)
            if h * w == patches:
                return h, w
            raise ValueError(
                f"the last block has {patches} patch keys, but images of {record.image_size[0]}x"
                f"{record.image_size[1]} make a grid of {h}x{w}; a map needs each patch: switch patch dropout off"
            )
        try:
            h, w = self.key_grid()
        except ValueError:
            h = w = 0
        if h * w != patches:
            h = w = math.isqrt(patches)
        if h * w != patches:
            raise ValueError(
                f"the last block has {patches} patch keys and the size of the images is not known; call the model "
                "itself with images, not a part of it"
            )
        return h, w


def collectors(model: nn.Module) -> list[Collector]:
    """The collectors of all parts of ``model`` that went through :func:`apply_sar`.

    Args:
        model: bare, compiled, wrapped for distributed training, or with such networks inside.

    Returns:
        One or more.

    Raises:
        ValueError: if there is none.

    Example:
        >>> collectors(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: this Linear has no part that went through apply_sar; call apply_sar(model) before training it
    """
    found = [module.__dict__.get("sar") for module in model.modules()]
    ours = [collector for collector in found if isinstance(collector, Collector)]
    if not ours:
        raise ValueError(
            f"this {type(model).__name__} has no part that went through apply_sar; call apply_sar(model) before "
            "training it"
        )
    return ours


def take_maps(model: nn.Module, similarity: Similarity = "dot") -> list[Tensor]:
    """Similarity maps of all forward passes of ``model`` that were collected, which empties its collectors.

    Args:
        model: as for :func:`collectors`.
        similarity: as in :func:`sar_vit.entropy.similarity_maps`.

    Returns:
        For each pass ``(b, heads, h, w)``; one or more.

    Raises:
        ValueError: without a collector.
        RuntimeError: if nothing was collected.
    """
    found = [maps for collector in collectors(model) for maps in collector.take(similarity)]
    if not found:
        raise RuntimeError(
            "no forward pass was collected since the last call: run the model in training mode with gradient, or in "
            "model.sar.collecting(), and ask for the loss once a step"
        )
    return found


def _last_block(net: Any) -> nn.Module:
    if isinstance(getattr(net, "last_block", None), nn.Module):
        return net.last_block
    stack: Any = net
    for name in ("layers", "stages"):  # Swin, PVT-v2
        stages = getattr(net, name, None)
        if isinstance(stages, (nn.Sequential, nn.ModuleList)) and len(stages):
            stack = stages[-1]
    found: Any = getattr(stack, "blocks", None)
    if (
        not isinstance(found, (nn.Sequential, nn.ModuleList))
        or not len(found)
        or not hasattr(found[-1], "attn")
    ):
        raise ValueError(
            f"{type(net).__name__} has no transformer block with attention at its end; expected a timm ViT, Swin or "
            "PVT-v2, or a network with last_block and set_last_block"
        )
    return found[-1]
