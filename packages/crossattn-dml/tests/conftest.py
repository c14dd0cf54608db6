"""A run small enough for every test that needs one, and how commands are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from crossattn_dml.cli import main

DATA = "synthetic:classes=10,superclasses=2,unseen=4,image_size=32,scale_min=0.4,train=36,test=16"
TINY = ["--data", DATA, "--image-size", "32", "--epochs", "2", "--warmup-epochs", "0", "--batch-size", "12"]
TINY += ["--backbone", "vit", "--backbone-options.patch-size", "8", "--backbone-options.embed-dim", "16"]
TINY += ["--backbone-options.depth", "1", "--backbone-options.num-heads", "2", "--threads", "1"]
TINY += [
    "--embedding-dim",
    "8",
    "--heads",
    "2",
    "--per-class",
    "2",
    "--eval-batch-size",
    "4",
    "--nmi-seeds",
    "2",
]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Arguments that make any tiny recipe a matter of seconds."""
    return list(TINY)


@pytest.fixture(scope="session")
def source() -> str:
    """The data of these arguments."""
    return DATA


@pytest.fixture
def history():
    """Records of a run folder, without what differs between two runs of one configuration."""

    def read(run: Path) -> list[dict]:
        lines = (run / "history.jsonl").read_text().splitlines()
        timing = {"seconds", "images_per_second"}
        return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]

    return read


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A finished run of the method."""
    folder = tmp_path_factory.mktemp("runs") / "stack"
    assert main(["train", "tiny-stack", *TINY, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def refused(capsys):
    """Call the program, expect exit code 2 and one line of error; give the line."""

    def call(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-1].startswith("crossattn-dml: error: ")
        return said[-1]

    return call
