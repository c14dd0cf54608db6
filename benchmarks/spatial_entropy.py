"""Spatial entropy loss against the published loop over maps and components: same numbers, then times.

    python benchmarks/spatial_entropy.py [--rounds 7] [--no-check] [--no-steps]

Peers: *published*, the released loss restated (each map to the host, OpenCV labels it, one mask tensor for each
component, an entropy over the ragged stack); *scipy*, the fix anyone would make first (one ``scipy.ndimage.label`` for
the whole batch, sums by label); *kornia*, its exact union-find on the device in place of that; *poolings*, kornia's
other labelling with its 100 max-poolings, which is wrong on long thin components (here too, on a smaller case, where it
is right). The candidates take turns within a round; times are milliseconds of the loss forward and backward, the
median over the rounds: of processor time on a CPU, of the clock on a GPU.

The step is ViT-S/16 at 224 px, forward, backward and AdamW, of 8 images on a CPU and of 128 on CUDA, where fewer leave
the device idle; there the copies from device to host in one loss
are counted with the profiler. Only ratios compare between machines; the goals at the end are ratios.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["opencv-python-headless>=4.10.0.84", "kornia>=0.9"]
# ///

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import timm
import torch
from _harness import DEVICE, Benchmark, in_turns
from kornia.contrib import connected_components, connected_components_union_find
from sar_vit import SpatialEntropyLoss, apply_sar, spatial_entropy, spatial_entropy_loss
from sar_vit.entropy import plain_entropy
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-9

Loss = Callable[[Tensor], Tensor]


# --- Candidates -------------------------------------------------------------------------------------------


def ours(S: Tensor) -> Tensor:
    return spatial_entropy(S, EPS, "mean")


def published(S: Tensor) -> Tensor:
    """With the types of the released code: an int64 mask for each component, by way of float64."""
    b, heads, h, w = S.shape
    flat = S.flatten(2)
    m = flat.mean(-1, keepdim=True)
    above = (flat > m).long()
    on_host = above.cpu().numpy()
    images: list[int] = []
    which: list[int] = []
    masks: list[Tensor] = []
    for image in range(b):
        for head in range(heads):
            picture = ((on_host[image, head].reshape(h, w, 1) > 0) * 1).astype("uint8")
            count, labels = cv2.connectedComponents(picture, connectivity=8, ltype=cv2.CV_16U)
            for component in range(1, count):
                images.append(image)
                which.append(head)
                masks.append(torch.tensor((labels == component) * 1.0).reshape(-1).long())
    owner = (torch.tensor(images, device=S.device), torch.tensor(which, device=S.device))
    mask = torch.stack(masks).to(S.device)
    B = torch.relu(flat - m) + EPS
    mass = (B[owner] * mask).sum(-1)
    total = (B[owner] * above[owner]).sum(-1)
    P = mass / total
    loss = -(P * P.log()).sum() / (b * heads)
    return loss if math.isfinite(loss.detach()) else loss * 0


def by_labels(S: Tensor, labels: Tensor) -> Tensor:
    """Sums by label, (m, n) from 1 within each map and 0 for background; the entropy by autograd."""
    m, n = labels.shape
    flat = S.flatten(2).flatten(0, 1)
    B = torch.where(labels > 0, flat - flat.mean(1, keepdim=True) + EPS, 0)
    slot = (labels + (n + 1) * torch.arange(m, device=S.device).unsqueeze(1)).flatten()
    mass = B.new_zeros(m * (n + 1)).index_add(0, slot, B.flatten()).reshape(m, n + 1)
    total = mass.sum(1, keepdim=True)
    P = mass / torch.where(total > 0, total, 1)
    P = torch.where(P > 0, P, 1)  # 1 log 1 has a gradient where 0 log 0 has none
    return -(P * P.log()).sum() / m


def foreground(S: Tensor) -> Tensor:
    return S.detach() - S.detach().mean((2, 3), keepdim=True) > 0


def scipy_labels(S: Tensor) -> Tensor:
    stack = foreground(S).flatten(0, 1).cpu().numpy()
    structure = np.zeros((3, 3, 3))
    structure[1] = 1
    labels, _ = ndimage.label(stack, structure)
    flat = labels.reshape(len(stack), -1)
    first = np.where(flat > 0, flat, flat.max() + 1).min(1, keepdims=True)  # those of a map are consecutive
    local = np.where(flat > 0, flat - first + 1, 0)
    return by_labels(S, torch.from_numpy(local.astype(np.int64)).to(S.device))


def kornia_labels(S: Tensor, label: Callable[..., Tensor] = connected_components_union_find) -> Tensor:
    mask = foreground(S).flatten(0, 1).unsqueeze(1).to(torch.float32)
    labels = label(mask).flatten(1).long()
    n = labels.shape[1]
    largest = labels.amax(1, keepdim=True).clamp_min(1)
    return by_labels(S, torch.where(labels > 0, (largest - labels) % n + 1, 0))  # consistent within a map


def poolings(S: Tensor) -> Tensor:
    return kornia_labels(S, lambda mask: connected_components(mask, 100))


def plain(S: Tensor) -> Tensor:
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, S: Tensor) -> Tensor:
            E, gradient, _ = plain_entropy(S.flatten(2).flatten(0, 1), S.shape[3], EPS)
            ctx.save_for_backward(gradient)
            return E.mean()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            [gradient] = ctx.saved_tensors
            return (grad / len(gradient) * gradient).reshape(S.shape)

    result: Any = Loss.apply(S)
    return result


# --- Cases ------------------------------------------------------------------------------------------------


def maps(b: int, heads: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Half smooth maps and half noise, as early and late in a training."""
    rng = np.random.default_rng(k)
    S = rng.standard_normal((b, heads, k, k))
    S[::2] = ndimage.gaussian_filter(S[::2], (0, 0, 1.2, 1.2))
    return torch.from_numpy(S).to(DEVICE, dtype).requires_grad_()


def largest_difference(peer: Loss, S: Tensor) -> float:
    """From ours in float64, of the loss and its gradient, each in units of its own largest entry."""
    S = S.detach().double().requires_grad_()
    found = []
    for loss in (ours, peer):
        value = loss(S)
        found.append((value.detach(), *torch.autograd.grad(value, S)))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found))


def forward_backward(loss: Loss, S: Tensor) -> None:
    torch.autograd.grad(loss(S), S)


def training_step(kind: str, batch: int) -> Callable[[], object]:
    """Forward, backward and AdamW of one batch; all kinds have the same last block and start from the same weights."""
    torch.manual_seed(0)
    net: nn.Module = timm.create_model("deit_small_patch16_224", drop_path_rate=0.1)
    net = apply_sar(net, collect=kind == "sar").to(DEVICE).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    images, labels = torch.randn(batch, 3, 224, 224, device=DEVICE), torch.arange(batch, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(images), labels)
        if kind == "sar":
            loss = loss + 0.01 * spatial_entropy_loss(net)
        loss.backward()
        optimizer.step()

    return step


def copies_to_host(S: Tensor) -> int:
    """Copies from the device in one loss, forward and backward, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    loss = SpatialEntropyLoss(nonfinite="skip_batch")
    loss.measure(S).loss.backward()
    with torch.profiler.profile(activities=activities) as profile:
        loss.measure(S).loss.backward()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "DtoH" in event.key)


def main(arguments: list[str] | None = None) -> int:
    packages = ("sar-vit", "torch", "numba", "numpy", "scipy", "timm", "kornia", "opencv-python-headless")
    bench = Benchmark(__file__, __doc__, packages=packages, rounds=7)
    bench.parser.add_argument("--no-steps", action="store_true", help="leave the whole training steps out")
    options = bench.start(arguments)
    cv2.setNumThreads(1)

    peers: dict[str, Loss] = {
        "published": published,
        "scipy": scipy_labels,
        "kornia": kornia_labels,
        "plain torch": plain,
    }
    per_pixel: dict[tuple[int, int, int], float] = {}
    heads = 6
    for b in (8, 64, 128):
        for k in (7, 14, 28):
            S = maps(b, heads, k)
            small = (
                b == 8 and k < 28
            )  # the poolings split long components of larger grids, and take their time
            candidates: dict[str, Loss] = {"ours": ours} | peers | ({"poolings": poolings} if small else {})
            differences = {
                name: largest_difference(loss, S) for name, loss in candidates.items() if name != "ours"
            }
            assert max(differences.values()) < 1e-9, differences
            works = {name: lambda f=loss, S=S: forward_backward(f, S) for name, loss in candidates.items()}
            ms = in_turns(works, options.rounds, times={"ours": 10 if b * k < 1000 else 3})
            per_pixel[b, heads, k] = 1e6 * ms["ours"] / S.numel()
            for peer, difference in differences.items():
                ratio = bench.row(f"loss, B={b}, H={heads}, k={k}", ms["ours"], peer, ms[peer], difference)
                if peer == "published" and b >= 64 and k == 14:
                    bench.at_least(f"loss, B={b}, k={k}, against published", ratio, 15)

    print("cost of a pixel: " + ", ".join(f"B={b} k={k} {ns:.1f} ns" for (b, _, k), ns in per_pixel.items()))
    by_size = [[b, k, round(ns, 2)] for (b, _, k), ns in per_pixel.items()]
    bench.note("cost of a pixel, ns", by_batch_and_side=by_size)
    # Flat once the maps outweigh the fixed cost of a call: slope of log cost against log pixels.
    large = {key: ns for key, ns in per_pixel.items() if key[0] >= 64 and key[2] >= 14}
    points = [(math.log(b * h * k * k), math.log(ns)) for (b, h, k), ns in large.items()]
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*points))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    bench.at_most("growth of a pixel's cost, exponent", slope, 0.15)
    bench.at_most("a pixel at B=128 k=28 / at B=64 k=14", large[128, heads, 28] / large[64, heads, 14], 1.3)

    if not options.no_steps:
        batch = 128 if DEVICE.type == "cuda" else 8
        S = maps(batch, heads, 14)
        works = {"plain": training_step("plain", batch), "sar": training_step("sar", batch)}
        works["loss"] = lambda: forward_backward(ours, S)
        works["published"] = lambda: forward_backward(published, S)
        ms = in_turns(works, max(options.rounds, 9), times={"loss": 50, "published": 5})
        bench.row(f"ViT-S/16 step, batch {batch}: with SAR", ms["sar"], "plain step", ms["plain"])
        bench.row(f"ViT-S/16 step, batch {batch}: the loss in it", ms["loss"], "published", ms["published"])
        print(
            f"of the step: loss {100 * ms['loss'] / ms['plain']:.4f} %, "
            f"published {100 * ms['published'] / ms['plain']:.4f} %"
        )
        percent = {
            f"{name}_percent": 100 * ms[of] / ms["plain"]
            for name, of in (("ours", "loss"), ("published",) * 2)
        }
        bench.note(f"percent of a ViT-S/16 step, batch {batch}", **percent)
        most = 1.0 if DEVICE.type == "cuda" else 0.05
        bench.at_most("loss, percent of a step", 100 * ms["loss"] / ms["plain"], most)
        bench.at_most("step with SAR / plain step", ms["sar"] / ms["plain"], 1.02)

    if DEVICE.type == "cuda":
        bench.at_most("copies from device to host", copies_to_host(maps(128, heads, 14)), 0)
    else:
        print("copies from device to host: not counted, there is no CUDA device")

    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
