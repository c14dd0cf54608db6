"""Grocery Store: lists with fine and coarse classes, and the table of their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from attnmap_core.data.sources import load_data

CLASSES = """Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Iconic Image Path (str)
Golden-Delicious,0,Apple,0,/iconic/0.jpg
Granny-Smith,1,Apple,0,/iconic/1.jpg
Conference,7,Pear,3,/iconic/7.jpg
"""


@pytest.fixture
def grocery(tmp_path: Path, photo, text) -> Path:
    root = tmp_path / "GroceryStoreDataset" / "dataset"
    for split, numbers in {"train": (7, 0, 0), "val": (0,), "test": (7, 0)}.items():
        rows = []
        for place, number in enumerate(numbers):
            name = f"{split}/Fruit/{number}/{number}_{place:03d}.jpg"
            photo(root / name)
            rows.append(f"{name}, {number}, {number // 2}")
        text(root, {f"{split}.txt": "\n".join(rows)})
    text(root, {"classes.csv": CLASSES})
    return root


def test_fine_classes_in_the_order_of_their_numbers(grocery: Path) -> None:
    train, val = load_data(f"grocery:{grocery}", "train"), load_data(f"grocery:{grocery.parent}", "val")
    assert train.labels == val.labels == ["Golden-Delicious", "Conference"]  # no photo of a Granny Smith
    assert train.targets.tolist() == [1, 0, 0]
    assert train.image_ids[0] == "train/Fruit/7/7_000.jpg"
    assert train[0].image.mode == "RGB"
    assert len(load_data(str(grocery), "test")) == 2  # recognised, and not as folders of classes


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("train/Fruit/7/7_000.jpg, 7", "train.txt:1: expected '<path>, <fine class>, <coarse class>'"),
        ("train/Fruit/7/7_000.jpg, x, 3", "train.txt:1: expected"),
        ("train/Fruit/7/7_000.jpg, 8, 3", "train.txt:1: class 8 is not in classes.csv"),
        ("train/Fruit/7/none.jpg, 7, 3", "none.jpg: no such file"),
    ],
)
def test_malformed_lists(grocery: Path, text, refusal, rows: str, says: str) -> None:
    text(grocery, {"train.txt": rows})
    assert says in refusal(f"grocery:{grocery}")


def test_missing_or_other_table(grocery: Path, text, refusal) -> None:
    text(grocery, {"classes.csv": "name,id\na,0\n"})
    assert "classes.csv: expected columns Class Name (str), Class ID (int)" in refusal(f"grocery:{grocery}")
    (grocery / "classes.csv").unlink()
    assert "classes.csv" in refusal(f"grocery:{grocery}")
