"""Reference numbers of an independent implementation: stack and losses, every case of every file.

The folder is ``ATTNMAP_GOLDEN`` (default: ``golden`` in the optional data folder ``ATTNMAP_SHARED``); shapes and
parameters come from the files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnmap_core.metrics import metrics_of_ranking, nearest
from crossattn_dml import ConditionalEmbeddingLoss, CrossAttentionStack
from crossattn_dml.cross_attention import unit
from crossattn_dml.diagnostics import EDGES, gradient_histogram, similar_parts
from crossattn_dml.losses import contrastive, distance_weights, margin, multi_similarity, pair_masks, triplet
from crossattn_dml.rerank import reordered
from torch import Tensor

pytestmark = pytest.mark.golden

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
FOLDER = Path(os.environ.get("ATTNMAP_GOLDEN", SHARED / "golden")) / "dml"
EXACT = {"rtol": 1e-9, "atol": 1e-9}
BLOCK = {
    "norm_query.weight": "lnq_g", "norm_query.bias": "lnq_b",
    "norm_memory.weight": "lnk_g", "norm_memory.bias": "lnk_b",
    "query.weight": "Wq", "query.bias": "bq", "key.weight": "Wk", "key.bias": "bk", "value.weight": "Wv",
    "value.bias": "bv", "out.weight": "Wo", "out.bias": "bo", "norm.weight": "lnf_g", "norm.bias": "lnf_b",
    "expand.weight": "W1", "expand.bias": "b1", "contract.weight": "W2", "contract.bias": "b2",
}  # fmt: skip


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = FOLDER / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no {name}.npz in {FOLDER} (ATTNMAP_GOLDEN)")
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    return arrays, json.loads((FOLDER / f"{name}.json").read_text())


def golden_stack(arrays: dict[str, Tensor], facts: dict[str, Any], **options: Any) -> CrossAttentionStack:
    stack = CrossAttentionStack(
        facts["d"], facts["C"], blocks=facts["blocks"], heads=facts["heads"], init="xavier", **options
    ).double()
    state = {}
    for name in stack.state_dict():
        _, number, rest = name.split(".", 2)
        state[name] = arrays[f"block{int(number) + 1}_{BLOCK[rest]}"]
    stack.load_state_dict(state)
    return stack


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("mode", ["block", "ca_only"])
@pytest.mark.parametrize("hierarchy", ["mutual", "running"])
def test_stack(hierarchy, mode, tile):
    arrays, facts = read("stack")
    N, case = facts["blocks"], f"{hierarchy}_{mode}"
    stack = golden_stack(arrays, facts, hierarchy=hierarchy, mode=mode, tile=tile)
    u, X = arrays["u"].requires_grad_(), arrays["tokens"].requires_grad_()
    with torch.no_grad():
        P = stack.conditional(u, X, levels=range(N + 1))
        A = stack.attention_maps(u, X, levels=range(1, N + 1))
    for n in range(N + 1):
        # The file's first axis is the image whose tokens are read; ours the image whose embedding it is.
        found = P[n] if hierarchy == "mutual" else P[n].transpose(0, 1)
        torch.testing.assert_close(found, arrays[f"{case}_P{n}"], **EXACT)
        if n:
            torch.testing.assert_close(A[n], arrays[f"{case}_att{n}"], **EXACT)
    S = stack(u, X, levels=range(N + 1))
    for n in range(N + 1):
        torch.testing.assert_close(S[n].detach(), arrays[f"{case}_Smutual{n}"], **EXACT)
    for similarity in ("target", "anchor"):
        name = f"{case}_S{similarity}{N}"
        if name in arrays:
            other = golden_stack(
                arrays, facts, hierarchy=hierarchy, mode=mode, tile=tile, similarity=similarity
            )
            with torch.no_grad():
                torch.testing.assert_close(other(u, X)[N], arrays[name], **EXACT)
    for supervise in ("last", "all"):
        parts = ConditionalEmbeddingLoss(supervise=supervise)(S, arrays["labels"])
        assert parts.total.item() == pytest.approx(facts[case][f"loss_{supervise}"], abs=1e-9)
        assert parts.unconditional.item() == pytest.approx(facts[case]["loss_unconditional"], abs=1e-9)
        if f"{case}_grad_tokens_{supervise}" in arrays:
            for name, gradient in zip(
                ("tokens", "u"), torch.autograd.grad(parts.total, [X, u], retain_graph=True)
            ):
                torch.testing.assert_close(gradient, arrays[f"{case}_grad_{name}_{supervise}"], **EXACT)


def test_attention_maps_of_a_triple():
    arrays, facts = read("stack")
    maps, more = read("diagnostics")
    stack, triple = golden_stack(arrays, facts), more["triple"]
    levels = sorted({int(found[1]) for key in maps if (found := re.match(r"attn_block(\d+)_", key))})
    with torch.no_grad():
        A = stack.attention_maps(arrays["u"], arrays["tokens"], levels=levels)
    for n in levels:
        upper, lower = (
            A[n][triple["a"], triple[key]].mean(0).reshape(facts["grid_h"], -1) for key in ("i1", "i2")
        )
        torch.testing.assert_close(upper, maps[f"attn_block{n}_upper"], **EXACT)
        torch.testing.assert_close(lower, maps[f"attn_block{n}_lower"], **EXACT)
        torch.testing.assert_close((upper - lower).square(), maps[f"attn_block{n}_sqdiff"], **EXACT)


def loss_named(key: str, arrays: dict[str, Tensor], labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of a key of the file; its numbers are in its name."""
    number = {
        name: float(value) for name, value in re.findall(r"(?<=_)(a|b|m|eps|beta|miner)(\d+(?:\.\d+)?)", key)
    }
    positive, negative = pair_masks(labels)
    every = torch.stack(torch.where(positive[:, :, None] & negative[:, None, :]), dim=1)
    if key.startswith(("ms_pml", "ms_lmu", "ms_matrix")):
        return lambda S: multi_similarity(
            S, labels, alpha=number["a"], beta=number["b"], epsilon=number.get("eps", number.get("miner")),
            reduction="batch" if "pml" in key else "anchors",
        )  # fmt: skip
    if key.startswith("triplet_pml"):
        reduction = "mean" if key.endswith("mean") else "avg_nonzero"
        return lambda S: triplet(S, every, margin=number["m"], squared=False, reduction=reduction, eps=0)
    if key.startswith("triplet_lmu"):
        return lambda S: triplet(S, arrays["triplets"], margin=number["m"])
    if key.startswith("margin_pml"):
        return lambda S: margin(S, every, number["beta"], margin=number["m"], eps=0)
    if key.startswith("margin_lmu"):
        boundaries = arrays["beta_per_class"][labels[arrays["triplets"][:, 0]]]
        return lambda S: margin(S, arrays["triplets"], boundaries, margin=number["m"])
    assert key == "contrastive_pml_pos0_neg1", f"{key}: a loss that this test does not know"
    return lambda S: contrastive(S, labels, eps=0)


def test_losses():
    everything, facts = read("losses")
    for case, expected in facts.items():
        arrays = {
            key.removeprefix(f"{case}_"): v for key, v in everything.items() if key.startswith(f"{case}_")
        }
        labels, compared = arrays["labels"], 0
        for key, value in expected.items():
            if key.startswith("proxy_anchor") or "_num_" in key or key.endswith("active_terms"):
                continue
            loss = loss_named(key, arrays, labels)
            if key.startswith("ms_matrix_asym"):
                assert loss(arrays["asym_similarity"]).item() == pytest.approx(value, abs=1e-9), key
                continue
            leaf = arrays["embeddings"].clone().requires_grad_()
            z = unit(leaf)
            found = loss(z @ z.T)
            assert found.item() == pytest.approx(value, abs=1e-9), key
            if f"grad_{key}" in arrays:
                [gradient] = torch.autograd.grad(found, leaf)
                torch.testing.assert_close(gradient, arrays[f"grad_{key}"], **EXACT)
                compared += 1
        assert compared >= 9
        z = unit(arrays["embeddings"])
        for key in [key for key in arrays if key.startswith("dws_prob_")]:
            low, high = re.fullmatch(r"dws_prob_lower([\d.]+?)(?:_upper([\d.]+))?", key).groups()
            found = distance_weights(
                z @ z.T, labels, z.shape[1], lower=float(low), upper=float(high) if high else None
            )
            torch.testing.assert_close(found, arrays[key], **EXACT)


def test_proxy_anchor():
    arrays, facts = read("losses")
    for case, expected in facts.items():
        [key] = [key for key in expected if key.startswith("proxy_anchor")]
        proxies, leaf = arrays[f"{case}_proxies"], arrays[f"{case}_embeddings"].requires_grad_()
        loss = ConditionalEmbeddingLoss(
            "proxy_anchor", num_classes=len(proxies), dim=proxies.shape[1]
        ).double()
        loss.proxies.load_state_dict({"proxies": proxies})
        value = loss({0: leaf}, arrays[f"{case}_labels"]).total
        assert value.item() == pytest.approx(expected[key], abs=1e-9)
        [gradient] = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(gradient, arrays[f"{case}_grad_{key}"], **EXACT)


def test_reranking():
    arrays, facts = read("rerank")
    z = unit(arrays["embeddings"].double())
    k, labels = facts["top_k"], arrays["labels"].numpy()
    near = nearest(z, k=len(z) - 1)
    np.testing.assert_array_equal(near.indices, arrays["ranking_before"])
    conditional = np.take_along_axis(arrays["conditional_similarity"].numpy(), near.indices, axis=1)
    after = near.indices.copy()
    after[:, :k] = reordered(near.indices[:, :k], near.similarities[:, :k], conditional[:, :k], facts["mu"])
    np.testing.assert_array_equal(after, arrays["ranking_after"])
    relevant = [(labels == label).sum() - 1 for label in labels]
    for ranking, name in ((near.indices, "before"), (after, "after")):
        ks = [int(key.partition("@")[2]) for key in facts[name] if key.startswith("recall@")]
        found = metrics_of_ranking(labels[ranking] == labels[:, None], relevant, ks)
        assert found == pytest.approx(facts[name], abs=1e-9)


def test_gradient_histogram():
    arrays, _ = read("stack")
    expected, more = read("diagnostics")
    found = gradient_histogram([arrays["mutual_block_grad_tokens_last"].numpy()])
    np.testing.assert_array_equal(found.counts, expected["grad_hist_counts"])
    np.testing.assert_allclose(EDGES, expected["grad_hist_edges"], atol=1e-12)
    grad = more["grad"]
    assert (found.zeros, found.underflow, found.overflow) == (
        grad["zeros"],
        grad["underflow"],
        grad["overflow"],
    )
    assert found.percentiles == pytest.approx((grad["p05"], grad["median_log10"], grad["p95"]), abs=1e-9)


def test_parts():
    arrays, facts = read("diagnostics")
    parts, labels = facts["parts"], arrays["parts_labels"]
    grid = (parts["grid_h"], parts["grid_w"])
    for query in parts["queries"]:
        image = query["query_image"]
        found = similar_parts(
            arrays["parts_tokens"].numpy(), image, query["row"], query["col"], grid, most=parts["top_m"]
        )
        for part, wanted in zip(found, query["top"], strict=True):
            assert (part.image, part.row, part.col) == (wanted["image"], wanted["row"], wanted["col"])
            assert part.cosine == pytest.approx(wanted["cosine"], abs=1e-9)
            assert bool(labels[part.image] == labels[image]) == wanted["same_label"]
