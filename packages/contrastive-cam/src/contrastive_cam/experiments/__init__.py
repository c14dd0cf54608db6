"""The tables and figures by the name that ``contrastive-cam reproduce`` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from attnmap_core.cli import Reproduction


def _lazily(module: str, function: str) -> Callable[[list[str]], None]:
    def run(arguments: list[str]) -> None:
        getattr(importlib.import_module(f".{module}", __name__), function)(arguments)

    return run


REPRODUCTIONS: dict[str, Reproduction] = {
    "fig1": Reproduction(
        summary="mean CorLoc by the ratio of PTAP, with and without the contrastive loss",
        run=_lazily("tables", "fig1_command"),
    ),
    "table1": Reproduction(summary="PTAP on and off in the test", run=_lazily("tables", "table1_command")),
    "table2": Reproduction(
        summary="channel-wise and pixel-wise pooling", run=_lazily("tables", "table2_command")
    ),
    "table3": Reproduction(
        summary="pretext tasks R+S and S+T on four data sets, baseline and full method",
        run=_lazily("tables", "table3_command"),
    ),
    "fig2": Reproduction(
        summary="heat maps and boxes of baseline and full method", run=_lazily("tables", "fig2_command")
    ),
    "main": Reproduction(
        summary="PsyNet, + PTAP, + contrastive maps and both, beside floors and training-free methods",
        run=_lazily("tables", "main_command"),
    ),
    "compare": Reproduction(
        summary="all training-free methods on one data set or folder with boxes",
        run=_lazily("compare", "compare_command"),
    ),
    "search": Reproduction(
        summary="forms of the region unit beside DDT, on folders that the evidence does not report",
        run=_lazily("search", "search_command"),
    ),
    "evidence": Reproduction(
        summary="real photos: trained and training-free methods and floors, seed by seed",
        run=_lazily("compare", "evidence_command"),
    ),
}
