"""Metrics: pure functions on arrays, which never see a model, and thin accumulators that processes can gather."""

from .classification import class_ranks, topk_accuracy
from .localization import best_iou_curve, corloc, max_box_acc, pxap, topk_loc

__all__ = ["best_iou_curve", "class_ranks", "corloc", "max_box_acc", "pxap", "topk_accuracy", "topk_loc"]
