"""Oxford-IIIT Pets in its official layout.

Parkhi et al., "Cats and Dogs", CVPR 2012.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from .listing import Listing, Record, bad_row, check_files, existing_folder, find_home, numbered_lines

_CLASSES = 37
_LISTS = {"train": "trainval.txt", "test": "test.txt"}
_FORM = "<name> <class 1..37> <species> <breed>"


class _Row(NamedTuple):
    where: str
    name: str
    number: int


def list_pets(root: Path) -> Listing:
    """List ``images/<Breed_N>.jpg`` by ``annotations/trainval.txt`` (split ``train``) and ``annotations/test.txt``.

    A class is called as its photos are, without their number. Photos that neither list names are left out, as they are
    officially.

    Args:
        root: the folder with ``images`` and ``annotations``, or one that has them in ``oxford-iiit-pet``.

    Raises:
        InputError: for missing files, malformed rows, classes outside of 1..37 or without a photo, and photos whose
            name and class number contradict others.
    """
    root = find_home(existing_folder(root, "Oxford-IIIT Pets"), "annotations", "oxford-iiit-pet")
    rows = {split: _read(root / "annotations" / name) for split, name in _LISTS.items()}
    names: dict[int, str] = {}
    for row in (row for found in rows.values() for row in found):
        breed = row.name.rpartition("_")[0]
        if names.setdefault(row.number, breed) != breed:
            raise InputError(
                f"{row.where}: {row.name} has class {row.number}, which is {names[row.number]} before; correct one"
            )
    labels = [names.get(number, "") for number in range(1, max(names, default=0) + 1)]
    if not labels or "" in labels or len(set(labels)) < len(labels):
        raise InputError(
            f"{root / 'annotations'}: {len(set(labels) - {''})} breeds for the class numbers 1..{len(labels)}, "
            "expected one for each; get the lists again"
        )
    return Listing(
        name="pets",
        root=root,
        labels=labels,
        splits={split: partial(_records, root, found, _LISTS[split]) for split, found in rows.items()},
        upright=False,
    )


def _read(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    for number, line in numbered_lines(path):
        fields = line.split()
        if len(fields) != 4 or "_" not in fields[0] or not fields[1].isdecimal():
            raise bad_row(path, number, line, _FORM)
        if not 1 <= int(fields[1]) <= _CLASSES:
            raise bad_row(path, number, line, _FORM)
        rows.append(_Row(f"{path}:{number}", fields[0], int(fields[1])))
    return rows


def _records(root: Path, rows: list[_Row], list_name: str) -> list[Record]:
    records = [
        Record(
            image_id=f"{row.name}.jpg",
            path=os.path.join(root, "images", f"{row.name}.jpg"),
            label=row.number - 1,
        )
        for row in rows
    ]
    check_files(records, root / "annotations" / list_name)
    return records
