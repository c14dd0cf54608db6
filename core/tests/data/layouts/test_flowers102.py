"""Oxford 102 Flowers: one-based MATLAB files, training and validation together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from attnmap_core.data.sources import load_data
from PIL import Image
from scipy.io import savemat

# Four photos of each class but in no order: two for train, one for valid, one for test.
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 103), 4))
PLACES = [np.flatnonzero(label == LABELS) + 1 for label in range(1, 103)]
SETS = {
    "trnid": [place for places in PLACES for place in places[:2]],
    "valid": [places[2] for places in PLACES],
    "tstid": [places[3] for places in reversed(PLACES)],
}


def write_lists(root: Path, labels: Any = LABELS, sets: Any = SETS) -> None:
    savemat(root / "imagelabels.mat", {"labels": np.asarray(labels)[None].astype(np.uint8)})
    savemat(root / "setid.mat", {name: np.asarray(ids)[None].astype(np.uint16) for name, ids in sets.items()})


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    root = tmp_path / "flowers-102"
    (root / "jpg").mkdir(parents=True)
    for number in range(len(LABELS), 0, -1):
        Image.new("RGB", (4, 3), (number % 256, 0, 0)).save(root / "jpg" / f"image_{number:05d}.jpg")
    write_lists(root)
    return root


def test_splits_equal_torchvision(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    theirs: dict[str, int] = {}
    for part in ("train", "val", "test"):
        data: Any = torchvision.datasets.Flowers102(str(flowers.parent), split=part)
        found = {path.name: label for path, label in zip(data._image_files, data._labels)}
        if part != "test":
            theirs |= found
            continue
        ours = load_data(f"flowers102:{flowers}", "test")
        assert dict(zip(ours.image_ids, ours.targets.tolist())) == found
    ours = load_data(f"flowers102:{flowers}", "train")
    assert dict(zip(ours.image_ids, ours.targets.tolist())) == theirs
    assert len(ours) == 306
    assert ours.labels == [str(number) for number in range(1, 103)]
    assert ours.image_ids == sorted(ours.image_ids)


def test_recognised_and_in_its_parent(flowers: Path) -> None:
    assert load_data(str(flowers), "test").name == "flowers102:flowers-102"
    assert len(load_data(f"flowers102:{flowers.parent}", "test")) == 102


def test_gray_and_broken_photos(flowers: Path, refusal) -> None:
    first, second = (flowers / "jpg" / f"image_{n:05d}.jpg" for n in sorted(SETS["tstid"])[:2])
    Image.new("L", (5, 4), 9).save(first)
    Image.new("CMYK", (5, 4)).save(second)
    test = load_data(f"flowers102:{flowers}", "test")
    assert [test[i].image.mode for i in (0, 1)] == ["RGB", "RGB"]
    second.write_bytes(second.read_bytes()[:60])
    assert f"{second.name}: " in refusal(f"flowers102:{flowers}", "test")


def test_malformed_lists(flowers: Path, refusal) -> None:
    spec = f"flowers102:{flowers}"
    labels = LABELS.copy()
    labels[6] = 103
    write_lists(flowers, labels=labels)
    assert "imagelabels.mat: image 7 has class 103, expected 1..102" in refusal(spec)
    write_lists(flowers, labels=LABELS[:-1])
    assert "408 photos, but" in refusal(spec)
    assert "has 407 labels" in refusal(spec)
    write_lists(flowers, sets=SETS | {"valid": [409]})
    assert "setid.mat: image 409 of 408, expected numbers 1..408" in refusal(spec)
    write_lists(flowers, sets=SETS | {"valid": SETS["tstid"][:1]})
    assert "each in one set" in refusal(spec)
    write_lists(flowers, sets={"trnid": [1], "tstid": [2]})
    assert "setid.mat: expected a MATLAB file with trnid and valid and tstid" in refusal(spec)
    (flowers / "setid.mat").write_bytes(b"MATLAB 5.0")
    assert "setid.mat: expected a MATLAB file" in refusal(spec)
    (flowers / "setid.mat").unlink()
    assert "setid.mat: no such file" in refusal(spec)
    savemat(flowers / "imagelabels.mat", {"labels": np.full((1, 408), 1.5)})
    assert "imagelabels.mat: labels is not a list of whole numbers" in refusal(spec)


def test_photo_under_another_name(flowers: Path, refusal) -> None:
    (flowers / "jpg" / "image_00005.jpg").rename(flowers / "jpg" / "image_5.jpg")
    split = "test" if 5 in SETS["tstid"] else "train"
    assert "image_00005.jpg: no such file" in refusal(f"flowers102:{flowers}", split)
