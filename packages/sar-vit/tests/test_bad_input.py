"""Wrong input ends in one line that names it, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sar_vit import SARViT, apply_sar, spatial_entropy, spatial_entropy_loss
from sar_vit.cli import main
from sar_vit.task import SupervisedTask

SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
SMALL = ["--image-size", "32", "--epochs", "1", "--batch-size", "4", "--warmup-epochs", "0", "--workers", "0"]
SMALL += ["--select-on", "last", "--backbone-options.patch-size", "8", "--backbone-options.embed-dim", "12"]
SMALL += ["--backbone-options.depth", "1", "--backbone-options.num-heads", "2"]
DATA = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=8,val=4,test=4"
PLAIN = {"msa_skip": True, "mlp_norm": True}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of six small photos."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.jpg")
    return tmp_path / "photos"


def saved(folder: Path, num_classes: int = 2, **options: Any) -> Path:
    torch.manual_seed(0)
    labels = ["cat", "dog"] if num_classes == 2 else None
    model = SARViT("vit", num_classes, 32, labels=labels, **{"backbone_options": SIZES} | options)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return saved(tmp_path / "model")


def refused(capsys, arguments, *words) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    for word in words:
        assert str(word) in lines[0], lines[0]
    return lines[0]


def train(data, out, *more) -> list[Any]:
    return ["train", "tiny-sar", "--data", data, *SMALL, "--output-dir", out, *more]


def done(arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_good_photos_do_train(photos, tmp_path):
    done(train(photos, tmp_path / "run"))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# --- What every verb refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["which recipe", "tiny-sar"]),
        (["train", "tiny-sarr"], ["tiny-sarr", "tiny-sar"]),
        (["train", "tiny-sar", "--epoch", "3"], ["--epoch", "--epochs"]),
        (["train", "tiny-sar", "--epochs", "many"], ["epochs", "many"]),
        (["train", "tiny-sar", "--epochs", "0"], ["epochs 0", "at least 1"]),
        (["train", "tiny-sar", "--data", "no/such/folder"], ["no/such/folder"]),
        (["train", "tiny-sar", "--data", "synthetic:clases=3"], ["clases"]),
        (["train", "tiny-sar", "--data-options.split-fle", "a.json"], ["split_fle", "split_file"]),
        (["train", "tiny-sar", "--entropy-weight", "-1"], ["entropy_weight -1", "0 or more"]),
        (["train", "tiny-sar", "--test-crop", "1.5"], ["test_crop 1.5"]),
        (["train", "tiny-sar", "--label-smoothing", "1"], ["label_smoothing 1"]),
        (["train", "tiny-sar", "--similarity", "l2"], ["l2", "cosine"]),
        (["train", "tiny-sar", "--image-size", "60"], ["60"]),
        (["train", "tiny-sar", "--augmentation", "deit", "--rand-augment", "rnd-m9"], ["rnd-m9"]),
        (["train", "tiny-sar", "--augmentation", "deit", "--rand-augment", "rand-q9"], ["rand-q9"]),
        (["train", "tiny-sar", "--imagenet100"], ["classes"]),
        (["train", "tiny-sar", "--start", "no/such/model"], ["no/such/model"]),
        (["train", "tiny-sar", "--weights", "no/such.safetensors"], ["no/such.safetensors"]),
        (["train", "tiny-sar", "--start", "a", "--weights", "b"], ["start a", "weights"]),
        (["train", "tiny-probe", "--start", "no/such/run"], ["no/such/run"]),
        (["evaluate", "no/such/model"], ["no/such/model"]),
        (["evaluate"], ["Model folder"]),
        (["predict", "no/such/photos", "--model", "no/such/model", "--out", "out"], ["no/such/model"]),
        (["inspect", "no/such/model", "no/such/photos", "--out", "out"], ["no/such/photos"]),
        (["push", "no/such/run", "owner/name"], ["no/such/run"]),
        (["demo", "no/such/model"], ["no/such/model"]),
        (["reproduce"], ["table1b"]),
        (["reproduce", "table-9"], ["table-9"]),
        (["list", "recipes"], ["recipes"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_wrong_arguments(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, arguments, *words)
    assert not list(tmp_path.iterdir())


def test_wrong_recipe_files(capsys, tmp_path):
    (tmp_path / "field.toml").write_text("# mine\nepocs = 3\n")
    refused(capsys, ["train", tmp_path / "field.toml"], "field.toml", "epocs", "epochs")
    (tmp_path / "type.toml").write_text('epochs = "three"\n')
    refused(capsys, ["train", tmp_path / "type.toml"], "type.toml", "epochs", "three")
    (tmp_path / "broken.toml").write_text("epochs = = 3\n")
    refused(capsys, ["train", tmp_path / "broken.toml"], "broken.toml")


# --- Models that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ("deit_smal_patch16_224", ["deit_smal_patch16_224", "deit_small_patch16_224"]),
        ("t2t_vit_13", ["t2t_vit_13"]),
        ("resnet18", ["resnet18", "no transformer block"]),
        ("pvt_v2_b0", ["pvt_v2_b0", "no class token", "query='avg'"]),
    ],
)
def test_backbones_without_attention_or_class_token(backbone, words, capsys, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'data = "{DATA}"\nbackbone = "{backbone}"\nimage_size = 32\nworkers = 0\n')
    refused(capsys, ["train", recipe, "--output-dir", tmp_path / "run"], *words)
    assert not (tmp_path / "run").exists()


def test_average_query_needs_no_class_token(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'data = "{DATA}"\nbackbone = "pvt_v2_b0"\nimage_size = 32\nworkers = 0\nepochs = 1\n')
    done(["train", recipe, "--query", "avg", "--select-on", "last", "--output-dir", tmp_path / "run"])


def moco(path: Path, arch: str) -> Path:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **SIZES)
    state = {f"module.base_encoder.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": state, "arch": arch}, path)
    return path


def test_moco_checkpoint_of_other_heads(capsys, tmp_path):
    weights = ["--weights", moco(tmp_path / "moco.pth.tar", "vit_small"), "--msa-skip", "--mlp-norm"]
    refused(
        capsys, train(DATA, tmp_path / "run", *weights), "moco.pth.tar", "12 heads", "has 2", "wrong maps"
    )
    assert not (tmp_path / "run").exists()
    refused(
        capsys,
        train(DATA, tmp_path / "run", "--weights", moco(tmp_path / "who.pth", "vit_mine")),
        "who.pth",
        "vit_mine",
    )


def test_weights_of_another_last_block(capsys, tmp_path):
    plain = saved(tmp_path / "plain", **PLAIN)
    line = refused(
        capsys,
        train(DATA, tmp_path / "run", "--weights", plain),
        "plain",
        "msa_skip=True mlp_norm=True",
        "msa_skip=False mlp_norm=False",
    )
    assert "new_surgery" in line
    assert not (tmp_path / "run").exists()
    done(train(DATA, tmp_path / "run", "--weights", plain, "--new-surgery"))


def test_config_that_tells_another_last_block_than_the_weights(capsys, tmp_path, model, photos):
    config = json.loads((model / "config.json").read_text())
    config["model"] |= {"mlp_norm": True}
    (model / "config.json").write_text(json.dumps(config))
    refused(capsys, ["evaluate", model, "--data", DATA, "--device", "cpu"], "norm2")
    config["model"] |= {"mlp_norm": False, "heads": 12}
    (model / "config.json").write_text(json.dumps(config))
    refused(capsys, ["evaluate", model, "--data", DATA, "--device", "cpu"], "heads 12", "has 2")
    config["model"] |= {"heads": 2, "num_classes": 3}
    (model / "config.json").write_text(json.dumps(config))
    predict = ["predict", photos, "--model", model, "--out", tmp_path / "out"]
    refused(capsys, predict)
    (model / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, model / "pytorch_model.bin")
    refused(capsys, predict, "pytorch_model.bin", "pickle")
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_not_measured(capsys, tmp_path, photos):
    damaged = SARViT("vit", 2, 32, labels=["cat", "dog"], backbone_options=SIZES)
    with torch.no_grad():
        damaged.collector.block.attn.qkv.weight[0, 0] = float("nan")
    damaged.save_pretrained(tmp_path / "damaged")
    out = ["--out", tmp_path / "out", "--device", "cpu"]
    split = ["--data", photos, "--split", "all"]
    refused(capsys, ["evaluate", tmp_path / "damaged", *split, "--device", "cpu"], "not finite")
    refused(capsys, ["inspect", tmp_path / "damaged", photos, *out], "not finite")
    assert not (tmp_path / "out").exists()


# --- Tensors ------------------------------------------------------------------------------------------------


def test_empty_batches():
    model = SARViT("vit", 2, 32, backbone_options=SIZES).train()
    with pytest.raises(ValueError, match=r"\(0, 2, 4, 4\); leave empty batches out"):
        spatial_entropy(torch.zeros(0, 2, 4, 4))
    with pytest.raises(ValueError, match="leave empty batches out"):
        SupervisedTask()(
            model, {"images": torch.zeros(0, 3, 32, 32), "labels": torch.zeros(0, dtype=torch.long)}
        )


def test_tokens_that_make_no_grid():
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, patch_drop_rate=0.5, **SIZES)
    apply_sar(net).train()(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="8 patch keys, but images of 32x32 make a grid of 4x4"):
        spatial_entropy_loss(net)


def test_maps_that_are_not_finite():
    S = torch.randn(2, 2, 4, 4)
    S[0, 1, 2, 2] = float("inf")
    found = spatial_entropy(S)
    assert torch.isfinite(found).all()
    assert found[0, 1] == 0
    with pytest.raises(FloatingPointError, match=r"1 of 4 .* index \[0, 1\]"):
        spatial_entropy(S, nonfinite="raise")
    model = SARViT("vit", 2, 32, backbone_options=SIZES).train()
    batch = {"images": torch.full((2, 3, 32, 32), float("nan")), "labels": torch.tensor([0, 1])}
    assert SupervisedTask()(model, batch)["excluded"] == 4
    with pytest.raises(FloatingPointError, match="4 of 4"):
        SupervisedTask(nonfinite="raise")(model, batch)


@pytest.mark.parametrize("nonfinite", ["mask", "raise"])
def test_training_that_diverges(nonfinite, photos, capsys, tmp_path):
    more = ["--lr", "1e30", "--epochs", "3", "--nonfinite", nonfinite]
    line = refused(capsys, train(photos, tmp_path / "run", *more), "not finite")
    assert ("--lr" if nonfinite == "mask" else "similarity maps") in line
    assert not (tmp_path / "run" / "model").exists()


# --- Photos -------------------------------------------------------------------------------------------------


def test_empty_folder_and_folder_without_images(capsys, tmp_path, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    for name in ("empty", "texts"):
        folder = tmp_path / name
        refused(capsys, train(folder, tmp_path / "run"), name)
        refused(capsys, ["evaluate", model, "--data", folder, "--device", "cpu"], name)
        refused(capsys, ["inspect", model, folder, "--out", tmp_path / "out", "--device", "cpu"], name)
        refused(capsys, ["predict", folder, "--model", model, "--out", tmp_path / "out"], name)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["zero bytes", "truncated", "not an image"])
def test_unreadable_photos(kind, photos, capsys, tmp_path, model):
    bad = photos / "cat" / "3.jpg"
    content = {"zero bytes": b"", "truncated": bad.read_bytes()[:400], "not an image": b"hello" * 99}[kind]
    bad.write_bytes(content)
    refused(capsys, train(photos, tmp_path / "run"), "3.jpg", "--skip-unreadable")
    evaluate = ["evaluate", model, "--data", photos, "--split", "all", "--device", "cpu"]
    refused(capsys, evaluate, "3.jpg", "--skip-unreadable")
    done([*evaluate, "--skip-unreadable"])
    if kind == "truncated":
        done(train(photos, tmp_path / "run2", "--skip-unreadable"))


def test_box_outside_the_photo(photos, capsys, tmp_path):
    rows = [{"file_name": "cat/0.jpg", "objects": {"bbox": [[30, 10, 60, 10]]}}]
    rows += [{"file_name": f"{c}/{i}.jpg"} for c in ("cat", "dog") for i in range(6) if (c, i) != ("cat", 0)]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {
        "train": [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(4)],
        "test": ["cat/4.jpg", "dog/4.jpg"],
    }
    (tmp_path / "split.json").write_text(json.dumps(split))
    refused(
        capsys,
        train(photos, tmp_path / "run", "--data-options.split-file", tmp_path / "split.json"),
        "0.jpg",
    )


def test_class_without_training_images(photos, capsys, tmp_path):
    split = {"train": ["cat/0.jpg", "cat/1.jpg"], "test": ["dog/0.jpg", "cat/2.jpg"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    refused(
        capsys, train(photos, tmp_path / "run", "--data-options.split-file", tmp_path / "split.json"), "dog"
    )


def test_existing_output_folders(photos, capsys, tmp_path, model):
    for name in ("run", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    refused(capsys, train(photos, tmp_path / "run"), "run", "--resume", "--overwrite")
    for verb in (["predict", photos, "--model", model], ["inspect", model, photos]):
        refused(capsys, [*verb, "--out", tmp_path / "out"], "out", "--overwrite")
    evaluate = ["evaluate", model, "--data", photos, "--split", "all", "--device", "cpu"]
    refused(capsys, [*evaluate, "--out", tmp_path / "out"], "out", "--overwrite")
    for name in ("run", "out"):
        assert (tmp_path / name / "precious.txt").read_text() == "mine"


def test_full_disk_keeps_what_was_there(photos, capsys, tmp_path, model, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    out = ["--out", tmp_path / "out", "--device", "cpu"]
    refused(capsys, ["inspect", model, photos, *out], "space")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_model_of_other_classes_measures_no_accuracy(capsys, model, photos):
    shutil.move(photos / "dog", photos / "wolf")
    done(["evaluate", model, "--data", photos, "--split", "all", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "no accuracy: class 1 of" in printed
    assert "wolf" in printed
    assert "Top-1" not in printed


def test_resume_with_other_settings(photos, capsys, tmp_path):
    done(train(photos, tmp_path / "run"))
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    refused(
        capsys,
        train(photos, tmp_path / "run", "--resume", "--entropy-weight", "0.5"),
        "entropy_weight",
        "0.5",
    )
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
