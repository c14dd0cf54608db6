"""Whole runs through the command line: launch, resume, two processes, fine-tuning, and every recipe at a small size."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attnmap_core.checkpoint import list_checkpoints, read_checkpoint_state
from attnmap_core.recipes import list_recipes, load_recipe
from PIL import Image
from safetensors.torch import load_file
from sar_vit import SARViT
from sar_vit.cli import load_model, main
from sar_vit.config import SarConfig
from sar_vit.entropy import entropy_weight
from sar_vit.scenarios.supervised import build_model, make_schedule
from sar_vit.segmentation import SARSegmenter

DATA = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=44,val=10,test=14"
LITTLE = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=16,val=4,test=8"
VIT = ["--backbone", "vit", "--backbone-options.patch-size", "8", "--backbone-options.embed-dim", "24"]
VIT += ["--backbone-options.depth", "2", "--backbone-options.num-heads", "3"]
QUICK = ["--image-size", "32", "--workers", "0", "--threads", "1", "--mixed-precision", "no"]
TINY = ["--data", DATA, *VIT, *QUICK, "--epochs", "2", "--warmup-epochs", "0", "--eval-batch-size", "4"]
TINY += ["--batch-size", "16", "--evaluate-every", "1"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def history(run: Path) -> list[dict[str, Any]]:
    lines = (run / "history.jsonl").read_text().splitlines()
    timing = {"seconds", "images_per_second"}
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def epochs(run: Path) -> list[dict[str, Any]]:
    return [line for line in history(run) if line["kind"] == "epoch"]


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")


def train(run: Path, *arguments: object, recipe: str = "tiny-sar") -> Path:
    assert main(["train", recipe, *map(str, arguments), "--output-dir", str(run)]) == 0
    return run


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "sar", *TINY)


def test_run_folder_is_whole(run):
    for name in (
        "recipe.toml",
        "run.json",
        "history.jsonl",
        "metrics.json",
        "report.html",
        "model/config.json",
        "best/model.safetensors",
    ):
        assert (run / name).stat().st_size > 0, name
    found = json.loads((run / "metrics.json").read_text())
    assert (found["split"], found["scenario"], found["chosen"]["metric"]) == ("test", "supervised", "top1")
    names = {"top1", "top5", "jaccard", "spatial_entropy", "components", "foreground"}
    assert set(found["metrics"]) == names | {f"last_{name}" for name in names}
    assert found["metrics"]["top1"] * 14 % 100 == pytest.approx(0, abs=1e-6)
    lines = epochs(run)
    assert [line["step"] for line in lines] == [3, 6]
    best = max(lines, key=lambda line: line["metrics"]["top1"])
    assert (found["chosen"]["epoch"], found["chosen"]["value"]) == (best["epoch"], best["metrics"]["top1"])
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["cross_entropy"] + 0.01 * lines[0]["spatial_entropy"], rel=1e-5
    )
    card = (run / "model" / "README.md").read_text()
    assert "Top-1" in card
    assert "sar_vit" in card
    report = (run / "report.html").read_text()
    assert "Heads of the last block" in report
    # The resolved recipe is a recipe that says the same run.
    again = load_recipe("sar_vit", str(run / "recipe.toml"), SarConfig)
    assert (again.batch_size, again.lr, again.image_size, again.entropy_weight) == (16, 1e-3, 32, 0.01)
    assert again.backbone_options == {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def test_model_folder_predicts_alone(run):
    model = load_model(str(run / "model"))
    assert isinstance(model, SARViT)
    assert model.switches == {"msa_skip": False, "mlp_norm": False, "mlp_skip": True}
    assert len(model.labels) == 4
    prediction = model.predict(Image.new("RGB", (70, 40), (90, 120, 30)))
    assert (prediction.width, prediction.height) == (70, 40)
    assert prediction.label_name in model.labels


def test_existing_folder_is_refused_and_resume_of_a_finished_run_changes_nothing(run, capsys):
    before = weights(run)
    arguments = ["train", "tiny-sar", *TINY, "--output-dir", str(run)]
    assert main(arguments) == 2
    assert "output folder exists" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    after = weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluate_repeats_the_metrics_of_the_run(run, tmp_path, capsys):
    out = tmp_path / "evaluation"
    arguments = ["evaluate", str(run), "--data", DATA, "--batch-size", "4", "--device", "cpu"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert "Top-1" in capsys.readouterr().out
    ours = json.loads((out / "metrics.json").read_text())["metrics"]
    theirs = json.loads((run / "metrics.json").read_text())["metrics"]
    assert ours == {name: value for name, value in theirs.items() if not name.startswith("last_")}


# --- Interrupted and distributed ----------------------------------------------------------------------------

# Everything that draws: RandAugment and erasing, Mixup and CutMix, stochastic depth; and what must be kept besides.
DRAWING = ["--augmentation", "deit", "--mixup", "0.8", "--cutmix", "1.0", "--drop-path-rate", "0.2"]
DRAWING += ["--ema-decay", "0.8", "--repeated-augmentation", "3", "--log-every", "1", "--save-every", "2"]
DRAWING += ["--entropy-schedule", "warmup_cosine", "--entropy-warmup-epochs", "2", "--epochs", "3"]
KILLED = """
import os, signal, sys
from sar_vit.cli import main
from sar_vit.task import SupervisedTask

call, calls = SupervisedTask.__call__, []

def counted(self, model, batch):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, model, batch)

SupervisedTask.__call__ = counted
main(sys.argv[1:])
"""


@pytest.mark.multiprocess
def test_resume_after_kill_equals_the_uninterrupted_run(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, *TINY, *DRAWING)
    arguments = ["train", "tiny-sar", *TINY, *DRAWING, "--output-dir", str(killed)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (killed / "model").exists()
    assert (
        read_checkpoint_state(list_checkpoints(killed / "checkpoints")[-1])["updates"] == 4
    )  # of 3 an epoch
    assert main([*arguments, "--resume"]) == 0
    for name in ("model", "best"):
        file = f"{name}/model.safetensors"
        assert (whole / file).read_bytes() == (killed / file).read_bytes(), name
    assert history(whole) == history(killed)
    assert (whole / "metrics.json").read_text() == (killed / "metrics.json").read_text()


def launch(run: Path, processes: int, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", port, "-m", "sar_vit.train", "tiny-sar", *TINY, *arguments]
    done = subprocess.run(
        [*command, "--output-dir", str(run)], env=environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.multiprocess
def test_two_processes_equal_one_with_twice_the_batch(run, tmp_path):
    two = tmp_path / "two"
    launch(two, 2, "--batch-size", "8")
    assert read_checkpoint_state(list_checkpoints(two / "checkpoints")[-1])["processes"] == 2
    ours, theirs = epochs(run), epochs(two)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "cross_entropy", "spatial_entropy", "components", "foreground", "accuracy"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
        # One of ten images may fall on the other side with the last digit of a weight.
        assert b["metrics"]["top1"] == pytest.approx(a["metrics"]["top1"], abs=11)
        assert b["metrics"]["spatial_entropy"] == pytest.approx(a["metrics"]["spatial_entropy"], abs=0.02)
    one, both = (json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (run, two))
    assert one.keys() == both.keys()
    for name in ("last_top1", "last_jaccard", "last_foreground"):
        assert both[name] == pytest.approx(one[name], abs=8), name
    others = weights(two)
    for name, tensor in weights(run).items():
        found = others[name]
        if name.endswith("qkv.bias"):
            # Softmax does not see the keys' bias: its gradient is rounding noise, which Adam blows up to full steps.
            (query, _, value), (q, _, v) = tensor.chunk(3), found.chunk(3)
            tensor, found = torch.cat([query, value]), torch.cat([q, v])
        torch.testing.assert_close(found, tensor, rtol=1e-2, atol=2e-4, msg=name)


# --- What settings do ---------------------------------------------------------------------------------------


def test_weight_of_the_loss_follows_its_schedule(tmp_path):
    schedule = ["--entropy-schedule", "warmup_cosine", "--entropy-warmup-epochs", "3", "--epochs", "6"]
    once = ["--data", LITTLE, "--batch-size", "8", "--evaluate-every", "6", "--select-on", "last"]
    lines = epochs(train(tmp_path / "run", *TINY, *schedule, *once, "--entropy-weight", "0.5"))
    expected = [0, 0.25, 0.5, 0.5, 0.25 * (1 + math.cos(math.pi / 3)), 0.25 * (1 + math.cos(2 * math.pi / 3))]
    assert [line["entropy_weight"] for line in lines] == pytest.approx(expected, abs=1e-7)
    for epoch, line in enumerate(lines):
        weight = entropy_weight(epoch, 6, 0.5, "warmup_cosine", warmup_epochs=3)
        assert line["entropy_weight"] == pytest.approx(weight, abs=1e-7)
        assert line["loss"] == pytest.approx(
            line["cross_entropy"] + weight * line["spatial_entropy"], rel=1e-5
        )


def test_rate_lags_an_epoch_and_stays_low_at_the_end(tmp_path):
    times = ["--epochs", "7", "--warmup-epochs", "2", "--cooldown-epochs", "2", "--no-schedule-per-step"]
    rates = ["--lr", "1e-3", "--warmup-lr", "1e-5", "--min-lr", "1e-4", "--evaluate-every", "7"]
    once = ["--data", LITTLE, "--batch-size", "8", "--select-on", "last", "--legacy-lag"]
    found = [line["lr"] for line in epochs(train(tmp_path / "run", *TINY, *times, *rates, *once))]

    def rate(epoch: int) -> float:
        if epoch < 2:
            return 1e-5 + (1e-3 - 1e-5) * epoch / 2
        return 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * epoch / 5)) if epoch < 5 else 1e-4

    assert found == pytest.approx([rate(0), *(rate(epoch) for epoch in range(6))], rel=1e-6)
    config = load_recipe("sar_vit", str(tmp_path / "run" / "recipe.toml"), SarConfig)
    config.legacy_lag = False
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule, punctual = make_schedule(optimizer, config, 2), []
    for epoch in range(7):
        schedule.step(epoch)
        punctual.append(optimizer.param_groups[0]["lr"])
    assert punctual == pytest.approx([rate(epoch) for epoch in range(7)], rel=1e-6)


def test_averaged_weights_are_saved_and_measured(run, tmp_path):
    # With a decay of 0 the average is the last weights; with one near 1 it hardly leaves the first ones.
    same = train(tmp_path / "same", *TINY, "--ema-decay", "0")
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(same).items())
    assert epochs(same) == epochs(run)
    slow = train(tmp_path / "slow", *TINY, "--ema-decay", "0.99999", "--select-on", "last")
    for a, b in zip(epochs(run), epochs(slow), strict=True):
        assert a["loss"] == b["loss"]
    config = load_recipe("sar_vit", str(run / "recipe.toml"), SarConfig)
    first = build_model(config, load_model(str(run / "model")).labels).state_dict()
    moved = {name: float((t - first[name]).abs().max()) for name, t in weights(slow).items()}
    assert (
        0 < max(moved.values()) < 1.1e-3
    )  # the average begins after the first step, of the rate's length at most
    trained = {name: float((t - first[name]).abs().max()) for name, t in weights(run).items()}
    assert max(trained.values()) > 1.5e-3


def test_repeated_augmentation_repeats_images(run, tmp_path):
    thrice = epochs(train(tmp_path / "run", *TINY, "--repeated-augmentation", "3"))
    assert [line["step"] for line in thrice] == [line["step"] for line in epochs(run)]
    assert [line["loss"] for line in thrice] != [line["loss"] for line in epochs(run)]


def test_drloc_trains_a_plain_classifier(run, tmp_path):
    folder = train(tmp_path / "run", *TINY, "--drloc-weight", "0.1", "--drloc-warmup-epochs", "1")
    lines = epochs(folder)
    for line in lines:
        expected = (
            line["cross_entropy"] + 0.01 * line["spatial_entropy"] + line["drloc_weight"] * line["drloc"]
        )
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
    assert max(line["drloc_weight"] for line in lines) > 0
    assert weights(folder).keys() == weights(run).keys()
    assert type(load_model(str(folder / "model"))) is SARViT


# --- Fine-tuning --------------------------------------------------------------------------------------------

STILL = ["--lr", "1e-12", "--weight-decay", "0", "--schedule", "constant", "--epochs", "1"]
STILL += ["--warmup-epochs", "0"]
STILL += ["--msa-skip", "--mlp-norm", "--backbone", "pvt_nano", "--select-on", "last"]


def started(start: Path, tmp_path: Path, data: str) -> tuple[Path, SARViT]:
    folder = train(tmp_path / "tuned", "--start", start, "--data", data, *QUICK, *STILL)
    model = load_model(str(folder / "model"))
    assert isinstance(model, SARViT)
    return folder, model


def test_fine_tuning_keeps_the_form_the_backbone_and_the_head_of_equal_classes(run, tmp_path):
    folder, model = started(run, tmp_path, LITTLE)
    assert (model.arch, model.switches["msa_skip"], model.switches["mlp_norm"]) == ("vit", False, False)
    before = weights(run)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, before[name], atol=1e-9, rtol=0, msg=name)
    assert epochs(folder)[0]["entropy_weight"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("classes", "count"), [("classes=6,superclasses=2", 6), ("classes=4,superclasses=4", 4)]
)
def test_fine_tuning_for_other_classes_starts_a_new_head(run, tmp_path, classes, count):
    data = f"synthetic:{classes},image_size=32,scale_min=0.4,train=16,val=6,test=8"
    folder, model = started(run, tmp_path, data)
    assert model.labels != load_model(str(run / "model")).labels  # four, but others
    before = weights(run)
    for name, tensor in weights(folder).items():
        if not name.startswith("head."):
            torch.testing.assert_close(tensor, before[name], atol=1e-9, rtol=0, msg=name)
    head = weights(folder)["head.weight"]
    assert head.shape == (count, 24)
    assert count == 6 or not torch.allclose(head, before["head.weight"], atol=1e-3)
    torch.testing.assert_close(weights(folder)["head.bias"], torch.zeros(count), atol=1e-9, rtol=0)
    assert 0.01 < head.std() < 0.03


def test_fine_tuning_a_plain_model_switches_the_loss_alone(tmp_path):
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    plain = {"msa_skip": True, "mlp_norm": True}
    SARViT("vit", 4, 32, labels=list("abcd"), backbone_options=sizes, **plain).save_pretrained(
        tmp_path / "plain"
    )
    for weight in (0.0, 0.01):
        config = SarConfig(start=str(tmp_path / "plain"), entropy_weight=weight, image_size=48)
        model = build_model(config, ["x", "y", "z"])
        assert model.switches == {"msa_skip": True, "mlp_norm": True, "mlp_skip": True}
        assert (model.grid, model.heads, model.num_classes) == ((6, 6), 3, 3)  # positions are resampled


# --- Recipes ------------------------------------------------------------------------------------------------

RECIPES = [recipe.name for recipe in list_recipes("sar_vit")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid_and_says_what_it_costs(recipe):
    load_recipe("sar_vit", recipe, SarConfig).check()
    [info] = [info for info in list_recipes("sar_vit") if info.name == recipe]
    assert "Command:" in info.header
    assert re.search(rf"(sar_vit\.train|sar-vit train) {recipe}\b", info.header)
    if not recipe.startswith(("tiny", "photos")):
        assert "Published" in info.header
        assert "Cost:" in info.header


TABLE = {  # epochs, total batch, peak rate, weight decay, warm-up, lowest rate, clipped norm; 5.1 to 5.3
    "in1k-vit-tiny": (300, 1024, 1e-3, 0.05, 5, 1e-5, None),
    "in1k-vit-small": (300, 1024, 1e-3, 0.05, 5, 1e-5, None),
    "in1k-t2t-vit-14": (310, 1024, 1e-3, 0.05, 10, 1e-5, None),
    "in1k-pvt-small": (300, 1024, 1e-3, 0.05, 5, 1e-5, None),
    "in1k-cvt-13": (300, 2048, 2e-3, 0.05, 5, 1e-5, None),
    "in100-vit-small": (100, 1024, 1e-3, 0.05, 20, 1e-5, 5.0),
    "small-data-vit-small": (5000, 1024, 1e-3, 0.05, 5, 1e-5, None),
    "finetune-vit-small": (100, 512, 5e-4, 0.05, 3, 1e-5, None),
}


@pytest.mark.parametrize("recipe", TABLE)
def test_supervised_recipes_are_those_of_the_paper(recipe):
    config = load_recipe("sar_vit", recipe, SarConfig)
    [info] = [info for info in list_recipes("sar_vit") if info.name == recipe]
    processes = int(re.findall(r"--num_processes (\d+)", info.header)[0])
    assert (
        config.epochs,
        config.batch_size * processes,
        config.lr,
        config.weight_decay,
        config.warmup_epochs,
        config.min_lr,
        config.clip_grad,
    ) == TABLE[recipe]
    assert (config.optimizer, config.schedule, config.warmup_lr) == ("adamw", "cosine", 1e-6)
    assert (config.schedule_per_step, config.imagenet100) == (
        (True, True) if "in100" in recipe else (False,) * 2
    )
    t2t = recipe == "in1k-t2t-vit-14"
    assert (config.cooldown_epochs, config.ema_decay, config.test_crop, config.crop_interpolation) == (
        (10, 0.99996, 0.9, "random") if t2t else (0, None, 0.875, "bicubic")
    )
    # DeiT's augmentation, SAR's block and loss
    assert (config.augmentation, config.rand_augment, config.erasing) == (
        "deit",
        "rand-m9-mstd0.5-inc1",
        0.25,
    )
    assert (config.mixup, config.cutmix, config.mix_prob, config.mix_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (config.label_smoothing, config.drop_path_rate, config.repeated_augmentation) == (0.1, 0.1, 1)
    assert config.switches() == {"msa_skip": False, "mlp_norm": False, "mlp_skip": True}
    assert (config.entropy_weight, config.entropy_schedule, config.similarity) == (0.01, "constant", "dot")


NANO = {"in1k-t2t-vit-14": "t2t_vit_nano", "in1k-pvt-small": "pvt_nano", "in1k-cvt-13": "cvt_nano"}
DINO = ["--local-size", "16", "--local-crops", "2", "--prototypes", "32"]
SELF = ["--hidden-dim", "32", "--projection-dim", "16"]


def small(recipe: str, start: Path) -> list[str]:
    """The fields that make a recipe small enough for a test, and nothing else of it."""
    config = load_recipe("sar_vit", recipe, SarConfig)
    more = ["--data", LITTLE, *QUICK, "--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0"]
    more += ["--batch-size", "8", "--no-imagenet100"]
    if config.scenario == "segmentation":
        return [*more, "--backbone", "pvt_nano", "--neck-channels", "8", "--head-channels", "8"]
    if config.scenario == "probe" or recipe.startswith("finetune"):
        return [*more, "--start", str(start), "--probe-blocks", str(min(config.probe_blocks, 2))]
    more += ["--backbone", NANO[recipe]] if recipe in NANO else VIT
    if config.scenario in ("dino", "mocov3"):
        more += SELF + (DINO if config.scenario == "dino" else [])
    return more


# Others differ from one of these in numbers alone; the tiny ones run where their scenario is tested.
ONE_OF_EACH = [
    recipe
    for recipe in RECIPES
    if not recipe.startswith("tiny") and recipe not in ("in1k-vit-tiny", "in100-dino", "in100-mocov3")
]


@pytest.mark.parametrize("recipe", ONE_OF_EACH)
def test_every_kind_of_recipe_runs(recipe, run, tmp_path):
    folder = train(tmp_path / "run", *small(recipe, run), recipe=recipe)
    found = json.loads((folder / "metrics.json").read_text())
    config = load_recipe("sar_vit", str(folder / "recipe.toml"), SarConfig)
    metric = {"dino": "knn", "mocov3": "knn", "segmentation": "mean_iou"}.get(config.scenario, "top1")
    assert 0 <= found["metrics"][metric] <= 100
    assert (found["chosen"] is None) == (config.select_on == "last")
    kind = SARSegmenter if config.scenario == "segmentation" else SARViT
    model = kind.from_pretrained(str(folder / "model"))
    if isinstance(model, SARViT):
        assert model.switches == {"msa_skip": False, "mlp_norm": False, "mlp_skip": True}
    assert math.isfinite(epochs(folder)[-1]["loss"])
    assert (folder / "report.html").is_file()
