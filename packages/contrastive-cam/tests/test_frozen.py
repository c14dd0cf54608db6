"""Frozen maps: DDT as a model, the loss on regions against its formula, and a unit that learns a planted object."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from attnmap_core.errors import InputError
from contrastive_cam.baselines import DescriptorStatistics
from contrastive_cam.frozen import FrozenMap, RegionTask, fit_ddt, fit_region, region_loss, turn_to_center

TINY = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}


def keys(**options) -> FrozenMap:
    torch.manual_seed(0)
    return FrozenMap("vit", img_size=32, blocks=(0, 1), backbone_options=TINY, **options).eval()


def photos(count: int = 12) -> torch.Tensor:
    """Dark noise with a bright striped square near the middle."""
    generator = torch.Generator().manual_seed(1)
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    images[:, :, 8:24, 8:24] += 3.0
    return images


def reference(P: np.ndarray, F: np.ndarray, decay: float) -> float:
    def mean(m: np.ndarray, f: np.ndarray) -> np.ndarray:
        return (f * m).sum((1, 2)) / m.sum()

    def s(x: np.ndarray, y: np.ndarray) -> float:
        return (1 + x @ y / np.linalg.norm(x) / np.linalg.norm(y)) / 2

    b = len(P)
    fg, bg = [mean(P[i], F[i]) for i in range(b)], [mean(1 - P[i], F[i]) for i in range(b)]
    loss = -np.mean([np.log(1 - s(fg[i], bg[j])) for i in range(b) for j in range(b)])
    for side in (fg, bg):
        total = 0.0
        for i in range(b):
            near = sorted((j for j in range(b) if j != i), key=lambda j: -s(side[i], side[j]))
            total += sum(-np.exp(-decay * rank) * np.log(s(side[i], side[j])) for rank, j in enumerate(near))
        loss += total / (b * (b - 1))
    return float(loss)


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_region_loss_is_its_formula(decay):
    rng = np.random.default_rng(3)
    P, F = rng.uniform(0.1, 0.9, (5, 3, 4)), rng.normal(size=(5, 6, 3, 4))
    found = region_loss(torch.from_numpy(P), torch.from_numpy(F), decay=decay)
    assert float(found) == pytest.approx(reference(P, F, decay), rel=1e-9)
    P_t = torch.from_numpy(P).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: region_loss(p, torch.from_numpy(F), decay=decay), P_t)
    with pytest.raises(ValueError, match="expected"):
        region_loss(torch.zeros(2, 3, 3), torch.zeros(2, 4, 3, 4))


def test_ddt_as_a_model_is_ddt_and_survives_saving(tmp_path):
    model, images = keys(), photos()
    fit_ddt(model, images.split(5))
    statistics = DescriptorStatistics(24)
    statistics.add(model.features(images))
    torch.testing.assert_close(
        model(images).score, statistics.fit()(model.features(images)), rtol=1e-4, atol=1e-5
    )
    model.save_pretrained(tmp_path)
    again = FrozenMap.from_pretrained(tmp_path)
    assert torch.equal(again(images).score, model(images).score)
    assert again.blocks == (0, 1)
    assert again.threshold == 0.5
    positive = FrozenMap("vit", img_size=32, blocks=(0, 1), positive=True, backbone_options=TINY).eval()
    positive.load_state_dict(model.state_dict())
    assert torch.equal(positive.attention_map(images), model(images).score.clamp_min(0))


def test_training_moves_the_unit_alone():
    model = keys()
    backbone = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.weight.detach().clone()
    torch.manual_seed(0)
    parts = RegionTask()(model, {"images": photos(4)})
    parts["loss"].backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)
    assert all(torch.equal(value, backbone[name]) for name, value in model.backbone.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"weight", "bias"}
    assert "equivariance" not in RegionTask(0.0)(model, {"images": photos(4)})
    with pytest.raises(ValueError, match="equivariance"):
        RegionTask(-1)


def test_a_trained_unit_finds_what_was_planted_whatever_its_seed():
    for seed in (0, 1):
        model, images = keys(), photos()
        losses: list[float] = []

        def note(step: int, parts: Mapping[str, torch.Tensor], losses: list[float] = losses) -> None:
            losses.append(float(parts["loss"]))

        fit_region(model, [images], seed=seed, steps=60, on_step=note)
        assert losses[-1] < losses[0]
        score = model(images).score
        middle, corners = score[:, 1:3, 1:3].mean((1, 2)), score[:, [0, 0, 3, 3], [0, 3, 0, 3]].mean(1)
        assert (middle > 0).all()
        assert (middle > corners).all()
        assert corners.mean() < 0


def test_sign_is_turned_to_the_center():
    model = keys()
    score = torch.zeros(1, 4, 4)
    score[:, 1:3, 1:3] = -1.0
    weight = model.weight.detach().clone()
    turn_to_center(model, [score])
    assert torch.equal(model.weight, -weight)
    turn_to_center(model, [-score])
    assert torch.equal(model.weight, -weight)


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="exclude"):
        FrozenMap("vit", img_size=32, blocks=(0,), layers=("blocks.0",), backbone_options=TINY)
    with pytest.raises(InputError, match="blocks"):
        FrozenMap("vit", img_size=32, blocks=(7,), backbone_options=TINY)
    with pytest.raises(InputError, match="no photos"):
        fit_ddt(keys(), [])
    with pytest.raises(InputError, match="no photos"):
        fit_region(keys(), [])
    wide = FrozenMap("vit", img_size=(16, 32), blocks=(0,), backbone_options=TINY)
    with pytest.raises(InputError, match="square"):
        fit_region(wide, [torch.zeros(1, 3, 16, 32)])
