"""Dealing images into splits where the data set does not, and fixed lists."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from attnmap_core.data.layouts.splits import SplitOptions, deal, plan_split, sample
from attnmap_core.data.sources import load_data
from attnmap_core.errors import InputError

IDS = [f"class{label}/{i}.jpg" for label in range(4) for i in range(10 * (label + 1))]
LABELS = [int(name[5]) for name in IDS]


@pytest.fixture
def animals(tmp_path: Path, photo) -> Path:
    for name in (f"{of}/{i}.jpg" for of in ("cat", "dog") for i in range(10)):
        photo(tmp_path / "animals" / name)
    return tmp_path / "animals"


def test_shares_hold_in_each_class() -> None:
    dealt = deal(IDS, LABELS, val_fraction=0.2, test_fraction=0.3)
    assert sorted(index for indices in dealt.values() for index in indices) == list(range(len(IDS)))
    assert all(indices == sorted(indices) for indices in dealt.values())
    per_class = {name: Counter(LABELS[i] for i in indices) for name, indices in dealt.items()}
    assert per_class["test"] == {0: 3, 1: 6, 2: 9, 3: 12}
    assert per_class["val"] == {0: 1, 1: 3, 2: 4, 3: 6}  # of what is not test, to the nearest image


def test_dealing_depends_on_seed_and_ids_alone() -> None:
    test = {IDS[i] for i in deal(IDS, LABELS)["test"]}
    turned = IDS[::-1]
    assert {turned[i] for i in deal(turned, LABELS[::-1])["test"]} == test
    assert {IDS[i] for i in deal(IDS, LABELS, seed=1)["test"]} != test


def test_dealing_is_the_same_on_every_machine() -> None:
    # Written down once: a change would reshuffle everybody's splits.
    assert deal([f"{i}.jpg" for i in range(10)], [0] * 10)["test"] == [0, 4, 8]


def test_every_class_keeps_a_training_image() -> None:
    dealt = deal(["a", "b", "c"], [0, 1, 1], val_fraction=0.9, test_fraction=0.9)
    assert {0, 1} == {[0, 1, 1][i] for i in dealt["train"]}


def test_folder_without_splits(animals: Path, refusal) -> None:
    ids = {
        split: set(load_data(str(animals), split, val_fraction=0.25).image_ids)
        for split in ("train", "val", "test")
    }
    assert {name: len(of) for name, of in ids.items()} == {"train": 10, "val": 4, "test": 6}
    assert len(set.union(*ids.values())) == 20
    assert len(load_data(str(animals), "train")) == 14
    assert "val_fraction is 0" in refusal(str(animals), "val")
    assert "expected a share in [0, 1)" in refusal(str(animals), "val", val_fraction=1.5)


def test_official_test_stays_whole(tmp_path: Path, photo, refusal) -> None:
    for name in (f"{split}/cat/{i}.jpg" for split in ("train", "test") for i in range(10)):
        photo(tmp_path / name)
    spec = f"folder:{tmp_path}"
    assert [len(load_data(spec, split, val_fraction=0.2)) for split in ("train", "val", "test")] == [8, 2, 10]
    assert [len(load_data(spec, split)) for split in ("train", "test")] == [10, 10]
    assert "no split 'val', found test, train; add the folder" in refusal(spec, "val")


def test_official_val_is_not_dealt() -> None:
    options = SplitOptions(val_fraction=0.5)
    plan = plan_split("data", ["train", "val"], "train", options, {})
    assert list(plan.keep(IDS, LABELS)) == list(range(len(IDS)))


# --- Fixed lists ------------------------------------------------------------------------------------------


def lists(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_fixed_lists(animals: Path, tmp_path: Path) -> None:
    file = lists(
        tmp_path / "split.json", {"train": ["dog/3.jpg", "cat/1.jpg"], "test": ["cat/2.jpg", "dog/0.jpg"]}
    )
    train = load_data(str(animals), "train", split_file=file)
    assert train.image_ids == ["dog/3.jpg", "cat/1.jpg"]
    assert train.labels == ["cat", "dog"]
    assert load_data(str(animals), "test", split_file=file).image_ids == ["cat/2.jpg", "dog/0.jpg"]
    assert len(load_data(str(animals), "all", split_file=file)) == 4


def test_fixed_lists_replace_official_splits(tmp_path: Path, photo) -> None:
    for name in ("train/cat/1.jpg", "test/cat/1.jpg"):
        photo(tmp_path / name)
    file = lists(tmp_path / "split.json", {"train": ["test/cat/1.jpg"]})
    assert load_data(f"folder:{tmp_path}", "train", split_file=file).image_ids == ["test/cat/1.jpg"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1], "expected {"),
        ({"training": []}, "found 'training'"),
        ({"train": "cat/1.jpg"}, "found 'train'"),
        ({"train": ["emu/1.jpg"]}, "'emu/1.jpg' of train is not in the data set"),
        ({"train": ["cat/1.jpg"], "test": ["cat/1.jpg"]}, "'cat/1.jpg' is in train and again in test"),
        ({"test": ["cat/1.jpg"]}, "no list 'train', found test"),
        ({"train": ["cat/1.jpg"]}, "1 of 2 classes have no image in train (dog)"),
        ({"train": []}, "no images in split train"),
    ],
)
def test_wrong_lists(animals: Path, tmp_path: Path, refusal, content: object, says: str) -> None:
    file = lists(tmp_path / "split.json", content)
    assert says in refusal(str(animals), "train", split_file=file)


def test_missing_list_file(animals: Path, tmp_path: Path, refusal) -> None:
    assert "gone.json: no such file" in refusal(str(animals), "train", split_file=tmp_path / "gone.json")


# --- Classes ----------------------------------------------------------------------------------------------


def test_only_some_classes(animals: Path, refusal) -> None:
    dogs = load_data(str(animals), "all", classes=["dog"])
    assert (dogs.labels, len(dogs), set(dogs.targets.tolist())) == (["dog"], 10, {0})
    turned = load_data(str(animals), "all", classes="dog,cat")
    assert turned.labels[turned[0].label] == "cat"
    assert "no class 'dgo', it has dog" in refusal(str(animals), classes=["dgo"])
    assert "expected each once" in refusal(str(animals), classes=["dog", "dog"])


def test_class_that_test_lacks_is_a_warning_and_that_train_lacks_an_error(
    tmp_path: Path, photo, refusal, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "val/cat/1.jpg", "val/emu/1.jpg"):
        photo(tmp_path / name)
    assert "1 of 3 classes have no image in train (emu)" in refusal(f"folder:{tmp_path}", "train")
    assert load_data(f"folder:{tmp_path}", "test").labels == ["cat", "dog", "emu"]
    assert "2 classes have no image in test: dog, emu" in caplog.text


def test_unknown_split_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="split must be"):
        load_data("synthetic", "validation")
    with pytest.raises(InputError):
        SplitOptions(test_fraction=-0.1)


# --- A share of each class --------------------------------------------------------------------------------


def test_sample_holds_in_each_class_and_is_nested() -> None:
    quarter, half = sample(IDS, LABELS, 0.25), sample(IDS, LABELS, 0.5)
    assert Counter(LABELS[i] for i in quarter) == {0: 3, 1: 5, 2: 8, 3: 10}  # to the nearest image
    assert set(quarter) < set(half)
    assert quarter == sorted(quarter)
    assert sample(IDS, LABELS, 1.0) == list(range(len(IDS)))
    assert len(sample(IDS, LABELS, 1e-6)) == 4


def test_sample_depends_on_seed_and_ids_alone() -> None:
    chosen = {IDS[i] for i in sample(IDS, LABELS, 0.25)}
    turned = IDS[::-1]
    assert {turned[i] for i in sample(turned, LABELS[::-1], 0.25)} == chosen
    assert {IDS[i] for i in sample(IDS, LABELS, 0.25, seed=1)} != chosen
    # Written down once: a change would give everybody other images.
    assert sample([f"{i}.jpg" for i in range(10)], [0] * 10, 0.3) == [0, 4, 8]
