"""``inspect``: numbers of every layer and head against a reference, pictures, and photos and models that do not fit."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from attnmap_core.data.images import load_image
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from PIL import Image
from sar_vit import SARViT
from sar_vit.inspection import COLUMNS, LayerReader, inspect_command, map_statistics
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
WEIGHTS = SHARED / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k" / "model.safetensors"
PHOTO = SHARED / "data" / "caltech101_animals" / "images" / "kangaroo" / "image_0010.jpg"

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def tiny(**options) -> SARViT:
    torch.manual_seed(0)
    model = SARViT("vit", **{"num_classes": 4, "img_size": (32, 48), "backbone_options": TINY} | options)
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.attn.qkv.weight.mul_(30)
    return model.eval()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(60, 40), (30, 90), (50, 50), (64, 32), (20, 20)]):
        coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        coarse.resize((width, height)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def saved(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def maps_by_hand(model: SARViT, images: torch.Tensor, query: str = "cls") -> tuple[np.ndarray, np.ndarray]:
    """S and softmax ``(b, layers, heads, h, w)``, from the input of each attention."""
    seen: list[torch.Tensor] = []
    handles = [
        block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for block in model.backbone.blocks
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    S, attention = [], []
    for x, block in zip(seen, model.backbone.blocks):
        b, n, c = x.shape
        q, k, _ = block.attn.qkv(x).reshape(b, n, 3, 3, c // 3).permute(2, 0, 3, 1, 4)
        q = q[:, :, :1] if query == "cls" else q[:, :, 1:].mean(2, keepdim=True)
        logits = (q @ k.mT * (c // 3) ** -0.5)[:, :, 0]
        S.append(logits[..., 1:].reshape(b, 3, 4, 6))
        attention.append(logits.softmax(-1)[..., 1:].reshape(b, 3, 4, 6))
    return torch.stack(S, 1).detach().numpy(), torch.stack(attention, 1).detach().numpy()


def statistics_by_hand(S: np.ndarray) -> dict[str, float]:
    mask = S.mean() < S
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    B = np.maximum(S - S.mean(), 0)
    shares = ndimage.sum(B, labels, range(1, count + 1)) / B.sum()
    return {
        "spatial_entropy": float(-(shares * np.log(shares)).sum()),
        "components": count,
        "component_size": float(mask.sum() / count),
        "largest_share": float(100 * shares.max()),
        "foreground": float(100 * mask.mean()),
    }


@pytest.mark.parametrize("query", ["cls", "avg"])
def test_maps_of_every_layer(query):
    model, images = tiny(query=query), torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    reader = LayerReader(model)
    found = reader(images)
    S, attention = maps_by_hand(model, images, query)
    np.testing.assert_allclose(found.similarity, S, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.attention, attention, atol=1e-5)
    assert (reader.layers, reader.note) == ([1, 2, 3], "")
    assert not any(
        module._forward_pre_hooks for block in model.backbone.blocks[:2] for module in block.modules()
    )


def test_statistics_of_maps():
    S = np.random.default_rng(0).normal(size=(40, 7, 7))
    found = map_statistics(torch.tensor(S))
    for i, one in enumerate(S):
        for name, value in statistics_by_hand(one).items():
            assert found[name][i] == pytest.approx(value, abs=1e-6), name
    assert {
        name: float(values) for name, values in map_statistics(torch.ones(3, 3)).items()
    } == dict.fromkeys(COLUMNS, 0.0)


@pytest.mark.parametrize(
    ("backbone", "options", "layers", "note"),
    [
        (
            "pvt_small",
            {"embed_dims": (4, 6, 8, 12), "depths": (1, 2, 1, 2), "num_heads": (1, 2, 2, 3)},
            [5, 6],
            "1, 2, 3, 4",
        ),
        (
            "cvt_13",
            {"embed_dims": (4, 6, 12), "depths": (1, 1, 3), "num_heads": (1, 2, 3)},
            [3, 4, 5],
            "1, 2 are",
        ),
        ("t2t_vit_14", {"embed_dim": 12, "depth": 3, "num_heads": 3, "token_dim": 4}, [1, 2, 3], ""),
    ],
)
def test_architectures_of_stages_are_read_where_the_grid_is_the_last_ones(backbone, options, layers, note):
    model = tiny_other(backbone, options)
    reader = LayerReader(model)
    images = torch.randn(1, 3, 64, 64)
    found = reader(images)
    assert reader.layers == layers
    assert note in reader.note
    with torch.no_grad(), model.collector.recording() as record:
        model(images)
    torch.testing.assert_close(found.similarity[:, -1], model.collector.maps(record))
    torch.testing.assert_close(found.attention[:, -1], model.collector.maps(record, "softmax"))


def tiny_other(backbone: str, options: dict) -> SARViT:
    torch.manual_seed(0)
    return SARViT(backbone, num_classes=2, img_size=64, backbone_options=options).eval()


def test_swin_is_read_in_its_last_block_alone():
    model = SARViT("swin_tiny_patch4_window7_224", num_classes=2, img_size=64, query="avg", backbone_options={
        "embed_dim": 12, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 3), "window_size": 2,
    }).eval()  # fmt: skip
    reader = LayerReader(model)
    assert reader.layers == [5]
    assert "Only the last block" in reader.note
    assert reader(torch.randn(1, 3, 64, 64)).similarity.shape == (1, 1, 3, 2, 2)


# --- The verb --------------------------------------------------------------------------------------------------------


def test_command_measures_every_photo_layer_and_head(photos, saved, tmp_path, capsys):
    out = tmp_path / "out"
    inspect_command(
        [
            str(saved),
            str(photos),
            "--out",
            str(out),
            "--batch-size",
            "2",
            "--pictures",
            "2",
            "--device",
            "cpu",
        ]
    )
    model = SARViT.from_pretrained(saved)
    transform = eval_transform(model.preprocessing)
    rows = list(csv.DictReader((out / "heads.csv").open()))
    assert len(rows) == 5 * 3 * 3
    sums = {name: np.zeros((3, 3)) for name in COLUMNS}
    for row in rows:
        S, _ = maps_by_hand(model, transform(load_image(row["photo"]))[None])
        layer, head = int(row["layer"]) - 1, int(row["head"]) - 1
        for name, value in statistics_by_hand(S[0, layer, head]).items():
            assert float(row[name]) == pytest.approx(value, abs=1e-3), (row["photo"], layer, head, name)
            sums[name][layer, head] += value
    found = json.loads((out / "layers.json").read_text())
    for name, total in sums.items():
        np.testing.assert_allclose(found["mean"][name], total / 5, atol=1e-3)
    assert (found["photos"], found["layers"], found["grid"]) == (5, [1, 2, 3], "4x6")
    assert len(list((out / "pictures").iterdir())) == 2
    report = (out / "report.html").read_text()
    assert "From similarity to components" in report
    assert "3 more are not shown" in report
    assert (out / "mosaic.jpg").stat().st_size > 1000
    assert b"layer" in (out / "entropy.svg").read_bytes()
    assert "Entropy" in capsys.readouterr().out


def test_maps_are_of_the_whole_photo(photos, tmp_path):
    from attnmap_core.data.transforms import Preprocessing

    cropped = Preprocessing(size=(32, 48), resize=(64, 96), crop="center")
    for name, options in (("whole", {}), ("crop", {"preprocessing": cropped.to_dict()})):
        tiny(
            **options
            | {"preprocessing": options.get("preprocessing", Preprocessing(size=(32, 48)).to_dict())}
        ).save_pretrained(tmp_path / name)
        inspect_command(
            [str(tmp_path / name), str(photos), "--out", str(tmp_path / f"out-{name}"), "--pictures", "0"]
        )
    assert (tmp_path / "out-whole" / "heads.csv").read_text() == (
        tmp_path / "out-crop" / "heads.csv"
    ).read_text()
    assert not (tmp_path / "out-whole" / "pictures").exists()


def test_unreadable_photos_are_listed_or_refused(photos, saved, tmp_path):
    (photos / "4.png").write_bytes(b"")  # the last: its batch is still run
    arguments = [str(saved), str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(InputError, match=r"4\.png.*--skip-unreadable"):
        inspect_command(arguments)
    assert not (tmp_path / "out").exists()
    inspect_command([*arguments, "--skip-unreadable"])
    assert json.loads((tmp_path / "out" / "layers.json").read_text())["photos"] == 4
    assert "4.png" in (tmp_path / "out" / "report.html").read_text()
    for path in photos.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 5 photos"):
        inspect_command([*arguments, "--skip-unreadable", "--overwrite"])
    assert (tmp_path / "out" / "layers.json").is_file()  # of before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--mass", "1.5"], ["--mass 1.5"]),
        (["--image-size", "30"], ["30x30"]),
        (["--layer", "3"], ["--layer"]),
        (["--pretrained"], ["timm:NAME"]),
    ],
)
def test_wrong_arguments(arguments, words, photos, saved, tmp_path):
    with pytest.raises(InputError) as caught:
        inspect_command(
            [str(saved), str(photos), "--out", str(tmp_path / "out"), "--device", "cpu", *arguments]
        )
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_and_folders_that_do_not_fit(photos, saved, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no transformer block"):
        inspect_command(
            ["timm:resnet18", str(photos), "--out", str(out), "--weights", str(saved / "model.safetensors")]
        )
    with pytest.raises(InputError, match="no/such/photo"):
        inspect_command([str(saved), "no/such/photo", "--out", str(out)])
    with pytest.raises(InputError, match="holds photos"):
        inspect_command([str(saved), str(photos), "--out", str(photos), "--overwrite"])
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        inspect_command([str(saved), str(photos), "--out", str(out)])
    assert (out / "precious.txt").read_text() == "mine"


def test_weights_that_are_not_finite(photos, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="not finite"):
        inspect_command([str(tmp_path / "model"), str(photos), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.skipif(not WEIGHTS.is_file() or not PHOTO.is_file(), reason=f"no weights or photos in {SHARED}")
def test_real_weights_on_a_real_photo(tmp_path):
    out = tmp_path / "out"
    inspect_command(["timm:vit_tiny_patch16_224", str(PHOTO), "--weights", str(WEIGHTS), "--out", str(out)])
    found = json.loads((out / "layers.json").read_text())
    entropies = np.array(found["mean"]["spatial_entropy"])
    assert entropies.shape == (12, 3)
    assert ((entropies > 0) & (entropies < np.log(49))).all()
    assert found["last block"] == "msa_skip=True mlp_norm=True mlp_skip=True"
