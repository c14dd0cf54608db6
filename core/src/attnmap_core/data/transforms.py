"""From a photo to the network's input tensor, and back to photo coordinates.

One rule keeps training, testing and mapping back consistent: a transform chooses a *rectangle of the photo*
and resamples that rectangle to the input size in one step (Pillow's antialiased resize with ``box=``). This
equals resizing and then cropping, up to Pillow's rounding between its two passes. It never makes a huge
intermediate image (a 20,000 x 3 photo with its shorter side at 256 would be 1.7 million pixels wide), and the
rectangle is all one needs to map boxes and score maps back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError

Interpolation = Literal["bilinear", "bicubic"]
Crop = Literal["none", "center"]
TrainCrop = Literal["none", "random", "random_resized"]
Rectangle = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels of the photo, end exclusive."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_LONGEST_MAP = 4096


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a model does to a photo before it looks: plain values, stored with the weights.

    ``resize`` and ``crop`` together say which part of the photo is seen:

    ============  ============  ==========================================================================
    ``crop``      ``resize``    meaning
    ============  ============  ==========================================================================
    ``"none"``    ``None``      the whole photo is resized to exactly ``size``; its aspect is not kept
    ``"center"``  ``None``      resized to just cover ``size``, aspect kept; then the middle is cut out
    ``"center"``  ``n``         the shorter side is resized to ``n``, aspect kept; then the same cut
    ``"center"``  ``(h, w)``    resized to exactly ``(h, w)``, aspect not kept; then the same cut
    ============  ============  ==========================================================================

    Attributes:
        mean: per RGB channel, on the scale where white is 1; ``std`` likewise.
        size: ``(height, width)`` of the network's input in pixels.
        resize: see the table; every resized side must be at least the input's.
        crop: see the table.
        interpolation: Pillow filter, antialiased when shrinking.

    Raises:
        InputError: for values that do not fit together.

    Example:
        >>> pre = Preprocessing(size=(224, 224), resize=256, crop="center")
        >>> pre.seen_rectangle(width=500, height=250)
        (140.625, 15.625, 359.375, 234.375)
        >>> Preprocessing.from_dict(pre.to_dict()) == pre
        True
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    size: tuple[int, int] = (224, 224)
    resize: int | tuple[int, int] | None = None
    crop: Crop = "none"
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        _check("mean", self.mean, _is_numbers(self.mean, 3), "three finite numbers")
        _check("std", self.std, _is_numbers(self.std, 3) and min(self.std) > 0, "three numbers above 0")
        _check("size", self.size, _is_sides(self.size), "two whole numbers above 0, (height, width)")
        _check("crop", self.crop, self.crop in get_args(Crop), "none or center")
        known = self.interpolation in get_args(Interpolation)
        _check("interpolation", self.interpolation, known, "bilinear or bicubic")
        if self.resize is not None:
            _check(
                "resize", self.resize, self.crop == "center", "None without a centre crop (size says it all)"
            )
            sides = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
            wide_enough = _is_sides(sides) and all(have >= need for have, need in zip(sides, self.size))
            _check("resize", self.resize, wide_enough, f"whole numbers not below size {self.size}")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read what :meth:`to_dict` wrote; an unknown key or a wrong value is an :class:`InputError`."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(
                f"preprocessing: unknown key {unknown[0]!r}, expected some of {', '.join(known)}; "
                "remove it or correct it"
            )
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**plain)

    @classmethod
    def from_timm(
        cls,
        model: nn.Module,
        *,
        size: tuple[int, int] | None = None,
        crop: Crop = "none",
        interpolation: Interpolation | None = None,
    ) -> Preprocessing:
        """The mean, std, input size and interpolation a timm model was made with.

        Localization wants the whole photo, so nothing is cropped by default; ``crop="center"`` takes over
        timm's own evaluation crop (``crop_pct``) instead; an input that is not square is then just covered.

        Args:
            model: a timm model.
            size: ``(height, width)`` of another input size; a ViT's own ``img_size`` otherwise.
            crop: ``"none"`` or ``"center"``.
            interpolation: replaces the model's.

        Raises:
            ValueError: if the model's interpolation is neither bilinear nor bicubic and none is given, or its
                crop mode is neither ``center`` nor ``squash`` and a crop is asked for.
        """
        from timm.data.config import resolve_model_data_config

        config: dict[str, Any] = resolve_model_data_config(model)
        made_for: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
        input_height, input_width = size or made_for or config["input_size"][1:]
        filter_name = interpolation or config["interpolation"]
        if filter_name not in get_args(Interpolation):
            raise ValueError(
                f"the model's interpolation is {filter_name!r}; pass interpolation='bicubic' or 'bilinear'"
            )
        resize: int | tuple[int, int] | None = None
        if crop == "center":
            height, width = (math.floor(side / config["crop_pct"]) for side in (input_height, input_width))
            if config["crop_mode"] == "squash":
                resize = (height, width)
            elif config["crop_mode"] == "center":
                resize = height if height == width else None
            else:
                raise ValueError(
                    f"the model's crop mode {config['crop_mode']!r} is not supported; use crop='none'"
                )
        return cls(
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            size=(int(input_height), int(input_width)),
            resize=resize,
            crop=crop,
            interpolation=filter_name,
        )

    def seen_rectangle(self, width: int, height: int) -> Rectangle:
        """The part of a ``width x height`` photo that the network sees, xyxy floats in photo pixels.

        Example:
            >>> Preprocessing(size=(64, 96)).seen_rectangle(width=500, height=3)
            (0.0, 0.0, 500.0, 3.0)
        """
        if self.crop == "none":
            return (0.0, 0.0, float(width), float(height))
        target_height, target_width = self.size
        if isinstance(self.resize, tuple):
            resized_height, resized_width = self.resize
        elif self.resize is not None:  # torchvision's Resize(int): the longer side is rounded down
            resized_height = self.resize * height // width if height > width else self.resize
            resized_width = self.resize * width // height if width > height else self.resize
        else:
            factor = max(target_height / height, target_width / width)
            resized_height = max(target_height, math.floor(height * factor))
            resized_width = max(target_width, math.floor(width * factor))
        top = round((resized_height - target_height) / 2)  # as torchvision's CenterCrop rounds
        left = round((resized_width - target_width) / 2)
        return _rectangle(width, height, (resized_height, resized_width), top, left, self.size)

    def to_photo_coordinates(
        self, boxes_xyxy: NDArray[np.float64], width: int, height: int
    ) -> NDArray[np.float64]:
        """Move boxes from input pixels to the pixels of the ``width x height`` photo.

        Args:
            boxes_xyxy: ``(k, 4)`` in pixels of the network's input, end exclusive.
            width: of the photo; ``height`` likewise.

        Returns:
            ``(k, 4)`` float64 in photo pixels, inside the seen rectangle if the boxes are inside the input.

        Example:
            >>> pre = Preprocessing(size=(10, 10))
            >>> pre.to_photo_coordinates(np.array([[1.0, 2.0, 5.0, 10.0]]), width=200, height=50)
            array([[ 20.,  10., 100.,  50.]])
        """
        boxes = np.asarray(boxes_xyxy, dtype=np.float64)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"boxes_xyxy must be (k, 4), got {boxes.shape}")
        left, top, right, bottom = self.seen_rectangle(width, height)
        input_height, input_width = self.size
        scale = np.array([(right - left) / input_width, (bottom - top) / input_height] * 2)
        return boxes * scale + np.array([left, top] * 2)

    def to_photo_map(self, score_map: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
        """A score map of what the network saw, laid out over the whole photo: what was cropped away gets 0.

        Args:
            score_map: ``(h, w)`` over the network's input, any resolution.
            width: of the photo; ``height`` likewise.

        Returns:
            ``(h', w')`` float32 over the whole photo at the same resolution (sides end at 4,096);
            the same map where nothing is cropped.

        Example:
            >>> pre = Preprocessing(size=(8, 8), crop="center")
            >>> pre.to_photo_map(np.ones((2, 2), np.float32), width=16, height=8)
            array([[0., 1., 1., 0.],
                   [0., 1., 1., 0.]], dtype=float32)
        """
        score_map = np.asarray(score_map, dtype=np.float32)
        if score_map.ndim != 2:
            raise ValueError(f"score_map must be (h, w), got {score_map.shape}")
        if self.crop == "none":
            return score_map
        left, top, right, bottom = self.seen_rectangle(width, height)
        rows, row_seen = _spread(score_map.shape[0], top, bottom, height)
        columns, column_seen = _spread(score_map.shape[1], left, right, width)
        seen = row_seen[:, None] & column_seen[None, :]
        return np.where(seen, score_map[rows[:, None], columns[None, :]], np.float32(0))

    def normalise(self, images: Tensor) -> Tensor:
        """``(..., 3, h, w)`` with white 1 and black 0 -> the same, minus ``mean``, over ``std``."""
        mean, std = self._mean_std(images)
        return (images - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """Undo :meth:`normalise`: back to white 1 and black 0, for pictures."""
        mean, std = self._mean_std(images)
        return images * std + mean

    def _mean_std(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.ndim < 3 or images.shape[-3] != 3 or not images.is_floating_point():
            raise ValueError(
                f"expected float images (..., 3, h, w), got {images.dtype} {tuple(images.shape)}"
            )
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(3, 1, 1)
        return mean, std


def uint8_to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """``(h, w, 3)`` bytes -> ``(3, h, w)`` float32 in ``[0, 1]``: the cheap way when nothing is resized.

    Example:
        >>> uint8_to_tensor(np.full((2, 4, 3), 255, np.uint8)).shape
        torch.Size([3, 2, 4])
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"expected uint8 pixels (h, w, 3), got {pixels.dtype} {pixels.shape}")
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(channels_first).to(torch.float32).div_(255)


@dataclass(frozen=True)
class EvalTransform:
    """See :func:`eval_transform`. A plain class, so that loader workers can pickle it."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image) -> Tensor:
        pre = self.preprocessing
        rectangle = pre.seen_rectangle(image.width, image.height)
        return pre.normalise(_pixels(_resample(image, rectangle, pre)))

    def with_segmentation(self, image: Image.Image, segmentation: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """The image as by a call, and what :func:`resample_segmentation` makes of its class map."""
        rectangle = self.preprocessing.seen_rectangle(image.width, image.height)
        _check_aligned(image, segmentation)
        return self(image), resample_segmentation(segmentation, rectangle, self.preprocessing.size)


@dataclass(frozen=True)
class TrainTransform:
    """See :func:`train_transform`. A plain class, so that loader workers can pickle it."""

    preprocessing: Preprocessing
    resize: tuple[int, int]
    crop: TrainCrop
    flip: float
    scale: tuple[float, float]
    ratio: tuple[float, float]
    color_jitter: float

    def __call__(self, image: Image.Image) -> Tensor:
        return self._apply(image)[0]

    def with_segmentation(self, image: Image.Image, segmentation: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """The image as by a call, and its class map cut and mirrored alike, see :func:`resample_segmentation`."""
        _check_aligned(image, segmentation)
        tensor, rectangle, flipped = self._apply(image)
        classes = resample_segmentation(segmentation, rectangle, self.preprocessing.size)
        return tensor, classes.flip(-1) if flipped else classes

    def _apply(self, image: Image.Image) -> tuple[Tensor, Rectangle, bool]:
        # Drawn from torch's global generator in torchvision's order: crop top, crop left, flip, colours.
        pre = self.preprocessing
        rectangle = self._rectangle(image)
        seen = _resample(image, rectangle, pre)
        flipped = bool(torch.rand(1) < self.flip)
        if self.color_jitter > 0:
            from torchvision.transforms import ColorJitter

            seen = ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter)(seen)
        tensor = pre.normalise(_pixels(seen))
        return tensor.flip(-1) if flipped else tensor, rectangle, flipped

    def _rectangle(self, image: Image.Image) -> Rectangle:
        if self.crop == "random_resized":
            from torchvision.transforms import RandomResizedCrop

            drawn: Any = RandomResizedCrop.get_params
            top, left, height, width = drawn(image, list(self.scale), list(self.ratio))
            return (float(left), float(top), float(left + width), float(top + height))
        if self.crop == "none":
            return (0.0, 0.0, float(image.width), float(image.height))
        top, left = (
            int(torch.randint(have - need + 1, (1,)))
            for have, need in zip(self.resize, self.preprocessing.size)
        )
        return _rectangle(image.width, image.height, self.resize, top, left, self.preprocessing.size)


def eval_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """The deterministic way from a photo to the network's input.

    Args:
        preprocessing: sizes, crop and normalisation; ``seen_rectangle`` is the part that comes out.

    Returns:
        A picklable function: Pillow RGB image -> ``(3, h, w)`` float32, normalised.

    Example:
        >>> to_input = eval_transform(Preprocessing(size=(32, 48)))
        >>> to_input(Image.new("RGB", (20000, 3))).shape
        torch.Size([3, 32, 48])
    """
    return EvalTransform(preprocessing)


def train_transform(
    preprocessing: Preprocessing,
    *,
    resize: int | tuple[int, int] | None = None,
    crop: TrainCrop = "random",
    flip: float = 0.5,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    color_jitter: float = 0.0,
) -> Callable[[Image.Image], Tensor]:
    """The random way from a photo to the network's input: resize, crop, flip, colours, normalise.

    All randomness comes from torch's global generator: seed it and the result repeats. The defaults are those
    of the usual WSOL recipes: the photo is resized to exactly 8/7 of the input (256 x 256 for 224; its aspect
    is not kept), a random window of the input's size is cut out, and half the photos are mirrored.

    Args:
        preprocessing: input size, interpolation and normalisation (not its ``resize``, ``crop``).
        resize: for ``crop="random"``, exact size before the crop: ``(height, width)``, or one number for both
            sides; ``None`` is 8/7 of the input size.
        crop: ``"random"`` as above; ``"random_resized"`` cuts a rectangle of random area and aspect out of
            the photo; ``"none"`` resizes the whole photo.
        flip: probability of a left-right mirror.
        scale: for ``"random_resized"``, area of the rectangle as a share of the photo's, from and to.
        ratio: for ``"random_resized"``, width over height of the rectangle, from and to.
        color_jitter: strength of random brightness, contrast and saturation; 0 is off.

    Returns:
        A picklable function: Pillow RGB image -> ``(3, h, w)`` float32, normalised.

    Raises:
        InputError: for a probability outside ``[0, 1]`` or a ``resize`` smaller than the input.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> augment = train_transform(Preprocessing(size=(224, 224)), resize=256)
        >>> augment(Image.new("RGB", (500, 335))).shape
        torch.Size([3, 224, 224])
    """
    if resize is None:
        resize = (round(preprocessing.size[0] * 8 / 7), round(preprocessing.size[1] * 8 / 7))
    sides = (resize, resize) if isinstance(resize, int) else resize
    large_enough = _is_sides(sides) and all(have >= need for have, need in zip(sides, preprocessing.size))
    _check("resize", resize, large_enough, f"whole numbers not below size {preprocessing.size}")
    _check("crop", crop, crop in get_args(TrainCrop), "none, random or random_resized")
    _check("flip", flip, 0 <= flip <= 1, "a probability in [0, 1]")
    _check("color_jitter", color_jitter, 0 <= color_jitter <= 1, "a strength in [0, 1]")
    _check(
        "scale", scale, 0 < scale[0] <= scale[1] <= 1, "two shares of the photo's area, 0 < from <= to <= 1"
    )
    _check("ratio", ratio, 0 < ratio[0] <= ratio[1], "two aspects, 0 < from <= to")
    return TrainTransform(preprocessing, sides, crop, flip, scale, ratio, color_jitter)


def resample_segmentation(
    segmentation: NDArray[np.uint8], rectangle: Rectangle, size: tuple[int, int]
) -> Tensor:
    """The rectangle of a class map at the size of the network's input, each pixel from the nearest one.

    Args:
        segmentation: ``(H, W)`` class indices of a photo.
        rectangle: the part that the network sees, in pixels of the photo.
        size: ``(height, width)`` of the input.

    Returns:
        ``(height, width)`` int64, aligned with the image: Pillow's nearest neighbour, which samples where the centre of
        an input pixel lies.

    Example:
        >>> resample_segmentation(np.array([[0, 7], [255, 3]], np.uint8), (0, 0, 2, 2), (2, 4))
        tensor([[  0,   0,   7,   7],
                [255, 255,   3,   3]])
    """
    height, width = size
    resized = Image.fromarray(segmentation).resize((width, height), Image.Resampling.NEAREST, box=rectangle)
    return torch.from_numpy(np.array(resized)).long()


def _check_aligned(image: Image.Image, segmentation: NDArray[np.uint8]) -> None:
    if segmentation.shape != (image.height, image.width) or segmentation.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 class map {(image.height, image.width)} as its image, "
            f"got {segmentation.dtype} {segmentation.shape}"
        )


def _resample(image: Image.Image, rectangle: Rectangle, preprocessing: Preprocessing) -> Image.Image:
    if image.mode != "RGB":
        raise ValueError(
            f"expected an RGB image, got mode {image.mode!r}; attnmap_core.data.images.load_image converts"
        )
    height, width = preprocessing.size
    if image.size == (width, height) and rectangle == (0, 0, width, height):
        return image
    return image.resize((width, height), _RESAMPLING[preprocessing.interpolation], box=rectangle)


def _pixels(image: Image.Image) -> Tensor:
    return uint8_to_tensor(np.asarray(image))


def _rectangle(
    width: int, height: int, resized: tuple[int, int], top: int, left: int, size: tuple[int, int]
) -> Rectangle:
    """A window of ``size`` at ``(top, left)`` of the photo resized to ``resized`` (h, w), in photo pixels."""
    per_row, per_column = height / resized[0], width / resized[1]
    # Rounding may lead 1e-13 over the edge, which Pillow refuses.
    right, bottom = min(width, (left + size[1]) * per_column), min(height, (top + size[0]) * per_row)
    return (left * per_column, top * per_row, float(right), float(bottom))


def _spread(length: int, start: float, stop: float, whole: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Cells of an axis whose part ``start..stop`` has ``length`` cells: source of each, and is it seen?"""
    cells = min(_LONGEST_MAP, max(1, round(length * whole / (stop - start))))
    centres = (np.arange(cells) + 0.5) * (whole / cells)
    source = np.floor((centres - start) / (stop - start) * length).astype(np.intp)
    return np.clip(source, 0, length - 1), (source >= 0) & (source < length)


def _is_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def _is_sides(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == 2
        and all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)
    )


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"preprocessing: {name} is {value!r}, expected {expected}; correct it")
