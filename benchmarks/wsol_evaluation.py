"""Box evaluation at all thresholds against the published loop over OpenCV contours: same numbers, then times.

    python benchmarks/wsol_evaluation.py [--images 2] [--rounds 3] [--thresholds 1000] [--full]

Peers: *published*, the ``accumulate`` of the reference WSOL evaluator restated (contours at every threshold, the
best IoU of all boxes taken anew for each); *memo*, the fix anyone would make first (that maximum once, contours
only where the threshold's level differs). Both use OpenCV, ours does not. The candidates take turns within a round;
times are milliseconds of CPU per image, all on one thread, the median over the rounds. Only ratios compare between
machines.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["opencv-python-headless>=4.10.0.84"]
# ///

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from attnmap_core.boxes import box_iou, score_map_to_uint8, threshold_levels, upsample_score_map
from attnmap_core.metrics import best_iou_curve
from attnmap_core.metrics.localization import wsol_thresholds
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

RESULTS = Path(__file__).parent / "results" / "wsol_evaluation.json"
CONTOURS = {"V1": "largest", "V2": "all"}
ROW = "{case:40} {peer:>10} {ours_ms:>9.2f} {peer_ms:>10.2f} {ratio:>8.1f}x"

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


def cases(full: bool, thresholds: int) -> list[tuple[str, int, int, dict[str, Curve]]]:
    """Kind of map, side, thresholds, peers; the published loop takes too long on busy maps."""
    both: dict[str, Curve] = {"published": published, "memo": memo}
    fast: dict[str, Curve] = {"memo": memo}
    found = [
        ("CAM 14x14", 224, thresholds, both),
        ("attention 28x28", 224, thresholds, both),
        ("14x14 nearest", 224, thresholds, fast),
        ("texture", 224, thresholds, fast),
        ("white noise", 224 if full else 64, thresholds, fast),
    ]
    if full:
        found += [("attention 28x28", 224, count, both) for count in (10, 100)]
        found += [("attention 28x28", side, thresholds, both) for side in (64, 448)]
    return found


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
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, curve in candidates.items():
            start = time.process_time()  # other jobs on the machine do not count
            for values, truth in inputs:
                curve(values, truth, thresholds, every)
            times[name].append(1000 * (time.process_time() - start) / len(inputs))
    return {name: statistics.median(values) for name, values in times.items()}, worst


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2, help="maps of each kind")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is reported")
    parser.add_argument("--thresholds", type=int, default=1000, help="of arange(0, 1, 1/thresholds)")
    parser.add_argument("--full", action="store_true", help="also other sizes and numbers of thresholds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    cv2.setNumThreads(1)
    packages = ("attnmap-core", "numpy", "numba", "opencv-python-headless")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    rows: list[dict[str, Any]] = []
    print(f"{'case':40} {'peer':>10} {'ours ms':>9} {'peer ms':>10} {'ratio':>9}")
    for kind, side, count, peers in cases(options.full, options.thresholds):
        inputs = [(make_map(kind, side, seed), make_boxes(side, seed)) for seed in range(options.images)]
        for term, contours in CONTOURS.items():
            candidates = {"ours": ours} | peers
            ms, worst = measure(
                candidates, inputs, wsol_thresholds(1 / count), contours == "all", options.rounds
            )
            for peer in peers:
                rows.append({
                    "subject": "wsol_evaluation",
                    "case": f"{term} {kind}, {side} px, {count} thr.",
                    "ours_ms": round(ms["ours"], 3),
                    "peer": peer,
                    "peer_ms": round(ms[peer], 3),
                    "ratio": round(ms[peer] / ms["ours"], 2),
                    "max_abs_diff": worst,
                    # Of the process so far, peers included.
                    "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                    "threads": 1,
                    "load": round(os.getloadavg()[0], 2),
                    "versions": versions,
                })  # fmt: skip
                print(ROW.format(**rows[-1]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
