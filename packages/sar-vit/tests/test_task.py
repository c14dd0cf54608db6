"""The supervised task: its parts, soft targets, the weight by epoch, distributed wrapping."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from sar_vit import SARViT, apply_sar, spatial_entropy
from sar_vit.task import SupervisedTask
from torch import Tensor, nn
from torch.nn import functional

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
NAMES = {"loss", "cross_entropy", "spatial_entropy", "entropy_weight", "accuracy", "components", "foreground"}
NAMES |= {"excluded"}


@pytest.fixture
def model() -> SARViT:
    torch.manual_seed(0)
    return SARViT("vit", 3, 32, drop_path_rate=0.0, backbone_options=TINY).train()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"images": torch.randn(4, 3, 32, 32, generator=generator), "labels": torch.arange(4) % 3}


def test_parts_add_up(model, batch):
    parts = SupervisedTask(weight=0.5)(model, batch)
    assert set(parts) == NAMES
    assert all(part.ndim == 0 for part in parts.values())
    assert [name for name, part in parts.items() if part.requires_grad] == ["loss"]
    torch.testing.assert_close(parts["loss"], parts["cross_entropy"] + 0.5 * parts["spatial_entropy"])
    logits = model(batch["images"])
    [S] = model.collector.take()
    torch.testing.assert_close(parts["cross_entropy"], functional.cross_entropy(logits, batch["labels"]))
    torch.testing.assert_close(parts["spatial_entropy"], spatial_entropy(S, reduction="mean"))
    assert parts["accuracy"].item() == (logits.argmax(1) == batch["labels"]).float().mean()
    foreground = S - S.mean((2, 3), keepdim=True) > 0
    assert parts["foreground"].item() == pytest.approx(foreground.float().mean().item())
    assert parts["components"].item() >= 1
    assert parts["excluded"].item() == 0


def test_without_weight_the_entropy_is_reported_only(model, batch):
    parts = SupervisedTask(weight=0.0)(model, batch)
    assert set(parts) == NAMES
    assert torch.equal(parts["loss"], parts["cross_entropy"])
    assert parts["spatial_entropy"] > 0
    assert len(model.collector) == 0


def test_weight_follows_the_epochs(model, batch):
    task = SupervisedTask(schedule="warmup_cosine", epochs=30, warmup_epochs=3)
    found = []
    for epoch in (0, 1, 2, 3, 29):
        task.begin_epoch(epoch)
        found.append(task(model, batch)["entropy_weight"].item())
    assert found[:4] == pytest.approx([0, 0.005, 0.01, 0.01])
    assert 0 < found[4] < 1e-4


def test_soft_targets_and_smoothing(model, batch):
    soft = functional.one_hot(batch["labels"], 3).float()
    hard = SupervisedTask()(model, batch)
    for name, part in SupervisedTask()(model, batch | {"labels": soft}).items():
        torch.testing.assert_close(part, hard[name])
    mixed = 0.7 * soft + 0.3 * soft.roll(1, 0)
    expected = -(mixed * model(batch["images"]).log_softmax(1)).sum(1).mean()
    model.collector.clear()
    torch.testing.assert_close(
        SupervisedTask()(model, batch | {"labels": mixed})["cross_entropy"], expected.detach()
    )
    smooth = SupervisedTask(label_smoothing=0.1)(model, batch)["cross_entropy"]
    spread = SupervisedTask()(model, batch | {"labels": 0.9 * soft + 0.1 / 3})["cross_entropy"]
    torch.testing.assert_close(smooth, spread)


def test_any_model_that_went_through_apply_sar(batch):
    net = apply_sar(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **TINY)).train()
    assert set(SupervisedTask()(net, batch)) == NAMES
    assert set(SupervisedTask()(torch.compile(net, backend="eager"), batch)) == NAMES
    with pytest.raises(ValueError, match="call apply_sar"):
        SupervisedTask()(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), batch)


def test_loss_options(model, batch):
    cosine = SupervisedTask(similarity="cosine")(model, batch)["spatial_entropy"]
    dot = SupervisedTask()(model, batch)["spatial_entropy"]
    variation = SupervisedTask(kind="tv")(model, batch)["spatial_entropy"]
    assert len({cosine.item(), dot.item(), variation.item()}) == 3


def test_half_precision(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = SupervisedTask()(model, batch)
    assert parts["loss"].dtype == parts["spatial_entropy"].dtype == torch.float32
    parts["loss"].backward()


def test_training_lowers_the_entropy(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    task, values = SupervisedTask(weight=1.0), []
    for _ in range(20):
        parts = task(model, batch)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        values.append(parts["spatial_entropy"].item())
    assert values[-1] < 0.7 * values[0]


def test_distributed_wrapper(model, batch, tmp_path):
    SupervisedTask()(model, batch)["loss"].backward()
    expected = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        SupervisedTask()(wrapped, batch)["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close([weight.grad for weight in model.parameters()], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be 0 or more"),
        ({"weight": math.nan}, "weight must be 0 or more"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"schedule": "linear"}, "schedule must be"),
        ({"similarity": "l2"}, "similarity must be"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SupervisedTask(**options)
