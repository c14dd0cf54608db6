"""ImageNet-A and ImageNet-C: test sets for models that were trained on ImageNet.

Hendrycks et al., "Natural Adversarial Examples", CVPR 2021; Hendrycks, Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

from ...errors import InputError
from ..images import walk_images
from .listing import Listing, Record, existing_folder

_WNID = re.compile(r"n\d{8}")
_GROUPS = ("noise", "blur", "weather", "digital", "extra")
_SEVERITIES = ("1", "2", "3", "4", "5")


def list_imagenet_a(root: Path) -> Listing:
    """List ``imagenet-a/<wnid>/*.jpg``, all of it split ``test``.

    A label is the rank of the wnid among the 200 of the data set, which is not the class index of an ImageNet
    model.

    Args:
        root: ``imagenet-a``, or the folder that holds it.

    Raises:
        InputError: if there are not exactly 200 class folders: with fewer the labels would be others.
    """
    existing_folder(root, "ImageNet-A")
    return _listing("imagenet-a", root / "imagenet-a" if (root / "imagenet-a").is_dir() else root, 200, "")


def list_imagenet_c(root: Path, part: str) -> Listing:
    """List ``<corruption>/<severity>/<wnid>/*.JPEG``, one corruption at one severity, as split ``test``.

    Args:
        root: the folder with the corruptions, or with ``noise``, ``blur``, ``weather``, ``digital`` (and ``extra``)
            that hold them, as the official archives do.
        part: such as ``"gaussian_noise/3"``.

    Raises:
        InputError: for a corruption or severity that is not there, and if there are not exactly 1000 class folders.
    """
    existing_folder(root, "ImageNet-C")
    corruption, _, severity = part.partition("/")
    places = _corruptions(root)
    if corruption not in places:
        found = ", ".join(sorted(places)) or "none"
        raise InputError(f"{root}: no corruption '{corruption}', found {found}; choose one or check the path")
    if severity not in _SEVERITIES:
        raise InputError(
            f"imagenet-c ...@{part}: severity '{severity}', expected 1, 2, 3, 4 or 5; correct it"
        )
    folder = places[corruption] / severity
    return _listing("imagenet-c", existing_folder(folder, "a severity of ImageNet-C"), 1000, f"{part}/")


def _corruptions(root: Path) -> dict[str, Path]:
    """The folder of each corruption: one that holds a severity."""
    folders = (root / group for group in ("", *_GROUPS))
    inside = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    return {path.name: path for path in inside if any((path / severity).is_dir() for severity in _SEVERITIES)}


def _listing(name: str, folder: Path, expected: int, prefix: str) -> Listing:
    with os.scandir(folder) as entries:
        wnids = sorted(entry.name for entry in entries if _WNID.fullmatch(entry.name) and entry.is_dir())
    if len(wnids) != expected:
        raise InputError(
            f"{folder}: {len(wnids)} folders by wnid, expected {expected}; unpack the archive again, or write "
            f"folder:{folder} for a part of it"
        )
    return Listing(
        name=name,
        root=folder,
        labels=wnids,
        splits={"test": partial(_records, folder, wnids, prefix)},
        upright=False,
    )


def _records(folder: Path, wnids: list[str], prefix: str) -> list[Record]:
    records: list[Record] = []
    for label, wnid in enumerate(wnids):
        names = walk_images(folder / wnid)
        if not names:
            raise InputError(f"{folder / wnid}: no images in this class folder; unpack the archive again")
        records += [
            Record(image_id=f"{prefix}{wnid}/{name}", path=os.path.join(folder, wnid, name), label=label)
            for name in names
        ]
    return records
