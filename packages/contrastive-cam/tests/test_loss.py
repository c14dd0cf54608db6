"""The losses against loops in NumPy, at hand-made and degenerate maps, and in two processes against one."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contrastive_cam import contrastive_map_loss
from contrastive_cam.loss import CHOICES, contrastive_terms, foreground_background_loss, gathered
from contrastive_cam.transforms import inverse_theta, map_validity, theta_of, warp_maps
from torch import Tensor

TAU = 0.3


def batch(b: int = 4, size: tuple[int, int] = (5, 6), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A, A_t = torch.rand(2, b, *size, dtype=torch.float64, generator=generator)
    labels = {
        "rotation": torch.randint(4, (b,), generator=generator),
        "scale": torch.randint(3, (b,), generator=generator),
    }
    for task, identity in (("rotation", 0), ("scale", 1)):
        labels[task][0] = identity
    return A, A_t, theta_of(labels)


def similar(a: np.ndarray, b: np.ndarray, kind: str) -> float:
    if kind == "neg_mse":
        a, b = ((x - x.min()) / (x.max() - x.min()) for x in (a, b))
        return -float(((a - b) ** 2).mean())
    if kind == "pearson":
        a, b = a - a.mean(), b - b.mean()
    return float(a @ b / max(np.linalg.norm(a), 1e-8) / max(np.linalg.norm(b), 1e-8))


def picked(right: float, all_of_them: list[float]) -> float:
    """Cross-entropy of the first among all."""
    return -math.log(math.exp(right / TAU) / sum(math.exp(x / TAU) for x in all_of_them))


def reference(
    A: Tensor, A_t: Tensor, theta: Tensor, align: str, undefined: str, kind: str, negatives: str, frame: str
) -> float:
    """The definitions, image by image."""
    if align == "both":
        both = (
            reference(A, A_t, theta, one, undefined, kind, negatives, frame) for one in ("forward", "inverse")
        )
        return sum(both) / 2
    forward, number, size = align == "forward", len(A), (A.shape[1], A.shape[2])
    used = theta if forward else inverse_theta(theta)
    masks = (
        map_validity(used, size).flatten(1).numpy()
        if undefined == "mask"
        else np.ones((number, size[0] * size[1]))
    )
    u = (warp_maps(A, used) if forward else A).flatten(1).numpy() * masks
    v = (A_t if forward else warp_maps(A_t, used)).flatten(1).numpy() * masks
    everyone = range(number)
    if frame == "anchor":
        total = 0.0
        for i in everyone:
            moved = [
                (warp_maps(A[j : j + 1], used[i : i + 1]) if forward else A[j]).flatten().numpy() * masks[i]
                for j in everyone
            ]
            total += picked(similar(v[i], moved[i], kind), [similar(v[i], x, kind) for x in moved])
        return total / number
    S = np.array([[similar(v[i], u[j], kind) for j in everyone] for i in everyone])
    if negatives == "none":
        return float(np.mean([1 - S[i, i] for i in everyone]))
    if negatives == "batch_all":
        z = [*v, *u]
        total = 0.0
        for i in range(2 * number):
            others = [similar(z[i], z[j], kind) for j in range(2 * number) if j != i]
            total += picked(similar(z[i], z[(i + number) % (2 * number)], kind), others)
        return total / (2 * number)
    rows, columns = [list(S[i]) for i in everyone], [list(S[:, j]) for j in everyone]
    if negatives == "unaligned":
        for i in everyone:
            if np.allclose(theta[i].numpy(), np.eye(2, 3)):
                continue
            if forward:
                rows[i].append(similar(v[i], A[i].flatten().numpy(), kind))
            else:
                columns[i].append(similar(u[i], A_t[i].flatten().numpy(), kind))
    losses = [(picked(S[i, i], rows[i]) + picked(S[i, i], columns[i])) / 2 for i in everyone]
    return float(np.mean(losses))


NAMES = ("align", "undefined", "similarity", "negatives", "negatives_frame")
COMBINATIONS = [
    values
    for values in itertools.product(*(CHOICES[name] for name in NAMES))
    if values[4] == "own" or values[3] == "batch"
]


@pytest.mark.parametrize("values", COMBINATIONS, ids="-".join)
def test_every_combination(values):
    A, A_t, theta = batch()
    found = contrastive_map_loss(A, A_t, theta, tau=TAU, **dict(zip(NAMES, values)))
    assert found.item() == pytest.approx(reference(A, A_t, theta, *values), abs=1e-12)
    single = contrastive_map_loss(A.float(), A_t.float(), theta.float(), tau=TAU, **dict(zip(NAMES, values)))
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(found.item(), abs=1e-5)


@pytest.mark.parametrize("values", COMBINATIONS[::7], ids="-".join)
def test_gradient_numerically(values):
    A, A_t, theta = (x[:3, ..., :4] if x.ndim == 3 and x.shape[1] > 2 else x[:3] for x in batch(size=(3, 4)))
    A, A_t = A.clone().requires_grad_(), A_t.clone().requires_grad_()
    options = dict(zip(NAMES, values))
    assert torch.autograd.gradcheck(
        lambda a, b: contrastive_map_loss(a, b, theta, tau=TAU, **options), (A, A_t)
    )


def test_closed_form_of_the_gradient_of_similarities():
    """dL/dS = (P + Q - 2 I) / (2 B tau), through unit vectors that are the maps themselves."""
    torch.manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(3, 8, dtype=torch.float64), dim=1)
    u = torch.nn.functional.normalize(torch.randn(3, 8, dtype=torch.float64), dim=1)
    A, A_t = u.reshape(3, 2, 4).requires_grad_(), v.reshape(3, 2, 4).requires_grad_()
    identity = theta_of({"flip": torch.ones(3).long()})
    contrastive_map_loss(A, A_t, identity, tau=TAU).backward()
    S = v @ u.T
    G = ((S / TAU).softmax(1) + (S / TAU).softmax(0) - 2 * torch.eye(3, dtype=torch.float64)) / (6 * TAU)
    expected = torch.stack([sum(G[i, j] * (u[j] - S[i, j] * v[i]) for j in range(3)) for i in range(3)])
    torch.testing.assert_close(A_t.grad.flatten(1), expected)


@pytest.mark.parametrize(("stop", "blocked"), [("none", None), ("original", 0), ("transformed", 1)])
def test_stop_grad(stop, blocked):
    A, A_t, theta = batch()
    maps = (A.requires_grad_(), A_t.requires_grad_())
    contrastive_map_loss(*maps, theta, stop_grad=stop).backward()
    for i, x in enumerate(maps):
        assert (x.grad is None) == (i == blocked)


def test_padding_is_punished_forward_and_forgiven_inverse():
    """After a zoom-out, activation on the undefined border."""
    theta = theta_of({"scale": torch.tensor([0, 0])})
    A = torch.rand(2, 14, 14, dtype=torch.float64)
    clean = warp_maps(A, theta)
    border = map_validity(theta, (14, 14)) == 0
    assert border.any()
    dirty = torch.where(border, 0.5, clean)
    for align, punished in (("forward", True), ("inverse", False)):
        losses = [
            contrastive_map_loss(A, x, theta, align=align, negatives="none").item() for x in (clean, dirty)
        ]
        assert (losses[1] > losses[0] + 0.05) == punished
    assert contrastive_map_loss(A, dirty, theta, undefined="mask", negatives="none").item() < 1e-3


def test_maps_that_cannot_be_told_apart():
    for number in (1, 2, 7):
        ones, theta = torch.ones(number, 4, 4), theta_of({"flip": torch.zeros(number).long()})
        assert contrastive_map_loss(ones, ones, theta).item() == pytest.approx(math.log(number), abs=1e-6)


@pytest.mark.parametrize("similarity", CHOICES["similarity"])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps_leave_gradients_small(similarity, value):
    A, A_t, theta = batch()
    A[1], A_t[2] = value, value
    A, A_t = A.requires_grad_(), A_t.requires_grad_()
    loss = contrastive_map_loss(A, A_t, theta, similarity=similarity)
    loss.backward()
    assert loss.isfinite()
    for x in (A, A_t):
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() < 1e3


def test_half_precision_and_autocast():
    A, A_t, theta = batch(size=(28, 28))
    large = (A * 300).half()  # whose products overflow in half precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrastive_map_loss(large, (A_t * 300).half(), theta)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(contrastive_map_loss(A, A_t, theta).item(), abs=2e-3)


def test_what_is_watched():
    A, A_t, theta = batch()
    terms = contrastive_terms(A, A_t, theta)
    S = terms.similarity
    assert not S.requires_grad
    assert terms.positive.item() == pytest.approx(S.diagonal().mean().item())
    assert terms.negative.item() == pytest.approx(S[~torch.eye(4, dtype=torch.bool)].mean().item())
    assert terms.loss.item() == pytest.approx((terms.loss_vu + terms.loss_uv).item() / 2)
    assert contrastive_terms(A[:1], A_t[:1], theta[:1]).negative.item() == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tau": 0}, "tau must be above 0"),
        ({"align": "sideways"}, "align must be one of"),
        ({"negatives": "some"}, "negatives must be one of"),
        ({"negatives": "none", "negatives_frame": "anchor"}, "goes with negatives='batch'"),
        ({"A_t": torch.zeros(4, 5, 5)}, "expected"),
        ({"theta": torch.zeros(3, 2, 3)}, "expected"),
    ],
)
def test_bad_input(change, complaint):
    A, A_t, theta = batch()
    with pytest.raises(ValueError, match=complaint):
        contrastive_map_loss(**({"A": A, "A_t": A_t, "theta": theta} | change))


# --- Foreground against background -----------------------------------------------------------------


def fgbg_reference(F: Tensor, F_t: Tensor, A: Tensor, A_t: Tensor) -> float:
    def regions(F: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        m = (A - A.min()) / (A.max() - A.min())
        return (F * m).sum((1, 2)) / m.sum(), (F * (1 - m)).sum((1, 2)) / (1 - m).sum()

    originals = [regions(f.numpy(), a.numpy()) for f, a in zip(F, A)]
    others = [regions(f.numpy(), a.numpy()) for f, a in zip(F_t, A_t)]
    grounds = [bg for _, bg in [*originals, *others]]
    total = 0.0
    for (fg, _), (fg_t, _) in zip(originals, others):
        right = similar(fg, fg_t, "cosine")
        total += picked(right, [right, *(similar(fg, bg, "cosine") for bg in grounds)])
    return total / len(F)


def test_foreground_background():
    torch.manual_seed(0)
    F, F_t = torch.rand(2, 3, 8, 4, 5, dtype=torch.float64)
    A, A_t = F.mean(1), F_t.amax(1)
    found = foreground_background_loss(F, F_t, A, A_t, tau=TAU)
    assert found.item() == pytest.approx(fgbg_reference(F, F_t, A, A_t), abs=1e-12)
    inputs = [x[:2, ..., :2, :3].clone().requires_grad_() for x in (F, F_t)]
    assert torch.autograd.gradcheck(
        lambda a, b: foreground_background_loss(a, b, a.mean(1), b.amax(1), tau=TAU), inputs
    )
    flat = foreground_background_loss(F, F_t, torch.ones_like(A), A_t)
    assert flat.isfinite()
    with pytest.raises(ValueError, match="do not fit"):
        foreground_background_loss(F, F_t, A[:2], A_t)


# --- Two processes ---------------------------------------------------------------------------------

SIZES = ((3, 3), (4, 2))
SETTINGS: list[dict[str, Any]] = [
    {},
    {"align": "both", "undefined": "mask"},
    {"negatives": "unaligned"},
    {"negatives": "batch_all", "similarity": "neg_mse"},
    {"negatives_frame": "anchor"},
    {"negatives": "none"},
]


def losses_of(A: Tensor, A_t: Tensor, theta: Tensor) -> list[Callable[[], Tensor]]:
    of_maps = [lambda options=options: contrastive_map_loss(A, A_t, theta, **options) for options in SETTINGS]
    F, F_t = (torch.stack([x, x.square(), 1 - x], 1) for x in (A, A_t))
    return [*of_maps, lambda: foreground_background_loss(F, F_t, A, A_t)]


def one_of_two(rank: int, folder: str) -> None:
    """What each subprocess below runs."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = {}
    for sizes in SIZES:
        A, A_t, theta = batch(sum(sizes))
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        found = []
        for i in range(len(SETTINGS) + 1):
            local = [A[mine].clone().requires_grad_(), A_t[mine].clone().requires_grad_()]
            loss = losses_of(*local, theta[mine])[i]()
            # A mean over processes, weighted by their images, as the training loop takes it.
            (loss * sizes[rank] / sum(sizes)).backward()
            found.append((loss.detach(), *(x.grad for x in local)))
        results[sizes] = found
        rows, first = gathered(A[mine])
        assert torch.equal(rows, A)
        assert first == mine.start
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_are_one(tmp_path):
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['one_of_two'](int(sys.argv[2]), sys.argv[3])"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, __file__, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    complaints = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], complaints
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for sizes in SIZES:
        A, A_t, theta = batch(sum(sizes))
        A, A_t = A.requires_grad_(), A_t.requires_grad_()
        for loss, *parts in zip(losses_of(A, A_t, theta), *(half[sizes] for half in halves)):
            whole = loss()
            gradients = torch.autograd.grad(whole, (A, A_t))
            mean = sum(part[0] * size for part, size in zip(parts, sizes)) / sum(sizes)
            torch.testing.assert_close(mean, whole.detach())
            for i, gradient in enumerate(gradients):
                torch.testing.assert_close(torch.cat([part[1 + i] for part in parts]), gradient)
