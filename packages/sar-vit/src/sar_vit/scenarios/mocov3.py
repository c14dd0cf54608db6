"""MoCo-v3 with SAR (section 4.5, appendix D.5): contrastive training without labels.

Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from attnmap_core.data.sources import ImageData
from attnmap_core.errors import InputError
from torch import Tensor, nn
from torch.nn import functional

from ..config import SarConfig
from ..model import SARViT
from ..views import mocov3_views
from . import Setup
from .pretraining import (
    PretrainingTask,
    follow,
    gathered,
    make_encoder,
    make_schedule,
    measure,
    momentum_at,
    processes,
)


def make_setup(config: SarConfig, data: ImageData) -> Setup:
    """MoCo-v3 on these images, whose labels only the k-NN accuracy looks at."""
    model = MoCoV3(
        make_encoder(config, data),
        hidden_dim=config.hidden_dim,
        projection_dim=config.projection_dim,
        temperature=config.temperature,
    )
    if config.sync_batchnorm and processes()[0] > 1 and distributed.get_backend() == "nccl":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # which has no form for CPUs

    def encoder(candidate: Any) -> SARViT:
        return candidate if isinstance(candidate, SARViT) else candidate.encoder(config.save_branch)

    def save(candidate: Any, folder: Path) -> None:
        encoder(candidate).save_pretrained(folder)

    return Setup(
        model=model,
        task=MoCoV3Task(config),
        transform=mocov3_views(config.image_size, config.crop_scale, mean=config.mean, std=config.std),
        measure=lambda candidate, split, accelerator: measure(
            config, encoder(candidate), split, data, accelerator
        ),
        save=save,
        load=SARViT.from_pretrained,
        select_by="knn",
        make_schedule=make_schedule,
    )


class MoCoV3(nn.Module):
    r"""Two encoders of one form: the base learns by gradient, the momentum encoder follows it and gives the keys.

    Queries are the predictor's output, keys the momentum projector's, both of length 1:

    .. math:: L = 2\tau \, [\mathrm{CE}(q_1 k_2^T / \tau) + \mathrm{CE}(q_2 k_1^T / \tau)]

    The key of a query is the other view of its photo; the other keys, of all processes, are negatives. The patch
    projection stays as it was drawn, and positions are sines and cosines (:func:`prepare_vit`).

    Args:
        base: without head; prepared in place.
        hidden_dim: of projector (3 layers) and predictor (2 layers).
        projection_dim: their outputs.
        temperature: τ.

    Raises:
        InputError: if ``base`` is not a plain ViT, see :func:`prepare_vit`.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> model = MoCoV3(SARViT("vit", 0, 32, backbone_options=tiny), hidden_dim=16, projection_dim=8)
        >>> loss = model([torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)])
        >>> loss.backward()
        >>> len(model.base.collector), len(model.momentum.collector)  # forward passes for the spatial entropy
        (2, 0)
    """

    def __init__(
        self, base: SARViT, *, hidden_dim: int = 4096, projection_dim: int = 256, temperature: float = 0.2
    ) -> None:
        super().__init__()
        prepare_vit(base)
        self.temperature = temperature
        self.base = base
        self.projector = _mlp(base.num_features, hidden_dim, hidden_dim, projection_dim)
        self.predictor = _mlp(projection_dim, hidden_dim, projection_dim)
        self.momentum = copy.deepcopy(self.base).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """The loss of two views, ``(b, 3, H, W)`` each, ``b`` the same in all processes; the base is collected."""
        first, second = views
        queries = [self.predictor(self.projector(self.base(view))) for view in (first, second)]
        with torch.no_grad():
            keys = [self.momentum_projector(self.momentum(view)) for view in (first, second)]
        return self._contrast(queries[0], keys[1]) + self._contrast(queries[1], keys[0])

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = (
                functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)
                for rows in (queries, keys)
            )
            logits = queries @ gathered(keys).T / self.temperature
            own = torch.arange(len(queries), device=logits.device) + len(queries) * processes()[1]
            return 2 * self.temperature * functional.cross_entropy(logits, own)

    def encoder(self, branch: str = "default") -> SARViT:
        """The base encoder, or the momentum encoder for ``"teacher"``."""
        return self.momentum if branch == "teacher" else self.base

    def update_momentum(self, momentum: float) -> None:
        """Let the momentum encoder and its projector follow, see :func:`~.pretraining.follow`."""
        follow([self.momentum, self.momentum_projector], [self.base, self.projector], momentum)


class MoCoV3Task(PretrainingTask):
    """Contrastive loss plus λ times the spatial entropy of the base encoder, the mean over both views."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the model on a batch whose ``images`` are two views; :class:`MoCoV3`, bare or wrapped."""
        return self.parts("contrastive", model(batch["images"]), model)

    def param_groups(self, model: nn.Module, config: SarConfig) -> list[dict[str, Any]]:
        """All trained weights in one group: none is without weight decay."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trained, "weight_decay": config.weight_decay, "lr_scale": 1.0}]

    def after_update(self, model: nn.Module, progress: float) -> None:
        """Let the momentum encoder follow."""
        bare: Any = model
        bare.update_momentum(momentum_at(progress, self.config.momentum_start))


@torch.no_grad()
def prepare_vit(model: SARViT) -> None:
    """Draw the weights as MoCo-v3 does, and freeze patch projection and position embedding.

    Args:
        model: of a plain timm ViT with a class token; its weights are replaced in place.

    Raises:
        InputError: for another network, or a width that 4 does not divide.
    """
    from timm.models import named_apply
    from timm.models.vision_transformer import VisionTransformer, get_init_weights_vit

    network: Any = model.backbone.model
    if not isinstance(network, VisionTransformer) or network.pos_embed is None or not model.has_class_token:
        raise InputError(
            f"backbone {model.arch}: mocov3 needs a plain ViT with class token and position embedding, such as "
            "deit_small_patch16_224"
        )
    named_apply(get_init_weights_vit("moco"), network)
    projection: Any = network.patch_embed.proj
    rows, columns = network.patch_embed.grid_size
    fan_in, fan_out = projection.weight[0].numel(), projection.weight.shape[0]
    bound = (6 / (fan_in + fan_out)) ** 0.5
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    patches = sincos_positions(rows, columns, network.embed_dim)
    network.pos_embed.zero_()  # also that of the class token
    network.pos_embed[0, -len(patches) :] = patches
    projection.requires_grad_(False)
    network.pos_embed.requires_grad_(False)


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    r"""Fixed position embedding of a grid: sines and cosines of the row, then of the column.

    .. math:: \omega_i = 10000^{-i / (c / 4)}, \quad i = 0 .. c / 4 - 1

    Args:
        rows: of the grid; ``columns`` likewise.
        width: channels c.

    Returns:
        ``(rows columns, width)``, row-major: sin and cos of ``row ω``, sin and cos of ``column ω``.

    Raises:
        InputError: for a width that 4 does not divide.

    Example:
        >>> sincos_positions(2, 3, 4)[4]  # row 1, column 1
        tensor([0.8415, 0.5403, 0.8415, 0.5403])
    """
    if width % 4:
        raise InputError(f"width {width}: sines and cosines of two axes need a multiple of 4 channels")
    omega = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    y, x = (axis.flatten()[:, None] * omega for axis in _grid(rows, columns))
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1)


def _grid(rows: int, columns: int) -> tuple[Tensor, ...]:
    return torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers without bias, each with batch norm, ReLU between them; the last norm has no weights."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths), start=2):
        last = number == len(widths)
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
