"""Tables and figures at the smallest scale: published values beside ours, runs shared and not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from attnmap_core.backbones import create_backbone
from contrastive_cam.cli import main
from contrastive_cam.experiments import REPRODUCTIONS, compare, search
from contrastive_cam.experiments.compare import Free
from contrastive_cam.experiments.tables import folder_name
from contrastive_cam.published import FULL, TABLE_1, TABLE_2, TABLE_3
from PIL import Image
from safetensors.torch import save_file

DATA = "synthetic:classes=2,superclasses=1,image_size=32,scale_min=0.4,train=8,val=2,test=4"
SMALL = ["--data", DATA, "--epochs", "1", "--device", "cpu"]
for _name, _value in {
    "image_size": 32,
    "resize": 36,
    "batch_size": 4,
    "eval_batch_size": 4,
    "threads": 1,
}.items():
    SMALL += [f"--changes.{_name}", str(_value)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reproduce")


def reproduce(place: Path, name: str, *more: str) -> dict:
    arguments = ["reproduce", name, *SMALL, "--runs", str(place / "runs"), "--out", str(place), *more]
    assert main(arguments) == 0
    return json.loads((place / name / "table.json").read_text())


def test_published_arithmetic():
    """Means and gains of the supplement agree with their parts, but for the one that it prints a hundredth too high."""
    for table in (TABLE_1, TABLE_2):
        for name, row in table.items():
            mean = (row["corloc_iou30"] + row["corloc_iou50"] + row["corloc_iou70"]) / 3
            assert row["corloc_mean"] == pytest.approx(mean, abs=0.0101 if name == "channel" else 0.0051)
    assert TABLE_3["S+T"]["cub"][1] - TABLE_3["S+T"]["cub"][0] == pytest.approx(48.17)
    assert FULL["corloc_mean"] == 73.20


@pytest.mark.slow
def test_table1_and_table2_share_the_full_run(place):
    first = reproduce(place, "table1")
    assert [row["source"] for row in first["rows"]] == ["published", "ours"] * 2
    assert first["rows"][2]["mean"] == 73.20
    assert any("Active channels" in note for note in first["notes"])
    assert any("Reduced scale" in note for note in first["notes"])
    before = {path: path.stat().st_mtime_ns for path in (place / "runs").glob("*/seed0/metrics.json")}
    second = reproduce(place, "table2")
    after = {path: path.stat().st_mtime_ns for path in (place / "runs").glob("*/seed0/metrics.json")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    assert second["rows"][3]["CorLoc 0.5"]["mean"] == first["rows"][3]["CorLoc 0.5"]["mean"]


@pytest.mark.slow
def test_table3_fig1_fig2_and_main(place):
    third = reproduce(place, "table3", "--paddings", "zeros")
    assert {row["tasks"] for row in third["rows"]} == {"R+S", "S+T"}
    for row in third["rows"]:
        assert row["gain"] == pytest.approx(row["full"] - row["baseline"])
    figure = reproduce(place, "fig1", "--ratios", "0.7")
    assert [row["ratio"] for row in figure["rows"]] == ["Max", "0.7", "Avg"]
    assert [row["published, full"] for row in figure["rows"]] == [None, 73.2, None]
    assert (place / "fig1" / "fig1.png").stat().st_size > 0
    arguments = [
        "reproduce",
        "fig2",
        *SMALL,
        "--runs",
        str(place / "runs"),
        "--out",
        str(place),
        "--images",
        "0",
        "2",
    ]
    assert main(arguments) == 0
    with Image.open(place / "fig2" / "fig2.png") as picture:
        assert picture.width > 300
    assert main([*arguments[:-2], "99"]) == 2
    main_table = reproduce(place, "main")
    names = [row["method"] for row in main_table["rows"]]
    assert names[:4] == ["PsyNet", "PsyNet + PTAP", "PsyNet + contrastive maps", "both: the full method"]
    assert {"SCDA", "DDT", "pretrained, mean activation", "floor: whole image"} <= set(names)


@pytest.fixture
def networks(tmp_path, monkeypatch) -> list[str]:
    """Small networks in place of the pretrained ones."""
    torch.manual_seed(0)
    paths = {}
    for kind, name in (("vit", "vit_tiny_patch16_224"), ("cnn", "mobilenetv2_035")):
        net = create_backbone(name, img_size=64)
        paths[kind] = tmp_path / f"{kind}.safetensors"
        save_file(
            {k.removeprefix("model."): v.contiguous() for k, v in net.state_dict().items()}, paths[kind]
        )
    monkeypatch.setattr(
        compare,
        "FREE",
        {
            "mean": Free("mean", "cnn"),
            "DDT+": Free("ddt+", "cnn", ("blocks.5", "blocks.4")),
            "region": Free("region", "vit", blocks=(-1,)),
            "LOST": Free("lost", "vit", blocks=(-1,)),
        },
    )
    arguments = [
        "--vit",
        "vit_tiny_patch16_224",
        "--vit-weights",
        str(paths["vit"]),
        "--cnn",
        "mobilenetv2_035",
    ]
    arguments += ["--cnn-weights", str(paths["cnn"]), "--image-size", "64", "--device", "cpu"]
    return [*arguments, "--methods", "mean", "DDT+", "region", "LOST"]


@pytest.mark.slow
def test_compare_has_every_method_and_floor(networks, tmp_path):
    out = tmp_path / "compare"
    arguments = ["reproduce", "compare", "--data", DATA, "--seeds", "0", "1", "--out", str(out), *networks]
    assert main(arguments) == 0
    table = json.loads((out / "table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    assert {"mean", "DDT+", "region", "LOST", "floor: centred box 80 %"} <= rows.keys()
    assert rows["region"]["CorLoc 0.5"]["n"] == 2
    assert rows["mean"]["CorLoc 0.5"]["n"] == 1
    with Image.open(out / "compare.png") as picture:  # a row of photos, then one for each method
        assert picture.height > 5 * 100


@pytest.fixture
def photos(tmp_path) -> list[str]:
    """Eight photos with a box each, as --folders and --data-options name them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    images, boxes = [], []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 60, (60, 80, 3), dtype=np.uint8)
        pixels[15:45, 20 + i : 60 + i] = (250, 240, 30)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": 80, "height": 60})
        box = {"bbox": [20 + i, 15, 40, 30], "area": 1200, "iscrowd": 0}
        boxes.append({"id": i + 1, "image_id": i + 1, "category_id": 1, **box})
    truth = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return ["--folders", f"folder:{folder}", "--data-options.annotations", str(tmp_path / "truth.json")]


@pytest.mark.slow
def test_evidence_keeps_what_is_measured(networks, photos, tmp_path, monkeypatch):
    out = tmp_path / "evidence"
    arguments = ["reproduce", "evidence", *photos, "--seeds", "0", "--out", str(out), *networks]
    arguments += [
        "--trainings",
        "CNN + PTAP",
        "--epochs",
        "1",
        "--changes.image_size",
        "64",
        "--changes.resize",
        "64",
    ]
    arguments += ["--changes.batch_size", "4"]
    assert main(arguments) == 0
    first = json.loads((out / "table.json").read_text())
    methods = [row["method"] for row in first["rows"]]
    assert methods[:5] == ["mean", "DDT+", "region", "LOST", "CNN + PTAP"]
    assert methods[5].startswith("floor")
    assert len(first["records"]) == 5 + 3  # and floors
    monkeypatch.setattr(compare, "measured", None)  # would fail if it were measured again
    assert main(arguments) == 0
    again = json.loads((out / "table.json").read_text())
    assert again["rows"] == first["rows"]
    [run] = (out / "runs").glob("*/*/seed0")
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_search_measures_every_form_once_and_names_the_best(networks, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "FEATURES", {"ViT, last block": ("vit", {"blocks": (-1,)})})
    out = tmp_path / "search"
    arguments = ["reproduce", "search", *photos, "--seeds", "0", "1", "--out", str(out), *networks]
    arguments += ["--sizes", "64"]
    assert main(arguments) == 0
    first = json.loads((out / "table.json").read_text())
    assert [(row["method"], row["cut"]) for row in first["rows"][:3]] == [
        ("DDT", "zero"),
        ("DDT", "otsu"),
        ("DDT", "0.5"),
    ]
    assert len(first["rows"]) == 12
    for kind in ("DDT", "region"):
        [best] = [row for row in first["rows"] if row["best"] == f"ViT {kind}"]
        assert best["mean"] == max(row["mean"] for row in first["rows"] if row["method"].startswith(kind))
    monkeypatch.setattr(compare, "measured", None)  # would fail if it were measured again
    assert main(arguments) == 0
    assert json.loads((out / "table.json").read_text())["rows"] == first["rows"]
    assert main([*arguments, "--folders"]) == 2


def test_long_names_of_runs_stay_apart():
    long = {"data": "synthetic:" + 200 * "x", "tasks": "R+S"}
    names = {folder_name("tiny-contrastive", long), folder_name("tiny-contrastive", long | {"tasks": "S+T"})}
    assert len(names) == 2
    assert max(map(len, names)) < 200


def test_lines_over_folders_are_means_of_each_seed():
    records = [
        {"folder": folder, "row": "unit", "seed": seed, **dict.fromkeys(compare.METRICS, value)}
        for folder, seed, value in (("a", 0, 50.0), ("a", 1, 60.0), ("b", 0, 70.0), ("b", 1, 100.0))
    ]
    rows = [
        {"folder": folder, "method": "unit", "cut": "otsu"}
        | {f"CorLoc {level}": {"mean": mean} for level in (0.5, 0.7)}
        for folder, mean in (("a", 55.0), ("b", 85.0))
    ]
    [line] = compare.by_folder(rows, records)
    assert (line["a"], line["b"], line["cut"]) == ("55.0 / 55.0", "85.0 / 85.0", "otsu")
    assert line["CorLoc 0.7"] == {"mean": 70.0, "std": pytest.approx(200**0.5), "n": 2}


def test_every_name_is_listed(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in REPRODUCTIONS)
    assert "aircraft:PATH" in said
