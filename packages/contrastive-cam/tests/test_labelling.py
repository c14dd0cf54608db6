"""``contrastive-cam label``: what a user meets, from a good folder to every kind of bad one."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from attnmap_core.backbones import create_backbone
from contrastive_cam import labelling
from contrastive_cam.cli import load_model, main
from contrastive_cam.labelling import doubts, two_groups
from PIL import Image
from safetensors.torch import save_file

SIZES = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    net = create_backbone("vit", img_size=64, **SIZES)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file({key.removeprefix("model."): value for key, value in net.state_dict().items()}, path)
    return path


def draw(path: Path, index: int, size: tuple[int, int] = (80, 60), colour=(250, 240, 30)) -> list[float]:
    """A photo of dark noise with a bright rectangle, and its xyxy."""
    rng = np.random.default_rng(index)
    width, height = size
    pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    x, y = width // 4 + index % 3, height // 4 + index % 2
    w, h = width // 2, height // 2
    pixels[y : y + h, x : x + w] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return [x, y, x + w, y + h]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Nine photos of mixed sizes, one of them smaller than the network's input."""
    sizes = [(80, 60), (60, 80), (200, 100), (24, 20)]
    boxes = {f"{i}.png": draw(tmp_path / "photos" / f"{i}.png", i, sizes[i % 4]) for i in range(9)}
    (tmp_path / "truth.json").write_text(json.dumps(coco(tmp_path / "photos", boxes)))
    return tmp_path / "photos"


def coco(folder: Path, boxes: dict[str, list[float]]) -> dict:
    images, annotations = [], []
    for number, (name, (x0, y0, x1, y1)) in enumerate(boxes.items(), start=1):
        width, height = Image.open(folder / name).size
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 0,
            }
            | {"area": (x1 - x0) * (y1 - y0)}
        )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}


def label(photos: Path | list[Path], out: Path, weights: Path, *more: str) -> int:
    given = photos if isinstance(photos, list) else [photos]
    arguments = ["label", *map(str, given), "--out", str(out), "--backbone", "vit", "--weights", str(weights)]
    arguments += ["--image-size", "64", "--device", "cpu", "--batch-size", "4", *more]
    for name, value in SIZES.items():
        arguments += [f"--backbone-options.{name}", str(value)]
    if "--blocks" not in more:
        arguments += ["--blocks", "-2", "-1"]
    return main(arguments)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "photos.jsonl").read_text().splitlines()]


def test_a_folder_gets_boxes_heat_maps_and_a_report(photos, tmp_path, weights, capsys):
    truth = tmp_path / "truth.json"
    assert label(photos, tmp_path / "boxes.json", weights, "--name", "thing", "--truth", str(truth)) == 0
    said = capsys.readouterr().out
    assert "floor: centred box 80 %" in said
    assert "Against 9 known boxes" in said
    found = json.loads((tmp_path / "boxes.json").read_text())
    assert [image["file_name"] for image in found["images"]] == [str(photos / f"{i}.png") for i in range(9)]
    assert found["categories"] == [{"id": 1, "name": "thing"}]
    folder = tmp_path / "boxes"
    lines = lines_of(folder)
    by_image = {a["image_id"]: a for a in found["annotations"]}
    for number, line in enumerate(lines, start=1):
        assert 0 <= line["confidence"] <= 1
        signs = [line[name] for name in ("stability", "contrast", "whole")]
        assert line["confidence"] == pytest.approx(float(np.prod(signs) ** (1 / 3)), abs=1e-3)
        x0, y0, x1, y1 = line["box"]
        assert 0 <= x0 < x1 <= line["width"]
        assert 0 <= y0 < y1 <= line["height"]
        assert by_image[number]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.011)
        assert by_image[number]["score"] == line["confidence"]
        assert (folder / line["heatmap"]).is_file()
    page = (folder / "report.html").read_text()
    order = [
        page.index(f"<b>{Path(line['source']).name}</b>")
        for line in sorted(lines, key=lambda x: x["confidence"])
    ]
    assert order == sorted(order)  # doubtful first
    # What was fitted predicts alone.
    model = load_model(str(folder / "model"))
    assert model.predict(Image.open(photos / "0.png")).score_map.shape == (64, 64)


def test_the_planted_object_is_found(photos, tmp_path, weights):
    assert (
        label(photos, tmp_path / "out", weights, "--truth", str(tmp_path / "truth.json"), "--blocks", "-1")
        == 0
    )
    truth = json.loads((tmp_path / "truth.json").read_text())
    x, y, w, h = truth["annotations"][2]["bbox"]
    box = lines_of(tmp_path / "out")[2]["box"]
    inter = max(0, min(box[2], x + w) - max(box[0], x)) * max(0, min(box[3], y + h) - max(box[1], y))
    assert inter / ((box[2] - box[0]) * (box[3] - box[1]) + w * h - inter) > 0.5


@pytest.mark.parametrize("format", ["yolo", "voc", "csv"])
def test_formats(photos, tmp_path, weights, format):
    out = tmp_path / "boxes.csv" if format == "csv" else tmp_path / "out"
    more = [] if format == "csv" else ["--format", format]
    assert label(photos, out, weights, "--method", "mean", *more) == 0
    if format == "csv":
        rows = list(csv.DictReader(out.open()))
        assert len(rows) == 9
        assert {"x0", "score"} <= set(rows[0])
    elif format == "yolo":
        assert len(list((out / "labels").glob("*.txt"))) == 9
    else:
        tree = ElementTree.parse(out / "annotations" / "3.xml")
        assert tree.findtext("size/width") == "24"


@pytest.mark.parametrize("method", ["region", "scda", "lost"])
def test_methods(photos, tmp_path, weights, method):
    more = ["--blocks", "-1"] if method == "lost" else []
    assert label(photos, tmp_path / "out", weights, "--method", method, *more) == 0
    assert len(lines_of(tmp_path / "out")) == 9


def test_resume_does_only_what_is_missing_and_gives_the_same(photos, tmp_path, weights, monkeypatch, capsys):
    whole = tmp_path / "whole"
    assert label(photos, whole, weights) == 0
    add = labelling.Journal.add
    calls = []

    def interrupted(self, batch, found, localizer):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(batch)
        add(self, batch, found, localizer)

    monkeypatch.setattr(labelling.Journal, "add", interrupted)
    out = tmp_path / "out"
    assert label(photos, out, weights) == 130
    assert "--resume" in capsys.readouterr().err
    assert len(lines_of(out)) == 4
    with (out / "photos.jsonl").open("a") as file:
        file.write('{"source": "half a li')  # the power went

    def counted(self, batch, found, localizer):
        calls.append(batch)
        add(self, batch, found, localizer)

    monkeypatch.setattr(labelling.Journal, "add", counted)
    assert label(photos, out, weights) == 2  # neither --resume nor --overwrite
    assert label(photos, out, weights, "--threshold", "0.3", "--resume") == 2
    assert "--threshold 0.3" in capsys.readouterr().err
    assert label(photos, out, weights, "--resume") == 0
    assert sum(len(batch.sources) for batch in calls) == 9
    for name in ("photos.jsonl", "annotations.json"):
        assert (out / name).read_text() == (whole / name).read_text()
    draw(photos / "new.png", 11)
    assert label(photos, out, weights, "--resume") == 0
    assert len(lines_of(out)) == 10
    assert len(json.loads((out / "annotations.json").read_text())["images"]) == 10
    assert label(photos, out, weights, "--overwrite", "--method", "mean") == 0


def refused(capsys, code: int, *words: str) -> None:
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]


def test_unreadable_photos(photos, tmp_path, weights, capsys, caplog):
    (photos / "torn.jpg").write_bytes((photos / "0.png").read_bytes()[:300])
    (photos / "clip.mp4").write_bytes(b"movie")
    (photos / "notes.txt").write_text("text")
    refused(capsys, label(photos, tmp_path / "out", weights), "torn.jpg", "--skip-unreadable")
    assert not (tmp_path / "out").exists()
    assert label(photos, tmp_path / "out", weights, "--resume", "--skip-unreadable") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not readable (1)" in page
    assert "torn.jpg" in page
    assert "1 .mp4" in page
    assert "1 .txt" in page
    assert len(json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]) == 9
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(photos / "torn.jpg", only)
    refused(
        capsys, label(only, tmp_path / "out2", weights, "--skip-unreadable", "--method", "mean"), "none of 1"
    )


def test_bad_options(photos, tmp_path, weights, capsys):
    out = tmp_path / "out"
    for more, words in (
        (["--threshold", "1.5"], ["threshold 1.5", "[0, 1]"]),
        (["--fit-photos", "0"], ["--fit-photos 0"]),
        (["--truth", str(tmp_path / "none.json")], ["none.json"]),
        (["--blocks", "9"], ["blocks"]),
        (["--layers", "layer4"], ["exclude"]),
        (["--device", "abacus"], ["abacus"]),
        (["--fit-photo", "3"], ["--fit-photos"]),
    ):
        refused(capsys, label(photos, out, weights, *more), *words)
        assert not out.exists()
    refused(capsys, label(photos, photos, weights), "holds photos")
    refused(capsys, label(tmp_path / "nowhere", out, weights), "nowhere")
    refused(capsys, label(photos, tmp_path / "boxes.json", weights, "--format", "yolo"), ".json file is coco")
    refused(capsys, label(photos, out, tmp_path / "no.safetensors"), "no.safetensors")
    (tmp_path / "empty").mkdir()
    refused(capsys, label(tmp_path / "empty", out, weights), "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    refused(capsys, label(tmp_path / "text", out, weights), "text")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("keep")
    refused(capsys, label(photos, other, weights, "--resume"), "no labelling to resume")
    assert (other / "mine.txt").read_text() == "keep"


def test_odd_folders_work_and_warn(photos, tmp_path, weights):
    one = tmp_path / "one"
    draw(one / "a.png", 0)
    assert label(one, tmp_path / "out1", weights) == 0
    assert "1 photo: what is common" in (tmp_path / "out1" / "report.html").read_text()
    same = tmp_path / "same"
    for i in range(4):
        draw(same / f"{i}.png", 0)
    assert label(same, tmp_path / "out2", weights) == 0
    assert "All photos look the same" in (tmp_path / "out2" / "report.html").read_text()
    assert len({json.dumps(line["box"]) for line in lines_of(tmp_path / "out2")}) == 1


def test_nothing_stands_out(tmp_path, weights, monkeypatch):
    draw(tmp_path / "photos" / "a.png", 0)
    monkeypatch.setattr(
        "contrastive_cam.localizers.Localizer._scores",
        lambda self, model, features: torch.ones(len(features), 8, 8),
    )
    assert label(tmp_path / "photos", tmp_path / "out", weights) == 0
    [line] = lines_of(tmp_path / "out")
    assert (line["box"], line["confidence"]) == (None, 0.0)
    assert "1 of 1 photos have no box" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "annotations.json").read_text())["annotations"] == []


def test_several_kinds_are_told_from_one():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(60, 32))
    assert two_groups(one) < 0.12
    two = one + 4 * np.repeat(rng.normal(size=(2, 32)), 30, axis=0)
    assert two_groups(two) > 0.3
    assert any("two groups" in text for text in doubts(two, 60))
    assert doubts(one, 60) == []
    odd = one + 9 * (np.arange(60) == 7)[:, None]
    assert two_groups(odd) < 0.12  # a single odd photo is no kind
