"""Reference numbers of the released code: every file of a group, found by the prefix of its name.

The folder is ``ATTNMAP_GOLDEN`` (default: ``golden`` in the optional data folder ``ATTNMAP_SHARED``); shapes
and parameters come from the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scm_wsol import SCM, TSCAM, ActivationDiffusionBlock, SpatialCalibration
from scm_wsol.calibration import (
    dense_diffusion,
    grid_laplacian,
    modulated_laplacian,
    newton_schulz,
    similarity,
)
from torch import Tensor
from torch.nn import functional

pytestmark = pytest.mark.golden

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
FOLDER = Path(os.environ.get("ATTNMAP_GOLDEN", SHARED / "golden")) / "scm"

Golden = dict[str, NDArray[Any]]


def each_file(*prefixes: str) -> Callable[[Any], Any]:
    files = sorted(path for prefix in prefixes for path in FOLDER.glob(f"{prefix}*.npz"))
    absent = pytest.param(
        None, marks=pytest.mark.skip(reason=f"no {prefixes[0]}*.npz in {FOLDER} (ATTNMAP_GOLDEN)")
    )
    return pytest.mark.parametrize(
        "golden", files or [absent], ids=lambda path: path.stem if path else "absent", indirect=True
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(request.param, allow_pickle=False) as file:
        return dict(file)


def close(ours: Tensor | NDArray[Any], reference: NDArray[Any], rtol: float, what: str = "") -> None:
    """Max-norm: the largest difference against the largest reference value."""
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    assert ours.shape == reference.shape, what
    error = np.abs(ours - reference).max()
    assert error <= rtol * np.abs(reference).max(), f"{what}: {error:.2e} of {np.abs(reference).max():.2e}"


def tensor(array: NDArray[Any], gradient: bool = False) -> Tensor:
    return torch.from_numpy(np.array(array)).requires_grad_(gradient)


def set_scalars(blocks: Any, lam: NDArray[Any], beta: NDArray[Any]) -> None:
    """Exactly, in the precision the block has now: its constructor rounds to float32."""
    for block, one_lam, one_beta in zip(blocks, np.atleast_1d(lam), np.atleast_1d(beta)):
        block.lam.data.fill_(float(one_lam))
        block.beta.data.fill_(float(one_beta))


@each_file("grid_laplacian")
def test_grid_laplacian(golden: Golden) -> None:
    for name, expected in golden.items():
        kind, size = name.split("_")
        h, w = (int(side) for side in size.split("x"))
        ours = grid_laplacian(h, w, dtype=torch.float64).numpy()
        np.testing.assert_array_equal(ours if kind == "lap" else ours.diagonal(), expected)


@each_file("newton_schulz_")
def test_newton_schulz(golden: Golden) -> None:
    for p, expected in zip(golden["p"], golden["V"]):
        close(
            newton_schulz(tensor(golden["X"]), int(p), float(golden["alpha"])),
            expected,
            1e-7 if p >= 16 else 1e-9,
            f"p={p}",
        )


@each_file("adb_")
def test_activation_diffusion_block(golden: Golden) -> None:
    S, F = tensor(golden["S"], gradient=True), tensor(golden["F"], gradient=True)
    p, alpha, lam = int(golden["p"]), float(golden["alpha"]), float(golden["lam"])
    block = ActivationDiffusionBlock(p, alpha=alpha).to(S.dtype)
    set_scalars([block], golden["lam"], golden["beta"])
    S_next, F_next = block(S, F)
    loss = (tensor(golden["w_S"]) * S_next).sum() + (tensor(golden["w_F"]) * F_next).sum()
    loss.backward()

    h, w = (int(side) for side in golden["grid"])
    E = similarity(S)
    X = modulated_laplacian(E, grid_laplacian(h, w, dtype=S.dtype), lam)
    V = newton_schulz(X, p, alpha).mT
    if S.dtype == torch.float32:
        close(V, golden["V"], 1e-4, "V")
        np.testing.assert_allclose(S_next.detach(), golden["S_next"], rtol=0, atol=2e-3)
        np.testing.assert_allclose(F_next.detach(), golden["F_next"], rtol=0, atol=2e-3)
        return
    rtol = 1e-7 if p >= 16 else 1e-9
    u = dense_diffusion(S, F, lam, iterations=p, alpha=alpha) / (
        float(golden["beta"]) * F.max(-1, keepdim=True).values
    )
    ours = {
        "lap": grid_laplacian(h, w, dtype=S.dtype),
        "E": E,
        "X": X,
        "V": V,
        "diffused": dense_diffusion(S, F, lam, iterations=p, alpha=alpha),
        "shrunk": u - u.tanh(),
        "T": block.activation(S, F),
        "S_next": S_next,
        "F_next": F_next,
        "grad_S": S.grad,
        "grad_F": F.grad,
    }
    for name, value in ours.items():
        close(value, golden[name], rtol, name)
    close_scalar_gradients(block.lam.grad, block.beta.grad, golden["grad_lam"], golden["grad_beta"], rtol)
    close(loss.detach().reshape(1), golden["loss"].reshape(1), rtol, "loss")


def close_scalar_gradients(
    lam: Tensor, beta: Tensor, expected_lam: NDArray[Any], expected_beta: NDArray[Any], rtol: float
) -> None:
    """Compare λ and β together, in the max-norm.

    β cancels in the min-max to leading order: its gradient is a difference of terms 1/u² larger and is known
    only to about ε/u⁴ (1e-9 at u = 0.02) of itself, on any two processors.
    """
    close(torch.cat([lam, beta]), np.concatenate([expected_lam, expected_beta]), rtol, "grad_lam, grad_beta")
    close(beta, expected_beta, max(rtol, 1e-6), "grad_beta")


@each_file("scm_stack_")
def test_stack(golden: Golden) -> None:
    S, F = tensor(golden["S"], gradient=True), tensor(golden["F"], gradient=True)
    p = [int(count) for count in golden["p"]]
    stack = SpatialCalibration(len(p), p, alpha=float(golden["alpha"])).to(S.dtype)
    set_scalars(stack.blocks, golden["lam"], golden["beta"])
    S_layers, F_layers = stack(S, F, return_layers=True)
    logits = S_layers[-1].mean((2, 3))
    loss = functional.cross_entropy(logits, tensor(golden["label"]))
    loss.backward()
    rtol = 1e-7 if max(p) >= 16 else 1e-9
    ours = {"S_layers": S_layers, "F_layers": F_layers, "logits": logits, "grad_S": S.grad, "grad_F": F.grad}
    for name, value in ours.items():
        close(value, golden[name], rtol, name)
    close(loss.detach().reshape(1), golden["ce_loss"].reshape(1), rtol, "ce_loss")
    lam = torch.cat([block.lam.grad for block in stack.blocks])
    beta = torch.cat([block.beta.grad for block in stack.blocks])
    close_scalar_gradients(lam, beta, golden["grad_lam"], golden["grad_beta"], rtol)


def tiny_model(golden: Golden, cls: type[TSCAM], **options: Any) -> TSCAM:
    image, patch, width, depth, heads, mlp_ratio, classes = (int(value) for value in golden["cfg"])
    sizes = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio,
    }
    model = cls("vit", classes, image, drop_path_rate=0.0, backbone_options=sizes, **options).double()
    weights = {
        name.removeprefix("w."): tensor(value) for name, value in golden.items() if name.startswith("w.")
    }
    names = {name: name if name.startswith("head.") else f"backbone.model.{name}" for name in weights}
    loaded = model.load_state_dict({names[name]: value for name, value in weights.items()}, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("calibration.") for name in loaded.missing_keys)
    return model


@each_file("model_tscam_", "model_scm_")
def test_tscam_model(golden: Golden) -> None:
    model = tiny_model(golden, TSCAM).eval()
    images = tensor(golden["x"]).double()
    maps = model.maps(images)
    every = torch.arange(model.head.out_channels).expand(len(images), -1)
    close(maps.logits, golden["tscam_logits"], 1e-9, "tscam_logits")
    close(model(images), golden["tscam_logits"], 1e-9, "forward")
    close(model.class_maps(maps, every), golden["tscam_maps"], 1e-9, "tscam_maps")
    for k, expected in enumerate(golden["cls_row_headmean"]):
        one = tiny_model(golden, TSCAM, attention_blocks=[k]).eval().maps(images).attention
        close(one.flatten(1), expected, 1e-9, f"cls_row_headmean of block {k}")


@each_file("model_scm_")
def test_scm_model_in_evaluation(golden: Golden) -> None:
    model = tiny_model(golden, SCM).eval()
    images = tensor(golden["x"]).double()
    maps = model.maps(images)
    every = torch.arange(model.head.out_channels).expand(len(images), -1)
    close(model(images), golden["scm_logits"], 1e-9, "scm_logits")
    close(maps.semantic, golden["S0"], 1e-9, "S0")
    close(model.class_maps(maps, every), golden["scm_maps"], 1e-9, "scm_maps")
    close(model.calibrated(maps)[1][0].unsqueeze(1), golden["F0_norm"], 1e-9, "F0_norm")


@each_file("model_scm_")
def test_scm_model_in_training(golden: Golden) -> None:
    runs = [name.removeprefix("train_logits_") for name in golden if name.startswith("train_logits_")]
    assert runs
    for run in runs:  # such as p16_4_4_4
        p = [int(count) for count in run.removeprefix("p").split("_")]
        model = tiny_model(golden, SCM, calibration_options={"blocks": len(p), "iterations": p}).train()
        set_scalars(model.calibration.blocks, golden["lam"], golden["beta"])
        logits = model(tensor(golden["x"]).double())
        loss = functional.cross_entropy(logits, tensor(golden["train_label"]))
        loss.backward()
        rtol = 1e-7 if max(p) >= 16 else 1e-9
        close(logits, golden[f"train_logits_{run}"], rtol, "train_logits")
        close(loss.detach().reshape(1), golden[f"train_ce_{run}"].reshape(1), rtol, "train_ce")
        close(model.head.weight.grad, golden[f"grad_head_weight_{run}"], rtol, "grad_head_weight")
        qkv = model.backbone.blocks[-1].attn.qkv.weight
        close(qkv.grad, golden[f"grad_qkv_last_weight_{run}"], rtol, "grad_qkv_last_weight")
        lam = torch.cat([block.lam.grad for block in model.calibration.blocks])
        beta = torch.cat([block.beta.grad for block in model.calibration.blocks])
        close_scalar_gradients(lam, beta, golden[f"grad_lam_{run}"], golden[f"grad_beta_{run}"], rtol)
