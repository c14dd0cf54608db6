"""Runs that are made once: alone, several at once, and what is refused."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from attnmap_core.errors import InputError
from attnmap_core.experiments import Runner

TOY = """
import json, os, time
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
    time.sleep(300 if config.seed >= 100 else 0)
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


INTERRUPTED = """
import signal, sys
from pathlib import Path
from attnmap_core.experiments import Runner
from toy_runs import Config, train

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    asked = [(Path(sys.argv[1]) / str(seed), "toy", {"seed": seed}) for seed in (100, 101, 102, 103)]
    Runner(module="toy_runs", config=Config, train=train).finished_together(asked, 2)
"""


@pytest.mark.multiprocess
@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to send a Ctrl-C to")
def test_an_interrupt_ends_all_runs_at_once(runner, tmp_path):
    """Those at work would take minutes, and two more wait in the queue."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), str(out)]
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: out.is_dir() and len(list(out.iterdir())) == 2)
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does
        _, said = started.communicate(timeout=60)
        assert "KeyboardInterrupt" in said
        assert sorted(folder.name for folder in out.iterdir()) == ["100", "101"]
        wait_for(lambda: not group_lives(started.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_is_refused(runner, tmp_path):
    with pytest.raises(InputError, match="jobs 0: expected 1 or more"):
        runner.finished_together(asked(tmp_path, 1), 0)
    with pytest.raises(InputError, match="seeds: expected each once"):
        runner.finished_together(asked(tmp_path, 1, 1), 2)
    assert not (tmp_path / "1").exists()
