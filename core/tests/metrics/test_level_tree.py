"""The one-pass sweep equals extracting contours with OpenCV at every one of the 256 levels, bit for bit."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from attnmap_core.metrics.level_tree import LevelTree, best_iou_by_level
from attnmap_core.threads import in_pieces
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Map = NDArray[np.uint8]


def draw_map(kind: str, height: int, width: int, seed: int) -> Map:
    rng = np.random.default_rng(seed)
    values = rng.random((height, width))
    if kind == "smooth":
        values = gaussian_filter(values, 1.5)
    elif kind == "plateaus":
        values = np.floor(values * 4)
    elif kind == "sparse":
        values = (values > 0.6) * values
    elif kind == "rings":
        y, x = np.mgrid[:height, :width]
        values = np.maximum(abs(y - height // 2), abs(x - width // 2)) % 3 + values
    elif kind == "constant":
        return np.full((height, width), rng.integers(0, 256), np.uint8)
    values = values - values.min()
    return np.floor(255 * values / max(values.max(), 1e-9)).astype(np.uint8)


kinds = st.sampled_from(["noise", "smooth", "plateaus", "sparse", "rings", "constant"])
sides = st.integers(1, 20)
maps = st.builds(draw_map, kinds, sides, sides, st.integers(0, 2**32 - 1))


def draw_boxes(values: Map, count: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    height, width = values.shape
    corners = rng.integers(0, [width, height], (count, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def iou(a: Any, b: Any) -> float:
    w, h = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1, 0) for i in (0, 1))
    area_a, area_b = ((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b))
    return float(w * h / (area_a + area_b - w * h))


def contour_by_contour(values: Map, boxes: NDArray[np.int64], *, every: bool) -> NDArray[np.float64]:
    height, width = values.shape
    known: dict[int, float] = {}  # by number of pixels: between two values of the map nothing changes
    curve = np.zeros(256)
    for level in range(256):
        binary = (values > level).astype(np.uint8)
        count = int(binary.sum())
        if count not in known:
            contours: Any = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
            if not every and contours:
                contours = [max(contours, key=cv2.contourArea)]
            found = [[0, 0, 0, 0]] * (not contours)
            for x, y, w, h in map(cv2.boundingRect, contours):
                found.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
            known[count] = max(iou(a, b) for a in found for b in boxes.tolist())
        curve[level] = known[count]
    return curve


@settings(deadline=None, max_examples=120)
@given(values=maps, count=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
@example(values=draw_map("noise", 1, 17, 0), count=1, seed=0)
@example(values=draw_map("noise", 17, 1, 0), count=1, seed=0)
@example(values=np.array([[0]], np.uint8), count=1, seed=0)
@example(values=np.array([[255]], np.uint8), count=1, seed=0)
def test_every_level_equals_opencv(values: Map, count: int, seed: int) -> None:
    boxes = draw_boxes(values, count, seed)
    for every in (False, True):
        curve = best_iou_by_level(values, boxes, every=every)
        np.testing.assert_array_equal(curve, contour_by_contour(values, boxes, every=every))


@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_a_map_of_real_size_equals_opencv(kind: str) -> None:
    values = draw_map(kind, 64, 96, 1)
    boxes = np.array([[20, 10, 70, 50], [0, 0, 95, 63]])
    for every in (False, True):
        curve = best_iou_by_level(values, boxes, every=every)
        np.testing.assert_array_equal(curve, contour_by_contour(values, boxes, every=every))


def test_a_hole_is_found_only_among_all_contours() -> None:
    values = np.zeros((20, 20), np.uint8)
    values[2:18, 2:18] = 200
    values[8:12, 6:10] = 50
    hole = np.array([[5, 7, 11, 13]])  # its border runs one pixel outside, and ends one pixel late
    every = best_iou_by_level(values, hole, every=True)
    assert every[[49, 50, 199]].tolist() == [pytest.approx(49 / 289), 1.0, 1.0]
    assert best_iou_by_level(values, hole, every=False)[100] == pytest.approx(49 / 289)


def test_of_equal_areas_the_lowest_region_counts() -> None:
    values = np.zeros((20, 20), np.uint8)
    values[2:5, 2:5] = values[12:15, 12:15] = 9
    upper, lower = np.array([[2, 2, 5, 5]]), np.array([[12, 12, 15, 15]])
    assert best_iou_by_level(values, upper, every=False)[3] == 0.0
    assert best_iou_by_level(values, lower, every=False)[3] == 1.0
    assert best_iou_by_level(values, upper, every=True)[3] == 1.0


def test_above_the_peak_there_is_the_empty_box() -> None:
    values = np.full((6, 6), 100, np.uint8)
    curve = best_iou_by_level(values, np.array([[0, 0, 1, 1]]), every=True)
    assert set(curve[:100]) == {4 / 36}
    assert set(curve[100:]) == {1 / 4}


def test_neither_the_map_nor_its_memory_layout_matters() -> None:
    values = draw_map("smooth", 12, 18, 5)
    boxes = np.array([[3, 3, 9, 9]])
    before = values.copy()
    expected = best_iou_by_level(values, boxes, every=True)
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(best_iou_by_level(np.asfortranarray(values), boxes, every=True), expected)
    strided = np.repeat(values, 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(best_iou_by_level(strided, boxes.astype(np.int32), every=True), expected)


def test_one_tree_serves_any_boxes_and_both_kinds_of_contours() -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(0, 256, (20, 30)).astype(np.uint8)
    tree = LevelTree(values)
    for seed in range(4):
        boxes = np.sort(np.random.default_rng(seed).integers(0, 20, (2, 2, 2)), axis=1).reshape(2, 4)
        for every in (True, False):
            fresh = best_iou_by_level(values, boxes, every=every)
            np.testing.assert_array_equal(tree.best_iou(boxes, every=every), fresh)


def test_another_map_in_between_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([[3, 4, 20, 25]])
    for _ in range(10):
        first, second = (rng.integers(0, 256, (40, 30)).astype(np.uint8) for _ in range(2))
        expected = LevelTree(first).best_iou(boxes, every=True)
        tree = LevelTree(first)
        tree.best_iou(boxes, every=False)  # finds the holes, which are kept
        LevelTree(second).best_iou(boxes, every=True)
        np.testing.assert_array_equal(tree.best_iou(boxes, every=True), expected)


def test_threads_do_not_share_what_they_write() -> None:
    maps = [np.random.default_rng(seed).integers(0, 9, (40, 30)).astype(np.uint8) for seed in range(12)]
    boxes = np.array([[3, 4, 20, 25]])
    alone = [best_iou_by_level(values, boxes, every=True) for values in maps]
    found: dict[int, Map] = {}

    def work(start: int, stop: int) -> None:
        for _ in range(20):
            for i in range(start, stop):
                found[i] = best_iou_by_level(maps[i], boxes, every=True)

    in_pieces(work, len(maps), threads=4)
    for i, curve in enumerate(alone):
        np.testing.assert_array_equal(found[i], curve)


@pytest.mark.parametrize("wrong", [np.zeros((0, 3), np.uint8), np.zeros((3, 3)), np.zeros(4, np.uint8)])
def test_what_is_no_uint8_map_is_named(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected a uint8 map"):
        LevelTree(wrong)
