"""Reference numbers of the released evaluators: every file of a group, found by the prefix of its name.

The folder is ``ATTNMAP_GOLDEN`` (default: ``golden`` in the optional data folder ``ATTNMAP_SHARED``); sizes
and thresholds come from the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnmap_core.boxes import box_iou, boxes_from_score_map, resize_boxes, upsample_score_map
from attnmap_core.metrics.localization import (
    ScmProtocol,
    TscamProtocol,
    best_iou_curve,
    combine_masks,
    max_box_acc,
    pixel_histograms,
    pxap,
)
from numpy.typing import NDArray

pytestmark = pytest.mark.golden

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
FOLDER = Path(os.environ.get("ATTNMAP_GOLDEN", SHARED / "golden")) / "scm"

Golden = dict[str, NDArray[Any]]
CONTOURS = [("single", "largest"), ("multi", "all")]


def each_file(prefix: str) -> Callable[[Any], Any]:
    files = sorted(FOLDER.glob(f"{prefix}*.npz"))
    absent = pytest.param(
        None, marks=pytest.mark.skip(reason=f"no {prefix}*.npz in {FOLDER} (ATTNMAP_GOLDEN)")
    )
    return pytest.mark.parametrize(
        "golden", files or [absent], ids=lambda path: path.stem if path else "absent", indirect=True
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(request.param, allow_pickle=False) as file:
        return dict(file)


@each_file("rawboxes")
@pytest.mark.parametrize(("mode", "contours"), CONTOURS)
def test_boxes_of_small_maps(golden: Golden, mode: str, contours: Any) -> None:
    names = [name for name in golden if name.startswith("map") and name[3:].isdigit()]
    assert names
    for name in names:
        found = [boxes_from_score_map(golden[name], t, contours) for t in golden["thresholds"]]
        assert [len(boxes) for boxes in found] == golden[f"{name}_{mode}_count"].tolist(), name
        np.testing.assert_array_equal(np.concatenate(found), golden[f"{name}_{mode}_boxes"], name)


@each_file("boxeval")
@pytest.mark.parametrize(("mode", "contours"), CONTOURS)
def test_boxes_of_maps_in_order(golden: Golden, mode: str, contours: Any) -> None:
    thresholds, counts = golden["thresholds"], golden[f"{mode}_box_count"]
    ends = np.cumsum(counts.ravel()).reshape(counts.shape)
    # Some thresholds of each image, others for the next; the curves below are compared at all of them.
    for i, values in enumerate(golden["map_u8"]):
        for t in range(i % 9, len(thresholds), max(9, len(thresholds) // 10)):
            expected = golden[f"{mode}_boxes"][ends[i, t] - counts[i, t] : ends[i, t]]
            found = boxes_from_score_map(values, thresholds[t], contours)
            np.testing.assert_array_equal(found, expected, f"image {i}, threshold {t}")


@each_file("boxeval")
@pytest.mark.parametrize(("mode", "contours"), CONTOURS)
def test_best_iou_and_box_accuracy(golden: Golden, mode: str, contours: Any) -> None:
    owner = np.sort(golden["gt_index"])  # the boxes of the frame are in the order of the images
    curves = np.stack([
        best_iou_curve(values, golden["gt_boxes_224"][owner == i], golden["thresholds"], contours)
        for i, values in enumerate(golden["map_u8"])
    ])  # fmt: skip
    np.testing.assert_allclose(curves, golden[f"{mode}_best_iou"], rtol=0, atol=1e-9)
    levels = golden["iou_thresholds"] / 100
    correct = (curves[:, None] >= levels[:, None]).sum(axis=0)
    np.testing.assert_array_equal(correct, golden[f"{mode}_num_correct"])
    accuracy, _ = max_box_acc(curves, levels)
    np.testing.assert_allclose(accuracy, golden[f"{mode}_max_box_acc"], rtol=0, atol=1e-9)
    if mode == "multi":
        np.testing.assert_allclose(accuracy.mean(), golden["MaxBoxAccV2"], rtol=0, atol=1e-9)
    else:
        at_half = accuracy[levels.tolist().index(0.5)]
        np.testing.assert_allclose(at_half, golden["MaxBoxAccV1"], rtol=0, atol=1e-9)


@each_file("boxeval")
def test_true_boxes_in_the_frame(golden: Golden) -> None:
    sizes, owners = golden["image_sizes"], golden["gt_index"]
    order = np.argsort(owners, kind="stable")
    found = [resize_boxes(golden["gt_boxes"][j], sizes[owners[j]]) for j in order]
    np.testing.assert_array_equal(np.concatenate(found), golden["gt_boxes_224"])


@each_file("boxeval")
@pytest.mark.parametrize(("name", "interpolation"), [("cubic", "bicubic"), ("linear", "bilinear")])
def test_upsampled_maps(golden: Golden, name: str, interpolation: Any) -> None:
    expected = golden[f"resized_{name}_first4"]
    ours = upsample_score_map(golden["maps_lowres"][: len(expected)], expected.shape[1:], interpolation)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@each_file("iou_and_resize")
def test_iou_and_resized_boxes(golden: Golden) -> None:
    np.testing.assert_allclose(box_iou(golden["box_a"], golden["box_b"]), golden["iou"], rtol=0, atol=1e-9)
    for convention in ("wsol", "scm"):
        found = [
            resize_boxes(box, size, convention=convention)
            for box, size in zip(golden["orig_boxes_xyxy"], golden["image_sizes_wh"])
        ]
        np.testing.assert_array_equal(np.concatenate(found), golden[f"{convention}_resized_224"])


@each_file("pxap")
def test_pxap(golden: Golden) -> None:
    true: Any = 0
    false: Any = 0
    for i, score_map in enumerate(golden["maps"]):
        masks = [golden[name] for name in golden if name.startswith(f"mask{i}_")]
        combined = combine_masks(masks, golden.get(f"ignore{i}"))
        np.testing.assert_array_equal(combined, golden["combined_mask_224"][i])
        foreground, background = pixel_histograms(score_map, combined, golden["thresholds"])
        true, false = true + foreground, false + background
    np.testing.assert_array_equal(true, golden["hist_true"])
    np.testing.assert_array_equal(false, golden["hist_false"])
    np.testing.assert_allclose(pxap(true, false), golden["PxAP"], rtol=0, atol=1e-9)


@each_file("scm_metrics")
def test_scm_and_tscam_protocols(golden: Golden) -> None:
    scm = ScmProtocol(golden["thresholds"])
    fixed = sorted(
        int(name[9:-5]) for name in golden if name.startswith("tscam_thr") and name.endswith("_cls1")
    )
    tscam = {percent: TscamProtocol(percent / 100) for percent in fixed}
    assert tscam
    ranked = np.argsort(-golden["logits"], axis=1, kind="stable")
    np.testing.assert_array_equal(ranked[:, :5], golden["top5"])
    for i, label in enumerate(golden["labels"].tolist()):
        boxes = golden["gt_boxes_224"][golden["gt_index"] == i]
        score_maps = upsample_score_map(golden["maps"][i], (224, 224), "bilinear")
        classes = ranked[i, :5]
        scm.add(i, label=label, classes=classes, score_maps=score_maps[classes], boxes_xyxy=boxes)
        rank = ranked[i].tolist().index(label)
        for protocol in tscam.values():
            protocol.add(i, rank=rank, score_map=score_maps[label], boxes_xyxy=boxes)

    for name, counts in (("det", "det_correct"), ("loc", "loc_correct"), ("cls", "cls_correct")):
        np.testing.assert_array_equal(scm.column(name).sum(axis=0), golden[counts])
    result = scm.compute()
    for name, value in zip(golden["result_names"].tolist(), golden["result_values"].tolist()):
        assert result[name] == pytest.approx(value, abs=1e-9), name

    for percent, protocol in tscam.items():
        result, prefix = protocol.compute(), f"tscam_thr{percent}_"
        np.testing.assert_allclose(protocol.column("iou"), golden[f"{prefix}gt_iou"], rtol=0, atol=1e-9)
        for ours, theirs in (
            ("top1_cls", "cls1"), ("top5_cls", "cls5"), ("top1_loc", "loc1"), ("top5_loc", "loc5"),
            ("gt_known", "gtknown"),
        ):  # fmt: skip
            assert result[ours] == pytest.approx(float(golden[prefix + theirs]), abs=1e-9), (percent, ours)
        for i, label in enumerate(golden["labels"].tolist()):
            score_map = upsample_score_map(golden["maps"][i, label], (224, 224), "bilinear")
            found = boxes_from_score_map(score_map, percent / 100, convention="tscam")
            np.testing.assert_array_equal(found[0], golden[f"{prefix}gt_boxes"][i])
