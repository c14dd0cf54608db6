"""What the experiments share besides core's: the runs of this package, and models with the stack of their training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attnmap_core import cli, experiments
from attnmap_core.data.sources import ImageData
from attnmap_core.data.transforms import eval_transform
from attnmap_core.experiments import Run, RunOptions
from attnmap_core.recipes import load_recipe
from PIL import Image

from ..config import DmlConfig
from ..cross_attention import CrossAttentionStack
from ..model import Embedded, EmbeddingModel
from ..task import load_stack
from ..train import train

RUNNER = experiments.Runner(module="crossattn_dml", config=DmlConfig, train=train)
write_results = partial(experiments.write_results, distribution="crossattn-dml")

BASELINE: dict[str, Any] = {"stack": False}
METHOD: dict[str, Any] = {"stack": True}


def finished(options: RunOptions, out: Path, recipe: str, seed: int, **changes: Any) -> Run:
    """The finished run of a recipe under an experiment's options; one that is there is read, not repeated."""
    return RUNNER.finished(out / f"seed{seed}", recipe, **{**options.overrides(), "seed": seed, **changes})


def finished_together(
    options: RunOptions, recipe: str, asked: Sequence[tuple[Path, int, dict[str, Any]]], jobs: int
) -> list[Run]:
    """As :func:`finished`, of several folders, seeds and changes: up to ``jobs`` runs at once."""
    given = options.overrides()
    runs = [(out / f"seed{seed}", recipe, {**given, "seed": seed, **changes}) for out, seed, changes in asked]
    return RUNNER.finished_together(runs, jobs)


def recipe_config(recipe: str, overrides: dict[str, Any]) -> DmlConfig:
    """What a recipe with changed fields says."""
    return load_recipe("crossattn_dml", recipe, DmlConfig, overrides)


def open_model(folder: str | Path, device: str) -> EmbeddingModel:
    """A model or run folder, or Hub id, ready for evaluation."""
    return EmbeddingModel.from_pretrained(cli.resolve_model(str(folder))).to(cli.choose_device(device)).eval()


def open_pair(folder: str | Path, device: str) -> tuple[EmbeddingModel, CrossAttentionStack]:
    """A model and the stack of its training.

    Raises:
        InputError: where there is no stack beside it.
    """
    model = open_model(folder, device)
    return model, load_stack(model, cli.resolve_model(str(folder)))


@torch.no_grad()
def seen(model: EmbeddingModel, photos: list[Image.Image]) -> Embedded:
    """What a network says of some photos."""
    transform, weight = eval_transform(model.preprocessing), model.head.weight
    return model(torch.stack([transform(photo) for photo in photos]).to(weight.device, weight.dtype))


def network_view(model: EmbeddingModel, photo: Image.Image) -> Image.Image:
    """The photo as the network sees it: cropped and resized, colours as they are."""
    images = eval_transform(model.preprocessing)(photo)
    pixels = model.preprocessing.denormalise(images[None])[0].clamp(0, 1).permute(1, 2, 0).numpy()
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))


def scale_note(config: DmlConfig) -> str | None:
    """How far a run on the embedded default is from the paper; None on other data."""
    if not config.data.startswith("synthetic"):
        return None
    return (
        f"Reduced scale: {config.data}; {config.backbone} at {config.image_size} px, {config.epochs} epochs, batch "
        f"{config.batch_size}. The paper: ResNet-50 on CUB-200-2011, Cars196 and Stanford Online Products. These "
        "numbers cannot be compared with published ones."
    )


def places_of(data: ImageData) -> dict[int, list[int]]:
    """Places of the images of each class."""
    targets = data.targets
    return {int(label): np.flatnonzero(targets == label).tolist() for label in np.unique(targets)}
