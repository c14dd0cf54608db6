"""Caltech 101 with its annotations: a box and an outline for each photo.

Fei-Fei, Fergus, Perona, "Learning generative visual models from few training examples", CVPR workshop 2004.
"""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...errors import InputError
from ..images import walk_images
from .listing import Listing, Record, corners_to_xywh, existing_folder
from .matlab import read_mat

_IMAGES = ("101_ObjectCategories", "images")
_ANNOTATIONS = ("Annotations", "annotations")
# Four classes have other names in the official annotations.
_ANNOTATION_FOLDERS = {
    "Faces": "Faces_2",
    "Faces_easy": "Faces_3",
    "Motorbikes": "Motorbikes_16",
    "airplanes": "Airplanes_Side_2",
}


def list_caltech101(root: Path) -> Listing:
    """List ``101_ObjectCategories/<class>/image_NNNN.jpg`` with ``Annotations/<class>/annotation_NNNN.mat``.

    The folders may also be called ``images`` and ``annotations``. Boxes are the numbers of ``box_coord``
    (top, bottom, left, right) as corners; the mask is the outline ``obj_contour``, relative to the box's
    top left corner, filled, and kept as a PNG of some hundred bytes. No official split.

    Raises:
        InputError: for missing folders, no photos, and photos and annotations that do not pair.
    """
    existing_folder(root, "Caltech 101")
    images = next((root / name for name in _IMAGES if (root / name).is_dir()), None)
    annotations = next((root / name for name in _ANNOTATIONS if (root / name).is_dir()), None)
    if images is None or annotations is None:
        raise InputError(
            f"{root}: expected 101_ObjectCategories/ and Annotations/ (Caltech 101); check the path"
        )
    names = [name for name in walk_images(images) if not name.startswith("BACKGROUND_Google/")]
    if not names:
        raise InputError(f"{images}: no images in class folders; check the path")
    for name in names:
        if "/" not in name:
            raise InputError(f"{images / name}: a photo outside of the class folders; move it")
    labels = sorted({name.split("/")[0] for name in names})
    pairs = {name: _annotation_of(annotations, name) for name in names}
    unpaired = set(annotations.rglob("annotation_*.mat")) - set(pairs.values())
    for path in sorted(unpaired):
        raise InputError(
            f"{path}: no photo for this annotation in {images}; add the photo or remove the file"
        )
    return Listing(
        name="caltech101", root=root, labels=labels, splits={"all": partial(_records, images, labels, pairs)}
    )


def _annotation_of(annotations: Path, name: str) -> Path:
    folder, base = os.path.split(name)
    number = os.path.splitext(base)[0].rpartition("_")[2]
    for of in (folder, _ANNOTATION_FOLDERS.get(folder, folder)):
        path = annotations / of / f"annotation_{number}.mat"
        if path.exists():
            return path
    raise InputError(
        f"{annotations / folder}/annotation_{number}.mat: no such file for the photo {name}; add it"
    )


def _records(images: Path, labels: list[str], pairs: dict[str, Path]) -> list[Record]:
    records: list[Record] = []
    for name, annotation in pairs.items():
        path = os.path.join(images, name)
        (top, bottom, left, right), outline = _read(annotation)
        # Only the header is read here; an unreadable photo keeps its box and fails, by name, when it is used.
        try:
            with Image.open(path) as image:
                size = image.size
        except OSError:
            size = None
        records.append(
            Record(
                image_id=name,
                path=path,
                label=labels.index(name.split("/")[0]),
                boxes_xywh=corners_to_xywh([[left, top, right, bottom]]),
                masks=() if size is None else (_filled(outline + [[left], [top]], size),),
                size=size,
            )
        )
    return records


def _read(path: Path) -> tuple[list[float], NDArray[np.float64]]:
    found = read_mat(path, ["box_coord", "obj_contour"], squeeze=False)
    try:
        box = np.asarray(found[0], dtype=np.float64).reshape(4)
        outline = np.asarray(found[1], dtype=np.float64).reshape(2, -1)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path}: box_coord and obj_contour are not 4 numbers and a row of points ({error}); get it again"
        ) from None
    if box[1] < box[0] or box[3] < box[2] or outline.shape[1] < 3:
        raise InputError(
            f"{path}: box_coord {box.tolist()} and {outline.shape[1]} contour points; correct it"
        )
    return box.tolist(), outline


def _filled(outline: NDArray[np.float64], size: tuple[int, int]) -> bytes:
    """The polygon ``(2, k)`` of x and y, filled: a 1-bit PNG."""
    mask = Image.new("1", size)
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in outline.T], fill=1)
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()
