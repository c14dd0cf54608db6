r"""Spatial calibration without matrices: steps 2 to 5 of :mod:`scm_wsol.calibration` on the edges of the grid.

X couples a patch with its four neighbours only, and of V only the product with F is used. Newton-Schulz is a
geometric series,

.. math:: I - X V_{i+1} = (I - X V_i)^2 \quad\Rightarrow\quad V_p = V_0 \sum_{j < 2^p} (I - X V_0)^j,

so :math:`V_p^\top F` takes :math:`2^p` rounds of ``d <- d + V_0 (F - X d)`` from d = 0: 31 products with a 5-point
stencil for p = 4, linear in the number of patches. Where V_0 is a constant in the gradient, X in the round is not, as
in the iteration itself.

A symmetric *stencil* ``(b, 3, n)`` holds three numbers for each patch: its own entry, that of its edge to the right
and that of its edge below. The last column has no edge to the right and the last row none below: 0 there.

The two operators ``scm_wsol::neighbour_similarity`` and ``scm_wsol::truncated_inverse`` are opaque to
``torch.compile``. They run compiled by numba on a CPU, the second as one Triton kernel on CUDA, and as the plain
torch code below on other devices.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from .arithmetic import divide, matmul

MAX_ITERATIONS = {"cpu": 20}
"""Largest p of the operator by device, which sums long series smartly on a CPU; beyond it matrix products double it."""
_MAX_ROUNDS = 5


# --- Steps 1 to 5, as dense_diffusion takes and gives them -----------------------------------------


def stencil_similarity(S: Tensor) -> Tensor:
    r"""Cosine similarity of the class scores of patches that touch (step 2).

    Args:
        S: ``(b, c, h, w)`` semantic maps, any sign.

    Returns:
        ``(b, 2, n)`` in ``[-1, 1]``, n = h w: with the patch to the right and with the one below; 0 where there is
        none, and for all-zero patches.

    Example:
        >>> right, below = stencil_similarity(torch.tensor([[[[2.0, 1.0], [4.0, -3.0]]]]))[0]
        >>> right.tolist(), below.tolist()
        ([1.0, 0.0, -1.0, 0.0], [1.0, -1.0, 0.0, 0.0])
    """
    # The convolution that makes S leaves it channels-last where its input was: then this is a view.
    return _similarity_op(rearrange(S, "b c h w -> b (h w) c").contiguous(), S.shape[-1])


def stencil_diffusion(
    S: Tensor,
    F: Tensor,
    rate: Tensor | float,
    *,
    iterations: int,
    alpha: float | Literal["auto"],
    laplacian: Literal["hadamard", "rowsum"] = "hadamard",
    sign: Literal["release", "supplement"] = "release",
    detach_init: bool = True,
    E: Tensor | None = None,
) -> Tensor:
    """What :func:`scm_wsol.calibration.dense_diffusion` gives, to rounding, in time and memory linear in n.

    Args:
        S: ``(b, c, h, w)`` semantic maps.
        F: ``(b, h * w)`` attention map.
        rate: λ.
        iterations: Newton-Schulz steps p.
        alpha: scale of the start value, or ``"auto"``.
        laplacian, sign: as in ``modulated_laplacian``.
        detach_init: take the start value as a constant in the gradient.
        E: :func:`stencil_similarity` of S, where it is known already.

    Returns:
        ``(b, h * w)``, the redistributed map d.

    Example:
        >>> S, F = torch.tensor([[[[1.0, 1.0]], [[1.0, -1.0]]]]), torch.tensor([[1.0, 0.0]])
        >>> stencil_diffusion(S, F, 1.0, iterations=0, alpha=0.5)  # unlike neighbours: X = [[0, 1], [1, 0]]
        tensor([[0.0000, 0.5000]])
    """
    height, width = S.shape[-2:]
    E = stencil_similarity(S) if E is None else E  # step 2
    X = stencil_laplacian(E, rate, height, width, laplacian=laplacian, sign=sign)  # step 3, Eq. 3
    start = X.detach() if detach_init else X
    V0 = alpha * start if alpha != "auto" else divide(start, _largest_row(start, width) ** 2)
    if iterations <= MAX_ITERATIONS.get(F.device.type, _MAX_ROUNDS):
        return _inverse_op(X, V0, F.contiguous(), width, iterations)  # steps 4 and 5
    return doubled_series(X, V0, F, width, iterations)


def stencil_laplacian(
    E: Tensor,
    rate: Tensor | float,
    height: int,
    width: int,
    *,
    laplacian: Literal["hadamard", "rowsum"] = "hadamard",
    sign: Literal["release", "supplement"] = "release",
) -> Tensor:
    r"""X = (D - A) ∘ (λE - 1) as a stencil ``(b, 3, n)``, of ``E (b, 2, n)``; see ``modulated_laplacian``."""
    edges = E.new_zeros(2, height, width)  # step 1: the grid
    edges[0, :, :-1] = 1
    edges[1, :-1] = 1
    edges = edges.flatten(1)
    X_edges = edges * (1 - rate * E)
    if laplacian == "hadamard":
        own = _over_edges(edges.unsqueeze(0), width) * (rate - 1)  # degree (λ - 1): a patch is like itself
        own = own.expand(len(E), -1)
    else:
        own = -_over_edges(X_edges, width)  # every row then sums to 0
    X = torch.cat([own.unsqueeze(1), X_edges], dim=1)
    return -X if sign == "supplement" else X


def _over_edges(edges: Tensor, width: int) -> Tensor:
    """Sum over the up to four edges of each patch, of ``edges (b, 2, n)``."""
    right, below = edges.unbind(1)
    n = edges.shape[-1]
    left = functional.pad(right, (1, 0))[:, :n]
    above = functional.pad(below, (width, 0))[:, :n]
    return right + below + left + above


def _largest_row(X: Tensor, width: int) -> Tensor:
    """‖X‖₁ = ‖X‖∞ ``(b, 1, 1)`` of a symmetric stencil."""
    size = X.abs()
    return rearrange((size[:, 0] + _over_edges(size[:, 1:], width)).amax(-1), "b -> b 1 1")


def doubled_series(X: Tensor, V0: Tensor, F: Tensor, width: int, iterations: int) -> Tensor:
    """The series of :math:`2^p` terms in p doublings, each one matrix product: half of what Newton-Schulz takes.

    With R = I - V₀ X: ``d <- d + R d; R <- R R``. For many iterations, where single rounds would take too long.
    """
    X_matrix, V0_matrix = _matrix(X, width), _matrix(V0, width)
    d = matmul(V0_matrix, F.unsqueeze(-1))
    R = torch.eye(X_matrix.shape[-1], dtype=X.dtype, device=X.device) - matmul(V0_matrix, X_matrix)
    for i in range(iterations):
        d = d + matmul(R, d)
        if i + 1 < iterations:
            R = matmul(R, R)
    return d.squeeze(-1)


def _matrix(stencil: Tensor, width: int) -> Tensor:
    """``(b, n, n)`` of a stencil."""
    own, right, below = stencil.unbind(1)
    upper = torch.diag_embed(right[:, :-1], 1) + torch.diag_embed(below[:, : below.shape[1] - width], width)
    return torch.diag_embed(own) + upper + upper.mT


# --- Operator: similarity of neighbours ------------------------------------------------------------


@torch.library.custom_op("scm_wsol::neighbour_similarity", mutates_args=())
def _similarity_op(v: Tensor, width: int) -> Tensor:
    """``E (b, 2, n)`` of patch vectors ``v (b, n, c)``."""
    unit = _unit(v, width)[0]
    right, below = v.new_zeros(2, *unit.shape[:3]).unbind()
    right[:, :, :-1] = (unit[:, :, :-1] * unit[:, :, 1:]).sum(-1)
    below[:, :-1] = (unit[:, :-1] * unit[:, 1:]).sum(-1)
    return torch.stack([right.flatten(1), below.flatten(1)], dim=1)


@torch.library.custom_op("scm_wsol::neighbour_similarity_backward", mutates_args=())
def _similarity_backward_op(grad: Tensor, v: Tensor, width: int) -> Tensor:
    # dE/dv_n = (u_m - E u_n) / |v_n| for the edge between n and m, with u = v / |v|
    unit, inverse = _unit(v, width)
    right, below = rearrange(grad, "b e (h w) -> e b h w 1", w=width)
    pull = torch.zeros_like(unit)
    pull[:, :, :-1] += right[:, :, :-1] * unit[:, :, 1:]
    pull[:, :, 1:] += right[:, :, :-1] * unit[:, :, :-1]
    pull[:, :-1] += below[:, :-1] * unit[:, 1:]
    pull[:, 1:] += below[:, :-1] * unit[:, :-1]
    along = (pull * unit).sum(-1, keepdim=True)
    return ((pull - along * unit) * inverse).reshape(v.shape)


def _unit(v: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Unit vectors ``(b, h, w, c)`` and inverse lengths ``(b, h, w, 1)``; an all-zero patch stays zero."""
    grid = rearrange(v, "b (h w) c -> b h w c", w=width)
    inverse = divide(torch.ones_like(grid[..., :1]), torch.linalg.vector_norm(grid, dim=-1, keepdim=True))
    return grid * inverse, inverse


@_similarity_op.register_kernel("cpu")
def _(v: Tensor, width: int) -> Tensor:
    from . import stencil_cpu

    return torch.from_numpy(stencil_cpu.neighbour_similarity(v.numpy(), width))


@_similarity_backward_op.register_kernel("cpu")
def _(grad: Tensor, v: Tensor, width: int) -> Tensor:
    from . import stencil_cpu

    return torch.from_numpy(stencil_cpu.neighbour_similarity_backward(grad.numpy(), v.numpy(), width))


@_similarity_op.register_fake
def _(v: Tensor, width: int) -> Tensor:
    return v.new_empty(v.shape[0], 2, v.shape[1])


@_similarity_backward_op.register_fake
def _(grad: Tensor, v: Tensor, width: int) -> Tensor:
    return torch.empty_like(v)


def _similarity_setup(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.width = inputs[1]


def _similarity_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (v,) = ctx.saved_tensors
    return _similarity_backward_op(grad.contiguous(), v, ctx.width), None


_similarity_op.register_autograd(_similarity_gradient, setup_context=_similarity_setup)


# --- Operator: Newton-Schulz applied to a vector ---------------------------------------------------


@torch.library.custom_op("scm_wsol::truncated_inverse", mutates_args=())
def _inverse_op(X: Tensor, V0: Tensor, F: Tensor, width: int, iterations: int) -> Tensor:
    """``d (b, n)``, Newton-Schulz applied to F, of stencils ``X, V0 (b, 3, n)`` and ``F (b, n)``."""
    d = torch.zeros_like(F)
    for _ in range(2**iterations):
        d = d + _product(V0, F - _product(X, d, width), width)
    return d


@torch.library.custom_op("scm_wsol::truncated_inverse_backward", mutates_args=())
def _inverse_backward_op(
    grad: Tensor, X: Tensor, V0: Tensor, F: Tensor, width: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    rounds = [torch.zeros_like(F)]
    for _ in range(2**iterations - 1):
        d = rounds[-1]
        rounds.append(d + _product(V0, F - _product(X, d, width), width))
    grad_X, grad_V0, grad_F = torch.zeros_like(X), torch.zeros_like(V0), torch.zeros_like(F)
    for d in reversed(rounds):
        residual = F - _product(X, d, width)
        grad_V0 += _outer(grad, residual, width)
        back = _product(V0, grad, width)
        grad_F += back
        grad_X -= _outer(back, d, width)
        grad = grad - _product(X, back, width)
    return grad_X, grad_V0, grad_F


def _product(stencil: Tensor, y: Tensor, width: int) -> Tensor:
    own, right, below = stencil.unbind(1)
    n = y.shape[1]
    result = own * y
    result[:, : n - 1] += right[:, : n - 1] * y[:, 1:]
    result[:, 1:] += right[:, : n - 1] * y[:, : n - 1]
    result[:, : n - width] += below[:, : n - width] * y[:, width:]
    result[:, width:] += below[:, : n - width] * y[:, : n - width]
    return result


def _outer(a: Tensor, b: Tensor, width: int) -> Tensor:
    """Entries of ``a b'`` that a symmetric stencil has: each edge stands for two of them."""
    result = a.new_zeros(a.shape[0], 3, a.shape[1])
    n = a.shape[1]
    result[:, 0] = a * b
    result[:, 1, : n - 1] = a[:, : n - 1] * b[:, 1:] + a[:, 1:] * b[:, : n - 1]
    result[:, 1, width - 1 :: width] = 0
    result[:, 2, : n - width] = a[:, : n - width] * b[:, width:] + a[:, width:] * b[:, : n - width]
    return result


@_inverse_op.register_kernel("cpu")
def _(X: Tensor, V0: Tensor, F: Tensor, width: int, iterations: int) -> Tensor:
    from . import stencil_cpu

    return torch.from_numpy(
        stencil_cpu.truncated_inverse(X.numpy(), V0.numpy(), F.numpy(), width, iterations)
    )


@_inverse_backward_op.register_kernel("cpu")
def _(
    grad: Tensor, X: Tensor, V0: Tensor, F: Tensor, width: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    from . import stencil_cpu

    X_, V0_, F_ = stencil_cpu.truncated_inverse_backward(
        grad.numpy(), X.numpy(), V0.numpy(), F.numpy(), width, iterations
    )
    return torch.from_numpy(X_), torch.from_numpy(V0_), torch.from_numpy(F_)


@_inverse_op.register_kernel("cuda")
def _(X: Tensor, V0: Tensor, F: Tensor, width: int, iterations: int) -> Tensor:
    from . import stencil_triton

    return stencil_triton.truncated_inverse(X, V0, F, width, 2**iterations)


@_inverse_backward_op.register_kernel("cuda")
def _(
    grad: Tensor, X: Tensor, V0: Tensor, F: Tensor, width: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    from . import stencil_triton

    return stencil_triton.truncated_inverse_backward(grad, X, V0, F, width, 2**iterations)


@_inverse_op.register_fake
def _(X: Tensor, V0: Tensor, F: Tensor, width: int, iterations: int) -> Tensor:
    return torch.empty_like(F)


@_inverse_backward_op.register_fake
def _(
    grad: Tensor, X: Tensor, V0: Tensor, F: Tensor, width: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(X), torch.empty_like(V0), torch.empty_like(F)


def _inverse_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.width, ctx.iterations = inputs[3:]


def _inverse_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    X, V0, F = ctx.saved_tensors
    found = _inverse_backward_op(grad.contiguous(), X, V0, F, ctx.width, ctx.iterations)
    return *found, None, None


_inverse_op.register_autograd(_inverse_gradient, setup_context=_inverse_setup)
