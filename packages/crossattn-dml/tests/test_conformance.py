"""What every model of the project must do, for a ViT and a CNN with batch norm."""

from __future__ import annotations

from typing import Any

from attnmap_core.testing import ModelConformance
from crossattn_dml import EmbeddingModel
from crossattn_dml.losses import nt_xent
from torch import Tensor
from torch.nn import functional


class OfThisPackage(ModelConformance):
    __test__ = False

    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        z = functional.normalize(model(images).embeddings.float(), dim=1)
        return nt_xent(z @ z.T, labels // 2, temperature=0.5)  # the suite's labels all differ


class TestViT(OfThisPackage):
    __test__ = True

    def make_model(self) -> EmbeddingModel:
        tiny = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
        return EmbeddingModel("vit", 6, (32, 48), backbone_options=tiny)


class TestCNN(OfThisPackage):
    __test__ = True

    def make_model(self) -> EmbeddingModel:
        return EmbeddingModel(
            "resnet10t",
            6,
            64,
            pool="avg+max",
            batch_norm="trained",  # frozen ones are no part of training mode, which the suite asks of every module
            backbone_options={"zero_init_last": False},  # zeros would stop the gradients of the first step
        )
