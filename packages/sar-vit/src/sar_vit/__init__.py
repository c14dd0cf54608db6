"""Spatial Entropy as an Inductive Bias for Vision Transformers: so far the architectures that timm lacks."""

from .architectures import ARCHITECTURES, create_architecture, load_published

__version__ = "0.1.0"
__all__ = ["ARCHITECTURES", "create_architecture", "load_published"]
