"""S⁰, f, the logits of training and evaluation, the score maps, and how pretrained heads are taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attnmap_core.errors import InputError
from attnmap_core.training import TrainConfig, param_groups
from scm_wsol import SCM, TSCAM
from scm_wsol.calibration import minmax
from torch import Tensor, nn

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def make(cls: type[TSCAM] = TSCAM, **options: Any) -> TSCAM:
    torch.manual_seed(0)
    options = {
        "num_classes": 5,
        "img_size": (16, 24),
        "drop_path_rate": 0.0,
        "backbone_options": TINY,
    } | options
    return cls("vit", **options).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- S⁰ and f


def attention_by_hand(model: TSCAM, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens ``(b, n, c)`` and head-mean CLS rows ``(blocks, b, n)``, without timm's attention."""
    net = model.backbone.model
    tokens = net.patch_embed(images)
    tokens = torch.cat([net.cls_token.expand(len(images), -1, -1), tokens], dim=1) + net.pos_embed
    rows = []
    for block in net.blocks:
        normed = block.norm1(tokens)
        b, n, c = normed.shape
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(normed).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (c // heads) ** 0.5).softmax(-1)
        rows.append(weights[:, :, 0, 1:].mean(1))
        tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return net.norm(tokens)[:, 1:], torch.stack(rows)


def test_maps_are_the_convolved_tokens_and_the_summed_attention(images):
    model = make()
    tokens, rows = attention_by_hand(model, images)
    maps = model.maps(images)
    grid = tokens.transpose(1, 2).reshape(2, 24, 2, 3)
    S = nn.functional.conv2d(grid, model.head.weight, model.head.bias, padding=1)
    torch.testing.assert_close(maps.semantic, S)
    torch.testing.assert_close(maps.attention, rows.sum(0).reshape(2, 2, 3))
    torch.testing.assert_close(maps.logits, S.mean((2, 3)))


def test_attention_blocks_choose_what_is_summed(images):
    _, rows = attention_by_hand(make(), images)
    chosen = make(attention_blocks=[0, -1]).maps(images).attention
    torch.testing.assert_close(chosen.flatten(1), rows[0] + rows[2])


def test_linear_head_is_pooling_then_classifying(images):
    model = make(head_kernel=1)
    pooled = model.backbone(images).tokens.mean(1)
    torch.testing.assert_close(model(images), pooled @ model.head.weight[..., 0, 0].T + model.head.bias)


def test_register_tokens_are_no_patches():
    options = {**TINY, "reg_tokens": 2}
    model = make(backbone_options=options)
    assert model.maps(torch.randn(1, 3, 16, 24).double()).attention.shape == (1, 2, 3)


def test_head_keeps_the_initialisation_of_pytorch():
    weight = make(num_classes=200).head.weight
    bound = (24 * 9) ** -0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_stochastic_depth_grows_linearly_over_the_blocks():
    depths = [getattr(b.drop_path1, "drop_prob", 0.0) for b in make(drop_path_rate=0.1).backbone.blocks]
    assert depths == pytest.approx([0.0, 0.05, 0.1])


# --- training and evaluation


def test_tscam_never_computes_its_attention_in_training(images, monkeypatch):
    tscam, scm = make().train(), make(SCM).train()
    for model in (tscam, scm):
        monkeypatch.setattr(model.tap, "recording", lambda: pytest.fail("the tap was opened"))
    tscam(images).sum().backward()
    with pytest.raises(pytest.fail.Exception):
        scm(images)


def test_logits_of_training_and_evaluation(images):
    tscam, scm = make(), make(SCM, calibration_options={"iterations": 16})
    pooled = tscam.maps(images).semantic.mean((2, 3))
    for model in (tscam, scm):  # the same weights: the seed is the same
        torch.testing.assert_close(model.eval()(images), pooled)
    torch.testing.assert_close(tscam.train()(images), pooled)
    maps = scm.maps(images)
    calibrated, _ = scm.calibration(maps.semantic, minmax(maps.attention.flatten(1)))
    torch.testing.assert_close(scm.train()(images), calibrated.mean((2, 3)))
    assert (scm(images) - pooled).abs().max() > 0.01


@pytest.mark.parametrize("cls", [TSCAM, SCM])
def test_logit_scale_is_for_training_only(cls, images):
    plain, scaled = make(cls), make(cls, logit_scale=12.0)
    assert torch.equal(scaled(images), plain(images))
    torch.testing.assert_close(scaled.train()(images), 12 * plain.train()(images))


def test_training_reaches_the_attention_only_through_calibration(images):
    """The class token's query in the last block acts on nothing but f."""
    for cls, reached in ((TSCAM, False), (SCM, True)):
        model = make(cls)
        queries: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor, kept: list[Tensor] = queries) -> None:
            output.retain_grad()
            kept.append(output)

        model.backbone.blocks[-1].attn.q_norm.register_forward_hook(keep)
        model.train()(images)[:, 0].sum().backward()
        of_class_token = queries[0].grad[:, :, 0]
        assert bool(of_class_token.abs().max() > 1e-12) is reached, cls.__name__


# --- score maps


def test_kinds_of_score_maps(images):
    model = make()
    maps = model.maps(images)
    S, f = maps.semantic, maps.attention
    F = minmax(f.flatten(1)).view_as(f)
    classes = torch.tensor([3, 1])
    of_class = torch.stack([S[0, 3], S[1, 1]])
    expected = {"cam": of_class, "att": f, "tscam": of_class * f, "scm": of_class * F}
    for kind, value in expected.items():
        torch.testing.assert_close(model.class_maps(maps, classes, kind), value)
    several = model.class_maps(maps, torch.tensor([[3, 0, 2], [1, 1, 4]]), "tscam")
    assert several.shape == (2, 3, 2, 3)
    torch.testing.assert_close(several[:, 0], expected["tscam"])
    torch.testing.assert_close(several[1, 2], S[1, 4] * f[1])
    with pytest.raises(ValueError, match="cam, att, tscam, scm, got 'grad'"):
        model.class_maps(maps, classes, "grad")
    with pytest.raises(ValueError, match="combine"):
        model.class_maps(maps, classes, "combine:0,0")


@pytest.mark.parametrize(
    ("cls", "options", "kind"),
    [
        (TSCAM, {}, "tscam"),
        (TSCAM, {"method": "cam"}, "cam"),
        (TSCAM, {"normalise_attention": True}, "scm"),
        (SCM, {}, "scm"),
        (SCM, {"normalise_attention": False}, "tscam"),
    ],
)
def test_localize_gives_the_predicted_classes_own_map(cls, options, kind, images):
    model = make(cls, **options)
    logits, score_maps = model.localize(images)
    maps = model.maps(images)
    assert torch.equal(logits, model(images))
    assert torch.equal(score_maps, model.class_maps(maps, logits.argmax(1), kind))
    assert model.own_kind == kind


def test_combinations_pair_every_semantic_layer_with_every_attention_layer(images):
    model = make(SCM, calibration_options={"blocks": 3, "iterations": [16, 4, 8]})
    maps = model.maps(images)
    classes = torch.tensor([[2, 4], [0, 1]])
    S, F = model.calibrated(maps)
    pairs = model.combined_maps(maps, classes)
    assert pairs.shape == (2, 2, 4, 4, 2, 3)
    for layer in range(4):
        for attention in range(4):
            one = model.class_maps(maps, classes, f"combine:{layer},{attention}")
            torch.testing.assert_close(pairs[:, :, layer, attention], one)
            torch.testing.assert_close(one[1, 0], S[layer, 1, 0] * F[attention, 1])
    torch.testing.assert_close(pairs[:, :, 0, 0], model.class_maps(maps, classes))
    for wrong in ("combine:0,4", "combine:1", "combine:a,b", "combine:-1,0"):
        with pytest.raises(ValueError, match='like "combine:0,3"'):
            model.class_maps(maps, classes, wrong)


# --- with and without the calibration


def test_inference_never_runs_the_calibration(images, monkeypatch):
    model = make(SCM)
    before = model(images), *model.localize(images)
    monkeypatch.setattr(model.calibration, "forward", lambda *args: pytest.fail("the calibration ran"))
    for old, new in zip(before, (model(images), *model.localize(images))):
        assert torch.equal(old, new)


def test_dropping_the_calibration_leaves_every_output(images):
    scm = make(SCM, labels=list("abcde"), threshold=0.3)
    plain = scm.without_calibration()
    assert type(plain) is TSCAM
    assert not any("calibration" in name for name in plain.state_dict())
    assert (plain.labels, plain.threshold, plain.preprocessing) == (scm.labels, 0.3, scm.preprocessing)
    assert not plain.training
    for a, b in zip(scm.localize(images), plain.localize(images)):
        assert torch.equal(a, b)


def test_an_untrained_calibration_on_tscam_weights(images):
    tscam = make(labels=list("abcde"))
    control = SCM.from_tscam(tscam, iterations="release")
    assert [block.iterations for block in control.calibration.blocks] == [16, 4, 4, 4]
    maps = tscam.maps(images)
    for a, b in zip(maps, control.maps(images)):
        assert torch.equal(a, b)
    assert control.own_kind == "scm"
    assert control.labels == tscam.labels


# --- weights


def test_weight_decay_spares_scalars_embeddings_and_one_dimensional_weights():
    model = make(SCM)
    spared = model.no_weight_decay()
    assert {"backbone.model.pos_embed", "backbone.model.cls_token", "head.bias"} <= spared
    assert {f"calibration.blocks.{i}.{name}" for i in range(4) for name in ("lam", "beta")} <= spared
    assert "head.weight" not in spared
    assert "backbone.model.blocks.0.attn.qkv.weight" not in spared
    decayed = [g for g in param_groups(model, TrainConfig(weight_decay=0.05)) if g["weight_decay"] > 0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert spared.isdisjoint(names[id(p)] for group in decayed for p in group["params"])
    assert decayed


def pretrained_file(folder: Path, num_classes: int) -> str:
    """Weights as a pretrained ViT classifier of 16x16 pixels has them: a linear head with bias."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(7)
    network = VisionTransformer(img_size=16, num_classes=num_classes, **TINY)
    network.head.bias.data.normal_()
    torch.save({"model": network.state_dict()}, folder / "vit.pth")
    return str(folder / "vit.pth")


def test_of_a_pretrained_head_only_a_fitting_bias_is_taken(tmp_path):
    weights = pretrained_file(tmp_path, num_classes=5)
    bias = torch.load(weights, weights_only=True)["model"]["head.bias"]
    taken = make(weights=weights)
    torch.testing.assert_close(taken.head.bias.float(), bias)
    assert taken.head.weight.shape == (5, 24, 3, 3)
    for other in (make(weights=weights, num_classes=4), make(weights=weights, reset_head_bias=True)):
        assert other.head.bias.abs().max() < (24 * 9) ** -0.5  # PyTorch's own
    source = torch.load(weights, weights_only=True)["model"]["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(taken.backbone.model.blocks[1].mlp.fc1.weight.float(), source)


def test_position_embeddings_follow_another_grid(tmp_path):
    weights = pretrained_file(tmp_path, num_classes=5)
    model = make(weights=weights, img_size=(32, 56))
    assert model.maps(torch.randn(1, 3, 32, 56).double()).semantic.shape == (1, 5, 4, 7)
    at_home = make(weights=weights, img_size=16)
    source = torch.load(weights, weights_only=True)["model"]["pos_embed"]
    torch.testing.assert_close(at_home.backbone.model.pos_embed.float(), source)


def test_a_folder_needs_no_backbone_weights(tmp_path, images):
    model = make(SCM, weights=pretrained_file(tmp_path, num_classes=5)).float()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "vit.pth").unlink()
    again = SCM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(images.float()), model(images.float()))


# --- wrong arguments


def test_a_backbone_without_class_token_is_refused():
    with pytest.raises(InputError, match=r"backbone resnet18.*choose a ViT"):
        TSCAM("resnet18", 3, 64)
    with pytest.raises(InputError, match=r"attention_blocks \[7\].*3 blocks"):
        make(attention_blocks=[7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, "method must be tscam or cam"),
        ({"head_kernel": 2}, "odd head_kernel"),
        ({"num_classes": 0}, "num_classes >= 1"),
        ({"labels": ["a", "b"]}, "2 labels do not fit num_classes 5"),
        ({"interpolation": "nearest"}, "bicubic or bilinear"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
