"""Box evaluation at all thresholds against the published loop over OpenCV contours: same numbers, then times.

    python benchmarks/wsol_evaluation.py [--images 4] [--rounds 3] [--thresholds 1000] [--no-check]

V1 keeps the largest contour, V2 all of them; PxAP is the histogram of scores over object and background. Peers:
*published*, the ``accumulate`` of the reference WSOL evaluator restated (contours at every threshold, the best IoU of
all boxes taken anew for each); *memo*, the fix anyone would make first (that maximum once, contours only where the
threshold's level differs); for PxAP ``numpy.histogram``. Contours are OpenCV's; ours needs none. The candidates take
turns within a round; times are milliseconds of CPU per image, all on one thread, the median over the rounds. Only
ratios compare between machines; the goals at the end are ratios.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["opencv-python-headless>=4.10.0.84"]
# ///

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from _harness import Benchmark, Work, in_turns
from attnmap_core.boxes import box_iou, score_map_to_uint8, threshold_levels, upsample_score_map
from attnmap_core.metrics import best_iou_curve
from attnmap_core.metrics.localization import pixel_histograms, wsol_thresholds
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

CONTOURS = {"V1": "largest", "V2": "all"}

Curve = Callable[[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64], bool], NDArray[np.float64]]


# --- Candidates -------------------------------------------------------------------------------------------


def ours(values: Any, truth: Any, thresholds: Any, every: bool) -> NDArray[np.float64]:
    return best_iou_curve(values, truth, thresholds, "all" if every else "largest")


def contour_boxes(values: NDArray[np.uint8], level: int, every: bool) -> NDArray[np.int64]:
    """Boxes of the map's contours above one level, by the evaluator's rules."""
    height, width = values.shape
    _, binary = cv2.threshold(values, level, 255, cv2.THRESH_BINARY)
    contours: Any = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not contours:
        return np.zeros((1, 4), np.int64)
    kept = contours if every else [max(contours, key=cv2.contourArea)]
    boxes = [
        (x, y, min(x + w, width - 1), min(y + h, height - 1)) for x, y, w, h in map(cv2.boundingRect, kept)
    ]
    return np.array(boxes)


def published(values: Any, truth: Any, thresholds: Any, every: bool) -> NDArray[np.float64]:
    peak = int(values.max())
    boxes = [contour_boxes(values, int(threshold * peak), every) for threshold in thresholds]
    ious = box_iou(np.concatenate(boxes), truth)
    curve, start = [], 0
    for found in boxes:
        curve.append(max(ious.max(1)[start : start + len(found)]))
        start += len(found)
    return np.array(curve)


def memo(values: Any, truth: Any, thresholds: Any, every: bool) -> NDArray[np.float64]:
    levels, place = np.unique(threshold_levels(thresholds, int(values.max())), return_inverse=True)
    best = [box_iou(contour_boxes(values, int(level), every), truth).max() for level in levels]
    return np.array(best)[place]


# --- Cases ------------------------------------------------------------------------------------------------


def make_map(kind: str, side: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    if kind == "CAM 14x14":
        raw = gaussian_filter(rng.random((14, 14)), 1.5)
    elif kind == "attention 28x28":
        raw = gaussian_filter(rng.random((28, 28)), 0.7) ** 2
    elif kind == "14x14 nearest":
        raw = np.kron(gaussian_filter(rng.random((14, 14)), 1), np.ones((-(-side // 14),) * 2))[:side, :side]
    elif kind == "texture":
        raw = gaussian_filter(rng.random((side, side)), 2)
    else:
        raw = rng.random((side, side))
    return score_map_to_uint8(upsample_score_map(raw, (side, side)))


def make_boxes(side: int, seed: int) -> NDArray[np.int64]:
    corners = np.sort(np.random.default_rng(seed).integers(0, side, (2, 2, 2)), axis=1)
    return corners.reshape(2, 4)


def cases(images: int, thresholds: int) -> list[tuple[str, int, int, int, dict[str, Curve]]]:
    """Kind of map, side, thresholds, maps, peers; the published loop takes too long on busy maps."""
    both: dict[str, Curve] = {"published": published, "memo": memo}
    fast: dict[str, Curve] = {"memo": memo}
    return [
        ("CAM 14x14", 224, thresholds, images, both),
        ("attention 28x28", 224, thresholds, images, both),
        ("14x14 nearest", 224, thresholds, images, fast),
        ("texture", 224, thresholds, images, fast),
        ("white noise", 224, thresholds, 1, fast),
        # growth
        ("CAM 14x14", 224, 10, images, both),
        ("CAM 14x14", 224, 100, images, both),
        ("CAM 14x14", 64, thresholds, images, both),
        ("CAM 14x14", 448, thresholds, images, both),
    ]


def numpy_pixel_histograms(score_map: Any, mask: Any, thresholds: Any) -> tuple[Any, Any]:
    edges = np.append(thresholds, [1.0, 2.0, 3.0])
    return np.histogram(score_map[mask == 1], edges)[0], np.histogram(score_map[mask == 0], edges)[0]


# --- Measuring --------------------------------------------------------------------------------------------


def measure(
    candidates: dict[str, Curve], inputs: list[tuple[Any, Any]], thresholds: Any, every: bool, rounds: int
) -> tuple[dict[str, float], float]:
    """CPU milliseconds per image by candidate, and the largest difference of any curve from ours; asserts it is 0."""
    worst = 0.0
    for values, truth in inputs:
        expected = ours(values, truth, thresholds, every)
        for name, curve in candidates.items():
            difference = float(np.abs(curve(values, truth, thresholds, every) - expected).max())
            assert difference == 0.0, f"{name} differs by {difference}"
            worst = max(worst, difference)
    works = {
        name: lambda curve=curve: [curve(values, truth, thresholds, every) for values, truth in inputs]
        for name, curve in candidates.items()
    }
    ms = in_turns(works, rounds, least_ms=100)
    return {name: value / len(inputs) for name, value in ms.items()}, worst


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds per image, ours and the peers', for each kind of map."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["kind"] for row in rows if "kind" in row))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, term in zip(axes, CONTOURS):
        for k, (name, colour) in enumerate({"published": "C3", "memo": "C1", "ours": "C0"}.items()):
            found = [row for row in rows if row.get("kind") and row["term"] == term and not row["growth"]]
            if name == "ours":
                values = {row["kind"]: row["ours_ms"] for row in found}
            else:
                values = {row["kind"]: row["peer_ms"] for row in found if row["peer"] == name}
            places = [kinds.index(kind) + 0.27 * (k - 1) for kind in values]
            ax.bar(places, list(values.values()), 0.25, color=colour, label=name)
        ax.set(yscale="log", title=f"{term}, 1000 thresholds, 224 px")
        ax.set_xticks(range(len(kinds)), [kind.replace(" ", "\n", 1) for kind in kinds], fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms per image, one thread")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    packages = ("attnmap-core", "numpy", "numba", "opencv-python-headless")
    bench = Benchmark(__file__, __doc__, packages=packages, rounds=3)
    bench.parser.add_argument("--images", type=int, default=4, help="maps of each kind")
    bench.parser.add_argument("--thresholds", type=int, default=1000, help="of arange(0, 1, 1/thresholds)")
    options = bench.start(arguments)
    cv2.setNumThreads(1)

    ratios: dict[tuple[str, str, str], float] = {}
    own: dict[tuple[str, str, int, int], float] = {}
    for k, (kind, side, count, images, peers) in enumerate(cases(options.images, options.thresholds)):
        inputs = [(make_map(kind, side, seed), make_boxes(side, seed)) for seed in range(images)]
        for term, contours in CONTOURS.items():
            every = contours == "all"
            ms, worst = measure(
                {"ours": ours} | peers, inputs, wsol_thresholds(1 / count), every, options.rounds
            )
            own[term, kind, side, count] = ms["ours"]
            for peer in peers:
                case = f"{term} {kind}, {side} px, {count} thr."
                more = {"kind": kind, "term": term, "growth": k >= 5}
                ratio = bench.row(case, ms["ours"], peer, ms[peer], worst, **more)
                if k < 5:
                    ratios[term, kind, peer] = ratio
    thresholds = wsol_thresholds(1 / options.thresholds)
    score_map = make_map("attention 28x28", 224, 0) / 255
    mask = (np.random.default_rng(0).random((224, 224)) < 0.4).astype(np.uint8)
    mask[:9] = 255
    pairs = zip(
        pixel_histograms(score_map, mask, thresholds), numpy_pixel_histograms(score_map, mask, thresholds)
    )
    assert all(np.array_equal(a, b) for a, b in pairs)
    works: dict[str, Work] = {
        "ours": lambda: pixel_histograms(score_map, mask, thresholds),
        "numpy": lambda: numpy_pixel_histograms(score_map, mask, thresholds),
    }
    ms = in_turns(works, options.rounds, least_ms=100)
    histograms = bench.row(
        f"PxAP histograms, 224 px, {options.thresholds} thr.", ms["ours"], "numpy", ms["numpy"], 0.0
    )

    plot(bench.rows, options.out.with_suffix(".png"))
    ours_at = {kind: own["V2", kind, 224, options.thresholds] for kind in ("CAM 14x14", "white noise")}
    for term, peer, wanted in (("V2", "memo", 4), ("V1", "published", 20)):
        least = min(ratio for (t, _, p), ratio in ratios.items() if (t, p) == (term, peer))
        bench.at_least(f"{term} any kind, {peer} / ours", least, wanted)
    for kind, wanted in (("CAM 14x14", 30), ("attention 28x28", 50)):
        bench.at_least(f"V2 {kind}, published / ours", ratios["V2", kind, "published"], wanted)
    bench.at_least("PxAP histograms, numpy / ours", histograms, 6)
    bench.at_most(
        "V2 time, 1000 / 10 thresholds", ours_at["CAM 14x14"] / own["V2", "CAM 14x14", 224, 10], 1.15
    )
    bench.at_most("V2 time, white noise / CAM 14x14", ours_at["white noise"] / ours_at["CAM 14x14"], 3)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
