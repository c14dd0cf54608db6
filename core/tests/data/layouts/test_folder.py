"""Plain image folders: classes, splits, metadata.jsonl, COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnmap_core.data.sources import load_data
from PIL import Image


@pytest.fixture
def animals(tmp_path: Path, photo) -> Path:
    for name in ("dog/b.jpg", "dog/a.PNG", "cat/deep/1.jpg", "cat/2.jpeg"):
        photo(tmp_path / "animals" / name)
    return tmp_path / "animals"


def jsonl(*rows: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, rows))


def coco(images: dict[str, list[tuple[str, list[float]]]], /, **extra: Any) -> str:
    """A COCO file: for each photo its objects as (category, x y w h)."""
    names = sorted({name for objects in images.values() for name, _ in objects})
    rows = [(i, *found) for i, objects in enumerate(images.values()) for found in objects]
    content = {
        "images": [{"id": i, "file_name": name, "width": 20, "height": 10} for i, name in enumerate(images)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(["unused", *names])],
        "annotations": [
            {"id": n, "image_id": i, "category_id": 1 + names.index(name), "bbox": box, "iscrowd": 0}
            for n, (i, name, box) in enumerate(rows)
        ],
    }
    return json.dumps(content | extra)


# --- Classes and splits -----------------------------------------------------------------------------------


def test_class_folders(animals: Path) -> None:
    data = load_data(str(animals), "all")
    assert data.labels == ["cat", "dog"]
    assert data.image_ids == ["cat/2.jpeg", "cat/deep/1.jpg", "dog/a.PNG", "dog/b.jpg"]
    assert data.targets.tolist() == [0, 0, 1, 1]
    assert data[0].boxes_xyxy.shape == (0, 4)
    assert data[0].mask is None


@pytest.mark.parametrize("val_name", ["val", "valid", "validation", "dev"])
def test_split_folders(tmp_path: Path, photo, val_name: str) -> None:
    for name in ("train/cat/1.jpg", "train/dog/1.jpg", f"{val_name}/cat/1.jpg", f"{val_name}/dog/1.jpg"):
        photo(tmp_path / name)
    data = load_data(f"folder:{tmp_path}", "val")
    assert data.image_ids == [f"{val_name}/cat/1.jpg", f"{val_name}/dog/1.jpg"]
    assert data.labels == ["cat", "dog"]
    assert len(load_data(f"folder:{tmp_path}", "all")) == 4


def test_two_val_folders(tmp_path: Path, photo, refusal) -> None:
    for name in ("train/cat/1.jpg", "val/cat/1.jpg", "valid/cat/1.jpg"):
        photo(tmp_path / name)
    assert "are both the val split" in refusal(f"folder:{tmp_path}")


@pytest.mark.parametrize("below", ["", "images/"])
def test_flat_folder_is_one_class(tmp_path: Path, photo, below: str) -> None:
    for name in ("1.jpg", "2.jpg"):
        photo(tmp_path / f"{below}{name}")
    data = load_data(str(tmp_path), "all")
    assert (data.labels, data.image_ids) == (["object"], [f"{below}1.jpg", f"{below}2.jpg"])


def test_photo_outside_of_the_class_folders(animals: Path, photo, refusal) -> None:
    photo(animals / "stray.jpg")
    assert "stray.jpg: a photo outside of the class folders" in refusal(str(animals))


def test_class_folder_without_images(animals: Path, refusal) -> None:
    (animals / "emu").mkdir()
    (animals / "emu" / "notes.txt").touch()
    assert "emu: a class folder without images" in refusal(str(animals))


def test_folder_missing_empty_or_without_images(tmp_path: Path, text, refusal) -> None:
    assert "no such folder" in refusal(f"folder:{tmp_path / 'gone'}")
    assert "empty folder" in refusal(f"folder:{tmp_path}")
    text(tmp_path, {"a.txt": ""})
    assert "no images in this folder" in refusal(f"folder:{tmp_path}")
    assert "is a file" in refusal(f"folder:{tmp_path / 'a.txt'}")


# --- metadata.jsonl ---------------------------------------------------------------------------------------


def test_metadata_boxes(animals: Path, text) -> None:
    rows = [
        {"file_name": "dog/b.jpg", "objects": {"bbox": [[1, 2, 3, 4], [0, 0, 20, 10]], "categories": [0, 0]}},
        {"file_name": "cat/2.jpeg", "bbox": [1.5, 2, 3, 4]},
    ]
    text(animals, {"metadata.jsonl": jsonl(*rows)})
    data = load_data(str(animals), "all")
    np.testing.assert_array_equal(data[3].boxes_xyxy, [[1, 2, 4, 6], [0, 0, 20, 10]])
    np.testing.assert_array_equal(data[0].boxes_xyxy, [[1.5, 2, 4.5, 6]])
    assert data[1].boxes_xyxy.shape == (0, 4)
    assert data.labels == ["cat", "dog"]


def test_metadata_in_split_folders(tmp_path: Path, photo, text) -> None:
    for split in ("train", "test"):
        photo(tmp_path / split / "1.jpg")
        text(
            tmp_path / split,
            {"metadata.jsonl": jsonl({"file_name": "1.jpg", "label": "cat", "bbox": [1, 1, 2, 2]})},
        )
    data = load_data(str(tmp_path), "test")
    assert data.labels == ["cat"]
    np.testing.assert_array_equal(data[0].boxes_xyxy, [[1, 1, 3, 3]])


def test_metadata_labels_take_the_place_of_folders(animals: Path, text, refusal) -> None:
    names = ["cat/2.jpeg", "cat/deep/1.jpg", "dog/a.PNG", "dog/b.jpg"]
    rows = [
        {"file_name": name, "label": label} for name, label in zip(names, ["wild", "tame", "tame", "wild"])
    ]
    text(animals, {"metadata.jsonl": jsonl(*rows)})
    data = load_data(str(animals), "all")
    assert (data.labels, data.targets.tolist()) == (["tame", "wild"], [1, 0, 0, 1])
    text(animals, {"metadata.jsonl": jsonl(*rows[:3])})
    assert "dog/b.jpg: no label in the metadata" in refusal(str(animals))


def test_numeric_labels_keep_their_value(animals: Path, text, refusal) -> None:
    names = ["cat/2.jpeg", "cat/deep/1.jpg", "dog/a.PNG", "dog/b.jpg"]
    rows = [{"file_name": name, "label": label} for name, label in zip(names, [2, 0, 1, 2])]
    text(animals, {"metadata.jsonl": jsonl(*rows)})
    data = load_data(str(animals), "all")
    assert (data.labels, data.targets.tolist()) == (["0", "1", "2"], [2, 0, 1, 2])
    text(animals, {"metadata.jsonl": jsonl(*rows[:3], {"file_name": names[3], "label": "cat"})})
    assert "names and numbers mixed" in refusal(str(animals))


def test_mask_files_are_no_photos(tmp_path: Path, photo, text, refusal) -> None:
    photo(tmp_path / "cat" / "1.jpg", (4, 2))
    photo(tmp_path / "dog" / "1.jpg", (4, 2))
    for name, pixels in {"m": [[1, 0, 0, 0]] * 2, "i": [[1, 1, 0, 0]] * 2}.items():
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.array(pixels, np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    row = {"file_name": "cat/1.jpg", "mask": "masks/m.png", "ignore": "masks/i.png"}
    text(tmp_path, {"metadata.jsonl": jsonl(row)})
    data = load_data(str(tmp_path), "all")
    assert data.labels == ["cat", "dog"]
    sample = data[0]
    assert sample.mask is not None
    assert sample.ignore is not None
    assert sample.mask.tolist() == [[True, False, False, False]] * 2
    assert sample.ignore.tolist() == [[False, True, False, False]] * 2
    (tmp_path / "masks" / "m.png").unlink()
    assert "m.png: no such file" in refusal(str(tmp_path), "all")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"file_name": "dog/b.jpg"}\n{', "metadata.jsonl:2: not valid JSON"),
        ('{"name": "dog/b.jpg"}', "metadata.jsonl:1: expected an object with"),
        ("[1]", "metadata.jsonl:1: expected an object with"),
        ('{"file_name": "dog/gone.jpg"}', "metadata.jsonl:1: no such photo"),
        (
            '{"file_name": "dog/b.jpg"}\n{"file_name": "dog/b.jpg"}',
            "metadata.jsonl:2: second row of dog/b.jpg",
        ),
        ('{"file_name": "dog/b.jpg", "bbox": [1, 2, 3]}', "metadata.jsonl:1: bbox [1, 2, 3]"),
        ('{"file_name": "dog/b.jpg", "bbox": [1, 2, 3, "x"]}', "metadata.jsonl:1: bbox [1, 2, 3, 'x']"),
        ('{"file_name": "dog/b.jpg", "bbox": 5}', "metadata.jsonl:1: bbox 5"),
        ('{"file_name": "dog/b.jpg", "objects": 5}', "metadata.jsonl:1: objects 5"),
        ('{"file_name": "dog/b.jpg", "mask": 5}', "metadata.jsonl:1: mask 5"),
        ('{"file_name": "dog/b.jpg", "label": -1}', "metadata.jsonl:1: label -1"),
        ('{"file_name": "dog/b.jpg", "label": 1.5}', "metadata.jsonl:1: label 1.5"),
    ],
)
def test_malformed_metadata(animals: Path, text, refusal, content: str, says: str) -> None:
    text(animals, {"metadata.jsonl": content})
    assert says in refusal(str(animals), "all")


# --- COCO -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["annotations.json", "_annotations.coco.json"])
def test_coco_boxes_with_class_folders(animals: Path, text, name: str) -> None:
    text(animals, {name: coco({"dog/b.jpg": [("thing", [1, 2, 3, 4]), ("other", [0, 0, 5, 5])]})})
    data = load_data(str(animals), "all")
    assert data.labels == ["cat", "dog"]
    np.testing.assert_array_equal(data[3].boxes_xyxy, [[1, 2, 4, 6], [0, 0, 5, 5]])


def test_coco_categories_are_the_classes_of_a_flat_folder(tmp_path: Path, photo, text, refusal) -> None:
    for split in ("train", "valid"):
        for name in ("1.jpg", "2.jpg"):
            photo(tmp_path / split / name)
        objects = {"1.jpg": [("dog", [1, 1, 2, 2])], "2.jpg": [("cat", [1, 1, 2, 2]), ("cat", [0, 0, 1, 1])]}
        text(tmp_path / split, {"_annotations.coco.json": coco(objects)})
    data = load_data(str(tmp_path), "val")
    assert (data.labels, data.targets.tolist()) == (["cat", "dog"], [1, 0])
    assert [len(sample.boxes_xyxy) for sample in data] == [1, 2]
    text(
        tmp_path / "valid", {"_annotations.coco.json": coco({"1.jpg": [("dog", [1, 1, 2, 2])], "2.jpg": []})}
    )
    assert "2.jpg: objects of 0 categories" in refusal(str(tmp_path), "val")


def test_one_category_names_the_single_class(tmp_path: Path, photo, text) -> None:
    for name in ("1.jpg", "2.jpg"):
        photo(tmp_path / name)
    text(tmp_path, {"annotations.json": coco({"1.jpg": [("raccoon", [1, 1, 2, 2])]})})
    data = load_data(str(tmp_path), "all")
    assert (data.labels, data.targets.tolist()) == (["raccoon"], [0, 0])


def test_crowds_are_no_boxes(animals: Path, text) -> None:
    content = json.loads(coco({"dog/b.jpg": [("a", [1, 2, 3, 4]), ("a", [0, 0, 5, 5])]}))
    content["annotations"][1]["iscrowd"] = 1
    text(animals, {"annotations.json": json.dumps(content)})
    assert len(load_data(str(animals), "all")[3].boxes_xyxy) == 1


def test_annotations_that_lie_elsewhere(animals: Path, tmp_path: Path, text, refusal) -> None:
    text(tmp_path, {"boxes/mine.json": coco({"dog/b.jpg": [("a", [1, 2, 3, 4])]})})
    data = load_data(f"folder:{animals}", "all", annotations=tmp_path / "boxes" / "mine.json")
    np.testing.assert_array_equal(data[3].boxes_xyxy, [[1, 2, 4, 6]])
    assert "gone.json: no such file" in refusal(f"folder:{animals}", annotations=tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a COCO file"),
        ('{"images": []}', "not a COCO file"),
        (coco({"dog/gone.jpg": []}), "image 0: no such photo"),
        (coco({"dog/b.jpg": [("a", [1, 2, 30, 4])]}), "dog/b.jpg: box x=1 y=2 width=30 height=4"),
        (coco({"dog/b.jpg": [("a", [1, 2, 3])]}), "annotation 0: bbox [1, 2, 3]"),
        (
            coco({}, annotations=[{"id": 7, "image_id": 3, "category_id": 0, "bbox": [0, 0, 1, 1]}]),
            "annotation 7: of image 3, which the file does not have",
        ),
        (
            coco(
                {"dog/b.jpg": []},
                annotations=[{"id": 7, "image_id": 0, "category_id": 9, "bbox": [0, 0, 1, 1]}],
            ),
            "annotation 7: category 9",
        ),
        (
            coco({}, images=[{"id": 1, "file_name": "dog/a.PNG"}, {"id": 1, "file_name": "dog/b.jpg"}]),
            "image ids occur twice",
        ),
        (
            coco({}, images=[{"id": 1, "file_name": "dog/b.jpg"}, {"id": 2, "file_name": "dog/b.jpg"}]),
            "two images are called dog/b.jpg",
        ),
    ],
)
def test_malformed_coco(animals: Path, text, refusal, content: str, says: str) -> None:
    text(animals, {"annotations.json": content})
    message = refusal(str(animals), "all")
    assert says in message


def test_two_annotation_files(animals: Path, text, refusal) -> None:
    text(animals, {"annotations.json": coco({"dog/b.jpg": []}), "metadata.jsonl": ""})
    assert "has metadata.jsonl and annotations.json, expected one" in refusal(str(animals))
