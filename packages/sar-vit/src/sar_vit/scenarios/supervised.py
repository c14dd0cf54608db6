"""Supervised training (section 4.2, appendix D.1) and fine-tuning (section 4.3, appendix D.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from attnmap_core.cli import resolve_model
from attnmap_core.data.sources import ImageData
from attnmap_core.errors import InputError
from attnmap_core.hub import read_config
from attnmap_core.training import Schedule, timm_schedule

from ..augmentation import batch_mix, photo_transform, preprocessing
from ..config import SarConfig
from ..evaluate import evaluate_model
from ..model import SARViT
from ..task import SupervisedTask
from . import Setup

KEPT = ("backbone", "backbone_options", "msa_skip", "mlp_norm", "mlp_skip", "query", "interpolation")
"""What fine-tuning takes over from the model it starts with: its architecture, the form of the last block included."""


def make_setup(config: SarConfig, data: ImageData) -> Setup:
    """Cross-entropy and spatial entropy on labelled images."""
    model = build_model(config, data.labels)
    task: Any = make_task(config, len(data.labels))
    if config.drloc_weight > 0:
        from ..drloc import with_drloc

        model, task = with_drloc(model, task, config)
    return Setup(
        model=model,
        task=task,
        transform=photo_transform(config),
        measure=lambda candidate, split, accelerator: measure(config, candidate, split, accelerator),
        save=save,
        load=SARViT.from_pretrained,
        make_schedule=make_schedule,
    )


def build_model(config: SarConfig, labels: list[str]) -> SARViT:
    """The model a config describes, with fresh or pretrained weights drawn from ``config.seed``."""
    torch.manual_seed(config.seed)
    options: dict[str, Any] = {
        "backbone": config.backbone,
        "backbone_options": dict(config.backbone_options),
        "query": config.query,
        "pretrained": config.pretrained,
        "weights": config.weights,
        "new_surgery": config.new_surgery,
        **config.switches(),
    }
    if config.start is not None:
        folder = local_folder(config.start)
        described = read_config(folder)
        options = {name: value for name, value in described["model"].items() if name in KEPT}
        known = list(described.get("labels") or ())
        options |= {"weights": str(folder), "reset_head": known != list(labels)}
    return SARViT(
        **options,
        num_classes=len(labels),
        img_size=config.image_size,
        drop_path_rate=config.drop_path_rate,
        labels=labels,
        preprocessing=preprocessing(config).to_dict(),
    )


def local_folder(start: str) -> Path:
    """The model folder that ``--start`` names; a Hub repository is fetched.

    Raises:
        InputError: if there is no such folder or repository.
    """
    folder = Path(resolve_model(start))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(start, allow_patterns=["config.json", "model.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"start {start}: neither a folder nor a reachable Hub repository ({error})"
        ) from None


def make_task(config: SarConfig, classes: int) -> SupervisedTask:
    """The loss that a config describes."""
    mix = batch_mix(config, classes)
    return SupervisedTask(
        config.entropy_weight,
        config.entropy_schedule,
        epochs=config.epochs,
        warmup_epochs=config.entropy_warmup_epochs,
        label_smoothing=0.0 if mix is not None else config.label_smoothing,
        mix=mix,
        similarity=config.similarity,
        nonfinite=config.nonfinite,
        kind=config.regulariser,
    )


def make_schedule(optimizer: torch.optim.Optimizer, config: SarConfig, steps_per_epoch: int | None) -> Any:
    """timm's schedule as configured; with ``legacy_lag`` an epoch later."""
    schedule = timm_schedule(optimizer, config, steps_per_epoch)
    return LaggingSchedule(schedule) if config.legacy_lag else schedule


class LaggingSchedule:
    """A schedule stepped at the end of each epoch instead of its beginning: the first two epochs are alike.

    Example:
        >>> class Printed:
        ...     def step(self, epoch):
        ...         print(epoch)
        >>> lagging = LaggingSchedule(Printed())
        >>> lagging.step(0), lagging.step(1), lagging.step(2)
        0
        0
        1
        (None, None, None)
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def step(self, epoch: int, /) -> None:
        """Take the rate of the epoch before."""
        self.schedule.step(max(epoch - 1, 0))

    def step_update(self, num_updates: int, /) -> None:
        """Within an epoch nothing lags."""
        self.schedule.step_update(num_updates)


def measure(config: SarConfig, model: Any, data: ImageData, accelerator: Any) -> dict[str, float]:
    """Standard metrics of a model that is being trained, or was."""
    return evaluate_model(
        bare(model),
        data,
        accelerator=accelerator,
        batch_size=config.eval_batch_size,
        workers=config.workers,
        jaccard_mass=config.jaccard_mass,
    ).metrics()


def save(model: Any, folder: Path) -> None:
    """The classifier's model folder, without what only trains."""
    bare(model).save_pretrained(folder)


def bare(model: Any) -> SARViT:
    """The classifier itself, out of what wraps it in training."""
    return model if isinstance(model, SARViT) else model.classifier
