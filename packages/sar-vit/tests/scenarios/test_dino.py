"""DINO: its loss, head, centre and schedules, what moves and what stays, resuming, and several processes."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch
from attnmap_core.errors import InputError
from safetensors.torch import load_file
from sar_vit import SARViT, spatial_entropy
from sar_vit.scenarios.dino import DINO, DINOHead, DINOTask
from torch import nn

tiny = importlib.import_module("tiny_pretraining")
SIZES = (32, 32, 16, 16)


def model_and_crops(b: int = 3, sizes: tuple[int, ...] = SIZES, **changed) -> tuple[DINO, list[torch.Tensor]]:
    made = tiny.setup("dino", **{"drop_path_rate": 0.0, "temperature": 0.1} | changed)
    model = made.model.train()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.student_head.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.center.normal_(std=0.1, generator=generator)
    return model, [torch.randn(b, 3, size, size, generator=generator) for size in sizes]


@pytest.mark.parametrize("sizes", [SIZES, (32, 32)])
def test_loss_is_that_of_every_pair_by_itself(sizes):
    model, crops = model_and_crops(sizes=sizes)
    center = model.center.clone()
    student = [model.student_head(model.student(crop)) for crop in crops]
    teacher = [model.teacher_head(model.teacher(crop)) for crop in crops[:2]]
    terms = []
    for i, t in enumerate(teacher):
        for j, s in enumerate(student):
            if i != j:
                wanted = ((t - center) / 0.05).exp()
                wanted = wanted / wanted.sum(1, keepdim=True)
                terms.append(-(wanted * (s / 0.1).log_softmax(1)).sum(1).mean())
    assert len(terms) == 2 * (len(sizes) - 1)
    torch.testing.assert_close(model(crops, 0.05), sum(terms) / len(terms))


def test_centre_is_a_moving_average_of_the_teachers_outputs():
    model, crops = model_and_crops()
    before = model.center.clone()
    with torch.no_grad():
        outputs = torch.cat([model.teacher_head(model.teacher(crop)) for crop in crops[:2]])
    model.eval()(crops, 0.05)
    assert torch.equal(model.center, before)
    model.train()(crops, 0.05)
    torch.testing.assert_close(model.center, 0.9 * before + 0.1 * outputs.mean(0))
    assert "center" in model.state_dict()


def test_head_is_weight_normalised_with_its_norm_fixed():
    torch.manual_seed(1)
    head = DINOHead(12, hidden_dim=16, bottleneck_dim=8, prototypes=24)
    assert [type(layer).__name__ for layer in head.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert 0.015 < head.mlp[0].weight.std() < 0.025
    last = nn.utils.parametrizations.weight_norm(nn.Linear(8, 24, bias=False))
    last.parametrizations.weight.original0.data.fill_(1.0)
    last.parametrizations.weight.original1.data.copy_(head.prototypes)
    x = torch.randn(5, 12)
    bottleneck = head.mlp(x)
    expected = last(bottleneck / bottleneck.norm(dim=1, keepdim=True))
    torch.testing.assert_close(head(x), expected)
    coefficients = torch.randn(5, 24)
    (head(x) * coefficients).sum().backward()
    [gradient] = torch.autograd.grad((expected * coefficients).sum(), last.parametrizations.weight.original1)
    torch.testing.assert_close(head.prototypes.grad, gradient)


def test_temperature_of_the_teacher():
    config = tiny.config(
        "dino", teacher_warmup_temperature=0.04, teacher_temperature=0.07, teacher_warmup_epochs=4
    )
    task = DINOTask(config)
    expected = np.concatenate([np.linspace(0.04, 0.07, 4), np.full(2, 0.07)])
    found = []
    for epoch in range(6):
        task.begin_epoch(epoch)
        found.append(task.teacher_temperature)
    assert found == pytest.approx(expected)
    assert DINOTask(tiny.config("dino")).teacher_temperature == 0.04


def test_gradients_are_of_the_student_alone():
    model, crops = model_and_crops()
    tiny.setup("dino").task(model, {"images": crops})["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) is name.startswith("teacher"), name
        assert parameter.grad is None or parameter.grad.any(), name


def test_stochastic_depth_is_the_students_alone():
    model, crops = model_and_crops(drop_path_rate=0.5)
    assert model.student.training
    assert not model.teacher.training
    assert model.teacher_head.training  # it has nothing that depends on it
    large = torch.cat(crops[:2])
    with torch.no_grad():
        assert torch.equal(model.teacher(large), model.teacher(large))
        torch.manual_seed(0)
        first, *others = (model.student(large) for _ in range(6))
        assert not all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("views", ["global", "all"])
def test_entropy_of_large_crops_or_of_all(views):
    model, crops = model_and_crops()
    each = []
    for crop in crops:
        model.student(crop)
        [S] = model.student.collector.take()
        assert S.shape == (3, 3, crop.shape[2] // 8, crop.shape[2] // 8)
        each.append(spatial_entropy(S, reduction="mean"))
    task = tiny.setup("dino", entropy_views=views, entropy_weight=0.5).task
    parts = task(model, {"images": crops})
    expected = sum(each) / 4 if views == "all" else (each[0] + each[1]) / 2
    torch.testing.assert_close(parts["spatial_entropy"], expected)
    torch.testing.assert_close(parts["loss"], parts["distillation"] + 0.5 * parts["spatial_entropy"])
    assert len(model.student.collector) == 0


def test_biases_and_norms_do_not_decay():
    made = tiny.setup("dino")
    decayed, plain = made.task.param_groups(made.model, tiny.config("dino"))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {
        id(parameter): name for name, parameter in made.model.named_parameters() if parameter.requires_grad
    }
    assert {id(p) for p in decayed["params"]} | {id(p) for p in plain["params"]} == set(names)
    assert {"student.backbone.model.pos_embed", "student_head.prototypes"} <= {
        names[id(p)] for p in decayed["params"]
    }
    assert all(
        names[id(p)].endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight"))
        for p in plain["params"]
    )


def test_each_gradient_is_clipped_and_the_last_layer_waits():
    model, crops = model_and_crops()
    task = tiny.setup("dino", clip_each=0.01, freeze_last_layer_epochs=1).task
    task(model, {"images": crops})["loss"].backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    task.begin_epoch(0)
    task.before_update(model)
    assert model.student_head.prototypes.grad is None
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = before[name].norm()
            torch.testing.assert_close(parameter.grad, before[name] * min(1, 0.01 / (norm + 1e-6)))
    model.student_head.prototypes.grad = before["student_head.prototypes"]
    task.begin_epoch(1)
    task.before_update(model)
    assert model.student_head.prototypes.grad is not None


def test_teacher_follows():
    made = tiny.setup("dino", momentum_start=0.8)
    model = made.model
    nn.init.normal_(model.student.backbone.model.cls_token)
    nn.init.normal_(model.student_head.prototypes)
    before = model.teacher.backbone.model.cls_token.clone(), model.teacher_head.prototypes.clone()
    made.task.after_update(model, 0.5)
    after = model.teacher.backbone.model.cls_token, model.teacher_head.prototypes
    now = model.student.backbone.model.cls_token, model.student_head.prototypes
    for old, new, student in zip(before, after, now):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)


def test_training_resumes_bit_for_bit(tmp_path):
    settings = tiny.config("dino", save_every=1, clip_each=1.0)
    result, task = tiny.run(tmp_path / "whole", tiny.setup("dino"), settings)
    assert result.steps == 4
    with pytest.raises(tiny.Stopped):
        tiny.run(tmp_path / "stopped", tiny.setup("dino"), settings, stop_at=4)
    made = tiny.setup("dino")
    tiny.run(tmp_path / "stopped", made, settings, resume=True)
    states = [
        load_file(tmp_path / name / "checkpoints/step-000000004/model.safetensors")
        for name in ("whole", "stopped")
    ]
    assert states[0].keys() == states[1].keys() == made.model.state_dict().keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    first, second = task.states
    assert torch.equal(
        first["student_head.prototypes"], second["student_head.prototypes"]
    )  # of the first epoch
    assert not torch.equal(states[0]["student_head.prototypes"], second["student_head.prototypes"])
    assert not torch.equal(first["student_head.mlp.0.weight"], second["student_head.mlp.0.weight"])
    assert not torch.equal(first["center"], second["center"])


@pytest.mark.multiprocess
def test_two_processes_are_one_with_twice_the_batch(tmp_path, two_processes):
    shared = {"drop_path_rate": 0.0, "optimizer": "sgd", "entropy_weight": 0.5, "entropy_views": "all"}
    two_processes(tmp_path / "two", "dino", batch_size=4, **shared)
    tiny.run(tmp_path / "one", tiny.setup("dino", **shared), tiny.config("dino", **shared), evaluate=True)
    histories = [
        [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for ours, theirs in zip(*histories, strict=True):
        names = ("loss", "distillation", "spatial_entropy", "components", "lr")
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-4)
        assert ours.get("metrics", {}) == pytest.approx(theirs.get("metrics", {}), rel=1e-4)
    states = [
        load_file(tmp_path / name / "checkpoints/step-000000004/model.safetensors") for name in ("one", "two")
    ]
    for name in states[0]:  # the centre among them
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("branch", ["default", "student"])
def test_what_is_saved_is_the_encoder(tmp_path, branch):
    made = tiny.setup("dino", save_branch=branch)
    nn.init.normal_(made.model.student.backbone.model.blocks[0].mlp.fc1.weight)
    made.save(made.model, tmp_path / "model")
    loaded = made.load(tmp_path / "model")
    assert isinstance(loaded, SARViT)
    expected, other = made.model.teacher, made.model.student
    if branch == "student":
        expected, other = other, expected
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), expected.eval()(images))
        assert not torch.equal(loaded(images), other.eval()(images))
    assert loaded.at_size(48).attention_maps(torch.randn(1, 3, 48, 48))[1].shape == (1, 3, 6, 6)


def test_other_backbones():
    pvt = {"embed_dims": (4, 6, 8, 12), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 3)}
    cvt = {"embed_dims": (4, 6, 12), "depths": (1, 1, 2), "num_heads": (1, 2, 3)}
    sizes = {"image_size": 64, "local_size": 32}
    model, crops = model_and_crops(sizes=(64, 64, 32), backbone="pvt_small", backbone_options=pvt, **sizes)
    assert torch.isfinite(model(crops, 0.04))
    with pytest.raises(InputError, match="backbone cvt_13: has batch norms"):
        tiny.setup("dino", backbone="cvt_13", backbone_options=cvt, **sizes)


def test_bfloat16():
    model, crops = model_and_crops()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(crops, 0.05)
    assert loss.dtype == model.center.dtype == torch.float32
    torch.testing.assert_close(loss, model(crops, 0.05), rtol=0.1, atol=0.1)
