"""Stanford Online Products: two lists of products, none in both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnmap_core.data.sources import load_data
from PIL import Image

HEADER = "image_id class_id super_class_id path"
TRAIN = ["1 1 1 bicycle_final/a_0.JPG", "2 1 1 bicycle_final/a_1.JPG", "3 20 2 cabinet_final/b 0.JPG"]
TEST = ["4 3 1 bicycle_final/c_0.JPG", "5 100 2 cabinet_final/d_0.JPG"]


@pytest.fixture
def sop(tmp_path: Path, photo, text) -> Path:
    root = tmp_path / "Stanford_Online_Products"
    for row in (*TRAIN, *TEST):
        photo(root / row.split(maxsplit=3)[3])
    return text(
        root, {"Ebay_train.txt": "\n".join([HEADER, *TRAIN]), "Ebay_test.txt": "\n".join([HEADER, *TEST, ""])}
    )


def test_splits_share_their_labels_and_no_class(sop: Path) -> None:
    train, test = (load_data(f"sop:{sop}", split) for split in ("train", "test"))
    assert train.labels == test.labels == ["1", "3", "20", "100"]  # by number, not as text
    assert (train.targets.tolist(), test.targets.tolist()) == ([0, 0, 2], [1, 3])
    assert train.image_ids == ["bicycle_final/a_0.JPG", "bicycle_final/a_1.JPG", "cabinet_final/b 0.JPG"]
    assert train[2].image.size == (20, 10)
    everything = load_data(f"sop:{sop}", "all")
    assert everything.targets.tolist() == [0, 0, 2, 1, 3]


def test_classes_that_are_there_count_from_0(sop: Path) -> None:
    test = load_data(f"sop:{sop}", "test")
    some = test.of_classes(sorted(set(test.targets.tolist())))
    assert (some.labels, some.targets.tolist(), some[1].label) == (["3", "100"], [0, 1], 1)
    again = some.of_classes([1])
    assert (again.labels, again.targets.tolist(), again.image_ids) == (
        ["100"],
        [0],
        ["cabinet_final/d_0.JPG"],
    )
    assert again.select([0])[0].label == 0
    with pytest.raises(ValueError, match=r"classes must be of 0..1, each once"):
        some.of_classes([0, 0])


def test_recognised_in_its_parent_and_in_the_other_form(sop: Path, photo) -> None:
    for place in (sop, f"sop:{sop.parent}"):
        assert load_data(str(place), "test").name == "sop:Stanford_Online_Products"
    (sop / "Info_Files").mkdir()
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        (sop / name).rename(sop / "Info_Files" / name)
    (sop / "images").mkdir()
    for folder in ("bicycle_final", "cabinet_final"):
        (sop / folder).rename(sop / "images" / folder)
    data = load_data(str(sop), "train")
    np.testing.assert_array_equal(data.targets, [0, 0, 2])
    assert data[0].image.mode == "RGB"


def test_without_a_header(sop: Path, text) -> None:
    text(sop, {"Ebay_test.txt": "\n".join(TEST)})
    assert len(load_data(f"sop:{sop}", "test")) == 2


def test_malformed(sop: Path, text, refusal) -> None:
    spec = f"sop:{sop}"
    assert "no class in it" not in refusal(f"{spec}/bicycle_final")
    assert "Ebay_train.txt: no such file" in refusal(f"{spec}/bicycle_final")
    for row, message in (
        ("4 3 bicycle_final/c_0.JPG", "Ebay_test.txt:2: expected '<image id>"),
        ("4 x 1 bicycle_final/c_0.JPG", "found '4 x 1"),
        ("4 1 1 bicycle_final/c_0.JPG", "class 1 is in Ebay_train.txt too"),
    ):
        text(sop, {"Ebay_test.txt": f"{HEADER}\n{row}"})
        assert message in refusal(spec, "test")
    text(sop, {"Ebay_test.txt": HEADER})
    assert "no rows, expected" in refusal(spec, "test")
    text(sop, {"Ebay_test.txt": "\n".join([HEADER, *TEST, "6 5 1 bicycle_final/z.JPG"])})
    assert "z.JPG: no such file, but" in refusal(spec, "test")
    text(sop, {"Ebay_test.txt": "\n".join([HEADER, *TEST, TEST[0]])})
    assert "occurs twice" in refusal(spec, "test")
    assert "no split 'val'" in refusal(spec, "val")


def test_gray_photo(sop: Path) -> None:
    Image.new("L", (20, 10)).save(sop / "bicycle_final" / "a_0.JPG")
    assert load_data(f"sop:{sop}", "train")[0].image.mode == "RGB"
