"""CAM, TS-CAM and SCM fine-tuned on real photos with equal budget: the evidence behind the default recipe.

Twelve animal classes of Caltech-101 with a box and an outline each, a fixed 70/30 split by image, and a ViT-Tiny with
ImageNet weights. Rows differ in one thing at a time. Objects are large and central there, so box metrics hardly
separate anything from the centre prior; the mask metrics (PxAP, mIoU) and IoU 0.7 do.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnmap_core import cli
from attnmap_core.errors import InputError
from attnmap_core.experiments import format_table, markdown_table
from attnmap_core.files import read_json, write_json, write_text
from attnmap_core.recipes import run_record

from ..evaluate import KIND_NAMES, METRIC_NAMES
from .runs import mean_and_deviation, run_once, shown

METRICS = (
    "top1_cls",
    "top1_loc",
    "box_acc_iou30",
    "gt_known",
    "box_acc_iou70",
    "max_box_acc_v2",
    "pxap",
    "miou",
)
LONG: dict[str, Any] = {"epochs": 10, "decay_epochs": [8]}
LARGE: dict[str, Any] = {"image_size": 224, "resize": 256}
FAST_SCALARS: dict[str, Any] = {"detach_ns_init": False, "lr_scales": {"calibration.*": 100.0}}
SCM: dict[str, Any] = {"method": "scm"}
STABLE: dict[str, Any] = {"method": "scm", "stable_shrink": True}

ROWS: dict[str, dict[str, Any]] = {
    "TS-CAM": {"method": "tscam"},
    "SCM p=4": SCM,
    "SCM p=4, stable shrink": STABLE,
    "TS-CAM, logits x4": {"method": "tscam", "logit_scale": 4.0},
    "SCM p=16, mean-1 weights": STABLE | {"iterations": [16], "mean_one_weights": True},
    "SCM p=4, mean-1 weights": STABLE | {"mean_one_weights": True},
    "SCM p=2": STABLE | {"iterations": [2]},
    "SCM p=8": STABLE | {"iterations": [8]},
    "SCM p=16": STABLE | {"iterations": [16]},
    "SCM release (16,4,4,4)": STABLE | {"iterations": [16, 4, 4, 4]},
    "SCM p=4, full gradient, scalars x100": STABLE | FAST_SCALARS,
    "TS-CAM, 10 epochs": {"method": "tscam"} | LONG,
    "SCM p=4, 10 epochs": STABLE | LONG,
    "TS-CAM, 224 px": {"method": "tscam"} | LARGE,
    "SCM p=4, 224 px": STABLE | LARGE,
}
"""Changes to the recipe, by row; what is not named is the same in all."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune and compare on real photos; finished runs are not repeated."""

    data: str
    """``caltech101:PATH`` with images and annotations of the twelve animal classes."""
    weights: str
    """Weights of vit_tiny_patch16_224.augreg_in21k_ft_in1k (.safetensors)."""
    out: Path = Path("runs/real-photos")
    """Folder of all runs, results.json and table.md."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of head, order and augmentation; the split is fixed."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows to train."""
    threads: int = 0
    """CPU threads of a run; 0 leaves PyTorch's choice."""
    table_only: bool = False
    """Only gather the runs that are finished."""


def command(arguments: list[str]) -> None:
    """``scm-wsol reproduce real-photos --data ... --weights ...``."""
    options = cli.parse(Options, arguments, command="scm-wsol reproduce real-photos")
    for row in options.rows:
        if row not in ROWS:
            raise InputError(f"{row}: no such row; known: {'; '.join(ROWS)}")
    split = str(files("scm_wsol") / "experiments" / "caltech101_animals_split.json")
    if not options.table_only:
        for seed in options.seeds:
            for row in options.rows:
                run_once(
                    options.out / slug(row) / f"seed{seed}",
                    "photos-tscam",
                    data=options.data,
                    data_options={"split_file": split},
                    weights=options.weights,
                    seed=seed,
                    threads=options.threads,
                    **ROWS[row],
                )
    results = gather(options.out)
    write_json(options.out / "results.json", results | {"record": run_record(options.seeds[0])})
    table = markdown(results)
    write_text(options.out / "table.md", table)
    sys.stdout.write(
        format_table([dict(zip(("row", *header()), line)) for line in table_rows(results)]) + "\n"
    )


def slug(row: str) -> str:
    """Folder name of a row."""
    return "".join(c if c.isalnum() else "-" for c in row.lower()).strip("-")


def gather(out: Path) -> dict[str, Any]:
    """Means over the finished seeds, for each row and kind of score map, and the floors."""
    rows: list[dict[str, Any]] = []
    floors: dict[str, Any] = {}
    for row in ROWS:
        found = {
            path.parent.name: read_json(path) for path in sorted((out / slug(row)).glob("seed*/metrics.json"))
        }
        if not found:
            continue
        runs = list(found.values())
        floors = runs[0]["floors"]
        for kind in runs[0]["protocol standard"]:
            measured = [run["protocol standard"][kind] for run in runs]
            cells = mean_and_deviation(measured, METRICS)
            rows.append({"row": row, "map": kind, "own": kind == runs[0]["map"], "seeds": list(found), "metrics": cells,
                         "values": [{name: run[name] for name in METRICS} for run in measured]})  # fmt: skip
    if not rows:
        raise InputError(f"{out}: no finished run; run without --table-only first")
    return {
        "rows": rows,
        "floors": {name: {m: v for m, v in f.items() if m in METRICS} for name, f in floors.items()},
    }


def header() -> list[str]:
    """Column titles."""
    return ["map", "seeds", *(METRIC_NAMES[name] for name in METRICS)]


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Every row with its own map; CAM and ATT for plain TS-CAM only; then the floors."""
    lines: list[list[str]] = []
    for item in results["rows"]:
        if item["own"] or (item["row"] == "TS-CAM" and item["map"] in ("cam", "att")):
            cells = [shown(item["metrics"].get(name)) for name in METRICS]
            lines.append([item["row"], KIND_NAMES[item["map"]], str(len(item["seeds"])), *cells])
    for floor, metrics in results["floors"].items():
        cells = [f"{metrics[name]:.1f}" if name in metrics else "–" for name in METRICS]
        lines.append([f"floor: {floor}", "–", "–", *cells])
    return lines


def markdown(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    return markdown_table([dict(zip(("training", *header()), line)) for line in table_rows(results)]) + "\n"
