"""Whole runs through the command line: what a run folder holds, launch, resume, two processes, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attnmap_core.recipes import list_recipes, load_recipe
from crossattn_dml import CrossAttentionStack, EmbeddingModel
from crossattn_dml.cli import load_model, main
from crossattn_dml.config import DmlConfig
from crossattn_dml.task import load_stack
from crossattn_dml.train import build_training
from safetensors.torch import load_file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(run: Path, processes: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), "-m", "crossattn_dml.train", "tiny-stack"]
    command += [*arguments, "--output-dir", str(run)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_run_folder_is_whole(run, history):
    names = (
        "recipe.toml",
        "run.json",
        "history.jsonl",
        "metrics.json",
        "report.html",
        "model/stack.safetensors",
    )
    for name in (*names, "model/config.json", "model/model.safetensors"):
        assert (run / name).stat().st_size > 0, name
    found = json.loads((run / "metrics.json").read_text())
    assert {"recall@1", "recall@8", "map_at_r", "r_precision", "nmi"} <= found["metrics"].keys()
    assert found["classes"] == {"train": 6, "test": 4}
    assert found["selection"] == "Numbers of the last epoch"
    card = (run / "model" / "README.md").read_text()
    assert "R@1" in card
    assert "unseen classes" in card
    again = load_recipe("crossattn_dml", str(run / "recipe.toml"), DmlConfig)
    assert (again.batch_size, again.embedding_dim, again.hierarchy) == (12, 8, "running")
    epochs = [line for line in history(run) if line["kind"] == "epoch"]
    assert {"unconditional", "conditional", "pairs"} <= epochs[-1].keys()


def test_model_embeds_without_the_stack_and_the_stack_fits(run):
    model = load_model(str(run / "model"))
    assert isinstance(model, EmbeddingModel)
    assert isinstance(load_stack(model, run / "model"), CrossAttentionStack)
    code = (
        "import sys; from PIL import Image; from crossattn_dml import EmbeddingModel\n"
        f"z = EmbeddingModel.from_pretrained({str(run / 'model')!r}).encode(Image.new('RGB', (40, 30)))\n"
        "assert z.shape == (1, 8)\n"
        "assert 'crossattn_dml.cross_attention' not in sys.modules and 'accelerate' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_existing_folder_is_refused_and_resume_of_a_finished_run_changes_nothing(run, refused, tiny):
    before = load_file(run / "model" / "model.safetensors")
    arguments = ["train", "tiny-stack", *tiny, "--output-dir", str(run)]
    assert "output folder exists" in refused(*arguments)
    assert main([*arguments, "--resume"]) == 0
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("sampler", ["balanced", "m_per_class"])
def test_interrupted_run_resumes_exactly(tmp_path, monkeypatch, sampler, tiny, history):
    from crossattn_dml.task import MetricTask

    arguments = ["train", "tiny-stack", *tiny, "--sampler", sampler, "--save-every", "1", "--nmi-seeds", "0"]
    # Triplets are drawn from the random state, which a resume must restore as well.
    arguments += ["--loss", "triplet", "--log-every", "1"]
    assert main([*arguments, "--output-dir", str(tmp_path / "whole")]) == 0
    calls, plain = [], MetricTask.__call__

    def stops(self, model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(MetricTask, "__call__", stops)
        assert main([*arguments, "--output-dir", str(tmp_path / "cut")]) == 130
    assert main([*arguments, "--output-dir", str(tmp_path / "cut"), "--resume"]) == 0
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    for name in ("model.safetensors", "stack.safetensors"):
        a, b = (load_file(tmp_path / run / "model" / name) for run in ("cut", "whole"))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, tiny, history):
    # AdamW makes a step of the rate of every rounding error; the recipe's would be too large for a small ViT.
    shared = (*tiny, "--gather", "--lr", "5e-4", "--nmi-seeds", "0")
    launch(tmp_path / "two", 2, *shared, "--batch-size", "6")
    launch(tmp_path / "one", 1, *shared, "--batch-size", "12")
    for name in ("model.safetensors", "stack.safetensors"):
        a, b = (load_file(tmp_path / run / "model" / name) for run in ("two", "one"))
        for key in a:
            # Softmax does not see the bias of the keys: its gradient is rounding error, which AdamW makes a step of.
            if not key.endswith("key.bias"):
                torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5, msg=key)
    two, one = (history(tmp_path / run) for run in ("two", "one"))
    assert [line["pairs"] for line in two] == [line["pairs"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    metrics = [json.loads((tmp_path / run / "metrics.json").read_text())["metrics"] for run in ("two", "one")]
    assert metrics[0] == pytest.approx(metrics[1], abs=0.07)  # one query of 16, should a near-tie turn


def test_baseline_begins_as_the_method_and_has_no_stack(tmp_path):
    config = load_recipe("crossattn_dml", "tiny-stack", DmlConfig, {})
    method, baseline = (build_training(dataclasses.replace(config, stack=on), 8) for on in (True, False))
    assert baseline.stack is None
    for (name, a), b in zip(method.model.state_dict().items(), baseline.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_epoch_chosen_on_held_out_classes(tmp_path, tiny):
    arguments = ["train", "tiny-baseline", *tiny[: tiny.index("--heads")], *tiny[tiny.index("--heads") + 2 :]]
    arguments += ["--select-on", "val", "--val-share", "0.34", "--batch-size", "8", "--ks", "1", "2"]
    assert main([*arguments, "--output-dir", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["classes"] == {"train": 4, "test": 4}
    assert found["chosen"]["metric"] == "recall@1"
    assert {"recall@1", "last_recall@1"} <= found["metrics"].keys()
    assert not (tmp_path / "run" / "model" / "stack.safetensors").exists()


def test_rates_of_the_parts_reach_the_optimizer():
    config = DmlConfig(loss="proxy_anchor", head_lr_scale=3.0).with_lr_scales()
    assert config.lr_scales == {"model.head.*": 3.0, "stack.*": 10.0, "loss.proxies.*": 100.0}
    assert DmlConfig(stack=False, loss="margin").with_lr_scales().lr_scales == {"loss.boundaries": 500.0}


def test_frozen_parameters_stay(tmp_path):
    config = load_recipe("crossattn_dml", "tiny-stack", DmlConfig, {"freeze": ["model.backbone.*"]})
    training = build_training(config, 8)
    assert {
        name.split(".")[1] for name, p in training.model.named_parameters(prefix="m") if p.requires_grad
    } == {"head"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "synthetic:classes=6,superclasses=2,image_size=32,scale_min=0.4"],
            "are in train and in test",
        ),
        (["--class-split", "first"], "split 'all' does not exist"),
        (["--per-class", "5"], "per_class 5: expected a divisor of batch_size 12"),
        (["--per-class", "1"], "per_class 1: expected 2 or more"),
        (
            ["--batch-size", "24", "--sampler", "balanced"],
            "takes 12 classes with 2 images each, the data have 6",
        ),
        (["--batch-size", "40"], "batch_size 40: expected at most 36"),
        (["--ks", "16", "--select-on", "test"], "k 16: expected 1 to 15"),
        (["--mode", "ca_only"], 'use "xavier"'),
        (["--heads", "3"], "heads 3: expected a divisor"),
        (["--freeze", "nothing.*"], "freeze nothing.*: matches no parameter"),
        (["--select-on", "val", "--val-share", "0.01"], "holds out 0 of 6 training classes"),
        (["--test-resize", "20"], "test_resize 20: expected at least image_size 32"),
        (
            ["--loss-options.epsilon", "none", "--mined", "--loss", "triplet"],
            "mined True: expected loss multi_similarity",
        ),
        (["--nmi-seeds", "-1"], "nmi_seeds -1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, refused, arguments, message, tiny):
    out = tmp_path / "run"
    said = refused("train", "tiny-stack", *tiny, "--output-dir", str(out), *arguments)
    assert message in said
    if "k 16" not in message:
        assert not out.exists()  # what is wrong with data and settings leaves no folder behind


def test_every_recipe_is_whole():
    infos = list_recipes("crossattn_dml")
    names = {info.name for info in infos}
    assert {
        f"{data}-{kind}" for data in ("cub", "cars", "sop", "inshop") for kind in ("lmu", "strong")
    } <= names
    for info in infos:
        config = load_recipe("crossattn_dml", info.name, DmlConfig)
        config.check()
        config.preprocessing()
        assert info.summary


def test_standard_protocols_of_the_recipes():
    def recipe(name: str) -> DmlConfig:
        return load_recipe("crossattn_dml", name, DmlConfig)

    assert {recipe(f"{data}-lmu").class_split for data in ("cub", "cars")} == {"first"}
    assert recipe("sop-lmu").ks == (1, 10, 100, 1000)
    inshop = recipe("inshop-strong")
    assert (inshop.query_split, inshop.gallery_split, inshop.batch_norm) == ("query", "gallery", "trained")
    lmu = recipe("cub-lmu")
    assert (lmu.backbone, lmu.batch_size, lmu.per_class, lmu.lr, lmu.weight_decay) == (
        "resnet50.tv_in1k",
        112,
        2,
        1e-5,
        4e-4,
    )
    assert (lmu.optimizer, lmu.batch_norm, lmu.stack_lr_scale, lmu.epochs) == ("adam", "frozen", 10.0, 150)
