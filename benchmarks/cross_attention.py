"""The cross-attention stack over all pairs of a batch, against a loop over pairs and against expanding to pairs.

Run ``python benchmarks/cross_attention.py``; it prints a table and writes JSON rows to
``results/cross_attention.json``. Peers, equal to ours to 1e-9 in float64 in values and token gradients before anything
is timed: the *loop*, one pair at a time, and *expand*, which repeats the tokens of each image for every partner and
projects each copy, as the block is usually written. *Whole* is ours without tiles. Forward and backward; the candidates
take turns; times are milliseconds of processor time on a CPU, of the clock on a GPU, median over the rounds. Only
ratios compare between machines. One block is compared as attention alone (``ca_only``): its feed-forward part costs the
same either way. *Peak* is the most memory of a process of its own that runs one case, on a GPU what it allocates.
"""

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

import torch
from crossattn_dml import CrossAttentionStack
from crossattn_dml.cross_attention import Mode
from torch import Tensor
from torch.nn import functional

RESULTS = Path(__file__).parent / "results" / "cross_attention.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROW = "{case:44} {peer:>8} {ours_ms:>10.1f} {peer_ms:>10.1f} {ratio:>8.2f}x"

Similarities = Callable[[CrossAttentionStack, Tensor, Tensor], Tensor]


def ours(stack: CrossAttentionStack, u: Tensor, X: Tensor) -> Tensor:
    return stack(u, X)[stack.depth]


def pairs(stack: CrossAttentionStack, own: Tensor, partner: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """Cosine similarities of as many pairs as there are rows; every row has its own copy of the tokens."""
    p, q = own[:, None], partner[:, None]
    for level in range(1, stack.depth + 1):
        block = stack.block(level)
        p, q = (
            block(p, block.queries(q), *block.keys_values(X)),
            block(q, block.queries(p), *block.keys_values(Y)),
        )
    return functional.cosine_similarity(p[:, 0], q[:, 0])


def expand(stack: CrossAttentionStack, u: Tensor, X: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(u), len(u), device=u.device)
    values = pairs(stack, u[i], u[j], X[i], X[j])
    upper = u.new_zeros(len(u), len(u)).index_put((i, j), values)
    return upper + upper.triu(1).T


def loop(stack: CrossAttentionStack, u: Tensor, X: Tensor) -> Tensor:
    b = len(u)
    found = {
        (i, j): pairs(stack, u[i : i + 1], u[j : j + 1], X[i : i + 1], X[j : j + 1])
        for i in range(b)
        for j in range(i, b)
    }
    return torch.stack([torch.cat([found[min(i, j), max(i, j)] for j in range(b)]) for i in range(b)])


def make(
    b: int, n: int, blocks: int, dim: int = 512, mode: Mode = "block"
) -> tuple[CrossAttentionStack, Tensor, Tensor]:
    torch.manual_seed(0)
    stack = CrossAttentionStack(dim, dim, blocks=blocks, init="xavier", mode=mode).to(DEVICE)
    return stack, torch.randn(b, dim, device=DEVICE), torch.randn(b, n, dim, device=DEVICE).requires_grad_()


def difference(peer: Similarities) -> float:
    stack, u, X = make(5, 6, 2, dim=32)
    stack, u, X = stack.double(), u.double(), X.detach().double().requires_grad_()
    found: list[tuple[Tensor, ...]] = []
    for function in (ours, peer):
        S = function(stack, u, X)
        S = S - torch.diag(S.diagonal())
        found.append((S.detach(), *torch.autograd.grad(S.square().sum(), X)))
    return max((a - b).abs().max().item() for a, b in zip(*found))


def forward_backward(function: Similarities, stack: CrossAttentionStack, u: Tensor, X: Tensor) -> None:
    stack.zero_grad()
    function(stack, u, X).sum().backward()


def milliseconds(work: Callable[[], object]) -> float:
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (clock() - start)


def saved_megabytes(function: Similarities, stack: CrossAttentionStack, u: Tensor, X: Tensor) -> float:
    """Held between forward and backward pass, each storage once."""
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        S = function(stack, u, X)
    del S
    return sum(held.values()) / 2**20


def peak_megabytes(b: int, n: int, blocks: int, tile: int | None) -> float:
    """Most memory of a forward and backward pass: of a process that does nothing else, or allocated on a GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_peak_here, b, n, blocks, tile).result()


def _peak_here(b: int, n: int, blocks: int, tile: int | None) -> float:
    torch.set_num_threads(1)
    stack, u, X = make(b, n, blocks)
    stack.tile = tile
    forward_backward(ours, stack, u, X)
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return (
        int(line.split()[1]) / 1024
    )  # getrusage would still have the peak of the program that started this one


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is reported")
    parser.add_argument(
        "--quick", action="store_true", help="the two goals of one block and one tiled case only"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="report only; otherwise a missed goal is exit code 1"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    versions = {"python": platform.python_version()} | {
        name: version(name) for name in ("crossattn-dml", "torch")
    }
    differences = {"expand": difference(expand), "loop": difference(loop)}
    assert max(differences.values()) < 1e-9, differences
    rows: list[dict[str, Any]] = []
    goals: list[tuple[str, float, float, bool]] = []  # name, reached, wanted, at least (or at most)
    per_pair: dict[tuple[int, int, int], float] = {}
    expanded: dict[int, dict[str, float]] = {}  # by blocks

    def compare(
        b: int,
        n: int,
        blocks: int,
        peers: dict[str, Similarities],
        tile: int | None = None,
        mode: Mode = "block",
    ) -> dict[str, float]:
        stack, u, X = make(b, n, blocks, mode=mode)
        whole, _, _ = make(b, n, blocks, mode=mode)
        stack.tile = tile
        works: dict[str, Callable[[], object]] = {"ours": lambda: forward_backward(ours, stack, u, X)}
        works |= {name: lambda f=f: forward_backward(f, whole, u, X) for name, f in peers.items()}
        ms: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(options.rounds + 1):
            for name, work in works.items():
                elapsed = milliseconds(work)
                if turn:
                    ms[name].append(elapsed)
        median = {name: statistics.median(values) for name, values in ms.items()}
        saved = {name: saved_megabytes(f, whole if name != "ours" else stack, u, X) for name, f in
                 {"ours": ours, **peers}.items()}  # fmt: skip
        for peer in peers:
            case = f"B={b}, {n} tokens, {blocks} {mode}" + (f", tile {tile}" if tile else "")
            rows.append({
                "subject": "cross_attention", "case": case, "ours_ms": round(median["ours"], 2), "peer": peer,
                "peer_ms": round(median[peer], 2), "ratio": round(median[peer] / median["ours"], 3),
                "max_abs_diff": differences.get(peer), "saved_mb": round(saved["ours"], 2),
                "peer_saved_mb": round(saved[peer], 2),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1), "threads": 1,
                "load": round(os.getloadavg()[0], 2), "device": DEVICE.type, "versions": versions,
            })  # fmt: skip
            print(ROW.format(**rows[-1]), f"{saved['ours']:9.1f} {saved[peer]:9.1f} MB", flush=True)
        if tile is None:
            per_pair[b, n, blocks] = median["ours"] / b**2
        else:
            goals.append(("time in tiles / whole", median["ours"] / median["whole"], 1.4, False))
            goals.append(("saved memory whole / in tiles", saved["whole"] / saved["ours"], 4, True))
        return median

    print(f"{'case':44} {'peer':>8} {'ours ms':>10} {'peer ms':>10} {'ratio':>9} saved for backward")
    for b, n, wanted in ((12, 49, 8), (6, 196, 3)):
        median = compare(b, n, 1, {"expand": expand, "loop": loop}, mode="ca_only")
        goals.append(
            (
                f"attention of one block, B={b}, {n} tokens, against expand",
                median["expand"] / median["ours"],
                wanted,
                True,
            )
        )
    if not options.quick:
        for b in (8, 16, 32):
            for blocks in (1, 6):
                median = compare(b, 49, blocks, {"expand": expand} if b == 8 else {"whole": ours})
                if b == 8:
                    expanded[blocks] = median
        theirs, own = (expanded[6][name] - expanded[1][name] for name in ("expand", "ours"))
        goals.append(("each later block, B=8, 49 tokens, against expand", theirs / own, 1.3, True))
        for blocks in (1, 6):
            growth = per_pair[32, 49, blocks] / per_pair[8, 49, blocks]
            goals.append((f"time a pair, B=32 / B=8, {blocks} blocks", growth, 1.1, False))
    if options.quick:
        compare(32, 49, 2, {"whole": ours}, tile=16)
    else:
        compare(100, 49, 6, {"whole": ours}, tile=25)
        for tile in (25, None):
            rows[-1]["peak_mb" if tile else "peer_peak_mb"] = round(peak_megabytes(100, 49, 6, tile), 1)
        goals.append(("MB at most in tiles, B=100, 6 blocks", rows[-1]["peak_mb"], 3000, False))
        print(f"peak memory in tiles {rows[-1]['peak_mb']} MB, whole {rows[-1]['peer_peak_mb']} MB")

    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    missed = 0
    for name, reached, limit, at_least in goals:
        met = reached >= limit if at_least else reached <= limit
        missed += not met
        print(
            f"{'reached' if met else 'MISSED ':8} {name}: {reached:.3g}, wanted {'>=' if at_least else '<='} {limit:g}"
        )
    return 1 if missed and not options.no_check else 0


if __name__ == "__main__":
    sys.exit(main())
