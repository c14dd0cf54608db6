"""What holds for all of them: published sizes, timm's interface, the last block, training."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from attnmap_core.backbones import Backbone
from attnmap_core.errors import InputError
from attnmap_core.training import TrainConfig, param_groups
from sar_vit.architectures import ARCHITECTURES, ClassTokenTransformer, create_architecture
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SAR = {"msa_skip": False, "mlp_norm": False}
SWITCHES = ("msa_skip", "mlp_norm", "mlp_skip")
EVERY_FORM = [dict(zip(SWITCHES, values)) for values in itertools.product((True, False), repeat=3)]

# Parameters as the releases have them; trainable ones; width of the last block; published millions; the
# published 10⁹ multiply-adds at 224 pixels.
PUBLISHED = {
    "t2t_vit_7": (4_310_222, 4_255_694, 256, 4.3, 1.1),
    "t2t_vit_10": (5_889_230, 5_834_702, 256, 5.9, 1.5),
    "t2t_vit_12": (6_941_902, 6_887_374, 256, 6.9, 1.8),
    "t2t_vit_14": (21_545_550, 21_465_806, 384, 21.5, 4.8),
    "t2t_vit_19": (39_177_422, 39_085_070, 448, 39.2, 8.5),
    "t2t_vit_24": (64_105_934, 64_000_974, 512, 64.1, 13.8),
    "t2t_vit_14_transformer": (21_541_070, 21_465_422, 384, 21.5, 6.1),
    "t2t_vit_19_transformer": (39_172_942, 39_084_686, 448, 39.2, 9.8),
    "t2t_vit_24_transformer": (64_101_454, 64_000_590, 512, 64.1, 15.0),
    "pvt_tiny": (13_229_288, 13_229_288, 512, 13.2, 1.9),
    "pvt_small": (24_485_864, 24_485_864, 512, 24.5, 3.8),
    "pvt_medium": (44_208_104, 44_208_104, 512, 44.2, 6.7),
    "pvt_large": (61_369_320, 61_369_320, 512, 61.4, 9.8),
    "cvt_13": (19_997_480, 19_997_480, 384, 20.0, 4.5),
    "cvt_21": (31_622_696, 31_622_696, 384, 31.6, 7.1),
}
each_published = pytest.mark.parametrize("published", PUBLISHED)


def on_meta(name: str, **options: Any) -> ClassTokenTransformer:
    with torch.device("meta"):
        return create_architecture(name, **options)


def count(model: nn.Module, trainable: bool = False) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trainable)


# --- Published sizes


def test_every_architecture_has_a_published_size():
    assert set(PUBLISHED) == {name for name in ARCHITECTURES if not name.endswith("_nano")}


@each_published
def test_parameters(published):
    parameters, trainable, dim, millions, _ = PUBLISHED[published]
    model = on_meta(published)
    assert (count(model), count(model, trainable=True)) == (parameters, trainable)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.06)
    assert model.num_features == model.embed_dim == dim


@pytest.mark.parametrize(
    ("published", "with_sar"),
    [("t2t_vit_14", 21_544_782), ("pvt_small", 24_484_840), ("cvt_13", 19_996_712)],
)
def test_parameters_with_sar(published, with_sar):
    assert count(on_meta(published, last_block=SAR)) == with_sar
    model = on_meta(published)
    before = count(model)
    model.set_last_block(**SAR)
    assert before - count(model) == 2 * model.num_features


@pytest.mark.parametrize(
    "published",
    ["t2t_vit_7", "t2t_vit_14", "t2t_vit_14_transformer", "pvt_tiny", "pvt_small", "cvt_13", "cvt_21"],
)
def test_multiply_adds(published):
    """The papers count one multiply-add where PyTorch counts two operations; both leave out element-wise work.

    Attention's two products are counted. CvT's paper leaves something out that takes 1.5 %: hence 2 %.
    """
    model = on_meta(published).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    published_g = PUBLISHED[published][-1]
    assert counter.get_total_flops() / 2e9 == pytest.approx(published_g, rel=0.02, abs=0.05)


@pytest.mark.parametrize(
    ("published", "keys", "tokens"),
    [("t2t_vit_14", (14, 14), (14, 14)), ("pvt_small", (7, 7), (7, 7)), ("cvt_13", (7, 7), (14, 14))],
)
def test_grids_at_224(published, keys, tokens):
    model = on_meta(published)
    assert (model.key_grid(), model.token_grid()) == (keys, tokens)
    attention = model.last_block.attn
    scale = {"t2t_vit_14": 64, "pvt_small": 64, "cvt_13": 384}[published] ** -0.5
    assert attention.scale == pytest.approx(scale)
    assert attention.num_heads == {"t2t_vit_14": 6, "pvt_small": 8, "cvt_13": 6}[published]


def test_every_attention_tells_heads_and_scale(make, name):
    for block in make(name).all_blocks:
        assert block.attn.num_heads >= 1
        assert 0 < block.attn.scale <= 1


# --- timm's interface


def test_shapes(make, name, images):
    model = make(name)
    h, w = model.token_grid()
    tokens = model.forward_features(images)
    assert tokens.shape == (2, model.num_prefix_tokens + h * w, model.num_features)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, model.num_features)
    torch.testing.assert_close(model.forward_head(tokens), model(images))
    torch.testing.assert_close(model(images), model.head(tokens[:, 0]))
    assert model(images).shape == (2, 5)


def test_reset_classifier(make, name, images):
    model = make(name)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(images).shape == (2, 7)
    assert model.get_classifier().weight.dtype == torch.float64
    model.reset_classifier(0, global_pool="token")
    torch.testing.assert_close(model(images), model.forward_features(images)[:, 0])
    with pytest.raises(ValueError, match="class token"):
        model.reset_classifier(3, global_pool="avg")


def test_without_classes_at_construction(make, name, images):
    assert make(name, num_classes=0)(images).shape == (2, 12)


def test_default_cfg_is_that_of_imagenet(make, name):
    cfg = make(name).default_cfg
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["input_size"] == (3, 64, 64)


def test_images_of_one_batch_do_not_influence_each_other(make, name, images):
    model = make(name)
    assert model(images[:1]).shape == (1, 5)
    torch.testing.assert_close(torch.cat([model(images[:1]), model(images[1:])]), model(images))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 128), (72, 100)])
def test_other_sizes(make, name, size):
    model = make(name)
    keys: list[Tensor] = []
    handle = model.last_block.attn.k_norm.register_forward_hook(lambda *call: keys.append(call[2]))
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    tokens = model.forward_features(x)
    handle.remove()
    (h, w), (rows, columns) = model.token_grid(size), model.key_grid(size)
    assert tokens.shape[1] == 1 + h * w
    assert keys[0].shape[2] == 1 + rows * columns
    assert torch.isfinite(model(x)).all()


def test_a_model_made_for_a_size_equals_one_resampled_to_it_only_in_shape(make, name):
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    assert make(name, img_size=(96, 64))(x).shape == make(name)(x).shape


@pytest.mark.parametrize("architecture", ["pvt_small", "cvt_13"])
def test_too_small_images_are_refused(make, architecture):
    with pytest.raises(ValueError, match="too small"):
        make(architecture)(torch.zeros(1, 3, 2, 2, dtype=torch.float64))


def test_core_takes_it_as_a_backbone(make, name, images):
    model, images = make(name).float(), images.float()
    expected = model.forward_features(images)
    backbone = Backbone(model, name, (64, 64))
    features = backbone(images)
    torch.testing.assert_close(features.tokens, expected[:, 1:])
    torch.testing.assert_close(features.prefix, expected[:, :1])
    assert features.grid == backbone.grid() == model.token_grid()
    assert backbone.no_weight_decay() == {f"model.{key}" for key in model.no_weight_decay()}


def test_only_embeddings_and_one_dimensional_weights_escape_decay(make, name):
    model = make(name)
    [cls_token] = model.no_weight_decay()
    assert cls_token.endswith("cls_token")
    decayed, free = set(), set()
    names = {id(weight): key for key, weight in model.named_parameters()}
    for group in param_groups(model, TrainConfig(weight_decay=0.05)):
        (decayed if group["weight_decay"] else free).update(names[id(weight)] for weight in group["params"])
    assert cls_token in free
    assert all(key == cls_token or model.get_parameter(key).ndim <= 1 for key in free)
    assert all("norm" not in key and ".bn." not in key and "bias" not in key for key in decayed)


def test_unknown_names_and_sizes():
    with pytest.raises(InputError, match="did you mean cvt_13"):
        create_architecture("cvt13")
    with pytest.raises(ValueError, match="num_classes"):
        on_meta("cvt_13", num_classes=-1)


# --- The last block


def test_queries_and_keys_are_those_of_the_forward(make, name, images):
    model = make(name)
    seen: dict[str, Any] = {}
    attention = model.last_block.attn
    attention.register_forward_pre_hook(lambda module, args: seen.update(args=args))
    attention.q_norm.register_forward_hook(lambda *call: seen.update(q=call[2]))
    attention.k_norm.register_forward_hook(lambda *call: seen.update(k=call[2]))
    model(images)
    q, k = seen["q"], seen["k"]
    again_q, again_k = attention.queries_and_keys(*seen["args"])
    torch.testing.assert_close(again_q, q)
    torch.testing.assert_close(again_k, k)
    (h, w), (rows, columns) = model.token_grid(), model.key_grid()
    assert q.shape == (2, 3, 1 + h * w, 4)
    assert k.shape == (2, 3, 1 + rows * columns, 4)


def test_the_last_block_is_where_its_key_says(make, name):
    model = make(name)
    key = {"pvt_small": "block4.1", "cvt_13": "stage2.blocks.2"}.get(name, "blocks.2")
    assert model.get_submodule(key) is model.last_block is model.all_blocks[-1]


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_forms_of_the_last_block(make, name, form, images):
    """By hand from the branches: z' = MSA(LN1 z) [+ z], out = MLP([LN2] z') [+ z']."""
    model = make(name, last_block=form)
    block = model.last_block
    seen: dict[str, Any] = {}
    block.register_forward_hook(lambda module, args, output: seen.update(args=args, output=output))
    model(images)
    z, *grid = seen["args"]
    middle = block.attn(block.norm1(z), *grid) + (z if form["msa_skip"] else 0)
    normed = middle
    if form["mlp_norm"]:
        eps = 1e-6 if name == "pvt_small" else 1e-5
        normed = nn.functional.layer_norm(middle, (12,), block.norm2.weight, block.norm2.bias, eps)
    torch.testing.assert_close(seen["output"], block.mlp(normed) + (middle if form["mlp_skip"] else 0))


def test_the_form_only_concerns_the_last_block_and_drops_only_its_norm(make, name):
    base, sar = make(name), make(name, last_block=SAR)
    gone = set(base.state_dict()) - set(sar.state_dict())
    key = next(key for key, module in base.named_modules() if module is base.last_block)
    assert gone == {f"{key}.norm2.weight", f"{key}.norm2.bias"}
    assert not set(sar.state_dict()) - set(base.state_dict())
    for block in sar.all_blocks[:-1]:
        assert (block.msa_skip, block.mlp_norm, block.mlp_skip) == (True, True, True)


def test_switching_back_and_forth(make, name, images):
    model = make(name, drop_path_rate=0.1).train()
    model.set_last_block(msa_skip=False, mlp_norm=False, mlp_skip=False)
    block = model.last_block
    assert isinstance(block.drop_path1, nn.Identity)
    assert isinstance(block.drop_path2, nn.Identity)
    model.set_last_block(**SAR)
    assert isinstance(block.drop_path1, nn.Identity)
    assert block.drop_path2.drop_prob == pytest.approx(0.1)
    model.set_last_block()
    assert block.drop_path1.drop_prob == pytest.approx(0.1)
    assert block.norm2.weight.dtype == torch.float64
    assert (block.norm2.eps, block.norm2.training) == (block.norm1.eps, True)
    assert torch.isfinite(model(images)).all()


@pytest.mark.parametrize(
    ("published", "depth", "first"), [("t2t_vit_14", 14, 0), ("pvt_small", 16, 0), ("cvt_13", 10, 3)]
)
def test_drop_path_grows_linearly(published, depth, first):
    """Over all blocks; in CvT over those of the last stage."""
    blocks = on_meta(published, drop_path_rate=0.1).all_blocks
    assert len(blocks) == first + depth
    for i, block in enumerate(blocks):
        expected = 0.1 * max(i - first, 0) / (depth - 1)
        for module in (block.drop_path1, block.drop_path2):
            assert getattr(module, "drop_prob", 0.0) == pytest.approx(expected)
    assert blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_a_dropped_sample_of_the_sar_block_is_not_zero(make, name, images):
    """Without its skip a branch must not be dropped, even at a rate of 1 in the blocks."""
    model = make(name, last_block=SAR, drop_path_rate=0.999).train()
    outputs: list[Tensor] = []
    model.last_block.register_forward_hook(lambda *call: outputs.append(call[2]))
    model(images)
    assert (outputs[0].abs().amax(dim=2) > 0).all()


# --- Training


@pytest.mark.parametrize(
    "form", [{}, SAR, {"msa_skip": False, "mlp_norm": False, "mlp_skip": False}], ids=str
)
def test_gradient_reaches_every_trainable_weight(make, name, form, images):
    model = make(name, last_block=form).train()
    model(images).square().sum().backward()
    frozen = {key for key, weight in model.named_parameters() if weight.grad is None}
    expected = {"pos_embed"} if name.startswith("t2t") else set()
    if name == "t2t_vit_14":
        expected |= {"tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}
    assert frozen == expected
    for key, weight in model.named_parameters():
        if weight.grad is not None:
            assert torch.isfinite(weight.grad).all(), key
            # CvT's last block: only the class token is read, and its query passes no convolution.
            unused = name == "cvt_13" and key.startswith("stage2.blocks.2.attn.conv_proj_q.")
            assert (weight.grad.abs().max() > 0) != unused, key


def test_initial_weights(name):
    sizes = {"pvt_small": {"depths": (1, 1, 1, 1)}, "cvt_13": {"depths": (1, 1, 1)}}.get(name, {"depth": 1})
    torch.manual_seed(0)
    model = create_architecture(name, num_classes=200, **sizes)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.08), key
            assert module.bias is None or not module.bias.any(), key
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all(), key
            assert not module.bias.any(), key
    for key, weight in model.named_parameters():
        if key.endswith("cls_token") or ("pos_embed" in key and name == "pvt_small"):
            assert weight.std().item() == pytest.approx(0.02, rel=0.12), key


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_checkpointing_equals_plain(make, name, drop_path_rate, images):
    """Logits, gradients and running statistics, with dropout and stochastic depth drawn alike."""
    results = []
    for enable in (False, True):
        model = make(name, drop_path_rate=drop_path_rate).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        logits = model(images)
        logits.square().sum().backward()
        gradients = {key: weight.grad for key, weight in model.named_parameters()}
        results.append((logits.detach(), gradients, dict(model.named_buffers())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_checkpointing_runs_the_last_block_once(make, name, images):
    model = make(name).train()
    model.set_grad_checkpointing()
    calls: list[int] = []
    for i, block in enumerate(model.all_blocks):
        block.attn.k_norm.register_forward_hook(lambda *call, i=i: calls.append(i))
    model(images).sum().backward()
    counts = [calls.count(i) for i in range(len(model.all_blocks))]
    assert counts == [2] * (len(counts) - 1) + [1]


def test_compiles_as_one_graph(make, name, images):
    if name.startswith("t2t") and torch.__version__.startswith("2.6."):
        pytest.skip("PyTorch 2.6 breaks the graph of the performer")
    torch.compiler.reset()
    shallow = {"pvt_small": {"depths": (1, 1, 1, 1)}, "cvt_13": {"depths": (1, 1, 1)}}.get(name, {"depth": 1})
    model = make(name, last_block=SAR, drop_path_rate=0.1, **shallow)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_autocast_is_close_to_float32(make, name, images):
    model = make(name).float()
    exact = model(images.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(images.float())
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_attention_never_forms_the_matrix(make, name, images, monkeypatch):
    """Each block attends through the fused function, with the scale that the attention states."""
    model = make(name)
    scales: list[float] = []
    fused = nn.functional.scaled_dot_product_attention

    def note(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        scales.append(options.get("scale") or q.shape[-1] ** -0.5)
        return fused(q, k, v, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note)
    model(images)
    expected = [block.attn.scale for block in model.all_blocks]
    assert scales[-len(expected) :] == pytest.approx(expected)
    token_steps = {"t2t_vit_14_transformer": [(3 * 49) ** -0.5, (4 * 9) ** -0.5]}.get(name, [])
    assert scales[: -len(expected)] == pytest.approx(token_steps)
