"""SCM's diffusion without matrices against the published dense form: same numbers, then times and memory.

    python benchmarks/scm_diffusion.py [--rounds 5] [--no-check] [--no-steps]

Peers: *dense*, Newton-Schulz on explicit n x n matrices as published; *doubled*, the fix anyone would make first (only
the product with F is wanted, so one matrix product a round instead of two). The candidates take turns within a round;
times are milliseconds of a whole layer, features to diffused map and back, the median over the rounds: of processor
time on a CPU, of the clock on a GPU. *Saved* is what autograd keeps for the backward pass, the features included. The
training steps are ViT-Tiny and ViT-Small at 224 px, 200 classes, AdamW, in turns as well.

Only ratios compare between machines; the goals at the end are ratios.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import DEVICE, Benchmark, in_turns
from scm_wsol import SCM, TSCAM, stencil
from scm_wsol.calibration import ALPHA, dense_diffusion
from scm_wsol.stencil import stencil_diffusion
from scm_wsol.task import ClassificationTask
from torch import Tensor

CHANNELS = 200
SIZES = {14: 8, 28: 2, 37: 1}
"""Images of a batch, by side of the grid: as many as the dense form does in a second or few."""

Layer = Callable[..., Tensor]


def doubled_diffusion(
    S: Tensor, F: Tensor, rate: Tensor, *, iterations: int, alpha: float, detach_init: bool
) -> Tensor:
    height, width = S.shape[-2:]
    X = stencil.stencil_laplacian(stencil.stencil_similarity(S), rate, height, width)
    return stencil.doubled_series(X, alpha * (X.detach() if detach_init else X), F, width, iterations)


LAYERS: dict[str, Layer] = {"ours": stencil_diffusion, "dense": dense_diffusion, "doubled": doubled_diffusion}


def inputs(side: int, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Channels-last features, as the convolution head leaves them, an attention map and λ."""
    generator = torch.Generator().manual_seed(side)
    S = torch.randn(batch, side, side, CHANNELS, generator=generator, dtype=torch.float64).permute(0, 3, 1, 2)
    F = torch.rand(batch, side * side, generator=generator, dtype=torch.float64)
    rate = torch.full((1,), 1.05, dtype=torch.float64)
    S, F, rate = (x.to(DEVICE, dtype).requires_grad_() for x in (S, F, rate))
    return S, F, rate


def run(layer: Layer, given: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The map and the gradients of S, F and λ."""
    d = layer(*given, alpha=ALPHA, **options)
    weights = torch.linspace(-1, 1, d.shape[1], dtype=d.dtype, device=d.device)
    return [d.detach(), *torch.autograd.grad((d * weights).sum(), given)]


def largest_difference(peer: str, side: int, options: dict[str, Any]) -> float:
    """From ours in float64, of the map and all gradients, each in units of its own largest entry."""
    given = inputs(side, 1, torch.float64)
    found = [run(LAYERS[name], given, options) for name in ("ours", peer)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found))


def saved_mb(layer: Layer, given: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> float:
    """What autograd keeps, in MB per image; storage that several tensors share counts once."""
    kept: dict[int, tuple[Any, int]] = {}  # the storages are held, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        d = layer(*given, alpha=ALPHA, **options)
    assert d.requires_grad
    return sum(size for _, size in kept.values()) / 1e6 / len(given[0])


def training_step(method: str, backbone: str, batch: int) -> Callable[[], object]:
    """Forward, backward and AdamW of one batch; all methods start from the same weights."""
    torch.manual_seed(0)
    options = {"num_classes": CHANNELS, "drop_path_rate": 0.1}
    if method == "TS-CAM":
        model: TSCAM = TSCAM(backbone, **options)
    else:
        model = SCM(
            backbone,
            calibration_options={"backend": "dense" if method == "SCM dense" else "stencil"},
            **options,
        )
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    size = (224, 224)
    data = {
        "images": torch.randn(batch, 3, *size, device=DEVICE),
        "labels": torch.arange(batch, device=DEVICE),
    }
    task = ClassificationTask()

    def step() -> None:
        optimizer.zero_grad()
        task(model, data)["loss"].backward()
        optimizer.step()

    return step


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and saved memory of one layer per image, against the number of patches, from the rows of p = 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    layers = [row for row in rows if row["case"].startswith("p=4") and row["case"].endswith("constant V0")]
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for found in layers:
        n, images = found["patches"], found["images"]
        curves.setdefault(found["peer"], []).append((n, found["peer_ms"] / images, found["peer_saved_mb"]))
        if found["peer"] == "dense":
            curves.setdefault("ours", []).append((n, found["ours_ms"] / images, found["saved_mb"]))
    for name, points in curves.items():
        n, ms, saved = zip(*points)
        time_axes.loglog(n, ms, "o-", label=name)
        memory_axes.loglog(n, saved, "o-", label=name)
    for axes, label in (
        (time_axes, "ms per image, there and back"),
        (memory_axes, "MB per image kept for backward"),
    ):
        axes.set(xlabel="patches n", ylabel=label)
        axes.set_xticks([side * side for side in SIZES], [f"{side}²" for side in SIZES])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    time_axes.legend()
    figure.suptitle("Diffusion layer of SCM, p = 4, 200 classes", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    packages = ("scm-wsol", "attnmap-core", "torch", "numba", "numpy", "timm")
    bench = Benchmark(__file__, __doc__, packages=packages, rounds=5)
    bench.parser.add_argument("--no-steps", action="store_true", help="leave the whole training steps out")
    options = bench.start(arguments)

    wanted = {14: (10, 5), 28: (80, 20), 37: (300, 35)}
    growth: list[tuple[int, float]] = []
    for side, batch in SIZES.items():
        for name, detach in (("constant V0", True), ("differentiable V0", False)):
            case = {"iterations": 4, "detach_init": detach}
            given = inputs(side, batch)
            differences = {peer: largest_difference(peer, side, case) for peer in ("dense", "doubled")}
            assert max(differences.values()) < 1e-9, differences
            works = {peer: lambda f=layer, g=given, o=case: run(f, g, o) for peer, layer in LAYERS.items()}
            ms = in_turns(works, max(options.rounds if side == 14 else options.rounds - 2, 1), least_ms=50)
            saved = {peer: saved_mb(layer, given, case) for peer, layer in LAYERS.items()}
            for peer in ("dense", "doubled"):
                more: dict[str, Any] = {"patches": side * side, "images": batch}
                more |= {"saved_mb": round(saved["ours"], 3), "peer_saved_mb": round(saved[peer], 3)}
                ratio = bench.row(
                    f"p=4, {side} x {side}, batch {batch}, {name}",
                    ms["ours"],
                    peer,
                    ms[peer],
                    differences[peer],
                    **more,
                )
                if peer == "dense" and detach:
                    bench.at_least(f"layer, k={side}", ratio, wanted[side][0])
                    bench.at_least(f"saved memory, k={side}", saved["dense"] / saved["ours"], wanted[side][1])
                    print(
                        f"{'':8}saved per image: ours {saved['ours']:.2f} MB, dense {saved['dense']:.2f} MB"
                    )
    for side in (14, 20, 28, 37, 52):  # the same batch for all: time against n
        given, case = inputs(side, 4), {"iterations": 4, "detach_init": True}
        ms = in_turns(
            {"ours": lambda g=given, o=case: run(stencil_diffusion, g, o)}, options.rounds, least_ms=50
        )["ours"]
        growth.append((side * side, ms))
    logs = [(math.log(n), math.log(ms)) for n, ms in growth]
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*logs))
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    bench.note("growth, batch 4", n_ms=growth, exponent=exponent)
    print("growth: " + ", ".join(f"n={n} {ms:.2f} ms" for n, ms in growth) + f"; exponent {exponent:.2f}")
    bench.at_most("growth exponent in n", exponent, 1.2)

    for side, batch in SIZES.items():
        case = {"iterations": 16, "detach_init": True}
        given = inputs(side, batch)
        difference = largest_difference("dense" if side == 14 else "doubled", side, case)
        names = ("ours", "dense", "doubled") if side == 14 else ("ours", "doubled")
        works = {peer: lambda f=LAYERS[peer], g=given, o=case: run(f, g, o) for peer in names}
        ms = in_turns(works, 2, least_ms=50)
        for peer in names[1:]:
            bench.row(
                f"p=16, {side} x {side}, batch {batch}, constant V0", ms["ours"], peer, ms[peer], difference
            )

    if not options.no_steps:
        most = {"deit_tiny_patch16_224": 1.15, "deit_small_patch16_224": 1.08}
        for backbone, limit in most.items():
            methods = ["TS-CAM", "SCM", "SCM dense"] if "tiny" in backbone else ["TS-CAM", "SCM"]
            steps = {method: training_step(method, backbone, 16) for method in methods}
            ms = in_turns(steps, 3)
            short = "ViT-Tiny" if "tiny" in backbone else "ViT-Small"
            for peer in methods:
                if peer != "SCM":
                    bench.row(f"training step, {short}, batch 16: SCM", ms["SCM"], peer, ms[peer])
            bench.at_most(f"{short} step, SCM / TS-CAM", ms["SCM"] / ms["TS-CAM"], limit)

    plot(bench.rows, options.out.with_suffix(".png"))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
