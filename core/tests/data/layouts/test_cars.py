"""Stanford Cars: structs in MATLAB files, with boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from attnmap_core.data.sources import load_data
from PIL import Image
from scipy.io import savemat

NAMES = [f"Make Model {number} 2012" for number in range(1, 197)]
TRAIN = [(f"{number:05d}.jpg", number) for number in range(196, 0, -1)]
TEST = [("00002.jpg", 7), ("00001.jpg", 196)]


def annotate(path: Path, rows: list[tuple[str, int]], box: Any = (3, 2, 18, 9), labels: bool = True) -> None:
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", *(["class"] if labels else []), "fname"]
    table = np.zeros((1, len(rows)), dtype=[(name, object) for name in fields])
    for i, (name, label) in enumerate(rows):
        sides = [np.array([[side]], np.uint8) for side in box]
        of = [np.array([[label]], np.uint8)] if labels else []
        table[0, i] = (*sides, *of, name)
    savemat(path, {"annotations": table})


@pytest.fixture
def cars(tmp_path: Path, photo) -> Path:
    root = tmp_path / "stanford_cars"
    (root / "devkit").mkdir(parents=True)
    for folder, rows in (("cars_train", TRAIN), ("cars_test", TEST)):
        for name, _ in rows:
            photo(root / folder / name)
    annotate(root / "devkit" / "cars_train_annos.mat", TRAIN)
    annotate(root / "cars_test_annos_withlabels.mat", TEST)
    names = np.empty((1, 196), dtype=object)
    names[0] = NAMES
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    return root


def test_splits_equal_torchvision(cars: Path) -> None:
    for split in ("train", "test"):
        ours = load_data(f"cars:{cars}", split)
        theirs = torchvision.datasets.StanfordCars(str(cars.parent), split=split)
        assert ours.labels == theirs.classes == NAMES
        expected = [(Path(path).name, label) for path, label in theirs._samples]
        assert list(zip([Path(name).name for name in ours.image_ids], ours.targets.tolist())) == expected
    np.testing.assert_array_equal(ours[0].boxes_xyxy, [[3, 2, 18, 9]])


def test_recognised_and_in_its_parent(cars: Path) -> None:
    (cars / "cars_test_annos_withlabels.mat").rename(cars / "devkit" / "cars_test_annos_withlabels.mat")
    for place in (cars, f"cars:{cars.parent}"):
        data = load_data(str(place), "test")
        assert (data.name, data.targets.tolist()) == ("cars:stanford_cars", [6, 195])


def test_one_row_and_no_names(cars: Path) -> None:
    annotate(cars / "cars_test_annos_withlabels.mat", TEST[:1])
    (cars / "cars_test" / "00001.jpg").unlink()
    (cars / "devkit" / "cars_meta.mat").unlink()
    test = load_data(f"cars:{cars}", "test")
    assert (test.targets.tolist(), test.labels[6]) == ([6], "7")


def test_without_labels_for_test(cars: Path, refusal) -> None:
    annotate(cars / "cars_test_annos_withlabels.mat", TEST, labels=False)
    assert "annotations have no class, found bbox_x1" in refusal(f"cars:{cars}", "test")
    (cars / "cars_test_annos_withlabels.mat").unlink()
    assert "no split 'test', found train; add" in refusal(f"cars:{cars}", "test")


def test_malformed(cars: Path, photo, refusal) -> None:
    spec, path = f"cars:{cars}", cars / "cars_test_annos_withlabels.mat"
    annotate(path, [("00001.jpg", 197), TEST[0]])
    assert "00001.jpg has class 197, expected 1..196" in refusal(spec, "test")
    annotate(path, TEST, box=(9, 2, 3, 9))
    assert "has the box 9 2 3 9, expected x1 <= x2" in refusal(spec, "test")
    annotate(path, TEST, box=(3, 2, 28, 9))
    assert "is not inside the image of 20x10 pixels" in refusal(spec, "test")
    annotate(path, [*TEST, ("00003.jpg", 1)])
    assert "00003.jpg: no such file, but" in refusal(spec, "test")
    annotate(path, TEST)
    photo(cars / "cars_test" / "00003.jpg")
    assert "00003.jpg: no row for this photo" in refusal(spec, "test")
    assert "which has 2 for 3 photos" in refusal(spec, "test")
    savemat(cars / "devkit" / "cars_meta.mat", {"class_names": np.array(["a", "b"], dtype=object)})
    assert "cars_meta.mat: 2 class names, expected 196" in refusal(spec)
    savemat(path, {"other": 1})
    (cars / "devkit" / "cars_meta.mat").unlink()
    assert "expected a MATLAB file with annotations" in refusal(spec, "test")


def test_gray_photo(cars: Path) -> None:
    Image.new("L", (20, 10)).save(cars / "cars_test" / "00002.jpg")
    assert load_data(f"cars:{cars}", "test")[0].image.mode == "RGB"
