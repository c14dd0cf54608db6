"""FGVC-Aircraft 2013b in its official layout.

Maji et al., "Fine-Grained Visual Classification of Aircraft", arXiv 1306.5151, 2013.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from ...errors import InputError
from .listing import (
    Listing,
    Record,
    bad_row,
    check_files,
    corners_to_xywh,
    existing_folder,
    find_home,
    numbered_lines,
)

_COUNTS = {"train": 3334, "val": 3333, "test": 3333}
_BANNER = 20  # pixel rows

_logger = logging.getLogger(__name__)


def list_aircraft(root: Path, *, crop_banner: bool = True) -> Listing:
    """List ``images/`` by ``images_variant_{train,val,test}.txt``, ``images_box.txt`` and ``variants.txt``.

    The classes are the variants. Boxes are written counting from 1 with both ends inside; here they begin at 0 and end
    exclusively. The lowest 20 rows of each photo are a copyright banner, the same way up in all: they are cut off.

    Args:
        root: the folder with these (``data``), or one that has it in ``fgvc-aircraft-2013b/data`` or ``data``.
        crop_banner: cut the banner off; off for numbers of code that keeps it.

    Raises:
        InputError: for missing files, malformed rows, unknown variants, and photos without a box or a file.
    """
    root = find_home(
        existing_folder(root, "FGVC-Aircraft"),
        "images_box.txt",
        "data",
        os.path.join("fgvc-aircraft-2013b", "data"),
    )
    labels = [line.strip() for _, line in numbered_lines(root / "variants.txt")]
    return Listing(
        name="aircraft",
        root=root,
        labels=labels,
        splits={split: partial(_records, root, split, labels) for split in _COUNTS},
        upright=False,
        crop_bottom=_BANNER if crop_banner else 0,
    )


def _records(root: Path, split: str, labels: list[str]) -> list[Record]:
    path = root / f"images_variant_{split}.txt"
    boxes = _boxes(root / "images_box.txt")
    number_of = {name: number for number, name in enumerate(labels)}
    records: list[Record] = []
    for number, line in numbered_lines(path):
        image_id, _, variant = line.strip().partition(" ")
        if variant not in number_of:
            raise bad_row(path, number, line, "<image id> <variant of variants.txt>")
        if image_id not in boxes:
            raise InputError(f"{root / 'images_box.txt'}: no row for image {image_id} of {path}; add the row")
        records.append(
            Record(
                image_id=f"{image_id}.jpg",
                path=os.path.join(root, "images", f"{image_id}.jpg"),
                label=number_of[variant],
                boxes_xywh=corners_to_xywh([boxes[image_id]]),
            )
        )
    check_files(records, path)
    if len(records) != _COUNTS[split]:
        _logger.warning("%s: %d photos, the official list has %d", path, len(records), _COUNTS[split])
    return records


def _boxes(path: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for number, line in numbered_lines(path):
        image_id, *sides = line.split()
        try:
            x0, y0, x1, y1 = map(float, sides)
        except ValueError:
            raise bad_row(path, number, line, "<image id> <xmin> <ymin> <xmax> <ymax>") from None
        if x1 < x0 or y1 < y0:
            raise bad_row(path, number, line, "xmin <= xmax and ymin <= ymax")
        found[image_id] = [x0 - 1, y0 - 1, x1, y1]
    return found
