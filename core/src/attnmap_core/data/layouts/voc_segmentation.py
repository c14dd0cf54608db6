"""Pascal VOC 2012 with its class maps.

Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective", IJCV 2015.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from ...errors import InputError
from .listing import (
    Listing,
    Record,
    SegmentationClasses,
    bad_row,
    check_files,
    existing_folder,
    find_home,
    numbered_lines,
)

VOC_FOLDERS = ("", "VOC2012/", "VOCdevkit/VOC2012/")
"""Where the data set may lie below the folder that is named."""

_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)


def list_voc_segmentation(root: Path) -> Listing:
    """List the photos of ``ImageSets/Segmentation/{train,val}.txt`` with their maps in ``SegmentationClass``.

    The maps are 0 for background, 1 to 20 for the objects and 255 for what counts as nothing. A photo shows
    several classes, so all photos have one and the same label.

    Args:
        root: ``VOC2012``, or a folder that has it, alone or in ``VOCdevkit``.

    Raises:
        InputError: for missing lists, photos or maps; a map that is not one shows when it is read.
    """
    existing_folder(root, "Pascal VOC 2012")
    root = find_home(root, "ImageSets", *VOC_FOLDERS[1:])
    lists = {split: root / "ImageSets" / "Segmentation" / f"{split}.txt" for split in ("train", "val")}
    if not any(path.exists() for path in lists.values()):
        raise InputError(
            f"{root}: no ImageSets/Segmentation/train.txt or val.txt (Pascal VOC 2012); check the path"
        )
    return Listing(
        name="voc-segmentation",
        root=root,
        labels=["photo"],
        splits={split: partial(_records, root, path) for split, path in lists.items() if path.exists()},
        upright=False,
        hints={split: f"add {path}" for split, path in lists.items()},
        segmentation=SegmentationClasses(labels=tuple(_CLASSES.split())),
    )


def _records(root: Path, path: Path) -> list[Record]:
    records: list[Record] = []
    for number, line in numbered_lines(path):
        if len(line.split()) != 1:
            raise bad_row(path, number, line, "<name of a photo>")
        name = line.strip()
        records.append(
            Record(
                image_id=name,
                path=os.path.join(root, "JPEGImages", f"{name}.jpg"),
                label=0,
                segmentation=os.path.join(root, "SegmentationClass", f"{name}.png"),
            )
        )
    check_files(records, path)
    return records
