"""From attention maps to boxes, and how boxes are scored: CorLoc, and the released PsyNet code's own evaluation.

A map is stretched to ``[0, 1]``, enlarged bilinearly and stretched again; what is at or above a threshold falls apart
in 8-connected components; the largest gives the box. Thresholds need no labels: a fixed share, or one of the map.
Convention of scores: a photo without a box counts as missed.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from attnmap_core.boxes import box_iou, boxes_from_score_map, upsample_score_map
from attnmap_core.errors import InputError
from attnmap_core.metrics.localization import Protocol, corloc
from numpy.typing import ArrayLike, NDArray

Boxes: TypeAlias = NDArray[np.float64]
Threshold: TypeAlias = float | Literal["mean", "otsu"]
Multi = Literal["first", "any", "best"]

IOU_LEVELS = (0.3, 0.5, 0.7)
"""Overlaps at which CorLoc is reported, and whose mean is CorLoc^Mean."""

PSYNET_THRESHOLD = 0.152
"""The share of the map's maximum that the colours of the PsyNet evaluation come down to; its code says 0.2."""


# --- Heat map --------------------------------------------------------------------------------------


def heat_map(attention: ArrayLike, size: tuple[int, int] = (224, 224)) -> NDArray[np.float64]:
    """Enlarge raw attention maps bilinearly and stretch each to ``[0, 1]``.

    Args:
        attention: ``(..., h, w)``, any scale.
        size: ``(height, width)`` of the result.

    Returns:
        ``(..., height, width)``; zeros for a constant map, which points nowhere.

    Example:
        >>> heat_map([[1.0, 3.0]], (1, 4)).round(2).tolist()
        [[0.0, 0.25, 0.75, 1.0]]
    """
    return upsample_score_map(attention, size, "bilinear")


def threshold_of(score_map: ArrayLike, rule: Threshold) -> float:
    """The threshold of one heat map, by a rule that needs no labels.

    Args:
        score_map: ``(h, w)`` in ``[0, 1]``.
        rule: the threshold itself; ``"mean"`` of the map (as SCDA, whose mask is strictly above it); ``"otsu"``, the
            edge among 256 bins that parts the values best in two classes.

    Returns:
        A number in ``[0, 1]``.

    Raises:
        ValueError: for another rule, or a number out of range.

    Example:
        >>> score_map = np.repeat([0.0, 0.1, 0.9, 1.0], 25).reshape(10, 10)
        >>> threshold_of(score_map, 0.2), threshold_of(score_map, "mean"), 0.1 < threshold_of(score_map, "otsu") < 0.9
        (0.2, 0.5, True)
    """
    values = np.asarray(score_map, dtype=np.float64)
    if rule == "mean":
        return float(values.mean())
    if rule == "otsu":
        return _otsu(values)
    if isinstance(rule, str) or not 0 <= rule <= 1:
        raise ValueError(f"threshold must be a share in [0, 1], 'mean' or 'otsu', got {rule!r}")
    return float(rule)


def parse_rule(text: str) -> float | Literal["mean", "otsu", "zero"] | None:
    """The cut of heat maps that a text names; None for auto.

    Raises:
        InputError: for anything else than a share, mean, otsu, zero or auto.

    Example:
        >>> parse_rule("0.3"), parse_rule("otsu"), parse_rule("auto")
        (0.3, 'otsu', None)
    """
    if text == "auto":
        return None
    if text in ("mean", "otsu", "zero"):
        return text
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError(f"threshold {text}: expected a share in [0, 1], mean, otsu, zero or auto")
    return share


def _otsu(values: NDArray[np.float64]) -> float:
    count, edges = np.histogram(values, bins=256, range=(0, 1))
    centre = (edges[:-1] + edges[1:]) / 2
    low, mass = np.cumsum(count)[:-1], np.cumsum(count * centre)
    high = values.size - low
    both = (low > 0) & (high > 0)
    gap = np.divide(mass[:-1], low, where=both, out=np.zeros(255)) - np.divide(
        mass[-1] - mass[:-1], high, where=both, out=np.zeros(255)
    )
    spread = np.where(both, low * high * gap**2, 0)
    best = np.flatnonzero(spread >= spread.max() * (1 - 1e-12))  # an empty valley: its middle
    return float(edges[1:-1][best].mean())


def largest_component_box(score_map: ArrayLike, threshold: Threshold = 0.2) -> Boxes | None:
    """Tight box around the largest 8-connected component of what is at or above a threshold.

    Of equally large components the first in row-major order counts.

    Args:
        score_map: ``(h, w)`` in ``[0, 1]``.
        threshold: see :func:`threshold_of`; pixels exactly at ``"mean"`` do not count.

    Returns:
        ``(4,)`` xyxy in map pixels, end exclusive; None for a constant map.

    Raises:
        ValueError: if the map is not ``(h, w)``, or as :func:`threshold_of`.

    Example:
        >>> score_map = np.zeros((5, 6))
        >>> score_map[1, 1] = score_map[2, 2] = score_map[4, 5] = 1.0
        >>> largest_component_box(score_map).tolist()
        [1.0, 1.0, 3.0, 3.0]
    """
    values = np.asarray(score_map, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"a score map is (h, w), got {values.shape}")
    level = threshold_of(values, threshold)
    if not values.size or values.min() == values.max():
        return None
    return mask_box(largest_component(values > level if threshold == "mean" else values >= level))


def largest_component(mask: ArrayLike, connectivity: Literal[4, 8] = 8) -> NDArray[np.bool_]:
    """The part of a mask that is its largest connected component, the first in row-major order of equals.

    Args:
        mask: ``(h, w)``.
        connectivity: whether cells that meet at a corner hold together (8) or not (4).

    Returns:
        ``(h, w)``; nothing where the mask is empty.

    Raises:
        ValueError: for another connectivity.

    Example:
        >>> largest_component([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]]).astype(int).tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    """
    from scipy import ndimage

    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity}")
    found: Any = ndimage.label(np.asarray(mask, dtype=bool), np.ones((3, 3)) if connectivity == 8 else None)
    labels, count = found  # numbered in row-major order
    if count == 0:
        return np.zeros_like(labels, dtype=bool)
    return labels == int(np.argmax(np.bincount(labels.ravel())[1:])) + 1


def mask_box(mask: ArrayLike) -> Boxes | None:
    """Tight box ``(4,)`` xyxy around a mask ``(h, w)``, end exclusive; None around nothing.

    Example:
        >>> mask_box([[0, 1], [0, 1]]).tolist()
        [1.0, 0.0, 2.0, 2.0]
    """
    rows, columns = np.nonzero(np.asarray(mask))
    if not len(rows):
        return None
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float64)


# --- CorLoc ----------------------------------------------------------------------------------------


class CorLocProtocol(Protocol):
    """CorLoc at three overlaps and their mean, of one box per photo.

    .. math:: \\mathrm{CorLoc}^{\\mathrm{IoU} = d} = 100 \\cdot |\\{i : \\mathrm{IoU}_i \\ge d\\}| / N

    Args:
        multi: which of several annotated objects counts: the ``"first"``; ``"any"`` or ``"best"``, the one that
            overlaps best.
        iou_plus_one: count pixels with both ends included, as the PsyNet code does with its own boxes.

    Raises:
        ValueError: for another ``multi``.

    Example:
        >>> protocol = CorLocProtocol()
        >>> protocol.add(0, box_xyxy=[0, 0, 10, 10], boxes_xyxy=[[0, 0, 10, 6]])
        0.6
        >>> protocol.add(1, box_xyxy=None, boxes_xyxy=[[0, 0, 10, 6]])
        0.0
        >>> protocol.compute()["corloc_iou50"]
        50.0
    """

    def __init__(self, *, multi: Multi = "first", iou_plus_one: bool = False) -> None:
        if multi not in ("first", "any", "best"):
            raise ValueError(f"multi must be first, any or best, got {multi!r}")
        super().__init__(IOU_LEVELS)
        self.multi: Multi = multi
        self.iou_plus_one = iou_plus_one

    def add(self, index: int, *, box_xyxy: ArrayLike | None, boxes_xyxy: ArrayLike) -> float:
        """Take one photo; return its IoU.

        Args:
            index: its place in the data set.
            box_xyxy: ``(4,)`` predicted, or None.
            boxes_xyxy: ``(g, 4)`` annotated, at least one, in the same frame.

        Raises:
            ValueError: for no annotated box.
        """
        truth = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
        if not len(truth):
            raise ValueError(f"photo {index} has no annotated box; leave it out of CorLoc")
        iou = 0.0
        if box_xyxy is not None:
            counted = truth[:1] if self.multi == "first" else truth
            one = np.array([0, 0, 1, 1]) * self.iou_plus_one  # boxes of real photos may begin below 0
            box = np.asarray(box_xyxy, dtype=np.float64).reshape(1, 4)
            iou = float(box_iou(box + one, counted + one, "continuous").max())
        self.rows[index] = {"iou": iou}
        return iou

    def compute(self) -> dict[str, float]:
        """Percent: ``corloc_iou30``, ``corloc_iou50``, ``corloc_iou70``, their mean ``corloc_mean``; and ``images``."""
        ious = self.column("iou")
        found = {f"corloc_iou{round(100 * level)}": corloc(ious, level) for level in IOU_LEVELS}
        return {**found, "corloc_mean": sum(found.values()) / len(found), "images": float(len(ious))}


class PsyNetProtocol(CorLocProtocol):
    """The evaluation of the released PsyNet code, colours and all, in the 224 x 224 frame of its maps.

    The heat map is coloured (jet), turned to gray, and cut at a fifth of the largest gray value; the contour of largest
    area gives the box, which is one pixel too large under the "+1" overlap. Jet's gray is not monotonic: what comes out
    is the mask 0.152 < M < 0.980, and its hole does not matter for an outer contour. Photos without a contour count as
    missed here; that code leaves them out.

    Args:
        multi: as in :class:`CorLocProtocol`.

    Example:
        >>> score_map = np.zeros((224, 224))
        >>> score_map[60:120, 50:150] = 0.6
        >>> protocol = PsyNetProtocol()
        >>> protocol.add(0, score_map=score_map, boxes_xyxy=[[50, 60, 150, 120]]).tolist()
        [50, 60, 150, 120]
        >>> protocol.compute()["corloc_iou70"]
        100.0
    """

    def __init__(self, *, multi: Multi = "first") -> None:
        super().__init__(multi=multi, iou_plus_one=True)

    def add(  # pyright: ignore[reportIncompatibleMethodOverride] (it finds the box itself)
        self, index: int, *, score_map: ArrayLike, boxes_xyxy: ArrayLike
    ) -> NDArray[np.int64] | None:
        """Take one photo; return the box found, ``(4,)`` int xyxy, or None.

        Args:
            index: its place in the data set.
            score_map: ``(h, w)`` in ``[0, 1]``, of :func:`heat_map`.
            boxes_xyxy: ``(g, 4)`` annotated, in the frame of the map and rounded, see :func:`psynet_boxes`.
        """
        gray = psynet_gray(score_map)
        flat = gray.max() <= int(0.2 * gray.max()) or np.ptp(np.asarray(score_map)) == 0
        box = None if flat else boxes_from_score_map(gray, 0.2, "largest", "tscam")[0]
        super().add(index, box_xyxy=box, boxes_xyxy=boxes_xyxy)
        return box


def psynet_boxes(
    boxes_xyxy: ArrayLike, size_wh: tuple[int, int], side: int = 224, *, as_xywh: bool = False
) -> NDArray[np.int64]:
    """Annotated boxes in the frame of the PsyNet evaluation: scaled and rounded.

    Args:
        boxes_xyxy: ``(g, 4)`` photo pixels.
        size_wh: width and height of the photo.
        side: of the frame.
        as_xywh: round corner and size instead of two corners, as that code does for CUB.

    Returns:
        ``(g, 4)`` int xyxy.

    Example:
        >>> psynet_boxes([[1, 2, 30, 40]], (100, 50)).tolist()
        [[2, 9, 67, 179]]
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    scale = side / np.tile(np.asarray(size_wh, dtype=np.float64), 2)
    if as_xywh:
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    rounded = np.rint(boxes * scale).astype(np.int64)
    if as_xywh:
        rounded[:, 2:] += rounded[:, :2]
    return rounded


def psynet_gray(score_map: ArrayLike) -> NDArray[np.uint8]:
    """A heat map in jet colours, turned to gray: matplotlib's and OpenCV's arithmetic, without either.

    Args:
        score_map: any shape, in ``[0, 1]``.

    Returns:
        The same shape.

    Example:
        >>> psynet_gray([0.0, 0.633, 1.0]).tolist()
        [14, 221, 38]
    """
    index = np.minimum((np.asarray(score_map, dtype=np.float64) * 256).astype(np.int64), 255)
    position = np.linspace(0, 1, 256)
    red = np.interp(position, [0, 0.35, 0.66, 0.89, 1], [0, 0, 1, 1, 0.5])
    green = np.interp(position, [0, 0.125, 0.375, 0.64, 0.91, 1], [0, 0, 1, 1, 0, 0])
    blue = np.interp(position, [0, 0.11, 0.34, 0.65, 1], [0.5, 1, 1, 0, 0])
    colours = (255 * np.stack([red, green, blue], axis=1)).astype(np.int64)  # truncated, as there
    gray = (colours @ np.array([9798, 19235, 3735]) + (1 << 14)) >> 15
    return gray.astype(np.uint8)[index]
