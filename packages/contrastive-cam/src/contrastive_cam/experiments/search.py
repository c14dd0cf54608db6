"""Which form of the region unit to ship: tried on folders of photos that the evidence does not report.

The unit and DDT, the strongest training-free method, have the same features and the same cuts to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnmap_core import cli
from attnmap_core.errors import InputError
from attnmap_core.experiments import mean_and_deviation, write_results

from ..evaluate import METRIC_NAMES
from .compare import METRICS, CompareOptions, Free, kept_rows, networks, open_folder, slug

FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT, last block": ("vit", {"blocks": (-1,)}),
    "ViT, three blocks": ("vit", {"blocks": (-3, -2, -1)}),
    "CNN, block 5": ("cnn", {"layers": ("blocks.5",)}),
}
"""Network and what of it is read."""
CUTS = ("zero", "otsu", 0.5)
"""Where heat maps are cut."""


def forms() -> dict[tuple[str, str], Free]:
    """Everything that is tried, by features and method."""
    found: dict[tuple[str, str], Free] = {}
    for features, (network, read) in FEATURES.items():
        found[features, "DDT"] = Free("ddt", network, rule="zero", **read)
        for name, weight in (
            ("region unit", 0.0),
            ("region unit + turns", 1.0),
            ("region unit + 3 turns", 3.0),
        ):
            found[features, name] = Free("region", network, rule="zero", equivariance=weight, **read)
    return found


@dataclass(frozen=True, kw_only=True)
class SearchOptions(CompareOptions):
    """Forms of the region unit and DDT on several folders; finished ones are not measured again."""

    folders: tuple[str, ...] = ()
    """Data sources with boxes, each of one kind of thing, which the evidence then does not report."""
    sizes: tuple[int, ...] = (224,)
    """Sides of the square input, in pixels; a CNN gets one more, which makes its grid symmetric."""
    seeds: tuple[int, ...] = (100, 101)
    """Of the region units; other than those of the evidence."""
    out: Path = Path("runs/search")
    """Folder of the table."""


def search_command(arguments: list[str]) -> None:
    """``contrastive-cam reproduce search --folders voc:PHOTOS ... --cnn-weights FILE --vit-weights FILE``."""
    options = cli.parse(SearchOptions, arguments, command="contrastive-cam reproduce search")
    if not options.folders or not options.seeds or not options.sizes:
        raise InputError(
            "--folders, --seeds and --sizes: expected one or more of each, such as --folders voc:PHOTOS --seeds 100"
        )
    opened = [open_folder(options, folder) for folder in options.folders]
    rows: list[dict[str, Any]] = []
    for (features, method), free in forms().items():
        for size in options.sizes:
            make = networks(options)
            make["vit"]["img_size"], make["cnn"]["img_size"] = size, size + 1
            by_cut: dict[str, list[Mapping[str, float]]] = {str(cut): [] for cut in CUTS}
            for _, _, data, title in opened:
                name = slug(f"{features} {method} {size}")
                path = options.out / "free" / slug(title) / f"{name}.json"
                for one in kept_rows(options, path, free, data, make, rules=CUTS[1:]):
                    by_cut["zero"].append(one["metrics"])
                    for cut, found in one["rules"].items():
                        by_cut[cut].append(found)
            rows += [_row(features, size, method, cut, several) for cut, several in by_cut.items()]
    for network in dict.fromkeys(features.split(",")[0] for features in FEATURES):
        mine = [row for row in rows if row["features"].startswith(network)]
        for kind in ("DDT", "region"):
            best = max((row for row in mine if row["method"].startswith(kind)), key=lambda row: row["mean"])
            best["best"] = f"{network} {kind}"
    write_results(
        options.out,
        rows,
        title=f"Forms of the region unit, mean over {len(opened)} folders",
        distribution="contrastive-cam",
        notes=[
            f"Folders: {', '.join(title for _, _, _, title in opened)}. Region units: mean of {len(options.seeds)} "
            "seeds. The best of many is flattered: only folders that had no part in the choice count.",
        ],
        seed=options.seeds[0],
    )


def _row(
    features: str, size: int, method: str, cut: str, several: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    found = mean_and_deviation(several, METRICS)
    return {"features": features, "pixels": size, "method": method, "cut": cut, "best": ""} | {
        METRIC_NAMES[metric]: found[metric]["mean"] for metric in METRICS
    }
