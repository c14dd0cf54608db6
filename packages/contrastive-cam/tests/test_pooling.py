"""PTAP against a sort written out in NumPy, its gradient, ties, degenerate values, memory, and both forms of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contrastive_cam.pooling import _ptap_op, active_fraction, kept_channels, plain_pool, ptap
from torch import Tensor

OPERATORS = pytest.mark.parametrize("operator", [_ptap_op, plain_pool], ids=["kernel", "plain"])
SHAPES = [(2, 8, 3, 3), (3, 37, 5, 4), (1, 130, 1, 17), (2, 1, 2, 2), (1, 64, 7, 7)]


def features(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    rng = np.random.default_rng(sum(shape))
    values = rng.standard_normal(shape)
    if kind == "relu":
        values = np.maximum(values, 0)
    elif kind == "ties":
        values = rng.integers(-2, 3, shape).astype(float)
        values[values == 0] *= rng.choice([-1, 1], (values == 0).sum())  # zeros of both signs
    elif kind == "tiny":
        values *= 1e-41  # denormal in float32
    return torch.from_numpy(values).to(dtype)


def reference(F: Tensor, k: int, absolute: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Map and selection, by a stable sort of each pixel."""
    values = F.flatten(2).numpy()
    A, chosen = np.zeros((values.shape[0], values.shape[2])), np.zeros(values.shape, bool)
    for b in range(values.shape[0]):
        for p in range(values.shape[2]):
            column = values[b, :, p].astype(np.float64)
            order = np.argsort(-(np.abs(column) if absolute else column), kind="stable")[:k]
            A[b, p], chosen[b, order, p] = column[order].mean(), True
    return A, chosen


def unpacked(selected: Tensor, channels: int) -> np.ndarray:
    return np.unpackbits(selected.numpy(), axis=1, bitorder="little")[:, :channels].astype(bool)


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["signed", "relu", "ties", "tiny"])
def test_map_and_selection(operator, dtype, kind):
    for shape in SHAPES:
        F = features(kind, shape, dtype)
        for k in sorted({1, 2, kept_channels(0.3, shape[1]), kept_channels(0.7, shape[1]), shape[1]}):
            for absolute in (False, True):
                if k > shape[1]:
                    continue
                A, selected = operator(F.flatten(2), k, absolute)
                expected, chosen = reference(F, k, absolute)
                assert A.dtype == dtype
                tolerance = 1e-12 if dtype == torch.float64 else 1e-6
                np.testing.assert_allclose(
                    A, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max() + 2e-45
                )
                np.testing.assert_array_equal(unpacked(selected, shape[1]), chosen)


@pytest.mark.parametrize("kind", ["signed", "relu", "ties"])
@pytest.mark.parametrize("rank", ["value", "abs"])
def test_gradient_goes_to_what_was_selected(kind, rank):
    for shape in SHAPES:
        F, k = features(kind, shape).requires_grad_(), kept_channels(0.7, shape[1])
        G = torch.randn(shape[0], *shape[2:], dtype=torch.float64)
        [grad] = torch.autograd.grad(ptap(F, 0.7, rank=rank), F, G)
        _, chosen = reference(F.detach(), k, rank == "abs")
        expected = np.where(chosen, G.flatten(1).numpy()[:, None], 0).reshape(shape) / k
        np.testing.assert_allclose(grad, expected, rtol=1e-14)


def test_gradient_numerically():
    F = torch.rand(2, 9, 2, 3, dtype=torch.float64, requires_grad=True)
    for mode in ("pixel", "channel", "max", "avg"):
        assert torch.autograd.gradcheck(lambda x, mode=mode: ptap(x, 0.5, mode), F)
    assert torch.autograd.gradcheck(lambda x: ptap(x - 0.5, 0.5, rank="abs"), F)


@pytest.mark.parametrize("ratio", [1e-6, 0.1, 0.5, 0.7, 1.0])
def test_special_cases(ratio):
    F = features("signed", (2, 30, 4, 5))
    k = kept_channels(ratio, 30)
    torch.testing.assert_close(ptap(F, ratio), F.topk(k, dim=1).values.mean(1))
    torch.testing.assert_close(ptap(F, mode="max"), F.amax(1))
    torch.testing.assert_close(ptap(F, mode="avg"), F.mean(1))
    torch.testing.assert_close(ptap(F, 1.0, "channel"), F.mean(1))
    order = np.argsort(-F.mean((2, 3)).numpy(), axis=1, kind="stable")[:, :k]
    expected = torch.stack([F[b, order[b]].mean(0) for b in range(2)])
    torch.testing.assert_close(ptap(F, ratio, "channel"), expected)


def test_channels_of_equal_priority_go_by_index():
    F = torch.zeros(1, 4, 1, 2)
    F[0, :, 0, 0] = torch.tensor([1.0, 0.0, 2.0, 1.0])
    F[0, :, 0, 1] = torch.tensor([1.0, 2.0, 0.0, 1.0])
    assert ptap(F, 0.5, "channel").tolist() == [[[0.5, 1.5]]]  # of channels 0 and 1


@OPERATORS
def test_values_that_are_not_finite(operator):
    F = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 3.0]).reshape(1, 6, 1)
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    F[0, 4] = negative_nan
    assert operator(F, 1, False)[0].isnan().item()
    assert operator(F[:, :3].contiguous(), 1, False)[0].item() == torch.inf
    assert operator(F[:, [0, 2, 5]].contiguous(), 2, False)[0].item() == 2.0
    assert operator(F[:, [0, 2, 5]].contiguous(), 3, False)[0].item() == -torch.inf
    assert operator(F[:, [0, 4, 5]].contiguous(), 2, False)[0].isnan().item()


def test_both_forms_agree_where_everything_varies():
    for seed in range(20):
        torch.manual_seed(seed)
        shape = (int(torch.randint(1, 4, ())), int(torch.randint(1, 200, ())), int(torch.randint(1, 40, ())))
        F = torch.randn(shape).mul(4).round() if seed % 2 else torch.randn(shape)
        k = int(torch.randint(1, shape[1] + 1, ()))
        ours, plain = _ptap_op(F, k, False), plain_pool(F, k, False)
        torch.testing.assert_close(ours[0], plain[0])
        assert torch.equal(ours[1], plain[1])


def test_saves_a_bit_per_value():
    F = torch.rand(2, 512, 14, 14, requires_grad=True)
    saved: list[int] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        ptap(F, 0.7)
    assert 0 < sum(saved) <= F.numel() / 8 + 16


def test_any_layout_and_precision():
    F = torch.rand(2, 24, 6, 5)
    expected = ptap(F, 0.4)
    torch.testing.assert_close(
        ptap(F.contiguous(memory_format=torch.channels_last), 0.4), expected, rtol=0, atol=0
    )
    half = F.bfloat16().requires_grad_()
    A = ptap(half, 0.4)
    assert A.dtype == torch.float32
    torch.testing.assert_close(A, ptap(half.detach().float(), 0.4), rtol=0, atol=0)
    A.sum().backward()
    assert half.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mode in ("pixel", "channel", "max", "avg"):
            torch.testing.assert_close(
                ptap(F, 0.4, mode), ptap(F.double(), 0.4, mode).float(), rtol=1e-6, atol=1e-6
            )


def test_operator_keeps_the_rules_of_torch():
    F = torch.rand(2, 10, 6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        _ptap_op, (F, 4, False), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_ratio():
    assert [kept_channels(0.1 * i, 10) for i in range(1, 11)] == list(range(1, 11))
    assert kept_channels(0.7, 2048) == 1433
    for ratio in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="ratio must be"):
            kept_channels(ratio, 8)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((torch.rand(3, 4, 5),), r"\(b, c, h, w\)"),
        ((torch.rand(1, 0, 2, 2),), "not empty"),
        ((torch.rand(1, 2, 2, 2), 0.7, "sum"), "mode must be"),
        ((torch.rand(1, 2, 2, 2), 1.5), "ratio must be"),
    ],
)
def test_bad_input(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        ptap(*arguments)
    with pytest.raises(ValueError, match="rank must be"):
        ptap(torch.rand(1, 2, 2, 2), mode="channel", rank="abs")


def test_active_fraction_says_when_ptap_is_the_mean():
    torch.manual_seed(0)
    F = torch.rand(2, 20, 5, 5) * (torch.rand(2, 20, 5, 5) < 0.3)
    active = (F > 0).sum(1)
    found = active_fraction(F, 0.7)
    assert found.mean.item() == pytest.approx(active.float().mean().item() / 20)
    assert found.p95.item() == pytest.approx(float(np.quantile(active, 0.95, method="inverted_cdf")) / 20)
    assert found.acts.item() == (active > 14).float().mean().item() == 0
    torch.testing.assert_close(ptap(F, 0.7), F.mean(1) * 20 / 14)
    assert active_fraction(F, 0.2).acts.item() > 0
