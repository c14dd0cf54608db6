"""Heat maps, thresholds, boxes and scores: cases made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from contrastive_cam.inference import (
    PSYNET_THRESHOLD,
    CorLocProtocol,
    PsyNetProtocol,
    heat_map,
    largest_component_box,
    psynet_boxes,
    psynet_gray,
    threshold_of,
)


def blob(size: tuple[int, int], *boxes: tuple[int, int, int, int], value: float = 1.0) -> np.ndarray:
    score_map = np.zeros(size)
    for x0, y0, x1, y1 in boxes:
        score_map[y0:y1, x0:x1] = value
    return score_map


def test_largest_component():
    assert largest_component_box(blob((20, 30), (2, 3, 5, 6), (10, 4, 25, 9))).tolist() == [10, 4, 25, 9]
    assert largest_component_box(blob((9, 9), (5, 5, 7, 7), (1, 1, 3, 3))).tolist() == [1, 1, 3, 3]  # a tie
    assert largest_component_box(blob((9, 9), (1, 1, 3, 3), (3, 3, 5, 5))).tolist() == [
        1,
        1,
        5,
        5,
    ]  # by a corner
    for constant in (np.zeros((4, 5)), np.full((4, 5), 0.7)):
        assert largest_component_box(constant) is None
    with pytest.raises(ValueError, match=r"\(h, w\)"):
        largest_component_box(np.zeros((2, 3, 4)))


def test_threshold_is_inclusive():
    score_map = np.array([[0.0, 0.2, 0.5, 1.0]])
    assert largest_component_box(score_map, 0.2).tolist() == [1, 0, 4, 1]
    assert largest_component_box(score_map, np.nextafter(0.2, 1)).tolist() == [2, 0, 4, 1]
    assert largest_component_box(np.array([[0.0, 0.5, 1.0]]), "mean").tolist() == [
        2,
        0,
        3,
        1,
    ]  # strictly above


def test_otsu_is_the_best_of_all_splits():
    rng = np.random.default_rng(0)
    values = np.clip(np.concatenate([rng.normal(0.25, 0.1, 300), rng.normal(0.7, 0.08, 100)]), 0, 1).reshape(
        20, 20
    )

    def between(t: float) -> float:
        low, high = values[values < t], values[values >= t]
        return low.size * high.size * (low.mean() - high.mean()) ** 2 if low.size and high.size else 0.0

    best = max(between(t) for t in np.linspace(0, 1, 257))
    assert between(threshold_of(values, "otsu")) == pytest.approx(best, rel=2e-3)
    assert 0 <= threshold_of(np.zeros((3, 3)), "otsu") <= 1
    for wrong in (1.5, -0.1, "median", float("nan")):
        with pytest.raises(ValueError, match="threshold must be"):
            threshold_of(values, wrong)


def test_heat_map_of_a_constant_is_zero():
    assert not heat_map(np.full((2, 3, 3), 4.0), (6, 6)).any()
    peaks = heat_map(np.random.default_rng(0).random((3, 4, 5)), (8, 10))
    assert peaks.shape == (3, 8, 10)
    assert (peaks.min((1, 2)) == 0).all()
    assert (peaks.max((1, 2)) == 1).all()


def test_several_objects():
    truth = [[0, 0, 10, 10], [20, 20, 30, 30]]
    for multi, iou in (("first", 0.0), ("any", 1.0), ("best", 1.0)):
        assert CorLocProtocol(multi=multi).add(0, box_xyxy=truth[1], boxes_xyxy=truth) == iou
    with pytest.raises(ValueError, match="multi must be"):
        CorLocProtocol(multi="all")
    with pytest.raises(ValueError, match="no annotated box"):
        CorLocProtocol().add(0, box_xyxy=truth[0], boxes_xyxy=np.zeros((0, 4)))


def test_plus_one():
    assert CorLocProtocol(iou_plus_one=True).add(0, box_xyxy=[0, 0, 9, 9], boxes_xyxy=[[0, 0, 9, 4]]) == 0.5


def test_corloc_is_gathered_from_processes():
    protocols = [CorLocProtocol(), CorLocProtocol()]
    for index in range(5):
        protocols[index % 2].add(index, box_xyxy=[0, 0, 10, 2 * index], boxes_xyxy=[[0, 0, 10, 8]])
    states = [protocol.state() for protocol in protocols]
    protocols[0].merge(states)
    found = protocols[0].compute()
    assert found["images"] == 5
    assert [found[f"corloc_iou{level}"] for level in (30, 50, 70)] == [60.0, 60.0, 40.0]
    assert found["corloc_mean"] == pytest.approx(160 / 3)


def test_gray_of_jet_is_not_monotonic():
    gray = psynet_gray(np.linspace(0, 1, 10_000)).astype(int)
    kept = np.flatnonzero(gray > int(0.2 * gray.max())) / 9999
    assert kept.min() == pytest.approx(PSYNET_THRESHOLD, abs=0.005)
    assert kept.max() == pytest.approx(0.98, abs=0.005)


def test_gray_is_matplotlibs_and_opencvs():
    matplotlib = pytest.importorskip("matplotlib", reason="the colour table is compared with matplotlib's")
    score_map = np.random.default_rng(0).random((50, 50))
    colours = (matplotlib.colormaps["jet"](score_map)[..., :3] * 255).astype(np.uint8)
    plain = colours @ np.array([0.299, 0.587, 0.114])
    assert np.abs(psynet_gray(score_map) - plain).max() < 1.0


def test_psynet_box_has_no_hole_and_counts_one_more_pixel():
    y, x = np.mgrid[:224, :224]
    hot = np.exp(-((x - 100) ** 2 + (y - 90) ** 2) / 2000)
    score_map = (hot - hot.min()) / (hot.max() - hot.min())
    box = PsyNetProtocol().add(0, score_map=score_map, boxes_xyxy=[[50, 50, 150, 150]])
    plain = largest_component_box(score_map, PSYNET_THRESHOLD)
    assert np.abs(box - plain).max() <= 1
    assert PsyNetProtocol().add(0, score_map=np.zeros((224, 224)), boxes_xyxy=[[5, 5, 9, 9]]) is None


def test_psynet_truth_is_rounded():
    box = [[10.4, 20.6, 30.3, 41.9]]
    assert psynet_boxes(box, (224, 224)).tolist() == [[10, 21, 30, 42]]
    assert psynet_boxes(box, (224, 224), as_xywh=True).tolist() == [[10, 21, 30, 42]]
    assert psynet_boxes([[0.4, 0, 1.0, 2]], (224, 224), as_xywh=True).tolist() == [[0, 0, 1, 2]]
    assert psynet_boxes([[0.4, 0, 1.8, 2]], (224, 224), as_xywh=True).tolist() == [[0, 0, 1, 2]]
