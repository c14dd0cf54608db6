"""Spatial entropy on a CPU, compiled by numba: one pass over each map, a piece of the batch for each thread.

Components are found on *runs*, the stretches of foreground in a row. A run joins every run of the row above that
comes within one column of it (8-connectivity); there are far fewer runs than pixels, and neither labels nor masks
are ever written. Sums are in float64 for either precision of the map.
"""

from __future__ import annotations

import numba
import numpy as np
from attnmap_core.threads import in_pieces
from numpy.typing import NDArray

Array = NDArray[np.floating]

_jit = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")

_PIXELS_PER_THREAD = 32_768  # fewer take less time than a thread takes to wake


def entropy_and_gradient(S: Array, width: int, eps: float) -> tuple[Array, Array, NDArray[np.int32]]:
    """What :func:`sar_vit.entropy.plain_entropy` gives, of maps ``(m, n)`` in float32 or float64."""
    maps = len(S)
    E, gradient, counts = np.empty(maps, S.dtype), np.empty_like(S), np.empty((maps, 2), np.int32)
    tiny = float(np.finfo(S.dtype).tiny)
    at_most = max(S.size // _PIXELS_PER_THREAD, 1)
    threads = None if at_most > 1 else 1

    def work(start: int, stop: int) -> None:
        _entropy(S, width, eps, tiny, E, gradient, counts, start, stop)

    in_pieces(work, maps, threads)
    return E, gradient, counts


@_jit
def _root(parent: NDArray[np.int32], run: int) -> int:
    while parent[run] != run:
        parent[run] = parent[parent[run]]
        run = parent[run]
    return run


@_jit
def _entropy(
    S: Array,
    width: int,
    eps: float,
    tiny: float,
    E: Array,
    gradient: Array,
    counts: NDArray[np.int32],
    start: int,
    stop: int,
) -> None:
    n = S.shape[1]
    height = n // width
    most = height * ((width + 1) // 2)
    first = np.empty(most, np.int32)  # pixel that begins a run
    last = np.empty(most, np.int32)  # pixel that ends it
    size = np.empty(most, np.int32)
    parent = np.empty(most, np.int32)  # of smaller index; a run that is its own parent stands for a component
    mass = np.empty(most, np.float64)
    for one in range(start, stop):
        pixels = S[one]
        total = 0.0
        for i in range(n):
            total += np.float64(pixels[i])
        mean = total / n
        if not np.isfinite(total):
            E[one] = 0
            gradient[one] = 0
            counts[one] = -1
            continue

        # Eq. 5 and 6: runs of B > 0, each joined with those it touches in the row above
        runs, above, above_end = 0, 0, 0
        for y in range(height):
            row = y * width
            begin = runs
            touching = above
            i, end = row, row + width
            while i < end:
                if not pixels[i] > mean:
                    i += 1
                    continue
                a, u = i, 0.0
                while i < end and pixels[i] > mean:
                    u += pixels[i] - mean
                    i += 1
                first[runs], last[runs], size[runs], mass[runs], parent[runs] = a, i - 1, i - a, u, runs
                root = runs
                while touching < above_end and last[touching] + width < a - 1:
                    touching += 1
                other = touching
                while other < above_end and first[other] + width <= i:
                    found = _root(parent, other)
                    if found < root:
                        parent[root] = found
                        root = found
                    else:
                        parent[found] = root
                    other += 1
                runs += 1
            above, above_end = begin, runs

        # Eq. 8: sums of the components, in the slot of the run that stands for each
        foreground, components = 0, 0
        for run in range(runs):
            foreground += size[run]
        for run in range(runs):
            root = parent[parent[run]]  # runs before this one have their root already
            parent[run] = root
            if root == run:
                components += 1
            else:
                mass[root] += mass[run]
                size[root] += size[run]
        counts[one, 0], counts[one, 1] = components, foreground
        U = 0.0  # added up as the components are, so that a single one has P = 1 to the last bit
        for run in range(runs):
            if parent[run] == run:
                mass[run] += eps * size[run]
                U += mass[run]
        if not tiny <= U:  # no contrast, or less than can be told from none
            E[one] = 0
            gradient[one] = 0
            continue

        # Eq. 7, and the gradient: g_j = -(log P_j + E) / U
        entropy = 0.0
        for run in range(runs):
            if parent[run] == run:
                p = mass[run] / U
                log_p = np.log(p) if p > 0 else 0.0
                entropy -= p * log_p
                mass[run] = log_p
        background = 0.0
        for run in range(runs):
            if parent[run] == run:
                mass[run] = -(mass[run] + entropy) / U
                background -= size[run] * mass[run]
        background /= n
        E[one] = entropy
        row_gradient = gradient[one]
        row_gradient[:] = background
        for run in range(runs):
            value = mass[parent[run]] + background
            for i in range(first[run], last[run] + 1):
                row_gradient[i] = value
