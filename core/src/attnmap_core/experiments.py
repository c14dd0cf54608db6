"""What experiments share: training runs done once, means over seeds, tables for people and programs."""

from __future__ import annotations

import csv
import io
import json
import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import check_same_run
from .errors import InputError
from .files import read_json, write_json, write_text
from .recipes import load_recipe, plain_values, run_record

logger = logging.getLogger(__name__)


# --- Runs -------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: of the run.
        config: its configuration.
        metrics: what ``metrics.json`` holds.
    """

    folder: Path
    config: Any
    metrics: dict[str, Any]

    def epochs(self) -> list[dict[str, Any]]:
        """The records of the epochs, with the metrics of the split that chooses."""
        lines = (self.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == "epoch"]


@dataclass(frozen=True, kw_only=True)
class Runner:
    """How the runs of a package are made and found again.

    Attributes:
        module: import package that holds the recipes.
        config: dataclass of a run.
        train: ``train(config, resume=...)`` that leaves a run folder with ``recipe.toml`` and ``metrics.json``.
        comparable: of a config, the plain values that two runs of one configuration share.
    """

    module: str
    config: type[Any]
    train: Callable[..., Any]
    comparable: Callable[[Any], dict[str, Any]] = plain_values

    def finished(self, folder: Path, recipe: str, **overrides: Any) -> Run:
        """The run of a recipe with changed fields: a finished one is read, an interrupted one resumed.

        Raises:
            InputError: for a run of another configuration in its place.
        """
        config = load_recipe(self.module, recipe, self.config, {**overrides, "output_dir": str(folder)})
        metrics = folder / "metrics.json"
        if metrics.is_file():
            found = load_recipe(self.module, str(folder / "recipe.toml"), self.config)
            may_change = self.config.may_change_on_resume
            check_same_run(folder, self.comparable(found), self.comparable(config), may_change)
        else:
            logger.info("run %s", folder)
            self.train(config, resume=folder.exists())
        return Run(folder, config, read_json(metrics))

    def finished_together(self, asked: Sequence[tuple[Path, str, Mapping[str, Any]]], jobs: int) -> list[Run]:
        """Several runs, up to ``jobs`` at once, each in a process of its own; their numbers are those of one at a time.

        Args:
            asked: folder, recipe and changed fields of each; no folder twice.
            jobs: 1 runs them here, one after the other.

        Raises:
            InputError: for ``jobs`` below 1, a folder asked for twice (the same seed), and as :meth:`finished`; runs
                that have not begun are then left out.
            KeyboardInterrupt: at once, without the runs at work; called again, they go on from their checkpoints.
        """
        if jobs < 1:
            raise InputError(f"jobs {jobs}: expected 1 or more; 1 is one run at a time")
        if len({folder for folder, _, _ in asked}) < len(asked):
            raise InputError("seeds: expected each once; leave out what is given twice")
        if jobs == 1 or len(asked) < 2:
            return [self.finished(folder, recipe, **changes) for folder, recipe, changes in asked]
        fresh = multiprocessing.get_context("spawn")  # a fork would share CUDA and the state of Accelerate
        level, others = logging.getLogger().level, set(multiprocessing.active_children())
        with ProcessPoolExecutor(min(jobs, len(asked)), fresh, _start_worker, (level,)) as pool:
            try:
                several = [
                    pool.submit(self.finished, folder, recipe, **changes) for folder, recipe, changes in asked
                ]
                return [one.result() for one in several]
            except BaseException as error:  # leaving the pool would first make all runs that wait
                pool.shutdown(wait=False, cancel_futures=True)
                if not isinstance(error, Exception):  # an interrupt: nor does anybody wait for those at work
                    for worker in set(multiprocessing.active_children()) - others:
                        worker.terminate()
                raise


def _start_worker(level: int) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes: the first one ends the others
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def mean_and_deviation(
    rows: Sequence[Mapping[str, float]], names: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) over seeds, of the metrics that all rows have.

    Example:
        >>> mean_and_deviation([{"top1": 60.0}, {"top1": 64.0}], ["top1", "top5"])
        {'top1': {'mean': 62.0, 'std': 2.8284271247461903, 'n': 2}}
    """
    result: dict[str, dict[str, float]] = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        if values and len(values) == len(rows):
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            result[name] = {"mean": float(np.mean(values)), "std": spread, "n": len(values)}
    return result


def paired_difference(ours: Sequence[float], theirs: Sequence[float], digits: int = 1) -> str:
    """Mean difference of pairs with its 95 % interval of Student's t; without one for a single pair.

    Args:
        ours, theirs: values of the same seeds, in one order.
        digits: decimals.

    Example:
        >>> paired_difference([61.0, 63.0, 65.0], [60.0, 60.0, 63.0])
        '+2.0 [-0.5, +4.5]'
    """
    from scipy import stats

    difference = np.subtract(ours, theirs)
    mean = float(difference.mean())
    if len(difference) < 2:
        return f"{mean:+.{digits}f}"
    half = float(stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference)))
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def shown(cell: Mapping[str, float] | None, digits: int = 1) -> str:
    """``52.7 ± 0.3``; without a spread for a single value, a dash for none.

    Example:
        >>> shown({"mean": 52.71, "std": 0.34, "n": 3}), shown({"mean": 1.0, "std": 0.0, "n": 1}), shown(None)
        ('52.7 ± 0.3', '1.0', '–')
    """
    if cell is None:
        return "–"
    mean = f"{cell['mean']:.{digits}f}"
    return f"{mean} ± {cell['std']:.{digits}f}" if cell["n"] > 1 else mean


# --- Results ----------------------------------------------------------------------------------------------------------


Row = Mapping[str, Any]
"""Text, numbers, None, or cells of :func:`mean_and_deviation`, by column title."""


def write_results(
    out: Path,
    rows: Sequence[Row],
    *,
    title: str,
    distribution: str,
    notes: Sequence[str | None] = (),
    digits: Mapping[str, int] | None = None,
    tables: Mapping[str, Sequence[Row]] | None = None,
    seed: int | None = None,
    records: Sequence[Row] = (),
) -> None:
    """Write ``table.json``, ``table.csv`` and ``table.md`` into ``out`` and print the table.

    Args:
        out: the folder.
        rows: of the table; all of them go into JSON and CSV, with all their decimals.
        title: above the table.
        distribution: whose version goes into the record of the launch.
        notes: lines below it; None is left out.
        digits: decimals shown, by column; 1 where not given.
        tables: what is shown in place of ``rows``, by title, where people need another arrangement.
        seed: for the record of the launch.
        records: single numbers for programs, which go into JSON only.
    """
    said = [note for note in notes if note is not None]
    record = run_record(seed, (distribution,))
    table: dict[str, Any] = {"title": title, "rows": list(rows), "notes": said, "record": record}
    write_json(out / "table.json", table | ({"records": list(records)} if records else {}))
    write_text(out / "table.csv", _csv(rows))
    written, printed = [f"# {title}"], [title]
    for heading, part in (tables or {"": rows}).items():
        texts = shown_rows(part, digits)
        written += [f"## {heading}"] * bool(heading) + [markdown_table(texts)]
        printed += [f"\n{heading}"] * bool(heading) + [format_table(texts)]
    write_text(out / "table.md", "\n\n".join([*written, *said]) + "\n")
    sys.stdout.write("\n".join([*printed, *(f"\n{note}" for note in said), f"\n{out}"]) + "\n")


def shown_rows(rows: Sequence[Row], digits: Mapping[str, int] | None = None) -> list[dict[str, str]]:
    """Rows as texts: cells by :func:`shown`, numbers with as many decimals as ``digits`` says, by column (else 1).

    Example:
        >>> shown_rows([{"row": "A", "E": {"mean": 0.24, "std": 0.011, "n": 3}, "top-1": 71.0}], {"E": 3})
        [{'row': 'A', 'E': '0.240 ± 0.011', 'top-1': '71.0'}]
    """
    return [{name: _shown(value, (digits or {}).get(name, 1)) for name, value in row.items()} for row in rows]


def format_table(rows: Sequence[Row]) -> str:
    """Rows as aligned text; numbers with one decimal, what is missing as a dash.

    Example:
        >>> print(format_table([{"": "SCM", "GT-known": 61.25}, {"": "floor"}]))
               GT-known
        SCM        61.2
        floor         –
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(_line(line, widths) for line in cells)


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, as :func:`format_table` shows them.

    Example:
        >>> print(markdown_table([{"row": "A", "top-1": 74.0}]))
        | row | top-1 |
        | --- | --- |
        | A | 74.0 |
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(value: Any, digits: int) -> str:
    if isinstance(value, Mapping):
        return shown(value, digits)  # pyright: ignore[reportUnknownArgumentType]
    return "–" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths))
    )
    return "  ".join([first, *rest]).rstrip()


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
