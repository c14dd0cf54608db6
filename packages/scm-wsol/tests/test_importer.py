"""Official checkpoints, made here in the form that the released code writes them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnmap_core.errors import InputError
from scm_wsol import SCM, TSCAM
from scm_wsol.importer import import_checkpoint, official_state_dict

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
VIT: dict[str, Any] = {"backbone": "vit", "backbone_options": TINY}


def trained(cls: type[TSCAM], **options: Any) -> TSCAM:
    torch.manual_seed(0)
    model = cls("vit", 4, 32, backbone_options=TINY, **options).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


def write(path: Path, model: TSCAM, **more: Any) -> Path:
    torch.save(
        {"epoch": 9, "state_dict": official_state_dict(model), "best_map": np.float64(0.69)} | more, path
    )
    return path


def test_names_are_those_of_the_released_code():
    names = set(official_state_dict(trained(SCM)))
    expected = {
        "module.cls_token",
        "module.pos_embed",
        "module.patch_embed.proj.weight",
        "module.blocks.1.attn.qkv.bias",
        "module.blocks.0.mlp.fc2.weight",
        "module.norm.bias",
        "module.head.weight",
        "module.head.bias",
        "module.layers.0.fuse._loss_rate",
        "module.layers.3.thred",
    }
    assert expected <= names
    assert not any("backbone" in name or "calibration" in name for name in names)
    assert official_state_dict(trained(SCM))["module.layers.0.thred"].shape == (1,)


@pytest.mark.parametrize("cls", [SCM, TSCAM])
def test_round_trip(cls, tmp_path):
    model = trained(cls)
    again = import_checkpoint(write(tmp_path / "best.pth", model), labels=list("abcd"), **VIT)
    assert type(again) is cls
    assert not again.training
    assert again.labels == list("abcd")
    state = again.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    for a, b in zip(model.localize(images), again.localize(images)):
        assert torch.equal(a, b)
    assert again.preprocessing.interpolation == "bilinear"


def test_scalars_go_to_their_blocks(tmp_path):
    model = trained(SCM, calibration_options={"blocks": 3})
    for i, block in enumerate(model.calibration.blocks):
        block.lam.data.fill_(1 + i / 10)
        block.beta.data.fill_(0.5 - i / 10)
    again = import_checkpoint(write(tmp_path / "best.pth", model), **VIT)
    assert [block.lam.item() for block in again.calibration.blocks] == pytest.approx([1.0, 1.1, 1.2])
    assert [block.beta.item() for block in again.calibration.blocks] == pytest.approx([0.5, 0.4, 0.3])


def test_iterations_are_those_of_the_released_code_unless_given(tmp_path):
    path = write(tmp_path / "best.pth", trained(SCM))
    assert [block.iterations for block in import_checkpoint(path, **VIT).calibration.blocks] == [16, 4, 4, 4]
    given = import_checkpoint(path, calibration_options={"iterations": 4, "sign": "supplement"}, **VIT)
    assert [(block.iterations, block.sign) for block in given.calibration.blocks] == [(4, "supplement")] * 4


def test_backbone_classes_and_size_come_from_the_file(tmp_path):
    torch.manual_seed(0)
    model = TSCAM("deit_tiny_patch16_224", 7, 96).eval()
    again = import_checkpoint(write(tmp_path / "best.pth", model))
    assert again.backbone.name == "deit_tiny_patch16_224"
    assert (again.head.out_channels, again.backbone.img_size) == (7, (96, 96))
    assert torch.equal(again.head.weight, model.head.weight)


def test_plain_deit_file_gives_a_model_to_train(tmp_path, caplog):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    network = VisionTransformer(img_size=32, num_classes=6, **TINY)
    network.head.bias.data.normal_()
    torch.save({"model": network.state_dict()}, tmp_path / "deit.pth")
    with caplog.at_level(logging.WARNING):
        model = import_checkpoint(tmp_path / "deit.pth", **VIT)
    assert "train the model" in caplog.text
    assert type(model) is TSCAM
    assert torch.equal(model.head.bias, network.head.bias)  # its shape fits, as the released code has it
    assert torch.equal(model.backbone.model.blocks[1].mlp.fc1.weight, network.blocks[1].mlp.fc1.weight)
    for options in ({"num_classes": 5}, {"reset_head_bias": True}):
        other = import_checkpoint(tmp_path / "deit.pth", **VIT, **options)
        assert other.head.bias.abs().max() < (24 * 9) ** -0.5


def test_other_weights_of_the_blocks_are_left_with_a_warning(tmp_path, caplog):
    model = trained(SCM)
    state = official_state_dict(model) | {"module.layers.0.laplacian": torch.eye(16)}
    path = write(tmp_path / "best.pth", model, state_dict=state)
    with caplog.at_level(logging.WARNING):
        import_checkpoint(path, **VIT)
    assert "layers.0.laplacian" in caplog.text


class Opaque:
    pass


def test_wrong_files_are_named(tmp_path):
    model = trained(SCM)
    cases: dict[str, tuple[Any, str]] = {
        "object": ({"state_dict": official_state_dict(model), "args": Opaque()}, "could run any code"),
        "names": (
            {"state_dict": {"module.conv1.weight": torch.zeros(2)}},
            "no pos_embed.*found conv1.weight",
        ),
        "width": ({"state_dict": official_state_dict(model)}, "width 24 is of no DeiT.*give the backbone"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        with pytest.raises(InputError, match=message) as caught:
            import_checkpoint(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        import_checkpoint(tmp_path / "cut.pth")
    with pytest.raises(InputError, match="no such"):
        import_checkpoint(tmp_path / "absent.pth")


def test_a_file_that_does_not_fit_lists_its_keys(tmp_path):
    state = official_state_dict(trained(SCM))
    state["module.blocks.0.attn.qkv.Weight"] = state.pop("module.blocks.0.attn.qkv.weight")
    path = write(tmp_path / "best.pth", trained(SCM), state_dict=state)
    with pytest.raises(InputError, match=r"missing: \S*qkv\.weight; unexpected: \S*qkv\.Weight"):
        import_checkpoint(path, **VIT)
