"""Contrastive Attention Maps for Self-supervised Co-localization (ICCV 2021): boxes from photos without any label."""

from .attention import caam
from .frozen import FrozenMap
from .loss import contrastive_map_loss
from .model import ContrastiveCAM
from .pooling import ptap

__version__ = "0.1.0"
__all__ = ["ContrastiveCAM", "FrozenMap", "caam", "contrastive_map_loss", "ptap"]
