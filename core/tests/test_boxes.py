"""Boxes equal OpenCV's, contour by contour; conversions and IoU equal counting pixels one by one."""

from __future__ import annotations

import itertools
from typing import Any

import cv2
import numpy as np
import pytest
from attnmap_core.boxes import (
    box_iou,
    boxes_from_score_map,
    minmax_normalise,
    resize_boxes,
    score_map_to_uint8,
    threshold_levels,
    upsample_score_map,
    xywh_to_xyxy,
    xyxy_to_xywh,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

KINDS = ("noise", "smooth", "plateaus", "sparse", "rings", "constant")


def draw_map(kind: str, height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """A uint8 map of one kind; rings are regions in holes in regions."""
    rng = np.random.default_rng(seed)
    values = rng.random((height, width))
    if kind == "smooth":
        values = gaussian_filter(values, 1.5)
    elif kind == "plateaus":
        values = np.floor(values * 3)
    elif kind == "sparse":
        values = (values > 0.7) * rng.random()
    elif kind == "rings":
        y, x = np.mgrid[:height, :width]
        values = np.maximum(abs(y - height // 2), abs(x - width // 2)) % 2 * 0.5 + (values > 0.8) * 0.5
    elif kind == "constant":
        return np.full((height, width), rng.integers(0, 256), np.uint8)
    values = values - values.min()
    return np.floor(255 * values / max(values.max(), 1e-9)).astype(np.uint8)


maps = st.builds(
    draw_map, st.sampled_from(KINDS), st.integers(1, 22), st.integers(1, 22), st.integers(0, 2**32 - 1)
)


def opencv_boxes(binary: NDArray[np.bool_], *, every: bool, clip: bool = True) -> list[list[int]]:
    """What the reference evaluator does with a binary map."""
    height, width = binary.shape
    contours: Any = cv2.findContours(binary.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not every and contours:
        contours = [max(contours, key=cv2.contourArea)]
    boxes: list[list[int]] = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)] if clip else [x, y, x + w, y + h])
    return boxes


# --- Maps to boxes ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(values=maps, threshold=st.floats(0, 0.99))
def test_boxes_are_those_of_opencv_in_its_order(values: NDArray[np.uint8], threshold: float) -> None:
    binary = values > int(threshold * int(values.max()))
    for contours, every in (("all", True), ("largest", False)):
        expected = opencv_boxes(binary, every=every) or [[0, 0, 0, 0]]
        assert boxes_from_score_map(values, threshold, contours).tolist() == expected
        expected = opencv_boxes(binary, every=every, clip=False) or [[0, 0, 1, 1]]
        assert boxes_from_score_map(values, threshold, contours, "tscam").tolist() == expected


def test_a_region_in_a_hole_comes_after_the_hole_around_it() -> None:
    score_map = np.zeros((9, 9))
    score_map[1:8, 1:8] = 1
    score_map[2:7, 2:7] = 0
    score_map[4, 4] = 1
    assert boxes_from_score_map(score_map, 0.5, "all").tolist() == [[1, 1, 8, 8], [1, 1, 8, 8], [4, 4, 5, 5]]
    assert boxes_from_score_map(score_map, 0.5).tolist() == [[1, 1, 8, 8]]


def test_of_equal_areas_the_contour_lowest_in_the_picture_wins() -> None:
    score_map = np.zeros((12, 6))
    score_map[1:3, 1:3] = score_map[8:10, 2:4] = 1
    assert boxes_from_score_map(score_map, 0.5).tolist() == [[2, 8, 4, 10]]
    assert boxes_from_score_map(score_map, 0.5, "all").tolist() == [[2, 8, 4, 10], [1, 1, 3, 3]]


def test_a_pixel_at_the_threshold_is_background() -> None:
    values = np.array([[0, 0, 0, 0], [0, 100, 200, 0], [0, 0, 0, 0]], np.uint8)
    assert boxes_from_score_map(values, 0.5).tolist() == [[2, 1, 3, 2]]
    assert boxes_from_score_map(values, 0.499).tolist() == [[1, 1, 3, 2]]


def test_an_empty_map_has_the_convention_s_own_box() -> None:
    for values in (np.zeros((5, 7)), np.full((5, 7), 1 / 300)):  # the second is 0 as uint8
        assert boxes_from_score_map(values, 0.0).tolist() == [[0, 0, 0, 0]]
        assert boxes_from_score_map(values, 0.0, convention="tscam").tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.01, 1.01])
def test_a_map_out_of_range_is_refused(bad: float) -> None:
    score_map = np.full((4, 4), 0.5)
    score_map[2, 1] = bad
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        boxes_from_score_map(score_map, 0.5)


def test_levels_are_those_of_uint8() -> None:
    assert score_map_to_uint8([[0.0, 0.5, 1.0, 254.999 / 255]]).tolist() == [[0, 127, 255, 254]]
    assert threshold_levels([0, 0.1, 0.5, 0.999], 255).tolist() == [0, 25, 127, 254]
    already = np.array([[7, 250]], np.uint8)
    assert score_map_to_uint8(already).tolist() == [[7, 250]]


# --- Raw maps to score maps -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    interpolation=st.sampled_from([("bicubic", cv2.INTER_CUBIC), ("bilinear", cv2.INTER_LINEAR)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_upsampling_equals_opencv(
    height: int, width: int, size: tuple[int, int], interpolation: Any, seed: int
) -> None:
    raw = np.random.default_rng(seed).normal(size=(height, width))
    expected = cv2.resize(raw, size[::-1], interpolation=interpolation[1]).reshape(size)
    spread = expected.max() - expected.min()
    ours = upsample_score_map(raw, size, interpolation[0])
    assert ours.shape == size
    if spread < 1e-3:  # constant but for rounding, which no two programs do alike
        return
    np.testing.assert_allclose(ours, (expected - expected.min()) / spread, atol=1e-5 / min(1, spread))


def test_uint8_maps_equal_those_of_opencv() -> None:
    rng = np.random.default_rng(3)
    for side in (7, 14, 28):
        raw = rng.normal(size=(side, side))
        expected = cv2.resize(raw, (224, 224), interpolation=cv2.INTER_CUBIC)
        expected -= expected.min()
        levels = np.floor(255 * (expected / expected.max()))
        ours = score_map_to_uint8(upsample_score_map(raw))
        assert (ours != levels).mean() < 1e-3  # a value on an integer may fall to either side


def test_leading_axes_are_maps_of_their_own() -> None:
    raw = np.random.default_rng(0).normal(size=(2, 3, 5, 4)) * np.array([1, 10, 100])[:, None, None]
    together = upsample_score_map(raw, (12, 9))
    for index in itertools.product(range(2), range(3)):
        np.testing.assert_array_equal(together[index], upsample_score_map(raw[index], (12, 9)))
        assert (together[index].min(), together[index].max()) == (0.0, 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_becomes_zeros_alone(bad: float) -> None:
    raw = np.random.default_rng(0).normal(size=(2, 4, 4))
    raw[0, 1, 2] = bad
    upsampled = upsample_score_map(raw, (8, 8))
    assert not upsampled[0].any()
    assert upsampled[1].max() == 1.0
    assert not minmax_normalise(raw)[0].any()


def test_a_constant_map_becomes_zeros() -> None:
    assert not minmax_normalise(np.full((3, 4), -7.5)).any()
    assert not upsample_score_map(np.full((3, 4), 0.0), (9, 9)).any()


def test_another_interpolation_is_refused() -> None:
    with pytest.raises(ValueError, match="nearest"):
        upsample_score_map(np.eye(3), interpolation="nearest")  # type: ignore[arg-type]


# --- Conversions ------------------------------------------------------------------------------------------

corner = st.integers(0, 14)
box = st.tuples(corner, corner, corner, corner).map(
    lambda b: [min(b[::2]), min(b[1::2]), max(b[::2]), max(b[1::2])]
)


def pixels_of(box_xyxy: list[int], *, inclusive: bool) -> set[tuple[int, int]]:
    x0, y0, x1, y1 = box_xyxy
    return set(itertools.product(range(x0, x1 + inclusive), range(y0, y1 + inclusive)))


@given(a=st.lists(box, min_size=1, max_size=4), b=st.lists(box, min_size=1, max_size=4))
def test_iou_equals_counting_pixels(a: list[list[int]], b: list[list[int]]) -> None:
    for convention, inclusive in (("inclusive", True), ("continuous", False)):
        ours = box_iou(a, b, convention)  # type: ignore[arg-type]
        assert ours.shape == (len(a), len(b))
        for i, j in itertools.product(range(len(a)), range(len(b))):
            first, second = (pixels_of(boxes, inclusive=inclusive) for boxes in (a[i], b[j]))
            expected = len(first & second) / len(first | second) if first | second else 0.0
            assert ours[i, j] == pytest.approx(expected, abs=1e-12)


def test_boxes_that_are_none_are_refused() -> None:
    good = [[0, 0, 3, 3]]
    for bad in ([[3, 0, 2, 5]], [[0, 5, 3, 4]], [[-1, 0, 3, 3]], [[0, 0, np.nan, 3]]):
        with pytest.raises(ValueError, match="xyxy"):
            box_iou(good, bad)
        with pytest.raises(ValueError, match="xyxy"):
            box_iou(bad, good)
    assert box_iou([[-4, -4, 0, 0]], [[-2, -4, 0, 0]], "continuous").tolist() == [[0.5]]


@given(st.lists(box, max_size=5))
def test_xywh_and_xyxy_are_inverse(boxes: list[list[int]]) -> None:
    boxes_xyxy = np.array(boxes, float).reshape(-1, 4)
    boxes_xywh = xyxy_to_xywh(boxes_xyxy)
    for (x0, y0, x1, y1), (x, y, w, h) in zip(boxes_xyxy, boxes_xywh):
        assert (x, y, w, h) == (x0, y0, x1 - x0, y1 - y0)
    np.testing.assert_array_equal(xywh_to_xyxy(boxes_xywh), boxes_xyxy)


@given(
    boxes=st.lists(st.lists(st.floats(0, 700), min_size=4, max_size=4).map(sorted), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 900), st.integers(1, 900)),
)
def test_frame_boxes_equal_the_published_arithmetic(boxes: list[list[float]], size: tuple[int, int]) -> None:
    boxes = [[a, b, c, d] for a, b, c, d in boxes]  # sorted, so x0 <= x1 and y0 <= y1
    width, height = size
    wsol, scm = resize_boxes(boxes, size), resize_boxes(boxes, size, convention="scm")
    for (x0, y0, x1, y1), by_wsol, by_scm in zip(boxes, wsol.tolist(), scm.tolist()):
        assert by_wsol == [
            int(x0 * 224 / width), int(y0 * 224 / height), int(x1 * 224 / width), int(y1 * 224 / height)
        ]  # fmt: skip
        w, h = int(x1 - x0), int(y1 - y0)
        assert by_scm == [
            int(max(int(x0) / width * 224, 0)),
            int(max(int(y0) / height * 224, 0)),
            int(min((int(x0) + w) / width * 224, 223)),
            int(min((int(y0) + h) / height * 224, 223)),
        ]


def test_frame_boxes_may_stick_out_in_one_convention_only() -> None:
    assert resize_boxes([[0, 0, 100, 50]], (100, 50)).tolist() == [[0, 0, 224, 224]]
    assert resize_boxes([[0, 0, 100, 50]], (100, 50), convention="scm").tolist() == [[0, 0, 223, 223]]
    assert resize_boxes([[0, 0, 100, 50]], (100, 50), to_wh=(32, 16)).tolist() == [[0, 0, 32, 16]]
    assert resize_boxes(np.zeros((0, 4)), (100, 50)).shape == (0, 4)
