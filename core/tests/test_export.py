"""Annotation files, read back as other tools read them."""

from __future__ import annotations

import csv
import errno
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from attnmap_core.errors import InputError
from attnmap_core.export import FORMATS, export_predictions
from attnmap_core.prediction import Prediction
from pycocotools.coco import COCO

NASTY = ['say "hi"', "it's <b> & co", "ünïcödé 猫 🦊", "a: {b} #c, [d]", "back\\slash", "plain"]


def prediction(source: str, boxes: Any = (), label: int = 0, name: str = "cat", **changes: Any) -> Prediction:
    boxes_xyxy = np.array(boxes, np.float64).reshape(-1, 4)
    values: dict[str, Any] = {
        "source": source,
        "width": 200,
        "height": 100,
        "label": label,
        "label_name": name,
        "probability": 0.875,
        "boxes_xyxy": boxes_xyxy,
        "box_scores": np.linspace(0.9, 0.5, len(boxes_xyxy)),
        "score_map": np.zeros((4, 4), np.float32),
        "threshold": 0.2,
    }
    return Prediction(**(values | changes))


TWO_BOXES = [[10.5, 20, 110.5, 90], [0, 0, 200, 100]]


@pytest.fixture
def predictions() -> list[Prediction]:
    return [
        prediction("photos/a.jpg", TWO_BOXES),
        prediction("photos/none.jpg", label=2, name="hen"),
        prediction("elsewhere/a.png", [[1, 2, 3, 4]], label=1, name="dog"),
    ]


def read_yolo_boxes(path: Path, width: int, height: int) -> list[list[float]]:
    boxes: list[list[float]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        _, x, y, w, h = map(float, line.split())
        assert min(x, y, w, h) >= 0
        assert max(x, y, w, h) <= 1
        boxes.append([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height])
    return boxes


# --- COCO -------------------------------------------------------------------------------------------------


def test_coco_loads_in_pycocotools(predictions: list[Prediction], tmp_path: Path) -> None:
    [path] = export_predictions(predictions, tmp_path, "coco", ["cat", "dog", "hen"])
    coco = COCO(str(path))
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {1: "cat", 2: "dog", 3: "hen"}
    images = coco.loadImgs(coco.getImgIds())
    assert [image["file_name"] for image in images] == [p.source for p in predictions]
    assert {(image["width"], image["height"]) for image in images} == {(200, 100)}
    for image, expected in zip(images, predictions):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert len(annotations) == len(expected.boxes_xyxy)
        for annotation, (x0, y0, x1, y1), score in zip(annotations, expected.boxes_xyxy, expected.box_scores):
            assert annotation["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])
            assert annotation["area"] == pytest.approx((x1 - x0) * (y1 - y0))
            assert annotation["score"] == pytest.approx(score)
            assert annotation["category_id"] == expected.label + 1
    assert len(coco.getAnnIds(catIds=[1])) == 2


def test_coco_results_can_be_matched_with_it(predictions: list[Prediction], tmp_path: Path) -> None:
    [path] = export_predictions(predictions, tmp_path, "coco")
    coco = COCO(str(path))
    results = [
        {name: annotation[name] for name in ("image_id", "category_id", "bbox", "score")}
        for annotation in coco.dataset["annotations"]
    ]
    assert len(coco.loadRes(results).getAnnIds()) == 3


# --- YOLO -------------------------------------------------------------------------------------------------


def test_yolo_boxes_and_names(predictions: list[Prediction], tmp_path: Path) -> None:
    written = export_predictions(predictions, tmp_path, "yolo", ["cat", "dog", "hen"])
    labels = tmp_path / "labels"
    assert sorted(path.name for path in labels.iterdir()) == ["a.txt", "a_2.txt", "none.txt"]
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(written)
    np.testing.assert_allclose(read_yolo_boxes(labels / "a.txt", 200, 100), TWO_BOXES, atol=1e-3)
    np.testing.assert_allclose(read_yolo_boxes(labels / "a_2.txt", 200, 100), [[1, 2, 3, 4]], atol=1e-3)
    assert (labels / "none.txt").read_text() == ""
    assert (labels / "a_2.txt").read_text().startswith("1 ")
    data = yaml.safe_load((tmp_path / "data.yaml").read_text(encoding="utf-8"))
    assert data["names"] == {0: "cat", 1: "dog", 2: "hen"}
    assert data["nc"] == 3


# --- Pascal VOC -------------------------------------------------------------------------------------------


def test_voc_counts_pixels_from_one_and_includes_both_ends(tmp_path: Path) -> None:
    boxes = [[0, 0, 200, 100], [10.5, 20, 110.5, 90], [50, 60, 50.2, 60.2], [199.5, 99.5, 200, 100]]
    [path] = export_predictions([prediction("x/a.jpg", boxes)], tmp_path, "voc")
    assert path == tmp_path / "annotations" / "a.xml"
    root = ElementTree.parse(path).getroot()
    assert root.tag == "annotation"
    assert root.findtext("filename") == "a.jpg"
    assert [root.findtext(f"size/{tag}") for tag in ("width", "height", "depth")] == ["200", "100", "3"]
    corners = [
        [int(item.findtext(f"bndbox/{tag}", "")) for tag in ("xmin", "ymin", "xmax", "ymax")]
        for item in root.iter("object")
    ]
    assert corners == [[1, 1, 200, 100], [11, 21, 111, 90], [51, 61, 51, 61], [200, 100, 200, 100]]
    assert {item.findtext("name") for item in root.iter("object")} == {"cat"}


def test_voc_of_a_photo_without_a_box(predictions: list[Prediction], tmp_path: Path) -> None:
    written = export_predictions(predictions, tmp_path, "voc")
    assert [path.name for path in written[:3]] == ["a.xml", "none.xml", "a_2.xml"]
    assert ElementTree.parse(written[1]).getroot().find("object") is None
    assert ElementTree.parse(written[2]).getroot().findtext("path") == "elsewhere/a.png"


# --- CSV --------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_one_row_a_box(predictions: list[Prediction], tmp_path: Path) -> None:
    [path] = export_predictions(predictions, tmp_path, "csv", ["cat", "dog", "hen"])
    rows = read_csv(path)
    assert [row["source"] for row in rows] == ["photos/a.jpg"] * 2 + ["photos/none.jpg", "elsewhere/a.png"]
    assert [float(rows[0][name]) for name in ("x0", "y0", "x1", "y1")] == TWO_BOXES[0]
    assert rows[2]["x0"] == rows[2]["score"] == ""
    assert [row["label"] for row in rows] == ["cat", "cat", "hen", "dog"]
    assert float(rows[3]["probability"]) == 0.875


# --- All formats ------------------------------------------------------------------------------------------


def names_in(format: str, folder: Path) -> list[str]:
    if format == "coco":
        return [c["name"] for c in json.loads((folder / "annotations.json").read_text("utf-8"))["categories"]]
    if format == "yolo":
        return list(yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))["names"].values())
    if format == "csv":
        return [row["label"] for row in read_csv(folder / "boxes.csv")]
    files = sorted((folder / "annotations").iterdir(), key=lambda path: int(path.stem))
    return [ElementTree.parse(path).getroot().findtext("object/name", "") for path in files]


@pytest.mark.parametrize("format", FORMATS)
def test_names_with_quotes_and_other_scripts_survive(format: Any, tmp_path: Path) -> None:
    kept = [
        prediction(f"{i}.jpg", [[0, 0, 5, 5]], label=i, name=name) for i, name in enumerate(NASTY)
    ]  # fmt: skip
    export_predictions(kept, tmp_path, format, NASTY)
    assert names_in(format, tmp_path) == NASTY


@pytest.mark.parametrize(
    "name", ['we "said", so.jpg', "猫 & <co>.jpg", "no\u00a0break\u3000space.jpg", "a\nb.jpg"]
)
def test_photo_names_survive(name: str, tmp_path: Path) -> None:
    source, kept = f"photos/{name}", [prediction(f"photos/{name}", [[0, 0, 5, 5]])]
    [coco] = export_predictions(kept, tmp_path, "coco")
    assert COCO(str(coco)).loadImgs(1)[0]["file_name"] == source
    assert read_csv(export_predictions(kept, tmp_path, "csv")[0])[0]["source"] == source
    [voc] = export_predictions(kept, tmp_path, "voc")
    assert voc.stem == Path(name).stem
    assert ElementTree.parse(voc).getroot().findtext("path") == source


@pytest.mark.parametrize("format", FORMATS)
def test_a_photo_name_that_is_not_unicode_is_no_reason_to_fail(format: Any, tmp_path: Path) -> None:
    source = b"photos/caf\xe9.jpg".decode("utf-8", "surrogateescape")  # what Python makes of such a file name
    for path in export_predictions([prediction(source, [[0, 0, 5, 5]])], tmp_path, format):
        path.read_text(encoding="utf-8")
    if format == "coco":
        assert (
            json.loads((tmp_path / "annotations.json").read_text("utf-8"))["images"][0]["file_name"] == source
        )


@pytest.mark.parametrize("format", FORMATS)
def test_no_predictions_give_a_valid_empty_file(format: Any, tmp_path: Path) -> None:
    written = export_predictions([], tmp_path, format, ["cat", "dog"])
    if format == "coco":
        coco = COCO(str(written[0]))
        assert (coco.getImgIds(), coco.getAnnIds(), coco.getCatIds()) == ([], [], [1, 2])
    elif format == "yolo":
        assert yaml.safe_load((tmp_path / "data.yaml").read_text())["names"] == {0: "cat", 1: "dog"}
    elif format == "csv":
        assert read_csv(written[0]) == []
    else:
        assert written == []


def test_labels_default_to_the_names_met(predictions: list[Prediction], tmp_path: Path) -> None:
    kept = [predictions[0], prediction("b.jpg", label=3, name="fox")]
    export_predictions(kept, tmp_path, "coco")
    assert names_in("coco", tmp_path) == ["cat", "1", "2", "fox"]


def test_photos_of_one_name_get_files_of_their_own(tmp_path: Path) -> None:
    sources = ["x/a.jpg", "y/a.jpg", "x/a_2.jpg", "z/A.JPG"]  # the last is the same on some disks
    written = export_predictions([prediction(source) for source in sources], tmp_path, "voc")
    assert len({path.name.lower() for path in written}) == 4
    read = [ElementTree.parse(path).getroot().findtext("path") for path in written]
    assert read == sources


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"coco.*'xml'"):
        export_predictions([], tmp_path, "xml")  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_no_half_file(
    format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as file:
            file.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="space"):
        export_predictions([prediction("a.jpg", TWO_BOXES)], tmp_path, format)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
