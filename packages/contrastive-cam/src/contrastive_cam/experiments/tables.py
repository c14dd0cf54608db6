"""The tables and figures of the supplement, published values beside ours, at any scale.

Without options everything runs on the embedded default at reduced scale; ``--recipe cub --data cub:CUB_200_2011`` and
the like are the published settings.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attnmap_core import cli, experiments
from attnmap_core.data.sources import ImageData, load_data
from attnmap_core.errors import InputError
from attnmap_core.experiments import Run, Runner, RunOptions, mean_and_deviation
from attnmap_core.files import write_json
from attnmap_core.pictures import line_plot, picture_grid, save_picture
from attnmap_core.recipes import run_record
from PIL import Image

from ..config import ContrastiveConfig
from ..evaluate import METRIC_NAMES, evaluate_localizer
from ..pictures import shown_photo
from ..published import FIGURE_1_MEAN, PSYNET, TABLE_1, TABLE_2, TABLE_3
from ..train import localizer_of, train

METRICS = tuple(METRIC_NAMES)
PSYNET_ONLY: dict[str, Any] = {"contrastive_weight": 0.0, "pooling": "avg", "gate": "none"}
WITH_PTAP: dict[str, Any] = {"contrastive_weight": 0.0}
WITH_LOSS: dict[str, Any] = {"pooling": "avg", "gate": "none"}
ROWS: dict[str, dict[str, Any]] = {
    "PsyNet": PSYNET_ONLY,
    "PsyNet + PTAP": WITH_PTAP,
    "PsyNet + contrastive maps": WITH_LOSS,
    "both: the full method": {},
}
"""What is switched on, as changes to a recipe of the full method."""

RUNNER = Runner(module="contrastive_cam", config=ContrastiveConfig, train=train)
write_results = partial(experiments.write_results, distribution="contrastive-cam")


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Train where no finished run is there, and print published values beside ours."""

    recipe: str = "tiny-contrastive"
    """Recipe of the full method: cub, cars, aircraft, dogs, folder, or the embedded default at reduced scale."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of each run."""
    runs: Path = Path("runs/reproduce/runs")
    """Folder of all runs; tables share them."""
    out: Path = Path("runs/reproduce")
    """Folder of the results."""


@dataclass(frozen=True, kw_only=True)
class Fig1Options(Options):
    """Mean CorLoc by the ratio of PTAP, with and without the contrastive loss, and how many channels are active."""

    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Shares of channels, between Max and Avg."""


@dataclass(frozen=True, kw_only=True)
class Table3Options(Options):
    """Baseline and full method with R+S and S+T, on each data set."""

    recipes: tuple[str, ...] = ("tiny-contrastive",)
    """Recipes, one a data set: cub cars aircraft dogs."""
    paddings: tuple[str, ...] = ("zeros", "reflection")
    """What lies outside of transformed photos: the paper's is not known."""


@dataclass(frozen=True, kw_only=True)
class Fig2Options(Options):
    """Heat maps with known (red) and found (green) boxes, baseline and full method."""

    images: tuple[int, ...] = ()
    """Which test photos; spread over the split where not given."""


def _parsed(kind: type[Any], name: str, arguments: list[str]) -> Any:
    options = cli.parse(kind, arguments, command=f"contrastive-cam reproduce {name}")
    if not options.seeds:
        raise InputError("--seeds: expected at least one, such as --seeds 0 1 2")
    return options


def trained(options: Options, changes: Mapping[str, Any], recipe: str | None = None) -> list[Run]:
    """Finished runs of a recipe with changes, one a seed; those that are there are not repeated."""
    recipe = recipe or options.recipe
    given = {**options.overrides(), **changes}
    return [
        RUNNER.finished(options.runs / folder_name(recipe, given) / f"seed{seed}", recipe, seed=seed, **given)
        for seed in options.seeds
    ]


def folder_name(recipe: str, changes: Mapping[str, Any]) -> str:
    """Folder of the runs of one configuration.

    Example:
        >>> folder_name("tiny-contrastive", {"ratio": 0.1, "pooling": "avg"})
        'tiny-contrastive_pooling-avg_ratio-0.1'
    """
    parts = [f"{name}-{value}" for name, value in sorted(changes.items()) if name != "weights"]
    text = "_".join([Path(recipe).stem, *parts])
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in text)
    if len(name) <= 150:
        return name
    return (
        f"{name[:150]}_{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"  # file systems end at 255
    )


def cells(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over seeds by column title."""
    found = mean_and_deviation(runs, METRICS)
    return {METRIC_NAMES[name]: found.get(name) for name in METRICS}


def own_metrics(run: Run) -> dict[str, float]:
    """CorLoc of a run under its own cut."""
    return run.metrics["metrics"]


def published(row: Mapping[str, float], **labels: Any) -> dict[str, Any]:
    """A published row."""
    return {**labels, "source": "published"} | {METRIC_NAMES[name]: row[name] for name in METRICS}


def scale_note(config: ContrastiveConfig) -> str | None:
    """How far a run on the embedded default is from the paper; None on other data."""
    if not config.data.startswith("synthetic"):
        return None
    return (
        f"Reduced scale: {config.data}; {config.backbone} at {config.image_size} px from random weights, "
        f"{config.epochs} epochs. Published: CUB-200-2011 at 224 px with ImageNet weights, 80 epochs assumed. These "
        "numbers show that everything runs; they cannot be compared with published ones."
    )


def activity_note(runs: Sequence[Run]) -> str | None:
    """How many channels were active in the test: what a sweep of the ratio can show at all."""
    facts = [run.metrics["facts"] for run in runs if "active_fraction" in run.metrics["facts"]]
    if not facts:
        return None
    mean, acts = (float(np.mean([fact[name] for fact in facts])) for name in ("active_fraction", "ptap_acts"))
    return (
        f"Active channels: {mean:.0f} % of the channels are above 0 in the mean over pixels; at {acts:.0f} % of the "
        "pixels there are more of them than PTAP keeps. Elsewhere PTAP is the mean of all channels, up to its scale."
    )


# --- Tables ------------------------------------------------------------------------------------------------------


def fig1_command(arguments: list[str]) -> None:
    """``contrastive-cam reproduce fig1 [--ratios 0.1 0.7]``."""
    options: Fig1Options = _parsed(Fig1Options, "fig1", arguments)
    settings: dict[str, dict[str, Any]] = {
        "Max": {"pooling": "max"},
        **{f"{ratio:g}": {"ratio": ratio} for ratio in options.ratios},
        "Avg": {"pooling": "avg"},
    }
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[float]] = {"PsyNet + PTAP": [], "full method": []}
    config: ContrastiveConfig | None = None
    for name, changes in settings.items():
        row: dict[str, Any] = {"ratio": name}
        for series, more in (("PsyNet + PTAP", WITH_PTAP), ("full method", {})):
            runs = trained(options, {**changes, **more})
            config = runs[0].config
            cell = mean_and_deviation([own_metrics(run) for run in runs], ["corloc_mean"])["corloc_mean"]
            row[f"{series}, mean CorLoc"] = cell
            curves[series].append(cell["mean"])
            facts = [run.metrics["facts"] for run in runs]
            row[f"{series}, k matters %"] = float(np.mean([fact.get("ptap_acts", 0.0) for fact in facts]))
            row[f"{series}, active %"] = float(np.mean([fact.get("active_fraction", 0.0) for fact in facts]))
        row["published, full"] = FIGURE_1_MEAN.get(float(name)) if name not in ("Max", "Avg") else None
        rows.append(row)
    assert config is not None
    out = options.out / "fig1"
    write_results(
        out,
        rows,
        title="Figure 1: mean CorLoc by the ratio of PTAP",
        notes=[
            "Published: the bar chart's maximum is at 0.7; other heights are not given as numbers.",
            "k matters: share of pixels where more channels are active than PTAP keeps. A flat curve where that is "
            "small is a finding about the network, not about the method.",
            scale_note(config),
        ],
        seed=options.seeds[0],
    )
    save_picture(
        line_plot(list(settings), curves, x_label="ratio", y_label="mean CorLoc, %"), out / "fig1.png"
    )


def table1_command(arguments: list[str]) -> None:
    """``contrastive-cam reproduce table1``."""
    options: Options = _parsed(Options, "table1", arguments)
    runs = trained(options, {})
    rows: list[dict[str, Any]] = []
    for state, eval_map in (("off", "caam"), ("on", "ptap")):
        rows.append(published(TABLE_1[state], **{"PTAP in the test": state}))
        found = [reevaluated(run, eval_map, options.device) for run in runs]
        rows.append({"PTAP in the test": state, "source": "ours"} | cells(found))
    write_results(
        options.out / "table1",
        rows,
        title="Table 1: PTAP in the test, trained with it",
        notes=[
            "Off: the mean of the unweighted features.",
            activity_note(runs),
            scale_note(runs[0].config),
        ],
        seed=options.seeds[0],
    )


def reevaluated(run: Run, eval_map: str, device: str) -> dict[str, float]:
    """CorLoc of a run's model with another map in inference."""
    from ..cli import load_model

    config: ContrastiveConfig = run.config
    model = load_model(str(run.folder / "model")).to(cli.choose_device(device)).eval()
    model.eval_map = eval_map
    found = evaluate_localizer(
        localizer_of(config, model),
        test_split(config),
        floors=False,
        multi=config.multi,
        batch_size=config.eval_batch_size,
    )
    return found.metrics()


def test_split(config: ContrastiveConfig) -> ImageData:
    """What a run was scored on."""
    return load_data(config.data, "all" if config.whole else "test", **config.source_options())


def table2_command(arguments: list[str]) -> None:
    """``contrastive-cam reproduce table2``."""
    options: Options = _parsed(Options, "table2", arguments)
    rows: list[dict[str, Any]] = []
    runs: list[Run] = []
    for form in ("channel", "pixel"):
        runs = trained(options, {"pooling": "channel"} if form == "channel" else {})
        rows.append(published(TABLE_2[form], pooling=f"{form}-wise"))
        rows.append({"pooling": f"{form}-wise", "source": "ours"} | cells([own_metrics(run) for run in runs]))
    write_results(
        options.out / "table2",
        rows,
        title="Table 2: channel-wise and pixel-wise pooling",
        notes=[activity_note(runs), scale_note(runs[0].config)],
        seed=options.seeds[0],
    )


def table3_command(arguments: list[str]) -> None:
    """``contrastive-cam reproduce table3 [--recipes cub cars aircraft dogs]``."""
    options: Table3Options = _parsed(Table3Options, "table3", arguments)
    rows: list[dict[str, Any]] = []
    notes: list[str | None] = []
    for recipe in options.recipes:
        for tasks, known in TABLE_3.items():
            place = known.get(Path(recipe).stem)
            if place is not None:
                rows.append(
                    _gain({"tasks": tasks, "data": recipe, "padding": None, "source": "published"}, *place)
                )
            for padding in options.paddings:
                scores: list[float] = []
                for more in (PSYNET_ONLY, {}):
                    runs = trained(options, {"tasks": tasks, "padding": padding, **more}, recipe)
                    found = mean_and_deviation([own_metrics(run) for run in runs], ["corloc_iou50"])
                    scores.append(found["corloc_iou50"]["mean"])
                    notes.append(scale_note(runs[0].config))
                rows.append(
                    _gain({"tasks": tasks, "data": recipe, "padding": padding, "source": "ours"}, *scores)
                )
    write_results(
        options.out / "table3",
        rows,
        title="Table 3: CorLoc at IoU 0.5, baseline and full method",
        notes=["What the paper fills undefined regions with is not known: both.", *dict.fromkeys(notes)],
        digits={"baseline": 2, "full": 2, "gain": 2},
        seed=options.seeds[0],
    )


def _gain(labels: dict[str, Any], baseline: float, full: float) -> dict[str, Any]:
    return {**labels, "baseline": float(baseline), "full": float(full), "gain": float(full - baseline)}


def main_command(arguments: list[str]) -> None:
    """``contrastive-cam reproduce main``."""
    from .compare import free_rows

    options: Options = _parsed(Options, "main", arguments)
    rows: list[dict[str, Any]] = []
    runs: list[Run] = []
    for name, changes in ROWS.items():
        runs = trained(options, changes)
        rows.append({"method": name, "trained": "yes"} | cells([own_metrics(run) for run in runs]))
    config: ContrastiveConfig = runs[0].config
    rows += [
        {"method": f"floor: {name}", "trained": "no"}
        | {METRIC_NAMES[metric]: found[metric] for metric in METRICS}
        for name, found in runs[0].metrics["floors"].items()
    ]
    rows += free_rows(config, test_split(config), options.device)
    scheme = config.data.partition(":")[0]
    if scheme in PSYNET:
        rows.append({"method": "PsyNet (VGG16-BN, odd + rotation), published", "CorLoc 0.5": PSYNET[scheme]})
        if scheme == "cub":
            rows.append(
                {"method": "full method, published"} | {METRIC_NAMES[m]: TABLE_1["on"][m] for m in METRICS}
            )
    write_results(
        options.out / "main",
        rows,
        title=f"Methods side by side on {config.data.partition(':')[0]}",
        notes=[
            "Training-free rows read the same network without training, each cut as its own paper says.",
            activity_note(runs),
            scale_note(config),
        ],
        seed=options.seeds[0],
    )


# --- Pictures ----------------------------------------------------------------------------------------------------


def fig2_command(arguments: list[str]) -> None:
    """``contrastive-cam reproduce fig2 [--images 0 3 5]``."""
    from ..cli import load_model

    options: Fig2Options = _parsed(Fig2Options, "fig2", arguments)
    models = {
        name: trained(options, changes)[0] for name, changes in (("PsyNet", PSYNET_ONLY), ("full method", {}))
    }
    config: ContrastiveConfig = next(iter(models.values())).config
    data = test_split(config)
    wanted = options.images or tuple(np.linspace(0, len(data) - 1, min(6, len(data))).astype(int).tolist())
    for index in wanted:
        if not 0 <= index < len(data):
            raise InputError(
                f"--images {index}: no such image; {data.name}, {data.split} has 0 to {len(data) - 1}"
            )
    pictures: list[list[Image.Image]] = []
    for run in models.values():
        model = load_model(str(run.folder / "model")).to(cli.choose_device(options.device)).eval()
        localizer = localizer_of(run.config, model)
        pictures.append([shown_photo(localizer, data, index) for index in wanted])
    out = options.out / "fig2"
    picture = picture_grid(pictures, row_titles=list(models))
    saved = save_picture(picture, out / "fig2.png")
    note = scale_note(config)
    write_json(
        out / "fig2.json",
        {
            "images": list(wanted),
            "models": {name: str(run.folder) for name, run in models.items()},
            "note": note,
            "record": run_record(options.seeds[0], ("contrastive-cam",)),
        },
    )
    sys.stdout.write(f"{note}\n{saved}\n" if note else f"{saved}\n")
