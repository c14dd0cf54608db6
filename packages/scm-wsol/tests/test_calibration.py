"""Spatial calibration against an independent NumPy reference, hand-made cases and its own invariances."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scm_wsol import arithmetic, calibration
from scm_wsol.calibration import (
    ActivationDiffusionBlock,
    DivergedError,
    SpatialCalibration,
    dense_diffusion,
    dynamic_filter,
    grid_laplacian,
    minmax,
    modulated_laplacian,
    newton_schulz,
    similarity,
    stable_tanhshrink,
)
from torch import Tensor, nn

Array = NDArray[np.float64]
few_examples = settings(max_examples=25, deadline=None)
grids = st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda hw: hw[0] * hw[1] > 1)
seeds = st.integers(0, 2**31 - 1)


def maps(
    seed: int, h: int, w: int, c: int = 6, b: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(b, c, h, w, generator=generator, dtype=torch.float64)
    F = torch.rand(b, h * w, generator=generator, dtype=torch.float64)
    return S.to(dtype), F.to(dtype)


def block(iterations: int = 4, **options) -> ActivationDiffusionBlock:
    return ActivationDiffusionBlock(iterations, **options).double()


# --- an independent reference: loops, and the closed form of Newton-Schulz through singular values


def reference_activation(
    S: Array,
    F: Array,
    lam: float,
    beta: float,
    p: int,
    alpha: float,
    laplacian: str = "hadamard",
    sign: float = 1.0,
) -> Array:
    c, h, w = S.shape
    n = h * w
    v = S.reshape(c, n)
    X = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            apart = abs(i // w - j // w) + abs(i % w - j % w)
            E = v[:, i] @ v[:, j] / np.sqrt((v[:, i] @ v[:, i]) * (v[:, j] @ v[:, j]))
            if apart == 1:
                X[i, j] = 1 - lam * E
                X[i, i] += (lam - 1) if laplacian == "hadamard" else lam * E - 1
    d = reference_inverse(sign * X, p, alpha) @ F
    u = d / (beta * F.max())
    y = u - np.tanh(u)
    return (y - y.min()) / (y.max() - y.min())


def reference_inverse(X: Array, p: int, alpha: float) -> Array:
    """V_p by the gain of every singular value: g_p(σ) = [1 - (1 - ασ²)^(2^p)] / σ."""
    left, sigma, right = np.linalg.svd(X)
    rounds = 2.0**p
    gain = np.where(
        sigma > 1e-9,
        -np.expm1(rounds * np.log1p(-alpha * sigma**2)) / np.maximum(sigma, 1e-300),
        alpha * rounds * sigma,
    )
    return right.T @ np.diag(gain) @ left.T


# --- step 1


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 4), (3, 1), (2, 3), (4, 4)])
def test_grid_laplacian_counts_the_neighbours_of_each_patch(h, w):
    expected = torch.zeros(h * w, h * w)
    for r in range(h):
        for c in range(w):
            for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                if 0 <= r + dr < h and 0 <= c + dc < w:
                    expected[r * w + c, r * w + c] += 1
                    expected[r * w + c, (r + dr) * w + c + dc] -= 1
    assert torch.equal(grid_laplacian(h, w), expected)


def test_grid_first_made_in_inference_mode_still_trains():
    calibration._grid_laplacian.cache_clear()
    with torch.inference_mode():
        grid_laplacian(3, 5)
    S, F = maps(0, 3, 5, dtype=torch.float32)
    S.requires_grad_()
    ActivationDiffusionBlock()(S, F)[0].sum().backward()
    assert S.grad is not None


# --- steps 2 and 3


@few_examples
@given(seeds, grids)
def test_similarity_is_symmetric_with_unit_diagonal_and_ignores_scale(seed, grid):
    S, _ = maps(seed, *grid)
    E = similarity(S)
    torch.testing.assert_close(E, E.mT, rtol=0, atol=1e-15)  # a product with its transpose rounds as it likes
    torch.testing.assert_close(
        E.diagonal(dim1=1, dim2=2), torch.ones(2, grid[0] * grid[1], dtype=torch.float64)
    )
    assert E.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(similarity(7.5 * S), E)


def test_similarity_of_an_empty_patch_is_zero_but_for_itself():
    S, _ = maps(1, 2, 2)
    S[0, :, 0, 1] = 0
    S.requires_grad_()
    E = similarity(S)
    assert E[0, 1].tolist() == [0, 1, 0, 0]
    E.sum().backward()
    assert S.grad is not None
    assert torch.isfinite(S.grad).all()


@few_examples
@given(seeds, grids, st.floats(-2, 2))
def test_modulated_laplacian_is_symmetric_on_the_grid_edges(seed, grid, lam):
    S, _ = maps(seed, *grid)
    graph = grid_laplacian(*grid, dtype=torch.float64)
    for kind in ("hadamard", "rowsum"):
        X = modulated_laplacian(similarity(S), graph, lam, laplacian=kind)
        torch.testing.assert_close(X, X.mT)
        assert (X[:, graph == 0] == 0).all()
    torch.testing.assert_close(X.sum(-1), torch.zeros_like(X[..., 0]), rtol=0, atol=1e-12)  # rows of rowsum


def test_at_the_initial_rate_the_diagonal_is_zero_and_edges_are_dissimilarity():
    S, _ = maps(2, 3, 3)
    E, graph = similarity(S), grid_laplacian(3, 3, dtype=torch.float64)
    X = modulated_laplacian(E, graph, 1.0)
    edges = (graph < 0).expand_as(X)
    assert X.diagonal(dim1=1, dim2=2).abs().max() < 1e-14
    torch.testing.assert_close(X[edges], 1 - E[edges])


def test_both_laplacians_agree_when_all_patches_are_alike():
    E, graph = torch.ones(1, 9, 9), grid_laplacian(3, 3)
    hadamard = modulated_laplacian(E, graph, 1.4)
    torch.testing.assert_close(modulated_laplacian(E, graph, 1.4, laplacian="rowsum"), hadamard)
    assert hadamard.abs().max() > 0.3


# --- step 4


@pytest.mark.parametrize("p", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_newton_schulz_has_the_closed_form_gain(p, symmetric):
    generator = np.random.default_rng(p)
    X = generator.normal(size=(3, 7, 7)) * 2
    X = X + X.transpose(0, 2, 1) if symmetric else X
    alpha = 0.5 / np.linalg.norm(X, 2, axis=(1, 2)).max() ** 2
    expected = np.stack([reference_inverse(x, p, alpha) for x in X])
    V = newton_schulz(torch.tensor(X), p, float(alpha))
    np.testing.assert_allclose(V.numpy(), expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@few_examples
@given(seeds, st.integers(0, 5))
def test_newton_schulz_is_odd_and_keeps_symmetry(seed, p):
    X = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = X + X.mT
    V = newton_schulz(X, p)
    torch.testing.assert_close(newton_schulz(-X, p), -V, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(V, V.mT, rtol=1e-9, atol=1e-12)


def test_automatic_scale_inverts_what_the_fixed_one_cannot():
    X = torch.tensor([[[50.0, 10.0], [-5.0, 20.0]], [[0.3, 0.0], [0.1, 0.2]]], dtype=torch.float64)
    V = newton_schulz(X, 40, "auto")
    torch.testing.assert_close(V @ X, torch.eye(2, dtype=torch.float64).expand(2, 2, 2), rtol=0, atol=1e-9)
    assert not torch.isfinite(newton_schulz(X, 40)).all()
    assert torch.equal(newton_schulz(torch.zeros(1, 3, 3), 4, "auto"), torch.zeros(1, 3, 3))


def test_gradient_holds_the_start_constant_unless_asked():
    X = torch.tensor([[[0.7, 0.2], [0.1, -0.4]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, 3, detach_init=False), X)
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, 3, "auto", detach_init=False), X)
    start = 0.002 * X.detach().mT

    def from_constant_start(x: Tensor) -> Tensor:
        V = start
        for _ in range(3):
            V = V @ (2 * torch.eye(2, dtype=torch.float64) - x @ V)
        return V

    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    (released,) = torch.autograd.grad((weight * newton_schulz(X, 3)).sum(), X)
    step = 1e-5
    for i in range(2):
        for j in range(2):
            shift = torch.zeros_like(X.detach())
            shift[0, i, j] = step
            above, below = from_constant_start(X.detach() + shift), from_constant_start(X.detach() - shift)
            slope = ((weight * above).sum() - (weight * below).sum()) / (2 * step)
            torch.testing.assert_close(released[0, i, j], slope, rtol=1e-6, atol=1e-12)
    (full,) = torch.autograd.grad((weight * newton_schulz(X, 3, detach_init=False)).sum(), X)
    assert (full - released).abs().max() > 0.1 * full.abs().max()  # they are different trainings


def test_diffusion_without_iterations_is_one_product():
    S, F = maps(3, 3, 4)
    X = modulated_laplacian(similarity(S), grid_laplacian(3, 4, dtype=torch.float64), 1.3)
    d = dense_diffusion(S, F, 1.3, iterations=0, alpha=0.01)
    torch.testing.assert_close(d, (0.01 * X @ F.unsqueeze(-1)).squeeze(-1))


# --- step 6


def test_minmax_passes_its_gradient_to_one_minimum_and_one_maximum():
    v = torch.tensor([[1.0, 1.0, 2.0, 3.0, 3.0]], requires_grad=True)
    minmax(v)[0, 2].backward()  # (v - min) / (max - min) = 1/2; d/dmin = -1/4, d/dmax = -1/4
    assert v.grad is not None
    assert sorted(v.grad[0].tolist()) == [-0.25, -0.25, 0.0, 0.0, 0.5]


def test_minmax_of_a_constant_row_is_zero_with_zero_gradient_and_leaves_others_alone():
    v = torch.tensor([[4.0, 4.0, 4.0], [0.1, 0.9, 0.3]], requires_grad=True)
    result = minmax(v)
    assert result[0].tolist() == [0, 0, 0]
    unguarded = v[1] - v[1].min()
    assert torch.equal(result[1], unguarded / unguarded.max())  # the same bits
    result.sum().backward()
    assert v.grad is not None
    assert v.grad[0].tolist() == [0, 0, 0]
    assert torch.isfinite(v.grad[1]).all()


def test_stable_shrink_is_exact_where_float32_cancels():
    u = torch.logspace(-4, 1, 200, dtype=torch.float64)
    u = torch.cat([u, -u])
    wide = u.clone().requires_grad_()
    exact = u - u.tanh()
    exact[u.abs() < 1e-2] = (u**3 / 3 - 2 * u**5 / 15)[u.abs() < 1e-2]
    torch.testing.assert_close(stable_tanhshrink(u.float()).double(), exact, rtol=2e-4, atol=0)
    near = torch.linspace(
        0.02, 0.0499, 50, dtype=torch.float64
    )  # where the last term of the series still counts
    torch.testing.assert_close(stable_tanhshrink(near), near - near.tanh(), rtol=1e-8, atol=0)
    plain = (u.float() - u.float().tanh()).double()
    assert ((plain - exact) / exact).abs().max() > 0.1
    stable_tanhshrink(wide).sum().backward()
    torch.testing.assert_close(wide.grad, u.tanh() ** 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("filter", "shrink"),
    [("tanhshrink", lambda u: u - u.tanh()), ("softshrink", nn.Softshrink(0.5)), ("none", lambda u: u)],
)
def test_filters(filter, shrink):
    d, F = torch.linspace(-3, 5, 9).unsqueeze(0), torch.rand(1, 9)
    y = shrink(d / (0.4 * F.max()))
    torch.testing.assert_close(dynamic_filter(d, F, 0.4, filter=filter), (y - y.min()) / (y.max() - y.min()))


# --- the block


@pytest.mark.parametrize(
    ("lam", "beta", "p", "options", "sign"),
    [
        (1.0, 0.5, 4, {}, 1.0),
        (1.13, 0.42, 4, {}, 1.0),
        (-0.3, 0.5, 2, {}, 1.0),
        (0.9, 0.5, 16, {}, 1.0),
        (1.2, 0.5, 4, {"laplacian": "rowsum"}, 1.0),
        (1.2, 0.5, 4, {"sign": "supplement"}, -1.0),
    ],
)
@pytest.mark.parametrize("grid", [(3, 4), (5, 2), (1, 6)])
def test_block_equals_the_reference(lam, beta, p, options, sign, grid):
    S, F = maps(11, *grid)
    module = block(p, lam_init=lam, beta_init=beta, **options)
    module.lam.data.fill_(lam)
    module.beta.data.fill_(beta)
    S_next, F_next = module(S, F)
    for i in range(2):
        T = reference_activation(
            S[i].numpy(), F[i].numpy(), lam, beta, p, 0.002, options.get("laplacian", "hadamard"), sign
        )
        np.testing.assert_allclose(F_next[i].detach().numpy(), F[i].numpy() + T, atol=1e-8)
        expected = S[i].numpy() * (1 + T.reshape(grid))
        np.testing.assert_allclose(S_next[i].detach().numpy(), expected, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options", [{}, {"laplacian": "rowsum"}, {"filter": "none"}, {"alpha": "auto"}, {"residual": False}]
)
def test_full_differentiation_is_the_true_gradient(options):
    S, F = maps(5, 2, 3, c=3, b=2)
    module = block(3, detach_ns_init=False, lam_init=1.25, alpha=options.pop("alpha", 0.05), **options)

    def run(S: Tensor, F: Tensor, lam: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(module, {"lam": lam, "beta": beta}, (S, F))

    inputs = (S, F, module.lam.detach().clone(), module.beta.detach().clone())
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs], eps=1e-6, atol=1e-5)


def test_released_gradient_equals_finite_differences_with_a_constant_start(monkeypatch):
    S, F = maps(6, 3, 3, c=4, b=1)
    module = block(4, backend="dense")
    weights = torch.randn(2, 4 * 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(lam: Tensor, beta: Tensor, S: Tensor, F: Tensor) -> Tensor:
        S_next, F_next = torch.func.functional_call(module, {"lam": lam, "beta": beta}, (S, F))
        return (weights[0] * S_next.flatten()).sum() + (weights[1, :9] * F_next.flatten()).sum()

    values = [module.lam.detach().clone(), module.beta.detach().clone(), S, F]
    for value in values:
        value.requires_grad_()
    gradients = torch.autograd.grad(loss(*values), values)

    # the same loss with V_0 frozen at today's X, whatever X becomes
    X = modulated_laplacian(similarity(S), grid_laplacian(3, 3, dtype=torch.float64), 1.0).detach()

    def frozen_start(X_now: Tensor, iterations: int, alpha: float, *, detach_init: bool) -> Tensor:
        V = alpha * X.mT
        for _ in range(iterations):
            V = V @ (2 * torch.eye(9, dtype=torch.float64) - X_now @ V)
        return V

    monkeypatch.setattr(calibration, "newton_schulz", frozen_start)
    with torch.no_grad():
        for position, (value, gradient) in enumerate(zip(values, gradients)):
            for k in {0, value.numel() // 2, value.numel() - 1}:
                step = torch.zeros(value.numel(), dtype=torch.float64)
                step[k] = 1e-5
                ends = []
                for direction in (1, -1):
                    moved = list(values)
                    moved[position] = value + direction * step.view_as(value)
                    ends.append(loss(*moved))
                slope = (ends[0] - ends[1]) / 2e-5
                torch.testing.assert_close(gradient.flatten()[k], slope, rtol=1e-4, atol=1e-7)


@few_examples
@given(seeds, grids, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_scaling_the_inputs_leaves_the_activation(seed, grid, a, c):
    S, F = maps(seed, *grid)
    module = block(4)
    S_next, F_next = module(S, F)
    S_scaled, F_scaled = module(a * S, F)
    T = module.activation(S, F)
    torch.testing.assert_close(S_scaled, a * S_next, rtol=1e-6, atol=1e-6 * a)
    torch.testing.assert_close(F_scaled, F_next, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module.activation(S, c * F), T, rtol=1e-5, atol=1e-6)


@few_examples
@given(seeds, grids)
def test_activation_spans_zero_to_one(seed, grid):
    T = block(4).activation(*maps(seed, *grid))
    assert T.amin(-1).tolist() == [0, 0]
    assert T.amax(-1).tolist() == [1, 1]


@few_examples
@given(seeds, grids, st.sampled_from(["flip rows", "flip columns", "transpose"]))
def test_moving_the_grid_moves_the_outputs(seed, grid, move):
    S, F = maps(seed, *grid)
    F_grid = F.view(2, 1, *grid)
    act = {
        "flip rows": lambda x: x.flip(2),
        "flip columns": lambda x: x.flip(3),
        "transpose": lambda x: x.mT,
    }[move]
    module = block(4)
    S_next, F_next = module(S, F)
    S_moved, F_moved = module(act(S), act(F_grid).flatten(1))
    torch.testing.assert_close(S_moved, act(S_next), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(F_moved, act(F_next.view(2, 1, *grid)).flatten(1), rtol=1e-6, atol=1e-6)


def test_samples_do_not_see_each_other():
    S, F = maps(8, 3, 4, b=3)
    module = block(4)
    together = module(S, F)
    alone = module(S[1:2], F[1:2])
    for whole, one in zip(together, alone):
        torch.testing.assert_close(whole[1:2], one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [4, 16])
def test_supplement_sign_gives_the_complement(p):
    S, F = maps(9, 4, 4)
    T = block(p).activation(S, F)
    torch.testing.assert_close(block(p, sign="supplement").activation(S, F), 1 - T, rtol=0, atol=1e-9)


def test_without_residual_only_the_activation_remains():
    S, F = maps(10, 3, 3)
    module = block(4, residual=False)
    S_next, F_next = module(S, F)
    T = module.activation(S, F)
    assert torch.equal(F_next, T)
    assert torch.equal(S_next, S * T.view(2, 1, 3, 3))


def test_stable_shrink_and_float64_agree_where_float32_does_not():
    S, F = maps(12, 6, 6, c=20, dtype=torch.float32)
    S = S.abs() + 4  # alike patches: a weak diffusion, |u| near 0.003
    exact = block(1).activation(S.double(), F.double())

    def error(**options) -> float:
        return (ActivationDiffusionBlock(1, **options).activation(S, F) - exact).abs().max().item()

    assert error() > 1e-3
    assert error(stable_shrink=True) < 1e-4
    assert error(dtype="float64") < 1e-8


def test_beta_clamp_holds_the_filter_up():
    S, F = maps(13, 3, 3)
    low, clamped = block(4, beta_init=-1.0), block(4, beta_init=-1.0, clamp_beta=True)
    torch.testing.assert_close(clamped.activation(S, F), block(4, beta_init=1e-3).activation(S, F))
    assert (low.activation(S, F) - clamped.activation(S, F)).abs().max() > 0.1


def test_degenerate_maps_calibrate_to_nothing_without_nan():
    flat = torch.ones(1, 4, 3, 3) * torch.tensor([1.0, 2.0, -1.0, 0.5]).view(
        1, 4, 1, 1
    )  # X = 0: no diffusion
    cases = {
        "parallel patches": (flat, torch.rand(1, 9)),
        "no attention": (torch.randn(1, 4, 3, 3), torch.zeros(1, 9)),
        "no scores": (torch.zeros(1, 4, 3, 3), torch.rand(1, 9)),
        "one patch": (torch.randn(1, 4, 1, 1), torch.rand(1, 1)),
    }
    for name, (S, F) in cases.items():
        S.requires_grad_()
        module = ActivationDiffusionBlock(4)
        S_next, F_next = module(S, F)
        (S_next.sum() + F_next.sum()).backward()
        assert torch.isfinite(S_next).all(), name
        assert torch.isfinite(F_next).all(), name
        assert S.grad is not None
        assert torch.isfinite(S.grad).all(), name
        assert module.lam.grad is not None
        assert torch.isfinite(module.lam.grad).all(), name
    zero = ActivationDiffusionBlock(4).activation(*cases["no attention"])
    assert zero.tolist() == [[0.0] * 9]


def test_divergence_names_the_rate_and_the_largest_singular_value():
    S, F = maps(14, 5, 5, dtype=torch.float32)
    S = S.abs() + 1  # alike patches: σ_max near its bound 8 |λ - 1|
    with pytest.raises(DivergedError, match=r"λ = 6.*σ_max = \d") as caught:
        ActivationDiffusionBlock(16, lam_init=6.0)(S, F)
    assert isinstance(caught.value, FloatingPointError)
    assert "\n" not in str(caught.value)
    with pytest.raises(DivergedError, match="λ = -4"):
        ActivationDiffusionBlock(16, lam_init=-4.0)(S, F)
    ActivationDiffusionBlock(16, lam_init=6.0, alpha="auto")(S, F)  # the way out that the message names
    with pytest.raises(DivergedError, match="maps before calibration"):
        ActivationDiffusionBlock(4)(S * torch.nan, F)
    with pytest.raises(DivergedError, match="β = 0"):
        ActivationDiffusionBlock(4, beta_init=0.0)(S, F)


def test_wrong_arguments_are_named():
    S, F = maps(0, 3, 4)
    with pytest.raises(ValueError, match=r"F \(2, 11\) does not fit S \(2, 6, 3, 4\)"):
        block()(S, F[:, :11])
    for wrong in (
        {"sign": "minus"},
        {"laplacian": "graph"},
        {"filter": "relu"},
        {"dtype": "bfloat16"},
        {"backend": "cuda"},
        {"iterations": -1},
        {"alpha": 0.0},
        {"chunk_size": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ActivationDiffusionBlock(**wrong)


# --- precision and memory


def test_autocast_does_not_reach_into_the_block():
    S, F = maps(15, 4, 4, dtype=torch.float32)
    stack = SpatialCalibration()
    expected = stack(S, F)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = stack(S, F)
        assert (S[0] @ S[0]).dtype == torch.bfloat16  # autocast is on out here
    for a, b in zip(result, expected):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    low = stack(S.bfloat16(), F)
    assert low[0].dtype == torch.float32
    assert torch.isfinite(low[0]).all()


def test_reduced_precision_products_are_off_inside_in_both_directions(monkeypatch):
    seen: list[bool] = []
    inside = arithmetic._full_float32

    @contextlib.contextmanager
    def spy():
        with inside():
            seen.append(exact())
            yield

    def exact() -> bool:
        return all(getattr(where, name) in values for where, name, values in arithmetic._REDUCED_PRECISION)

    monkeypatch.setattr(arithmetic, "_full_float32", spy)
    S, F = maps(16, 3, 3, dtype=torch.float32)
    S.requires_grad_()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not exact()
        loss = ActivationDiffusionBlock(2, backend="dense")(S, F)[0].sum()
        forward = len(seen)
        loss.backward()
        assert forward > 0
        assert len(seen) > forward  # the backward products too
        assert all(seen)
        assert not exact()
        assert torch.get_float32_matmul_precision() == "high"  # given back
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 9])
def test_chunks_change_nothing(chunk_size):
    S, F = maps(17, 3, 4, b=5)
    results = []
    for size in (None, chunk_size):
        module = SpatialCalibration(2, chunk_size=size).double()
        inputs = S.clone().requires_grad_(), F.clone().requires_grad_()
        S_next, _ = module(*inputs)
        S_next.square().sum().backward()
        results.append((S_next.detach(), *(p.grad for p in (*inputs, *module.parameters()))))
    assert torch.equal(results[0][0], results[1][0])
    for whole, chunked in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(whole, chunked, rtol=1e-10, atol=1e-14)


def test_chunks_keep_less_memory_for_the_backward_pass():
    def saved(chunk_size: int | None) -> int:
        S, F = maps(18, 6, 6, b=8, dtype=torch.float32)
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            ActivationDiffusionBlock(8, chunk_size=chunk_size, backend="dense")(S.requires_grad_(), F)
        return total

    assert saved(1) < saved(None) / 10


# --- the stack


def test_release_preset_and_one_count_per_block():
    def counts(**options) -> list[int]:
        return [block.iterations for block in SpatialCalibration(**options).blocks]

    assert counts() == [4, 4, 4, 4]
    assert counts(iterations="release") == [16, 4, 4, 4]
    assert counts(blocks=2, iterations=[8, 1]) == [8, 1]
    assert counts(blocks=3, iterations=(2,)) == [2, 2, 2]
    with pytest.raises(ValueError, match=r"\[8, 1\] do not fit 4 blocks"):
        SpatialCalibration(iterations=[8, 1])
    with pytest.raises(ValueError, match="release, got 'realease'"):
        SpatialCalibration(iterations="realease")


def test_stack_is_its_blocks_in_a_row():
    S, F = maps(19, 3, 4)
    stack = SpatialCalibration(3, [4, 2, 8]).double()
    S_layers, F_layers = stack(S, F, return_layers=True)
    assert S_layers.shape == (4, 2, 6, 3, 4)
    assert F_layers.shape == (4, 2, 12)
    s, f = S, F
    for i, block_i in enumerate(stack.blocks):
        torch.testing.assert_close(
            S_layers[i], s, rtol=1e-12, atol=1e-12
        )  # one E for all blocks: to rounding
        torch.testing.assert_close(F_layers[i], f, rtol=1e-12, atol=1e-12)
        s, f = block_i(s, f)
    torch.testing.assert_close(S_layers[3], s, rtol=1e-12, atol=1e-12)
    s = S_layers[3]
    assert torch.equal(stack(S, F)[0], s)
    assert stack.last_activation is not None
    torch.testing.assert_close(stack.last_activation.sum(0), (F_layers[3] - F_layers[0]).detach())


@few_examples
@given(seeds, grids)
def test_calibration_is_a_positive_weight_per_patch_and_keeps_the_similarity(seed, grid):
    S, F = maps(seed, *grid)
    stack = SpatialCalibration(4).double()
    S_layers, _ = stack(S, F, return_layers=True)
    w = (1 + stack.last_activation).prod(0)
    assert w.min() >= 1
    assert w.max() <= 16
    torch.testing.assert_close(S_layers[-1], S * w.view(2, 1, *grid))
    for layer in S_layers:
        torch.testing.assert_close(similarity(layer), similarity(S), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["stencil", "dense"])
def test_similarity_once_per_stack_gives_the_same_numbers_and_gradients(backend):
    """The blocks' own S may be replaced by S0 where only directions count: forward and backward."""
    results = []
    for once in (False, True):
        S, F = maps(20, 4, 4)
        S.requires_grad_()
        stack = SpatialCalibration(4, backend=backend).double()
        s, f = S, F
        for each in stack.blocks:
            s, f = each(s, f)
        S_next = stack(S, F)[0] if once else s
        results.append((S_next, *torch.autograd.grad(S_next.square().sum(), S)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-9)


def test_similarity_is_computed_once_where_blocks_only_scale_patches(monkeypatch):
    calls = []
    plain = calibration.BACKENDS["dense"]
    counted = plain._replace(similarity=lambda S: calls.append(1) or similarity(S))
    monkeypatch.setitem(calibration.BACKENDS, "dense", counted)
    SpatialCalibration(4, backend="dense")(*maps(20, 4, 4, dtype=torch.float32))
    assert len(calls) == 1
    # Without the residual a patch may become zero, which is like no other: each block has its own E.
    S, F = maps(20, 4, 4)
    stack = SpatialCalibration(3, residual=False).double()
    s, f = S, F
    for each in stack.blocks:
        s, f = each(s, f)
    assert torch.equal(stack(S, F)[0], s)


def test_mean_one_weights_keep_the_scale_of_the_logits():
    S, F = maps(21, 4, 4)
    plain, control = (
        SpatialCalibration(4, 16).double(),
        SpatialCalibration(4, 16, mean_one_weights=True).double(),
    )
    layers = control(S, F, return_layers=True)[0]
    w = (1 + control.last_activation).prod(0)
    torch.testing.assert_close(layers[-1], S * (w / w.mean(-1, keepdim=True)).view(2, 1, 4, 4))
    ones = torch.ones_like(
        S
    )  # every class the same everywhere: pooling with mean-one weights is plain pooling
    torch.testing.assert_close((control(S, F)[0] / S).mean((2, 3)), ones.mean((2, 3)))
    assert (plain(S, F)[0] / S).mean() > 1.5
    without = SpatialCalibration(2, mean_one_weights=True, residual=False).double()
    torch.testing.assert_close((without(S, F)[0] / S).mean((2, 3)), ones.mean((2, 3)))


def test_last_activation_survives_copying_and_holds_no_graph():
    import copy

    stack = SpatialCalibration(2)
    stack(*maps(22, 3, 3, dtype=torch.float32))
    assert stack.last_activation is not None
    assert stack.last_activation.grad_fn is None
    assert copy.deepcopy(stack).last_activation is not None
    assert not any("activation" in key for key in stack.state_dict())
