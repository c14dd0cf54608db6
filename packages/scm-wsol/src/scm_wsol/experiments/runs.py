"""What the experiments share: training runs that are done once, and means over seeds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attnmap_core.files import read_json
from attnmap_core.recipes import load_recipe

from ..config import ScmConfig
from ..train import train

logger = logging.getLogger(__name__)


def run_once(folder: Path, recipe: str, **overrides: Any) -> dict[str, Any]:
    """Train a recipe into ``folder`` and return its ``metrics.json``.

    A finished run is read, an interrupted one resumed; another configuration in its place is an error.
    """
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        logger.info("run %s", folder)
        config = load_recipe("scm_wsol", recipe, ScmConfig, {**overrides, "output_dir": str(folder)})
        train(config, resume=folder.exists())
    return read_json(metrics)


def mean_and_deviation(rows: Sequence[Mapping[str, float]], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) over seeds, of the metrics that all rows have."""
    result: dict[str, dict[str, float]] = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        if len(values) == len(rows):
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            result[name] = {"mean": float(np.mean(values)), "std": spread, "n": len(values)}
    return result


def shown(cell: Mapping[str, float] | None) -> str:
    """``52.7 ± 0.3``; without a spread for a single value, a dash for none."""
    if cell is None:
        return "–"
    return f"{cell['mean']:.1f} ± {cell['std']:.1f}" if cell["n"] > 1 else f"{cell['mean']:.1f}"
