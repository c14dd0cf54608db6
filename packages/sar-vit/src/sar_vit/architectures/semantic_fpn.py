r"""Semantic FPN: a feature pyramid whose levels are brought to stride 4, added and classified per pixel.

Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, section 3.2, over the pyramid of Lin et al.,
"Feature Pyramid Networks for Object Detection", CVPR 2017, with the sizes that Wang et al., "Pyramid Vision
Transformer", ICCV 2021, use on ADE20K.

Own code under the licence of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .pvt import PyramidVisionTransformer


class ConvLayer(nn.Module):
    """A convolution, alone with its bias, or followed by BatchNorm and ReLU.

    Args:
        in_chans: channels that come in.
        out_chans: channels that go out.
        kernel: odd side of the window; the map keeps its size.
        norm: whether BatchNorm and ReLU follow.
    """

    def __init__(self, in_chans: int, out_chans: int, kernel: int, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, padding=kernel // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(out_chans)
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]  # there is one without norm
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """A map ``(b, c, h, w)`` to a map of the same size."""
        x = self.conv(x)
        return functional.relu(self.bn(x)) if self.norm else x


class FPN(nn.Module):
    """Feature pyramid: from the coarsest level down, each level gets the one above, enlarged, added.

    Args:
        in_channels: channels of each level, finest first.
        channels: of all levels that come out.

    Example:
        >>> maps = [torch.zeros(1, 4, 8, 8), torch.zeros(1, 6, 4, 4)]
        >>> [tuple(level.shape) for level in FPN((4, 6), 5)(maps)]
        [(1, 5, 8, 8), (1, 5, 4, 4)]
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvLayer(c, channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(ConvLayer(channels, channels, 3) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``(b, c, h, w)``, finest first, to as many maps ``(b, channels, h, w)``."""
        levels = [lateral(feature) for lateral, feature in zip(self.lateral_convs, features)]
        for i in range(len(levels) - 1, 0, -1):
            above = functional.interpolate(levels[i], size=levels[i - 1].shape[2:], mode="nearest")
            levels[i - 1] = levels[i - 1] + above
        return [conv(level) for conv, level in zip(self.fpn_convs, levels)]


class SemanticHead(nn.Module):
    """Each level: convolutions with BatchNorm, each but at stride 4 followed by doubling; sum; classifier.

    Args:
        in_channels: of all levels.
        num_levels: levels of strides 4, 8, 16 and so on.
        num_classes: classes.
        channels: after the first convolution.
        dropout: probability of dropping a channel before the classifier.

    Example:
        >>> levels = [torch.zeros(1, 5, 8, 8), torch.zeros(1, 5, 4, 4)]
        >>> SemanticHead(5, 2, num_classes=3, channels=4).eval()(levels).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self, in_channels: int, num_levels: int, num_classes: int, channels: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for doublings in range(num_levels):
            layers: list[nn.Module] = []
            for j in range(max(doublings, 1)):
                layers.append(ConvLayer(channels if j else in_channels, channels, 3, norm=True))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Maps ``(b, c, h, w)``, finest first, to logits ``(b, num_classes, h, w)`` at the finest."""
        size = levels[0].shape[2:]
        total = torch.zeros((), device=levels[0].device, dtype=levels[0].dtype)
        for head, level in zip(self.scale_heads, levels):
            total = total + _resize(head(level), size)  # odd sizes are a pixel off after doubling
        return self.conv_seg(self.dropout(total))


class SemanticFPN(nn.Module):
    """A dense PVT with pyramid and head: per-pixel class scores.

    The modules are named as in the published segmentation checkpoints: ``backbone``, ``neck``,
    ``decode_head``. Batch norms are plain; several processes convert them by
    :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` before they wrap the model.

    Args:
        backbone: made with ``dense=True``.
        num_classes: classes; 150 for ADE20K, whose label 0 is not one of them.
        neck_channels: of the pyramid.
        head_channels: of the head.
        dropout: before the classifier.

    Raises:
        ValueError: if the backbone gives logits.

    Example:
        >>> backbone = PyramidVisionTransformer(
        ...     img_size=32, embed_dims=(4, 4, 4, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2), dense=True)
        >>> model = SemanticFPN(backbone, num_classes=5, neck_channels=8, head_channels=4).eval()
        >>> images = torch.zeros(1, 3, 32, 64)
        >>> model(images).shape, model.logits(images).shape
        (torch.Size([1, 5, 32, 64]), torch.Size([1, 5, 8, 16]))
    """

    def __init__(
        self,
        backbone: PyramidVisionTransformer,
        num_classes: int = 150,
        *,
        neck_channels: int = 256,
        head_channels: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not backbone.dense:
            raise ValueError("the backbone gives logits; create it with dense=True")
        self.num_classes = num_classes
        self.backbone = backbone
        self.neck = FPN(backbone.embed_dims, neck_channels)
        self.decode_head = SemanticHead(
            neck_channels, len(backbone.embed_dims), num_classes, head_channels, dropout
        )

    def logits(self, x: Tensor) -> Tensor:
        """Scores ``(b, num_classes, H / 4, W / 4)`` of images ``(b, 3, H, W)``."""
        return self.decode_head(self.neck(self.backbone.forward_dense(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(b, num_classes, H, W)`` of images ``(b, 3, H, W)``, enlarged bilinearly."""
        return _resize(self.logits(x), x.shape[2:])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass to save memory."""
        self.backbone.set_grad_checkpointing(enable)


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = 255,
    mean_over: Literal["valid", "all"] = "valid",
) -> Tensor:
    """Cross entropy per pixel, of logits enlarged bilinearly to the labels, in float32 or wider.

    Args:
        logits: ``(b, c, h, w)``.
        labels: ``(b, H, W)`` integer classes.
        ignore_index: label of pixels that do not count.
        mean_over: ``"valid"`` divides by the pixels that count, ``"all"`` by ``b H W``, which weighs crops
            with padding less.

    Returns:
        A scalar, 0 or more; 0 with zero gradients if no pixel counts.

    Raises:
        ValueError: if the batches differ, or ``mean_over`` is something else.

    Example:
        >>> labels = torch.tensor([[[0, 255], [1, 1]]])
        >>> round(segmentation_loss(torch.zeros(1, 2, 2, 2), labels).item(), 4)  # log 2
        0.6931
        >>> round(segmentation_loss(torch.zeros(1, 2, 2, 2), labels, mean_over="all").item(), 4)
        0.5199
    """
    if labels.ndim != 3 or len(labels) != len(logits):
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    if mean_over not in ("valid", "all"):
        raise ValueError(f"mean_over must be valid or all, got {mean_over!r}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = functional.cross_entropy(
        _resize(wide, labels.shape[1:]), labels.long(), ignore_index=ignore_index, reduction="sum"
    )
    counting = (labels != ignore_index) if mean_over == "valid" else torch.ones_like(labels)
    return total / counting.sum().clamp(min=1)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
