"""Backbones give tokens with their grid; the tap gives exactly the attention that the network uses."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from attnmap_core.backbones import AttentionTap, Backbone, create_backbone, mismatched_keys, read_weights
from attnmap_core.errors import InputError
from safetensors.torch import save_file
from torch import Tensor, nn

SHARED = Path(os.environ.get("ATTNMAP_SHARED", Path(__file__).parents[2] / ".." / "shared"))
REAL_VIT = SHARED / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k" / "model.safetensors"
REAL_CNN = SHARED / "weights" / "mobilenetv2_100.tf2_ptq_dequant_in1k" / "model.safetensors"

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vit() -> Backbone:
    return create_backbone("vit", **TINY).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16)


def save_state(net: nn.Module, path: Path, **changes: Tensor | None) -> Path:
    state = {key: value.clone() for key, value in net.state_dict().items()}
    for key, value in changes.items():
        key = key.replace("__", ".")
        state.pop(key, None)
        if value is not None:
            state[key] = value
    save_file(state, path)
    return path


# --- Features -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "grid", "prefix"),
    [
        ("deit_tiny_patch16_224", {"img_size": (32, 64), "depth": 2}, (2, 4), 1),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}, (2, 2), 2),
        ("vit_small_patch14_reg4_dinov2", {"img_size": (28, 42), "depth": 1}, (2, 3), 5),
        ("vit_small_patch16_dinov3", {"img_size": (32, 48), "depth": 1}, (2, 3), 5),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1}, (2, 2), 1),
        ("vit", {**TINY, "img_size": (16, 32), "class_token": False, "global_pool": "avg"}, (2, 4), 0),
        ("vit", {**TINY, "patch_size": (4, 8)}, (4, 2), 1),
    ],
)
def test_tokens_have_their_grid(
    name: str, options: dict[str, Any], grid: tuple[int, int], prefix: int
) -> None:
    backbone = create_backbone(name, **options).eval()
    height, width = backbone.img_size
    features = backbone(torch.randn(2, 3, height, width))
    assert features.grid == grid == backbone.grid()
    assert features.tokens is not None
    assert features.tokens.shape == (2, grid[0] * grid[1], backbone.num_features)
    assert backbone.num_prefix_tokens == prefix
    assert (0 if features.prefix is None else features.prefix.shape[1]) == prefix
    # The map holds the same tokens, row by row.
    assert torch.equal(features.map[:, :, -1, 0], features.tokens[:, -grid[1]])
    assert (height // backbone.stride[0], width // backbone.stride[1]) == grid
    # After the final norm: at the start its gain is 1 and its shift 0, except in RMS norms.
    torch.testing.assert_close(features.tokens.mean(-1), torch.zeros(2, grid[0] * grid[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "stride"),
    [
        ("resnet18", {}, 32),
        ("mobilenetv3_small_050", {}, 32),
        ("convnext_atto", {}, 32),
        ("vgg11_bn", {}, 32),
        ("resnet18", {"output_stride": 16}, 16),
        ("swin_s3_tiny_224", {"img_size": 224, "depths": (1, 1, 1, 1)}, 32),  # channels last
        ("pvt_v2_b0", {}, 32),
    ],
)
def test_networks_that_give_maps(name: str, options: dict[str, Any], stride: int) -> None:
    backbone = create_backbone(name, **options).eval()
    height, width = (224, 224) if "swin" in name else (64, 96)
    features = backbone(torch.randn(1, 3, height, width))
    assert features.tokens is None
    assert features.prefix is None
    assert features.grid == (height // stride, width // stride) == backbone.grid((height, width))
    assert features.map.shape == (1, backbone.num_features, *features.grid)
    assert backbone.stride == (stride, stride)


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", "eva02_tiny_patch14_224", "vit"])
def test_gradient_reaches_every_weight(name: str) -> None:
    options = TINY if name == "vit" else {"img_size": 28, "depth": 2} if name.startswith("eva") else {}
    backbone = create_backbone(name, **options)
    size = backbone.img_size if backbone.img_size[0] < 100 else (64, 64)
    backbone(torch.randn(4, 3, *size)).map.square().sum().backward()
    assert [key for key, weight in backbone.named_parameters() if weight.grad is None] == []


def test_state_dict_holds_timm_keys(vit: Backbone) -> None:
    same: Any = timm.models.vision_transformer.VisionTransformer(num_classes=0, **TINY)
    assert list(vit.model.state_dict()) == list(same.state_dict())
    assert "model.pos_embed" in vit.no_weight_decay()
    assert vit.no_weight_decay() <= {key for key, _ in vit.named_parameters()}


def test_features_are_those_of_timm(vit: Backbone, images: Tensor) -> None:
    expected = vit.model.forward_features(images)
    features = vit(images)
    assert torch.equal(features.prefix, expected[:, :1])
    assert torch.equal(features.tokens, expected[:, 1:])


def test_dynamic_image_size(images: Tensor) -> None:
    backbone = create_backbone("vit", **TINY, dynamic_img_size=True).eval()
    assert backbone(torch.randn(1, 3, 24, 40)).grid == (3, 5) == backbone.grid((24, 40))
    assert backbone(images).grid == (2, 2)


def test_stochastic_depth_grows_over_the_blocks() -> None:
    backbone = create_backbone("vit", **TINY, drop_path_rate=0.2)
    rates: list[float] = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_preprocessing_comes_with_the_weights() -> None:
    assert create_backbone("vit_tiny_patch16_224", depth=1).preprocessing_config == {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
    }
    assert create_backbone("deit_tiny_patch16_224", depth=1).preprocessing_config["mean"] == (
        0.485,
        0.456,
        0.406,
    )
    assert create_backbone("vit", **TINY).preprocessing_config["std"] == (0.229, 0.224, 0.225)


def test_wrong_image_size_names_both(vit: Backbone) -> None:
    with pytest.raises(ValueError, match="16x16 pixels, got 16x24"):
        vit(torch.zeros(1, 3, 16, 24))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_244", {}, "did you mean vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.nonsense", {}, "augreg_in21k_ft_in1k"),
        ("somebody/some_model", {}, "no such timm model"),
        ("vit", {"output_stride": 16}, "no option 'output_stride'"),
        ("resnet10t", {"patch_size": 8}, "no option 'patch_size'"),
        ("vit", {**TINY, "pretrained": True}, "no published weights"),
        ("vit", {**TINY, "weights": "nowhere.pth"}, "nowhere.pth: no such"),
        ("vit", {**TINY, "img_size": (16, 30)}, "img_size 16x30.*8x8 patches.*choose 16x32"),
        ("resnet18", {"pretrained": True, "weights": "x.pth"}, "exclude each other"),
    ],
)
def test_bad_input_is_told_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as failure:
        create_backbone(name, **options)
    assert "\n" not in str(failure.value)


def test_no_network_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("network was asked for")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    create_backbone("deit_tiny_patch16_224.fb_in1k", depth=1)
    with pytest.raises(InputError, match=r"network was asked for.*weights=FILE"):
        create_backbone("deit_tiny_patch16_224", pretrained=True)


# --- Weights ------------------------------------------------------------------------------------------------


def test_weights_load_without_their_classifier(tmp_path: Path, images: Tensor) -> None:
    net: Any = timm.models.vision_transformer.VisionTransformer(num_classes=7, **TINY)
    path = save_state(net, tmp_path / "vit.safetensors")
    loaded = create_backbone("vit", **TINY, weights=path).eval()
    assert torch.equal(loaded(images).tokens, net.eval().forward_features(images)[:, 1:])
    # The same from a training checkpoint's pickle.
    torch.save({"model": net.state_dict(), "epoch": 3}, tmp_path / "vit.pth")
    pickled = create_backbone("vit", **TINY, weights=tmp_path / "vit.pth").eval()
    assert torch.equal(loaded(images).tokens, pickled(images).tokens)


def test_position_embeddings_are_resampled(tmp_path: Path) -> None:
    small = create_backbone("vit", **{**TINY, "img_size": 32})
    path = save_state(small.model, tmp_path / "vit.safetensors")
    wide = create_backbone("vit", **{**TINY, "img_size": (32, 64)}, weights=path)
    old, new = small.model.pos_embed[0], wide.model.pos_embed[0]
    assert torch.equal(old[0], new[0])  # of the class token
    grid = old[1:].T.reshape(1, 16, 4, 4)
    expected = F.interpolate(grid, size=(4, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(new[1:].T.reshape(1, 16, 4, 8), expected)
    assert torch.equal(small.model.patch_embed.proj.weight, wide.model.patch_embed.proj.weight)


def test_weights_that_do_not_fit_list_their_keys(tmp_path: Path, vit: Backbone) -> None:
    path = save_state(vit.model, tmp_path / "a.safetensors", norm__weight=None, renamed=torch.zeros(16))
    with pytest.raises(InputError, match=r"a\.safetensors.*missing: norm\.weight; unexpected: renamed"):
        create_backbone("vit", **TINY, weights=path)
    path = save_state(vit.model, tmp_path / "b.safetensors", norm__weight=torch.zeros(3))
    with pytest.raises(InputError, match=r"norm\.weight is \(3,\), expected \(16,\)"):
        create_backbone("vit", **TINY, weights=path)


def test_mismatched_keys_are_cut_short() -> None:
    many = {f"layer{i}": torch.zeros(1) for i in range(30)}
    assert mismatched_keys(many, many) is None
    assert mismatched_keys(many, {}, limit=2) == "missing: layer0, layer1 and 28 more"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("damaged.safetensors", b"\x00\x01 no header", "damaged"),
        ("damaged.pth", b"PK no zip", "damaged"),
        ("empty.pth", b"", "damaged"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        read_weights(tmp_path / name)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / "object.pth")
    with pytest.raises(InputError, match="more than weights"):
        read_weights(tmp_path / "object.pth")
    assert not (tmp_path / "sprung").exists()
    torch.save({"model": {"a": 3}}, tmp_path / "number.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        read_weights(tmp_path / "number.pth")


@pytest.mark.real
@pytest.mark.skipif(
    not REAL_VIT.is_file(), reason="no ViT weights in the optional data folder (ATTNMAP_SHARED)"
)
def test_real_vit_weights() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", weights=REAL_VIT).eval()
    net = timm.create_model("vit_tiny_patch16_224", checkpoint_path=REAL_VIT).eval()
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(backbone(images).tokens, net.forward_features(images)[:, 1:])
    assert backbone.preprocessing_config["mean"] == (0.5, 0.5, 0.5)
    assert create_backbone("vit_tiny_patch16_224", img_size=(112, 160), weights=REAL_VIT).grid() == (7, 10)


@pytest.mark.real
@pytest.mark.skipif(
    not REAL_CNN.is_file(), reason="no CNN weights in the optional data folder (ATTNMAP_SHARED)"
)
def test_real_cnn_weights() -> None:
    backbone = create_backbone("mobilenetv2_100", pad_type="same", weights=REAL_CNN).eval()
    net = timm.create_model("mobilenetv2_100", pad_type="same", checkpoint_path=REAL_CNN).eval()
    images = torch.randn(1, 3, 96, 128)
    assert torch.equal(backbone(images).map, net.forward_features(images))


# --- The tap: right numbers ---------------------------------------------------------------------------------


def explicit_attention(net: Any, images: Tensor) -> list[Tensor]:
    """timm's own softmax matrices ``(b, heads, n, n)``, with gradient, from its explicit (not fused) code."""
    weights: list[Tensor] = []
    handles = []
    for block in net.blocks:
        attention: Any = block.attn
        attention.fused_attn = False

        def keep(module: nn.Module, args: tuple[Tensor]) -> None:
            weights.append(args[0])

        handles.append(attention.attn_drop.register_forward_pre_hook(keep))
    net.forward_features(images)
    for handle in handles:
        handle.remove()
    return weights


def is_fused(net: Any) -> bool:
    return all(block.attn.fused_attn for block in net.blocks)


CASES = {
    "class token": ("deit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}),
    "qk norm": ("vit", {**TINY, "qk_norm": True}),
    "not square": ("vit", {**TINY, "img_size": (16, 40)}),
    "rotary, registers": ("vit_small_patch16_dinov3", {"img_size": (32, 48), "depth": 2}),
    "rotary": ("eva02_tiny_patch14_224", {"img_size": (28, 42), "depth": 2}),
    "rotary, halves": ("vit", {**TINY, "rope": True}),
}


def make_case(case: str) -> Backbone:
    name, options = CASES[case]
    if "rope" in options:
        net: Any = timm.models.eva.Eva(
            img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0,
            use_rot_pos_emb=True, rope_rotate_half=True, attn_type="rope",
        )  # fmt: skip
        return Backbone(net, "eva", (16, 16)).double()
    return create_backbone(name, **options).double()


@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_equal_the_explicit_softmax(case: str) -> None:
    backbone = make_case(case)
    images = torch.randn(2, 3, *backbone.img_size, dtype=torch.float64)
    with AttentionTap(backbone) as tap, AttentionTap(backbone, full=True) as full:
        assert is_fused(backbone.model)
        backbone(images)
        rows, logits, whole = tap.rows(), tap.logits(), full.weights()
        torch.testing.assert_close(full.rows(), rows, rtol=0, atol=1e-12)
    weights = explicit_attention(backbone.model, images)
    expected = torch.stack([matrix[:, :, 0] for matrix in weights], dim=1)
    assert rows.shape == (2, len(weights), weights[0].shape[1], weights[0].shape[-1])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(whole, weights):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    direction = torch.randn_like(rows)
    parameters = list(backbone.parameters())
    found = torch.autograd.grad((rows * direction).sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad((expected * direction).sum(), parameters, allow_unused=True)
    for ours, theirs in zip(found, wanted):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert any(gradient is not None and gradient.any() for gradient in found)


@pytest.mark.skipif(
    "num_kv_heads" not in inspect.signature(timm.layers.AttentionRope).parameters,
    reason="this timm has no grouped-query attention",
)
def test_grouped_queries() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = timm.layers.AttentionRope(16, num_heads=4, num_kv_heads=2, qkv_fused=False)

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens + self.attn(tokens)

    net: Any = nn.Module()
    net.blocks, net.cls_token, net.num_prefix_tokens = nn.Sequential(Block(), Block()), torch.zeros(1), 1
    net.forward_features = net.blocks
    net = net.double()
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    with AttentionTap(net) as tap:
        net.blocks(tokens)
        rows = tap.rows()
    expected = torch.stack([matrix[:, :, 0] for matrix in explicit_attention(net, tokens)], dim=1)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)


def test_average_query() -> None:
    vit = create_backbone("vit", **TINY, class_token=False, global_pool="avg", reg_tokens=2).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    captured: list[Tensor] = []
    for block in vit.model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, args, output: captured.append(output))
    with AttentionTap(vit, query="avg") as tap, AttentionTap(vit, query="avg", full=True) as full:
        vit(images)
        logits = tap.logits()
        torch.testing.assert_close(full.logits(), logits, rtol=0, atol=1e-12)
    for block, qkv in enumerate(captured):
        query, key, _ = qkv.reshape(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
        average = query[:, :, 2:].mean(dim=2)  # of the four patches, registers left out
        expected = torch.einsum("bhd,bhnd->bhn", average, key) / 8**0.5
        torch.testing.assert_close(logits[:, block], expected, rtol=0, atol=1e-12)


def test_chosen_blocks(vit: Backbone, images: Tensor) -> None:
    with AttentionTap(vit) as every, AttentionTap(vit.model, blocks=[-1, 0]) as some:
        vit(images)
        assert some.blocks == [0, 2]
        assert torch.equal(some.rows(), every.rows()[:, [0, 2]])


def test_output_is_untouched(vit: Backbone, images: Tensor) -> None:
    before = vit(images)
    with AttentionTap(vit, full=True):
        inside = vit(images)
    assert torch.equal(before.tokens, inside.tokens)


def test_autocast_computes_in_float32(vit: Backbone, images: Tensor) -> None:
    with AttentionTap(vit) as tap:
        vit(images)
        exact = tap.rows()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vit(images)
            rows = tap.rows()
            sums = rows.sum(-1)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)  # bfloat16 would miss by 1e-3
    torch.testing.assert_close(rows, exact, rtol=0, atol=1e-2)
    assert not torch.equal(rows, exact)  # the queries themselves are bfloat16
    rows.sum().backward()
    torch.manual_seed(0)
    half = create_backbone("vit", **TINY).bfloat16()
    with AttentionTap(half) as tap:
        half(images.bfloat16())
        assert tap.rows().dtype == torch.float32


def test_no_grad(vit: Backbone, images: Tensor) -> None:
    with AttentionTap(vit) as tap:
        vit(images)
        expected = tap.rows()
        with torch.no_grad():
            vit(images)
            rows = tap.rows()
        with torch.inference_mode():
            vit(images)
            assert torch.equal(tap.rows(), expected)
    assert torch.equal(rows, expected)
    assert expected.requires_grad
    assert not rows.requires_grad


# --- The tap: forwards kept apart ---------------------------------------------------------------------------


def test_several_forwards_are_popped_in_order(vit: Backbone, images: Tensor) -> None:
    with AttentionTap(vit) as tap:
        vit(images)
        first = tap.rows()
        vit(images + 1)  # the record that was read is gone
        second = tap.rows()
        vit(images)
        vit(images + 1)
        assert len(tap) == 2
        with pytest.raises(RuntimeError, match="2 forward passes are waiting"):
            tap.rows()
        assert torch.equal(tap.pop().rows(), first)
        assert torch.equal(tap.pop().rows(), second)
        assert not torch.equal(first, second)
        with pytest.raises(RuntimeError, match="recorded nothing"):
            tap.pop()


def test_a_pass_that_failed_leaves_no_record(vit: Backbone, images: Tensor) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError

    with AttentionTap(vit) as tap:
        handle = vit.model.blocks[2].attn.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            vit(images)
        with pytest.raises(RuntimeError, match="only 2 of the 3"):
            tap.rows()
        handle.remove()
        vit(images)
        rows = tap.rows()
    with AttentionTap(vit) as fresh:
        vit(images)
        assert torch.equal(rows, fresh.rows())


def test_grad_checkpointing_records_no_second_pass(vit: Backbone, images: Tensor) -> None:
    def gradient(leave_first: bool) -> Tensor:
        vit.zero_grad()
        with AttentionTap(vit) as tap:
            tokens, rows = vit(images).tokens, tap.rows()
            loss = tokens.sum() + rows[..., 1].sum()
            if not leave_first:
                loss.backward()
                assert len(tap) == 1
        if leave_first:
            loss.backward()
        return vit.model.blocks[0].attn.qkv.weight.grad.clone()

    expected = gradient(leave_first=True)
    vit.train().set_grad_checkpointing()
    torch.testing.assert_close(gradient(leave_first=True), expected)
    torch.testing.assert_close(gradient(leave_first=False), expected)


def test_shape_queries_are_no_forward_pass(vit: Backbone) -> None:
    with AttentionTap(vit) as tap:
        vit.grid()
        assert len(tap) == 0


# --- The tap: nothing left behind ---------------------------------------------------------------------------


def count_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_closing_removes_every_hook(vit: Backbone, images: Tensor) -> None:
    with AttentionTap(vit):
        assert count_hooks(vit) == 9
    assert count_hooks(vit) == 0
    tap = AttentionTap(vit)

    def fail_inside() -> None:
        with tap:
            vit(images)
            assert len(tap) == 1
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail_inside()
    assert count_hooks(vit) == 0
    assert len(tap) == 0
    with pytest.raises(RuntimeError, match="recorded nothing"):
        tap.rows()


def test_records_free_their_graph(vit: Backbone, images: Tensor) -> None:
    def alive_after(use: Any) -> bool:
        keys: list[weakref.ref[Tensor]] = []
        watch = vit.model.blocks[1].attn.k_norm.register_forward_hook(
            lambda module, args, output: keys.append(weakref.ref(output))
        )
        use()
        watch.remove()
        gc.collect()
        return keys[0]() is not None

    tap = AttentionTap(vit)

    def popped() -> None:
        vit(images)
        tap.pop().rows()

    def read_then_next() -> None:
        vit(images)
        tap.rows()
        vit.model.blocks[1].attn.k_norm._forward_hooks.popitem()
        vit(images)
        tap.rows()

    def left_open() -> None:
        vit(images)

    with tap:
        assert not alive_after(popped)
        assert not alive_after(read_then_next)
        tap.pop()
        with torch.no_grad():
            assert not alive_after(left_open)  # an unread record holds rows, not queries and keys
        tap.pop()
        assert alive_after(left_open)  # with gradients it does: the test can tell
    gc.collect()
    assert not alive_after(left_open)


def test_taps_themselves_are_freed(vit: Backbone, images: Tensor) -> None:
    with AttentionTap(vit) as tap:
        vit(images)
    gone = weakref.ref(tap)
    del tap
    gc.collect()
    assert gone() is None


# --- The tap: kept by a model -------------------------------------------------------------------------------


class Model(nn.Module):
    """Keeps a tap, as the packages' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_backbone("vit", **TINY)
        self.tap = AttentionTap(self.backbone).attach()
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with self.tap.recording() as record:
            tokens = self.backbone(images).tokens
        return self.head(tokens.mean(1)), record.rows().mean(2).sum(1)[:, self.tap.num_prefix_tokens :]


def gradients(model: nn.Module, outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    model.zero_grad()
    (outputs[0].sum() + outputs[1].square().sum()).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_recording(images: Tensor) -> None:
    model = Model().eval()
    attention = model(images)[1]
    with AttentionTap(model.backbone) as tap:
        model.backbone(images)
        assert torch.equal(tap.rows().mean(2).sum(1)[:, 1:], attention)
    model.backbone(images)  # outside of recording()
    assert len(model.tap) == 0
    assert all(site.query is None for site in model.tap._sites)  # nothing is held either

    def record(*actions: Any) -> None:
        with model.tap.recording():
            for action in actions:
                action(images)

    def fail(_: Tensor) -> None:
        raise ArithmeticError

    with pytest.raises(RuntimeError, match="recorded nothing"):
        record()
    with pytest.raises(RuntimeError, match="2 forward passes"):
        record(model.backbone, model.backbone)
    with pytest.raises(RuntimeError, match="recording already"):
        record(model)
    with pytest.raises(ArithmeticError):
        record(fail)
    assert torch.equal(model(images)[1], attention)
    model.tap.detach()
    assert count_hooks(model) == 0
    assert torch.equal(model(images)[1], attention)  # hooks for the one pass
    assert count_hooks(model) == 0


def test_deepcopy_taps_its_own_blocks(images: Tensor) -> None:
    model = Model().eval()
    expected = model(images)[1]
    with model.tap.recording():  # a copy made in the middle carries no record
        model.backbone(images)
        average = copy.deepcopy(model)
    assert torch.equal(average(images)[1], expected)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(average(images)[1], expected)
    assert torch.equal(model(images)[1], expected)
    assert count_hooks(average) == count_hooks(model) == 9
    average.tap.detach()
    assert count_hooks(average) == 0
    assert torch.equal(model(images)[1], expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model(images: Tensor, backend: str) -> None:
    torch._dynamo.reset()
    model = Model()
    compiled: Any = torch.compile(model, backend=backend)
    for batch in (images, images + 1, images):
        expected, found = model(batch), compiled(batch)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs)
        for ours, theirs in zip(gradients(model, found), gradients(model, expected)):
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))
    assert len(model.tap) == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_backbone_is_recorded_or_refused(vit: Backbone, images: Tensor, backend: str) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(vit, backend=backend)
    with AttentionTap(compiled) as tap:
        vit(images)
        expected = tap.rows()
    with AttentionTap(vit) as tap:
        for batch in (images, images + 1, images):
            compiled(batch)
            rows = tap.rows()
    torch.testing.assert_close(rows, expected)
    compiled(images)  # the tap is closed: the graph that fed it must not run
    assert len(tap) == 0
    with AttentionTap(vit) as late:
        compiled(images)  # compiled without hooks by now
        with pytest.raises(RuntimeError, match=r"compiled \(torch\.compile\) before"):
            late.rows()


def test_distributed_data_parallel(images: Tensor, tmp_path: Path) -> None:
    model = Model()
    expected = gradients(model, model(images))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for ours, theirs in zip(gradients(model, wrapped(images)), expected):
            torch.testing.assert_close(ours, theirs)
        assert AttentionTap(nn.parallel.DistributedDataParallel(model.backbone)).blocks == [0, 1, 2]
    finally:
        torch.distributed.destroy_process_group()


# --- The tap: refusals --------------------------------------------------------------------------------------


def test_without_class_token() -> None:
    vit = create_backbone("vit", **TINY, class_token=False, global_pool="avg", reg_tokens=1)
    with pytest.raises(ValueError, match="no class token; use query='avg'"):
        AttentionTap(vit)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_relpos_small_patch16_224", "RelPosAttention"),
        ("beit_base_patch16_224", "Attention"),
        ("vit_tiny_patch16_224", "ParallelScalingBlock"),
        ("resnet18", "ResNet has no stack"),
    ],
)
def test_other_attention_is_refused_by_name(name: str, message: str) -> None:
    options: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}
    if message == "ParallelScalingBlock":
        options["block_fn"] = timm.models.vision_transformer.ParallelScalingBlock
    query = "avg" if "relpos" in name else "cls"
    net = timm.create_model(name, num_classes=0, **({} if name == "resnet18" else options))
    net.cls_token = getattr(net, "cls_token", torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        AttentionTap(net, query=query)


def test_a_subclass_with_another_forward_is_refused(vit: Backbone) -> None:
    class Doubled(timm.layers.Attention):
        def forward(self, x: Tensor, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return x

    vit.model.blocks[1].attn.__class__ = Doubled
    with pytest.raises(ValueError, match=r"block 1: .*Doubled"):
        AttentionTap(vit)


def test_masks_are_refused(vit: Backbone, images: Tensor) -> None:
    with AttentionTap(vit), pytest.raises(ValueError, match="Attention got an attention mask"):
        vit.model.forward_features(images, attn_mask=torch.zeros(5, 5))


def test_wrong_arguments(vit: Backbone, images: Tensor) -> None:
    for blocks in ([3], [-4], []):
        with pytest.raises(ValueError, match="indices of the 3 blocks"):
            AttentionTap(vit, blocks=blocks)
    with pytest.raises(ValueError, match="query must be"):
        AttentionTap(vit, query="all")  # type: ignore[arg-type]
    with AttentionTap(vit) as tap:
        vit(images)
        with pytest.raises(ValueError, match="full=True"):
            tap.weights()
        with pytest.raises(RuntimeError, match="open already"):
            tap.__enter__()


# --- A tap for a loss: every pass in training


@pytest.fixture
def tapped() -> tuple[Any, AttentionTap]:
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
    net = create_backbone("vit", img_size=32, **options).train()
    return net, AttentionTap(net, [-1]).attach(in_training=True)


def test_passes_in_training_are_recorded_unasked(tapped: tuple[Any, AttentionTap]) -> None:
    net, tap = tapped
    sizes = [(32, 32), (16, 48)]
    for size in sizes:
        net(torch.randn(1, 3, *size))
    with torch.no_grad():
        net(torch.randn(1, 3, 32, 32))
    net.eval()(torch.randn(1, 3, 32, 32))
    assert len(tap) == 2
    records = [tap.pop(), tap.pop()]
    assert [record.image_size for record in records] == sizes
    assert [record.logits().shape[-1] for record in records] == [17, 13]
    assert records[0].logits().requires_grad
    net.train()(torch.randn(1, 3, 32, 32))
    tap.clear()
    assert len(tap) == 0
    tap.detach()
    net(torch.randn(1, 3, 32, 32))
    assert len(tap) == 0
    assert count_hooks(net) == 0


def test_recording_leaves_the_passes_that_wait(tapped: tuple[Any, AttentionTap]) -> None:
    net, tap = tapped
    net(torch.randn(2, 3, 32, 32))
    with tap.recording() as record:
        net(torch.randn(1, 3, 16, 16))
    assert (record.logits().shape[0], record.image_size) == (1, (16, 16))
    assert len(tap) == 1
    assert tap.pop().logits().shape[0] == 2


def test_passes_that_nobody_takes_end_in_an_error(tapped: tuple[Any, AttentionTap]) -> None:
    net, _ = tapped
    for _ in range(32):
        net(torch.randn(1, 3, 16, 16))
    with pytest.raises(RuntimeError, match="none was taken"):
        net(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("query", ["cls", "avg"])
@pytest.mark.parametrize("keep_keys", [True, False])
def test_queries_and_keys_make_the_logits(query: Any, keep_keys: bool) -> None:
    net = create_backbone("vit", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    with torch.no_grad(), AttentionTap(net, query=query, keep_keys=keep_keys) as tap:
        net(torch.randn(2, 3, 32, 32))
        record = tap.pop()
    if not keep_keys:
        with pytest.raises(ValueError, match="keep_keys=True"):
            record.queries_and_keys()
        return
    for index, (q, k) in enumerate(record.queries_and_keys()):
        expected = torch.einsum("bhd,bhnd->bhn", q, k) * 8**-0.5
        torch.testing.assert_close(record.logits()[:, index], expected)


def test_one_block_itself_and_another_attention() -> None:
    class Attention(nn.Module):
        scale = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

        def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.q_norm(x.unsqueeze(1)), self.k_norm(x.unsqueeze(1))

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.queries_and_keys(x)
            return (q @ k.mT).softmax(-1).squeeze(1) @ x

    class Staged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Module()
            self.last.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.last.attn(x)

    net, x = Staged(), torch.randn(2, 5, 3)
    with AttentionTap(net, net.last, "avg") as tap:
        net(x)
        torch.testing.assert_close(tap.logits()[:, 0, 0], torch.einsum("bd,bnd->bn", x.mean(1), x))
    with pytest.raises(ValueError, match="has no class token"):
        AttentionTap(net, net.last)
