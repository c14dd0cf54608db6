"""Stanford Dogs: lists in MATLAB files, XML without a suffix, one dog or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from attnmap_core.data.sources import load_data
from scipy.io import savemat

TRAIN = [("n02085620-Chihuahua/n02085620_5927", 1), ("n02085782-Japanese_spaniel/n02085782_2874", 2)]
TEST = [("n02085782-Japanese_spaniel/n02085782_23", 2), ("n02085620-Chihuahua/n02085620_2650", 1)]
DOG = (
    "<object><name>{name}</name>"
    "<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"
)


def annotate(path: Path, *boxes: Sequence[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dogs = "".join(DOG.format(*box, name="Chihuahua") for box in boxes)
    size = "<size><width>20</width><height>10</height><depth>3</depth></size>"
    path.write_text(f"<annotation><filename>%s</filename>{size}{dogs}</annotation>")


def cells(values: Sequence[str]) -> np.ndarray:
    found = np.empty((len(values), 1), dtype=object)
    found[:, 0] = values
    return found


def write_list(path: Path, rows: Sequence[tuple[str, int]]) -> None:
    names = [name for name, _ in rows]
    savemat(
        path,
        {
            "file_list": cells([f"{name}.jpg" for name in names]),
            "annotation_list": cells(names),
            "labels": np.array([[label] for _, label in rows], np.uint8),
        },
    )


@pytest.fixture
def dogs(tmp_path: Path, photo) -> Path:
    root = tmp_path / "stanford_dogs"
    for name, _ in TRAIN + TEST:
        photo(root / "Images" / f"{name}.jpg")
        annotate(root / "Annotation" / name, (2, 1, 18, 9))
    annotate(root / "Annotation" / TEST[0][0], (1, 1, 9, 9), (10, 2, 20, 10))
    write_list(root / "train_list.mat", TRAIN)
    write_list(root / "test_list.mat", TEST)
    return root


def test_lists_boxes_and_names(dogs: Path) -> None:
    for place in (dogs, f"dogs:{dogs.parent}"):
        train, test = load_data(str(place), "train"), load_data(str(place), "test")
        assert train.labels == test.labels == ["Chihuahua", "Japanese_spaniel"]
        assert (train.targets.tolist(), test.targets.tolist()) == ([0, 1], [1, 0])
        assert test.image_ids == [f"{name}.jpg" for name, _ in TEST]
        np.testing.assert_array_equal(test[0].boxes_xyxy, [[1, 1, 9, 9], [10, 2, 20, 10]])
        np.testing.assert_array_equal(test[1].boxes_xyxy, [[2, 1, 18, 9]])


def test_lists_in_their_own_folder(dogs: Path) -> None:
    (dogs / "lists").mkdir()
    for split in ("train", "test"):
        (dogs / f"{split}_list.mat").rename(dogs / "lists" / f"{split}_list.mat")
    assert load_data(str(dogs), "test").name == "dogs:stanford_dogs"


def test_one_row_and_counts(dogs: Path, caplog) -> None:
    write_list(dogs / "test_list.mat", TEST[:1])
    assert load_data(f"dogs:{dogs}", "test").targets.tolist() == [1]
    assert "1 photos, the official list has 8580" in caplog.text


def test_malformed(dogs: Path, refusal) -> None:
    spec = f"dogs:{dogs}"
    annotate(dogs / "Annotation" / TEST[0][0])
    assert "no object with a box" in refusal(spec, "test")
    annotate(dogs / "Annotation" / TEST[0][0], (1, 1, 30, 9))
    assert "is not inside the image of 20x10" in refusal(spec, "test")
    (dogs / "Annotation" / TEST[0][0]).unlink()
    assert f"{TEST[0][0]}: no such file" in refusal(spec, "test")
    write_list(dogs / "test_list.mat", [(TEST[0][0], 1)])
    assert "class 1 is Japanese_spaniel and Chihuahua" in refusal(spec, "test")
    write_list(dogs / "test_list.mat", [(TEST[0][0], 4)])
    assert "the lists name" in refusal(spec, "test")
    savemat(
        dogs / "test_list.mat",
        {"file_list": cells(["a.jpg"]), "annotation_list": cells(["a", "b"]), "labels": [[1]]},
    )
    assert "1 photos, 2 annotations and 1 labels" in refusal(spec, "test")
    (dogs / "test_list.mat").unlink()
    assert "test_list.mat: no such file" in refusal(spec, "test")
