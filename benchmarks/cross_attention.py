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

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from _harness import DEVICE, Benchmark, Work, in_turns, peak_megabytes
from crossattn_dml import CrossAttentionStack
from crossattn_dml.cross_attention import Mode
from torch import Tensor
from torch.nn import functional

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


def peak_of(b: int, n: int, blocks: int, tile: int | None) -> float:
    """Most memory of a forward and backward pass: of a program that does nothing else, or allocated on a GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_peak_here, b, n, blocks, tile).result()


def _peak_here(b: int, n: int, blocks: int, tile: int | None) -> float:
    torch.set_num_threads(1)
    stack, u, X = make(b, n, blocks)
    stack.tile = tile
    forward_backward(ours, stack, u, X)
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else peak_megabytes()


def main(arguments: list[str] | None = None) -> int:
    bench = Benchmark(__file__, __doc__, packages=("crossattn-dml", "torch"), rounds=3)
    bench.parser.add_argument(
        "--quick", action="store_true", help="the two goals of one block and one tiled case only"
    )
    options = bench.start(arguments)
    differences = {"expand": difference(expand), "loop": difference(loop)}
    assert max(differences.values()) < 1e-9, differences

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
        works: dict[str, Work] = {"ours": lambda: forward_backward(ours, stack, u, X)}
        works |= {name: lambda f=f: forward_backward(f, whole, u, X) for name, f in peers.items()}
        ms = in_turns(works, options.rounds)
        saved = saved_megabytes(ours, stack, u, X)
        for name, peer in peers.items():
            case = f"B={b}, {n} tokens, {blocks} {mode}" + (f", tile {tile}" if tile else "")
            theirs = saved_megabytes(peer, whole, u, X)
            more = {"saved_mb": round(saved, 2), "peer_saved_mb": round(theirs, 2)}
            bench.row(case, ms["ours"], name, ms[name], differences.get(name), **more)
            print(f"{'':8}saved for backward: ours {saved:.1f} MB, {name} {theirs:.1f} MB")
            if tile is not None:
                bench.at_most("time in tiles / whole", ms["ours"] / ms[name], 1.4)
                bench.at_least("saved memory whole / in tiles", theirs / saved, 4)
        return ms

    for b, n, wanted in ((12, 49, 8), (6, 196, 3)):
        ms = compare(b, n, 1, {"expand": expand, "loop": loop}, mode="ca_only")
        bench.at_least(
            f"attention of one block, B={b}, {n} tokens, against expand", ms["expand"] / ms["ours"], wanted
        )
    if options.quick:
        compare(32, 49, 2, {"whole": ours}, tile=16)
        return bench.finish()
    ms_of = {
        (b, blocks): compare(b, 49, blocks, {"expand": expand} if b == 8 else {"whole": ours})
        for b in (8, 16, 32)
        for blocks in (1, 6)
    }
    theirs, own = (ms_of[8, 6][name] - ms_of[8, 1][name] for name in ("expand", "ours"))
    bench.at_least("each later block, B=8, 49 tokens, against expand", theirs / own, 1.3)
    for blocks in (1, 6):
        growth = (ms_of[32, blocks]["ours"] / 32**2) / (ms_of[8, blocks]["ours"] / 8**2)
        bench.at_most(f"time a pair, B=32 / B=8, {blocks} blocks", growth, 1.1)
    compare(100, 49, 6, {"whole": ours}, tile=25)
    tiled, whole = (peak_of(100, 49, 6, tile) for tile in (25, None))
    bench.note("peak, B=100, 49 tokens, 6 block", tile_25_mb=round(tiled, 1), whole_mb=round(whole, 1))
    bench.at_most("MB at most in tiles, B=100, 6 blocks", tiled, 3000)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
