"""Several random views of one photo: MoCo-v3's two and DINO's many.

Their transforms are those of the released code, out of torchvision and Pillow. Everything random comes from torch's
global generator, which the loader seeds for each photo and epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attnmap_core.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from attnmap_core.errors import InputError
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import (
    ColorJitter,
    Compose,
    InterpolationMode,
    Normalize,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
    ToTensor,
)

View = Callable[[Image.Image], Tensor]


class Views:
    """A photo through several transforms; as a loader's ``transform`` it makes each batch a list of tensors.

    Args:
        *views: one transform a view.

    Example:
        >>> views = Views(ToTensor(), Compose([RandomHorizontalFlip(1.0), ToTensor()]))
        >>> [tuple(view.shape) for view in views(Image.new("RGB", (6, 4)))]
        [(3, 4, 6), (3, 4, 6)]
    """

    def __init__(self, *views: View) -> None:
        self.views = views

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]


class Blur:
    """Pillow's Gaussian blur with a radius drawn from 0.1 to 2 pixels.

    Example:
        >>> Blur()(Image.new("RGB", (6, 4))).size
        (6, 4)
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = float(torch.empty(1).uniform_(0.1, 2.0))
        return image.filter(ImageFilter.GaussianBlur(radius))


def mocov3_views(
    size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Views:
    """The two views of MoCo-v3: always blurred, and blurred now and then but solarised.

    Both: crop, brightness, contrast and saturation 0.4 and hue 0.1 in 80 %, gray in 20 %, mirrored in 50 %.

    Args:
        size: side of the views, in pixels.
        scale: share of the photo's area that a crop takes, from and to.
        mean: of the normalisation, for each channel; ``std`` likewise.

    Returns:
        A picklable transform: RGB image to two tensors ``(3, size, size)``.

    Raises:
        InputError: for a scale outside of ``0 < from <= to <= 1`` or a size below 1.

    Example:
        >>> [tuple(view.shape) for view in mocov3_views(32)(Image.new("RGB", (50, 40)))]
        [(3, 32, 32), (3, 32, 32)]

    References:
        Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021.
    """
    crop = _crop(size, scale, InterpolationMode.BILINEAR)
    end = [RandomHorizontalFlip(), *_normalised(mean, std)]
    return Views(
        Compose([crop, *_colours(), Blur(), *end]),
        Compose([crop, *_colours(), RandomApply([Blur()], 0.1), RandomSolarize(128, 0.2), *end]),
    )


def dino_views(
    size: int = 224,
    local_size: int = 96,
    local_crops: int = 10,
    *,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Views:
    """The crops of DINO: two large ones, then ``local_crops`` small ones.

    The first large one is always blurred, the second in 10 % and solarised in 20 %, small ones are blurred in 50 %.

    Args:
        size: side of the large crops, in pixels.
        local_size: side of the small ones.
        local_crops: number of small ones, 0 or more; the paper of SAR takes 10.
        global_scale: share of the photo's area in a large crop, from and to.
        local_scale: likewise in a small one.
        mean: of the normalisation, for each channel; ``std`` likewise.

    Returns:
        A picklable transform: RGB image to ``2 + local_crops`` tensors, ``(3, size, size)`` and ``(3, local_size,
        local_size)``.

    Raises:
        InputError: for a scale outside of ``0 < from <= to <= 1``, a size below 1 or a negative number.

    Example:
        >>> views = dino_views(32, 16, local_crops=3)(Image.new("RGB", (50, 40)))
        >>> [view.shape[1] for view in views]
        [32, 32, 16, 16, 16]

    References:
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021.
    """
    if local_crops < 0:
        raise InputError(f"local_crops {local_crops}: expected 0 or more; DINO with SAR takes 10")
    bicubic = InterpolationMode.BICUBIC
    large = [_crop(size, global_scale, bicubic), RandomHorizontalFlip(), *_colours()]
    small = [_crop(local_size, local_scale, bicubic), RandomHorizontalFlip(), *_colours()]
    end = _normalised(mean, std)
    local = Compose([*small, RandomApply([Blur()], 0.5), *end])
    return Views(
        Compose([*large, Blur(), *end]),
        Compose([*large, RandomApply([Blur()], 0.1), RandomSolarize(128, 0.2), *end]),
        *[local] * local_crops,
    )


def _crop(size: int, scale: tuple[float, float], interpolation: InterpolationMode) -> Any:
    if size < 1:
        raise InputError(f"size {size}: expected a crop's side in pixels, 1 or more")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(
            f"crop scale {scale[0]} {scale[1]}: expected two shares of the photo, 0 < from <= to <= 1"
        )
    return RandomResizedCrop(size, scale, interpolation=interpolation)


def _colours() -> list[Any]:
    return [RandomApply([ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), RandomGrayscale(0.2)]


def _normalised(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    return [ToTensor(), Normalize(mean, std)]
