"""Runs that are made once: alone, several at once, and what is refused."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from attnmap_core.errors import InputError
from attnmap_core.experiments import Runner

TOY = """
import json, os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from attnmap_core.errors import InputError
from attnmap_core.recipes import resolved_toml

@dataclass(kw_only=True)
class Config:
    may_change_on_resume: ClassVar = frozenset({"output_dir"})
    output_dir: Path = Path("run")
    seed: int = 0

def train(config, resume=False):
    if config.seed == 13:
        raise InputError("seed 13: bad luck")
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "recipe.toml").write_text(resolved_toml(config))
    (config.output_dir / "metrics.json").write_text(json.dumps({"seed": config.seed, "process": os.getpid()}))
"""


@pytest.fixture
def runner(tmp_path, monkeypatch) -> Runner:
    """One whose training is a file that says its seed and its process."""
    folder = tmp_path / "toy_runs"
    (folder / "recipes").mkdir(parents=True)
    (folder / "__init__.py").write_text(TOY)
    (folder / "recipes" / "toy.toml").write_text("seed = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_runs", raising=False)
    toy: Any = importlib.import_module("toy_runs")
    return Runner(module="toy_runs", config=toy.Config, train=toy.train)


def asked(out: Path, *seeds: int) -> list[tuple[Path, str, dict[str, Any]]]:
    return [(out / str(seed), "toy", {"seed": seed}) for seed in seeds]


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_come_back_in_order_and_are_made_once(runner, tmp_path, jobs):
    runs = runner.finished_together(asked(tmp_path / "out", 3, 1, 2), jobs)
    assert [run.metrics["seed"] for run in runs] == [3, 1, 2]
    assert [run.folder.name for run in runs] == ["3", "1", "2"]
    assert ({run.metrics["process"] for run in runs} == {os.getpid()}) == (jobs == 1)
    again = runner.finished_together(asked(tmp_path / "out", 1, 2, 4), jobs)
    assert [run.metrics for run in again[:2]] == [run.metrics for run in runs[1:]]
    assert again[2].metrics["seed"] == 4


@pytest.mark.parametrize("jobs", [1, 2])
def test_errors_of_a_run_come_back(runner, tmp_path, jobs):
    with pytest.raises(InputError, match="seed 13: bad luck"):
        runner.finished_together(asked(tmp_path / "out", 13, 1), jobs)
    assert not (tmp_path / "out" / "13").exists()


def test_what_is_refused(runner, tmp_path):
    with pytest.raises(InputError, match="jobs 0: expected 1 or more"):
        runner.finished_together(asked(tmp_path, 1), 0)
    with pytest.raises(InputError, match="seeds: expected each once"):
        runner.finished_together(asked(tmp_path, 1, 1), 2)
    assert not (tmp_path / "1").exists()
