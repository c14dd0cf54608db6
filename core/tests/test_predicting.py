"""The predict verb on a model whose answers are known: odd photos, broken photos, full disks, old folders."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from attnmap_core.cli import Program, run
from attnmap_core.data.transforms import Preprocessing
from attnmap_core.hub import Localization, PretrainedModel
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

Predict = Callable[..., tuple[int, str, str]]


class Redness(PretrainedModel):
    """The score map is how red a pixel is; class 1 if anything is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def localize(self, images: Tensor) -> Localization:
        red = (images[:, 0] - images[:, 1:].amax(dim=1)).clamp(min=0) * self.scale
        seen = red.amax(dim=(1, 2))
        return Localization(torch.stack([0.5 - seen, seen - 0.5], dim=1), red)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    red_photo().save(folder / "fox.png")
    Image.new("RGB", (60, 20), (0, 90, 0)).save(folder / "grass.jpg")
    return folder


@pytest.fixture
def predict(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Predict:
    """Run the verb on the folder of photos; answers exit code, stdout and stderr without the progress bar."""
    model = Redness()
    model.preprocessing = Preprocessing(
        mean=(0, 0, 0), std=(1, 1, 1), size=(32, 32), interpolation="bilinear"
    )
    model.labels, model.threshold = ["grass", 'fox "é"'], 0.5
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def unused(*_: Any) -> None:
        pytest.fail("not this verb")

    program = Program(
        name="toy", module="toy", config=Redness, train=unused, evaluate=unused, load=lambda _: model
    )

    def call(*options: str, given: tuple[Path, ...] = (photos,), out: Path = tmp_path / "out") -> Any:
        shared = ["--model", str(tmp_path / "model"), "--out", str(out), "--device", "cpu"]
        code = run(program, ["predict", *map(str, given), *shared, *options])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.replace("\r", "\n").splitlines() if "predict:" not in line]
        return code, captured.out, "\n".join(filter(None, (line.strip() for line in lines)))

    return call


def red_photo(
    size: tuple[int, int] = (128, 64), box: tuple[int, int, int, int] = (32, 16, 96, 48)
) -> Image.Image:
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), box)
    return image


def results(out: Path) -> dict[str, Any]:
    rows = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    return {Path(row["source"]).name: row for row in rows}


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("toy: error: ")
    assert "\n" not in err, err
    for word in words:
        assert word in err


def left_over(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"photos", "model"}


# --- What comes out ---------------------------------------------------------------------------------------


def test_photos_become_annotations_pictures_and_a_report(predict: Predict, tmp_path: Path) -> None:
    code, said, _ = predict()
    out = tmp_path / "out"
    assert code == 0
    assert said == f"{out / 'report.html'}\n"
    assert {p.name for p in out.iterdir()} == {
        "annotations.json", "heatmaps", "predictions.json", "report.html",
    }  # fmt: skip
    fox, grass = results(out)["fox.png"], results(out)["grass.jpg"]
    assert (fox["width"], fox["height"], fox["label"], fox["label_name"]) == (128, 64, 1, 'fox "é"')
    np.testing.assert_allclose(fox["boxes_xyxy"], [[32, 16, 96, 48]], atol=5)
    assert fox["probability"] > 0.7
    assert fox["threshold"] == 0.5
    assert (grass["label_name"], grass["boxes_xyxy"]) == ("grass", [])
    heatmaps = sorted(p.name for p in (out / "heatmaps").iterdir())
    assert heatmaps == ["000000_fox.jpg", "000001_grass.jpg"]
    with Image.open(out / "heatmaps" / "000000_fox.jpg") as heat:
        assert heat.size == (128, 64)
        heat.load()
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "2 photos" in report
    assert "toy predict" in report
    assert left_over(tmp_path) == {"out"}


def test_all_four_formats(predict: Predict, tmp_path: Path) -> None:
    for format in ("coco", "yolo", "voc", "csv"):
        assert predict("--format", format, out=tmp_path / format)[0] == 0
    expected = results(tmp_path / "coco")["fox.png"]["boxes_xyxy"][0]

    coco = COCO(str(tmp_path / "coco" / "annotations.json"))
    x, y, w, h = coco.loadAnns(coco.getAnnIds())[0]["bbox"]
    np.testing.assert_allclose([x, y, x + w, y + h], expected, atol=0.02)

    _, *centred = map(float, (tmp_path / "yolo" / "labels" / "fox.txt").read_text().split())
    x, y, w, h = np.array(centred) * [128, 64, 128, 64]
    np.testing.assert_allclose([x - w / 2, y - h / 2, x + w / 2, y + h / 2], expected, atol=0.02)

    root = ElementTree.parse(tmp_path / "voc" / "annotations" / "fox.xml").getroot()
    assert root.findtext("object/name") == 'fox "é"'
    xmin, ymin, xmax, ymax = (int(child.text or "") for child in root.findall("object/bndbox/*"))
    np.testing.assert_allclose([xmin - 1, ymin - 1, xmax, ymax], expected, atol=1)

    with (tmp_path / "csv" / "boxes.csv").open(encoding="utf-8", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["source"].endswith("fox.png"))
    np.testing.assert_allclose([float(row[name]) for name in ("x0", "y0", "x1", "y1")], expected, atol=0.01)


def test_options_reach_the_model(predict: Predict, photos: Path, tmp_path: Path) -> None:
    two = red_photo((96, 96), (6, 6, 30, 30))
    two.paste((120, 0, 0), (60, 60, 84, 84))  # weaker
    two.save(photos / "two.png")
    for options, count in (
        ((), 1),
        (("--boxes", "all"), 1),
        (("--boxes", "all", "--threshold", "0.2"), 2),
        (("--threshold", "0.2", "--batch-size", "1"), 1),
    ):
        assert predict(*options, "--overwrite")[0] == 0
        assert len(results(tmp_path / "out")["two.png"]["boxes_xyxy"]) == count


@pytest.mark.parametrize("options", [("--threshold", "1.5"), ("--threshold", "-0.1"), ("--batch-size", "0")])
def test_numbers_out_of_range_are_wrong_input(
    predict: Predict, tmp_path: Path, options: tuple[str, str]
) -> None:
    assert_refused(predict(*options), *options)
    assert left_over(tmp_path) == set()


# --- Odd photos -------------------------------------------------------------------------------------------


def test_every_kind_of_photo(predict: Predict, photos: Path, tmp_path: Path) -> None:
    red = red_photo()
    red.convert("CMYK").save(photos / "cmyk.jpg", quality=95)
    red.convert("P").save(photos / "palette.png")
    red.convert("RGBA").save(photos / "alpha.png")
    Image.fromarray(np.full((30, 50), 40_000, np.uint16)).save(photos / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying, to be shown standing
    red.transpose(Image.Transpose.ROTATE_90).save(photos / "turned.jpg", exif=turned, quality=95)
    Image.new("RGB", (1, 1), "red").save(photos / "pixel.png")
    red_photo((600, 3), (200, 0, 300, 3)).save(photos / "strip.PNG")
    assert predict()[0] == 0
    found = results(tmp_path / "out")
    assert len(found) == 9
    for name in ("cmyk.jpg", "palette.png", "alpha.png", "turned.jpg"):
        assert (found[name]["width"], found[name]["height"], found[name]["label"]) == (128, 64, 1), name
        np.testing.assert_allclose(found[name]["boxes_xyxy"], [[32, 16, 96, 48]], atol=6, err_msg=name)
    assert found["deep.png"]["label"] == 0
    assert (found["pixel.png"]["width"], found["pixel.png"]["height"]) == (1, 1)
    np.testing.assert_allclose(found["strip.PNG"]["boxes_xyxy"], [[200, 0, 300, 3]], atol=20)
    assert len(list((tmp_path / "out" / "heatmaps").iterdir())) == 9


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "猫" * 80 + ".png", 'a "b" & <c>.png', "no ending"])
def test_odd_names(predict: Predict, tmp_path: Path, name: str) -> None:
    other = tmp_path / "photos" / "more"
    other.mkdir()
    red_photo().save(other / name, "PNG")
    assert predict(given=(other / name,))[0] == 0
    assert list(results(tmp_path / "out")) == [name]


def test_equal_names_from_two_folders(predict: Predict, photos: Path, tmp_path: Path) -> None:
    (photos / "more").mkdir()
    red_photo(box=(0, 0, 32, 16)).save(photos / "more" / "fox.png")
    assert predict("--format", "yolo")[0] == 0
    out = tmp_path / "out"
    assert {p.name for p in (out / "labels").iterdir()} == {"fox.txt", "fox_2.txt", "grass.txt"}
    assert len(list((out / "heatmaps").iterdir())) == 3


# --- Broken photos ----------------------------------------------------------------------------------------


def break_photo(photos: Path, kind: str) -> Path:
    path = photos / "broken.jpg"
    red_photo().save(path)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"<html>not found</html>", "truncated": whole[: len(whole) // 2]}[kind]
    )
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
def test_a_broken_photo_ends_the_run_and_leaves_no_folder(
    predict: Predict, photos: Path, tmp_path: Path, kind: str
) -> None:
    path = break_photo(photos, kind)
    assert_refused(predict(), str(path), "--skip-unreadable")
    assert left_over(tmp_path) == set()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
def test_broken_photos_are_skipped_and_listed_on_request(
    predict: Predict, photos: Path, tmp_path: Path, kind: str
) -> None:
    path = break_photo(photos, kind)
    assert predict("--skip-unreadable")[0] == 0
    assert set(results(tmp_path / "out")) == {"fox.png", "grass.jpg"}
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "1 photo could not be read" in report
    assert str(path) in report


def test_photos_that_are_all_broken_are_an_error(predict: Predict, photos: Path, tmp_path: Path) -> None:
    path = break_photo(photos, "empty")
    assert_refused(predict("--skip-unreadable", given=(path,)), "none of 1 photos", "0 bytes")
    assert left_over(tmp_path) == set()


def test_no_photos_are_an_error(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "photos" / "empty").mkdir()
    assert_refused(predict(given=(tmp_path / "photos" / "empty",)), "no images")
    assert_refused(predict(given=(tmp_path / "absent",)), "absent: no such file")
    assert_refused(predict(given=()), "no photos given")
    assert left_over(tmp_path) == set()


# --- The output folder ------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept_unless_told(predict: Predict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert predict()[0] == 0  # an empty one is as good as none
    (out / "mine.txt").write_text("keep")
    assert_refused(predict(), str(out), "--overwrite")
    assert (out / "mine.txt").read_text() == "keep"
    assert predict("--overwrite")[0] == 0
    assert not (out / "mine.txt").exists()
    assert (out / "report.html").is_file()


def test_a_failure_keeps_the_folder_that_was_to_be_replaced(
    predict: Predict, photos: Path, tmp_path: Path
) -> None:
    assert predict()[0] == 0
    before = sorted(p.relative_to(tmp_path) for p in (tmp_path / "out").rglob("*"))
    break_photo(photos, "empty")
    assert_refused(predict("--overwrite"), "broken.jpg")
    assert sorted(p.relative_to(tmp_path) for p in (tmp_path / "out").rglob("*")) == before
    assert left_over(tmp_path) == {"out"}


def test_a_file_is_no_output_folder(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert_refused(predict("--overwrite"), "is a file")
    assert (tmp_path / "out").read_text() == "mine"


def test_photos_are_never_overwritten(predict: Predict, photos: Path, tmp_path: Path) -> None:
    for out in (photos, photos.parent, tmp_path / "photos" / ".." / "photos"):
        assert_refused(predict("--overwrite", out=out), "photos", "--out")
    assert {p.name for p in photos.iterdir()} == {"fox.png", "grass.jpg"}


# --- A full disk ------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name"), [(Image.Image, "save"), (Path, "write_text"), (os, "fsync"), (Path, "mkdir")]
)
def test_a_full_disk_leaves_nothing_half_written(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, full)
        result = predict()
    assert_refused(result, str(tmp_path / "out"), "space")
    assert left_over(tmp_path) == set()
