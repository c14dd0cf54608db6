"""Corruption errors by hand; accuracy within some of the classes; ranks gathered from several processes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from attnmap_core.metrics import mce, subset_accuracy, topk_accuracy
from attnmap_core.metrics.classification import AccuracyProtocol
from attnmap_core.metrics.robustness import ALEXNET_ERRORS, CORRUPTIONS, corruption_errors

GROUPS = {"noise": 3, "blur": 4, "weather": 4, "digital": 4}


def errors_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((15, 5))


def test_the_reference_itself_is_one_hundred() -> None:
    alexnet = np.repeat(np.array(list(ALEXNET_ERRORS.values()))[:, None], 5, axis=1)
    assert mce(alexnet) == pytest.approx(100)
    assert mce(alexnet / 2) == pytest.approx(50)
    assert mce(np.zeros((15, 5))) == 0.0
    assert len(CORRUPTIONS) == sum(GROUPS.values()) == 15
    assert not {"speckle_noise", "gaussian_blur", "spatter", "saturate"} & set(CORRUPTIONS)


def test_each_corruption_is_a_ratio_of_sums() -> None:
    errors = errors_of(0)
    against = np.random.default_rng(1).uniform(0.2, 1, (15, 5))
    expected = [sum(row) / sum(other) for row, other in zip(errors.tolist(), against.tolist())]
    np.testing.assert_allclose(corruption_errors(errors, against.mean(axis=1)), expected)
    assert mce(errors, against.mean(axis=1)) == pytest.approx(100 * sum(expected) / 15)
    # One corruption with a large error of the reference counts less than one with a small one.
    noise, jpeg = np.zeros((15, 5)), np.zeros((15, 5))
    noise[CORRUPTIONS.index("impulse_noise")] = jpeg[CORRUPTIONS.index("brightness")] = 0.5
    assert mce(noise) == pytest.approx(100 * 0.5 / 0.92264 / 15)
    assert mce(noise) < mce(jpeg)


def test_names_in_any_order() -> None:
    errors = errors_of(2)
    by_name = {name: errors[i].tolist() for i, name in reversed(list(enumerate(CORRUPTIONS)))}
    assert mce(by_name) == mce(errors) == mce(by_name, dict(reversed(ALEXNET_ERRORS.items())))


@pytest.mark.parametrize(
    ("errors", "reference", "says"),
    [
        (np.zeros((15, 4)), None, r"errors must be \(15, 5\)"),
        (np.zeros((19, 5)), None, r"errors must be \(15, 5\)"),
        (np.full((15, 5), 53.0), None, r"fractions in \[0, 1\], got 53"),
        (np.full((15, 5), np.nan), None, "fractions"),
        (dict.fromkeys(CORRUPTIONS[:-1], [0.1] * 5), None, "'jpeg_compression' is missing"),
        (dict.fromkeys((*CORRUPTIONS, "spatter"), [0.1] * 5), None, "'spatter' is strange"),
        (np.zeros((15, 5)), np.zeros(15), "error of gaussian_noise is 0"),
        (np.zeros((15, 5)), np.ones(14), r"reference must be \(15,\)"),
    ],
)
def test_wrong_errors(errors: Any, reference: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mce(errors, reference)


# --- Some of the classes ----------------------------------------------------------------------------------


def test_subset_accuracy_ignores_the_other_classes() -> None:
    draw = np.random.default_rng(0)
    logits, labels, indices = (
        draw.normal(size=(40, 20)),
        draw.integers(0, 6, 40),
        np.array([1, 4, 5, 9, 12, 19]),
    )
    for k in (1, 3):
        right = [
            labels[i] in sorted(range(6), key=lambda c, i=i: -logits[i, indices[c]])[:k] for i in range(40)
        ]
        assert subset_accuracy(logits, labels, indices, k) == pytest.approx(100 * np.mean(right))
    others = np.setdiff1d(np.arange(20), indices)
    logits[:, others] = 1e9
    assert subset_accuracy(logits, labels, indices, 6) == 100.0
    assert topk_accuracy(logits, indices[labels]) == 0.0


@pytest.mark.parametrize("indices", [[0, 0], [0, 3], [-1, 0], [0.0, 1.0], [[0, 1]]])
def test_wrong_subsets(indices: Any) -> None:
    with pytest.raises(ValueError, match="indices"):
        subset_accuracy(np.zeros((1, 3)), [0], indices)


def test_label_beyond_the_subset() -> None:
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1"):
        subset_accuracy(np.zeros((1, 3)), [2], [0, 1])


@pytest.mark.parametrize("indices", [None, [3, 1, 7, 8, 2, 9]])
def test_accuracy_protocol_gathers_ranks(indices: Any) -> None:
    draw = np.random.default_rng(1)
    logits, labels = draw.normal(size=(30, 10)), draw.integers(0, 6, 30)

    def fill(part: Any) -> AccuracyProtocol:
        protocol = AccuracyProtocol(indices)
        for i in part:
            protocol.add(i, logits=logits[i], label=int(labels[i]))
        return protocol

    states = [copy.deepcopy(fill(part).state()) for part in (range(20, 30), [5, 0], range(20))]
    together = AccuracyProtocol(indices)
    together.merge(states)
    kept = logits if indices is None else logits[:, indices]
    assert (
        together.compute()
        == fill(range(30)).compute()
        == {
            "images": 30.0,
            "top1_cls": pytest.approx(topk_accuracy(kept, labels, 1)),
            "top5_cls": pytest.approx(topk_accuracy(kept, labels, 5)),
        }
    )
    assert AccuracyProtocol().compute() == {"images": 0.0}
