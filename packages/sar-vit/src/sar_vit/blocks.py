"""timm's transformer blocks with three switches: skip around the attention, norm before the MLP, skip around it.

A block takes on its switched class in place. It keeps its children, their names, its hooks and its weights; what goes
is ``norm2`` with ``mlp_norm=False``, and the stochastic depth of a branch that has lost its skip, because a dropped
sample would be all zeros there. LayerScale stays on its branch.
"""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownParameterType=false
# pyright: reportUntypedBaseClass=false, reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from timm.models import eva, pvt_v2, swin_transformer, vision_transformer
from torch import Tensor, nn


def switched_class(block: nn.Module) -> Any:
    """The class here that takes the place of a block's own.

    Args:
        block: a ViT's ``Block`` or ``EvaBlock``, Swin's or PVT-v2's block; not a subclass that computes something
            else.

    Returns:
        A subclass of the block's class.

    Raises:
        ValueError: for another class.

    Example:
        >>> switched_class(vision_transformer.Block(8, num_heads=2)).__name__
        'SwitchedBlock'
    """
    kinds: list[tuple[Any, Any]] = [
        (vision_transformer.Block, SwitchedBlock),
        (eva.EvaBlock, SwitchedEvaBlock),
        (swin_transformer.SwinTransformerBlock, SwitchedSwinBlock),
        (pvt_v2.Block, SwitchedPvtBlock),
    ]
    kind: Any = type(block)
    for theirs, ours in kinds:
        if kind.forward is theirs.forward:
            return ours
    raise ValueError(
        f"the last block is a {kind.__name__}, which has no known place for the switches; expected timm's Block, "
        "EvaBlock, SwinTransformerBlock or PVT-v2 Block, or an architecture with set_last_block"
    )


def switch(block: nn.Module, *, msa_skip: bool, mlp_norm: bool, mlp_skip: bool) -> None:
    """Give one of timm's blocks its switches, in place.

    Args:
        block: as for :func:`switched_class`.
        msa_skip: keep the skip connection around the attention.
        mlp_norm: keep the norm before the MLP.
        mlp_skip: keep the skip connection around the MLP.

    Raises:
        ValueError: for another class.

    Example:
        >>> block = vision_transformer.Block(8, num_heads=2, drop_path=0.1)
        >>> switch(block, msa_skip=False, mlp_norm=False, mlp_skip=True)
        >>> block.drop_path1, block.norm2, block.drop_path2
        (Identity(), Identity(), DropPath(drop_prob=0.100))
    """
    block.__class__ = switched_class(block)
    children: Any = block
    children.msa_skip, children.mlp_skip = msa_skip, mlp_skip
    if not msa_skip:
        children.drop_path1 = nn.Identity()
    if not mlp_skip:
        children.drop_path2 = nn.Identity()
    if not mlp_norm:
        children.norm2 = nn.Identity()
    children.prepare()


class _Switched:
    """What all switched blocks share; ``drop_path1`` and ``drop_path2`` are timm's."""

    msa_skip: bool
    mlp_skip: bool

    def prepare(self) -> None:
        """Called once the block has this class."""

    def after_attention(self, x: Any, branch: Any) -> Any:
        own: Any = self
        return x + own.drop_path1(branch) if self.msa_skip else branch  # Eq. 1, or 10

    def after_mlp(self, z: Any, branch: Any) -> Any:
        own: Any = self
        return z + own.drop_path2(branch) if self.mlp_skip else branch  # Eq. 2, or 11


class SwitchedBlock(_Switched, vision_transformer.Block):
    """Of ViT, DeiT, DINOv2 and their kin."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens ``(b, n, c)`` to tokens; the rest, such as a mask, goes to the attention."""
        z = self.after_attention(x, self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        return self.after_mlp(z, self.ls2(self.mlp(self.norm2(z))))


class SwitchedEvaBlock(_Switched, eva.EvaBlock):
    """Of EVA, DINOv3 and other ViTs with rotary embedding."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens ``(b, n, c)`` to tokens; the rest, such as the rotary embedding, goes to the attention."""
        branch = self.attn(self.norm1(x), *args, **kwargs)
        z = self.after_attention(x, branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.mlp(self.norm2(z))
        return self.after_mlp(z, branch if self.gamma_2 is None else self.gamma_2 * branch)


class SwitchedPvtBlock(_Switched, pvt_v2.Block):
    """Of PVT-v2. Queries and keys are passed on to ``attn.q_norm`` and ``attn.k_norm``, where a tap finds them."""

    def prepare(self) -> None:
        """Add the two modules without weights, and the hooks that fill them."""
        attention: Any = self.attn
        attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
        attention.queries_and_keys = self.queries_and_keys
        attention.q.register_forward_hook(self.tell_queries)
        attention.kv.register_forward_hook(self.tell_keys)

    def forward(self, x: Tensor, feat_size: Any) -> Tensor:
        """Tokens ``(b, n, c)`` on the grid ``feat_size`` to tokens."""
        z = self.after_attention(x, self.attn(self.norm1(x), feat_size))
        return self.after_mlp(z, self.mlp(self.norm2(z), feat_size))

    def queries_and_keys(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """``(b, heads, n, d)`` each, of what the linear layers ``attn.q`` and ``attn.kv`` give."""
        heads: int = self.attn.num_heads
        k = rearrange(kv, "b n (two heads d) -> two b heads n d", two=2, heads=heads)[0]
        return rearrange(q, "b n (heads d) -> b heads n d", heads=heads), k

    def tell_queries(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook of ``attn.q``."""
        self.attn.q_norm(rearrange(output, "b n (heads d) -> b heads n d", heads=self.attn.num_heads))

    def tell_keys(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook of ``attn.kv``."""
        self.attn.k_norm(self.queries_and_keys(output, output)[1])


class SwitchedSwinBlock(_Switched, swin_transformer.SwinTransformerBlock):
    """Of Swin. Queries and keys of all windows, put together as a map, go to ``attn.q_norm`` and ``attn.k_norm``."""

    _map_size: tuple[int, int] = (0, 0)

    def prepare(self) -> None:
        """Add the two modules without weights, and the hook that fills them."""
        attention: Any = self.attn
        attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
        attention.queries_and_keys = self.queries_and_keys
        attention.qkv.register_forward_hook(self.tell)

    def forward(self, x: Tensor) -> Tensor:
        """A map ``(b, h, w, c)`` to a map."""
        self._map_size = (x.shape[1], x.shape[2])
        z = self.after_attention(x, self._attn(self.norm1(x)))
        return self.after_mlp(z, self.mlp(self.norm2(z)))

    def queries_and_keys(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """``(b, heads, h w, d)`` each, of what the linear layer ``attn.qkv`` gives for the windows."""
        h, w = self._map_size
        wh, ww = self.window_size
        q, k, _ = rearrange(
            qkv,
            "(b rows columns) (wh ww) (three heads d) -> three b heads (rows wh) (columns ww) d",
            rows=-(-h // wh),
            columns=-(-w // ww),
            wh=wh,
            three=3,
            heads=self.attn.num_heads,
        )
        q, k = q[:, :, :h, :w], k[:, :, :h, :w]  # without padding
        if any(self.shift_size):
            q, k = (torch.roll(t, tuple(self.shift_size), (2, 3)) for t in (q, k))
        return rearrange(q, "b heads h w d -> b heads (h w) d"), rearrange(
            k, "b heads h w d -> b heads (h w) d"
        )

    def tell(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook of ``attn.qkv``."""
        q, k = self.queries_and_keys(output)
        self.attn.q_norm(q)
        self.attn.k_norm(k)
