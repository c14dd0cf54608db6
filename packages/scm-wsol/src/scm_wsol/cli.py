"""``scm-wsol``: the verbs of every package, and ``import`` for the authors' checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from attnmap_core import cli


def program() -> cli.Program:
    """What the shared verbs need to know; training modules are imported only by the verbs that use them."""
    from .experiments import REPRODUCTIONS

    return cli.Program(
        name="scm-wsol",
        module="scm_wsol",
        config=_config(),
        train=_train,
        evaluate=_evaluate,
        load=load_model,
        reproductions=REPRODUCTIONS,
        verbs={"import": _import, "quickstart": _quickstart},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return cli.run(program(), arguments)


def load_model(name: str) -> Any:
    """The TS-CAM or SCM model of a folder or Hub id, by the class its ``config.json`` names."""
    from attnmap_core.hub import read_config

    from .model import SCM, TSCAM

    return (SCM if read_config(name).get("class") == "SCM" else TSCAM).from_pretrained(name)


def _config() -> type[Any]:
    from .config import ScmConfig

    return ScmConfig


def _train(config: Any, header: str, resume: bool, overwrite: bool) -> None:
    from .train import train

    train(config, header, resume=resume, overwrite=overwrite)
    sys.stdout.write(f"{Path(config.output_dir) / 'report.html'}\n")


def _evaluate(arguments: list[str]) -> None:
    from .evaluate import evaluate_command

    evaluate_command(arguments)


def _quickstart(arguments: list[str]) -> None:
    from .quickstart import quickstart_command

    quickstart_command(arguments)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Turn a checkpoint of the authors' code into a model folder."""

    checkpoint: tyro.conf.Positional[Path]
    """File with ``epoch``, ``state_dict`` and ``best_map``, or a plain DeiT file."""
    out: Path
    """Model folder to write."""
    backbone: str | None = None
    """timm name of its backbone; the DeiT of the file's width where not given."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def _import(arguments: list[str]) -> None:
    from attnmap_core.files import atomic_folder, new_output_folder

    from .importer import import_checkpoint

    options = cli.parse(ImportOptions, arguments, command="scm-wsol import")
    model = import_checkpoint(options.checkpoint, backbone=options.backbone)
    new_output_folder(options.out, overwrite=options.overwrite)
    with atomic_folder(options.out) as folder:
        model.save_pretrained(folder)
    sys.stdout.write(f"{options.out}\n")


if __name__ == "__main__":
    sys.exit(main())
