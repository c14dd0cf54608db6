"""The linear probe: its features, that nothing but the head moves, and the classifier that it leaves."""

from __future__ import annotations

import importlib

import pytest
import torch
from attnmap_core.errors import InputError
from PIL import Image
from sar_vit import SARViT
from sar_vit.scenarios.probe import LinearProbe, classify
from torch.nn import functional

tiny = importlib.import_module("tiny_pretraining")


@pytest.fixture
def start(tmp_path):
    """A run folder of DINO, whose encoder has stochastic depth."""
    made = tiny.setup("dino", drop_path_rate=0.5)
    made.save(made.model, tmp_path / "run/model")
    return tmp_path / "run"


def probe(start, **changed):
    return tiny.setup(
        "probe", **{"start": str(start), "probe_blocks": 2, "augmentation": "crop_flip"} | changed
    )


def test_features_are_the_class_tokens_of_the_last_blocks(start):
    model = probe(start).model.eval()
    encoder = SARViT.from_pretrained(start / "model")
    network = encoder.backbone.model
    tokens = []
    handles = [
        block.register_forward_hook(lambda *given: tokens.append(given[-1])) for block in network.blocks
    ]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        alone = encoder(images)
        expected = torch.cat([network.norm(out)[:, 0] for out in tokens], dim=1)
    for handle in handles:
        handle.remove()
    assert expected.shape == (2, 24)
    torch.testing.assert_close(model.classifier.features(images), expected)
    torch.testing.assert_close(probe(start, probe_blocks=1).model.eval().classifier.features(images), alone)
    torch.testing.assert_close(model(images), model.classifier.head(expected))
    torch.testing.assert_close(model.classifier(images), model(images))


def test_form_of_the_block_is_that_of_the_model(tmp_path):
    made = tiny.setup("mocov3", msa_skip=True, mlp_norm=True)
    made.save(made.model, tmp_path / "plain")
    classifier = probe(tmp_path / "plain").model.classifier
    assert classifier.switches == {"msa_skip": True, "mlp_norm": True, "mlp_skip": True}
    assert (classifier.heads, classifier.labels) == (3, tiny.data().labels)


def test_head_starts_small(start):
    head = probe(start, backbone="vit").model.classifier.head
    assert 0.007 < head.weight.std() < 0.013
    assert not head.bias.any()


def test_task(start):
    model = probe(start).model.train()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])
    parts = classify(model, {"images": images, "labels": labels})
    logits = model(images)
    torch.testing.assert_close(parts["cross_entropy"], functional.cross_entropy(logits, labels))
    assert parts["accuracy"] == (logits.argmax(1) == labels).float().mean()
    parts["loss"].backward()
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_gradient == ["classifier.head.weight", "classifier.head.bias"]


def test_nothing_but_the_head_moves(start, tmp_path):
    settings = tiny.config(
        "probe",
        optimizer="momentum",
        lr=0.5,
        weight_decay=0.0,
        warmup_epochs=0,
        schedule_per_step=False,
        epochs=3,
    )
    made = probe(start)
    assert not made.model.train().classifier.backbone.training  # in spite of its stochastic depth
    result, task = tiny.run(tmp_path / "probe", made, settings, evaluate=True)
    state = made.model.state_dict()
    changed = {name for name in state if not torch.equal(state[name], task.states[0][name])}
    assert changed == {"classifier.head.weight", "classifier.head.bias"}
    epochs = [line for line in result.history if line["kind"] == "epoch"]
    assert [line["lr"] for line in epochs] == pytest.approx([0.5, 0.375, 0.125])
    assert 0 <= epochs[-1]["metrics"]["top1"] <= 100
    loaded = made.load(tmp_path / "probe/model")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), made.model.eval()(images))
    assert loaded.predict(Image.new("RGB", (40, 32), "olive")).label_name in tiny.data().labels
    assert made.measure(loaded, tiny.data("val"), None) == pytest.approx(epochs[-1]["metrics"])


def test_it_learns(start):
    model = probe(start).model.train()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 4
    images = torch.randn(8, 3, 32, 32, generator=generator) + labels[:, None, None, None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    losses = []
    for _ in range(60):
        loss = classify(model, {"images": images, "labels": labels})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_wrong_settings(start, tmp_path):
    with pytest.raises(InputError, match="start none: a probe needs a trained model"):
        tiny.setup("probe")
    with pytest.raises(InputError, match="no such folder"):
        probe(tmp_path / "nowhere/at/all")
    with pytest.raises(InputError, match="head_blocks 3: vit gives the class token of 2 blocks"):
        probe(start, probe_blocks=3)
    with pytest.raises(ValueError, match="a probe needs a model with a head"):
        LinearProbe(SARViT.from_pretrained(start / "model"))
