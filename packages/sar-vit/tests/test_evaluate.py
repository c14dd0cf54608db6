"""Metrics of a model on a split, against references written here; protocols, resuming, and wrong input."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from attnmap_core.data.sources import load_data
from attnmap_core.data.transforms import Preprocessing, eval_transform
from attnmap_core.errors import InputError
from attnmap_core.metrics.robustness import ALEXNET_ERRORS
from PIL import Image
from safetensors.torch import save_file
from sar_vit import SARViT, evaluate
from sar_vit.evaluate import (
    CorruptionEvaluation,
    evaluate_command,
    evaluate_imagenet_c,
    evaluate_model,
    open_model,
)
from sar_vit.imagenet_a import IMAGENET_A
from scipy import ndimage
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
WEIGHTS = SHARED / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k" / "model.safetensors"
ANIMALS = SHARED / "data" / "caltech101_animals"

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
DATA = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=8,val=4,test=14"


def tiny(num_classes: int = 4, img_size=(32, 48), **options) -> SARViT:
    torch.manual_seed(0)
    model = SARViT("vit", num_classes=num_classes, img_size=img_size, backbone_options=TINY, **options)
    with torch.no_grad():  # attention that is not almost uniform
        for block in model.backbone.blocks:
            block.attn.qkv.weight.mul_(30)
        if num_classes:
            model.head.weight.mul_(20)
    return model.eval()


def attention_by_hand(model: SARViT, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """S and the softmax attention, ``(b, heads, h, w)``, from the input of the last attention."""
    block, seen = model.collector.block, []
    handle = block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    b, n, c = seen[0].shape
    heads = block.attn.num_heads
    q, k, _ = block.attn.qkv(seen[0]).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    logits = (q[:, :, :1] @ k.mT * (c // heads) ** -0.5)[:, :, 0]
    h, w = (side // 8 for side in images.shape[-2:])
    shape = (b, heads, h, w)
    return (
        logits[..., 1:].reshape(shape).detach().double().numpy(),
        logits.softmax(-1)[..., 1:].reshape(shape).detach().double().numpy(),
    )


def entropy_by_hand(S: np.ndarray) -> tuple[float, int, float]:
    mask = S.mean() < S
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    B = np.maximum(S - S.mean(), 0)
    shares = ndimage.sum(B, labels, range(1, count + 1)) / B.sum()
    return float(-(shares * np.log(shares)).sum()), count, float(mask.mean())


def mask_by_hand(attention: np.ndarray, height: int, width: int, mass: float = 0.6) -> np.ndarray:
    """The steps of the released evaluation: sort, cumulate, keep, enlarge by nearest neighbour."""
    heads, h, w = attention.shape
    kept = []
    for head in attention.reshape(heads, -1):
        share = head / head.sum()
        order = np.argsort(share, kind="stable")
        keep = np.zeros(h * w, bool)
        keep[order[np.cumsum(share[order]) > 1 - mass]] = True
        kept.append(keep.reshape(h, w))
    enlarged = functional.interpolate(
        torch.tensor(np.array(kept))[None].float(), (height, width), mode="nearest"
    )
    return enlarged[0].bool().numpy()


def jaccard_by_hand(masks: np.ndarray, target: np.ndarray, counts: np.ndarray | None = None) -> float:
    counts = np.ones(target.shape, bool) if counts is None else counts
    classes = [c for c in np.unique(target) if c not in (0, 255)]
    best = [
        max((mask & (target == c) & counts).sum() / ((mask | (target == c)) & counts).sum() for mask in masks)
        for c in classes
    ]
    return float(np.mean(best)) if best else float("nan")


# --- Standard metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["none", "center"])
def test_metrics_are_those_computed_by_hand(crop):
    model = tiny(preprocessing=Preprocessing(size=(32, 48), crop=crop).to_dict())
    data = load_data(DATA, "test")
    found = evaluate_model(model, data, batch_size=5, progress=False)

    entropies, counts, shares, jaccards, correct, five = [], [], [], [], [], []
    for sample in data:
        image = eval_transform(model.preprocessing)(sample.image)[None]
        S, attention = attention_by_hand(model, image)
        each = [entropy_by_hand(head) for head in S[0]]
        entropies.append([e for e, _, _ in each])
        counts.append([r for _, r, _ in each])
        shares.append([share for _, _, share in each])
        ranked = model(image)[0].argsort(descending=True).tolist()
        correct.append(ranked[0] == sample.label)
        five.append(sample.label in ranked[:5])
        mask = Image.fromarray(sample.mask.astype(np.uint8))
        box = model.preprocessing.seen_rectangle(*sample.image.size)
        target = np.array(mask.resize((48, 32), Image.Resampling.NEAREST, box=box))
        jaccards.append(jaccard_by_hand(mask_by_hand(attention[0], 32, 48), target))

    metrics = found.metrics()
    assert metrics["spatial_entropy"] == pytest.approx(np.mean(entropies), abs=1e-5)
    assert metrics["components"] == pytest.approx(np.mean(counts))
    assert metrics["foreground"] == pytest.approx(100 * np.mean(shares))
    assert metrics["jaccard"] == pytest.approx(100 * np.nanmean(jaccards), abs=1e-6)
    assert (metrics["top1"], metrics["top5"]) == (
        pytest.approx(100 * np.mean(correct)),
        pytest.approx(100 * np.mean(five)),
    )
    heads = found.heads()
    assert [head["spatial_entropy"] for head in heads] == pytest.approx(np.mean(entropies, axis=0), abs=1e-5)
    assert len(heads) == 3
    assert found.to_json()["images"] == 14
    assert max(counts)[0] > 1  # or the entropies would say nothing
    json.dumps(found.to_json(), allow_nan=False)


def test_neither_batches_nor_streams_nor_the_mode_change_anything():
    model, data = tiny(), load_data(DATA, "test")
    one = evaluate_model(model, data, batch_size=14, progress=False).metrics()
    assert evaluate_model(model, data, batch_size=3, progress=False).metrics() == pytest.approx(one)
    streamed = load_data(DATA, "test", streaming=True)
    assert evaluate_model(model, streamed, batch_size=3, progress=False).metrics() == pytest.approx(one)
    model.train()
    assert evaluate_model(model, data, batch_size=14, progress=False).metrics() == pytest.approx(one)
    assert model.training
    assert len(model.collector) == 0  # nothing is kept of a pass


def test_accuracy_only_where_the_classes_are_the_same():
    data = load_data(DATA, "test")
    for model, words in (
        (tiny(3), "3 classes"),
        (tiny(0, labels=None), "0 classes"),
        (tiny(labels=[*data.labels[::-1]]), "class 0"),
    ):
        found = evaluate_model(model, data, progress=False)
        assert "top1" not in found.metrics()
        assert {"jaccard", "spatial_entropy"} <= found.metrics().keys()
        assert words in found.notes[0]
    assert "top1" in evaluate_model(tiny(labels=data.labels), data, progress=False).metrics()


def test_images_without_masks_or_labels(tmp_path):
    for i in range(3):
        Image.new("RGB", (40, 30), (60 * i, 90, 120)).save(tmp_path / f"{i}.png")
    found = evaluate_model(tiny(), load_data(str(tmp_path), "all"), progress=False)
    assert set(found.metrics()) == {"spatial_entropy", "components", "foreground"}
    assert found.scores()[0] == "entropy"


def test_an_average_query_model():
    model = tiny(query="avg")
    found = evaluate_model(model, load_data(DATA, "test"), progress=False).metrics()
    cls = evaluate_model(tiny(), load_data(DATA, "test"), progress=False).metrics()
    assert found["spatial_entropy"] != pytest.approx(cls["spatial_entropy"])


# --- Class maps ------------------------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path):
    """Three photos of different sizes: two objects and void, one object, none."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(70, 50), (40, 60), (50, 50)]):
        coarse = rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(root / "JPEGImages" / f"p{i}.jpg", quality=95)
        target = np.zeros((height, width), np.uint8)
        if i < 2:
            target[10:30, 5:25] = 7
        if i == 0:
            target[5:40, 40:65], target[3:5, 40:65] = 15, 255
        classes = Image.fromarray(target, mode="P")
        classes.putpalette([v for k in range(256) for v in (k, 255 - k, 0)])
        classes.save(root / "SegmentationClass" / f"p{i}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("p0\np1\np2\n")
    return root


@pytest.mark.parametrize("exclude_void", [False, True])
def test_voc_jaccard_by_the_steps_of_the_released_evaluation(voc, exclude_void):
    model = tiny(img_size=(32, 32))
    data = load_data(f"voc-segmentation:{voc}", "val")
    found = evaluate_model(
        model, data, protocols=("voc-jaccard",), jaccard_size=96, exclude_void=exclude_void, progress=False
    )
    large = model.at_size(96)
    values = []
    for i in range(3):
        image = (
            Image.open(voc / "JPEGImages" / f"p{i}.jpg")
            .convert("RGB")
            .resize((96, 96), Image.Resampling.BILINEAR)
        )
        tensor = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        _, attention = attention_by_hand(large, (tensor - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        target = np.array(Image.open(voc / "SegmentationClass" / f"p{i}.png").resize((96, 96)))
        counts = target != 255 if exclude_void else None
        values.append(jaccard_by_hand(mask_by_hand(attention[0], 96, 96), target, counts))
    assert found.rows["jaccard"] == pytest.approx(values, nan_ok=True, abs=1e-9)
    assert found.metrics() == {"jaccard": pytest.approx(100 * np.nanmean(values))}
    assert found.to_json()["images_with_objects"] == 2


def test_standard_has_the_same_jaccard_and_the_entropies(voc):
    data = load_data(f"voc-segmentation:{voc}", "val")
    both = evaluate_model(tiny(img_size=32), data, jaccard_size=96, progress=False)
    alone = evaluate_model(
        tiny(img_size=32), data, protocols=("voc-jaccard",), jaccard_size=96, progress=False
    )
    assert both.metrics()["jaccard"] == alone.metrics()["jaccard"]
    assert {"spatial_entropy", "jaccard"} <= both.metrics().keys()
    assert "top1" not in both.metrics()


def test_evaluation_draws_nothing_from_the_generator(voc):
    data = load_data(f"voc-segmentation:{voc}", "val")
    model, before = tiny(img_size=32), torch.random.get_rng_state()
    evaluate_model(model, data, jaccard_size=64, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_size_keeps_what_the_model_computes():
    model = tiny()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    again = model.at_size((32, 48))
    torch.testing.assert_close(again(images), model(images))
    large = model.at_size((64, 96))
    assert (large.grid, large.preprocessing.size) == ((8, 12), (64, 96))
    table = model.backbone.model.pos_embed[:, 1:].reshape(1, 4, 6, 24).permute(0, 3, 1, 2)
    expected = functional.interpolate(table, (8, 12), mode="bicubic", antialias=True)
    found = large.backbone.model.pos_embed[:, 1:].reshape(1, 8, 12, 24).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
    turned = model.at_size((48, 32))  # as many patches, another grid
    assert not torch.equal(turned.backbone.model.pos_embed, model.backbone.model.pos_embed)
    with pytest.raises(InputError, match="100"):
        model.at_size(100)


# --- ImageNet-A and -C -----------------------------------------------------------------------------------------------


def photo(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32)).save(path)


@pytest.fixture(scope="module")
def imagenet_a(tmp_path_factory):
    root = tmp_path_factory.mktemp("a") / "imagenet-a"
    for label in range(200):
        folder = root / f"n{label:08d}"
        folder.mkdir(parents=True)
        photo(folder / "a.png", label)
    return root


def test_imagenet_a_looks_at_its_200_classes_alone(imagenet_a):
    model = tiny(1000, img_size=32)
    data = load_data(f"imagenet-a:{imagenet_a}", "test")
    found = evaluate_model(model, data, protocols=("imagenet-a",), progress=False)
    hits = 0
    transform = eval_transform(model.preprocessing)
    for label in range(200):
        image = Image.open(imagenet_a / f"n{label:08d}" / "a.png")
        with torch.no_grad():
            scores = model(transform(image)[None])[0]
        hits += int(scores[list(IMAGENET_A)].argmax()) == label
    assert found.metrics()["imagenet_a"] == pytest.approx(100 * hits / 200)
    assert "top1" not in found.metrics()
    with pytest.raises(InputError, match="1000 classes"):
        evaluate_model(tiny(4), data, protocols=("imagenet-a",))
    with pytest.raises(InputError, match="class 6 of the model"):
        evaluate_model(tiny(1000, labels=[f"c{i}" for i in range(1000)]), data, protocols=("imagenet-a",))


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    """A thousand photos as one corruption at one severity."""
    root = tmp_path_factory.mktemp("c")
    place = root / "noise" / "gaussian_noise" / "1"
    place.mkdir(parents=True)
    photo(root / "a.png", 0)
    for i in range(1000):
        (place / f"n{i:08d}").mkdir()
        os.link(root / "a.png", place / f"n{i:08d}" / "a.png")
    return root, load_data(f"imagenet-c:{root}@gaussian_noise/1", "test")


@pytest.fixture
def imagenet_c(corrupted, monkeypatch):
    """The root, and what is asked of it: whatever the corruption, three of the thousand photos."""
    root, data = corrupted
    asked = []

    def few(spec, *args, **options):
        asked.append(spec)
        return data.select([3, 500, len(asked) % 7])

    monkeypatch.setattr(evaluate, "load_data", few)
    return root, asked


def test_imagenet_c_is_resumed_and_only_by_the_same_model(imagenet_c, tmp_path, monkeypatch):
    root, asked = imagenet_c
    model = tiny(1000, img_size=32)
    progress = tmp_path / "progress.json"
    parts = [f"imagenet-c:{root}@{c}/{s}" for c in ALEXNET_ERRORS for s in range(1, 6)]
    walk, walked = evaluate._walk, []

    def few_are_run(*args, **options):
        """The first parts for real; errors that differ for the rest."""
        walked.append(asked[-1])
        if len(walked) == 3:
            raise KeyboardInterrupt
        return walk(*args, **options) if len(walked) < 6 else {"rank": np.arange(len(walked)) % 9}

    monkeypatch.setattr(evaluate, "_walk", few_are_run)
    with pytest.raises(KeyboardInterrupt):
        evaluate_imagenet_c(model, root, progress_file=progress, progress=False)
    assert len(json.loads(progress.read_text())["errors"]) == 2
    found = evaluate_imagenet_c(model, root, progress_file=progress, progress=False)
    assert asked == parts[:3] + parts[2:]  # what was done is not done again
    table = np.array([found.table()[name] for name in ALEXNET_ERRORS])
    assert table.shape == (15, 5)
    by_hand = 100 * np.mean(table.mean(axis=1) / np.array(list(ALEXNET_ERRORS.values())))
    assert found.metrics()["mce"] == pytest.approx(by_hand)
    assert found.rows()[0]["CE"] == pytest.approx(100 * table[0].mean() / 0.886428)
    with torch.no_grad():
        model.head.bias.add_(1)
    with pytest.raises(InputError, match="another weights"):
        evaluate_imagenet_c(model, root, progress_file=progress, progress=False)


def test_imagenet_c_sees_photos_as_they_are(imagenet_c, monkeypatch):
    root, _ = imagenet_c
    seen = []
    monkeypatch.setattr(
        evaluate,
        "_walk",
        lambda data, preprocessing, *_, **__: seen.append(preprocessing) or {"rank": np.zeros(1)},
    )
    pre = Preprocessing(size=(32, 32), resize=40, crop="center").to_dict()
    found = evaluate_imagenet_c(tiny(1000, img_size=32, preprocessing=pre), root, progress=False)
    assert found.metrics()["mce"] == 0
    assert seen[0].seen_rectangle(32, 32) == (0, 0, 32, 32)
    with pytest.raises(InputError, match="1000 classes"):
        evaluate_imagenet_c(tiny(4), root)


def test_alexnet_has_100():
    errors = {f"{name}/{s}": error for name, error in ALEXNET_ERRORS.items() for s in range(1, 6)}
    assert CorruptionEvaluation(data="c", errors=errors).metrics()["mce"] == pytest.approx(100)


# --- Models by name --------------------------------------------------------------------------------------------------


def test_a_timm_model_is_what_timm_computes(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    model = open_model("timm:vit_tiny_patch16_224", weights=tmp_path / "weights.safetensors")
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model(images), net(images))
    assert model.num_classes == 7
    assert all(model.switches.values())
    pre = model.preprocessing
    assert (pre.crop, pre.resize, pre.mean) == ("center", 248, (0.5, 0.5, 0.5))
    small = open_model("timm:vit_tiny_patch16_224", weights=tmp_path / "weights.safetensors", image_size=64)
    assert small.grid == (4, 4)


def test_a_saved_model_at_another_size(tmp_path):
    tiny().save_pretrained(tmp_path / "run" / "model")
    assert open_model(str(tmp_path / "run")).grid == (4, 6)
    assert open_model(str(tmp_path / "run"), image_size=64).grid == (8, 8)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm:vit_tiny_patch16_224", {}, ["no weights", "--pretrained", "--weights FILE"]),
        ("timm:vit_tiny_patch16_224", {"pretrained": True, "weights": "a"}, ["not both"]),
        ("timm:vit_tinny_patch16_224", {"weights": "none.safetensors"}, ["none.safetensors"]),
        (
            "timm:vit_tinny_patch16_224",
            {"pretrained": True},
            ["vit_tinny_patch16_224", "vit_tiny_patch16_224"],
        ),
        ("no/such/model", {}, ["no/such/model"]),
        ("no/such/model", {"pretrained": True}, ["timm:NAME"]),
    ],
)
def test_models_that_are_not_there(name, options, words):
    with pytest.raises(InputError) as caught:
        open_model(name, **options)
    for word in words:
        assert word in str(caught.value)


# --- The verb --------------------------------------------------------------------------------------------------------


def test_command_writes_numbers_and_a_report(tmp_path, capsys):
    data = load_data(DATA, "test")
    tiny(labels=data.labels).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "model"), "--data", DATA, "--device", "cpu", "--out", str(out)]
    evaluate_command(arguments)
    shown = capsys.readouterr().out
    assert "Top-1" in shown
    assert "14 images" in shown
    found = json.loads((out / "metrics.json").read_text())
    model = open_model(str(tmp_path / "model"))
    assert found["metrics"] == pytest.approx(evaluate_model(model, data, progress=False).metrics())
    report = (out / "report.html").read_text()
    assert "Best cases" in report
    assert "Heads of the last block" in report
    with pytest.raises(InputError, match="--overwrite"):
        evaluate_command(arguments)


def test_command_runs_all_of_imagenet_c(imagenet_c, tmp_path, capsys, monkeypatch):
    root, asked = imagenet_c
    monkeypatch.setattr(evaluate, "_walk", lambda *_, **__: {"rank": np.arange(len(asked))})
    tiny(1000, img_size=32).save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--data", f"imagenet-c:{root}", "--out", str(tmp_path / "out")]
    evaluate_command([*arguments, "--device", "cpu"])
    assert "mCE" in capsys.readouterr().out
    before = len(asked)
    evaluate_command([*arguments, "--device", "cpu", "--resume"])
    assert len(asked) == before
    assert "mCE" in (tmp_path / "out" / "report.html").read_text()
    assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())["errors"]) == 15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "no/such/data"], ["no/such/data"]),
        (["--protocols", "voc-jaccard"], ["voc-segmentation:PATH"]),
        (["--protocols", "imagenet-a"], ["1000 classes"]),
        (["--protocols", "other"], ["other"]),
        (["--jaccard-mass", "0"], ["jaccard_mass 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--resume"], ["--resume"]),
        (["--data", "imagenet-c:no/such", "--split", "val"], ["imagenet-c", "--split"]),
        (["--data-options.split-fle", "a.json"], ["split_fle", "split_file"]),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError) as caught:
        evaluate_command([str(tmp_path / "model"), "--data", DATA, "--device", "cpu", *arguments])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite():
    model = tiny()
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        evaluate_model(model, load_data(DATA, "test"), progress=False)


# --- Several processes, real weights ---------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from attnmap_core.data.sources import load_data
from attnmap_core.training import start_processes
from sar_vit.evaluate import evaluate_model, open_model

accelerator = start_processes()
found = evaluate_model(open_model(sys.argv[1]), load_data(sys.argv[2], "test"), accelerator=accelerator, batch_size=4)
with open(f"{sys.argv[3]}/{accelerator.process_index}-of-{accelerator.num_processes}.json", "w") as file:
    json.dump(found.to_json(), file)
accelerator.destroy_process_group()  # a process group that is still open may abort the exit
"""


@pytest.mark.multiprocess
def test_two_processes_measure_what_one_does(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
    ]
    command += [str(tmp_path / "script.py"), str(tmp_path / "model"), DATA, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{process}-of-2.json").read_text()) for process in (0, 1)]
    assert found[0] == found[1]
    one = evaluate_model(model, load_data(DATA, "test"), batch_size=4, progress=False)
    assert found[0]["metrics"] == pytest.approx(one.metrics(), rel=1e-6)
    assert (found[0]["images"], found[0]["images_with_objects"]) == (14, 14)
    for theirs, ours in zip(found[0]["heads"], one.heads(), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6)


@pytest.mark.real
@pytest.mark.skipif(not WEIGHTS.is_file() or not ANIMALS.is_dir(), reason=f"no weights or photos in {SHARED}")
def test_real_weights_on_real_photos():
    model = open_model("timm:vit_tiny_patch16_224", weights=WEIGHTS)
    data = load_data(f"caltech101:{ANIMALS}", "test", test_fraction=0.1)
    data = data.select(range(0, len(data), 4))
    found = evaluate_model(model, data, progress=False)
    assert 0.3 < found.metrics()["spatial_entropy"] < 1  # 0.571 on all 69 photos
    assert 10 < found.metrics()["jaccard"] < 30  # 17.0
