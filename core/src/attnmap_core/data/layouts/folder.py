"""Plain image folders, with boxes from ``metadata.jsonl`` or a COCO file if there are any."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from ...errors import InputError
from ...files import read_json
from ..images import walk_images
from .listing import BoxXYWH, Listing, Record, check_files, existing_folder, numbered_lines

_SPLIT_FOLDERS = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test",
}  # fmt: skip
_COCO_NAMES = ("annotations.json", "_annotations.coco.json")
_ONLY_CLASS = "object"


@dataclass(slots=True)
class _Fact:
    """What an annotation file says of one photo; names are relative to the root of the data set."""

    where: str
    label: str | int | None = None
    categories: frozenset[str] = frozenset()
    boxes_xywh: tuple[BoxXYWH, ...] = ()
    masks: tuple[str, ...] = ()
    ignore: str | None = None
    size: tuple[int, int] | None = None


@dataclass(slots=True)
class _Facts:
    by_name: dict[str, _Fact]
    categories: tuple[str, ...] = ()  # all that a COCO file uses


def list_folder(root: Path, *, annotations: Path | None = None) -> Listing:
    """List ``root/<class>/*.jpg``, or ``root/{train,val,test}/<class>/*.jpg``.

    The first folder below the root, or below the split, is the class; deeper folders do not matter. Photos
    without class folders are one class: ``"object"``, or the one category of the COCO file. Boxes (pixels
    ``[x, y, width, height]``) come, where they exist, from one of these in the root or in the split folders:

    - ``metadata.jsonl``, as Hugging Face image folders have it: rows ``{"file_name": ..., "label": ...,
      "objects": {"bbox": [[x, y, w, h], ...]}}``. All but ``file_name`` is optional; a ``label`` (name or
      number) takes the place of the class folders and must then be there for every photo. ``"mask"``
      and ``"ignore"`` may name mask files.
    - a COCO file ``annotations.json`` or ``_annotations.coco.json``. Without class folders its categories are
      the classes, one a photo. Crowd annotations are left out.

    Args:
        root: the data set.
        annotations: one of these files, if it lies or is called otherwise; names in it are relative to
            ``root`` or to its own folder.

    Raises:
        InputError: for no photos, class folders without photos, photos without a class, rows that are
            malformed or speak of a file that is not there, and photos that are listed twice.
    """
    existing_folder(root, "photos in class folders")
    parts = _parts(root)
    names = {split: [prefix + name for name in walk_images(root / prefix)] for split, prefix in parts.items()}
    facts = _read_facts(root, parts.values(), annotations)
    auxiliary = {file for fact in facts.by_name.values() for file in (*fact.masks, fact.ignore)}
    names = {split: [name for name in found if name not in auxiliary] for split, found in names.items()}
    every = [name for found in names.values() for name in found]
    if not every:
        raise InputError(f"{root}: no images in this folder; check the path")
    _check_complete(root, facts, every)
    classes = _classes(root, parts, names, facts, auxiliary)
    labels, index_of = _labels(root, classes.values())
    return Listing(
        name="folder",
        root=root,
        labels=labels,
        splits={
            split: partial(_records, root, found, classes, index_of, facts) for split, found in names.items()
        },
        hints={split: f"add the folder {root / split}" for split in ("train", "val", "test")},
    )


def _parts(root: Path) -> dict[str, str]:
    """The prefix, such as ``"train/"``, of each split; ``{"all": ""}`` if the folder is not split."""
    folders = _subfolders(root)
    parts: dict[str, str] = {}
    if "train" in folders or (folders and all(name in _SPLIT_FOLDERS for name in folders)):
        for name in folders:
            split = _SPLIT_FOLDERS.get(name)
            if split in parts:
                raise InputError(f"{root}: {parts[split]} and {name}/ are both the {split} split; keep one")
            if split is not None:
                parts[split] = f"{name}/"
        return parts
    return {"all": "images/" if folders == ["images"] else ""}


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _read_facts(root: Path, prefixes: Iterable[str], given: Path | None) -> _Facts:
    if given is not None:
        paths = [given]
    else:
        folders = [root, *(root / prefix for prefix in prefixes if prefix)]
        paths = [path for folder in folders for path in _annotation_files(folder)]
    facts = _Facts({})
    for path in paths:
        found = (_read_jsonl if path.suffix == ".jsonl" else _read_coco)(path, _names_relative_to(root, path))
        for name, fact in found.by_name.items():
            if name in facts.by_name:
                before = facts.by_name[name].where
                raise InputError(f"{fact.where}: annotates {name}, as does {before}; keep one of the two")
            facts.by_name[name] = fact
        facts.categories = tuple(sorted({*facts.categories, *found.categories}))
    return facts


def _annotation_files(folder: Path) -> list[Path]:
    found = [folder / name for name in ("metadata.jsonl", *_COCO_NAMES) if (folder / name).exists()]
    if len(found) > 1:
        raise InputError(f"{folder}: has {' and '.join(path.name for path in found)}, expected one; name one")
    return found


def _names_relative_to(root: Path, path: Path) -> Callable[[str], str]:
    """How a name in the annotation file becomes one relative to the root."""
    own = path.parent

    def relative(name: str) -> str:
        base = own if (own / name).exists() or not (root / name).exists() else root
        return os.path.relpath(base / name, root).replace(os.sep, "/")

    return relative


def _read_jsonl(path: Path, relative: Callable[[str], str]) -> _Facts:
    facts = _Facts({})
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON ({error}); correct the row") from None
        name = cast(dict[str, Any], row).get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise InputError(
                f"{where}: expected an object with \"file_name\", found '{line[:80]}'; correct the row"
            )
        name = relative(name)
        if name in facts.by_name:
            raise InputError(f"{where}: second row of {name}, expected one; put its boxes into one row")
        label = row.get("label")
        if not (label is None or isinstance(label, str) or (type(label) is int and label >= 0)):
            raise InputError(f"{where}: label {label!r}, expected a name or a number from 0; correct the row")
        objects = row.get("objects")
        if not (objects is None or isinstance(objects, dict)):
            raise InputError(f'{where}: objects {objects!r}, expected {{"bbox": [...]}}; correct the row')
        masks, ignored = (_files(where, row, key) for key in ("mask", "ignore"))
        facts.by_name[name] = _Fact(
            where,
            label=label,
            boxes_xywh=_boxes(where, (objects or row).get("bbox")),
            masks=tuple(map(relative, masks)),
            ignore=relative(ignored[0]) if ignored else None,
        )
    return facts


def _files(where: str, row: dict[str, Any], key: str) -> list[str]:
    value = row.get(key) or []
    names: Any = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: {key} {value!r}, expected a file name; correct the row")
    return names


def _boxes(where: str, value: Any) -> tuple[BoxXYWH, ...]:
    """From one ``[x, y, width, height]`` or a list of them."""
    rows: Any = value or []
    if rows and not (isinstance(rows, list) and isinstance(rows[0], list)):
        rows = [rows]
    boxes: list[BoxXYWH] = []
    for row in rows:
        try:
            x, y, width, height = map(float, row)
        except (TypeError, ValueError):
            raise InputError(
                f"{where}: bbox {row!r}, expected [x, y, width, height]; correct the row"
            ) from None
        boxes.append((x, y, width, height))
    return tuple(boxes)


def _read_coco(path: Path, relative: Callable[[str], str]) -> _Facts:
    content = read_json(path)
    try:
        categories = {row["id"]: str(row["name"]) for row in content["categories"]}
        images = {row["id"]: row for row in content["images"]}
        annotations = [row for row in content["annotations"] if not row.get("iscrowd")]
        boxes: dict[Any, list[BoxXYWH]] = {image_id: [] for image_id in images}
        names: dict[Any, set[str]] = {image_id: set() for image_id in images}
        if len(images) != len(content["images"]):
            raise InputError(f"{path}: image ids occur twice, expected each once; correct the file")
        for row in annotations:
            where = f"{path}: annotation {row['id']}"
            if row["image_id"] not in images:
                raise InputError(
                    f"{where}: of image {row['image_id']}, which the file does not have; remove it"
                )
            if row["category_id"] not in categories:
                raise InputError(f"{where}: category {row['category_id']} is not in the file; correct it")
            boxes[row["image_id"]] += _boxes(where, row["bbox"])
            names[row["image_id"]].add(categories[row["category_id"]])
        facts: dict[str, _Fact] = {}
        for image_id, row in images.items():
            name = relative(row["file_name"])
            if name in facts:
                raise InputError(f"{path}: two images are called {name}, expected one; correct the file")
            size = (int(row["width"]), int(row["height"])) if row.get("width") and row.get("height") else None
            facts[name] = _Fact(
                f"{path}: image {image_id}",
                categories=frozenset(names[image_id]),
                boxes_xywh=tuple(boxes[image_id]),
                size=size,
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a COCO file (missing or wrong: {error}), "
            "expected images, annotations and categories; correct it"
        ) from None
    return _Facts(facts, tuple(sorted(set().union(*names.values()))))


def _check_complete(root: Path, facts: _Facts, names: Sequence[str]) -> None:
    present = set(names)
    for name, fact in facts.by_name.items():
        if name not in present:
            raise InputError(f"{fact.where}: no such photo {root / name}; add the photo or remove the row")


def _classes(
    root: Path, parts: dict[str, str], names: dict[str, list[str]], facts: _Facts, auxiliary: set[str | None]
) -> dict[str, str | int]:
    """The class of every photo."""
    every = [name for found in names.values() for name in found]
    told = {name: fact.label for name, fact in facts.by_name.items() if fact.label is not None}
    if told:
        for name in every:
            if name not in told:
                raise InputError(f"{root / name}: no label in the metadata, where others have one; add it")
        return told
    below = {name: name[len(parts[split]) :] for split, found in names.items() for name in found}
    if any("/" in name for name in below.values()):
        _check_class_folders(root, parts, below, auxiliary)
        return {name: of.split("/")[0] for name, of in below.items()}
    if not facts.categories:
        return dict.fromkeys(every, _ONLY_CLASS)
    if len(facts.categories) == 1:
        return dict.fromkeys(every, facts.categories[0])
    classes: dict[str, str | int] = {}
    for name in every:
        own = sorted(facts.by_name[name].categories) if name in facts.by_name else []
        if len(own) != 1:
            raise InputError(
                f"{root / name}: objects of {len(own)} categories ({', '.join(own)}), "
                "expected one class a photo; sort the photos into class folders"
            )
        classes[name] = own[0]
    return classes


def _check_class_folders(
    root: Path, parts: dict[str, str], below: dict[str, str], auxiliary: set[str | None]
) -> None:
    for name, of in below.items():
        if "/" not in of:
            raise InputError(
                f"{root / name}: a photo outside of the class folders beside it; move it into one"
            )
    prefix = parts.get("train", parts.get("all"))
    if prefix is None:
        return
    filled = {of.split("/")[0] for name, of in below.items() if name.startswith(prefix)}
    filled |= {name[len(prefix) :].split("/")[0] for name in auxiliary if name and name.startswith(prefix)}
    for folder in _subfolders(root / prefix):
        if folder not in filled:
            raise InputError(
                f"{root / prefix / folder}: a class folder without images; add some or remove it"
            )


def _labels(root: Path, classes: Iterable[str | int]) -> tuple[list[str], dict[str | int, int]]:
    """Class names, and the index of each class; numbers stay what they are, names are sorted."""
    found = set(classes)
    numbers = {of for of in found if isinstance(of, int)}
    if numbers and len(numbers) != len(found):
        raise InputError(f"{root}: labels are names and numbers mixed in the metadata; use one kind")
    if numbers:
        return [str(number) for number in range(max(numbers) + 1)], {number: number for number in numbers}
    labels = sorted(map(str, found))
    return labels, {label: index for index, label in enumerate(labels)}


def _records(
    root: Path,
    names: Sequence[str],
    classes: dict[str, str | int],
    index_of: dict[str | int, int],
    facts: _Facts,
) -> list[Record]:
    base = os.fspath(root)
    nothing = _Fact("")
    records: list[Record] = []
    for name in names:
        fact = facts.by_name.get(name, nothing)
        records.append(
            Record(
                image_id=name,
                path=os.path.join(base, name),
                label=index_of[classes[name]],
                boxes_xywh=fact.boxes_xywh,
                masks=tuple(os.path.join(base, mask) for mask in fact.masks),
                ignore=os.path.join(base, fact.ignore) if fact.ignore else None,
                size=fact.size,
            )
        )
    if facts.by_name:
        check_files(records, root)
    return records
