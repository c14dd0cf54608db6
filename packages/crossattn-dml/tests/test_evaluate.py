"""Measuring: against the definitions, with ties, query and gallery, re-ranking, and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from attnmap_core.data.sources import load_data
from attnmap_core.errors import InputError
from crossattn_dml import EmbeddingModel
from crossattn_dml.cli import main
from crossattn_dml.evaluate import EmbeddedData, embed_data, measure, ties_matter
from crossattn_dml.rerank import reordered, rerank_data
from crossattn_dml.task import load_stack


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def random(n: int, classes: int, seed: int = 0) -> EmbeddedData:
    rng = np.random.default_rng(seed)
    return EmbeddedData(unit(rng.standard_normal((n, 5))), rng.integers(0, classes, n) + 2**24)


def by_hand(query: EmbeddedData, gallery: EmbeddedData | None, ks: tuple[int, ...]) -> dict[str, float]:
    other = gallery or query
    hits = {k: [] for k in ks}
    average, precision = [], []
    for i, (z, label) in enumerate(zip(query.z.astype(float), query.labels)):
        order = sorted(range(len(other.z)), key=lambda j: (-(other.z[j].astype(float) @ z), j))
        same = [other.labels[j] == label for j in order if gallery is not None or j != i]
        for k in ks:
            hits[k].append(any(same[:k]))
        R = sum(same)
        if R:
            precision.append(sum(same[:R]) / R)
            average.append(sum(sum(same[: r + 1]) / (r + 1) for r in range(R) if same[r]) / R)
    return {f"recall@{k}": np.mean(hits[k]) for k in ks} | {
        "r_precision": np.mean(precision),
        "map_at_r": np.mean(average),
    }


@pytest.mark.parametrize("separate", [False, True])
def test_measures_are_the_definitions(separate):
    query, gallery = random(30, 5), random(25, 5, 1) if separate else None
    found = measure(query, gallery, ks=(1, 3))
    assert found == pytest.approx(by_hand(query, gallery, (1, 3)))


def test_bounds_of_ties_tell_collapsed_embeddings():
    collapsed = EmbeddedData(np.ones((6, 2), np.float32) / np.float32(2**0.5), np.array([0, 0, 1, 1, 2, 2]))
    found = measure(collapsed, ks=(1,), ties="bounds")
    assert (found["recall@1_optimistic"], found["recall@1_pessimistic"]) == (1.0, 0.0)
    assert ties_matter(found)
    assert not ties_matter(measure(random(20, 4), ks=(1,), ties="bounds"))


def test_bad_embeddings_and_k():
    broken = random(6, 2)
    broken.z[2, 1] = np.nan
    with pytest.raises(InputError, match="row 2 holds values that are not finite"):
        measure(broken, ks=(1,))
    with pytest.raises(InputError, match="k 6: expected 1 to 5"):
        measure(random(6, 2), ks=(6,))


def test_weights_that_overflowed_are_named(run, source):
    model = EmbeddingModel.from_pretrained(run / "model")
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(InputError, match="embeddings that are not finite"):
        embed_data(model, load_data(source, "test"), progress=False)


def test_embedding_a_data_set_equals_encoding_its_photos(run, source):
    model, data = EmbeddingModel.from_pretrained(run / "model"), load_data(source, "test")
    found = embed_data(model, data, batch_size=5, progress=False)
    np.testing.assert_allclose(found.z, model.encode([sample.image for sample in data]), atol=1e-6)
    np.testing.assert_array_equal(found.labels, data.targets)


def test_command_prints_and_writes(run, source, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "evaluate",
        str(run),
        "--data",
        source,
        "--ks",
        "1",
        "2",
        "--nmi-seeds",
        "2",
        "--ties",
        "bounds",
    ]
    assert main([*arguments, "--rerank", "5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "16 images, 4 classes" in said
    assert "ties at worst" in said
    assert "re-ranked 5" in said
    found = json.loads((out / "metrics.json").read_text())["metrics"]
    trained = json.loads((run / "metrics.json").read_text())["metrics"]
    for name in ("recall@1", "map_at_r", "nmi"):
        assert found["embedding"][name] == pytest.approx(trained[name])
    report = (out / "report.html").read_text()
    assert "Best cases" in report
    assert "16 images of split test, 4 classes" in report


def test_command_refuses(run, source, refused, tmp_path):
    evaluate = ("evaluate", str(run), "--data", source)
    assert "k 99: expected 1 to 15" in refused(*evaluate, "--ks", "99")
    assert "--rerank 16: expected at most 15" in refused(*evaluate, "--rerank", "16", "--nmi-seeds", "0")
    assert "rerank_weight 2.0" in refused(*evaluate, "--rerank", "3", "--rerank-weight", "2")
    assert "no such folder" in refused("evaluate", "nowhere", "--data", source)
    assert "data option size: unknown" in refused(*evaluate, "--data-options.size", "3")
    assert "a stream cannot be searched in" in refused(*evaluate, "--data-options.streaming", "true")
    assert "--batch-size 0" in refused(*evaluate, "--batch-size", "0")
    model = EmbeddingModel.from_pretrained(run / "model")
    model.save_pretrained(tmp_path / "alone")
    assert "expected the stack of a training" in refused(
        "evaluate", str(tmp_path / "alone"), "--data", source, "--rerank", "3"
    )


def test_reordering_keeps_equals_and_mixes_scores():
    assert reordered([[5, 6, 7]], [[0.9, 0.8, 0.7]], [[0.0, 0.0, 0.3]], 0.5).tolist() == [[7, 5, 6]]
    assert reordered([[5, 6, 7]], [[0.3, 0.3, 0.1]], [[0.1, 0.1, 0.9]], 0.0).tolist() == [[5, 6, 7]]
    assert reordered([[5, 6, 7]], [[0.3, 0.3, 0.1]], [[0.1, 0.1, 0.9]], 1.0).tolist() == [[7, 5, 6]]


def test_reranking_by_the_stack_is_that_of_all_pairs(run, source):
    model, data = EmbeddingModel.from_pretrained(run / "model").eval(), load_data(source, "test")
    stack = load_stack(model, run / "model")
    found = embed_data(model, data, progress=False)
    weight, count = 0.7, 6
    metrics = rerank_data(model, run / "model", data, count=count, weight=weight, ks=(1, 2, 8))
    from attnmap_core.data.transforms import eval_transform

    with torch.no_grad():
        said = model(torch.stack([eval_transform(model.preprocessing)(sample.image) for sample in data]))
        S = stack(said.embeddings, said.tokens.half().float(), grid=said.grid)[stack.depth].numpy()
    z = found.z.astype(float)
    cosine = z @ z.T
    hits, relevant = [], []
    for q in range(len(z)):
        order = [j for j in sorted(range(len(z)), key=lambda j: (-cosine[q, j], j)) if j != q]
        head = sorted(order[:count], key=lambda j: -((1 - weight) * cosine[q, j] + weight * S[q, j]))
        same = [found.labels[j] == found.labels[q] for j in head + order[count:]]
        hits.append(same)
        relevant.append(sum(same))
    for k in (1, 2, 8):
        assert metrics[f"recall@{k}"] == pytest.approx(np.mean([any(same[:k]) for same in hits]))
    precision = [sum(same[:R]) / R for same, R in zip(hits, relevant)]
    assert metrics["r_precision"] == pytest.approx(np.mean(precision))
