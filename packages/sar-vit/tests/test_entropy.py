"""Spatial entropy against a plain restatement with scipy's labels and autograd, on every device's implementation."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sar_vit import SpatialEntropyLoss, entropy, spatial_entropy
from sar_vit.entropy import (
    entropy_and_counts,
    entropy_weight,
    label_components,
    map_components,
    plain_entropy,
    similarity_maps,
    total_variation,
)
from scipy import ndimage
from torch import Tensor

BACKENDS = {"kernel": entropy._entropy_op, "plain": plain_entropy}
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
few_examples = settings(max_examples=40, deadline=None)
grids = st.tuples(st.integers(1, 12), st.integers(1, 12))
KINDS = ("white", "smooth", "sparse", "steps", "maze", "spiral")


def reference(S: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """E, its gradient and the number of components, map by map, component by component."""
    S = S.double().detach().requires_grad_()
    values, numbers = [], []
    for one in S.flatten(0, -3):
        m = one.mean()
        labels, number = ndimage.label((one > m).numpy(), structure=np.ones((3, 3)))
        B = torch.relu(one - m)
        masks = [torch.from_numpy(labels == j + 1) for j in range(number)]
        u = [(B[mask] + eps).sum() for mask in masks]
        U = sum(u)
        values.append(-sum((x / U) * (x / U).log() for x in u) if number else one.sum() * 0)
        numbers.append(number)
    E = torch.stack([torch.as_tensor(value) for value in values])
    [gradient] = torch.autograd.grad(E.sum(), S)
    return E.detach().reshape(S.shape[:-2]), gradient, torch.tensor(numbers).reshape(S.shape[:-2])


def make_maps(seed: int, h: int, w: int, kind: str = "white", b: int = 2, heads: int = 3) -> Tensor:
    rng = np.random.default_rng(seed)
    S = rng.standard_normal((b, heads, h, w))
    if kind == "smooth":
        S = ndimage.gaussian_filter(S, (0, 0, 1, 1))
    elif kind == "sparse":
        S = 0.01 * S + 5 * (rng.random(S.shape) < 0.1)
    elif kind == "steps":
        S = np.round(S)  # many ties, at the mean too
    elif kind == "maze":
        S = (rng.random(S.shape) < 0.4) * (1 + rng.random(S.shape))
    elif kind == "spiral":
        S = spiral(h, w) * (1 + rng.random(S.shape))
    return torch.from_numpy(np.ascontiguousarray(S))


def spiral(h: int, w: int) -> np.ndarray:
    """One path of pixels that touches itself nowhere."""
    path, y, x, dy, dx = np.zeros((h, w)), 0, 0, 0, 1
    path[0, 0] = 1
    turned = 0
    while turned < 2:
        ny, nx, my, mx = y + dy, x + dx, y + 2 * dy, x + 2 * dx
        free = 0 <= ny < h and 0 <= nx < w and not path[ny, nx]
        ahead_free = not (0 <= my < h and 0 <= mx < w and path[my, mx])
        if free and ahead_free:
            y, x, turned = ny, nx, 0
            path[y, x] = 1
        else:
            dy, dx, turned = dx, -dy, turned + 1
    return path


def at_work(backend, S: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    E, gradient, counts = backend(S.flatten(-2).flatten(0, -2), S.shape[-1], eps)
    return E.reshape(S.shape[:-2]), gradient.reshape(S.shape), counts.reshape(*S.shape[:-2], 2)


def clear_of_the_mean(S: Tensor, by: float = 1e-9) -> bool:
    return bool((S - S.mean((-2, -1), keepdim=True)).abs().min() > by)


# --- equality with the plain restatement


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [0.0, 1e-9, 0.1])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (12, 20), (5, 3), (1, 9), (9, 1), (30, 30)])
def test_equals_the_restatement(backend, kind, grid, eps):
    S = make_maps(sum(grid), *grid, kind)
    expected, expected_gradient, number = reference(S, eps)
    E, gradient, counts = at_work(backend, S, eps)
    torch.testing.assert_close(E, expected, rtol=0, atol=1e-9)
    size = expected_gradient.abs().amax((-2, -1), keepdim=True)
    assert ((gradient - expected_gradient).abs() <= 1e-9 * size + 1e-12).all()
    assert torch.equal(counts[..., 0], number.int())
    foreground = (S - S.mean((-2, -1), keepdim=True) > 0).sum((-2, -1))
    assert torch.equal(counts[..., 1], foreground.int())


@few_examples
@given(st.integers(0, 2**31), grids, st.sampled_from(KINDS[:4]))
def test_any_grid_equals_the_restatement(seed, grid, kind):
    S = make_maps(seed, *grid, kind)
    expected, expected_gradient, _ = reference(S)
    for backend in BACKENDS.values():
        E, gradient, _ = at_work(backend, S)
        torch.testing.assert_close(E, expected, rtol=0, atol=1e-9)
        size = expected_gradient.abs().amax((-2, -1), keepdim=True)
        assert ((gradient - expected_gradient).abs() <= 1e-9 * size + 1e-11).all()


@each_backend
@pytest.mark.parametrize("kind", KINDS[:3])
def test_float32(backend, kind):
    S = make_maps(5, 14, 14, kind).float()
    assert clear_of_the_mean(S, 1e-6)
    expected, expected_gradient, number = reference(S)
    E, gradient, counts = at_work(backend, S)
    assert E.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(E.double(), expected, rtol=0, atol=5e-6)
    assert torch.equal(counts[..., 0], number.int())
    std, size = S.double().std((-2, -1)), expected_gradient.abs().amax((-2, -1))
    noise = 1e-5 * (S.double().mean((-2, -1)).abs() / std).clamp_min(1) / std
    assert ((gradient - expected_gradient).abs().amax((-2, -1)) <= 2e-4 * size + noise).all()


def test_gradient_by_finite_differences():
    S = make_maps(1, 5, 6, "smooth").requires_grad_()
    assert clear_of_the_mean(S.detach(), 1e-4)
    torch.autograd.gradcheck(spatial_entropy, (S,), eps=1e-7, atol=1e-5)
    for reduction in ("mean", "per_head"):
        torch.autograd.gradcheck(
            lambda S, r=reduction: spatial_entropy(S, 1e-9, r), (S,), eps=1e-7, atol=1e-5
        )


@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_the_loss_divides_by_all_maps(eps):
    S = make_maps(2, 7, 9)
    S[0, 1] = 3.0  # a constant one counts
    S.requires_grad_()
    expected, gradient, _ = reference(S, eps)
    loss = spatial_entropy(S, eps, "mean")
    loss.backward()
    torch.testing.assert_close(loss, expected.mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(S.grad, gradient / 6, rtol=1e-9, atol=1e-12)


def test_reductions():
    S = make_maps(3, 6, 6)
    E = spatial_entropy(S)
    assert E.shape == (2, 3)
    torch.testing.assert_close(spatial_entropy(S, reduction="mean"), E.mean())
    torch.testing.assert_close(spatial_entropy(S, reduction="per_head"), E.mean(0))
    torch.testing.assert_close(spatial_entropy(S[0, 0]), E[0, 0])
    torch.testing.assert_close(spatial_entropy(S.mT.contiguous().mT), E)  # strides do not matter


# --- the seven properties


@few_examples
@given(st.integers(0, 2**31), grids, st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_shift_and_scale_change_nothing(seed, grid, factor, shift):
    S = make_maps(seed, *grid)
    assume(clear_of_the_mean(S))
    changed = factor * S + shift
    assume(clear_of_the_mean(changed, 1e-9 * (factor + abs(shift))))
    torch.testing.assert_close(spatial_entropy(changed, 0.0), spatial_entropy(S, 0.0), rtol=0, atol=1e-8)


@few_examples
@given(st.integers(0, 2**31), grids)
def test_gradient_is_blind_to_shift_and_scale(seed, grid):
    S = make_maps(seed, *grid).requires_grad_()
    [gradient] = torch.autograd.grad(spatial_entropy(S, 0.0).sum(), S)
    size = gradient.abs().amax((-2, -1)) * S[0, 0].numel() + 1e-12
    assert (gradient.sum((-2, -1)).abs() <= 1e-10 * size).all()
    assert ((S * gradient).sum((-2, -1)).abs() <= 1e-10 * size).all()


@few_examples
@given(st.integers(0, 2**31), grids)
def test_mirrored_and_turned_maps_give_the_same(seed, grid):
    S = make_maps(seed, *grid)
    assume(clear_of_the_mean(S))
    E, gradient, _ = at_work(BACKENDS["kernel"], S)
    turns = [lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT, lambda x: x.rot90(1, (-2, -1))]
    for turn in turns:
        turned_E, turned_gradient, _ = at_work(BACKENDS["kernel"], turn(S).contiguous())
        torch.testing.assert_close(turned_E, E, rtol=0, atol=1e-10)
        torch.testing.assert_close(turned_gradient, turn(gradient), rtol=1e-7, atol=1e-9)


@each_backend
@pytest.mark.parametrize("r", [2, 3, 5])
def test_equal_peaks_have_log_r_and_no_gradient(backend, r):
    S = torch.zeros(1, 1, 3, 2 * r, dtype=torch.float64)
    S[..., 1, ::2] = 4.0
    E, gradient, counts = at_work(backend, S)
    assert E.item() == pytest.approx(math.log(r), abs=1e-12)
    assert gradient.abs().max() < 1e-14
    assert counts[0, 0].tolist() == [r, r]


@each_backend
@pytest.mark.parametrize("a", [0.5, 0.1, 0.01])
def test_two_components_have_the_binary_entropy(backend, a):
    S = torch.zeros(1, 1, 4, 7, dtype=torch.float64)
    for _ in range(60):  # masses a : 1 - a above the mean, which they move
        S[0, 0, 0, 0], S[0, 0, 3, 6] = 10 * a + S.mean(), 10 * (1 - a) + S.mean()
    expected = -(a * math.log(a) + (1 - a) * math.log(1 - a))
    assert at_work(backend, S)[0].item() == pytest.approx(expected, abs=1e-9)


@each_backend
def test_a_checkerboard_is_one_component(backend):
    board = (torch.arange(8).unsqueeze(1) + torch.arange(6)) % 2
    E, gradient, counts = at_work(backend, board.double().expand(1, 1, 8, 6))
    assert E.item() == 0
    assert not gradient.any()
    assert counts[0, 0].tolist() == [1, 24]


@few_examples
@given(st.integers(0, 2**31), grids, st.sampled_from(KINDS[:5]))
def test_between_zero_and_log_r(seed, grid, kind):
    S = make_maps(seed, *grid, kind)
    found = entropy_and_counts(S)
    assert (found.values >= 0).all()
    assert (found.values <= found.components.clamp_min(1).double().log() + 1e-12).all()
    assert (found.components <= ((grid[0] + 1) // 2) * ((grid[1] + 1) // 2)).all()


def test_a_joined_batch_is_the_weighted_mean():
    a, b = make_maps(4, 7, 7, b=2), make_maps(5, 7, 7, b=5)
    joined = spatial_entropy(torch.cat([a, b]), reduction="mean")
    apart = [spatial_entropy(part, reduction="mean") for part in (a, b)]
    torch.testing.assert_close(joined, (2 * apart[0] + 5 * apart[1]) / 7)


# --- edge cases


@each_backend
@pytest.mark.parametrize("value", [0.0, 2.5, -4.0, 0.1, 1e30])
@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (3, 14)])
def test_constant_maps_are_zero(backend, value, grid):
    for dtype in (torch.float32, torch.float64):
        E, gradient, _ = at_work(backend, torch.full((1, 2, *grid), value, dtype=dtype))
        assert not E.any()
        assert not gradient.any()


@each_backend
def test_a_batch_without_any_component_has_a_graph(backend):
    S = torch.zeros(2, 3, 5, 5, requires_grad=True)
    loss = spatial_entropy(S, reduction="mean")
    assert loss.item() == 0
    assert loss.requires_grad
    loss.backward()
    assert S.grad is not None
    assert not S.grad.any()
    assert not at_work(backend, S.detach())[2].any()


@each_backend
def test_a_pixel_at_the_mean_joins_nothing(backend):
    S = torch.tensor([[[[4.0, 0.0, 4.0, -8.0]]]])
    E, _, counts = at_work(backend, S)
    assert counts[0, 0].tolist() == [2, 2]
    assert E.item() == pytest.approx(math.log(2))


@each_backend
def test_nothing_wraps_around(backend):
    S = torch.zeros(1, 1, 4, 5)
    S[..., 1, 4] = S[..., 2, 0] = S[..., 0, 0] = 1.0  # ends of neighbouring rows
    assert at_work(backend, S)[2][0, 0].tolist() == [3, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_backend
def test_maps_that_are_not_finite_are_left_out(backend, bad):
    S = make_maps(6, 5, 5)
    S[0, 1, 2, 2] = bad
    S[1, 0, 0, 0] = bad
    E, gradient, counts = at_work(backend, S)
    clean, clean_gradient, _ = at_work(backend, make_maps(6, 5, 5))
    left_out = torch.zeros(2, 3, dtype=torch.bool)
    left_out[0, 1] = left_out[1, 0] = True
    torch.testing.assert_close(E, torch.where(left_out, 0, clean))
    torch.testing.assert_close(gradient, torch.where(left_out[..., None, None], 0, clean_gradient))
    assert torch.equal(counts[..., 0] < 0, left_out)


def test_policies_for_maps_that_are_not_finite():
    S = make_maps(6, 5, 5)
    S[1, 2, 0, 0] = math.nan
    S.requires_grad_()
    masked = spatial_entropy(S, reduction="mean")
    assert torch.isfinite(torch.autograd.grad(masked, S)[0]).all()
    torch.testing.assert_close(
        masked * 6, spatial_entropy(S.detach())[0].sum() + spatial_entropy(S)[1, :2].sum()
    )
    skipped = spatial_entropy(S, reduction="mean", nonfinite="skip_batch")
    assert skipped.item() == 0
    assert not torch.autograd.grad(skipped, S)[0].any()
    with pytest.raises(FloatingPointError, match=r"1 of 6 .* first at index \[1, 2\]"):
        spatial_entropy(S, nonfinite="raise")
    fine = make_maps(6, 5, 5)
    for policy in ("skip_batch", "raise"):
        assert torch.equal(spatial_entropy(fine, nonfinite=policy), spatial_entropy(fine))
    assert SpatialEntropyLoss().measure(S).excluded.item() == 1


@each_backend
def test_contrast_of_the_last_bits_gives_finite_numbers(backend):
    for dtype in (torch.float32, torch.float64):
        tiny = torch.finfo(dtype).tiny
        for scale in (tiny / 4, tiny, 1e3 * tiny, 1e30):
            S = (make_maps(7, 6, 6) * scale).to(dtype)
            for eps in (0.0, 1e-9):
                E, gradient, _ = at_work(backend, S, eps)
                assert torch.isfinite(E).all()
                assert torch.isfinite(gradient).all() or (eps == 0 and scale <= 1e3 * tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    S = make_maps(8, 7, 7).to(dtype).requires_grad_()
    E = spatial_entropy(S)
    assert E.dtype == torch.float32
    torch.testing.assert_close(E, spatial_entropy(S.detach().float()))
    E.sum().backward()
    assert S.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(spatial_entropy(S.detach()), E)
        assert spatial_entropy(S.detach(), reduction="mean").dtype == torch.float32
    assert spatial_entropy(S.detach().double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_an_empty_batch_is_refused(shape):
    for function in (spatial_entropy, total_variation, map_components):
        with pytest.raises(ValueError, match=r"at least one map with a pixel, got shape .* leave empty"):
            function(torch.zeros(shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spatial_entropy(torch.zeros(4)), "expected similarity maps"),
        (lambda: spatial_entropy(torch.zeros(2, 2, dtype=torch.long)), "of floats"),
        (lambda: spatial_entropy(torch.zeros(2, 2), eps=-1.0), "eps must be 0 or more"),
        (
            lambda: spatial_entropy(torch.zeros(2, 2), reduction="sum"),
            "reduction must be none, mean or per_head",
        ),
        (lambda: spatial_entropy(torch.zeros(2, 2), nonfinite="drop"), "nonfinite must be"),
        (lambda: spatial_entropy(torch.zeros(3, 2, 2), reduction="per_head"), "needs maps"),
        (lambda: SpatialEntropyLoss(reduction="sum"), "reduction must be none, mean or per_head"),
        (lambda: SpatialEntropyLoss(similarity="l2"), "similarity must be dot, cosine or softmax"),
        (lambda: total_variation(torch.zeros(2, 2), p=3), "p must be 1 or 2"),
        (lambda: entropy_weight(0, 5, schedule="linear"), "schedule must be"),
        (lambda: entropy_weight(-1, 5), "counted from 0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# --- labels


@pytest.mark.parametrize("side", [7, 14, 28, 64])
@pytest.mark.parametrize("kind", ["maze", "spiral", "white"])
def test_labels_are_those_of_scipy(side, kind):
    mask = make_maps(side, side, side, kind, b=2, heads=2) > 0
    if kind == "spiral":
        mask = make_maps(side, side, side, kind, b=1, heads=1) > 0.5
    labels = label_components(mask, check=True)
    for ours, one in zip(labels.flatten(0, 1), mask.flatten(0, 1)):
        theirs, number = ndimage.label(one.numpy(), structure=np.ones((3, 3)))
        pairs = {(a, b) for a, b in zip(ours.flatten().tolist(), theirs.flatten().tolist())}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert len(pairs) == number + (not one.all())
    assert (labels[~mask] == side * side).all()


@few_examples
@given(st.integers(0, 2**31), st.floats(0.3, 0.6), grids)
def test_labels_settle_in_the_fixed_number_of_rounds(seed, density, grid):
    mask = torch.rand(20, *grid, generator=torch.Generator().manual_seed(seed)) < density
    label_components(mask, check=True)


def test_too_few_rounds_are_noticed_on_request():
    path = torch.from_numpy(spiral(30, 30)) > 0
    with pytest.raises(RuntimeError, match="have not settled"):
        label_components(path, rounds=1, check=True)


def test_components_for_diagnostics():
    S = make_maps(9, 6, 7)
    found, counts = map_components(S), entropy_and_counts(S)
    assert torch.equal(found.number, counts.components.long())
    assert torch.equal(found.sizes.sum(-1), counts.foreground.long())
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(2, 3, dtype=S.dtype))
    torch.testing.assert_close(torch.special.entr(found.shares).sum(-1), spatial_entropy(S, 0.0))
    label = found.labels[0, 0].max().item()
    assert found.sizes[0, 0, label] == (found.labels[0, 0] == label).sum()


# --- the operator


def test_operator_is_registered_as_torch_wants_it():
    S = make_maps(10, 4, 5, b=1).reshape(3, 20).requires_grad_()
    torch.library.opcheck(entropy._entropy_op, (S, 5, 1e-9))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_loss_is_one_graph_with_the_same_numbers(backend):
    torch._dynamo.reset()
    S = make_maps(11, 7, 7).requires_grad_()
    loss = SpatialEntropyLoss(nonfinite="skip_batch")

    def both(S):
        found = loss.measure(S)
        return found.loss, found.components, found.excluded

    compiled = torch.compile(both, fullgraph=True, backend=backend)
    for ours, expected in zip(compiled(S), both(S)):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(run(S)[0], S)[0] for run in (compiled, both)))


def test_plain_form_is_one_graph_too():
    torch._dynamo.reset()
    S = make_maps(12, 6, 5).reshape(6, 30)
    compiled = torch.compile(plain_entropy, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(S, 5, 0.0), plain_entropy(S, 5, 0.0)):
        torch.testing.assert_close(ours, expected)


def test_only_the_gradient_is_kept():
    kept: list[Tensor] = []
    S = make_maps(13, 14, 14).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        spatial_entropy(S, reduction="mean")
    assert [tensor.shape for tensor in kept] == [(6, 196)]


def test_threads_change_nothing():
    S = make_maps(14, 14, 14, b=200)
    alone = spatial_entropy(S)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(spatial_entropy(S), alone)
    finally:
        torch.set_num_threads(before)


def test_deterministic_algorithms_are_enough():
    torch.use_deterministic_algorithms(True)
    try:
        S = make_maps(15, 7, 7).requires_grad_()
        spatial_entropy(S, reduction="mean").backward()
        map_components(S)
    finally:
        torch.use_deterministic_algorithms(False)


# --- similarity, total variation, schedule


@pytest.mark.parametrize("kind", ["dot", "cosine", "softmax"])
@pytest.mark.parametrize("query", ["cls", "avg"])
def test_similarity_maps(kind, query):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 2 + 12, 5, generator=generator, dtype=torch.float64)
    one = q[:, :, 0] if query == "cls" else q[:, :, 2:].mean(2)
    logits = (k @ one.unsqueeze(-1)).squeeze(-1) * 5**-0.5
    if kind == "cosine":
        logits = torch.nn.functional.cosine_similarity(k, one.unsqueeze(2), dim=-1)
    elif kind == "softmax":
        logits = logits.softmax(-1)
    found = similarity_maps(q, k, (3, 4), kind=kind, query=query)
    torch.testing.assert_close(found, logits[..., 2:].reshape(2, 3, 3, 4))
    torch.testing.assert_close(similarity_maps(one, k, (3, 4), kind=kind), found)
    half = similarity_maps(one.bfloat16(), k.bfloat16(), (3, 4), kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = similarity_maps(one.bfloat16(), k.bfloat16(), (3, 4), kind=kind)
    assert half.dtype == torch.float32
    assert torch.equal(half, again)


def test_cosine_of_an_empty_key_is_zero_with_a_finite_gradient():
    q, k = torch.ones(1, 1, 2), torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]], requires_grad=True)
    S = similarity_maps(q, k, (1, 2), kind="cosine")
    assert S[0, 0, 0].tolist() == pytest.approx([0.0, 0.5**0.5])
    S.sum().backward()
    assert torch.isfinite(k.grad).all()


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        ((1, 2, 3), (1, 2, 5, 4), {}, "does not fit"),
        ((1, 2, 4), (1, 5, 4), {}, "does not fit"),
        ((1, 2, 4), (1, 2, 5, 4), {}, "6 patches, but there are 5 keys"),
        ((1, 2, 6, 4), (1, 2, 6, 4), {"query": "cls"}, "needs a class token"),
        ((1, 2, 6, 4), (1, 2, 6, 4), {"query": "max"}, "query must be cls or avg"),
        ((1, 2, 4), (1, 2, 6, 4), {"kind": "l2"}, "similarity must be"),
    ],
)
def test_wrong_shapes(q, k, options, message):
    with pytest.raises(ValueError, match=message):
        similarity_maps(torch.zeros(q), torch.zeros(k), (2, 3), **options)


@pytest.mark.parametrize("p", [1, 2])
def test_total_variation(p):
    S = make_maps(16, 4, 5).requires_grad_()
    expected = torch.zeros(2, 3, dtype=S.dtype)
    for y in range(4):
        for x in range(5):
            for dy, dx in ((0, 1), (1, 0)):
                if y + dy < 4 and x + dx < 5:
                    step = (S[..., y, x] - S[..., y + dy, x + dx]).abs()
                    expected = expected + (step if p == 1 else step**2 / 2)
    torch.testing.assert_close(total_variation(S, p), expected)
    torch.testing.assert_close(total_variation(S, p, "per_head"), expected.mean(0))
    loss = SpatialEntropyLoss(kind="tv" if p == 1 else "tv2")
    torch.testing.assert_close(loss(S), expected.mean())
    torch.autograd.gradcheck(lambda S: total_variation(S, p, "mean"), (S,))


def test_total_variation_leaves_bad_maps_out():
    S = make_maps(17, 4, 5)
    expected = total_variation(S)[0].sum() / 6
    S[1, :, 0, 0] = math.nan
    S.requires_grad_()
    found = SpatialEntropyLoss(kind="tv").measure(S)
    torch.testing.assert_close(found.loss, expected)
    assert found.excluded.item() == 3
    assert torch.isfinite(torch.autograd.grad(found.loss, S)[0]).all()


def test_weight_over_the_epochs():
    assert {entropy_weight(epoch, 7, 0.3) for epoch in range(7)} == {0.3}
    found = [entropy_weight(epoch, 30, 1.0, "warmup_cosine", warmup_epochs=4) for epoch in range(30)]
    assert found[:5] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert found[4:] == sorted(found[4:], reverse=True)
    assert 0 < found[-1] < 0.01
    assert entropy_weight(0, 1, schedule="warmup_cosine", warmup_epochs=0) == 0.01


# --- Triton


def triton_results() -> None:
    """What the subprocess below runs: the CUDA kernel in Triton's interpreter, against the compiled one."""
    from sar_vit import entropy_triton

    for grid, kind, dtype in (
        ((7, 7), "white", torch.float64),
        ((14, 14), "smooth", torch.float32),
        ((12, 20), "maze", torch.float64),
        ((9, 9), "spiral", torch.float64),
        ((1, 7), "steps", torch.float64),
        ((4, 4), "steps", torch.float32),
        ((1, 1), "white", torch.float32),
    ):
        S = make_maps(18, *grid, kind).to(dtype)
        S[0, 0] = 2.5
        S[1, 1, 0, 0], S[1, 2, 0, 0] = math.nan, -math.inf
        for eps in (0.0, 1e-9):
            ours = at_work(entropy_triton.entropy_and_gradient, S, eps)
            expected = at_work(entropy._entropy_op, S, eps)
            rtol = 1e-9 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(
                ours, expected, rtol=rtol, atol=1e-10 if dtype == torch.float64 else 1e-6
            )


def compiled_without_a_device() -> None:
    """What another subprocess runs: the kernel as machine code for an H100 and an A100."""
    import triton
    from sar_vit import entropy_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for dtype, n in (("fp32", 256), ("fp64", 64), ("fp32", entropy_triton.MAX_PIXELS)):
        pointer = f"*{dtype}"
        signature = {
            "S": pointer,
            "E": pointer,
            "gradient": pointer,
            "counts": "*i32",
            "n": "i32",
            "width": "i32",
        }
        constants = {"eps": 1e-9, "tiny": 1e-38, "BLOCK": n}
        source = ASTSource(
            entropy_triton._entropy, signature | dict.fromkeys(constants, "constexpr"), constants
        )
        for capability in (80, 90):
            found = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert found.asm["cubin"]


@pytest.mark.parametrize(
    ("function", "interpret"), [("triton_results", "1"), ("compiled_without_a_device", "0")]
)
def test_triton_kernel_without_a_device(function, interpret):
    # The compiler's own interface moves, and the interpreter of 3.2 knows no booleans.
    pytest.importorskip(
        "triton", "3.3", reason="no Triton here that is new enough; its kernels run on CUDA only"
    )
    code = f"import runpy; runpy.run_path({__file__!r})[{function!r}](); print('agree')"
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("agree"), done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("side", [7, 14, 28, 70])
def test_cuda_agrees_with_the_cpu(side):
    for kind in KINDS:
        S = make_maps(19, side, side, kind)
        for expected, found in zip(at_work(entropy._entropy_op, S), at_work(entropy._entropy_op, S.cuda())):
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_never_waits_for_the_device():
    S = make_maps(20, 14, 14).cuda().requires_grad_()
    spatial_entropy(S, reduction="mean").backward()  # compiled now
    torch.cuda.set_sync_debug_mode("error")
    try:
        SpatialEntropyLoss(nonfinite="skip_batch").measure(S).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
