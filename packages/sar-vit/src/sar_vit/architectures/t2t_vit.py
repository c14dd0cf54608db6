r"""T2T-ViT: patch tokens made in two steps, each looking at overlapping neighbourhoods of the step before.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021; token
performer after Choromanski et al., "Rethinking Attention with Performers", ICLR 2021.

Own code under the licence of this package. The names of the weights are those of the authors' release
(Clear BSD licence), so that its checkpoints load; see :func:`sar_vit.architectures.load_published`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from einops import einsum, rearrange
from timm.layers import Mlp, resample_abs_pos_embed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional

from .layers import Block, ClassTokenTransformer, Size, linear_rates, pair, strided

TokenType = Literal["performer", "transformer"]

_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding of the three soft splits


class SelfAttention(Attention):
    """timm's attention of a ViT, which also tells its queries and keys.

    Its ``forward`` is timm's own, so that :class:`attnmap_core.backbones.AttentionTap` reads it.

    Example:
        >>> q, k = SelfAttention(8, num_heads=2).queries_and_keys(torch.zeros(1, 5, 8))
        >>> q.shape, k.shape
        (torch.Size([1, 2, 5, 4]), torch.Size([1, 2, 5, 4]))
    """

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q and k ``(b, heads, n, d)`` of normed tokens ``(b, n, c)``."""
        q, k, _ = rearrange(
            self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads
        )
        return self.q_norm(q), self.k_norm(k)


class TokenPerformer(nn.Module):
    r"""Attention of linear cost between neighbourhoods, from ``dim_in`` to ``dim`` channels.

    .. math:: y_t = \frac{\phi(q_t) \sum_s \phi(k_s) v_s^T}{\phi(q_t) \cdot \sum_s \phi(k_s) + 10^{-8}},
        \qquad \phi(t) = \frac{\exp(W t - \lVert t \rVert^2 / 2)}{\sqrt{f}}

    W is a random orthogonal ``(f, dim)`` matrix times :math:`\sqrt f`, ``f = dim / 2``: drawn once, never
    trained, part of the state dict. The values are the skip connection, since the width changes.

    Args:
        dim_in: channels of the tokens that come in.
        dim: channels e of the tokens that go out.
        dropout: probability after the projection and after the MLP.

    Example:
        >>> TokenPerformer(27, 8)(torch.zeros(2, 5, 27)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, dim_in: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        features = dim // 2
        self.norm1 = nn.LayerNorm(dim_in)
        self.kqv = nn.Linear(dim_in, 3 * dim)
        self.w = nn.Parameter(torch.empty(features, dim), requires_grad=False)
        nn.init.orthogonal_(self.w, gain=math.sqrt(features))
        self.proj = nn.Linear(dim, dim)
        self.dp = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(b, n, dim_in)`` to tokens ``(b, n, dim)``."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)  # in this order in the release
        x = v + self.dp(self.proj(self._attend(q, k, v)))
        return x + self.mlp(self.norm2(x))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The exponentials overflow in half precision: everything between the linears is float32 or wider.
        device, dtype = q.device.type, torch.promote_types(q.dtype, torch.float32)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._attend_wide(q.to(dtype), k.to(dtype), v.to(dtype)).to(v.dtype)
        return self._attend_wide(q.to(dtype), k.to(dtype), v.to(dtype)).to(v.dtype)

    def _attend_wide(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi_q, phi_k = self._features(q), self._features(k)
        summed = einsum(phi_k, v, "b n f, b n e -> b f e")
        total = einsum(phi_q, phi_k.sum(dim=1), "b n f, b f -> b n")
        return einsum(phi_q, summed, "b n f, b f e -> b n e") / (rearrange(total, "b n -> b n 1") + 1e-8)

    def _features(self, t: Tensor) -> Tensor:
        """φ: ``(b, n, e)`` to ``(b, n, f)``, all positive."""
        half_norm = t.square().sum(dim=-1, keepdim=True) / 2
        return torch.exp(functional.linear(t, self.w.to(t.dtype)) - half_norm) / math.sqrt(len(self.w))


class TokenAttention(nn.Module):
    """Self-attention with one head that changes the width; its values are the skip connection.

    Args:
        dim_in: channels of the tokens that come in.
        dim: channels of the tokens that go out.
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.scale = dim_in**-0.5  # as released: of the width that comes in, not of the head
        self.qkv = nn.Linear(dim_in, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(b, n, dim_in)`` to tokens ``(b, n, dim)``."""
        q, k, v = rearrange(self.qkv(x), "b n (three d) -> three b 1 n d", three=3)
        y = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return rearrange(v, "b 1 n d -> b n d") + self.proj(rearrange(y, "b 1 n d -> b n d"))


class TokenTransformer(nn.Module):
    """Full attention in place of :class:`TokenPerformer`: the ``T2T-ViT_t`` models, 6.1 instead of 4.8 G.

    Args:
        dim_in: channels of the tokens that come in.
        dim: channels of the tokens that go out.

    Example:
        >>> TokenTransformer(27, 8)(torch.zeros(2, 5, 27)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim_in)
        self.attn = TokenAttention(dim_in, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(b, n, dim_in)`` to tokens ``(b, n, dim)``."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """The two steps from pixels to tokens and the linear layer after the third split: the weights only.

    :class:`T2TViT` runs them, because it decides what is recomputed.

    Args:
        embed_dim: channels of the tokens.
        token_dim: channels between the steps.
        token_type: of the two steps.
        dropout: of :class:`TokenPerformer`.
        in_chans: channels of the images.
    """

    def __init__(
        self, embed_dim: int, token_dim: int, token_type: TokenType, dropout: float, in_chans: int
    ) -> None:
        super().__init__()
        window = token_dim * _SPLITS[1][0] ** 2
        widths = (in_chans * _SPLITS[0][0] ** 2, window)
        if token_type == "performer":
            self.attention1, self.attention2 = (TokenPerformer(width, token_dim, dropout) for width in widths)
        else:
            self.attention1, self.attention2 = (TokenTransformer(width, token_dim) for width in widths)
        self.project = nn.Linear(window, embed_dim)


class T2TViT(ClassTokenTransformer):
    """T2T-ViT: three overlapping soft splits with attention between them, then a deep and narrow ViT.

    The position table is the fixed sinusoid over the flattened positions of ``img_size``'s grid; for images
    of another size it is resampled as a picture, bicubic, as for fine-tuning in the release. Frozen weights
    (the table, W of the performers) are parameters without gradient.

    Args:
        num_classes: outputs of the head; 0 for features.
        img_size: pixels the position table is made for.
        embed_dim: channels ``c``.
        depth: blocks.
        num_heads: of each block.
        mlp_ratio: hidden channels of the MLPs over ``embed_dim``.
        token_type: ``"performer"`` or ``"transformer"``, the attention between the soft splits.
        token_dim: channels between the soft splits.
        token_dropout: of the performers.
        drop_path_rate: of the last block, growing linearly from 0 at the first.
        last_block: switches of the last :class:`~sar_vit.architectures.layers.Block`.
        in_chans: channels of the images.

    Raises:
        ValueError: for an unknown ``token_type`` or heads that do not divide the channels.

    Example:
        >>> model = T2TViT(10, 64, embed_dim=12, depth=2, num_heads=3, token_dim=4)
        >>> model(torch.zeros(1, 3, 64, 64)).shape, model.key_grid(), model.key_grid((32, 64))
        (torch.Size([1, 10]), (4, 4), (2, 4))
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: Size = 224,
        *,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        token_type: TokenType = "performer",
        token_dim: int = 64,
        token_dropout: float = 0.1,
        drop_path_rate: float = 0.0,
        last_block: Mapping[str, bool] | None = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__(num_classes, img_size, embed_dim, reduction=16, crop_pct=0.9)
        if token_type not in ("performer", "transformer"):
            raise ValueError(f"token_type must be performer or transformer, got {token_type!r}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.tokens_to_token = TokensToToken(embed_dim, token_dim, token_type, token_dropout, in_chans)
        h, w = self.token_grid()
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.pos_embed = nn.Parameter(sinusoid_table(1 + h * w, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, SelfAttention(embed_dim, num_heads), mlp_ratio, rate)
            for rate in linear_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self._finish(last_block)

    @property
    def all_blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return cast(list[Block], list(self.blocks))

    def token_grid(self, img_size: Size | None = None) -> tuple[int, int]:
        """One sixteenth of the image: rows and columns of the last block's patch tokens and keys."""
        grid = pair(img_size or self.img_size)
        for split in _SPLITS:
            grid = strided(grid, *split)
        return grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens ``(b, 1 + n, c)`` after the final norm, the class token first."""
        grid = self.token_grid((x.shape[2], x.shape[3]))
        tokens = self.tokens(x)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self._positions(self.pos_embed, grid)
        for block in self.blocks:
            tokens = self._run(block, tokens)
        return self.norm(tokens)

    def tokens(self, x: Tensor) -> Tensor:
        """Patch tokens ``(b, n, c)`` of images, before class token and positions."""
        steps = self.tokens_to_token
        for split, attention in zip(_SPLITS, (steps.attention1, steps.attention2)):
            h, _ = strided((x.shape[2], x.shape[3]), *split)
            x = rearrange(self._run(attention, _soft_split(x, *split)), "b (h w) c -> b c h w", h=h)
        return steps.project(_soft_split(x, *_SPLITS[2]))

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Resample the position table of a state dict to the grid of ``img_size``."""
        state = dict(state)
        table = state.get("pos_embed")
        if table is not None and table.ndim == 3 and table.shape != self.pos_embed.shape:
            side = math.isqrt(table.shape[1] - 1)
            if side > 0 and side * side == table.shape[1] - 1:
                state["pos_embed"] = resample_abs_pos_embed(table, list(self.token_grid()), [side, side])
        return state

    def _positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        own = self.token_grid()
        return table if grid == own else resample_abs_pos_embed(table, list(grid), list(own))


def sinusoid_table(positions: int, channels: int) -> Tensor:
    r"""Fixed position code, float32 ``(1, positions, channels)``.

    Position p, channel j: sine for even j and cosine for odd j of
    :math:`p / 10000^{2 \lfloor j/2 \rfloor / c}`.

    Example:
        >>> sinusoid_table(2, 4)[0, 1]
        tensor([0.8415, 0.5403, 0.0100, 0.9999])
    """
    channel = torch.arange(channels)
    rates = 10000.0 ** (-2.0 * (channel // 2).double() / channels)
    angles = rearrange(torch.arange(positions).double(), "p -> p 1") * rates
    table = torch.where(channel % 2 == 0, angles.sin(), angles.cos())
    return rearrange(table, "p c -> 1 p c").float()


def _soft_split(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Overlapping windows ``(b, n, c kernel²)`` of a map ``(b, c, h, w)``."""
    return rearrange(functional.unfold(x, kernel, stride=stride, padding=padding), "b c n -> b n c")
