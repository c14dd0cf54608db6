"""In-Shop Clothes Retrieval of DeepFashion in its official layout: training photos, queries and a gallery.

Liu, Luo, Qiu, Wang, Tang, "DeepFashion: Powering Robust Clothes Recognition and Retrieval with Rich Annotations",
CVPR 2016.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from .listing import Listing, Record, bad_row, check_files, existing_folder, find_home, numbered_lines

_LIST = "list_eval_partition.txt"
_SPLITS = ("train", "query", "gallery")
_FORM = "<path> <item id> <train, query or gallery>"


class _Row(NamedTuple):
    name: str
    item: str
    split: str


def list_inshop(root: Path) -> Listing:
    """List the photos of ``list_eval_partition.txt``: splits ``train``, ``query`` and ``gallery``.

    A class is one item (``id_00000002``). Queries look for photos of their item in the gallery; ``train`` has other
    items. Labels count through all of them, so that the splits share them.

    Args:
        root: the folder with ``Eval/list_eval_partition.txt`` and ``Img/img/``, or one that has them in
            ``Inshop_Clothes``. The list may also lie beside ``img/``.

    Raises:
        InputError: for missing files, malformed rows, a count that is not that of the rows, and an item of ``train``
            that is asked for or in the gallery too.
    """
    root = find_home(existing_folder(root, "In-Shop Clothes"), "Eval", "Inshop_Clothes")
    path = next(
        (folder / _LIST for folder in (root / "Eval", root) if (folder / _LIST).is_file()),
        root / "Eval" / _LIST,
    )
    rows = _read(path)
    trained = {row.item for row in rows if row.split == "train"}
    for row in rows:
        if row.split != "train" and row.item in trained:
            raise InputError(
                f"{path}: item {row.item} is in train and in {row.split}, expected others in train; get the list again"
            )
    labels = sorted({row.item for row in rows})
    images = root / "Img" if (root / "Img").is_dir() else root
    return Listing(
        name="inshop",
        root=root,
        labels=labels,
        splits={split: partial(_records, images, rows, labels, split, path) for split in _SPLITS},
        upright=False,
        disjoint=True,
        hints={"test": "load query and gallery"},
    )


def _read(path: Path) -> list[_Row]:
    lines = list(numbered_lines(path))
    if len(lines) < 2 or not lines[0][1].strip().isdecimal() or lines[1][1].split()[:1] != ["image_name"]:
        raise InputError(
            f"{path}: expected the number of images and a line of column names on top; get the list again"
        )
    rows: list[_Row] = []
    for number, line in lines[2:]:
        fields = line.split()
        if len(fields) != 3 or fields[2] not in _SPLITS:
            raise bad_row(path, number, line, _FORM)
        rows.append(_Row(*fields))
    if len(rows) != int(lines[0][1]):
        raise InputError(
            f"{path}: {len(rows)} rows, expected {lines[0][1].strip()} as its first line says; get it again"
        )
    return rows


def _records(images: Path, rows: list[_Row], labels: list[str], split: str, path: Path) -> list[Record]:
    label = {item: index for index, item in enumerate(labels)}
    records = [
        Record(image_id=row.name, path=os.path.join(images, *row.name.split("/")), label=label[row.item])
        for row in rows
        if row.split == split
    ]
    check_files(records, path)
    return records
