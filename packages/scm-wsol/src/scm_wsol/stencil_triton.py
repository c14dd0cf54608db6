"""The series of Newton-Schulz on CUDA: one program for each image, whose vectors never leave the chip.

Patches lie flat, row by row, in one block of a power of two; neighbours are gathered within it. Entries of edges that
do not exist are 0, so an index may wrap around.
"""

# pyright: basic, reportMissingImports=false, reportArgumentType=false
# The arguments of kernels are pointers and scalars of Triton's own types; and Triton is not there on every platform.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def truncated_inverse(X: Tensor, V0: Tensor, F: Tensor, width: int, terms: int) -> Tensor:
    """``d (b, n)`` of stencils ``X, V0 (b, 3, n)`` and ``F (b, n)``."""
    d = torch.empty_like(F)
    block, options = _launch(F)
    if len(F):
        _forward[(len(F),)](X.contiguous(), V0.contiguous(), F, d, F.shape[1], width, terms, block, **options)
    return d


def truncated_inverse_backward(
    grad: Tensor, X: Tensor, V0: Tensor, F: Tensor, width: int, terms: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of X, V0 and F from that of d."""
    X, V0 = X.contiguous(), V0.contiguous()
    grads = torch.empty_like(X), torch.empty_like(V0), torch.empty_like(F)
    block, options = _launch(F)
    rounds = F.new_empty(len(F), terms, block)  # d of each round: written and read back by the same threads
    if len(F):
        _backward[(len(F),)](grad, X, V0, F, rounds, *grads, F.shape[1], width, terms, block, **options)
    return grads


def _launch(F: Tensor) -> tuple[int, dict[str, Any]]:
    block = max(triton.next_power_of_2(F.shape[1]), 16)
    return block, {"num_warps": min(max(block // 128, 1), 16)}


@triton.jit
def _stencil(base, here, n, width):
    """Own entry, and those of the edges to the right, left, below and above."""
    inside = here < n
    own = tl.load(base + here, mask=inside, other=0.0)
    right = tl.load(base + n + here, mask=inside, other=0.0)
    left = tl.load(base + n + here - 1, mask=inside & (here >= 1), other=0.0)
    below = tl.load(base + 2 * n + here, mask=inside, other=0.0)
    above = tl.load(base + 2 * n + here - width, mask=inside & (here >= width), other=0.0)
    return own, right, left, below, above


@triton.jit
def _shifted(y, here, by, BLOCK: tl.constexpr):
    return tl.gather(y, (here + by) & (BLOCK - 1), 0)


@triton.jit
def _product(own, right, left, below, above, y, here, width, BLOCK: tl.constexpr):
    result = own * y
    result += right * _shifted(y, here, 1, BLOCK) + left * _shifted(y, here, -1, BLOCK)
    return result + below * _shifted(y, here, width, BLOCK) + above * _shifted(y, here, -width, BLOCK)


@triton.jit
def _store(base, own, right, below, here, n, width):
    inside = here < n
    tl.store(base + here, own, mask=inside)
    tl.store(base + n + here, tl.where(here % width == width - 1, 0.0, right), mask=inside)
    tl.store(base + 2 * n + here, tl.where(here + width >= n, 0.0, below), mask=inside)


@triton.jit
def _forward(X, V0, F, result, n, width, terms, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, BLOCK)
    x0, x1, x2, x3, x4 = _stencil(X + image * 3 * n, here, n, width)
    v0, v1, v2, v3, v4 = _stencil(V0 + image * 3 * n, here, n, width)
    f = tl.load(F + image * n + here, mask=here < n, other=0.0)
    d = tl.zeros_like(f)
    for _ in range(terms):
        residual = f - _product(x0, x1, x2, x3, x4, d, here, width, BLOCK)
        d += _product(v0, v1, v2, v3, v4, residual, here, width, BLOCK)
    tl.store(result + image * n + here, d, mask=here < n)


@triton.jit
def _backward(grad, X, V0, F, rounds, grad_X, grad_V0, grad_F, n, width, terms, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, BLOCK)
    x0, x1, x2, x3, x4 = _stencil(X + image * 3 * n, here, n, width)
    v0, v1, v2, v3, v4 = _stencil(V0 + image * 3 * n, here, n, width)
    f = tl.load(F + image * n + here, mask=here < n, other=0.0)
    own_rounds = rounds + image * terms * BLOCK + here
    d = tl.zeros_like(f)
    for term in range(terms):
        tl.store(own_rounds + term * BLOCK, d)
        residual = f - _product(x0, x1, x2, x3, x4, d, here, width, BLOCK)
        d += _product(v0, v1, v2, v3, v4, residual, here, width, BLOCK)
    g = tl.load(grad + image * n + here, mask=here < n, other=0.0)
    of_f = tl.zeros_like(f)
    of_x0, of_x1, of_x2 = tl.zeros_like(f), tl.zeros_like(f), tl.zeros_like(f)
    of_v0, of_v1, of_v2 = tl.zeros_like(f), tl.zeros_like(f), tl.zeros_like(f)
    for back in range(terms):
        d = tl.load(own_rounds + (terms - 1 - back) * BLOCK)
        residual = f - _product(x0, x1, x2, x3, x4, d, here, width, BLOCK)
        of_v0 += g * residual
        of_v1 += g * _shifted(residual, here, 1, BLOCK) + _shifted(g, here, 1, BLOCK) * residual
        of_v2 += g * _shifted(residual, here, width, BLOCK) + _shifted(g, here, width, BLOCK) * residual
        z = _product(v0, v1, v2, v3, v4, g, here, width, BLOCK)
        of_f += z
        of_x0 -= z * d
        of_x1 -= z * _shifted(d, here, 1, BLOCK) + _shifted(z, here, 1, BLOCK) * d
        of_x2 -= z * _shifted(d, here, width, BLOCK) + _shifted(z, here, width, BLOCK) * d
        g -= _product(x0, x1, x2, x3, x4, z, here, width, BLOCK)
    _store(grad_X + image * 3 * n, of_x0, of_x1, of_x2, here, n, width)
    _store(grad_V0 + image * 3 * n, of_v0, of_v1, of_v2, here, n, width)
    tl.store(grad_F + image * n + here, of_f, mask=here < n)
