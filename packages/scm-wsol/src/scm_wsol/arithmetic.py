"""Arithmetic that stays exact: guarded division, and products in full float32."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``; zero with zero gradient where b is 0, which the released code leaves as NaN."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, forward and backward in full float32 whatever reduced precision a program has allowed."""
    return _FullPrecisionProduct.apply(a, b)


@contextmanager
def _full_float32() -> Generator[None]:
    """Switch off the reduced-precision float32 products (TF32, bfloat16) that a program may have allowed."""
    changed: list[tuple[Any, str, Any]] = []
    for switches, name, exact in _REDUCED_PRECISION:
        if (current := getattr(switches, name)) not in exact:
            changed.append((switches, name, current))
            setattr(switches, name, exact[0])
    try:
        yield
    finally:
        for switches, name, value in changed:
            setattr(switches, name, value)


_CUDA, _CPU = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
_REDUCED_PRECISION: list[tuple[Any, str, tuple[Any, ...]]] = (  # where, which switch, its exact values
    [(_CUDA, "fp32_precision", ("ieee", "none")), (_CPU, "fp32_precision", ("ieee", "none"))]
    if hasattr(_CUDA, "fp32_precision")  # torch >= 2.9
    else [(_CUDA, "allow_tf32", (False,))]
)


class _FullPrecisionProduct(torch.autograd.Function):
    """A batched product in full float32, both ways: a context around the forward pass would miss backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with _full_float32():
            return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return (
            _FullPrecisionProduct.apply(grad, b.mT) if need_a else None,
            _FullPrecisionProduct.apply(a.mT, grad) if need_b else None,
        )
