"""SARViT: logits, maps and their agreement with the plain network."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
from attnmap_core.errors import InputError
from sar_vit import SARViT, spatial_entropy
from torch import nn

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
PLAIN = {"msa_skip": True, "mlp_norm": True, "mlp_skip": True}


def tiny(**options) -> SARViT:
    torch.manual_seed(0)
    return SARViT("vit", **{"num_classes": 3, "img_size": (32, 48), "backbone_options": TINY} | options)


def images(b: int = 2, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    return torch.randn(b, 3, *size, generator=torch.Generator().manual_seed(1))


def test_plain_form_is_timm_with_its_head():
    model = tiny(**PLAIN).eval()
    net = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=3, **TINY).eval()
    state = {name.removeprefix("backbone.model."): tensor for name, tensor in model.state_dict().items()}
    net.load_state_dict(state)
    torch.testing.assert_close(model(images()), net(images()))


def test_maps_are_the_attention_of_the_class_token():
    model = tiny().eval()
    block = model.collector.block
    seen: list[torch.Tensor] = []
    handle = block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits, maps = model.attention_maps(images())
    handle.remove()
    q, k, _ = block.attn.qkv(seen[0]).reshape(2, 25, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = (q @ k.mT * 8**-0.5).softmax(-1)[:, :, 0, 1:].reshape(2, 3, 4, 6)
    torch.testing.assert_close(maps, expected)
    found = model.localize(images())
    torch.testing.assert_close(found.logits, logits)
    mean = expected.mean(1)
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    torch.testing.assert_close(found.score_maps, (mean - low) / (high - low))


def test_spatial_entropy_of_the_last_forward():
    model = tiny().train()
    model(images())
    [S] = model.collector.take()
    model(images())
    torch.testing.assert_close(model.spatial_entropy(), spatial_entropy(S, reduction="mean"))
    with pytest.raises(RuntimeError, match="no forward pass"):
        model.spatial_entropy()


def test_a_constant_map_is_zero():
    model = tiny().eval()
    nn.init.zeros_(model.collector.block.attn.qkv.weight)
    nn.init.zeros_(model.collector.block.attn.qkv.bias)
    assert not model.localize(images()).score_maps.any()


@pytest.mark.parametrize(
    ("backbone", "options", "size", "grid", "heads"),
    [
        ("t2t_vit_7", {"embed_dim": 12, "depth": 2, "num_heads": 3, "token_dim": 4}, (64, 96), (4, 6), 3),
        ("cvt_13", {"embed_dims": (4, 6, 12), "depths": (1, 1, 2), "num_heads": (1, 2, 3)}, 64, (2, 2), 3),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 12, "depths": (1, 2), "num_heads": (1, 2)},
            56,
            (7, 7),
            2,
        ),
    ],
)
def test_other_backbones(backbone, options, size, grid, heads):
    query = "avg" if "swin" in backbone else "cls"
    model = SARViT(backbone, 5, size, query=query, backbone_options=options)
    assert (model.grid, model.heads) == (grid, heads)
    shape = (size, size) if isinstance(size, int) else size
    assert model(images(size=shape)).shape == (2, 5)
    assert model.spatial_entropy(reduction="none").shape == (2, heads)
    assert model.eval().localize(images(size=shape)).score_maps.shape == (2, *grid)


def test_config_tells_form_architecture_grid_and_heads(tmp_path):
    model = tiny(mlp_skip=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["model"]
    expected = {"msa_skip": False, "mlp_norm": False, "mlp_skip": False, "backbone": "vit", "heads": 3}
    assert expected.items() <= config.items()
    assert config["grid"] == [4, 6]
    again = SARViT.from_pretrained(tmp_path)
    assert (again.switches, again.heads, again.grid) == (model.switches, 3, (4, 6))
    config["backbone_options"]["num_heads"] = 6  # loads without any complaint of shapes
    (tmp_path / "config.json").write_text(json.dumps({"class": "SARViT", "model": config}))
    with pytest.raises(InputError, match="heads 3: the last block of vit has 6"):
        SARViT.from_pretrained(tmp_path)


def test_without_head_it_gives_features(tmp_path):
    model = tiny(num_classes=0).eval()
    assert not any(name.startswith("head") for name in model.state_dict())
    with torch.no_grad():
        features = model(images())
        torch.testing.assert_close(features, model.backbone(images()).prefix[:, 0])
        assert model.attention_maps(images())[1].shape == (2, 3, 4, 6)
        with pytest.raises(InputError, match="this SARViT has no head and names no class"):
            model.localize(images())
        model.save_pretrained(tmp_path)
        assert torch.equal(SARViT.from_pretrained(tmp_path)(images()), features)
        classifier = tiny(num_classes=5, weights=str(tmp_path)).eval()
        torch.testing.assert_close(classifier(images()), classifier.head(features))
        classifier.save_pretrained(tmp_path / "classifier")
        assert torch.equal(
            tiny(num_classes=0, weights=str(tmp_path / "classifier")).eval()(images()), features
        )
    assert model.train()(images()).requires_grad
    assert model.spatial_entropy() > 0


def test_head_on_several_blocks(tmp_path):
    model = tiny(head_blocks=2).train()
    assert model(images()).shape == (2, 3)
    assert (model.num_features, model.head.in_features) == (48, 48)
    [S] = model.collector.take()
    model.eval().save_pretrained(tmp_path)
    again = SARViT.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))
        last = model.backbone(images()).prefix[:, 0]
        torch.testing.assert_close(model.features(images())[:, 24:], last)
        assert again.attention_maps(images())[1].shape == S.shape == (2, 3, 4, 6)


def test_average_of_the_weights():
    model = tiny().train()
    average = copy.deepcopy(model)
    average(images())
    assert (len(model.collector), len(average.collector)) == (0, 1)


def test_no_weight_decay():
    exempt = tiny().no_weight_decay()
    assert {"backbone.model.cls_token", "backbone.model.pos_embed", "head.bias"} <= exempt
    assert "head.weight" not in exempt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet18", "backbone_options": {}}, "resnet18: ResNet has no transformer block"),
        ({"backbone": "pvt_v2_b0", "backbone_options": {}, "img_size": 64}, "use query='avg'"),
        ({"backbone": "pvt_smal", "backbone_options": {}}, "pvt_smal"),
        (
            {"backbone": "pvt_small", "backbone_options": {}, "pretrained": True} | PLAIN,
            "give weights= with a file",
        ),
        ({"pretrained": True}, "timm's weights are of a standard last block, this one has msa_skip=False"),
        ({"heads": 4}, "heads 4: the last block of vit has 3"),
        ({"grid": (5, 5)}, r"grid \(5, 5\): the last block of vit has \(4, 6\)"),
        ({"weights": "no/such.safetensors"}, "no/such.safetensors"),
        ({"num_classes": -1}, "num_classes must be 0 or more"),
        ({"head_blocks": 0}, "head_blocks 0: vit gives the class token of 2 blocks; choose 1 to 2"),
        ({"head_blocks": 3}, "head_blocks 3: vit gives"),
        ({"labels": ["a"]}, "1 labels do not fit num_classes 3"),
        ({"interpolation": "nearest"}, "interpolation must be"),
    ],
)
def test_wrong_settings(options, message):
    backbone = options.pop("backbone", "vit")
    settings = {"num_classes": 3, "img_size": (32, 48), "backbone_options": TINY} | options
    with pytest.raises(ValueError, match=message) as error:
        SARViT(backbone, **settings)
    assert "\n" not in str(error.value)


def test_import_takes_no_compiler_along():
    unwanted = ("numba", "triton", "scipy", "matplotlib", "timm", "cv2")
    code = f"import sar_vit, sys; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
