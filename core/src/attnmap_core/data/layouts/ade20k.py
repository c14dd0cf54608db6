"""ADE20K as the scene parsing benchmark of 150 classes.

Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from ...errors import InputError
from ..images import walk_images
from .listing import Listing, Record, SegmentationClasses, bad_row, existing_folder, find_home, numbered_lines

_CLASSES = 150
_SPLITS = {"train": "training", "val": "validation"}
_NAMES = "objectInfo150.txt"


def list_ade20k(root: Path) -> Listing:
    """List ``images/{training,validation}`` with the maps of ``annotations/{training,validation}``.

    The files have 0 for "other", which is ignored, and 1 to 150 for the classes, which become 0 to 149. Their names
    come from ``objectInfo150.txt`` where it is there. All photos have one and the same label.

    Args:
        root: ``ADEChallengeData2016``, or the folder that holds it.

    Raises:
        InputError: for missing folders, and photos and maps that do not pair; a map that is not one shows when it
            is read.
    """
    root = find_home(existing_folder(root, "ADE20K"), "images", "ADEChallengeData2016")
    present = {split: name for split, name in _SPLITS.items() if (root / "images" / name).is_dir()}
    if not present:
        raise InputError(f"{root}: no images/training or images/validation (ADE20K); check the path")
    return Listing(
        name="ade20k",
        root=root,
        labels=["photo"],
        splits={split: partial(_records, root, name) for split, name in present.items()},
        upright=False,
        hints={split: f"add {root / 'images' / name}" for split, name in _SPLITS.items()},
        segmentation=SegmentationClasses(labels=_class_names(root / _NAMES), first=1),
    )


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return tuple(str(number) for number in range(1, _CLASSES + 1))
    names: list[str] = []
    for number, line in numbered_lines(path):
        fields = line.split("\t")
        if number == 1 and not fields[0].isdecimal():
            continue
        if len(fields) < 2 or fields[0] != str(len(names) + 1):
            raise bad_row(path, number, line, f"{len(names) + 1}<tab>...<tab><name>")
        names.append(fields[-1].strip())
    if len(names) != _CLASSES:
        raise InputError(f"{path}: {len(names)} classes, expected {_CLASSES}; get the file again")
    return tuple(names)


def _records(root: Path, folder: str) -> list[Record]:
    photos, maps = root / "images" / folder, root / "annotations" / folder
    existing_folder(photos, "the photos of ADE20K")
    existing_folder(maps, "the class maps of ADE20K")
    named = {os.path.splitext(name)[0]: name for name in walk_images(photos)}
    found = {os.path.splitext(name)[0]: name for name in walk_images(maps)}
    for stem in sorted(named.keys() - found.keys()):
        raise InputError(f"{maps / stem}.png: no such file for the photo {photos / named[stem]}; add it")
    for stem in sorted(found.keys() - named.keys()):
        raise InputError(
            f"{maps / found[stem]}: no photo for this map in {photos}; add it or remove the file"
        )
    return [
        Record(
            image_id=f"{folder}/{name}",
            path=os.path.join(photos, name),
            label=0,
            segmentation=os.path.join(maps, found[stem]),
        )
        for stem, name in named.items()
    ]
