"""Stanford Online Products in its official layout: photos of products for sale, few of each.

Song, Xiang, Jegelka, Savarese, "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from .listing import Listing, Record, bad_row, check_files, existing_folder, find_home, numbered_lines

_LISTS = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}
_FORM = "<image id> <class id> <super class id> <path>"


class _Row(NamedTuple):
    name: str
    number: int


def list_sop(root: Path) -> Listing:
    """List the photos of ``Ebay_train.txt`` and ``Ebay_test.txt``: no product is in both.

    A class is one product; its name is its number in the lists. Labels count through both lists by rising number, so
    that all splits share them. The super classes (bicycle, kettle, ...) are the folders of the photos.

    Args:
        root: ``Stanford_Online_Products``, or the folder that holds it. The lists may also lie in ``Info_Files`` and
            the photos in ``images``, as some copies have them.

    Raises:
        InputError: for missing files, malformed rows, and a product that is in both lists.
    """
    root = find_home(
        existing_folder(root, "Stanford Online Products"), _LISTS["train"], "Stanford_Online_Products"
    )
    lists = find_home(root, _LISTS["train"], "Info_Files")
    rows = {split: _read(lists / name) for split, name in _LISTS.items()}
    numbers = {split: {row.number for row in found} for split, found in rows.items()}
    if both := sorted(numbers["train"] & numbers["test"]):
        raise InputError(
            f"{lists / _LISTS['test']}: class {both[0]} is in {_LISTS['train']} too, expected none in both lists; "
            "get the lists again"
        )
    every = sorted(numbers["train"] | numbers["test"])
    images = root / "images" if (root / "images").is_dir() else root
    return Listing(
        name="sop",
        root=root,
        labels=[str(number) for number in every],
        splits={
            split: partial(_records, images, found, every, lists / _LISTS[split])
            for split, found in rows.items()
        },
        upright=False,
        disjoint=True,
    )


def _read(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    for number, line in numbered_lines(path):
        fields = line.split(maxsplit=3)
        if number == 1 and fields[:1] == ["image_id"]:
            continue
        if len(fields) != 4 or not all(field.isdecimal() for field in fields[:3]):
            raise bad_row(path, number, line, _FORM)
        rows.append(_Row(fields[3].strip(), int(fields[1])))
    if not rows:
        raise InputError(f"{path}: no rows, expected '{_FORM}' each; get the list again")
    return rows


def _records(images: Path, rows: list[_Row], numbers: list[int], path: Path) -> list[Record]:
    label = {number: index for index, number in enumerate(numbers)}
    records = [
        Record(image_id=row.name, path=os.path.join(images, *row.name.split("/")), label=label[row.number])
        for row in rows
    ]
    check_files(records, path)
    return records
