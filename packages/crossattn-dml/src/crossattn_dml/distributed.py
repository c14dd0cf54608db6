"""Batches larger than one process holds: rows and sums of all processes, with gradients.

Every process then computes the same loss from the same numbers. The backward pass sums the gradients of all these
copies of the loss, and averaging over processes, as distributed training does, gives those of one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> tuple[int, int]:
    """``(rank, number)`` of the processes; ``(0, 1)`` where there is only one.

    Example:
        >>> processes()
        (0, 1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


class _SumAcross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_across(values: Tensor) -> Tensor:
    """The sum over processes, in each of them; the gradient is summed likewise. All must call it alike.

    Args:
        values: of one shape in all processes.
    """
    if processes()[1] == 1:
        return values
    result: Any = _SumAcross.apply(values)
    return result


def gather_rows(*tensors: Tensor) -> list[Tensor]:
    """The rows of all processes one below the other, in the order of their ranks, with gradient.

    Args:
        tensors: each ``(n, ...)``, all of the same ``n``, which may differ between processes and be 0.

    Returns:
        As many tensors ``(sum of n, ...)``, the same in each process.

    Example:
        >>> gather_rows(torch.eye(2))[0].shape
        torch.Size([2, 2])
    """
    rank, number = processes()
    if number == 1:
        return list(tensors)
    sizes = torch.zeros(number, dtype=torch.int64, device=tensors[0].device)
    sizes[rank] = len(tensors[0])
    counts = sum_across(sizes).tolist()
    before, after = sum(counts[:rank]), sum(counts[rank + 1 :])
    return [
        sum_across(torch.cat([t.new_zeros(before, *t.shape[1:]), t, t.new_zeros(after, *t.shape[1:])]))
        for t in tensors
    ]
