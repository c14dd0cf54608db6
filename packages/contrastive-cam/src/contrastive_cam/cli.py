"""``contrastive-cam``: the verbs of every package, and ``label`` for a folder of photos without any label."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnmap_core import cli


def program() -> cli.Program:
    """What the shared verbs need to know; training modules are imported only by the verbs that use them."""
    from .config import ContrastiveConfig
    from .experiments import REPRODUCTIONS

    return cli.Program(
        name="contrastive-cam",
        module="contrastive_cam",
        config=ContrastiveConfig,
        train=_train,
        evaluate=_evaluate,
        load=load_model,
        reproductions=REPRODUCTIONS,
        verbs={"label": _label},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return cli.run(program(), arguments)


def load_model(name: str) -> Any:
    """The model of a folder or Hub id, by the class its ``config.json`` names."""
    from attnmap_core.hub import read_config

    from .frozen import FrozenMap
    from .model import ContrastiveCAM

    frozen = read_config(name).get("class") == "FrozenMap"
    return (FrozenMap if frozen else ContrastiveCAM).from_pretrained(name)


def _train(config: Any, header: str, resume: bool, overwrite: bool) -> None:
    from .train import train

    train(config, header, resume=resume, overwrite=overwrite)
    sys.stdout.write(f"{Path(config.output_dir) / 'report.html'}\n")


def _evaluate(arguments: list[str]) -> None:
    from .evaluate import evaluate_command

    evaluate_command(arguments)


def _label(arguments: list[str]) -> None:
    from .labelling import label_command

    label_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
