"""ADE20K: gray class maps, 0 ignored, the others one less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnmap_core.data.sources import load_data
from PIL import Image

VALUES = np.array([[0, 1, 2], [150, 75, 0]], np.uint8)


@pytest.fixture
def ade(tmp_path: Path, photo) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for part, short, count in (("training", "train", 3), ("validation", "val", 1)):
        (root / "annotations" / part).mkdir(parents=True)
        for number in range(count, 0, -1):
            name = f"ADE_{short}_{number:08d}"
            photo(root / "images" / part / f"{name}.jpg", (3, 2))
            Image.fromarray(VALUES).save(root / "annotations" / part / f"{name}.png")
    return root


def test_labels_are_one_less_and_zero_is_ignored(ade: Path) -> None:
    train = load_data(f"ade20k:{ade}", "train")
    assert train.image_ids == [f"training/ADE_train_0000000{number}.jpg" for number in (1, 2, 3)]
    for sample in train:
        np.testing.assert_array_equal(sample.segmentation, [[255, 0, 1], [149, 74, 255]])
    assert train.segmentation is not None
    assert len(train.segmentation.labels) == 150


def test_recognised_and_in_its_parent(ade: Path) -> None:
    for place in (ade, ade.parent, f"ade20k:{ade.parent}"):
        data = load_data(str(place), "val")
        assert (data.name, len(data)) == ("ade20k:ADEChallengeData2016", 1)


def test_class_names(ade: Path, text, refusal) -> None:
    rows = [f"{number}\t0.1\t5\t6\tname {number}, other" for number in range(1, 151)]
    text(ade, {"objectInfo150.txt": "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows])})
    data = load_data(f"ade20k:{ade}", "val")
    assert data.segmentation is not None
    assert data.segmentation.labels[149] == "name 150, other"
    text(ade, {"objectInfo150.txt": "\n".join(rows[:-1])})
    assert "objectInfo150.txt: 149 classes, expected 150" in refusal(f"ade20k:{ade}", "val")
    text(ade, {"objectInfo150.txt": "\n".join([rows[0], rows[2]])})
    assert "objectInfo150.txt:2: expected" in refusal(f"ade20k:{ade}", "val")


def test_bad_maps(ade: Path, refusal) -> None:
    spec, path = f"ade20k:{ade}", ade / "annotations" / "validation" / "ADE_val_00000001.png"
    Image.fromarray(VALUES + np.uint8(1)).save(path)
    assert "class number 151 in the map, expected 1..150, or 255" in refusal(spec, "val")
    Image.fromarray(VALUES.astype(np.uint16) * 300).save(path)
    assert "ADE_val_00000001.png: class numbers 0..45000, expected 0..255" in refusal(spec, "val")
    Image.new("CMYK", (3, 2)).save(path.with_suffix(".jpg"))
    path.unlink()
    assert "ADE_val_00000001.jpg: a picture of mode CMYK" in refusal(spec, "val")
    path.with_suffix(".jpg").unlink()
    assert "validation: empty folder, expected the class maps" in refusal(spec, "val")


def test_photos_and_maps_pair(ade: Path, photo, refusal) -> None:
    photo(ade / "images" / "training" / "ADE_train_00000009.jpg")
    assert "ADE_train_00000009.png: no such file for the photo" in refusal(f"ade20k:{ade}")
    (ade / "images" / "training" / "ADE_train_00000009.jpg").unlink()
    (ade / "images" / "training" / "ADE_train_00000002.jpg").unlink()
    assert "ADE_train_00000002.png: no photo for this map" in refusal(f"ade20k:{ade}")


def test_gray_photo_and_missing_folders(ade: Path, tmp_path: Path, text, refusal) -> None:
    Image.new("L", (3, 2)).save(ade / "images" / "validation" / "ADE_val_00000001.jpg")
    assert load_data(f"ade20k:{ade}", "val")[0].image.mode == "RGB"
    text(tmp_path / "other", {"a.txt": ""})
    assert "no images/training or images/validation" in refusal(f"ade20k:{tmp_path / 'other'}")
