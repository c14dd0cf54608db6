"""Segmentation: augmentation in mmsegmentation's order, class maps of masks, the model that gives class maps."""

from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest
import torch
from attnmap_core.data.loaders import Draw, samples_of
from attnmap_core.data.sources import ImageData, load_data
from attnmap_core.errors import InputError
from PIL import Image
from sar_vit import SARViT, create_architecture, segmentation_data
from sar_vit.segmentation import SARSegmenter, TimmStages
from sar_vit.segmentation_data import (
    SegmentationAugmentation,
    SegmentationInput,
    largest_share,
    photometric_distortion,
    scaled_size,
    with_class_maps,
)
from torch.nn import functional

TINY = {"embed_dims": (4, 4, 4, 8), "depths": (1, 1, 1, 2), "num_heads": (1, 1, 1, 2)}
SIZES = {"neck_channels": 8, "head_channels": 4, "short_side": 64}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def blocks(width: int, height: int, cell: int) -> tuple[Image.Image, np.ndarray]:
    """A photo of flat squares whose red value is ten times their class."""
    rows, columns = np.arange(height)[:, None] // cell, np.arange(width)[None] // cell
    classes = ((rows * 7 + columns * 3) % 20).astype(np.uint8)
    return Image.fromarray(np.stack([classes * 10] * 3, axis=-1)), classes


@pytest.fixture
def model() -> SARSegmenter:
    torch.manual_seed(0)
    return SARSegmenter("pvt_small", 5, 64, **SIZES, backbone_options=TINY)


# --- Augmentation ---------------------------------------------------------------------------------------


def test_sizes_as_released():
    """mmcv's rule: the largest size inside of (2048, 512), rounded half up."""
    generator = random.Random(0)
    for _ in range(300):
        width, height = generator.randint(20, 3000), generator.randint(20, 3000)
        long, short = max(width, height), min(width, height)
        factor = min(2048 / long, 512 / short)
        assert scaled_size(width, height, 512) == (int(height * factor + 0.5), int(width * factor + 0.5))


@pytest.mark.parametrize(("size", "expected"), [((683, 512), (512, 704)), ((500, 375), (512, 704))])
def test_input_of_tests(size, expected):
    photo = Image.effect_noise(size, 60).convert("RGB")
    pixels = SegmentationInput(512, **PLAIN)(photo)
    assert pixels.shape == (3, *expected)
    resized = np.asarray(photo.resize(expected[::-1], Image.Resampling.BILINEAR))  # the whole photo
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), resized / 255, atol=1e-6)


@pytest.mark.parametrize("size", [(200, 150), (150, 200), (90, 400)])
def test_photo_and_class_map_stay_aligned(size):
    photo, classes = blocks(*size, cell=30)
    augment = SegmentationAugmentation(96, photometric=False, class_share=1, **PLAIN)
    random.seed(1)
    padded = 0
    for _ in range(20):
        pixels, labels = augment.with_segmentation(photo, classes)
        assert pixels.shape == (3, 96, 96)
        assert labels.shape == (96, 96)
        assert labels.dtype == torch.int64
        counts = labels != 255
        assert not pixels[:, ~counts].any()
        windows = functional.unfold(functional.pad(labels[None, None].float(), (1, 1, 1, 1), value=-1), 3)
        inside = (windows == windows[:, 4:5]).all(1).view(96, 96) & counts
        # All but the borders of the squares, which blur over a pixel or two.
        assert (pixels[0] * 25.5 - labels)[inside].abs().max() < 5
        assert ((pixels[0] * 25.5).round() == labels)[inside].float().mean() > 0.97
        padded += int((~counts).any())
        rows, columns = counts.any(1), counts.any(0)  # what is filled is one rectangle at the top left
        assert counts.sum() == rows.sum() * columns.sum()
        assert rows[: rows.sum()].all()
        assert columns[: columns.sum()].all()
    assert 0 < padded < 20


def test_scale_and_flip():
    """Scale 1/2 of a photo of exactly the crop's size: half of it, mirrored with probability 1/2."""
    photo, classes = blocks(64, 64, cell=16)
    augment = SegmentationAugmentation(64, (0.5, 0.5), 1, photometric=False, **PLAIN)
    small = torch.from_numpy(classes[::2, ::2].astype(np.int64))
    seen = {"plain": 0, "mirrored": 0}
    random.seed(3)
    for _ in range(200):
        labels = augment.with_segmentation(photo, classes)[1]
        assert (labels[32:] == 255).all()
        assert (labels[:, 32:] == 255).all()
        seen["plain" if torch.equal(labels[:32, :32], small) else "mirrored"] += 1
        assert torch.equal(labels[:32, :32], small) or torch.equal(labels[:32, :32], small.flip(1))
    assert 70 < seen["mirrored"] < 130


def test_crops_of_one_class_are_drawn_again(monkeypatch):
    calls = []
    original = segmentation_data.resample_segmentation
    monkeypatch.setattr(
        segmentation_data,
        "resample_segmentation",
        lambda *args: calls.append(args[1]) or original(*args),
    )
    photo, single = Image.new("RGB", (300, 300)), np.full((300, 300), 4, np.uint8)
    SegmentationAugmentation(32).with_segmentation(photo, single)
    assert len(calls) == 11  # the last is taken as it is
    calls.clear()
    SegmentationAugmentation(32, class_share=1).with_segmentation(photo, single)
    assert len(calls) == 1
    halves = single.copy()
    halves[:, 150:] = 2
    random.seed(0)
    shares = {
        limit: [
            largest_share(SegmentationAugmentation(32, (4, 4), limit).with_segmentation(photo, halves)[1])
            for _ in range(40)
        ]
        for limit in (0.75, 1)
    }
    assert np.mean(np.array(shares[0.75]) >= 0.75) < 0.2 < 0.5 < np.mean(np.array(shares[1]) >= 0.75)
    assert largest_share(torch.full((2, 2), 255)) == 1


def reference_distortion(colour: tuple[int, int, int]) -> list[float]:
    """As mmsegmentation words it, on one colour, in floating point; draws from ``random`` in the same order."""
    rgb = [float(value) for value in colour]

    def clip() -> None:
        rgb[:] = [min(max(value, 0.0), 255.0) for value in rgb]

    def contrast() -> None:
        if random.random() < 0.5:
            factor = random.uniform(0.5, 1.5)
            rgb[:] = [value * factor for value in rgb]
            clip()

    if random.random() < 0.5:
        delta = random.uniform(-32, 32)
        rgb[:] = [value + delta for value in rgb]
        clip()
    first = random.random() < 0.5
    if first:
        contrast()
    h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in rgb))
    if random.random() < 0.5:
        s = min(s * random.uniform(0.5, 1.5), 1.0)
    if random.random() < 0.5:
        h = (h + random.randint(-18, 17) / 180) % 1.0
    rgb[:] = [255 * value for value in colorsys.hsv_to_rgb(h, s, v)]
    if not first:
        contrast()
    return rgb


def test_photometric_distortion_by_hand():
    generator = random.Random(4)
    changed, errors = 0, []
    for seed in range(300):
        colour = tuple(generator.randint(0, 255) for _ in range(3))
        random.seed(seed)
        found = photometric_distortion(np.full((2, 1, 3), colour, np.uint8))
        state = random.random()
        random.seed(seed)
        expected = reference_distortion(colour)
        assert random.random() == state
        assert (found[0] == found[1]).all()
        errors.extend(np.abs(found[0, 0] - np.array(expected)))
        changed += tuple(found[0, 0]) != colour
    assert changed > 220
    assert max(errors) < 12  # hue and saturation in whole numbers, then contrast
    assert np.mean(errors) < 1.5


def test_same_sample_same_crop():
    data = with_class_maps(load_data("synthetic:classes=4,image_size=64,train=8", "train"))
    samples = samples_of(data, SegmentationAugmentation(48), seed=7, with_segmentation=True)
    first, again = samples[Draw(2, 5)], samples[Draw(2, 5)]
    other = samples[Draw(3, 5)]
    for name in ("image", "pixel_labels"):
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["image"], other["image"])


def test_wrong_augmentation():
    with pytest.raises(InputError, match="scale_range 2 1"):
        SegmentationAugmentation(32, (2, 1))
    with pytest.raises(InputError, match=r"class_share 0"):
        SegmentationAugmentation(32, class_share=0)
    with pytest.raises(ValueError, match="expected a class map"):
        SegmentationAugmentation(32).with_segmentation(Image.new("RGB", (4, 6)), np.zeros((4, 6), np.uint8))


# --- Class maps of masks --------------------------------------------------------------------------------


def test_class_maps_of_masks():
    plain = load_data("synthetic:classes=4,image_size=64,train=8", "train")
    data = with_class_maps(plain)
    assert data.segmentation.labels == ("background", *plain.labels)
    assert with_class_maps(data) is data
    for sample, bare in zip(data, plain):
        assert np.array_equal(sample.segmentation == bare.label + 1, bare.mask)
        assert np.array_equal(sample.segmentation == 0, ~bare.mask)
    chosen = data.select([5, 2])
    assert np.array_equal(chosen[1].segmentation, data[2].segmentation)
    assert plain.segmentation is None


def test_masks_of_another_size_and_pixels_to_ignore(monkeypatch):
    data = load_data("synthetic:classes=4,image_size=64,train=2", "train")
    original = ImageData.to_sample

    def coarse(self, row, index):
        sample = original(self, row, index)
        mask, ignore = np.zeros((2, 2), bool), np.zeros((2, 2), bool)
        mask[0, 0], ignore[1, 1], ignore[0, 0] = True, True, True
        return type(sample)(
            **{name: getattr(sample, name) for name in ("image", "label", "boxes_xyxy", "image_id", "index")},
            mask=mask,
            ignore=ignore,
        )

    monkeypatch.setattr(ImageData, "to_sample", coarse)
    classes = with_class_maps(data)[1].segmentation
    assert classes.shape == (64, 64)
    assert (classes[:32, :32] == 2).all()  # label 1; foreground is not ignored
    assert (classes[32:, 32:] == 255).all()
    assert (classes[:32, 32:] == 0).all()


def test_data_without_masks(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    data = with_class_maps(load_data(str(tmp_path), "all"))
    with pytest.raises(InputError, match=r"a\.png: neither a class map nor a mask"):
        data[0]
    many = load_data("synthetic:classes=96,superclasses=1,image_size=32,train=1", "train")
    many.labels = [str(number) for number in range(255)]
    with pytest.raises(InputError, match="255 labels, class maps of masks hold at most 254"):
        with_class_maps(many)


# --- The model ------------------------------------------------------------------------------------------


def test_class_map_is_that_of_scores_enlarged_twice():
    torch.manual_seed(0)
    model = SARSegmenter("pvt_small", 37, 64, **SIZES, backbone_options=TINY).eval()
    with torch.no_grad():
        model.decode_head.conv_seg.weight.normal_()
        image = torch.randn(3, 64, 96)
        found = model.class_map(image, (50, 77))
        scores = model(image[None])
        for size in ((64, 96), (50, 77)):
            scores = functional.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    assert found.dtype == np.uint8
    assert np.array_equal(found, scores[0].argmax(0).numpy())
    assert {index // 16 for index in np.unique(found).tolist()} == {0, 1, 2}


def test_predict(model, tmp_path):
    photo = Image.effect_noise((70, 50), 90).convert("RGB")
    photo.save(tmp_path / "a.png")
    model.train()
    [from_file, from_image] = model.predict([tmp_path / "a.png", photo])
    assert model.training
    assert from_file.shape == (50, 70)
    assert np.array_equal(from_file, from_image)
    assert np.array_equal(model.predict(photo), from_file)
    model.eval()
    with torch.no_grad():
        expected = model.class_map(SegmentationInput(64)(photo), (50, 70))
    assert np.array_equal(from_file, expected)
    with pytest.raises(InputError, match=r"missing\.png"):
        model.predict(tmp_path / "missing.png")


def test_save_and_load(model, tmp_path):
    model.labels = ["a", "b", "c", "d", "e"]
    model.save_pretrained(tmp_path / "folder")
    again = SARSegmenter.from_pretrained(tmp_path / "folder")
    assert again.labels == model.labels
    for (name, tensor), (other, loaded) in zip(model.state_dict().items(), again.state_dict().items()):
        assert name == other
        assert torch.equal(tensor, loaded)
    photo = Image.effect_noise((70, 50), 90).convert("RGB")
    assert np.array_equal(again.predict(photo), model.predict(photo))
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "neck", "decode_head"}
    with pytest.raises(InputError, match="describes a SARSegmenter, expected SARViT"):
        SARViT.from_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("msa_skip", [True, False])
@pytest.mark.parametrize("mlp_norm", [True, False])
def test_backbone_of_a_classifier(msa_skip, mlp_norm):
    switches = {"msa_skip": msa_skip, "mlp_norm": mlp_norm}
    torch.manual_seed(0)
    classifier = SARViT("pvt_small", 3, 64, **switches, backbone_options=TINY).eval()
    model = SARSegmenter("pvt_small", 5, 64, **switches, **SIZES, backbone_options=TINY).eval()
    model.take_backbone(classifier)
    source = classifier.backbone.model
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    lost = source.state_dict().keys() - model.backbone.state_dict().keys()
    assert lost == {"cls_token", "norm.weight", "norm.bias"}
    assert model.backbone.last_block.msa_skip == msa_skip
    # The last stage by hand, in the form that was trained: 4 patch tokens, their own positions, no class token.
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        *_, third, fourth = model.backbone.forward_dense(images)
        tokens, grid = source.patch_embed4(third)
        tokens = tokens + source.pos_embed4[:, 1:]
        for block in source.block4:
            tokens = block(tokens, grid)
    torch.testing.assert_close(fourth.flatten(2).transpose(1, 2), tokens)


def test_another_form_of_the_last_block_is_refused():
    classifier = SARViT("pvt_small", 3, 64, msa_skip=True, mlp_norm=True, backbone_options=TINY)
    model = SARSegmenter("pvt_small", 5, 64, **SIZES, backbone_options=TINY)
    with pytest.raises(InputError, match="norm2"):
        model.take_backbone(classifier)


def test_released_weights(tmp_path):
    torch.manual_seed(0)
    released = create_architecture("pvt_small", num_classes=7, img_size=32, **TINY)
    torch.save({"model": released.state_dict()}, tmp_path / "pvt.pth")
    options = {**SIZES, "backbone_options": TINY, "weights": str(tmp_path / "pvt.pth")}
    model = SARSegmenter("pvt_small", 5, 64, msa_skip=True, mlp_norm=True, **options)
    assert torch.equal(model.backbone.block1[0].attn.q.weight, released.block1[0].attn.q.weight)
    assert model.backbone.pos_embed1.shape[1] == 16 * 16  # resampled from 8x8
    with pytest.raises(InputError, match="not the weights"):
        SARSegmenter("pvt_small", 5, 64, **options)
    changed = SARSegmenter("pvt_small", 5, 64, **options, new_surgery=True)
    assert torch.equal(changed.backbone.block4[1].attn.q.weight, released.block4[1].attn.q.weight)


@pytest.mark.parametrize(
    ("name", "options", "sar"),
    [
        ("pvt_small", TINY, True),
        ("pvt_v2_b0", {"embed_dims": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}, True),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 2)}, True),
        ("resnet18", {}, False),
    ],
)
def test_every_weight_learns(name, options, sar):
    """Distributed training refuses weights that have no part in the scores."""
    torch.manual_seed(0)
    model = SARSegmenter(name, 5, 64, msa_skip=not sar, mlp_norm=not sar, **SIZES, backbone_options=options)
    scores = model.train()(torch.randn(2, 3, 64, 96))
    assert scores.shape == (2, 5, 16, 24)
    scores.square().mean().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_timm_backbone_of_a_classifier():
    options = {"embed_dims": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    classifier = SARViT("pvt_v2_b0", 3, 64, query="avg", backbone_options=options).eval()
    model = SARSegmenter("pvt_v2_b0", 5, 64, **SIZES, backbone_options=options).eval()
    model.take_backbone(classifier)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.forward_dense(images)[-1], classifier.backbone(images).map)
    with pytest.raises(InputError, match="do not fit"):
        SARSegmenter(
            "pvt_v2_b0", 5, 64, msa_skip=True, mlp_norm=True, **SIZES, backbone_options=options
        ).take_backbone(classifier)


def test_swin_takes_photos_of_other_sizes():
    stages = TimmStages(
        "swin_tiny_patch4_window7_224",
        {"msa_skip": False, "mlp_norm": False, "mlp_skip": True},
        embed_dim=12,
        depths=(1, 1, 1, 2),
    )
    shapes = [tuple(maps.shape) for maps in stages.forward_dense(torch.zeros(1, 3, 96, 128))]
    assert shapes == [(1, 12, 24, 32), (1, 24, 12, 16), (1, 48, 6, 8), (1, 96, 3, 4)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SARSegmenter("pvt_small", 256), ValueError, "num_classes must be 1 to 255"),
        (lambda: SARSegmenter("pvt_small", 3, labels=["a"]), ValueError, "1 labels do not fit"),
        (lambda: SARSegmenter("t2t_vit_7", 3), InputError, "gives no maps of strides"),
        (lambda: SARSegmenter("vit_tiny_patch16_224", 3), InputError, "gives no maps of strides"),
        (lambda: SARSegmenter("resnet18", 3), InputError, "backbone resnet18: .*no transformer block"),
        (lambda: SARSegmenter("pvt_small", 3, pretrained=True), InputError, "standard last block"),
        (
            lambda: SARSegmenter("pvt_small", 3, pretrained=True, new_surgery=True),
            InputError,
            "not timm's",
        ),
    ],
)
def test_wrong_settings(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_scores_that_are_not_finite(model):
    model.decode_head.conv_seg.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        model.predict(Image.new("RGB", (40, 40)))
