"""Localization metrics equal plain loops over images, thresholds and pixels; protocols gather in any order."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import cv2
import numpy as np
import pytest
from attnmap_core.metrics.localization import (
    IOU_THRESHOLDS,
    ScmProtocol,
    StandardProtocol,
    TscamProtocol,
    best_iou_curve,
    centre_prior,
    centred_box,
    combine_masks,
    corloc,
    mask_iou_curve,
    max_box_acc,
    pixel_histograms,
    pxap,
    topk_loc,
    wsol_thresholds,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

SIZE = (40, 32)
seeds = st.integers(0, 2**32 - 1)


def blob_map(seed: int, size: tuple[int, int] = SIZE) -> NDArray[np.float64]:
    values = gaussian_filter(np.random.default_rng(seed).random(size), 3)
    values -= values.min()
    return values / values.max()


def random_boxes(seed: int, count: int = 1, size: tuple[int, int] = SIZE) -> NDArray[np.int64]:
    corners = np.random.default_rng(seed).integers(0, size[::-1], (count, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def iou(a: Any, b: Any) -> float:
    w, h = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1, 0) for i in (0, 1))
    area_a, area_b = ((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b))
    return float(w * h / (area_a + area_b - w * h))


def opencv_boxes(
    score_map: NDArray[np.float64], threshold: float, *, every: bool, clip: bool = True
) -> list[list[int]]:
    values = (score_map * 255).astype(np.uint8)
    binary = values > int(threshold * int(values.max()))
    height, width = values.shape
    contours: Any = cv2.findContours(binary.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not contours:
        return [[0, 0, 0, 0]] if clip else [[0, 0, 1, 1]]
    kept = contours if every else [max(contours, key=cv2.contourArea)]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in map(cv2.boundingRect, kept)]
    return [[a, b, min(c, width - 1), min(d, height - 1)] for a, b, c, d in boxes] if clip else boxes


def loop_curve(
    score_map: NDArray[np.float64], boxes: NDArray[np.int64], thresholds: Any, *, every: bool
) -> list[float]:
    return [
        max(iou(a, b) for a in opencv_boxes(score_map, t, every=every) for b in boxes.tolist())
        for t in thresholds
    ]


# --- Boxes ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seed=seeds, count=st.integers(1, 3))
def test_curve_equals_the_published_loop(seed: int, count: int) -> None:
    score_map, boxes, thresholds = blob_map(seed), random_boxes(seed, count), wsol_thresholds(0.05)
    for contours, every in (("largest", False), ("all", True)):
        ours = best_iou_curve(score_map, boxes, thresholds, contours)  # type: ignore[arg-type]
        assert ours.tolist() == loop_curve(score_map, boxes, thresholds, every=every)


def test_curve_takes_uint8_and_float_maps_alike() -> None:
    score_map, boxes = blob_map(1), random_boxes(1)
    as_uint8 = (score_map * 255).astype(np.uint8)
    thresholds = wsol_thresholds()
    np.testing.assert_array_equal(
        best_iou_curve(score_map, boxes, thresholds), best_iou_curve(as_uint8, boxes, thresholds)
    )
    # The threshold is a share of the map's own maximum.
    dim = best_iou_curve(as_uint8 // 2, boxes, [0.5])
    assert dim.tolist() == loop_curve((as_uint8 // 2) / 255 + 1e-9, boxes, [0.5], every=False)


@pytest.mark.parametrize(
    "boxes", [np.zeros((0, 4)), [[5, 0, 2, 3]], [[0, 9, 3, 2]], [[-1, 0, 3, 3]], [[0, 0, 3.5, 3]]]
)
def test_true_boxes_that_are_none_are_refused(boxes: Any) -> None:
    with pytest.raises(ValueError, match="true boxes"):
        best_iou_curve(blob_map(0), boxes, [0.5])


def test_thresholds_are_those_of_the_published_code() -> None:
    assert wsol_thresholds().tolist() == list(np.arange(0, 1, 0.01))
    assert len(wsol_thresholds(0.001)) == 1000


@given(seed=seeds, n=st.integers(1, 9), t=st.integers(1, 7))
def test_max_box_acc_equals_counting(seed: int, n: int, t: int) -> None:
    curves = np.random.default_rng(seed).choice([0.0, 0.29, 0.3, 0.5, 0.7, 1.0], (n, t))
    accuracy, best = max_box_acc(curves)
    for delta, value, index in zip(IOU_THRESHOLDS, accuracy, best):
        shares = [100.0 * sum(curves[i, j] >= delta for i in range(n)) / n for j in range(t)]
        assert value == max(shares)
        assert index == shares.index(max(shares))


def test_curves_in_single_precision_reach_the_same_levels() -> None:
    exactly = np.array([[0.3, 0.5, 0.7]], np.float32)  # as float64, the first and the last fall just beside
    for levels in (IOU_THRESHOLDS, np.array(IOU_THRESHOLDS)):
        accuracy, best = max_box_acc(exactly, levels)  # type: ignore[arg-type]
        assert (accuracy.tolist(), best.tolist()) == ([100.0] * 3, [0, 1, 2])


def test_empty_inputs_are_refused() -> None:
    for call in (
        lambda: max_box_acc(np.zeros((0, 5))),
        lambda: max_box_acc([0.5, 0.4]),
        lambda: corloc([]),
        lambda: topk_loc([], []),
        lambda: topk_loc([0.5], [0, 1]),
        lambda: pxap([0, 0], [1, 2]),
        lambda: ScmProtocol().compute(),
        lambda: TscamProtocol().compute(),
    ):
        with pytest.raises(ValueError, match=r"empty|no images|foreground"):
            call()


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.49, 0.5, 0.51, 1.0]), st.integers(0, 8)), min_size=1))
def test_shares_equal_counting(rows: list[tuple[float, int]]) -> None:
    ious, ranks = zip(*rows)
    assert corloc(ious) == pytest.approx(100 * sum(i >= 0.5 for i in ious) / len(rows))
    for k in (1, 5):
        right = sum(i >= 0.5 and rank < k for i, rank in rows)
        assert topk_loc(ious, ranks, k) == pytest.approx(100 * right / len(rows))


# --- Masks ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=seeds, step=st.sampled_from([0.01, 0.1, 0.25]))
def test_pxap_equals_a_loop_over_thresholds(seed: int, step: float) -> None:
    rng = np.random.default_rng(seed)
    images = [(np.round(blob_map(seed + i) * 20) / 20, rng.choice([0, 1, 255], SIZE)) for i in range(3)]
    images[0][1][0, 0] = 1
    thresholds = wsol_thresholds(step)
    histograms = [pixel_histograms(scores, mask, thresholds) for scores, mask in images]
    ours = pxap(sum(true for true, _ in histograms), sum(false for _, false in histograms))

    scores = np.concatenate([s[m != 255] for s, m in images])
    truth = np.concatenate([m[m != 255] == 1 for _, m in images])
    expected = previous = 0.0
    for threshold in [1.0, *thresholds[::-1]]:
        chosen = scores >= threshold
        if chosen.any():
            precision, recall = truth[chosen].mean(), truth[chosen].sum() / truth.sum()
            expected += precision * (recall - previous)
            previous = recall
    assert previous == 1.0
    assert ours == pytest.approx(100 * expected, abs=1e-9)


def test_pixels_to_ignore_are_in_no_histogram() -> None:
    mask = np.array([[1, 0, 255], [255, 0, 0]])
    true, false = pixel_histograms(np.full((2, 3), 0.35), mask, [0.0, 0.25, 0.5])
    assert true.tolist() == [0, 1, 0, 0, 0]
    assert false.tolist() == [0, 3, 0, 0, 0]
    with pytest.raises(ValueError, match="size"):
        pixel_histograms(np.zeros((2, 2)), mask, [0.0])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        pixel_histograms(np.full((2, 3), 1.5), mask, [0.0])


@settings(deadline=None, max_examples=40)
@given(seed=seeds, height=st.integers(1, 60), width=st.integers(1, 60))
def test_combined_masks_equal_opencv(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.choice([0, 255], (height, width)).astype(np.uint8) for _ in range(2)]
    ignore = rng.choice([0, 255], (height, width)).astype(np.uint8)
    size = (23, 31)
    object_, left_out = (
        cv2.resize(picture, size[::-1], interpolation=cv2.INTER_NEAREST) > 127
        for picture in (masks[0] | masks[1], ignore)
    )
    expected = np.where(object_, 1, np.where(left_out, 255, 0))
    np.testing.assert_array_equal(combine_masks(masks, ignore, size), expected)
    as_bool = combine_masks([mask > 0 for mask in masks], ignore > 0, size)
    np.testing.assert_array_equal(as_bool, expected)
    np.testing.assert_array_equal(combine_masks(masks, None, size), object_)


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_mask_iou_equals_counting_pixels(seed: int) -> None:
    score_map = blob_map(seed)
    mask = np.random.default_rng(seed).choice([0, 1, 255], SIZE)
    values, thresholds = (score_map * 255).astype(int), wsol_thresholds(0.1)
    for threshold, ours in zip(thresholds, mask_iou_curve(score_map, mask, thresholds)):
        above = values > int(threshold * values.max())
        inter = (above & (mask == 1)).sum()
        union = ((above & (mask == 0)) | (mask == 1)).sum()
        assert ours == pytest.approx(inter / union)


def test_any_gray_above_one_half_is_object() -> None:
    gray = np.array([[0, 1], [100, 255]], np.uint8)
    assert combine_masks([gray], None, (2, 2)).tolist() == [[0, 1], [1, 1]]
    assert combine_masks([gray / 255], None, (2, 2)).tolist() == [[0, 0], [0, 1]]


def test_mask_iou_without_an_object_is_zero() -> None:
    assert mask_iou_curve(np.zeros((4, 4)), np.zeros((4, 4)), [0.0, 0.5]).tolist() == [0.0, 0.0]


# --- Maps that see nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (10, 30), (1, 1)])
def test_the_centre_prior_peaks_in_the_middle(size: tuple[int, int]) -> None:
    prior = centre_prior(size)
    assert prior.shape == size
    assert prior.min() >= 0
    assert prior.max() <= 1
    np.testing.assert_allclose(prior, prior[::-1, ::-1], atol=1e-12)
    if size != (1, 1):
        assert prior[size[0] // 2, size[1] // 2] == prior.max() == 1
        assert prior[0, 0] == 0


def test_the_centred_box_is_where_it_says() -> None:
    assert opencv_boxes(centred_box(0.5), 0.1, every=True) == [[56, 56, 168, 168]]
    assert centred_box(1.0, (3, 5)).all()
    assert centred_box(0.5, (4, 8)).sum() == 2 * 4


# --- Protocols --------------------------------------------------------------------------------------------


def fill_standard(protocol: StandardProtocol, indices: Any) -> StandardProtocol:
    for i in indices:
        mask = combine_masks([blob_map(900 + i) > 0.5], blob_map(700 + i) > 0.8, SIZE)
        protocol.add(
            i,
            rank=i % 7,
            score_map=blob_map(i),
            boxes_xyxy=random_boxes(i, 1 + i % 2) if i % 4 else None,
            mask=mask if i % 3 else None,
        )
    return protocol


def fill_scm(protocol: ScmProtocol, indices: Any) -> ScmProtocol:
    for i in indices:
        classes = np.random.default_rng(i).permutation(8)[:5]
        score_maps = np.stack([blob_map(10 * i + k) for k in range(5)])
        protocol.add(i, label=i % 8, classes=classes, score_maps=score_maps, boxes_xyxy=random_boxes(i))
    return protocol


def fill_tscam(protocol: TscamProtocol, indices: Any) -> TscamProtocol:
    for i in indices:
        protocol.add(i, rank=i % 7, score_map=blob_map(i), boxes_xyxy=random_boxes(i))
    return protocol


@pytest.mark.parametrize(
    ("fill", "kind"),
    [(fill_standard, StandardProtocol), (fill_scm, ScmProtocol), (fill_tscam, TscamProtocol)],
)
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
            assert list(together.rows) == list(range(n))


def test_standard_metrics_equal_loops() -> None:
    n, thresholds = 12, wsol_thresholds()
    protocol = fill_standard(StandardProtocol(), range(n))
    result = protocol.compute()
    boxed = [i for i in range(n) if i % 4]
    curves = {
        every: np.array(
            [loop_curve(blob_map(i), random_boxes(i, 1 + i % 2), thresholds, every=every) for i in boxed]
        )
        for every in (False, True)
    }
    shares = {(every, d): 100 * (curves[every] >= d).mean(axis=0) for every in curves for d in IOU_THRESHOLDS}
    best = int(shares[False, 0.5].argmax())
    located, ranks = curves[False][:, best] >= 0.5, np.array([i % 7 for i in boxed])
    expected = {
        "images": n,
        "images_with_boxes": len(boxed),
        "top1_cls": 100 * np.mean([i % 7 < 1 for i in range(n)]),
        "top5_cls": 100 * np.mean([i % 7 < 5 for i in range(n)]),
        "gt_known": shares[False, 0.5].max(),
        "max_box_acc_v1": shares[False, 0.5].max(),
        "max_box_acc_v2": np.mean([shares[True, d].max() for d in IOU_THRESHOLDS]),
        "top1_loc": 100 * np.mean(located & (ranks < 1)),
        "top5_loc": 100 * np.mean(located & (ranks < 5)),
        "threshold": thresholds[best],
    }
    for d in IOU_THRESHOLDS:
        expected[f"v2_iou{round(100 * d)}"] = shares[True, d].max()
        expected[f"box_acc_iou{round(100 * d)}"] = shares[False, d].max()
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-9), name

    assert protocol.ious() == {
        i: pytest.approx(v, abs=1e-6) for i, v in zip(boxed, curves[False][:, best].tolist())
    }
    for d, curve in protocol.box_accuracy_curves().items():
        np.testing.assert_allclose(100 * curve, shares[False, d])

    masked = [i for i in range(n) if i % 3]
    masks = [combine_masks([blob_map(900 + i) > 0.5], blob_map(700 + i) > 0.8, SIZE) for i in masked]
    histograms = [pixel_histograms(blob_map(i), m, thresholds) for i, m in zip(masked, masks)]
    assert result["pxap"] == pytest.approx(pxap(*(sum(kind) for kind in zip(*histograms))))
    curve = np.mean([mask_iou_curve(blob_map(i), m, thresholds) for i, m in zip(masked, masks)], axis=0)
    assert result["miou"] == pytest.approx(100 * curve.max(), abs=1e-4)


def test_a_frozen_threshold_is_used_as_given() -> None:
    free = fill_standard(StandardProtocol(), range(12))
    frozen = fill_standard(StandardProtocol(threshold=0.9), range(12))
    result = frozen.compute()
    assert result["threshold"] == pytest.approx(0.9)
    assert result["gt_known"] == pytest.approx(100 * free.box_accuracy_curves()[0.5][90])
    assert result["gt_known"] < free.compute()["gt_known"]
    assert result["max_box_acc_v1"] == free.compute()["max_box_acc_v1"]


def test_what_the_data_cannot_say_is_left_out() -> None:
    only_classes = StandardProtocol()
    only_classes.add(0, rank=0, score_map=blob_map(0))
    assert set(only_classes.compute()) == {"images", "top1_cls", "top5_cls"}
    assert only_classes.ious() == {}
    only_boxes = StandardProtocol()
    only_boxes.add(0, rank=None, score_map=blob_map(0), boxes_xyxy=np.zeros((0, 4)))
    only_boxes.add(1, rank=None, score_map=blob_map(1), boxes_xyxy=[[0, 0, 31, 39]])
    result = only_boxes.compute()
    assert result["images_with_boxes"] == 1
    assert not {"top1_cls", "top1_loc", "pxap", "miou"} & set(result)
    assert StandardProtocol().compute() == {"images": 0.0}


def test_a_blank_map_locates_nothing_and_breaks_nothing() -> None:
    protocol = StandardProtocol()
    protocol.add(0, rank=0, score_map=np.zeros(SIZE), boxes_xyxy=[[5, 5, 20, 20]])
    result = protocol.compute()
    assert result["gt_known"] == result["max_box_acc_v2"] == result["top1_loc"] == 0.0


def test_tscam_uses_its_own_box_and_a_strict_iou() -> None:
    score_map = np.zeros((12, 12))
    score_map[:9, :9] = 1  # the box [0, 0, 9, 9], read as 10 x 10 pixels
    protocol = TscamProtocol()
    protocol.add(0, rank=0, score_map=score_map, boxes_xyxy=[[0, 0, 9, 4]])  # IoU exactly one half
    result = protocol.compute()
    assert result["gt_known"] == 100.0
    assert result["top1_loc"] == result["top5_loc"] == 0.0

    n = 12
    result = fill_tscam(TscamProtocol(0.3), range(n)).compute()
    found = [opencv_boxes(blob_map(i), 0.3, every=False, clip=False)[0] for i in range(n)]
    ious = np.array([iou(box, random_boxes(i)[0].tolist()) for i, box in enumerate(found)])
    ranks = np.arange(n) % 7
    assert result == {
        "top1_cls": pytest.approx(100 * np.mean(ranks < 1)),
        "top5_cls": pytest.approx(100 * np.mean(ranks < 5)),
        "gt_known": pytest.approx(100 * np.mean(ious >= 0.5)),
        "top1_loc": pytest.approx(100 * np.mean((ious > 0.5) & (ranks < 1))),
        "top5_loc": pytest.approx(100 * np.mean((ious > 0.5) & (ranks < 5))),
        "threshold": 0.3,
    }


def test_scm_asks_the_maps_of_predicted_classes() -> None:
    right, wrong = np.zeros((20, 20)), np.zeros((20, 20))
    right[5:15, 5:15], wrong[0:2, 0:2] = 1, 1
    truth = [[5, 5, 15, 15]]
    protocol = ScmProtocol()
    # Image 0: the first class is the true one, its map wrong; the fourth class's map is right.
    protocol.add(
        0, label=3, classes=[3, 1, 0, 2, 4], score_maps=[wrong] * 3 + [right, wrong], boxes_xyxy=truth
    )
    # Image 1: the true class is not among the five, but the first one's map is right.
    protocol.add(1, label=9, classes=[3, 1, 0, 2, 4], score_maps=[right] + [wrong] * 4, boxes_xyxy=truth)
    # Image 2: the true class comes second, with a right map.
    protocol.add(
        2, label=1, classes=[3, 1, 0, 2, 4], score_maps=[wrong, right] + [wrong] * 3, boxes_xyxy=truth
    )
    result = protocol.compute()
    third = 100 / 3
    assert result["cls_acc_top-1"] == pytest.approx(third)
    assert result["cls_acc_top-5"] == pytest.approx(2 * third)
    assert result["GT-Known_top-1"] == pytest.approx(third)
    assert result["GT-Known_top-5"] == pytest.approx(100)
    assert result["maxbox_acc_thr_70.00_top-5"] == pytest.approx(100)
    assert result["loc_acc_thr_50.00_top-1"] == 0
    assert result["loc_acc_thr_50.00_top-5"] == pytest.approx(third)
    assert result["det_optThred_thr_50.00_top-1"] == 0.0


def test_scm_takes_each_number_at_its_own_threshold() -> None:
    bright, dim = np.zeros((40, 40)), np.zeros((40, 40))
    bright[4:36, 4:36] = 0.4
    bright[5:15, 5:15] = dim[10:30, 10:30] = 1  # the first is as small as its object only from 0.4 on
    protocol = ScmProtocol()
    protocol.add(0, label=0, classes=[0], score_maps=[bright], boxes_xyxy=[[5, 5, 15, 15]])
    protocol.add(1, label=1, classes=[0], score_maps=[dim], boxes_xyxy=[[10, 10, 30, 30]])
    result = protocol.compute()
    assert result["GT-Known_top-1"] == 100.0
    assert result["det_optThred_thr_50.00_top-1"] == pytest.approx(0.4)
    assert result["loc_acc_thr_50.00_top-1"] == 50.0
    assert result["loc_optThred_thr_50.00_top-1"] == pytest.approx(0.4)
