"""Training images: DeiT's transform as timm makes it, and mixed batches checked from the images themselves."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from attnmap_core.data.transforms import eval_transform
from PIL import Image
from sar_vit import SARViT
from sar_vit.augmentation import batch_mix, photo_transform, preprocessing
from sar_vit.config import SarConfig
from sar_vit.scenarios.supervised import make_task
from sar_vit.task import SupervisedTask
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform
from torch.nn import functional

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth colours with noise on them, 90x70."""
    y, x = np.mgrid[0:70, 0:90]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 5)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return Image.fromarray(np.clip(128 + 90 * waves + noise, 0, 255).astype(np.uint8))


def seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def pixels(photo: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255


def normalised(image: torch.Tensor) -> torch.Tensor:
    return (image - MEAN[:, None, None]) / STD[:, None, None]


# --- Test photos


@pytest.mark.parametrize(
    ("size", "test_crop", "resize"), [(224, 0.875, 256), (224, 0.9, 248), (224, 1.0, None), (32, 0.875, 36)]
)
def test_shorter_side_before_the_crop(size, test_crop, resize):
    found = preprocessing(SarConfig(image_size=size, test_crop=test_crop))
    assert (found.size, found.resize) == ((size, size), resize)
    assert found.crop == ("none" if resize is None else "center")
    assert found.interpolation == "bicubic"


def test_test_photos_are_resized_and_cropped_in_the_middle(photo):
    found = eval_transform(preprocessing(SarConfig(image_size=28)))(photo)
    resized = photo.resize((41, 32), Image.Resampling.BICUBIC)  # 90x70 with the shorter side 28 / 0.875 = 32
    left = round((41 - 28) / 2)
    expected = normalised(pixels(resized.crop((left, 2, left + 28, 30))))
    torch.testing.assert_close(found, expected, atol=2.5 / 255 / STD.min().item(), rtol=0)
    assert (found - expected).abs().mean() < 0.5 / 255 / STD.min()


# --- Training photos


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_deit_is_timms_transform_with_the_published_settings(photo, interpolation):
    ours = photo_transform(SarConfig(image_size=48, crop_interpolation=interpolation))
    theirs = create_transform(
        (48, 48),
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation=interpolation,
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        mean=tuple(MEAN.tolist()),
        std=tuple(STD.tolist()),
    )
    same = 0
    for seed in range(60):
        seeded(seed)
        found = ours(photo)
        seeded(seed)
        try:
            expected = theirs(photo)
        except ValueError:  # posterize to 0 bits, below
            continue
        same += 1
        assert torch.equal(found, expected), seed
    assert same > 50


def test_steps_of_deit():
    steps = {type(step).__name__: step for step in photo_transform(SarConfig()).transforms}
    crop = steps["RandomResizedCropAndInterpolation"]
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert steps["RandomHorizontalFlip"].p == 0.5
    randomly = steps["RandAugment"]
    assert randomly.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in randomly.ops} == {(9, 0.5, 0.5)}
    assert {op.name for op in randomly.ops} >= {"PosterizeIncreasing", "SolarizeAdd", "ShearX"}
    assert "ColorJitter" not in steps  # not beside RandAugment
    erasing = steps["RandomErasing"]
    assert (erasing.probability, erasing.max_count, erasing.rand_color, erasing.per_pixel) == (
        0.25, 1, False, True,
    )  # fmt: skip
    assert list(steps)[-1] == "RandomErasing"  # noise in the scale of what is normalised


def names(**fields) -> list[str]:
    return [type(step).__name__ for step in photo_transform(SarConfig(image_size=32, **fields)).transforms]


def test_settings_take_steps_away():
    assert "ColorJitter" in names(rand_augment="none")
    assert "RandomErasing" not in names(erasing=0.0)
    plain = names(augmentation="crop_flip")
    assert plain[:2] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert not {"RandAugment", "RandomErasing"} & set(plain)
    steps = photo_transform(SarConfig(augmentation="crop_flip", crop_scale=(0.3, 0.9))).transforms
    assert steps[0].scale == (0.3, 0.9)
    for step in steps:
        if type(step).__name__ == "ColorJitter":  # one that does nothing
            assert (step.brightness, step.contrast, step.saturation, step.hue) == (None,) * 4


def test_flip_keeps_the_whole_photo(photo):
    transform = photo_transform(SarConfig(image_size=32, augmentation="flip"))
    torch.manual_seed(0)
    found = torch.stack([transform(photo) for _ in range(12)])
    whole = normalised(pixels(photo.resize((32, 32), Image.Resampling.BICUBIC)))
    limit = 2.5 / 255 / STD.min()
    straight = ((found - whole).abs().amax((1, 2, 3)) < limit).sum()
    mirrored = ((found - whole.flip(-1)).abs().amax((1, 2, 3)) < limit).sum()
    assert straight + mirrored == 12
    assert straight > 0 < mirrored


def test_posterize_without_a_bit_is_black(photo):
    transform = photo_transform(SarConfig(image_size=32, rand_augment="rand-m10-mstd0-inc1"))
    (randomly,) = [step for step in transform.transforms if hasattr(step, "ops")]
    (posterize,) = [operation for operation in randomly.ops if operation.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    assert posterize.level_fn(10, {}) == (0,)  # what timm asks for at full magnitude
    black = posterize(photo)
    assert (black.mode, black.size, black.getextrema()) == ("RGB", photo.size, ((0, 0),) * 3)
    posterize.magnitude = 5
    reference = auto_augment.posterize(photo, 4 - int(5 / 10 * 4))
    assert np.array_equal(np.asarray(posterize(photo)), np.asarray(reference))
    assert len(set(np.asarray(reference).flat)) == 4
    posterize.magnitude = 10
    seeded(0)
    for _ in range(60):
        assert torch.isfinite(transform(photo)).all()


# --- Mixed batches


def batch(b: int, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(b)
    return torch.rand(b, 3, 12, 12, generator=generator), torch.arange(b) % classes


def soft(labels: torch.Tensor, share: float, smoothing: float, classes: int = 5) -> torch.Tensor:
    """Mixed, then smoothed; mixing is linear, so that the order does not matter."""
    one_hot = functional.one_hot(labels, classes).float()
    mixed = share * one_hot + (1 - share) * one_hot.flip(0)
    return (1 - smoothing) * mixed + smoothing / classes


@pytest.mark.parametrize("b", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_images_and_labels_by_one_share(b, smoothing):
    mix = batch_mix(SarConfig(cutmix=0.0, label_smoothing=smoothing), 5)
    images, labels = batch(b)
    before = images.clone()
    seeded(b)
    mixed, targets = mix(images, labels)
    assert torch.equal(images, before)  # the loader's batch is left alone
    difference = images - images.flip(0)
    share = 0.5  # any will do for an image mixed with itself
    if b > 1:
        share = float(((mixed - images.flip(0)) * difference).sum() / difference.square().sum())
        assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(targets, soft(labels, share, smoothing), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(b))


@pytest.mark.parametrize("b", [2, 5])
def test_cutmix_weighs_labels_by_the_area(b):
    mix = batch_mix(SarConfig(mixup=0.0), 5)
    images, labels = batch(b)
    seeded(4)
    mixed, targets = mix(images, labels)
    other = (mixed != images).any(dim=1)
    assert torch.equal(
        mixed[other[:, None].expand_as(mixed)], images.flip(0)[other[:, None].expand_as(mixed)]
    )
    box = other[0]
    rows, columns = box.any(1).sum(), box.any(0).sum()
    assert 0 < rows * columns < 144
    assert box.sum() == rows * columns  # a rectangle
    assert torch.equal(other[-1], box)
    torch.testing.assert_close(targets, soft(labels, 1 - box.float().mean().item(), 0.1))


def test_share_of_batches_and_of_cutmix():
    images, labels = batch(4)
    images = images.round(decimals=2) + 1

    def kinds(**fields) -> dict[str, int]:
        mix = batch_mix(SarConfig(**fields), 5)
        seeded(0)
        counts = {"none": 0, "cutmix": 0, "mixup": 0}
        for _ in range(400):
            mixed, _ = mix(images, labels)
            from_pairs = (mixed == images) | (mixed == images.flip(0))
            kind = "none" if torch.equal(mixed, images) else "cutmix" if from_pairs.all() else "mixup"
            counts[kind] += 1
        return counts

    both = kinds()
    assert both["none"] < 20  # a rectangle of no area
    assert 160 < both["mixup"] < 240
    assert 150 < kinds(mix_prob=0.5)["none"] < 250
    assert kinds(mix_switch_prob=0.0)["mixup"] == 400
    assert kinds(mix_switch_prob=1.0)["mixup"] == 0


def test_unmixed_batches_are_smoothed():
    mix = batch_mix(SarConfig(mix_prob=1e-9), 5)
    images, labels = batch(3)
    mixed, targets = mix(images, labels)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(targets, soft(labels, 1.0, 0.1))


def test_numpys_seed_decides():
    mix = batch_mix(SarConfig(), 5)
    images, labels = batch(6)
    found = []
    for seed in (1, 1, 2):
        seeded(seed)
        found.append([mix(images, labels) for _ in range(3)])
    first, again, other = found
    torch.testing.assert_close(again, first, atol=0, rtol=0)
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, other))


def test_no_mixing_where_all_is_off():
    assert batch_mix(SarConfig(mixup=0.0, cutmix=0.0), 5) is None
    assert batch_mix(SarConfig(mix_prob=0.0), 5) is None


def test_task_mixes_and_smooths_once():
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = SARViT("vit", 5, 12, drop_path_rate=0.0, backbone_options=sizes)
    images, labels = batch(5)
    task = make_task(SarConfig(mix_switch_prob=0.0), 5)
    seeded(7)
    parts = task(model.train(), {"images": images, "labels": labels})
    seeded(7)
    mixed, targets = batch_mix(SarConfig(mix_switch_prob=0.0), 5)(images, labels)
    expected = -(targets * model(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(parts["cross_entropy"], expected.detach())
    unmixed = make_task(SarConfig(mixup=0.0, cutmix=0.0), 5)
    parts = unmixed(model.train(), {"images": images, "labels": labels})
    smooth = -(soft(labels, 1.0, 0.1) * model(images).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(parts["cross_entropy"], smooth.detach())


def test_task_leaves_batches_alone_in_evaluation():
    sizes = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = SARViT("vit", 5, 12, backbone_options=sizes)
    images, labels = batch(4)
    seen: list[bool] = []

    def mix(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(model.training)
        return images, labels

    task = SupervisedTask(mix=mix)
    task(model.train(), {"images": images, "labels": labels})
    with pytest.raises(RuntimeError, match="training mode"):  # maps are collected there alone
        task(model.eval(), {"images": images, "labels": labels})
    assert seen == [True]
