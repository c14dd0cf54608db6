"""Accuracy away from the training distribution: common corruptions, and test sets of some of the classes.

Errors are fractions in ``[0, 1]``; the metrics are percent, as papers print them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .classification import topk_accuracy

SEVERITIES = 5

ALEXNET_ERRORS: Mapping[str, float] = MappingProxyType(
    {
        "gaussian_noise": 0.886428,
        "shot_noise": 0.894468,
        "impulse_noise": 0.922640,
        "defocus_blur": 0.819880,
        "glass_blur": 0.826268,
        "motion_blur": 0.785948,
        "zoom_blur": 0.798360,
        "snow": 0.866816,
        "frost": 0.826572,
        "fog": 0.819324,
        "brightness": 0.564592,
        "contrast": 0.853204,
        "elastic_transform": 0.646056,
        "pixelate": 0.717840,
        "jpeg_compression": 0.606500,
    }
)
"""Top-1 error of AlexNet under each corruption of ImageNet-C, mean over the severities (Hendrycks, Dietterich)."""

CORRUPTIONS = tuple(ALEXNET_ERRORS)
"""The 15 corruptions of ImageNet-C in the usual order; the four extra ones are no part of mCE."""


def corruption_errors(
    errors: Mapping[str, Sequence[float]] | ArrayLike,
    reference: Mapping[str, float] | ArrayLike | None = None,
) -> NDArray[np.float64]:
    r"""Errors under each corruption as a share of the reference network's.

    .. math:: CE_c = \frac{\sum_s E_{c,s}}{\sum_s E^{ref}_{c,s}}

    Args:
        errors: top-1 errors ``(15, 5)`` by corruption, in the order of :data:`CORRUPTIONS`, and severity; or five
            by the name of each corruption.
        reference: mean error of the reference by corruption, ``(15,)`` or by name; AlexNet's by default.

    Returns:
        ``(15,)`` fractions, which may exceed 1.

    Raises:
        ValueError: for corruptions that are missing or strange, other shapes, and errors outside ``[0, 1]``.

    Example:
        >>> round(float(corruption_errors(np.full((15, 5), 0.443214))[0]), 6)
        0.5
    """
    found = _by_corruption("errors", errors, (len(CORRUPTIONS), SEVERITIES))
    given = ALEXNET_ERRORS if reference is None else reference
    against = _by_corruption("reference", given, (len(CORRUPTIONS),))
    if (against == 0).any():
        raise ValueError(
            f"the reference error of {CORRUPTIONS[int(np.argmin(against))]} is 0, nothing to compare with"
        )
    return found.mean(axis=1) / against


def mce(
    errors: Mapping[str, Sequence[float]] | ArrayLike,
    reference: Mapping[str, float] | ArrayLike | None = None,
) -> float:
    """Mean corruption error in percent: the mean of :func:`corruption_errors`, 100 for AlexNet itself; less is better.

    It is not the plain mean of the errors, which some scripts print: that counts all corruptions alike, however hard
    they are.

    Args:
        errors: top-1 errors ``(15, 5)``, in ``[0, 1]``; or five by the name of each corruption.
        reference: mean error of the reference by corruption, ``(15,)`` or by name; AlexNet's by default.

    Raises:
        ValueError: as :func:`corruption_errors`.

    Example:
        >>> round(mce({name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}), 6)
        100.0

    References:
        Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
        ICLR 2019.
    """
    return float(100.0 * corruption_errors(errors, reference).mean())


def _by_corruption(
    name: str, values: Mapping[str, Sequence[float]] | Mapping[str, float] | ArrayLike, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    if isinstance(values, Mapping):
        wrong = sorted(set(values) ^ set(CORRUPTIONS))
        if wrong:
            kind = "strange" if wrong[0] in values else "missing"
            raise ValueError(f"{name}: corruption {wrong[0]!r} is {kind}, expected {', '.join(CORRUPTIONS)}")
        values = [values[corruption] for corruption in CORRUPTIONS]
    found = np.asarray(values, dtype=np.float64)
    if found.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {found.shape}")
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"{name} must be fractions in [0, 1], got {found.min()}..{found.max()}")
    return found


def subset_accuracy(logits: ArrayLike, labels: ArrayLike, indices: ArrayLike, k: int = 1) -> float:
    """Percent of images whose class is among the k highest-scoring ones *of a subset of the classes*.

    The accuracy of test sets that have some of the classes of the training set only, such as ImageNet-A: the scores of
    the others are not looked at.

    Args:
        logits: ``(n, c)`` scores of all classes.
        labels: ``(n,)`` places in ``indices``, not class indices of the model.
        indices: ``(m,)`` the classes of the subset, each once.
        k: classes looked at, ``1 <= k <= m``.

    Raises:
        ValueError: if an index is not a class or occurs twice, or as in :func:`~.classification.topk_accuracy`.

    Example:
        >>> subset_accuracy([[0.9, 0.1, 0.3], [0.9, 0.5, 0.3]], [1, 1], indices=[1, 2])
        50.0
    """
    scores, chosen = np.asarray(logits), np.asarray(indices)
    if scores.ndim != 2 or chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(
            f"expected logits (n, c) and whole indices (m,), got {scores.shape} and {chosen.shape}"
        )
    if len(np.unique(chosen)) < len(chosen) or ((chosen < 0) | (chosen >= scores.shape[1])).any():
        raise ValueError(f"indices must be classes 0..{scores.shape[1] - 1}, each once")
    return topk_accuracy(scores[:, chosen], labels, k)
