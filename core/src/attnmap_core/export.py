"""Predictions as annotation files that other tools read: COCO, YOLO, Pascal VOC, CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from .boxes import xyxy_to_xywh
from .files import write_json, write_text
from .prediction import Prediction

Format = Literal["coco", "yolo", "voc", "csv"]
FORMATS: tuple[Format, ...] = ("coco", "yolo", "voc", "csv")


def export_predictions(
    predictions: Iterable[Prediction], folder: str | Path, format: Format = "coco", labels: Sequence[str] = ()
) -> list[Path]:
    """Write the boxes of all predictions in one annotation format.

    ========  =====================================================================================================
    format    files
    ========  =====================================================================================================
    ``coco``  ``annotations.json``: images, categories and annotations; ``bbox`` is xywh in pixels, ``score`` added
    ``yolo``  ``labels/<name>.txt``: class, centre and size as shares of the photo; ``data.yaml`` names the classes,
              ``photos.csv`` the photo of each file
    ``voc``   ``annotations/<name>.xml``: integer pixels, counted from 1, both ends inclusive
    ``csv``   ``boxes.csv``: one row a box, xyxy in pixels, end exclusive
    ========  =====================================================================================================

    Photos of the same name from different folders get distinct files (``a.txt``, ``a_2.txt``). A photo without a box
    is listed without one.

    Args:
        predictions: in any number; only boxes are kept in memory.
        folder: where to write; existing files of the same names are replaced.
        format: one of :data:`FORMATS`.
        labels: class names by index; names met in the predictions are used where it is shorter.

    Returns:
        The files written.

    Raises:
        ValueError: for another format.
        InputError: if the folder cannot be written.
    """
    writers = {"coco": _coco, "yolo": _yolo, "voc": _voc, "csv": _csv}
    if format not in writers:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    kept = list(predictions)
    names = {p.label: p.label_name for p in kept} | dict(enumerate(labels))
    return writers[format](
        kept, Path(folder), [names.get(i, str(i)) for i in range(max(names, default=-1) + 1)]
    )


def _coco(predictions: list[Prediction], folder: Path, labels: list[str]) -> list[Path]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, p in enumerate(predictions, start=1):
        images.append({"id": number, "file_name": p.source, "width": p.width, "height": p.height})
        for box, score in zip(xyxy_to_xywh(p.boxes_xyxy).reshape(-1, 4).tolist(), p.box_scores.tolist()):
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": p.label + 1,
                "bbox": [round(v, 2) for v in box],
                "area": round(box[2] * box[3], 2),
                "iscrowd": 0,
                "score": round(score, 4),
            })  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(labels, start=1)]
    path = folder / "annotations.json"
    # "info" and "licenses" hold nothing here, but pycocotools fails without "info".
    write_json(
        path,
        {"info": {}, "licenses": [], "images": images, "categories": categories, "annotations": annotations},
    )
    return [path]


def _yolo(predictions: list[Prediction], folder: Path, labels: list[str]) -> list[Path]:
    written: list[Path] = []
    for p, stem in zip(predictions, _stems(predictions)):
        size = np.array([p.width, p.height, p.width, p.height], dtype=np.float64)
        boxes = p.boxes_xyxy.reshape(-1, 4)
        centred = (
            np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1) / size
        )
        lines = [f"{p.label} " + " ".join(f"{v:.6f}" for v in box) + "\n" for box in centred.tolist()]
        written.append(folder / "labels" / f"{stem}.txt")
        write_text(written[-1], "".join(lines))
    written.append(folder / "photos.csv")
    photos = ([path.name, p.source] for path, p in zip(written, predictions))
    write_text(written[-1], _csv_text(["labels", "photo"], photos))
    # JSON strings are YAML strings, whatever characters a class name has.
    names = "".join(f"  {i}: {json.dumps(name, ensure_ascii=False)}\n" for i, name in enumerate(labels))
    written.append(folder / "data.yaml")
    write_text(written[-1], f"path: .\ntrain: images\nval: images\nnc: {len(labels)}\nnames:\n{names}")
    return written


def _voc(predictions: list[Prediction], folder: Path, labels: list[str]) -> list[Path]:
    written: list[Path] = []
    for p, stem in zip(predictions, _stems(predictions)):
        root = ElementTree.Element("annotation")
        _element(root, "filename", PurePath(p.source).name)
        _element(root, "path", p.source)
        size = ElementTree.SubElement(root, "size")
        for tag, value in (("width", p.width), ("height", p.height), ("depth", 3)):
            _element(size, tag, value)
        for box in _one_based(p).tolist():
            item = ElementTree.SubElement(root, "object")
            _element(item, "name", labels[p.label])
            for tag in ("truncated", "difficult"):
                _element(item, tag, 0)
            corners = ElementTree.SubElement(item, "bndbox")
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box):
                _element(corners, tag, value)
        ElementTree.indent(root)
        written.append(folder / "annotations" / f"{stem}.xml")
        write_text(written[-1], ElementTree.tostring(root, encoding="unicode") + "\n")
    return written


def _csv(predictions: list[Prediction], folder: Path, labels: list[str]) -> list[Path]:
    header = ["source", "width", "height", "label", "probability", "x0", "y0", "x1", "y1", "score"]
    rows: list[list[object]] = []
    for p in predictions:
        head = [p.source, p.width, p.height, labels[p.label], f"{p.probability:.6f}"]
        boxes = p.boxes_xyxy.reshape(-1, 4).tolist()
        for box, score in zip(boxes, p.box_scores.tolist()):
            rows.append([*head, *(f"{v:.2f}" for v in box), f"{score:.4f}"])
        if not boxes:
            rows.append([*head, "", "", "", "", ""])
    path = folder / "boxes.csv"
    write_text(path, _csv_text(header, rows))
    return [path]


def _csv_text(header: list[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _one_based(p: Prediction) -> NDArray[np.int64]:
    """Pixels counted from 1, both ends inclusive, at least one pixel and within the photo."""
    boxes = p.boxes_xyxy.reshape(-1, 4)
    size = np.array([p.width, p.height])
    first = np.clip(np.floor(boxes[:, :2]).astype(np.int64) + 1, 1, size)
    return np.concatenate([first, np.clip(np.ceil(boxes[:, 2:]).astype(np.int64), first, size)], axis=1)


def _stems(predictions: list[Prediction]) -> list[str]:
    """File names of the annotations: those of the photos, made distinct."""
    taken: set[str] = set()
    stems: list[str] = []
    for p in predictions:
        stem = base = PurePath(p.source).stem or "photo"
        number = 1
        while stem.lower() in taken:
            number += 1
            stem = f"{base}_{number}"
        taken.add(stem.lower())
        stems.append(stem)
    return stems


def _element(parent: ElementTree.Element, tag: str, value: object) -> None:
    # XML has no way to say control characters.
    ElementTree.SubElement(parent, tag).text = re.sub("[\x00-\x08\x0b-\x1f\ufffe\uffff]", "", str(value))
