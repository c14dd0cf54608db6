"""Figure S1: how large gradients are at the output of the encoder, by epoch, baseline against method.

Both are looked at on the same batches with the same augmentation, at epochs that the training passed. The figure is
drawn twice: of the losses as they are, and divided by the sum of their weights, without which a second loss term makes
gradients larger for that reason alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from attnmap_core import cli
from attnmap_core.checkpoint import list_checkpoints, load_checkpoint, read_checkpoint_state
from attnmap_core.data.loaders import TrainSteps, samples_of
from attnmap_core.errors import InputError
from attnmap_core.experiments import Run, RunOptions
from attnmap_core.files import atomic_file
from attnmap_core.pictures import save_picture

from ..config import DmlConfig
from ..diagnostics import EDGES, GradientHistogram, gradient_histogram, token_gradients
from ..samplers import make_sampler
from ..train import build_training, train_images
from .runs import BASELINE, METHOD, finished, scale_note, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS: dict[str, dict[str, Any]] = {"baseline": BASELINE, "method": METHOD}
COLOURS = {"baseline": "#1f77b4", "method": "#d62728"}
"""Blue and red, as the paper has it."""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Histograms of log10 |dL/dE| at some epochs of a baseline and a method run. Finished runs are not repeated."""

    recipe: str = "tiny-stack"
    """Recipe of both runs; cub-lmu, cars-lmu, sop-lmu are the paper's."""
    at: tuple[int, ...] = ()
    """Epochs to look at, 0 is before training; five evenly spaced ones where not given."""
    batches: int = 20
    """Training batches, the same at all epochs and for both."""
    granularity: Literal["element", "token"] = "element"
    """Every entry, or the length of each location's gradient."""
    seed: int = 0
    """Of both runs."""
    out: Path = Path("runs/fig-gradients")
    """Folder of the runs, gradients.npz, the figures and the table."""


def gradients_command(arguments: list[str]) -> None:
    """``crossattn-dml reproduce fig-gradients [--recipe cub-lmu --data cub:PATH]``."""
    options = cli.parse(Options, arguments, command="crossattn-dml reproduce fig-gradients")
    if options.batches < 1:
        raise InputError(f"--batches {options.batches}: expected 1 or more; 20 is usual")
    runs = {
        # Every epoch's weights are kept, whatever the recipe says; this has no influence on them.
        arm: finished(
            options, options.out / arm, options.recipe, options.seed, **changes, keep_checkpoints=10**6
        )
        for arm, changes in ARMS.items()
    }
    epochs = runs["method"].config.epochs
    chosen = options.at or tuple(int(epoch) for epoch in np.unique(np.linspace(0, epochs, 5).round()))
    if min(chosen) < 0 or max(chosen) > epochs:
        raise InputError(f"--at {list(chosen)}: expected epochs of 0 to {epochs}; change it")
    found: dict[tuple[str, int, str], GradientHistogram] = {}
    for arm, run in runs.items():
        for epoch in chosen:
            for scale in ("raw", "normalised"):
                gradients = gradients_at(run, epoch, options, normalise=scale == "normalised")
                found[arm, epoch, scale] = gradient_histogram(gradients)
    with atomic_file(options.out / "gradients.npz") as path:
        counts = np.array([[found[arm, epoch, "raw"].counts for arm in ARMS] for epoch in chosen])
        np.savez(path, edges=EDGES, epochs=np.array(chosen), counts=counts)
    for scale in ("raw", "normalised"):
        parts = {(arm, epoch): found[arm, epoch, scale] for arm in ARMS for epoch in chosen}
        save_picture(figure(parts, chosen), options.out / f"gradients-{scale}.png")
    config: DmlConfig = runs["method"].config
    write_results(
        options.out,
        table_rows(found, chosen),
        title=f"log10 |dL/dE|, {options.granularity} by {options.granularity}, {config.backbone} on {config.data}",
        notes=[
            "Percentiles over the entries that are not 0. Normalised: divided by the sum of the losses' weights. "
            "The paper's figure shows that the baseline's gradients shrink late in training and the method's less; "
            "it has no numbers.",
            scale_note(config),
        ],
        digits=dict.fromkeys(("5 %", "median", "95 %"), 2),
        seed=options.seed,
    )


def gradients_at(run: Run, epoch: int, options: Options, *, normalise: bool) -> Any:
    """Gradients of a run's weights after an epoch, batch after batch."""
    config: DmlConfig = run.config
    data = config.load().train
    training = build_training(config, len(data.labels))
    if epoch:
        load_checkpoint(checkpoint_of(run.folder, epoch), model=training, ema=None)
    training = training.to(cli.choose_device(options.device))
    order = make_sampler(
        config.sampler, data.targets, config.batch_size, per_class=config.per_class, seed=config.seed
    )
    steps = TrainSteps(
        samples_of(data, train_images(config), seed=config.seed),
        config.batch_size,
        seed=config.seed,
        order=order,
    )
    # Always the first batches of the first epoch: the same photos, equally augmented, for every model.
    batches = (batch for step in islice(steps.epoch(0), options.batches) for batch in step)
    return token_gradients(training, batches, granularity=options.granularity, normalise=normalise)


def checkpoint_of(folder: Path, epoch: int) -> Path:
    """The checkpoint at the end of an epoch.

    Raises:
        InputError: if it was not kept.
    """
    for path in list_checkpoints(folder / "checkpoints"):
        state = read_checkpoint_state(path)
        if state["epoch"] == epoch and state["step"] == 0:
            return path
    raise InputError(
        f"{folder}: no checkpoint after epoch {epoch}, expected one of each; train again in another --out"
    )


def table_rows(
    found: Mapping[tuple[str, int, str], GradientHistogram], epochs: Sequence[int]
) -> list[dict[str, Any]]:
    """Percentiles by epoch, arm and scale."""
    rows: list[dict[str, Any]] = []
    for epoch in epochs:
        for arm in ARMS:
            for scale in ("raw", "normalised"):
                histogram = found[arm, epoch, scale]
                low, middle, high = (value if np.isfinite(value) else None for value in histogram.percentiles)
                row = {
                    "epoch": str(epoch),
                    "model": arm,
                    "loss": scale,
                    "5 %": low,
                    "median": middle,
                    "95 %": high,
                }
                rows.append(row | {"zeros": histogram.zeros})
    return rows


def figure(found: Mapping[tuple[str, int], GradientHistogram], epochs: Sequence[int]) -> Figure:
    """A panel for each epoch: densities, baseline blue and method red, with their medians."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 0.6 + 1.5 * len(epochs)), layout="constrained")
    panels = drawn.subplots(len(epochs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    edges = np.asarray(EDGES)
    # All but a thousandth of the entries at either end: a few tiny ones would squeeze the rest.
    shares = [h.counts.cumsum() / h.counts.sum() for h in found.values() if h.counts.any()]
    held = [edges[np.searchsorted(share, (1e-3, 1 - 1e-3))] for share in shares]
    for panel, epoch in zip(panels, epochs):
        for arm, colour in COLOURS.items():
            histogram = found[arm, epoch]
            panel.stairs(histogram.density(), edges, color=colour, fill=True, alpha=0.35)
            panel.stairs(histogram.density(), edges, color=colour, label=arm)
            if np.isfinite(histogram.percentiles[1]):
                panel.axvline(histogram.percentiles[1], color=colour, linestyle="--", linewidth=1)
        panel.set_ylabel(f"epoch {epoch}")
        panel.grid(alpha=0.3)
    if held:
        panels[0].set_xlim(min(low for low, _ in held) - 0.3, max(high for _, high in held) + 0.4)
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel("log10 |dL/dE|   (dashed: median)")
    return drawn
