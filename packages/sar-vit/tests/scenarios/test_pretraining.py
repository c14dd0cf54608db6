"""What MoCo-v3 and DINO share: schedules, momentum, refused settings, and the k-NN accuracy."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from attnmap_core.data.loaders import samples_of
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.recipes import load_recipe
from sar_vit.config import SarConfig
from sar_vit.scenarios import make_setup
from sar_vit.scenarios.pretraining import (
    CosineSchedule,
    PretrainingTask,
    follow,
    make_schedule,
    momentum_at,
    neighbour_votes,
)
from torch import nn

tiny = importlib.import_module("tiny_pretraining")


def test_rate_and_weight_decay_of_each_step():
    decayed, plain = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [decayed], "weight_decay": 0.04}, {"params": [plain], "weight_decay": 0.0}]
    config = SarConfig(
        lr=2.0,
        epochs=5,
        warmup_epochs=2,
        warmup_lr=0.0,
        min_lr=0.1,
        weight_decay=0.04,
        final_weight_decay=0.4,
    )
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    schedule = CosineSchedule(optimizer, config, steps_per_epoch=3)
    for step in [*range(15), 4]:  # a resume may begin anywhere
        optimizer.load_state_dict(optimizer.state_dict())  # which replaces the groups
        schedule.step(step // 3)
        schedule.step_update(step)
        expected = 2.0 * step / 6 if step < 6 else 0.1 + 0.95 * (1 + math.cos(math.pi * (step - 6) / 9))
        decay = 0.4 - 0.18 * (1 + math.cos(math.pi * step / 15))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2)
        assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([decay, 0])


def test_other_schedules_are_timms():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = SarConfig(lr=1.0, schedule="cosine", schedule_per_step=False, epochs=4)
    schedule = make_schedule(optimizer, config, 3)
    schedule.step(2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    config.final_weight_decay = 0.4
    with pytest.raises(
        InputError, match=r"final_weight_decay 0.4: needs schedule cosine with schedule_per_step"
    ):
        make_schedule(optimizer, config, 3)
    config.schedule_per_step, config.warmup_epochs = True, 4
    with pytest.raises(InputError, match="warmup_epochs 4: expected less than epochs 4"):
        make_schedule(optimizer, config, 3)


def test_momentum():
    for progress in (0, 0.1, 0.5, 0.77, 1):
        expected = 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - 0.996)
        assert momentum_at(progress, 0.996) == pytest.approx(expected, abs=1e-15)


def test_followers_move_and_what_is_equal_stays():
    torch.manual_seed(0)
    slow, fast = (
        nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)),
        nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)),
    )
    slow[0].bias.data.copy_(fast[0].bias)
    nn.init.uniform_(fast[1].running_mean)
    before = {name: tensor.clone() for name, tensor in slow.state_dict().items()}
    follow([slow], [fast], 0.9)
    torch.testing.assert_close(slow[0].weight, 0.9 * before["0.weight"] + 0.1 * fast[0].weight)
    assert torch.equal(slow[0].bias, fast[0].bias)
    assert torch.equal(slow[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize(("k", "temperature"), [(3, 0.07), (50, 1.0)])
def test_votes_of_neighbours(k, temperature):
    random = np.random.default_rng(4)
    bank, queries = (random.normal(size=(n, 5)) for n in (17, 6))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    labels = random.integers(0, 4, 17)
    expected = np.zeros((6, 4))
    for i, query in enumerate(queries):
        cosines = [(float(query @ other), int(label)) for other, label in zip(bank, labels)]
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            expected[i, label] += math.exp(cosine / temperature)
    found = neighbour_votes(*map(torch.from_numpy, (queries, bank, labels)), 4, k, temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("scenario", ["mocov3", "dino"])
def test_measure_is_knn_over_the_training_images(scenario):
    made = tiny.setup(scenario)
    made.model.eval()
    encoder = made.model.encoder()
    samples = {
        name: samples_of(tiny.data(name), eval_transform(encoder.preprocessing), seed=0)
        for name in ("train", "val")
    }
    with torch.no_grad():
        features = {
            name: nn.functional.normalize(encoder(torch.stack([item["image"] for item in some]))).numpy()
            for name, some in samples.items()
        }
    labels = {name: np.array([item["label"] for item in some]) for name, some in samples.items()}
    cosines = features["val"] @ features["train"].T
    votes = np.exp(cosines / 0.07) @ np.eye(4)[labels["train"]]  # 18 images: all of them are neighbours
    metrics = made.measure(made.model, tiny.data("val"), None)
    assert metrics["knn"] == pytest.approx(100 * (votes.argmax(1) == labels["val"]).mean())
    assert metrics["spatial_entropy"] > 0
    assert made.measure(encoder, tiny.data("val"), None) == metrics  # as it is once it was saved


def test_weight_of_the_entropy_follows_the_epochs():
    task = PretrainingTask(
        SarConfig(epochs=10, entropy_weight=0.5, entropy_schedule="warmup_cosine", entropy_warmup_epochs=3)
    )
    S = torch.zeros(1, 1, 3, 3)
    S[0, 0, 0, 0] = S[0, 0, 2, 2] = 1.0
    found = []
    for epoch in (0, 1, 2):
        task.begin_epoch(epoch)
        found.append(task.parts("main", torch.tensor(2.0), S))
    assert [parts["entropy_weight"].item() for parts in found] == pytest.approx([0, 0.25, 0.5])
    assert [parts["loss"].item() for parts in found] == pytest.approx(
        [2 + w * math.log(2) for w in (0, 0.25, 0.5)]
    )
    assert found[2]["main"] == 2


@pytest.mark.parametrize("method", ["mocov3", "dino"])
def test_recipes_are_those_of_the_paper(method):
    plain, sar, small, probe = (
        load_recipe("sar_vit", name, SarConfig)
        for name in (f"in100-{method}", f"in100-{method}-sar", f"tiny-{method}", f"in100-probe-{method}")
    )
    differing = {name for name, value in vars(sar).items() if value != getattr(plain, name)}
    assert differing == {"msa_skip", "mlp_norm", "entropy_weight"}
    assert (sar.msa_skip, sar.mlp_norm, sar.mlp_skip, sar.entropy_weight) == (False, False, True, 0.01)
    assert (plain.msa_skip, plain.mlp_norm, plain.mlp_skip, plain.entropy_weight) == (True, True, True, 0)
    per_256 = {"mocov3": (1.5e-4, 3.0), "dino": (5e-4, 0.001)}[method]
    assert sar.lr == pytest.approx(per_256[0] * 8 * sar.batch_size / 256)
    assert probe.lr == pytest.approx(per_256[1] * 8 * probe.batch_size / 256)
    assert probe.probe_blocks == {"mocov3": 1, "dino": 4}[method]
    assert sar.scenario == small.scenario == method
    small.data = tiny.DATA
    made = make_setup(small, tiny.data())
    assert made.select_by == "knn"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": "runs/a"}, "start runs/a: with scenario dino weights are drawn at random"),
        ({"pretrained": True}, "pretrained True: with scenario dino weights are drawn"),
        ({"lr_scales": {"a": 1.0}}, "lr_scales .*: with scenario dino all weights have one learning rate"),
        ({"drloc_weight": 0.1}, "drloc_weight 0.1: with scenario dino there is no relative"),
        (
            {"drop_last": False},
            "drop_last False: with scenario dino all steps need batches of one size; give true",
        ),
        ({"temperature": 0.0}, "temperature 0.0: with scenario dino expected a number above 0"),
        ({"momentum_start": 1.5}, "momentum_start 1.5: with scenario dino expected a number from 0 to 1"),
        ({"prototypes": 0}, "prototypes 0: with scenario dino expected 1 or more"),
        ({"clip_each": 3.0, "mixed_precision": "fp16"}, "clip_each 3.0: gradients are scaled in fp16"),
        ({"local_size": 20}, "local_size 20: not a size for vit"),
        ({"local_scale": (0.5, 0.2)}, "crop scale 0.5 0.2: expected two shares"),
        ({"local_crops": -1}, "local_crops -1: expected 0 or more"),
        (
            {"backbone": "swin_tiny_patch4_window7_224", "query": "avg"},
            "backbone 'swin_tiny_patch4_window7_224': has no option 'depth'",
        ),
    ],
)
def test_wrong_settings(changed, message):
    with pytest.raises(InputError, match=message) as error:
        tiny.setup("dino", **changed)
    assert "\n" not in str(error.value)


def test_a_stream_is_refused():
    data = tiny.data()
    data.streaming = True
    with pytest.raises(InputError, match="a stream, whose last step is not full"):
        make_setup(tiny.config("mocov3"), data)
