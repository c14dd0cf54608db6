"""CvT against explicit convolutions and softmax, and its batch norms in training."""

from __future__ import annotations

import math

import pytest
import torch
from sar_vit.architectures import ConvolutionalVisionTransformer
from sar_vit.architectures.cvt import ConvAttention, ConvProjection, QuickGELU
from torch import Tensor, nn
from torch.nn import functional


def projection_by_loops(module: ConvProjection, grid: Tensor) -> Tensor:
    """Tokens ``(b, n, c)``: every window of every channel on its own, then the stored statistics."""
    weight, bn = module.conv.weight[:, 0], module.bn
    stride = module.conv.stride[0]
    padded = functional.pad(grid, [1] * 4)
    windows = [
        (padded[:, :, i : i + 3, j : j + 3] * weight).sum(dim=(2, 3))
        for i in range(0, padded.shape[2] - 2, stride)
        for j in range(0, padded.shape[3] - 2, stride)
    ]
    tokens = torch.stack(windows, dim=1)
    return (tokens - bn.running_mean) / torch.sqrt(bn.running_var + 1e-5) * bn.weight + bn.bias


def attention_by_hand(module: ConvAttention, x: Tensor, h: int, w: int) -> Tensor:
    b, n, c = x.shape
    heads, prefix = module.num_heads, n - h * w
    grid = x[:, prefix:].transpose(1, 2).reshape(b, c, h, w)
    q, k, v = (
        linear(torch.cat([x[:, :prefix], projection_by_loops(conv, grid)], dim=1))
        .reshape(b, -1, heads, c // heads)
        .transpose(1, 2)
        for conv, linear in (
            (module.conv_proj_q, module.proj_q),
            (module.conv_proj_k, module.proj_k),
            (module.conv_proj_v, module.proj_v),
        )
    )
    weights = (q @ k.transpose(-1, -2) / math.sqrt(c)).softmax(dim=-1)  # of all channels, not of one head
    return module.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 3)])
@torch.no_grad()
def test_attention_by_explicit_softmax(prefix, grid):
    torch.manual_seed(0)
    module = ConvAttention(8, 2, prefix).double().eval()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.add_(0.3 * torch.rand_like(tensor))
    x = torch.randn(2, prefix + grid[0] * grid[1], 8, dtype=torch.float64)
    torch.testing.assert_close(module(x, grid), attention_by_hand(module, x, *grid))
    _, k = module.queries_and_keys(x, grid)
    assert k.shape[2] == prefix + math.ceil(grid[0] / 2) * math.ceil(grid[1] / 2)


@torch.no_grad()
def test_whole_network_by_hand(make, images):
    model = make("cvt_13")
    x = images
    for i in range(3):
        stage = getattr(model, f"stage{i}")
        embed = stage.patch_embed
        x = functional.conv2d(
            x, embed.proj.weight, embed.proj.bias, stride=(4, 2, 2)[i], padding=(2, 1, 1)[i]
        )
        b, c, h, w = x.shape
        x = functional.layer_norm(
            x.flatten(2).transpose(1, 2), (c,), embed.norm.weight, embed.norm.bias, 1e-5
        )
        if i == 2:
            x = torch.cat([stage.cls_token.repeat(b, 1, 1), x], dim=1)
        for block in stage.blocks:
            x = x + attention_by_hand(block.attn, block.norm1(x), h, w)
            hidden = block.mlp.fc1(block.norm2(x))
            x = x + block.mlp.fc2(hidden / (1 + torch.exp(-1.702 * hidden)))
        if i < 2:
            x = x.transpose(1, 2).reshape(b, c, h, w)
    torch.testing.assert_close(model(images), model.head(model.norm(x[:, 0])))


def test_sizes_of_the_paper():
    with torch.device("meta"):
        model = ConvolutionalVisionTransformer()
    blocks = model.all_blocks
    assert [block.attn.num_heads for block in blocks] == [1] + [3] * 2 + [6] * 10
    assert [block.attn.num_prefix_tokens for block in blocks] == [0] * 3 + [1] * 10
    assert [block.attn.scale for block in blocks] == [64**-0.5] + [192**-0.5] * 2 + [384**-0.5] * 10
    for block in blocks:
        assert [getattr(block.attn, f"conv_proj_{t}").conv.stride for t in "qkv"] == [(1, 1), (2, 2), (2, 2)]
        assert block.attn.proj_q.bias is not None
        assert block.attn.conv_proj_q.conv.bias is None
        assert isinstance(block.mlp.act, QuickGELU)
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}
    windows = [
        (conv.kernel_size[0], conv.stride[0], conv.padding[0])
        for conv in (getattr(model, f"stage{i}").patch_embed.proj for i in range(3))
    ]
    assert windows == [(7, 4, 2), (3, 2, 1), (3, 2, 1)]


def test_asking_for_queries_and_keys_does_not_count_the_batch():
    module = ConvAttention(8, 2, num_prefix_tokens=1).double().train()
    x = torch.randn(2, 1 + 16, 8, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    module.k_norm.register_forward_hook(lambda *call: seen.update(k=call[2]))
    module(x, (4, 4))
    kept = {key: value.clone() for key, value in module.named_buffers()}
    from_forward = seen["k"]
    _, k = module.queries_and_keys(x, (4, 4))
    torch.testing.assert_close(k, from_forward)
    torch.testing.assert_close(dict(module.named_buffers()), kept, rtol=0, atol=0)
    module(x, (4, 4))
    assert module.conv_proj_k.bn.num_batches_tracked == kept["conv_proj_k.bn.num_batches_tracked"] + 1


def test_one_image_in_training(make):
    model = make("cvt_13").train()
    logits = model(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert logits.shape == (1, 5)
    logits.sum().backward()


def test_rows_and_columns_are_not_swapped(make):
    """The transposed image through transposed kernels gives the same logits."""
    model, turned = make("cvt_13"), make("cvt_13")
    with torch.no_grad():
        for key, weight in turned.named_parameters():
            if weight.ndim == 4:
                weight.copy_(model.get_parameter(key).transpose(2, 3))
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    torch.testing.assert_close(turned(x.transpose(2, 3)), model(x))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="one value for each stage"):
        ConvolutionalVisionTransformer(depths=(1, 2))
    with pytest.raises(ValueError, match="does not divide"):
        ConvAttention(8, 3)
