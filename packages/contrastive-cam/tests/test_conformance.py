"""What every model of the project must do, for ContrastiveCAM on a ViT and on CNNs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from attnmap_core.testing import ModelConformance
from contrastive_cam import ContrastiveCAM
from contrastive_cam.frozen import FrozenMap, RegionTask
from contrastive_cam.task import ColocalizationTask
from contrastive_cam.transforms import PretextTransform
from torch import Tensor


class OfThisPackage(ModelConformance):
    __test__ = False

    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same transformations at each step of the tiny training
        return ColocalizationTask(PretextTransform(model.tasks))(model, {"images": images})["loss"]


class TestViT(OfThisPackage):
    __test__ = True

    def make_model(self) -> ContrastiveCAM:
        tiny = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
        return ContrastiveCAM("vit", "R+S", (32, 48), labels=["bird"], backbone_options=tiny)


class TestResNet(OfThisPackage):
    __test__ = True
    learning_rate: ClassVar[float] = 1e-2

    def make_model(self) -> ContrastiveCAM:
        # timm starts the last norm of each block at 0, which lets no gradient into the block
        tiny = {"channels": (8, 8, 16, 16), "stem_width": 8, "zero_init_last": False}
        return ContrastiveCAM("resnet10t", "rotation", (64, 64), gate="se", backbone_options=tiny)


class TestFrozenMap(ModelConformance):
    __test__ = True
    learning_rate: ClassVar[float] = 0.1  # one linear unit is all that learns

    def make_model(self) -> FrozenMap:
        tiny = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
        return FrozenMap("vit", 32, blocks=(0,), labels=["bird"], backbone_options=tiny)

    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        torch.manual_seed(5)
        return RegionTask()(model, {"images": images})["loss"]
