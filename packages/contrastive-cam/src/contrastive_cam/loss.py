r"""The contrastive attention map loss: maps of an image and of its transformation should agree, others differ.

Ki et al., "Contrastive Attention Maps for Self-supervised Co-localization", ICCV 2021, say that a contrastive objective
acts directly on attention maps of transformed images, and that its gains are largest where transformations leave
undefined regions. The text of the paper that holds its formula could not be obtained: **the formula here, its default
and its alternatives are our own design**, not the paper's equation.

With A the maps of the images, Ã those of the transformed images, and W the transformation of maps,

.. math:: u_i = W(A_i; \theta_i), \quad v_i = \tilde A_i, \quad S_{ij} = \cos(v_i, u_j), \quad
    L = \tfrac{1}{2} \big( \mathrm{CE}(S / \tau) + \mathrm{CE}(S^\top / \tau) \big)

where CE is the cross-entropy whose correct class is the diagonal.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional

from .transforms import MapWarp, inverse_theta, map_warp

Align = Literal["forward", "inverse", "both"]
Undefined = Literal["zero", "mask"]
Similarity = Literal["cosine", "pearson", "neg_mse"]
Negatives = Literal["batch", "batch_all", "unaligned", "none"]
Frame = Literal["own", "anchor"]
StopGrad = Literal["none", "original", "transformed"]

CHOICES: dict[str, tuple[str, ...]] = {
    "align": ("forward", "inverse", "both"),
    "undefined": ("zero", "mask"),
    "similarity": ("cosine", "pearson", "neg_mse"),
    "negatives": ("batch", "batch_all", "unaligned", "none"),
    "negatives_frame": ("own", "anchor"),
    "stop_grad": ("none", "original", "transformed"),
}
"""Values of the options of :func:`contrastive_map_loss`, the default first."""

_EPS = 1e-8


class MapTerms(NamedTuple):
    """The loss of a batch of maps, and what to watch about it; see :func:`contrastive_terms`.

    Attributes:
        loss: scalar, with gradient.
        similarity: S ``(b, B)`` in ``[-1, 1]``, without gradient: rows are this process's transformed maps, columns
            the warped maps of all B images, this process's from ``first`` on. With ``align="both"`` of the forward
            alignment; with ``negatives="none"`` of this process alone.
        first: column of the first image of this process.
        loss_vu: scalar, without gradient: transformed maps choose among warped ones.
        loss_uv: scalar, likewise the other way around; equal to ``loss_vu`` where there is no such term.
    """

    loss: Tensor
    similarity: Tensor
    first: int
    loss_vu: Tensor
    loss_uv: Tensor

    @property
    def positive(self) -> Tensor:
        """Mean similarity of the pairs."""
        return self.similarity.diagonal(self.first).mean()

    @property
    def negative(self) -> Tensor:
        """Mean similarity of maps of different images; 0 for a single image."""
        others = self.similarity.numel() - len(self.similarity)
        return (self.similarity.sum() - self.similarity.diagonal(self.first).sum()) / max(others, 1)


def contrastive_map_loss(
    A: Tensor,
    A_t: Tensor,
    theta: Tensor,
    *,
    tau: float = 0.1,
    align: Align = "forward",
    undefined: Undefined = "zero",
    similarity: Similarity = "cosine",
    negatives: Negatives = "batch",
    negatives_frame: Frame = "own",
    stop_grad: StopGrad = "none",
    gather: bool = True,
) -> Tensor:
    r"""Contrastive loss of the attention maps of images and of their transformations.

    The default is the formula at the top of this module: maps of the original images follow the transformation, with
    zeros where it shows what the image does not hold, so that activation on padding is punished. For maps that cannot
    be told apart it is log B. Worked out in float32 at least, also under autocast. A map of zeros (for ``"pearson"``, a
    constant one) is similar to none and gets no gradient.

    Args:
        A: ``(b, h, w)`` maps of the images, raw: neither normalised nor upsampled.
        A_t: ``(b, h, w)`` maps of the transformed images.
        theta: ``(b, 2, 3)`` matrices of the transformations, from output to input coordinates.
        tau: temperature, above 0.
        align: ``"forward"``; ``"inverse"``: u is A, v is Ã moved back, which loses what a zoom-out added;
            ``"both"``: the mean of the two losses.
        undefined: ``"zero"``; ``"mask"`` multiplies u and v of an image by the share of each cell that comes from
            inside of it.
        similarity: ``"cosine"``; ``"pearson"``, after each vector's mean is subtracted; ``"neg_mse"``, minus the mean
            squared difference of the vectors, each stretched to ``[0, 1]``.
        negatives: ``"batch"``: maps of the other images, from both sides. ``"batch_all"``: all 2B vectors, each against
            the other 2B - 1. ``"unaligned"``: as batch, and a transformed map has its own image's map before the
            transformation as one more negative, unless that is the identity. ``"none"``: the mean of 1 - S_ii.
        negatives_frame: ``"own"``; ``"anchor"``: row i compares v_i with the maps of all images moved by the
            transformation of image i, so that borders tell nothing; of ``"batch"``, rows only.
        stop_grad: side that gets no gradient.
        gather: take negatives from all processes of a distributed launch. Each process then gives the mean over its own
            images, and the gradients, averaged over processes, are those of the whole batch in one process.

    Returns:
        Scalar, 0 or more (``"none"`` with pearson up to 2); float32, or float64 for float64.

    Raises:
        ValueError: for shapes that do not fit, an unknown value, or ``negatives_frame="anchor"`` with other negatives.

    Example:
        >>> from contrastive_cam.transforms import theta_of, warp_maps
        >>> A, theta = torch.eye(2).reshape(2, 1, 2), theta_of({"flip": torch.tensor([0, 1])})
        >>> contrastive_map_loss(A, warp_maps(A, theta), theta, negatives="none")
        tensor(0.)
        >>> contrastive_map_loss(torch.ones(4, 3, 3), torch.ones(4, 3, 3), theta_of({"flip": torch.ones(4).long()}))
        tensor(1.3863)
    """
    return contrastive_terms(
        A,
        A_t,
        theta,
        tau=tau,
        align=align,
        undefined=undefined,
        similarity=similarity,
        negatives=negatives,
        negatives_frame=negatives_frame,
        stop_grad=stop_grad,
        gather=gather,
    ).loss


def contrastive_terms(
    A: Tensor,
    A_t: Tensor,
    theta: Tensor,
    *,
    tau: float = 0.1,
    align: Align = "forward",
    undefined: Undefined = "zero",
    similarity: Similarity = "cosine",
    negatives: Negatives = "batch",
    negatives_frame: Frame = "own",
    stop_grad: StopGrad = "none",
    gather: bool = True,
) -> MapTerms:
    """:func:`contrastive_map_loss` with the similarities and the two directions behind it; arguments as there."""
    given = {"align": align, "undefined": undefined, "similarity": similarity, "negatives": negatives}
    given |= {"negatives_frame": negatives_frame, "stop_grad": stop_grad}
    check_choices(tau, **given)
    if A.ndim != 3 or A.shape != A_t.shape or theta.shape != (len(A), 2, 3) or 0 in A.shape:
        raise ValueError(
            f"maps {tuple(A.shape)} and {tuple(A_t.shape)} with matrices {tuple(theta.shape)}; expected (b, h, w) "
            "twice and (b, 2, 3), not empty"
        )
    with torch.autocast(A.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(A.dtype, A_t.dtype), torch.float32)
        A, A_t, theta = A.to(dtype), A_t.to(dtype), theta.double()
        A = A.detach() if stop_grad == "original" else A
        A_t = A_t.detach() if stop_grad == "transformed" else A_t
        terms = [
            _aligned_terms(
                A, A_t, theta, tau, direction, undefined, similarity, negatives, negatives_frame, gather
            )
            for direction in (("forward", "inverse") if align == "both" else (align,))
        ]
    if len(terms) == 1:
        return terms[0]
    a, b = terms
    return MapTerms(
        (a.loss + b.loss) / 2,
        a.similarity,
        a.first,
        (a.loss_vu + b.loss_vu) / 2,
        (a.loss_uv + b.loss_uv) / 2,
    )


def check_choices(tau: float, **options: str) -> None:
    """Raise ValueError for a temperature or option that :func:`contrastive_map_loss` does not know.

    Example:
        >>> check_choices(0.1, align="sideways")
        Traceback (most recent call last):
        ValueError: align must be one of forward, inverse, both, got 'sideways'
    """
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    for name, value in options.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
    if options.get("negatives_frame") == "anchor" and options.get("negatives", "batch") != "batch":
        raise ValueError(
            f"negatives_frame='anchor' goes with negatives='batch', got {options['negatives']!r}"
        )


def _aligned_terms(
    A: Tensor,
    A_t: Tensor,
    theta: Tensor,
    tau: float,
    align: str,
    undefined: Undefined,
    similarity: Similarity,
    negatives: Negatives,
    frame: Frame,
    gather: bool,
) -> MapTerms:
    warp = map_warp(
        theta if align == "forward" else inverse_theta(theta), (A.shape[1], A.shape[2]), dtype=A.dtype
    )
    u, v = (warp(A), A_t.flatten(1)) if align == "forward" else (A.flatten(1), warp(A_t))
    mask = warp.validity() if undefined == "mask" else torch.ones_like(u)
    if frame == "anchor":
        return _anchor_terms(A, v, warp if align == "forward" else None, mask, tau, similarity, gather)
    u, v = _prepared(u * mask, similarity), _prepared(v * mask, similarity)
    if negatives == "none":
        S = _compared(v, u, similarity)
        loss = (1 - S.diagonal()).mean()
        return MapTerms(loss, S.detach(), 0, loss.detach(), loss.detach())
    all_u, first = gathered(u) if gather else (u, 0)
    all_v, _ = gathered(v) if gather else (v, 0)
    own = torch.arange(first, first + len(u), device=u.device)
    S = _compared(v, all_u, similarity)
    if negatives == "batch_all":
        everything, mine = torch.cat([all_v, all_u]), torch.cat([v, u])
        logits = _compared(mine, everything, similarity) / tau
        total = len(all_u)
        itself = torch.cat([own, own + total])
        logits = logits.scatter(1, itself.unsqueeze(1), -torch.inf)
        each = functional.cross_entropy(logits, torch.cat([own + total, own]), reduction="none")
        loss_vu, loss_uv = each.chunk(2)
        return _terms(S, first, loss_vu.mean(), loss_uv.mean())
    S_columns = S if len(all_v) == len(v) else _compared(all_v, u, similarity)
    rows, columns = S / tau, S_columns.T / tau
    if negatives == "unaligned":
        # The map that W moves, as it was before: right content, wrong place.
        if align == "forward":
            rows = torch.cat(
                [rows, _unaligned(v, _prepared(A.flatten(1), similarity), theta, similarity) / tau], 1
            )
        else:
            still = _unaligned(u, _prepared(A_t.flatten(1), similarity), theta, similarity)
            columns = torch.cat([columns, still / tau], 1)
    return _terms(S, first, functional.cross_entropy(rows, own), functional.cross_entropy(columns, own))


def _terms(S: Tensor, first: int, loss_vu: Tensor, loss_uv: Tensor) -> MapTerms:
    return MapTerms((loss_vu + loss_uv) / 2, S.detach(), first, loss_vu.detach(), loss_uv.detach())


def _anchor_terms(
    A: Tensor, v: Tensor, warp: MapWarp | None, mask: Tensor, tau: float, similarity: Similarity, gather: bool
) -> MapTerms:
    """Rows in the frame of their own image, where an inverse alignment has nothing to move."""
    all_A, first = gathered(A) if gather else (A, 0)
    u = warp.of_all(all_A) if warp else all_A.flatten(1).expand(len(v), -1, -1)  # (b, B, n)
    u, v = _prepared(u * mask.unsqueeze(1), similarity), _prepared(v * mask, similarity)
    S = _compared_pairs(v.unsqueeze(1), u, similarity)
    loss = functional.cross_entropy(S / tau, torch.arange(first, first + len(v), device=v.device))
    return MapTerms(loss, S.detach(), first, loss.detach(), loss.detach())


def _unaligned(a: Tensor, b: Tensor, theta: Tensor, similarity: Similarity) -> Tensor:
    """Similarity of a_i and b_i ``(b, 1)``, minus infinity where the transformation is the identity."""
    identity = torch.eye(2, 3, dtype=theta.dtype, device=theta.device)
    same = ((theta - identity).abs() < 1e-6).flatten(1).all(dim=1)
    return _compared_pairs(a, b, similarity).masked_fill(same, -torch.inf).unsqueeze(1)


# --- Similarity ------------------------------------------------------------------------------------


def _prepared(x: Tensor, similarity: Similarity) -> Tensor:
    """Vectors along the last dimension such that comparing them is one product."""
    if similarity == "neg_mse":
        shifted = x - x.amin(dim=-1, keepdim=True)
        peak = shifted.amax(dim=-1, keepdim=True)
        return shifted / torch.where(peak > 0, peak, 1)
    if similarity == "pearson":
        x = x - x.mean(dim=-1, keepdim=True)
    return unit(x)


def unit(x: Tensor) -> Tensor:
    """``x / max(|x|, 1e-8)`` along the last dimension; what is shorter than that gets no gradient.

    The formula alone would multiply the gradient of a map of zeros by 1e8.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > _EPS, x / norm.clamp_min(_EPS), x.detach() / _EPS)


def _compared(a: Tensor, b: Tensor, similarity: Similarity) -> Tensor:
    """Similarity of each of ``a (i, n)`` and each of ``b (j, n)``: ``(i, j)``."""
    product = a @ b.T
    if similarity != "neg_mse":
        return product
    squares = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    return (2 * product - squares).clamp_max(0) / a.shape[1]


def _compared_pairs(a: Tensor, b: Tensor, similarity: Similarity) -> Tensor:
    """Similarity of vectors at the same place, along the last dimension."""
    if similarity == "neg_mse":
        return -(a - b).square().mean(dim=-1)
    return (a * b).sum(dim=-1)


# --- Foreground against background -----------------------------------------------------------------


def foreground_background_loss(
    features: Tensor,
    features_t: Tensor,
    A: Tensor,
    A_t: Tensor,
    *,
    tau: float = 0.1,
    gather: bool = True,
) -> Tensor:
    r"""The alternative ``kind="fgbg"``: feature vectors of foreground and background instead of maps.

    With m the map stretched to ``[0, 1]``, an image's foreground is the mean of its features weighted by m, its
    background the one weighted by 1 - m. The foregrounds of an image and of its transformation attract each other;
    the former is kept away from the backgrounds of all 2B views:

    .. math:: L = -\tfrac{1}{B} \sum_i \log \frac{e^{\cos(f_i, \tilde f_i) / \tau}}
        {e^{\cos(f_i, \tilde f_i) / \tau} + \sum_{j=1}^{2B} e^{\cos(f_i, b_j) / \tau}}

    Args:
        features: ``(b, c, h, w)`` weighted feature maps of the images.
        features_t: ``(b, c, h, w)``, of the transformed images.
        A: ``(b, h, w)`` maps of the images.
        A_t: ``(b, h, w)``, of the transformed images.
        tau: temperature, above 0.
        gather: take backgrounds from all processes, as in :func:`contrastive_map_loss`.

    Returns:
        Scalar, 0 or more; float32, or float64 for float64.

    Raises:
        ValueError: for shapes that do not fit or a temperature that is not above 0.

    Example:
        >>> F = torch.eye(2).reshape(1, 2, 1, 2)  # one channel for each of two pixels
        >>> A = torch.tensor([[[1.0, 0.0]]])  # the first is the foreground
        >>> round(foreground_background_loss(F, F, A, A, tau=1.0).item(), 4)  # log(1 + 2 exp(-1))
        0.5514
    """
    check_choices(tau)
    if (
        features.ndim != 4
        or features.shape != features_t.shape
        or not A.shape == A_t.shape == (len(features), *features.shape[2:])
    ):
        raise ValueError(
            f"features {tuple(features.shape)}, {tuple(features_t.shape)} and maps {tuple(A.shape)}, "
            f"{tuple(A_t.shape)} do not fit; expected (b, c, h, w) and (b, h, w), each twice"
        )
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        fg, bg = _regions(features.to(dtype), A.to(dtype))
        fg_t, bg_t = _regions(features_t.to(dtype), A_t.to(dtype))
        positive = (fg * fg_t).sum(dim=1, keepdim=True)
        grounds = torch.cat([bg, bg_t])
        negative = fg @ (gathered(grounds)[0] if gather else grounds).T
        logits = torch.cat([positive, negative], dim=1) / tau
        return functional.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))


def _regions(F: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``(b, c)`` of foreground and background."""
    m = _prepared(A.flatten(1), "neg_mse")
    vectors = (
        einsum(F.flatten(2), weight, "b c n, b n -> b c") / weight.sum(dim=1, keepdim=True).clamp_min(_EPS)
        for weight in (m, 1 - m)
    )
    fg, bg = (unit(vector) for vector in vectors)
    return fg, bg


# --- All processes ---------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """All-gather along the first dimension whose gradient comes back from every process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        rank, longest = torch.distributed.get_rank(), max(sizes)
        ctx.first, ctx.count = sum(sizes[:rank]), len(x)
        padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]).contiguous()
        pieces = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous().clone()
        torch.distributed.all_reduce(grad)
        return grad[ctx.first : ctx.first + ctx.count], None


def gathered(x: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes, in the order of their ranks, and where this process's begin.

    The gradient of a row is the sum of what all processes ask of it, which is what a mean over processes afterwards
    expects. Processes may bring different numbers of rows. In a single process it is ``x`` itself.

    Args:
        x: ``(b, ...)``.

    Returns:
        ``(B, ...)`` and the index of this process's first row.

    Example:
        >>> rows, first = gathered(torch.ones(2, 3))
        >>> rows.shape, first
        (torch.Size([2, 3]), 0)
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return x, 0
    counts = torch.zeros(distributed.get_world_size(), dtype=torch.long, device=x.device)
    counts[distributed.get_rank()] = len(x)
    distributed.all_reduce(counts)
    sizes: list[int] = counts.tolist()
    result: Any = _Gather.apply(x, sizes)
    return result, sum(sizes[: distributed.get_rank()])
