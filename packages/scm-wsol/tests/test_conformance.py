"""What every model of the project must do, for both models of this package."""

from __future__ import annotations

from typing import Any

from attnmap_core.testing import ModelConformance
from scm_wsol import SCM, TSCAM
from scm_wsol.task import ClassificationTask
from torch import Tensor

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
LABELS = ["wren", "heron", "owl"]


class OfThisPackage(ModelConformance):
    __test__ = False

    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        return ClassificationTask()(model, {"images": images, "labels": labels})["loss"]


class TestTSCAM(OfThisPackage):
    __test__ = True

    def make_model(self) -> TSCAM:
        return TSCAM("vit", 3, (32, 48), labels=LABELS, backbone_options=TINY)


class TestSCM(OfThisPackage):
    __test__ = True

    def make_model(self) -> SCM:
        options = {"iterations": "release"}
        return SCM("vit", 3, (32, 48), labels=LABELS, backbone_options=TINY, calibration_options=options)
