"""How many Newton-Schulz iterations: one SCM per p, all else equal (supplement 1.1, figure 3).

A larger p is a better inverse of the Laplacian, so attention travels further. Which p is best is read from GT-known
at the best threshold; how broad the map is, from the share of pixels above that threshold. (The supplement reads the
breadth from the threshold itself: for one fixed map a larger threshold gives a *smaller* region, so a large optimum
means that the map is broad.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from attnmap_core import cli
from attnmap_core.boxes import score_map_to_uint8, threshold_levels, upsample_score_map
from attnmap_core.data.loaders import SampleDataset, eval_loader
from attnmap_core.data.sources import ImageData
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.pictures import line_plot, save_picture, threshold_curves

from ..evaluate import METRIC_NAMES, Evaluation, evaluate_model
from ..model import TSCAM
from ..published import ABLATE_NS
from .runs import (
    RunOptions,
    experiment_data,
    mean_and_deviation,
    open_model,
    scale_note,
    trained,
    write_results,
)

METRICS = ("gt_known", "threshold", "region_area", "max_box_acc_v2", "pxap")
TITLES = METRIC_NAMES | {"threshold": "optimum τ", "region_area": "region area"}


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """One SCM per number of Newton-Schulz iterations: GT-known, its best threshold and the region it bounds."""

    recipe: str = "tiny-scm"
    """Recipe of all runs; cub-scm is the paper's."""
    iterations: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of iterations p, the same in all blocks of a run."""
    stable_shrink: bool = True
    """The filter's series for small arguments, in all runs: in single precision p <= 2 would otherwise learn from
    rounding errors."""
    seeds: tuple[int, ...] = (26,)
    """Seeds of each p."""
    split: Literal["val", "test"] = "test"
    """Split to measure; the paper's figure is on validation images."""
    out: Path = Path("runs/ablate-ns")
    """Folder of the runs, the table and the figures."""


def command(arguments: list[str]) -> None:
    """``scm-wsol reproduce ablate-ns``, also as ``fig-ns``: finished runs are not repeated."""
    options = cli.parse(Options, arguments, command="scm-wsol reproduce ablate-ns")
    counts = sorted(set(options.iterations))
    if not counts or counts[0] < 0:
        raise InputError(
            f"--iterations {list(options.iterations)}: expected whole numbers from 0, such as 1 2 4 8 16"
        )
    config, data = experiment_data(options, options.recipe, options.split)
    if config.method != "scm":
        raise InputError(
            f"--recipe {options.recipe}: its method is {config.method}; this table needs an SCM recipe"
        )
    cells: dict[int, dict[str, dict[str, float]]] = {}
    curves: dict[str, dict[float, Any]] = {}
    for p in counts:
        measured: list[dict[str, float]] = []
        for seed in options.seeds:
            changes = {"iterations": [p], "stable_shrink": options.stable_shrink}
            run = trained(options, options.out / f"p{p}", options.recipe, seed, **changes)
            evaluation, metrics = measure(
                open_model(run.folder, options.device), data, run.config.threshold_step
            )
            measured.append(metrics)
            curves.setdefault(f"p = {p}", evaluation.kinds[evaluation.own].box_accuracy_curves())
        cells[p] = mean_and_deviation(measured, METRICS)
    write_results(
        options.out,
        [{"p": p} | {TITLES[name]: cells[p][name] for name in METRICS if name in cells[p]} for p in counts],
        title=f"Newton-Schulz iterations p, {data.name}, {data.split}, percent",
        notes=[
            "GT-known at the best threshold τ; region area: pixels whose true class's map is above τ, in percent.",
            f"Published: {ABLATE_NS}.",
            f"Here, {len(options.seeds)} seed(s): {finding(cells)}.",
            scale_note(config),
        ],
        digits={"optimum τ": 2},
        seed=options.seeds[0],
    )
    save_picture(figure(cells), options.out / "iterations.png")
    save_picture(
        threshold_curves(curves, np.arange(0, 1, config.threshold_step)), options.out / "thresholds.png"
    )


def measure(model: TSCAM, data: ImageData, step: float) -> tuple[Evaluation, dict[str, float]]:
    """Standard metrics, and ``region_area`` at their threshold.

    Raises:
        InputError: if the data have no boxes.
    """
    evaluation = evaluate_model(model, data, step=step)
    threshold = evaluation.threshold()
    if threshold is None:
        raise InputError(f"{data.name}, {data.split}: no boxes; this table needs images with boxes")
    return evaluation, evaluation.metrics() | {"region_area": region_area(model, data, threshold)}


@torch.inference_mode()
def region_area(model: TSCAM, data: ImageData, threshold: float, *, batch_size: int = 64) -> float:
    """Mean percent of pixels where the true class's map exceeds ``threshold``."""
    samples = SampleDataset(data, eval_transform(model.preprocessing), seed=0)
    device = next(model.parameters()).device
    shares: list[float] = []
    for batch in eval_loader(samples, batch_size):
        maps = model.maps(batch["images"].to(device))
        raw = model.class_maps(maps, batch["labels"].to(device)).double().cpu().numpy()
        for values in map(score_map_to_uint8, upsample_score_map(raw, model.preprocessing.size)):
            shares.append(float((values > threshold_levels(threshold, int(values.max()))).mean()))
    return 100 * float(np.mean(shares))


def finding(cells: dict[int, dict[str, dict[str, float]]]) -> str:
    """Which p is best, and by how much, in the words of the published statement."""
    ranked = sorted(cells, key=lambda p: -cells[p]["gt_known"]["mean"])
    broadest = max(cells, key=lambda p: cells[p]["region_area"]["mean"])
    if len(ranked) == 1:
        return f"only p = {ranked[0]} was run"
    lead = cells[ranked[0]]["gt_known"]["mean"] - cells[ranked[1]]["gt_known"]["mean"]
    return (
        f"p = {ranked[0]} is best, {lead:.1f} points GT-known above p = {ranked[1]}; "
        f"the region is largest at p = {broadest}"
    )


def figure(cells: dict[int, dict[str, dict[str, float]]]) -> Any:
    """GT-known at the left, threshold and region area (both shares) at the right, over p."""

    def column(name: str, key: str, scale: float = 1.0) -> list[float]:
        return [scale * cell[name][key] for cell in cells.values()]

    several = any(cell["gt_known"]["n"] > 1 for cell in cells.values())
    lines = {
        "GT-known": ("gt_known", 1.0),
        "optimum τ": ("threshold", 1.0),
        "region area": ("region_area", 0.01),
    }
    means = {title: column(name, "mean", scale) for title, (name, scale) in lines.items()}
    spread = (
        {title: column(name, "std", scale) for title, (name, scale) in lines.items()} if several else None
    )
    return line_plot(
        [str(p) for p in cells],
        {"GT-known": means.pop("GT-known")},
        x_label="Newton-Schulz iterations p",
        y_label="GT-known at the best τ, %",
        errors=spread,
        twin=means,
        twin_label="threshold τ; share of the image above it",
    )
