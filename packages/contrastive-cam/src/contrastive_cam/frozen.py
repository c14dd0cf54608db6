r"""One linear map of frozen features: DDT as a model that can be kept, and a contrastive form that trains it.

.. math:: A(p) = w^\top (f(p) - \mu)

with f the features of a pretrained network that does not change. :func:`fit_ddt` takes w from all photos of a folder
in closed form; :func:`fit_region` learns it from pairs of regions: the foregrounds of all photos should be alike, so
should their backgrounds, and the two should differ. No photo's *map* is pushed away from another's. That is the
difference to :func:`contrastive_cam.contrastive_map_loss`, and why this form cannot shrink objects to a spot.

The loss on regions follows the idea of Xie et al., "C2AM", CVPR 2022; that it acts on frozen features through one
linear unit, together with equivariance to quarter turns, is our own design.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from attnmap_core.backbones import evaluating
from attnmap_core.errors import InputError
from attnmap_core.hub import Localization, PretrainedModel
from torch import Tensor, nn

from .backbones import LastStage, colocalization_backbone
from .baselines import DDT, DescriptorStatistics, Sign, central_cells, key_maps, layer_maps, unit_joined
from .loss import contrastive_map_loss, gathered, unit
from .transforms import rotate_images, theta_of

VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
"""The network whose keys are read where nothing else is said."""

_LEAST = 5e-4  # similarities are kept this far from 0 and 1, whose logarithms are not finite


class Mapped(NamedTuple):
    """What a :class:`FrozenMap` sees in a batch.

    Attributes:
        score: ``(b, h, w)``, signed, with gradient to the unit.
        features: ``(b, c, h, w)``, without.
    """

    score: Tensor
    features: Tensor


class FrozenMap(
    PretrainedModel,
    license="apache-2.0",
    tags=["co-localization", "unsupervised", "attention-maps", "contrastive-cam"],
    pipeline_tag="object-detection",
    paper_url="https://openaccess.thecvf.com/content/ICCV2021/html/"
    "Ki_Contrastive_Attention_Maps_for_Self-Supervised_Co-Localization_ICCV_2021_paper.html",
):
    """A linear map of features that do not change, and the box around what it lights up.

    Args:
        backbone: timm name of a ViT or CNN, or ``"vit"``.
        img_size: input pixels, one number or ``(height, width)``.
        blocks: read the keys of these transformer blocks (negative from the end), joined.
        layers: read the outputs of these modules of the timm network instead, joined. Without either the network's
            own feature map is read.
        unit_length: scale each descriptor to length 1; default: for keys.
        last_stage: of CNNs, see :func:`contrastive_cam.backbones.colocalization_backbone`.
        positive: only what is above 0 counts: the boundary of DDT and of :func:`fit_region`. Set the threshold to 0.
        threshold: share of the heat map's maximum above which pixels make the box.
        labels: the name of what the photos show, one.
        preprocessing: fields of :class:`attnmap_core.data.transforms.Preprocessing`; default: the whole photo at
            ``img_size``, normalised as the backbone's pretrained weights expect.
        pretrained: download timm's weights for the backbone.
        weights: local file of backbone weights instead.
        backbone_options: passed on.

    Raises:
        InputError: if the backbone is unknown or lacks what is asked for.
        ValueError: for another value out of range.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> model = FrozenMap("vit", img_size=32, blocks=(0, 1), backbone_options=tiny)
        >>> model.features(torch.zeros(2, 3, 32, 32)).shape, model.attention_map(torch.zeros(2, 3, 32, 32)).shape
        (torch.Size([2, 24, 4, 4]), torch.Size([2, 4, 4]))
    """

    mean: Tensor

    def __init__(
        self,
        backbone: str = VIT,
        img_size: int | Sequence[int] = 224,
        *,
        blocks: Sequence[int] = (),
        layers: Sequence[str] = (),
        unit_length: bool | None = None,
        last_stage: LastStage = "stride1",
        positive: bool = False,
        threshold: float = 0.5,
        labels: Sequence[str] = ("object",),
        preprocessing: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if blocks and layers:
            raise ValueError(f"blocks {list(blocks)} and layers {list(layers)} exclude each other")
        if len(labels) != 1:
            raise ValueError(f"labels {list(labels)}: expected one, the name of what all photos show")
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.blocks, self.layers = tuple(blocks), tuple(layers)
        self.unit_length = bool(blocks) if unit_length is None else unit_length
        self.positive = positive
        self.interpolation = "bilinear"
        self.backbone = colocalization_backbone(
            backbone,
            size,
            last_stage=last_stage,
            pretrained=pretrained,
            weights=weights,
            **(backbone_options or {}),
        )
        self.backbone.requires_grad_(False)
        with evaluating(self.backbone), torch.no_grad():
            try:
                channels = self.features(torch.zeros(1, 3, *size)).shape[1]
            except ValueError as error:
                raise InputError(f"blocks {list(blocks)} of {backbone}: {error}") from error
        self.register_buffer("mean", torch.zeros(channels))
        self.weight = nn.Parameter(torch.full((channels,), 1 / channels))
        self.bias = nn.Parameter(torch.zeros(()))

    def features(self, images: Tensor) -> Tensor:
        """Descriptors ``(b, c, h, w)`` of ``images (b, 3, H, W)``, normalised; without gradient, in evaluation mode."""
        with evaluating(self.backbone), torch.no_grad():
            if self.blocks:
                maps = key_maps(self.backbone, images, self.blocks)
            elif self.layers:
                maps = layer_maps(self.backbone, images, self.layers)
            else:
                maps = [self.backbone(images).map]
            return unit_joined(maps, unit=self.unit_length)

    def score(self, features: Tensor) -> Tensor:
        """The map ``(b, h, w)`` of descriptors ``(b, c, h, w)``, signed."""
        offset = self.bias - self.weight @ self.mean
        return torch.einsum("bchw,c->bhw", features, self.weight) + offset

    def forward(self, images: Tensor) -> Mapped:
        """Signed maps and descriptors of ``images (b, 3, H, W)``, normalised."""
        features = self.features(images)
        return Mapped(self.score(features), features)

    def attention_map(self, images: Tensor) -> Tensor:
        """The map that inference uses, ``(b, h, w)``: signed, or cut at 0 where only that counts."""
        score = self(images).score
        return score.clamp_min(0) if self.positive else score

    def localize(self, images: Tensor) -> Localization:
        """The map and one logit, its mean: there is one class, of probability 1."""
        A = self.attention_map(images)
        return Localization(A.mean((1, 2)).unsqueeze(1), A)

    @torch.no_grad()
    def take(self, ddt: DDT) -> None:
        """Be the map of a descriptor transformation."""
        self.mean.copy_(ddt.mean)
        self.weight.copy_(ddt.component)
        self.bias.zero_()


def normalised(
    model: FrozenMap, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> FrozenMap:
    """A model whose photos are normalised as its weights need, where that is not what timm says of the network.

    Args:
        model: changed in place.
        mean, std: per channel; left as they are where not given.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> normalised(FrozenMap("vit", img_size=32, backbone_options=tiny), mean=(0.5, 0.5, 0.5)).preprocessing.mean
        (0.5, 0.5, 0.5)
    """
    given = {name: tuple(value) for name, value in (("mean", mean), ("std", std)) if value is not None}
    model.preprocessing = dataclasses.replace(model.preprocessing, **given)
    return model


# --- Closed form -----------------------------------------------------------------------------------


def descriptor_statistics(
    models: Sequence[FrozenMap], batches: Iterable[Tensor]
) -> list[DescriptorStatistics]:
    """Mean and covariance of the descriptors of photos, in each of several models.

    Args:
        models: whose descriptors; on one device.
        batches: ``(b, 3, H, W)`` each, normalised; read once, and moved to the models' device.

    Raises:
        InputError: for no photos.
    """
    found = [DescriptorStatistics(len(model.weight)) for model in models]
    for images in batches:
        for model, statistics in zip(models, found):
            with evaluating(model):
                statistics.add(model.features(images.to(model.weight.device)))
    if not found[0].photos:
        raise InputError("no photos to fit; give one or more")
    return found


def fit_ddt(model: FrozenMap, batches: Iterable[Tensor], sign: Sign = "center") -> DDT:
    """Make the map of a model DDT's of these photos.

    Args:
        model: changed in place.
        batches: as in :func:`descriptor_statistics`.
        sign: as in :meth:`contrastive_cam.baselines.DescriptorStatistics.fit`.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> model = FrozenMap("vit", img_size=32, blocks=(0,), backbone_options=tiny)
        >>> ddt = fit_ddt(model, [torch.randn(4, 3, 32, 32)])
        >>> torch.equal(model.weight, ddt.component.float())
        True
    """
    ddt = descriptor_statistics([model], batches)[0].fit(sign)
    model.take(ddt)
    return ddt


# --- Regions ---------------------------------------------------------------------------------------


def region_loss(P: Tensor, features: Tensor, *, decay: float = 0.25, gather: bool = True) -> Tensor:
    r"""Foregrounds alike, backgrounds alike, and the two apart, over all pairs of photos.

    With :math:`f_i` and :math:`b_i` the means of an image's features weighted by P and 1 - P, and
    :math:`s(x, y) = (1 + \cos(x, y)) / 2`:

    .. math:: L = -\overline{\log(1 - s(f_i, b_j))} - \overline{w_{ij} \log s(f_i, f_j)}
        - \overline{w_{ij} \log s(b_i, b_j)}, \quad w_{ij} = e^{-\gamma\, r_{ij}}

    where r counts, from 0, the other images j by falling similarity to i: foregrounds need not be like all others.

    Args:
        P: ``(b, h, w)`` in ``[0, 1]``, how much each cell is foreground.
        features: ``(b, c, h, w)``; subtract their mean first, or all cosines are near 1.
        decay: :math:`\gamma`.
        gather: take pairs with the images of all processes; each then gives the mean over its own images.

    Returns:
        Scalar, 0 or more. A single image has only the first term.

    Raises:
        ValueError: for shapes that do not fit or a negative decay.

    Example:
        >>> features = torch.tensor([[[[1.0, -1.0]]]]).expand(2, 1, 1, 2)
        >>> good, bad = torch.tensor([[[1.0, 0.0]]] * 2), torch.full((2, 1, 2), 0.5)
        >>> bool(region_loss(good, features) < region_loss(bad, features))
        True

    References:
        Xie et al., "C2AM: Contrastive Learning of Class-agnostic Activation Map", CVPR 2022.
    """
    if features.ndim != 4 or P.shape != (len(features), *features.shape[2:]) or decay < 0:
        raise ValueError(
            f"P {tuple(P.shape)} and features {tuple(features.shape)} with decay {decay}: expected (b, h, w) and "
            "(b, c, h, w) and 0 or more"
        )
    precise = torch.promote_types(features.dtype, torch.float32)  # 1 minus a little is 1 in half precision
    with torch.autocast(features.device.type, enabled=False):
        return _region_loss(P.to(precise), features.to(precise), decay, gather)


def _region_loss(P: Tensor, features: Tensor, decay: float, gather: bool) -> Tensor:
    weight = P.flatten(1).unsqueeze(1)
    rows = features.flatten(2)
    fg, bg = (unit((rows * m).sum(dim=2) / m.sum(dim=2).clamp_min(1e-8)) for m in (weight, 1 - weight))
    (all_fg, first), (all_bg, _) = (gathered(fg), gathered(bg)) if gather else ((fg, 0), (bg, 0))
    loss = -(1 - _likeness(fg, all_bg)).log().mean()
    own = torch.arange(first, first + len(fg), device=fg.device)
    if len(all_fg) > 1:
        loss = (
            loss
            + _attraction(_likeness(fg, all_fg), own, decay)
            + _attraction(_likeness(bg, all_bg), own, decay)
        )
    return loss


def _likeness(a: Tensor, b: Tensor) -> Tensor:
    return ((1 + a @ b.T) / 2).clamp(_LEAST, 1 - _LEAST)


def _attraction(s: Tensor, own: Tensor, decay: float) -> Tensor:
    itself = torch.zeros_like(s, dtype=torch.bool).scatter(1, own.unsqueeze(1), True)
    rank = s.detach().masked_fill(itself, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    weight = torch.where(itself, 0, torch.exp(-decay * rank.to(s.dtype)))
    return -(weight * s.log()).sum() / (s.numel() - len(s))


class RegionTask:
    """Training task of a :class:`FrozenMap`: :func:`region_loss`, and maps that turn with their photos.

    The second term is ``1 - cos`` of the map of the turned photo and the turned map
    (:func:`contrastive_cam.contrastive_map_loss` without negatives).

    Args:
        equivariance: weight of the second term; 0 leaves it out, and with it the turned photos.
        decay: of :func:`region_loss`.
        gather: likewise.

    Raises:
        ValueError: for a negative weight.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> model = FrozenMap("vit", img_size=32, blocks=(0,), backbone_options=tiny)
        >>> sorted(RegionTask()(model, {"images": torch.randn(4, 3, 32, 32)}))
        ['equivariance', 'foreground', 'loss', 'region']
    """

    def __init__(self, equivariance: float = 1.0, *, decay: float = 0.25, gather: bool = True) -> None:
        if not equivariance >= 0:
            raise ValueError(f"equivariance must be 0 or more, got {equivariance}")
        self.equivariance, self.decay, self.gather = equivariance, decay, gather

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses of ``images (b, 3, n, n)``, square.

        Returns:
            Scalars: ``loss`` with gradient, ``region``, ``equivariance``, and ``foreground``, the mean of the map.
        """
        images = batch["images"]
        turns = torch.randint(1, 4, (len(images),)).to(images.device)
        both = torch.cat([images, rotate_images(images, turns)]) if self.equivariance else images
        views: Mapped = model(
            both
        )  # through the wrapper of distributed training, which gathers the gradients
        frozen: Any = getattr(model, "module", model)
        count = len(images)
        return self.losses(
            views.score[:count], views.features[:count], views.score[-count:], turns, frozen.mean
        )

    def losses(
        self, score: Tensor, features: Tensor, turned: Tensor, turns: Tensor, mean: Tensor
    ) -> dict[str, Tensor]:
        """The same of signed maps.

        Args:
            score: ``(b, n, n)`` of the photos.
            features: ``(b, c, n, n)``, likewise.
            turned: ``(b, n, n)`` of the photos turned by ``turns (b,)`` quarters.
            turns: see there.
            mean: ``(c,)`` of all descriptors.
        """
        P = score.sigmoid()
        region = region_loss(P, features - mean[:, None, None], decay=self.decay, gather=self.gather)
        parts = {"region": region.detach(), "foreground": P.detach().mean()}
        loss = region
        if self.equivariance:
            theta = theta_of({"rotation": turns})
            moved = contrastive_map_loss(P, turned.sigmoid(), theta, negatives="none")
            loss = loss + self.equivariance * moved
            parts["equivariance"] = moved.detach()
        return {"loss": loss, **parts}


@torch.no_grad()
def start_region(model: FrozenMap, statistics: DescriptorStatistics, generator: torch.Generator) -> None:
    """Random weights to begin with, about the mean of the descriptors; changed in place.

    Args:
        model: the map.
        statistics: of the photos to come.
        generator: of the weights, on the CPU.
    """
    model.take(statistics.fit())
    channels = len(model.weight)
    model.weight.copy_(torch.randn(channels, generator=generator) / math.sqrt(channels))


@torch.no_grad()
def turn_to_center(model: FrozenMap, scores: Iterable[Tensor]) -> None:
    """Which side of a trained unit is the object is arbitrary: let it be the one that is brighter in the middle.

    Args:
        model: changed in place.
        scores: its signed maps ``(b, h, w)`` of photos.
    """
    contrast = 0.0
    for score in scores:
        central = central_cells(score.shape[1], score.shape[2]).to(score.device)
        rows = score.flatten(1)
        if central.any() and not central.all():
            contrast += float((rows[:, central].mean(dim=1) - rows[:, ~central].mean(dim=1)).sum())
    if contrast < 0:
        model.weight.neg_()
        model.bias.neg_()


def fit_region(
    model: FrozenMap,
    batches: Iterable[Tensor],
    *,
    seed: int = 0,
    steps: int = 100,
    batch_size: int = 32,
    lr: float = 0.03,
    equivariance: float = 1.0,
    on_step: Callable[[int, Mapping[str, Tensor]], object] = lambda step, parts: None,
) -> None:
    """Train the map of a model on photos whose features stay in memory: seconds after they are there.

    Args:
        model: changed in place; its photos are square.
        batches: ``(b, 3, n, n)`` each, normalised; a few hundred photos in all.
        seed: of weights, turns and order.
        steps: of Adam.
        batch_size: photos a step.
        lr: learning rate.
        equivariance: of :class:`RegionTask`.
        on_step: called with the number of each step and its losses.

    Raises:
        InputError: for no photos, or photos that are not square.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> model = FrozenMap("vit", img_size=32, blocks=(0,), backbone_options=tiny)
        >>> fit_region(model, [torch.randn(4, 3, 32, 32)], steps=2)
    """
    height, width = model.preprocessing.size
    if height != width:
        raise InputError(f"img_size {height}x{width}: quarter turns need square photos; give one number")
    generator = torch.Generator().manual_seed(seed)
    device = model.weight.device
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    statistics = DescriptorStatistics(len(model.weight))
    with evaluating(model):
        for images in batches:
            turns = torch.randint(1, 4, (len(images),), generator=generator)
            features = model.features(images.to(device)).cpu()
            statistics.add(features)
            turned = (
                model.features(rotate_images(images, turns).to(device)).cpu() if equivariance else features
            )
            kept.append((features, turned, turns))
    if not statistics.photos:
        raise InputError("no photos to fit; give one or more")
    features, turned, turns = (torch.cat(part) for part in zip(*kept))
    start_region(model, statistics, generator)
    task = RegionTask(equivariance, gather=False)
    optimizer = torch.optim.Adam([model.weight, model.bias], lr=lr)
    for step in range(steps):
        some = torch.randperm(len(features), generator=generator)[:batch_size]
        now, moved = features[some].to(device), turned[some].to(device)
        parts = task.losses(model.score(now), now, model.score(moved), turns[some].to(device), model.mean)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        on_step(step, parts)
    turn_to_center(model, (model.score(part.to(device)) for part in features.split(batch_size)))
    if not bool(np.isfinite(model.weight.detach().cpu().numpy()).all()):
        raise InputError(f"lr {lr}: training ended in numbers that are not finite; choose a smaller one")
