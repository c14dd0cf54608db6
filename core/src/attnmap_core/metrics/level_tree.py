r"""Contours of a score map at every threshold in one pass, and their best IoU with the true boxes.

A threshold t of a uint8 map gives the binary map "value > t"; there are only 256 of them, and from one to the next
regions only grow and merge. Four observations make one sweep over the pixels enough for all thresholds:

1. Outer borders are the 8-connected regions of "value > t": a union-find that takes the pixels by falling value and
   keeps each region's bounding box.
2. Hole borders are the 4-connected regions of "value <= t" that do not touch the frame, their box grown by one
   pixel: the same union-find by rising value.
3. A region keeps one box for an interval of thresholds: it is written down once with its interval, and its IoU is
   computed once and max-ed into that interval.
4. The area of an outer border (a polygon through pixel centres) is additive on the *hole-filled* map: half a unit for
   each 2 x 2 block of pixels with three inside, one for each with four. Equal areas go to the region whose first
   pixel comes last in raster order.

A fifth makes it fast: most pixels change no box. What a pixel does follows from which of its eight neighbours come
before it, one byte. With none before it, it is a *seed* and starts a region; with several that do not touch each
other, it may join regions; with neighbours on one side alone, it may widen a box. Any other pixel just belongs to the
seed where its neighbours lead. So the union-find runs over seeds and sees only *events*: a pixel and two seeds.

The result is the same, bit for bit, as extracting contours threshold by threshold; the cost does not depend on the
number of thresholds. The compiled functions release the GIL.
"""

# pyright: reportArgumentType=false, reportReturnType=false
# Compiled functions take NumPy's integers for Python's.

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Nodes = NDArray[np.int16]
_Scratch = tuple[NDArray[Any], ...]

_LEVELS = 256
_SPANS = 9  # interval lengths 2^0 ... 2^8
_OPEN = -1  # in place of a level: a region that touches the frame is no hole

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


class LevelTree:
    """All contours of a uint8 map, at all levels; what was computed once serves any number of true boxes.

    Args:
        values: ``(h, w)`` uint8 score map, sides below 32,767.

    Raises:
        ValueError: for another shape or type.

    Example:
        >>> values = np.zeros((6, 6), np.uint8)
        >>> values[1:4, 1:4] = 200
        >>> tree = LevelTree(values)
        >>> tree.largest[[0, 199]].tolist()
        [[1, 1, 3, 3], [1, 1, 3, 3]]
        >>> tree.best_iou(np.array([[1, 1, 4, 4]]), every=False)[[0, 199, 200]].tolist()
        [1.0, 1.0, 0.0]
    """

    def __init__(self, values: Bytes) -> None:
        if values.ndim != 2 or not values.size or values.dtype != np.uint8 or max(values.shape) >= 2**15 - 1:
            raise ValueError(f"expected a uint8 map (h, w), got {values.dtype} {values.shape}")
        self.shape = (values.shape[0], values.shape[1])
        self.peak = int(values.max())
        self._framed = _framed(values)

    @cached_property
    def _holes(self) -> tuple[Nodes, Bytes, Bytes]:
        """Boxes of all holes with their levels, the framed map with its holes filled, and which pixels merged two."""
        scratch = _scratch(self._framed.shape)
        n, filled = _filled(self._framed, scratch)
        return scratch[_NODES][:n].copy(), filled, scratch[_MERGED][: filled.size].copy()

    @cached_property
    def _regions(self) -> Nodes:
        """Boxes of all outer regions with their levels."""
        merged, scratch = self._holes[2], _scratch(self._framed.shape)
        scratch[_MERGED][: merged.size] = merged  # another map may have been here since
        n, _ = _sweep(self._framed, False, False, scratch)
        return scratch[_NODES][:n].copy()

    @cached_property
    def largest(self) -> NDArray[np.int64]:
        """Box of the contour of largest area at each level, ``(256, 4)`` inclusive xyxy; zeros where there is none."""
        return _largest_borders(self._holes[1], _scratch(self._framed.shape))

    def best_iou(self, boxes_xyxy: NDArray[np.integer[Any]], *, every: bool) -> NDArray[np.float64]:
        """Best IoU with the true boxes at each level t, of the binary map "value > t".

        Args:
            boxes_xyxy: ``(g, 4)`` true boxes, integer pixels, end inclusive.
            every: all contours, holes included (V2), or only the one of largest area (V1).

        Returns:
            ``(256,)``; where nothing is above t, the IoU of the box ``[0, 0, 0, 0]``.
        """
        boxes = np.ascontiguousarray(boxes_xyxy, dtype=np.int64)
        if not every:
            return _best_of_each(self.largest, *self.shape, boxes, self.peak)
        best = np.zeros((_SPANS, _LEVELS))
        holes, _, _ = self._holes
        _raise(best, self._regions, *self.shape, boxes, np.zeros(_LEVELS))
        # Of very many holes most are too small for the levels where they live.
        _raise(best, holes, *self.shape, boxes, np.minimum.accumulate(_spread(best)))
        return _best_of_all(best, *self.shape, boxes, self.peak)


def best_iou_by_level(
    values: NDArray[np.uint8], boxes_xyxy: NDArray[np.int64], *, every: bool
) -> NDArray[np.float64]:
    """:meth:`LevelTree.best_iou` of a map that is looked at once.

    Args:
        values: ``(h, w)`` uint8 score map.
        boxes_xyxy, every: as there.
    """
    return LevelTree(values).best_iou(boxes_xyxy, every=every)


def contour_boxes(binary: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Inclusive boxes ``(k, 4)`` of all contours of a binary map ``(h, w)``, in the order of OpenCV's RETR_TREE.

    The order is depth first; among siblings the one found last in raster order comes first.

    Example:
        >>> ring = np.ones((3, 3), bool)
        >>> ring[1, 1] = False
        >>> contour_boxes(ring).tolist()  # the outer border, then that of the hole
        [[0, 0, 2, 2], [0, 0, 2, 2]]
    """
    framed = _framed(binary.astype(np.uint8) * np.uint8(_LEVELS - 1))
    return _nested(framed, _scratch(framed.shape))


# --- What a pixel does, by which of its neighbours come before it -----------------------------------------

# Bit k of a byte is the k-th neighbour clockwise from the upper left one; odd ones share a side with the pixel.
_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
_DY, _DX = np.array(_RING).T.copy()
_SIDES = ({0, 1, 2}, {2, 3, 4}, {4, 5, 6}, {6, 7, 0})
_PREFERRED = (1, 2, 0, 7, 3, 5, 4, 6)  # neighbours that a raster scan has passed come first


def _parts(members: Iterable[int], touch: Callable[[int, int], bool]) -> list[set[int]]:
    """Ring positions in connected parts."""
    parts: list[set[int]] = []
    for k in members:
        touched = [part for part in parts if any(touch(k, j) for j in part)]
        parts = [part for part in parts if part not in touched] + [{k}.union(*touched)]
    return parts


def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """By (first axis) outer regions and holes, and the byte of neighbours that come before the pixel.

    - links ``(2, 256, 5)``: the number of connected parts that it touches, and a position of each; to a hole, the
      *other* neighbours come before;
    - widens ``(2, 256)``: whether the pixel may lie outside the box of its region;
    - halves ``(256,)``: 2 x 2 blocks that reach three or four pixels with it, half a unit of area each.
    """
    links, widens, halves = (
        np.zeros((2, 256, 5), np.uint8),
        np.zeros((2, 256), np.uint8),
        np.zeros(256, np.uint8),
    )
    for byte in range(256):
        before = [k for k in range(8) if byte >> k & 1]
        after = [k for k in range(8) if not byte >> k & 1]
        # Positions next to each other share a side, and odd ones two apart touch at a corner.
        outer = _parts(
            before, lambda j, k: (j - k) % 8 in (1, 7) or (j * k % 2 == 1 and (j - k) % 8 in (2, 6))
        )
        hole = _parts(after, lambda j, k: (j - k) % 8 in (1, 7))
        for kind, parts in enumerate((outer, [part for part in hole if any(k % 2 for k in part)])):
            chosen = sorted((min(part, key=_PREFERRED.index) for part in parts), key=_PREFERRED.index)
            links[kind, byte, : len(parts) + 1] = [len(parts), *chosen]
        widens[0, byte] = bool(before) and any(side.issuperset(before) for side in _SIDES)
        widens[1, byte] = sum(k % 2 for k in after) == 1
        halves[byte] = sum(sum((k + j) % 8 in before for j in range(3)) >= 2 for k in (1, 3, 5, 7))
    return links, widens, halves


_LINKS, _WIDENS, _HALVES = _tables()


# --- From pixels to events --------------------------------------------------------------------------------
# Maps are flat here, with a frame of one pixel around them. Pixels come by falling value, equal ones in raster order;
# for holes the other way round, so that one comparison serves both.


# Memory that one map leaves to the next in its thread, as fresh memory costs more than the work in it. A plain tuple:
# numba takes long to look at a named one.
_SEED = 0  # of each pixel: its seed, a pixel; 0 for the frame
_NUMBER = 1  # of each seed's pixel: the seed's number, 0 for the frame
_ORIGIN = 2  # of each seed: its pixel
_FOUND = 3
_EVENTS = 4  # rows of place (y << 16 | x), two seeds, half units of area
_STARTS = 5  # of each value: its first event
_PARENT = 6  # of each region, which is its first seed
_STATE = 7  # of each region, by column as below
_NODES = 8  # rows of box, first level, last level
_RANKS = 9  # of each node: area, then first place
_MERGED = 10  # of each pixel: whether it merged holes

_X0, _Y0, _X1, _Y1, _BORN, _PLACE, _AREA = range(
    7
)  # box, level at which the region took it, first place, half units

_per_thread = threading.local()


def _scratch(shape: tuple[int, ...]) -> _Scratch:
    kept: _Scratch | None = getattr(_per_thread, "scratch", None)
    size = shape[0] * shape[1]
    if kept is None or len(kept[_SEED]) < size:
        rows = 3 * size  # no pixel has more than three events
        kept = _per_thread.scratch = (
            *(np.empty(size, dtype) for dtype in (np.uint32, np.int32, np.int32)),
            np.empty(rows, np.int32),
            np.empty((rows, 5), np.int32),
            np.empty(_LEVELS + 1, np.int32),
            np.empty(size, np.uint32),
            np.empty((size, 7), np.int32),
            np.empty((rows + size, 6), np.int16),
            np.empty(rows + size, np.int64),
            np.empty(size, np.uint8),
        )
    return kept


def _framed(values: Bytes) -> Bytes:
    framed = np.zeros((values.shape[0] + 2, values.shape[1] + 2), np.uint8)
    framed[1:-1, 1:-1] = values
    return framed


@_jit
def _before(framed: Bytes) -> Bytes:
    """Which neighbours come before each pixel, as a byte; the frame comes after all."""
    h, w = framed.shape[0] - 2, framed.shape[1] - 2
    before = np.zeros_like(framed)
    for y in range(1, h + 1):
        up, here, down, found = framed[y - 1], framed[y], framed[y + 1], before[y]
        for x in range(1, w + 1):
            value = here[x]
            found[x] = (
                np.uint8(up[x - 1] >= value)
                | np.uint8(up[x] >= value) << np.uint8(1)
                | np.uint8(up[x + 1] >= value) << np.uint8(2)
                | np.uint8(here[x + 1] > value) << np.uint8(3)
                | np.uint8(down[x + 1] > value) << np.uint8(4)
                | np.uint8(down[x] > value) << np.uint8(5)
                | np.uint8(down[x - 1] > value) << np.uint8(6)
                | np.uint8(here[x - 1] >= value) << np.uint8(7)
            )
    before[1] &= np.uint8(0b11111000)  # nothing above the first row, and so on round the frame
    before[:, w] &= np.uint8(0b11100011)
    before[h] &= np.uint8(0b10001111)
    before[:, 1] &= np.uint8(0b00111110)
    return before


@_jit
def _find_seeds(
    before: Bytes, kind: int, seed: NDArray[np.uint32], number: NDArray[np.int32], origin: NDArray[np.int32]
) -> int:
    """Follow each pixel's first link to its seed; answers the number of seeds, the frame's 0 included."""
    h, stride = before.shape[0] - 2, before.shape[1]
    flat = before.ravel()
    step = np.zeros(256, np.int32)
    for byte in range(256):
        if _LINKS[kind, byte, 0]:
            k = _LINKS[kind, byte, 1]
            step[byte] = _DY[k] * stride + _DX[k]
    seed[: before.size] = 0
    number[0] = origin[0] = 0
    count = 1
    for y in range(1, h + 1):
        for pixel in range(y * stride + 1, y * stride + stride - 1):
            ahead = step[flat[pixel]]
            to = np.uint32(pixel + ahead)
            seed[pixel] = seed[to] if ahead < 0 else to
            origin[count], number[pixel] = pixel, count  # to stay where it is a seed
            count += ahead == 0
    for y in range(1, h + 1):
        for pixel in range(y * stride + 1, y * stride + stride - 1):
            end = seed[seed[pixel]]
            if seed[end] != end:  # a long way: once it is walked, it is short for the others on it
                while seed[end] != end:
                    end = seed[end]
                at = seed[pixel]
                while at != end:
                    following = seed[at]
                    seed[at] = end
                    at = following
            seed[pixel] = end
    return count


@_jit
def _find_events(
    framed: Bytes,
    before: Bytes,
    kind: int,
    areas: bool,
    seed: NDArray[np.uint32],
    number: NDArray[np.int32],
    found: NDArray[np.int32],
    events: NDArray[np.int32],
    starts: NDArray[np.int32],
    merged: Bytes,
) -> int:
    """Pixels that may change a region, by rising value; all pixels where areas are wanted.

    A pixel that touches three parts comes twice, and so on; its area comes once.
    """
    h, stride = framed.shape[0] - 2, framed.shape[1]
    values, flat = framed.ravel(), before.ravel()
    offset = (_DY * stride + _DX).astype(np.int32)
    links, other, acts = _LINKS[kind], np.zeros(256, np.int32), np.zeros(256, np.uint8)
    for byte in range(256):
        acts[byte] = 1 if areas else _WIDENS[kind, byte]
        if links[byte, 0] > 1:
            other[byte] = offset[links[byte, 2]]
        if links[byte, 0] > 2:
            acts[byte] |= 2
    n = 0
    for y in range(1, h + 1):
        for pixel in range(y * stride + 1, y * stride + stride - 1):
            byte = flat[pixel]
            act = acts[byte]
            found[n] = pixel << 2
            # No branch, as nobody could foretell it.
            n += (act & 1) | ((seed[pixel] != seed[np.uint32(pixel + other[byte])]) & (merged[pixel] ^ 1))
            if act & 2:
                for j in range(3, links[byte, 0] + 1):
                    found[n] = pixel << 2 | (j - 2)
                    n += seed[pixel] != seed[np.uint32(pixel + offset[links[byte, j]])]
    starts[:] = 0
    for i in range(n):
        starts[values[np.uint32(found[i] >> 2)] + 1] += 1
    for level in range(_LEVELS):
        starts[level + 1] += starts[level]
    ends = starts[:-1].copy()
    for i in range(n):  # counting sort
        pixel, j = np.uint32(found[i] >> 2), found[i] & 3
        byte, y = flat[pixel], pixel // np.uint32(stride)
        at = np.uint32(ends[values[pixel]])
        ends[values[pixel]] += 1
        events[at, 0] = y << 16 | (pixel - y * np.uint32(stride))
        events[at, 1] = number[seed[pixel]]
        events[at, 2] = number[seed[np.uint32(pixel + (offset[links[byte, j + 2]] if j else other[byte]))]]
        events[at, 3] = 0 if j else _HALVES[byte]
        events[at, 4] = links[byte, 0] == 2
    return n


# --- From events to boxes ---------------------------------------------------------------------------------


@_jit
def _root(parent: NDArray[np.uint32], region: int) -> int:
    while parent[region] != region:
        parent[region] = parent[parent[region]]
        region = parent[region]
    return region


@numba.njit(inline="always")
def _note(
    nodes: Nodes,
    ranks: NDArray[np.int64],
    n: int,
    state: NDArray[np.int32],
    region: int,
    level: int,
    kind: int,
):
    """Write down the box that a region had until it changes at this level."""
    born = state[region, _BORN]
    nodes[n, 0] = state[region, _X0] - 1 - kind  # without the frame; around the hole
    nodes[n, 1] = state[region, _Y0] - 1 - kind
    nodes[n, 2] = state[region, _X1] - 1 + kind
    nodes[n, 3] = state[region, _Y1] - 1 + kind
    nodes[n, 4] = born if kind else level
    nodes[n, 5] = level - 1 if kind else born - 1
    ranks[n] = np.int64(state[region, _AREA]) << 32 | state[region, _PLACE]


@_jit
def _sweep(framed: Bytes, holes: bool, areas: bool, scratch: _Scratch) -> tuple[int, int]:
    """Regions of all levels; answers how many nodes and seeds there are.

    With ``areas`` the nodes have ranks, and change where the rank changes as well.
    """
    seed, number, origin, found, events, starts, parent, state, nodes, ranks, merged = scratch
    before, kind = _before(framed), 1 if holes else 0
    count = _find_seeds(before, kind, seed, number, origin)
    if holes or areas:
        merged[: framed.size] = 0
    _find_events(framed, before, kind, areas, seed, number, found, events, starts, merged)
    for region in range(count):
        pixel = np.uint32(origin[region])
        y = pixel // np.uint32(framed.shape[1])
        x = pixel - y * np.uint32(framed.shape[1])
        parent[region] = region
        state[region, _X0], state[region, _Y0], state[region, _X1], state[region, _Y1] = x, y, x, y
        state[region, _BORN], state[region, _PLACE], state[region, _AREA] = framed[y, x], y << 16 | x, 0
    state[0, _BORN] = _OPEN
    n = 0
    for step in range(_LEVELS - 1):
        level = step if holes else _LEVELS - 1 - step
        for i in range(starts[level], starts[level + 1]):
            k = starts[level] + starts[level + 1] - 1 - i if holes else i
            region = _root(parent, np.uint32(events[k, 1]))
            other = _root(parent, np.uint32(events[k, 2]))
            opens = holes & ((state[region, _BORN] == _OPEN) | (state[other, _BORN] == _OPEN))
            place, halves = events[k, 0], events[k, 3]
            y, x = place >> 16, place & 0xFFFF
            if region == other:
                changes = (x < state[region, _X0]) | (x > state[region, _X1])
                changes |= (y < state[region, _Y0]) | (y > state[region, _Y1])
                changes |= areas & ((halves != 0) | (place < state[region, _PLACE]))
                if opens | (not changes):
                    continue
            if opens & (state[region, _BORN] == state[other, _BORN]):
                continue
            for changed in (region, other):
                born = state[changed, _BORN]
                if born != _OPEN and born != level:
                    _note(nodes, ranks, n, state, changed, level, kind)
                    n += 1
                    state[changed, _BORN] = level
                if (
                    opens and born != _OPEN
                ):  # not joined, so that it keeps the level at which it reached the frame
                    state[changed, _BORN], state[changed, _PLACE] = _OPEN, level
            if holes and other != region and events[k, 4]:
                merged[y * framed.shape[1] + x] = 1
            if opens:
                continue
            if other != region:
                parent[other] = region
                state[region, _X0] = min(state[region, _X0], state[other, _X0])
                state[region, _Y0] = min(state[region, _Y0], state[other, _Y0])
                state[region, _X1] = max(state[region, _X1], state[other, _X1])
                state[region, _Y1] = max(state[region, _Y1], state[other, _Y1])
                state[region, _PLACE] = min(state[region, _PLACE], state[other, _PLACE])
                state[region, _AREA] += state[other, _AREA]
            state[region, _X0] = min(state[region, _X0], x)
            state[region, _Y0] = min(state[region, _Y0], y)
            state[region, _X1] = max(state[region, _X1], x)
            state[region, _Y1] = max(state[region, _Y1], y)
            state[region, _PLACE] = min(state[region, _PLACE], place)
            state[region, _AREA] += halves
    last = _LEVELS - 1 if holes else 0
    for region in range(1, count):
        if parent[region] == region and state[region, _BORN] != _OPEN and state[region, _BORN] != last:
            _note(nodes, ranks, n, state, region, last, kind)
            n += 1
    return n, count


@_jit
def _filled(framed: Bytes, scratch: _Scratch) -> tuple[int, Bytes]:
    """Nodes of the holes, and the map whose region above any t is that of the given one with its holes filled."""
    n, count = _sweep(framed, True, False, scratch)
    rim = np.zeros(count, np.uint8)  # the value at which a seed's region reaches the frame
    for region in range(1, count):
        root = _root(scratch[_PARENT], region)
        rim[region] = scratch[_STATE][root, _PLACE] if scratch[_STATE][root, _BORN] == _OPEN else _LEVELS - 1
    filled = framed.copy()
    flat = filled.ravel()
    for pixel in range(flat.size):
        flat[pixel] = max(flat[pixel], rim[scratch[_NUMBER][scratch[_SEED][pixel]]])
    return n, filled


@_jit
def _largest_borders(filled: Bytes, scratch: _Scratch) -> NDArray[np.int64]:
    n, _ = _sweep(filled, False, True, scratch)
    nodes, ranks = scratch[_NODES], scratch[_RANKS]
    held = np.full((_SPANS, _LEVELS), -1)  # the node of highest rank
    for i in range(n):
        span, first, second = _cover(nodes[i, 4], nodes[i, 5])
        for start in range(first, second + 1, max(second - first, 1)):
            if held[span, start] < 0 or ranks[i] > ranks[held[span, start]]:
                held[span, start] = i
    for span in range(_SPANS - 1, 0, -1):
        half = 1 << (span - 1)
        for level in range(_LEVELS - 2 * half + 1):
            i = held[span, level]
            for start in range(level, level + 2 * half if i >= 0 else level, half):
                if held[span - 1, start] < 0 or ranks[i] > ranks[held[span - 1, start]]:
                    held[span - 1, start] = i
    boxes = np.zeros((_LEVELS, 4), np.int64)
    for level in range(_LEVELS):
        if held[0, level] >= 0:
            boxes[level] = nodes[held[0, level], :4]
    return boxes


@_jit
def _nested(framed: Bytes, scratch: _Scratch) -> NDArray[np.int64]:
    """Contours of a map of 0 and 255, numbered as a raster scan meets them: right of the contour around them."""
    size, stride = framed.size, framed.shape[1]
    region = np.zeros((2, size), np.int32)  # of each pixel: outer region and hole; 0 is the outside
    box = np.zeros((2, size, 4), np.int32)  # of each region
    for kind in (1, 0):
        _, seeds = _sweep(framed, kind == 1, False, scratch)
        parent, state, seed, number = scratch[_PARENT], scratch[_STATE], scratch[_SEED], scratch[_NUMBER]
        roots = np.zeros(seeds, np.int32)
        for i in range(seeds):
            root = _root(parent, i)
            roots[i] = 0 if state[root, _BORN] == _OPEN else root
            for side in range(4):
                box[kind, i, side] = state[i, side]
        for pixel in range(size):
            region[kind, pixel] = roots[number[seed[pixel]]]
    contour = np.zeros((2, size), np.int32)  # of each region; 0 is the outside
    boxes = np.zeros((size, 4), np.int64)
    child, following = (
        np.zeros(size, np.int32),
        np.zeros(size, np.int32),
    )  # of each contour; the last found comes first
    count = 1
    for y in range(1, framed.shape[0] - 1):
        for pixel in range(y * stride + 1, y * stride + stride - 1):
            kind = 0 if framed[y, pixel - y * stride] else 1
            found = region[kind, pixel]
            if found and not contour[kind, found]:
                contour[kind, found] = count
                x0, y0, x1, y1 = box[kind, found]
                boxes[count] = x0 - 1 - kind, y0 - 1 - kind, x1 - 1 + kind, y1 - 1 + kind
                around = contour[1 - kind, region[1 - kind, pixel - 1]]
                following[count] = child[around]
                child[around] = count
                count += 1
    ordered = np.empty((count - 1, 4), np.int64)
    stack, top, n = np.zeros(count + 1, np.int32), 1, 0
    stack[0] = child[0]
    while top:
        top -= 1
        at = stack[top]
        if at:
            ordered[n] = boxes[at]
            n += 1
            stack[top], stack[top + 1] = following[at], child[at]
            top += 2
    return ordered


# --- From boxes to IoU ------------------------------------------------------------------------------------


_SPAN = np.array([length.bit_length() - 1 for length in range(1, _LEVELS + 1)])


@_jit
def _cover(first: int, last: int) -> tuple[int, int, int]:
    """An interval as two overlapping spans of 2^k levels: k, and where both start."""
    span = _SPAN[last - first]
    return span, np.int64(first), last - (1 << span) + 1


@_jit
def _iou(x0: int, y0: int, x1: int, y1: int, h: int, w: int, boxes: NDArray[np.int64]) -> float:
    """Best IoU of one contour's box with the true ones, counting pixels inclusively."""
    # The box ends one pixel late, except at the frame: the reference evaluator's rule.
    x1, y1 = min(x1 + 1, w - 1), min(y1 + 1, h - 1)
    area = (x1 - x0 + 1) * (y1 - y0 + 1)
    best = 0.0
    for g in range(boxes.shape[0]):  # no branch, as nobody could foretell it
        width = max(min(x1, boxes[g, 2]) - max(x0, boxes[g, 0]) + 1, 0)
        height = max(min(y1, boxes[g, 3]) - max(y0, boxes[g, 1]) + 1, 0)
        true_area = (boxes[g, 2] - boxes[g, 0] + 1) * (boxes[g, 3] - boxes[g, 1] + 1)
        best = max(best, width * height / (area + true_area - width * height))
    return best


@_jit
def _raise(
    best: NDArray[np.float64],
    nodes: Nodes,
    h: int,
    w: int,
    boxes: NDArray[np.int64],
    reached: NDArray[np.float64],
) -> None:
    """Max every node's IoU into its levels, but for nodes too small for what all levels up to theirs have reached."""
    smallest = np.int64(1) << 62
    for g in range(boxes.shape[0]):
        smallest = min(smallest, (boxes[g, 2] - boxes[g, 0] + 1) * (boxes[g, 3] - boxes[g, 1] + 1))
    for i in range(nodes.shape[0]):
        x0, y0, x1, y1 = (
            np.int64(nodes[i, 0]),
            np.int64(nodes[i, 1]),
            np.int64(nodes[i, 2]),
            np.int64(nodes[i, 3]),
        )
        if (x1 - x0 + 2) * (y1 - y0 + 2) / smallest < reached[nodes[i, 5]]:
            continue
        iou = _iou(x0, y0, x1, y1, h, w, boxes)
        span, first, second = _cover(nodes[i, 4], nodes[i, 5])
        best[span, first] = max(best[span, first], iou)
        best[span, second] = max(best[span, second], iou)


@_jit
def _spread(best: NDArray[np.float64]) -> NDArray[np.float64]:
    for span in range(_SPANS - 1, 0, -1):  # hand every span's value down to its two halves
        half = 1 << (span - 1)
        for level in range(_LEVELS - 2 * half + 1):
            best[span - 1, level] = max(best[span - 1, level], best[span, level])
            best[span - 1, level + half] = max(best[span - 1, level + half], best[span, level])
    return best[0].copy()


@_jit
def _best_of_all(
    best: NDArray[np.float64], h: int, w: int, boxes: NDArray[np.int64], peak: int
) -> NDArray[np.float64]:
    curve = _spread(best)
    curve[peak:] = _iou(0, 0, -1, -1, h, w, boxes)  # nothing is above the peak: the evaluator's box of zeros
    return curve


@_jit
def _best_of_each(
    largest: NDArray[np.int64], h: int, w: int, boxes: NDArray[np.int64], peak: int
) -> NDArray[np.float64]:
    best = np.empty(_LEVELS)
    for level in range(_LEVELS):
        x0, y0, x1, y1 = largest[level]
        best[level] = _iou(x0, y0, x1, y1, h, w, boxes)
    best[peak:] = _iou(0, 0, -1, -1, h, w, boxes)
    return best
