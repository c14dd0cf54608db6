"""The task: its loss from its parts, what it passes through the model, and what it reports."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from contrastive_cam import ContrastiveCAM, contrastive_map_loss
from contrastive_cam.task import ColocalizationTask
from contrastive_cam.transforms import PretextTransform
from torch import nn
from torch.nn import functional

TINY = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def model() -> ContrastiveCAM:
    torch.manual_seed(0)
    return ContrastiveCAM("vit", "R+S", 32, backbone_options=TINY)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"images": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def run(
    task: ColocalizationTask, model: nn.Module, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return task(model, batch)


def test_loss_from_its_parts(model, batch):
    transform = PretextTransform("R+S", "zeros")
    task = ColocalizationTask(transform, 0.5, 2.0, tau=0.3, negatives="unaligned")
    parts = run(task, model, batch)
    torch.manual_seed(7)
    moved = transform(batch["images"])
    together = model(torch.cat([batch["images"], moved.images]))
    pretext = [
        functional.cross_entropy(together.logits[name][4:], labels) for name, labels in moved.labels.items()
    ]
    A, A_t = together.attention.split(4)
    contrastive = contrastive_map_loss(A, A_t, moved.theta, tau=0.3, negatives="unaligned")
    torch.testing.assert_close(parts["loss"], 2 * sum(pretext) + 0.5 * contrastive)
    torch.testing.assert_close(parts["contrastive"], contrastive.detach())
    torch.testing.assert_close(parts["loss_rotation"], pretext[0].detach())
    assert not any(value.requires_grad for name, value in parts.items() if name != "loss")
    assert all(value.ndim == 0 and value.isfinite() for value in parts.values())
    assert parts["positive"] != parts["negative"]


def test_without_weight_only_transformed_images_pass(model, batch):
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    parts = run(ColocalizationTask(PretextTransform("R+S"), weight=0), model, batch)
    assert "contrastive" not in parts
    run(ColocalizationTask(PretextTransform("R+S")), model, batch)
    handle.remove()
    assert seen == [4, 8]


def test_contrastive_term_alone_leaves_heads_with_zeros(model, batch):
    run(ColocalizationTask(PretextTransform("R+S"), pretext_weight=0), model, batch)["loss"].backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert not model.heads.layers["rotation"].weight.grad.any()
    assert model.gate.layer.conv.weight.grad.any()


def test_foreground_background(model, batch):
    parts = run(ColocalizationTask(PretextTransform("R+S"), kind="fgbg", tau=0.5), model, batch)
    parts["loss"].backward()
    assert 0 < parts["contrastive"] < math.log(9) + 4
    assert "positive" not in parts


def test_warmup():
    task = ColocalizationTask(weight=2.0, warmup_epochs=3)
    weights = []
    for epoch in range(5):
        task.begin_epoch(epoch)
        weights.append(task.current_weight)
    assert weights == [0.5, 1.0, 1.5, 2.0, 2.0]


class Fixed(nn.Module):
    """Gives maps that a test chooses."""

    def __init__(self, A: torch.Tensor) -> None:
        super().__init__()
        self.A = A

    def forward(self, images: torch.Tensor):
        from contrastive_cam.model import Views

        A = self.A.expand(len(images), -1, -1)
        return Views(
            {"rotation": torch.zeros(len(images), 4)}, A, A.unsqueeze(1), A.unsqueeze(1).repeat(1, 10, 1, 1)
        )


def test_ring_and_area(batch):
    task = ColocalizationTask(threshold=0.5)
    corner = torch.zeros(10, 10)
    corner[0, 0] = 1
    parts = run(task, Fixed(corner), batch)
    assert parts["outer_ring"] == 1
    assert parts["mask_area"].item() == pytest.approx(0.01)
    even = torch.ones(10, 10)
    even[5, 5] = 0
    ring = run(task, Fixed(even), batch)["outer_ring"]
    assert ring.item() == pytest.approx(36 / 99)
    flat = run(task, Fixed(torch.ones(10, 10)), batch)
    assert flat["outer_ring"] == flat["mask_area"] == 0
    assert run(task, Fixed(torch.ones(3, 3) - torch.eye(3)), batch)["outer_ring"].isfinite()


def test_warns_where_the_pooling_is_a_mean(batch, caplog):
    sparse = torch.zeros(4, 4)
    task = ColocalizationTask()
    with caplog.at_level(logging.WARNING):
        run(task, Fixed(sparse), batch)
        run(task, Fixed(sparse), batch)
        assert ["PTAP equals" in record.message for record in caplog.records] == [True]
        caplog.clear()
        run(ColocalizationTask(), Fixed(torch.ones(4, 4)), batch)
    assert not caplog.records


def test_half_precision(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = run(ColocalizationTask(PretextTransform("R+S")), model, batch)
    assert parts["loss"].dtype == parts["contrastive"].dtype == torch.float32
    parts["loss"].backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_distributed_wrapper(model, batch, tmp_path):
    task = ColocalizationTask(PretextTransform("R+S"))
    run(task, model, batch)["loss"].backward()
    expected = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        run(task, nn.parallel.DistributedDataParallel(model), batch)["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()
    for weight, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(weight.grad, gradient)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weight": -1}, "0 or more"),
        ({"weight": 0, "pretext_weight": 0}, "nothing would train"),
        ({"kind": "pixels"}, "kind must be"),
        ({"kind": "fgbg", "align": "both"}, "of kind='maps' only"),
        ({"negatives": "all"}, "negatives must be"),
        ({"tau": -1}, "tau must be"),
    ],
)
def test_bad_options(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        ColocalizationTask(**options)
