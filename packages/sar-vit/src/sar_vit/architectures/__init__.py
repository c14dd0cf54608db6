"""Transformers with a class token that timm does not have: T2T-ViT, PVT (first version) and CvT, by name.

Each is written from its paper and its released training code; see the modules. All are
:class:`~sar_vit.architectures.layers.ClassTokenTransformer`, which behave like timm's models.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from attnmap_core.errors import InputError

from .cvt import ConvolutionalVisionTransformer
from .layers import Block, ClassTokenTransformer
from .pvt import PyramidVisionTransformer
from .semantic_fpn import SemanticFPN, segmentation_loss
from .t2t_vit import T2TViT
from .weights import load_published

_small = partial(T2TViT, embed_dim=256, num_heads=4, mlp_ratio=2.0)
_t2t_14 = partial(T2TViT, embed_dim=384, num_heads=6, mlp_ratio=3.0, depth=14)
_t2t_19 = partial(T2TViT, embed_dim=448, num_heads=7, mlp_ratio=3.0, depth=19)
_t2t_24 = partial(T2TViT, embed_dim=512, num_heads=8, mlp_ratio=3.0, depth=24)

ARCHITECTURES: dict[str, Callable[..., ClassTokenTransformer]] = {
    "t2t_vit_7": partial(_small, depth=7),
    "t2t_vit_10": partial(_small, depth=10),
    "t2t_vit_12": partial(_small, depth=12),
    "t2t_vit_14": _t2t_14,
    "t2t_vit_19": _t2t_19,
    "t2t_vit_24": _t2t_24,
    "t2t_vit_14_transformer": partial(_t2t_14, token_type="transformer"),
    "t2t_vit_19_transformer": partial(_t2t_19, token_type="transformer"),
    "t2t_vit_24_transformer": partial(_t2t_24, token_type="transformer"),
    "pvt_tiny": partial(PyramidVisionTransformer, depths=(2, 2, 2, 2)),
    "pvt_small": partial(PyramidVisionTransformer, depths=(3, 4, 6, 3)),
    "pvt_medium": partial(PyramidVisionTransformer, depths=(3, 4, 18, 3)),
    "pvt_large": partial(PyramidVisionTransformer, depths=(3, 8, 27, 3)),
    "cvt_13": partial(ConvolutionalVisionTransformer, depths=(1, 2, 10)),
    "cvt_21": partial(ConvolutionalVisionTransformer, depths=(1, 4, 16)),
    # Of no paper: small enough for a CPU, with grids of 4x4 to 8x8 patches at 64 pixels.
    "t2t_vit_nano": partial(T2TViT, embed_dim=64, num_heads=4, mlp_ratio=3.0, depth=3, token_dim=32),
    "pvt_nano": partial(
        PyramidVisionTransformer,
        embed_dims=(16, 32, 48, 64),
        depths=(1, 1, 1, 2),
        num_heads=(1, 2, 3, 4),
        patch_sizes=(4, 2, 1, 1),
        mlp_ratios=(4, 4, 4, 4),
        sr_ratios=(4, 2, 2, 1),
    ),
    "cvt_nano": partial(
        ConvolutionalVisionTransformer,
        embed_dims=(16, 32, 64),
        depths=(1, 1, 2),
        num_heads=(1, 2, 4),
        strides=(4, 2, 1),
    ),
}
"""Name to constructor. All take ``num_classes``, ``img_size``, ``drop_path_rate``, ``last_block`` and sizes."""


def create_architecture(name: str, **options: Any) -> ClassTokenTransformer:
    """Make a model of :data:`ARCHITECTURES` with random weights.

    Args:
        name: such as ``"t2t_vit_14"``, ``"pvt_small"`` or ``"cvt_13"``.
        **options: of the constructor; the published sizes are the defaults.

    Returns:
        The model, in training mode.

    Raises:
        InputError: if the name is unknown.

    Example:
        >>> import torch
        >>> with torch.device("meta"):  # no memory
        ...     model = create_architecture("cvt_13", last_block={"msa_skip": False, "mlp_norm": False})
        >>> f"{sum(weight.numel() for weight in model.parameters()):,}", model.key_grid(384)
        ('19,996,712', (12, 12))
    """
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(name, ARCHITECTURES, n=3)
        raise InputError(
            f"architecture {name!r}: not known here; "
            + (f"did you mean {' or '.join(close)}?" if close else f"choose {', '.join(ARCHITECTURES)}")
        )
    return ARCHITECTURES[name](**options)


__all__ = [
    "ARCHITECTURES",
    "Block",
    "ClassTokenTransformer",
    "ConvolutionalVisionTransformer",
    "PyramidVisionTransformer",
    "SemanticFPN",
    "T2TViT",
    "create_architecture",
    "load_published",
    "segmentation_loss",
]
