"""``crossattn-dml``: the verbs of every package, and ``index``, ``query``, ``duplicates`` for folders of photos."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnmap_core import cli


def program() -> cli.Program:
    """What the shared verbs need to know; training modules are imported only by the verbs that use them."""
    from .config import DmlConfig
    from .experiments import REPRODUCTIONS

    return cli.Program(
        name="crossattn-dml",
        module="crossattn_dml",
        config=DmlConfig,
        train=_train,
        evaluate=_evaluate,
        load=load_model,
        reproductions=REPRODUCTIONS,
        verbs={"index": _index, "query": _query, "duplicates": _duplicates, "demo": _demo},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return cli.run(program(), arguments)


def load_model(name: str) -> Any:
    """The model of a folder or Hub id."""
    from .model import EmbeddingModel

    return EmbeddingModel.from_pretrained(name)


def _train(config: Any, header: str, resume: bool, overwrite: bool) -> None:
    from .train import train

    train(config, header, resume=resume, overwrite=overwrite)
    sys.stdout.write(f"{Path(config.output_dir) / 'report.html'}\n")


def _evaluate(arguments: list[str]) -> None:
    from .evaluate import evaluate_command

    evaluate_command(arguments)


def _index(arguments: list[str]) -> None:
    from .search import index_command

    index_command(arguments)


def _query(arguments: list[str]) -> None:
    from .search import query_command

    query_command(arguments)


def _duplicates(arguments: list[str]) -> None:
    from .search import duplicates_command

    duplicates_command(arguments)


def _demo(arguments: list[str]) -> None:
    from .search import demo_command

    demo_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
