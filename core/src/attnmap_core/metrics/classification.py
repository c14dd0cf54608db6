"""Classification accuracy, and the rank that it and Top-k localization are counted from."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .localization import Protocol


def class_ranks(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Place of the true class among the classes by falling score, 0 is first.

    Args:
        logits: ``(n, c)`` class scores, any scale.
        labels: ``(n,)`` true classes.

    Returns:
        ``(n,)`` in ``0..c-1``. Of equal scores, the lower class index comes first.

    Raises:
        ValueError: if the shapes disagree, a label is not a class, or a score is NaN.

    Example:
        >>> class_ranks([[0.1, 0.7, 0.2], [0.5, 0.5, -1.0]], [2, 1]).tolist()
        [1, 1]
    """
    scores, classes = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if scores.ndim != 2 or classes.shape != scores.shape[:1]:
        raise ValueError(f"expected logits (n, c) and labels (n,), got {scores.shape} and {classes.shape}")
    if ((classes < 0) | (classes >= scores.shape[1])).any():
        raise ValueError(f"labels must be in 0..{scores.shape[1] - 1}, got {classes.min()}..{classes.max()}")
    if np.isnan(scores).any():
        raise ValueError("logits hold NaN, which has no rank")
    true = np.take_along_axis(scores, classes[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < classes[:, None]
    return ((scores > true) | ((scores == true) & earlier)).sum(axis=1)


def topk_accuracy(logits: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Percent of images whose class is among the k highest-scoring ones.

    Args:
        logits: ``(n, c)`` class scores, any scale.
        labels: ``(n,)`` true classes.
        k: classes looked at, ``1 <= k <= c``.

    Raises:
        ValueError: if there are no images, k is not in ``1..c``, or as in :func:`class_ranks`.

    Example:
        >>> topk_accuracy([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1]], [2, 0], k=1)
        50.0
    """
    ranks = class_ranks(logits, labels)
    classes = np.asarray(logits).shape[1]
    if not len(ranks) or not 1 <= k <= classes:
        raise ValueError(f"expected images and k in 1..{classes}, got {len(ranks)} images and k = {k}")
    return float(100.0 * (ranks < k).mean())


class AccuracyProtocol(Protocol):
    """The place of the true class of each image, and accuracy from these.

    Args:
        indices: classes of the model that the data set has, in the order of its labels; the scores of the others
            are not looked at, see :func:`~.robustness.subset_accuracy`. By default the classes are the same.

    Example:
        >>> protocol = AccuracyProtocol()
        >>> protocol.add(0, logits=[0.1, 0.7, 0.2], label=2)
        >>> protocol.add(1, logits=[0.6, 0.3, 0.1], label=0)
        >>> protocol.compute()
        {'images': 2.0, 'top1_cls': 50.0, 'top5_cls': 100.0}
    """

    def __init__(self, indices: ArrayLike | None = None) -> None:
        super().__init__()
        self.indices_of_labels = None if indices is None else np.asarray(indices, dtype=np.int64)

    def add(self, index: int, *, logits: ArrayLike, label: int) -> None:
        """Take one image.

        Args:
            index: its place in the data set.
            logits: ``(c,)`` scores of all classes of the model.
            label: true class, as the data set counts them.
        """
        scores = np.asarray(logits)
        scores = scores if self.indices_of_labels is None else scores[self.indices_of_labels]
        self.rows[index] = {"rank": int(class_ranks(scores[None], [label])[0])}

    def compute(self) -> dict[str, float]:
        """``images``, and of some images ``top1_cls`` and ``top5_cls`` in percent."""
        ranks = self.column("rank")
        result = {"images": float(len(ranks))}
        if not len(ranks):
            return result
        return result | {f"top{k}_cls": float(100.0 * (ranks < k).mean()) for k in (1, 5)}
