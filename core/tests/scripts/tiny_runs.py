"""Small training runs, for tests that need real processes: ``python -m tiny_runs '<JSON list of runs>'``.

A run is ``{"folder", "config", "resume", "kill_at", "model"}``; see :func:`run`. The tests also call it
directly.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from attnmap_core.data.loaders import SampleDataset, eval_loader, gather_samples
from attnmap_core.training import TrainConfig, start_processes, train
from PIL import Image
from safetensors.torch import save_model
from torch import nn
from torch.nn import functional

TRAIN_IMAGES, EVAL_IMAGES, CLASSES = 19, 13, 3


class Pictures:
    """Noise whose brightness tells the class."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> SimpleNamespace:
        label = index % CLASSES
        noise = np.random.default_rng([self.seed, index]).integers(0, 90, (8, 8, 3))
        return SimpleNamespace(image=Image.fromarray((noise + 80 * label).astype(np.uint8)), label=label)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5


def augment(image: Image.Image) -> torch.Tensor:
    """Draws from all three generators, so that a wrong state of any of them shows."""
    import random

    shift = random.random() + np.random.random()  # noqa: NPY002
    return to_tensor(image) + 0.05 * shift + 0.02 * torch.randn(3, 8, 8)


class Net(nn.Module):
    """Convolution, a norm, and a residual branch with dropout and stochastic depth."""

    def __init__(self, drop: float, batch_norm: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6) if batch_norm else nn.GroupNorm(2, 6)
        self.branch = nn.Linear(6, 6)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        branch = self.drop(self.branch(x).relu())
        if self.training and self.drop.p > 0:
            branch = branch * (torch.rand(len(x), 1, device=x.device) > self.drop.p)
        return self.head(x + branch)


class Stopped(Exception):
    """A run that ends early in a process that goes on."""


class Classify:
    """Cross-entropy. At call ``kill_at`` the process ends like by ``kill -9``, at ``stop_at`` only the run."""

    def __init__(self, kill_at: int | None = None, stop_at: int | None = None) -> None:
        self.calls, self.kill_at, self.stop_at = 0, kill_at, stop_at

    def __call__(self, model: nn.Module, batch: dict) -> dict:
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == self.stop_at:
            raise Stopped
        logits = model(batch["images"])
        hits = (logits.argmax(dim=1) == batch["labels"]).float()
        return {"loss": functional.cross_entropy(logits, batch["labels"]), "accuracy": hits.mean()}


def evaluate(model: nn.Module, accelerator) -> dict:
    """Mean of per-image values, which are also kept, to be compared bit by bit."""
    dataset = SampleDataset(Pictures(EVAL_IMAGES, seed=1), to_tensor)
    share = {"processes": accelerator.num_processes, "process": accelerator.process_index}
    parts = []
    with torch.no_grad():
        for batch in eval_loader(dataset, batch_size=3, **share):
            logits = model(batch["images"].to(accelerator.device)).float().cpu()
            losses = functional.cross_entropy(logits, batch["labels"], reduction="none")
            parts.append((batch["index"].numpy(), logits.numpy(), losses.numpy()))
    names = ("index", "logits", "loss")
    rows = gather_samples(accelerator, dict(zip(names, map(np.concatenate, zip(*parts)))))
    evaluate.rows = rows
    torch.rand(1)  # the loop must not be disturbed by this
    return {"loss": rows["loss"].mean(dtype=np.float64), "images": len(rows["index"])}


def run(
    folder: str | Path,
    config: dict,
    *,
    resume: bool = False,
    kill_at: int | None = None,
    stop_at: int | None = None,
    drop: float = 0.0,
    batch_norm: bool = False,
    task=None,
    evaluate=evaluate,
    **options,
):
    """Train a :class:`Net`; the folder then also has the per-image values of the last evaluation."""
    plain = {"threads": 1, "workers": 0, "epochs": 2, "batch_size": 4, "lr": 0.01, "log_every": 4}
    settings = TrainConfig(**{**plain, **config})
    model = Net(drop, batch_norm)
    result = train(
        task or Classify(kill_at, stop_at),
        model,
        SampleDataset(Pictures(TRAIN_IMAGES), augment, seed=settings.seed),
        settings,
        folder,
        evaluate=evaluate,
        save_model=lambda model, to: save_model(model, str(to / "model.safetensors")),
        resume=resume,
        **options,
    )
    from accelerate import PartialState

    if evaluate is not None and PartialState().is_main_process and hasattr(evaluate, "rows"):
        np.savez(Path(folder) / "rows.npz", **evaluate.rows)
    return result, model


def say_threads() -> None:
    if Path("/proc/self/task").is_dir():  # Linux
        print("threads left:", *(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")))


if __name__ == "__main__":
    atexit.register(say_threads)  # the first one to register is the last one to be called
    start_processes()
    for one in json.loads(sys.argv[1]):
        with contextlib.suppress(Stopped):
            run(one.pop("folder"), one.pop("config"), **one)
