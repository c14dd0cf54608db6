"""CUB-200-2011 in its official layout, with CUBV2 as validation split where it is unpacked beside it.

Welinder et al., "Caltech-UCSD Birds 200", 2010; Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from ...errors import InputError
from . import wsol
from .listing import BoxXYWH, Listing, Record, bad_row, check_files, existing_folder, numbered_lines


def list_cub(root: Path, *, cubv2_boxes: wsol.CubV2Boxes = "corners") -> Listing:
    """List ``CUB_200_2011``: ``train`` and ``test`` from its text files, ``val`` from CUBV2.

    The text files are joined on their ids, whatever their order. CUBV2 is looked for where its lists are
    ``CUBV2/val/{image_ids,class_labels,localization}.txt`` and its images ``CUBV2/<image_id>`` or, unpacked
    into the folders of CUB itself, ``images/<image_id>``.

    Args:
        root: ``CUB_200_2011`` or the folder that holds it.
        cubv2_boxes: how the CUBV2 rows are read, see :func:`~.wsol.read_lists`.

    Raises:
        InputError: for missing files, malformed rows and ids that do not join.
    """
    root = existing_folder(root, "CUB-200-2011")
    if not (root / "images.txt").exists() and (root / "CUB_200_2011").is_dir():
        root = root / "CUB_200_2011"
    labels = _class_names(root / "classes.txt")
    splits = {name: partial(_official_split, root, labels, name == "train") for name in ("train", "test")}
    lists = root / "CUBV2" / "val"
    if lists.is_dir():
        images = (root / "CUBV2", root / "images")
        splits["val"] = partial(wsol.records, lists, images, labels, cubv2_boxes=cubv2_boxes)
    return Listing(
        name="cub",
        root=root,
        labels=labels,
        splits=splits,
        upright=False,
        hints={"val": f"unpack CUBV2 with its lists at {lists}"},
    )


def _class_names(path: Path) -> list[str]:
    names = {number: fields[0] for number, fields in _table(path, "<class id> <name>", 1).items()}
    if sorted(names) != list(range(1, len(names) + 1)):
        raise InputError(f"{path}: expected class ids 1..{len(names)} without gaps; correct the file")
    return [names[number] for number in sorted(names)]


def _official_split(root: Path, labels: list[str], train: bool) -> list[Record]:
    images = _table(root / "images.txt", "<id> <path>", 1)
    classes = _joined(root / "image_class_labels.txt", "<id> <class>", 1, images)
    in_train = _joined(root / "train_test_split.txt", "<id> <0 or 1>", 1, images)
    boxes = _joined(root / "bounding_boxes.txt", "<id> <x> <y> <width> <height>", 4, images)
    sizes_path = root / "image_sizes.txt"
    sizes = _joined(sizes_path, "<id> <width> <height>", 2, images) if sizes_path.exists() else {}
    records: list[Record] = []
    for number, (image_id,) in sorted(images.items()):
        label = _integer(root / "image_class_labels.txt", number, classes[number][0])
        if not 1 <= label <= len(labels):
            raise InputError(
                f"{root / 'image_class_labels.txt'}: image {number} has class {label}, "
                f"expected 1..{len(labels)} as in classes.txt; correct the row"
            )
        if in_train[number][0] not in ("0", "1"):
            raise InputError(
                f"{root / 'train_test_split.txt'}: image {number} has '{in_train[number][0]}', "
                "expected 0 or 1; correct the row"
            )
        if (in_train[number][0] == "1") == train:
            width_height = [_integer(sizes_path, number, text) for text in sizes.get(number, ())]
            records.append(
                Record(
                    image_id=image_id,
                    path=os.path.join(root, "images", image_id),
                    label=label - 1,
                    boxes_xywh=(_box(root / "bounding_boxes.txt", number, boxes[number]),),
                    size=(width_height[0], width_height[1]) if width_height else None,
                )
            )
    check_files(records, root / "images.txt")
    return records


def _table(path: Path, form: str, columns: int) -> dict[int, list[str]]:
    """Rows of ``<id> <column>...``, keyed by id; a single column may hold spaces."""
    rows: dict[int, list[str]] = {}
    for number, line in numbered_lines(path):
        key, *fields = line.split(maxsplit=1) if columns == 1 else line.split()
        if len(fields) != columns or not key.isdecimal():
            raise bad_row(path, number, line, form)
        if int(key) in rows:
            raise InputError(f"{path}:{number}: id {key} occurs twice, expected one row each; remove one")
        rows[int(key)] = [text.strip() for text in fields]
    return rows


def _joined(path: Path, form: str, columns: int, images: dict[int, list[str]]) -> dict[int, list[str]]:
    rows = _table(path, form, columns)
    for number in rows.keys() - images.keys():
        raise InputError(f"{path}: row for image {number}, which images.txt does not have; remove the row")
    for number in images.keys() - rows.keys():
        raise InputError(f"{path}: no row for image {number} of images.txt; add the row")
    return rows


def _integer(path: Path, number: int, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"{path}: image {number} has '{text}', expected a whole number; correct it"
        ) from None


def _box(path: Path, number: int, fields: list[str]) -> BoxXYWH:
    try:
        x, y, width, height = map(float, fields)
    except ValueError:
        raise InputError(
            f"{path}: image {number} has '{' '.join(fields)}', expected 4 numbers; correct it"
        ) from None
    return x, y, width, height
