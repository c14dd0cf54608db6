r"""CvT: queries, keys and values from depth-wise convolutions, tokens from overlapping ones, no positions.

Wu et al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021.

Own code under the licence of this package. The names of the weights are those of the authors' release
(MIT), so that its checkpoints load; see :func:`sar_vit.architectures.load_published`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from .layers import Block, ClassTokenTransformer, Size, linear_rates, pair, strided


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``, the activation of the published weights; timm's has the same values.

    Example:
        >>> QuickGELU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1542,  0.0000,  0.8458])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, element by element."""
        return x * torch.sigmoid(1.702 * x)


class ConvProjection(nn.Module):
    """Depth-wise 3x3 convolution without bias, and batch norm.

    Args:
        dim: channels.
        stride: pixels of the map per token that comes out.
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor, update_statistics: bool = True) -> Tensor:
        """Tokens ``(b, n, c)`` of a map ``(b, c, h, w)``."""
        x = self.conv(x)
        if update_statistics or not self.training:
            x = self.bn(x)
        else:
            x = functional_call(self.bn, {name: value.clone() for name, value in self.bn.named_buffers()}, x)
        return rearrange(x, "b c h w -> b (h w) c")


class ConvAttention(nn.Module):
    """Attention with convolutional projections; keys and values are strided. Prefix tokens skip these.

    The scale is that of the release, of all channels rather than of one head's.

    Args:
        dim: channels ``c``.
        num_heads: heads.
        num_prefix_tokens: tokens before the ``h w`` of the map.
        stride_kv: stride of keys and values.

    Example:
        >>> attention = ConvAttention(8, num_heads=2, num_prefix_tokens=1)
        >>> q, k = attention.queries_and_keys(torch.zeros(1, 1 + 5 * 4, 8), (5, 4))
        >>> q.shape, k.shape, round(attention.scale**-2)
        (torch.Size([1, 2, 21, 4]), torch.Size([1, 2, 7, 4]), 8)
    """

    def __init__(self, dim: int, num_heads: int, num_prefix_tokens: int = 0, stride_kv: int = 2) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide dim {dim}")
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.scale = dim**-0.5
        self.conv_proj_q = ConvProjection(dim, 1)
        self.conv_proj_k = ConvProjection(dim, stride_kv)
        self.conv_proj_v = ConvProjection(dim, stride_kv)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.q_norm = nn.Identity()  # where hooks find the queries and the keys, as on a timm ViT
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def queries_and_keys(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """q ``(b, heads, n, d)`` and k ``(b, heads, n_k, d)`` of normed tokens ``(b, n, c)`` on ``grid``.

        In training mode the batch norms use this batch, as in :meth:`forward`, and do not count it.
        """
        q = self._project(x, grid, self.conv_proj_q, self.proj_q, update_statistics=False)
        k = self._project(x, grid, self.conv_proj_k, self.proj_k, update_statistics=False)
        return self.q_norm(q), self.k_norm(k)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``(b, n, c)`` on ``grid`` to tokens ``(b, n, c)``."""
        q = self.q_norm(self._project(x, grid, self.conv_proj_q, self.proj_q))
        k = self.k_norm(self._project(x, grid, self.conv_proj_k, self.proj_k))
        v = self._project(x, grid, self.conv_proj_v, self.proj_v)
        y = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(rearrange(y, "b heads n d -> b n (heads d)"))

    def _project(
        self,
        x: Tensor,
        grid: tuple[int, int],
        conv: ConvProjection,
        linear: nn.Linear,
        update_statistics: bool = True,
    ) -> Tensor:
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        tokens = conv(rearrange(patches, "b (h w) c -> b c h w", h=grid[0]), update_statistics)
        if self.num_prefix_tokens:
            tokens = torch.cat([prefix.to(tokens.dtype), tokens], dim=1)
        return rearrange(linear(tokens), "b n (heads d) -> b heads n d", heads=self.num_heads)


class ConvEmbed(nn.Module):
    """Overlapping windows of a map to tokens: a convolution, then LayerNorm.

    Args:
        in_chans: channels of the map.
        dim: channels of the tokens.
        kernel: side of a window.
        stride: between windows.
        padding: around the map.
    """

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens ``(b, h w, c)`` and ``(h, w)`` of a map ``(b, c, H, W)``."""
        x = self.proj(x)
        return self.norm(rearrange(x, "b c h w -> b (h w) c")), (x.shape[2], x.shape[3])


class Stage(nn.Module):
    """Embedding and blocks of one resolution; the last stage has the class token.

    Args:
        patch_embed: from the map before.
        dim: channels.
        num_heads: of each block.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        rates: stochastic depth of each block.
        with_cls_token: whether this is the last stage.
        stride_kv: of keys and values.
    """

    def __init__(
        self,
        patch_embed: ConvEmbed,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        rates: Sequence[float],
        with_cls_token: bool,
        stride_kv: int,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        prefix = 1 if with_cls_token else 0
        if with_cls_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(
            Block(dim, ConvAttention(dim, num_heads, prefix, stride_kv), mlp_ratio, rate, QuickGELU)
            for rate in rates
        )


class ConvolutionalVisionTransformer(ClassTokenTransformer):
    """CvT. The class token joins in the last stage; there, keys are on a grid of half the tokens' sides.

    Args:
        num_classes: outputs of the head; 0 for features.
        img_size: pixels that :meth:`key_grid` takes by default; no weight depends on it.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratio: hidden channels of the MLPs over ``embed_dims``.
        kernels: windows of the convolutional token embeddings, one for each stage.
        strides: of these embeddings.
        paddings: of these embeddings.
        stride_kv: of keys and values.
        drop_path_rate: of the last block, growing linearly from 0 inside the last stage; 0 before.
        last_block: switches of the last :class:`~sar_vit.architectures.layers.Block`.
        in_chans: channels of the images.

    Raises:
        ValueError: for sizes that do not fit each other.

    Example:
        >>> model = ConvolutionalVisionTransformer(10, 64, embed_dims=(4, 6, 12), depths=(1, 1, 2))
        >>> model(torch.zeros(1, 3, 64, 64)).shape, model.token_grid(), model.key_grid()
        (torch.Size([1, 10]), (4, 4), (2, 2))
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: Size = 224,
        *,
        embed_dims: Sequence[int] = (64, 192, 384),
        depths: Sequence[int] = (1, 2, 10),
        num_heads: Sequence[int] = (1, 3, 6),
        mlp_ratio: float = 4.0,
        kernels: Sequence[int] = (7, 3, 3),
        strides: Sequence[int] = (4, 2, 2),
        paddings: Sequence[int] = (2, 1, 1),
        stride_kv: int = 2,
        drop_path_rate: float = 0.0,
        last_block: Mapping[str, bool] | None = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__(num_classes, img_size, embed_dims[-1], math.prod(strides), crop_pct=0.875)
        settings = (embed_dims, depths, num_heads, kernels, strides, paddings)
        if len({len(setting) for setting in settings}) != 1:
            raise ValueError(f"one value for each stage is needed, got {settings}")
        self.depths = tuple(depths)
        self.stride_kv = stride_kv
        self.windows = tuple(zip(kernels, strides, paddings))
        for i, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads)):
            last = i == len(depths) - 1
            embed = ConvEmbed(embed_dims[i - 1] if i else in_chans, dim, *self.windows[i])
            rates = linear_rates(drop_path_rate if last else 0.0, depth)
            self.add_module(f"stage{i}", Stage(embed, dim, heads, mlp_ratio, rates, last, stride_kv))
        self.norm = nn.LayerNorm(embed_dims[-1])
        self._finish(last_block)

    @property
    def all_blocks(self) -> list[Block]:
        """The blocks of all stages, first to last."""
        return cast(list[Block], [block for stage in self._stages for block in stage.blocks])

    def token_grid(self, img_size: Size | None = None) -> tuple[int, int]:
        """Rows and columns of the last stage's map, where the queries are."""
        grid = pair(img_size or self.img_size)
        for window in self.windows:
            grid = strided(grid, *window)
        return grid

    def key_grid(self, img_size: Size | None = None) -> tuple[int, int]:
        """Rows and columns of the last block's patch keys: half the token grid, rounded up."""
        return strided(self.token_grid(img_size), 3, self.stride_kv, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens ``(b, 1 + n, c)`` of the last stage after the final norm, the class token first."""
        self.token_grid((x.shape[2], x.shape[3]))  # says clearly what is wrong with small images
        tokens = x
        for i, stage in enumerate(self._stages):
            tokens, grid = stage.patch_embed(x)
            if i == len(self.depths) - 1:
                tokens = torch.cat([stage.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
            for block in stage.blocks:
                tokens = self._run(block, tokens, grid)
            if i < len(self.depths) - 1:
                x = rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])
        return self.norm(tokens)

    @property
    def _stages(self) -> list[Stage]:
        return [getattr(self, f"stage{i}") for i in range(len(self.depths))]
