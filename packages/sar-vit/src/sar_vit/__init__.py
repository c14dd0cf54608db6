"""Spatial Entropy as an Inductive Bias for Vision Transformers: the loss and the last-block change, for any ViT."""

from typing import TYPE_CHECKING, Any

from .entropy import SpatialEntropyLoss, spatial_entropy
from .model import SARViT
from .surgery import apply_sar, spatial_entropy_loss

if TYPE_CHECKING:
    from .architectures import ARCHITECTURES, create_architecture, load_published

__version__ = "0.1.0"
__all__ = [
    "ARCHITECTURES",
    "SARViT",
    "SpatialEntropyLoss",
    "apply_sar",
    "create_architecture",
    "load_published",
    "spatial_entropy",
    "spatial_entropy_loss",
]


def __getattr__(name: str) -> Any:
    if name in ("ARCHITECTURES", "create_architecture", "load_published"):
        from . import architectures  # which takes timm along: only for those who want one

        return getattr(architectures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
