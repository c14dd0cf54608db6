"""The optional data folder (ATTNMAP_SHARED): real photos and the official WSOL lists."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from attnmap_core.boxes import box_iou
from attnmap_core.data.layouts.wsol import read_lists
from attnmap_core.data.sources import load_data

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared")) / "data"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"no data in {DATA}; set ATTNMAP_SHARED to the optional folder"
    ),
]


def data_set(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not there")
    return DATA / name


def test_caltech101_animals() -> None:
    data = load_data(str(data_set("caltech101_animals")), "all")
    counts = data.describe()
    assert data.name == "caltech101:caltech101_animals"
    assert (counts["images"], counts["classes"], counts["boxes"], counts["images_with_masks"]) == (
        687,
        12,
        687,
        687,
    )
    assert (counts["smallest_class"], counts["largest_class"]) == (36, 83)
    assert data.labels[:3] == ["ant", "beaver", "crab"]


def test_caltech101_masks_fit_their_boxes() -> None:
    """Outlines were drawn apart from the boxes, a little inside as a rule; their extents must agree."""
    data = load_data(str(data_set("caltech101_animals")), "all")
    overlaps: list[float] = []
    for index in range(0, len(data), 9):
        sample = data[index]
        assert sample.mask is not None
        assert sample.mask.shape == sample.image.size[::-1]
        rows, columns = np.nonzero(sample.mask)
        extent = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        overlaps.append(float(box_iou(extent, sample.boxes_xyxy, convention="continuous").item()))
    assert np.median(overlaps) > 0.9
    assert np.mean(np.array(overlaps) > 0.7) > 0.95


def test_caltech101_floors() -> None:
    """The floors of the data set's README pin the box convention: centred boxes against the given ones."""
    data = load_data(str(data_set("caltech101_animals")), "all")
    overlaps: dict[float, list[float]] = {1.0: [], 0.8: [], 0.6: []}
    for sample in data:
        (width, height) = sample.image.size
        for share, found in overlaps.items():
            box = [
                [
                    width * (1 - share) / 2,
                    height * (1 - share) / 2,
                    width * (1 + share) / 2,
                    height * (1 + share) / 2,
                ]
            ]
            found.append(float(box_iou(box, sample.boxes_xyxy, convention="continuous").max()))
    shares = {
        share: [round(100 * float(np.mean(np.array(found) >= iou)), 1) for iou in (0.5, 0.7)]
        for share, found in overlaps.items()
    }
    assert shares == {1.0: [78.3, 45.7], 0.8: [92.7, 57.6], 0.6: [47.6, 4.4]}


def test_raccoon() -> None:
    data = load_data(str(data_set("raccoon")), "all")
    assert (data.name, data.labels) == ("voc:raccoon", ["raccoon"])
    per_image = [len(objects["bbox"]) for objects in data.dataset["objects"]]
    assert (len(data), sum(per_image)) == (200, 217)
    assert [per_image.count(k) for k in (1, 2, 3)] == [184, 15, 1]
    first = data[data.image_ids.index("raccoon-1.jpg")]
    assert first.image.size == (650, 417)
    np.testing.assert_array_equal(first.boxes_xyxy, [[81, 88, 522, 408]])
    hits = []
    for sample in data:  # every photo decodes; floor of the README: a centred box of 80 %
        width, height = sample.image.size
        box = [[0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height]]
        hits.append(box_iou(box, sample.boxes_xyxy, convention="continuous").max() >= 0.5)
    assert round(100 * float(np.mean(hits)), 1) == 72.5


def test_grocery_has_a_val_split_that_lacks_classes() -> None:
    root = data_set("grocery")
    sizes = {split: len(load_data(f"folder:{root}", split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 492, "val": 78, "test": 369}


@pytest.mark.parametrize(
    ("folder", "images", "boxes", "masks", "classes"),
    [
        ("CUB/val", 1_000, 1_000, 0, 200),
        ("ILSVRC/val", 10_000, 18_532, 0, 1000),
        ("OpenImages/val", 2_500, 0, 3_854, 100),
        ("OpenImages/test", 5_000, 0, 7_632, 100),
    ],
)
def test_official_lists(folder: str, images: int, boxes: int, masks: int, classes: int) -> None:
    rows = read_lists(data_set("wsol_metadata") / folder)
    assert len(rows) == images
    assert sum(len(row.boxes_xyxy) for row in rows) == boxes
    assert sum(len(row.masks) for row in rows) == masks
    assert len({row.label for row in rows}) == classes
    if boxes:
        for row in rows:
            assert row.size is not None
            assert all(
                0 <= x0 <= x1 <= row.size[0] and 0 <= y0 <= y1 <= row.size[1]
                for x0, y0, x1, y1 in row.boxes_xyxy
            )
    else:
        assert all(row.ignore is not None for row in rows)


def test_first_rows() -> None:
    cubv2 = read_lists(data_set("wsol_metadata") / "CUB" / "val")[0]
    assert cubv2.image_id == "001.Black_footed_Albatross/30107316117.jpg"
    assert (cubv2.label, cubv2.size, cubv2.boxes_xyxy) == (0, (560, 419), [(176, 136, 459, 291)])
    imagenet_v2 = read_lists(data_set("wsol_metadata") / "ILSVRC" / "val")[0]
    assert (imagenet_v2.image_id, imagenet_v2.size) == ("val2/0/0.jpeg", (500, 375))
    assert imagenet_v2.boxes_xyxy == [(156, 163, 318, 230)]
    masked = read_lists(data_set("wsol_metadata") / "OpenImages" / "test")[0]
    assert masked.ignore == "test/01226z/7af766bd43da900b_ignore.png"
    assert [mask.rsplit("_", 1)[1] for mask in masked.masks] == ["6554d965.png", "8856c605.png"]


def test_cubv2_boxes_are_corners() -> None:
    """Read as x, y, width, height, most of them would leave the image."""
    folder = data_set("wsol_metadata") / "CUB" / "val"
    overflow = 0
    for row in read_lists(folder):
        assert row.size is not None
        x0, y0, x1, y1 = row.boxes_xyxy[0]
        overflow += x0 + x1 > row.size[0] or y0 + y1 > row.size[1]
    assert overflow == 817
    for row in read_lists(folder, cubv2_boxes="xywh-bug"):
        assert row.size is not None
        assert row.boxes_xyxy[0][2] <= row.size[0]
