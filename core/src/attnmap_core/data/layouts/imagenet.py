"""ILSVRC2012 in its official layout.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ...errors import InputError
from ..images import is_image_name, walk_images
from .listing import Listing, Record, bad_row, corners_to_xywh, existing_folder, numbered_lines
from .voc import Annotation, read_annotation

_LIST_FORM = "<wnid>/<file> <class> <x0> <y0> <x1> <y1> ..."


def list_imagenet(root: Path, *, annotations: Path | None = None) -> Listing:
    """List ILSVRC2012: ``train`` from ``train/<wnid>/``, ``test`` from the official validation images.

    The names are those of localization papers: the 50,000 official validation images, flat in ``val/`` or in
    ``val/<wnid>/``, are split ``test``. Validation is ImageNetV2 through the WSOL lists, or a part of train.
    The class index is the rank of the wnid in sorted order, not the id of the devkit.

    Args:
        root: folder with ``train`` and ``val``, or one that has them in ``Data/CLS-LOC`` or
            ``ILSVRC/Data/CLS-LOC``.
        annotations: boxes of the official validation images: a folder of XML files (flat or by wnid), a list
            ``<wnid>/<file> <class> [<x0> <y0> <x1> <y1>]...`` (several rows of one image add up), or a CSV
            ``ImageId,PredictionString``. By default ``Annotations/CLS-LOC/val`` or ``LOC_val_solution.csv``
            is taken where it exists. A flat ``val/`` has its classes from here.

    Raises:
        InputError: for missing folders, malformed annotations, and photos whose class cannot be known.
    """
    root = existing_folder(root, "ILSVRC2012")
    home = next((root / top for top in (".", "ILSVRC") if (root / top / "Data" / "CLS-LOC").is_dir()), root)
    data = (
        home / "Data" / "CLS-LOC" if home / "Data" / "CLS-LOC" != root and (home / "Data").is_dir() else root
    )
    if annotations is None:
        guesses = (
            home / "Annotations" / "CLS-LOC" / "val",
            home / "LOC_val_solution.csv",
            root / "LOC_val_solution.csv",
        )
        annotations = next((path for path in guesses if path.exists()), None)
    elif not annotations.exists():
        raise InputError(f"{annotations}: no such file or folder, expected boxes; check the path")
    if not (data / "train").is_dir() and not (data / "val").is_dir():
        raise InputError(f"{root}: neither train nor val in it, expected ILSVRC2012; check the path")
    facts = _read_annotations(annotations) if annotations is not None else {}
    labels = _wnids(data, facts)
    splits = {}
    if (data / "train").is_dir():
        splits["train"] = partial(_train, data / "train", labels)
    if (data / "val").is_dir():
        splits["test"] = partial(_validation, data / "val", labels, facts, annotations)
    return Listing(
        name="imagenet",
        root=root,
        labels=labels,
        splits=splits,
        upright=False,
        hints={
            "val": "the official validation images are split 'test'; for ImageNetV2 give "
            "wsol:METADATA_DIR@IMAGE_ROOT, for a plain image folder folder:PATH",
        },
    )


@dataclass(slots=True)
class _Fact:
    """What an annotation says of one file; ``wnid`` or ``label`` or neither may be known."""

    where: str
    wnid: str | None = None
    label: int | None = None
    size: tuple[int, int] | None = None
    corners: list[list[float]] = field(default_factory=list[list[float]])


def _wnids(data: Path, facts: Mapping[str, _Fact]) -> list[str]:
    for split in ("train", "val"):
        if (data / split).is_dir():
            with os.scandir(data / split) as entries:
                folders = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
            if folders:
                return folders
    wnids = sorted({fact.wnid for fact in facts.values() if fact.wnid is not None})
    if not wnids:
        raise InputError(
            f"{data}: no folder by wnid and no annotations, so the classes are unknown; give the annotations "
            "(XML folder, list or CSV)"
        )
    return wnids


def _train(folder: Path, labels: list[str]) -> list[Record]:
    rank = {wnid: label for label, wnid in enumerate(labels)}
    records: list[Record] = []
    for name in walk_images(folder):
        wnid, _, rest = name.partition("/")
        if not rest:
            raise InputError(
                f"{folder / name}: a photo outside of a class folder, expected <wnid>/<file>; move it"
            )
        records.append(Record(image_id=f"train/{name}", path=os.path.join(folder, name), label=rank[wnid]))
    return records


def _validation(
    folder: Path, labels: list[str], facts: Mapping[str, _Fact], annotations: Path | None
) -> list[Record]:
    rank = {wnid: label for label, wnid in enumerate(labels)}
    records: list[Record] = []
    left = dict(facts)
    for name in walk_images(folder):
        wnid, base = os.path.split(name)
        fact = left.pop(os.path.splitext(base)[0], None)
        label = rank.get(wnid)
        if fact is not None:
            told = fact.label if fact.wnid is None else rank.get(fact.wnid)
            if told is None or told >= len(labels):
                raise InputError(
                    f"{fact.where}: class {fact.wnid or fact.label} of {base} is not among the {len(labels)} "
                    "class folders; correct it or add the folder"
                )
            if label is not None and told != label:
                raise InputError(
                    f"{fact.where}: {base} is a {labels[told]}, but lies in the folder {wnid}; correct one"
                )
            label = told
        if label is None:
            raise InputError(
                f"{folder / name}: class unknown (flat folder, no row in {annotations or 'annotations'}); "
                "give its annotations or put it into val/<wnid>/"
            )
        records.append(
            Record(
                # The evaluators call the photo so, wherever it was sorted to.
                image_id=f"val/{base}",
                path=os.path.join(folder, name),
                label=label,
                boxes_xywh=corners_to_xywh(fact.corners) if fact is not None else (),
                size=fact.size if fact is not None else None,
            )
        )
    if left:
        stem, fact = next(iter(left.items()))
        raise InputError(
            f"{fact.where}: annotates {stem}, which is not in {folder}; add the photo or remove the row"
        )
    return records


def _read_annotations(path: Path) -> dict[str, _Fact]:
    """Facts by file stem."""
    if path.is_dir():
        return _read_xml_folder(path)
    return _read_csv(path) if path.suffix.lower() == ".csv" else _read_list(path)


def _read_xml_folder(folder: Path) -> dict[str, _Fact]:
    facts: dict[str, _Fact] = {}
    for path in sorted(folder.rglob("*.xml")):
        annotation: Annotation = read_annotation(path)
        names = {name for name, _ in annotation.objects}
        if len(names) != 1:
            raise InputError(f"{path}: objects of {len(names)} classes, expected one wnid; correct the file")
        facts[path.stem] = _Fact(
            str(path), wnid=names.pop(), size=annotation.size, corners=[box for _, box in annotation.objects]
        )
    if not facts:
        raise InputError(f"{folder}: no XML files, expected one for each validation image; check the path")
    return facts


def _read_list(path: Path) -> dict[str, _Fact]:
    facts: dict[str, _Fact] = {}
    for number, line in numbered_lines(path):
        name, *fields = line.split()
        if not is_image_name(name) or len(fields) % 4 != 1 or not fields[0].isdecimal():
            raise bad_row(path, number, line, _LIST_FORM)
        try:
            numbers = [float(text) for text in fields[1:]]
        except ValueError:
            raise bad_row(path, number, line, _LIST_FORM) from None
        stem = os.path.splitext(os.path.basename(name))[0]
        fact = facts.setdefault(stem, _Fact(f"{path}:{number}", label=int(fields[0])))
        if fact.label != int(fields[0]):
            raise InputError(
                f"{path}:{number}: {name} has class {fields[0]}, but {fact.label} before; correct one"
            )
        fact.corners += [_checked(path, number, line, numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
    return facts


def _read_csv(path: Path) -> dict[str, _Fact]:
    facts: dict[str, _Fact] = {}
    form = "<ImageId>,<wnid x0 y0 x1 y1> ..."
    for number, line in numbered_lines(path):
        row = next(csv.reader([line]))
        if number == 1 and row[:1] == ["ImageId"]:
            continue
        fields = row[1].split() if len(row) == 2 else []
        if not fields or len(fields) % 5 or len(set(fields[::5])) != 1:
            raise bad_row(path, number, line, form)
        if row[0] in facts:
            raise InputError(f"{path}:{number}: second row of {row[0]}, expected one; remove one")
        try:
            corners = [[float(text) for text in fields[i + 1 : i + 5]] for i in range(0, len(fields), 5)]
        except ValueError:
            raise bad_row(path, number, line, form) from None
        boxes = [_checked(path, number, line, box) for box in corners]
        facts[row[0]] = _Fact(f"{path}:{number}", wnid=fields[0], corners=boxes)
    return facts


def _checked(path: Path, number: int, line: str, box: list[float]) -> list[float]:
    if box[2] < box[0] or box[3] < box[1]:
        raise bad_row(path, number, line, "x0 <= x1 and y0 <= y1")
    return box
