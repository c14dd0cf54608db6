"""The stencil form of the diffusion against the dense one, on every device's implementation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scm_wsol import SpatialCalibration, stencil
from scm_wsol.calibration import (
    BACKENDS,
    dense_diffusion,
    grid_laplacian,
    modulated_laplacian,
    newton_schulz,
    similarity,
)
from scm_wsol.stencil import stencil_diffusion, stencil_laplacian, stencil_similarity
from torch import Tensor

grids = st.tuples(st.integers(1, 7), st.integers(1, 7))
few_examples = settings(max_examples=30, deadline=None)


def maps(seed: int, h: int, w: int, c: int = 5, b: int = 3, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(b, c, h, w, **draw).to(dtype), torch.rand(b, h * w, **draw).to(dtype)


def results(diffusion, S: Tensor, F: Tensor, lam: float = 1.13, **options) -> list[Tensor]:
    """d, and the gradients of S, F and λ of a weighted sum of d."""
    S, F = S.clone().requires_grad_(), F.clone().requires_grad_()
    rate = torch.tensor([lam], dtype=S.dtype, requires_grad=True)
    d = diffusion(S, F, rate, **{"alpha": 0.002, **options})
    weights = torch.randn(d.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((weights.to(d.dtype) * d).sum(), (S, F, rate), allow_unused=True)
    return [d.detach(), *(torch.zeros(1) if gradient is None else gradient for gradient in found)]


def assert_equal_results(ours: list[Tensor], dense: list[Tensor], rtol: float) -> None:
    for name, a, b in zip(("d", "grad S", "grad F", "grad λ"), ours, dense):
        error, size = (a - b).abs().max().item(), b.abs().max().item()
        # 1e-13: what is 0 in exact arithmetic
        assert error <= rtol * size + 1e-13, f"{name}: {error:.1e} of {size:.1e}"


OPTIONS = {
    "released": {},
    "differentiable start": {"detach_init": False},
    "row sums": {"laplacian": "rowsum"},
    "supplement": {"sign": "supplement"},
    "automatic scale": {"alpha": "auto"},
    "automatic scale, differentiable": {"alpha": "auto", "detach_init": False},
    "all": {"alpha": "auto", "detach_init": False, "laplacian": "rowsum", "sign": "supplement"},
}


# --- equality with the dense form


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("p", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (5, 9)])
def test_few_iterations_agree_with_the_dense_form(grid, p, options):
    S, F = maps(p, *grid)
    both = [results(form, S, F, iterations=p, **options) for form in (stencil_diffusion, dense_diffusion)]
    assert_equal_results(*both, rtol=1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("p", [6, 9, 16])
@pytest.mark.parametrize("grid", [(7, 7), (4, 9)])
def test_many_iterations_agree_with_the_dense_form(grid, p, options):
    S, F = maps(p, *grid)
    both = [results(form, S, F, iterations=p, **options) for form in (stencil_diffusion, dense_diffusion)]
    assert_equal_results(*both, rtol=1e-7)


@few_examples
@given(st.integers(0, 2**31), grids, st.floats(-1.5, 2.5), st.integers(0, 8), st.booleans())
def test_any_grid_and_rate_agree_with_the_dense_form(seed, grid, lam, p, detach):
    S, F = maps(seed, *grid)
    both = [
        results(form, S, F, lam, iterations=p, detach_init=detach)
        for form in (stencil_diffusion, dense_diffusion)
    ]
    assert_equal_results(*both, rtol=1e-8)


def test_a_product_by_doubling_agrees_too(monkeypatch):
    monkeypatch.setattr(stencil, "MAX_ITERATIONS", {"cpu": 0})
    monkeypatch.setattr(stencil, "_MAX_ROUNDS", 0)
    S, F = maps(3, 4, 6)
    for p in (1, 4, 16):
        for detach in (True, False):
            both = [
                results(form, S, F, iterations=p, detach_init=detach)
                for form in (stencil_diffusion, dense_diffusion)
            ]
            assert_equal_results(*both, rtol=1e-7)


def test_a_series_that_diverges_does_so_as_the_dense_form_does():
    """Beyond α σ² = 2 no short series exists: terms are added one by one."""
    S, F = maps(4, 3, 4)
    both = [
        results(form, S, F, 8.0, iterations=6, alpha=0.01) for form in (stencil_diffusion, dense_diffusion)
    ]
    assert both[1][0].abs().max() > 1e3
    assert_equal_results(*both, rtol=1e-7)
    d = stencil_diffusion(
        torch.full((1, 2, 2, 2), torch.nan), torch.ones(1, 4), 1.0, iterations=8, alpha=0.002
    )
    assert d.isnan().all()


def test_float32_is_as_close_to_float64_as_the_dense_form():
    S, F = maps(5, 14, 14, c=20)
    for p in (4, 16):
        exact = results(dense_diffusion, S, F, 1.0, iterations=p)
        errors = {}
        for name, (_, form) in BACKENDS.items():
            found = results(form, S.float(), F.float(), 1.0, iterations=p)
            errors[name] = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found[:3], exact)]
        for ours, dense in zip(errors["stencil"], errors["dense"]):
            assert ours < max(3 * dense, 1e-5), errors


def test_parts_agree_with_the_dense_matrices():
    S, _ = maps(6, 3, 4)
    E = similarity(S)
    edges = stencil_similarity(S)
    for laplacian in ("hadamard", "rowsum"):
        X = modulated_laplacian(E, grid_laplacian(3, 4, dtype=S.dtype), 1.2, laplacian=laplacian)
        found = stencil_laplacian(edges, 1.2, 3, 4, laplacian=laplacian)
        torch.testing.assert_close(stencil._matrix(found, 4), X, rtol=0, atol=1e-12)
    V = newton_schulz(X, 3)
    F = torch.rand(3, 12, dtype=S.dtype)
    d = stencil_diffusion(S, F, 1.2, iterations=3, alpha=0.002, laplacian="rowsum")
    torch.testing.assert_close(d, (V.mT @ F[:, :, None])[:, :, 0])


def test_an_empty_patch_is_like_no_other_and_takes_no_gradient():
    S, F = maps(7, 3, 3)
    S[:, :, 1, 1] = 0
    assert not stencil_similarity(S)[:, :, 4].any()
    both = [results(form, S, F, iterations=4) for form in (stencil_diffusion, dense_diffusion)]
    assert_equal_results(*both, rtol=1e-9)
    assert not both[0][1][:, :, 1, 1].any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_changes_nothing(layout):
    S, F = maps(8, 4, 5)
    expected = results(stencil_diffusion, S, F, iterations=4)
    moved = results(stencil_diffusion, S.to(memory_format=layout), F, iterations=4)
    assert all(torch.equal(a, b) for a, b in zip(expected, moved))


def test_threads_and_batch_change_nothing():
    S, F = maps(9, 6, 6, b=7)
    for p in (4, 16):
        alone = [results(stencil_diffusion, S[i : i + 1], F[i : i + 1], iterations=p)[0] for i in range(7)]
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            together = results(stencil_diffusion, S, F, iterations=p)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(together[0], torch.cat(alone))


# --- the operators


def test_operators_are_registered_as_torch_wants_them():
    S, F = maps(10, 3, 4, b=2)
    v = S.flatten(2).mT.contiguous().requires_grad_()
    torch.library.opcheck(stencil._similarity_op, (v, 4))
    X = stencil_laplacian(stencil_similarity(S), 1.2, 3, 4).requires_grad_()
    V0 = (0.002 * X.detach()).requires_grad_()
    for p in (3, 8):
        torch.library.opcheck(stencil._inverse_op, (X, V0, F.requires_grad_(), 4, p))


def test_plain_torch_form_equals_the_compiled_one():
    """The code for other devices, which on a CPU is only reachable by hand."""
    S, F = maps(11, 4, 5, b=2)
    v = S.flatten(2).mT.contiguous()
    E, grad_E = stencil._similarity_op(v, 5), torch.randn(2, 2, 20, dtype=S.dtype)
    grad_E[:, 0, 4::5] = 0  # edges that are none
    grad_E[:, 1, 15:] = 0
    plain = stencil._similarity_op._init_fn
    torch.testing.assert_close(plain(v, 5), E, rtol=0, atol=1e-14)
    plain = stencil._similarity_backward_op._init_fn
    torch.testing.assert_close(plain(grad_E, v, 5), stencil._similarity_backward_op(grad_E, v, 5))
    X = stencil_laplacian(E, 1.2, 4, 5)
    arguments = (X, 0.002 * X, F, 5, 4)
    torch.testing.assert_close(stencil._inverse_op._init_fn(*arguments), stencil._inverse_op(*arguments))
    grad = torch.randn_like(F)
    found = stencil._inverse_backward_op._init_fn(grad, *arguments)
    torch.testing.assert_close(found, stencil._inverse_backward_op(grad, *arguments))


@pytest.mark.parametrize("iterations", [4, "release"])
def test_compiled_stack_is_one_graph_with_the_same_numbers(iterations):
    stack = SpatialCalibration(4, iterations).double()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    found = []
    for run in (stack, compiled):
        S, F = maps(12, 4, 4)
        S.requires_grad_()
        out = run(S, F)[0]
        found.append(
            (out, *torch.autograd.grad(out.square().sum(), (S, *stack.parameters()), allow_unused=True))
        )
    torch.testing.assert_close(found[0], found[1])


def saved_bytes(function, S: Tensor, F: Tensor) -> int:
    """Of the distinct tensors kept for the backward pass, S itself included."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function(S.requires_grad_(), F.requires_grad_())
    assert result.requires_grad
    return sum(kept.values())


def test_memory_for_the_backward_pass_is_linear_in_the_patches():
    def kept(side: int, form) -> int:
        S, F = maps(13, side, side, c=20, b=1, dtype=torch.float32)
        rate = torch.ones(1, requires_grad=True)
        return saved_bytes(lambda S, F: form(S, F, rate, iterations=4, alpha=0.002), S, F)

    small, large = kept(7, stencil_diffusion), kept(28, stencil_diffusion)
    assert large < 17 * small
    assert kept(28, dense_diffusion) > 20 * large


# --- Triton


def triton_results() -> None:
    """What the subprocess below runs: the CUDA kernels in Triton's interpreter, against the compiled ones."""
    from scm_wsol import stencil_triton

    for h, w, dtype, rtol in ((4, 5, "float64", 1e-12), (1, 7, "float64", 1e-12), (14, 14, "float32", 1e-4)):
        S, F = maps(14, h, w, b=2, dtype=getattr(torch, dtype))
        X = stencil_laplacian(stencil_similarity(S), 1.2, h, w)
        V0 = 0.01 * X
        for p in (0, 2, 4):
            ours = stencil_triton.truncated_inverse(X, V0, F, w, 2**p)
            torch.testing.assert_close(ours, stencil._inverse_op(X, V0, F, w, p), rtol=rtol, atol=rtol)
            grad = torch.randn_like(F)
            ours = stencil_triton.truncated_inverse_backward(grad, X, V0, F, w, 2**p)
            expected = stencil._inverse_backward_op(grad, X, V0, F, w, p)
            torch.testing.assert_close(ours, expected, rtol=rtol, atol=rtol)


def test_triton_kernels_give_the_same_in_the_interpreter():
    pytest.importorskip("triton", reason="no Triton for this platform: its kernels run on CUDA only")
    code = f"import runpy; runpy.run_path({__file__!r})['triton_results'](); print('agree')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("agree"), done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("p", [4, 16])
def test_cuda_agrees_with_the_cpu(p):
    S, F = maps(15, 14, 14)
    expected = results(dense_diffusion, S, F, iterations=p)
    found = results(
        lambda S, F, rate, **o: stencil_diffusion(S.cuda(), F.cuda(), rate.cuda(), **o).cpu(),
        S,
        F,
        iterations=p,
    )
    assert_equal_results(found, expected, rtol=1e-7)
