"""Stanford Cars in its official layout.

Krause et al., "3D Object Representations for Fine-Grained Categorization", ICCV workshop 2013.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ..images import walk_images
from .listing import Listing, Record, check_files, corners_to_xywh, existing_folder, find_home
from .matlab import read_mat, whole_numbers

_CLASSES = 196
_FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
_TEST_ANNOTATIONS = "cars_test_annos_withlabels.mat"


def list_cars(root: Path) -> Listing:
    """List ``cars_train/`` and ``cars_test/`` by the MATLAB files of the devkit.

    ``devkit/cars_train_annos.mat`` has the training photos; ``cars_test_annos_withlabels.mat``, in ``devkit`` or beside
    it, the test photos; ``devkit/cars_meta.mat`` the 196 class names (without it they are numbers). Boxes are the
    numbers of the files as corners.

    Args:
        root: the folder with these, or one that has them in ``stanford_cars``.

    Raises:
        InputError: for missing or malformed files, classes outside of 1..196, and photos without a row.
    """
    root = find_home(existing_folder(root, "Stanford Cars"), "devkit", "stanford_cars")
    devkit = existing_folder(root / "devkit", "the devkit of Stanford Cars")
    splits = {"train": partial(_records, root / "cars_train", devkit / "cars_train_annos.mat")}
    test = next(
        (folder / _TEST_ANNOTATIONS for folder in (devkit, root) if (folder / _TEST_ANNOTATIONS).exists()),
        None,
    )
    if test is not None:
        splits["test"] = partial(_records, root / "cars_test", test)
    return Listing(
        name="cars",
        root=root,
        labels=_names(devkit / "cars_meta.mat"),
        splits=splits,
        upright=False,
        hints={"test": f"add {devkit / _TEST_ANNOTATIONS}"},
    )


def _names(path: Path) -> list[str]:
    if not path.exists():
        return [str(number) for number in range(1, _CLASSES + 1)]
    [found] = read_mat(path, ["class_names"])
    names = [str(name) for name in np.atleast_1d(found)]
    if len(names) != _CLASSES or len(set(names)) != _CLASSES:
        raise InputError(f"{path}: {len(set(names))} class names, expected {_CLASSES}; get the file again")
    return names


def _records(folder: Path, path: Path) -> list[Record]:
    [found] = read_mat(path, ["annotations"])
    rows: Any = np.atleast_1d(found)
    missing = [name for name in _FIELDS if name not in (rows.dtype.names or ())]
    if missing:
        raise InputError(
            f"{path}: annotations have no {missing[0]}, found {', '.join(rows.dtype.names or ())}; get the file "
            "with labels"
        )
    columns = {name: whole_numbers(path, name, rows[name].tolist()) for name in _FIELDS[:-1]}
    files = [str(name) for name in rows["fname"]]
    records: list[Record] = []
    for number, name in enumerate(files):
        label = int(columns["class"][number])
        x0, y0, x1, y1 = (float(columns[field][number]) for field in _FIELDS[:4])
        if not 1 <= label <= _CLASSES:
            raise InputError(f"{path}: {name} has class {label}, expected 1..{_CLASSES}; get the file again")
        if x1 < x0 or y1 < y0:
            raise InputError(
                f"{path}: {name} has the box {x0:g} {y0:g} {x1:g} {y1:g}, expected x1 <= x2 and y1 <= y2"
            )
        records.append(
            Record(
                image_id=f"{folder.name}/{name}",
                path=os.path.join(folder, name),
                label=label - 1,
                boxes_xywh=corners_to_xywh([[x0, y0, x1, y1]]),
            )
        )
    check_files(records, path)
    unlisted = sorted(set(walk_images(folder)) - set(files))
    if unlisted:
        raise InputError(
            f"{folder / unlisted[0]}: no row for this photo in {path}, which has {len(files)} for "
            f"{len(files) + len(unlisted)} photos; get the file again or remove the photo"
        )
    return records
