"""Training images as DeiT's protocol has them: timm's transforms for photos, timm's Mixup and CutMix for batches.

Touvron et al., "Training data-efficient image transformers", 2021, table 9; SAR changes nothing of it. The spatial
entropy is that of the mixed images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnmap_core.data.transforms import Preprocessing, train_transform
from attnmap_core.errors import InputError
from PIL import Image, ImageOps
from torch import Tensor

from .config import SarConfig
from .task import Mix


def preprocessing(config: SarConfig) -> Preprocessing:
    """Of test photos: the shorter side resized, the centre cropped; with ``test_crop = 1`` the whole photo."""
    side = config.image_size
    crop: dict[str, Any] = {}
    if config.test_crop < 1:
        crop = {"crop": "center", "resize": int(side / config.test_crop)}
    return Preprocessing(size=(side, side), mean=config.mean, std=config.std, interpolation="bicubic", **crop)


def photo_transform(config: SarConfig) -> Callable[[Image.Image], Tensor]:
    """What happens to a training photo.

    Raises:
        InputError: for a ``rand_augment`` that timm cannot read.

    Example:
        >>> photo_transform(SarConfig(image_size=32))(Image.new("RGB", (50, 40))).shape
        torch.Size([3, 32, 32])
    """
    size = (config.image_size, config.image_size)
    if config.augmentation == "flip":
        plain = Preprocessing(size=size, mean=config.mean, std=config.std, interpolation="bicubic")
        return train_transform(plain, resize=config.image_size, flip=0.5)
    from timm.data.transforms_factory import create_transform

    full = config.augmentation == "deit"
    try:
        transform: Any = create_transform(
            config.image_size,
            is_training=True,
            scale=config.crop_scale,
            color_jitter=config.color_jitter if full else 0.0,
            auto_augment=config.rand_augment if full and config.rand_augment != "none" else None,
            interpolation=config.crop_interpolation,
            re_prob=config.erasing if full else 0.0,
            re_mode="pixel",
            re_count=1,
            mean=config.mean,
            std=config.std,
        )
    except AssertionError as error:  # how timm refuses what it cannot read
        raise InputError(
            f"rand_augment {config.rand_augment}: {error}; expected timm's form, such as rand-m9-mstd0.5-inc1, or none"
        ) from None
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):  # RandAugment's
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    # At full magnitude timm's own keeps no bit, which newer Pillows refuse; it used to make a black image.
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def batch_mix(config: SarConfig, classes: int) -> Mix | None:
    """Mixup and CutMix of a batch, which make soft targets with label smoothing; None where both are off.

    Images are paired with the batch in reverse order. Draws come from numpy's global generator.

    Example:
        >>> import torch
        >>> mix = batch_mix(SarConfig(), classes=3)
        >>> images, targets = mix(torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2]))
        >>> images.shape, targets.sum(dim=1).allclose(torch.ones(3))
        (torch.Size([3, 3, 8, 8]), True)
    """
    if config.mix_prob == 0 or (config.mixup == 0 and config.cutmix == 0):
        return None
    from timm.data.mixup import Mixup, mixup_target

    mixup: Any = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mix_prob,
        switch_prob=config.mix_switch_prob,
        mode="batch",
        label_smoothing=config.label_smoothing,
        num_classes=classes,
    )

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.clone()
        # Its own call refuses an odd batch for the sake of its other modes; a whole batch has a reverse in any case.
        share: float = mixup._mix_batch(images)
        return images, mixup_target(labels, classes, share, config.label_smoothing)

    return mix
