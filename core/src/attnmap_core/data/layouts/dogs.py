"""Stanford Dogs in its official layout.

Khosla et al., "Novel Dataset for Fine-Grained Image Categorization", CVPR workshop 2011.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import InputError
from .listing import Listing, Record, check_files, corners_to_xywh, existing_folder, find_home
from .matlab import read_mat, whole_numbers
from .voc import read_annotation

_COUNTS = {"train": 12000, "test": 8580}

_logger = logging.getLogger(__name__)


def list_dogs(root: Path) -> Listing:
    """List ``Images/`` and ``Annotation/`` by ``train_list.mat`` and ``test_list.mat``.

    The lists name photos, annotations (XML without a suffix) and classes; what an XML file says about its photo's name
    is not read: it need not be right. Boxes, one or more a photo, are taken as written.

    Args:
        root: the folder with these; the lists may be in ``lists`` below it.

    Raises:
        InputError: for missing or malformed files, lists of different lengths, classes with two names, and an
            annotation without a box.
    """
    root = find_home(existing_folder(root, "Stanford Dogs"), "Images", "stanford_dogs", "StanfordDogs")
    existing_folder(root / "Images", "the photos of Stanford Dogs")
    lists = root if (root / "train_list.mat").exists() else root / "lists"
    rows = {split: _rows(lists / f"{split}_list.mat") for split in _COUNTS}
    names: dict[int, str] = {}
    for split, found in rows.items():
        for file, _, label in found:
            breed = file.partition("/")[0].partition("-")[2] or file.partition("/")[0]
            if names.setdefault(label, breed) != breed:
                raise InputError(
                    f"{lists / f'{split}_list.mat'}: class {label} is {breed} and {names[label]}, expected one name; "
                    "get the file again"
                )
    if sorted(names) != list(range(1, len(names) + 1)) or len(set(names.values())) != len(names):
        raise InputError(
            f"{lists}: the lists name {len(set(names.values()))} breeds by numbers {min(names)} to {max(names)}, "
            "expected one each from 1 on; get them again"
        )
    return Listing(
        name="dogs",
        root=root,
        labels=[names[number] for number in sorted(names)],
        splits={
            split: partial(_records, root, lists / f"{split}_list.mat", found, _COUNTS[split])
            for split, found in rows.items()
        },
        upright=False,
    )


def _rows(path: Path) -> list[tuple[str, str, int]]:
    """Photo, annotation and class of each row of a list."""
    files, annotations, labels = read_mat(path, ["file_list", "annotation_list", "labels"])
    photos, notes = ([str(name) for name in np.atleast_1d(found)] for found in (files, annotations))
    classes = whole_numbers(path, "labels", labels).tolist()
    if not len(photos) == len(notes) == len(classes):
        raise InputError(
            f"{path}: {len(photos)} photos, {len(notes)} annotations and {len(classes)} labels, expected as many of "
            "each; get the file again"
        )
    return list(zip(photos, notes, classes))


def _records(root: Path, path: Path, rows: list[tuple[str, str, int]], official: int) -> list[Record]:
    records: list[Record] = []
    for file, annotation, label in rows:
        where = root / "Annotation" / annotation
        if not where.exists():
            raise InputError(
                f"{where}: no such file, but {path} has a row for {file}; unpack the annotations"
            )
        read = read_annotation(where)
        if not read.objects:
            raise InputError(f"{where}: no object with a box in it; get the annotations again")
        records.append(
            Record(
                image_id=file,
                path=os.path.join(root, "Images", *file.split("/")),
                label=label - 1,
                boxes_xywh=corners_to_xywh([box for _, box in read.objects]),
                size=read.size,
            )
        )
    check_files(records, path)
    if len(records) != official:
        _logger.warning("%s: %d photos, the official list has %d", path, len(records), official)
    return records
