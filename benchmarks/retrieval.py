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

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import faiss
import numpy as np
import torch
from _harness import DEVICE, Benchmark, Work, in_turns, milliseconds, peak_megabytes
from attnmap_core.metrics import recall_at_k
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch.nn import functional

KS = (1, 2, 4, 8)


def embeddings(n: int) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(n)
    labels = rng.integers(0, n // 5, n)
    x = rng.standard_normal((n // 5, 512))[labels] * 0.35 + rng.standard_normal((n, 512))
    return torch.from_numpy(x.astype(np.float32)).to(DEVICE), labels


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
    before = peak_megabytes()
    elapsed = milliseconds(lambda: recall_at_k(x, labels, k=KS))
    return elapsed, peak_megabytes(), before


def main(arguments: list[str] | None = None) -> int:
    packages = ("attnmap-core", "torch", "numpy", "pytorch-metric-learning", "faiss-cpu")
    bench = Benchmark(__file__, __doc__, packages=packages, rounds=3)
    bench.parser.add_argument("--sizes", type=int, nargs="+", default=[2500, 5000, 10000])
    bench.parser.add_argument(
        "--large", type=int, default=60502, help="size of the case for memory; 0 leaves it out"
    )
    options = bench.start(arguments)
    faiss.omp_set_num_threads(1)

    x, labels = embeddings(1000)
    assert recall_at_k(x, labels, k=KS) == in_float64(x, labels), "not equal to a float64 brute force"
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

        works: dict[str, Work] = {
            "ours": lambda x=x, labels=labels: recall_at_k(x, labels, k=KS),
            "bare": bare,
            "faiss": flat,
        } | {name: lambda c=c, z=z, y=y: c.get_accuracy(z, y) for name, c in pml.items()}
        ours = recall_at_k(x, labels, k=1, exclude_lone=True)
        for name, calculator in pml.items():
            assert abs(calculator.get_accuracy(z, y)["precision_at_1"] - ours) < 1e-9, name
        ms = in_turns(works, options.rounds)
        for peer in list(works)[1:]:
            bench.row(f"N={n}, d=512", ms["ours"], peer, ms[peer], 0.0 if peer in pml else None)
        if n == max(options.sizes):
            bench.at_most("ours / bare product", ms["ours"] / ms["bare"], 1.15)
            bench.at_most("ours / pml + faiss", ms["ours"] / ms["pml + faiss"], 1.0)
            bench.at_most("ours / faiss", ms["ours"] / ms["faiss"], 1.0)
    if options.large:
        elapsed, peak, before = alone(options.large)
        bench.note(f"alone, N={options.large}, d=512", ours_ms=elapsed, peak_mb=peak, before_mb=before)
        print(
            f"N={options.large}: {elapsed / 1000:.0f} s, {peak:.0f} MB at most, {before:.0f} MB before the search"
        )
        bench.at_most(f"MB at most, N={options.large}", peak, 2048)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
