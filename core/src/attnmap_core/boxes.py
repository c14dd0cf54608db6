"""Score map -> boxes, and the box conventions of this field: they live here and nowhere else.

Three conventions meet in weakly supervised localization:

- *photo* boxes: float pixels of the photo, end exclusive; what users give and get;
- *frame* boxes: integers in the square frame of the network input (224 x 224), whose IoU counts pixels
  inclusively;
- ``xywh`` in files, ``xyxy`` everywhere else.

Boxes of a score map follow the reference WSOL evaluator: the map becomes uint8, a threshold makes it binary,
and each contour gives a box. No OpenCV is needed: see :mod:`attnmap_core.metrics.level_tree`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Boxes = NDArray[np.float64]
Interpolation = Literal["bicubic", "bilinear"]

# --- Maps -----------------------------------------------------------------------------------------------


def minmax_normalise(score_map: ArrayLike) -> NDArray[np.float64]:
    """Shift and scale the last two axes to ``[0, 1]``; a constant or non-finite map becomes zeros.

    Example:
        >>> minmax_normalise([[2.0, 4.0], [3.0, 2.0]]).tolist()
        [[0.0, 1.0], [0.5, 0.0]]
        >>> minmax_normalise([[7.0, 7.0]]).tolist()
        [[0.0, 0.0]]
    """
    values = np.asarray(score_map, dtype=np.float64)
    finite = np.isfinite(values).all(axis=(-2, -1), keepdims=True)
    shifted = np.where(finite, values, 0.0)
    shifted = shifted - shifted.min(axis=(-2, -1), keepdims=True)
    peak = shifted.max(axis=(-2, -1), keepdims=True)
    return np.divide(shifted, peak, out=np.zeros_like(shifted), where=peak > 0)


def upsample_score_map(
    score_map: ArrayLike, size: tuple[int, int] = (224, 224), interpolation: Interpolation = "bicubic"
) -> NDArray[np.float64]:
    """Enlarge raw maps as OpenCV does, then normalise each to ``[0, 1]``.

    Half-pixel centres, no antialias, edges repeated; bicubic with a = -0.75 overshoots, so clip nothing
    before.

    Args:
        score_map: ``(..., h, w)``, any sign and scale.
        size: ``(height, width)`` of the result.
        interpolation: ``"bicubic"`` (reference evaluator) or ``"bilinear"`` (SCM's and TS-CAM's own code).

    Returns:
        ``(..., height, width)`` float64 in ``[0, 1]``.

    Raises:
        ValueError: for another interpolation.

    Example:
        >>> upsample_score_map([[0.0, 1.0]], (1, 4), "bilinear").round(2).tolist()
        [[0.0, 0.25, 0.75, 1.0]]
    """
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation must be bicubic or bilinear, got {interpolation!r}")
    values = np.asarray(score_map, dtype=np.float64)
    rows = _resize_matrix(values.shape[-2], size[0], interpolation)
    columns = _resize_matrix(values.shape[-1], size[1], interpolation)
    return minmax_normalise(rows @ np.where(np.isfinite(values), values, np.nan) @ columns.T)


@lru_cache(maxsize=32)
def _resize_matrix(old: int, new: int, interpolation: Interpolation) -> NDArray[np.float64]:
    """``(new, old)`` weights of a one-dimensional resize."""
    # OpenCV works out bicubic weights, not bilinear ones, in single precision; so do we, for equal uint8 maps.
    centre = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype("f4" if interpolation == "bicubic" else "f8")
    start = np.floor(centre)
    t = centre - start
    if interpolation == "bilinear":
        taps = {0: 1 - t, 1: t}
    else:
        a = -0.75
        outer = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a
        inner = [((a + 2) * x - (a + 3)) * x * x + 1 for x in (t, 1 - t)]
        taps = {-1: outer, 0: inner[0], 1: inner[1], 2: 1 - outer - inner[0] - inner[1]}
    matrix = np.zeros((new, old))
    for offset, weight in taps.items():
        source = np.clip(start + offset, 0, old - 1).astype(int)
        np.add.at(matrix, (np.arange(new), source), weight)
    matrix.flags.writeable = False
    return matrix


def score_map_to_uint8(score_map: ArrayLike) -> NDArray[np.uint8]:
    """``floor(255 * map)``, in double precision whatever the map's; uint8 is returned as it is.

    Raises:
        ValueError: if the map does not lie in ``[0, 1]``.

    Example:
        >>> score_map_to_uint8([[0.0, 0.5, 1.0]]).tolist()
        [[0, 127, 255]]
    """
    values = np.asarray(score_map)
    if values.dtype == np.uint8:
        return values
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"score map in [{values.min()}, {values.max()}], expected [0, 1]; normalise it first"
        )
    return (values.astype(np.float64) * 255).astype(np.uint8)


# --- Boxes of a map -------------------------------------------------------------------------------------


def threshold_levels(thresholds: ArrayLike, peak: int) -> NDArray[np.int64]:
    """Integer levels t = int(threshold * peak): a pixel is foreground where its uint8 value is above t.

    Raises:
        ValueError: if a threshold is not in ``[0, 1]``.

    Example:
        >>> threshold_levels([0.0, 0.5, 1.0], peak=255).tolist()
        [0, 127, 255]
    """
    shares = np.asarray(thresholds, dtype=np.float64)
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"thresholds are shares of the maximum in [0, 1], got {shares.tolist()}")
    return (shares * peak).astype(np.int64)


def boxes_from_score_map(
    score_map: ArrayLike,
    threshold: float,
    contours: Literal["largest", "all"] = "largest",
    convention: Literal["wsol", "tscam"] = "wsol",
) -> NDArray[np.int64]:
    """Boxes around what a score map holds above a threshold, by the reference WSOL evaluator's rules.

    Args:
        score_map: ``(h, w)`` float in ``[0, 1]``, or uint8.
        threshold: share of the map's maximum in ``[0, 1]``.
        contours: ``"largest"`` keeps the contour of largest polygon area (MaxBoxAccV1), ``"all"`` every one,
            hole borders included (V2).
        convention: ``"wsol"`` as the evaluator; ``"tscam"`` does not clip the end to the frame, and answers
            ``[0, 0, 1, 1]`` in place of ``[0, 0, 0, 0]`` where nothing is above the threshold.

    Returns:
        ``(k, 4)`` int xyxy in map pixels, ``k >= 1``, in OpenCV's contour order. The end is the exclusive
        edge, clipped to the last pixel, which the evaluators then read as inclusive.

    Raises:
        ValueError: if the map is not ``(h, w)`` in ``[0, 1]``, or the threshold not in ``[0, 1]``.

    Example:
        >>> score_map = np.zeros((6, 6))
        >>> score_map[1:4, 2:4] = 0.8
        >>> boxes_from_score_map(score_map, 0.5).tolist()
        [[2, 1, 4, 4]]
    """
    values = score_map_to_uint8(score_map)
    if values.ndim != 2:
        raise ValueError(f"a score map is (h, w), got {values.shape}")
    from .metrics.level_tree import LevelTree, contour_boxes

    peak = int(values.max(initial=0))
    level = int(threshold_levels(threshold, peak))
    if level >= peak:
        return np.array([[0, 0, 1, 1] if convention == "tscam" else [0, 0, 0, 0]], dtype=np.int64)
    found = contour_boxes(values > level) if contours == "all" else LevelTree(values).largest[level][None]
    boxes = found + np.array([0, 0, 1, 1])
    if convention == "wsol":
        height, width = values.shape
        boxes[:, 2:] = np.minimum(boxes[:, 2:], [width - 1, height - 1])
    return boxes


# --- Conversions and IoU --------------------------------------------------------------------------------


def xywh_to_xyxy(boxes_xywh: ArrayLike) -> Boxes:
    """``(..., 4)`` corner and size to corners, end exclusive."""
    boxes = np.asarray(boxes_xywh, dtype=np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def xyxy_to_xywh(boxes_xyxy: ArrayLike) -> Boxes:
    """``(..., 4)`` corners, end exclusive, to corner and size."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def resize_boxes(
    boxes_xyxy: ArrayLike,
    size_wh: tuple[float, float],
    to_wh: tuple[int, int] = (224, 224),
    convention: Literal["wsol", "scm"] = "wsol",
) -> NDArray[np.int64]:
    """Photo boxes in the integer frame of the evaluators.

    Args:
        boxes_xyxy: ``(k, 4)`` photo pixels.
        size_wh: width and height of the photo.
        to_wh: width and height of the frame.
        convention: ``"wsol"`` truncates ``coordinate * side / photo side`` and clips nothing; ``"scm"`` (also
            TS-CAM's) truncates corner and size first, divides before it multiplies, and clips to the frame.

    Returns:
        ``(k, 4)`` int.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    photo, frame = np.tile(np.asarray(size_wh, dtype=np.float64), 2), np.tile(np.asarray(to_wh), 2)
    if convention == "wsol":
        return (boxes * frame / photo).astype(np.int64)
    corner = boxes[:, :2].astype(np.int64)
    size = xyxy_to_xywh(boxes)[:, 2:].astype(np.int64)
    scaled = np.concatenate([corner, corner + size], axis=1) / photo * frame
    return np.clip(scaled, 0, np.where([True, True, False, False], np.inf, frame - 1)).astype(np.int64)


def box_iou(
    a_xyxy: ArrayLike, b_xyxy: ArrayLike, convention: Literal["inclusive", "continuous"] = "inclusive"
) -> NDArray[np.float64]:
    """Intersection over union of every pair of boxes.

    Args:
        a_xyxy: ``(a, 4)``.
        b_xyxy: ``(b, 4)``.
        convention: ``"inclusive"`` counts pixels, ends included (the evaluators, integer boxes);
            ``"continuous"`` measures areas, end exclusive.

    Returns:
        ``(a, b)`` in ``[0, 1]``; 0 where the union is empty.

    Raises:
        ValueError: for a box that ends before it begins, or (inclusive) has a negative coordinate.

    Example:
        >>> box_iou([[0, 0, 9, 9]], [[0, 0, 9, 4], [5, 5, 5, 5]]).tolist()
        [[0.5, 0.01]]
    """
    a = np.asarray(a_xyxy, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(b_xyxy, dtype=np.float64).reshape(1, -1, 4)
    for boxes in (a, b):
        right = (boxes[..., :2] <= boxes[..., 2:]).all() and (
            convention == "continuous" or (boxes >= 0).all()
        )
        if not right:  # NaN compares false
            wanted = "xyxy with x0 <= x1, y0 <= y1" + (", not negative" if convention == "inclusive" else "")
            raise ValueError(f"boxes must be {wanted}; got {boxes.reshape(-1, 4).tolist()}")
    one = 1.0 if convention == "inclusive" else 0.0
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + one
    inter = np.prod(np.maximum(sides, 0), axis=-1)
    area_a, area_b = (np.prod(boxes[..., 2:] - boxes[..., :2] + one, axis=-1) for boxes in (a, b))
    union = area_a + area_b - inter
    return np.divide(inter, union, out=np.zeros_like(union), where=union > 0)
