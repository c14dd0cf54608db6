r"""Localization metrics of WSOL and co-localization, and the three protocols that papers report them under.

========== ======================================================= ===================================
protocol   score map                                               threshold
========== ======================================================= ===================================
standard   of the true class (reference WSOL evaluator)            best over all, or frozen
scm        of the five highest-scoring *predicted* classes         best over all, for each metric anew
tscam      of the true class                                       fixed
========== ======================================================= ===================================

A protocol takes one image at a time, keeps a few numbers of each, and can be gathered from several processes: rows
are put in the order of the image index before anything is reduced, so the result does not depend on who saw what.
Accuracies are percent, as papers print them; IoU counts pixels inclusively in the frame of the score map.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..boxes import box_iou, boxes_from_score_map, score_map_to_uint8, threshold_levels

if TYPE_CHECKING:
    from .level_tree import LevelTree

Floats = NDArray[np.float64]
IOU_THRESHOLDS = (0.3, 0.5, 0.7)

# --- Functions ------------------------------------------------------------------------------------------


def wsol_thresholds(step: float = 0.01) -> Floats:
    """Thresholds as the reference evaluators build them; another way to write them may shift one by a level."""
    return np.arange(0, 1, step)


def best_iou_curve(
    score_map: ArrayLike,
    gt_boxes_xyxy: ArrayLike,
    thresholds: ArrayLike,
    contours: Literal["largest", "all"] = "largest",
) -> Floats:
    """Best IoU of a map's boxes with the true ones, at each threshold.

    Args:
        score_map: ``(h, w)`` float in ``[0, 1]``, or uint8.
        gt_boxes_xyxy: ``(g, 4)`` true boxes, integer pixels of the map, g >= 1.
        thresholds: ``(t,)`` shares of the map's maximum.
        contours: ``"largest"`` contour only (MaxBoxAccV1) or ``"all"`` (V2).

    Returns:
        ``(t,)`` in ``[0, 1]``.

    Raises:
        ValueError: if there is no true box, or a box is not valid.

    Example:
        >>> score_map = np.zeros((6, 6))
        >>> score_map[1:4, 1:4] = 1
        >>> best_iou_curve(score_map, [[1, 1, 4, 4]], [0.0, 0.5]).tolist()
        [1.0, 1.0]

    References:
        Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020.
    """
    tree = _level_tree(score_map)
    return _curve(tree, gt_boxes_xyxy, thresholds, every=contours == "all")


def _level_tree(score_map: ArrayLike) -> LevelTree:
    from .level_tree import LevelTree  # numba: half a second that only an evaluation pays

    values = score_map_to_uint8(score_map)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a score map is (h, w), got {values.shape}")
    return LevelTree(values)


def _curve(tree: LevelTree, gt_boxes_xyxy: ArrayLike, thresholds: ArrayLike, *, every: bool) -> Floats:
    given = np.asarray(gt_boxes_xyxy).reshape(-1, 4)
    boxes = given.astype(np.int64)
    whole = bool((boxes == given).all())
    if not len(boxes) or not whole or (boxes < 0).any() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(
            f"expected true boxes xyxy in whole pixels, not negative, x0 <= x1 and y0 <= y1, got {given.tolist()}"
        )
    return tree.best_iou(boxes, every=every)[threshold_levels(thresholds, tree.peak)]


def max_box_acc(
    curves: ArrayLike, iou_thresholds: Sequence[float] = IOU_THRESHOLDS
) -> tuple[Floats, NDArray[np.int64]]:
    """Box accuracy at the best threshold, for each IoU level.

    Args:
        curves: ``(n, t)`` of :func:`best_iou_curve`.
        iou_thresholds: levels δ; correct means IoU >= δ.

    Returns:
        Percent ``(d,)`` and the index of the first best threshold ``(d,)``. The mean over 0.3, 0.5 and 0.7 with
        ``"all"`` contours is MaxBoxAccV2; the value at 0.5 with the ``"largest"`` is V1.

    Example:
        >>> accuracy, best = max_box_acc([[0.4, 0.6], [0.4, 0.2]], [0.3, 0.5])
        >>> accuracy.tolist(), best.tolist()
        ([100.0, 50.0], [0, 1])
    """
    values = np.asarray(curves)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"curves must be (images, thresholds) and not empty, got {values.shape}")
    # Python numbers take the precision of the curves: 0.7 in float32 is not below a threshold of 0.7.
    return _best_over_thresholds(np.stack([values >= float(delta) for delta in iou_thresholds], axis=1))


def _best_over_thresholds(correct: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.int64]]:
    """Of ``(n, d, t)`` answers."""
    counts = correct.sum(axis=0)
    best = counts.argmax(axis=1)
    return 100.0 * counts[np.arange(len(best)), best] / len(correct), best


def corloc(ious: ArrayLike, threshold: float = 0.5) -> float:
    """Percent of images whose box has an IoU of at least ``threshold``.

    Example:
        >>> corloc([0.5, 0.49, 0.9, 0.1])
        50.0
    """
    values = np.asarray(ious, dtype=np.float64)
    if not values.size:
        raise ValueError("corloc of no images")
    return float(100.0 * np.mean(values >= threshold))


def topk_loc(ious: ArrayLike, ranks: ArrayLike, k: int = 1, threshold: float = 0.5) -> float:
    """Percent of images that are located and whose class is among the first k.

    Args:
        ious: ``(n,)`` IoU of the true class's box.
        ranks: ``(n,)`` place of the true class among the predicted ones, 0 is first.
        k: 1 for Top-1 Loc, 5 for Top-5 Loc.
        threshold: correct means IoU >= threshold.

    Example:
        >>> topk_loc([0.6, 0.6, 0.2], [0, 3, 0], k=1)
        33.33333333333333
    """
    located, named = np.asarray(ious) >= threshold, np.asarray(ranks) < k
    if located.shape != named.shape or not located.size:
        raise ValueError(f"ious {located.shape} and ranks {named.shape} must be equal, (n,) and not empty")
    return float(100.0 * (located & named).mean())


def pxap(foreground: ArrayLike, background: ArrayLike) -> float:
    """Pixel average precision from histograms of scores, percent.

    Args:
        foreground, background: ``(bins,)`` counts of object and of other pixels by rising score; see
            :func:`pixel_histograms`.

    Raises:
        ValueError: if there is no foreground.

    Example:
        >>> round(pxap([0, 1, 3], [4, 1, 0]), 3)
        20.0

    References:
        Choe et al., CVPR 2020: :math:`\\sum_j P_j (R_j - R_{j-1})`, first point dropped, no interpolation.
    """
    true = np.cumsum(np.asarray(foreground, dtype=np.float64)[::-1])
    false = np.cumsum(np.asarray(background, dtype=np.float64)[::-1])
    if not true.size or true[-1] == 0:
        raise ValueError("PxAP needs foreground pixels; the masks have none")
    predicted = true + false
    precision = np.divide(true, predicted, out=np.zeros_like(true), where=predicted > 0)
    gained = np.diff(true / true[-1])
    return float(100.0 * (precision[1:] * gained)[predicted[1:] > 0].sum())


def pixel_histograms(
    score_map: ArrayLike, mask: ArrayLike, thresholds: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Scores of object pixels and of other pixels, counted between the thresholds.

    Args:
        score_map: ``(h, w)`` in ``[0, 1]``.
        mask: ``(h, w)`` of :func:`combine_masks`: 1 object, 0 other, 255 left out.
        thresholds: ``(t,)`` rising, from 0.

    Returns:
        Two ``(t + 2,)`` counts.
    """
    scores, kinds = np.asarray(score_map), np.asarray(mask)
    if scores.shape != kinds.shape:
        raise ValueError(f"score map {scores.shape} and mask {kinds.shape} differ in size")
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(f"score map in [{scores.min()}, {scores.max()}], expected [0, 1]")
    from .pixels import count_between

    edges = np.append(np.asarray(thresholds, dtype=np.float64), [1.0, 2.0, 3.0])
    background, foreground = count_between(scores, kinds, edges)
    return foreground, background


def combine_masks(
    masks: Iterable[ArrayLike], ignore: ArrayLike | None, size: tuple[int, int] = (224, 224)
) -> NDArray[np.uint8]:
    """One map of object (1), other (0) and ignored (255) pixels in the frame of the score maps.

    Args:
        masks: instance masks at photo size, bool or gray (foreground above 0.5); their union is the object.
        ignore: mask of pixels to leave out, or None; the object wins where both are set.
        size: ``(height, width)``; resized to by nearest neighbour.
    """
    object_ = np.zeros(size, dtype=bool)
    for mask in masks:
        object_ |= _nearest(mask, size)
    result = object_.astype(np.uint8)
    if ignore is not None:
        result[_nearest(ignore, size) & ~object_] = 255
    return result


def _nearest(mask: ArrayLike, size: tuple[int, int]) -> NDArray[np.bool_]:
    values = np.asarray(mask)
    # Written as OpenCV computes it: another order of operations picks other pixels here and there.
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (1.0 / (new / old))).astype(int), old - 1)
        for new, old in zip(size, values.shape)
    )
    return values[rows][:, columns] > 0.5


def mask_iou_curve(score_map: ArrayLike, mask: ArrayLike, thresholds: ArrayLike) -> Floats:
    """IoU of "map above threshold" with the object mask, at each threshold; ignored pixels count nowhere."""
    values, kinds = score_map_to_uint8(score_map), np.asarray(mask)
    inside = np.bincount(values[kinds == 1], minlength=256)
    outside = np.bincount(values[kinds == 0], minlength=256)
    above = [np.append(np.cumsum(counts[::-1])[::-1], 0)[1:] for counts in (inside, outside)]  # value > t
    levels = threshold_levels(thresholds, int(values.max(initial=0)))
    union = inside.sum() + above[1][levels]
    return np.divide(above[0][levels], union, out=np.zeros(len(levels)), where=union > 0)


# --- Floors: maps and boxes that see nothing ------------------------------------------------------------


def centre_prior(size: tuple[int, int] = (224, 224)) -> Floats:
    """The same round blob for every image, ``(h, w)`` in ``[0, 1]``: what a method has to beat."""
    y, x = (np.abs(np.linspace(-1, 1, side)) for side in size)
    blob = np.maximum(1 - np.sqrt(y[:, None] ** 2 + x[None, :] ** 2) / np.sqrt(2), 0)
    return (blob - blob.min()) / max(blob.max() - blob.min(), 1e-12)


def centred_box(share: float = 0.8, size: tuple[int, int] = (224, 224)) -> Floats:
    """A score map whose only box is centred and spans ``share`` of each side; 1.0 is the whole image."""
    inside = [np.abs(np.arange(side) + 0.5 - side / 2) <= share * side / 2 for side in size]
    return (inside[0][:, None] & inside[1][None, :]).astype(np.float64)


# --- Protocols ------------------------------------------------------------------------------------------


class Protocol:
    """Rows of one number or curve per image, gathered over processes and reduced once.

    ``state()`` of all processes goes into ``merge`` of each; rows of the same index count once.
    """

    def __init__(self, thresholds: ArrayLike | None = None) -> None:
        self.thresholds = (
            wsol_thresholds() if thresholds is None else np.asarray(thresholds, dtype=np.float64)
        )
        self.rows: dict[int, dict[str, Any]] = {}

    def compute(self) -> dict[str, float]:
        """The metrics of all rows, by name."""
        raise NotImplementedError

    def state(self) -> dict[int, dict[str, Any]]:
        """What another process needs of this one."""
        return self.rows

    def merge(self, states: Iterable[Mapping[int, dict[str, Any]]]) -> None:
        """Take the rows of all processes, in the order of the images."""
        together = {index: row for state in states for index, row in state.items()}
        self.rows = dict(sorted(together.items()))

    def column(self, name: str) -> NDArray[Any]:
        """Values of all images that have ``name``, by rising index."""
        return np.array([row[name] for _, row in sorted(self.rows.items()) if name in row])

    def indices(self, name: str) -> list[int]:
        """Indices of the images that have ``name``, rising."""
        return [index for index, row in sorted(self.rows.items()) if name in row]


class StandardProtocol(Protocol):
    """Metrics of the reference WSOL evaluator, from the true class's map.

    Args:
        thresholds: ``arange(0, 1, step)``; 100 by default.
        threshold: freeze one threshold (found on validation) for ``gt_known``, ``top1_loc``, ``top5_loc``; without
            it they take the best on the images given, all three the one that is best for ``gt_known``.

    Example:
        >>> protocol = StandardProtocol()
        >>> protocol.add(0, rank=0, score_map=centred_box(0.5), boxes_xyxy=[[56, 56, 168, 168]])
        >>> protocol.compute()["max_box_acc_v1"]
        100.0
    """

    def __init__(self, thresholds: ArrayLike | None = None, *, threshold: float | None = None) -> None:
        super().__init__(thresholds)
        self.threshold = threshold

    def add(
        self,
        index: int,
        *,
        rank: int | None,
        score_map: ArrayLike,
        boxes_xyxy: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> None:
        """Take one image.

        Args:
            index: its place in the data set.
            rank: place of the true class among the predicted ones, 0 is first; None where nothing is predicted.
            score_map: ``(h, w)`` of the true class, in ``[0, 1]``.
            boxes_xyxy: ``(g, 4)`` true boxes in the frame of the map; none or None leaves box metrics out.
            mask: ``(h, w)`` of :func:`combine_masks`; None leaves mask metrics out.
        """
        row: dict[str, Any] = {} if rank is None else {"rank": rank}
        if boxes_xyxy is not None and len(np.atleast_1d(np.asarray(boxes_xyxy))):
            tree = _level_tree(score_map)
            every = _curve(tree, boxes_xyxy, self.thresholds, every=True)
            largest = _curve(tree, boxes_xyxy, self.thresholds, every=False)
            levels = np.array(IOU_THRESHOLDS)[:, None]
            row["largest_right"], row["all_right"] = largest >= levels, every >= levels  # (iou, t)
            row["largest"] = largest.astype(
                np.float32
            )  # to show; what is right was decided in full precision
        if mask is not None:
            row["foreground"], row["background"] = pixel_histograms(score_map, mask, self.thresholds)
            row["mask_iou"] = mask_iou_curve(score_map, mask, self.thresholds).astype(np.float32)
        self.rows[index] = row

    def compute(self) -> dict[str, float]:
        """Percent by name, and the thresholds they were found at; what the data cannot say is left out.

        ``top1_cls top5_cls gt_known top1_loc top5_loc max_box_acc_v1 max_box_acc_v2 v2_iou30 v2_iou50 v2_iou70``
        (the three terms of V2), ``box_acc_iou30 ... iou70`` (largest contour), ``threshold``, ``pxap``, ``miou``.
        """
        result: dict[str, float] = {"images": float(len(self.rows))}
        ranks = self.column("rank")
        if len(ranks):
            result |= {
                "top1_cls": float(100.0 * (ranks < 1).mean()),
                "top5_cls": float(100.0 * (ranks < 5).mean()),
            }
        largest = self.column("largest_right")
        if len(largest):
            single, single_best = _best_over_thresholds(largest)
            several, _ = _best_over_thresholds(self.column("all_right"))
            at = int(single_best[1]) if self.threshold is None else self._nearest(self.threshold)
            located = largest[:, 1, at].astype(np.float64)
            result |= {
                "images_with_boxes": float(len(largest)),
                "gt_known": corloc(located),
                "max_box_acc_v1": float(single[1]),
                "max_box_acc_v2": float(several.mean()),
                **{f"v2_iou{round(100 * d)}": float(v) for d, v in zip(IOU_THRESHOLDS, several)},
                **{f"box_acc_iou{round(100 * d)}": float(v) for d, v in zip(IOU_THRESHOLDS, single)},
                "threshold": float(self.thresholds[at]),
            }
            if len(ranks):
                named = np.array([self.rows[index]["rank"] for index in self.indices("largest")])
                result |= {"top1_loc": topk_loc(located, named, 1), "top5_loc": topk_loc(located, named, 5)}
        foreground = self.column("foreground")
        if len(foreground) and foreground.sum():
            result["pxap"] = pxap(foreground.sum(axis=0), self.column("background").sum(axis=0))
            result["miou"] = float(100.0 * self.column("mask_iou").astype(np.float64).mean(axis=0).max())
        return result

    def ious(self) -> dict[int, float]:
        """IoU of each image with boxes, largest contour, at the threshold of ``gt_known``: for galleries."""
        if not len(self.column("largest")):
            return {}
        at = self._nearest(self.compute()["threshold"])
        return {index: float(self.rows[index]["largest"][at]) for index in self.indices("largest")}

    def box_accuracy_curves(self) -> dict[float, Floats]:
        """Share of correct boxes over the thresholds, in ``[0, 1]``, by IoU level, largest contour."""
        return dict(zip(IOU_THRESHOLDS, self.column("largest_right").mean(axis=0)))

    def _nearest(self, threshold: float) -> int:
        return int(np.abs(self.thresholds - threshold).argmin())


class ScmProtocol(Protocol):
    """Metrics as SCM's released code computes them: the map is that of a *predicted* class.

    ``det_k`` asks whether the map of any of the k highest-scoring classes is right, whatever the label; ``loc_k``
    asks the same of the true class among them. "GT-Known" is ``det`` at IoU 0.5, each number at its own best
    threshold.
    """

    def add(
        self, index: int, *, label: int, classes: ArrayLike, score_maps: ArrayLike, boxes_xyxy: ArrayLike
    ) -> None:
        """Take one image.

        Args:
            index: its place in the data set.
            label: true class.
            classes: ``(k,)`` highest-scoring classes, best first, k <= 5.
            score_maps: ``(k, h, w)`` in ``[0, 1]``, of those classes.
            boxes_xyxy: ``(g, 4)`` true boxes in the frame of the maps.
        """
        curves = [
            best_iou_curve(score_map, boxes_xyxy, self.thresholds) for score_map in np.asarray(score_maps)
        ]
        named = np.asarray(classes) == label
        right = np.stack(curves) >= np.array(IOU_THRESHOLDS)[:, None, None]  # (iou, k, t)
        self.rows[index] = {
            "det": np.stack([right[:, :1].any(axis=1), right.any(axis=1)], axis=1),  # (iou, top-1 or 5, t)
            "loc": np.stack([(right & named[:, None])[:, :k].any(axis=1) for k in (1, 5)], axis=1),
            "cls": np.array([named[:1].any(), named[:5].any()]),
        }

    def compute(self) -> dict[str, float]:
        """Percent by the released code's names, such as ``GT-Known_top-1``, and the thresholds found."""
        if not self.rows:
            raise ValueError("no images")
        result: dict[str, float] = {}
        counts = {name: self.column(name).sum(axis=0) for name in ("det", "loc", "cls")}
        n = len(self.rows)
        for j, k in enumerate((1, 5)):
            result[f"cls_acc_top-{k}"] = float(100.0 * counts["cls"][j] / n)
            result[f"GT-Known_top-{k}"] = float(100.0 * counts["det"][1, j].max() / n)
        for name, accuracy in (("det", "maxbox_acc"), ("loc", "loc_acc")):
            for i, delta in enumerate(IOU_THRESHOLDS):
                for j, k in enumerate((1, 5)):
                    case = f"thr_{100 * delta:.2f}_top-{k}"
                    result[f"{accuracy}_{case}"] = float(100.0 * counts[name][i, j].max() / n)
                    result[f"{name}_optThred_{case}"] = float(self.thresholds[counts[name][i, j].argmax()])
        return result


class TscamProtocol(Protocol):
    """Metrics as TS-CAM's released code computes them: one fixed threshold, boxes not clipped to the frame.

    GT-known asks for IoU >= 0.5, Top-1 and Top-5 Loc for IoU > 0.5.

    Args:
        threshold: 0.1 for CUB, 0.12 for ILSVRC in the released code.
    """

    def __init__(self, threshold: float = 0.1) -> None:
        super().__init__()
        self.threshold = threshold

    def add(self, index: int, *, rank: int, score_map: ArrayLike, boxes_xyxy: ArrayLike) -> None:
        """Take one image; arguments as in :meth:`StandardProtocol.add`."""
        box = boxes_from_score_map(score_map, self.threshold, convention="tscam")
        self.rows[index] = {"rank": rank, "iou": float(box_iou(box, boxes_xyxy).max())}

    def compute(self) -> dict[str, float]:
        """``top1_cls top5_cls gt_known top1_loc top5_loc`` in percent, and the ``threshold``."""
        if not self.rows:
            raise ValueError("no images")
        ranks, ious = self.column("rank"), self.column("iou")
        return {
            "top1_cls": float(100.0 * (ranks < 1).mean()),
            "top5_cls": float(100.0 * (ranks < 5).mean()),
            "gt_known": corloc(ious),
            "top1_loc": float(100.0 * ((ious > 0.5) & (ranks < 1)).mean()),
            "top5_loc": float(100.0 * ((ious > 0.5) & (ranks < 5)).mean()),
            "threshold": self.threshold,
        }
