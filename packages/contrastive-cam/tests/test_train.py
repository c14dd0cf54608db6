"""Whole runs through the command line: launch, resume, two processes, evaluation, and what a run folder holds."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attnmap_core.checkpoint import list_checkpoints
from attnmap_core.data.transforms import Preprocessing, eval_transform
from attnmap_core.recipes import list_recipes, load_recipe
from contrastive_cam.cli import load_model, main
from contrastive_cam.config import ContrastiveConfig
from contrastive_cam.evaluate import centred, evaluate_localizer
from contrastive_cam.localizers import Localizer
from contrastive_cam.report import collapse
from contrastive_cam.train import TrainTransform, build_model, build_task
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

DATA = "synthetic:classes=2,superclasses=1,image_size=32,scale_min=0.4,train=20,val=6,test=8"
TINY = ["--data", DATA, "--image-size", "32", "--resize", "36", "--threads", "1", "--workers", "0"]
TINY += ["--batch-size", "8", "--eval-batch-size", "4", "--epochs", "2"]
HEAD = ["tiny-head", *TINY, "--backbone-options.embed_dim", "12", "--backbone-options.depth", "1"]
HEAD += ["--backbone-options.num_heads", "3"]


def small(recipe: str, run: Path, *more: str) -> list[str]:
    """Arguments of a run of seconds; the recipe's own network, which is small."""
    return ["train", recipe, *TINY, "--output-dir", str(run), *more]


def history(run: Path) -> list[dict]:
    timing = {"seconds", "images_per_second"}
    lines = (run / "history.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "full"
    more = ["--select-on", "val", "--psynet", "--name", "fish"]
    assert main(small("tiny-contrastive", folder, *more)) == 0
    return folder


def test_run_folder_is_whole(run):
    for name in (
        "recipe.toml",
        "run.json",
        "history.jsonl",
        "metrics.json",
        "report.html",
        "model/config.json",
    ):
        assert (run / name).stat().st_size > 0, name
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"corloc_iou30", "corloc_iou50", "corloc_iou70", "corloc_mean", "images"} == metrics[
        "metrics"
    ].keys()
    assert metrics["metrics"]["images"] == 8
    assert set(metrics["floors"]) == {"whole image", "centred box 80 %", "centred box 90 %"}
    assert set(metrics["rules"]) == {"mean", "otsu"}
    assert metrics["psynet"]["images"] == 8
    assert 0 < metrics["facts"]["active_fraction"] <= 100
    assert metrics["chosen"]["metric"] == "corloc_mean"
    card = (run / "model" / "README.md").read_text()
    assert "CorLoc 0.5" in card
    assert "fish" in card
    again = load_recipe("contrastive_cam", str(run / "recipe.toml"), ContrastiveConfig)
    assert (again.batch_size, again.image_size, again.select_on) == (8, 32, "val")
    epochs = [line for line in history(run) if line["kind"] == "epoch"]
    assert {"contrastive", "positive", "negative", "mask_area", "outer_ring", "ptap_acts"} <= epochs[
        -1
    ].keys()


def test_evaluate_says_what_the_run_said(run, tmp_path, capsys):
    out = tmp_path / "eval"
    arguments = [
        "evaluate",
        str(run),
        "--data",
        DATA,
        "--psynet",
        "--rules",
        "mean",
        "otsu",
        "--out",
        str(out),
    ]
    assert main([*arguments, "--device", "cpu", "--oracle", "--batch-size", "4"]) == 0
    assert "oracle cut" in capsys.readouterr().out
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (out, run))
    for name in ("metrics", "rules", "floors", "psynet"):
        assert ours[name] == theirs[name]
    assert "<html" in (out / "report.html").read_text()
    assert main([*arguments[:4], "--sweep-from", "val", "--device", "cpu"]) == 0
    assert main(["evaluate", str(run), "--data", DATA, "--threshold", "2"]) == 2


def test_model_predicts_alone(run):
    model = load_model(str(run / "model"))
    prediction = model.predict(Image.new("RGB", (50, 40)))
    assert prediction.label_name == "fish"


def test_floor_box_is_centred():
    assert centred(1.0).tolist() == [0, 0, 1, 1]
    assert centred(0.8).tolist() == pytest.approx([0.1, 0.1, 0.9, 0.9])


@pytest.mark.slow
def test_resume_gives_the_same_weights(run, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(run, part)
    for name in ("metrics.json", "report.html", "model"):  # best may be of the epoch before
        path = part / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    last = list_checkpoints(part / "checkpoints")[-1]
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    arguments = small(
        "tiny-contrastive", part, "--select-on", "val", "--psynet", "--name", "fish", "--resume"
    )
    assert main(arguments) == 0
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (part, run))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_head_trains_one_unit(tmp_path):
    folder = tmp_path / "head"
    assert main(["train", *HEAD, "--output-dir", str(folder)]) == 0
    model = load_model(str(folder / "model"))
    assert type(model).__name__ == "FrozenMap"
    assert model.positive
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rule"] == "zero"
    out = tmp_path / "eval"
    arguments = ["evaluate", str(folder), "--data", DATA, "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    assert json.loads((out / "metrics.json").read_text())["metrics"] == metrics["metrics"]
    epochs = [line for line in history(folder) if line["kind"] == "epoch"]
    assert {"region", "equivariance", "foreground"} <= epochs[-1].keys()


def test_whole_folder_without_boxes(tmp_path):
    for i in range(10):
        path = tmp_path / "photos" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 30), 40 + i).convert("RGB").save(path)
    folder = tmp_path / "run"
    arguments = small("tiny-psynet", folder, "--whole", "--epochs", "1")
    arguments[arguments.index(DATA)] = str(tmp_path / "photos")
    assert main(arguments) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["metrics"] == {}
    assert metrics["facts"]["unboxed"] == 10
    assert "Photos" in (folder / "report.html").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny-contrastive", "tiny-head"])
def test_two_processes_score_every_photo_once(tmp_path, recipe):
    """Training gathers negatives and pairs over processes; scores and floors are those of the whole split."""
    extra = ["--freeze-norms"] if recipe == "tiny-contrastive" else HEAD[len(TINY) + 1 :]
    extra += ["--epochs", "1", "--drop-last", "--pretext-weight", "0"] if recipe == "tiny-contrastive" else []
    for processes in (1, 2):
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            str(processes),
        ]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(free_port()), "-m", "contrastive_cam.train"]
        arguments = small(recipe, tmp_path / str(processes), *extra, "--batch-size", str(8 // processes))[1:]
        done = subprocess.run(
            [*command, *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "12")
    assert one["metrics"]["images"] == two["metrics"]["images"] == 8
    assert one["floors"] == two["floors"]


def test_training_photos_are_padded_and_cropped_alone():
    image = Image.effect_noise((50, 40), 60).convert("RGB")
    preprocessing = Preprocessing(size=(24, 24))
    transform = TrainTransform(preprocessing, resize=28, padding=4)
    whole = eval_transform(Preprocessing(size=(28, 28)))(image)
    padded = functional.pad(whole[None], [4] * 4, mode="reflect")[0]
    torch.manual_seed(3)
    found = transform(image)
    places = [
        (y, x) for y in range(13) for x in range(13) if torch.equal(padded[:, y : y + 24, x : x + 24], found)
    ]
    assert len(places) == 1
    corners = set()
    for seed in range(40):
        torch.manual_seed(seed)
        crop = transform(image)
        corners |= {
            y for y in range(13) for x in range(13) if torch.equal(padded[:, y : y + 24, x : x + 24], crop)
        }
    assert min(corners) == 0
    assert max(corners) == 12


def test_every_recipe_can_be_read_and_describes_itself():
    recipes = list_recipes("contrastive_cam")
    assert {"cub", "cars", "aircraft", "dogs", "folder", "folder-head"} <= {info.name for info in recipes}
    for info in recipes:
        config = load_recipe("contrastive_cam", info.name, ContrastiveConfig)
        config.check()
        build_task(config)
        assert info.summary
        if not config.pretrained and config.data.startswith("synthetic"):
            assert build_model(config).labels == [config.name]


def test_a_rate_of_the_gate_stops_no_run_without_a_gate(tmp_path):
    more = ["--gate", "none", "--lr-scales.gate.*", "10", "--lr-scales.heads.*", "10", "--epochs", "1"]
    assert main(small("tiny-contrastive", tmp_path / "run", *more)) == 0
    [epoch] = [line for line in history(tmp_path / "run") if line["kind"] == "epoch"]
    assert epoch["contrastive"] > 0


def test_freeze_by_name():
    config = load_recipe(
        "contrastive_cam", "tiny-contrastive", ContrastiveConfig, {"freeze": ["backbone.model.layer1.*"]}
    )
    model = build_model(config)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still
    assert all(name.startswith("backbone.model.layer1.") for name in still)


def test_shrinking_maps_are_told():
    lines = [{"kind": "epoch", "mask_area": area} for area in (0.4, 0.3, 0.25)]
    assert collapse(lines) is None
    assert "fingerprints" in str(collapse([*lines, {"kind": "epoch", "mask_area": 0.19}]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["which recipe"]),
        (["train", "tiny-contrastiv"], ["tiny-contrastive"]),
        (["train", "tiny-contrastive", "--ratio", "0"], ["ratio 0.0", "above 0"]),
        (["train", "tiny-contrastive", "--ratio", "1.2"], ["ratio 1.2"]),
        (["train", "tiny-contrastive", "--tasks", "Q"], ["'Q'", "rotation"]),
        (["train", "tiny-contrastive", "--tau", "0"], ["tau 0.0"]),
        (["train", "tiny-contrastive", "--image-size", "96"], ["resize 72"]),
        (["train", "tiny-contrastive", "--threshold", "most"], ["threshold most"]),
        (["train", "tiny-contrastive", "--threshold", "zero"], ["threshold zero"]),
        (["train", "tiny-contrastive", "--whole", "--select-on", "val"], ["whole"]),
        (["train", "tiny-contrastive", "--freeze", "nothing.*"], ["freeze nothing.*"]),
        (["train", "tiny-contrastive", "--data", "no/such/folder"], ["no/such/folder"]),
        (["train", "tiny-contrastive", "--negatives-frame", "anchor", "--negatives", "none"], ["anchor"]),
        (["train", "tiny-contrastive", "--compat", "psynet", "--padding", "zeros"], ["psynet"]),
        (["train", "tiny-head", "--blocks", "9"], ["blocks"]),
        (["train", "tiny-head", "--select-on", "val"], ["select_on val"]),
        (["evaluate", "no/such/model"], ["no/such/model"]),
        (["reproduce", "table9"], ["table9"]),
        (["reproduce", "compare", "--methods", "magic"], ["magic"]),
        (["reproduce", "evidence"], ["--folders"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_bad_input(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]
    assert not list(tmp_path.iterdir())


def test_evaluating_a_model_that_crops_is_refused(run):
    from attnmap_core.data.sources import load_data
    from attnmap_core.errors import InputError

    model = load_model(str(run / "model"))
    model.preprocessing = Preprocessing(size=(32, 32), crop="center", resize=36)
    with pytest.raises(InputError, match="whole photo"):
        evaluate_localizer(Localizer(model, "model"), load_data(DATA, "test"))
