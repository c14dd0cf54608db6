"""Whole runs through the command line: launch, resume, two processes, and what a run folder holds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attnmap_core.checkpoint import list_checkpoints, read_checkpoint_state
from attnmap_core.recipes import list_recipes, load_recipe
from safetensors.torch import load_file
from scm_wsol import SCM
from scm_wsol.cli import load_model, main
from scm_wsol.config import ScmConfig

DATA = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=44,val=10,test=14"
TINY = [
    "--data",
    DATA,
    "--image-size",
    "32",
    "--resize",
    "36",
    "--epochs",
    "2",
    "--warmup-epochs",
    "0",
    "--lr",
    "1e-3",
]
TINY += ["--backbone-options.patch-size", "8", "--backbone-options.embed-dim", "24"]
TINY += ["--backbone-options.depth", "2", "--backbone-options.num-heads", "3", "--threads", "1"]
TINY += ["--evaluate-every", "1", "--threshold-step", "0.05", "--eval-batch-size", "4"]


def history(run: Path) -> list[dict]:
    lines = (run / "history.jsonl").read_text().splitlines()
    timing = {"seconds", "images_per_second"}
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(run: Path, processes: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(free_port()),
    ]
    command += ["-m", "scm_wsol.train", "tiny-scm", *TINY, "--output-dir", str(run), *arguments]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "scm"
    assert main(["train", "tiny-scm", *TINY, "--batch-size", "16", "--output-dir", str(folder)]) == 0
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
    assert metrics["map"] == "scm"
    assert {"gt_known", "max_box_acc_v2", "pxap", "top1_loc"} <= metrics["protocol standard"]["scm"].keys()
    assert set(metrics["floors"]) == {"whole image", "centred box 80 %", "centre prior"}
    card = (run / "model" / "README.md").read_text()
    assert "MaxBoxAccV2" in card
    assert "scm_wsol" in card
    # The resolved recipe is a recipe that says the same run.
    again = load_recipe("scm_wsol", str(run / "recipe.toml"), ScmConfig)
    assert (again.batch_size, again.lr, again.image_size) == (16, 1e-3, 32)


def test_model_folder_predicts_alone(run):
    model = load_model(str(run / "model"))
    assert isinstance(model, SCM)
    assert len(model.labels) == 4
    from PIL import Image

    prediction = model.predict(Image.new("RGB", (70, 40), (90, 120, 30)))
    assert (prediction.width, prediction.height) == (70, 40)
    assert prediction.label_name in model.labels
    assert prediction.threshold == model.threshold


def test_existing_folder_is_refused_and_resume_of_a_finished_run_changes_nothing(run, capsys):
    before = load_file(run / "model" / "model.safetensors")
    arguments = ["train", "tiny-scm", *TINY, "--batch-size", "16", "--output-dir", str(run)]
    assert main(arguments) == 2
    assert "output folder exists" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluate_repeats_the_metrics_of_the_run(run, tmp_path, capsys):
    out = tmp_path / "evaluation"
    arguments = ["evaluate", str(run), "--data", DATA, "--threshold-step", "0.05", "--batch-size", "4"]
    assert (
        main([*arguments, "--protocols", "standard", "scm", "tscam", "--out", str(out), "--device", "cpu"])
        == 0
    )
    assert "MaxBoxAccV2" in capsys.readouterr().out
    ours = json.loads((out / "metrics.json").read_text())
    theirs = json.loads((run / "metrics.json").read_text())
    assert ours["protocol standard"]["scm"] == theirs["protocol standard"]["scm"]
    assert "GT-Known_top-1" in ours["protocol scm"]
    assert "gt_known" in ours["protocol tscam"]
    assert (out / "report.html").is_file()


@pytest.mark.multiprocess
def test_two_processes_equal_one_with_twice_the_batch(run, tmp_path):
    two = tmp_path / "two"
    launch(two, 2, "--batch-size", "8")
    assert read_checkpoint_state(list_checkpoints(two / "checkpoints")[-1])["processes"] == 2
    one, both = history(run), history(two)
    assert [line["step"] for line in one] == [line["step"] for line in both]
    for a, b in zip(one, both):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        # Counts of a dozen images: one that lies on a threshold may flip with the last digit of a weight.
        for name in ("top1_cls", "gt_known", "pxap"):
            assert b["metrics"][name] == pytest.approx(a["metrics"][name], abs=11)
    weights, others = (
        load_file(run / "model" / "model.safetensors"),
        load_file(two / "model" / "model.safetensors"),
    )
    for name, tensor in weights.items():
        if name.endswith("qkv.bias"):
            # Softmax does not see the keys' bias: its gradient is rounding noise, which Adam blows up to full steps.
            query, _, value = tensor.chunk(3)
            tensor = torch.cat([query, value])
            query, _, value = others[name].chunk(3)
            others[name] = torch.cat([query, value])
        torch.testing.assert_close(others[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize("recipe", [recipe.name for recipe in list_recipes("scm_wsol")])
def test_every_recipe_is_valid_and_says_what_it_costs(recipe):
    config = load_recipe("scm_wsol", recipe, ScmConfig)
    config.check()
    [info] = [info for info in list_recipes("scm_wsol") if info.name == recipe]
    assert "Command:" in info.header
    assert f" {recipe} " in info.header


def test_published_presets_have_the_papers_values():
    scm = load_recipe("scm_wsol", "cub-scm", ScmConfig)
    assert (scm.lr, scm.batch_size, scm.epochs, scm.lr_steps, scm.weight_decay) == (
        5e-5,
        256,
        30,
        (30,),
        0.05,
    )
    ilsvrc = load_recipe("scm_wsol", "ilsvrc-scm", ScmConfig)
    assert (ilsvrc.lr, ilsvrc.batch_size, ilsvrc.epochs, ilsvrc.iterations) == (1e-6, 512, 20, (16, 4, 4, 4))
    assert load_recipe("scm_wsol", "ilsvrc-tscam", ScmConfig).lr == 5e-4
    assert load_recipe("scm_wsol", "cubv2-scm", ScmConfig).batch_size == 32
