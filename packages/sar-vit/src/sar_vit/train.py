"""Train with SAR: ``accelerate launch -m sar_vit.train RECIPE [--field value ...]``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from attnmap_core.data.loaders import samples_of
from attnmap_core.data.sources import ImageData, check_data_options
from attnmap_core.errors import InputError
from attnmap_core.training import TrainResult, prepare_run, start_accelerator, start_processes
from attnmap_core.training import train as run_training

from . import evaluate
from .config import SarConfig
from .report import write_run
from .scenarios import Setup, make_setup

logger = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A run that is over: what the loop did, and what the chosen weights do on the test split."""

    result: TrainResult
    metrics: Mapping[str, float]


def train(config: SarConfig, header: str = "", resume: bool = False, overwrite: bool = False) -> Finished:
    """Train as configured, choose an epoch, measure it on the test split, and write the run folder.

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
    data = {split: load_split(config, split) for split in splits}
    setup = make_setup(config, data["train"])
    prepare_run(run, config, header, "sar-vit", resume=resume, overwrite=overwrite)
    chooses = data.get(config.select_on)
    if config.select_on == "test":
        logger.warning(
            "select_on test: the epoch is chosen on the split it is reported on; the numbers flatter"
        )
    loop = config
    if chooses is not None and config.select_by == "last":
        loop = dataclasses.replace(config, select_by=setup.select_by, select_mode=setup.select_mode)

    def validate(candidate: Any, accelerator: Any) -> Mapping[str, float]:
        assert chooses is not None
        return setup.measure(candidate, chooses, accelerator)

    try:
        result = run_training(
            setup.task,
            setup.model,
            samples_of(
                setup.prepare(data["train"]),
                setup.transform,
                seed=config.seed,
                with_segmentation=setup.with_segmentation,
            ),
            loop,
            run,
            evaluate=None if chooses is None else validate,
            make_schedule=setup.make_schedule,
            save_model=setup.save,
            resume=resume,
        )
    except FloatingPointError as error:  # of --nonfinite raise
        raise InputError(str(error)) from error
    return Finished(result, finish_run(run, config, setup, data["test"], result))


def load_split(config: SarConfig, split: str) -> ImageData:
    """One split of the configured data; data with class maps are reported on their ``val``, for lack of a ``test``."""
    return evaluate.load_split(config.data, None if split == "test" else split, config.source_options())


def finish_run(
    run: Path, config: SarConfig, setup: Setup, data: ImageData, result: TrainResult
) -> Mapping[str, float]:
    """Measure the chosen weights on ``test``, and write model folder, metrics, card and report.

    Where an epoch was chosen, the last epoch's numbers are reported beside it, by names that begin with ``last_``.
    """
    accelerator = start_accelerator(config, run)
    accelerator.wait_for_everyone()
    metrics: dict[str, float] = {}
    model: Any = None
    for name in ("model", "best") if result.best is not None else ("model",):
        metrics = {f"last_{key}": value for key, value in metrics.items()}
        model = setup.load(run / name).to(accelerator.device).eval()
        metrics |= setup.measure(model, data, accelerator)
    if accelerator.is_main_process:
        write_run(run, config, setup, model, data, metrics, result)
    accelerator.wait_for_everyone()
    return metrics


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
