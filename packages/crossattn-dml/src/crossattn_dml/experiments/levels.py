"""Recall@1 by the similarity of each level of the stack: what the embedding has not yet taken up from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attnmap_core import cli
from attnmap_core.data.sources import ImageData
from attnmap_core.errors import InputError
from attnmap_core.experiments import RunOptions

from ..cross_attention import CrossAttentionStack
from ..model import EmbeddingModel
from .runs import METHOD, finished, open_pair, recipe_config, scale_note, seen, write_results


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Recall@1 on a subset of unseen classes, by level. A finished run is not repeated."""

    model: str = ""
    """Run folder with a stack; a run of the recipe where not given."""
    recipe: str = "tiny-mutual"
    """Recipe of that run, and of the data."""
    images: int = 200
    """Test images that search each other."""
    seed: int = 0
    """Of the run and of the choice."""
    out: Path = Path("runs/levels")
    """Folder of the run and the table."""


def levels_command(arguments: list[str]) -> None:
    """``crossattn-dml reproduce levels [--model RUN]``."""
    options = cli.parse(Options, arguments, command="crossattn-dml reproduce levels")
    folder = (
        options.model or finished(options, options.out / "run", options.recipe, options.seed, **METHOD).folder
    )
    model, stack = open_pair(folder, options.device)
    config = recipe_config(options.recipe, options.overrides())
    data = config.load().query
    chosen = np.sort(np.random.default_rng(options.seed).permutation(len(data))[: options.images])
    shares = recall_by_level(model, stack, data.select(chosen))
    write_results(
        options.out,
        [{"level": str(level), "R@1": 100 * share} for level, share in shares.items()],
        title=f"R@1 by level, {len(chosen)} images of {data.name}, percent",
        notes=["Level 0 is the embedding that is used; the others need the stack.", scale_note(config)],
        digits={"R@1": 2},
        seed=options.seed,
    )


@torch.no_grad()
def recall_by_level(model: EmbeddingModel, stack: CrossAttentionStack, data: ImageData) -> dict[int, float]:
    """Recall@1 of images that search each other, by level, fractions.

    Raises:
        InputError: where no image has another one of its class.
    """
    found: Any = seen(model, [data[i].image for i in range(len(data))])
    stack.tile = stack.tile or 32
    levels = list(range(stack.depth + 1))
    S = stack(found.embeddings, found.tokens, levels=levels, grid=found.grid)
    labels = torch.from_numpy(data.targets).to(found.embeddings.device)
    same = labels[:, None] == labels
    if int(same.sum()) == len(labels):
        raise InputError(f"{data.name}: no two of {len(labels)} images have one class; raise --images")
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return {
        level: float(same.gather(1, values.masked_fill(itself, -torch.inf).argmax(1)[:, None]).float().mean())
        for level, values in S.items()
    }
