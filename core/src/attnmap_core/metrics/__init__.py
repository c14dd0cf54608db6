"""Metrics: pure functions on arrays, which never see a model, and thin accumulators that processes can gather."""

from .classification import class_ranks, topk_accuracy
from .localization import best_iou_curve, corloc, max_box_acc, pxap, topk_loc
from .retrieval import (
    approximate_nearest,
    kmeans,
    map_at_r,
    metrics_of_ranking,
    nearest,
    nmi,
    r_precision,
    recall_at_k,
    retrieval_metrics,
)
from .robustness import mce, subset_accuracy
from .segmentation import jaccard_best_head, mass_mask, mean_iou

__all__ = [
    "approximate_nearest",
    "best_iou_curve",
    "class_ranks",
    "corloc",
    "jaccard_best_head",
    "kmeans",
    "map_at_r",
    "mass_mask",
    "max_box_acc",
    "mce",
    "mean_iou",
    "metrics_of_ranking",
    "nearest",
    "nmi",
    "pxap",
    "r_precision",
    "recall_at_k",
    "retrieval_metrics",
    "subset_accuracy",
    "topk_accuracy",
    "topk_loc",
]
