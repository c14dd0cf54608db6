"""Caltech 101: boxes and outlines from MATLAB files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnmap_core.data.sources import load_data
from scipy.io import savemat


def annotate(path: Path, box: list[int], outline: list[list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"box_coord": np.array([box], np.uint16), "obj_contour": np.array(outline)})


@pytest.fixture(
    params=[("101_ObjectCategories", "Annotations"), ("images", "annotations")], ids=["official", "plain"]
)
def caltech(request: pytest.FixtureRequest, tmp_path: Path, photo) -> Path:
    images, annotations = request.param
    root = tmp_path / "caltech"
    for folder, own in [("ant", "ant"), ("Faces", "Faces_2")]:
        for number in (1, 2):
            photo(root / images / folder / f"image_{number:04d}.jpg", (30, 20))
            # top, bottom, left, right; a rectangle 2 pixels inside of the box, relative to its corner
            annotate(
                root / annotations / own / f"annotation_{number:04d}.mat",
                [5, 15, 10, 26],
                [[2, 14, 14, 2], [2, 2, 8, 8]],
            )
    photo(root / images / "BACKGROUND_Google" / "image_0001.jpg")
    return root


def test_box_and_mask(caltech: Path) -> None:
    data = load_data(f"caltech101:{caltech}", "all")
    assert data.labels == ["Faces", "ant"]  # the background photos are no class
    assert data.image_ids == [
        "Faces/image_0001.jpg",
        "Faces/image_0002.jpg",
        "ant/image_0001.jpg",
        "ant/image_0002.jpg",
    ]
    sample = data[3]
    np.testing.assert_array_equal(sample.boxes_xyxy, [[10, 5, 26, 15]])
    assert sample.mask is not None
    assert sample.mask.shape == (20, 30)
    rows, columns = np.nonzero(sample.mask)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (12, 7, 24, 13)
    assert sample.mask[7:14, 12:25].all()


def test_recognised_without_saying_so(caltech: Path) -> None:
    assert load_data(str(caltech), "all").name == "caltech101:caltech"


def test_masks_are_small_bytes(caltech: Path) -> None:
    row = load_data(f"caltech101:{caltech}", "all").dataset[0]
    assert len(row["masks"][0]["bytes"]) < 300


def test_photo_and_annotation_must_pair(caltech: Path, refusal) -> None:
    (mat,) = caltech.glob("*nnotations/ant/annotation_0002.mat")
    content = mat.read_bytes()
    mat.unlink()
    assert "annotation_0002.mat: no such file for the photo ant/image_0002.jpg" in refusal(
        f"caltech101:{caltech}", "all"
    )
    mat.write_bytes(content)
    mat.with_name("annotation_0009.mat").write_bytes(content)
    assert "annotation_0009.mat: no photo for this annotation" in refusal(f"caltech101:{caltech}", "all")


def test_malformed_annotation(caltech: Path, refusal) -> None:
    (mat,) = caltech.glob("*nnotations/ant/annotation_0002.mat")
    mat.write_bytes(b"no matlab file")
    assert "annotation_0002.mat: expected a MATLAB file" in refusal(f"caltech101:{caltech}", "all")
    annotate(mat, [15, 5, 10, 26], [[1, 2, 3], [1, 2, 3]])
    assert "annotation_0002.mat: box_coord" in refusal(f"caltech101:{caltech}", "all")
    annotate(mat, [5, 25, 10, 26], [[1, 2, 3], [1, 2, 3]])
    assert "box x=10 y=5 width=16 height=20 is not inside the image of 30x20" in refusal(
        f"caltech101:{caltech}", "all"
    )


def test_unreadable_photo_is_named_when_it_is_read(caltech: Path, refusal) -> None:
    (path,) = caltech.glob("*/ant/image_0002.jpg")
    path.write_bytes(b"")
    assert "image_0002.jpg: 0 bytes" in refusal(f"caltech101:{caltech}", "all")
    assert len(load_data(f"caltech101:{caltech}", "all", skip_unreadable=True)) == 3


def test_folders_are_missing(tmp_path: Path, text, refusal) -> None:
    text(tmp_path, {"readme.txt": ""})
    assert "expected 101_ObjectCategories/ and Annotations/" in refusal(f"caltech101:{tmp_path}", "all")
