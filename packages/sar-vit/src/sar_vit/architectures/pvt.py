r"""PVT, first version: four stages of shrinking maps, attention to a spatially reduced set of keys.

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
ICCV 2021.

Own code under the licence of this package. The names of the weights are those of the authors' release
(Apache-2.0), so that its checkpoints load; see :func:`sar_vit.architectures.load_published`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .layers import Block, ClassTokenTransformer, Size, linear_rates, pair, strided


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values come from the map reduced by a strided convolution.

    Args:
        dim: channels ``c``.
        num_heads: heads.
        sr_ratio: side of the patch that becomes one key; 1 for plain attention, also to prefix tokens.

    Example:
        >>> attention = SpatialReductionAttention(8, num_heads=2, sr_ratio=2)
        >>> q, k = attention.queries_and_keys(torch.zeros(1, 24, 8), (4, 6))
        >>> q.shape, k.shape
        (torch.Size([1, 2, 24, 4]), torch.Size([1, 2, 6, 4]))
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide dim {dim}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)  # eps 1e-5, unlike the norms of the blocks
        self.q_norm = nn.Identity()  # where hooks find the queries and the keys, as on a timm ViT
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def queries_and_keys(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """q ``(b, heads, n, d)`` and k ``(b, heads, n_k, d)`` of normed tokens ``(b, n, c)`` on ``grid``."""
        dim = self.q.out_features
        q, k = self.q(x), functional.linear(self._reduced(x, grid), self.kv.weight[:dim], self.kv.bias[:dim])
        q, k = (rearrange(t, "b n (heads d) -> b heads n d", heads=self.num_heads) for t in (q, k))
        return self.q_norm(q), self.k_norm(k)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``(b, n, c)`` on ``grid`` to tokens ``(b, n, c)``."""
        q = rearrange(self.q(x), "b n (heads d) -> b heads n d", heads=self.num_heads)
        keys_values = self.kv(self._reduced(x, grid))  # keys first
        k, v = rearrange(keys_values, "b n (two heads d) -> two b heads n d", two=2, heads=self.num_heads)
        y = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, scale=self.scale)
        return self.proj(rearrange(y, "b heads n d -> b n (heads d)"))

    def _reduced(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.sr_ratio == 1:
            return x
        reduced = self.sr(rearrange(x, "b (h w) c -> b c h w", h=grid[0]))
        return self.norm(rearrange(reduced, "b c h w -> b (h w) c"))


class PatchEmbed(nn.Module):
    """Patches of a map to tokens: a convolution whose kernel is its stride, then LayerNorm (eps 1e-5).

    Args:
        in_chans: channels of the map.
        dim: channels of the tokens.
        patch_size: side of a patch. Rows and columns that fill no patch are left out.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens ``(b, h w, c)`` and ``(h, w)`` of a map ``(b, c, H, W)``."""
        x = self.proj(x)
        return self.norm(rearrange(x, "b c h w -> b (h w) c")), (x.shape[2], x.shape[3])


class PyramidVisionTransformer(ClassTokenTransformer):
    """PVT v1. The class token joins before the last stage.

    Position tables are learnt for ``img_size`` and resized bilinearly for images of another size. Images
    whose sides are no multiples of 32 lose the border that fills no patch.

    ``dense=True`` is the form for segmentation: :meth:`forward` gives the maps of the four stages, strides
    4, 8, 16 and 32, neither class token nor final norm nor head are there, and the class token's entry of
    the last position table is not used.

    Args:
        num_classes: outputs of the head; 0 for features.
        img_size: pixels the position tables are made for.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratios: hidden channels of the MLPs over ``embed_dims``.
        sr_ratios: spatial reduction of keys and values in each stage; the last must be 1.
        patch_sizes: of each stage, in pixels of the map before it.
        drop_path_rate: of the last block, growing linearly from 0 at the first over all stages.
        last_block: switches of the last :class:`~sar_vit.architectures.layers.Block`.
        dense: give feature maps instead of logits.
        in_chans: channels of the images.

    Raises:
        ValueError: for sizes that do not fit each other.

    Example:
        >>> sizes = dict(embed_dims=(4, 4, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
        >>> PyramidVisionTransformer(10, 64, **sizes)(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
        >>> dense = PyramidVisionTransformer(img_size=64, dense=True, **sizes)
        >>> [tuple(feature.shape) for feature in dense(torch.zeros(1, 3, 64, 96))]
        [(1, 4, 16, 24), (1, 4, 8, 12), (1, 8, 4, 6), (1, 8, 2, 3)]
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: Size = 224,
        *,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        drop_path_rate: float = 0.0,
        last_block: Mapping[str, bool] | None = None,
        dense: bool = False,
        in_chans: int = 3,
    ) -> None:
        super().__init__(
            0 if dense else num_classes, img_size, embed_dims[-1], math.prod(patch_sizes), crop_pct=0.875
        )
        settings = (embed_dims, depths, num_heads, mlp_ratios, sr_ratios, patch_sizes)
        if len({len(setting) for setting in settings}) != 1:
            raise ValueError(f"one value for each stage is needed, got {settings}")
        if sr_ratios[-1] != 1:
            raise ValueError(
                f"the last stage holds the class token: its sr_ratio must be 1, got {sr_ratios[-1]}"
            )
        self.dense = dense
        self.embed_dims = tuple(embed_dims)
        self.depths = tuple(depths)
        self.patch_sizes = tuple(patch_sizes)
        rates = iter(linear_rates(drop_path_rate, sum(depths)))
        for i, (dim, depth, heads, mlp, sr, patch) in enumerate(zip(*settings)):
            h, w = self._grids(self.img_size)[i]
            prefix = 1 if i == self._last else 0
            table = nn.Parameter(torch.empty(1, prefix + h * w, dim))
            nn.init.trunc_normal_(table, std=0.02)
            blocks = nn.ModuleList(
                Block(dim, SpatialReductionAttention(dim, heads, sr), mlp, next(rates), eps=1e-6)
                for _ in range(depth)
            )
            self.register_parameter(f"pos_embed{i + 1}", table)
            self.add_module(
                f"patch_embed{i + 1}", PatchEmbed(embed_dims[i - 1] if i else in_chans, dim, patch)
            )
            self.add_module(f"block{i + 1}", blocks)
        if not dense:
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dims[-1]))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            self.norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        self._finish(last_block)

    @property
    def all_blocks(self) -> list[Block]:
        """The blocks of all stages, first to last."""
        stages = (getattr(self, f"block{i + 1}") for i in range(len(self.depths)))
        return [block for stage in stages for block in stage]

    def token_grid(self, img_size: Size | None = None) -> tuple[int, int]:
        """Rows and columns of the last stage's map, whose tokens are also the keys."""
        return self._grids(pair(img_size or self.img_size))[-1]

    def forward(self, x: Tensor) -> Any:
        """Logits ``(b, num_classes)`` of images ``(b, 3, H, W)``; :meth:`forward_dense` if ``dense``."""
        return self.forward_dense(x) if self.dense else super().forward(x)

    def forward_dense(self, x: Tensor) -> list[Tensor]:
        """The maps ``(b, c, h, w)`` of all stages, without a class token, before the final norm."""
        features: list[Tensor] = []
        for i in range(len(self.depths)):
            tokens, grid = self._embed(i, x)
            tokens = self._run_stage(i, tokens + self._positions(i, grid), grid)
            x = rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])
            features.append(x)
        return features

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens ``(b, 1 + n, c)`` of the last stage after the final norm, the class token first.

        Raises:
            ValueError: if the model is ``dense``.
        """
        if self.dense:
            raise ValueError(
                "a dense PVT has no class token; call it, or forward_dense, for its feature maps"
            )
        for i in range(self._last):
            tokens, grid = self._embed(i, x)
            tokens = self._run_stage(i, tokens + self._positions(i, grid), grid)
            x = rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])
        tokens, grid = self._embed(self._last, x)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        own = self._table(self._last)[:, :1]  # the class token's own entry is not part of the map
        tokens = tokens + torch.cat([own, self._positions(self._last, grid)], dim=1)
        return self.norm(self._run_stage(self._last, tokens, grid))

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Resize the position tables of a state dict to ``img_size``; leave out what a dense model lacks."""
        fitted = dict(state)
        for i, grid in enumerate(self._grids(self.img_size)):
            name, prefix = f"pos_embed{i + 1}", 1 if i == self._last else 0
            table = fitted.get(name)
            if table is None or table.ndim != 3 or table.shape == self._table(i).shape:
                continue
            side = math.isqrt(max(table.shape[1] - prefix, 0))
            if side > 0 and side * side == table.shape[1] - prefix:
                resized = _resize(table[:, prefix:], (side, side), grid)
                fitted[name] = torch.cat([table[:, :prefix], resized], dim=1)
        if self.dense:
            absent = ("cls_token", "norm.", "head.")
            fitted = {key: value for key, value in fitted.items() if not key.startswith(absent)}
        return fitted

    @property
    def _last(self) -> int:
        return len(self.depths) - 1

    def _grids(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        grids: list[tuple[int, int]] = []
        for patch in self.patch_sizes:
            grid = strided(grid, patch, patch, 0)
            grids.append(grid)
        return grids

    def _embed(self, i: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if i == 0:
            self.token_grid((x.shape[2], x.shape[3]))  # says clearly what is wrong with small images
        return getattr(self, f"patch_embed{i + 1}")(x)

    def _run_stage(self, i: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        for block in getattr(self, f"block{i + 1}"):
            tokens = self._run(block, tokens, grid)
        return tokens

    def _table(self, i: int) -> Tensor:
        return getattr(self, f"pos_embed{i + 1}")

    def _positions(self, i: int, grid: tuple[int, int]) -> Tensor:
        """``(1, h w, c)``: the table of a stage on the grid of these images, without the class token's."""
        table = self._table(i)[:, 1:] if i == self._last else self._table(i)
        return _resize(table, self._grids(self.img_size)[i], grid)


def _resize(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position codes ``(1, h w, c)`` as a picture, bilinear, to another grid."""
    if old == new:
        return table
    picture = rearrange(table, "1 (h w) c -> 1 c h w", h=old[0])
    resized = functional.interpolate(picture, size=new, mode="bilinear", align_corners=False)
    return rearrange(resized, "1 c h w -> 1 (h w) c")
