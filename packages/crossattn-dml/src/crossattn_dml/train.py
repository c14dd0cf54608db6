"""Train an embedding: ``accelerate launch -m crossattn_dml.train RECIPE [--field value ...]``."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attnmap_core.data.loaders import samples_of
from attnmap_core.data.sources import ImageData, check_data_options
from attnmap_core.data.transforms import train_transform
from attnmap_core.errors import InputError
from attnmap_core.training import TrainResult, prepare_run, start_accelerator, start_processes
from attnmap_core.training import train as run_training

from .config import DmlConfig
from .evaluate import EmbeddedData, embed_data, measure
from .model import EmbeddingModel
from .report import write_run
from .samplers import make_sampler
from .task import ConditionalTraining, MetricTask
from .zero_shot import ZeroShotData

logger = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A run that is over: what the loop did, and what the chosen weights do on unseen classes."""

    result: TrainResult
    metrics: Mapping[str, float]


def build_model(config: DmlConfig) -> EmbeddingModel:
    """The network a config describes, with fresh or pretrained weights drawn from ``config.seed``."""
    torch.manual_seed(config.seed)
    return EmbeddingModel(
        config.backbone,
        config.embedding_dim,
        config.image_size,
        pool=config.pool,
        batch_norm=config.batch_norm,
        memory=config.memory,
        drop_path_rate=config.drop_path_rate,
        preprocessing=config.preprocessing().to_dict(),
        pretrained=config.pretrained,
        weights=config.weights,
        backbone_options=dict(config.backbone_options),
    )


def build_training(config: DmlConfig, classes: int) -> ConditionalTraining:
    """Network, stack and loss. Those of the baseline begin with the same network as the method's.

    Args:
        config: the run.
        classes: training classes.

    Raises:
        InputError: for options that contradict each other, and a pattern of ``freeze`` that matches nothing.
    """
    model = build_model(config)
    torch.manual_seed(config.seed + 1)  # the network's weights must not depend on what else is built
    training = ConditionalTraining(
        model,
        config.stack_options(),
        config.make_loss_options(classes),
        mined=config.mined and config.stack,
        gather=config.gather,
        partners=config.partners,
    )
    names = [name for name, _ in training.named_parameters()]
    for pattern in config.freeze:
        if not fnmatch.filter(names, pattern):
            raise InputError(
                f"freeze {pattern}: matches no parameter; expected names such as {', '.join(names[:3])}"
            )
    for name, parameter in training.named_parameters():
        if any(fnmatch.fnmatch(name, pattern) for pattern in config.freeze):
            parameter.requires_grad_(False)
    return training


def train_images(config: DmlConfig) -> Any:
    """The random way from a photo to the network's input."""
    return train_transform(
        config.preprocessing(),
        crop="random_resized" if config.augmentation == "crop_flip" else "none",
        scale=config.crop_scale,
    )


def train(config: DmlConfig, header: str = "", resume: bool = False, overwrite: bool = False) -> Finished:
    """Train as configured, measure the chosen epoch on unseen classes, and write the run folder.

    Args:
        config: the run; its ``output_dir`` receives everything.
        header: comment block of the recipe, kept with the resolved recipe.
        resume: go on from the newest checkpoint.
        overwrite: replace an existing run folder.

    Raises:
        InputError: for data, settings or a folder that cannot be used.
    """
    config.check()
    processes = start_processes().num_processes
    check_data_options(config.source_options())
    run = Path(config.output_dir)
    # Data and model first: what is wrong with them must not leave a run folder behind.
    data = config.load()
    order = make_sampler(
        config.sampler,
        data.train.targets,
        config.batch_size * processes,
        per_class=config.per_class,
        seed=config.seed,
    )
    training = build_training(config, len(data.train.labels))
    prepare_run(run, config, header, "crossattn-dml", resume=resume, overwrite=overwrite)
    if config.select_on == "test":
        logger.warning(
            "select_on test: the epoch is chosen on the classes it is reported on; the numbers flatter"
        )
    loop = config.with_lr_scales()
    if config.select_on != "last" and config.select_by == "last":
        loop = dataclasses.replace(loop, select_by=f"recall@{min(config.ks)}")

    def validate(candidate: Any, accelerator: Any) -> Mapping[str, float]:
        query, gallery = (data.val, None) if config.select_on == "val" else (data.query, data.gallery)
        assert query is not None
        return measure(*_embed(config, candidate.model, query, gallery, accelerator), ks=config.ks)

    result = run_training(
        MetricTask(config.conditional_weight, warmup_epochs=config.conditional_warmup_epochs),
        training,
        samples_of(data.train, train_images(config), seed=config.seed),
        loop,
        run,
        evaluate=None if config.select_on == "last" else validate,
        save_model=save,
        order=order,
        resume=resume,
    )
    return Finished(result, finish_run(run, config, data, result))


def save(training: Any, folder: Path) -> None:
    """The model folder, and the stack beside it, of weights that are still being trained."""
    training.save(folder)


def finish_run(run: Path, config: DmlConfig, data: ZeroShotData, result: TrainResult) -> Mapping[str, float]:
    """Measure the chosen weights on the unseen classes, and write model folder, metrics, card and report.

    Where an epoch was chosen, the last epoch's numbers are reported beside it, by names that begin with ``last_``.
    """
    accelerator = start_accelerator(config, run)
    accelerator.wait_for_everyone()
    metrics: dict[str, float] = {}
    chosen, embedded = run / "model", None
    for folder in (run / "model", run / "best") if result.best is not None else (run / "model",):
        metrics = {f"last_{key}": value for key, value in metrics.items()}
        model = EmbeddingModel.from_pretrained(folder).to(accelerator.device).eval()
        chosen, embedded = folder, _embed(config, model, data.query, data.gallery, accelerator)
        metrics |= measure(*embedded, ks=config.ks, nmi_seeds=config.nmi_seeds)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and embedded is not None:
        write_run(run, config, chosen, data, embedded, metrics, result)
    accelerator.wait_for_everyone()
    return metrics


def _embed(
    config: DmlConfig, model: EmbeddingModel, query: ImageData, gallery: ImageData | None, accelerator: Any
) -> tuple[EmbeddedData, EmbeddedData | None]:
    walk: dict[str, Any] = {
        "accelerator": accelerator,
        "batch_size": config.eval_batch_size,
        "workers": config.workers,
    }
    return embed_data(model, query, **walk), None if gallery is None else embed_data(model, gallery, **walk)


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
