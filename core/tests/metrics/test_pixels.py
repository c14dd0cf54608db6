"""Counts between edges against numpy.histogram."""

from __future__ import annotations

import numpy as np
import pytest
from attnmap_core.metrics.localization import wsol_thresholds
from attnmap_core.metrics.pixels import count_between
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

EDGES = {
    "1000 thresholds": np.append(wsol_thresholds(0.001), [1.0, 2.0, 3.0]),
    "100 thresholds": np.append(wsol_thresholds(0.01), [1.0, 2.0, 3.0]),
    "uneven": np.array([0.1, 0.11, 0.5, 0.97]),
    "one bin": np.array([0.25, 0.75]),
}


@pytest.mark.parametrize("edges", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_counts_are_those_of_numpy(edges: np.ndarray, dtype: type, data: st.DataObject) -> None:
    shape = data.draw(arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=20))
    # Often exactly on an edge, or the next number to it.
    on_edge = np.clip(edges, 0, 1).astype(dtype)
    near = [*on_edge, *np.nextafter(on_edge, dtype(2)), *np.maximum(np.nextafter(on_edge, dtype(-1)), 0)]
    values = st.sampled_from([float(x) for x in near if x <= 1]) | st.floats(0, 1, width=32)
    scores = data.draw(arrays.arrays(dtype, shape, elements=values))
    kinds = data.draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 255])))
    found = count_between(scores, kinds, edges)
    for kind in (0, 1):
        np.testing.assert_array_equal(found[kind], np.histogram(scores[kinds == kind], edges)[0])


def test_memory_layout_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    scores, kinds = rng.random((12, 9)), rng.integers(0, 2, (12, 9)).astype(np.uint8)
    edges = EDGES["100 thresholds"]
    np.testing.assert_array_equal(
        count_between(scores.T, kinds.T, edges), count_between(scores, kinds, edges)
    )
