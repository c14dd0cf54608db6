r"""Best IoU of a score map's contours with the true boxes, at every threshold in one pass.

A threshold t of a uint8 map gives the binary map "value > t"; there are only 256 of them, and from one to the next
regions only grow and merge. Four observations make one sweep over the pixels enough for all thresholds:

1. Outer borders are the 8-connected regions of "value > t": a union-find that takes the pixels by falling value and
   keeps each region's bounding box.
2. Hole borders are the 4-connected regions of "value <= t" that do not touch the frame, their box grown by one
   pixel: the same union-find by rising value.
3. A region lives for an interval of thresholds: its IoU is computed once and max-ed into that interval.
4. The area of an outer border (a polygon through pixel centres) is additive on the *hole-filled* map: half a unit for
   each 2 x 2 block of pixels with three inside, one for each with four. Equal areas go to the region whose first
   pixel comes last in raster order.

The result is the same, bit for bit, as extracting contours threshold by threshold; the cost depends neither on the
number of thresholds nor on how noisy the map is.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_LEVELS = 256
_SPANS = 9  # interval lengths 2^0 ... 2^8

_jit = numba.njit(cache=True, nogil=True)


def best_iou_by_level(
    values: NDArray[np.uint8], boxes_xyxy: NDArray[np.int64], *, every: bool
) -> NDArray[np.float64]:
    """Best IoU at each level t, of the binary maps ``values > t``.

    Args:
        values: ``(h, w)`` uint8 score map.
        boxes_xyxy: ``(g, 4)`` true boxes, integer pixels, end inclusive.
        every: all contours, holes included (V2), or only the one of largest area (V1).

    Returns:
        ``(256,)``; where nothing is above t, the IoU of the box ``[0, 0, 0, 0]``.

    Example:
        >>> values = np.zeros((6, 6), np.uint8)
        >>> values[1:4, 1:4] = 200
        >>> best = best_iou_by_level(values, np.array([[1, 1, 4, 4]]), every=False)
        >>> best[[0, 199, 200]].tolist()
        [1.0, 1.0, 0.0]
    """
    values = np.ascontiguousarray(values)
    boxes_xyxy = np.ascontiguousarray(boxes_xyxy, dtype=np.int64)
    best = np.zeros((_SPANS, _LEVELS))
    if every:
        _outer_borders(values, boxes_xyxy, best)
        _hole_borders(values, boxes_xyxy, best)
        curve = _spread(best)
    else:
        curve = _largest_borders(_filled(values), boxes_xyxy)
    peak = int(values.max(initial=0))
    curve[peak:] = _iou(0, 0, 0, 0, boxes_xyxy)  # nothing is above the peak
    return curve


@_jit
def _iou(x0: int, y0: int, x1: int, y1: int, boxes: NDArray[np.int64]) -> float:
    """Best IoU of one box with the true ones, counting pixels inclusively."""
    best = 0.0
    area = (x1 - x0 + 1) * (y1 - y0 + 1)
    for g in range(boxes.shape[0]):
        w = max(min(x1, boxes[g, 2]) - max(x0, boxes[g, 0]) + 1, 0)
        h = max(min(y1, boxes[g, 3]) - max(y0, boxes[g, 1]) + 1, 0)
        true_area = (boxes[g, 2] - boxes[g, 0] + 1) * (boxes[g, 3] - boxes[g, 1] + 1)
        union = area + true_area - w * h
        if union > 0:
            best = max(best, w * h / union)
    return best


@_jit
def _order(values: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels by rising value (counting sort), and where each value starts."""
    flat = values.ravel()
    starts = np.zeros(_LEVELS + 1, np.int64)
    for i in range(flat.size):
        starts[flat[i] + 1] += 1
    for level in range(_LEVELS):
        starts[level + 1] += starts[level]
    fill = starts.copy()
    order = np.empty(flat.size, np.int64)
    for i in range(flat.size):
        order[fill[flat[i]]] = i
        fill[flat[i]] += 1
    return order, starts


@_jit
def _root(parent: NDArray[np.int64], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@_jit
def _raise(best: NDArray[np.float64], first: int, last: int, value: float) -> None:
    """``best[first..last] = max(., value)`` in constant time: two overlapping spans of a power of two."""
    span, length = 0, last - first + 1
    while 2 << span <= length:
        span += 1
    best[span, first] = max(best[span, first], value)
    second = last - (1 << span) + 1
    best[span, second] = max(best[span, second], value)


@_jit
def _spread(best: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hand every span's value down to its two halves, until single levels hold them all."""
    for span in range(_SPANS - 1, 0, -1):
        half = 1 << (span - 1)
        for level in range(_LEVELS - (1 << span) + 1):
            value = best[span, level]
            best[span - 1, level] = max(best[span - 1, level], value)
            best[span - 1, level + half] = max(best[span - 1, level + half], value)
    return best[0].copy()


@_jit
def _close_outer(
    box: NDArray[np.int64],
    first: int,
    last: int,
    h: int,
    w: int,
    boxes: NDArray[np.int64],
    best: NDArray[np.float64],
) -> None:
    # A contour's box ends one pixel late, except at the frame: the reference evaluator's rule.
    _raise(best, first, last, _iou(box[0], box[1], min(box[2] + 1, w - 1), min(box[3] + 1, h - 1), boxes))


@_jit
def _outer_borders(values: NDArray[np.uint8], boxes: NDArray[np.int64], best: NDArray[np.float64]) -> None:
    h, w = values.shape
    order, starts = _order(values)
    parent = np.full(h * w, -1, np.int64)
    box = np.empty((h * w, 4), np.int64)
    born = np.empty(
        h * w, np.int64
    )  # value at which the region took its present shape: it lives for t < born
    for level in range(_LEVELS - 1, 0, -1):
        for k in range(starts[level], starts[level + 1]):
            i = order[k]
            y, x = i // w, i % w
            parent[i], born[i] = i, level
            box[i, 0], box[i, 1], box[i, 2], box[i, 3] = x, y, x, y
            root = i
            for ny in range(max(y - 1, 0), min(y + 2, h)):
                for nx in range(max(x - 1, 0), min(x + 2, w)):
                    j = ny * w + nx
                    if parent[j] < 0 or j == i:
                        continue
                    other = _root(parent, j)
                    if other == root:
                        continue
                    if born[other] != level:
                        _close_outer(box[other], level, born[other] - 1, h, w, boxes, best)
                        born[other] = level
                    # `root` is of this level already: it holds pixel i.
                    parent[root] = other
                    box[other, 0] = min(box[other, 0], box[root, 0])
                    box[other, 1] = min(box[other, 1], box[root, 1])
                    box[other, 2] = max(box[other, 2], box[root, 2])
                    box[other, 3] = max(box[other, 3], box[root, 3])
                    root = other
    for i in range(h * w):
        if parent[i] == i:
            _close_outer(box[i], 0, born[i] - 1, h, w, boxes, best)


@_jit
def _close_hole(
    box: NDArray[np.int64],
    first: int,
    last: int,
    h: int,
    w: int,
    boxes: NDArray[np.int64],
    best: NDArray[np.float64],
) -> None:
    if box[0] > 0 and box[1] > 0 and box[2] < w - 1 and box[3] < h - 1:
        # The border runs through the pixels around the hole; then one pixel late, as above.
        _raise(
            best,
            first,
            last,
            _iou(box[0] - 1, box[1] - 1, min(box[2] + 2, w - 1), min(box[3] + 2, h - 1), boxes),
        )


@_jit
def _hole_borders(values: NDArray[np.uint8], boxes: NDArray[np.int64], best: NDArray[np.float64]) -> None:
    h, w = values.shape
    order, starts = _order(values)
    parent = np.full(h * w, -1, np.int64)
    box = np.empty((h * w, 4), np.int64)
    born = np.empty(h * w, np.int64)  # the region lives for t >= born
    for level in range(_LEVELS - 1):
        for k in range(starts[level], starts[level + 1]):
            i = order[k]
            y, x = i // w, i % w
            parent[i], born[i] = i, level
            box[i, 0], box[i, 1], box[i, 2], box[i, 3] = x, y, x, y
            root = i
            for step in range(4):
                ny, nx = y + (step == 3) - (step == 0), x + (step == 2) - (step == 1)
                if ny < 0 or nx < 0 or ny >= h or nx >= w or parent[ny * w + nx] < 0:
                    continue
                other = _root(parent, ny * w + nx)
                if other == root:
                    continue
                if born[other] != level:
                    _close_hole(box[other], born[other], level - 1, h, w, boxes, best)
                    born[other] = level
                parent[root] = other
                box[other, 0] = min(box[other, 0], box[root, 0])
                box[other, 1] = min(box[other, 1], box[root, 1])
                box[other, 2] = max(box[other, 2], box[root, 2])
                box[other, 3] = max(box[other, 3], box[root, 3])
                root = other
    for i in range(h * w):
        if parent[i] == i:
            _close_hole(box[i], born[i], _LEVELS - 1, h, w, boxes, best)


@_jit
def _filled(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The map whose region above any t is that of ``values`` with its holes filled.

    A pixel's new value is the lowest maximum over all 4-paths to it from outside the frame: a flood that always goes
    on at the lowest level, with one stack a level.
    """
    h, w = values.shape
    filled = np.zeros((h, w), np.uint8)
    seen = np.zeros(h * w, np.bool_)
    after = np.full(h * w, -1, np.int64)  # linked stacks
    top = np.full(_LEVELS, -1, np.int64)
    for i in range(h * w):
        y, x = i // w, i % w
        if y == 0 or x == 0 or y == h - 1 or x == w - 1:
            seen[i] = True
            after[i] = top[values[y, x]]
            top[values[y, x]] = i
            filled[y, x] = values[y, x]
    level = 0
    while level < _LEVELS:
        i = top[level]
        if i < 0:
            level += 1
            continue
        top[level] = after[i]
        y, x = i // w, i % w
        for step in range(4):
            ny, nx = y + (step == 3) - (step == 0), x + (step == 2) - (step == 1)
            if ny < 0 or nx < 0 or ny >= h or nx >= w or seen[ny * w + nx]:
                continue
            j = ny * w + nx
            seen[j] = True
            reached = max(level, np.int64(values[ny, nx]))
            filled[ny, nx] = reached
            after[j] = top[reached]
            top[reached] = j
    return filled


@_jit
def _offer(
    key: NDArray[np.int64],
    held: NDArray[np.int64],
    first: int,
    last: int,
    offered: int,
    box: NDArray[np.int64],
) -> None:
    """Like :func:`_raise`, by key, and with the box that goes with it."""
    span, length = 0, last - first + 1
    while 2 << span <= length:
        span += 1
    for start in (first, last - (1 << span) + 1):
        if offered > key[span, start]:
            key[span, start] = offered
            held[span, start] = box


@_jit
def _largest_borders(values: NDArray[np.uint8], boxes: NDArray[np.int64]) -> NDArray[np.float64]:
    h, w = values.shape
    order, starts = _order(values)
    parent = np.full(h * w, -1, np.int64)
    box = np.empty((h * w, 4), np.int64)
    born = np.empty(h * w, np.int64)
    area = np.zeros(h * w, np.int64)  # in half units
    first_pixel = np.empty(h * w, np.int64)
    key = np.full((_SPANS, _LEVELS), -1, np.int64)  # area, then first pixel
    held = np.zeros((_SPANS, _LEVELS, 4), np.int64)
    for level in range(_LEVELS - 1, 0, -1):
        for k in range(starts[level], starts[level + 1]):
            i = order[k]
            y, x = i // w, i % w
            parent[i], born[i], first_pixel[i] = i, level, i
            box[i, 0], box[i, 1], box[i, 2], box[i, 3] = x, y, x, y
            root = i
            for ny in range(max(y - 1, 0), min(y + 2, h)):
                for nx in range(max(x - 1, 0), min(x + 2, w)):
                    j = ny * w + nx
                    if parent[j] < 0 or j == i:
                        continue
                    other = _root(parent, j)
                    if other == root:
                        continue
                    if born[other] != level:
                        _offer(
                            key,
                            held,
                            level,
                            born[other] - 1,
                            area[other] * h * w + first_pixel[other],
                            box[other],
                        )
                        born[other] = level
                    parent[root] = other
                    box[other, 0] = min(box[other, 0], box[root, 0])
                    box[other, 1] = min(box[other, 1], box[root, 1])
                    box[other, 2] = max(box[other, 2], box[root, 2])
                    box[other, 3] = max(box[other, 3], box[root, 3])
                    area[other] += area[root]
                    first_pixel[other] = min(first_pixel[other], first_pixel[root])
                    root = other
            for by in range(max(y - 1, 0), min(y + 1, h - 1)):  # the 2 x 2 blocks that hold the new pixel
                for bx in range(max(x - 1, 0), min(x + 1, w - 1)):
                    inside = 0
                    for ny in range(by, by + 2):
                        for nx in range(bx, bx + 2):
                            inside += parent[ny * w + nx] >= 0
                    area[root] += inside >= 3
    for i in range(h * w):
        if parent[i] == i:
            _offer(key, held, 0, born[i] - 1, area[i] * h * w + first_pixel[i], box[i])
    for span in range(_SPANS - 1, 0, -1):
        half = 1 << (span - 1)
        for level in range(_LEVELS - (1 << span) + 1):
            for start in (level, level + half):
                if key[span, level] > key[span - 1, start]:
                    key[span - 1, start] = key[span, level]
                    held[span - 1, start] = held[span, level]
    curve = np.zeros(_LEVELS)
    for level in range(_LEVELS):
        if key[0, level] >= 0:
            x0, y0, x1, y1 = held[0, level]
            curve[level] = _iou(x0, y0, min(x1 + 1, w - 1), min(y1 + 1, h - 1), boxes)
    return curve
