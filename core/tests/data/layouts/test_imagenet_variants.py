"""ImageNet-A and ImageNet-C, and the classes and shares of ImageNet itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from attnmap_core.data.sources import load_data
from PIL import Image


def wnid(number: int) -> str:
    return f"n{10000000 + 7 * number:08d}"


def fill(folder: Path, count: int, file: str = "a.JPEG") -> None:
    """Class folders with one photo each, all of them links to the same file."""
    folder.mkdir(parents=True)
    original = folder.parent / f"{folder.name}.photo"
    Image.new("L", (3, 2)).save(original, format="JPEG")
    for number in reversed(range(count)):
        (folder / wnid(number)).mkdir()
        os.link(original, folder / wnid(number) / file)


@pytest.fixture
def imagenet_a(tmp_path: Path, text) -> Path:
    fill(tmp_path / "data" / "imagenet-a", 200, "0.000_fox_0.9.jpg")
    return text(tmp_path / "data" / "imagenet-a", {"README.txt": "tench"})


def test_imagenet_a(imagenet_a: Path) -> None:
    for place in (imagenet_a, imagenet_a.parent):
        data = load_data(f"imagenet-a:{place}", "test")
        assert data.labels == [wnid(number) for number in range(200)]
        assert data.targets.tolist() == list(range(200))
        assert data.name == "imagenet-a:imagenet-a"
    assert (data.image_ids[3], data[3].image.mode) == (f"{wnid(3)}/0.000_fox_0.9.jpg", "RGB")


def test_imagenet_a_needs_all_folders(imagenet_a: Path, refusal) -> None:
    (imagenet_a / wnid(5) / "0.000_fox_0.9.jpg").unlink()
    assert f"{wnid(5)}: no images in this class folder" in refusal(f"imagenet-a:{imagenet_a}", "test")
    (imagenet_a / wnid(5)).rmdir()
    assert "199 folders by wnid, expected 200" in refusal(f"imagenet-a:{imagenet_a}", "test")
    (imagenet_a / wnid(5)).mkdir()
    assert "no split 'train', found test" in refusal(f"imagenet-a:{imagenet_a}", "train")


@pytest.mark.parametrize("group", ["", "noise"])
def test_imagenet_c(tmp_path: Path, refusal, group: str) -> None:
    root = tmp_path / "imagenet-c"
    fill(root / group / "shot_noise" / "2", 1000)
    data = load_data(f"imagenet-c:{root}@shot_noise/2", "test")
    assert data.targets.tolist() == list(range(1000))
    assert data.image_ids[999] == f"shot_noise/2/{wnid(999)}/a.JPEG"
    assert data[0].image.size == (3, 2)
    some = load_data(f"imagenet-c:{root}@shot_noise/2", "test", classes=[wnid(7), wnid(3)])
    assert some.image_ids == [f"shot_noise/2/{wnid(number)}/a.JPEG" for number in (3, 7)]
    assert some.targets.tolist() == [1, 0]

    def says(part: str) -> str:
        return refusal(f"imagenet-c:{root}{part}", "test")

    assert "no corruption 'fog', found shot_noise" in says("@fog/2")
    assert "severity '6', expected 1, 2, 3, 4 or 5" in says("@shot_noise/6")
    assert "severity ''" in says("@shot_noise")
    assert "no such folder, expected a severity" in says("@shot_noise/3")
    assert "expected imagenet-c:PATH@CORRUPTION/SEVERITY" in says("")
    for path in (root / group / "shot_noise" / "2" / wnid(1)).iterdir():
        path.unlink()
    (root / group / "shot_noise" / "2" / wnid(1)).rmdir()
    assert "999 folders by wnid, expected 1000" in says("@shot_noise/2")


# --- Some classes and some images of ImageNet -------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path: Path, photo) -> Path:
    """Six classes of 4, 8, 12, ... training photos and 2 validation photos."""
    root = tmp_path / "ILSVRC2012"
    for number in reversed(range(6)):
        for i in range(4 * (number + 1)):
            photo(root / "train" / wnid(number) / f"{wnid(number)}_{i}.JPEG", (2, 2))
        for i in range(2):
            photo(root / "val" / wnid(number) / f"ILSVRC2012_val_{number}{i}.JPEG", (2, 2))
    return root


@pytest.fixture
def three(tmp_path: Path, text) -> Path:
    lines = "\n".join(wnid(number) for number in (4, 1, 2))  # in no order, without a last newline
    return text(tmp_path, {"three.txt": lines}) / "three.txt"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_list_and_a_folder_of_the_classes_give_the_same(
    imagenet: Path, three: Path, tmp_path: Path, split: str
) -> None:
    listed = load_data(f"imagenet:{imagenet}", split, classes_file=three)
    part = tmp_path / "part" / "ILSVRC2012"
    for name in ("train", "val"):
        (part / name).mkdir(parents=True)
        for number in (1, 2, 4):
            (part / name / wnid(number)).symlink_to(imagenet / name / wnid(number))
    alone = load_data(f"imagenet:{part}", split)
    assert listed.labels == alone.labels == [wnid(number) for number in (1, 2, 4)]
    assert listed.image_ids == alone.image_ids
    assert listed.targets.tolist() == alone.targets.tolist()
    assert listed.image_ids == load_data(f"imagenet:{imagenet}", split, classes=alone.labels).image_ids


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"{wnid(1)}\nn99999999", "list.txt:2: no class 'n99999999', the data have"),
        (f"{wnid(1)}\n\n{wnid(1)}\n", f"list.txt:3: class '{wnid(1)}' again, as in line 1"),
        ("\n", "list.txt: no classes in it"),
    ],
)
def test_malformed_class_lists(
    imagenet: Path, text, tmp_path: Path, refusal, content: str, says: str
) -> None:
    path = text(tmp_path, {"list.txt": content}) / "list.txt"
    assert says in refusal(f"imagenet:{imagenet}", classes_file=path)


def test_class_lists_that_do_not_apply(imagenet: Path, three: Path, tmp_path: Path, refusal) -> None:
    assert "no such file" in refusal(f"imagenet:{imagenet}", classes_file=tmp_path / "gone.txt")
    assert "exclude each other" in refusal(f"imagenet:{imagenet}", classes_file=three, classes="a")
    assert "do not apply" in refusal("synthetic", classes_file=three)


def test_fraction_of_each_class(imagenet: Path) -> None:
    spec = f"imagenet:{imagenet}"
    whole = load_data(spec, "train")
    shares = {share: load_data(spec, "train", fraction=share) for share in (0.25, 0.5, 0.75)}
    for share, data in shares.items():
        counts = [data.targets.tolist().count(label) for label in range(6)]
        assert counts == [round(share * 4 * (label + 1)) for label in range(6)]
        assert data.labels == whole.labels
        assert [image_id for image_id in whole.image_ids if image_id in set(data.image_ids)] == data.image_ids
    assert set(shares[0.25].image_ids) < set(shares[0.5].image_ids) < set(shares[0.75].image_ids)
    assert load_data(spec, "train", fraction=0.25).image_ids == shares[0.25].image_ids
    assert load_data(spec, "train", fraction=0.25, seed=1).image_ids != shares[0.25].image_ids
    assert load_data(spec, "train", fraction=1.0).image_ids == whole.image_ids
    assert len(load_data(spec, "test", fraction=0.25)) == 12
    assert len(load_data(spec, "train", fraction=0.001)) == 6  # one of each class is left


def test_fraction_together_with_classes_and_held_out_images(imagenet: Path, three: Path) -> None:
    spec = f"imagenet:{imagenet}"
    options = {"classes_file": three, "val_fraction": 0.5}
    val = load_data(spec, "val", **options)
    assert load_data(spec, "val", fraction=0.5, **options).image_ids == val.image_ids
    kept, half = load_data(spec, "train", **options), load_data(spec, "train", fraction=0.5, **options)
    assert set(half.image_ids) < set(kept.image_ids)
    assert [half.targets.tolist().count(label) for label in range(3)] == [2, 3, 5]
    assert not set(half.image_ids) & set(val.image_ids)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_wrong_fractions(imagenet: Path, refusal, fraction: float) -> None:
    assert "expected a share in (0, 1]" in refusal(f"imagenet:{imagenet}", fraction=fraction)
    assert "do not apply" in refusal("synthetic", fraction=0.5)
