"""Every way from photos to boxes side by side: training-free methods, frozen maps and trained models.

A :class:`Localizer` is fitted to the photos of a folder where its method needs that, and then finds one box in each,
with a confidence that needs no labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from attnmap_core.backbones import evaluating
from attnmap_core.boxes import box_iou
from attnmap_core.errors import InputError
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .attention import caam
from .baselines import ddt_plus_mask, lost, scda_map, zero_level
from .frozen import FrozenMap, descriptor_statistics, fit_region
from .inference import Boxes, heat_map, largest_component, mask_box, threshold_of
from .model import ContrastiveCAM

Maps: TypeAlias = NDArray[np.float64]
Method = Literal["ddt", "ddt+", "region", "scda", "mean", "lost", "model"]
Rule: TypeAlias = float | Literal["mean", "otsu", "zero"]

METHODS: dict[str, str] = {
    "ddt": "DDT: what the descriptors of all photos have in common",
    "ddt+": "DDT of two layers",
    "region": "one linear unit on frozen features, trained by contrasting regions",
    "scda": "SCDA: sum of the channels above its mean",
    "mean": "mean of the channels",
    "lost": "LOST: a seed grown on the keys of a ViT",
    "model": "a trained model",
}
"""What :class:`Localizer` knows, with a line about each."""

_STEP = 0.1  # of the heat map's range: how far the threshold moves in the test of stability


class Found(NamedTuple):
    """What is found in one photo.

    Attributes:
        heat: ``(H, W)`` float64 in ``[0, 1]``, the heat map at the network's input size.
        box_xyxy: ``(4,)`` pixels of the heat map, end exclusive; None where nothing stands out.
        confidence: in ``[0, 1]``, see :func:`confidence_of`; 0 without a box.
        signs: what it is made of, by name.
        descriptor: ``(c,)`` mean feature of the object, of length 1; zeros without a box.
    """

    heat: Maps
    box_xyxy: Boxes | None
    confidence: float
    signs: dict[str, float]
    descriptor: NDArray[np.float64]


@dataclass
class Localizer:
    """One method on one network.

    Args:
        model: a :class:`FrozenMap`, whose features are read; for ``"model"`` one that is trained, of either class.
        method: one of :data:`METHODS`.
        rule: where the heat map is cut: a share of its range; ``"mean"`` of it, strictly above; ``"otsu"``; ``"zero"``
            of the signed map, the boundary that DDT and the region loss draw themselves. ``lost`` and ``ddt+`` bring
            their own masks. None: :func:`default_rule`.
        other: for ``"ddt+"``, the map of the second layer.

    Raises:
        InputError: for a method that does not fit the model.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> localizer = Localizer(FrozenMap("vit", img_size=32, blocks=(0,), backbone_options=tiny), "ddt")
        >>> photos = torch.randn(3, 3, 32, 32)
        >>> localizer.fit([photos])
        >>> [found.heat.shape for found in localizer.find(photos)]
        [(32, 32), (32, 32), (32, 32)]
    """

    model: FrozenMap | ContrastiveCAM
    method: Method = "ddt"
    rule: Rule | None = None
    other: FrozenMap | None = None

    def __post_init__(self) -> None:
        model = self.model
        if self.method not in METHODS:
            raise InputError(f"method {self.method}: expected one of {', '.join(METHODS)}")
        if self.method != "model" and not isinstance(model, FrozenMap):
            raise InputError(
                f"method {self.method}: reads frozen features; use method model for a trained one"
            )
        if (self.method == "ddt+") != (self.other is not None):
            raise InputError("method ddt+: takes a second model of another layer, and only ddt+ does")
        if self.method == "lost" and not (isinstance(model, FrozenMap) and model.blocks):
            raise InputError(
                "method lost: needs the keys of a ViT; give a ViT as --backbone, or another method"
            )
        if self.rule is None:
            self.rule = default_rule(self.method, model)
        if self.rule not in ("mean", "otsu", "zero") and (
            isinstance(self.rule, str) or not 0 <= self.rule <= 1
        ):
            raise InputError(f"threshold {self.rule}: expected a share in [0, 1], mean, otsu or zero")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def needs_fit(self) -> bool:
        """Whether the method looks at the photos together before it finds anything."""
        return self.method in ("ddt", "ddt+", "region", "lost")

    def fit(self, batches: Iterable[Tensor], **options: Any) -> None:
        """Take what the photos have in common; methods that look at each photo by itself do not look at any.

        Args:
            batches: ``(b, 3, H, W)``, normalised; read once.
            **options: for ``"region"``, of :func:`contrastive_cam.frozen.fit_region`; the weight of equivariance is
                that of :func:`default_turns` where not given.

        Raises:
            InputError: for no photos.
        """
        if not self.needs_fit or not isinstance(self.model, FrozenMap):
            return
        if self.method == "region":
            options.setdefault("equivariance", default_turns(self.model))
            fit_region(self.model, batches, **options)
            return
        models = [self.model] if self.other is None else [self.model, self.other]
        for model, statistics in zip(models, descriptor_statistics(models, batches)):
            model.take(statistics.fit())

    @torch.no_grad()
    def find(self, images: Tensor) -> list[Found]:
        """One box in each of ``images (b, 3, H, W)``, normalised."""
        model, images = self.model, images.to(self.device)
        size = (images.shape[2], images.shape[3])
        with evaluating(model):
            if isinstance(model, ContrastiveCAM):
                features = model.backbone(images).map
                scores = model.placed(model.map_of(features), size)
            else:
                features = model.features(images)
                scores = self._scores(model, features)
        others = [None] * len(images)
        if self.other is not None:
            with evaluating(self.other):
                others = list(self.other(images).score.double().cpu().numpy())
        maps = scores.double().cpu().numpy()
        described = features.double().cpu().numpy()
        return [
            self._found(score, feature, other, size) for score, feature, other in zip(maps, described, others)
        ]

    def _scores(self, model: FrozenMap, features: Tensor) -> Tensor:
        if self.method == "scda":
            return scda_map(features)
        if self.method == "mean":
            return caam(features)
        if self.method == "lost":
            # the sums that LOST itself needs come with its mask
            return features.sum(dim=1)
        return model.score(features)

    def _found(self, score: Maps, features: Maps, other: Maps | None, size: tuple[int, int]) -> Found:
        own: NDArray[np.bool_] | None = None  # a mask that the method brings, on the grid of the features
        if self.method == "lost":
            assert isinstance(self.model, FrozenMap)
            centred = features - self.model.mean.double().cpu().numpy()[:, None, None]
            _, score, own = lost(centred)
        elif other is not None:
            own = ddt_plus_mask(score, other)
        heat = heat_map(score, size)
        if own is not None:
            rows, columns = ((np.arange(new) * old) // new for new, old in zip(size, own.shape))
            mask = own[np.ix_(rows, columns)]
            mask = mask if score.min() < score.max() else np.zeros_like(mask)
            level = zero_level(score, size)
        else:
            level, strict = self._level(score, heat)
            mask = (heat > level) if strict else (heat >= level)
            mask = mask & (heat.min() < heat.max())
        part = largest_component(mask)
        box = mask_box(part)
        if box is None:
            return Found(heat, None, 0.0, dict.fromkeys(SIGNS, 0.0), np.zeros(len(features)))
        signs = signs_of(heat, mask, part, level)
        return Found(heat, box, confidence_of(signs), signs, _descriptor(features, heat))

    def _level(self, score: Maps, heat: Maps) -> tuple[float, bool]:
        """The cut, and whether what lies exactly on it is outside."""
        if self.rule == "zero":
            return zero_level(score, (heat.shape[0], heat.shape[1])), True
        assert self.rule is not None
        return threshold_of(heat, self.rule), self.rule == "mean"


def default_rule(method: Method, model: FrozenMap | ContrastiveCAM) -> Rule:
    """The cut that suits a method: measured for keys, its own boundary or the literature's for the others.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> keys = FrozenMap("vit", img_size=32, blocks=(0,), backbone_options=tiny)
        >>> default_rule("ddt", keys), default_rule("region", keys), default_rule("scda", keys)
        (0.5, 0.5, 'mean')
    """
    if method in ("ddt", "region"):
        return 0.5 if isinstance(model, FrozenMap) and model.blocks else "zero"
    if method == "model" and isinstance(model, FrozenMap) and model.positive:
        return "zero"
    rules: dict[str, Rule] = {"ddt+": "zero", "scda": "mean", "mean": 0.2, "lost": "zero"}
    return rules.get(method, model.threshold)


def default_turns(model: FrozenMap) -> float:
    """The weight of equivariance that suits the features of a region unit, measured as its cut was.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> default_turns(FrozenMap("vit", img_size=32, blocks=(0,), backbone_options=tiny))
        3.0
    """
    return 3.0 if model.blocks else 1.0


def _descriptor(features: Maps, heat: Maps) -> NDArray[np.float64]:
    """Mean feature of what is bright, of length 1."""
    h, w = features.shape[1:]
    rows, columns = ((np.arange(new) * old + old // 2) // new for new, old in zip((h, w), heat.shape))
    weight = heat[np.ix_(rows, columns)]
    mean = (features * weight).sum(axis=(1, 2))
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


# --- Confidence ------------------------------------------------------------------------------------

DOUBTFUL = 0.85
"""Boxes of less confidence are worth a look: with the default method 7 to 27 % of them on five folders of photos, among
which an IoU of 0.7 was reached by 50 to 77 %, of the others by 80 to 98 %. See :func:`doubtful`."""
MOST_DOUBTFUL = 0.25
"""Share of a folder that is called doubtful at most: other methods and networks are less sure of everything."""

SIGNS = ("stability", "contrast", "whole")
"""What a confidence is made of; see :func:`signs_of`."""


def doubtful(confidence: ArrayLike) -> NDArray[np.bool_]:
    """Which boxes of a folder are worth a look: those below :data:`DOUBTFUL`, the least sure quarter at most.

    A photo without a box is always one of them.

    Args:
        confidence: ``(n,)`` in ``[0, 1]``, 0 without a box.

    Returns:
        ``(n,)``.

    Example:
        >>> doubtful([0.9, 0.8, 0.95, 0.0]).tolist(), doubtful([0.5, 0.6, 0.7, 0.8]).tolist()
        ([False, False, False, True], [True, False, False, False])
    """
    values = np.asarray(confidence, dtype=np.float64)
    level = min(DOUBTFUL, float(np.quantile(values, MOST_DOUBTFUL))) if values.size else DOUBTFUL
    return (values < level) | (values == 0)


def signs_of(heat: Maps, mask: NDArray[np.bool_], part: NDArray[np.bool_], level: float) -> dict[str, float]:
    """What in a heat map speaks for its box, each in ``[0, 1]``; no labels are needed.

    - ``stability``: how well the boxes of a cut a tenth of the range lower and higher agree with the box (IoU, mean);
    - ``contrast``: share of the map's variance that the mask explains, 1 where it has only two values;
    - ``whole``: share of the mask that lies in its largest component, 1 for one object in one piece.

    Args:
        heat: ``(H, W)`` in ``[0, 1]``.
        mask: ``(H, W)``, what is above the cut.
        part: ``(H, W)``, its largest component, not empty.
        level: the cut.

    Example:
        >>> heat = np.zeros((8, 8))
        >>> heat[2:6, 2:6] = 1.0
        >>> signs_of(heat, heat > 0.5, heat > 0.5, 0.5)
        {'stability': 1.0, 'contrast': 1.0, 'whole': 1.0}
    """
    box = mask_box(part)
    assert box is not None
    near = [
        mask_box(largest_component(heat >= cut)) for cut in (level - _STEP, level + _STEP) if 0 < cut <= 1
    ]
    overlaps = [
        0.0 if other is None else box_iou(other[None], box[None], "continuous").item() for other in near
    ]
    inside = float(mask.mean())
    variance = float(heat.var())
    gap = float(heat[mask].mean() - heat[~mask].mean()) if 0 < inside < 1 else 0.0
    return {
        "stability": float(np.mean(overlaps)),
        "contrast": min(inside * (1 - inside) * gap**2 / variance, 1.0) if variance > 0 else 0.0,
        "whole": float(part.sum() / mask.sum()),
    }


def confidence_of(signs: dict[str, float]) -> float:
    """One number in ``[0, 1]`` from :func:`signs_of`: their geometric mean, low as soon as one is.

    Example:
        >>> confidence_of({"stability": 1.0, "contrast": 0.125, "whole": 1.0})
        0.5
    """
    return float(np.prod(list(signs.values())) ** (1 / len(signs)))
