"""What a localization model says about one photo: the plain thing that metrics, pictures and exports take."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Class, score map and boxes of one photo.

    Attributes:
        source: the photo's path or id, as the user gave it.
        width, height: size of the photo in pixels, as displayed (after EXIF rotation).
        label: class index; ``label_name`` its name; ``probability`` its softmax value in ``[0, 1]``.
        top: the best classes as ``(index, name, probability)``, best first.
        boxes_xyxy: ``(k, 4)`` float pixels of the photo, end exclusive, best first; ``(0, 4)`` if none.
        box_scores: ``(k,)`` in ``[0, 1]``, the mean of the score map inside each box.
        score_map: ``(h, w)`` float32 in ``[0, 1]``, covering the whole photo (any aspect: stretch to overlay).
        threshold: share of the map's maximum above which pixels made the boxes.
        embedding: ``(d,)`` retrieval vector, or None.
    """

    source: str
    width: int
    height: int
    label: int
    label_name: str
    probability: float
    boxes_xyxy: NDArray[np.float64]
    box_scores: NDArray[np.float64]
    score_map: NDArray[np.float32]
    threshold: float
    top: list[tuple[int, str, float]] = field(default_factory=list)
    embedding: NDArray[np.float32] | None = None
