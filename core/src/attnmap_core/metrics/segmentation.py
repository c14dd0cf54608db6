r"""Segmentation metrics: how well attention covers objects, and mean IoU of predicted class maps.

A class map holds a class index for each pixel and 255 where a pixel counts for nothing. Values of one image are
fractions; what is reduced over images is percent, as papers print it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .localization import Protocol

Floats = NDArray[np.float64]
VOID = 255
BACKGROUND = 0

# --- Functions ------------------------------------------------------------------------------------------


def mass_mask(attention: ArrayLike, keep_mass: float = 0.6) -> NDArray[np.bool_]:
    """The smallest set of patches with the most attention that holds a share of it.

    Args:
        attention: ``(..., n)`` not negative, of any sum: rows of a class token without the prefix tokens.
        keep_mass: the share, in ``(0, 1]``.

    Returns:
        ``(..., n)``: those patches whose running sum, from the weakest on, exceeds ``1 - keep_mass`` of the row's. Of
        equal ones the later come first. A row without any attention keeps nothing.

    Raises:
        ValueError: for a share outside ``(0, 1]``, no patches, and attention that is negative or not finite.

    Example:
        >>> mass_mask([0.1, 0.4, 0.2, 0.3]).tolist()
        [False, True, False, True]

    References:
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, code.
    """
    rows = np.asarray(attention, dtype=np.float64)
    if not 0 < keep_mass <= 1:
        raise ValueError(f"keep_mass must be in (0, 1], got {keep_mass}")
    if rows.ndim < 1 or not rows.shape[-1]:
        raise ValueError(f"attention must be (..., patches), got {rows.shape}")
    if not (rows >= 0).all() or not np.isfinite(rows).all():
        raise ValueError("attention must be finite and not negative")
    total = rows.sum(axis=-1, keepdims=True)
    shares = np.divide(rows, total, out=np.zeros_like(rows), where=total > 0)
    order = np.argsort(shares, axis=-1, kind="stable")
    kept = np.cumsum(np.take_along_axis(shares, order, axis=-1), axis=-1) > 1 - keep_mass
    mask = np.zeros(rows.shape, dtype=np.bool_)
    # Without attention the running sum is 0 throughout, which is above nothing: such a row stays empty.
    np.put_along_axis(mask, order, kept, axis=-1)
    return mask


def jaccard_best_head(
    attention: ArrayLike,
    target: ArrayLike,
    keep_mass: float = 0.6,
    *,
    exclude_void: bool = False,
    grid: tuple[int, int] | None = None,
) -> float | Floats:
    r"""Overlap of attention with the objects of an image: of each class the head that fits it best, then their mean.

    .. math:: J = \frac{1}{|C|} \sum_{c \in C} \max_h \frac{|M_h \cap T_c|}{|M_h \cup T_c|}

    with the :func:`mass_mask` :math:`M_h` of each head enlarged to the image by nearest neighbour, and the classes
    :math:`C` of the image, background and void not among them. The head is chosen with the truth in hand, for each
    image and class anew: an upper bound of what one head does.

    Args:
        attention: ``(..., heads, n)`` attention of the class token to the patches, row by row of their grid.
        target: ``(..., h, w)`` class map: 0 background, 255 void.
        keep_mass: share of the attention that a mask keeps.
        exclude_void: leave void pixels out. By default they are background, as in the released evaluation and the
            numbers published with it.
        grid: ``(rows, columns)`` of patches; by default the one of square patches.

    Returns:
        ``(...)`` in ``[0, 1]``, a float for one image; NaN for an image without objects.

    Raises:
        ValueError: if shapes do not fit, no grid of square patches has ``n`` of them, the target does not hold whole
            numbers ``0..255``, or as in :func:`mass_mask`.

    Example:
        >>> target = np.zeros((4, 4), int)
        >>> target[:2, :2] = 7
        >>> jaccard_best_head([[0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1]], target)
        1.0

    References:
        Naseer et al., "Intriguing Properties of Vision Transformers", NeurIPS 2021.
    """
    rows, maps = np.asarray(attention, dtype=np.float64), _class_map("target", target)
    if rows.ndim < 2 or maps.ndim != rows.ndim or rows.shape[:-2] != maps.shape[:-2] or not rows.shape[-2]:
        raise ValueError(
            f"expected attention (..., heads, n) and target (..., h, w) of the same images, got {rows.shape} and "
            f"{maps.shape}"
        )
    height, width = maps.shape[-2:]
    cells = _square_patches(rows.shape[-1], height, width) if grid is None else grid
    if min(cells) < 1 or cells[0] * cells[1] != rows.shape[-1]:
        raise ValueError(f"grid {cells} has not {rows.shape[-1]} patches")
    masks = mass_mask(rows, keep_mass)
    flat = zip(masks.reshape(-1, *rows.shape[-2:]), maps.reshape(-1, height, width))
    values = np.array([_best_heads(mask, classes, cells, exclude_void) for mask, classes in flat])
    return values.reshape(rows.shape[:-2]) if rows.ndim > 2 else float(values[0])


def _best_heads(
    mask: NDArray[np.bool_], target: NDArray[np.int64], grid: tuple[int, int], exclude_void: bool
) -> float:
    """Of one image: ``(heads, n)``, ``(h, w)``."""
    # Every pixel of a patch is in a mask or none is: pixels of each class are counted by patch, nothing is enlarged.
    row, column = (np.arange(side) * cells // side for side, cells in zip(target.shape, grid))
    patch = row[:, None] * grid[1] + column[None, :]
    patches = grid[0] * grid[1]
    counts = np.bincount((patch * 256 + target).ravel(), minlength=patches * 256).reshape(patches, 256)
    objects = np.setdiff1d(np.flatnonzero(counts.sum(axis=0)), (BACKGROUND, VOID))
    if not len(objects):
        return math.nan
    pixels = counts.sum(axis=1) - (counts[:, VOID] if exclude_void else 0)
    covered = mask.astype(np.int64) @ np.column_stack([pixels, counts[:, objects]])  # (heads, 1 + classes)
    both = covered[:, 1:]
    either = covered[:, :1] + counts[:, objects].sum(axis=0) - both  # at least the object itself
    return float((both / either).max(axis=0).mean())


def _square_patches(count: int, height: int, width: int) -> tuple[int, int]:
    side = math.isqrt(height * width // count)
    if side and not height % side and not width % side and height * width == count * side * side:
        return height // side, width // side
    raise ValueError(
        f"no grid of square patches divides {height}x{width} pixels into {count} patches; give grid=(rows, columns)"
    )


def confusion_matrix(
    prediction: ArrayLike, target: ArrayLike, classes: int, ignore: int = VOID
) -> NDArray[np.int64]:
    """Pixels of each true class (row) that were given each class (column).

    Args:
        prediction: class indices ``0..classes-1``, any shape.
        target: the same shape; also ``ignore``.
        classes: how many there are.
        ignore: true class of pixels that are left out, whatever was predicted there.

    Returns:
        ``(classes, classes)`` counts.

    Raises:
        ValueError: if the shapes differ, or for a class outside ``0..classes-1`` where it counts.

    Example:
        >>> confusion_matrix([[0, 1], [1, 1]], [[0, 0], [1, 255]], classes=2).tolist()
        [[1, 1], [0, 1]]
    """
    found, true = _whole("prediction", prediction), _whole("target", target)
    if found.shape != true.shape:
        raise ValueError(f"prediction {found.shape} and target {true.shape} differ in shape")
    counts = true != ignore
    found, true = found[counts], true[counts]
    for name, values in (("prediction", found), ("target", true)):
        if values.size and (values.min() < 0 or values.max() >= classes):
            raise ValueError(
                f"{name} holds classes {values.min()}..{values.max()}, expected 0..{classes - 1}"
                + (f" or {ignore}" if name == "target" else "")
            )
    return np.bincount(true * classes + found, minlength=classes * classes).reshape(classes, classes)


def class_ious(confusion: ArrayLike) -> Floats:
    """IoU of each class from a :func:`confusion_matrix` of all images together.

    Returns:
        ``(classes,)`` in ``[0, 1]``; NaN for a class that is neither there nor predicted.
    """
    counts = _square("confusion", confusion)
    both = counts.diagonal()
    either = counts.sum(axis=0) + counts.sum(axis=1) - both
    return np.divide(both, either, out=np.full(len(counts), np.nan), where=either > 0)


def mean_iou(confusion: ArrayLike) -> float:
    """Mean IoU of the classes in percent: of the pixels of all images together, not a mean over images.

    Args:
        confusion: ``(classes, classes)`` of :func:`confusion_matrix`, true classes in rows, summed over images.

    Returns:
        The mean over classes that are there or were predicted.

    Raises:
        ValueError: if the matrix is not square, or counts nothing.

    Example:
        >>> mean_iou([[1, 1, 0], [0, 2, 0], [0, 0, 0]])
        58.33333333333333

    References:
        Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015.
    """
    ious = class_ious(confusion)
    if np.isnan(ious).all():
        raise ValueError("mean IoU of no pixels")
    return float(100.0 * np.nanmean(ious))


def _class_map(name: str, values: ArrayLike) -> NDArray[np.int64]:
    classes = _whole(name, values)
    if classes.size and (classes.min() < 0 or classes.max() > VOID):
        raise ValueError(f"{name} must hold class numbers 0..{VOID}, found {classes.min()}..{classes.max()}")
    return classes


def _whole(name: str, values: ArrayLike) -> NDArray[np.int64]:
    given = np.asarray(values)
    whole = given.astype(np.int64)
    if not (whole == given).all():
        raise ValueError(f"{name} must hold whole numbers")
    return whole


def _square(name: str, values: ArrayLike) -> NDArray[np.int64]:
    counts = _whole(name, values)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"{name} must be (classes, classes), got {counts.shape}")
    return counts


# --- Protocols ------------------------------------------------------------------------------------------


class JaccardProtocol(Protocol):
    """:func:`jaccard_best_head` of each image, and their mean.

    Args:
        keep_mass, exclude_void: see :func:`jaccard_best_head`.

    Example:
        >>> protocol = JaccardProtocol()
        >>> protocol.add(0, attention=[[0.7, 0.1, 0.1, 0.1]], target=[[7, 0], [0, 0]])
        >>> protocol.add(1, attention=[[0.7, 0.1, 0.1, 0.1]], target=[[0, 0], [0, 255]])
        >>> protocol.compute()
        {'images': 2.0, 'images_without_objects': 1.0, 'jaccard': 100.0}
    """

    def __init__(self, keep_mass: float = 0.6, *, exclude_void: bool = False) -> None:
        super().__init__()
        self.keep_mass, self.exclude_void = keep_mass, exclude_void

    def add(
        self, index: int, *, attention: ArrayLike, target: ArrayLike, grid: tuple[int, int] | None = None
    ) -> None:
        """Take one image.

        Args:
            index: its place in the data set.
            attention: ``(heads, n)`` of the class token to the patches.
            target: ``(h, w)`` class map in the frame of the network's input.
            grid: ``(rows, columns)`` of patches; by default the one of square patches.
        """
        rows = np.asarray(attention)
        if rows.ndim != 2:
            raise ValueError(f"attention of one image must be (heads, n), got {rows.shape}")
        value = float(
            jaccard_best_head(rows, target, self.keep_mass, exclude_void=self.exclude_void, grid=grid)
        )
        self.rows[index] = {} if math.isnan(value) else {"jaccard": value}

    def compute(self) -> dict[str, float]:
        """``jaccard``, the mean over images with objects in percent, and how many images have some or none."""
        values = self.column("jaccard")
        result = {
            "images": float(len(self.rows)),
            "images_without_objects": float(len(self.rows) - len(values)),
        }
        return result | ({"jaccard": float(100.0 * values.mean())} if len(values) else {})


class MeanIouProtocol(Protocol):
    """:func:`confusion_matrix` of each image, and :func:`mean_iou` of their sum.

    Args:
        classes: how many there are.
        ignore: true class of pixels that are left out.

    Example:
        >>> protocol = MeanIouProtocol(classes=2)
        >>> protocol.add(0, prediction=[[0, 1]], target=[[0, 255]])
        >>> protocol.add(1, prediction=[[0, 1]], target=[[1, 1]])
        >>> protocol.compute()
        {'images': 2.0, 'mean_iou': 50.0, 'pixel_accuracy': 66.66666666666667}
    """

    def __init__(self, classes: int = 150, *, ignore: int = VOID) -> None:
        super().__init__()
        self.classes, self.ignore = classes, ignore

    def add(self, index: int, *, prediction: ArrayLike, target: ArrayLike) -> None:
        """Take one image.

        Args:
            index: its place in the data set.
            prediction: ``(h, w)`` class indices at the size of the photo.
            target: ``(h, w)`` class map of the photo.
        """
        counts = confusion_matrix(prediction, target, self.classes, self.ignore).ravel()
        pairs = np.flatnonzero(counts)  # an image has few classes: some dozens of numbers in place of 22,500
        self.rows[index] = {"pairs": pairs.astype(np.int32), "pixels": counts[pairs]}

    def confusion(self) -> NDArray[np.int64]:
        """``(classes, classes)`` of all images, true classes in rows."""
        total = np.zeros(self.classes * self.classes, dtype=np.int64)
        for row in self.rows.values():
            total[row["pairs"]] += row["pixels"]
        return total.reshape(self.classes, self.classes)

    def compute(self) -> dict[str, float]:
        """``images``, and where a pixel counts ``mean_iou`` and ``pixel_accuracy`` in percent."""
        counts = self.confusion()
        result = {"images": float(len(self.rows))}
        if not counts.any():
            return result
        accuracy = float(100.0 * counts.trace() / counts.sum())
        return result | {"mean_iou": mean_iou(counts), "pixel_accuracy": accuracy}
