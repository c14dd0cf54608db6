"""Compiled kernels on all cores: a pool of plain threads for work that releases the GIL.

Not numba's ``parallel=True``: that starts an OpenMP pool of its own, whose threads fight PyTorch's for the cores at
every barrier. Threads of this pool sleep between calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise


def in_pieces(work: Callable[[int, int], object], count: int, threads: int | None = None) -> None:
    """Run ``work(start, stop)`` until all of ``0 .. count`` is done, a contiguous piece for each thread.

    Args:
        work: releases the GIL for most of its time, as functions of ``numba.njit(nogil=True)`` do, and writes
            only what belongs to its piece. Its result is dropped.
        count: items, 0 or more.
        threads: at most so many; default: as many as PyTorch uses.

    Raises:
        Exception: whatever a piece raises, once all have ended.

    Example:
        >>> squares = [0] * 5
        >>> def square(start, stop):
        ...     squares[start:stop] = [i * i for i in range(start, stop)]
        >>> in_pieces(square, 5, threads=2)
        >>> squares
        [0, 1, 4, 9, 16]
    """
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    pieces = max(min(threads, count), 1)
    bounds = [count * piece // pieces for piece in range(pieces + 1)]
    spans = list(pairwise(bounds))
    others = [_pool(os.getpid(), pieces - 1).submit(work, *span) for span in spans[1:]]
    try:
        work(*spans[0])  # the calling thread would only wait
    finally:
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # One a process: the threads of a pool do not survive a fork.
    return ThreadPoolExecutor(threads, thread_name_prefix=f"attnmap-{process}")
