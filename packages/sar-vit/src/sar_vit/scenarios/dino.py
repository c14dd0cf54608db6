"""DINO with SAR (section 4.5, appendix D.5): a student matches its own average over many crops of a photo.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as distributed
from attnmap_core.data.sources import ImageData
from attnmap_core.errors import InputError
from torch import Tensor, nn
from torch.nn import functional

from ..architectures import ARCHITECTURES
from ..config import SarConfig
from ..model import SARViT
from ..surgery import take_maps
from ..views import dino_views
from . import Setup
from .pretraining import PretrainingTask, follow, make_encoder, make_schedule, measure, momentum_at, processes


def make_setup(config: SarConfig, data: ImageData) -> Setup:
    """DINO on these images, whose labels only the k-NN accuracy looks at."""
    # Position embeddings of timm's networks are interpolated for small crops; those written here always are.
    options = {} if config.backbone in ARCHITECTURES else {"dynamic_img_size": True}
    student = make_encoder(config, data, **options)
    try:
        student.collector.key_grid((config.local_size, config.local_size))
        if config.local_size % student.backbone.stride[0]:
            raise ValueError(f"patches have {student.backbone.stride[0]} pixels")
    except ValueError as error:
        raise InputError(
            f"local_size {config.local_size}: not a size for {config.backbone} ({error})"
        ) from None
    model = DINO(
        student,
        hidden_dim=config.hidden_dim,
        bottleneck_dim=config.projection_dim,
        prototypes=config.prototypes,
        temperature=config.temperature,
        center_momentum=config.center_momentum,
    )

    def encoder(candidate: Any) -> SARViT:
        return candidate if isinstance(candidate, SARViT) else candidate.encoder(config.save_branch)

    def save(candidate: Any, folder: Path) -> None:
        encoder(candidate).save_pretrained(folder)

    return Setup(
        model=model,
        task=DINOTask(config),
        transform=dino_views(
            config.image_size,
            config.local_size,
            config.local_crops,
            global_scale=config.global_scale,
            local_scale=config.local_scale,
            mean=config.mean,
            std=config.std,
        ),
        measure=lambda candidate, split, accelerator: measure(
            config, encoder(candidate), split, data, accelerator
        ),
        save=save,
        load=SARViT.from_pretrained,
        select_by="knn",
        make_schedule=make_schedule,
    )


class DINOHead(nn.Module):
    """Three layers to a bottleneck of length 1, and its cosines with prototypes: a last layer of fixed norm.

    Args:
        width: of the features.
        hidden_dim: of the first two layers.
        bottleneck_dim: of the third.
        prototypes: outputs.

    Example:
        >>> outputs = DINOHead(12, hidden_dim=16, bottleneck_dim=8, prototypes=32)(torch.randn(4, 12))
        >>> outputs.shape, bool(outputs.abs().max() <= 1)
        (torch.Size([4, 32]), True)
    """

    def __init__(
        self, width: int, hidden_dim: int = 2048, bottleneck_dim: int = 256, prototypes: int = 65536
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # Weight normalisation with its norm fixed to 1 is a normalisation of the rows.
        self.prototypes = nn.Parameter(nn.Linear(bottleneck_dim, prototypes, bias=False).weight.detach())

    def forward(self, features: Tensor) -> Tensor:
        """``(b, width)`` to cosines ``(b, prototypes)``."""
        bottleneck = functional.normalize(self.mlp(features), dim=1)
        return functional.linear(bottleneck, functional.normalize(self.prototypes, dim=1))


class DINO(nn.Module):
    r"""A student that learns by gradient, and a teacher of the same form that follows it and sees the large crops.

    .. math:: L = -\frac{1}{2 (v - 1)} \sum_{i=1}^{2} \sum_{j \neq i}^{v}
        \mathrm{softmax}\Big(\frac{t_i - c}{\tau_t}\Big) \cdot \log \mathrm{softmax}\Big(\frac{s_j}{\tau}\Big)

    v crops, the first two large; c, the centre, is a moving average of the teacher's outputs over all processes. The
    teacher stays in evaluation mode: stochastic depth is the student's alone.

    Args:
        student: without head; of a network that takes images of several sizes.
        hidden_dim, bottleneck_dim, prototypes: of the heads, see :class:`DINOHead`.
        temperature: τ, of the student.
        center_momentum: share of the centre that stays at each step.

    Raises:
        InputError: if the student has batch norms.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "dynamic_img_size": True}
        >>> model = DINO(SARViT("vit", 0, 32, backbone_options=tiny), hidden_dim=16, bottleneck_dim=8, prototypes=32)
        >>> crops = [torch.randn(2, 3, size, size) for size in (32, 32, 16, 16, 16)]
        >>> loss = model(crops, teacher_temperature=0.04)
        >>> [maps.shape for maps in take_maps(model)]
        [torch.Size([4, 3, 4, 4]), torch.Size([6, 3, 2, 2])]
    """

    center: Tensor

    def __init__(
        self,
        student: SARViT,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        prototypes: int = 65536,
        temperature: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if any(name.endswith("running_mean") for name, _ in student.named_buffers()):
            raise InputError(
                f"backbone {student.arch}: has batch norms, whose statistics a teacher does not follow; choose another"
            )
        self.temperature, self.center_momentum = temperature, center_momentum
        self.student = student
        self.student_head = DINOHead(student.num_features, hidden_dim, bottleneck_dim, prototypes)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.register_buffer("center", torch.zeros(prototypes))

    def train(self, mode: bool = True) -> Self:
        """Change the mode of all but the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, crops: Sequence[Tensor], teacher_temperature: float) -> Tensor:
        """The loss of one step; in training the centre moves and the student is collected, the large crops first.

        Args:
            crops: ``(b, 3, H, W)`` each: two large ones, then small ones of one size, if any.
            teacher_temperature: of this epoch.

        Returns:
            A scalar.
        """
        large, small = torch.cat(list(crops[:2])), list(crops[2:])
        features = [self.student(large), *([self.student(torch.cat(small))] if small else [])]
        outputs = self.student_head(torch.cat(features))
        with torch.no_grad():
            targets = self.teacher_head(self.teacher(large))
        with torch.autocast(large.device.type, enabled=False):
            precise = torch.promote_types(outputs.dtype, torch.float32)
            outputs, targets = outputs.to(precise), targets.to(precise)
            predicted = (outputs / self.temperature).log_softmax(dim=1)
            wanted = ((targets - self.center) / teacher_temperature).softmax(dim=1)
            # All pairs of a large and any crop at once: inner products over the photos of the batch and prototypes.
            pairs = wanted.reshape(2, -1) @ predicted.reshape(len(crops), -1).T
            loss = (pairs.diagonal().sum() - pairs.sum()) / (2 * (len(crops) - 1) * len(crops[0]))
        if self.training:
            self._move_center(targets)
        return loss

    @torch.no_grad()
    def _move_center(self, targets: Tensor) -> None:
        mean = targets.mean(dim=0)
        count, _ = processes()
        if count > 1:
            distributed.all_reduce(mean)
            mean /= count
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)

    def encoder(self, branch: str = "default") -> SARViT:
        """The teacher, or for ``"student"`` that."""
        return self.student if branch == "student" else self.teacher

    def update_teacher(self, momentum: float) -> None:
        """Let the teacher and its head follow, see :func:`~.pretraining.follow`."""
        follow([self.teacher, self.teacher_head], [self.student, self.student_head], momentum)


class DINOTask(PretrainingTask):
    """DINO's loss plus λ times the spatial entropy of the student, over large crops or over all."""

    def begin_epoch(self, epoch: int) -> None:
        """Take λ and the teacher's temperature of this epoch, counted from 0."""
        super().begin_epoch(epoch)
        start, end = self.config.teacher_warmup_temperature, self.config.teacher_temperature
        warmup = self.config.teacher_warmup_epochs
        done = epoch / max(warmup - 1, 1) if epoch < warmup else 1.0
        self.teacher_temperature = start + (end - start) * done

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the model on a batch whose ``images`` are the crops; :class:`DINO`, bare or wrapped."""
        loss = model(batch["images"], self.teacher_temperature)
        if self.config.entropy_views == "all":
            return self.parts("distillation", loss, model)
        large, *_ = take_maps(model, self.config.similarity)
        return self.parts("distillation", loss, large)

    def param_groups(self, model: nn.Module, config: SarConfig) -> list[dict[str, Any]]:
        """Weights of two or more dimensions with weight decay, biases and norms without."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [
            {
                "params": [parameter for parameter in trained if (parameter.ndim > 1) is decayed],
                "weight_decay": config.weight_decay if decayed else 0.0,
                "lr_scale": 1.0,
            }
            for decayed in (True, False)
        ]

    def before_update(self, model: nn.Module) -> None:
        """Clip each gradient where asked for; keep the last layer as it is during the first epochs."""
        super().before_update(model)
        if self.epoch < self.config.freeze_last_layer_epochs:
            bare: Any = model
            bare.student_head.prototypes.grad = None

    def after_update(self, model: nn.Module, progress: float) -> None:
        """Let the teacher follow."""
        bare: Any = model
        bare.update_teacher(momentum_at(progress, self.config.momentum_start))
