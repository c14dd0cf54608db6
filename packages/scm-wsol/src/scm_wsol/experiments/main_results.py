"""The main results: each method trained as its recipe says and measured under all three protocols.

Published rows do not share a protocol: SCM's numbers are of protocol ``scm`` (map of the predicted class, best
threshold), TS-CAM's of protocol ``tscam`` (map of the true class, one fixed threshold). So each stands beside the
row of ours that was measured the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnmap_core import cli

from ..evaluate import KIND_NAMES, METRIC_NAMES
from ..published import LOCALIZATION
from .runs import Run, RunOptions, iterations_text, mean_and_deviation, scale_note, trained, write_results

METRICS = ("top1_loc", "top5_loc", "gt_known", "top1_cls", "top5_cls", "threshold")
SCM_NAMES = {
    "top1_loc": "loc_acc_thr_50.00_top-1",
    "top5_loc": "loc_acc_thr_50.00_top-5",
    "gt_known": "GT-Known_top-1",
    "top1_cls": "cls_acc_top-1",
    "top5_cls": "cls_acc_top-5",
    "threshold": "det_optThred_thr_50.00_top-1",
}
"""Our names of what the released code prints."""
PUBLISHED = {"scm": ("SCM DeiT-S", "scm"), "tscam": ("TS-CAM DeiT-S", "tscam")}
"""Row of the published table and its protocol, by method."""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Top-1 Loc, Top-5 Loc, GT-known and classification under all three protocols, published rows beside them.

    With CUB-200-2011: --recipes cub-tscam cub-scm --data cub:CUB_200_2011; with ILSVRC2012: --recipes ilsvrc-tscam
    ilsvrc-scm --data imagenet:ILSVRC2012. Without data: the embedded default at reduced scale.
    """

    recipes: tuple[str, ...] = ("tiny-tscam", "tiny-scm")
    """Recipes to run, by name or as .toml files."""
    seeds: tuple[int, ...] = (26,)
    """Seeds of each."""
    out: Path = Path("runs/main-results")
    """Folder of the runs and the table."""


def command(arguments: list[str]) -> None:
    """``scm-wsol reproduce main-results [--recipes ... --data ...]``."""
    options = cli.parse(Options, arguments, command="scm-wsol reproduce main-results")
    rows: list[dict[str, Any]] = []
    notes: list[str | None] = []
    for recipe in options.recipes:
        runs = [
            trained(
                options, options.out / Path(recipe).stem, recipe, seed, protocols=["standard", "scm", "tscam"]
            )
            for seed in options.seeds
        ]
        rows += method_rows(recipe, runs)
        notes.append(scale_note(runs[0].config))
    write_results(
        options.out,
        rows,
        title="Main results, test split, percent",
        notes=[
            "Protocol standard: map of the true class, best threshold; scm: map of the predicted class, best threshold "
            "of each number; tscam: map of the true class, fixed threshold. Published: tables by the authors' code.",
            *dict.fromkeys(notes),
        ],
        digits={"τ": 2},
        seed=options.seeds[0],
    )


def method_rows(recipe: str, runs: list[Run]) -> list[dict[str, Any]]:
    """One row per protocol, then the published one."""
    config = runs[0].config
    name = KIND_NAMES[config.method]
    shared = {
        "seeds": len(runs),
        "p": iterations_text(config),
    }
    rows: list[dict[str, Any]] = []
    for protocol in ("standard", "scm", "tscam"):
        cells = mean_and_deviation([protocol_metrics(run, protocol) for run in runs], METRICS)
        data = runs[0].metrics["data"].partition(":")[0]
        rows.append(
            {"method": name, "data": "embedded default" if config.data.startswith("synthetic") else data}
            | {"protocol": protocol}
            | shared
            | _titled(cells)
        )
    if config.method in PUBLISHED:
        row, protocol = PUBLISHED[config.method]
        of_imagenet = config.data.startswith("imagenet") or Path(recipe).stem.startswith("ilsvrc")
        data_set = "ilsvrc" if of_imagenet else "cub"
        known = {"method": f"{row}, published", "data": data_set.upper(), "protocol": protocol}
        rows.append(known | _titled(LOCALIZATION[data_set][row]))
    return rows


def protocol_metrics(run: Run, protocol: str) -> dict[str, float]:
    """What a run measured under one protocol, by our names."""
    if protocol == "standard":
        return run.own()
    found: dict[str, float] = run.metrics[f"protocol {protocol}"]
    return found if protocol == "tscam" else {name: found[theirs] for name, theirs in SCM_NAMES.items()}


def _titled(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {"τ" if name == "threshold" else METRIC_NAMES[name]: metrics.get(name) for name in METRICS}
