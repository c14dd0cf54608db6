"""Table 1: the same pipeline with and without the cross-attention blocks, beside published rows.

``crossattn-dml reproduce main`` trains on the embedded default; ``--recipe cub-lmu --data cub:CUB_200_2011`` is the
paper's setting. The values of the paper's own table are not known to us, so that no row claims to be it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnmap_core import cli
from attnmap_core.errors import InputError
from attnmap_core.experiments import Run, RunOptions, mean_and_deviation, paired_difference

from ..evaluate import title_of
from ..published import PAPER, published_rows
from .runs import BASELINE, METHOD, finished, recipe_config, scale_note, write_results

ARMS: dict[str, dict[str, Any]] = {"without blocks": BASELINE, "with blocks": METHOD}


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """With and without the blocks, mean and standard deviation over seeds. Finished runs are not repeated."""

    recipe: str = "tiny-stack"
    """Recipe of all runs; cub-lmu, cars-lmu, sop-lmu, inshop-lmu are the paper's setting."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of initial weights, order and augmentation; the classes are fixed."""
    out: Path = Path("runs/main")
    """Folder of the runs and the table."""


def main_command(arguments: list[str]) -> None:
    """``crossattn-dml reproduce main [--recipe cub-lmu --data cub:PATH]``."""
    options = cli.parse(Options, arguments, command="crossattn-dml reproduce main")
    if not options.seeds:
        raise InputError("--seeds: expected at least one, such as --seeds 0 1 2 3 4")
    runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:  # seed by seed, so that an interrupted comparison is a fair one
        for arm, changes in ARMS.items():
            runs[arm].append(
                finished(options, options.out / arm.replace(" ", "-"), options.recipe, seed, **changes)
            )
    config = recipe_config(options.recipe, options.overrides())
    measured = {arm: [percents(run.metrics["metrics"]) for run in found] for arm, found in runs.items()}
    rows = table_rows(measured)
    published = published_rows(config.data)
    write_results(
        options.out,
        [*({"model": row.pop(""), **row} for row in published), *rows],
        title=f"{config.backbone} on {config.data}, unseen classes, percent",
        notes=[
            f"{len(options.seeds)} seeds, last epoch of each: mean ± standard deviation; differences are paired "
            "by seed, with a 95 % interval of Student's t.",
            PAPER if published else None,
            scale_note(config),
        ],
        digits=dict.fromkeys((title for row in rows for title in row), 2),
        seed=options.seeds[0],
        records=[
            {"arm": arm, "seed": seed, **values}
            for arm, several in measured.items()
            for seed, values in zip(options.seeds, several)
        ],
    )


def percents(found: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a run's last epoch by their titles, in percent."""
    last = {name.removeprefix("last_"): value for name, value in found.items() if name.startswith("last_")}
    return {
        title_of(name): 100 * value for name, value in (last or found).items() if not name.endswith("_std")
    }


def table_rows(
    measured: Mapping[str, Sequence[Mapping[str, float]]], compared: Sequence[str] = ("R@1", "mAP@R")
) -> list[dict[str, Any]]:
    """A line for each arm: cells of all metrics, and paired differences of some to the first arm.

    Args:
        measured: by arm, the metrics of each seed, in one order of seeds.
        compared: metrics whose difference is shown.
    """
    first = next(iter(measured))
    rows: list[dict[str, Any]] = []
    for arm, several in measured.items():
        line: dict[str, Any] = {"model": arm, **mean_and_deviation(several, list(several[0]))}
        if arm != first:
            for name in compared:
                ours, theirs = ([row[name] for row in measured[key]] for key in (arm, first))
                line[f"{name} difference"] = paired_difference(ours, theirs, digits=2)
        rows.append(line)
    return rows
