"""The supervised task: cross-entropy and spatial entropy, whose weight may follow the epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .entropy import Schedule, SpatialEntropyLoss, entropy_weight

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SupervisedTask:
    r"""Cross-entropy plus λ times the spatial entropy of the last block's similarity maps.

    .. math:: L_{tot} = L_{main} + \lambda L_{se}

    Args:
        weight: λ, 0.01 in the paper. With 0 the entropy is reported and nothing else.
        schedule: ``"constant"`` or ``"warmup_cosine"``; see :func:`sar_vit.entropy.entropy_weight`.
        epochs: of the whole training, for the schedule.
        warmup_epochs: likewise.
        label_smoothing: of the cross-entropy; with mixed targets it belongs in these.
        mix: ``mix(images, labels)`` gives mixed images and soft targets; used in training mode.
        **loss_options: of :class:`~sar_vit.SpatialEntropyLoss`.

    Attributes:
        epoch: counted from 0; the training loop calls :meth:`begin_epoch`.

    Raises:
        ValueError: for a negative or unknown setting.

    Example:
        >>> from sar_vit import SARViT
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> model = SARViT("vit", num_classes=4, img_size=32, backbone_options=tiny)
        >>> batch = {"images": torch.randn(2, 3, 32, 32), "labels": torch.tensor([3, 0])}
        >>> parts = SupervisedTask()(model, batch)
        >>> sorted(parts)[:5]
        ['accuracy', 'components', 'cross_entropy', 'entropy_weight', 'excluded']
        >>> sorted(parts)[5:]
        ['foreground', 'loss', 'spatial_entropy']
    """

    def __init__(
        self,
        weight: float = 0.01,
        schedule: Schedule = "constant",
        *,
        epochs: int = 1,
        warmup_epochs: int = 10,
        label_smoothing: float = 0.0,
        mix: Mix | None = None,
        **loss_options: Any,
    ) -> None:
        if not weight >= 0:
            raise ValueError(f"weight must be 0 or more, got {weight}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.weight, self.epochs, self.warmup_epochs = weight, epochs, warmup_epochs
        self.schedule: Schedule = schedule
        self.label_smoothing, self.mix = label_smoothing, mix
        self.entropy = SpatialEntropyLoss(**loss_options)
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Take the weight of this epoch, counted from 0."""
        self.epoch = epoch
        self.current_weight = entropy_weight(
            epoch, self.epochs, self.weight, self.schedule, warmup_epochs=self.warmup_epochs
        )

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch.

        Args:
            model: a :class:`~sar_vit.SARViT`, or any model that :func:`~sar_vit.apply_sar` changed and that gives
                logits; in training mode, bare or wrapped for distributed training or compilation.
            batch: ``images`` ``(b, 3, H, W)`` normalised; ``labels`` ``(b,)`` class ids, or ``(b, c)`` soft targets,
                as mixing images gives.

        Returns:
            Scalars: ``loss`` with gradient; without gradient its parts ``cross_entropy`` and ``spatial_entropy`` with
            ``entropy_weight``, ``accuracy``, and of the maps ``components`` (mean number), ``foreground`` (share of
            pixels) and ``excluded`` (number of maps that are not finite).
        """
        images, labels = batch["images"], batch["labels"]
        if self.mix is not None and model.training:
            images, labels = self.mix(images, labels)
        logits = model(images)  # through the wrapper, so that its hooks gather gradients
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        soft = labels.ndim == 2
        cross_entropy = functional.cross_entropy(
            logits, labels.to(logits.dtype) if soft else labels, label_smoothing=self.label_smoothing
        )
        found = self.entropy.measure(model)  # in any case: it frees what was collected
        weight = self.current_weight
        classes = labels.argmax(dim=1) if soft else labels
        return {
            "loss": cross_entropy + weight * found.loss if weight else cross_entropy,
            "cross_entropy": cross_entropy.detach(),
            "spatial_entropy": found.loss.detach(),
            "entropy_weight": torch.full_like(cross_entropy.detach(), weight),
            "accuracy": (logits.detach().argmax(dim=1) == classes).float().mean(),
            "components": found.components,
            "foreground": found.foreground,
            "excluded": found.excluded.float(),
        }
