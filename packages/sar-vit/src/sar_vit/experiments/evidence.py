"""Does SAR help from scratch on small data? Rows A, C, E and F of Table 1b, equal budget, seed by seed.

``sar-vit reproduce evidence`` trains on the embedded default, with ``--recipe photos-vit-small --data PHOTOS`` on
photos. Besides accuracy the table has the spatial entropy of the attention and, where objects have outlines, its
overlap with them. Differences to row A are of the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attnmap_core import cli
from attnmap_core.data.sources import load_data
from attnmap_core.errors import InputError
from attnmap_core.experiments import Run, RunOptions, mean_and_deviation, paired_difference, write_results
from attnmap_core.pictures import save_picture

from ..config import SarConfig
from .cases import ROWS, row_changes
from .figures import mosaic
from .tables import DIGITS, RUNNER, TITLES, folder_name, network

METRICS = ("top1", "spatial_entropy", "components", "jaccard")


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Rows A, C, E and F from scratch, mean and standard deviation over seeds. Finished runs are not repeated."""

    recipe: str = "tiny-sar"
    """Recipe of all runs; photos-vit-small for photos."""
    rows: tuple[Literal["A", "B", "C", "D", "E", "F"], ...] = ("A", "C", "E", "F")
    """Rows of Table 1b."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initial weights, order and augmentation; the split is fixed."""
    runs: Path = Path("runs/evidence/runs")
    """Folder of all runs."""
    out: Path = Path("runs/evidence")
    """Folder of the table and the pictures."""
    pictures: int = 4
    """Test photos whose attention is shown."""


def evidence_command(name: str, arguments: list[str]) -> None:
    """``sar-vit reproduce evidence [--recipe photos-vit-small --data PHOTOS]``."""
    options = cli.parse(Options, arguments, command=f"sar-vit reproduce {name}")
    if not options.rows or not options.seeds:
        raise InputError(
            "--rows and --seeds: expected at least one of each, such as --rows A F --seeds 0 1 2"
        )
    runs: dict[str, list[Run]] = {row: [] for row in options.rows}
    for seed in options.seeds:  # seed by seed, so that an interrupted comparison is a fair one
        for row in options.rows:
            changes = {**options.overrides(), **row_changes(row)}
            folder = options.runs / folder_name(options.recipe, changes) / f"seed{seed}"
            runs[row].append(RUNNER.finished(folder, options.recipe, seed=seed, **changes))
    measured = {row: [dict(run.metrics["metrics"]) for run in found] for row, found in runs.items()}
    config: SarConfig = runs[options.rows[0]][0].config
    write_results(
        options.out,
        table_rows(measured),
        title=f"{config.backbone} from scratch on {_data(config)}, test split",
        distribution="sar-vit",
        notes=[
            f"{network(config)}, {config.image_size} px, {config.epochs} epochs, batch {config.batch_size}, "
            f"{len(options.seeds)} seeds: mean ± standard deviation. Differences to row A are paired by seed, with "
            "a 95 % interval of Student's t.",
            *(
                ["Attention maps: plain (row A) and SAR (row F) in attention.png."]
                if _both(options.rows)
                else []
            ),
        ],
        digits={TITLES[metric]: DIGITS.get(metric, 1) for metric in METRICS},
        seed=options.seeds[0],
        records=[
            {"row": row, "seed": seed, **{metric: found.get(metric) for metric in METRICS}}
            for row, several in measured.items()
            for seed, found in zip(options.seeds, several)
        ],
    )
    if _both(options.rows) and options.pictures > 0:
        data = load_data(config.data, "test", **config.source_options())
        chosen = np.linspace(0, len(data) - 1, min(options.pictures, len(data))).astype(int).tolist()
        models = {"plain": runs["A"][0].folder, "SAR": runs["F"][0].folder}
        save_picture(mosaic(models, data, chosen, options.device), options.out / "attention.png")


def table_rows(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """A line for each row: cells of all metrics, and the paired difference of the accuracy to row A.

    Args:
        measured: by row, the metrics of each seed, in one order of seeds.
    """
    rows: list[dict[str, Any]] = []
    for row, several in measured.items():
        cells = mean_and_deviation(several, METRICS)
        line: dict[str, Any] = {"row": row, "what": ROWS[row]}
        line |= {TITLES[metric]: cells[metric] for metric in METRICS if metric in cells}
        if "A" in measured and row != "A":
            line["top-1 minus A"] = paired_difference(
                [found["top1"] for found in several], [found["top1"] for found in measured["A"]]
            )
        rows.append(line)
    return rows


def _both(rows: Sequence[str]) -> bool:
    return {"A", "F"} <= set(rows)


def _data(config: SarConfig) -> str:
    scheme, colon, rest = config.data.partition(":")
    return config.data if scheme == "synthetic" or not colon else f"{scheme}:{Path(rest).name}"
