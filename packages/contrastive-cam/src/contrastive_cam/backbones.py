"""The backbones of the papers: timm's networks, with the last stage at the resolution of the one before.

PsyNet (its released code) sets the stride of the last stage of SE-ResNet50 and ResNet50 from 2 to 1, and lets the last
two poolings of VGG keep the size. Pretrained weights load unchanged, since no weight changes its shape.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from attnmap_core.backbones import Backbone, create_backbone
from attnmap_core.errors import InputError
from torch import Tensor, nn

LastStage = Literal["stride1", "dilated", "timm"]
Feature = Literal["post_relu", "pre_relu"]

FIRST_CELL = {"SENet": 2.0, "ResNet": 0.0, "VGG": 3.5}
"""Pixel on which the receptive field of the first cell is centred, by class of network; 0 is the centre of pixel 0."""


def colocalization_backbone(
    name: str,
    img_size: tuple[int, int] = (224, 224),
    *,
    last_stage: LastStage = "stride1",
    feature: Feature = "post_relu",
    pretrained: bool = False,
    weights: str | Path | None = None,
    **options: Any,
) -> Backbone:
    """A backbone whose map is as fine as the papers' (14 x 14 of 224 pixels; VGG 28 x 28).

    Args:
        name: any timm name, or ``"vit"``; see :func:`attnmap_core.backbones.create_backbone`.
        img_size: ``(height, width)`` in pixels.
        last_stage: of SE-ResNets, ResNets and VGGs: ``"stride1"`` as PsyNet; ``"dilated"`` (not VGG) spreads the 3x3
            kernels besides, so that they see what they saw in pretraining; ``"timm"`` leaves the network alone. Other
            networks are left alone, and take what timm offers by ``options``, such as ``output_stride=16``.
        feature: ``"pre_relu"`` leaves the last ReLU out; of ResNets, SE-ResNets and VGGs.
        pretrained: download timm's weights.
        weights: local file of weights instead.
        **options: passed on.

    Returns:
        The backbone; VGG with batch norm has momentum 0.001, as in the released code.

    Raises:
        InputError: for a network that does not have what is asked for, or as ``create_backbone``.

    Example:
        >>> net = colocalization_backbone("resnet10t", (64, 64))
        >>> net(torch.zeros(1, 3, 64, 64)).grid, net.stride
        ((4, 4), (16, 16))
    """
    if last_stage not in ("stride1", "dilated", "timm"):
        raise ValueError(f"last_stage must be stride1, dilated or timm, got {last_stage!r}")
    if feature not in ("post_relu", "pre_relu"):
        raise ValueError(f"feature must be post_relu or pre_relu, got {feature!r}")
    backbone = create_backbone(name, img_size=img_size, pretrained=pretrained, weights=weights, **options)
    net: Any = backbone.model
    kind = type(net).__name__
    before = backbone.grid()
    if last_stage != "timm" and kind in ("SENet", "ResNet"):
        _open_last_stage(net.layer4, dilated=last_stage == "dilated", name=name)
    elif last_stage != "timm" and kind == "VGG":
        if last_stage == "dilated":
            raise InputError(f"last_stage=dilated: {name} has no strided convolution; use stride1")
        _keep_size(net.features)
    after = backbone.grid()
    backbone.stride = (
        backbone.stride[0] * before[0] // after[0],
        backbone.stride[1] * before[1] // after[1],
    )
    if kind == "VGG":
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.001
    if feature == "pre_relu":
        _drop_last_relu(net, name)
    return backbone


def _open_last_stage(stage: nn.Module, *, dilated: bool, name: str) -> None:
    strided = 0
    for module in stage.modules():
        stride: Any = getattr(module, "stride", 1)
        if isinstance(module, nn.Conv2d):
            if module.stride != (1, 1):
                module.stride, strided = (1, 1), strided + 1
            elif dilated and module.kernel_size == (3, 3):  # what came after the stride
                module.dilation = module.padding = (2, 2)
        elif stride not in (1, (1, 1)) and not list(module.children()):
            if not isinstance(module, nn.AvgPool2d):
                raise InputError(
                    f"{name}: a {type(module).__name__} halves its last stage, which cannot be undone; "
                    "use last_stage=timm"
                )
            module.kernel_size = module.stride = (1, 1)  # pooling of a shortcut: nothing left to average
            strided += 1
    if not strided:
        raise InputError(f"{name}: its last stage has stride 1 already; use last_stage=timm")


def _keep_size(features: nn.Sequential) -> None:
    pools = [i for i, module in enumerate(features) if isinstance(module, nn.MaxPool2d)]
    for i in pools[3:]:
        features[i] = nn.MaxPool2d(3, stride=1, padding=1)


def _drop_last_relu(net: Any, name: str) -> None:
    kind = type(net).__name__
    if kind == "VGG":
        last = [i for i, module in enumerate(net.features) if isinstance(module, nn.ReLU)][-1]
        net.features[last] = nn.Identity()
    elif kind == "ResNet":
        block = net.layer4[-1]
        setattr(block, "act3" if hasattr(block, "act3") else "act2", nn.Identity())
    elif kind == "SENet" and type(net.layer4[-1]).__name__ == "SEResNetBottleneck":
        net.layer4[-1].__class__ = _bottleneck_before_relu()  # its one ReLU module serves three places
    else:
        raise InputError(f"feature=pre_relu: {name} has no last ReLU that can be left out; use post_relu")


@cache
def _bottleneck_before_relu() -> type[nn.Module]:
    from timm.models.senet import SEResNetBottleneck

    class BottleneckBeforeReLU(SEResNetBottleneck):
        def forward(self, x: Tensor) -> Tensor:
            net: Any = self
            out = net.relu(net.bn1(net.conv1(x)))
            out = net.relu(net.bn2(net.conv2(out)))
            out = net.se_module(net.bn3(net.conv3(out)))
            return out + (x if net.downsample is None else net.downsample(x))

    return BottleneckBeforeReLU


def first_cell(backbone: Backbone) -> tuple[float, float]:
    """``(vertical, horizontal)`` pixel on which the receptive field of the map's first cell is centred.

    Upsampling assumes ``(stride - 1) / 2``, which holds for patches and VGG; SE-ResNet50 sees 5.5 pixels further up and
    left, so that its heat maps sit that much too far down and right.

    Raises:
        InputError: if it is not known for this network.

    Example:
        >>> first_cell(colocalization_backbone("resnet10t", (64, 64)))
        (0.0, 0.0)
    """
    kind = type(backbone.model).__name__
    if kind in FIRST_CELL:
        return FIRST_CELL[kind], FIRST_CELL[kind]
    if hasattr(backbone.model, "patch_embed"):
        return (backbone.stride[0] - 1) / 2, (backbone.stride[1] - 1) / 2
    raise InputError(f"map_offset=receptive_field: not known for {backbone.name}; use geometric")


def receptive_shift(backbone: Backbone) -> tuple[float, float]:
    """How many cells the map of a backbone lies too far ``(down, right)`` when its cells are taken as a plain grid.

    Example:
        >>> receptive_shift(colocalization_backbone("resnet10t", (64, 64)))
        (0.46875, 0.46875)
    """
    shifts = (
        ((stride - 1) / 2 - first) / stride for stride, first in zip(backbone.stride, first_cell(backbone))
    )
    vertical, horizontal = shifts
    return vertical, horizontal


def shifted_upsampling(maps: Tensor, size: tuple[int, int], shift: tuple[float, float]) -> Tensor:
    """Enlarge maps bilinearly, edges repeated, and move them up and left by ``shift`` cells.

    Args:
        maps: ``(b, h, w)``.
        size: ``(H, W)``.
        shift: ``(down, right)`` in cells, of :func:`receptive_shift`.

    Returns:
        ``(b, H, W)``.

    Example:
        >>> shifted_upsampling(torch.tensor([[[0.0, 1.0, 0.0]]]), (1, 3), (0.0, 0.5))
        tensor([[[0.5000, 0.5000, 0.0000]]])
    """
    rows, columns = (
        _resize(cells, pixels, by).to(maps)
        for cells, pixels, by in zip((maps.shape[1], maps.shape[2]), size, shift)
    )
    return rows @ maps @ columns.T


def _resize(cells: int, pixels: int, shift: float) -> Tensor:
    """``(pixels, cells)`` weights of bilinear interpolation."""
    centre = (torch.arange(pixels, dtype=torch.float64) + 0.5) * cells / pixels - 0.5 + shift
    distance = centre.clamp(0, cells - 1).unsqueeze(1) - torch.arange(cells, dtype=torch.float64)
    return (1 - distance.abs()).clamp_min(0)
