"""Train without labels: ``accelerate launch -m contrastive_cam.train RECIPE [--field value ...]``."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from attnmap_core.data.loaders import eval_loader, samples_of
from attnmap_core.data.sources import ImageData, check_data_options, load_data
from attnmap_core.data.transforms import Preprocessing, eval_transform
from attnmap_core.errors import InputError
from attnmap_core.training import TrainResult, prepare_run, start_accelerator, start_processes
from attnmap_core.training import train as run_training
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .config import ContrastiveConfig
from .evaluate import Evaluation, evaluate_localizer
from .frozen import FrozenMap, RegionTask, descriptor_statistics, start_region, turn_to_center
from .inference import parse_rule
from .localizers import Localizer
from .model import ContrastiveCAM
from .report import write_run
from .task import ColocalizationTask
from .transforms import PretextTransform

logger = logging.getLogger(__name__)

MEAN_PHOTOS = 500
"""Training photos that tell the mean of the descriptors of ``train head``."""


class TrainTransform:
    """PsyNet's way from a photo to the network's input in training: squeezed, mirrored at the edges, cropped.

    No flip and no colours: the pretext tasks bring the changes. Randomness comes from torch's global generator.

    Args:
        preprocessing: of the model.
        resize: side of the square in pixels.
        padding: pixels mirrored at each side before the crop.

    Example:
        >>> transform = TrainTransform(Preprocessing(size=(24, 24)), resize=28, padding=4)
        >>> transform(Image.new("RGB", (50, 40))).shape
        torch.Size([3, 24, 24])
    """

    def __init__(self, preprocessing: Preprocessing, resize: int = 256, padding: int = 4) -> None:
        self.size, self.padding = preprocessing.size, padding
        self.whole = eval_transform(dataclasses.replace(preprocessing, size=(resize, resize)))

    def __call__(self, image: Image.Image) -> Tensor:
        """``(3, h, w)`` of one photo."""
        pixels = functional.pad(self.whole(image)[None], [self.padding] * 4, mode="reflect")[0]
        top, left = (
            int(torch.randint(have - need + 1, (1,))) for have, need in zip(pixels.shape[1:], self.size)
        )
        return pixels[:, top : top + self.size[0], left : left + self.size[1]]


def build_model(config: ContrastiveConfig) -> ContrastiveCAM | FrozenMap:
    """The model a config describes, with fresh or pretrained weights drawn from ``config.seed``.

    Raises:
        InputError: for settings that the model refuses.
    """
    torch.manual_seed(config.seed)
    shared: dict[str, Any] = {
        "img_size": config.image_size,
        "last_stage": config.last_stage,
        "labels": [config.name],
        "pretrained": config.pretrained,
        "weights": config.weights,
        "backbone_options": dict(config.backbone_options),
    }
    rule = parse_rule(config.threshold)
    try:
        if config.train == "head":
            model: Any = FrozenMap(
                config.backbone,
                blocks=config.blocks,
                layers=config.layers,
                positive=rule == "zero",
                threshold=0.0 if rule == "zero" else rule if isinstance(rule, float) else 0.5,
                **shared,
            )
        else:
            model = ContrastiveCAM(
                config.backbone,
                PretextTransform(config.tasks, config.padding, compat=config.compat).tasks,
                feature=config.feature,
                gate=config.gate,
                ratio=config.ratio,
                pooling=config.pooling,
                rank=config.rank,
                heads_read=config.heads_read,
                eval_map=config.eval_map,
                map_offset=config.map_offset,
                threshold=rule if isinstance(rule, float) else 0.2,
                **shared,
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    known = model.backbone.preprocessing_config
    model.preprocessing = Preprocessing(
        size=(config.image_size, config.image_size),
        mean=config.mean or known["mean"],
        std=config.std or known["std"],
    )
    for pattern in config.freeze:
        matched = [p for name, p in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(f"freeze {pattern}: matches no parameter; such as backbone.model.layer1.*")
        for parameter in matched:
            parameter.requires_grad_(False)
    return model


def build_task(config: ContrastiveConfig) -> ColocalizationTask | RegionTask:
    """The losses a config describes.

    Raises:
        InputError: for settings that do not go together.
    """
    if config.train == "head":
        return RegionTask(config.equivariance)
    try:
        return ColocalizationTask(
            PretextTransform(config.tasks, config.padding, compat=config.compat),
            config.contrastive_weight,
            config.pretext_weight,
            warmup_epochs=config.contrastive_warmup_epochs,
            kind=config.kind,
            ratio=1.0 if config.pooling in ("max", "avg") else config.ratio,
            freeze_norms=config.freeze_norms,
            **config.loss_options(),
        )
    except ValueError as error:
        raise InputError(str(error)) from error


class Finished(NamedTuple):
    """A run that is over: what the loop did, and what the chosen weights do on the test split."""

    result: TrainResult
    evaluation: Evaluation


def train(
    config: ContrastiveConfig, header: str = "", resume: bool = False, overwrite: bool = False
) -> Finished:
    """Train as configured, choose an epoch, score it on the test split, and write the run folder.

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
    run = Path(config.output_dir)
    # Data and model first: what is wrong with them must not leave a run folder behind.
    splits = ["train", "val", "test"] if config.select_on == "val" else ["train", "test"]
    data = {
        split: load_data(config.data, "all" if config.whole else split, **config.source_options())
        for split in splits
    }
    loop = config
    if config.gate == "none":  # a recipe's rates for the gate must not stop a run without one
        scales = {name: scale for name, scale in config.lr_scales.items() if not name.startswith("gate.")}
        loop = dataclasses.replace(config, lr_scales=scales)
    if config.select_on == "last" or config.select_by == "last":
        loop = dataclasses.replace(loop, select_by="last" if config.select_on == "last" else "corloc_mean")
    model, task = build_model(config), build_task(config)
    transform = TrainTransform(model.preprocessing, config.resize, config.crop_padding)
    prepare_run(run, config, header, "contrastive-cam", resume=resume, overwrite=overwrite)
    if config.select_on == "test":
        logger.warning(
            "select_on test: the epoch is chosen on the split it is reported on; the numbers flatter"
        )
    if isinstance(model, FrozenMap):
        prepare_head(model, config, data["train"])
    chooses = data.get(config.select_on)

    def validate(candidate: Any, accelerator: Any) -> dict[str, float]:
        assert chooses is not None
        found = measure(config, candidate, chooses, accelerator, floors=False).metrics()
        if not found:
            raise InputError(f"select_on {config.select_on}: no photo with a box in it; use select_on last")
        return found

    result = run_training(
        task,
        model,
        samples_of(data["train"], transform, seed=config.seed),
        loop,
        run,
        evaluate=None if chooses is None else validate,
        save_model=save_model,
        resume=resume,
    )
    return Finished(result, finish_run(run, config, data, result))


def prepare_head(model: FrozenMap, config: ContrastiveConfig, data: ImageData) -> None:
    """Take the mean of the descriptors, and draw the weights to begin with; the same in every process."""
    some = (
        data if data.streaming or len(data) <= MEAN_PHOTOS else data.select(_spread(len(data), config.seed))
    )
    samples = samples_of(some, eval_transform(model.preprocessing), seed=0)
    loader = eval_loader(samples, config.eval_batch_size, workers=config.workers)
    [statistics] = descriptor_statistics([model], (batch["images"] for batch in loader))
    start_region(model, statistics, torch.Generator().manual_seed(config.seed))


def _spread(count: int, seed: int) -> Any:
    return np.sort(np.random.default_rng(seed).permutation(count)[:MEAN_PHOTOS])


def save_model(model: Any, folder: Path) -> None:
    """A model folder of weights that are still being trained; the card comes with the final one."""
    model.save_pretrained(folder)


def measure(
    config: ContrastiveConfig, model: Any, data: ImageData, accelerator: Any, **options: Any
) -> Evaluation:
    """:func:`evaluate_localizer` with the settings of a run."""
    return evaluate_localizer(
        localizer_of(config, model),
        data,
        accelerator=accelerator,
        multi=config.multi,
        batch_size=config.eval_batch_size,
        workers=config.workers,
        **options,
    )


def localizer_of(config: ContrastiveConfig, model: Any) -> Localizer:
    """The model of a run with the run's cut."""
    method: Any = "region" if config.train == "head" else "model"
    return Localizer(model, method, parse_rule(config.threshold))


def finish_run(
    run: Path, config: ContrastiveConfig, data: dict[str, ImageData], result: TrainResult
) -> Evaluation:
    """Score the chosen weights on ``test``, and write model folder, metrics, card and report."""
    from .cli import load_model

    accelerator = start_accelerator(config, run)
    accelerator.wait_for_everyone()
    chosen = run / ("best" if result.best is not None else "model")
    model = load_model(str(chosen)).to(accelerator.device).eval()
    if isinstance(model, FrozenMap):
        samples = samples_of(data["train"], eval_transform(model.preprocessing), seed=0)
        loader = eval_loader(samples, config.eval_batch_size, workers=config.workers)
        with torch.inference_mode():
            turn_to_center(model, (model(batch["images"].to(accelerator.device)).score for batch in loader))
    rules = [parse_rule(text) for text in config.rules]
    evaluation = measure(
        config,
        model,
        data["test"],
        accelerator,
        rules=[rule for rule in rules if rule not in (None, "zero")],
        psynet=config.psynet,
    )
    if accelerator.is_main_process:
        write_run(run, config, model, data["test"], evaluation, result)
    accelerator.wait_for_everyone()
    return evaluation


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
