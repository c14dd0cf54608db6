"""What a run leaves: model folder with card, metrics.json and report.html, whatever kind of model it trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attnmap_core.data.sources import load_data
from attnmap_core.errors import InputError
from attnmap_core.files import write_json
from attnmap_core.recipes import run_record
from attnmap_core.training import TrainResult
from sar_vit import SARViT
from sar_vit.config import SarConfig
from sar_vit.evaluate import evaluate_model
from sar_vit.report import attention_galleries, write_run
from sar_vit.scenarios import Setup
from torch import nn

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
DATA = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=8,val=4,test=14"


def tiny(num_classes: int = 4, **options) -> SARViT:
    torch.manual_seed(0)
    return SARViT("vit", num_classes=num_classes, img_size=32, backbone_options=TINY, **options).eval()


def setup(model: Any, save: Any) -> Setup:
    return Setup(model=model, task=None, transform=None, measure=None, save=save, load=None)  # pyright: ignore


def result(best: dict | None = None) -> TrainResult:
    metrics = {"top1": 25.0, "jaccard": 20.0, "spatial_entropy": 1.5}
    history = [
        {
            "kind": "epoch",
            "epoch": e,
            "step": 2 * e,
            "loss": 2.0 / e,
            "spatial_entropy": 1.4,
            "lr": 1e-3,
            "metrics": metrics,
        }
        for e in (1, 2)
    ]
    return TrainResult(
        history=[{"kind": "step", "step": 1, "loss": 2.0}, *history], best=best, steps=4, seconds=90.0
    )


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "run.json", run_record(26, ("sar-vit",), arguments=["sar-vit", "train", "tiny"]))
    return folder


def config(run: Path, **fields: Any) -> SarConfig:
    return SarConfig(output_dir=str(run), eval_batch_size=8, workers=0, **fields)


def test_a_classifier(run):
    data = load_data(DATA, "test")
    model = tiny(labels=data.labels)
    metrics = evaluate_model(model, data, progress=False).metrics()
    metrics |= {"last_top1": 12.5, "last_jaccard": 11.0}
    best = {"epoch": 1, "metric": "top1", "value": 25.0}
    write_run(
        run,
        config(run),
        setup(model, lambda m, folder: m.save_pretrained(folder)),
        model,
        data,
        metrics,
        result(best),
    )
    again = SARViT.from_pretrained(run / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    found = json.loads((run / "metrics.json").read_text())
    assert (found["metrics"], found["chosen"], found["split"]) == (metrics, best, "test")
    card = (run / "model" / "README.md").read_text()
    assert f"| Top-1 | {data.name}, test | {metrics['top1']:.1f} % |" in card
    assert f"| Entropy (nats) | {data.name}, test | {metrics['spatial_entropy']:.4f} |" in card
    assert "last" not in card.split("## ")[0]
    assert "image-classification" in card
    report = (run / "report.html").read_text()
    for words in (
        "ViT + SAR on",
        "chosen epoch",
        "last epoch",
        "12.5",
        "Best cases",
        "Worst cases",
        "Heads of the last block",
    ):
        assert words in report, words
    assert "epoch 1, chosen by top1 on val" in report
    assert report.count("data:image/svg+xml") >= 4  # loss, entropy, learning rate, metrics


def test_an_encoder_without_labels(run, tmp_path):
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(5):
        Image.new("RGB", (40, 30), (50 * i, 90, 120)).save(photos / f"{i}.png")
    data, model = load_data(str(photos), "all"), tiny(0)
    made = setup(model, lambda m, folder: m.save_pretrained(folder))
    write_run(run, config(run, scenario="mocov3"), made, model, data, {}, result())
    report = (run / "report.html").read_text()
    assert "MoCo-v3 + SAR on" in report
    assert "Lowest entropy" in report
    assert "image-feature-extraction" in (run / "model" / "README.md").read_text()
    assert json.loads((run / "metrics.json").read_text())["metrics"] == {}


def test_a_model_without_attention_heads(run):
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

    def save(model: Any, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "weights.pth")

    model, data = Segmenter(), load_data(DATA, "test")
    metrics = {"mean_iou": 41.1, "pixel_accuracy": 80.0}
    write_run(run, config(run, scenario="segmentation"), setup(model, save), model, data, metrics, result())
    assert [path.name for path in (run / "model").iterdir()] == ["weights.pth"]
    report = (run / "report.html").read_text()
    assert "41.1" in report
    assert "Semantic FPN on" in report
    assert "cases" not in report
    assert json.loads((run / "metrics.json").read_text())["metrics"] == metrics


def test_a_folder_that_is_no_run(tmp_path):
    model, data = tiny(), load_data(DATA, "test")
    with pytest.raises(InputError, match=r"run\.json"):
        write_run(tmp_path, config(tmp_path), setup(model, None), model, data, {}, result())


def test_galleries_are_ranked_by_jaccard_or_else_by_entropy():
    data, model = load_data(DATA, "test"), tiny()
    measured = evaluate_model(model, data, progress=False)
    best, worst, random = attention_galleries(model, data, measured, each=3)
    assert (best.title, worst.title, random.title) == ("Best cases", "Worst cases", "Random cases")
    values = sorted(measured.scores()[1].values())
    assert [tile.badge for tile in best.tiles] == [f"{100 * value:.0f} %" for value in values[:-4:-1]]
    assert [tile.badge for tile in worst.tiles] == [f"{100 * value:.0f} %" for value in values[:3]]
    assert all(len(tile.pictures) == 3 for tile in best.tiles)
    del measured.rows["jaccard"]
    lowest = attention_galleries(model, data, measured, each=3)[0]
    assert lowest.title == "Lowest entropy"
    assert lowest.tiles[0].badge == f"E {measured.rows['entropy'].mean(axis=1).min():.2f}"
