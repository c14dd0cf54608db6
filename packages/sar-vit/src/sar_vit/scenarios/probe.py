"""A linear layer on frozen features, the usual measure of training without labels (Table 9a)."""

from __future__ import annotations

from typing import Any, Self

import torch
from attnmap_core.data.sources import ImageData
from attnmap_core.errors import InputError
from attnmap_core.hub import read_config
from torch import Tensor, nn
from torch.nn import functional

from ..augmentation import photo_transform, preprocessing
from ..config import SarConfig
from ..model import SARViT
from . import Setup
from .supervised import KEPT, local_folder, measure, save


def make_setup(config: SarConfig, data: ImageData) -> Setup:
    """A probe on the model that ``config.start`` names."""
    if config.start is None:
        raise InputError(
            "start none: a probe needs a trained model; give its run or model folder, or a Hub id"
        )
    folder = local_folder(config.start)
    kept = {name: value for name, value in read_config(folder)["model"].items() if name in KEPT}
    torch.manual_seed(config.seed)
    classifier = SARViT(
        **kept,
        weights=str(folder),
        reset_head=True,
        num_classes=len(data.labels),
        img_size=config.image_size,
        head_blocks=config.probe_blocks,
        labels=data.labels,
        preprocessing=preprocessing(config).to_dict(),
    )
    return Setup(
        model=LinearProbe(classifier),
        task=classify,
        transform=photo_transform(config),
        measure=lambda candidate, split, accelerator: measure(config, candidate, split, accelerator),
        save=save,
        load=SARViT.from_pretrained,
    )


class LinearProbe(nn.Module):
    """A classifier of which only the head trains; the rest stays in evaluation mode.

    Args:
        classifier: with a head, whose weights are drawn anew (normal with deviation 0.01, biases 0).

    Raises:
        ValueError: if it has no head.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> probe = LinearProbe(SARViT("vit", 4, 32, head_blocks=2, backbone_options=tiny)).train()
        >>> [name for name, parameter in probe.named_parameters() if parameter.requires_grad]
        ['classifier.head.weight', 'classifier.head.bias']
        >>> probe(torch.randn(3, 3, 32, 32)).shape, probe.classifier.head.in_features
        (torch.Size([3, 4]), 24)
    """

    def __init__(self, classifier: SARViT) -> None:
        super().__init__()
        if not isinstance(classifier.head, nn.Linear):
            raise ValueError("a probe needs a model with a head: num_classes of 1 or more")
        self.classifier = classifier
        classifier.backbone.requires_grad_(False)
        nn.init.normal_(classifier.head.weight, std=0.01)
        nn.init.zeros_(classifier.head.bias)

    def train(self, mode: bool = True) -> Self:
        """Change the mode of all but the backbone."""
        super().train(mode)
        self.classifier.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(b, num_classes)`` of ``images (b, 3, H, W)``."""
        with torch.no_grad():
            features = self.classifier.features(images)
        return self.classifier.head(features)


def classify(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The task: cross-entropy and accuracy of a :class:`LinearProbe`, bare or wrapped, on a batch."""
    logits, labels = model(batch["images"]).float(), batch["labels"]
    cross_entropy = functional.cross_entropy(logits, labels)
    return {
        "loss": cross_entropy,
        "cross_entropy": cross_entropy.detach(),
        "accuracy": (logits.detach().argmax(dim=1) == labels).float().mean(),
    }
