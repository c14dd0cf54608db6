"""PTAP on a CPU, compiled by numba: a bisection over the bits of the k-th largest value of each pixel.

The bits of a float, those after the sign turned over where it is negative, order as an integer like the float itself.
So the k-th largest is built bit by bit, each by counting over the channels: a loop that compilers turn into vector
instructions, which beats sorting and heaps. Most pixels are done early, when the bits so far set k values apart from
the rest, or when the k-th value is the zero that a ReLU leaves. The selection is kept as one bit per value.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from attnmap_core.threads import in_pieces
from numpy.typing import NDArray

Array = NDArray[Any]

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})

_BLOCK = 16  # pixels taken together: one cache line of float32 from each channel


def pool(F: Array, k: int, absolute: bool) -> tuple[Array, NDArray[np.uint8]]:
    """What :func:`contrastive_cam.pooling.plain_pool` gives, of ``(b, c, n)`` in float32 or float64."""
    b, c, n = F.shape
    A, selected = np.empty((b, n), F.dtype), np.empty((b, (c + 7) // 8, n), np.uint8)
    integer = np.int32 if F.dtype == np.float32 else np.int64

    def work(start: int, stop: int) -> None:
        # The odd length keeps the rows from falling on the same cache lines.
        values = np.empty((_BLOCK, c + 16), F.dtype)
        flags = np.zeros(8 * selected.shape[1], np.uint8)
        keys, octets = values.view(integer), flags.view("<u8")
        _pool(F, k, absolute, values, keys, flags, octets, A, selected, start, stop)

    in_pieces(work, b * -(-n // _BLOCK))
    return A, selected


def spread(selected: NDArray[np.uint8], G: Array, c: int) -> Array:
    """``G (b, n)`` at the selected channels, 0 at the others: ``(b, c, n)``."""
    b, n = G.shape
    result = np.empty((b, c, n), G.dtype)
    in_pieces(lambda start, stop: _spread(selected, G, result, start, stop), b)
    return result


@_jit
def _pool(
    F: Array,
    k: int,
    absolute: bool,
    values: Array,
    keys: Array,
    flags: NDArray[np.uint8],
    octets: NDArray[np.uint64],
    A: Array,
    selected: NDArray[np.uint8],
    start: int,
    stop: int,
) -> None:
    _, c, n = F.shape
    blocks = -(-n // _BLOCK)
    for piece in range(start, stop):
        one, first = piece // blocks, piece % blocks * _BLOCK
        width = min(_BLOCK, n - first)
        for channel in range(c):
            for p in range(width):
                value = F[one, channel, first + p] + 0  # -0.0 becomes 0.0
                values[p, channel] = abs(value) if absolute else value
        for p in range(width):
            row = keys[p]
            _to_keys(values[p], row, c)
            least, last = _select(row, c, k)
            _mark(row, flags, c, least, last)
            total = 0.0
            if absolute:
                for channel in range(c):
                    total += F[one, channel, first + p] if flags[channel] else 0.0
            else:
                _turn(row, c)
                ranked = values[p]
                for channel in range(c):
                    total += ranked[channel] if flags[channel] else 0.0
            A[one, first + p] = total / k
            for j in range(selected.shape[1]):  # 8 bytes of 0 or 1 become the bits of one
                selected[one, j, first + p] = (octets[j] * np.uint64(0x0102040810204080)) >> np.uint64(56)


@_jit
def _mark(keys: Array, flags: NDArray[np.uint8], c: int, least: Any, last: int) -> None:
    edge = np.empty(1, keys.dtype)
    edge[0] = least
    bound = edge[0]
    for i in range(last + 1):
        flags[i] = keys[i] >= bound
    for i in range(last + 1, c):
        flags[i] = keys[i] > bound


@_jit
def _to_keys(values: Array, keys: Array, c: int) -> None:
    """In place: ``keys`` views the memory of ``values``."""
    for i in range(c):
        values[i] = values[i] if values[i] == values[i] else np.nan  # the positive one, largest as an integer
    _turn(keys, c)


@_jit
def _turn(keys: Array, c: int) -> None:
    """Bits of floats into keys, and back."""
    sign = 8 * keys.itemsize - 1
    for i in range(c):
        keys[i] ^= (keys[i] >> sign) & ~(-1 << sign)


@_jit
def _at_least(keys: Array, c: int, bound: Any) -> int:
    edge = np.empty(1, keys.dtype)  # as wide as the keys: a plain int would widen the comparison
    edge[0] = bound
    least = edge[0]
    number = np.float32(0)  # exact up to 2^24
    for i in range(c):
        number += np.float32(1) if keys[i] >= least else np.float32(0)
    return int(number)


@_jit
def _select(keys: Array, c: int, k: int) -> tuple[int, int]:
    """A key with k keys at or above it where there is one, else the k-th largest; and its last equal to take."""
    bit = 8 * keys.itemsize - 1
    least = -1 << bit
    if _at_least(keys, c, 0) >= k:
        least = 0
        if _at_least(keys, c, 1) < k:
            bit = 0
    while bit > 0:
        bit -= 1
        bound = least + (1 << bit)
        number = _at_least(keys, c, bound)
        if number >= k:
            least = bound
            if number == k:
                return least, c - 1
    free = k - _at_least(keys, c, least + 1)
    index = -1
    while free > 0:
        index += 1
        if keys[index] == least:
            free -= 1
    return least, index


@_jit
def _spread(selected: NDArray[np.uint8], G: Array, result: Array, start: int, stop: int) -> None:
    _, c, n = result.shape
    zero = np.zeros(1, G.dtype)[0]
    for one in range(start, stop):
        for channel in range(c):
            marks, bit = selected[one, channel >> 3], channel & 7
            for p in range(n):
                result[one, channel, p] = G[one, p] if (marks[p] >> bit) & 1 else zero
