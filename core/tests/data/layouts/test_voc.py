"""Pascal VOC files: photo and XML share a name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnmap_core.data.layouts.voc import read_annotation
from attnmap_core.data.sources import load_data


def xml(*objects: tuple[str, int, int, int, int], size: str = "") -> str:
    body = "".join(
        f"<object>\n<name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in objects
    )
    return f"<annotation>{size}{body}</annotation>"


@pytest.fixture
def voc(tmp_path: Path, photo, text) -> Path:
    for name in ("a-1.jpg", "a-2.JPG", "a-3.png"):
        photo(tmp_path / "voc" / "images" / name)
    one, two = ("raccoon", 1, 2, 9, 8), ("raccoon", 0, 0, 20, 10)
    return text(tmp_path / "voc", {"annotations/a-1.xml": xml(one, two), "annotations/a-2.xml": xml(two)})


def test_single_class(voc: Path) -> None:
    data = load_data(f"voc:{voc}", "all")
    assert data.labels == ["raccoon"]
    assert data.image_ids == ["a-1.jpg", "a-2.JPG", "a-3.png"]
    np.testing.assert_array_equal(data[0].boxes_xyxy, [[1, 2, 9, 8], [0, 0, 20, 10]])
    assert data[2].boxes_xyxy.shape == (0, 4)  # no XML file


def test_official_folder_names_and_recognition(voc: Path) -> None:
    assert load_data(str(voc), "all").name == "voc:voc"
    (voc / "images").rename(voc / "JPEGImages")
    (voc / "annotations").rename(voc / "Annotations")
    assert load_data(str(voc), "all").name == "voc:voc"


def test_class_folders(tmp_path: Path, photo, text) -> None:
    for name in ("dog/1.jpg", "cat/1.jpg"):
        photo(tmp_path / "images" / name)
    text(tmp_path, {"annotations/cat/1.xml": xml(("tail", 1, 1, 5, 5))})
    data = load_data(f"voc:{tmp_path}", "all")
    assert (data.labels, data.targets.tolist()) == (["cat", "dog"], [0, 1])
    assert [len(sample.boxes_xyxy) for sample in data] == [1, 0]


def test_classes_from_object_names(tmp_path: Path, photo, text, refusal) -> None:
    for name in ("1.jpg", "2.jpg"):
        photo(tmp_path / "images" / name)
    files = {"annotations/1.xml": xml(("dog", 1, 1, 5, 5)), "annotations/2.xml": xml(("cat", 1, 1, 5, 5))}
    text(tmp_path, files)
    assert load_data(f"voc:{tmp_path}", "all").targets.tolist() == [1, 0]
    text(tmp_path, {"annotations/2.xml": xml(("cat", 1, 1, 5, 5), ("dog", 1, 1, 5, 5))})
    assert "2.jpg: objects of 2 classes (cat, dog)" in refusal(f"voc:{tmp_path}", "all")


def test_stated_size_finds_boxes_outside_before_a_photo_is_opened(voc: Path, text, refusal) -> None:
    size = "<size><width>12</width><height>12</height></size>"
    text(voc, {"annotations/a-1.xml": xml(("raccoon", 1, 2, 19, 8), size=size)})
    (voc / "images" / "a-1.jpg").write_bytes(b"")
    assert "a-1.jpg: box x=1 y=2 width=18 height=6 is not inside the image of 12x12" in refusal(
        f"voc:{voc}", "all"
    )


def test_unknown_size_is_no_size(tmp_path: Path, text) -> None:
    text(tmp_path, {"a.xml": xml(size="<size><width>0</width><height>0</height></size>")})
    assert read_annotation(tmp_path / "a.xml").size is None


def test_annotation_without_photo(voc: Path, text, refusal) -> None:
    text(voc, {"annotations/z-9.xml": xml(("raccoon", 1, 1, 5, 5))})
    assert "z-9.xml: no photo" in refusal(f"voc:{voc}", "all")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("<annotation><object>", "not an XML file"),
        ("<annotation><object><name>raccoon</name></object></annotation>", "lacks a whole bndbox"),
        (xml(("raccoon", 9, 1, 5, 5)), "expected a name, xmin <= xmax"),
        (xml(("", 1, 1, 5, 5)), "expected a name"),
    ],
)
def test_malformed_xml(voc: Path, text, refusal, content: str, says: str) -> None:
    text(voc, {"annotations/a-2.xml": content})
    message = refusal(f"voc:{voc}", "all")
    assert "a-2.xml" in message
    assert says in message


def test_folders_are_missing_or_empty(tmp_path: Path, voc: Path, text, refusal) -> None:
    assert "expected the folders images/ and annotations/" in refusal(f"voc:{tmp_path}", "all")
    for path in (voc / "images").iterdir():
        path.unlink()
    assert "no images in this folder" in refusal(f"voc:{voc}", "all")
