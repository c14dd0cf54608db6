"""Photos with Pascal VOC files: one XML a photo.

Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ..images import walk_images
from .listing import Listing, Record, corners_to_xywh, existing_folder

_IMAGES = ("images", "JPEGImages")
_ANNOTATIONS = ("annotations", "Annotations")


@dataclass(frozen=True)
class Annotation:
    """One XML file: the size it states, and each object's name with its ``x0 y0 x1 y1``."""

    size: tuple[int, int] | None
    objects: list[tuple[str, list[float]]]


def read_annotation(path: Path) -> Annotation:
    """Read one VOC XML file. Coordinates are taken as written, as the WSOL evaluators do.

    Raises:
        InputError: if it is not XML, or an object lacks its name or its four numbers.
    """
    try:
        tree = ElementTree.parse(path)
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not an XML file ({error}); write it again or delete it") from None
    objects: list[tuple[str, list[float]]] = []
    for item in tree.iterfind("object"):
        name = (item.findtext("name") or "").strip()
        try:
            box = [float(item.findtext(f"bndbox/{key}") or "") for key in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError:
            raise InputError(f"{path}: object '{name}' lacks a whole bndbox; correct the file") from None
        if not name or box[2] < box[0] or box[3] < box[1]:
            raise InputError(
                f"{path}: object '{name}' has the box {box}, expected a name, xmin <= xmax and "
                "ymin <= ymax; correct it"
            )
        objects.append((name, box))
    stated = [(tree.findtext(f"size/{key}") or "0").strip() for key in ("width", "height")]
    # Some tools write 0 where they do not know the size.
    size = (
        (int(stated[0]), int(stated[1])) if all(text.isdecimal() and int(text) for text in stated) else None
    )
    return Annotation(size, objects)


def list_voc(root: Path) -> Listing:
    """List photos in ``images`` (or ``JPEGImages``) with XML files in ``annotations`` (or ``Annotations``).

    Photo and XML share their name below these folders, but for the suffix. The class is the folder of
    the photo below ``images``; without such folders it is the name of the objects, which must be one name (a
    photo without an XML file is taken where all objects bear one name). No official split.

    Raises:
        InputError: for missing folders, no photos, broken XML, an XML file whose photo is not there, and
            photos without a class or with several.
    """
    existing_folder(root, "images/ and annotations/ (Pascal VOC)")
    images = next((root / name for name in _IMAGES if (root / name).is_dir()), None)
    annotations = next((root / name for name in _ANNOTATIONS if (root / name).is_dir()), None)
    if images is None or annotations is None:
        raise InputError(
            f"{root}: expected the folders images/ and annotations/ (Pascal VOC); check the path"
        )
    names = walk_images(images)
    if not names:
        raise InputError(f"{images}: no images in this folder; check the path")
    found = {
        path.relative_to(annotations).with_suffix("").as_posix(): path
        for path in sorted(annotations.rglob("*.xml"))
    }
    stems = [os.path.splitext(name)[0] for name in names]
    for stem in sorted(found.keys() - set(stems)):
        raise InputError(f"{found[stem]}: no photo {images / stem}.*; add the photo or remove the XML file")
    read = {stem: read_annotation(path) for stem, path in found.items()}
    classes = _classes(images, names, stems, read)
    labels = sorted(set(classes))
    records = [
        Record(
            image_id=name,
            path=os.path.join(images, name),
            label=labels.index(of),
            boxes_xywh=corners_to_xywh([box for _, box in read[stem].objects]) if stem in read else (),
            size=read[stem].size if stem in read else None,
        )
        for name, stem, of in zip(names, stems, classes)
    ]
    return Listing(name="voc", root=root, labels=labels, splits={"all": lambda: records})


def _classes(images: Path, names: list[str], stems: list[str], read: dict[str, Annotation]) -> list[str]:
    if any("/" in name for name in names):
        for name in names:
            if "/" not in name:
                raise InputError(f"{images / name}: a photo outside of the class folders beside it; move it")
        return [name.split("/")[0] for name in names]
    all_names = {name for annotation in read.values() for name, _ in annotation.objects}
    if len(all_names) == 1:
        return list(all_names) * len(names)
    classes: list[str] = []
    for name, stem in zip(names, stems):
        own = sorted({of for of, _ in read[stem].objects}) if stem in read else []
        if len(own) != 1:
            raise InputError(
                f"{images / name}: objects of {len(own)} classes ({', '.join(own)}), "
                "expected one class a photo; sort the photos into class folders"
            )
        classes += own
    return classes
