"""Gradients, attention of triples and parts, against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attnmap_core.errors import InputError
from crossattn_dml import EmbeddingModel
from crossattn_dml.diagnostics import (
    EDGES,
    gradient_histogram,
    part_rectangle,
    salient_locations,
    similar_parts,
    token_gradients,
    triple_maps,
)
from crossattn_dml.model import Embedded
from crossattn_dml.task import ConditionalTraining

TINY = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}


def make(stack: dict | None, **options) -> ConditionalTraining:
    torch.manual_seed(0)
    model = EmbeddingModel("vit", 6, 32, backbone_options=TINY)
    return ConditionalTraining(model, stack, **options)


def batch(b: int = 6) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(b, 3, 32, 32, generator=generator),
        "labels": torch.arange(b) // 2,
        "index": torch.arange(b),
    }


def test_histogram_counts_everything_once():
    values = np.array([0, 0, 1e-20, 1e3, 0.05, -0.05, 10.0**-2, 99.9])
    found = gradient_histogram([values[:4], values[4:].reshape(2, 2)])
    assert (found.zeros, found.underflow, found.overflow) == (2, 1, 1)
    assert found.counts.sum() == 4
    assert found.counts[np.searchsorted(EDGES, np.log10(0.05)) - 1] == 2
    assert found.density().sum() * 0.1 == pytest.approx(1)
    logs = np.log10(np.abs(values[values != 0]))
    assert found.percentiles == pytest.approx(tuple(np.percentile(logs, (5, 50, 95))))
    nothing = gradient_histogram([np.zeros(3)])
    assert (nothing.zeros, nothing.counts.sum()) == (3, 0)
    assert np.isnan(nothing.percentiles).all()


@pytest.mark.parametrize("stack", [None, {"blocks": 2, "heads": 2, "init": "xavier"}])
def test_token_gradients_are_those_of_the_loss(stack):
    training = make(stack)
    [found] = token_gradients(training, [batch()])
    # The same by a finite difference at one entry of the tokens.
    model = training.model.eval()
    tokens: list[torch.Tensor] = []
    model.backbone.register_forward_hook(lambda m, a, out: tokens.append(out.tokens))
    training.eval()
    training(batch()["images"], batch()["labels"], batch()["index"])
    assert found.shape == tuple(tokens[0].shape)
    training.double()

    def loss(shift: float) -> float:
        def move(module, args, out):
            moved = out.tokens.clone()
            moved[1, 3, 4] += shift
            return out._replace(tokens=moved)

        handle = model.backbone.register_forward_hook(move)
        value = training(batch()["images"].double(), batch()["labels"], batch()["index"])["loss"].item()
        handle.remove()
        return value

    difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert abs(difference) == pytest.approx(float(found[1, 3, 4]), rel=1e-3)


def test_at_first_the_method_has_twice_the_gradient_and_normalised_the_same():
    stack = {"blocks": 1, "heads": 2}
    [baseline] = token_gradients(make(None), [batch()])
    [method] = token_gradients(make(stack), [batch()])
    [normalised] = token_gradients(make(stack), [batch()], normalise=True)
    np.testing.assert_allclose(method, 2 * baseline, rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(normalised, baseline, rtol=1e-3, atol=1e-8)
    [tokens] = token_gradients(make(None), [batch()], granularity="token")
    np.testing.assert_allclose(tokens, np.linalg.norm(baseline, axis=2), rtol=1e-5)


def test_looking_at_gradients_leaves_the_model_as_it_was():
    training = make({"blocks": 1, "heads": 2})
    list(token_gradients(training, [batch()]))
    assert training.training
    assert all(p.grad is None for p in training.parameters())
    assert not training.model.backbone._forward_hooks


def test_maps_of_a_triple():
    training = make({"blocks": 3, "heads": 2, "init": "xavier"})
    assert training.stack is not None
    found = Embedded(torch.randn(3, 6), torch.randn(3, 6, 12), (2, 3))
    A = training.stack.attention_maps(found.embeddings, found.tokens, levels=[2])[2].detach().double()
    text = triple_maps(training.stack, found, [2])[2]
    np.testing.assert_allclose(text.upper, A[0, 1].mean(0).reshape(2, 3))
    np.testing.assert_allclose(text.lower, A[0, 2].mean(0).reshape(2, 3))
    np.testing.assert_allclose(text.difference, (text.upper - text.lower) ** 2)
    assert (text.upper.sum(), text.heads.shape) == (pytest.approx(1), (2, 2, 2, 3))
    caption = triple_maps(training.stack, found, [2], direction="caption")[2]
    np.testing.assert_allclose(caption.upper, A[1, 0].mean(0).reshape(2, 3))
    assert caption.difference is None
    with pytest.raises(InputError, match="expected some of 1 to 3"):
        triple_maps(training.stack, found, [4])


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_parts_are_those_of_a_plain_search(chunk):
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((9, 6, 4))
    tokens[3, 2] = 0
    tokens[5] = tokens[2]  # of equals, the smaller image
    found = similar_parts(tokens, 1, 1, 2, (2, 3), most=5, chunk=chunk)
    asked, best = tokens[1, 5], []
    for i in range(9):
        cosines = [
            -np.inf if not t.any() else t @ asked / np.linalg.norm(t) / np.linalg.norm(asked)
            for t in tokens[i]
        ]
        if i != 1:
            best.append((-max(cosines), i, int(np.argmax(cosines))))
    for part, (value, image, place) in zip(found, sorted(best)):
        assert (part.image, 3 * part.row + part.col) == (image, place)
        assert part.cosine == pytest.approx(-value)


def test_parts_refuse_what_has_no_direction_or_place():
    tokens = np.ones((2, 4, 3))
    tokens[0, 3] = 0
    with pytest.raises(InputError, match="all 0 and have no direction"):
        similar_parts(tokens, 0, 1, 1, (2, 2))
    with pytest.raises(InputError, match="expected an image of 0 to 1"):
        similar_parts(tokens, 2, 0, 0, (2, 2))


def test_rectangles_stay_inside():
    for row in range(7):
        x0, y0, x1, y1 = part_rectangle(row, 6, (7, 7), (224, 112))
        assert 0 <= x0 < x1 == 224
        assert 0 <= y0 < y1 <= 112
        assert (x1 - x0, y1 - y0) == (96, 48)
    assert part_rectangle(0, 0, (1, 1), (50, 40)) == (0, 0, 50, 40)


def test_salient_locations_keep_their_distance():
    weights = np.zeros((4, 4))
    weights[1, 1], weights[1, 2], weights[3, 3] = 3, 2, 1
    assert salient_locations(weights) == [(1, 1), (3, 3)]
