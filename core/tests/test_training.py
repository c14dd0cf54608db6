"""The loop: equal however it is launched, accumulated or interrupted; and each setting does what it says."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attnmap_core.data.loaders import SampleDataset, StreamDataset
from attnmap_core.errors import InputError
from attnmap_core.training import TrainConfig, make_optimizer, param_groups, timm_schedule, train
from safetensors.torch import load_file, load_model
from torch import nn

pytest.importorskip("accelerate")
SCRIPTS = Path(__file__).parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
tiny_runs = importlib.import_module("tiny_runs")

# Everything that can go wrong in a resume at once: dropout, augmentation, accumulation, averaged weights,
# batch norm, and a checkpoint in the middle of an epoch (two processes do 2 steps an epoch, one does 3).
DEMANDING = {"accumulate": 2, "ema_decay": 0.8, "lr": 0.02, "log_every": 1, "schedule": "cosine"}
DEMANDING_NET = {"drop": 0.3, "batch_norm": True}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    forced = {"ACCELERATE_USE_CPU": "true"} if torch.accelerator.is_available() else {}
    return {**os.environ, **forced, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def launch(*runs: dict, processes: int = 2, with_accelerate: bool = False) -> subprocess.CompletedProcess:
    """Processes on the CPU, started as a user would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if with_accelerate:
        launcher = ["accelerate.commands.launch", "--cpu", "--main_process_port", port]
        launcher += ["--num_processes", str(processes)]
    else:
        launcher = ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tiny_runs", json.dumps(runs)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )


def numbers(folder: Path) -> list[dict]:
    """The history without what a clock measured."""
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in {"seconds", "images_per_second"}} for line in lines]


def weights(folder: Path) -> dict:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "model/model.safetensors").read_bytes() == (b / "model/model.safetensors").read_bytes()
    assert numbers(a) == numbers(b)
    rows = np.load(a / "rows.npz"), np.load(b / "rows.npz")
    assert all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0].files)


def assert_close_weights(a: dict, b: dict, **tolerance) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 1e-4, "atol": 1e-6}))


def assert_close_numbers(a: Path, b: Path) -> None:
    for ours, theirs in zip(numbers(a), numbers(b), strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours.pop("metrics", {}) == pytest.approx(theirs.pop("metrics", {}), rel=1e-5)
        assert ours == pytest.approx(theirs, rel=1e-5)


# --- Interrupted runs ---------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_resume_after_kill_equals_uninterrupted_run(tmp_path):
    config = {**DEMANDING, "save_every": 2}
    tiny_runs.run(tmp_path / "whole", config, **DEMANDING_NET)

    killed = {"folder": str(tmp_path / "killed"), "config": config, "kill_at": 9, **DEMANDING_NET}
    done = subprocess.run(
        [sys.executable, "-m", "tiny_runs", json.dumps([killed])],
        env=environment(),
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/model").exists()
    # step 4 is the first of the second epoch's three
    assert sorted(p.name for p in (tmp_path / "killed/checkpoints").glob("step-*"))[-1] == "step-000000004"

    tiny_runs.run(tmp_path / "killed", config, resume=True, **DEMANDING_NET)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Folder with what two processes left: ``whole`` and ``resumed``, ``plain``."""
    folder = tmp_path_factory.mktemp("two")
    config = {**DEMANDING, "save_every": 1}
    whole = {"folder": str(folder / "whole"), "config": config, **DEMANDING_NET}
    plain = {"folder": str(folder / "plain"), "config": PLAIN}
    resumed = {**whole, "folder": str(folder / "resumed")}

    done = launch(whole, plain, with_accelerate=True)
    assert done.returncode == 0, done.stderr[-3000:]
    done = launch({**resumed, "kill_at": 6})  # 3 micro-batches an epoch: in step 4 of 4
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    newest = sorted(path.name for path in (folder / "resumed/checkpoints").glob("step-*"))[-1]
    assert newest == "step-000000003"
    assert not (folder / "resumed/model").exists()
    done = launch({**resumed, "resume": True})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


PLAIN = {"batch_size": 4, "clip_grad": 1.0, "optimizer": "sgd", "lr": 0.1}


@pytest.mark.multiprocess
def test_two_processes_resume_after_kill_equals_uninterrupted_run(two_processes):
    assert_same_run(two_processes / "whole", two_processes / "resumed")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_three_processes_resume_exactly(tmp_path):
    """With three, the rounding of the gradients' sum depends on how they are laid out for the exchange."""
    whole = {"folder": str(tmp_path / "whole"), "config": {"batch_size": 2, "save_every": 1}, "drop": 0.3}
    stopped = {**whole, "folder": str(tmp_path / "stopped")}
    done = launch(whole, {**stopped, "stop_at": 7}, {**stopped, "resume": True}, processes=3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the names of threads are read from /proc")
def test_no_thread_of_a_process_group_outlives_it(tmp_path):
    """One that is left can abort the exit, now and then: it asks for an interpreter that has ended."""
    done = launch({"folder": str(tmp_path / "run"), "config": {"epochs": 1}})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("threads left:") == 2
    assert "gloo" not in done.stdout


@pytest.mark.multiprocess
def test_two_processes_equal_one_with_twice_the_batch(two_processes, tmp_path):
    tiny_runs.run(tmp_path, {**PLAIN, "batch_size": 8})
    assert_close_weights(weights(tmp_path), weights(two_processes / "plain"))
    assert_close_numbers(tmp_path, two_processes / "plain")


@pytest.mark.multiprocess
def test_two_process_evaluation_equals_one_process_exactly(two_processes):
    """Of the same weights, those of a batch norm included, 13 images in batches of 3."""
    model = tiny_runs.Net(**DEMANDING_NET)
    load_model(model, two_processes / "whole/model/model.safetensors")
    from accelerate import Accelerator

    metrics = tiny_runs.evaluate(model.eval(), Accelerator())
    rows = np.load(two_processes / "whole/rows.npz")
    assert rows["index"].tolist() == list(range(tiny_runs.EVAL_IMAGES))
    for name, values in tiny_runs.evaluate.rows.items():
        assert np.array_equal(values, rows[name])
    assert metrics == numbers(two_processes / "whole")[-1]["metrics"]


@pytest.mark.multiprocess
def test_resume_with_another_process_count_is_refused(two_processes):
    with pytest.raises(InputError, match=r"written by 2 processes, now 1; launch with --num_processes 2"):
        tiny_runs.run(two_processes / "whole", {**DEMANDING, "save_every": 1}, resume=True, **DEMANDING_NET)


def test_resume_refuses_other_settings_and_names_them(tmp_path):
    tiny_runs.run(tmp_path, {"epochs": 1})
    with pytest.raises(InputError, match=r"lr=0.01, batch_size=4.*|batch_size=4, .*lr=0.01") as caught:
        tiny_runs.run(tmp_path, {"lr": 0.5, "batch_size": 2, "log_every": 9}, resume=True)
    assert "lr=0.5" in str(caught.value)
    assert "log_every" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resume_refuses_other_data(tmp_path, monkeypatch):
    tiny_runs.run(tmp_path, {"epochs": 1})
    monkeypatch.setattr(tiny_runs, "TRAIN_IMAGES", 18)
    with pytest.raises(InputError, match="trained on 19 images, the data have 18"):
        tiny_runs.run(tmp_path, {"epochs": 2}, resume=True)


def test_longer_run_continues_a_shorter_one_exactly(tmp_path):
    tiny_runs.run(tmp_path / "long", {"epochs": 3}, drop=0.3)
    tiny_runs.run(tmp_path / "grown", {"epochs": 1}, drop=0.3)
    tiny_runs.run(tmp_path / "grown", {"epochs": 3}, drop=0.3, resume=True)
    assert_same_run(tmp_path / "long", tmp_path / "grown")
    tiny_runs.run(tmp_path / "cosine", {"epochs": 1, "schedule": "cosine"})
    with pytest.raises(InputError, match="epochs"):  # a cosine depends on its end
        tiny_runs.run(tmp_path / "cosine", {"epochs": 2, "schedule": "cosine"}, resume=True)


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    first, _ = tiny_runs.run(tmp_path, {})
    before = weights(tmp_path)
    second, _ = tiny_runs.run(tmp_path, {}, resume=True)
    assert_close_weights(before, weights(tmp_path), rtol=0, atol=0)
    assert second.history == first.history
    assert second.steps == first.steps == 10


def test_resume_without_checkpoint_begins(tmp_path):
    tiny_runs.run(tmp_path / "a", {"epochs": 1})
    tiny_runs.run(tmp_path / "b", {"epochs": 1}, resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_new_run_does_not_mix_with_an_old_one(tmp_path):
    tiny_runs.run(tmp_path, {"epochs": 1})
    with pytest.raises(InputError, match="holds checkpoints of a run; pass --resume"):
        tiny_runs.run(tmp_path, {"epochs": 1})


def test_stream_resumes_exactly(tmp_path):
    pytest.importorskip("datasets")
    from datasets import IterableDataset

    pictures = tiny_runs.Pictures(tiny_runs.TRAIN_IMAGES)

    def rows(shards):
        for shard in shards:
            yield from ({"i": i} for i in range(shard, len(pictures), 3))

    def to_sample(row, index):
        return SimpleNamespace(**vars(pictures[row["i"]]), image_id=str(row["i"]))

    data = SimpleNamespace(
        dataset=IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]}), to_sample=to_sample
    )

    class Killed(Exception):
        pass

    class Dying(tiny_runs.Classify):
        def __call__(self, model, batch):
            if self.calls == 8:  # in the second epoch, after the checkpoint of its first step
                raise Killed
            return super().__call__(model, batch)

    def run(folder, task, resume=False):
        config = TrainConfig(
            batch_size=4, accumulate=2, lr=0.01, epochs=2, save_every=1, workers=0, threads=1
        )
        source = StreamDataset(data, tiny_runs.augment, shuffle_buffer=7)
        return train(task, tiny_runs.Net(0.3, False), source, config, tmp_path / folder, resume=resume)

    whole = run("whole", tiny_runs.Classify())
    with pytest.raises(Killed):
        run("stopped", Dying())
    assert (tmp_path / "stopped/checkpoints/step-000000004").is_dir()  # of 3 steps an epoch
    resumed = run("stopped", tiny_runs.Classify(), resume=True)
    assert whole.steps == resumed.steps == 6
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "stopped")
    files = [
        tmp_path / name / "checkpoints/step-000000006/model.safetensors" for name in ("whole", "stopped")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- One step is the mean over its images -------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_equals_a_large_batch(tmp_path, accumulate):
    plain = {
        "optimizer": "momentum",  # plain SGD, in timm
        "lr": 0.1,
        "clip_grad": 0.5,
    }  # SGD shows a wrong scale of the gradient, Adam hides it
    tiny_runs.run(tmp_path / "large", {**plain, "batch_size": 8})
    tiny_runs.run(tmp_path / "small", {**plain, "batch_size": 8 // accumulate, "accumulate": accumulate})
    assert_close_weights(weights(tmp_path / "large"), weights(tmp_path / "small"))
    assert_close_numbers(tmp_path / "large", tmp_path / "small")


def test_one_step_is_plain_gradient_descent(tmp_path):
    """Against the textbook: w - lr * gradient of the mean over all images."""
    config = {
        "optimizer": "momentum",  # plain SGD, in timm
        "momentum": 0.0,
        "lr": 0.1,
        "weight_decay": 0.0,
        "epochs": 1,
        "batch_size": 4,
    }
    _, model = tiny_runs.run(tmp_path, {**config, "accumulate": 5})
    expected = tiny_runs.Net(0.0, False)
    data = SampleDataset(tiny_runs.Pictures(tiny_runs.TRAIN_IMAGES), tiny_runs.augment)
    images = torch.stack([data[i]["image"] for i in range(len(data))])
    labels = torch.tensor([data[i]["label"] for i in range(len(data))])
    loss = nn.functional.cross_entropy(expected(images), labels)
    loss.backward()
    for ours, plain in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, plain - 0.1 * plain.grad)
    assert numbers(tmp_path)[-1]["loss"] == pytest.approx(loss.item())


def test_training_learns(tmp_path):
    result, _ = tiny_runs.run(tmp_path, {"epochs": 15})
    losses = [line["loss"] for line in result.history if line["kind"] == "epoch"]
    assert losses[-1] < 0.5 * losses[0]


def test_evaluation_does_not_disturb_training(tmp_path):
    tiny_runs.run(tmp_path / "often", {}, drop=0.3)
    tiny_runs.run(tmp_path / "never", {}, drop=0.3, evaluate=None)
    tiny_runs.run(tmp_path / "last", {"evaluate_every": 9}, drop=0.3)
    assert_close_weights(weights(tmp_path / "often"), weights(tmp_path / "never"), rtol=0, atol=0)
    assert ["metrics" in line for line in numbers(tmp_path / "last") if line["kind"] == "epoch"] == [
        False,
        True,
    ]


# --- What is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "epoch", "value"), [("max", 2, 0.5), ("min", 1, 0.1)])
def test_best_model_is_chosen_by_the_metric(tmp_path, mode, epoch, value):
    scores, seen = iter([0.1, 0.5, float("nan"), 0.5]), []

    def evaluate(model, accelerator):
        assert not model.training
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"score": next(scores), "other": 0.0}

    config = {"epochs": 4, "select_by": "score", "select_mode": mode}
    result, _ = tiny_runs.run(tmp_path, config, evaluate=evaluate)
    assert result.best == {"epoch": epoch, "metric": "score", "value": value}
    assert_close_weights(load_file(tmp_path / "best/model.safetensors"), seen[epoch - 1], rtol=0, atol=0)
    assert_close_weights(weights(tmp_path), seen[-1], rtol=0, atol=0)
    metrics = [line["metrics"] for line in numbers(tmp_path) if line["kind"] == "epoch"]
    assert metrics[2] == {"score": None, "other": 0.0}  # JSON has no NaN


def test_unknown_metric_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="select_by los: no such metric; did you mean loss"):
        tiny_runs.run(tmp_path / "a", {"select_by": "los"})
    with pytest.raises(InputError, match="this run has no evaluation"):
        tiny_runs.run(tmp_path / "b", {"select_by": "loss"}, evaluate=None)


def test_averaged_weights_are_evaluated_and_saved(tmp_path):
    """Against the definition: after each step average = d * average + (1 - d) * weights."""
    trail = []

    class Watch(tiny_runs.Classify):
        def __call__(self, model, batch):
            trail.append(model.head.weight.detach().clone())
            return super().__call__(model, batch)

    seen = []

    def evaluate(model, accelerator):
        seen.append(model.head.weight.detach().clone())
        return {}

    _, model = tiny_runs.run(tmp_path, {"ema_decay": 0.7, "epochs": 1}, task=Watch(), evaluate=evaluate)
    trail = [*trail[1:], model.head.weight.detach()]
    average = trail[0]
    for step in trail[1:]:
        average = 0.7 * average + 0.3 * step
    torch.testing.assert_close(seen[0], average)
    assert torch.equal(weights(tmp_path)["head.weight"], seen[0])


@pytest.mark.parametrize("log_every", [1, 100])
def test_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, log_every):
    class Diverging(tiny_runs.Classify):
        def __call__(self, model, batch):
            parts = super().__call__(model, batch)
            return {**parts, "loss": parts["loss"] * (float("nan") if self.calls == 8 else 1.0)}

    with pytest.raises(InputError) as caught:
        tiny_runs.run(tmp_path, {"log_every": log_every, "save_every": 1000}, task=Diverging())
    message = str(caught.value)
    assert message.startswith("step 8 (epoch 2): loss not finite (loss nan, accuracy ")
    assert "learning rate 0.01" in message
    assert "the checkpoint of step 5 is kept" in message
    assert "\n" not in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]
    assert not (tmp_path / "model").exists()


def test_full_disk_is_one_line_and_keeps_the_older_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(model, accelerator):
        if (tmp_path / "checkpoints").exists():  # from the second epoch on no file may grow beyond 2 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        return {}

    try:
        with pytest.raises(
            InputError, match=r"step-0+10: no space left to write it .* nothing was replaced"
        ) as caught:
            tiny_runs.run(tmp_path, {}, evaluate=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]
    tiny_runs.run(tmp_path, {}, resume=True)
    tiny_runs.run(tmp_path.with_name("whole"), {})
    assert_close_weights(weights(tmp_path), weights(tmp_path.with_name("whole")), rtol=0, atol=0)


# --- Optimizer and schedule ---------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model around a backbone that exempts a parameter from decay by its own name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.backbone.table = nn.Parameter(torch.zeros(2, 2))
        self.backbone.no_weight_decay = lambda: {"table"}
        self.rate = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.head = nn.Conv2d(2, 2, 1)

    def group_matcher(self, coarse=False):
        return {
            "stem": r"^backbone\.table",
            "blocks": [(r"^backbone\.(?:weight|bias)", None), (r"^rate|^head", (9,))],
        }


def grouped(model: nn.Module, config: TrainConfig) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], pytest.approx(group["lr_scale"]))
        for group in param_groups(model, config)
        for parameter in group["params"]
    }


def test_param_groups_decay_matrices_only():
    assert grouped(Wrapped(), TrainConfig(weight_decay=0.05)) == {
        "backbone.weight": (0.05, 1.0),
        "backbone.bias": (0.0, 1.0),
        "backbone.table": (0.0, 1.0),
        "rate": (0.0, 1.0),
        "head.weight": (0.05, 1.0),
        "head.bias": (0.0, 1.0),
    }


def test_param_groups_follow_patterns():
    config = TrainConfig(lr_scales={"backbone.*": 0.1, "*.bias": 2.0}, no_decay=("head.weight",))
    groups = grouped(Wrapped(), config)
    assert groups["backbone.weight"] == (0.05, 0.1)
    assert groups["backbone.bias"] == (0.0, 0.2)
    assert groups["head.bias"] == (0.0, 2.0)
    assert groups["head.weight"] == (0.0, 1.0)
    with pytest.raises(
        InputError, match=r"backbne.\*: matches no parameter; expected names such as backbone"
    ):
        param_groups(Wrapped(), TrainConfig(lr_scales={"backbne.*": 0.1}))


def test_layer_decay_scales_by_distance_from_the_output():
    groups = grouped(Wrapped(), TrainConfig(layer_decay=0.5))
    assert [groups[name][1] for name in ("head.weight", "backbone.weight", "backbone.table")] == [
        1.0,
        0.5,
        0.25,
    ]
    with pytest.raises(InputError, match="layer_decay"):
        param_groups(nn.Linear(1, 1), TrainConfig(layer_decay=0.5))


def test_optimizer_options_reach_those_that_have_them():
    groups = param_groups(nn.Linear(2, 2), TrainConfig())
    adamw = make_optimizer(groups, TrainConfig(betas=(0.8, 0.9), eps=1e-3))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["eps"], adamw.defaults["lr"]) == ((0.8, 0.9), 1e-3, 5e-5)
    assert make_optimizer(groups, TrainConfig()).defaults["betas"] == (0.9, 0.999)
    assert make_optimizer(groups, TrainConfig(optimizer="sgd", betas=(0.8, 0.9))).defaults["momentum"] == 0.9
    with pytest.raises(InputError, match=r"optimizer adamv: .* did you mean adam"):
        make_optimizer(groups, TrainConfig(optimizer="adamv"))


def rates(config: TrainConfig, steps_per_epoch: int = 2) -> list[float]:
    """Learning rate of every step, called as the loop calls it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule, found = timm_schedule(optimizer, config, steps_per_epoch), []
    for epoch in range(config.epochs):
        schedule.step(epoch)
        for step in range(steps_per_epoch):
            schedule.step_update(epoch * steps_per_epoch + step)
            found.append(optimizer.param_groups[0]["lr"])
    return found


def test_schedules_follow_their_formulas():
    assert rates(TrainConfig(lr=1.0, epochs=2)) == [1.0] * 4
    stepped = TrainConfig(lr=1.0, epochs=5, schedule="step", decay_epochs=(2,), decay_rate=0.5)
    assert rates(stepped, 1) == [1.0, 1.0, 0.5, 0.5, 0.25]
    milestones = TrainConfig(lr=1.0, epochs=5, schedule="multistep", decay_epochs=(2, 4), decay_rate=0.1)
    assert rates(milestones, 1) == pytest.approx([1.0, 0.1, 0.1, 0.01, 0.01])
    cosine = TrainConfig(lr=1.0, epochs=4, schedule="cosine", min_lr=0.1)
    expected = [0.1 + 0.45 * (1 + np.cos(np.pi * epoch / 4)) for epoch in range(4)]
    assert rates(cosine, 1) == pytest.approx(expected)
    warm = TrainConfig(lr=1.0, epochs=2, warmup_epochs=1, warmup_lr=0.2, schedule_per_step=True)
    assert rates(warm, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0])
    with pytest.raises(InputError, match="schedule_per_step"):
        timm_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), warm, None)


def test_own_schedule_and_scales_reach_the_optimizer(tmp_path):
    class Quirk:
        """Ten times less at each epoch, set in place."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, epoch):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01 * 0.1**epoch * group["lr_scale"]

        def step_update(self, num_updates):
            pass

    config = {"lr_scales": {"*": 0.0, "head.*": 1.0}, "weight_decay": 0.0, "epochs": 3}
    result, model = tiny_runs.run(
        tmp_path, config, make_schedule=lambda optimizer, config, steps: Quirk(optimizer)
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_runs.Net(0.0, False).parameters()))
    with pytest.raises(InputError, match="epochs"):  # nobody said that this schedule ignores the end
        tiny_runs.run(tmp_path, {**config, "epochs": 4}, resume=True, make_schedule=lambda o, c, s: Quirk(o))
    config["lr_scales"] = {"conv.*": 0.5}
    result, _ = tiny_runs.run(tmp_path / "2", config, make_schedule=lambda o, c, s: Quirk(o))
    lr = [line["lr"] for line in result.history if line["kind"] == "epoch"]
    assert lr == pytest.approx([1e-2, 1e-3, 1e-4])


def test_clipping_bounds_the_step(tmp_path):
    config = {
        "optimizer": "momentum",  # plain SGD, in timm
        "momentum": 0.0,
        "weight_decay": 0.0,
        "lr": 1.0,
        "epochs": 1,
        "batch_size": 19,
    }
    _, model = tiny_runs.run(tmp_path, {**config, "clip_grad": 0.01})
    start = tiny_runs.Net(0.0, False)
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), start.parameters())])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# --- Settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("clip_grad", -1.0),
        ("workers", -1),
    ]
    + [("ema_decay", 1.0), ("layer_decay", 0.0), ("decay_epochs", ()), ("seed", -1)],
)
def test_values_out_of_range_are_input_errors(tmp_path, field, value):
    with pytest.raises(InputError, match=rf"^{field} .*: expected .*; change --{field.replace('_', '-')}$"):
        tiny_runs.run(tmp_path, {field: value})
    assert not list(tmp_path.iterdir())


def test_half_precision_on_the_cpu(tmp_path):
    with pytest.raises(InputError, match="fp16: needs a GPU"):
        tiny_runs.run(tmp_path / "fp16", {"mixed_precision": "fp16"})
    seen = []

    class Watch(tiny_runs.Classify):
        def __call__(self, model, batch):
            hook = model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
            parts = super().__call__(model, batch)
            hook.remove()
            return parts

    config = {"mixed_precision": "bf16", "ema_decay": 0.5, "epochs": 1}
    _, model = tiny_runs.run(tmp_path / "bf16", config, task=Watch())
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}
    assert model.head(torch.zeros(1, 6)).dtype == torch.float32
    assert model(torch.zeros(1, 3, 8, 8)).dtype == torch.float32
    assert "_original_forward" not in vars(model)  # given back as it came
    tiny_runs.run(tmp_path / "again", {"epochs": 1})  # another precision in the same process


def test_missing_tracker_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="tracker wandb: not installed; run: pip install wandb"):
        tiny_runs.run(tmp_path, {"tracker": "wandb"})


def test_tensorboard_gets_losses_and_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, _ = tiny_runs.run(tmp_path, {"tracker": "tensorboard", "log_every": 1})
    [folder] = {path.parent for path in tmp_path.glob("*/events*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [line["loss"] for line in result.history if line["kind"] == "log"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert [event.step for event in events.Scalars("eval/loss")] == [5, 10]


def test_task_that_returns_no_scalar_is_refused(tmp_path):
    class Wrong(tiny_runs.Classify):
        def __call__(self, model, batch):
            return {"loss": model(batch["images"])}

    with pytest.raises(ValueError, match=r"must return scalars .* got \{'loss': \(4, 3\)\}"):
        tiny_runs.run(tmp_path, {}, task=Wrong())


def test_task_may_group_parameters_itself(tmp_path):
    class HeadOnly(tiny_runs.Classify):
        def param_groups(self, model, config):
            return [{"params": list(model.head.parameters()), "weight_decay": 0.0}]

    _, model = tiny_runs.run(tmp_path, {"epochs": 1}, task=HeadOnly())
    start = tiny_runs.Net(0.0, False)
    assert torch.equal(model.conv.weight, start.conv.weight)
    assert not torch.equal(model.head.weight, start.head.weight)


@pytest.mark.slow
def test_compiled_model_trains_like_a_plain_one(tmp_path):
    config = {"epochs": 1, "ema_decay": 0.5}
    tiny_runs.run(tmp_path / "plain", config)
    tiny_runs.run(tmp_path / "compiled", {**config, "compile": True})
    assert_close_weights(weights(tmp_path / "plain"), weights(tmp_path / "compiled"), rtol=1e-3, atol=1e-5)


def test_task_hooks_surround_each_step(tmp_path):
    class Watching(tiny_runs.Classify):
        def __init__(self):
            super().__init__()
            self.epochs, self.gradients, self.progress = [], [], []

        def begin_epoch(self, epoch):
            self.epochs.append(epoch)

        def before_update(self, model):
            self.gradients.append(model.head.weight.grad is not None)
            model.conv.weight.grad = None  # so the optimizer leaves it as it is

        def after_update(self, model, progress):
            self.progress.append(progress)

    task = Watching()
    result, model = tiny_runs.run(tmp_path, {"epochs": 2, "evaluate_every": 2}, task=task)
    assert task.epochs == [0, 1]
    assert task.gradients == [True] * result.steps
    np.testing.assert_allclose(task.progress, np.arange(1, result.steps + 1) / result.steps)
    assert torch.equal(model.conv.weight, tiny_runs.Net(0.0, False).conv.weight)


def test_cool_down_stays_at_the_lowest_rate():
    config = TrainConfig(lr=1.0, epochs=6, cooldown_epochs=2, schedule="cosine", min_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = timm_schedule(optimizer, config, None)
    rates = []
    for epoch in range(6):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    np.testing.assert_allclose(rates, [*expected, 0.1, 0.1])
    with pytest.raises(InputError, match="cooldown_epochs 6: expected 0 to 5"):
        TrainConfig(epochs=6, cooldown_epochs=6).check()
