"""Retrieval metrics: goldens, a full sort in float64 as reference, ties, degenerate input, memory."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnmap_core.errors import InputError
from attnmap_core.metrics import (
    approximate_nearest,
    kmeans,
    map_at_r,
    metrics_of_ranking,
    nearest,
    nmi,
    r_precision,
    recall_at_k,
    retrieval_metrics,
)
from attnmap_core.metrics import retrieval as module
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
FOLDER = Path(os.environ.get("ATTNMAP_GOLDEN", SHARED / "golden")) / "dml"

TIES = ("index", "optimistic", "pessimistic")
MORE = {"r_precision": "r_precision", "map_at_r": "map_at_r", "map": "map_full", "mrr": "mrr"}


def cases(prefix: str) -> list[Any]:
    absent = pytest.param(
        None, marks=pytest.mark.skip(reason=f"no {prefix}*.npz in {FOLDER} (ATTNMAP_GOLDEN)")
    )
    return sorted(FOLDER.glob(f"{prefix}*.npz")) or [absent]


# --- Goldens


@pytest.mark.golden
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("path", cases("retrieval_"), ids=lambda path: path and path.stem)
def test_golden_metrics(path, chunk_size):
    facts = json.loads((FOLDER / "retrieval.json").read_text())[path.stem.removeprefix("retrieval_")]
    arrays = dict(np.load(path))
    options: dict[str, Any] = {"chunk_size": chunk_size, "full": True}
    options["similarity"] = "cosine" if facts["similarity"] == "cosine" else "euclidean"
    x, y = (
        (arrays["query"], arrays["query_labels"])
        if "query" in arrays
        else (arrays["embeddings"], arrays["labels"])
    )
    if "query" in arrays:
        options |= {"gallery": arrays["gallery"], "gallery_labels": arrays["gallery_labels"]}
    available = len(arrays.get("gallery", x)) - ("query" not in arrays)
    ks = [k for k in facts["ks"] if k <= available]
    for ties, expected in facts.get("expected_by_tie_policy", {"index": facts.get("expected")}).items():
        found = retrieval_metrics(x, y, ks, ties=ties, **options)
        without = retrieval_metrics(x, y, ks, ties=ties, exclude_lone=True, **options)
        for k in ks:
            assert found[f"recall@{k}"] == pytest.approx(
                expected["recall_all_queries"][f"recall@{k}"], abs=1e-12
            )
            wanted = expected.get("recall_excluding_lone", expected["recall_all_queries"])[f"recall@{k}"]
            assert without[f"recall@{k}"] == pytest.approx(wanted, abs=1e-12)
        for ours, theirs in {**MORE, "map_c": "map_c_lmu_variant"}.items():
            if theirs in expected:
                assert found[ours] == pytest.approx(expected[theirs], abs=1e-12), ours
        if ties == "index" and "wrong_drop_first_column_recall" in facts:
            wrong = facts["wrong_drop_first_column_recall"]
            assert any(abs(found[name] - value) > 1e-6 for name, value in wrong.items() if name in found)
        for name, library in facts.get("pytorch_metric_learning", {}).items():
            ours = {"mean_average_precision": "map", "mean_average_precision_at_r": "map_at_r",
                    "mean_reciprocal_rank": "mrr", "precision_at_1": "recall@1"}.get(name, name)  # fmt: skip
            assert (without if ours == "recall@1" else found)[ours] == pytest.approx(library, abs=1e-9), name


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("rerank"), ids=lambda path: path and path.stem)
def test_golden_ranking(path):
    arrays = dict(np.load(path))
    expected = arrays["ranking_before"]
    found = nearest(arrays["embeddings"], k=expected.shape[1])
    np.testing.assert_array_equal(found.indices, expected)


@pytest.mark.golden
@pytest.mark.parametrize("path", cases("nmi"), ids=lambda path: path and path.stem)
def test_golden_clustering(path):
    arrays, facts = dict(np.load(path)), json.loads((FOLDER / "nmi.json").read_text())
    for name, expected in facts.items():
        if not name.startswith("assignment_"):
            continue
        labels, clusters = (
            arrays[f"{kind}_{name.removeprefix('assignment_')}"] for kind in ("labels", "clusters")
        )
        for key in [key for key in expected if key.startswith("nmi_")]:
            assert nmi(labels, clusters, key.removeprefix("nmi_")) == pytest.approx(expected[key], abs=1e-9)
    found = kmeans(
        arrays["km_x"], start=arrays["km_init"], iterations=facts["kmeans_fixed_init"]["iterations"]
    )
    np.testing.assert_array_equal(found.clusters, arrays["km_assign"])
    np.testing.assert_allclose(found.centroids, arrays["km_centroids"], atol=1e-9)


# --- A reference: sort everything in float64


def reference_order(x, gallery, similarity, ties="index", hit=None) -> list[list[int]]:
    x64, g64 = np.asarray(x, np.float64), np.asarray(x if gallery is None else gallery, np.float64)
    orders = []
    for q in range(len(x64)):
        if similarity == "euclidean":
            S = [-float(((x64[q] - g) ** 2).sum()) for g in g64]
        else:
            S = [float((x64[q] * g).sum()) for g in g64]
            if similarity == "cosine":
                S = [
                    s / max(float(np.linalg.norm(x64[q])) * float(np.linalg.norm(g)), 1e-24)
                    for s, g in zip(S, g64)
                ]
        items = [g for g in range(len(g64)) if gallery is not None or g != q]
        sign = {"index": 0, "optimistic": -1, "pessimistic": 1}[ties]
        orders.append(sorted(items, key=lambda g: (-S[g], sign * bool(hit is not None and hit[q][g]), g)))
    return orders


def reference_metrics(x, y, ks, gallery=None, gallery_labels=None, similarity="cosine", ties="index"):
    classes = y if gallery is None else gallery_labels
    hit = [[a == b for b in classes] for a in y]
    found: dict[str, list[float]] = {
        name: [] for name in [*(f"recall@{k}" for k in ks), "r_precision", "map_at_r"]
    }
    full: dict[str, list[float]] = {"map": [], "mrr": [], "map_c": []}
    for q, order in enumerate(reference_order(x, gallery, similarity, ties, hit)):
        rel = [hit[q][g] for g in order]
        R = sum(rel)
        for k in ks:
            found[f"recall@{k}"].append(float(any(rel[:k])))
        precision = [sum(rel[: r + 1]) / (r + 1) for r in range(len(rel))]
        full["map_c"].append(sum(p for p, h in zip(precision[: R + 1], rel) if h) / (R + 1))
        if R:
            found["r_precision"].append(sum(rel[:R]) / R)
            found["map_at_r"].append(sum(p for p, h in zip(precision[:R], rel) if h) / R)
            full["map"].append(sum(p for p, h in zip(precision, rel) if h) / R)
            full["mrr"].append(1 / (rel.index(True) + 1))
    return {name: float(np.mean(values)) for name, values in (found | full).items()}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_a_full_sort(data):
    """Few distinct integer vectors: ties everywhere, duplicates of the query among them, zero vectors too."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    n, d = data.draw(st.integers(3, 40)), data.draw(st.integers(1, 4))
    spread = data.draw(st.integers(1, 3))
    similarity = data.draw(st.sampled_from(["cosine", "dot", "euclidean"]))
    ties = data.draw(st.sampled_from(TIES))
    apart = data.draw(st.booleans())
    x = rng.integers(-spread, spread + 1, (n, d)).astype(np.float32)
    if (
        similarity == "cosine"
    ):  # lengths whose products and roots are exact, so that ties of the reference are too
        x = (
            np.eye(d, dtype=np.float32)[rng.integers(0, d, n)]
            * 2.0 ** rng.integers(-2, 3, (n, 1))
            * rng.choice([-1, 0, 1], (n, 1))
        )
    y = rng.integers(0, 4, n)
    y[1] = y[0]
    options: dict[str, Any] = {"similarity": similarity, "ties": ties}
    if apart:
        options |= {"gallery": x[::-1][: n - 1].copy(), "gallery_labels": y[::-1][: n - 1].copy()}
    available = n - 1
    ks = sorted({1, min(3, available), available})
    if apart and not set(y) & set(options["gallery_labels"]):
        return
    expected = reference_metrics(x, y, ks, **options)
    for chunk in (None, 1, 5):
        found = retrieval_metrics(x, y, ks, full=True, chunk_size=chunk, **options)
        assert found == pytest.approx(expected, abs=1e-12)
        short = retrieval_metrics(x, y, ks[:1], chunk_size=chunk, **options)
        assert short == pytest.approx({name: found[name] for name in short}, abs=1e-12)
    order = nearest(x, options.get("gallery"), available, similarity=similarity).indices
    np.testing.assert_array_equal(order, reference_order(x, options.get("gallery"), similarity))


def clustered(n: int, d: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n // 6, n)
    return (rng.standard_normal((n // 6, d))[y] + 2.5 * rng.standard_normal((n, d))).astype(np.float32), y


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_large_enough_for_groups_and_equal_to_float64(similarity):
    x, y = clustered(1500, 24)
    x[700:710] = x[:10]  # duplicates
    x[800:900] = x[100:200] * np.float32(1 + 1e-6)  # and what float32 cannot tell apart
    z = x.astype(np.float64)
    z = z / np.linalg.norm(z, axis=1, keepdims=True) if similarity == "cosine" else z
    S = z @ z.T
    if similarity == "euclidean":
        S = 2 * S - np.square(z).sum(1) - np.square(z).sum(1)[:, None]
    np.fill_diagonal(S, -np.inf)
    found = nearest(x, k=3, similarity=similarity)
    np.testing.assert_allclose(found.similarities, -np.sort(-S, axis=1)[:, :3], atol=1e-9)
    order = np.argsort(-S, axis=1, kind="stable")[:, :8]
    recall = recall_at_k(x, y, k=(1, 8), similarity=similarity)
    for k in (1, 8):
        expected = (y[order[:, :k]] == y[:, None]).any(1).mean()
        assert abs(recall[k] - expected) <= 1 / 1500  # the reference itself errs among near duplicates


def test_group_maxima_find_what_topk_finds():
    x, _ = clustered(3000, 16, seed=3)
    search = module._Search(x, None, "cosine")
    assert search.columns // module._GROUP > 4 * 9  # groups are used
    for _, block in search.chunks(9, 512):
        values, columns = search.best(block.scores, 9)
        torch.testing.assert_close(values, block.scores.topk(9, dim=1).values, rtol=0, atol=0)
        assert torch.equal(block.scores.gather(1, columns), values)


def test_error_bound_holds():
    for scale, shift in ((1.0, 0.0), (100.0, 3.0), (1e-3, 10.0)):
        x, _ = clustered(600, 96, seed=5)
        x = x * np.float32(scale) + np.float32(shift)
        for similarity in ("cosine", "dot", "euclidean"):
            search = module._Search(x, None, similarity)
            for rows, block in search.chunks(1, None):
                every = torch.arange(600).expand(len(rows), -1)
                exact = search.exact(torch.arange(rows.start, rows.stop), every)
                if similarity == "euclidean":
                    exact = exact + search.query_norms[rows.start : rows.stop, None].square()
                off = ~torch.eye(600, dtype=torch.bool)[rows.start : rows.stop]
                error = (block.scores[:, :600].double() - exact).abs()[off].reshape(len(rows), -1)
                assert (error <= block.error[:, None]).all(), (similarity, scale)


def test_nearly_equal_similarities_are_told_apart():
    """Differences of 1e-9, far below float32, decide; in an order against the index."""
    angles = 0.3 + 1e-9 * np.arange(50)[::-1]
    gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = nearest(np.array([[1.0, 0.0]]), gallery, k=50)
    np.testing.assert_array_equal(found.indices[0], np.arange(50)[::-1])


@pytest.mark.parametrize("ties", TIES)
def test_collapsed_embeddings(ties):
    y = np.arange(300) % 3
    found = retrieval_metrics(np.ones((300, 4)), y, (1, 2, 299), ties=ties, chunk_size=64)
    expected = reference_metrics(np.ones((300, 4)), y, (1, 2, 299), ties=ties)
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)
    assert found["recall@1"] == pytest.approx(
        {"index": 1 / 3, "optimistic": 1.0, "pessimistic": 0.0}[ties], abs=0.01
    )


def test_a_duplicate_stands_first_and_the_query_nowhere():
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert nearest(x, k=3).indices.tolist() == [[1, 3, 2], [0, 3, 2], [3, 0, 1], [2, 0, 1]]
    assert (
        recall_at_k(x, [0, 1, 2, 0]) == 0.0
    )  # dropping the first column would make a hit of a duplicate's self


def test_threads_tensors_and_precisions_agree():
    x, y = clustered(900, 32, seed=7)
    expected = retrieval_metrics(x, y)
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(2)
        assert retrieval_metrics(torch.from_numpy(x), torch.from_numpy(y)) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_num_threads(before[1])
    assert retrieval_metrics(x.astype(np.float64), [f"class {k}" for k in y]) == expected
    assert retrieval_metrics(x, y + 2**40) == expected  # labels that float32 would merge
    half = torch.from_numpy(x).half()
    assert retrieval_metrics(half, y) == retrieval_metrics(half.float(), y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_cuda_agrees_with_the_cpu(similarity):
    x, y = clustered(3000, 48, seed=5)
    x[700:710] = x[:10]
    x[800:900] = x[100:200] * np.float32(1 + 1e-6)
    on_device = torch.from_numpy(x).cuda()
    for ties in TIES:
        options: dict[str, Any] = {"similarity": similarity, "ties": ties}
        expected = pytest.approx(retrieval_metrics(x, y, **options), rel=1e-12)  # means of the same ranks
        assert retrieval_metrics(on_device, y, **options) == expected
    found, expected = (nearest(z, k=5, similarity=similarity) for z in (on_device, x))
    np.testing.assert_array_equal(found.indices, expected.indices)
    there, here = (
        kmeans(z, 20, seed=1, iterations=3).clusters for z in (on_device.double(), x.astype(np.float64))
    )
    assert nmi(here, there) > 0.98  # sums on a GPU have no order


def test_parts_equal_the_whole():
    x, y = clustered(200, 8)
    found = retrieval_metrics(x, y, (1, 4))
    assert recall_at_k(x, y, 4) == found["recall@4"]
    assert recall_at_k(x, y, [1, 4]) == {1: found["recall@1"], 4: found["recall@4"]}
    assert r_precision(x, y) == found["r_precision"]
    assert map_at_r(x, y) == found["map_at_r"]
    gallery = {"gallery": x[:100], "gallery_labels": y[:100]}
    assert (
        map_at_r(x[100:], y[100:], **gallery)
        == retrieval_metrics(x[100:], y[100:], (1,), **gallery)["map_at_r"]
    )


def test_memory_is_a_chunk(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 18)
    peaks = {}
    for n in (1000, 4000):
        x, y = clustered(n, 8)
        search = module._Search(x, None, "cosine")
        largest = max(block.scores.nbytes for _, block in search.chunks(8, None))
        assert largest <= 1 << 18
        tracemalloc.start()
        retrieval_metrics(x, y, (1, 8))
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[4000] < 8 * peaks[1000]  # what numpy holds: labels and counts


X, Y = np.eye(4), [0, 0, 1, 1]
NAN = np.where(np.eye(4)[:, :3] > 0, np.nan, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall_at_k(NAN, Y), "embeddings: row 0 holds values that are not finite"),
        (
            lambda: map_at_r(X, Y, gallery=NAN, gallery_labels=Y),
            "gallery: row 0 holds values that are not finite",
        ),
        (lambda: recall_at_k(X, Y, k=4), "k 4: expected 1 to 3, the gallery images that a query can find"),
        (lambda: recall_at_k(X, Y, k=0), "k 0: expected 1 to 3"),
        (lambda: recall_at_k(X, Y, k=5, gallery=X, gallery_labels=Y), "k 5: expected 1 to 4"),
        (
            lambda: recall_at_k(X, [0, 1, 2, 3]),
            "no query has another image of its class among 4 gallery images",
        ),
        (lambda: r_precision(X, Y, gallery=X, gallery_labels=[5, 6, 7, 8]), "no query has another image"),
        (lambda: recall_at_k(X, [0, 0, 1]), r"labels: shape \(3,\), expected one for each of 4"),
        (lambda: recall_at_k(X[0], Y), r"embeddings: shape \(4,\), expected vectors"),
        (lambda: recall_at_k(X[:0], []), r"embeddings: shape \(0, 4\), expected vectors"),
        (lambda: recall_at_k(X, Y, gallery=X), "gallery and gallery_labels belong together"),
        (lambda: nearest(X, X[:, :2], 1), "gallery: vectors of 2 channels, expected 4"),
        (lambda: recall_at_k(X, Y, ties="first"), "ties first: expected index"),
        (lambda: recall_at_k(X, Y, similarity="l2"), "similarity l2: expected cosine"),
        (lambda: recall_at_k(X, Y, chunk_size=0), "chunk_size 0: expected 1 or more"),
        (lambda: nmi([0, 1], [0]), r"labels \(2,\) and clusters \(1,\)"),
        (lambda: nmi([0, 1], [0, 1], "mean"), "normalisation mean: expected arithmetic"),
        (lambda: kmeans(X, 5), "k 5: expected 1 to 4"),
        (lambda: kmeans(X), "k and start exclude each other"),
        (lambda: kmeans(X, start=X[:, :2]), "start: 2 channels, expected 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_lone_queries_miss_or_are_left_out():
    x, y = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), [0, 0, 7]
    assert recall_at_k(x, y) == pytest.approx(2 / 3)
    assert recall_at_k(x, y, exclude_lone=True) == 1.0
    assert r_precision(x, y) == 1.0


# --- Clustering


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 60), a=st.integers(1, 6), b=st.integers(1, 6))
def test_nmi_by_its_definition(seed, n, a, b):
    rng = np.random.default_rng(seed)
    y, c = rng.integers(0, a, n), rng.integers(0, b, n)
    information, h = 0.0, []
    for values in (y, c):
        p = np.unique(values, return_counts=True)[1] / n
        h.append(-sum(q * np.log(q) for q in p))
    for k in set(y):
        for m in set(c):
            p = ((y == k) & (c == m)).mean()
            if p:
                information += p * np.log(p / ((y == k).mean() * (c == m).mean()))
    if min(h) == 0:
        assert nmi(y, c) == float(max(h) == 0)
    else:
        assert nmi(y, c) == pytest.approx(2 * information / sum(h), abs=1e-9)
    assert nmi(y, c) == pytest.approx(nmi(c, y), abs=1e-12)
    assert nmi(y, 100 - c) == pytest.approx(nmi(y, c), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kmeans_against_plain_lloyd(dtype, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 999)  # many chunks
    x, _ = clustered(150, 5, seed=2)
    x = x.astype(dtype)
    centroids = x[:9].astype(np.float64)
    centroids[8] = 1e3  # stays empty, and where it is
    found = kmeans(x, start=centroids.astype(dtype), iterations=7)
    for _ in range(7):
        nearest_one = ((x[:, None] - centroids) ** 2).sum(2).argmin(1)
        for k in set(nearest_one):
            centroids[k] = x[nearest_one == k].mean(0)
    np.testing.assert_allclose(found.centroids, centroids, rtol=1e-4)
    assert found.centroids.dtype == dtype
    np.testing.assert_array_equal(found.clusters, ((x[:, None] - centroids) ** 2).sum(2).argmin(1))
    again, other = kmeans(x, 6, seed=1), kmeans(x, 6, seed=2)
    np.testing.assert_array_equal(again.clusters, kmeans(x, 6, seed=1).clusters)
    assert (again.clusters != other.clusters).any()


def test_metrics_of_a_given_ranking_are_those_of_the_search():
    rng = np.random.default_rng(4)
    x, labels = rng.standard_normal((40, 4)), rng.integers(0, 9, 40)
    near = nearest(x, k=39)
    relevant = [(labels == label).sum() - 1 for label in labels]
    hits = labels[near.indices] == labels[:, None]
    for exclude_lone in (False, True):
        expected = retrieval_metrics(x, labels, (1, 3), exclude_lone=exclude_lone)
        assert metrics_of_ranking(hits, relevant, (1, 3), exclude_lone=exclude_lone) == pytest.approx(
            expected
        )
    with pytest.raises(InputError, match=r"2 ranks, expected \d+ or more"):
        metrics_of_ranking(hits[:, :2], relevant, (1,))
    with pytest.raises(InputError, match="one of them above 0"):
        metrics_of_ranking(hits, np.zeros(40))


# --- Approximate search


def clusters(n: int, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(60, 12))[rng.integers(0, 60, n)] + 0.4 * rng.normal(size=(n, 12))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("itself", [True, False])
def test_approximate_search_finds_all_with_all_probes_and_most_with_few(similarity, itself):
    x = clusters(3000)
    queries, gallery = (x, None) if itself else (clusters(200, seed=1), x)
    exactly = nearest(queries, gallery, 5, similarity=similarity)
    every = approximate_nearest(queries, gallery, 5, similarity=similarity, probes=10**6)
    assert (every.indices == exactly.indices).mean() > 0.9999  # float32 decides which five
    np.testing.assert_allclose(every.similarities, exactly.similarities, rtol=1e-6, atol=1e-6)
    few = approximate_nearest(queries, gallery, 5, similarity=similarity, probes=4)
    overlap = [len(set(a) & set(b)) / 5 for a, b in zip(few.indices.tolist(), exactly.indices.tolist())]
    assert 0.8 < np.mean(overlap) < 1
    if itself:
        assert not (few.indices == np.arange(len(x))[:, None]).any()
    again = approximate_nearest(queries, gallery, 5, similarity=similarity, probes=4)
    assert np.array_equal(few.indices, again.indices)


def test_a_query_whose_cells_hold_too_little_sees_all():
    x = clusters(600)
    found = approximate_nearest(x, k=400, probes=1)
    exactly = nearest(x, k=400)
    assert np.array_equal(np.sort(found.indices, axis=1), np.sort(exactly.indices, axis=1))
    np.testing.assert_allclose(found.similarities, exactly.similarities, rtol=1e-12)


def test_approximate_search_says_what_is_wrong(monkeypatch):
    x = clusters(20)
    with pytest.raises(InputError, match="probes 0"):
        approximate_nearest(x, probes=0)
    with pytest.raises(InputError, match="k 20"):
        approximate_nearest(x, k=20)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"attnmap-core\[faiss\]"):
        approximate_nearest(x)
