"""Relative localisation: targets and pairs by hand, reference numbers, the weight by epoch, model and task."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sar_vit import SARViT
from sar_vit.config import SarConfig
from sar_vit.drloc import (
    DRLocHead,
    DRLocTask,
    DRLocViT,
    drloc_loss,
    drloc_weight,
    pair_features,
    pair_offsets,
    sample_pairs,
    with_drloc,
)
from sar_vit.task import SupervisedTask
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
GOLDEN = sorted((Path(os.environ.get("ATTNMAP_GOLDEN", SHARED / "golden")) / "sar").glob("drloc*.npz"))
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
TARGETS = ("absolute", "normalised", "signed")


@pytest.fixture
def classifier() -> SARViT:
    torch.manual_seed(0)
    return SARViT("vit", 3, (32, 48), drop_path_rate=0.0, backbone_options=TINY).train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return {"images": torch.randn(4, 3, 32, 48, generator=generator), "labels": torch.arange(4) % 3}


@pytest.mark.golden
@pytest.mark.skipif(not GOLDEN, reason="no drloc*.npz (ATTNMAP_GOLDEN)")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_reference_numbers(path):
    golden = {name: torch.from_numpy(values) for name, values in np.load(path).items()}
    pos_a, pos_b, features = golden["pos_a"], golden["pos_b"], golden["features"]
    assert torch.equal(pair_features(features, pos_a, pos_b), golden["pair_input"])
    for target, name in zip(TARGETS, ("abs", "abs_norm", "signed_norm")):
        offsets = pair_offsets(pos_a, pos_b, tuple(features.shape[2:]), target)
        torch.testing.assert_close(offsets.double(), golden[f"target_{name}"], rtol=0, atol=1e-6)
        loss = drloc_loss(golden["pred"], offsets.double())
        torch.testing.assert_close(loss, golden[f"loss_l1_{name}"], rtol=0, atol=1e-6)


def reference(features, pos_a, pos_b, prediction, target):
    """Input of the MLP and loss, number by number."""
    b, _, h, w = features.shape
    inputs, errors = [], []
    for i in range(b):
        for a, z, guess in zip(pos_a[i].tolist(), pos_b[i].tolist(), prediction[i].tolist()):
            inputs.append(features[i, :, a[0], a[1]].tolist() + features[i, :, z[0], z[1]].tolist())
            for axis, side in enumerate((h, w)):
                delta = a[axis] - z[axis]
                wanted = {
                    "absolute": abs(delta),
                    "normalised": abs(delta) / (side - 1),
                    "signed": (delta + side - 1) / (2 * side - 2),
                }[target]
                errors.append(abs(guess[axis] - wanted))
    return torch.tensor(inputs).view(b, -1, 2 * features.shape[1]), sum(errors) / len(errors)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (4, 4)])
def test_any_grid(grid, target):
    features, prediction = torch.randn(2, 3, *grid), torch.randn(2, 20, 2)
    pos_a, pos_b = sample_pairs(2, 20, grid)
    inputs, loss = reference(features, pos_a, pos_b, prediction, target)
    assert torch.equal(pair_features(features, pos_a, pos_b), inputs)
    found = drloc_loss(prediction, pair_offsets(pos_a, pos_b, grid, target))
    assert found.item() == pytest.approx(loss, rel=1e-5)


def test_pairs_are_uniform_and_repeat_with_the_seed():
    torch.manual_seed(5)
    first = sample_pairs(50, 400, (2, 5))
    torch.manual_seed(5)
    again = sample_pairs(50, 400, (2, 5))
    assert torch.equal(torch.stack(first), torch.stack(again))
    for positions in first:
        counts = torch.bincount((positions[..., 0] * 5 + positions[..., 1]).flatten(), minlength=10)
        assert counts.sum() == 20_000
        assert counts.min() > 1850  # 2,000 expected, deviation 42
        assert counts.max() < 2150
    assert not torch.equal(*first)


def test_a_single_patch_has_no_offsets():
    a = torch.zeros(1, 4, 2, dtype=torch.long)
    for target in TARGETS:
        assert torch.isfinite(pair_offsets(a, a, (1, 1), target)).all()


def test_pooling_counts_only_what_is_there():
    head = DRLocHead(1, pairs=300, pool=True)
    seen = []
    head.layers.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    image = torch.arange(14.0 * 14).view(1, 1, 14, 14)
    _, offsets = head(image)
    assert offsets.max() == 6  # the grid is 7x7
    means = {
        image[0, 0, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2].mean().item()
        for i in range(7)
        for j in range(7)
    }
    values = {round(value, 3) for value in seen[0].flatten().tolist()}
    assert values == {round(value, 3) for value in means}


@pytest.mark.parametrize(("arch", "pooled"), [("vit", False), ("t2t_vit_7", True), ("cvt_13", True)])
def test_which_architectures_pool(arch, pooled):
    options = {"vit": TINY, "t2t_vit_7": {"depth": 1}, "cvt_13": {"depths": (1, 1, 1)}}[arch]
    model = DRLocViT(SARViT(arch, 2, 64, backbone_options=options), pairs=7)
    assert model.drloc.pool is pooled
    output = model(torch.randn(2, 3, 64, 64))
    assert output.prediction.shape == output.offsets.shape == (2, 7, 2)
    cells = (8, 8) if arch == "vit" else (4, 4)  # of the final grid
    assert output.offsets.max() <= (cells[0] + 1) // 2 - 1 if pooled else cells[0] - 1


def test_weight_by_epoch():
    rising = [drloc_weight(epoch, 100, 0.1) for epoch in range(21)]
    assert rising == pytest.approx([0.005 * epoch for epoch in range(21)])
    falling = np.array([drloc_weight(epoch, 100, 0.1) for epoch in range(20, 100)])
    np.testing.assert_allclose(np.diff(falling), -0.1 / 79)
    assert falling[-1] == 0
    assert drloc_weight(0, 1, 0.3, warmup_epochs=0) == 0.3
    assert [drloc_weight(epoch, 3, 1.0) for epoch in range(3)] == pytest.approx([0, 0.05, 0.1])
    for wrong in ((100, 100, 0.1, 20), (-1, 100, 0.1, 20), (0, 100, -0.1, 20), (0, 100, 0.1, -1)):
        with pytest.raises(ValueError, match="expected weight"):
            drloc_weight(*wrong)


def test_features_are_the_final_grid(classifier, batch):
    model = DRLocViT(classifier)
    seen = []
    model.drloc.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    output = model(batch["images"])
    net = classifier.backbone.model
    tokens = net.forward_features(batch["images"])  # after the final norm
    torch.testing.assert_close(seen[0].flatten(2).transpose(1, 2), tokens[:, 1:])
    torch.testing.assert_close(output.logits, classifier(batch["images"]))
    classifier.collector.clear()


def test_parts_add_up(classifier, batch):
    model = DRLocViT(classifier)
    task = DRLocTask(SupervisedTask(0.5), 0.2, epochs=40, warmup_epochs=10)
    torch.manual_seed(1)
    task.begin_epoch(5)
    parts = task(model, batch)
    torch.manual_seed(1)
    output = model(batch["images"])
    classifier.collector.clear()
    torch.testing.assert_close(parts["drloc"], functional.l1_loss(output.prediction, output.offsets))
    torch.testing.assert_close(
        parts["loss"], parts["cross_entropy"] + 0.5 * parts["spatial_entropy"] + 0.1 * parts["drloc"]
    )
    assert parts["drloc_weight"] == pytest.approx(0.1)
    assert all(part.ndim == 0 for part in parts.values())
    assert [name for name, part in parts.items() if part.requires_grad] == ["loss"]
    assert task.supervised.epoch == 5
    alone = SupervisedTask(0.5)(classifier, batch)
    assert set(parts) == {*alone, "drloc", "drloc_weight"}
    for name in alone.keys() - {"loss"}:
        torch.testing.assert_close(parts[name], alone[name])


@pytest.mark.parametrize("epoch", [0, 7])
def test_gradient_reaches_every_weight(classifier, batch, epoch):
    model = DRLocViT(classifier)
    task = DRLocTask(SupervisedTask(), epochs=10)
    task.begin_epoch(epoch)
    task(model, batch)["loss"].backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert (model.drloc.layers[0].weight.grad.abs().sum() > 0) == (epoch > 0)


def test_mixed_images_and_half_precision(classifier, batch):
    def mix(images, labels):
        return images.flip(0), functional.one_hot(labels, 3).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = DRLocTask(SupervisedTask(mix=mix), 0.1, warmup_epochs=0)(DRLocViT(classifier), batch)
    assert parts["drloc"].dtype == parts["loss"].dtype == torch.float32
    parts["loss"].backward()


def test_distributed_wrapper(classifier, batch, tmp_path):
    model, task = DRLocViT(classifier), DRLocTask(SupervisedTask(), 0.1, warmup_epochs=0)
    torch.manual_seed(1)
    task(model, batch)["loss"].backward()
    expected = [weight.grad for weight in model.parameters()]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        for find_unused in (False, True):
            model.zero_grad()
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
            torch.manual_seed(1)
            task(wrapped, batch)["loss"].backward()
            torch.testing.assert_close([weight.grad for weight in model.parameters()], expected)
    finally:
        torch.distributed.destroy_process_group()


def test_head_learns_offsets_from_features_that_tell_the_position():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 6), indexing="ij")
    features = torch.stack([rows, columns])[None]
    head = DRLocHead(2, pairs=200, hidden=64)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    values = []
    for _ in range(200):
        loss = drloc_loss(*head(features))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    # A head that sees nothing can guess the medians, 1 row and 2 columns, and is 1.1 off in the mean.
    assert np.mean(values[-5:]) < 0.2 < 1 < values[0]


def test_of_a_configuration(classifier):
    config = SarConfig(
        drloc_weight=0.3, drloc_pairs=9, drloc_target="signed", epochs=50, drloc_warmup_epochs=5
    )
    supervised = SupervisedTask()
    model, task = with_drloc(classifier, supervised, config)
    assert model.classifier is classifier
    assert (model.drloc.pairs, model.drloc.target) == (9, "signed")
    assert (task.supervised, task.epochs, task.warmup_epochs) == (supervised, 50, 5)
    task.begin_epoch(5)
    assert task.current_weight == 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DRLocHead(4, pairs=0), "pairs must be 1 or more"),
        (lambda: DRLocHead(4, target="l2"), "target must be"),
        (lambda: pair_offsets(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), (2, 2), "l2"), "target must be"),
        (lambda: drloc_loss(torch.zeros(1, 2, 2), torch.zeros(1, 1, 2)), "differ"),
    ],
)
def test_wrong_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()
