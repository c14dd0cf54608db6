"""Pascal VOC 2012 segmentation: palette pictures whose indices are the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torchvision
from attnmap_core.data.sources import load_data
from numpy.typing import NDArray
from PIL import Image

SIZE = (14, 10)
NAMES = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
PALETTE = [
    value for number in range(256) for value in (number * 37 % 256, number * 101 % 256, number * 7 % 256)
]


def classes_of(seed: int) -> NDArray[np.uint8]:
    values = np.random.default_rng(seed).choice(np.array([0, 1, 15, 20, 255], np.uint8), SIZE[::-1])
    values[0, :2] = 20, 255
    return values


def save_palette(path: Path, classes: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(classes).convert("L")
    picture.putpalette(PALETTE)
    assert picture.mode == "P"
    picture.save(path)


@pytest.fixture
def voc(tmp_path: Path, photo, text) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for split, names in NAMES.items():
        for name in reversed(names):
            photo(root / "JPEGImages" / f"{name}.jpg", SIZE)
            save_palette(root / "SegmentationClass" / f"{name}.png", classes_of(int(name[-2:])))
        text(root / "ImageSets" / "Segmentation", {f"{split}.txt": "\n".join(names)})
    photo(root / "JPEGImages" / "2008_000001.jpg")  # most photos have no map
    text(root / "Annotations", {"2007_000032.xml": "<annotation/>"})
    return root


def test_maps_equal_torchvision(voc: Path) -> None:
    for split, names in NAMES.items():
        ours = load_data(f"voc-segmentation:{voc}", split)
        theirs = torchvision.datasets.VOCSegmentation(str(voc.parents[1]), year="2012", image_set=split)
        assert ours.image_ids == names
        for sample, (image, target) in zip(ours, theirs):
            assert sample.segmentation is not None
            assert sample.segmentation.dtype == np.uint8
            np.testing.assert_array_equal(sample.segmentation, np.asarray(target))
            np.testing.assert_array_equal(np.asarray(sample.image), np.asarray(image.convert("RGB")))
            assert sample.mask is None
    assert set(np.unique(classes_of(33))) == {0, 1, 15, 20, 255}


def test_class_names_and_counts(voc: Path) -> None:
    data = load_data(f"voc-segmentation:{voc}", "val")
    assert data.segmentation is not None
    assert len(data.segmentation.labels) == 21
    assert (data.segmentation.labels[0], data.segmentation.labels[20]) == ("background", "tvmonitor")
    assert data.describe()["segmentation_classes"] == 21
    assert data.select([0]).segmentation == data.segmentation


@pytest.mark.parametrize("up", [0, 1, 2])
def test_recognised_from_above(voc: Path, up: int) -> None:
    place = [voc, *voc.parents][up]
    assert load_data(str(place), "val").name == "voc-segmentation:VOC2012"
    assert len(load_data(f"voc-segmentation:{place}", "train")) == 2


def test_streaming_and_rows(voc: Path) -> None:
    plain = load_data(f"voc-segmentation:{voc}", "train")
    stream = load_data(f"voc-segmentation:{voc}", "train", streaming=True)
    for ours, theirs in zip(stream, plain):
        np.testing.assert_array_equal(ours.segmentation, theirs.segmentation)
    row = plain.dataset[0]
    assert row["segmentation"] == {"path": str(voc / "SegmentationClass" / "2007_000032.png"), "bytes": None}


def test_listing_opens_nothing(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", None)
    assert len(load_data(f"voc-segmentation:{voc}", "train")) == 2


def test_bad_maps(voc: Path, refusal) -> None:
    spec, path = f"voc-segmentation:{voc}", voc / "SegmentationClass" / "2007_000033.png"
    strange = classes_of(33)
    strange[2, 2] = 21
    save_palette(path, strange)
    assert "2007_000033.png: class number 21 in the map, expected 0..20, or 255" in refusal(spec, "val")
    save_palette(path, classes_of(33)[:-1])
    assert "2007_000033.png: a class map of 14x9 pixels, expected 14x10" in refusal(spec, "val")
    Image.new("RGB", SIZE).save(path)
    assert "2007_000033.png: a picture of mode RGB, expected class numbers" in refusal(spec, "val")
    path.write_bytes(path.read_bytes()[:50])
    assert "2007_000033.png: " in refusal(spec, "val")
    path.unlink()
    assert "2007_000033.png: no such file, but" in refusal(spec, "val")


def test_gray_and_cmyk_photos(voc: Path) -> None:
    Image.new("L", SIZE).save(voc / "JPEGImages" / "2007_000032.jpg")
    Image.new("CMYK", SIZE).save(voc / "JPEGImages" / "2007_000039.jpg")
    assert {sample.image.mode for sample in load_data(f"voc-segmentation:{voc}", "train")} == {"RGB"}


def test_malformed_lists(voc: Path, text, refusal) -> None:
    text(voc / "ImageSets" / "Segmentation", {"val.txt": "2007_000033 1"})
    assert "val.txt:1: expected '<name of a photo>'" in refusal(f"voc-segmentation:{voc}", "val")
    text(voc / "ImageSets" / "Segmentation", {"val.txt": "2007_000077\n"})
    assert "2007_000077.jpg: no such file" in refusal(f"voc-segmentation:{voc}", "val")
    assert "no split 'test', found train, val" in refusal(f"voc-segmentation:{voc}", "test")
    for path in (voc / "ImageSets" / "Segmentation").iterdir():
        path.unlink()
    assert "no ImageSets/Segmentation/train.txt or val.txt" in refusal(f"voc-segmentation:{voc}", "val")
