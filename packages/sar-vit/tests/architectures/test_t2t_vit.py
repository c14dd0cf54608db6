"""T2T-ViT against its formulas written out: soft splits, performer, sinusoids, the whole network."""

from __future__ import annotations

import math

import pytest
import torch
from attnmap_core.backbones import AttentionTap
from sar_vit.architectures import T2TViT
from sar_vit.architectures.t2t_vit import TokenAttention, TokenPerformer, TokenTransformer, sinusoid_table
from torch import Tensor, nn
from torch.nn import functional


def test_sinusoid_table_by_loops():
    table = sinusoid_table(197, 384)[0]
    assert table.dtype == torch.float32
    for p in (0, 1, 17, 196):
        for j in (0, 1, 2, 191, 382, 383):
            angle = p / 10000 ** (2 * math.floor(j / 2) / 384)
            assert table[p, j].item() == pytest.approx(
                math.cos(angle) if j % 2 else math.sin(angle), abs=1e-6
            )


def performer_by_loops(module: TokenPerformer, x: Tensor) -> Tensor:
    """One query and one key at a time."""
    e, f = module.proj.in_features, len(module.w)
    normed = functional.layer_norm(x, x.shape[-1:], module.norm1.weight, module.norm1.bias, 1e-5)
    projected = normed @ module.kqv.weight.T + module.kqv.bias
    k, q, v = projected[..., :e], projected[..., e : 2 * e], projected[..., 2 * e :]

    def phi(t: Tensor) -> Tensor:
        return torch.stack([torch.exp(w @ t - t @ t / 2) for w in module.w]) / math.sqrt(f)

    y = torch.zeros_like(v)
    for b in range(len(x)):
        for i in range(x.shape[1]):
            weights = torch.stack([phi(q[b, i]) @ phi(k[b, j]) for j in range(x.shape[1])])
            y[b, i] = sum(weights[j] * v[b, j] for j in range(x.shape[1])) / (weights.sum() + 1e-8)
    y = v + y @ module.proj.weight.T + module.proj.bias
    normed = functional.layer_norm(y, (e,), module.norm2.weight, module.norm2.bias, 1e-5)
    hidden = functional.gelu(normed @ module.mlp[0].weight.T + module.mlp[0].bias)
    return y + hidden @ module.mlp[2].weight.T + module.mlp[2].bias


@torch.no_grad()
def test_performer_by_loops():
    torch.manual_seed(0)
    module = TokenPerformer(9, 8).double().eval()
    for weight in module.parameters():
        weight.add_(0.3 * torch.randn_like(weight) * weight.requires_grad)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(module(x), performer_by_loops(module, x))


def test_random_features_are_orthogonal_frozen_and_saved():
    module = TokenPerformer(147, 64)
    assert module.w.shape == (32, 64)
    torch.testing.assert_close(module.w @ module.w.T, 32 * torch.eye(32), rtol=1e-4, atol=1e-4)
    assert not module.w.requires_grad
    assert "w" in module.state_dict()


def test_performer_features_stay_in_float32_under_autocast():
    torch.manual_seed(0)
    module = TokenPerformer(9, 8).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = module.kqv(torch.randn(1, 5, 9)).chunk(3, dim=-1)
        assert q.dtype == torch.bfloat16
        got = module._attend(q, k, v)
    exact = module._attend(q.float(), k.float(), v.float())
    torch.testing.assert_close(got, exact.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="PyTorch 2.6 breaks the graph")
def test_performer_compiles_as_one_graph_in_training_under_autocast():
    torch.compiler.reset()
    module = TokenPerformer(9, 8)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compiled(torch.randn(1, 5, 9)).float().square().sum()
    loss.backward()
    assert torch.isfinite(module.kqv.weight.grad).all()


def test_dropout_of_the_performers_is_a_tenth():
    performer = T2TViT(embed_dim=12, depth=1, num_heads=3, img_size=32).tokens_to_token.attention1
    assert (performer.dp.p, performer.mlp[3].p) == (0.1, 0.1)


@torch.no_grad()
def test_token_attention_by_explicit_softmax():
    module = TokenAttention(9, 4).double()
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    q, k, v = (x @ module.qkv.weight.T).split(4, dim=-1)
    weights = (q @ k.transpose(1, 2) / 3).softmax(dim=-1)  # the square root of the 9 channels that come in
    torch.testing.assert_close(module(x), v + (weights @ v) @ module.proj.weight.T + module.proj.bias)


def soft_split_by_loops(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, tuple[int, int]]:
    """Each token is one window, channel after channel, row after row."""
    padded = functional.pad(x, [padding] * 4)
    tops = range(0, padded.shape[2] - kernel + 1, stride)
    lefts = range(0, padded.shape[3] - kernel + 1, stride)
    windows = [padded[:, :, i : i + kernel, j : j + kernel].reshape(len(x), -1) for i in tops for j in lefts]
    return torch.stack(windows, dim=1), (len(tops), len(lefts))


def t2t_by_hand(model: T2TViT, images: Tensor) -> Tensor:
    x = images
    for attention, split in zip(("attention1", "attention2"), ((7, 4, 2), (3, 2, 1))):
        tokens, (h, w) = soft_split_by_loops(x, *split)
        tokens = getattr(model.tokens_to_token, attention)(tokens)
        x = tokens.transpose(1, 2).reshape(len(x), -1, h, w)
    tokens, _ = soft_split_by_loops(x, 3, 2, 1)
    tokens = model.tokens_to_token.project(tokens)
    tokens = torch.cat([model.cls_token.repeat(len(x), 1, 1), tokens], dim=1) + model.pos_embed
    for block in model.blocks:
        b, n, c = tokens.shape
        q, k, v = block.attn.qkv(block.norm1(tokens)).reshape(b, n, 3, 3, c // 3).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(c // 3)).softmax(dim=-1)
        tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
        tokens = tokens + block.mlp.fc2(functional.gelu(block.mlp.fc1(block.norm2(tokens))))
    return model.head(model.norm(tokens)[:, 0])


@pytest.mark.parametrize("token_type", ["performer", "transformer"])
@torch.no_grad()
def test_whole_network_by_hand(make, images, token_type):
    model = make("t2t_vit_14", token_type=token_type)
    torch.testing.assert_close(model(images), t2t_by_hand(model, images))


def test_sizes_of_the_paper():
    with torch.device("meta"):
        model = T2TViT()
    assert [
        step.norm1.normalized_shape for step in model.tokens_to_token.children() if hasattr(step, "norm1")
    ] == [
        (147,),
        (576,),
    ]
    block = model.last_block
    assert block.mlp.fc1.out_features == 1152
    assert block.attn.qkv.bias is None
    assert block.attn.proj.bias is not None
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


def test_position_table_is_fixed_and_saved(make):
    model = make("t2t_vit_14", img_size=(32, 64))
    assert model.pos_embed.shape == (1, 1 + 2 * 4, 12)
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model.pos_embed.float(), sinusoid_table(9, 12))
    assert "pos_embed" in model.state_dict()


def test_positions_of_other_sizes_keep_the_class_tokens_entry(make):
    model = make("t2t_vit_14")
    table = model._positions(model.pos_embed, (6, 4))
    assert table.shape == (1, 25, 12)
    torch.testing.assert_close(table[:, 0], model.pos_embed[:, 0])
    assert model._positions(model.pos_embed, (4, 4)) is model.pos_embed


@torch.no_grad()
def test_the_tap_of_core_reads_the_attention(make, images):
    model = make("t2t_vit_14")
    seen: dict[str, Tensor] = {}
    model.last_block.attn.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    tap = AttentionTap(model, [-1]).attach()
    with tap.recording() as record:
        model(images)
    q, k = model.last_block.attn.queries_and_keys(seen["x"])
    weights = q[:, :, :1] @ k.transpose(-1, -2) / 2
    torch.testing.assert_close(record.rows()[:, 0], weights.softmax(dim=-1)[:, :, 0])


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="token_type"):
        T2TViT(token_type="convolution")
    with pytest.raises(ValueError, match="does not divide"):
        T2TViT(embed_dim=10, num_heads=3)


def test_transformer_tokens_have_no_bias_and_a_narrow_mlp():
    module = TokenTransformer(147, 64)
    assert module.attn.qkv.bias is None
    assert module.mlp.fc1.weight.shape == (64, 64)
