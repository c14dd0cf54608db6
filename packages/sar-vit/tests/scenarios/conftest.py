"""Runs of this folder are on the CPU, and two processes are started as a user would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent / "scripts"
sys.path.insert(0, str(SCRIPTS))


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def two_processes() -> Callable[..., None]:
    """``two_processes(folder, scenario, **config)`` trains in two processes; see tiny_pretraining."""

    def launch(folder: Path, scenario: str, **config: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        path = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        forced = {"ACCELERATE_USE_CPU": "true"} if torch.accelerator.is_available() else {}
        given = json.dumps({"folder": str(folder), "scenario": scenario, "config": config})
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "tiny_pretraining", given],
            env={**os.environ, **forced, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return launch
