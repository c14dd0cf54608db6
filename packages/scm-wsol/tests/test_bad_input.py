"""Wrong input ends in one line that names it, exit code 2, and nothing half-written."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scm_wsol import TSCAM
from scm_wsol.cli import main

SMALL = ["--backbone", "vit", "--image-size", "32", "--resize", "32", "--epochs", "1", "--batch-size", "4"]
SMALL += ["--backbone-options.patch-size", "8", "--backbone-options.embed-dim", "12"]
SMALL += ["--backbone-options.depth", "1", "--backbone-options.num-heads", "2"]
SMALL += ["--threshold-step", "0.1", "--warmup-epochs", "0", "--workers", "0", "--select-on", "last"]


@pytest.fixture
def photos(tmp_path):
    """Two classes of six small photos."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path):
    tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    folder = tmp_path / "model"
    TSCAM("vit", num_classes=2, img_size=32, labels=["cat", "dog"], backbone_options=tiny).save_pretrained(
        folder
    )
    return folder


def refused(capsys, arguments, *words) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    for word in words:
        assert str(word) in lines[0], lines[0]
    return lines[0]


def train(photos, out, *more):
    return ["train", "tiny-tscam", "--data", photos, *SMALL, "--output-dir", out, *more]


def test_good_photos_do_train(photos, tmp_path):
    assert main([str(a) for a in train(photos, tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["which recipe"]),
        (["train", "tiny-scn"], ["tiny-scn", "tiny-scm"]),
        (["train", "tiny-scm", "--epoch", "3"], ["--epoch", "--epochs"]),
        (["train", "tiny-scm", "--epochs", "many"], ["epochs", "many"]),
        (["train", "tiny-scm", "--epochs", "0"], ["epochs 0", "at least 1"]),
        (["train", "tiny-scm", "--data", "no/such/folder"], ["no/such/folder"]),
        (["train", "tiny-scm", "--data", "synthetic:clases=3"], ["clases"]),
        (["train", "tiny-scm", "--data-options.split-fle", "a.json"], ["split_fle", "split_file"]),
        (["train", "tiny-scm", "--backbone", "deit_smal_patch16_224"], ["deit_smal_patch16_224"]),
        (["train", "tiny-scm", "--iterations", "4", "4"], ["iterations", "[4, 4]"]),
        (["train", "tiny-scm", "--image-size", "96"], ["resize 72"]),
        (["evaluate", "no/such/model"], ["no/such/model"]),
        (["predict", "no/such/photos", "--model", "no/such/model", "--out", "out"], ["no/such/model"]),
        (["reproduce", "table-9"], ["table-9"]),
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


def test_empty_folder_and_folder_without_images(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(capsys, train(tmp_path / "empty", tmp_path / "run"), "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    refused(capsys, train(tmp_path / "texts", tmp_path / "run"), "texts")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["zero bytes", "truncated", "not an image"])
def test_unreadable_photos(kind, photos, capsys, tmp_path, model):
    bad = photos / "cat" / "3.jpg"
    content = {"zero bytes": b"", "truncated": bad.read_bytes()[:400], "not an image": b"hello" * 99}[kind]
    bad.write_bytes(content)
    refused(capsys, train(photos, tmp_path / "run"), "3.jpg", "--skip-unreadable")
    predict = ["predict", photos, "--model", model, "--out", tmp_path / "out", "--device", "cpu"]
    refused(capsys, predict, "3.jpg", "--skip-unreadable")
    assert not (tmp_path / "out").exists()
    assert main([str(a) for a in [*predict, "--skip-unreadable"]]) == 0
    assert "3.jpg" in (tmp_path / "out" / "report.html").read_text()
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 11
    assert main([str(a) for a in train(photos, tmp_path / "run2", "--skip-unreadable")]) == 0


def test_unusual_photos_work(tmp_path, model):
    folder = tmp_path / "odd"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65535, (30, 40), dtype=np.uint16)).save(folder / "sixteen.png")
    rgb.convert("P").save(folder / "palette.png")
    exif = Image.Exif()
    exif[274] = 6
    rgb.save(folder / "rotated.jpg", exif=exif)
    Image.new("RGB", (1, 1), (200, 10, 10)).save(folder / "one.png")
    Image.new("RGB", (20000, 3), (10, 200, 10)).save(folder / "wide.png")
    out = tmp_path / "out"
    assert main(["predict", str(folder), "--model", str(model), "--out", str(out), "--device", "cpu"]) == 0
    sizes = {
        Path(p["source"]).name: (p["width"], p["height"])
        for p in json.loads((out / "predictions.json").read_text())
    }
    assert sizes["rotated.jpg"] == (30, 40)
    assert (sizes["one.png"], sizes["wide.png"]) == ((1, 1), (20000, 3))


def test_box_outside_the_photo(photos, capsys, tmp_path):
    rows = [{"file_name": "cat/0.jpg", "objects": {"bbox": [[30, 10, 60, 10]]}}]
    rows += [{"file_name": f"{c}/{i}.jpg"} for c in ("cat", "dog") for i in range(6) if (c, i) != ("cat", 0)]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {
        "train": [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(4)],
        "test": ["cat/4.jpg", "dog/4.jpg"],
    }
    (tmp_path / "split.json").write_text(json.dumps(split))
    line = ["--data-options.split-file", tmp_path / "split.json"]
    refused(capsys, train(photos, tmp_path / "run", *line), "0.jpg", "--clip-boxes")
    assert main([str(a) for a in train(photos, tmp_path / "run2", *line, "--clip-boxes")]) == 0


def test_annotation_for_a_file_that_is_not_there(photos, capsys, tmp_path):
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "cat/99.jpg"}) + "\n")
    refused(capsys, train(photos, tmp_path / "run"), "99.jpg")


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
    predict = ["predict", photos, "--model", model, "--out", tmp_path / "out"]
    refused(capsys, predict, "out", "--overwrite")
    for name in ("run", "out"):
        assert (tmp_path / name / "precious.txt").read_text() == "mine"


def test_full_disk_keeps_what_was_there(photos, capsys, tmp_path, model, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    refused(
        capsys, ["predict", photos, "--model", model, "--out", tmp_path / "out", "--device", "cpu"], "space"
    )
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_wrong_checkpoint_for_the_config(capsys, tmp_path, model, photos):
    config = json.loads((model / "config.json").read_text())
    config["model"]["num_classes"] = 3
    (model / "config.json").write_text(json.dumps(config))
    refused(capsys, ["predict", photos, "--model", model, "--out", tmp_path / "out"], "head.weight")
    (model / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, model / "pytorch_model.bin")
    refused(
        capsys,
        ["predict", photos, "--model", model, "--out", tmp_path / "out"],
        "pytorch_model.bin",
        "pickle",
    )


def test_model_of_other_classes(capsys, model, photos, tmp_path):
    shutil.move(photos / "dog", photos / "wolf")
    refused(capsys, ["evaluate", model, "--data", photos, "--split", "all"], "wolf", "dog")


def test_loss_that_is_not_finite(photos, capsys, tmp_path):
    line = refused(capsys, train(photos, tmp_path / "run", "--lr", "1e30", "--epochs", "3"), "not finite")
    assert "--lr" in line
    assert not (tmp_path / "run" / "model").exists()
