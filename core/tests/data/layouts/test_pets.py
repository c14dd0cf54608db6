"""Oxford-IIIT Pets: lists of names and class numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torchvision
from attnmap_core.data.sources import load_data
from PIL import Image

BREEDS = {"Abyssinian": 1, "american_bulldog": 2, "Birman": 3}


@pytest.fixture
def pets(tmp_path: Path, photo, text) -> Path:
    root = tmp_path / "oxford-iiit-pet"
    rows = {"trainval": [], "test": []}
    for breed, number in BREEDS.items():
        for i in range(1, 6):
            photo(root / "images" / f"{breed}_{i}.jpg")
            rows["test" if i > 3 else "trainval"].append(f"{breed}_{i} {number} 1 {number}")
    photo(root / "images" / "Birman_99.jpg")  # as officially, a photo that no list names
    text(root / "annotations", {f"{name}.txt": "\n".join(reversed(of)) for name, of in rows.items()})
    text(root / "annotations" / "xmls", {"Abyssinian_1.xml": "<annotation/>"})
    (root / "annotations" / "trimaps").mkdir()
    return root


def test_splits_equal_torchvision(pets: Path) -> None:
    for split, part in (("train", "trainval"), ("test", "test")):
        ours = load_data(f"pets:{pets}", split)
        theirs = torchvision.datasets.OxfordIIITPet(str(pets.parent), split=part)
        assert ours.image_ids == [path.name for path in theirs._images]
        assert ours.targets.tolist() == theirs._labels
        assert ours.labels == list(BREEDS)
        assert all(sample.image.mode == "RGB" for sample in ours)


def test_recognised_and_in_its_parent(pets: Path) -> None:
    assert load_data(str(pets), "test").name == "pets:oxford-iiit-pet"  # and not as Pascal VOC
    assert len(load_data(f"pets:{pets.parent}", "train")) == 9


def test_photos_that_are_no_jpeg(pets: Path, refusal) -> None:
    # Some official files are PNG or GIF under the name of a JPEG, some have transparency.
    Image.new("RGBA", (6, 5), (0, 0, 0, 0)).save(pets / "images" / "Birman_4.jpg", format="PNG")
    Image.new("L", (6, 5)).save(pets / "images" / "Birman_5.jpg", format="GIF")
    Image.new("CMYK", (6, 5)).save(pets / "images" / "Abyssinian_4.jpg", format="JPEG")
    assert {sample.image.mode for sample in load_data(f"pets:{pets}", "test")} == {"RGB"}
    (pets / "images" / "Birman_5.jpg").write_bytes(b"")
    assert "Birman_5.jpg: 0 bytes" in refusal(f"pets:{pets}", "test")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("Birman_1 3 1", "test.txt:1: expected '<name> <class 1..37> <species> <breed>'"),
        ("Birman_1 x 1 3", "test.txt:1: expected"),
        ("Birman_1 38 1 3", "test.txt:1: expected"),
        ("Birman_1 0 1 3", "test.txt:1: expected"),
        ("Birman 3 1 3", "test.txt:1: expected"),
        ("Birman_4 2 1 2", "test.txt:1: Birman_4 has class 2, which is american_bulldog before"),
        ("Bombay_4 5 1 2", "4 breeds for the class numbers 1..5, expected one for each"),
        ("Birman_4 4 1 2", "3 breeds for the class numbers 1..4"),
        ("Birman_77 3 1 3", "Birman_77.jpg: no such file, but"),
        ("Birman_4 3 1 3\nBirman_4 3 1 3\n", "image id 'Birman_4.jpg' occurs twice"),
    ],
)
def test_malformed_lists(pets: Path, text, refusal, rows: str, says: str) -> None:
    text(pets / "annotations", {"test.txt": rows})
    assert says in refusal(f"pets:{pets}", "test")


def test_missing_list(pets: Path, refusal) -> None:
    (pets / "annotations" / "trainval.txt").unlink()
    assert "trainval.txt: no such file" in refusal(f"pets:{pets}")
