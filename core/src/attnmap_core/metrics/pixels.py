"""Histograms of score maps over object and background in one pass over the pixels."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray


def count_between(
    scores: NDArray[np.floating[Any]], kinds: NDArray[np.uint8], edges: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Pixels of kind 0 and of kind 1 between the edges: the counts of ``numpy.histogram``, bit for bit.

    Args:
        scores: any shape, finite.
        kinds: the same shape; pixels of other kinds count nowhere.
        edges: ``(k + 1,)`` rising.

    Returns:
        ``(2, k)`` by kind. All bins are half open but the last.

    Example:
        >>> scores, kinds = np.array([0.0, 0.5, 0.5, 1.0]), np.array([0, 1, 255, 1], np.uint8)
        >>> count_between(scores, kinds, np.array([0.0, 0.5, 1.0])).tolist()
        [[1, 0], [0, 2]]
    """
    counts = np.zeros((2, len(edges) - 1), np.int64)
    _count(np.ascontiguousarray(scores).ravel(), np.ascontiguousarray(kinds).ravel(), edges, counts)
    return counts


@numba.njit(cache=True, nogil=True)
def _count(
    scores: NDArray[np.floating[Any]],
    kinds: NDArray[np.uint8],
    edges: NDArray[np.float64],
    counts: NDArray[np.int64],
) -> None:
    bins = len(edges) - 1
    for i in range(scores.size):
        kind, score = kinds[i], np.float64(scores[i])
        if kind > 1 or score < edges[0] or score > edges[bins]:
            continue
        # Thresholds are mostly even: a guess, put right by comparing with the edges themselves.
        found = min(max(np.int64(score * (bins - 2)), 0), bins - 1)
        while score < edges[found]:
            found -= 1
        while found < bins - 1 and score >= edges[found + 1]:
            found += 1
        counts[kind, found] += 1
