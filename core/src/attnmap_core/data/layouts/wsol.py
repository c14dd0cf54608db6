"""The lists of the reference WSOL evaluator: CUB with CUBV2, ILSVRC with ImageNetV2, OpenImages with masks.

Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from ...errors import InputError
from .listing import FolderIndex, Listing, Record, bad_row, corners_to_xywh, existing_folder, numbered_lines

logger = logging.getLogger(__name__)

CubV2Boxes: TypeAlias = Literal["corners", "xywh-bug"]
SPLITS = ("train", "val", "test")


@dataclass(slots=True)
class WsolRow:
    """One image of the lists, joined: boxes as corner pixels, mask paths below the image root."""

    image_id: str
    label: int
    size: tuple[int, int] | None = None
    boxes_xyxy: list[tuple[float, float, float, float]] = field(
        default_factory=list[tuple[float, float, float, float]]
    )
    masks: list[str] = field(default_factory=list[str])
    ignore: str | None = None


def read_lists(folder: str | Path, *, cubv2_boxes: CubV2Boxes = "corners") -> list[WsolRow]:
    """Read the lists of one split: image ids, class labels, image sizes and localization (``*.txt``).

    No image is needed. Sizes and localization may be empty or missing, as the train lists have them.

    Args:
        folder: for example ``metadata/CUB/val``.
        cubv2_boxes: ``"corners"`` reads box rows as ``x0,y0,x1,y1``, which they are. ``"xywh-bug"`` reads
            them as ``x,y,width,height`` and cuts what overflows, as a released loader did with CUBV2: wrong,
            and of use only to explain numbers that were measured so.

    Returns:
        The rows in the order of ``image_ids.txt``.

    Raises:
        InputError: for malformed rows (with file and line), ids that occur twice, labels, sizes or boxes
            of images that ``image_ids.txt`` does not have, and images without a label.
    """
    folder = Path(folder)
    ids_path, labels_path = folder / "image_ids.txt", folder / "class_labels.txt"
    numbers: dict[str, int] = {}
    for number, line in numbered_lines(ids_path):
        image_id = line.strip()
        if image_id in numbers:
            raise InputError(f"{ids_path}:{number}: image id {image_id} occurs twice; remove one row")
        numbers[image_id] = number
    rows = _labelled(numbers, labels_path)
    _read_sizes(rows, folder / "image_sizes.txt")
    _read_localization(rows, folder / "localization.txt", cubv2_boxes)
    return [rows[image_id] for image_id in numbers]


def list_wsol(metadata: Path, images: Path, *, cubv2_boxes: CubV2Boxes = "corners") -> Listing:
    """List one data set of the evaluator.

    Args:
        metadata: folder with ``train``, ``val`` or ``test`` of lists, such as ``metadata/CUB``. Class names
            come from ``classes.txt`` there (one a line, or ``<id> <name>``) if it exists, else from the
            folder names of the images if each class has its own, else they are the class numbers.
        images: the image root. Images are looked for below it and, for the known placements of CUB, below its
            ``images`` and ``CUBV2`` folders; ``val/X.JPEG`` is also found as ``val/<wnid>/X.JPEG``.
        cubv2_boxes: how the box rows of ``val`` are read, see :func:`read_lists`.

    Raises:
        InputError: if there are no lists or no images; reading a split checks the rest.
    """
    existing_folder(metadata, "WSOL lists (train, val, test)")
    existing_folder(images, "the images of the WSOL lists")
    found = [split for split in SPLITS if (metadata / split / "image_ids.txt").exists()]
    if not found:
        inside = (metadata / "image_ids.txt").exists()
        remedy = f"write wsol:{metadata.parent}@{images}" if inside else "check the path"
        raise InputError(f"{metadata}: no train, val or test folder with image_ids.txt; {remedy}")
    # Every split takes the names of the first one that exists, so that all splits agree.
    labels = _class_names(metadata, metadata / found[0])
    roots = (images, images / "images", images / "CUBV2", images / "CUBV2" / "images")
    return Listing(
        name="wsol",
        root=metadata,
        labels=labels,
        splits={
            split: partial(
                records,
                metadata / split,
                roots,
                labels,
                cubv2_boxes=cubv2_boxes if split == "val" else "corners",
            )
            for split in found
        },
        upright=False,
        hints={split: f"add the lists {metadata / split}/*.txt" for split in SPLITS},
    )


def records(
    folder: Path, roots: Sequence[Path], labels: Sequence[str], *, cubv2_boxes: CubV2Boxes = "corners"
) -> list[Record]:
    """The rows of :func:`read_lists` with their files found below the first root that has the first image."""
    if cubv2_boxes == "xywh-bug":
        logger.warning("%s: boxes are read as x,y,width,height, which they are not (xywh-bug)", folder)
    rows = read_lists(folder, cubv2_boxes=cubv2_boxes)
    if not rows:
        raise InputError(f"{folder / 'image_ids.txt'}: no image ids in it; download the lists again")
    index = FolderIndex()
    root = next((str(root) for root in roots if _find(index, str(root), rows[0].image_id)), None)
    if root is None:
        looked = ", ".join(str(root) for root in roots if root.is_dir())
        raise InputError(
            f"{rows[0].image_id}: the first image of {folder} is not below {looked or roots[0]}; "
            "give the image root as wsol:METADATA_DIR@IMAGE_ROOT"
        )

    def existing(name: str) -> str:
        path = _find(index, root, name)
        if path is None:
            raise InputError(f"{os.path.join(root, name)}: no such file, but {folder} lists it; add the file")
        return path

    found: list[Record] = []
    for row in rows:
        if row.label >= len(labels):
            raise InputError(
                f"{folder / 'class_labels.txt'}: {row.image_id} has class {row.label}, "
                f"expected 0..{len(labels) - 1} as in the other lists; correct the row"
            )
        found.append(
            Record(
                image_id=row.image_id,
                path=existing(row.image_id),
                label=row.label,
                boxes_xywh=corners_to_xywh(row.boxes_xyxy),
                masks=tuple(map(existing, row.masks)),
                ignore=existing(row.ignore) if row.ignore else None,
                size=row.size,
            )
        )
    return found


def _find(index: FolderIndex, root: str, name: str) -> str | None:
    folder, base = os.path.split(os.path.join(root, name))
    return index.find_below(folder, base)


def _labelled(numbers: dict[str, int], path: Path) -> dict[str, WsolRow]:
    rows: dict[str, WsolRow] = {}
    for number, line in numbered_lines(path):
        image_id, _, label = line.strip().rpartition(",")
        if not image_id or not label.isdecimal():
            raise bad_row(path, number, line, "<image_id>,<label 0, 1, ...>")
        if image_id not in numbers:
            raise _unknown(path, number, image_id)
        if image_id in rows:
            raise InputError(f"{path}:{number}: second label of {image_id}, expected one; remove one row")
        rows[image_id] = WsolRow(image_id, int(label))
    for image_id, number in numbers.items():
        if image_id not in rows:
            raise InputError(f"{path}: no label of {image_id} (image_ids.txt:{number}); add a row")
    return rows


def _read_sizes(rows: dict[str, WsolRow], path: Path) -> None:
    for number, line in numbered_lines(path) if path.exists() else ():
        image_id, *numbers = line.strip().rsplit(",", 2)
        if len(numbers) != 2 or not all(text.isdecimal() for text in numbers):
            raise bad_row(path, number, line, "<image_id>,<width>,<height>")
        if image_id not in rows:
            raise _unknown(path, number, image_id)
        rows[image_id].size = int(numbers[0]), int(numbers[1])


def _read_localization(rows: dict[str, WsolRow], path: Path, cubv2_boxes: CubV2Boxes) -> None:
    for number, line in numbered_lines(path) if path.exists() else ():
        image_id, *fields = line.strip().split(",")
        row = rows.get(image_id)
        if len(fields) == 2 and fields[0]:
            if row is None:
                raise _unknown(path, number, image_id)
            row.masks.append(fields[0])
            row.ignore = row.ignore or fields[1] or None
            continue
        try:
            x0, y0, x1, y1 = map(float, fields)
        except ValueError:
            raise bad_row(
                path, number, line, "<image_id>,<x0>,<y0>,<x1>,<y1>' or '<image_id>,<mask>,<ignore mask>"
            ) from None
        if row is None:
            raise _unknown(path, number, image_id)
        if cubv2_boxes == "xywh-bug":
            if row.size is None:
                raise InputError(
                    f"{path}:{number}: xywh-bug needs the size of {image_id} in image_sizes.txt; add it"
                )
            x1, y1 = min(x0 + x1, row.size[0]), min(y0 + y1, row.size[1])
        if x1 < x0 or y1 < y0:
            raise bad_row(path, number, line, "<image_id>,<x0>,<y0>,<x1>,<y1> with x0 <= x1, y0 <= y1")
        row.boxes_xyxy.append((x0, y0, x1, y1))


def _unknown(path: Path, number: int, image_id: str) -> InputError:
    return InputError(
        f"{path}:{number}: row for {image_id}, which image_ids.txt does not have; remove the row"
    )


def _class_names(metadata: Path, lists: Path) -> list[str]:
    folders: dict[int, set[str]] = {}
    path = lists / "class_labels.txt"
    for number, line in numbered_lines(path):
        image_id, _, label = line.strip().rpartition(",")
        if not image_id or not label.isdecimal():
            raise bad_row(path, number, line, "<image_id>,<label 0, 1, ...>")
        folders.setdefault(int(label), set()).add(os.path.basename(os.path.dirname(image_id)))
    count = max(folders, default=-1) + 1
    named = metadata / "classes.txt"
    if named.exists():
        lines = [line.strip() for _, line in numbered_lines(named)]
        numbered = all(line.split(maxsplit=1)[0] == str(i) for i, line in enumerate(lines, start=1))
        names = [line.split(maxsplit=1)[-1] for line in lines] if numbered else lines
        if len(names) < count:
            raise InputError(f"{named}: {len(names)} names, expected {count} as in {path}; add the rest")
        return names
    names = {label: next(iter(of)) for label, of in folders.items() if len(of) == 1}
    one_to_one = len(names) == count and len(set(names.values())) == count and all(names.values())
    return [names[label] if one_to_one else str(label) for label in range(count)]
