r"""What T2T-ViT, PVT and CvT have in common: the pre-norm block with three switches, class token, head.

The switches are those of Peruzzo et al., "Spatial Entropy as an Inductive Bias for Vision Transformers",
arXiv 2206.04636, section 3.2; with all of them on it is the block of Dosovitskiy et al., "An Image is Worth
16x16 Words", ICLR 2021.

Own code under the licence of this package; the authors' releases were read for the names of their weights.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils.checkpoint import checkpoint

Size = int | Sequence[int]
"""Pixels: one number, or height and width."""


class Block(nn.Module):
    r"""Attention, then an MLP, each behind its LayerNorm and on a skip connection that can be taken out.

    .. math:: z' = \mathrm{MSA}(\mathrm{LN}_1(z)) \;[+\, z], \qquad
        z_{out} = \mathrm{MLP}([\mathrm{LN}_2](z')) \;[+\, z']

    The brackets are the switches. SAR (Eq. 10-11) trains with ``msa_skip=False, mlp_norm=False``. A branch
    without its skip has no stochastic depth either: a dropped sample would be all zeros.

    Args:
        dim: channels ``c``.
        attn: self-attention from ``(b, n, c)`` to ``(b, n, c)``, called with the grid where there is one.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        drop_path: probability of dropping a branch for a sample, in training.
        act_layer: activation of the MLP.
        eps: of both LayerNorms.
        msa_skip: skip connection around the attention.
        mlp_norm: LayerNorm before the MLP; without it ``norm2`` is an identity with no weights.
        mlp_skip: skip connection around the MLP.

    Example:
        >>> block = Block(8, nn.Identity(), mlp_ratio=2, drop_path=0.1, msa_skip=False, mlp_norm=False)
        >>> block.drop_path1, block.norm2, block.drop_path2
        (Identity(), Identity(), DropPath(drop_prob=0.100))
        >>> block(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        eps: float = 1e-5,
        *,
        msa_skip: bool = True,
        mlp_norm: bool = True,
        mlp_skip: bool = True,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.drop_path1: nn.Module = nn.Identity()
        self.norm2: nn.Module = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer)
        self.drop_path2: nn.Module = nn.Identity()
        self.set_switches(msa_skip=msa_skip, mlp_norm=mlp_norm, mlp_skip=mlp_skip)

    def set_switches(self, *, msa_skip: bool = True, mlp_norm: bool = True, mlp_skip: bool = True) -> None:
        """Put the block in one of its forms; a LayerNorm that comes back starts as the identity affine map."""
        self.msa_skip, self.mlp_norm, self.mlp_skip = msa_skip, mlp_norm, mlp_skip
        self.drop_path1 = self._drop_path(msa_skip)
        self.drop_path2 = self._drop_path(mlp_skip)
        if not mlp_norm:
            self.norm2 = nn.Identity()
        elif isinstance(self.norm2, nn.Identity):
            scale = self.norm1.weight
            self.norm2 = nn.LayerNorm(
                len(scale), eps=self.norm1.eps, device=scale.device, dtype=scale.dtype
            ).train(self.training)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens ``(b, n, c)`` to tokens ``(b, n, c)``; ``grid`` goes to an attention that wants one."""
        normed = self.norm1(x)
        attended = self.attn(normed) if grid is None else self.attn(normed, grid)
        x = x + self.drop_path1(attended) if self.msa_skip else attended  # Eq. 1 or 10
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y) if self.mlp_skip else y  # Eq. 2 or 11

    def _drop_path(self, skip: bool) -> nn.Module:
        if not skip or self.drop_path_rate == 0:
            return nn.Identity()
        return DropPath(self.drop_path_rate).train(self.training)


class ClassTokenTransformer(nn.Module):
    """A transformer whose last block has a class token: the base of the architectures here.

    Behaves like a timm model. Images ``(b, 3, H, W)`` are normalised with ``default_cfg``'s mean and std, of
    any size and shape: position tables are resampled where the size is not ``img_size``.

    The attention of every block has ``num_heads``, ``scale``, a method ``queries_and_keys(x, ...)`` that
    gives q ``(b, heads, n_q, d)`` and k ``(b, heads, n_k, d)`` of normed tokens with prefix tokens first, and
    identities ``q_norm`` and ``k_norm`` through which the same q and k pass: a forward hook on them collects
    without computing twice, as on a timm ViT.

    Args:
        num_classes: outputs of the linear head; 0 for the features of the class token.
        img_size: pixels the model is made for.
        num_features: channels ``c`` of the last block.
        reduction: pixels per patch token of the last block.
        crop_pct: share of the resized image that the evaluation crop of the published protocol keeps.

    Attributes:
        num_prefix_tokens: tokens before the patch tokens, 1.
        default_cfg: mean, std and the rest of what timm says about a model; also ``pretrained_cfg``.
        feature_info: channels and reduction of the last block, as timm lists them.
    """

    num_prefix_tokens: ClassVar[int] = 1

    def __init__(
        self, num_classes: int, img_size: Size, num_features: int, reduction: int, crop_pct: float
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        self.num_classes = num_classes
        self.img_size = pair(img_size)
        self.num_features = self.embed_dim = num_features
        self.grad_checkpointing = False
        self.feature_info = [{"num_chs": num_features, "reduction": reduction, "module": "norm"}]
        self.default_cfg: dict[str, Any] = {
            "num_classes": num_classes,
            "input_size": (3, *self.img_size),
            "crop_pct": crop_pct,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "classifier": "head",
        }
        self.pretrained_cfg = self.default_cfg

    # --- What an architecture defines ---

    @property
    def all_blocks(self) -> list[Block]:
        """The transformer blocks of all stages, first to last."""
        raise NotImplementedError

    def token_grid(self, img_size: Size | None = None) -> tuple[int, int]:
        """Rows and columns of the last block's patch tokens for ``img_size`` pixels; default: its own size.

        Raises:
            ValueError: if the images are too small for one token.
        """
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens ``(b, 1 + n, c)`` after the final norm, the class token first."""
        raise NotImplementedError

    def key_grid(self, img_size: Size | None = None) -> tuple[int, int]:
        """Rows and columns of the last block's patch keys: the token grid, unless its attention strides."""
        return self.token_grid(img_size)

    def adapt_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the same architecture made for another image size, fitted to this model."""
        return dict(state)

    # --- The last block ---

    @property
    def last_block(self) -> Block:
        """The block whose attention is regularised and whose switches :meth:`set_last_block` sets."""
        return self.all_blocks[-1]

    def set_last_block(self, *, msa_skip: bool = True, mlp_norm: bool = True, mlp_skip: bool = True) -> None:
        """Set the switches of the last :class:`Block`; SAR is ``msa_skip=False, mlp_norm=False``."""
        self.last_block.set_switches(msa_skip=msa_skip, mlp_norm=mlp_norm, mlp_skip=mlp_skip)

    # --- As timm's models ---

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``(b, num_classes)`` of tokens ``(b, 1 + n, c)``, or the class token ``(b, c)`` itself."""
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Any:
        """Logits ``(b, num_classes)`` of images ``(b, 3, H, W)``."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear head, or an identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head of ``num_classes`` in place of the old one.

        Raises:
            ValueError: for a ``global_pool`` other than the class token's ``"token"``.
        """
        if global_pool not in (None, "", "token"):
            raise ValueError(
                f"global_pool must be 'token': the head is on the class token; got {global_pool!r}"
            )
        weight = next(self.parameters())
        self.num_classes = num_classes
        self.head = self._make_head(num_classes).to(weight.device, weight.dtype).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Weights to exempt from weight decay besides those of one dimension: the class token."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] == "cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass to save memory.

        The last block is left out: what hooks collect there is then computed once.
        """
        self.grad_checkpointing = enable

    # --- For subclasses ---

    def _make_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        init_weights(head)
        return head

    def _finish(self, last_block: Mapping[str, bool] | None) -> None:
        """End of each constructor: the head, all initial weights, the form of the last block."""
        self.head: nn.Module = self._make_head(self.num_classes)
        self.apply(init_weights)
        self.set_last_block(**(last_block or {}))

    def _run(self, module: nn.Module, *args: Any) -> Tensor:
        """Run a part of the network, with gradient checkpointing where it is on."""
        if not self.grad_checkpointing or not torch.is_grad_enabled() or module is self.last_block:
            return module(*args)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _keep_statistics(module)

        return checkpoint(module, *args, use_reentrant=False, context_fn=contexts)


def init_weights(module: nn.Module) -> None:
    """Linear weights normal with deviation 0.02, biases 0; to be used with :meth:`torch.nn.Module.apply`.

    Norms and convolutions keep PyTorch's own initial values, as in all three releases.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            nn.init.zeros_(module.bias)


def linear_rates(largest: float, depth: int) -> list[float]:
    """Stochastic depth of ``depth`` blocks, growing linearly from 0 to ``largest``.

    Example:
        >>> linear_rates(0.1, 3)
        [0.0, 0.05, 0.1]
    """
    return [largest * i / max(depth - 1, 1) for i in range(depth)]


def pair(size: Size) -> tuple[int, int]:
    """Height and width, in pixels.

    Example:
        >>> pair(224), pair((224, 320))
        ((224, 224), (224, 320))
    """
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def strided(size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Rows and columns that a convolution or unfold gives.

    Example:
        >>> strided((224, 100), kernel=7, stride=4, padding=2)
        (56, 25)

    Raises:
        ValueError: if nothing is left.
    """
    rows, columns = ((pixels + 2 * padding - kernel) // stride + 1 for pixels in size)
    if rows < 1 or columns < 1:
        raise ValueError(f"{size[0]}x{size[1]} is too small for a window of {kernel}; give larger images")
    return rows, columns


@contextmanager
def _keep_statistics(module: nn.Module) -> Generator[None]:
    """Run batch norms without moving their running statistics: a recomputed batch has been counted."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, count
