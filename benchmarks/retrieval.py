"""Recall@1, 2, 4, 8 of random clusters in 512 dimensions against the product alone and against two libraries.

Run ``python benchmarks/retrieval.py``; it prints a table and writes JSON rows to ``results/retrieval.json``. Peers:
the *bare* product of all similarities, 1024 queries at a time, which any exact search needs; *pml*, P@1 of
pytorch-metric-learning with its own search or with faiss, equal to our Recall@1 before anything is timed; *faiss*, a
flat index without the metric. The candidates take turns; times are milliseconds of processor time on a CPU, of the
clock on a GPU, median over the rounds. A data set as large as Stanford Online Products' test set is searched alone, for
its memory. Only ratios compare between machines; the goals at the end are ratios.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["pytorch-metric-learning>=2.8", "faiss-cpu>=1.9"]
# ///

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from attnmap_core.metrics import recall_at_k
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch.nn import functional

RESULTS = Path(__file__).parent / "results" / "retrieval.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KS = (1, 2, 4, 8)
ROW = "{case:20} {peer:>12} {ours_ms:>10.1f} {peer_ms:>10.1f} {ratio:>8.2f}x"


def embeddings(n: int) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(n)
    labels = rng.integers(0, n // 5, n)
    x = rng.standard_normal((n // 5, 512))[labels] * 0.35 + rng.standard_normal((n, 512))
    return torch.from_numpy(x.astype(np.float32)).to(DEVICE), labels


def milliseconds(work: Callable[[], object]) -> float:
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (clock() - start)


def in_float64(x: torch.Tensor, labels: np.ndarray) -> dict[int, float]:
    z = functional.normalize(x.double(), dim=1).cpu().numpy()
    S = z @ z.T
    np.fill_diagonal(S, -np.inf)
    order = np.argsort(-S, axis=1, kind="stable")[:, : max(KS)]
    return {k: float((labels[order[:, :k]] == labels[:, None]).any(1).mean()) for k in KS}


def alone(n: int) -> tuple[float, float, float]:
    """Ours in a process that does nothing else: milliseconds, MB at most, and MB before the search."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_alone_here, n).result()


def _alone_here(n: int) -> tuple[float, float, float]:
    x, labels = embeddings(n)
    before = _peak()
    elapsed = milliseconds(lambda: recall_at_k(x, labels, k=KS))
    return elapsed, _peak(), before


def _peak() -> float:
    """MB at most so far; getrusage would still have the peak of the program that started this one."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is reported")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2500, 5000, 10000])
    parser.add_argument(
        "--large", type=int, default=60502, help="size of the case for memory; 0 leaves it out"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="report only; otherwise a missed goal is exit code 1"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    packages = ("attnmap-core", "torch", "numpy", "pytorch-metric-learning", "faiss-cpu")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}

    x, labels = embeddings(1000)
    assert recall_at_k(x, labels, k=KS) == in_float64(x, labels), "not equal to a float64 brute force"
    rows: list[dict[str, Any]] = []
    goals: list[tuple[str, float, float]] = []
    print(f"{'case':20} {'peer':>12} {'ours ms':>10} {'peer ms':>10} {'ratio':>9}")
    for n in options.sizes:
        x, labels = embeddings(n)
        z, y = functional.normalize(x, dim=1), torch.from_numpy(labels).to(DEVICE)
        on_host = z.cpu().numpy()
        own = CustomKNN(CosineSimilarity(), batch_size=1024)
        pml = {
            name: AccuracyCalculator(include=("precision_at_1",), k=1, device=DEVICE, **extra)
            for name, extra in {"pml + faiss": {}, "pml": {"knn_func": own}}.items()
        }

        def bare(z: torch.Tensor = z) -> None:
            for part in z.split(1024):
                part @ z.T

        def flat(vectors: np.ndarray = on_host) -> np.ndarray:
            index = faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors)
            return index.search(vectors, max(KS) + 1)[1]

        works: dict[str, Callable[[], object]] = {
            "ours": lambda x=x, labels=labels: recall_at_k(x, labels, k=KS),
            "bare": bare,
            "faiss": flat,
        } | {name: lambda c=c, z=z, y=y: c.get_accuracy(z, y) for name, c in pml.items()}
        ours = recall_at_k(x, labels, k=1, exclude_lone=True)
        for name, calculator in pml.items():
            assert abs(calculator.get_accuracy(z, y)["precision_at_1"] - ours) < 1e-9, name
        ms: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(options.rounds + 1):
            for name, work in works.items():
                elapsed = milliseconds(work)
                if turn:
                    ms[name].append(elapsed)
        median = {name: statistics.median(values) for name, values in ms.items()}
        for peer in list(works)[1:]:
            rows.append({
                "subject": "retrieval", "case": f"N={n}, d=512", "ours_ms": round(median["ours"], 2), "peer": peer,
                "peer_ms": round(median[peer], 2), "ratio": round(median[peer] / median["ours"], 3),
                "max_abs_diff": 0.0 if peer.startswith("pml") else None,
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1), "threads": 1,
                "load": round(os.getloadavg()[0], 2), "device": DEVICE.type, "versions": versions,
            })  # fmt: skip
            print(ROW.format(**rows[-1]), flush=True)
        if n == max(options.sizes):
            goals = [
                ("ours / bare product", median["ours"] / median["bare"], 1.15),
                ("ours / pml + faiss", median["ours"] / median["pml + faiss"], 1.0),
                ("ours / faiss", median["ours"] / median["faiss"], 1.0),
            ]
    if options.large:
        elapsed, peak, before = alone(options.large)
        rows.append({
            "subject": "retrieval", "case": f"N={options.large}, d=512", "ours_ms": round(elapsed, 2), "peer": None,
            "peer_ms": None, "ratio": None, "max_abs_diff": None, "peak_mb": round(peak, 1),
            "before_mb": round(before, 1), "load": round(os.getloadavg()[0], 2), "device": DEVICE.type,
            "versions": versions,
        })  # fmt: skip
        print(
            f"N={options.large} alone: {elapsed / 1000:.0f} s, {peak:.0f} MB at most, {before:.0f} MB before the search"
        )
        goals.append((f"MB at most, N={options.large}", peak, 2048))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    missed = 0
    for name, reached, limit in goals:
        missed += reached > limit
        print(f"{'MISSED ' if reached > limit else 'reached':8} {name}: {reached:.3f}, wanted <= {limit:g}")
    return 1 if missed and not options.no_check else 0


if __name__ == "__main__":
    sys.exit(main())
