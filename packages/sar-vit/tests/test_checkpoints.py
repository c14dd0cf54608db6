"""Weights of another form of the last block, or of other heads, do not slip in."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from attnmap_core.errors import InputError
from safetensors.torch import save_file
from sar_vit import SARViT
from sar_vit.architectures import create_architecture
from sar_vit.checkpoints import load_weights

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
PLAIN = {"msa_skip": True, "mlp_norm": True, "mlp_skip": True}


def tiny(seed: int = 1, **options) -> SARViT:
    torch.manual_seed(seed)
    heads = options.pop("num_heads", 3)
    settings = {"num_classes": 3, "img_size": 32, "backbone_options": TINY | {"num_heads": heads}}
    return SARViT("vit", **settings | options)


def same(a: SARViT, b: SARViT, but: str = "no such") -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[k]) for k, tensor in a.state_dict().items() if but not in k)


def test_a_model_folder_or_its_file(tmp_path):
    source = tiny(0)
    source.save_pretrained(tmp_path)
    assert same(tiny(weights=str(tmp_path)), source)
    assert same(tiny(weights=str(tmp_path / "model.safetensors")), source)


def test_new_classes_and_another_size(tmp_path):
    source = tiny(0)
    source.save_pretrained(tmp_path)
    finer = tiny(num_classes=5, img_size=64, weights=str(tmp_path))
    ours, theirs = (model.backbone.model.blocks[0].attn.qkv.weight for model in (finer, source))
    assert torch.equal(ours, theirs)
    assert finer.head.out_features == 5
    fresh = tiny(weights=str(tmp_path), reset_head=True)
    assert same(fresh, source, but="head.")
    assert not torch.equal(fresh.head.weight, source.head.weight)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            {},
            PLAIN,
            "a last block with msa_skip=False mlp_norm=False, but this model has msa_skip=True mlp_norm=True",
        ),
        (PLAIN, {}, "with msa_skip=True mlp_norm=True, but this model has msa_skip=False mlp_norm=False"),
        ({"mlp_skip": False}, {}, "with mlp_skip=False, but this model has mlp_skip=True"),
        (PLAIN, PLAIN | {"msa_skip": False}, "with msa_skip=True, but"),
    ],
)
def test_another_form_is_refused_unless_allowed(tmp_path, theirs, ours, message):
    source = tiny(0, **theirs)
    source.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message + ".* or pass new_surgery=True") as error:
        tiny(weights=str(tmp_path), **ours)
    assert "\n" not in str(error.value)
    loaded = tiny(weights=str(tmp_path), new_surgery=True, **ours)
    assert same(loaded, source, but="blocks.1.norm2") or same(source, loaded, but="blocks.1.norm2")


def test_only_the_second_norm_of_the_last_block_may_differ(tmp_path):
    source = tiny(0, **PLAIN)
    source.save_pretrained(tmp_path)
    state = {k: t.clone() for k, t in source.state_dict().items() if "blocks.0.norm2" not in k}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"missing: backbone\.model\.blocks\.0\.norm2"):
        tiny(weights=str(tmp_path), new_surgery=True)


def test_timm_names(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **TINY)
    path = tmp_path / "timm.safetensors"
    save_file(net.state_dict(), path)
    loaded = tiny(weights=str(path), **PLAIN)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.eval()(images), net.eval()(images))
    with pytest.raises(InputError, match="weights of a last block with msa_skip=True mlp_norm=True"):
        tiny(weights=str(path))
    assert same(tiny(weights=str(path), new_surgery=True), loaded)


def test_names_of_the_architectures(tmp_path):
    sizes = {"embed_dims": (4, 6, 8, 12), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 3)}
    net = create_architecture("pvt_small", num_classes=3, img_size=64, **sizes)
    path = tmp_path / "pvt.pth"
    torch.save({"model": net.state_dict()}, path)
    loaded = SARViT("pvt_small", 3, 64, weights=str(path), backbone_options=sizes, **PLAIN)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(images), net.eval()(images))
    larger = SARViT("pvt_small", 3, 96, weights=str(path), backbone_options=sizes, new_surgery=True)
    assert larger.grid == (3, 3)


def moco(path: Path, arch: str | None, **more) -> str:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY)
    state = {
        f"module.{branch}_encoder.{k}": t
        for branch in ("base", "momentum")
        for k, t in net.state_dict().items()
    }
    for name in list(state):
        if "momentum" in name:
            state[name] = state[name] + 1
    state |= {
        "module.base_encoder.head.0.weight": torch.zeros(4, 24),
        "module.predictor.0.weight": torch.zeros(2),
    }
    torch.save({"state_dict": state, "arch": arch, **more} if arch else {"state_dict": state, **more}, path)
    return str(path)


def test_moco_of_other_heads_is_refused(tmp_path):
    path = moco(tmp_path / "moco.pth.tar", "vit_small")
    for new_surgery in (False, True):
        with pytest.raises(
            InputError, match=r"weights of 12 heads, but the last block of this model has 3; .* wrong maps"
        ):
            tiny(weights=path, new_surgery=new_surgery, **PLAIN)
    loaded = tiny(weights=path, num_heads=12, **PLAIN)
    other = tiny(num_heads=12, **PLAIN)
    load_weights(other, path, branch="momentum")
    weight = loaded.backbone.model.patch_embed.proj.weight
    torch.testing.assert_close(other.backbone.model.patch_embed.proj.weight, weight + 1)
    with pytest.raises(InputError, match="expected base or momentum"):
        load_weights(other, path, branch="teacher")


def test_moco_that_tells_its_heads(tmp_path):
    facts = {"msa_skip": True, "mlp_norm": True, "mlp_skip": True, "heads": 3}
    path = moco(tmp_path / "own.pth", None, sar=facts)
    tiny(weights=path, **PLAIN)
    with pytest.raises(InputError, match="weights of 3 heads, but the last block of this model has 6"):
        tiny(weights=path, num_heads=6, **PLAIN)
    with pytest.raises(InputError, match="pass new_surgery=True"):
        tiny(weights=path)
    with pytest.raises(InputError, match="does not tell its architecture"):
        tiny(weights=moco(tmp_path / "silent.pth", None), **PLAIN)


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "numbers.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, message in (
        ("text.pth", "damaged, or more than weights"),
        ("numbers.pth", "holds no state dict"),
        ("other.safetensors", "not the weights of this vit .missing"),
        ("absent.pth", "no such weights file"),
    ):
        with pytest.raises(InputError, match=message) as error:
            tiny(weights=str(tmp_path / name), **PLAIN)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
