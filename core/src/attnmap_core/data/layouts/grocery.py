"""The Grocery Store data set in its official layout: photos of products in shops, by fine class.

Klasson, Zhang, Kjellström, "A Hierarchical Grocery Store Image Dataset with Visual and Semantic Labels", WACV 2019.
"""

from __future__ import annotations

import csv
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from .listing import Listing, Record, bad_row, check_files, existing_folder, find_home, numbered_lines

_SPLITS = ("train", "val", "test")
_FORM = "<path>, <fine class>, <coarse class>"
_COLUMNS = ("Class Name (str)", "Class ID (int)")


class _Row(NamedTuple):
    name: str
    number: int


def list_grocery(root: Path) -> Listing:
    """List the photos of ``train.txt``, ``val.txt`` and ``test.txt`` by their fine classes, named by ``classes.csv``.

    Classes without a photo in any list are left out; the others are labels 0, 1, ... in the order of their numbers.

    Args:
        root: the folder with the lists, or one that has them in ``dataset``.

    Raises:
        InputError: for missing files, malformed rows, and classes that ``classes.csv`` does not name.
    """
    root = find_home(existing_folder(root, "Grocery Store"), "classes.csv", "dataset")
    names = _class_names(root / "classes.csv")
    rows = {split: _read(root / f"{split}.txt", names) for split in _SPLITS}
    numbers = sorted({row.number for found in rows.values() for row in found})
    return Listing(
        name="grocery",
        root=root,
        labels=[names[number] for number in numbers],
        splits={split: partial(_records, root, found, numbers, split) for split, found in rows.items()},
    )


def _class_names(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected the names of the classes; get the data set again")
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if not set(_COLUMNS) <= set(table.fieldnames or ()):
            raise InputError(f"{path}: expected columns {', '.join(_COLUMNS)}; get the data set again")
        return {int(row[_COLUMNS[1]]): row[_COLUMNS[0]] for row in table if row[_COLUMNS[1]].isdecimal()}


def _read(path: Path, names: dict[int, str]) -> list[_Row]:
    rows: list[_Row] = []
    for number, line in numbered_lines(path):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3 or not fields[0] or not fields[1].isdecimal():
            raise bad_row(path, number, line, _FORM)
        if int(fields[1]) not in names:
            raise InputError(f"{path}:{number}: class {fields[1]} is not in classes.csv; correct one of them")
        rows.append(_Row(fields[0], int(fields[1])))
    return rows


def _records(root: Path, rows: list[_Row], numbers: list[int], split: str) -> list[Record]:
    label = {number: index for index, number in enumerate(numbers)}
    records = [
        Record(image_id=row.name, path=os.path.join(root, *row.name.split("/")), label=label[row.number])
        for row in rows
    ]
    check_files(records, root / f"{split}.txt")
    return records
