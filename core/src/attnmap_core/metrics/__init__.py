"""Metrics: pure functions on arrays, which never see a model, and thin accumulators that processes can gather."""

from .localization import best_iou_curve, corloc, max_box_acc, pxap, topk_loc

__all__ = ["best_iou_curve", "corloc", "max_box_acc", "pxap", "topk_loc"]
