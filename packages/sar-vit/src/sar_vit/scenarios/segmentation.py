"""Semantic segmentation on ADE20K (Table 12): Semantic FPN on PVT-Small, with and without SAR in pre-training.

It starts with ``start``, a classifier trained with this package, with ``weights``, a released checkpoint of the
backbone, or with nothing. The form of the last block stays as it was trained; the spatial entropy loss has no part in
it. As in the public code of PVT: AdamW with the learning rate falling by (1 - t/T)^0.9 at every step; recipes say so.

Different from there: biases and norms have no weight decay, and photos are shrunk by Pillow's antialiased filter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attnmap_core.cli import resolve_model
from attnmap_core.data.loaders import eval_loader, gather_objects, samples_of
from attnmap_core.data.sources import ImageData
from attnmap_core.errors import InputError
from attnmap_core.hub import read_config
from attnmap_core.metrics.segmentation import MeanIouProtocol
from attnmap_core.training import start_processes
from torch import Tensor, nn

from ..architectures.semantic_fpn import segmentation_loss
from ..config import SarConfig
from ..model import SARViT
from ..segmentation import SARSegmenter
from ..segmentation_data import SegmentationAugmentation, with_class_maps
from . import Setup

_KEPT = ("backbone", "backbone_options", "msa_skip", "mlp_norm", "mlp_skip", "img_size")
"""What a segmentation takes over from the classifier it starts with."""


def make_setup(config: SarConfig, data: ImageData) -> Setup:
    """Per-pixel cross-entropy on photos with class maps, or with masks; see :func:`with_class_maps`."""
    classes = with_class_maps(data).segmentation
    assert classes is not None
    model = build_model(config, list(classes.labels))
    state = start_processes()
    if config.sync_batchnorm and state.num_processes > 1 and str(state.device).startswith("cuda"):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return Setup(
        model=model,
        task=SegmentationTask(),
        transform=SegmentationAugmentation(
            config.image_size,
            scale_range=config.scale_range,
            class_share=config.class_share,
            photometric=config.photometric,
            mean=config.mean,
            std=config.std,
        ),
        measure=lambda candidate, split, accelerator: measure(
            candidate, split, accelerator, workers=config.workers
        ),
        save=save,
        load=SARSegmenter.from_pretrained,
        select_by="mean_iou",
        prepare=with_class_maps,
        with_segmentation=True,
    )


def build_model(config: SarConfig, labels: list[str]) -> SARSegmenter:
    """The model a config describes, with weights drawn from ``config.seed`` but for the backbone it starts with.

    Raises:
        InputError: if ``start`` is no classifier of this package, or weights do not fit.
    """
    torch.manual_seed(config.seed)
    options: dict[str, Any] = {
        "backbone": config.backbone,
        "backbone_options": dict(config.backbone_options),
        "img_size": config.image_size,
        "pretrained": config.pretrained,
        "weights": config.weights,
        "new_surgery": config.new_surgery,
        **config.switches(),
    }
    classifier = None
    if config.start is not None:
        folder = resolve_model(config.start)
        classifier = SARViT.from_pretrained(folder)
        options = {name: value for name, value in read_config(folder)["model"].items() if name in _KEPT}
    model = SARSegmenter(
        **options,
        num_classes=len(labels),
        drop_path_rate=config.drop_path_rate,
        neck_channels=config.neck_channels,
        head_channels=config.head_channels,
        head_dropout=config.head_dropout,
        short_side=config.image_size,
        mean=config.mean,
        std=config.std,
        labels=labels,
    )
    if classifier is not None:
        model.take_backbone(classifier)
    return model


class SegmentationTask:
    """Cross-entropy of each pixel; 255 counts for nothing.

    The mean is over all pixels, those that count for nothing included, as the public code has it: then each photo of a
    batch weighs the same however the batch is split.

    Example:
        >>> model = nn.Conv2d(3, 5, 4, stride=4)
        >>> batch = {"images": torch.randn(2, 3, 8, 8), "pixel_labels": torch.zeros(2, 8, 8, dtype=torch.long)}
        >>> list(SegmentationTask()(model, batch))
        ['loss']
    """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch.

        Args:
            model: gives scores ``(b, c, h, w)``, which are enlarged bilinearly.
            batch: ``images`` ``(b, 3, H, W)`` normalised and ``pixel_labels`` ``(b, H, W)``.

        Returns:
            ``loss``, a scalar with gradient.
        """
        return {"loss": segmentation_loss(model(batch["images"]), batch["pixel_labels"], mean_over="all")}


@torch.no_grad()
def measure(model: Any, data: ImageData, accelerator: Any = None, *, workers: int = 0) -> dict[str, float]:
    """Mean IoU of whole photos at one scale, one by one, over all processes.

    Args:
        model: a :class:`~sar_vit.segmentation.SARSegmenter` in evaluation mode, on its device.
        data: with class maps, or masks.
        accelerator: of several processes.
        workers: that load photos.

    Returns:
        ``images``, ``mean_iou`` and ``pixel_accuracy``, the last two in percent.

    Raises:
        InputError: if model and data differ in the number of classes.
    """
    data = with_class_maps(data)
    assert data.segmentation is not None
    if len(data.segmentation.labels) != model.num_classes:
        raise InputError(
            f"{data.name}: {len(data.segmentation.labels)} classes in its class maps, the model has "
            f"{model.num_classes}; give the data it was trained on"
        )
    protocol = MeanIouProtocol(model.num_classes)
    processes, process = (
        (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    )
    samples = samples_of(data, model.to_input, seed=0, with_targets=True)
    device = next(model.parameters()).device
    for batch in eval_loader(samples, 1, processes=processes, process=process, workers=workers):
        width, height = batch["size_wh"][0]
        prediction = model.class_map(batch["images"][0].to(device), (height, width))
        protocol.add(int(batch["index"][0]), prediction=prediction, target=batch["segmentation"][0])
    protocol.merge(gather_objects(accelerator, protocol.state()))
    return protocol.compute()


def save(model: Any, folder: Path) -> None:
    """The model folder; the card comes with the final one."""
    model.save_pretrained(folder)
