"""Cross-image attention with conditional embeddings, for deep metric learning."""

from typing import TYPE_CHECKING, Any

from .model import EmbeddingModel

if TYPE_CHECKING:
    from .cross_attention import CrossAttentionStack
    from .losses import ConditionalEmbeddingLoss

__version__ = "0.1.0"
__all__ = ["ConditionalEmbeddingLoss", "CrossAttentionStack", "EmbeddingModel"]


def __getattr__(name: str) -> Any:
    if name == "CrossAttentionStack":  # training only, as the losses: inference goes without
        from .cross_attention import CrossAttentionStack

        return CrossAttentionStack
    if name == "ConditionalEmbeddingLoss":
        from .losses import ConditionalEmbeddingLoss

        return ConditionalEmbeddingLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
