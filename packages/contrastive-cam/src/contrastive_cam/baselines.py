r"""Localization without training, on the features of any pretrained network: SCDA, DDT, DDT+ and LOST.

What a trained map has to beat. SCDA takes one photo by itself; DDT asks what all photos of a folder have in common:
its map is the first principal component of their descriptors. Its mean and covariance are added up photo by photo, so
that a folder of any size fits. LOST grows a seed on the keys of a vision transformer. The plain mean of the channels
is :func:`contrastive_cam.caam`.

References:
    Wei et al., "Selective Convolutional Descriptor Aggregation", IEEE TIP 2017 (SCDA); "Unsupervised Object Discovery
    and Co-Localization by Deep Descriptor Transforming", Pattern Recognition 2019 (DDT); Siméoni et al., "Localizing
    Objects with Self-Supervised Transformers and no Labels", BMVC 2021 (LOST).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from attnmap_core.backbones import AttentionTap, Backbone
from attnmap_core.errors import InputError
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from .inference import Boxes, largest_component, mask_box

Maps = NDArray[np.float64]
Sign = Literal["center", "largest"]


# --- Features --------------------------------------------------------------------------------------


def layer_maps(backbone: Backbone, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Outputs of inner layers of a network, in one pass.

    Args:
        backbone: any whose layers give maps.
        images: ``(b, 3, H, W)``, normalised.
        layers: names of modules of the timm network, such as ``"blocks.5"`` (MobileNetV2) or ``"features.34"``.

    Returns:
        ``(b, c, h, w)`` each.

    Raises:
        InputError: for a name that the network does not have, or whose output is not a map.

    Example:
        >>> from attnmap_core.backbones import create_backbone
        >>> net = create_backbone("resnet10t", img_size=64)
        >>> [tuple(maps.shape) for maps in layer_maps(net, torch.zeros(1, 3, 64, 64), ["layer2", "layer4"])]
        [(1, 128, 8, 8), (1, 512, 2, 2)]
    """
    modules = dict(backbone.model.named_modules())
    for name in layers:
        if not name or name not in modules:
            known = ", ".join(key for key in modules if key and key.count(".") < 2)[:200]
            raise InputError(f"layer {name!r}: {backbone.name} has none of that name; it has {known} ...")
    kept: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: kept.__setitem__(name, output)

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if not isinstance(kept.get(name), Tensor) or kept[name].ndim != 4:
            raise InputError(
                f"layer {name!r} of {backbone.name} gives no feature map (b, c, h, w); name another"
            )
    return [kept[name] for name in layers]


def key_maps(backbone: Backbone, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Keys of the patches in the attention of transformer blocks, all heads joined.

    Args:
        backbone: a ViT.
        images: ``(b, 3, H, W)``, normalised.
        blocks: indices, negative from the end.

    Returns:
        ``(b, c, h, w)`` each, in the order of the blocks in the network.

    Raises:
        ValueError: as :class:`attnmap_core.backbones.AttentionTap`.

    Example:
        >>> from attnmap_core.backbones import create_backbone
        >>> vit = create_backbone("vit", img_size=(16, 24), patch_size=8, embed_dim=12, depth=2, num_heads=3)
        >>> [tuple(keys.shape) for keys in key_maps(vit, torch.zeros(1, 3, 16, 24), [0, 1])]
        [(1, 12, 2, 3), (1, 12, 2, 3)]
    """
    query = "cls" if backbone.num_prefix_tokens else "avg"
    with AttentionTap(backbone, blocks=blocks, query=query, keep_keys=True) as tap:
        h, w = backbone(images).grid
        found = tap.pop().queries_and_keys()
    maps: list[Tensor] = []
    for _, keys in found:
        patches = keys[:, :, backbone.num_prefix_tokens :]  # (b, heads, n, d)
        maps.append(patches.transpose(2, 3).flatten(1, 2).unflatten(2, (h, w)))
    return maps


def unit_joined(maps: Sequence[Tensor], *, unit: bool = True) -> Tensor:
    """Maps of several layers as one, each descriptor at first scaled to unit length.

    Raw tokens of a ViT are ruled by one outlying direction; at unit length they are not.

    Args:
        maps: ``(b, c, h, w)`` each; smaller grids are enlarged bilinearly to that of the first.
        unit: whether to scale.

    Returns:
        ``(b, sum of c, h, w)``.

    Example:
        >>> unit_joined([torch.full((1, 4, 1, 1), 3.0), torch.zeros(1, 1, 1, 1)]).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5, 0.0]
    """
    parts = [functional.normalize(part, dim=1) if unit else part for part in maps]
    size = parts[0].shape[2:]
    return torch.cat(
        [
            part if part.shape[2:] == size else functional.interpolate(part, list(size), mode="bilinear")
            for part in parts
        ],
        dim=1,
    )


# --- One photo by itself ---------------------------------------------------------------------------


def scda_map(features: Tensor) -> Tensor:
    """SCDA's aggregation map, the sum over channels ``(b, h, w)`` of ``features (b, c, h, w)``; in float32 at least.

    Example:
        >>> scda_map(torch.ones(1, 3, 1, 2))
        tensor([[[3., 3.]]])
    """
    return features.sum(dim=1, dtype=torch.promote_types(features.dtype, torch.float32))


def scda_mask(score_map: ArrayLike) -> NDArray[np.bool_]:
    """SCDA's mask on the grid of the features: the largest 8-connected component strictly above the mean.

    Args:
        score_map: ``(h, w)``, of :func:`scda_map`.

    Example:
        >>> scda_mask([[5.0, 0.0, 4.0], [0.0, 5.0, 0.0]]).astype(int).tolist()
        [[1, 0, 1], [0, 1, 0]]
    """
    values = np.asarray(score_map, dtype=np.float64)
    return largest_component(values > values.mean())


# --- What photos have in common --------------------------------------------------------------------


class DDT(NamedTuple):
    """Deep descriptor transformation; see :class:`DescriptorStatistics`.

    Attributes:
        mean: ``(c,)`` float64, of all descriptors.
        component: ``(c,)`` float64 of length 1, the first principal component.
        eigenvalue: variance along it (divided by N - 1).
        explained: share of the variance of all descriptors that it has, in ``[0, 1]``.
    """

    mean: Tensor
    component: Tensor
    eigenvalue: float
    explained: float

    def __call__(self, features: Tensor) -> Tensor:
        """The indicator maps ``(b, h, w)`` of ``features (b, c, h, w)``: above 0 where the common object is."""
        component = self.component.to(features)
        offset = (self.component @ self.mean).to(features)
        return torch.einsum("bchw,c->bhw", features, component) - offset


class DescriptorStatistics:
    r"""Mean and covariance of the descriptors of any number of photos, and DDT from them.

    .. math:: P(p) = \xi^\top (f(p) - \mu)

    with :math:`\xi` the unit eigenvector of the largest eigenvalue of the covariance of the descriptors f at all
    positions of all photos. Photos may have grids of different sizes. Sums are kept in float64, about the mean of the
    first batch.

    Args:
        channels: c.

    Attributes:
        photos: seen so far.

    Example:
        >>> features = torch.zeros(2, 3, 4, 4)
        >>> features[:, 1, 1:3, 1:3] = 5.0  # what both photos have, in their middle
        >>> statistics = DescriptorStatistics(3)
        >>> statistics.add(features)
        >>> ddt = statistics.fit()
        >>> (ddt(features)[0] > 0).int().tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """

    def __init__(self, channels: int) -> None:
        self.photos = 0
        self._shift: Tensor | None = None
        self._count = torch.zeros(2, dtype=torch.float64)  # central, other positions
        self._sum = torch.zeros(2, channels, dtype=torch.float64)
        self._square = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take the descriptors of ``features (b, c, h, w)``.

        Raises:
            ValueError: for another number of channels.
        """
        if features.ndim != 4 or features.shape[1] != len(self._square):
            raise ValueError(f"features must be (b, {len(self._square)}, h, w), got {tuple(features.shape)}")
        rows = features.detach().flatten(2).transpose(1, 2).cpu().double()  # (b, n, c)
        if self._shift is None:
            self._shift = rows.mean((0, 1))
        rows = rows - self._shift
        central = central_cells(features.shape[2], features.shape[3])
        for part, where in enumerate((central, ~central)):
            self._count[part] += len(rows) * int(where.sum())
            self._sum[part] += rows[:, where].sum((0, 1))
        flat = rows.flatten(0, 1)
        self._square += flat.T @ flat
        self.photos += len(features)

    def fit(self, sign: Sign = "center") -> DDT:
        """The transformation of all photos so far.

        Args:
            sign: which way the component points, which its eigenvector leaves open and which decides everything:
                ``"center"`` its mean map is larger in the central half of each side than outside; ``"largest"`` its
                entry of largest magnitude is positive, as the authors' code has it.

        Raises:
            ValueError: for another sign, or without two descriptors.
        """
        if sign not in ("center", "largest"):
            raise ValueError(f"sign must be center or largest, got {sign!r}")
        count = self._count.sum()
        if self._shift is None or count < 2:
            raise ValueError(f"DDT needs two descriptors or more, got {int(count)}")
        mean = self._sum.sum(0) / count
        covariance = (self._square - count * torch.outer(mean, mean)) / (count - 1)
        eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        component = vectors[:, -1]
        largest = component[component.abs().argmax()]
        if sign == "center" and bool((self._count > 0).all()):
            inside, outside = self._sum / self._count.unsqueeze(1)
            contrast = component @ (inside - outside)
            largest = contrast if contrast != 0 else largest
        component = component * torch.where(largest < 0, -1.0, 1.0)
        total = float(eigenvalues.clamp_min(0).sum())
        variance = max(float(eigenvalues[-1]), 0.0)
        return DDT(self._shift + mean, component, variance, variance / total if total > 0 else 0.0)


def central_cells(h: int, w: int) -> Tensor:
    """Which of the cells of a grid have their middle in the central half of both sides: ``(h w,)``, row-major.

    Example:
        >>> central_cells(1, 4).tolist()
        [False, True, True, False]
    """
    rows, columns = (((torch.arange(side) + 0.5) / side - 0.5).abs() < 0.25 for side in (h, w))
    return (rows.unsqueeze(1) & columns).flatten()


def ddt_mask(score_map: ArrayLike) -> NDArray[np.bool_]:
    """DDT's mask on the grid of the features: the largest 8-connected component above 0.

    Args:
        score_map: ``(h, w)``, of :class:`DDT`; without a positive value there is no object.

    Example:
        >>> ddt_mask([[-1.0, 2.0], [-1.0, -1.0]]).astype(int).tolist()
        [[0, 1], [0, 0]]
    """
    return largest_component(np.asarray(score_map) > 0)


def ddt_plus_mask(score_map: ArrayLike, other: ArrayLike) -> NDArray[np.bool_]:
    """DDT+: what the maps of two layers agree on, on the grid of the first.

    The other layer's mask, its largest component, is brought to the grid of the first by nearest neighbour; of the
    cells above 0 in both the largest 8-connected component is kept. Where they share nothing, the first decides.

    Args:
        score_map: ``(h, w)`` of the deeper layer.
        other: ``(h', w')`` of another.

    Example:
        >>> ddt_plus_mask([[1.0, 1.0, -1.0]], [[-1.0, 2.0, 2.0]]).astype(int).tolist()
        [[0, 1, 0]]
    """
    first, second = np.asarray(score_map), ddt_mask(other)
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(first.shape, second.shape)
    )
    both = (first > 0) & second[np.ix_(rows, columns)]
    return largest_component(both if both.any() else first > 0)


# --- Seeds -----------------------------------------------------------------------------------------


class Lost(NamedTuple):
    """What LOST finds in one photo; see :func:`lost`.

    Attributes:
        seed: ``(row, column)`` of the patch that is least like the others.
        score_map: ``(h, w)``, summed likeness to the seeds: above 0 in the mask.
        mask: ``(h, w)``, the component of the mask that holds the seed.
    """

    seed: tuple[int, int]
    score_map: Maps
    mask: NDArray[np.bool_]


def lost(features: ArrayLike, seeds: int = 100) -> Lost:
    r"""Grow an object from the patch that resembles the fewest others.

    With :math:`d_p` the number of patches q whose product :math:`f_p \cdot f_q` is not negative, the seed is the patch
    of least degree. Of the ``seeds`` patches of least degree those that resemble it vote: a patch belongs to the object
    if the sum of its products with them is not negative, and hangs together with the seed (4-connected, as released).

    Args:
        features: ``(c, h, w)``, keys of the last block of a ViT; subtract the folder's mean first to tell objects
            from what all photos show.
        seeds: of how many patches of least degree voters are taken.

    Raises:
        ValueError: for another shape, or no seeds.

    Example:
        >>> features = np.full((2, 3, 4), [[[-1.0]], [[0.5]]])
        >>> features[:, 1, 1:3] = [[2.0], [-1.0]]
        >>> lost(features).mask.astype(int).tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    from scipy import ndimage

    F = np.asarray(features, dtype=np.float64)
    if F.ndim != 3 or 0 in F.shape or seeds < 1:
        raise ValueError(f"features must be (c, h, w) and seeds 1 or more, got {F.shape} and {seeds}")
    c, h, w = F.shape
    rows = F.reshape(c, -1).T
    products = rows @ rows.T
    order = np.argsort((products >= 0).sum(axis=1), kind="stable")
    seed = int(order[0])
    voters = [int(q) for q in order[:seeds] if products[q, seed] >= 0] or [seed]
    score = products[:, voters].sum(axis=1).reshape(h, w)
    found: Any = ndimage.label(score >= 0)
    labels = found[0]
    place = (seed // w, seed % w)
    mask = labels == labels[place] if labels[place] else np.zeros((h, w), dtype=bool)
    mask[place] = True
    return Lost(place, score, mask)


# --- Boxes -----------------------------------------------------------------------------------------


def grid_box(mask: ArrayLike, size_wh: tuple[int, int]) -> Boxes | None:
    """Box of a mask on the grid of the features, enlarged to the photo by nearest neighbour.

    Args:
        mask: ``(h, w)``.
        size_wh: width and height of the photo.

    Returns:
        ``(4,)`` xyxy pixels, end exclusive; None for an empty mask.

    Example:
        >>> grid_box([[0, 1], [0, 0]], (100, 60)).tolist()
        [50.0, 0.0, 100.0, 30.0]
    """
    box = mask_box(mask)
    if box is None:
        return None
    h, w = np.asarray(mask).shape
    return box * np.tile([size_wh[0] / w, size_wh[1] / h], 2)


def zero_level(score_map: ArrayLike, size: tuple[int, int] = (224, 224)) -> float:
    """Where 0 of a signed map lies in its heat map, which :func:`~contrastive_cam.inference.heat_map` stretches.

    Args:
        score_map: ``(h, w)``, any sign.
        size: ``(height, width)`` of the heat map.

    Returns:
        A number in ``[0, 1]``: 0 where nothing is below 0, 1 where nothing is above.

    Example:
        >>> zero_level([[-1.0, 3.0]], (1, 2))
        0.25
    """
    values = np.asarray(score_map, dtype=np.float64)
    low, high = values.min(), values.max()
    if high <= 0 or low >= 0 or low == high:
        return float(high <= 0 and low < 0)
    raw = functional.interpolate(torch.from_numpy(values)[None, None], list(size), mode="bilinear")
    bottom, top = (
        float(raw.min()),
        float(raw.max()),
    )  # enlarging may cut the ends that stretching then restores
    return float(np.clip(-bottom / (top - bottom), 0, 1))
