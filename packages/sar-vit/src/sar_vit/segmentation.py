"""SARSegmenter: Semantic FPN on a backbone that was trained with SAR, for class maps of photos (Table 12)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from attnmap_core.backbones import create_backbone, evaluating, mismatched_keys
from attnmap_core.data.images import load_image
from attnmap_core.errors import InputError
from attnmap_core.hub import Photo, PretrainedModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from .architectures import ARCHITECTURES, create_architecture, load_published
from .architectures.semantic_fpn import SemanticFPN
from .model import SARViT
from .segmentation_data import SegmentationInput
from .surgery import apply_sar

_STRIDES = (4, 8, 16, 32)
_MOST = 255  # classes that uint8 can name beside the number for pixels to ignore


class SARSegmenter(
    PretrainedModel,
    license="apache-2.0",
    tags=["vision-transformer", "semantic-segmentation", "sar-vit"],
    pipeline_tag="image-segmentation",
    paper_url="https://arxiv.org/abs/2206.04636",
):
    """Semantic FPN on the maps of all stages of a backbone, whose last block keeps the form it was trained in.

    There is no class token: it and its position are left out, and so is the spatial entropy loss. Weights are named as
    in published checkpoints: ``backbone``, ``neck``, ``decode_head``.

    Args:
        backbone: a PVT of :data:`sar_vit.architectures.ARCHITECTURES`, or a timm network with maps of strides 4, 8, 16
            and 32, such as pvt_v2_b2, a Swin or a ResNet.
        num_classes: up to 255.
        img_size: pixels that position tables are made for; the network takes any multiples of 32.
        msa_skip: skip connection around the last attention; SAR has none.
        mlp_norm: norm before the last MLP; SAR has none.
        mlp_skip: skip connection around the last MLP.
        drop_path_rate: largest stochastic depth rate, growing linearly over the blocks; training only.
        neck_channels: of the pyramid.
        head_channels: of the head.
        head_dropout: before the classifier; training only.
        short_side: photos are resized to this shorter side; see :class:`~sar_vit.segmentation_data.SegmentationInput`.
        mean: of the normalisation.
        std: likewise.
        labels: class names in the order of the classes.
        pretrained: download timm's weights for the backbone.
        weights: local file of backbone weights instead, such as a release of PVT's authors.
        new_surgery: let these be of another form of the last block.
        backbone_options: of the backbone.

    Raises:
        InputError: if the backbone is unknown or gives no such maps, or weights do not fit.

    Example:
        >>> tiny = {"embed_dims": (4, 4, 4, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 2)}
        >>> model = SARSegmenter("pvt_small", 5, neck_channels=8, head_channels=4, short_side=64, backbone_options=tiny)
        >>> model(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 5, 16, 24])
        >>> model.predict(Image.new("RGB", (50, 40))).shape
        (40, 50)
    """

    def __init__(
        self,
        backbone: str = "pvt_small",
        num_classes: int = 150,
        img_size: int | Sequence[int] = 224,
        *,
        msa_skip: bool = False,
        mlp_norm: bool = False,
        mlp_skip: bool = True,
        drop_path_rate: float = 0.1,
        neck_channels: int = 256,
        head_channels: int = 128,
        head_dropout: float = 0.1,
        short_side: int = 512,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        labels: Sequence[str] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        new_surgery: bool = False,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_classes <= _MOST:
            raise ValueError(f"num_classes must be 1 to {_MOST}, got {num_classes}")
        if labels is not None and len(labels) != num_classes:
            raise ValueError(f"{len(labels)} labels do not fit num_classes {num_classes}")
        self.arch, self.num_classes = backbone, num_classes
        self.to_input = SegmentationInput(short_side, mean=mean, std=std)
        switches = {"msa_skip": msa_skip, "mlp_norm": mlp_norm, "mlp_skip": mlp_skip}
        if pretrained and not all(switches.values()) and not new_surgery:
            raise InputError(
                "pretrained=True: timm's weights are of a standard last block; keep msa_skip, mlp_norm and mlp_skip "
                "on, or pass new_surgery=True"
            )
        options = {"drop_path_rate": drop_path_rate, **(backbone_options or {})}
        stages: Any
        if backbone in ARCHITECTURES:
            stages = _own_stages(backbone, img_size, switches, pretrained, options)
            if weights is not None:
                load_published(stages, weights, new_last_block=new_surgery)
        else:
            stages = TimmStages(backbone, switches, pretrained=pretrained, weights=weights, **options)
        fpn = SemanticFPN(
            stages,
            num_classes,
            neck_channels=neck_channels,
            head_channels=head_channels,
            dropout=head_dropout,
        )
        self.backbone, self.neck, self.decode_head = fpn.backbone, fpn.neck, fpn.decode_head

    def take_backbone(self, classifier: SARViT) -> None:
        """Load the backbone of a classifier, whose architecture and form of the last block this one has.

        Raises:
            InputError: if it has another.

        Example:
            >>> tiny = {"embed_dims": (4, 4, 4, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 2)}
            >>> classifier = SARViT("pvt_small", 10, 64, backbone_options=tiny)
            >>> model = SARSegmenter("pvt_small", 5, 64, backbone_options=tiny)
            >>> model.take_backbone(classifier)
            >>> bool((model.backbone.pos_embed1 == classifier.backbone.model.pos_embed1).all())
            True
        """
        stages: Any = self.backbone
        state = classifier.backbone.model.state_dict()
        if isinstance(stages, TimmStages):
            stages.take(state)
        else:
            load_published(stages, state)

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``(b, num_classes, H / 4, W / 4)`` of ``images (b, 3, H, W)``, sides multiples of 32."""
        return self.decode_head(self.neck(self.backbone.forward_dense(images)))

    def class_map(self, image: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
        """The class of each pixel of one photo.

        Args:
            image: ``(3, h, w)`` of :attr:`to_input`, on the model's device.
            size: ``(H, W)`` of the photo.

        Returns:
            ``(H, W)`` of ``0..num_classes-1``. Scores are enlarged bilinearly to the input, then to the photo, and then
            compared.

        Raises:
            InputError: if scores are not finite.
        """
        scores = self(image[None])
        if not torch.isfinite(scores).all():
            raise InputError(
                "a photo has scores that are not finite; the weights are damaged or overflowed in training, load "
                "others"
            )
        scores = _enlarged(scores.float(), image.shape[-2:])
        best = found = torch.empty(0)
        # A few classes at a time: all scores of a photo of 12 megapixels would be 7 GB.
        for first in range(0, self.num_classes, 16):
            top, index = _enlarged(scores[:, first : first + 16], size)[0].max(dim=0)
            if first:
                better = top > best
                top, index = torch.where(better, top, best), torch.where(better, index + first, found)
            best, found = top, index
        return found.to(torch.uint8).cpu().numpy()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] (class maps, not boxes)
        self, photos: Photo | Iterable[Photo]
    ) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """Class maps of photos, in evaluation mode without gradients; the model's own mode is untouched.

        Args:
            photos: a path, bytes, an open file or a PIL image, or an iterable of these.

        Returns:
            ``(H, W)`` uint8 at the size of the photo, an index into ``labels`` for each pixel; a list for an iterable.

        Raises:
            InputError: for a photo that cannot be read.
        """
        if isinstance(photos, (str, PathLike, bytes, Image.Image)) or hasattr(photos, "read"):
            return self._predicted(cast(Photo, photos))
        return [self._predicted(photo) for photo in cast(Iterable[Photo], photos)]

    def _predicted(self, photo: Photo) -> NDArray[np.uint8]:
        image = load_image(photo)
        weight = next(self.parameters())
        with evaluating(self), torch.no_grad():
            pixels = self.to_input(image).to(weight.device, weight.dtype)
            return self.class_map(pixels, (image.height, image.width))


class TimmStages(nn.Module):
    """A timm network that gives the maps of its stages of strides 4, 8, 16 and 32.

    Args:
        name: of the network.
        switches: form of the last block, of networks that :func:`sar_vit.apply_sar` takes.
        pretrained: download timm's weights.
        weights: local file of them instead.
        **options: of the network.

    Attributes:
        embed_dims: channels of the maps.

    Raises:
        InputError: if the network is not known, or has no such stages or last block.

    Example:
        >>> stages = TimmStages("pvt_v2_b0", {"msa_skip": False, "mlp_norm": False, "mlp_skip": True})
        >>> [tuple(features.shape) for features in stages.forward_dense(torch.zeros(1, 3, 64, 96))]
        [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    """

    dense = True

    def __init__(
        self,
        name: str,
        switches: Mapping[str, bool],
        *,
        pretrained: bool = False,
        weights: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if name.startswith("swin"):
            options.setdefault("strict_img_size", False)  # photos are of many sizes
        net: Any = create_backbone(name, pretrained=pretrained, weights=weights, **options).model
        strides: list[Any] = [level["reduction"] for level in net.feature_info]
        if not hasattr(net, "prune_intermediate_layers") or not set(_STRIDES) <= set(strides):
            raise InputError(
                f"backbone {name}: gives no maps of strides 4, 8, 16 and 32; choose pvt_small, a PVT-v2, Swin or ResNet"
            )
        self.levels = [strides.index(stride) for stride in _STRIDES]
        self.embed_dims = tuple(int(net.feature_info[level]["num_chs"]) for level in self.levels)
        if not all(switches.values()):
            try:
                apply_sar(net, **switches, query="avg", collect=False)
            except ValueError as error:
                raise InputError(f"backbone {name}: {error}") from error
        net.prune_intermediate_layers(self.levels, prune_norm=True, prune_head=True)
        self.model = net

    def forward_dense(self, images: Tensor) -> list[Tensor]:
        """Maps ``(b, c, h, w)`` of ``images (b, 3, H, W)``, finest first."""
        return self.model.forward_intermediates(images, indices=self.levels, intermediates_only=True)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory."""
        self.model.set_grad_checkpointing(enable)

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of the same network with its final norm, which is left out.

        Raises:
            InputError: if some are missing or of another shape.
        """
        wanted = self.model.state_dict()
        found = {name: tensor for name, tensor in state.items() if name in wanted}
        if problem := mismatched_keys(wanted, found):
            raise InputError(
                f"these weights do not fit ({problem}); load a classifier of the same architecture"
            )
        self.model.load_state_dict(found)


def _own_stages(
    name: str,
    img_size: int | Sequence[int],
    switches: Mapping[str, bool],
    pretrained: bool,
    options: Mapping[str, Any],
) -> nn.Module:
    if pretrained:
        raise InputError(
            f"pretrained=True: {name} is not timm's; give weights= with a file of its authors' release"
        )
    if not name.startswith("pvt_"):
        raise InputError(f"backbone {name}: gives no maps of strides 4, 8, 16 and 32; choose pvt_small")
    return create_architecture(name, img_size=img_size, dense=True, last_block=dict(switches), **options)


def _enlarged(scores: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)
