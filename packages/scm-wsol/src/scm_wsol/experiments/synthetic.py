"""The embedded default as files in the layout of CUB-200-2011, with CUBV2 beside it and masks for PxAP.

Whatever reads CUB then reads drawn images: loaders, commands, other people's code. Images are lossless PNG, so numbers
measured on the files equal those on the data drawn in memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
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
    folders = [
        f"{number:03d}.{re.sub(r'[^A-Za-z0-9]+', '_', name)}" for number, name in enumerate(labels, start=1)
    ]
    official: dict[str, list[str]] = {name: [] for name in OFFICIAL}
    counts: dict[str, int] = {}
    for split, data in splits.items():
        lists: dict[str, list[str]] = {name: [] for name in LISTS}
        for sample in tqdm(data, desc=f"draw {split}", total=len(data), leave=False, disable=None):
            image_id = f"{folders[sample.label]}/{sample.image_id}.png"
            _write_images(root, split, image_id, sample)
            _add_to_lists(lists, split, image_id, sample)
            if split != "val":
                _add_official(official, split, image_id, sample)
        _write_metadata(folder / "metadata", split, lists)
        if split == "val":
            _write_lines(
                root / "CUBV2" / "val", lists, ("image_ids", "class_labels", "image_sizes", "localization")
            )
        counts[split] = len(data)
    names = [f"{number} {name}" for number, name in enumerate(labels, start=1)]
    _write_lines(root, official | {"classes": names}, (*OFFICIAL, "classes"))
    for metadata in ("CUB", "CUB-masks"):
        _write_lines(folder / "metadata" / metadata, {"classes": names}, ("classes",))
    return counts


OFFICIAL = ("images", "image_class_labels", "train_test_split", "bounding_boxes", "image_sizes")
LISTS = (
    "image_ids",
    "class_labels",
    "image_sizes",
    "localization",
    "mask_ids",
    "mask_labels",
    "mask_sizes",
    "masks",
)


def _write_images(root: Path, split: str, image_id: str, sample: Sample) -> None:
    for path, picture in (
        (_image_root(split) + image_id, sample.image),
        (f"segmentations/{image_id}", Image.fromarray(sample.mask)),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / path, compress_level=1)


def _image_root(split: str) -> str:
    return "CUBV2/" if split == "val" else "images/"


def _add_official(rows: dict[str, list[str]], split: str, image_id: str, sample: Sample) -> None:
    number = len(rows["images"]) + 1
    x0, y0, x1, y1 = sample.boxes_xyxy[0].tolist()
    width, height = sample.image.size
    for name, values in (
        ("images", image_id),
        ("image_class_labels", sample.label + 1),
        ("train_test_split", int(split == "train")),
        ("bounding_boxes", f"{x0!r} {y0!r} {x1 - x0!r} {y1 - y0!r}"),
        ("image_sizes", f"{width} {height}"),
    ):
        rows[name].append(f"{number} {values}")


def _add_to_lists(rows: dict[str, list[str]], split: str, image_id: str, sample: Sample) -> None:
    box = ",".join(map(repr, sample.boxes_xyxy[0].tolist()))
    width, height = sample.image.size
    # Masks lie beside the image folders, so the ids of the mask lists start above both.
    inside = _image_root(split) + image_id
    for name, row in (
        ("image_ids", image_id),
        ("class_labels", f"{image_id},{sample.label}"),
        ("image_sizes", f"{image_id},{width},{height}"),
        ("localization", f"{image_id},{box}"),
        ("mask_ids", inside),
        ("mask_labels", f"{inside},{sample.label}"),
        ("mask_sizes", f"{inside},{width},{height}"),
        ("masks", f"{inside},segmentations/{image_id},"),
    ):
        rows[name].append(row)


def _write_metadata(metadata: Path, split: str, lists: Mapping[str, list[str]]) -> None:
    _write_lines(metadata / "CUB" / split, lists, LISTS[:4])
    _write_lines(
        metadata / "CUB-masks" / split, dict(zip(LISTS[:4], (lists[name] for name in LISTS[4:]))), LISTS[:4]
    )


def _write_lines(folder: Path, rows: Mapping[str, list[str]], names: Iterable[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.txt").write_text("\n".join(rows[name]) + "\n", encoding="utf-8")
