"""Transforms against plain Pillow, torchvision and NumPy, and the way back to photo coordinates."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from attnmap_core.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    eval_transform,
    train_transform,
    uint8_to_tensor,
)
from attnmap_core.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as tv


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours plus noise, so that a shift of one pixel shows."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    base = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) % 256], axis=-1)
    return Image.fromarray(np.clip(base + generator.normal(0, 20, base.shape), 0, 255).astype(np.uint8))


def reference_normalise(pixels: np.ndarray, pre: Preprocessing) -> np.ndarray:
    values = (pixels / 255.0 - np.array(pre.mean)) / np.array(pre.std)
    return values.transpose(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("original", [(50, 33), (20, 61), (40, 24)])
def test_the_whole_photo_resized_equals_pillow(
    interpolation: str, size: tuple[int, int], original: tuple[int, int]
) -> None:
    image = photo(*original)
    pre = Preprocessing(size=size, interpolation=interpolation)  # type: ignore[arg-type]
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    resized = np.asarray(image.resize((size[1], size[0]), filters[interpolation]))
    tensor = eval_transform(pre)(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, *size)
    np.testing.assert_allclose(tensor.numpy(), reference_normalise(resized, pre), atol=1e-5)


def test_equal_size_is_passed_through_unchanged() -> None:
    image = photo(40, 24)
    pre = Preprocessing(size=(24, 40))
    np.testing.assert_allclose(
        eval_transform(pre)(image).numpy(), reference_normalise(np.asarray(image), pre), atol=1e-5
    )


@pytest.mark.parametrize("original", [(90, 60), (61, 97), (64, 64), (300, 41), (41, 300)])
@pytest.mark.parametrize("resize", [48, (48, 56)])
def test_centre_crop_equals_torchvision(original: tuple[int, int], resize: int | tuple[int, int]) -> None:
    """One resize of the seen rectangle is Resize followed by CenterCrop, up to rounding to bytes."""
    image = photo(*original)
    pre = Preprocessing(size=(40, 40), resize=resize, crop="center")
    two_steps = tv.Compose(
        [tv.Resize(resize), tv.CenterCrop(40), tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    difference = (pre.denormalise(eval_transform(pre)(image)) - pre.denormalise(two_steps(image))).abs() * 255
    # Pillow rounds to bytes between its two passes and orders them by cost, so a grey level may differ;
    # a window that is off by half a pixel differs by more than ten.
    assert difference.max() < 3
    assert difference.mean() < 0.4


def test_train_defaults_equal_torchvision_draw_for_draw() -> None:
    """Resize to exactly 256 x 256, random 224 crop, mirror: the same window and mirror as torchvision's."""
    pre = Preprocessing()
    ours = train_transform(pre, resize=256)
    theirs = tv.Compose(
        [tv.Resize((256, 256)), tv.RandomCrop(224), tv.RandomHorizontalFlip(0.5), tv.ToTensor()]
    )
    image = photo(300, 180)
    mirrored = 0
    for seed in range(6):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        got = pre.denormalise(ours(image))
        assert ((got - expected).abs() * 255).max() < 1.5
        wrong = (got.flip(-1) - expected).abs().max()
        assert wrong > 0.2  # the comparison would notice a wrong mirror
        torch.manual_seed(seed)
        torch.randint(0, 33, (1,)), torch.randint(0, 33, (1,))
        mirrored += int(torch.rand(1) < 0.5)
    assert 0 < mirrored < 6  # both cases were compared


def test_random_resized_crop_equals_torchvision() -> None:
    pre = Preprocessing(size=(48, 48))
    ours = train_transform(pre, crop="random_resized", scale=(0.2, 0.6), flip=0.0)
    theirs = tv.Compose([tv.RandomResizedCrop(48, scale=(0.2, 0.6)), tv.ToTensor()])
    image = photo(120, 90)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        difference = ((pre.denormalise(ours(image)) - expected).abs() * 255)[:, 4:-4, 4:-4]
        # Inside, the windows agree; at their rim Pillow's box= looks past the edge and a crop cannot.
        assert difference.max() < 1.5


@pytest.mark.parametrize("crop", ["none", "random", "random_resized"])
def test_train_transform_repeats_under_torchs_seed_alone(crop: str) -> None:
    image = photo(70, 50)
    transform = train_transform(Preprocessing(size=(32, 24)), crop=crop, color_jitter=0.4)  # type: ignore[arg-type]
    draws = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        np.random.seed(len(draws))  # noqa: NPY002 - must have no influence
        draws.append(transform(image))
    assert draws[0].shape == (3, 32, 24)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_default_resize_is_eight_sevenths() -> None:
    assert train_transform(Preprocessing(size=(224, 112))).resize == (256, 128)  # type: ignore[attr-defined]


def test_flip_probability_zero_and_one() -> None:
    image = photo(32, 32)
    pre = Preprocessing(size=(32, 32))
    straight = train_transform(pre, crop="none", flip=0.0)(image)
    mirrored = train_transform(pre, crop="none", flip=1.0)(image)
    assert torch.equal(straight.flip(-1), mirrored)
    assert torch.equal(straight, eval_transform(pre)(image))


@pytest.mark.parametrize("original", [(1, 1), (20000, 3), (3, 20000), (1, 500)])
@pytest.mark.parametrize(
    "pre",
    [
        Preprocessing(size=(32, 48)),
        Preprocessing(size=(32, 48), crop="center"),
        Preprocessing(size=(32, 32), resize=40, crop="center"),
        Preprocessing(size=(32, 32), resize=(36, 70), crop="center"),
    ],
    ids=["whole", "cover", "shorter", "exact"],
)
def test_extreme_sizes(original: tuple[int, int], pre: Preprocessing) -> None:
    image = photo(*original)
    augment = train_transform(pre)
    for tensor in (eval_transform(pre)(image), augment(image)):
        assert tensor.shape == (3, *pre.size)
        assert torch.isfinite(tensor).all()
    left, top, right, bottom = pre.seen_rectangle(*original)
    assert 0 <= left < right <= original[0]
    assert 0 <= top < bottom <= original[1]
    assert max(pre.to_photo_map(np.ones((4, 4), np.float32), *original).shape) <= 4096


PREPROCESSINGS = [
    Preprocessing(size=(40, 56)),
    Preprocessing(size=(40, 56), crop="center"),
    Preprocessing(size=(48, 48), resize=56, crop="center"),
    Preprocessing(size=(48, 48), resize=(60, 80), crop="center"),
]


@pytest.mark.parametrize("pre", PREPROCESSINGS, ids=["whole", "cover", "shorter", "exact"])
@pytest.mark.parametrize("original", [(200, 130), (110, 240)])
def test_a_box_found_in_the_input_maps_back_to_the_photo(
    pre: Preprocessing, original: tuple[int, int]
) -> None:
    """A white rectangle painted into a black photo comes back to within one input pixel."""
    width, height = original
    truth = np.array([width * 0.42, height * 0.4, width * 0.6, height * 0.55]).round()
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[int(truth[1]) : int(truth[3]), int(truth[0]) : int(truth[2])] = 255
    white = pre.denormalise(eval_transform(pre)(Image.fromarray(pixels)))[0] > 0.5
    rows, columns = np.nonzero(white.numpy())
    found = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], float)
    left, top, right, bottom = pre.seen_rectangle(width, height)
    tolerance = 1.01 * max((right - left) / pre.size[1], (bottom - top) / pre.size[0])
    mapped = pre.to_photo_coordinates(found, width, height)
    np.testing.assert_allclose(mapped[0], truth, atol=tolerance)


@pytest.mark.parametrize("pre", PREPROCESSINGS, ids=["whole", "cover", "shorter", "exact"])
def test_a_score_map_laid_over_the_photo_shows_the_same_place(pre: Preprocessing) -> None:
    width, height = 220, 130
    score_map = np.zeros(pre.size, np.float32)
    score_map[10:20, 12:30] = 0.7
    whole = pre.to_photo_map(score_map, width, height)
    assert whole.dtype == np.float32
    rows, columns = np.nonzero(whole)
    cell = np.array([width / whole.shape[1], height / whole.shape[0]] * 2)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * cell
    expected = pre.to_photo_coordinates(np.array([[12.0, 10.0, 30.0, 20.0]]), width, height)[0]
    np.testing.assert_allclose(found, expected, atol=1.01 * cell.max())


def test_cover_keeps_the_aspect_and_the_middle() -> None:
    left, top, right, bottom = Preprocessing(size=(50, 100), crop="center").seen_rectangle(400, 400)
    assert (left, right) == (0, 400)
    assert (top, bottom) == (100, 300)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    more=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    kind=st.sampled_from(["cover", "shorter", "exact"]),
)
def test_the_seen_rectangle_is_inside_the_photo(
    width: int, height: int, size: tuple[int, int], more: tuple[int, int], kind: str
) -> None:
    resize = {
        "cover": None,
        "shorter": max(size) + more[0],
        "exact": (size[0] + more[0], size[1] + more[1]),
    }[kind]
    pre = Preprocessing(size=size, resize=resize, crop="center")  # type: ignore[arg-type]
    left, top, right, bottom = pre.seen_rectangle(width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if kind != "exact" and min(width, height) > 400:  # aspect kept, up to the rounding of the resized side
        assert (right - left) / (bottom - top) == pytest.approx(size[1] / size[0], rel=0.02 + 1 / min(size))


def test_normalise_and_back() -> None:
    pre = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    normal = pre.normalise(images)
    assert normal[1, 2, 0, 0].item() == pytest.approx((images[1, 2, 0, 0].item() - 0.3) / 2.0)
    torch.testing.assert_close(pre.denormalise(normal), images)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        pre.normalise(torch.rand(3, 4))


def test_uint8_to_tensor_is_exact_and_does_not_share_memory() -> None:
    pixels = np.asarray(photo(7, 5)).copy()
    tensor = uint8_to_tensor(pixels)
    np.testing.assert_allclose(tensor.numpy().transpose(1, 2, 0), pixels / 255, atol=1e-7)
    before = tensor.clone()
    pixels[:] = 0
    assert torch.equal(tensor, before)
    with pytest.raises(ValueError, match="uint8"):
        uint8_to_tensor(pixels.astype(np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pre", [*PREPROCESSINGS, Preprocessing(interpolation="bicubic", mean=(0.5, 0.5, 0.5))]
)
def test_dictionary_round_trip_through_json(pre: Preprocessing) -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(pre.to_dict()))) == pre


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"men": [0.5, 0.5, 0.5]}, "unknown key 'men'.*mean"),
        ({"mean": [0.5, 0.5]}, "mean is .*three"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean is .*finite"),
        ({"std": [0.5, 0.5, 0]}, "std is .*above 0"),
        ({"size": [224]}, "size is .*two"),
        ({"size": [224, 0]}, "size is .*above 0"),
        ({"size": [224.0, 224]}, "size is .*whole"),
        ({"crop": "middle"}, "crop is 'middle', expected none or center"),
        ({"interpolation": "lanczos"}, "interpolation is 'lanczos'"),
        ({"resize": 256}, "resize is 256, expected None without a centre crop"),
        ({"resize": 200, "crop": "center"}, "resize is 200, expected .*not below size"),
        ({"resize": [256, 100], "crop": "center"}, "resize is .256, 100., expected .*not below size"),
    ],
)
def test_wrong_values_are_one_line_input_errors(values: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        Preprocessing.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resize": 100}, "resize is 100"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"crop": "five"}, "crop is 'five'"),
        ({"color_jitter": -1}, "color_jitter is -1"),
        ({"scale": (0.9, 0.1)}, "scale is"),
    ],
)
def test_wrong_train_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        train_transform(Preprocessing(), **options)  # type: ignore[arg-type]


def test_only_rgb_is_accepted() -> None:
    with pytest.raises(ValueError, match="mode 'L'"):
        eval_transform(Preprocessing())(Image.new("L", (4, 4)))


def test_transforms_can_be_sent_to_workers() -> None:
    image = photo(30, 20)
    for transform in (
        eval_transform(Preprocessing(size=(8, 8))),
        train_transform(Preprocessing(size=(8, 8))),
    ):
        torch.manual_seed(3)
        here = transform(image)
        torch.manual_seed(3)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(image), here)


def test_from_timm_reads_the_models_numbers() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, depth=1, img_size=(64, 96), num_classes=2
    )
    pre = Preprocessing.from_timm(model)
    assert pre == Preprocessing(
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), size=(64, 96), interpolation="bicubic"
    )
    assert Preprocessing.from_timm(model, interpolation="bilinear", size=(32, 32)).size == (32, 32)


def test_from_timm_crop_equals_timms_own_transform() -> None:
    model = timm.create_model("resnet10t", pretrained=False, num_classes=2)
    pre = Preprocessing.from_timm(model, crop="center")
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**config, is_training=False)
    image = photo(400, 250)
    difference = (pre.denormalise(eval_transform(pre)(image)) - pre.denormalise(theirs(image))).abs() * 255
    assert difference.max() < 1.5


# --- Class maps -------------------------------------------------------------------------------------------


def coded(width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """A photo whose colour is black or white by the class of each pixel, in blocks of 8 pixels."""
    blocks = np.random.default_rng(0).integers(0, 2, (-(-height // 8), -(-width // 8)), dtype=np.uint8)
    classes = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width].copy()
    return Image.fromarray(np.repeat(classes[..., None] * 255, 3, axis=2)), classes


@pytest.mark.parametrize("original", [(90, 60), (61, 97)])
@pytest.mark.parametrize("kind", ["eval", "centre", "random", "random_resized", "whole"])
def test_class_map_moves_with_the_image(original: tuple[int, int], kind: str) -> None:
    image, classes = coded(*original)
    pre = (
        Preprocessing(size=(40, 48), resize=56, crop="center")
        if kind == "centre"
        else Preprocessing(size=(40, 48))
    )
    crops = {"random": "random", "random_resized": "random_resized", "whole": "none"}
    transform = train_transform(pre, crop=crops[kind]) if kind in crops else eval_transform(pre)
    for seed in range(6):
        torch.manual_seed(seed)
        alone = transform(image)
        after = torch.rand(1)
        torch.manual_seed(seed)
        tensor, labels = transform.with_segmentation(image, classes)
        assert torch.equal(tensor, alone)
        assert torch.equal(torch.rand(1), after)  # the map draws nothing of its own
        assert (labels.dtype, labels.shape) == (torch.int64, (40, 48))
        # Blocks meet along lines, where the image is a mixture; a shift of a pixel would spoil many more.
        gray = pre.denormalise(tensor)[0]
        clear = (gray - 0.5).abs() > 0.49
        assert clear.float().mean() > 0.3
        assert ((gray > 0.5).long() == labels)[clear].all()
        assert ((gray > 0.5).long() == labels).float().mean() > 0.93


def test_class_map_is_resized_as_pillow_resizes_palette_pictures() -> None:
    classes = np.random.default_rng(1).choice(np.array([0, 5, 20, 255], np.uint8), (37, 53))
    palette = Image.fromarray(classes).convert("P")
    palette.putdata(classes.ravel().tolist())
    pre = Preprocessing(size=(48, 48))
    _, labels = eval_transform(pre).with_segmentation(Image.new("RGB", (53, 37)), classes)
    np.testing.assert_array_equal(labels.numpy(), np.asarray(palette.resize((48, 48))))
    assert set(labels.unique().tolist()) == {0, 5, 20, 255}


def test_class_map_of_another_size_is_refused() -> None:
    for classes in (np.zeros((4, 5), np.uint8), np.zeros((5, 4), np.int64)):
        for transform in (
            eval_transform(Preprocessing(size=(8, 8))),
            train_transform(Preprocessing(size=(8, 8))),
        ):
            with pytest.raises(ValueError, match="expected a uint8 class map"):
                transform.with_segmentation(Image.new("RGB", (4, 5)), classes)
