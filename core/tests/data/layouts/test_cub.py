"""CUB-200-2011: text files joined on ids; CUBV2 in both places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnmap_core.data.sources import load_data

# Three classes; ids are neither sorted nor in the same order in the files.
IMAGES = {
    3: "002.Laysan_Albatross/Laysan_1.jpg",
    1: "001.Black_footed_Albatross/Black_1.jpg",
    2: "001.Black_footed_Albatross/Black_2.jpg",
    10: "003.Sooty_Albatross/Sooty_1.jpg",
    4: "002.Laysan_Albatross/Laysan_2.jpg",
    5: "003.Sooty_Albatross/Sooty_2.jpg",
}
CLASS = {1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 10: 3}
IN_TRAIN = {1: 1, 2: 0, 3: 1, 4: 0, 5: 0, 10: 1}


def write_cub(root: Path, photo, text) -> Path:
    for path in IMAGES.values():
        photo(root / "images" / path)
    return text(
        root,
        {
            "images.txt": "\n".join(f"{i} {path}" for i, path in IMAGES.items()) + "\n",
            "image_class_labels.txt": "\n".join(f"{i} {CLASS[i]}" for i in sorted(CLASS)) + "\n",
            "train_test_split.txt": "\n".join(f"{i} {IN_TRAIN[i]}" for i in reversed(list(IMAGES))) + "\n",
            "bounding_boxes.txt": "\n".join(f"{i} {i}.0 2.0 5.5 6.0" for i in IMAGES) + "\n",
            "classes.txt": "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n3 003.Sooty_Albatross\n",
        },
    )


@pytest.fixture
def cub(tmp_path: Path, photo, text) -> Path:
    return write_cub(tmp_path / "CUB_200_2011", photo, text)


def with_cubv2(root: Path, photo, text, *, images_in: str) -> None:
    names = [
        f"00{c + 1}.{name}/3010{c}.jpg"
        for c, name in enumerate(("Black_footed_Albatross", "Laysan_Albatross"))
    ]
    names.append("003.Sooty_Albatross/30102.jpg")
    for name in names:
        photo(root / images_in / name, (40, 30))
    text(
        root / "CUBV2" / "val",
        {
            "image_ids.txt": "\n".join(names),
            "class_labels.txt": "\n".join(f"{name},{c}" for c, name in enumerate(names)),
            "image_sizes.txt": "\n".join(f"{name},40,30" for name in names),
            "localization.txt": "\n".join(f"{name},{10 + c},5,35,28" for c, name in enumerate(names)),
        },
    )


def test_files_are_joined_on_ids(cub: Path) -> None:
    train, test = load_data(f"cub:{cub}", "train"), load_data(f"cub:{cub}", "test")
    assert train.labels == ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    assert train.image_ids == [IMAGES[1], IMAGES[3], IMAGES[10]]
    assert test.image_ids == [IMAGES[2], IMAGES[4], IMAGES[5]]
    assert train.targets.tolist() == test.targets.tolist() == [0, 1, 2]
    # Official boxes are x y width height in pixels from the top left.
    np.testing.assert_array_equal(train[2].boxes_xyxy, [[10.0, 2.0, 15.5, 8.0]])
    assert list(train.dataset["objects"])[2] == {"bbox": [[10.0, 2.0, 5.5, 6.0]]}


def test_recognised_without_saying_so_also_from_the_folder_above(cub: Path) -> None:
    assert load_data(str(cub), "train").name == load_data(str(cub.parent), "train").name == "cub:CUB_200_2011"


@pytest.mark.parametrize("images_in", ["CUBV2", "images"])
def test_cubv2_is_val_in_both_placements(cub: Path, photo, text, images_in: str) -> None:
    with_cubv2(cub, photo, text, images_in=images_in)
    val = load_data(f"cub:{cub}", "val")
    assert val.targets.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(val[1].boxes_xyxy, [[11, 5, 35, 28]])
    assert val[1].image.size == (40, 30)
    assert len(load_data(f"cub:{cub}", "train")) == 3  # CUBV2 images among CUB's do not enter train


def test_cubv2_boxes_option(cub: Path, photo, text, caplog: pytest.LogCaptureFixture) -> None:
    with_cubv2(cub, photo, text, images_in="CUBV2")
    wrong = load_data(f"cub:{cub}", "val", cubv2_boxes="xywh-bug")
    np.testing.assert_array_equal(
        wrong[1].boxes_xyxy, [[11, 5, 40, 30]]
    )  # 11+35 and 5+28 overflow, and are cut
    assert "xywh-bug" in caplog.text
    same = [load_data(f"cub:{cub}", "test", cubv2_boxes=how)[0].boxes_xyxy for how in ("corners", "xywh-bug")]
    np.testing.assert_array_equal(*same)


def test_val_without_cubv2(cub: Path, refusal) -> None:
    message = refusal(f"cub:{cub}", "val")
    assert "no split 'val', found train, test" in message
    assert "unpack CUBV2" in message
    assert "val_fraction" in message


def test_image_sizes_are_used_to_check_boxes_before_any_photo_is_opened(cub: Path, text, refusal) -> None:
    text(cub, {"image_sizes.txt": "\n".join(f"{i} 9 10" for i in IMAGES)})
    message = refusal(f"cub:{cub}", "train")
    assert IMAGES[10] in message
    assert "9x10" in message


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("bounding_boxes.txt", "10 10.0", "10 x", "image 10 has 'x 2.0 5.5 6.0', expected 4 numbers"),
        ("bounding_boxes.txt", "3 3.0 2.0", "3 2.0", "bounding_boxes.txt:1: expected '<id> <x> <y>"),
        ("bounding_boxes.txt", "10 10.0 2.0 5.5 6.0\n", "", "no row for image 10"),
        ("image_class_labels.txt", "10 3", "11 3", "row for image 11, which images.txt does not have"),
        ("image_class_labels.txt", "10 3", "10 4", "class 4, expected 1..3"),
        ("image_class_labels.txt", "10 3", "10 three", "'three', expected a whole number"),
        ("train_test_split.txt", "10 1", "10 2", "image 10 has '2', expected 0 or 1"),
        ("images.txt", "10 003", "1 003", "images.txt:4: id 1 occurs twice"),
        ("images.txt", "Sooty_1.jpg", "Sooty_9.jpg", "Sooty_9.jpg: no such file"),
        ("classes.txt", "3 003", "4 003", "expected class ids 1..3 without gaps"),
    ],
)
def test_contradictions_are_named(cub: Path, refusal, file: str, old: str, new: str, says: str) -> None:
    path = cub / file
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))
    assert says in refusal(f"cub:{cub}", "train")


def test_missing_file_is_named(cub: Path, refusal) -> None:
    (cub / "bounding_boxes.txt").unlink()
    assert "bounding_boxes.txt: no such file" in refusal(f"cub:{cub}")


def test_folder_is_missing_or_empty(tmp_path: Path, refusal) -> None:
    assert "no such folder" in refusal(f"cub:{tmp_path / 'gone'}")
    assert "empty folder" in refusal(f"cub:{tmp_path}")
