"""Published figures (CorLoc, percent), printed beside ours. Nothing here is measured by this package.

Ki et al., "Contrastive Attention Maps for Self-supervised Co-localization", ICCV 2021, supplementary document: tables 1
to 3. Baek et al., "PsyNet", AAAI 2020: the list of checkpoints beside its code.
"""

from __future__ import annotations

Corloc = dict[str, float]


def _row(at_30: float, at_50: float, at_70: float, mean: float) -> Corloc:
    return {"corloc_iou30": at_30, "corloc_iou50": at_50, "corloc_iou70": at_70, "corloc_mean": mean}


FULL = _row(97.30, 83.65, 38.64, 73.20)
"""The full method on CUB-200-2011, rotation, ratio 0.7: the row that tables 1 and 2 share."""

TABLE_1: dict[str, Corloc] = {"off": _row(97.04, 81.29, 35.12, 71.15), "on": FULL}
"""CUB, rotation, trained with PTAP; by whether PTAP is on in the test."""

TABLE_2: dict[str, Corloc] = {"channel": _row(96.63, 80.66, 35.27, 70.86), "pixel": FULL}
"""CUB, rotation; by the form of PTAP."""

TABLE_3: dict[str, dict[str, tuple[float, float]]] = {
    "R+S": {
        "cub": (79.98, 85.88),
        "cars": (91.19, 97.26),
        "aircraft": (91.11, 96.60),
        "dogs": (76.84, 82.82),
    },
    "S+T": {
        "cub": (35.98, 84.15),
        "cars": (42.86, 97.50),
        "aircraft": (68.22, 96.72),
        "dogs": (34.86, 83.62),
    },
}
"""CorLoc at IoU 0.5 of baseline and full method, by pretext tasks and data set."""

FIGURE_1_MEAN = {0.7: 73.20}
"""Mean CorLoc of the full method by ratio, where the bar chart's height is known: its maximum."""

PSYNET = {"cub": 83.78, "cars": 95.59, "aircraft": 96.61}
"""CorLoc at IoU 0.5 of PsyNet's checkpoints (VGG16-BN, odd + rotation), under its own protocol."""
