"""Train SCM, TS-CAM or CAM: ``accelerate launch -m scm_wsol.train RECIPE [--field value ...]``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attnmap_core.data.loaders import samples_of
from attnmap_core.data.sources import ImageData, check_data_options, load_data
from attnmap_core.data.transforms import Preprocessing, train_transform
from attnmap_core.training import (
    TrainResult,
    prepare_run,
    start_accelerator,
    start_processes,
    timm_schedule,
)
from attnmap_core.training import train as run_training

from .config import ScmConfig
from .evaluate import Evaluation, evaluate_model
from .model import SCM, TSCAM
from .report import write_run
from .task import ClassificationTask, DivisibleStep

logger = logging.getLogger(__name__)


def build_model(config: ScmConfig, labels: list[str]) -> TSCAM:
    """The model a config describes, with fresh or pretrained weights drawn from ``config.seed``."""
    torch.manual_seed(config.seed)
    options: dict[str, Any] = {
        "backbone": config.backbone,
        "num_classes": len(labels),
        "img_size": config.image_size,
        "head_kernel": config.head_kernel,
        "drop_path_rate": config.drop_path_rate,
        "logit_scale": config.logit_scale,
        "threshold": config.fixed_threshold,
        "labels": labels,
        "preprocessing": preprocessing(config).to_dict(),
        "pretrained": config.pretrained,
        "weights": config.weights,
        "reset_head_bias": config.reset_head_bias,
        "backbone_options": dict(config.backbone_options),
    }
    if config.method == "scm":
        return SCM(**options, calibration_options=config.calibration_options())
    return TSCAM(**options, method=config.method)


def preprocessing(config: ScmConfig) -> Preprocessing:
    """Test photos are resized straight to the input, without a crop."""
    return Preprocessing(size=(config.image_size, config.image_size), mean=config.mean, std=config.std)


def make_schedule(optimizer: torch.optim.Optimizer, config: ScmConfig, steps_per_epoch: int | None) -> Any:
    """The released step rule where ``lr_steps`` are given, timm's schedules otherwise."""
    if config.lr_steps:
        return DivisibleStep(optimizer, steps=config.lr_steps)
    return timm_schedule(optimizer, config, steps_per_epoch)


class Finished(NamedTuple):
    """A run that is over: what the loop did, and what the chosen weights do on the test split."""

    result: TrainResult
    evaluation: Evaluation


def train(config: ScmConfig, header: str = "", resume: bool = False, overwrite: bool = False) -> Finished:
    """Train as configured, choose a checkpoint, evaluate it on the test split, and write the run folder.

    Args:
        config: the run; its ``output_dir`` receives everything.
        header: comment block of the recipe, kept with the resolved recipe.
        resume: go on from the newest checkpoint.
        overwrite: replace an existing run folder.

    Raises:
        InputError: for data, settings or a folder that cannot be used.
    """
    config.check()
    start_processes()
    check_data_options(config.source_options())
    # Without a split to choose on, the last weights are it; with one, GT-known chooses unless a metric is named.
    if config.select_on == "last":
        config = dataclasses.replace(config, select_by="last")
    elif config.select_by == "last":
        config = dataclasses.replace(config, select_by="gt_known")
    run = Path(config.output_dir)
    # Data and model first: what is wrong with them must not leave a run folder behind.
    data = {split: load_split(config, split) for split in needed_splits(config)}
    train_data = data["train"]
    model = build_model(config, train_data.labels)
    prepare_run(run, config, header, "scm-wsol", resume=resume, overwrite=overwrite)
    transform = train_transform(model.preprocessing, resize=config.resize, flip=config.flip)
    samples = samples_of(train_data, transform, seed=config.seed)
    selection = data.get(config.select_on)
    if config.select_on == "test":
        logger.warning(
            "select_on test: the checkpoint is chosen on the split it is reported on; the numbers flatter"
        )

    def validate(candidate: Any, accelerator: Any) -> dict[str, float]:
        assert selection is not None
        return measure(config, candidate, selection, accelerator).metrics()

    result = run_training(
        ClassificationTask(),
        model,
        samples,
        config,
        run,
        evaluate=None if selection is None else validate,
        make_schedule=make_schedule,
        save_model=save_model,
        resume=resume,
    )
    return Finished(result, finish_run(run, config, data, result))


def save_model(model: Any, folder: Path) -> None:
    """A model folder of weights that are still being trained; the card comes with the final one."""
    model.save_pretrained(folder)


def needed_splits(config: ScmConfig) -> list[str]:
    """Splits a run reads: training and test images, and those that choose the checkpoint."""
    return ["train", "val", "test"] if config.select_on == "val" else ["train", "test"]


def load_split(config: ScmConfig, split: str) -> ImageData:
    """One split of the configured data."""
    return load_data(config.data, split, **config.source_options())


def measure(config: ScmConfig, model: TSCAM, data: ImageData, accelerator: Any, **options: Any) -> Evaluation:
    """:func:`evaluate_model` with the settings of a run."""
    return evaluate_model(
        model,
        data,
        accelerator=accelerator,
        step=config.threshold_step,
        fixed_threshold=config.fixed_threshold,
        batch_size=config.eval_batch_size,
        workers=config.workers,
        **options,
    )


def finish_run(run: Path, config: ScmConfig, data: dict[str, ImageData], result: TrainResult) -> Evaluation:
    """Measure the chosen weights on ``test`` and write model folder, metrics, card and report."""
    accelerator = start_accelerator(config, run)
    accelerator.wait_for_everyone()
    chosen = run / ("best" if result.best is not None else "model")
    model = (SCM if config.method == "scm" else TSCAM).from_pretrained(chosen).to(accelerator.device).eval()
    if "val" in data:
        model.threshold = (
            measure(config, model, data["val"], accelerator).threshold() or config.fixed_threshold
        )
    kinds = tuple(dict.fromkeys((model.own_kind, "cam", "att", "tscam", "scm")))
    evaluation = measure(
        config, model, data["test"], accelerator, kinds=kinds, protocols=config.protocols, floors=True
    )
    if accelerator.is_main_process:
        write_run(run, config, model, data["test"], evaluation, result)
    accelerator.wait_for_everyone()
    return evaluation


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
