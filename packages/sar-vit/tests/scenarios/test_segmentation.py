"""The segmentation scenario: what it makes of a configuration, a short run end to end, mean IoU, recipes."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attnmap_core.data.loaders import samples_of
from attnmap_core.data.sources import load_data
from attnmap_core.errors import InputError
from attnmap_core.metrics.segmentation import mean_iou
from attnmap_core.recipes import load_recipe
from attnmap_core.training import make_optimizer, param_groups, timm_schedule, train
from PIL import Image
from sar_vit import SARViT
from sar_vit.config import SarConfig
from sar_vit.scenarios import make_setup, segmentation
from sar_vit.scenarios.segmentation import SegmentationTask, build_model, measure
from sar_vit.segmentation import SARSegmenter
from sar_vit.segmentation_data import with_class_maps
from sar_vit.train import train as run
from torch import nn

TINY = {"embed_dims": (4, 4, 4, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 2)}


@pytest.fixture
def config(tmp_path) -> SarConfig:
    return SarConfig(
        data="synthetic:classes=3,superclasses=3,image_size=32,train=6,val=5,test=5",
        scenario="segmentation",
        backbone="pvt_small",
        backbone_options=TINY,
        image_size=32,
        neck_channels=8,
        head_channels=8,
        epochs=1,
        batch_size=4,
        workers=0,
        threads=1,
        lr=1e-3,
        schedule="poly",
        schedule_per_step=True,
        decay_rate=0.9,
        output_dir=tmp_path / "run",
    )


@pytest.fixture
def data(config):
    return {split: load_data(config.data, split) for split in ("train", "val")}


def test_end_to_end(config, data):
    setup = make_setup(config, data["train"])
    assert setup.with_segmentation
    samples = samples_of(
        setup.prepare(data["train"]), setup.transform, seed=config.seed, with_segmentation=True
    )
    before = {name: weight.clone() for name, weight in setup.model.state_dict().items()}
    result = train(
        setup.task,
        setup.model,
        samples,
        replace(config, select_by=setup.select_by),
        config.output_dir,
        evaluate=lambda model, accelerator: setup.measure(model, data["val"], accelerator),
        save_model=setup.save,
    )
    assert result.steps == 2
    [epoch] = [record for record in result.history if record["kind"] == "epoch"]
    assert math.isfinite(epoch["loss"])
    # All weights moved but those whose gradient may be 0: keys' biases, which softmax does not see.
    still = {name for name, weight in setup.model.state_dict().items() if torch.equal(weight, before[name])}
    assert {name for name in still if not name.endswith(("bias", "running_mean"))} == set()
    loaded = setup.load(config.output_dir / "best")
    assert loaded.labels == ["background", *data["train"].labels]
    assert measure(loaded, data["val"]) == pytest.approx(epoch["metrics"])
    assert loaded.backbone.last_block.msa_skip is False
    assert loaded.predict(data["val"][0].image).shape == (32, 32)


def test_mean_iou_of_whole_photos(config, data):
    model = build_model(config, ["background", "a", "b", "c"]).eval()
    nn.init.normal_(model.decode_head.conv_seg.weight)
    confusion = np.zeros((4, 4), int)
    for sample in with_class_maps(data["val"]):
        np.add.at(confusion, (sample.segmentation.ravel(), model.predict(sample.image).ravel()), 1)
    found = measure(model, data["val"])
    assert found["images"] == 5
    assert found["mean_iou"] == pytest.approx(mean_iou(confusion))
    assert found["pixel_accuracy"] == pytest.approx(100 * np.trace(confusion) / confusion.sum())
    assert np.count_nonzero(confusion.sum(0)) > 1


def test_processes_share_the_photos(config, data, monkeypatch):
    model = build_model(config, ["background", "a", "b", "c"]).eval()
    nn.init.normal_(model.decode_head.conv_seg.weight)
    alone = measure(model, data["val"])
    states = []
    monkeypatch.setattr(
        segmentation, "gather_objects", lambda accelerator, state: states.append(dict(state)) or states
    )
    results = [
        measure(model, data["val"], SimpleNamespace(num_processes=2, process_index=index)) for index in (0, 1)
    ]
    assert [sorted(state) for state in states] == [[0, 2, 4], [1, 3]]
    assert results[1] == alone != results[0]


def test_number_of_classes_must_fit(config, data):
    model = build_model(config, ["a", "b"]).eval()
    with pytest.raises(InputError, match="4 classes in its class maps, the model has 2"):
        measure(model, data["val"])


def test_loss_weighs_each_photo_alike():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 4, stride=4)
    images, labels = torch.randn(3, 3, 16, 16), torch.randint(0, 5, (3, 16, 16))
    labels[0, 4:], labels[1] = 255, 255
    whole = SegmentationTask()(model, {"images": images, "pixel_labels": labels})["loss"]
    each = [
        SegmentationTask()(model, {"images": images[i : i + 1], "pixel_labels": labels[i : i + 1]})["loss"]
        for i in range(3)
    ]
    torch.testing.assert_close(whole, torch.stack(each).mean())
    assert each[1] == 0
    log_probabilities = nn.functional.interpolate(model(images), scale_factor=4, mode="bilinear").log_softmax(
        1
    )
    counted = labels != 255
    picked = log_probabilities.gather(1, labels.clamp(max=4)[:, None])[:, 0][counted]
    torch.testing.assert_close(whole, -picked.sum() / labels.numel())


@pytest.mark.parametrize("run_folder", [False, True])
def test_start(config, tmp_path, run_folder):
    torch.manual_seed(5)
    classifier = SARViT("pvt_small", 7, 64, msa_skip=True, mlp_norm=False, backbone_options=TINY)
    folder = tmp_path / "source"
    classifier.save_pretrained(folder / "model" if run_folder else folder)
    # Fields of the model do not count: they are the start's.
    model = build_model(replace(config, start=str(folder), backbone_options={}), ["a", "b"])
    assert isinstance(model, SARSegmenter)
    assert model.backbone.last_block.msa_skip is True
    assert model.backbone.last_block.mlp_norm is False
    assert model.backbone.img_size == (64, 64)
    assert model.to_input.short_side == 32
    source = classifier.backbone.model.state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.backbone.state_dict().items())
    again = build_model(replace(config, start=str(folder)), ["a", "b"])
    assert torch.equal(again.neck.fpn_convs[0].conv.weight, model.neck.fpn_convs[0].conv.weight)


def test_start_of_another_kind(config, tmp_path):
    build_model(config, ["a", "b"]).save_pretrained(tmp_path / "segmenter")
    with pytest.raises(InputError, match="describes a SARSegmenter, expected SARViT"):
        build_model(replace(config, start=str(tmp_path / "segmenter")), ["a", "b"])
    with pytest.raises(InputError, match="no such folder"):
        build_model(replace(config, start=str(tmp_path / "none")), ["a", "b"])


def test_statistics_over_processes_on_gpus(config, data, monkeypatch, tmp_path):
    def norms(on: bool, processes: int, device: str) -> set[type]:
        state = SimpleNamespace(num_processes=processes, device=torch.device(device))
        monkeypatch.setattr(segmentation, "start_processes", lambda: state)
        setup = make_setup(replace(config, sync_batchnorm=on), data["train"])
        head = setup.model.decode_head
        if processes > 1 and on:
            setup.save(setup.model, tmp_path / device)
            assert not any(isinstance(m, nn.SyncBatchNorm) for m in setup.load(tmp_path / device).modules())
        return {type(module) for module in head.modules() if "BatchNorm" in type(module).__name__}

    assert norms(True, 2, "cuda") == {nn.SyncBatchNorm}
    assert norms(True, 2, "cpu") == norms(True, 1, "cuda") == norms(False, 2, "cuda") == {nn.BatchNorm2d}


def test_recipes_of_table_12():
    base, sar = (load_recipe("sar_vit", name, SarConfig) for name in ("ade20k-pvt-fpn", "ade20k-pvt-fpn-sar"))
    assert replace(base, **sar.switches()) == sar
    assert base.switches() == {"msa_skip": True, "mlp_norm": True, "mlp_skip": True}
    steps = math.ceil(20_210 / (8 * base.batch_size))
    assert 40_000 <= base.epochs * steps <= 40_600
    assert (base.lr, base.weight_decay, base.image_size) == (2e-4, 1e-4, 512)
    assert (base.scale_range, base.class_share, base.photometric) == ((0.5, 2.0), 0.75, True)
    # The rate of every step, as PVT's code has it.
    with torch.device("meta"):
        model = SARSegmenter(base.backbone, 150)
    optimizer = make_optimizer(param_groups(nn.Linear(2, 2), base), base)
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(28.2, abs=0.05)
    schedule, end = timm_schedule(optimizer, base, steps), base.epochs * steps
    for done in (0, 1, end // 3, end - 1):
        schedule.step_update(done)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-4 * (1 - done / end) ** 0.9)


def test_tiny_recipe(tmp_path):
    config = load_recipe("sar_vit", "tiny-fpn", SarConfig)
    data = load_data(config.data, "train")
    setup = make_setup(config, data)
    samples = samples_of(setup.prepare(data), setup.transform, seed=1, with_segmentation=True)
    batch = {
        "images": torch.stack([samples[i]["image"] for i in range(4)]),
        "pixel_labels": torch.stack([samples[i]["pixel_labels"] for i in range(4)]),
    }
    optimizer = torch.optim.AdamW(setup.model.parameters(), lr=config.lr)
    losses = []
    for _ in range(12):
        loss = setup.task(setup.model.train(), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_ade20k_from_the_recipe_to_the_report(tmp_path):
    generator = np.random.default_rng(0)
    root = tmp_path / "ADEChallengeData2016"
    for split, count in (("training", 6), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.effect_noise((90, 70 + i), 50).convert("RGB").save(root / f"images/{split}/{i}.jpg")
            classes = generator.integers(0, 151, (70 + i, 90)).astype(np.uint8)
            Image.fromarray(classes).save(root / f"annotations/{split}/{i}.png")
    classifier = SARViT("pvt_small", 3, 64, backbone_options=TINY)
    classifier.save_pretrained(tmp_path / "start")
    changes = {"data": f"ade20k:{root}", "start": str(tmp_path / "start"), "output_dir": tmp_path / "run"}
    small = {"image_size": 64, "epochs": 1, "workers": 0, "neck_channels": 8, "head_channels": 8}
    config = load_recipe("sar_vit", "ade20k-pvt-fpn-sar", SarConfig, {**changes, **small})
    finished = run(config)
    assert finished.metrics["images"] == 3
    assert 0 <= finished.metrics["mean_iou"] < 5  # of 150 classes, drawn at random
    assert (tmp_path / "run/report.html").is_file()
    assert SARSegmenter.from_pretrained(tmp_path / "run/model").num_classes == 150


@pytest.mark.slow
def test_tiny_recipe_learns(tmp_path):
    """45 seconds on one core; a map of nothing but background has a mean IoU of 29."""
    config = load_recipe("sar_vit", "tiny-fpn", SarConfig)
    data = {split: load_data(config.data, split) for split in ("train", "test")}
    setup = make_setup(config, data["train"])
    samples = samples_of(
        setup.prepare(data["train"]), setup.transform, seed=config.seed, with_segmentation=True
    )
    train(setup.task, setup.model, samples, config, tmp_path / "run", save_model=setup.save)
    found = setup.measure(setup.load(tmp_path / "run" / "model"), data["test"], None)
    assert found["mean_iou"] > 60
