"""Reference numbers of an independent implementation and of the released PsyNet code, each file found by its prefix.

The folder is ``ATTNMAP_GOLDEN`` (default: ``golden`` in the optional data folder ``ATTNMAP_SHARED``); cases, shapes and
parameters come from the files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contrastive_cam.attention import PretextHeads, caam, channel_gate
from contrastive_cam.baselines import DescriptorStatistics, ddt_mask, scda_map, scda_mask
from contrastive_cam.inference import (
    CorLocProtocol,
    PsyNetProtocol,
    heat_map,
    largest_component,
    largest_component_box,
    mask_box,
    psynet_gray,
)
from contrastive_cam.loss import contrastive_map_loss, contrastive_terms
from contrastive_cam.pooling import _ptap_op, kept_channels, plain_pool, ptap
from contrastive_cam.transforms import (
    LETTERS,
    PretextTransform,
    inverse_theta,
    map_validity,
    theta_of,
    warp_images,
    warp_maps,
)
from numpy.typing import NDArray
from torch import Tensor

pytestmark = pytest.mark.golden

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
FOLDER = Path(os.environ.get("ATTNMAP_GOLDEN", SHARED / "golden")) / "ccam"

Golden = dict[str, NDArray[Any]]


def read(path: Path) -> Golden:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def each_case(prefix: str, marker: str) -> Any:
    """A parametrization over (golden, case): what stands before ``marker`` in the keys of each file."""
    found = []
    for path in sorted(FOLDER.glob(f"{prefix}*.npz")):
        with np.load(path, allow_pickle=False) as file:
            names = [match[1] for key in file.files if (match := re.fullmatch(rf"(.*?){marker}", key))]
        found += [pytest.param(path, name, id=f"{path.stem}-{name}") for name in dict.fromkeys(names)]
    skip = pytest.mark.skip(reason=f"no {prefix}*.npz in {FOLDER} (ATTNMAP_GOLDEN)")
    return pytest.mark.parametrize(("path", "case"), found or [pytest.param(None, "", marks=skip)])


def tensor(golden: Golden, key: str) -> Tensor:
    return torch.from_numpy(golden[key])


def close(found: Any, expected: Any, atol: float = 1e-9) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else found
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# --- Pooling and gate ------------------------------------------------------------------------------


@each_case("ptap", "_F")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pooling(path: Path, case: str, dtype: torch.dtype) -> None:
    golden = read(path)
    atol = 1e-9 if dtype == torch.float64 else 1e-5
    F, Fw = tensor(golden, f"{case}_F"), tensor(golden, f"{case}_Fw")
    for i, ratio in enumerate(golden["ratios"]):
        k = kept_channels(float(ratio), Fw.shape[1])
        assert k == golden[f"{case}_k"][i]
        close(ptap(Fw.to(dtype), float(ratio)), golden[f"{case}_pixelwise"][i], atol)
        close(ptap(Fw.to(dtype), float(ratio), "channel"), golden[f"{case}_channelwise"][i], atol)
        for operator in (_ptap_op, plain_pool):
            A, _ = operator(Fw.flatten(2).to(dtype), k, False)
            close(A.reshape(Fw[:, 0].shape), golden[f"{case}_pixelwise"][i], atol)
    close(ptap(Fw.to(dtype), mode="max"), golden[f"{case}_max"], atol)
    close(ptap(Fw.to(dtype), mode="avg"), golden[f"{case}_avg"], atol)
    close(caam(F.to(dtype)), golden[f"{case}_caam"], atol)


@each_case("ptap", "_F")
def test_gate(path: Path, case: str) -> None:
    golden = read(path)
    F = tensor(golden, f"{case}_F")
    gate = gate_of(golden, case)
    close(gate(F), golden[f"{case}_Fw"])
    close(
        gate(torch.ones_like(F)) * 0 + gate.weights(F),
        golden[f"{case}_eca_gate"][..., None, None] * np.ones(F.shape),
    )


@each_case("ptap", "_upstream")
def test_gradient_through_pooling_and_gate(path: Path, case: str) -> None:
    golden = read(path)
    F, gate = tensor(golden, f"{case}_F").requires_grad_(), gate_of(golden, case)
    (ptap(gate(F), 0.7) * tensor(golden, f"{case}_upstream")).sum().backward()
    close(F.grad, golden[f"{case}_grad_F_k70"])
    [kernel] = gate.parameters()
    close(kernel.grad.flatten(), golden[f"{case}_grad_kernel_k70"])


def gate_of(golden: Golden, case: str) -> Any:
    gate = channel_gate("eca3", golden[f"{case}_F"].shape[1]).double()
    [kernel] = gate.parameters()
    with torch.no_grad():
        kernel.copy_(tensor(golden, f"{case}_eca_kernel").reshape(kernel.shape))
    return gate


# --- Transformations -------------------------------------------------------------------------------


@each_case("transforms_psynet", "_theta")
def test_transforms(path: Path, case: str) -> None:
    golden = read(path)
    letters, corners = case.rsplit("_ac", 1)
    align_corners = corners == "1"
    x, theta = tensor(golden, f"{case}_x"), tensor(golden, f"{case}_theta")
    names = {"flip": "hflip"}
    tasks = [LETTERS["psynet"][letter] for letter in letters]
    labels = {task: tensor(golden, f"{case}_label_{names.get(task, task)}") for task in tasks}
    close(theta_of(labels), theta, 1e-6)
    for padding in ("reflection", "zeros"):
        found = warp_images(x, theta, padding, align_corners=align_corners)
        close(found, golden[f"{case}_out_{padding}"])
    size = (x.shape[2], x.shape[3])
    close(map_validity(theta, size, align_corners=align_corners), golden[f"{case}_valid"], 1e-5)
    warped = torch.stack(
        [warp_maps(channel, theta, align_corners=align_corners) for channel in x.unbind(1)], 1
    )
    close(warped, golden[f"{case}_out_zeros"], 1e-5)
    if align_corners:
        transform = PretextTransform("+".join(letters), compat="psynet")
    else:
        transform = PretextTransform(tasks, align_corners=False)
    moved = transform(x, labels)
    assert list(moved.labels) == list(transform.tasks)
    close(moved.images, golden[f"{case}_out_reflection"], 1e-4)


# --- Loss ------------------------------------------------------------------------------------------


@each_case("contrastive_loss", r"_(?:cosine|pearson)_tau[0-9.]+_S")
def test_loss(path: Path, case: str) -> None:
    golden = read(path)
    theta = tensor(golden, f"{case}_theta")
    close(warp_maps(tensor(golden, f"{case}_A"), theta), golden[f"{case}_warped_A"])
    settings = {key[: -len("_S")] for key in golden if re.fullmatch(rf"{case}_[a-z]+_tau[0-9.]+_S", key)}
    assert settings
    for setting in settings:
        similarity, tau = setting.removeprefix(f"{case}_").split("_tau")
        A, A_t = (tensor(golden, f"{case}_{name}").clone().requires_grad_() for name in ("A", "A_t"))
        found = contrastive_terms(A, A_t, theta, tau=float(tau), similarity=similarity)
        close(found.similarity, golden[f"{setting}_S"])
        close(found.loss_vu, golden[f"{setting}_loss_v2u"])
        close(found.loss_uv, golden[f"{setting}_loss_u2v"])
        close(found.loss, golden[f"{setting}_loss"])
        found.loss.backward()
        close(A.grad, golden[f"{setting}_grad_A"])
        close(A_t.grad, golden[f"{setting}_grad_A_t"])


@each_case("contrastive_options", "_tau")
def test_options(path: Path, case: str) -> None:
    golden = read(path)
    A, A_t, theta = (tensor(golden, f"{case}_{name}") for name in ("A", "A_t", "theta"))
    size = (A.shape[1], A.shape[2])
    close(map_validity(theta, size), golden[f"{case}_mask_forward"])
    close(map_validity(inverse_theta(theta), size), golden[f"{case}_mask_inverse"])
    for name in golden:
        match = re.fullmatch(rf"{case}_(forward|inverse|both)_(zero|mask)(?:_(.*))?", name)
        if match is None:
            continue
        align, undefined, extra = match.groups()
        more = {"negatives_frame": "anchor"} if extra == "anchor_frame" else {"negatives": extra or "batch"}
        tau = float(golden[f"{case}_tau"])
        found = contrastive_map_loss(A, A_t, theta, tau=tau, align=align, undefined=undefined, **more)
        close(found, golden[name])


# --- Maps, heads and boxes -------------------------------------------------------------------------


@each_case("caam_heads_psynet", "_features")
def test_heads(path: Path, case: str) -> None:
    golden = read(path)
    F = tensor(golden, f"{case}_features").double()
    close(caam(F), golden[f"{case}_caam"], 1e-6)
    number = len([key for key in golden if re.fullmatch(rf"{case}_head\d+_weight", key)])
    assert number
    for i in range(number):
        weight, bias = (tensor(golden, f"{case}_head{i}_{part}").double() for part in ("weight", "bias"))
        heads = PretextHeads(F.shape[1], {"task": len(bias)}).double()
        [layer] = heads.layers.values()
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            layer.bias.copy_(bias)
        close(heads(F)["task"], golden[f"{case}_head{i}_logits"], 1e-6)
        close(heads.planes(F)["task"], golden[f"{case}_head{i}_cam"], 1e-6)


@each_case("boxes", "maps")
def test_boxes(path: Path, case: str) -> None:
    golden = read(path)
    size = (int(golden["size"]),) * 2
    heat = heat_map(golden["maps"], size)
    close(heat[: len(golden["upsampled_minmax"])], golden["upsampled_minmax"])
    for i, row in enumerate(golden["boxes_plain"]):
        for j, (threshold, expected) in enumerate(zip(golden["thresholds"], row)):
            box = largest_component_box(heat[i], float(threshold))
            np.testing.assert_array_equal(np.full(4, -1) if box is None else box, expected)
            assert (heat[i] >= threshold).sum() == golden["mask_area"][i, j] or box is None
    assert (
        np.abs(psynet_gray(heat[: len(golden["gray_psynet"])]).astype(int) - golden["gray_psynet"]).max() <= 1
    )
    protocol = PsyNetProtocol()
    for i, gt in enumerate(golden["gt"]):
        found = protocol.add(i, score_map=heat[i], boxes_xyxy=gt[None])
        assert found is not None
        assert np.abs(found - golden["boxes_psynet"][i]).max() <= 1
    close(protocol.column("iou"), golden["iou_psynet"], 0.05)
    assert protocol.compute()["corloc_iou50"] == pytest.approx(float(golden["corloc50_psynet"]))


@each_case("corloc", "gt")
@pytest.mark.parametrize("plus_one", [False, True])
def test_corloc(path: Path, case: str, plus_one: bool) -> None:
    golden = read(path)
    protocol = CorLocProtocol(iou_plus_one=plus_one)
    for i, (gt, box) in enumerate(zip(golden["gt"], golden["pred"])):
        protocol.add(i, box_xyxy=None if (box == -1).all() else box, boxes_xyxy=gt[None])
    suffix = f"plus{int(plus_one)}"
    close(protocol.column("iou"), golden[f"iou_{suffix}"])
    found = protocol.compute()
    levels = [f"iou{round(100 * level)}" for level in golden["iou_thresholds"]]
    close([found[f"corloc_{name}"] for name in [*levels, "mean"]], golden[f"corloc_{suffix}"])


@each_case("ddt_scda", "features")
def test_ddt_and_scda(path: Path, case: str) -> None:
    golden = read(path)
    features = tensor(golden, "features")
    statistics = DescriptorStatistics(features.shape[1])
    for part in features.split(2):
        statistics.add(part)
    ddt = statistics.fit("largest")
    close(ddt.mean, golden["ddt_mean"])
    close(ddt.component, golden["ddt_component"], 1e-8)
    assert ddt.eigenvalue == pytest.approx(float(golden["ddt_eigenvalue"]))
    found = {"ddt": ddt(features).numpy(), "scda": scda_map(features).numpy()}
    for name, mask_of in (("ddt", ddt_mask), ("scda", scda_mask)):
        close(found[name], golden[f"{name}_map"], 1e-8)
        for i, score_map in enumerate(found[name]):
            mask = mask_of(score_map)
            np.testing.assert_array_equal(mask, golden[f"{name}_mask8"][i])
            box = mask_box(mask)
            np.testing.assert_array_equal(np.full(4, -1) if box is None else box, golden[f"{name}_box8"][i])
            level = 0 if name == "ddt" else golden["scda_threshold"][i]
            four = largest_component(golden[f"{name}_map"][i] > level, 4)
            np.testing.assert_array_equal(four, golden[f"{name}_mask4"][i])
    close(found["scda"].mean(axis=(1, 2)), golden["scda_threshold"])
