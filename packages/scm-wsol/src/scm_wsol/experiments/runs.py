"""What the experiments share besides core's: the runs of this package, and how far they are from the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attnmap_core import cli, experiments
from attnmap_core.data.sources import ImageData, check_labels
from attnmap_core.errors import InputError
from attnmap_core.experiments import RunOptions, mean_and_deviation, shown
from attnmap_core.recipes import load_recipe, plain_values

from ..cli import load_model
from ..config import ScmConfig
from ..model import TSCAM
from ..train import load_split, train

__all__ = [
    "Run",
    "RunOptions",
    "check_images",
    "experiment_data",
    "finished_run",
    "given_or_trained",
    "iterations_text",
    "mean_and_deviation",
    "open_model",
    "run_once",
    "scale_note",
    "shown",
    "trained",
    "write_results",
]


@dataclass(frozen=True)
class Run(experiments.Run):
    """A finished run of this package."""

    def own(self) -> dict[str, float]:
        """Standard metrics of the model's own score map, on the test split; percent."""
        return self.metrics["protocol standard"][self.metrics["map"]]


def _comparable(config: ScmConfig) -> dict[str, Any]:
    # "last" with a split to choose on means "gt_known", and is written so into the run folder.
    values = plain_values(config)
    return values | {"select_by": "last" if config.select_by == "gt_known" else config.select_by}


_RUNNER = experiments.Runner(module="scm_wsol", config=ScmConfig, train=train, comparable=_comparable)


def finished_run(folder: Path, recipe: str, **overrides: Any) -> Run:
    """Train a recipe into ``folder``; a finished run is read, an interrupted one resumed."""
    run = _RUNNER.finished(folder, recipe, **overrides)
    return Run(run.folder, run.config, run.metrics)


def run_once(folder: Path, recipe: str, **overrides: Any) -> dict[str, Any]:
    """The ``metrics.json`` of :func:`finished_run`."""
    return finished_run(folder, recipe, **overrides).metrics


def trained(options: RunOptions, out: Path, recipe: str, seed: int, **changes: Any) -> Run:
    """The finished run of a recipe under an experiment's options."""
    return finished_run(out / f"seed{seed}", recipe, **{**options.overrides(), "seed": seed, **changes})


def open_model(folder: str | Path, device: str) -> TSCAM:
    """A model or run folder, or Hub id, ready for evaluation."""
    return load_model(cli.resolve_model(str(folder))).to(cli.choose_device(device)).eval()


def given_or_trained(
    options: RunOptions, model: str, data: ImageData, out: Path, recipe: str, seed: int
) -> TSCAM:
    """The model a user names, which must have the classes of ``data``; without a name, a run of the recipe."""
    opened = open_model(model or trained(options, out, recipe, seed).folder, options.device)
    check_labels(opened.labels, data)
    return opened


def experiment_data(options: RunOptions, recipe: str, split: str) -> tuple[ScmConfig, ImageData]:
    """What the recipe and the options say, and the split that is looked at."""
    config = load_recipe("scm_wsol", recipe, ScmConfig, options.overrides())
    return config, load_split(config, split)


def check_images(images: Sequence[int], data: ImageData) -> None:
    """Indices must lie in the data."""
    for index in images:
        if not 0 <= index < len(data):
            raise InputError(
                f"--images {index}: no such image; {data.name}, {data.split} has 0 to {len(data) - 1}"
            )


def iterations_text(config: ScmConfig) -> str | None:
    """Newton-Schulz iterations of an SCM, block by block or one number for all; None for other methods."""
    return " ".join(map(str, config.iterations)) if config.method == "scm" else None


def scale_note(config: ScmConfig, given: Sequence[str] = ()) -> str | None:
    """How far a run on the embedded default is from the paper; None on other data.

    Args:
        config: of what is trained here.
        given: names of models that were not trained here; empty names count as none.
    """
    if not config.data.startswith("synthetic"):
        return None
    options = config.backbone_options
    sizes = ", ".join(
        f"{name} {options[name]}" for name in ("depth", "embed_dim", "patch_size") if name in options
    )
    start = "" if config.weights or config.pretrained else " from random weights"
    model = (
        f"{config.backbone}{f' ({sizes})' if sizes else ''} at {config.image_size} px{start}, "
        f"epochs {config.epochs}, batch {config.batch_size}"
    )
    models = [*filter(None, given), *([] if given and all(given) else [model])]
    return (
        f"Reduced scale: {config.data}; {'; '.join(models)}. The paper: DeiT-S at 224 px with ImageNet weights, on "
        "CUB-200-2011 and ILSVRC2012. These numbers show that everything runs; they cannot be compared with published "
        "ones."
    )


write_results = partial(experiments.write_results, distribution="scm-wsol")
