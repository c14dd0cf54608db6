"""Time PTAP, the mean of the strongest channels at each pixel, against what else does it.

The peers are *topk*, ``torch.topk`` over the channels, which anyone would write first; *unsorted*, the same on a
channel-last copy without sorting, the cheap fix; *sort*; *kthvalue*, a threshold by ``torch.kthvalue``; and *plain
torch*, the form of this library that serves devices without a kernel. For scale: *mean*, which reads the input once.
At the end whole training steps: the full method on photos and their transformed copies, against *PsyNet* on as many
images.

Values and gradients are compared in float64 first, on features without equal values: where values tie, the gradient of
``torch.topk`` depends on chance. The candidates take turns within a round; times are milliseconds, the median over the
rounds: of processor time on a CPU, of the clock on a GPU. Only ratios compare between machines; the goals are ratios.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _harness import DEVICE, Benchmark, in_turns
from contrastive_cam import ContrastiveCAM, ptap
from contrastive_cam.pooling import kept_channels, plain_pool
from contrastive_cam.task import ColocalizationTask
from torch import Tensor

SHAPES = ((8, 2048, 14), (8, 2048, 7), (32, 512, 14))
CALLS = 20 if DEVICE.type == "cuda" else 1
"""Of a pooling within a turn: a single one would time the launch."""
RATIOS = (0.1, 0.5, 0.7, 1.0)

Pool = Callable[[Tensor, float], Tensor]


# --- Candidates -------------------------------------------------------------------------------------------


def topk(F: Tensor, ratio: float) -> Tensor:
    return F.topk(kept_channels(ratio, F.shape[1]), dim=1).values.mean(1)


def unsorted(F: Tensor, ratio: float) -> Tensor:
    last = F.permute(0, 2, 3, 1).contiguous()
    return last.topk(kept_channels(ratio, F.shape[1]), dim=-1, sorted=False).values.mean(-1)


def by_sort(F: Tensor, ratio: float) -> Tensor:
    return F.sort(dim=1, descending=True).values[:, : kept_channels(ratio, F.shape[1])].mean(1)


def by_kthvalue(F: Tensor, ratio: float) -> Tensor:
    channels = F.shape[1]
    k = kept_channels(ratio, channels)
    least = F.detach().kthvalue(channels - k + 1, dim=1, keepdim=True).values
    above = least < F
    return (torch.where(above, F, 0).sum(1) + (k - above.sum(1)) * least.squeeze(1)) / k


def plain(F: Tensor, ratio: float) -> Tensor:
    A, _ = plain_pool(F.flatten(2), kept_channels(ratio, F.shape[1]), False)
    return A.reshape(F.shape[0], *F.shape[2:])


def mean(F: Tensor, ratio: float) -> Tensor:
    return F.mean(1)


PEERS: dict[str, Pool] = {
    "topk": topk,
    "unsorted": unsorted,
    "sort": by_sort,
    "kthvalue": by_kthvalue,
    "plain torch": plain,
}
WITH_GRADIENT = ("topk", "unsorted", "sort", "plain torch")


# --- Cases ------------------------------------------------------------------------------------------------


def features(b: int, c: int, side: int, relu: bool) -> Tensor:
    F = torch.randn(b, c, side, side, generator=torch.Generator().manual_seed(side))
    return (F.relu() if relu else F).to(DEVICE)


def largest_difference(peer: Pool, F: Tensor, ratio: float, gradient: bool) -> float:
    """From ours in float64, of the map and of its gradient, each in units of its own largest entry."""
    F = F[:2].double().requires_grad_()
    found = []
    for pool in (ptap, peer):
        A = pool(F, ratio)
        more = torch.autograd.grad(A.square().sum(), F) if gradient else ()
        found.append((A.detach(), *more))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found))


def saved_share(F: Tensor, ratio: float) -> float:
    """Bytes kept for the backward pass, as a share of the input's."""
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        ptap(F.detach().requires_grad_(), ratio)
    return sum(kept) / (F.numel() * F.element_size())


def both_ways(pool: Pool, F: Tensor, ratio: float) -> None:
    A = pool(F, ratio)
    torch.autograd.grad(A, F, torch.ones_like(A))


def training_step(photos: int, task: ColocalizationTask, **options: Any) -> Callable[[], None]:
    """A step on SE-ResNet50 at 224 pixels, from drawing the transformations to the weights' update."""
    torch.manual_seed(0)
    model = ContrastiveCAM(**options).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    images = torch.randn(photos, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        task(model, {"images": images})["loss"].backward()
        optimizer.step()

    return step


def main(arguments: list[str] | None = None) -> int:
    bench = Benchmark(__file__, __doc__, packages=("contrastive-cam", "torch", "numba", "numpy"), rounds=5)
    bench.parser.add_argument("--quick", action="store_true", help="the first shape and the ratio 0.7 alone")
    options = bench.start(arguments)
    for b, c, side in SHAPES[:1] if options.quick else SHAPES:
        for relu in (False, True):
            F = features(b, c, side, relu)
            for ratio in (0.7,) if options.quick else RATIOS:
                case = f"{b}x{c}x{side}x{side}, {ratio:.0%}{', ReLU' if relu else ''}"
                main_case = (b, c, side) == SHAPES[0] and ratio == 0.7
                # Equal zeros leave the gradient of topk to chance.
                differences = {
                    name: largest_difference(pool, F, ratio, name in WITH_GRADIENT and not relu)
                    for name, pool in PEERS.items()
                }
                assert max(differences.values()) < 1e-9, differences
                with torch.no_grad():
                    pools = {"ours": ptap, **PEERS, "mean": mean}
                    works = {name: lambda f=f, F=F, r=ratio: f(F, r) for name, f in pools.items()}
                    ms = in_turns(works, options.rounds, times=dict.fromkeys(works, CALLS))
                for peer in (*PEERS, "mean"):
                    reached = bench.row(f"forward, {case}", ms["ours"], peer, ms[peer], differences.get(peer))
                    if peer == "topk" and main_case:
                        bench.at_least(f"forward, {case}, against topk", reached, 3.5)
                F.requires_grad_()
                pools = {
                    "ours": ptap,
                    **{name: PEERS[name] for name in WITH_GRADIENT if name != "plain torch"},
                    "mean": mean,
                }
                works = {name: lambda f=f, F=F, r=ratio: both_ways(f, F, r) for name, f in pools.items()}
                ms = in_turns(works, options.rounds, times=dict.fromkeys(works, CALLS))
                for peer in list(pools)[1:]:
                    reached = bench.row(
                        f"both ways, {case}", ms["ours"], peer, ms[peer], differences.get(peer)
                    )
                    if peer == "topk" and main_case:
                        bench.at_least(f"both ways, {case}, against topk", reached, 2.0)
                if main_case:
                    share = saved_share(F, ratio)
                    bench.note(f"saved for backward, {case}", share_of_input=share)
                    bench.at_most(f"saved for backward, {case}, of the input", share, 1.1)

    photos = 4 if DEVICE.type == "cpu" else 32
    ms = in_turns(
        {
            "full": training_step(photos, ColocalizationTask()),
            "PsyNet": training_step(2 * photos, ColocalizationTask(weight=0), gate="none", pooling="avg"),
        },
        2 if options.quick else options.rounds,
    )
    case = f"training step, SE-ResNet50, {2 * photos} images"
    reached = bench.row(case, ms["full"], "PsyNet", ms["PsyNet"])
    bench.at_most(f"{case}, of PsyNet's", 1 / reached, 1.1)

    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
