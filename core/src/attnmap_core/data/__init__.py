"""Data sources, the synthetic default, photo reading, transforms and loaders.

The names below load their module on first use, so that reading photos for inference needs none of the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .images import list_images as list_images
    from .images import load_image as load_image
    from .images import split_readable as split_readable
    from .sources import ImageData as ImageData
    from .sources import Sample as Sample
    from .sources import describe_sources as describe_sources
    from .sources import load_data as load_data
    from .synthetic import SyntheticSpec as SyntheticSpec
    from .transforms import Preprocessing as Preprocessing

_MODULES = {
    "ImageData": "sources",
    "Preprocessing": "transforms",
    "Sample": "sources",
    "SyntheticSpec": "synthetic",
    "describe_sources": "sources",
    "list_images": "images",
    "load_data": "sources",
    "load_image": "images",
    "split_readable": "images",
}

__all__ = [
    "ImageData",
    "Preprocessing",
    "Sample",
    "SyntheticSpec",
    "describe_sources",
    "list_images",
    "load_data",
    "load_image",
    "split_readable",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
