"""Spatial entropy on CUDA: one program for each map does labels, sums, entropy and gradient in one launch.

The pixels lie flat, row by row, in one block of a power of two that never leaves the chip; neighbours and chains of
labels are gathered within it. Labels spread until they stand still, then one component after the other is summed: no
atomics, so the same bits every time. Float64 inside, so that a pixel at the mean is background here and on a CPU.
"""

# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false
# The arguments of kernels are pointers and scalars of Triton's own types; and Triton is not there on every platform.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PIXELS = 4096
"""Largest map that fits in a block; the operator does larger ones in plain torch."""


def entropy_and_gradient(S: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`sar_vit.entropy.plain_entropy` gives, of maps ``(m, n)`` in float32 or float64."""
    maps, n = S.shape
    E, gradient = S.new_empty(maps), torch.empty_like(S)
    counts = S.new_empty(maps, 2, dtype=torch.int32)
    block = max(triton.next_power_of_2(n), 16)
    tiny = torch.finfo(S.dtype).tiny
    options: dict[str, Any] = {"num_warps": min(max(block // 128, 1), 16)}
    with torch.cuda.device_of(S):
        _entropy[(maps,)](S, E, gradient, counts, n, width, eps, tiny, block, **options)
    return E, gradient, counts


@triton.jit
def _lowest_neighbour(labels, foreground, here, n, width, BLOCK: tl.constexpr):
    """Smallest label of the 3x3 pixels around each; BLOCK on the background and beyond the map."""
    column = here % width
    left = tl.gather(labels, (here - 1) & (BLOCK - 1), 0)
    right = tl.gather(labels, (here + 1) & (BLOCK - 1), 0)
    lowest = tl.minimum(labels, tl.where(column > 0, left, BLOCK))
    lowest = tl.minimum(lowest, tl.where(column < width - 1, right, BLOCK))
    above = tl.gather(lowest, (here - width) & (BLOCK - 1), 0)
    below = tl.gather(lowest, (here + width) & (BLOCK - 1), 0)
    lowest = tl.minimum(lowest, tl.where(here >= width, above, BLOCK))
    lowest = tl.minimum(lowest, tl.where(here + width < n, below, BLOCK))
    return tl.where(foreground, lowest, BLOCK)


@triton.jit
def _entropy(
    S, E, gradient, counts, n, width, eps: tl.constexpr, tiny: tl.constexpr, BLOCK: tl.constexpr
):  # floats are constants, because an argument would be rounded to float32
    one = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, BLOCK)
    inside = here < n
    pixels = tl.load(S + one * n + here, mask=inside, other=0.0).to(tl.float64)
    bad = tl.sum((inside & ~(tl.abs(pixels) < float("inf"))).to(tl.int32), axis=0)  # NaN is not below either
    pixels = tl.where(bad > 0, 0.0, pixels)
    deviation = pixels - tl.sum(pixels, axis=0) / n
    foreground = inside & (deviation > 0)
    B = tl.where(foreground, deviation, 0.0)  # Eq. 5
    area = tl.sum(foreground.to(tl.int32), axis=0)

    # Eq. 6: from the neighbourhood, then twice along the chain, until nothing changes
    labels = tl.where(foreground, here, BLOCK)
    changes = area
    while changes > 0:
        lowest = _lowest_neighbour(labels, foreground, here, n, width, BLOCK)
        lowest = tl.gather(lowest, tl.where(foreground, lowest, here), 0)
        lowest = tl.gather(lowest, tl.where(foreground, lowest, here), 0)
        changes = tl.sum((lowest != labels).to(tl.int32), axis=0)
        labels = lowest

    # Eq. 7 and 8, component by component
    U = tl.sum(B, axis=0) + eps * area
    contrast = tl.where(tiny <= U, 1.0, 0.0)  # less cannot be told from none
    safe = tl.where(tiny <= U, U, 1.0)
    entropy = U * 0.0
    log_p = B * 0.0
    components = area * 0
    todo = labels
    component = tl.min(todo, axis=0)
    while component < BLOCK:
        member = labels == component
        share = (tl.sum(tl.where(member, B, 0.0), axis=0) + eps * tl.sum(member.to(tl.int32), axis=0)) / safe
        share = tl.minimum(share, 1.0)  # whatever rounding does
        log_share = tl.log(tl.where(share > 0, share, 1.0))
        entropy -= share * log_share
        log_p = tl.where(member, log_share, log_p)
        components += 1
        todo = tl.where(member, BLOCK, todo)
        component = tl.min(todo, axis=0)

    # Each pixel of a component carries its g = -(log P + E) / U; the mean draws on all pixels alike
    g = tl.where(foreground, -(log_p + entropy) / safe, 0.0) * contrast
    tl.store(gradient + one * n + here, g - tl.sum(g, axis=0) / n, mask=inside)
    tl.store(E + one, entropy * contrast)
    tl.store(counts + 2 * one, tl.where(bad > 0, -1, components))
    tl.store(counts + 2 * one + 1, tl.where(bad > 0, -1, area))
