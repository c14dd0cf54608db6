"""The figures and tables by the name that ``crossattn-dml reproduce`` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from attnmap_core.cli import Reproduction


def _lazily(place: str) -> Callable[[list[str]], None]:
    module, _, function = place.partition(":")

    def run(arguments: list[str]) -> None:
        getattr(importlib.import_module(f".{module}", __name__), function)(arguments)

    return run


REPRODUCTIONS: dict[str, Reproduction] = {
    name: Reproduction(summary=summary, run=_lazily(place))
    for name, place, summary in (
        ("main", "main_results:main_command", "table 1: with and without the blocks, beside published rows"),
        (
            "fig-gradients",
            "gradients:gradients_command",
            "figure S1: log10 |dL/dE| over epochs, baseline and method",
        ),
        ("fig-attention", "attention:attention_command", "figures S2, S3: where blocks look in a triple"),
        ("fig-parts", "parts:parts_command", "figures S4, S5: two locations and the parts most like them"),
        (
            "neighbours",
            "neighbours:neighbours_command",
            "photos and what they find, of any folder or data set",
        ),
        ("levels", "levels:levels_command", "Recall@1 by the similarity of each level of the stack"),
        ("search", "evidence:search_command", "settings of both arms, chosen on held-out classes"),
        ("variants", "variants:variants_command", "single settings on top of a recipe, on held-out classes"),
        (
            "evidence",
            "evidence:evidence_command",
            "baseline against method, paired differences with confidence interval",
        ),
    )
}
