"""Small trainings without labels, for tests that need real processes: ``python -m tiny_pretraining '<JSON>'``.

The JSON is ``{"folder", "scenario", "config"}``; see :func:`launched`. The tests also call :func:`run` directly.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from attnmap_core.data.loaders import samples_of
from attnmap_core.data.sources import ImageData, load_data
from attnmap_core.training import TrainResult, start_accelerator, start_processes, train
from sar_vit.config import SarConfig
from sar_vit.scenarios import Setup, make_setup
from torch import nn

DATA = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=18,val=7,test=4"
COMMON: dict[str, Any] = {
    "data": DATA,
    "backbone": "vit",
    "backbone_options": {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3},
    "image_size": 32,
    "test_crop": 1.0,
    "drop_path_rate": 0.2,
    "hidden_dim": 16,
    "projection_dim": 8,
    "prototypes": 24,
    "local_crops": 2,
    "local_size": 16,
    "epochs": 2,
    "batch_size": 8,
    "drop_last": True,
    "eval_batch_size": 3,
    "lr": 1e-2,
    "weight_decay": 0.1,
    "final_weight_decay": 0.3,
    "schedule": "cosine",
    "schedule_per_step": True,
    "warmup_epochs": 0.5,
    "warmup_lr": 0.0,
    "momentum_start": 0.8,
    "workers": 0,
    "log_every": 1,
}


def config(scenario: str, **changed: Any) -> SarConfig:
    return SarConfig(scenario=scenario, **COMMON | changed)


def data(split: str = "train") -> ImageData:
    return load_data(DATA, split)


def setup(scenario: str, **changed: Any) -> Setup:
    return make_setup(config(scenario, **changed), data())


class Stopped(Exception):
    """A run that ends early in a process that goes on."""


class Watched:
    """A task that notes the state of the model as each epoch begins, and may stop in the middle."""

    def __init__(self, task: Any, model: nn.Module, stop_at: int | None) -> None:
        self.task, self.model, self.stop_at, self.calls = task, model, stop_at, 0
        self.states: list[dict[str, torch.Tensor]] = []

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == self.stop_at:
            raise Stopped
        return self.task(model, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def begin_epoch(self, epoch: int) -> None:
        self.states.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        getattr(self.task, "begin_epoch", lambda epoch: None)(epoch)


def run(
    folder: Path,
    made: Setup,
    settings: SarConfig,
    *,
    stop_at: int | None = None,
    resume: bool = False,
    evaluate: bool = False,
) -> tuple[TrainResult, Watched]:
    """Train as the command line does."""
    task = Watched(made.task, made.model, stop_at)
    result = train(
        task,
        made.model,
        samples_of(data(), made.transform, seed=settings.seed),
        settings,
        folder,
        evaluate=(lambda model, accelerator: made.measure(model, data("val"), accelerator))
        if evaluate
        else None,
        make_schedule=made.make_schedule,
        save_model=made.save,
        resume=resume,
    )
    return result, task


def without_norms(model: nn.Module) -> nn.Module:
    """Batch norms taken out: their statistics are of one process on CPUs."""
    for name, child in model.named_children():
        setattr(model, name, nn.Identity() if isinstance(child, nn.BatchNorm1d) else without_norms(child))
    return model


def launched(folder: Path, scenario: str, changed: dict[str, Any]) -> None:
    """Train in each process of a launch, evaluation included."""
    start_processes()
    settings = config(scenario, **changed)
    made = make_setup(settings, data())
    without_norms(made.model)
    start_accelerator(settings, folder)
    run(folder, made, settings, evaluate=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    launched(Path(given["folder"]), given["scenario"], given["config"])
