"""The stencil operators on a CPU, compiled by numba: one image after the other, a piece of the batch for each thread.

A grid of n patches lies flat, row by row. A stencil holds three numbers for each patch: its own, that of the edge to
the right and that of the edge below (0 where there is none). Since the edges that leave a row at its end are 0, rows
need no bounds: patch i has the neighbours i ± 1 and i ± width, in vectors that have ``width`` zeros on either side.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np
from attnmap_core.threads import in_pieces
from numpy.typing import NDArray
from scipy.fft import dct

Array = NDArray[np.floating]

# Sums may be reordered, so that they run in vector registers.
_jit = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")


# --- Similarity of neighbours (step 2) -------------------------------------------------------------


def neighbour_similarity(v: Array, width: int) -> Array:
    """``E (b, 2, n)`` of the patch vectors ``v (b, n, c)``."""
    E = np.zeros((len(v), 2, v.shape[1]), v.dtype)
    in_pieces(lambda start, stop: _similarity(v, width, E, start, stop), len(v))
    return E


def neighbour_similarity_backward(grad: Array, v: Array, width: int) -> Array:
    """Gradient of v ``(b, n, c)`` from that of E."""
    result = np.zeros_like(v)
    in_pieces(lambda start, stop: _similarity_backward(grad, v, width, result, start, stop), len(v))
    return result


@_jit
def _dot(a: Array, b: Array) -> float:
    total = a[0] * b[0]
    for k in range(1, a.size):
        total += a[k] * b[k]
    return total


@_jit
def _inverse_lengths(v: Array, out: Array) -> None:
    for i in range(len(v)):
        squared = _dot(v[i], v[i])
        out[i] = 1 / np.sqrt(squared) if squared > 0 else 0  # an all-zero patch is like no other


@_jit
def _similarity(v: Array, width: int, E: Array, start: int, stop: int) -> None:
    n = v.shape[1]
    inverse = np.empty(n, v.dtype)
    for image in range(start, stop):
        _inverse_lengths(v[image], inverse)
        for i in range(n):
            if (i + 1) % width:
                E[image, 0, i] = _dot(v[image, i], v[image, i + 1]) * (inverse[i] * inverse[i + 1])
            if i + width < n:
                E[image, 1, i] = _dot(v[image, i], v[image, i + width]) * (inverse[i] * inverse[i + width])


@_jit
def _add_scaled(row: Array, scale: float, other: Array) -> None:
    for k in range(row.size):
        row[k] += scale * other[k]


@_jit
def _similarity_backward(grad: Array, v: Array, width: int, result: Array, start: int, stop: int) -> None:
    # dE/dv_i = (u_j - E u_i) / |v_i| for the edge between i and j, with u = v / |v|
    n = v.shape[1]
    inverse = np.empty(n, v.dtype)
    for image in range(start, stop):
        _inverse_lengths(v[image], inverse)
        right, below = grad[image]
        for i in range(n):
            pull = result[image, i]  # sum of the neighbours' u, each by its edge's gradient
            if (i + 1) % width:
                _add_scaled(pull, right[i] * inverse[i + 1], v[image, i + 1])
            if i % width:
                _add_scaled(pull, right[i - 1] * inverse[i - 1], v[image, i - 1])
            if i + width < n:
                _add_scaled(pull, below[i] * inverse[i + width], v[image, i + width])
            if i >= width:
                _add_scaled(pull, below[i - width] * inverse[i - width], v[image, i - width])
            along = _dot(pull, v[image, i]) * inverse[i] * inverse[i]
            for k in range(pull.size):
                pull[k] = (pull[k] - along * v[image, i, k]) * inverse[i]


# --- Newton-Schulz applied to a vector (steps 4 and 5) ---------------------------------------------
#
# V_p' F is the polynomial sum_{j < N} (I - V0 X)^j, N = 2^p, times V0 F. Up to MAX_SERIES its terms are added one by
# one. Beyond it the same polynomial is summed as a Chebyshev series over [0, c], an interval that holds all
# eigenvalues of V0 X. Its coefficients fall like exp(-k² / N c): a few hundred terms in place of 65 536 (p = 16)
# leave out less than rounding does.

MAX_SERIES = 5
_TOO_FAR = 1.99
"""An end c of the interval from which on terms are added one by one: at 2 the polynomial itself diverges."""


class _Series(NamedTuple):
    coefficients: Array  # (b, k)
    counts: NDArray[np.int64]  # (b,) of coefficients that an image needs
    scales: Array  # (b,) 2 / c


def truncated_inverse(X: Array, V0: Array, F: Array, width: int, iterations: int) -> Array:
    """``d (b, n)`` of stencils ``X, V0 (b, 3, n)`` and ``F (b, n)``; V0 a multiple of X, 0 or more."""
    dtype = F.dtype
    X, V0, F = _precise(iterations, X, V0, F)
    d = np.empty_like(F)
    series = _chebyshev(X, V0, width, iterations)

    def work(start: int, stop: int) -> None:
        if series is None:
            _forward(X, V0, F, width, 2**iterations, d, start, stop)
        else:
            _forward_chebyshev(X, V0, F, width, series, d, start, stop)

    in_pieces(work, len(F))
    return d.astype(dtype, copy=False)


def truncated_inverse_backward(
    grad: Array, X: Array, V0: Array, F: Array, width: int, iterations: int
) -> tuple[Array, Array, Array]:
    """Gradients of X, V0 and F from that of d."""
    dtype = F.dtype
    grad, X, V0, F = _precise(iterations, grad, X, V0, F)
    of_X, of_V0, of_F = np.zeros_like(X), np.zeros_like(V0), np.zeros_like(F)
    series = _chebyshev(X, V0, width, iterations)

    def work(start: int, stop: int) -> None:
        if series is None:
            _backward(grad, X, V0, F, width, 2**iterations, of_X, of_V0, of_F, start, stop)
        else:
            _backward_chebyshev(grad, X, V0, F, width, series, of_X, of_V0, of_F, start, stop)

    in_pieces(work, len(F))
    return of_X.astype(dtype, copy=False), of_V0.astype(dtype, copy=False), of_F.astype(dtype, copy=False)


def _precise(iterations: int, *arrays: Array) -> tuple[Array, ...]:
    # T_k is as steep as k² at the ends of its interval, and single precision would lose three digits there.
    return arrays if iterations <= MAX_SERIES else tuple(array.astype(np.float64) for array in arrays)


def _chebyshev(X: Array, V0: Array, width: int, iterations: int) -> _Series | None:
    """The series of each image; None where terms are better added one by one."""
    if iterations <= MAX_SERIES:
        return None
    ends = np.empty(len(X))
    in_pieces(lambda start, stop: _largest_eigenvalues(X, V0, width, ends, start, stop), len(X))
    if not (ends < _TOO_FAR).all():  # near or beyond divergence, or not finite
        return None
    # Rounded up to quarter octaves, so that only few series are ever worked out.
    steps = np.ceil(4 * np.log2(np.maximum(ends, 2.0**-30))).astype(int)
    found = [_coefficients(int(step), iterations) for step in steps]
    counts = np.array([len(values) for values in found], dtype=np.int64)
    table = np.zeros((len(found), counts.max(initial=1)))
    for row, values in zip(table, found):
        row[: len(values)] = values
    return _Series(table, counts, 2 / 2.0 ** (steps / 4))


@lru_cache(maxsize=64)
def _coefficients(step: int, iterations: int) -> NDArray[np.float64]:
    """Chebyshev coefficients of ``sum_{j < 2^p} (1 - m)^j`` for m in ``[0, 2^(step / 4)]``."""
    end = 2.0 ** (step / 4)
    points = 64
    while True:
        nodes = np.cos(np.pi * (np.arange(points) + 0.5) / points)
        power = 1 - end * (nodes + 1) / 2
        values = np.ones(points)
        for _ in range(iterations):  # (1 + x)(1 + x²)(1 + x⁴)...: nothing cancels
            values *= 1 + power
            power = power * power
        found = np.asarray(dct(values))[: points // 2] / points
        found[0] /= 2
        size = np.abs(found)
        kept = int(np.flatnonzero(size > 4e-15 * size.sum())[-1]) + 1
        if kept < points // 2:
            return found[:kept]
        points *= 2  # at most to the degree of the polynomial


@_jit
def _padded(stencil: Array, width: int) -> Array:
    rows = np.zeros((3, stencil.shape[1] + width), stencil.dtype)
    rows[:, width:] = stencil
    return rows


@_jit
def _product(stencil: Array, y: Array, width: int, out: Array) -> None:
    """``out = stencil y``; stencil ``(3, width + n)``, the vectors ``(width + n + width,)``, zero outside."""
    n = stencil.shape[1] - width
    own, right, below = stencil[0, width:], stencil[1, width:], stencil[2, width:]
    left, above = stencil[1, width - 1 : width - 1 + n], stencil[2, :n]
    here, after, before = y[width : width + n], y[width + 1 : width + 1 + n], y[width - 1 : width - 1 + n]
    under, over = y[2 * width :], y[:n]
    result = out[width : width + n]
    for i in range(n):
        result[i] = (
            own[i] * here[i]
            + right[i] * after[i]
            + left[i] * before[i]
            + below[i] * under[i]
            + above[i] * over[i]
        )


@_jit
def _add_outer(a: Array, b: Array, width: int, grad: Array) -> None:
    """Add ``a b'`` on the entries of a symmetric stencil: each edge stands for two of them."""
    n = grad.shape[1]
    own, right, below = grad[0], grad[1], grad[2]
    here_a, after_a, under_a = a[width : width + n], a[width + 1 : width + 1 + n], a[2 * width :]
    here_b, after_b, under_b = b[width : width + n], b[width + 1 : width + 1 + n], b[2 * width :]
    for i in range(n):
        own[i] += here_a[i] * here_b[i]
        right[i] += here_a[i] * after_b[i] + after_a[i] * here_b[i]
        below[i] += here_a[i] * under_b[i] + under_a[i] * here_b[i]


@_jit
def _drop_missing_edges(grad: Array, width: int) -> None:
    grad[1, width - 1 :: width] = 0
    grad[2, grad.shape[1] - width :] = 0


@_jit
def _largest_eigenvalues(X: Array, V0: Array, width: int, ends: Array, start: int, stop: int) -> None:
    """Of V0 X, not less: the product of the two largest row sums."""
    n = X.shape[2]
    ones, sums = np.zeros((2, n + 2 * width), X.dtype)
    ones[width : width + n] = 1
    for image in range(start, stop):
        _product(_padded(np.abs(X[image]), width), ones, width, sums)
        of_X = sums[width : width + n].max()
        _product(_padded(np.abs(V0[image]), width), ones, width, sums)
        ends[image] = of_X * sums[width : width + n].max()


@_jit
def _step(
    X: Array, V0: Array, F: Array, width: int, y: Array, residual: Array, change: Array, out: Array
) -> None:
    """``residual = F - X y`` and ``out = y + V0 residual``."""
    n = F.size
    _product(X, y, width, residual)
    for i in range(n):
        residual[width + i] = F[i] - residual[width + i]
    _product(V0, residual, width, change)
    for i in range(n):
        out[width + i] = y[width + i] + change[width + i]


@_jit
def _forward(X: Array, V0: Array, F: Array, width: int, terms: int, d: Array, start: int, stop: int) -> None:
    n = F.shape[1]
    y, residual, change = np.zeros((3, n + 2 * width), F.dtype)
    for image in range(start, stop):
        X_, V0_ = _padded(X[image], width), _padded(V0[image], width)
        y[:] = 0
        for _ in range(terms):
            _step(X_, V0_, F[image], width, y, residual, change, y)
        d[image] = y[width : width + n]


@_jit
def _backward(
    grad: Array,
    X: Array,
    V0: Array,
    F: Array,
    width: int,
    terms: int,
    grad_X: Array,
    grad_V0: Array,
    grad_F: Array,
    start: int,
    stop: int,
) -> None:
    n = F.shape[1]
    ys = np.zeros((terms + 1, n + 2 * width), F.dtype)
    residual, change, g, z = np.zeros((4, n + 2 * width), F.dtype)
    for image in range(start, stop):
        X_, V0_ = _padded(X[image], width), _padded(V0[image], width)
        for term in range(terms):
            _step(X_, V0_, F[image], width, ys[term], residual, change, ys[term + 1])
        g[width : width + n] = grad[image]
        for term in range(terms - 1, -1, -1):
            _product(X_, ys[term], width, residual)
            for i in range(n):
                residual[width + i] = F[image, i] - residual[width + i]
            _add_outer(g, residual, width, grad_V0[image])
            _product(V0_, g, width, z)
            _product(X_, z, width, change)
            for i in range(n):
                grad_F[image, i] += z[width + i]
                g[width + i] -= change[width + i]
                z[width + i] = -z[width + i]
            _add_outer(z, ys[term], width, grad_X[image])
        _drop_missing_edges(grad_X[image], width)
        _drop_missing_edges(grad_V0[image], width)


@_jit
def _onto_interval(
    first: Array, second: Array, width: int, y: Array, scale: float, half: Array, out: Array
) -> None:
    """``half = second y`` and ``out = 2/c first second y - y``: eigenvalues in [0, c] come to lie in [-1, 1]."""
    _product(second, y, width, half)
    _product(first, half, width, out)
    for i in range(y.size):
        out[i] = scale * out[i] - y[i]


@_jit
def _forward_chebyshev(
    X: Array, V0: Array, F: Array, width: int, series: _Series, d: Array, start: int, stop: int
) -> None:
    n = F.shape[1]
    inside = slice(width, width + n)
    half, f, before, t, new = np.zeros((5, n + 2 * width), F.dtype)
    for image in range(start, stop):
        X_, V0_ = _padded(X[image], width), _padded(V0[image], width)
        a, scale = series.coefficients[image], series.scales[image]
        f[inside] = F[image]
        _product(V0_, f, width, t)  # T_0
        d[image] = a[0] * t[inside]
        before[:] = 0
        for k in range(1, series.counts[image]):
            _onto_interval(V0_, X_, width, t, scale, half, new)
            if k > 1:  # T_k = 2 M T_(k-1) - T_(k-2), but T_1 = M T_0
                for i in range(new.size):
                    new[i] += new[i] - before[i]
            for i in range(n):
                d[image, i] += a[k] * new[width + i]
            before, t, new = t, new, before


@_jit
def _backward_chebyshev(
    grad: Array,
    X: Array,
    V0: Array,
    F: Array,
    width: int,
    series: _Series,
    grad_X: Array,
    grad_V0: Array,
    grad_F: Array,
    start: int,
    stop: int,
) -> None:
    n = F.shape[1]
    inside = slice(width, width + n)
    ts = np.zeros((series.counts[start:stop].max(), n + 2 * width), F.dtype)
    half, f, g, z, after, s, new = np.zeros((7, n + 2 * width), F.dtype)
    for image in range(start, stop):
        X_, V0_ = _padded(X[image], width), _padded(V0[image], width)
        a, scale, count = series.coefficients[image], series.scales[image], series.counts[image]
        f[inside], g[inside] = F[image], grad[image]
        _product(V0_, f, width, ts[0])
        for k in range(1, count):
            _onto_interval(V0_, X_, width, ts[k - 1], scale, half, ts[k])
            if k > 1:
                for i in range(new.size):
                    ts[k, i] += ts[k, i] - ts[k - 2, i]
        # s is the gradient of T_k; the transpose of V0 X is X V0.
        after[:] = 0
        for i in range(new.size):
            s[i] = a[count - 1] * g[i]
        for k in range(count - 2, -1, -1):
            if k > 0:  # T_(k+1) holds M T_k twice
                for i in range(s.size):
                    new[i] = s[i] + s[i]
            else:
                new[:] = s
            for i in range(s.size):
                half[i] = scale * new[i]
            _product(V0_, half, width, z)
            _add_outer(z, ts[k], width, grad_X[image])
            _product(X_, ts[k], width, f)
            _add_outer(half, f, width, grad_V0[image])
            _product(X_, z, width, f)
            for i in range(s.size):
                gradient = a[k] * g[i] + f[i] - new[i] - after[i]
                after[i] = s[i]
                s[i] = gradient
        f[inside] = F[image]
        _add_outer(s, f, width, grad_V0[image])
        _product(V0_, s, width, z)
        grad_F[image] = z[inside]
        _drop_missing_edges(grad_X[image], width)
        _drop_missing_edges(grad_V0[image], width)
