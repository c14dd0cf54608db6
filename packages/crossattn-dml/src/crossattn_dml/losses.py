r"""Losses on the similarities of a batch, and their sum over the levels of a stack (section 4).

The pair and triplet losses take any similarity matrix ``S (b, b)``, also one that is not symmetric: row anchor, column
candidate, diagonal ignored. ``present (b, b)`` says which pairs there are; the others, whatever ``S`` holds there, are
absent and not merely dissimilar. A loss without any pair is 0 with a gradient of 0. The proxy losses are those of
pytorch-metric-learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from attnmap_core.data.loaders import import_training_extra
from attnmap_core.errors import InputError
from torch import Tensor, nn
from torch.nn import functional

from .cross_attention import unit

LossName = Literal[
    "multi_similarity", "triplet", "margin", "contrastive", "nt_xent", "proxy_anchor", "normalised_softmax"
]
Miner = Literal["distance", "semihard", "softhard", "random"]
Supervise = Literal["last", "all", "increasing"]

PROXY_LOSSES = ("proxy_anchor", "normalised_softmax")
TRIPLET_LOSSES = ("triplet", "margin")


def pair_masks(labels: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``Pos`` and ``Neg``, ``(b, b)`` bool: pairs of one class without the diagonal, and pairs of two.

    Example:
        >>> positive, negative = pair_masks(torch.tensor([4, 4, 9]))
        >>> positive.sum().item(), negative.sum().item()
        (2, 4)
    """
    same = labels[:, None] == labels[None]
    there = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if present is not None:
        there = there & present
    return same & there, ~same & there


def distances(S: Tensor, eps: float = 1e-8) -> Tensor:
    r"""``(b, b)`` Euclidean distances of unit vectors, :math:`D = \sqrt{\max(2 - 2S, 0) + eps}`.

    Example:
        >>> distances(torch.tensor([[0.0, 0.5]]), eps=0.0)
        tensor([[1.4142, 1.0000]])
    """
    squared = (2 - 2 * S).clamp_min(0) + eps
    zero = squared == 0  # its square root has no gradient
    return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


@torch.no_grad()
def mine(S: Tensor, positive: Tensor, negative: Tensor, epsilon: float = 0.1) -> tuple[Tensor, Tensor]:
    """Multi-similarity's mining: the pairs of each anchor that violate its order, give or take ``epsilon``.

    Args:
        S: ``(b, b)`` similarities.
        positive, negative: masks of :func:`pair_masks`.
        epsilon: larger keeps more.

    Returns:
        The positives less similar than the most similar negative plus ``epsilon``, and the negatives more similar than
        the least similar positive less ``epsilon``; nothing of anchors that lack either kind.

    Example:
        >>> S = torch.tensor([[1.0, 0.1, 0.5], [0.1, 1.0, -0.9], [0.5, -0.9, 1.0]])
        >>> kept = mine(S, *pair_masks(torch.tensor([0, 0, 1])))
        >>> [mask.int().tolist() for mask in kept]
        [[[0, 1, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0], [0, 0, 0]]]
    """
    hardest = S.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    nearest = S.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    some = positive.any(1, keepdim=True) & negative.any(1, keepdim=True)
    return positive & some & (S - epsilon < nearest), negative & some & (S + epsilon > hardest)


# --- Losses on all pairs --------------------------------------------------------------------------------------


def multi_similarity(
    S: Tensor,
    labels: Tensor,
    present: Tensor | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 40.0,
    threshold: float = 0.5,
    epsilon: float | None = 0.1,
    reduction: Literal["anchors", "batch"] = "anchors",
) -> Tensor:
    r"""Multi-similarity loss, with its own mining of pairs.

    .. math:: \ell_i = \tfrac1\alpha \log(1 + \sum_{j} e^{-\alpha (S_{ij} - \lambda)})
              + \tfrac1\beta \log(1 + \sum_{k} e^{\beta (S_{ik} - \lambda)})

    over the positives ``j`` that are less similar than the most similar negative plus ``epsilon``, and the negatives
    ``k`` that are more similar than the least similar positive less ``epsilon``.

    Args:
        S, labels, present: see the top of this module.
        alpha, beta: sharpness for positives and negatives.
        threshold: λ.
        epsilon: of the mining; None keeps all pairs.
        reduction: ``"anchors"`` is the mean over the anchors that keep both a positive and a negative; ``"batch"``
            what pytorch-metric-learning does: every anchor counts with the pairs it keeps, if only of one kind.

    Returns:
        A scalar, 0 or more.

    Example:
        >>> S = torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, 0.1], [0.2, 0.1, 1.0]])
        >>> multi_similarity(S, torch.tensor([0, 0, 1])).item()  # no pair violates its margin
        0.0

    References:
        Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019.
    """
    positive, negative = pair_masks(labels, present)
    if epsilon is not None:
        positive, negative = mine(S, positive, negative, epsilon)
    pull = _log1p_sum_exp(-alpha * (S - threshold), positive) / alpha
    push = _log1p_sum_exp(beta * (S - threshold), negative) / beta
    if reduction == "batch":
        return (pull + push).sum() / len(labels)
    kept = positive.any(1) & negative.any(1)
    return torch.where(kept, pull + push, 0).sum() / kept.sum().clamp_min(1)


def _log1p_sum_exp(values: Tensor, mask: Tensor) -> Tensor:
    """``log(1 + sum of exp)`` of each row over the mask."""
    masked = values.masked_fill(~mask, -torch.inf)
    return torch.cat([masked, masked.new_zeros(len(masked), 1)], dim=1).logsumexp(1)


def contrastive(
    S: Tensor,
    labels: Tensor,
    present: Tensor | None = None,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """Contrastive loss on distances: means of the hinges above 0, of positive and of negative pairs, added.

    Args:
        S, labels, present: see the top of this module.
        positive_margin: distance that positives should not exceed.
        negative_margin: distance that negatives should keep.
        eps: of :func:`distances`.

    Example:
        >>> round(contrastive(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([0, 0])).item(), 6)
        1.0
    """
    positive, negative = pair_masks(labels, present)
    D = distances(torch.where(positive | negative, S, 0), eps)
    pull = torch.where(positive, (D - positive_margin).clamp_min(0), 0)
    push = torch.where(negative, (negative_margin - D).clamp_min(0), 0)
    return _mean_of_positive(pull) + _mean_of_positive(push)


def nt_xent(S: Tensor, labels: Tensor, present: Tensor | None = None, *, temperature: float = 0.07) -> Tensor:
    r"""Supervised NT-Xent: cross-entropy of each positive pair against the negatives of its anchor, mean over pairs.

    .. math:: \ell_{ij} = -\log \frac{e^{S_{ij}/\tau}}{e^{S_{ij}/\tau} + \sum_{k \in Neg(i)} e^{S_{ik}/\tau}}

    Args:
        S, labels, present: see the top of this module.
        temperature: τ.

    Example:
        >>> S = torch.zeros(3, 3)
        >>> round(nt_xent(S, torch.tensor([0, 0, 1])).item(), 4)  # one positive, one negative
        0.6931
    """
    positive, negative = pair_masks(labels, present)
    logits = S / temperature
    # Not infinity: a row of nothing else has no gradient that a mask could take away.
    others = logits.masked_fill(~negative, torch.finfo(S.dtype).min).logsumexp(1, keepdim=True)
    positive = positive & negative.any(1, keepdim=True)  # alone, a positive pair has no cross-entropy
    gap = torch.where(positive, others - torch.where(positive, logits, 0), 0)
    return torch.where(positive, functional.softplus(gap), 0).sum() / positive.sum().clamp_min(1)


def _mean_of_positive(terms: Tensor) -> Tensor:
    return terms.sum() / (terms > 0).sum().clamp_min(1)


# --- Losses on triplets ---------------------------------------------------------------------------------------


def triplet(
    S: Tensor,
    triplets: Tensor,
    *,
    margin: float = 0.2,
    squared: bool = True,
    reduction: Literal["mean", "avg_nonzero"] = "mean",
    eps: float = 1e-8,
) -> Tensor:
    r"""Triplet loss, :math:`\max(0, D_{ap} - D_{an} + margin)`, of squared distances or of distances.

    Args:
        S: ``(b, b)`` similarities.
        triplets: ``(m, 3)`` anchor, positive, negative; ``m`` may be 0.
        margin: 0 or more.
        squared: of distances.
        reduction: mean over all triplets, or over those above 0.
        eps: of :func:`distances`.

    Example:
        >>> S = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.0], [0.5, 0.0, 1.0]])
        >>> round(triplet(S, torch.tensor([[0, 1, 2]])).item(), 6)
        0.2
    """
    anchor, positive, negative = triplets.unbind(1)
    near, far = distances(S[anchor, positive], eps), distances(S[anchor, negative], eps)
    if squared:
        near, far = near.square(), far.square()
    terms = (near - far + margin).clamp_min(0)
    return _mean_of_positive(terms) if reduction == "avg_nonzero" else terms.sum() / max(len(terms), 1)


def margin(
    S: Tensor, triplets: Tensor, boundaries: Tensor | float, *, margin: float = 0.2, eps: float = 1e-8
) -> Tensor:
    r"""Margin loss: :math:`\max(0, D_{ap} - \beta + m)` and :math:`\max(0, \beta - D_{an} + m)`, over those above 0.

    Args:
        S: ``(b, b)`` similarities.
        triplets: ``(m, 3)`` anchor, positive, negative; ``m`` may be 0.
        boundaries: β, ``(m,)`` of each triplet's anchor, or one for all.
        margin: ``m``.
        eps: of :func:`distances`.

    Example:
        >>> S = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.0], [0.5, 0.0, 1.0]])
        >>> round(margin(S, torch.tensor([[0, 1, 2]]), 1.0).item(), 6)
        0.2

    References:
        Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017.
    """
    anchor, positive, negative = triplets.unbind(1)
    pull = (distances(S[anchor, positive], eps) - boundaries + margin).clamp_min(0)
    push = (boundaries - distances(S[anchor, negative], eps) + margin).clamp_min(0)
    return _mean_of_positive(torch.cat([pull, push]))


@torch.no_grad()
def distance_weights(
    S: Tensor,
    labels: Tensor,
    dim: int,
    present: Tensor | None = None,
    *,
    lower: float = 0.5,
    upper: float | None = None,
) -> Tensor:
    r"""Probability of each negative in distance-weighted sampling.

    The inverse of how often a distance occurs between points of the unit sphere of ``dim`` dimensions:
    :math:`\log w = (2 - d) \log D - \tfrac{d-3}{2} \log(1 - D^2/4)`.

    Args:
        S, labels, present: see the top of this module.
        dim: of the embeddings.
        lower: distances below count as this one.
        upper: candidates further away are left out; None takes all.

    Returns:
        ``(b, b)``; rows sum to 1, or are 0 where no candidate is.

    Example:
        >>> distance_weights(torch.eye(3), torch.tensor([0, 0, 1]), dim=8)[0]
        tensor([0., 0., 1.])
    """
    _, negative = pair_masks(labels, present)
    distance = (2 - 2 * torch.where(negative, S, 0)).clamp_min(0).sqrt()
    if upper is not None:
        negative = negative & (distance < upper)
    distance = distance.clamp_min(lower)
    # Opposite points are as rare as coinciding ones: the logarithm of 0 is kept finite.
    log = (2.0 - dim) * distance.log() - (dim - 3.0) / 2 * (1 - distance.square() / 4).clamp_min(1e-8).log()
    log = log.masked_fill(~negative, -torch.inf)
    return torch.where(negative.any(1, keepdim=True), log.softmax(1), 0)


@torch.no_grad()
def sample_triplets(
    S: Tensor,
    labels: Tensor,
    dim: int,
    present: Tensor | None = None,
    *,
    miner: Miner = "distance",
    margin: float = 0.2,
    upper: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One triplet for each anchor that has a positive and a negative.

    Args:
        S, labels, present: see the top of this module; ``S`` of level 0, so that all levels share their triplets.
        dim: of the embeddings, for ``"distance"``.
        miner: how the negative is chosen; the positive is any. ``"distance"``: :func:`distance_weights`;
            ``"semihard"``: further than the positive, by less than ``margin``; ``"softhard"``: nearer than the
            furthest positive; both take any negative where there is none such. ``"random"``: any.
        margin: of ``"semihard"``.
        upper: of ``"distance"``; an anchor left without a candidate has no triplet.
        generator: of the device of ``S``.

    Returns:
        ``(m, 3)`` anchor, positive, negative; ``m`` may be 0.

    Example:
        >>> sample_triplets(torch.eye(3), torch.tensor([0, 0, 1]), dim=8).tolist()
        [[0, 1, 2], [1, 0, 2]]
    """
    positive, negative = pair_masks(labels, present)
    usable = positive.any(1) & negative.any(1)
    pick = torch.where(usable[:, None], positive, True).to(torch.float32)
    chosen = torch.multinomial(pick, 1, generator=generator)
    if miner == "distance":
        weights = distance_weights(S, labels, dim, present, upper=upper).to(torch.float32)
        usable = usable & weights.any(1)
    else:
        distance = distances(torch.where(positive | negative, S, 0))
        wanted = negative
        if miner == "semihard":
            near = distance.gather(1, chosen)
            wanted = negative & (distance > near) & (distance < near + margin)
        elif miner == "softhard":
            furthest = distance.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
            wanted = negative & (distance < furthest)
        weights = torch.where(wanted.any(1, keepdim=True), wanted, negative).to(torch.float32)
    drawn = torch.multinomial(torch.where(usable[:, None], weights, 1), 1, generator=generator)
    anchors = torch.arange(len(S), device=S.device)[:, None]
    return torch.cat([anchors, chosen, drawn], dim=1)[usable]


# --- The loss of a step (section 4.1) -------------------------------------------------------------------------


class LevelLosses(NamedTuple):
    """What :class:`ConditionalEmbeddingLoss` gives.

    Attributes:
        total: with gradient.
        unconditional: the loss on level 0.
        conditional: weighted mean over the supervised levels; 0 where there are none.
    """

    total: Tensor
    unconditional: Tensor
    conditional: Tensor


class ConditionalEmbeddingLoss(nn.Module):
    r"""One loss on the unconditional similarities and on those of the supervised levels.

    .. math:: L = w_0\, \ell(S^0) + \lambda\, \frac{\sum_n \omega_n \ell(S^n)}{\sum_n \omega_n}

    Args:
        loss: name of ℓ.
        weight: λ.
        unconditional_weight: :math:`w_0`; with 0 the embedding is trained through the stack alone.
        supervise: ``"last"`` level; ``"all"`` of them alike; ``"increasing"`` with :math:`\omega_n = n`.
        miner: of the losses on triplets, see :func:`sample_triplets`.
        num_classes: training classes, for proxies and the margin loss's boundaries.
        dim: of the embeddings, for proxies and distance-weighted sampling.
        boundary: β of the margin loss at first; one is learnt for each class.
        upper: of distance-weighted sampling.
        **options: of ℓ: of the function of this module, or of the class of pytorch-metric-learning.

    Raises:
        InputError: for unknown names, numbers out of range, sizes that the loss needs and does not get, and where
            pytorch-metric-learning is missing for a loss with proxies.

    Example:
        >>> loss = ConditionalEmbeddingLoss()
        >>> S = torch.tensor([[1.0, 0.2, 0.6], [0.2, 1.0, 0.1], [0.6, 0.1, 1.0]])
        >>> parts = loss({0: S, 2: S}, torch.tensor([0, 0, 1]))
        >>> bool(parts.total == 2 * parts.unconditional)
        True
    """

    def __init__(
        self,
        loss: LossName = "multi_similarity",
        *,
        weight: float = 1.0,
        unconditional_weight: float = 1.0,
        supervise: Supervise = "last",
        miner: Miner = "distance",
        num_classes: int | None = None,
        dim: int | None = None,
        boundary: float = 1.2,
        upper: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        known = (*_PAIR_LOSSES, *TRIPLET_LOSSES, *PROXY_LOSSES)
        _check("loss", loss, loss in known, " or ".join(known))
        _check("weight", weight, weight >= 0, "0 or more")
        _check("unconditional_weight", unconditional_weight, unconditional_weight >= 0, "0 or more")
        _check("supervise", supervise, supervise in ("last", "all", "increasing"), "last, all or increasing")
        miners = ("distance", "semihard", "softhard", "random")
        _check("miner", miner, miner in miners, " or ".join(miners))
        if loss in ("margin", *PROXY_LOSSES):
            _check("num_classes", num_classes, (num_classes or 0) >= 1, f"the training classes, for {loss}")
        if loss in (*TRIPLET_LOSSES, *PROXY_LOSSES):
            _check("dim", dim, (dim or 0) >= 1, f"channels of the embeddings, for {loss}")
        self.loss: LossName = loss
        self.supervise: Supervise = supervise
        self.miner: Miner = miner
        self.weight, self.unconditional_weight = weight, unconditional_weight
        self.dim, self.upper, self.options = dim or 0, upper, options
        if loss == "margin":
            self.boundaries = nn.Parameter(torch.full((num_classes or 0,), boundary))
        if loss in PROXY_LOSSES:
            losses = import_training_extra("pytorch_metric_learning.losses")
            kind = losses.ProxyAnchorLoss if loss == "proxy_anchor" else losses.NormalizedSoftmaxLoss
            self.proxies: nn.Module = kind(num_classes, dim, **options)

    @property
    def takes_embeddings(self) -> bool:
        """True for losses with proxies: levels are then embeddings, not similarities."""
        return self.loss in PROXY_LOSSES

    def level_weights(self, depth: int) -> dict[int, float]:
        """:math:`\\omega_n` of the supervised levels of a stack of ``depth`` blocks.

        Example:
            >>> ConditionalEmbeddingLoss(supervise="increasing").level_weights(3)
            {1: 1.0, 2: 2.0, 3: 3.0}
        """
        if self.supervise == "last":
            return {depth: 1.0} if depth else {}
        return {n: float(n) if self.supervise == "increasing" else 1.0 for n in range(1, depth + 1)}

    def forward(
        self,
        levels: Mapping[int, Tensor],
        labels: Tensor,
        present: Tensor | None = None,
        *,
        partners: Tensor | None = None,
        weight: float | None = None,
        generator: torch.Generator | None = None,
    ) -> LevelLosses:
        """The loss of a batch.

        Args:
            levels: by level, which must hold 0: ``(b, b)`` similarities. Each further one counts as ``supervise``
                says, those that it does not supervise not at all; without any, this is the baseline. For losses with
                proxies instead embeddings, ``(b, d)`` on level 0 and ``(b, m, d)`` given each of ``m`` partners above.
            labels: ``(b,)`` class ids, in ``0..num_classes-1`` where classes have parameters.
            present: ``(b, b)`` bool, pairs that there are; default all but the diagonal.
            partners: ``(m,)`` who they are, so that no image is taken given itself; for proxies.
            weight: λ of this step instead of the usual one.
            generator: of the triplets.
        """
        weights = self.level_weights(max(levels))
        if self.takes_embeddings:
            values = {
                n: self._proxy_loss(levels[n], labels, present, partners)
                for n in (0, *weights)
                if n in levels
            }
        else:
            values = self._matrix_losses(
                {n: levels[n] for n in (0, *weights) if n in levels}, labels, present, generator
            )
        missing = [n for n in weights if n not in values]
        if missing:
            raise ValueError(f"supervise={self.supervise!r} needs level {missing[0]}, got {sorted(levels)}")
        conditional = torch.zeros_like(values[0])
        if weights:
            conditional = sum((w * values[n] for n, w in weights.items()), conditional) / sum(
                weights.values()
            )
        factor = self.weight if weight is None else weight
        total = self.unconditional_weight * values[0] + factor * conditional
        return LevelLosses(total, values[0], conditional)

    def _matrix_losses(
        self,
        levels: Mapping[int, Tensor],
        labels: Tensor,
        present: Tensor | None,
        generator: torch.Generator | None,
    ) -> dict[int, Tensor]:
        positive, negative = pair_masks(labels, present)
        there = positive | negative
        # What is absent may hold NaN, which would reach the gradients even through a mask.
        levels = {n: torch.where(there, S, 0) for n, S in levels.items()}
        if self.loss in _PAIR_LOSSES:
            function: Any = _PAIR_LOSSES[self.loss]
            return {n: function(S, labels, there, **self.options) for n, S in levels.items()}
        triplets = sample_triplets(
            levels[0], labels, self.dim, there, miner=self.miner, upper=self.upper, generator=generator
        )
        if self.loss == "triplet":
            return {n: triplet(S, triplets, **self.options) for n, S in levels.items()}
        boundaries = self.boundaries[labels[triplets[:, 0]]]
        return {n: margin(S, triplets, boundaries, **self.options) for n, S in levels.items()}

    def _proxy_loss(
        self, embeddings: Tensor, labels: Tensor, present: Tensor | None, partners: Tensor | None
    ) -> Tensor:
        embeddings = unit(embeddings)
        if embeddings.ndim == 2:
            return self.proxies(embeddings, labels)
        if partners is None:
            raise ValueError("conditional embeddings need the indices of their partners")
        total = embeddings.sum() * 0
        for place, partner in enumerate(partners.tolist()):
            given = torch.arange(len(labels), device=labels.device) != partner
            if present is not None:
                given = given & present[:, partner]
            if given.any():
                total = total + self.proxies(embeddings[given, place], labels[given])
        return total / max(len(partners), 1)


_PAIR_LOSSES = {"multi_similarity": multi_similarity, "contrastive": contrastive, "nt_xent": nt_xent}


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} {value}: expected {expected}; change {name}")
