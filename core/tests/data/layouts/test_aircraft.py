"""FGVC-Aircraft: text lists, boxes that count from 1, a banner at the foot of each photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torchvision
from attnmap_core.data.sources import load_data
from PIL import Image

VARIANTS = ["707-320", "A340-300", "F/A-18", "Boeing 717"]
ROWS = {
    "train": {"1025794": "707-320", "0034309": "A340-300", "0056978": "F/A-18", "0698580": "Boeing 717"},
    "val": {"1411994": "Boeing 717"},
    "test": {"1514522": "A340-300", "0747566": "707-320"},
}


@pytest.fixture
def aircraft(tmp_path: Path, photo, text) -> Path:
    root = tmp_path / "fgvc-aircraft-2013b" / "data"
    for rows in ROWS.values():
        for name in rows:
            photo(root / "images" / f"{name}.jpg", (60, 50))
    lists = {
        f"images_variant_{split}.txt": "\n".join(" ".join(row) for row in rows.items())
        for split, rows in ROWS.items()
    }
    ids = [name for rows in ROWS.values() for name in rows]
    text(root, {**lists, "variants.txt": "\n".join(VARIANTS)})
    text(root, {"images_box.txt": "\n".join(f"{name} 3 2 58 41" for name in ids)})
    return root


def test_splits_equal_torchvision(aircraft: Path) -> None:
    for split in ("train", "val", "test"):
        ours = load_data(f"aircraft:{aircraft}", split)
        theirs = torchvision.datasets.FGVCAircraft(str(aircraft.parents[1]), split=split)
        assert ours.labels == theirs.classes == VARIANTS
        expected = [(Path(path).name, label) for path, label in zip(theirs._image_files, theirs._labels)]
        assert list(zip(ours.image_ids, ours.targets.tolist())) == expected


def test_banner_is_cut_with_the_boxes(aircraft: Path) -> None:
    for place in (aircraft, f"aircraft:{aircraft.parents[1]}", f"aircraft:{aircraft.parent}"):
        sample = load_data(str(place), "test")[0]
        assert sample.image.size == (60, 30)
        np.testing.assert_array_equal(sample.boxes_xyxy, [[2, 1, 58, 30]])
    kept = load_data(f"aircraft-banner:{aircraft}", "test").select([1])[0]
    assert kept.image.size == (60, 50)
    np.testing.assert_array_equal(kept.boxes_xyxy, [[2, 1, 58, 41]])
    cut = load_data(f"aircraft:{aircraft}", "test").select([1])[0]
    assert cut.image.size == (60, 30)


def test_cut_keeps_the_upper_rows(aircraft: Path) -> None:
    pixels = np.zeros((50, 60, 3), np.uint8)
    pixels[30:] = 255
    Image.fromarray(pixels).save(aircraft / "images" / "1514522.jpg", quality=100, subsampling=0)
    assert np.asarray(load_data(f"aircraft:{aircraft}", "test")[0].image)[:24].max() == 0


def test_counts_are_told(aircraft: Path, caplog) -> None:
    load_data(f"aircraft:{aircraft}", "val")
    assert "1 photos, the official list has 3333" in caplog.text


def test_malformed(aircraft: Path, text, refusal) -> None:
    spec = f"aircraft:{aircraft}"
    text(aircraft, {"images_variant_val.txt": "1411994 Concorde"})
    assert "images_variant_val.txt:1: expected '<image id> <variant" in refusal(spec, "val")
    text(aircraft, {"images_variant_val.txt": "7 707-320"})
    assert "no row for image 7" in refusal(spec, "val")
    (aircraft / "images" / "0747566.jpg").unlink()
    assert "0747566.jpg: no such file, but" in refusal(spec, "test")
    text(aircraft, {"images_box.txt": "1514522 9 2 3 9"})
    assert "images_box.txt:1: expected 'xmin <= xmax" in refusal(spec, "test")
    text(aircraft, {"images_box.txt": "1514522 9 2 x 9"})
    assert "expected '<image id> <xmin>" in refusal(spec, "test")
    (aircraft / "variants.txt").unlink()
    assert "variants.txt: no such file" in refusal(spec, "test")
