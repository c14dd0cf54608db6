"""The losses against pytorch-metric-learning and by hand; pairs absent, alone or alike; the sum over levels."""

from __future__ import annotations

import math

import pytest
import torch
from attnmap_core.errors import InputError
from crossattn_dml import ConditionalEmbeddingLoss
from crossattn_dml.losses import (
    contrastive,
    distance_weights,
    distances,
    margin,
    mine,
    multi_similarity,
    nt_xent,
    pair_masks,
    sample_triplets,
    triplet,
)
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor
from torch.nn import functional

PAIRS = {"multi_similarity": multi_similarity, "contrastive": contrastive, "nt_xent": nt_xent}


def batch(seed: int = 0, b: int = 12, d: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (b,), generator=generator)
    means = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    z = means[labels] + torch.randn(b, d, generator=generator, dtype=torch.float64)
    return functional.normalize(z, dim=1), labels


def circle(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    z = torch.stack([angle.cos(), angle.sin()], dim=1)
    return z @ z.T


def all_triplets(labels: Tensor) -> Tensor:
    return torch.stack(loss_and_miner_utils.get_all_triplets_indices(labels), dim=1)


def check_against(ours, theirs, seed: int) -> None:
    """Value and gradient in the embeddings."""
    z, labels = batch(seed)
    found = []
    for function in (lambda z: ours(z @ z.T, labels), lambda z: theirs(z, labels)):
        leaf = z.clone().requires_grad_()
        value = function(functional.normalize(leaf, dim=1))
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_losses_of_pytorch_metric_learning(seed):
    ms = pml_losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5)
    check_against(lambda S, y: multi_similarity(S, y, epsilon=None, reduction="batch"), ms, seed)
    miner = pml_miners.MultiSimilarityMiner(epsilon=0.1)
    check_against(
        lambda S, y: multi_similarity(S, y, reduction="batch"), lambda z, y: ms(z, y, miner(z, y)), seed
    )
    check_against(lambda S, y: contrastive(S, y, eps=0), pml_losses.ContrastiveLoss(0, 1), seed)
    check_against(lambda S, y: contrastive(S, y, positive_margin=0.4, negative_margin=1.3, eps=0),
                  pml_losses.ContrastiveLoss(0.4, 1.3), seed)  # fmt: skip
    check_against(nt_xent, pml_losses.NTXentLoss(temperature=0.07), seed)
    check_against(
        lambda S, y: triplet(S, all_triplets(y), margin=0.05, squared=False, reduction="avg_nonzero", eps=0),
        pml_losses.TripletMarginLoss(margin=0.05),
        seed,
    )
    check_against(
        lambda S, y: margin(S, all_triplets(y), 1.25, eps=0),
        pml_losses.MarginLoss(margin=0.2, beta=1.25),
        seed,
    )


def test_multi_similarity_by_hand():
    S = circle(0, 60, 90, 180)  # of image 0: 1/2, 0, -1
    labels = torch.tensor([0, 0, 1, 1])
    # 0: positive 1/2 kept (1/2 - 0.1 < 0? no): nothing violates. 2: positive 0, negatives 0 and cos 30: all kept.
    kept = mine(S, *pair_masks(labels))
    assert kept[0].int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert kept[1].int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    root = math.sqrt(3) / 2
    one = math.log1p(math.exp(0)) / 2 + math.log1p(math.exp(40 * (root - 0.5))) / 40
    two = math.log1p(math.exp(1)) / 2 + math.log1p(math.exp(-20) + math.exp(40 * (root - 0.5))) / 40
    assert multi_similarity(S, labels).item() == pytest.approx((one + two) / 2, rel=1e-12)
    assert multi_similarity(S, labels, reduction="batch").item() == pytest.approx((one + two) / 4, rel=1e-12)


def test_rows_are_anchors():
    S = torch.tensor([[0, 0.2, 0.9], [0.8, 0, -0.5], [0.3, 0.1, 0]], dtype=torch.float64)  # not symmetric
    labels = torch.tensor([0, 0, 1])
    expected = math.log1p(math.exp(-2 * -0.3)) / 2 + math.log1p(math.exp(40 * 0.4)) / 40  # anchor 0 alone
    assert multi_similarity(S, labels).item() == pytest.approx(expected, rel=1e-12)
    assert multi_similarity(S.T, labels).item() != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [*PAIRS, "triplet", "margin"])
@pytest.mark.parametrize(
    "case", ["one class", "all alone", "one image", "all equal", "opposite", "nothing present"]
)
def test_no_pair_is_no_loss_and_never_nan(name, case):
    b = 1 if case == "one image" else 6
    labels = torch.zeros(b, dtype=torch.int64) if case == "one class" else torch.arange(b)
    if case in ("all equal", "opposite", "nothing present"):
        labels = torch.arange(b) // 2
    u = torch.randn(b, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = {
        "all equal": torch.ones_like(u),
        "opposite": torch.ones_like(u) * (1 - 2 * (labels[:, None] % 2)),
    }.get(case, u)
    u = u.clone().requires_grad_()
    z = functional.normalize(u, dim=1)
    present = torch.zeros(b, b, dtype=torch.bool) if case == "nothing present" else None
    loss = ConditionalEmbeddingLoss(name, num_classes=6, dim=4).double()
    parts = loss({0: z @ z.T, 2: z @ z.T}, labels, present)
    parts.total.backward()
    assert torch.isfinite(parts.total)
    assert torch.isfinite(u.grad).all()
    pushes = name == "contrastive" and case == "all alone"  # negatives alone are enough for it
    pulls = name == "contrastive" and case == "one class"
    if case in ("one image", "one class", "all alone", "nothing present") and not pushes and not pulls:
        assert parts.total == 0
        assert not u.grad.any()


@pytest.mark.parametrize("name", [*PAIRS, "triplet", "margin"])
@pytest.mark.parametrize("hole", [math.nan, math.inf, 0.0, 5.0])
def test_absent_pairs_do_not_exist(name, hole):
    """The loss of a batch with images 8.. absent is that of the first eight alone."""
    z, _ = batch(1)
    labels = torch.arange(12) // 2 % 4
    present = torch.zeros(12, 12, dtype=torch.bool)
    present[:8, :8] = True
    options = {"reduction": "anchors"} if name == "multi_similarity" else {}
    loss = ConditionalEmbeddingLoss(name, num_classes=4, dim=6, miner="random", **options).double()
    leaf = z.clone().requires_grad_()
    S = (leaf @ leaf.T).masked_fill(~present, hole)
    if name in ("triplet", "margin"):  # which triplets are drawn is not compared, only that none is absent
        drawn = sample_triplets(S.detach(), labels, 6, present, miner="random")
        assert drawn.max() < 8
        assert len(drawn) == 8
        value = loss({0: S, 1: S}, labels, present).total
    else:
        value = loss({0: S, 1: S}, labels, present).total
        small = (z @ z.T)[:8, :8]
        expected = loss({0: small, 1: small}, labels[:8]).total
        torch.testing.assert_close(value, expected)
    value.backward()
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[8:].any()


def test_diagonal_is_never_looked_at():
    z, labels = batch(2)
    S = z @ z.T
    for name, function in PAIRS.items():
        values = {function(S.clone().fill_diagonal_(x), labels).item() for x in (1.0, -7.0, 7.0)}
        assert len(values) == 1, name


def test_distances_have_a_gradient_at_zero():
    S = torch.tensor([1.0, 1.0 + 1e-9, 0.5], dtype=torch.float64, requires_grad=True)
    for eps in (0.0, 1e-8):
        [gradient] = torch.autograd.grad(distances(S, eps).sum(), S)
        assert torch.isfinite(gradient).all()
    assert distances(S, 0.0)[2].item() == pytest.approx(1.0)


# --- Triplets


@pytest.mark.parametrize("miner", ["distance", "semihard", "softhard", "random"])
def test_triplets_are_of_the_asked_kind(miner):
    seen: set[tuple[int, ...]] = set()
    for seed in range(500):
        z, labels = batch(3)
        S = z @ z.T
        drawn = sample_triplets(S, labels, 6, miner=miner, generator=torch.Generator().manual_seed(seed))
        positive, negative = pair_masks(labels)
        anchors = drawn[:, 0]
        assert anchors.tolist() == (positive.any(1) & negative.any(1)).nonzero()[:, 0].tolist()
        assert positive[anchors, drawn[:, 1]].all()
        assert negative[anchors, drawn[:, 2]].all()
        seen |= {tuple(row) for row in drawn.tolist()}
        D = distances(S)
        for a, p, n in drawn.tolist():
            others = D[a][negative[a]]
            if miner == "semihard":
                wanted = (others > D[a, p]) & (others < D[a, p] + 0.2)
                assert not wanted.any() or D[a, p] < D[a, n] < D[a, p] + 0.2
            if miner == "softhard":
                furthest = D[a][positive[a]].max()
                assert not (others < furthest).any() or D[a, n] < furthest
    every = {tuple(row) for row in all_triplets(labels).tolist()}
    assert seen <= every
    assert seen == every or miner != "random"


def test_distance_weights_follow_the_density_of_distances():
    z, labels = batch(4, b=20, d=9)
    found = distance_weights(z @ z.T, labels, 9)
    for i in range(20):
        weights = []
        for j in range(20):
            D = max(math.sqrt(max(2 - 2 * float(z[i] @ z[j]), 0)), 0.5)
            density = D ** (9 - 2) * (1 - D * D / 4) ** ((9 - 3) / 2)
            weights.append(0.0 if labels[i] == labels[j] else 1 / density)
        expected = torch.tensor(weights, dtype=torch.float64)
        torch.testing.assert_close(found[i], expected / expected.sum(), rtol=1e-9, atol=1e-12)
    none = distance_weights(z @ z.T, labels, 9, upper=0.01)
    assert not none.any()
    assert not len(sample_triplets(z @ z.T, labels, 9, upper=0.01))
    opposite = distance_weights(-torch.ones(3, 3), torch.arange(3), 128)
    torch.testing.assert_close(opposite.sum(1), torch.ones(3))


def test_triplets_of_level_0_serve_all_levels():
    z, labels = batch(5)
    S = z @ z.T
    loss = ConditionalEmbeddingLoss("triplet", dim=6, supervise="all", weight=1.0)
    generator = torch.Generator().manual_seed(1)
    parts = loss({0: S, 1: S, 2: S}, labels, generator=generator)
    assert parts.conditional.item() == pytest.approx(parts.unconditional.item(), rel=1e-12)


# --- Levels


@pytest.mark.parametrize(
    ("supervise", "weights"),
    [("last", {3: 1}), ("all", {1: 1, 2: 1, 3: 1}), ("increasing", {1: 1, 2: 2, 3: 3})],
)
def test_total(supervise, weights):
    labels = batch(6)[1]
    levels = {}
    for n in range(4):
        z, _ = batch(6 + n)
        levels[n] = z @ z.T
    loss = ConditionalEmbeddingLoss(supervise=supervise, weight=0.3, unconditional_weight=0.7)
    each = {n: multi_similarity(S, labels).item() for n, S in levels.items()}
    mean = sum(w * each[n] for n, w in weights.items()) / sum(weights.values())
    parts = loss(levels, labels)
    assert parts.conditional.item() == pytest.approx(mean, rel=1e-12)
    assert parts.total.item() == pytest.approx(0.7 * each[0] + 0.3 * mean, rel=1e-12)
    assert loss(levels, labels, weight=0.0).total.item() == pytest.approx(0.7 * each[0], rel=1e-12)
    baseline = loss({0: levels[0]}, labels)
    assert baseline.total.item() == pytest.approx(0.7 * each[0], rel=1e-12)
    assert baseline.conditional == 0
    if supervise != "last":
        with pytest.raises(ValueError, match="needs level 1"):
            loss({0: levels[0], 3: levels[3]}, labels)


@pytest.mark.parametrize("name", ["proxy_anchor", "normalised_softmax"])
def test_proxies_see_each_partner_apart_and_no_image_given_itself(name):
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 1, 2])
    u = torch.randn(4, 6, dtype=torch.float64)
    given = torch.randn(4, 2, 6, dtype=torch.float64)
    loss = ConditionalEmbeddingLoss(name, num_classes=3, dim=6).double()
    kind = pml_losses.ProxyAnchorLoss if name == "proxy_anchor" else pml_losses.NormalizedSoftmaxLoss
    reference = kind(3, 6).double()
    reference.load_state_dict(loss.proxies.state_dict())
    parts = loss({0: u, 2: given}, labels, partners=torch.tensor([3, 0]))
    p = functional.normalize(given, dim=-1)
    expected = (reference(p[:3, 0], labels[:3]) + reference(p[1:, 1], labels[1:])) / 2
    torch.testing.assert_close(parts.unconditional, reference(functional.normalize(u, dim=1), labels))
    torch.testing.assert_close(parts.conditional, expected)
    with pytest.raises(ValueError, match="indices of their partners"):
        loss({0: u, 2: given}, labels)


def test_boundaries_of_the_margin_loss_are_learnt_for_each_class():
    z, labels = batch(7, b=16)
    loss = ConditionalEmbeddingLoss("margin", num_classes=9, dim=6, boundary=0.6).double()
    assert loss.boundaries.tolist() == pytest.approx([0.6] * 9)
    loss({0: z @ z.T}, labels).total.backward()
    assert loss.boundaries.grad[labels.unique()].any()
    assert not loss.boundaries.grad[4:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "arcface"}, "loss arcface: expected multi_similarity or contrastive"),
        ({"weight": -1.0}, "weight -1.0: expected 0 or more"),
        ({"supervise": "first"}, "supervise first: expected last, all or increasing"),
        ({"miner": "easy"}, "miner easy: expected distance"),
        ({"loss": "margin", "dim": 4}, "num_classes None: expected the training classes, for margin"),
        ({"loss": "triplet"}, "dim None: expected channels of the embeddings, for triplet"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        ConditionalEmbeddingLoss(**options)
