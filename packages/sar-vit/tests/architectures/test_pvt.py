"""PVT against plain loops and explicit softmax: spatial reduction, position tables, dense features."""

from __future__ import annotations

import math

import pytest
import torch
from sar_vit.architectures import PyramidVisionTransformer
from sar_vit.architectures.pvt import SpatialReductionAttention
from torch import Tensor, nn
from torch.nn import functional

SAR = {"msa_skip": False, "mlp_norm": False}
TINY = {"embed_dims": (4, 6, 8, 12), "depths": (1, 2, 1, 2), "num_heads": (1, 2, 2, 3)}


def attention_by_hand(module: SpatialReductionAttention, x: Tensor, h: int, w: int) -> Tensor:
    """Explicit softmax; each key token is one patch of the map times the convolution's weight."""
    b, n, c = x.shape
    heads, ratio = module.num_heads, module.sr_ratio
    source = x
    if ratio > 1:
        grid = x.reshape(b, h, w, c)
        patches = [
            torch.einsum("bijc,ocij->bo", grid[:, i : i + ratio, j : j + ratio], module.sr.weight)
            for i in range(0, h - ratio + 1, ratio)
            for j in range(0, w - ratio + 1, ratio)
        ]
        source = torch.stack(patches, dim=1) + module.sr.bias
        source = functional.layer_norm(source, (c,), module.norm.weight, module.norm.bias, 1e-5)
    q = module.q(x).reshape(b, n, heads, c // heads).transpose(1, 2)
    k, v = module.kv(source).split(c, dim=-1)
    k, v = (t.reshape(b, -1, heads, c // heads).transpose(1, 2) for t in (k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(c // heads)).softmax(dim=-1)
    return module.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


@pytest.mark.parametrize(("ratio", "grid"), [(1, (3, 5)), (2, (4, 6)), (2, (5, 7)), (4, (8, 4))])
@torch.no_grad()
def test_spatial_reduction_by_loops(ratio, grid):
    torch.manual_seed(0)
    module = SpatialReductionAttention(8, 2, ratio).double()
    for weight in module.parameters():
        weight.add_(0.3 * torch.randn_like(weight))
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    torch.testing.assert_close(module(x, grid), attention_by_hand(module, x, *grid))


def pvt_by_hand(model: PyramidVisionTransformer, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Maps of all stages without a class token, or with it the logits; at the model's own size."""
    x, maps = images, []
    for i in range(1, 5):
        embed, table = getattr(model, f"patch_embed{i}"), getattr(model, f"pos_embed{i}")
        x = functional.conv2d(x, embed.proj.weight, embed.proj.bias, stride=4 if i == 1 else 2)
        b, c, h, w = x.shape
        x = functional.layer_norm(
            x.flatten(2).transpose(1, 2), (c,), embed.norm.weight, embed.norm.bias, 1e-5
        )
        if i == 4 and model.dense:
            table = table[:, 1:]
        elif i == 4:
            x = torch.cat([model.cls_token.repeat(b, 1, 1), x], dim=1)
        x = x + table
        for block in getattr(model, f"block{i}"):
            norms = ((norm.weight, norm.bias) for norm in (block.norm1, block.norm2))
            x = x + attention_by_hand(block.attn, functional.layer_norm(x, (c,), *next(norms), 1e-6), h, w)
            normed = functional.layer_norm(x, (c,), *next(norms), 1e-6)
            x = x + block.mlp.fc2(functional.gelu(block.mlp.fc1(normed)))
        if i == 4 and not model.dense:
            normed = functional.layer_norm(x, (c,), model.norm.weight, model.norm.bias, 1e-6)
            return maps, model.head(normed[:, 0])
        x = x.transpose(1, 2).reshape(b, c, h, w)
        maps.append(x)
    return maps, None


@torch.no_grad()
def test_whole_network_by_hand(make, images):
    model = make("pvt_small")
    torch.testing.assert_close(model(images), pvt_by_hand(model, images)[1])


@torch.no_grad()
def test_dense_features_by_hand(make, images):
    model = make("pvt_small", dense=True)
    maps, _ = pvt_by_hand(model, images)
    torch.testing.assert_close(model(images), maps)


def test_sizes_of_the_paper():
    with torch.device("meta"):
        model = PyramidVisionTransformer()
    blocks = model.all_blocks
    assert [block.attn.sr_ratio for block in blocks] == [8] * 3 + [4] * 4 + [2] * 6 + [1] * 3
    assert [block.attn.num_heads for block in blocks] == [1] * 3 + [2] * 4 + [5] * 6 + [8] * 3
    hidden = [block.mlp.fc1.out_features for block in blocks]
    assert hidden == [512] * 3 + [1024] * 4 + [1280] * 6 + [2048] * 3
    assert {block.attn.scale for block in blocks} == {64**-0.5}
    fine = {
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.eps == 1e-6
    }
    assert fine == {
        f"block{i + 1}.{j}.norm{k}"
        for i, depth in enumerate((3, 4, 6, 3))
        for j in range(depth)
        for k in (1, 2)
    } | {"norm"}
    shapes = [tuple(getattr(model, f"pos_embed{i}").shape) for i in range(1, 5)]
    assert shapes == [(1, 3136, 64), (1, 784, 128), (1, 196, 320), (1, 50, 512)]


def bilinear_by_loops(table: Tensor, h: int, w: int) -> Tensor:
    """Pixel centres aligned, border repeated."""
    rows, columns, _ = table.shape
    result = torch.zeros(h, w, table.shape[2], dtype=table.dtype)
    for i in range(h):
        y = max((i + 0.5) * rows / h - 0.5, 0)
        for j in range(w):
            x = max((j + 0.5) * columns / w - 0.5, 0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            above = table[top, left] * (1 - (x - left)) + table[top, right] * (x - left)
            below = table[bottom, left] * (1 - (x - left)) + table[bottom, right] * (x - left)
            result[i, j] = above * (1 - (y - top)) + below * (y - top)
    return result


@torch.no_grad()
def test_position_tables_are_resized_bilinearly(make):
    model = make("pvt_small")
    for i, (own, new) in enumerate(
        [((16, 16), (24, 8)), ((8, 8), (12, 4)), ((4, 4), (6, 2)), ((2, 2), (3, 1))]
    ):
        table = getattr(model, f"pos_embed{i + 1}")[0, 1 if i == 3 else 0 :]
        expected = bilinear_by_loops(table.reshape(*own, -1), *new).flatten(0, 1)
        torch.testing.assert_close(model._positions(i, new)[0], expected)


@pytest.mark.parametrize("size", [(32, 96), (128, 64)])
@torch.no_grad()
def test_dense_features_of_other_sizes(make, size):
    """One image at any resolution; four strides; the class token's entry of the table plays no part."""
    model = make("pvt_small", dense=True)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    maps = model(x)
    assert [m.shape[2:] for m in maps] == [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    assert [m.shape[1] for m in maps] == [4, 6, 8, 12]
    model.pos_embed4[:, 0] += 1e3
    torch.testing.assert_close(model(x), maps, rtol=0, atol=0)


def test_dense_keeps_the_sar_block_and_has_no_class_token(make, images):
    model = make("pvt_small", dense=True, last_block=SAR).train()
    assert not {"cls_token", "norm.weight", "head.weight", "block4.1.norm2.weight"} & set(model.state_dict())
    assert model.no_weight_decay() == set()
    sum(feature.square().sum() for feature in model(images)).backward()
    for key, weight in model.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.abs().max() > 0, key
    with pytest.raises(ValueError, match="dense"):
        model.forward_features(images)


@torch.no_grad()
def test_first_three_maps_are_those_of_the_classifier(make, images):
    """The class token joins after them."""
    model = make("pvt_small")
    dense = make("pvt_small", dense=True)
    dense.load_state_dict(model.adapt_weights(model.state_dict()), strict=False)
    for own, other in zip(model.forward_dense(images)[:3], dense(images)[:3]):
        torch.testing.assert_close(own, other)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="sr_ratio must be 1"):
        PyramidVisionTransformer(**TINY, sr_ratios=(8, 4, 2, 2))
    with pytest.raises(ValueError, match="one value for each stage"):
        PyramidVisionTransformer(**{**TINY, "depths": (1, 1)})
    with pytest.raises(ValueError, match="does not divide"):
        SpatialReductionAttention(8, 3)
