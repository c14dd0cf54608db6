"""Photos and class maps for segmentation: augmentation, test input, and class maps of data that have masks only.

The augmentation is that of mmsegmentation's ADE20K configurations, in its order: random scale, crop, flip, photometric
distortion, normalisation, padding.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from attnmap_core.data.layouts.listing import IGNORED, SegmentationClasses
from attnmap_core.data.sources import ImageData, Sample
from attnmap_core.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    Rectangle,
    eval_transform,
    resample_segmentation,
    uint8_to_tensor,
)
from attnmap_core.errors import InputError
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

Pixels = NDArray[np.uint8]

_LONG = 4  # the longer side is at most so many times the shorter: 2048 for 512
_TRIES = 11  # crops until one is taken whatever is in it


def scaled_size(width: int, height: int, short_side: float) -> tuple[int, int]:
    """Height and width of a photo resized to a shorter side, aspect kept.

    A photo of more than 4:1 gets a longer side of four times ``short_side`` instead, and a shorter one below.

    Example:
        >>> scaled_size(640, 480, 512), scaled_size(4000, 500, 512)
        ((512, 683), (256, 2048))
    """
    factor = min(short_side / min(width, height), _LONG * short_side / max(width, height))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


@dataclass(frozen=True)
class SegmentationInput:
    """The network's input in tests: a whole photo at one scale, both sides rounded up to whole strides.

    Attributes:
        short_side: see :func:`scaled_size`.
        mean: of the normalisation; ``std`` likewise.
        stride: sides become multiples of it.

    Example:
        >>> to_input = SegmentationInput(512)
        >>> to_input(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 512, 704])
    """

    short_side: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    stride: int = 32

    def __call__(self, image: Image.Image) -> Tensor:
        """A photo as ``(3, h, w)`` float32, normalised, resampled in one step."""
        sides = scaled_size(image.width, image.height, self.short_side)
        height, width = (-(-side // self.stride) * self.stride for side in sides)
        return eval_transform(Preprocessing(size=(height, width), mean=self.mean, std=self.std))(image)


@dataclass(frozen=True)
class SegmentationAugmentation:
    """The random way from a photo and its class map to a square crop of both.

    Randomness comes from the module ``random``. What the photo does not fill is at the right and the bottom: 0 after
    the normalisation, and 255 in the class map.

    Attributes:
        size: side of the crop, and the shorter side of the photo at scale 1.
        scale_range: the photo is resized to a shorter side of ``size`` times a number from this range.
        class_share: a crop in which one class has this share of the pixels or more is drawn again, ten times at most;
            1 takes any.
        flip: probability of a left-right mirror.
        photometric: distort colours, see :func:`photometric_distortion`.
        mean: of the normalisation; ``std`` likewise.

    Raises:
        InputError: for settings out of range.

    Example:
        >>> augment = SegmentationAugmentation(64)
        >>> photo, classes = Image.new("RGB", (96, 80)), np.zeros((80, 96), np.uint8)
        >>> [tuple(part.shape) for part in augment.with_segmentation(photo, classes)]
        [(3, 64, 64), (64, 64)]
    """

    size: int
    scale_range: tuple[float, float] = (0.5, 2.0)
    class_share: float = 0.75
    flip: float = 0.5
    photometric: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        low, high = self.scale_range
        if not 0 < low <= high < math.inf:
            raise InputError(
                f"scale_range {low} {high}: expected two factors, 0 < from <= to; 0.5 2 is usual"
            )
        if not 0 < self.class_share <= 1:
            raise InputError(
                f"class_share {self.class_share}: expected a share above 0, up to 1, such as 0.75"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """The crop ``(3, size, size)`` of a photo without class map."""
        return self.with_segmentation(image, np.full((image.height, image.width), IGNORED, np.uint8))[0]

    def with_segmentation(self, image: Image.Image, segmentation: Pixels) -> tuple[Tensor, Tensor]:
        """A crop of a photo and of its class map.

        Args:
            image: RGB.
            segmentation: ``(H, W)`` uint8 class indices, 255 where a pixel counts for nothing.

        Returns:
            ``(3, size, size)`` float32, normalised, and ``(size, size)`` int64.

        Raises:
            ValueError: if the class map is of another size.
        """
        if segmentation.shape != (image.height, image.width):
            raise ValueError(
                f"expected a class map {(image.height, image.width)} as its image, got {segmentation.shape}"
            )
        sides = scaled_size(image.width, image.height, random.uniform(*self.scale_range) * self.size)
        height, width = min(sides[0], self.size), min(sides[1], self.size)
        rectangle: Rectangle = (0, 0, image.width, image.height)
        classes = torch.empty(0)
        for _ in range(_TRIES):
            top, left = random.randint(0, sides[0] - height), random.randint(0, sides[1] - width)
            rectangle = _window(image, sides, top, left, height, width)
            # Crop and resize at once: a large photo is never enlarged as a whole.
            classes = resample_segmentation(segmentation, rectangle, (height, width))
            if self.class_share == 1 or largest_share(classes) < self.class_share:
                break
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=rectangle))
        if random.random() < self.flip:
            pixels, classes = pixels[:, ::-1], classes.flip(-1)
        if self.photometric:
            pixels = photometric_distortion(pixels)
        crop = Preprocessing(mean=self.mean, std=self.std).normalise(uint8_to_tensor(pixels))
        padding = (0, self.size - width, 0, self.size - height)
        return functional.pad(crop, padding), functional.pad(classes, padding, value=IGNORED)


def largest_share(classes: Tensor) -> float:
    """Share of the most frequent class among the pixels that count; 1 if none does.

    Example:
        >>> largest_share(torch.tensor([[3, 3], [7, 3], [255, 255]]))
        0.75
    """
    counts = torch.bincount(classes[classes != IGNORED])
    return (counts.max() / counts.sum()).item() if len(counts) else 1.0


def photometric_distortion(pixels: Pixels) -> Pixels:
    """Random brightness, contrast, saturation and hue, each with probability 1/2, as in mmsegmentation.

    Brightness comes first: up to 32 more or less. Contrast and saturation are multiplied by 0.5 to 1.5, hue turns by up
    to 36 degrees; contrast comes before those two or after them, by chance.

    Args:
        pixels: ``(h, w, 3)`` RGB.

    Returns:
        The same shape, uint8; nothing wraps around 0 or 255.

    Example:
        >>> random.seed(2)
        >>> photometric_distortion(np.full((1, 1, 3), (200, 100, 50), np.uint8))
        array([[[200, 142, 113]]], dtype=uint8)
    """
    if _chance():
        pixels = _linear(pixels, shift=random.uniform(-32, 32))
    contrast_first = _chance()
    if contrast_first and _chance():
        pixels = _linear(pixels, factor=random.uniform(0.5, 1.5))
    saturation = random.uniform(0.5, 1.5) if _chance() else 1.0
    hue = random.randint(-18, 17) if _chance() else 0  # of 180, as OpenCV counts them
    if saturation != 1 or hue:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        hsv[..., 1] = _linear(hsv[..., 1], factor=saturation)
        hsv[..., 0] = (hsv[..., 0] + round(hue * 255 / 180) % 255) % 255  # Pillow's circle is of 255
        pixels = np.asarray(Image.frombytes("HSV", hsv.shape[1::-1], hsv.tobytes()).convert("RGB"))
    if not contrast_first and _chance():
        pixels = _linear(pixels, factor=random.uniform(0.5, 1.5))
    return pixels


def _chance() -> bool:
    return random.random() < 0.5


def _linear(values: Pixels, factor: float = 1.0, shift: float = 0.0) -> Pixels:
    return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def _window(
    image: Image.Image, sides: Sequence[int], top: int, left: int, height: int, width: int
) -> Rectangle:
    """A window of the photo resized to ``sides`` (h, w), in pixels of the photo."""
    rows, columns = image.height / sides[0], image.width / sides[1]
    # Rounding may lead 1e-13 over the edge, which Pillow refuses.
    right = min(float(image.width), (left + width) * columns)
    return (left * columns, top * rows, right, min(float(image.height), (top + height) * rows))


# --- Class maps of data that have none ------------------------------------------------------------------


def with_class_maps(data: ImageData) -> ImageData:
    """Data with class maps: the same if they have some, else made of masks and labels.

    Class 0 is ``background``; the mask of a photo has the class of its label, one more than that. Pixels to ignore are
    255. So the synthetic default and CUB with its masks can train a segmentation.

    Args:
        data: any data; those without class maps must have a mask for each photo.

    Returns:
        Data whose ``segmentation`` says what the class maps mean.

    Raises:
        InputError: for more than 254 labels; while reading, for a photo without mask.

    Example:
        >>> from attnmap_core.data.sources import load_data
        >>> data = with_class_maps(load_data("synthetic:classes=4,image_size=64,train=8", "train"))
        >>> data.segmentation.labels[:2], np.unique(data[2].segmentation).tolist()
        (('background', 'red crest fish'), [0, 3])
    """
    if data.segmentation is not None:
        return data
    if len(data.labels) >= IGNORED:
        raise InputError(
            f"{data.name}: {len(data.labels)} labels, class maps of masks hold at most {IGNORED - 1}; give fewer"
        )
    return _MaskedData(
        data.dataset,
        labels=data.labels,
        name=data.name,
        split=data.split,
        streaming=data.streaming,
        upright=data.upright,
        clip_boxes=data.clip_boxes,
        segmentation=SegmentationClasses(labels=("background", *data.labels)),
    )


class _MaskedData(ImageData):
    """Data whose class maps are their masks."""

    def to_sample(self, row: Any, index: int) -> Sample:
        sample = super().to_sample(row, index)
        if sample.mask is None:
            raise InputError(
                f"{sample.image_id}: neither a class map nor a mask; give data that have them, such as ade20k:PATH"
            )
        classes = np.zeros((sample.image.height, sample.image.width), np.uint8)
        if sample.ignore is not None:
            classes[_at_size(sample.ignore, sample.image.size)] = IGNORED
        classes[_at_size(sample.mask, sample.image.size)] = sample.label + 1
        return dataclasses.replace(sample, segmentation=classes)

    def _class_map(self, row: Any, image_id: str, size: tuple[int, int]) -> None:
        return None  # there is no file

    def _with(self, dataset: Any) -> ImageData:
        plain = super()._with(dataset)
        plain.segmentation = None
        return with_class_maps(plain)


def _at_size(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """``(h, w)`` of ``size`` (w, h), each pixel from the nearest one."""
    if mask.shape == (size[1], size[0]):
        return mask
    return np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
