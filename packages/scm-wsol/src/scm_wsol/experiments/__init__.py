"""One module per table or figure, by the name that ``scm-wsol reproduce`` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from attnmap_core.cli import Reproduction


def _lazily(place: str) -> Callable[[list[str]], None]:
    module, _, function = place.partition(":")

    def run(arguments: list[str]) -> None:
        getattr(importlib.import_module(f".{module}", __name__), function or "command")(arguments)

    return run


REPRODUCTIONS: dict[str, Reproduction] = {
    name: Reproduction(summary=summary, run=_lazily(place))
    for name, place, summary in (
        (
            "main-results",
            "main_results",
            "Top-k Loc and GT-known under all three protocols, beside published rows",
        ),
        (
            "maxboxacc",
            "maxboxacc",
            "supplement table 1: MaxBoxAccV1 and V2 on val and test, epochs chosen by either",
        ),
        ("ablate-ns", "ablate_ns", "supplement 1.1: one SCM per number of Newton-Schulz iterations"),
        ("fig-ns", "ablate_ns", "supplement figure 3, the plot of ablate-ns"),
        (
            "combine-maps",
            "combine_maps",
            "supplement 1.2: all pairs of semantic and attention maps, in numbers",
        ),
        (
            "fig-grid",
            "combine_maps:figure_command",
            "supplement figure 2, the pictures of combine-maps alone",
        ),
        ("fig-diffusion", "fig_diffusion", "supplement figure 1: one attention map diffused by p iterations"),
        ("fig-qualitative", "fig_qualitative", "boxes, heat maps and masks of TS-CAM and SCM side by side"),
        ("synthetic", "synthetic", "the embedded default as files in the layout of CUB-200-2011"),
        ("real-photos", "real_photos", "CAM, TS-CAM and SCM fine-tuned on Caltech-101 photos, seed by seed"),
    )
}
