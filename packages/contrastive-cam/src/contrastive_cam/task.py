"""The training task: pretext cross-entropy on the transformed photos, and the contrastive attention map loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .loss import check_choices, contrastive_terms, foreground_background_loss
from .model import Views
from .pooling import active_fraction
from .transforms import PretextTransform

Kind = Literal["maps", "fgbg"]

_logger = logging.getLogger(__name__)


class ColocalizationTask:
    r"""Transform, tell the transformation, and keep the attention map with the object.

    .. math:: L = \alpha \sum_m \mathrm{CE}_m(\mathrm{logits}(\tilde x), y^m) + \lambda L_{con}

    Each photo passes as it is and transformed, both in one batch, so that batch norm sees them together. With
    ``weight=0`` only the transformed one passes: that is PsyNet.

    Args:
        transform: draws and applies the pretext tasks; of the same tasks as the model's heads.
        weight: λ.
        pretext_weight: α; with 0 the contrastive term trains alone.
        warmup_epochs: epochs over which λ grows linearly to its value, from ``1 / (warmup_epochs + 1)`` of it.
        kind: ``"maps"`` :func:`~contrastive_cam.contrastive_map_loss`; ``"fgbg"``
            :func:`~contrastive_cam.loss.foreground_background_loss`.
        ratio: of the model, for the report on active channels.
        threshold: share of a map's maximum for the report on its area.
        freeze_norms: batch norm keeps the statistics of its pretraining.
        **loss_options: of :func:`~contrastive_cam.contrastive_map_loss`, for ``"maps"``; ``tau`` and ``gather`` also
            for ``"fgbg"``.

    Attributes:
        epoch: counted from 0; the training loop calls :meth:`begin_epoch`.
        current_weight: λ of this epoch.

    Raises:
        ValueError: for a negative weight or an unknown value.

    Example:
        >>> from contrastive_cam import ContrastiveCAM
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> model = ContrastiveCAM("vit", "rotation", img_size=32, backbone_options=tiny)
        >>> parts = ColocalizationTask()(model, {"images": torch.randn(4, 3, 32, 32)})
        >>> sorted(parts)[:5]
        ['active_fraction', 'active_p95', 'contrastive', 'loss', 'loss_rotation']
        >>> sorted(parts)[5:]
        ['mask_area', 'negative', 'outer_ring', 'positive', 'ptap_acts', 'rotation_accuracy', 'weight']
    """

    def __init__(
        self,
        transform: PretextTransform | None = None,
        weight: float = 1.0,
        pretext_weight: float = 1.0,
        *,
        warmup_epochs: int = 0,
        kind: Kind = "maps",
        ratio: float = 0.7,
        threshold: float = 0.2,
        freeze_norms: bool = False,
        **loss_options: Any,
    ) -> None:
        if kind not in ("maps", "fgbg"):
            raise ValueError(f"kind must be maps or fgbg, got {kind!r}")
        if not weight >= 0 or not pretext_weight >= 0 or warmup_epochs < 0:
            raise ValueError(
                f"weights and warmup_epochs must be 0 or more, got {weight}, {pretext_weight}, {warmup_epochs}"
            )
        if not weight and not pretext_weight:
            raise ValueError("weight and pretext_weight are both 0: nothing would train")
        options = {name: value for name, value in loss_options.items() if name != "gather"}
        foreign = set(loss_options) - {"tau", "gather"}
        if kind == "fgbg" and foreign:
            raise ValueError(f"{', '.join(sorted(foreign))}: of kind='maps' only")
        check_choices(options.pop("tau", 0.1), **options)
        self.transform = transform or PretextTransform()
        self.weight, self.pretext_weight, self.warmup_epochs = weight, pretext_weight, warmup_epochs
        self.kind: Kind = kind
        self.ratio, self.threshold, self.freeze_norms = ratio, threshold, freeze_norms
        self.loss_options = loss_options
        self.told = False
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Take λ of this epoch, counted from 0."""
        self.epoch = epoch
        self.current_weight = self.weight * min(1.0, (epoch + 1) / (self.warmup_epochs + 1))

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch.

        Args:
            model: a :class:`~contrastive_cam.ContrastiveCAM`, in training mode, bare or wrapped for distributed
                training or compilation.
            batch: ``images`` ``(b, 3, H, W)``, normalised; anything else in it, labels too, is left alone.

        Returns:
            Scalars: ``loss`` with gradient. Without gradient ``loss_<task>`` and ``<task>_accuracy`` of each pretext
            task; with a contrastive term ``contrastive``, λ as ``weight`` and, for maps, ``positive`` and ``negative``
            (mean similarity of pairs and of others); of the maps ``mask_area`` (share of cells at or above the
            threshold), ``outer_ring`` (share of mass within a tenth of a side from the edge); of the features
            ``active_fraction``, ``active_p95`` and ``ptap_acts``, see :func:`~contrastive_cam.pooling.active_fraction`.
        """
        images = batch["images"]
        if self.freeze_norms:  # the loop puts the whole model in training mode before each epoch
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
                    module.eval()
        moved = self.transform(images)
        with_maps = self.weight > 0
        views: Views = model(torch.cat([images, moved.images]) if with_maps else moved.images)
        count = len(images)
        parts: dict[str, Tensor] = {}
        pretext = images.new_zeros((), dtype=torch.float32)
        for task, labels in moved.labels.items():
            logits = views.logits[task][-count:]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            entropy = functional.cross_entropy(logits, labels)
            pretext = pretext + entropy
            parts[f"loss_{task}"] = entropy.detach()
            parts[f"{task}_accuracy"] = (logits.detach().argmax(dim=1) == labels).float().mean()
        # Also with weight 0, so that every parameter has a gradient, if of zeros.
        loss = self.pretext_weight * pretext
        if with_maps:
            contrastive, more = self._contrastive(views, moved.theta, count)
            loss = loss + self.current_weight * contrastive
            parts |= {"contrastive": contrastive.detach(), **more}
            parts["weight"] = torch.full_like(contrastive.detach(), self.current_weight)
        parts |= self._watched(views)
        self._warn_once(parts["ptap_acts"])
        return {"loss": loss, **parts}

    def _contrastive(self, views: Views, theta: Tensor, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        A, A_t = views.attention.split(count)
        if self.kind == "fgbg":
            F, F_t = views.weighted.split(count)
            return foreground_background_loss(F, F_t, A, A_t, **self.loss_options), {}
        terms = contrastive_terms(A, A_t, theta, **self.loss_options)
        return terms.loss, {"positive": terms.positive, "negative": terms.negative}

    @torch.no_grad()
    def _watched(self, views: Views) -> dict[str, Tensor]:
        active = active_fraction(views.weighted, self.ratio)
        A = views.attention.detach()
        low, high = torch.aminmax(A.flatten(1), dim=1, keepdim=True)
        area = ((A.flatten(1) - low >= self.threshold * (high - low)) & (high > low)).float().mean()
        mass = (A.flatten(1) - low).reshape(A.shape)
        inner = mass * _inside(A.shape[1], A).unsqueeze(1) * _inside(A.shape[2], A)
        total = mass.sum((1, 2))
        ring = 1 - inner.sum((1, 2)) / torch.where(total > 0, total, 1)
        return {
            "mask_area": area,
            "outer_ring": torch.where(total > 0, ring, 0).mean(),
            "active_fraction": active.mean,
            "active_p95": active.p95,
            "ptap_acts": active.acts,
        }

    def _warn_once(self, acts: Tensor) -> None:
        if self.told or torch.compiler.is_compiling():
            return
        self.told = True  # looked at in the first batch alone: it waits for the device
        if self.ratio < 1 and acts.item() == 0:
            _logger.warning(
                "at no pixel of the first batch are more than %g of the channels active: PTAP equals the plain mean "
                "there; lower the ratio or use feature=pre_relu",
                self.ratio,
            )


def _inside(cells: int, like: Tensor) -> Tensor:
    """Share of each cell that lies at least a tenth of the side away from both edges."""
    edges = torch.arange(cells + 1, dtype=like.dtype, device=like.device) / cells
    return (edges[1:].clamp_max(0.9) - edges[:-1].clamp_min(0.1)).clamp_min(0) * cells
