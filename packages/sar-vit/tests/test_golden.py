"""Reference numbers of an independent implementation and of the released code: every file, found by its prefix.

The folder is ``ATTNMAP_GOLDEN`` (default: ``golden`` in the optional data folder ``ATTNMAP_SHARED``); shapes and
parameters come from the files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sar_vit import SpatialEntropyLoss, apply_sar, spatial_entropy
from sar_vit.entropy import (
    _entropy_op,
    entropy_and_counts,
    entropy_weight,
    map_components,
    plain_entropy,
    similarity_maps,
    total_variation,
)
from sar_vit.surgery import ABLATION
from torch import Tensor

pytestmark = pytest.mark.golden

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
FOLDER = Path(os.environ.get("ATTNMAP_GOLDEN", SHARED / "golden")) / "sar"
ENTROPY_FILES = ("random_", "adversarial_", "mixed_batch")

Golden = dict[str, NDArray[Any]]
Backend = Callable[[Tensor, int, float], tuple[Tensor, Tensor, Tensor]]


def files(*prefixes: str) -> list[Path]:
    return sorted(path for prefix in prefixes for path in FOLDER.glob(f"{prefix}*.npz"))


def read(path: Path) -> Golden:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def each_file(*prefixes: str) -> Callable[[Any], Any]:
    absent = pytest.param(
        None, marks=pytest.mark.skip(reason=f"no {prefixes[0]}*.npz in {FOLDER} (ATTNMAP_GOLDEN)")
    )
    return pytest.mark.parametrize(
        "golden",
        files(*prefixes) or [absent],
        ids=lambda path: path.stem if path else "absent",
        indirect=True,
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return read(request.param)


def check_entropy(backend: Backend, golden: Golden, dtype: torch.dtype) -> None:
    S = torch.from_numpy(golden["S"])
    flat = S.flatten(2).flatten(0, 1)
    spread, middle = flat.std(1, correction=0), flat.mean(1).abs()
    for suffix, eps in (("", 0.0), ("_eps", 1e-9)):
        E, gradient, counts = backend(flat.to(dtype), S.shape[-1], eps)
        expected = torch.from_numpy(golden[f"grad{suffix}"]).reshape(gradient.shape)
        largest = expected.abs().amax(1)
        if dtype == torch.float64:
            allowed, at_most = 1e-9 * largest + 1e-12 / spread.clamp_min(1e-30), 1e-9
        else:
            allowed, at_most = 2e-4 * largest + 1e-5 * (middle / spread).clamp_min(1) / spread, 5e-6
        assert E.dtype == gradient.dtype == dtype
        np.testing.assert_allclose(E.numpy(), golden[f"H{suffix}"].ravel(), rtol=0, atol=at_most)
        error = (gradient - expected).abs().amax(1)
        assert (error <= torch.where(spread > 0, allowed, 0)).all(), (error / allowed).max()
        np.testing.assert_array_equal(counts[:, 0], golden["n_components"].ravel())
        np.testing.assert_array_equal(counts[:, 1], golden["foreground"].sum((2, 3)).ravel())


@each_file(*ENTROPY_FILES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", [_entropy_op, plain_entropy], ids=["kernel", "plain"])
def test_entropy(golden: Golden, dtype: torch.dtype, backend: Backend) -> None:
    check_entropy(backend, golden, dtype)


@each_file(*ENTROPY_FILES)
def test_loss(golden: Golden) -> None:
    for suffix, eps in (("", 0.0), ("_eps", 1e-9)):
        S = torch.from_numpy(golden["S"]).requires_grad_()
        loss = spatial_entropy(S, eps, "mean")
        loss.backward()
        assert loss.item() == pytest.approx(golden[f"loss{suffix}"].item(), abs=1e-9)
        expected = golden[f"grad{suffix}"] / S[..., 0, 0].numel()
        size = np.abs(expected).max((2, 3), keepdims=True)
        assert (np.abs(S.grad.numpy() - expected) <= 1e-9 * size + 1e-12).all()


@each_file(*ENTROPY_FILES)
def test_released_code(golden: Golden) -> None:
    fine = golden["official_status"] == 0
    found = entropy_and_counts(torch.from_numpy(golden["S"]).float())
    np.testing.assert_allclose(found.values.numpy()[fine], golden["official_H_f32"][fine], rtol=0, atol=5e-6)
    assert (found.components.numpy()[golden["official_status"] == 1] == 0).all()  # there an error, here 0


@each_file(*ENTROPY_FILES)
def test_labels(golden: Golden) -> None:
    labels = map_components(torch.from_numpy(golden["S"])).labels.numpy()
    np.testing.assert_array_equal(labels >= 0, golden["foreground"])
    for ours, theirs in zip(
        labels.reshape(-1, labels[0, 0].size), golden["labels"].reshape(-1, labels[0, 0].size)
    ):
        pairs = {(int(a), int(b)) for a, b in zip(ours, theirs)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@each_file(*ENTROPY_FILES)
def test_total_variation(golden: Golden) -> None:
    S = torch.from_numpy(golden["S"])
    np.testing.assert_allclose(total_variation(S), golden["tv_l1"], rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(total_variation(S, 2), golden["tv_half_squared"], rtol=1e-12, atol=1e-9)


def triton_results() -> None:
    """What the subprocess below runs, in Triton's interpreter."""
    from sar_vit import entropy_triton

    for path in files(*ENTROPY_FILES):
        for dtype in (torch.float64, torch.float32):
            check_entropy(entropy_triton.entropy_and_gradient, read(path), dtype)


@pytest.mark.skipif(not files(*ENTROPY_FILES), reason=f"no random_*.npz in {FOLDER} (ATTNMAP_GOLDEN)")
def test_entropy_of_the_triton_kernel() -> None:
    pytest.importorskip(
        "triton", "3.3", reason="no Triton here that is new enough; its kernels run on CUDA only"
    )
    code = f"import runpy; runpy.run_path({__file__!r})['triton_results'](); print('agree')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip().endswith("agree"), done.stderr[-3000:]


@each_file("similarity_")
def test_similarity(golden: Golden) -> None:
    h, w = (int(side) for side in golden["grid"])
    q, k_cls, k, q_patch = (torch.from_numpy(golden[n]) for n in ("q_cls", "k_cls", "k_patch", "q_patch"))
    keys = torch.cat([k_cls.unsqueeze(2), k], dim=2)
    queries = torch.cat([q.unsqueeze(2), q_patch], dim=2)
    scale = float(golden["scale"])
    found = {
        "dot": similarity_maps(queries, keys, (h, w), scale=scale),
        "cos": similarity_maps(queries, keys, (h, w), kind="cosine"),
        "softmax": similarity_maps(queries, keys, (h, w), scale=scale, kind="softmax"),
        "avgq": similarity_maps(queries, keys, (h, w), scale=scale, query="avg"),
    }
    for name, S in found.items():
        np.testing.assert_allclose(S, golden[f"S_{name}"], rtol=1e-12, atol=1e-13)
        entropy = entropy_and_counts(S, 0.0)
        np.testing.assert_allclose(entropy.values, golden[f"H_{name}"], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(entropy.components, golden[f"ncomp_{name}"])


@each_file("similarity_")
def test_gradient_of_queries_and_keys(golden: Golden) -> None:
    h, w = (int(side) for side in golden["grid"])
    q, k = (torch.from_numpy(golden[name]).requires_grad_() for name in ("q_cls", "k_patch"))
    loss = SpatialEntropyLoss(eps=0.0)(similarity_maps(q, k, (h, w), scale=float(golden["scale"])))
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss_dot"].item(), abs=1e-9)
    np.testing.assert_allclose(q.grad, golden["grad_q_cls_dot"], rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(k.grad, golden["grad_k_patch_dot"], rtol=1e-8, atol=1e-11)


@each_file("last_block")
@pytest.mark.parametrize("form", "ABCD")
def test_last_block(golden: Golden, form: str) -> None:
    from timm.models.vision_transformer import VisionTransformer

    h, w = (int(side) for side in golden["grid"])
    x = torch.from_numpy(golden["x"])
    sizes = {"patch_size": 2, "embed_dim": x.shape[2], "depth": 1, "num_heads": int(golden["heads"])}
    vit = VisionTransformer(img_size=(2 * h, 2 * w), num_classes=0, qkv_bias=True, **sizes).double()
    block = vit.blocks[0]
    for norm in (block.norm1, block.norm2):
        norm.eps = float(golden["ln_eps"])
    names = {"norm1": "norm1", "attn.qkv": "qkv", "attn.proj": "proj", "norm2": "norm2"}
    names |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    block.load_state_dict({
        f"{ours}.{part}": torch.from_numpy(golden[f"{theirs}_{part}"])
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    })  # fmt: skip
    apply_sar(vit, **ABLATION[form].switches)
    np.testing.assert_allclose(vit.blocks[0](x).detach(), golden[f"out_{form}"], rtol=0, atol=1e-12)
    [S] = vit.sar.take()
    np.testing.assert_allclose(S.detach(), golden["S"], rtol=0, atol=1e-12)
    vit.blocks[0](x)
    [attention] = vit.sar.take("softmax")
    expected = golden["attention_cls"][..., 1:].reshape(attention.shape)
    np.testing.assert_allclose(attention.detach(), expected, rtol=0, atol=1e-12)


@each_file("lambda_warmup_cosine")
def test_weight_schedule(golden: Golden) -> None:
    schedules = [name for name in golden if name.startswith("schedule_")]
    assert schedules
    for name in schedules:
        base, epochs, warmup = golden[name.replace("schedule", "config")]
        found = [
            entropy_weight(epoch, int(epochs), float(base), "warmup_cosine", warmup_epochs=int(warmup))
            for epoch in range(len(golden[name]))
        ]
        np.testing.assert_allclose(found, golden[name], rtol=1e-12, atol=1e-16)
