"""The embedded default as files in the layout of CUB-200-2011, with CUBV2 beside it and masks for PxAP.

Whatever reads CUB then reads drawn images: loaders, commands, other people's code. Images are lossless PNG, so numbers
measured on the files equal those on the data drawn in memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attnmap_core import cli
from attnmap_core.data.sources import ImageData, Sample, load_data
from attnmap_core.data.synthetic import SPLITS, SyntheticSpec
from attnmap_core.errors import InputError
from attnmap_core.files import atomic_folder, new_output_folder
from PIL import Image
from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw the embedded default into files: CUB_200_2011 (train, test), CUBV2 in it (val), masks, WSOL lists."""

    data: str = "synthetic"
    """What to draw, as in --data of the other commands: synthetic, or synthetic:classes=6,image_size=64,..."""
    out: Path = Path("synthetic-cub")
    """Folder to write."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def command(arguments: list[str]) -> None:
    """``scm-wsol reproduce synthetic [--data synthetic:image_size=64 --out DIR]``."""
    options = cli.parse(Options, arguments, command="scm-wsol reproduce synthetic")
    scheme, _, text = options.data.partition(":")
    if scheme != "synthetic":
        raise InputError(f"--data {options.data}: expected synthetic or synthetic:field=value,...")
    spec = SyntheticSpec.from_string(text)
    splits = [split for split in SPLITS if spec.size_of(split)]
    for needed in ("train", "test"):
        if needed not in splits:
            raise InputError(
                f"--data {options.data}: no images in {needed}, which CUB has; give {needed}=... above 0"
            )
    new_output_folder(options.out, overwrite=options.overwrite)
    with atomic_folder(options.out) as folder:
        counts = write_cub({split: load_data(options.data, split) for split in splits}, folder)
    said = ", ".join(f"{split} {count}" for split, count in counts.items())
    root, metadata = options.out / "CUB_200_2011", options.out / "metadata"
    sys.stdout.write(
        f"{said} images, {spec.classes} classes\n"
        f"boxes      --data cub:{root}\n"
        f"           --data wsol:{metadata / 'CUB'}@{root}\n"
        f"masks      --data wsol:{metadata / 'CUB-masks'}@{root}\n"
    )


def write_cub(splits: Mapping[str, ImageData], folder: Path) -> dict[str, int]:
    """Write labelled images with one box and a mask each; returns the number of images by split.

    Below ``folder``: ``CUB_200_2011/`` with the official text files, ``images/`` and ``segmentations/`` of train and
    test; ``CUB_200_2011/CUBV2/`` with lists and images of val; ``metadata/CUB/`` with the lists of the WSOL evaluator
    for all splits (boxes), ``metadata/CUB-masks/`` the same with masks in place of boxes.
    """
    root = folder / "CUB_200_2011"
    labels = next(iter(splits.values())).labels
    names = [f"{number} {name}" for number, name in enumerate(labels, start=1)]
    folders = [
        f"{number:03d}.{re.sub('[^A-Za-z0-9]+', '_', name)}" for number, name in enumerate(labels, start=1)
    ]
    official = _Lists()
    for split, data in splits.items():
        images = "CUBV2" if split == "val" else "images"
        boxes, masks = _Lists(), _Lists()
        for sample in tqdm(data, desc=f"draw {split}", total=len(data), leave=False, disable=None):
            image_id = f"{folders[sample.label]}/{sample.image_id}.png"
            mask = sample.mask
            assert mask is not None  # drawn images have one
            _save(sample.image, root / images / image_id)
            _save(Image.fromarray(mask), root / "segmentations" / image_id)
            _list(boxes, image_id, sample, ",".join(map(repr, sample.boxes_xyxy[0].tolist())))
            # Masks lie beside the image folders, so the ids of their lists start above both.
            _list(masks, f"{images}/{image_id}", sample, f"segmentations/{image_id},")
            if split != "val":
                _list_officially(official, split, image_id, sample)
        boxes.write(folder / "metadata" / "CUB" / split)
        masks.write(folder / "metadata" / "CUB-masks" / split)
        if split == "val":
            boxes.write(root / "CUBV2" / split)
    official.write(root)
    for place in (root, folder / "metadata" / "CUB", folder / "metadata" / "CUB-masks"):
        _Lists(classes=names).write(place)
    return {split: len(data) for split, data in splits.items()}


class _Lists(dict[str, list[str]]):
    """Rows of text files by their names."""

    def add(self, **rows: str) -> None:
        for name, row in rows.items():
            self.setdefault(name, []).append(row)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.items():
            (folder / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, compress_level=1)


def _list(lists: _Lists, image_id: str, sample: Sample, localization: str) -> None:
    width, height = sample.image.size
    lists.add(
        image_ids=image_id,
        class_labels=f"{image_id},{sample.label}",
        image_sizes=f"{image_id},{width},{height}",
        localization=f"{image_id},{localization}",
    )


def _list_officially(lists: _Lists, split: str, image_id: str, sample: Sample) -> None:
    number = len(lists.get("images", ())) + 1
    x0, y0, x1, y1 = sample.boxes_xyxy[0].tolist()
    width, height = sample.image.size
    lists.add(
        images=f"{number} {image_id}",
        image_class_labels=f"{number} {sample.label + 1}",
        train_test_split=f"{number} {int(split == 'train')}",
        bounding_boxes=f"{number} {x0!r} {y0!r} {x1 - x0!r} {y1 - y0!r}",
        image_sizes=f"{number} {width} {height}",
    )
