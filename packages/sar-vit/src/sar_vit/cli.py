"""``sar-vit``: the verbs of every package, and ``inspect`` for the attention maps of any vision transformer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnmap_core import cli


def program() -> cli.Program:
    """What the shared verbs need to know; training modules are imported only by the verbs that use them."""
    from .config import SarConfig
    from .experiments import REPRODUCTIONS

    return cli.Program(
        name="sar-vit",
        module="sar_vit",
        config=SarConfig,
        train=_train,
        evaluate=_evaluate,
        load=load_model,
        reproductions=REPRODUCTIONS,
        verbs={"inspect": _inspect},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return cli.run(program(), arguments)


def load_model(name: str) -> Any:
    """The model of a folder or Hub id."""
    from .model import SARViT

    return SARViT.from_pretrained(name)


def _train(config: Any, header: str, resume: bool, overwrite: bool) -> None:
    from .train import train

    train(config, header, resume=resume, overwrite=overwrite)
    sys.stdout.write(f"{Path(config.output_dir) / 'report.html'}\n")


def _evaluate(arguments: list[str]) -> None:
    from .evaluate import evaluate_command

    evaluate_command(arguments)


def _inspect(arguments: list[str]) -> None:
    from .inspection import inspect_command

    inspect_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
