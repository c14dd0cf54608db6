"""What every model of the project must do, for SARViT on a ViT, on one without class token, and on a CvT."""

from __future__ import annotations

from typing import Any

from attnmap_core.testing import ModelConformance
from sar_vit import SARViT
from sar_vit.task import SupervisedTask
from torch import Tensor

LABELS = ["wren", "heron", "owl"]


class OfThisPackage(ModelConformance):
    __test__ = False

    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        return SupervisedTask()(model, {"images": images, "labels": labels})["loss"]


class TestViT(OfThisPackage):
    __test__ = True

    def make_model(self) -> SARViT:
        tiny = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
        return SARViT("vit", 3, (32, 48), labels=LABELS, drop_path_rate=0.0, backbone_options=tiny)


class TestWithoutClassToken(OfThisPackage):
    __test__ = True

    def make_model(self) -> SARViT:
        tiny = {"embed_dims": (4, 4, 8, 12), "num_heads": (1, 1, 2, 3), "depths": (1, 1, 1, 1)}
        return SARViT(
            "pvt_v2_b0", 3, (64, 96), query="avg", labels=LABELS, drop_path_rate=0.0, backbone_options=tiny
        )


class TestOwnArchitecture(OfThisPackage):
    __test__ = True

    def make_model(self) -> SARViT:
        tiny = {"embed_dims": (4, 6, 8, 12), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 3)}
        return SARViT("pvt_small", 3, (64, 96), labels=LABELS, drop_path_rate=0.0, backbone_options=tiny)
