"""One module per table or figure, by the name that ``scm-wsol reproduce`` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from attnmap_core.cli import Reproduction


def _lazily(module: str) -> Callable[[list[str]], None]:
    def run(arguments: list[str]) -> None:
        importlib.import_module(f".{module}", __name__).command(arguments)

    return run


REPRODUCTIONS: dict[str, Reproduction] = {
    name: Reproduction(summary=summary, run=_lazily(module))
    for name, module, summary in (
        ("real-photos", "real_photos", "CAM, TS-CAM and SCM fine-tuned on Caltech-101 photos, seed by seed"),
    )
}
