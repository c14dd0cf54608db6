"""What the experiments share: training runs done once, means over seeds, results for people and programs."""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from attnmap_core import cli
from attnmap_core.checkpoint import check_same_run
from attnmap_core.data.sources import ImageData
from attnmap_core.errors import InputError
from attnmap_core.files import read_json, write_json, write_text
from attnmap_core.recipes import load_recipe, plain_values, run_record

from ..cli import load_model
from ..config import ScmConfig
from ..evaluate import check_labels, format_table
from ..model import TSCAM
from ..train import load_split, train

logger = logging.getLogger(__name__)


# --- Runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every experiment takes that trains where no trained model is given."""

    data: str = ""
    """Data source; the recipe's own where not given."""
    data_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Options of the data source, such as split_file."""
    weights: str = ""
    """Local file of pretrained backbone weights, instead of what the recipe says."""
    epochs: int | None = None
    """Epochs of each run; the recipe's own where not given."""
    changes: dict[str, bool | int | float | str] = field(default_factory=dict[str, bool | int | float | str])
    """Other fields of the recipe, such as --changes.lr 1e-4."""
    device: str = "auto"
    """Where finished models are looked at: cpu, cuda, mps or auto."""

    def overrides(self) -> dict[str, Any]:
        """The recipe's fields that these options replace."""
        given: dict[str, Any] = dict(self.changes)
        if self.data:
            given["data"] = self.data
        if self.data_options:
            given["data_options"] = dict(self.data_options)
        if self.weights:
            given |= {"weights": self.weights, "pretrained": False}
        if self.epochs is not None:
            given["epochs"] = self.epochs
        return given


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    config: ScmConfig
    metrics: dict[str, Any]

    def own(self) -> dict[str, float]:
        """Standard metrics of the model's own score map, on the test split; percent."""
        return self.metrics["protocol standard"][self.metrics["map"]]

    def epochs(self) -> list[dict[str, Any]]:
        """The records of the epochs, with the metrics of the split that chooses."""
        lines = (self.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == "epoch"]


def run_once(folder: Path, recipe: str, **overrides: Any) -> dict[str, Any]:
    """Train a recipe into ``folder`` and return its ``metrics.json``.

    A finished run is read, an interrupted one resumed; another configuration in its place is an error.
    """
    return finished_run(folder, recipe, **overrides).metrics


def finished_run(folder: Path, recipe: str, **overrides: Any) -> Run:
    """:func:`run_once` that also gives the configuration and the folder."""
    config = load_recipe("scm_wsol", recipe, ScmConfig, {**overrides, "output_dir": str(folder)})
    metrics = folder / "metrics.json"
    if metrics.is_file():
        found = load_recipe("scm_wsol", str(folder / "recipe.toml"), ScmConfig)
        check_same_run(folder, _comparable(found), _comparable(config), ScmConfig.may_change_on_resume)
    else:
        logger.info("run %s", folder)
        train(config, resume=folder.exists())
    return Run(folder, config, read_json(metrics))


def _comparable(config: ScmConfig) -> dict[str, Any]:
    # "last" with a split to choose on means "gt_known", and is written so into the run folder.
    values = plain_values(config)
    return values | {"select_by": "last" if config.select_by == "gt_known" else config.select_by}


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
    check_labels(opened, data)
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


# --- Numbers ------------------------------------------------------------------------------------------------------


def mean_and_deviation(
    rows: Sequence[Mapping[str, float]], names: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) over seeds, of the metrics that all rows have."""
    result: dict[str, dict[str, float]] = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        if len(values) == len(rows):
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            result[name] = {"mean": float(np.mean(values)), "std": spread, "n": len(values)}
    return result


def shown(cell: Mapping[str, float] | None, digits: int = 1) -> str:
    """``52.7 ± 0.3``; without a spread for a single value, a dash for none."""
    if cell is None:
        return "–"
    mean = f"{cell['mean']:.{digits}f}"
    return f"{mean} ± {cell['std']:.{digits}f}" if cell["n"] > 1 else mean


# --- Results ------------------------------------------------------------------------------------------------------


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


Row = Mapping[str, Any]
"""Text, numbers, None, or cells of :func:`mean_and_deviation`, by column title."""


def write_results(
    out: Path,
    rows: Sequence[Row],
    *,
    title: str,
    notes: Sequence[str | None] = (),
    digits: Mapping[str, int] | None = None,
    tables: Mapping[str, Sequence[Row]] | None = None,
    seed: int | None = None,
) -> None:
    """Write ``table.json``, ``table.csv`` and ``table.md`` into ``out`` and print the table.

    Args:
        out: the folder.
        rows: of the table; all of them go into JSON and CSV, with all their decimals.
        title: above the table.
        notes: lines below it; None is left out.
        digits: decimals shown, by column; 1 where not given.
        tables: what is shown in place of ``rows``, by title, where people need another arrangement.
        seed: for the record of the launch.
    """
    said = [note for note in notes if note is not None]
    record = run_record(seed, ("scm-wsol",))
    write_json(out / "table.json", {"title": title, "rows": list(rows), "notes": said, "record": record})
    write_text(out / "table.csv", _csv(rows))
    written, printed = [f"# {title}"], [title]
    for heading, part in (tables or {"": rows}).items():
        texts = [
            {name: _shown(value, (digits or {}).get(name, 1)) for name, value in row.items()} for row in part
        ]
        written += [f"## {heading}"] * bool(heading) + [_markdown(texts)]
        printed += [f"\n{heading}"] * bool(heading) + [format_table(texts)]
    write_text(out / "table.md", "\n\n".join([*written, *said]) + "\n")
    sys.stdout.write("\n".join([*printed, *(f"\n{note}" for note in said), f"\n{out}"]) + "\n")


def _shown(value: Any, digits: int) -> str:
    if isinstance(value, Mapping):
        return shown(value, digits)
    return "–" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "–") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _csv(rows: Sequence[Row]) -> str:
    flat: list[dict[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {}
        for name, value in row.items():
            if isinstance(value, Mapping):
                line |= {name: value["mean"]} | ({f"{name} std": value["std"]} if value["n"] > 1 else {})
            else:
                line[name] = value
        flat.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for line in flat for name in line)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
