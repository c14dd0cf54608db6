"""Semantic FPN: published size, the pyramid by hand, odd sizes, the loss and its ignored pixels."""

from __future__ import annotations

import math

import pytest
import torch
from sar_vit.architectures import SemanticFPN, create_architecture, segmentation_loss
from sar_vit.architectures.semantic_fpn import FPN
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def model(make) -> SemanticFPN:
    backbone = make("pvt_small", dense=True)
    return SemanticFPN(backbone, num_classes=5, neck_channels=8, head_channels=6).double().eval()


def test_published_size():
    """The PVT paper: 28.2 million, and 44.5 G multiply-adds for a picture of 512x512; 150 classes."""
    with torch.device("meta"):
        model = SemanticFPN(create_architecture("pvt_small", dense=True)).eval()
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(28.2, abs=0.05)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(torch.empty(1, 3, 512, 512, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(44.5, rel=0.01)


def fpn_by_hand(model: SemanticFPN, maps: list[Tensor]) -> Tensor:
    neck, head = model.neck, model.decode_head
    lateral = [
        torch.einsum("bchw,oc->bohw", m, conv.conv.weight[..., 0, 0]) + conv.conv.bias[:, None, None]
        for m, conv in zip(maps, neck.lateral_convs)
    ]
    for i in (2, 1, 0):
        lateral[i] = lateral[i] + lateral[i + 1].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    levels = [
        functional.conv2d(m, conv.conv.weight, conv.conv.bias, padding=1)
        for m, conv in zip(lateral, neck.fpn_convs)
    ]
    total = 0.0
    for doublings, (level, layers) in enumerate(zip(levels, head.scale_heads)):
        convs = [layer for layer in layers if hasattr(layer, "bn")]
        assert len(convs) == max(doublings, 1)
        for conv in convs:
            bn = conv.bn
            level = functional.conv2d(level, conv.conv.weight, None, padding=1)
            level = functional.batch_norm(level, bn.running_mean, bn.running_var, bn.weight, bn.bias).relu()
            if doublings:
                level = functional.interpolate(level, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + level
    return functional.conv2d(total, head.conv_seg.weight, head.conv_seg.bias)


@torch.no_grad()
def test_by_hand(model, images):
    for module in model.decode_head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    expected = fpn_by_hand(model, model.backbone(images))
    torch.testing.assert_close(model.logits(images), expected)
    enlarged = functional.interpolate(expected, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images), enlarged)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (100, 72)])
def test_any_size(model, size):
    assert model(torch.randn(1, 3, *size, dtype=torch.float64)).shape == (1, 5, *size)


def test_pyramid_of_odd_levels():
    levels = FPN((4, 6, 8), 5)([torch.randn(1, c, s, s + 1) for c, s in ((4, 9), (6, 5), (8, 2))])
    assert [tuple(level.shape) for level in levels] == [(1, 5, 9, 10), (1, 5, 5, 6), (1, 5, 2, 3)]


def test_gradient_reaches_every_weight_with_checkpointing_too(model, images):
    labels = torch.randint(0, 5, (2, 64, 64))
    results = []
    for enable in (False, True):
        model.train()
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        segmentation_loss(model.logits(images), labels).backward()
        for key, weight in model.named_parameters():
            assert weight.grad is not None, key
            # A bias before a batch norm has none; there is none such here.
            assert weight.grad.abs().max() > 0, key
        results.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(*results)


def test_a_tiny_training_lowers_the_loss(make):
    """Which of two halves of the image is bright, with a border that does not count."""
    torch.manual_seed(0)
    model = SemanticFPN(make("pvt_small", dense=True), 2, neck_channels=8, head_channels=8).float().train()
    images = torch.randn(4, 3, 32, 32)
    images[:2, :, :, 16:] += 3
    images[2:, :, :, :16] += 3
    labels = (images.mean(dim=1, keepdim=True) > 1.5).long().squeeze(1)
    labels[:, :, :3] = 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses: list[float] = []
    for _ in range(15):
        loss = segmentation_loss(model.logits(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_converts_to_synchronised_batch_norm(model):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    kinds = {type(module) for module in converted.modules() if "BatchNorm" in type(module).__name__}
    assert kinds == {nn.SyncBatchNorm}


def test_keys_of_published_segmentation_checkpoints(model):
    keys = {key for key in model.state_dict() if not key.startswith("backbone.")}
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {
        f"neck.{kind}_convs.{i}.conv.{p}" for kind in ("lateral", "fpn") for i in range(4) for p in norms[:2]
    }
    for level, places in enumerate([(0,), (0,), (0, 2), (0, 2, 4)]):
        for place in places:
            head = f"decode_head.scale_heads.{level}.{place}"
            expected |= {f"{head}.conv.weight"} | {f"{head}.bn.{p}" for p in norms}
    assert keys == expected | {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}


def test_a_classifier_is_no_dense_backbone(make):
    with pytest.raises(ValueError, match="dense=True"):
        SemanticFPN(make("pvt_small"))


# --- The loss


def test_loss_by_loops():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4))
    labels[0, :2] = 255
    terms = [
        -logits[b, :, i, j].log_softmax(0)[labels[b, i, j]]
        for b in range(2)
        for i in range(4)
        for j in range(4)
        if labels[b, i, j] != 255
    ]
    assert len(terms) == 24
    torch.testing.assert_close(segmentation_loss(logits, labels), sum(terms) / 24)
    torch.testing.assert_close(segmentation_loss(logits, labels, mean_over="all"), sum(terms) / 32)


def test_loss_enlarges_the_logits():
    logits, labels = torch.randn(1, 3, 4, 6), torch.randint(0, 3, (1, 16, 24))
    large = functional.interpolate(logits, size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(segmentation_loss(logits, labels), functional.cross_entropy(large, labels))


def test_loss_where_nothing_counts_is_zero_with_zero_gradients():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_loss_is_float32_of_half_logits():
    loss = segmentation_loss(
        torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16), torch.zeros(1, 2, 2, dtype=torch.uint8)
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(4))


def test_loss_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        segmentation_loss(torch.zeros(2, 3, 2, 2), torch.zeros(1, 2, 2).long())
    with pytest.raises(ValueError, match="mean_over"):
        segmentation_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), mean_over="some")
