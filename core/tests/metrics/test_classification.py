"""Ranks equal sorting by hand; accuracies equal counting."""

from __future__ import annotations

import numpy as np
import pytest
from attnmap_core.metrics import class_ranks, topk_accuracy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

# Few values, so that equal scores are common.
scores = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=7),
    elements=st.sampled_from([-np.inf, -2.0, 0.0, 0.5, 3.0]),
)


@given(logits=scores, data=st.data())
def test_ranks_equal_a_stable_sort(logits: NDArray[np.float64], data: st.DataObject) -> None:
    images, classes = logits.shape
    labels = [data.draw(st.integers(0, classes - 1)) for _ in range(images)]
    by_score = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)) for row in logits.tolist()]
    expected = [order.index(label) for order, label in zip(by_score, labels)]
    assert class_ranks(logits, labels).tolist() == expected
    for k in range(1, classes + 1):
        right = sum(label in order[:k] for order, label in zip(by_score, labels))
        assert topk_accuracy(logits, labels, k) == pytest.approx(100 * right / images)


def test_negative_scores_rank_like_others() -> None:
    logits = [[-5.0, -1.0, -3.0], [-1.0, -5.0, -3.0]]
    assert class_ranks(logits, [2, 2]).tolist() == [1, 1]
    assert [topk_accuracy(logits, [1, 2], k) for k in (1, 2, 3)] == [50.0, 100.0, 100.0]


@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        (np.zeros(3), [0], "logits"),
        (np.zeros((2, 3)), [0], "labels"),
        (np.zeros((2, 3)), [0, 3], r"0\.\.2"),
        (np.zeros((2, 3)), [-1, 0], r"0\.\.2"),
        ([[0.0, np.nan]], [0], "NaN"),
    ],
)
def test_what_has_no_rank_is_refused(logits: object, labels: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        class_ranks(logits, labels)  # type: ignore[arg-type]


def test_accuracy_needs_images_and_as_many_classes_as_it_looks_at() -> None:
    for logits, labels, k in (
        (np.zeros((2, 3)), [0, 1], 0),
        (np.zeros((2, 3)), [0, 1], 4),
        (np.zeros((0, 3)), [], 1),
    ):
        with pytest.raises(ValueError, match=r"k in 1\.\.3"):
            topk_accuracy(logits, labels, k)
