"""Backbones, gates and heads, the maps of the model, and boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attnmap_core.errors import InputError
from contrastive_cam import ContrastiveCAM, caam, ptap
from contrastive_cam.attention import PretextHeads, channel_gate
from contrastive_cam.backbones import colocalization_backbone, first_cell, receptive_shift, shifted_upsampling
from contrastive_cam.inference import heat_map
from PIL import Image
from torch import nn

TINY_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
TINY_RESNET = {"channels": (8, 8, 16, 16), "stem_width": 8, "zero_init_last": False}


@pytest.mark.parametrize(("name", "grid"), [("legacy_seresnet50", 4), ("resnet50", 4), ("vgg16_bn", 8)])
def test_last_stage_keeps_its_size(name, grid):
    backbone = colocalization_backbone(name, (64, 64))
    assert backbone.grid() == (grid, grid)
    assert backbone.stride == (64 // grid, 64 // grid)
    plain = colocalization_backbone(name, (64, 64), last_stage="timm")
    assert plain.grid() == (2, 2)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in backbone.state_dict().items()
    }
    momenta = {m.momentum for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.001 if name == "vgg16_bn" else 0.1}


def test_sizes_of_the_published_backbone():
    model = ContrastiveCAM(tasks="R+T", gate="none")
    assert model.backbone.grid() == (14, 14)
    assert model.backbone.num_features == 2048
    assert sum(p.numel() for p in model.parameters()) == 26_053_367  # with a 4-way and a 3-way head


def test_dilation_keeps_the_receptive_field():
    """With dilation, every second cell of an open last stage equals the strided stage, borders aside."""
    strided = colocalization_backbone("resnet10t", (128, 128), last_stage="timm", **TINY_RESNET).eval()
    opened = colocalization_backbone("resnet10t", (128, 128), last_stage="dilated", **TINY_RESNET).eval()
    opened.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, 128, 128)
    for net in (strided, opened):
        for block in net.model.layer4:  # the averaging shortcut of this variant sees 2x2 cells, or one
            if block.downsample is not None:
                block.downsample[0] = nn.AvgPool2d(1, net.stride[0] // 16)
    with torch.no_grad():
        a, b = strided(images).map, opened(images).map
    torch.testing.assert_close(b[..., ::2, ::2], a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["legacy_seresnet50", "resnet50", "vgg16_bn"])
def test_features_before_the_last_relu(name):
    options = {"zero_init_last": False} if name == "resnet50" else {}
    after = colocalization_backbone(name, (32, 32), **options).eval()
    before = colocalization_backbone(name, (32, 32), feature="pre_relu", **options).eval()
    before.load_state_dict(after.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        raw, F = before(images).map, after(images).map
    assert raw.min() < 0
    torch.testing.assert_close(raw.relu(), F)  # also after the max-pooling of VGG


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("vgg11", {"last_stage": "dilated"}, "no strided convolution"),
        ("mobilenetv2_050", {"feature": "pre_relu"}, "no last ReLU"),
        ("resnet50", {"output_stride": 16}, "stride 1 already"),
    ],
)
def test_what_a_backbone_lacks(name, options, complaint):
    with pytest.raises(InputError, match=complaint):
        colocalization_backbone(name, (32, 32), **options)


def test_other_networks_are_left_alone():
    net = colocalization_backbone("mobilenetv2_050", (64, 64), output_stride=16)
    assert net.grid() == (4, 4)
    with pytest.raises(InputError, match="not known"):
        first_cell(net)
    vit = colocalization_backbone("vit", (64, 64), **TINY_VIT)
    assert receptive_shift(vit) == (0, 0)


@pytest.mark.parametrize("name", ["legacy_seresnet50", "resnet50", "vgg16"])
def test_first_cell_is_the_centre_of_the_receptive_field(name):
    """Kernels, strides and paddings along the main path, which is what the shortcuts are aligned to."""
    backbone = colocalization_backbone(name, (64, 64))
    net = backbone.model
    if name == "vgg16":
        layers = [layer for layer in net.features if isinstance(layer, (nn.Conv2d, nn.MaxPool2d))]
    else:
        stem = [net.conv1, net.maxpool] if name == "resnet50" else [net.layer0.conv1, net.pool0]
        blocks = [block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage]
        layers = [*stem, *(layer for block in blocks for layer in (block.conv1, block.conv2, block.conv3))]
    centre, jump = 0.0, 1.0
    for layer in layers:
        kernel, stride, padding = (np.ravel(x)[0] for x in (layer.kernel_size, layer.stride, layer.padding))
        centre += ((kernel - 1) / 2 - padding) * jump
        jump *= stride
    assert backbone.stride == (jump, jump)
    assert first_cell(backbone) == (centre, centre)


def test_shifted_upsampling():
    maps = torch.rand(2, 5, 7, dtype=torch.float64)
    plain = torch.nn.functional.interpolate(maps.unsqueeze(1), (20, 21), mode="bilinear").squeeze(1)
    torch.testing.assert_close(shifted_upsampling(maps, (20, 21), (0, 0)), plain)
    ramp = torch.arange(6.0).expand(1, 6, 6)
    moved = shifted_upsampling(ramp, (12, 12), (0, 0.5))
    torch.testing.assert_close(moved[0, 0, 3:7], torch.arange(3, 7) / 2 - 0.25 + 0.5)


@pytest.mark.parametrize("kind", ["eca3", "eca_adaptive", "se", "none"])
def test_gates(kind):
    torch.manual_seed(0)
    gate, F = channel_gate(kind, 32), torch.rand(2, 32, 3, 4)
    a = gate.weights(F)
    assert ((a > 0) & (a <= 1)).all()
    torch.testing.assert_close(gate(F), a * F)
    if kind == "eca3":
        w, g = gate.layer.conv.weight.flatten(), F.mean((2, 3))
        padded = torch.nn.functional.pad(g, (1, 1))
        z = w[0] * padded[:, :-2] + w[1] * padded[:, 1:-1] + w[2] * padded[:, 2:]
        torch.testing.assert_close(a.flatten(1), z.sigmoid())
        assert w.abs().max() <= 3**-0.5
    with pytest.raises(ValueError, match="gate must be"):
        channel_gate("softmax", 32)


def test_kernels_of_the_adaptive_gate():
    assert [channel_gate("eca_adaptive", c).layer.conv.kernel_size for c in (512, 2048)] == [(5,), (7,)]


def test_heads_are_means_of_planes():
    heads, F = PretextHeads(6, {"rotation": 4, "scale": 3}), torch.randn(2, 6, 4, 5)
    for name, planes in heads.planes(F).items():
        torch.testing.assert_close(planes.mean((2, 3)), heads(F)[name])


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def test_maps_of_the_model(images):
    torch.manual_seed(0)
    options = {"img_size": 64, "backbone_options": TINY_RESNET, "ratio": 0.3}
    model = ContrastiveCAM("resnet10t", "R", **options).eval()
    with torch.no_grad():
        views = model(images)
        torch.testing.assert_close(views.weighted, model.gate(views.features))
        torch.testing.assert_close(views.attention, ptap(views.weighted, 0.3))
        torch.testing.assert_close(views.logits["rotation"], model.heads(views.weighted)["rotation"])
        assert torch.equal(model.localize(images).score_maps, views.attention)
        expected = {"ptap": views.attention, "caam": caam(views.features), "avg_fw": caam(views.weighted)}
        for eval_map, maps in expected.items():
            other = ContrastiveCAM("resnet10t", "R", eval_map=eval_map, heads_read="F", **options).eval()
            other.load_state_dict(model.state_dict())
            torch.testing.assert_close(other.localize(images).score_maps, maps)
            torch.testing.assert_close(
                other(images).logits["rotation"], model.heads(views.features)["rotation"]
            )
        moved = ContrastiveCAM("resnet10t", "R", map_offset="receptive_field", **options).eval()
        moved.load_state_dict(model.state_dict())
        found = moved.localize(images).score_maps
    torch.testing.assert_close(found, shifted_upsampling(views.attention, (64, 64), (7.5 / 16, 7.5 / 16)))


def test_predictions_have_one_class_and_the_heat_map(images):
    model = ContrastiveCAM("vit", "R", 64, labels=["raccoon"], backbone_options=TINY_VIT)
    photo = Image.effect_noise((64, 64), 90).convert("RGB")
    prediction = model.predict(photo)
    assert (prediction.label_name, prediction.probability) == ("raccoon", 1.0)
    from attnmap_core.data.transforms import eval_transform

    with torch.no_grad():
        A = model.eval().localize(eval_transform(model.preprocessing)(photo)[None]).score_maps[0]
    np.testing.assert_allclose(prediction.score_map, heat_map(A.numpy(), (64, 64)), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"gate": "softmax"}, "gate must be"),
        ({"ratio": 0.0}, "ratio must be"),
        ({"pooling": "median"}, "pooling must be"),
        ({"rank": "abs", "pooling": "max"}, "goes with pooling='pixel'"),
        ({"eval_map": "cam"}, "eval_map must be"),
        ({"heads_read": "A"}, "heads_read must be"),
        ({"tasks": "spin"}, "expected different ones"),
        ({"labels": ["cat", "dog"]}, "expected one"),
        ({"labels": []}, "expected one"),
        ({"last_stage": "open"}, "last_stage must be"),
        ({"feature": "both"}, "feature must be"),
    ],
)
def test_bad_options(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        ContrastiveCAM("vit", img_size=64, backbone_options=TINY_VIT, **options)
