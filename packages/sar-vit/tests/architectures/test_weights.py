"""Names and shapes of the published checkpoints, written out, and reading them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from attnmap_core.errors import InputError
from safetensors.torch import save_file
from sar_vit.architectures import create_architecture, load_published
from torch import Tensor, nn

SAR = {"msa_skip": False, "mlp_norm": False}

Shapes = dict[str, tuple[int, ...]]


def layer(name: str, out: int, *rest: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, *rest)} | ({f"{name}.bias": (out,)} if bias else {})


def mlp(name: str, dim: int, hidden: int) -> Shapes:
    return layer(f"{name}.fc1", hidden, dim) | layer(f"{name}.fc2", dim, hidden)


def t2t_vit_14(token_type: str) -> Shapes:
    keys: Shapes = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    for step, width in (("attention1", 147), ("attention2", 576)):
        name = f"tokens_to_token.{step}"
        keys |= layer(f"{name}.norm1", width) | layer(f"{name}.norm2", 64)
        if token_type == "performer":
            keys |= {f"{name}.w": (32, 64)}
            keys |= layer(f"{name}.kqv", 192, width) | layer(f"{name}.proj", 64, 64)
            keys |= layer(f"{name}.mlp.0", 64, 64) | layer(f"{name}.mlp.2", 64, 64)
        else:
            keys |= layer(f"{name}.attn.qkv", 192, width, bias=False) | layer(f"{name}.attn.proj", 64, 64)
            keys |= mlp(f"{name}.mlp", 64, 64)
    keys |= layer("tokens_to_token.project", 384, 576)
    for i in range(14):
        name = f"blocks.{i}"
        keys |= layer(f"{name}.norm1", 384) | layer(f"{name}.norm2", 384) | mlp(f"{name}.mlp", 384, 1152)
        keys |= layer(f"{name}.attn.qkv", 1152, 384, bias=False) | layer(f"{name}.attn.proj", 384, 384)
    return keys | layer("norm", 384) | layer("head", 1000, 384)


def pvt_small() -> Shapes:
    keys: Shapes = {"cls_token": (1, 1, 512)}
    chans, positions = 3, (3136, 784, 196, 50)
    stages = zip((64, 128, 320, 512), (3, 4, 6, 3), (8, 8, 4, 4), (8, 4, 2, 1), (4, 2, 2, 2), positions)
    for i, (dim, depth, ratio, sr, patch, n) in enumerate(stages, 1):
        keys |= {f"pos_embed{i}": (1, n, dim)}
        keys |= layer(f"patch_embed{i}.proj", dim, chans, patch, patch) | layer(f"patch_embed{i}.norm", dim)
        for j in range(depth):
            name = f"block{i}.{j}"
            keys |= layer(f"{name}.norm1", dim) | layer(f"{name}.norm2", dim)
            keys |= layer(f"{name}.attn.q", dim, dim) | layer(f"{name}.attn.kv", 2 * dim, dim)
            keys |= layer(f"{name}.attn.proj", dim, dim) | mlp(f"{name}.mlp", dim, ratio * dim)
            if sr > 1:
                keys |= layer(f"{name}.attn.sr", dim, dim, sr, sr) | layer(f"{name}.attn.norm", dim)
        chans = dim
    return keys | layer("norm", 512) | layer("head", 1000, 512)


def cvt_13() -> Shapes:
    keys: Shapes = {"stage2.cls_token": (1, 1, 384)}
    chans = 3
    for i, (dim, depth, kernel) in enumerate(zip((64, 192, 384), (1, 2, 10), (7, 3, 3))):
        embed = f"stage{i}.patch_embed"
        keys |= layer(f"{embed}.proj", dim, chans, kernel, kernel) | layer(f"{embed}.norm", dim)
        for j in range(depth):
            name = f"stage{i}.blocks.{j}"
            keys |= layer(f"{name}.norm1", dim) | layer(f"{name}.norm2", dim)
            keys |= layer(f"{name}.attn.proj", dim, dim) | mlp(f"{name}.mlp", dim, 4 * dim)
            for t in "qkv":
                conv = f"{name}.attn.conv_proj_{t}"
                keys |= layer(f"{conv}.conv", dim, 1, 3, 3, bias=False) | layer(f"{conv}.bn", dim)
                keys |= {f"{conv}.bn.running_mean": (dim,), f"{conv}.bn.running_var": (dim,)}
                keys |= {f"{conv}.bn.num_batches_tracked": ()}
                keys |= layer(f"{name}.attn.proj_{t}", dim, dim)
        chans = dim
    return keys | layer("norm", 384) | layer("head", 1000, 384)


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ("t2t_vit_14", t2t_vit_14("performer")),
        ("t2t_vit_14_transformer", t2t_vit_14("transformer")),
        ("pvt_small", pvt_small()),
        ("cvt_13", cvt_13()),
    ],
    ids=["t2t_vit_14", "t2t_vit_14_transformer", "pvt_small", "cvt_13"],
)
def test_names_and_shapes_of_published_checkpoints(published, expected):
    with torch.device("meta"):
        model = create_architecture(published)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


# --- Reading


def other_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        key: value + torch.rand_like(value) if value.is_floating_point() else value + 3
        for key, value in model.state_dict().items()
    }


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth.tar"])
def test_round_trip_through_a_file(make, name, suffix, tmp_path):
    model = make(name)
    state, path = other_weights(model), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3, "arch": name}, path)
    load_published(model, path)
    assert_holds(model, state)


@pytest.mark.parametrize(
    "wrappers", [(), ("state_dict",), ("model",), ("state_dict_ema",), ("model", "state_dict")]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrappers_and_prefix(make, wrappers, prefix):
    model = make("cvt_13")
    state = other_weights(model)
    source: dict[str, Any] = {prefix + key: value for key, value in state.items()}
    for wrapper in wrappers:
        source = {wrapper: source, "epoch": 7}
    load_published(model, source)
    assert_holds(model, state)


def test_averaged_weights_are_preferred(make):
    model = make("t2t_vit_14")
    plain, averaged = other_weights(model), other_weights(model)
    source = {"state_dict": plain, "state_dict_ema": averaged}
    load_published(model, source)
    assert_holds(model, averaged)
    load_published(model, source, ema=False)
    assert_holds(model, plain)


def test_what_is_missing_or_left_over_is_named_in_one_line(make, name):
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = other_weights(model)
    del state["norm.bias"]
    with pytest.raises(InputError, match=r"missing: norm\.bias"):
        load_published(model, state)
    state = other_weights(model) | {"stranger": torch.zeros(1)}
    with pytest.raises(InputError, match="unexpected: stranger") as error:
        load_published(model, state)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="missing"):
        load_published(model, make("cvt_13" if name != "cvt_13" else "pvt_small").state_dict())
    assert_holds(model, before)


def test_another_number_of_classes_needs_permission(make, name):
    source, model = make(name, num_classes=9), make(name)
    with pytest.raises(InputError, match=r"other shape: head\.weight"):
        load_published(model, source.state_dict())
    head = model.head.weight.clone()
    state = other_weights(source)
    load_published(model, state, new_head=True)
    torch.testing.assert_close(model.head.weight, head, rtol=0, atol=0)
    torch.testing.assert_close(model.norm.weight, state["norm.weight"], rtol=0, atol=0)


def test_another_last_block_needs_permission(make, name):
    base, sar = make(name), make(name, last_block=SAR)
    key = next(key for key, module in base.named_modules() if module is base.last_block)
    with pytest.raises(InputError, match=re.escape(f"unexpected: {key}.norm2.weight")):
        load_published(sar, base.state_dict())
    with pytest.raises(InputError, match=re.escape(f"missing: {key}.norm2.weight")):
        load_published(base, sar.state_dict())
    state = other_weights(base)
    load_published(sar, state, new_last_block=True)
    assert_holds(sar, {k: v for k, v in state.items() if ".norm2." not in k or not k.startswith(key)})
    norm2 = base.last_block.norm2.weight.clone()
    load_published(base, sar.state_dict(), new_last_block=True)
    torch.testing.assert_close(base.last_block.norm2.weight, norm2, rtol=0, atol=0)
    broken = other_weights(base)
    first = next(k for k in broken if ".norm2." in k and not k.startswith(key))
    del broken[first]
    with pytest.raises(InputError, match="missing"):
        load_published(base, broken, new_last_block=True)


def test_another_image_size_resamples_the_positions(make, name):
    """The loaded model sees images of its size as the source sees them."""
    source, model = make(name, img_size=64), make(name, img_size=(96, 128))
    load_published(model, source.state_dict())
    x = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    torch.testing.assert_close(model(x), source(x))


def test_dense_pvt_leaves_out_what_it_lacks(make):
    source, model = make("pvt_small"), make("pvt_small", dense=True, img_size=(96, 64))
    load_published(model, source.state_dict())
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x)[:3], source.forward_dense(x)[:3])
    with pytest.raises(InputError, match="missing"):
        load_published(model, {k: v for k, v in source.state_dict().items() if "block3" not in k})


class Stranger:
    """Not on the list of what may be unpickled."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "args": argparse.Namespace(lr=1)}, "more than weights"),
        ({"model": Stranger()}, "more than weights"),
        ([1, 2], "no state dict but list"),
        ({"epoch": 3}, "found 'epoch', no tensor"),
        ({}, "found none"),
    ],
)
def test_files_that_hold_something_else(make, content, message, tmp_path):
    path = tmp_path / "file.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=message) as error:
        load_published(make("cvt_13"), path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_absent_or_damaged(make, tmp_path):
    with pytest.raises(InputError, match="no such weights file"):
        load_published(make("cvt_13"), tmp_path / "absent.pth")
    path: Path = tmp_path / "damaged.pth"
    path.write_bytes(b"no pickle")
    with pytest.raises(InputError, match="damaged"):
        load_published(make("cvt_13"), path)
