"""MoCo-v3: its loss, what moves and what stays, resuming, and keys of several processes."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from attnmap_core.errors import InputError
from safetensors.torch import load_file
from sar_vit import SARViT, spatial_entropy
from sar_vit.scenarios import mocov3
from sar_vit.scenarios.mocov3 import MoCoV3, prepare_vit, sincos_positions
from torch import nn

tiny = importlib.import_module("tiny_pretraining")
FROZEN = ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")


def model_and_views(b: int = 5) -> tuple[MoCoV3, list[torch.Tensor]]:
    made = tiny.setup("mocov3", drop_path_rate=0.0)
    generator = torch.Generator().manual_seed(2)
    return made.model.train(), [torch.randn(b, 3, 32, 32, generator=generator) for _ in range(2)]


def test_loss_is_that_of_every_query_by_itself():
    model, views = model_and_views()
    q = [model.predictor(model.projector(model.base(view))) for view in views]
    k = [model.momentum_projector(model.momentum(view)) for view in views]
    expected = 0.0
    for queries, keys in ((q[0], k[1]), (q[1], k[0])):
        for i in range(5):
            scores = [
                torch.dot(queries[i], keys[j]) / queries[i].norm() / keys[j].norm() / 0.2 for j in range(5)
            ]
            expected += 2 * 0.2 * -torch.stack(scores).log_softmax(0)[i] / 5
    torch.testing.assert_close(model(views), expected)


def test_heads_are_those_of_the_released_code():
    model, _ = model_and_views()
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert [type(layer).__name__ for layer in model.predictor] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
    ]
    assert [layer.weight.shape for layer in model.projector if isinstance(layer, nn.Linear)] == [
        (16, 12),
        (16, 16),
        (8, 16),
    ]
    assert [layer.weight.shape for layer in model.predictor if isinstance(layer, nn.Linear)] == [
        (16, 8),
        (8, 16),
    ]
    assert not any(
        layer.bias is not None
        for layer in [*model.projector, *model.predictor]
        if isinstance(layer, nn.Linear)
    )
    for head in (model.projector, model.predictor):
        assert [layer.affine for layer in head if isinstance(layer, nn.BatchNorm1d)] == [True] * (
            len(head) // 3
        ) + [False]


def test_positions_are_sines_and_cosines():
    rows, columns, width = 3, 4, 8
    found = sincos_positions(rows, columns, width)
    for row in range(rows):
        for column in range(columns):
            for i in range(2):
                omega = 1 / 10000 ** (i / 2)
                values = (
                    math.sin(row * omega),
                    math.cos(row * omega),
                    math.sin(column * omega),
                    math.cos(column * omega),
                )
                got = [found[row * columns + column, 2 * part + i].item() for part in range(4)]
                assert got == pytest.approx(values, abs=1e-6)
    with pytest.raises(InputError, match=r"width 6: .* a multiple of 4"):
        sincos_positions(2, 2, 6)


def test_weights_are_drawn_as_released_and_the_patch_projection_is_frozen():
    model, _ = model_and_views()
    network = model.base.backbone.model
    assert torch.equal(network.pos_embed[0, 1:], sincos_positions(4, 4, 12))
    assert not network.pos_embed[0, 0].any()
    bound = math.sqrt(6 / (3 * 8 * 8 + 12))
    assert 0.8 * bound < network.patch_embed.proj.weight.abs().max() <= bound
    assert not network.patch_embed.proj.bias.any()
    attention = network.blocks[0].attn
    bound = math.sqrt(6 / (12 + 12))  # queries, keys and values each by themselves
    assert 0.9 * bound < attention.qkv.weight.abs().max() <= bound
    assert not attention.qkv.bias.any()
    frozen = [name for name, parameter in model.base.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == sorted(f"backbone.model.{name}" for name in FROZEN)


def test_gradients_are_of_the_base_alone():
    model, views = model_and_views()
    made = tiny.setup("mocov3")
    parts = made.task(model, {"images": views})
    parts["loss"].backward()
    for name, parameter in model.named_parameters():
        follows = name.startswith("momentum") or name.endswith(FROZEN)
        assert (parameter.grad is None) is follows, name
        if not follows:
            assert parameter.grad.any(), name
    assert [name for name, part in parts.items() if part.requires_grad] == ["loss"]


def test_entropy_is_the_mean_over_both_views():
    model, views = model_and_views()
    task = tiny.setup("mocov3", entropy_weight=0.5).task
    each = []
    for view in views:
        model.base(view)
        [S] = model.base.collector.take()
        each.append(spatial_entropy(S, reduction="mean"))
    assert abs(each[0] - each[1]) > 1e-3
    model.base.collector.clear()
    parts = task(model, {"images": views})
    torch.testing.assert_close(parts["spatial_entropy"], (each[0] + each[1]) / 2)
    torch.testing.assert_close(parts["loss"], parts["contrastive"] + 0.5 * parts["spatial_entropy"])
    assert len(model.base.collector) == len(model.momentum.collector) == 0


def test_momentum_encoder_follows():
    made = tiny.setup("mocov3", momentum_start=0.8)
    model = made.model
    for head in (model.base.backbone.model.blocks[0].mlp.fc1.weight, model.projector[0].weight):
        nn.init.normal_(head)
    before = (
        model.momentum.backbone.model.blocks[0].mlp.fc1.weight.clone(),
        model.momentum_projector[0].weight.clone(),
    )
    made.task.after_update(model, 0.25)
    m = 1 - 0.5 * (1 + math.cos(math.pi / 4)) * 0.2
    after = model.momentum.backbone.model.blocks[0].mlp.fc1.weight, model.momentum_projector[0].weight
    now = model.base.backbone.model.blocks[0].mlp.fc1.weight, model.projector[0].weight
    for old, new, base in zip(before, after, now):
        torch.testing.assert_close(new, m * old + (1 - m) * base)


def test_all_trained_weights_decay():
    made = tiny.setup("mocov3")
    [group] = made.task.param_groups(made.model, tiny.config("mocov3"))
    assert group["weight_decay"] == 0.1
    trained = {id(parameter) for parameter in made.model.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in group["params"]} == trained
    assert any(parameter.ndim == 1 for parameter in group["params"])


def test_training_resumes_bit_for_bit_and_frozen_parts_stay(tmp_path):
    settings = tiny.config("mocov3", save_every=1)
    result, task = tiny.run(tmp_path / "whole", tiny.setup("mocov3"), settings, evaluate=True)
    assert result.steps == 4  # 18 photos: two steps of 8 an epoch
    with pytest.raises(tiny.Stopped):
        tiny.run(tmp_path / "stopped", tiny.setup("mocov3"), settings, stop_at=4, evaluate=True)
    made = tiny.setup("mocov3")
    tiny.run(tmp_path / "stopped", made, settings, resume=True, evaluate=True)
    states = [
        load_file(tmp_path / name / "checkpoints/step-000000004/model.safetensors")
        for name in ("whole", "stopped")
    ]
    assert states[0].keys() == states[1].keys() == made.model.state_dict().keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    changed = {name for name in states[0] if not torch.equal(states[0][name], task.states[0][name])}
    assert {name for name in states[0] if name.endswith(FROZEN)}.isdisjoint(changed)
    assert {
        "base.backbone.model.blocks.0.mlp.fc1.weight",
        "momentum.backbone.model.blocks.0.mlp.fc1.weight",
    } <= changed
    lines = (tmp_path / "whole/history.jsonl").read_text().splitlines()
    rates = [line["lr"] for line in map(json.loads, lines) if line["kind"] == "log"]
    assert rates == pytest.approx(
        [0, 1e-2, 5e-3 * (1 + math.cos(math.pi / 3)), 5e-3 * (1 + math.cos(2 * math.pi / 3))]
    )


@pytest.mark.parametrize("branch", ["default", "teacher"])
def test_what_is_saved_is_the_encoder(tmp_path, branch):
    made = tiny.setup("mocov3", save_branch=branch, msa_skip=True)
    nn.init.normal_(made.model.base.backbone.model.blocks[0].mlp.fc1.weight)
    made.save(made.model, tmp_path / "model")
    loaded = made.load(tmp_path / "model")
    assert isinstance(loaded, SARViT)
    assert (loaded.heads, loaded.grid, loaded.num_classes) == (3, (4, 4), 0)
    assert loaded.switches == {"msa_skip": True, "mlp_norm": False, "mlp_skip": True}
    expected = made.model.momentum if branch == "teacher" else made.model.base
    other = made.model.base if branch == "teacher" else made.model.momentum
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), expected.eval()(images))
        assert not torch.equal(loaded(images), other.eval()(images))
    assert loaded.attention_maps(images)[1].shape == (2, 3, 4, 4)


@pytest.mark.multiprocess
def test_keys_of_two_processes_are_those_of_one(tmp_path, two_processes):
    """Without batch norm, two processes of 4 photos learn what one of 8 does; evaluation included."""
    shared = {"drop_path_rate": 0.0, "optimizer": "sgd", "entropy_weight": 0.5}
    two_processes(tmp_path / "two", "mocov3", batch_size=4, **shared)
    settings = tiny.config("mocov3", **shared)
    made = tiny.setup("mocov3", **shared)
    tiny.without_norms(made.model)
    tiny.run(tmp_path / "one", made, settings, evaluate=True)
    histories = [
        [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for ours, theirs in zip(*histories, strict=True):
        names = ("loss", "contrastive", "spatial_entropy", "components", "lr")
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-4)
        assert ours.get("metrics", {}) == pytest.approx(theirs.get("metrics", {}), rel=1e-4)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "asked", "expected"), [("nccl", True, True), ("gloo", True, False), ("nccl", False, False)]
)
def test_batch_norms_are_of_all_processes_on_gpus(monkeypatch, backend, asked, expected):
    monkeypatch.setattr(mocov3, "processes", lambda: (2, 0))
    monkeypatch.setattr(mocov3.distributed, "get_backend", lambda: backend)
    model = tiny.setup("mocov3", sync_batchnorm=asked).model
    found = {
        isinstance(layer, nn.SyncBatchNorm)
        for layer in model.modules()
        if "BatchNorm" in type(layer).__name__
    }
    assert found == {expected}
    assert model.base.collector.block is model.base.backbone.model.blocks[-1]


def test_only_plain_vits(tmp_path):
    options = {"embed_dim": 12, "depth": 2, "num_heads": 3, "token_dim": 4}
    with pytest.raises(InputError, match="backbone t2t_vit_7: mocov3 needs a plain ViT with class token"):
        tiny.setup("mocov3", backbone="t2t_vit_7", backbone_options=options, image_size=64)
    odd = {"patch_size": 8, "embed_dim": 18, "depth": 1, "num_heads": 3}
    with pytest.raises(InputError, match="width 18"):
        prepare_vit(SARViT("vit", 0, 32, backbone_options=odd))


def test_bfloat16(tmp_path):
    model, views = model_and_views()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(views)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(views), rtol=0.05, atol=0.05)
