"""Oxford 102 Flowers in its official layout.

Nilsback, Zisserman, "Automated Flower Classification over a Large Number of Classes", ICVGIP 2008.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..images import walk_images
from .listing import Listing, Record, check_files, existing_folder, find_home
from .matlab import read_mat, whole_numbers

_CLASSES = 102
_SETS = {"train": ("trnid", "valid"), "test": ("tstid",)}


def list_flowers102(root: Path) -> Listing:
    """List ``jpg/image_NNNNN.jpg`` with the classes of ``imagelabels.mat`` and the splits of ``setid.mat``.

    ``train`` is what the authors call training and validation, as in most papers on fine-tuning. The classes
    are called by their numbers, ``"1"`` to ``"102"``: the files do not name them.

    Args:
        root: the folder with these, or one that has them in ``flowers-102``.

    Raises:
        InputError: for missing or malformed files, classes outside of 1..102, as many labels as photos not being there,
            and photos that are in two splits.
    """
    root = find_home(existing_folder(root, "102 Flowers"), "imagelabels.mat", "flowers-102")
    labels_path, sets_path = root / "imagelabels.mat", root / "setid.mat"
    [found] = read_mat(labels_path, ["labels"])
    classes = whole_numbers(labels_path, "labels", found)
    outside = np.flatnonzero((classes < 1) | (classes > _CLASSES))
    if len(outside):
        raise InputError(
            f"{labels_path}: image {outside[0] + 1} has class {classes[outside[0]]}, expected 1..{_CLASSES}; "
            "get the file again"
        )
    photos = len(walk_images(existing_folder(root / "jpg", "the photos of 102 Flowers")))
    if photos != len(classes):
        raise InputError(
            f"{root / 'jpg'}: {photos} photos, but {labels_path} has {len(classes)} labels; unpack the photos again"
        )
    names = [name for parts in _SETS.values() for name in parts]
    ids = {
        name: whole_numbers(sets_path, name, values)
        for name, values in zip(names, read_mat(sets_path, names))
    }
    every = np.concatenate(list(ids.values()))
    numbers, times = np.unique(every, return_counts=True)
    wrong = [*numbers[(numbers < 1) | (numbers > len(classes))], *numbers[times > 1]]
    if wrong:
        raise InputError(
            f"{sets_path}: image {wrong[0]} of {len(classes)}, expected numbers 1..{len(classes)}, each in one set; "
            "get the file again"
        )
    return Listing(
        name="flowers102",
        root=root,
        labels=[str(number) for number in range(1, _CLASSES + 1)],
        splits={
            split: partial(_records, root, classes, np.concatenate([ids[name] for name in parts]))
            for split, parts in _SETS.items()
        },
        upright=False,
    )


def _records(root: Path, classes: NDArray[np.int64], numbers: NDArray[np.int64]) -> list[Record]:
    records = [
        Record(
            image_id=f"image_{number:05d}.jpg",
            path=os.path.join(root, "jpg", f"image_{number:05d}.jpg"),
            label=int(classes[number - 1]) - 1,
        )
        for number in sorted(numbers.tolist())
    ]
    check_files(records, root / "setid.mat")
    return records
