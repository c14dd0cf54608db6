"""Segmentation metrics by hand, against plain loops over enlarged masks, and gathered from several processes."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
from attnmap_core.metrics import jaccard_best_head, mass_mask, mean_iou
from attnmap_core.metrics.segmentation import (
    JaccardProtocol,
    MeanIouProtocol,
    class_ious,
    confusion_matrix,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

seeds = st.integers(0, 2**32 - 1)
VALUES = np.array([0, 0, 0, 1, 7, 20, 255], np.uint8)


def attention_of(seed: int, heads: int, patches: int) -> NDArray[np.float64]:
    rows = np.exp(2 * np.random.default_rng(seed).normal(size=(heads, patches)))
    return rows / (1.3 * rows.sum(axis=-1, keepdims=True))  # the class token took the rest


def target_of(seed: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).choice(VALUES, size)


# --- Masks ------------------------------------------------------------------------------------------------


def loop_mask(row: list[float], keep: float) -> list[bool]:
    """The weakest are dropped one by one as long as what was dropped stays within 1 - keep."""
    dropped, mask = 0.0, [True] * len(row)
    for i in sorted(range(len(row)), key=lambda i: row[i]):
        dropped += row[i] / sum(row)
        if dropped > 1 - keep:
            break
        mask[i] = False
    return mask


@given(seed=seeds, patches=st.integers(1, 30), keep=st.sampled_from([0.1, 0.5, 0.6, 0.9]))
def test_mask_equals_dropping_the_weakest(seed: int, patches: int, keep: float) -> None:
    rows = attention_of(seed, 3, patches)
    mask = mass_mask(rows, keep)
    assert mask.tolist() == [loop_mask(row, keep) for row in rows.tolist()]
    # The smallest set with that mass: without its weakest patch it would fall short.
    shares = np.where(mask, rows, 0).sum(axis=-1) / rows.sum(axis=-1)
    assert (shares >= keep - 1e-9).all()
    weakest = np.where(mask, rows, np.inf).min(axis=-1) / rows.sum(axis=-1)
    assert (shares - weakest < keep + 1e-9).all()


def test_mask_by_hand() -> None:
    assert mass_mask([1, 4, 2, 3]).tolist() == [False, True, False, True]
    assert mass_mask([1, 4, 2, 3], 0.35).tolist() == [False, True, False, False]
    assert mass_mask([4, 6], 0.6).tolist() == [False, True]  # what is dropped is exactly 0.4
    assert mass_mask([1, 1, 1, 1], 0.5).tolist() == [False, False, True, True]
    assert mass_mask([0, 2, 0], 1.0).tolist() == [False, True, False]
    assert mass_mask([5.0]).tolist() == [True]


def test_mask_without_attention_and_of_any_scale() -> None:
    rows = np.array([[0.0, 0.0], [1e-300, 3e-300]])
    assert mass_mask(rows).tolist() == [[False, False], [False, True]]
    assert mass_mask(rows.astype(np.float32) + [[0, 0], [1e-30, 3e-30]]).tolist()[1] == [False, True]
    assert mass_mask(np.zeros((2, 3, 4))).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("rows", "keep"),
    [([0.5, -0.1], 0.6), ([0.5, math.nan], 0.6), ([0.5, math.inf], 0.6), ([], 0.6), (0.5, 0.6)]
    + [([0.5, 0.5], keep) for keep in (0.0, 1.1, math.nan)],
)
def test_mask_of_nonsense(rows: Any, keep: float) -> None:
    with pytest.raises(ValueError, match=r"attention|keep_mass"):
        mass_mask(rows, keep)


# --- Jaccard ----------------------------------------------------------------------------------------------


def loop_jaccard(
    attention: NDArray[np.float64], target: NDArray[np.uint8], grid: tuple[int, int], *, exclude_void: bool
) -> float:
    """As the protocol is written: masks enlarged to the image, sets of pixels compared."""
    (height, width), (rows, columns) = target.shape, grid
    best: dict[int, float] = {}
    for head in attention.tolist():
        mask = loop_mask(head, 0.6)
        found, true = set(), {}
        for y in range(height):
            for x in range(width):
                if exclude_void and target[y, x] == 255:
                    continue
                if mask[(y * rows // height) * columns + x * columns // width]:
                    found.add((y, x))
                true.setdefault(int(target[y, x]), set()).add((y, x))
        for label in true.keys() - {0, 255}:
            overlap = len(found & true[label]) / len(found | true[label])
            best[label] = max(best.get(label, 0.0), overlap)
    return sum(best.values()) / len(best) if best else math.nan


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds, heads=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 4),
    patch=st.integers(1, 3), exclude_void=st.booleans(),
)  # fmt: skip
def test_jaccard_equals_sets_of_pixels(
    seed: int, heads: int, rows: int, columns: int, patch: int, exclude_void: bool
) -> None:
    attention = attention_of(seed, heads, rows * columns)
    target = target_of(seed, (rows * patch, columns * patch))
    ours = jaccard_best_head(attention, target, exclude_void=exclude_void)
    assert isinstance(ours, float)
    theirs = loop_jaccard(attention, target, (rows, columns), exclude_void=exclude_void)
    assert ours == pytest.approx(theirs, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("size", [(11, 7), (3, 2), (8, 8)])
def test_grid_that_does_not_divide_the_image(size: tuple[int, int]) -> None:
    attention, target = attention_of(3, 2, 12), target_of(3, size)
    ours = jaccard_best_head(attention, target, grid=(4, 3))
    assert ours == pytest.approx(loop_jaccard(attention, target, (4, 3), exclude_void=False))


def test_jaccard_by_hand() -> None:
    target = np.zeros((4, 4), np.uint8)
    target[:2, :2], target[2:, 2:], target[0, 3] = 1, 2, 255
    one, two = [0.7, 0.1, 0.1, 0.1], [0.1, 0.35, 0.1, 0.45]  # masks: patch 0; patches 1 and 3
    assert jaccard_best_head([one], target) == pytest.approx((1 + 0) / 2)
    # Each class takes its own head: class 2 fills 4 of the 8 pixels of the second, one of which is void.
    assert jaccard_best_head([one, two], target) == pytest.approx((1 + 4 / 8) / 2)
    assert jaccard_best_head([one, two], target, exclude_void=True) == pytest.approx((1 + 4 / 7) / 2)
    assert jaccard_best_head([two, one], target, 0.4) == pytest.approx((1 + 1) / 2)  # patch 3 alone
    flipped = jaccard_best_head([two, one], target, exclude_void=True)
    assert flipped == pytest.approx((1 + 4 / 7) / 2)


def test_jaccard_of_several_images() -> None:
    attention = np.stack([attention_of(i, 3, 16) for i in range(4)])
    target = np.stack([target_of(i, (8, 8)) for i in range(4)])
    target[2] = 0
    target[2, 0] = 255
    found = jaccard_best_head(attention, target)
    each = [jaccard_best_head(attention[i], target[i]) for i in range(4)]
    np.testing.assert_array_equal(found, each)
    assert np.isnan(each).tolist() == [False, False, True, False]
    assert jaccard_best_head(attention[:0], target[:0]).shape == (0,)


def test_jaccard_of_heads_that_see_nothing() -> None:
    target = np.full((4, 4), 3)
    assert jaccard_best_head(np.zeros((2, 4)), target) == 0.0
    assert jaccard_best_head([[0, 0, 0, 0], [1, 1, 1, 1]], target, 1.0) == 1.0
    assert math.isnan(jaccard_best_head(np.ones((2, 4)), np.full((4, 4), 255), exclude_void=True))


@pytest.mark.parametrize(
    ("attention", "target", "options", "says"),
    [
        (np.ones((2, 4)), np.ones((3, 4)), {}, "no grid of square patches"),
        (np.ones((2, 3)), np.ones((4, 4)), {}, "no grid of square patches"),
        (np.ones((2, 64)), np.ones((4, 4)), {}, "no grid of square patches"),
        (np.ones((2, 4)), np.ones((4, 4)), {"grid": (1, 3)}, "has not 4 patches"),
        (np.ones((2, 4)), np.ones((4, 4)), {"grid": (-2, -2)}, "has not 4 patches"),
        (np.ones(4), np.ones((4, 4)), {}, "heads, n"),
        (np.ones((0, 4)), np.ones((4, 4)), {}, "heads, n"),
        (np.ones((2, 2, 4)), np.ones((1, 4, 4)), {}, "of the same images"),
        (np.ones((2, 4)), np.full((4, 4), 256), {}, "0..255, found 256..256"),
        (np.ones((2, 4)), np.full((4, 4), -1), {}, "0..255, found -1..-1"),
        (np.ones((2, 4)), np.full((4, 4), 0.5), {}, "whole numbers"),
        (-np.ones((2, 4)), np.ones((4, 4)), {}, "not negative"),
    ],
)
def test_jaccard_of_nonsense(attention: Any, target: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        jaccard_best_head(attention, target, **options)


# --- Mean IoU ---------------------------------------------------------------------------------------------


@given(seed=seeds, classes=st.integers(1, 6))
def test_confusion_equals_counting(seed: int, classes: int) -> None:
    draw = np.random.default_rng(seed)
    true, found = draw.integers(0, classes, (5, 7)), draw.integers(0, classes, (5, 7))
    true[draw.random(true.shape) < 0.2] = 255
    pairs = list(zip(true.ravel().tolist(), found.ravel().tolist()))
    counts = confusion_matrix(found, true, classes)
    assert counts.tolist() == [[pairs.count((i, j)) for j in range(classes)] for i in range(classes)]
    ious = []
    for label in range(classes):
        both = pairs.count((label, label))
        either = sum(1 for i, j in pairs if label in (i, j) and i != 255)
        ious.append(both / either if either else math.nan)
    np.testing.assert_allclose(class_ious(counts), ious)
    if counts.any():
        assert mean_iou(counts) == pytest.approx(100 * np.nanmean(ious))


def test_ignored_pixels_may_be_given_any_class() -> None:
    assert confusion_matrix([9, 0], [255, 0], classes=2).tolist() == [[1, 0], [0, 0]]
    assert confusion_matrix([0, 0], [0, 0], classes=1, ignore=0).tolist() == [[0]]
    assert confusion_matrix(np.zeros((0, 3)), np.zeros((0, 3)), classes=2).sum() == 0


@pytest.mark.parametrize(
    ("prediction", "target", "says"),
    [
        ([0, 1], [0], "differ in shape"),
        ([0, 2], [0, 1], r"prediction holds classes 0\.\.2, expected 0\.\.1"),
        ([0, 1], [0, -1], r"target holds classes -1\.\.0, expected 0\.\.1 or 255"),
        ([0, 1], [0, 2], "target holds"),
        ([0.5, 1], [0, 1], "prediction must hold whole numbers"),
    ],
)
def test_confusion_of_nonsense(prediction: Any, target: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        confusion_matrix(prediction, target, classes=2)


def test_a_class_counts_if_it_is_there_or_predicted() -> None:
    # Of four classes the third is only predicted, the fourth neither there nor predicted.
    counts = [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert mean_iou(counts) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    counts[0][2] = 1
    assert mean_iou(counts) == pytest.approx(100 * (1 / 3 + 2 / 3 + 0) / 3)


def test_mean_iou_of_nothing() -> None:
    for counts, says in ((np.zeros((2, 2)), "no pixels"), (np.ones((2, 3)), r"\(classes, classes\)")):
        with pytest.raises(ValueError, match=says):
            mean_iou(counts)


# --- Protocols --------------------------------------------------------------------------------------------


def fill_jaccard(protocol: JaccardProtocol, indices: Any) -> JaccardProtocol:
    for i in indices:
        target = target_of(i, (8, 12)) if i % 5 else np.zeros((8, 12))
        protocol.add(i, attention=attention_of(i, 3, 24), target=target)
    return protocol


def fill_iou(protocol: MeanIouProtocol, indices: Any) -> MeanIouProtocol:
    for i in indices:
        draw = np.random.default_rng(i)
        shape = (4 + i, 9)  # photos have their own sizes
        prediction, target = (draw.integers(0, 150, shape) for _ in range(2))
        target[0], target[1] = 255, prediction[1]
        protocol.add(i, prediction=prediction, target=target)
    return protocol


@pytest.mark.parametrize(("fill", "kind"), [(fill_jaccard, JaccardProtocol), (fill_iou, MeanIouProtocol)])
def test_gathering_processes_in_any_order_changes_nothing(fill: Any, kind: Any) -> None:
    n = 12
    alone = fill(kind(), range(n)).compute()
    # As of two processes that saw every other image, and of three, one of which wrapped around to image 0.
    for parts in ([range(0, n, 2), range(1, n, 2)], [range(8, n), [5, 4, 7, 6, 0], range(5)]):
        states = [copy.deepcopy(fill(kind(), part).state()) for part in parts]
        for order in itertools.permutations(states):
            together = kind()
            together.merge(order)
            assert together.compute() == alone


def test_jaccard_protocol_is_the_mean_over_images_with_objects() -> None:
    result = fill_jaccard(JaccardProtocol(exclude_void=True), range(12)).compute()
    each = [
        jaccard_best_head(attention_of(i, 3, 24), target_of(i, (8, 12)), exclude_void=True)
        for i in range(12)
        if i % 5
    ]
    assert result == {
        "images": 12.0,
        "images_without_objects": 3.0,
        "jaccard": pytest.approx(100 * np.mean(each)),
    }
    strict = fill_jaccard(JaccardProtocol(0.2), range(12)).compute()["jaccard"]
    assert strict != pytest.approx(result["jaccard"])


def test_mean_iou_protocol_counts_all_pixels_together() -> None:
    result = fill_iou(MeanIouProtocol(), range(6))
    total = np.zeros((150, 150), np.int64)
    for i in range(6):
        one = fill_iou(MeanIouProtocol(), [i])
        total += one.confusion()
    np.testing.assert_array_equal(result.confusion(), total)
    assert total.sum() == sum(9 * (3 + i) for i in range(6))
    assert result.compute()["mean_iou"] == mean_iou(total)
    assert result.compute()["pixel_accuracy"] == pytest.approx(100 * np.trace(total) / total.sum())
    # In one image nothing but right, in the other nothing but wrong: not 50 percent.
    protocol = MeanIouProtocol(2)
    protocol.add(0, prediction=[[0, 0, 0]], target=[[0, 0, 0]])
    protocol.add(1, prediction=[[0]], target=[[1]])
    assert protocol.compute()["mean_iou"] == pytest.approx(100 * (3 / 4 + 0) / 2)


def test_protocols_without_images() -> None:
    assert JaccardProtocol().compute() == {"images": 0.0, "images_without_objects": 0.0}
    assert MeanIouProtocol().compute() == {"images": 0.0}
    nothing = MeanIouProtocol(2)
    nothing.add(0, prediction=[[1]], target=[[255]])
    assert nothing.compute() == {"images": 1.0}
    with pytest.raises(ValueError, match="of one image"):
        JaccardProtocol().add(0, attention=np.ones((1, 2, 4)), target=np.ones((1, 4, 4)))
