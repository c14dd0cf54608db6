r"""The spatial entropy of attention maps, and the loss made of it.

Peruzzo et al., "Spatial Entropy as an Inductive Bias for Vision Transformers", arXiv 2206.04636, section 3; in the
paper's order, with its equation numbers. A map of similarities between one query and all patch keys is cut at its own
mean; what is above falls apart in blobs, the 8-connected components; the entropy of how the mass is shared among them
is low for few and unequal blobs. Labels are constants in the gradient, all else is differentiable, the mean too.

The operator ``sar_vit::spatial_entropy`` works out entropy and gradient of all maps in one go and keeps the gradient
alone for the backward pass. It has fixed shapes, never copies to the host and is opaque to ``torch.compile``. It runs
compiled by numba on a CPU, as one Triton kernel on CUDA, and as :func:`plain_entropy` on other devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional

Query = Literal["cls", "avg"]
Similarity = Literal["dot", "cosine", "softmax"]
Reduction = Literal["none", "mean", "per_head"]
NonFinite = Literal["mask", "skip_batch", "raise"]
Schedule = Literal["constant", "warmup_cosine"]

_NORM_GUARD = 1e-12


class Entropy(NamedTuple):
    """Spatial entropy of maps, with the counts behind it; see :func:`entropy_and_counts`.

    Attributes:
        values: ``(...)``, in nats, 0 or more; with gradient.
        components: ``(...)`` integer, number of components r; -1 for a map that is not finite.
        foreground: ``(...)`` integer, pixels above the mean; -1 likewise.
    """

    values: Tensor
    components: Tensor
    foreground: Tensor


class Components(NamedTuple):
    """Connected components of maps; see :func:`map_components`.

    Attributes:
        labels: ``(..., h, w)`` integer, the smallest row-major pixel index of the component; -1 for background.
        number: ``(...)`` integer, how many components r.
        sizes: ``(..., h w)`` integer, pixels of the component of each label; 0 where no component has that label.
        shares: ``(..., h w)``, P of each label (Eq. 8 with eps = 0); they sum to 1, or to 0 without a component.
    """

    labels: Tensor
    number: Tensor
    sizes: Tensor
    shares: Tensor


# --- Similarity maps (Eq. 4) -----------------------------------------------------------------------


def similarity_maps(
    q: Tensor,
    k: Tensor,
    grid: tuple[int, int],
    *,
    scale: float | None = None,
    kind: Similarity = "dot",
    query: Query = "cls",
) -> Tensor:
    r"""Similarity S between one query per head and every patch key, as a map.

    .. math:: S_{x,y} = \langle q, k_{x,y} \rangle \cdot \mathrm{scale} \;\;(4), \qquad
        \hat S_{x,y} = \frac{\langle q, k_{x,y} \rangle}{\lVert q \rVert \lVert k_{x,y} \rVert} \;\;(15)

    Computed in float32, also under autocast (float64 stays): one row for each head costs next to nothing.

    Args:
        q: ``(b, heads, d)`` one query, or ``(b, heads, p + n, d)`` all of them, from which ``query`` picks.
        k: ``(b, heads, p + n, d)`` keys, the p prefix tokens (class, distillation, registers) first.
        grid: ``(h, w)`` of the patch keys, row-major, n = h w. Whatever is before the last n keys is prefix.
        scale: of the attention, any positive number; default ``d ** -0.5``. The entropy does not depend on it.
        kind: ``"dot"`` (Eq. 4); ``"cosine"`` (Eq. 15); ``"softmax"``, the attention over all keys, of which the
            patches' are kept: a diagnostic, since training on it collapses to single peaks.
        query: of all queries, ``"cls"`` takes the first; ``"avg"`` the mean of the patches', for models without
            class token.

    Returns:
        ``(b, heads, h, w)``; any sign for dot, ``[-1, 1]`` for cosine, ``[0, 1]`` for softmax.

    Raises:
        ValueError: if the shapes disagree, the grid has more patches than there are keys, or a name is unknown.

    Example:
        >>> k = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]).reshape(1, 1, 3, 2)  # class token, two patches
        >>> q = torch.tensor([[[1.0, 1.0]]])
        >>> similarity_maps(q, k, (1, 2), scale=1.0)
        tensor([[[[1., 2.]]]])
        >>> similarity_maps(q, k, (1, 2), kind="cosine")
        tensor([[[[0.7071, 0.7071]]]])
    """
    n = grid[0] * grid[1]
    prefix = k.shape[2] - n if k.ndim == 4 else -1
    if k.ndim != 4 or q.ndim not in (3, 4) or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}; expected (b, heads, d) or (b, heads, n, d), "
            "and (b, heads, n, d)"
        )
    if prefix < 0 or n < 1:
        raise ValueError(
            f"a grid of {grid[0]}x{grid[1]} has {n} patches, but there are {k.shape[2]} keys; give the grid of the "
            "last block's patch keys"
        )
    if q.ndim == 4:
        q = _chosen_query(q, query, prefix)
    dtype = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        q, k = q.to(dtype), k.to(dtype)
        if kind == "cosine":
            q = q / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(_NORM_GUARD)
            k = k / torch.linalg.vector_norm(k, dim=-1, keepdim=True).clamp_min(_NORM_GUARD)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        logits = einsum(q * (1.0 if kind == "cosine" else factor), k, "b heads d, b heads n d -> b heads n")
    return maps_of_logits(logits, grid, "dot" if kind == "cosine" else kind)


def maps_of_logits(logits: Tensor, grid: tuple[int, int], kind: Literal["dot", "softmax"] = "dot") -> Tensor:
    """A row of attention logits as maps of the patch keys.

    Args:
        logits: ``(b, heads, p + n)`` scaled products of the query with every key, prefix tokens first.
        grid: ``(h, w)`` of the patch keys.
        kind: ``"softmax"`` takes the softmax over all keys first.

    Returns:
        ``(b, heads, h, w)``.

    Example:
        >>> maps_of_logits(torch.arange(5.0).reshape(1, 1, 5), (2, 2))
        tensor([[[[1., 2.],
                  [3., 4.]]]])
    """
    if kind not in ("dot", "softmax"):
        raise ValueError(f"similarity must be dot, cosine or softmax, got {kind!r}")
    S = logits.softmax(dim=-1) if kind == "softmax" else logits
    return rearrange(
        S[..., logits.shape[-1] - grid[0] * grid[1] :], "b heads (h w) -> b heads h w", h=grid[0]
    )


def _chosen_query(q: Tensor, query: Query, prefix: int) -> Tensor:
    if query not in ("cls", "avg"):
        raise ValueError(f"query must be cls or avg, got {query!r}")
    if query == "cls" and prefix == 0:
        raise ValueError("query='cls' needs a class token before the patches; use query='avg'")
    if query == "avg":
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q[:, :, prefix:].mean(dim=2, dtype=dtype)  # projection is linear: the query of the mean patch
    return q[:, :, 0]


# --- Components (Eq. 5 and 6) ----------------------------------------------------------------------


def label_components(mask: Tensor, *, rounds: int | None = None, check: bool = False) -> Tensor:
    """8-connected components of boolean maps, in fixed shapes and a fixed number of rounds.

    Every pixel starts with its own index. A round takes the smallest label of the 3x3 neighbourhood, hooks the old
    label onto it (all pixels of that label learn of it) and jumps twice along the chain of labels.

    Args:
        mask: ``(..., h, w)`` boolean; the grid does not wrap around.
        rounds: default ``ceil(log2(h w)) + 2``; random maps, mazes and spirals of up to 64x64 pixels settle in 6.
        check: whether all labels have settled is looked up on the host, an error if not. For debugging.

    Returns:
        ``(..., h, w)`` integer, the smallest row-major index of a pixel's component; ``h w`` for background.

    Raises:
        RuntimeError: with ``check``, if more rounds are needed.

    Example:
        >>> label_components(torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1]], dtype=torch.bool))
        tensor([[0, 8, 8, 3],
                [8, 0, 8, 3]])
    """
    h, w = mask.shape[-2:]
    n = h * w
    flat = mask.reshape(-1, n)
    pixel = torch.arange(n + 1, device=mask.device).expand(len(flat), -1)  # slot n takes what is background
    labels = functional.pad(torch.where(flat, pixel[:, :n], n), (0, 1), value=n)
    for _ in range(max(n - 1, 1).bit_length() + 2 if rounds is None else rounds):
        lowest = _lowest_neighbour(labels, flat, h, w)
        hooked = pixel.scatter_reduce(1, labels, lowest, "amin")
        labels = hooked.gather(1, lowest)
        for _ in range(2):
            labels = labels.gather(1, labels)
    if check and not torch.equal(_lowest_neighbour(labels, flat, h, w), labels):
        raise RuntimeError(f"labels of {h}x{w} maps have not settled; give more rounds")
    return labels[:, :n].reshape(mask.shape)


def _lowest_neighbour(labels: Tensor, mask: Tensor, h: int, w: int) -> Tensor:
    """Smallest label of the 3x3 pixels around each pixel of the foreground; ``(m, n + 1)``."""
    n = h * w
    square = labels[:, :n].reshape(-1, 1, h, w)
    exact = torch.float32 if n < 2**24 else torch.float64  # pooling takes no integers
    pooled = -functional.max_pool2d(-square.to(exact), 3, stride=1, padding=1)
    lowest = torch.where(mask, pooled.reshape(-1, n).to(labels.dtype), n)
    return functional.pad(lowest, (0, 1), value=n)


@torch.no_grad()
def map_components(S: Tensor) -> Components:
    """The components that the entropy of a map sees, for pictures and diagnostics.

    Args:
        S: ``(..., h, w)`` similarity maps. Labels need no gradient and have none.

    Returns:
        Labels, number, sizes and shares, all in fixed shapes and on the device of S.

    Raises:
        ValueError: as :func:`spatial_entropy`.

    Example:
        >>> found = map_components(torch.tensor([[[5.0, 0.0, 0.0, 2.0], [5.0, 0.0, 0.0, 0.0]]]))
        >>> found.labels.tolist(), found.number.tolist()
        ([[[0, -1, -1, 3], [0, -1, -1, -1]]], [2])
        >>> [round(share, 3) for share in found.shares[0].tolist() if share]
        [0.933, 0.067]
    """
    maps = _checked(S)
    h, w = S.shape[-2:]
    _, B, labels = _thresholded(maps, w)
    U, size = _summed(B, labels)
    U, size = U[:, : h * w], size[:, : h * w]
    shares = U / _safe(U.sum(dim=1, keepdim=True))
    lead = S.shape[:-2]
    return Components(
        torch.where(labels == h * w, -1, labels).reshape(S.shape),
        (size > 0).sum(dim=1).reshape(lead),
        size.to(labels.dtype).reshape(*lead, -1),
        shares.reshape(*lead, -1),
    )


def _thresholded(S: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which maps are finite ``(m, 1)``, B ``(m, n)`` and the labels ``(m, n)`` of ``S (m, n)``."""
    finite = S.isfinite().all(dim=1, keepdim=True)
    S = torch.where(finite, S, 0)
    deviation = S - S.mean(dim=1, keepdim=True)
    foreground = deviation > 0  # strictly, and before any eps
    B = torch.where(foreground, deviation, 0)  # Eq. 5
    return finite, B, label_components(foreground.unflatten(1, (-1, width))).flatten(1)  # Eq. 6


def _summed(B: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of B and number of pixels by label, each ``(m, n + 1)``."""
    m, n = B.shape
    # One dimension, so that torch.use_deterministic_algorithms has a way to do it.
    slot = (labels + (n + 1) * torch.arange(m, device=B.device).unsqueeze(1)).flatten()
    sums = B.new_zeros(m * (n + 1)).index_add(0, slot, B.flatten())
    size = B.new_zeros(m * (n + 1)).index_add(0, slot, torch.ones_like(B).flatten())
    size = size.reshape(m, n + 1)
    return sums.reshape(m, n + 1), torch.cat([size[:, :n], torch.zeros_like(size[:, n:])], dim=1)


def _safe(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1)


# --- Entropy (Eq. 7 and 8) -------------------------------------------------------------------------


def plain_entropy(S: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, its gradient and counts of flat maps ``(m, n)``, in torch's own operations.

    The form for devices without a kernel of their own, and the one to read. No gradient flows through it.

    Args:
        S: ``(m, n)`` maps of ``n / width`` rows, float32 or float64.
        width: columns.
        eps: added to each foreground pixel after labelling.

    Returns:
        E ``(m,)``, dE/dS ``(m, n)``, and ``(m, 2)`` int32, components and foreground pixels (-1 for a map that is
        not finite, whose E and gradient are 0).

    Example:
        >>> E, gradient, counts = plain_entropy(torch.tensor([[3.0, 0.0, 0.0, 0.0, 1.0, 0.0]]), 6, 0.0)
        >>> E, counts
        (tensor([0.3768]), tensor([[2, 2]], dtype=torch.int32))
    """
    n = S.shape[1]
    finite, B, labels = _thresholded(S, width)  # Eq. 5 and 6
    sums, size = _summed(B, labels)
    masses = sums + eps * size  # of each component; sums of B_eps over the foreground alone
    U = masses.sum(dim=1, keepdim=True)
    tiny = torch.finfo(S.dtype).tiny
    P = masses / torch.where(tiny <= U, U, 1)  # Eq. 8
    log_P = torch.where(P > 0, P.clamp_min(tiny).log(), 0)
    E = 0 - (P * log_P).sum(dim=1, keepdim=True)  # Eq. 7; 0, not -0, for one component
    # The mean takes part in the gradient: it draws on every pixel alike.
    g = torch.where((size > 0) & (tiny <= U), -(log_P + E) / torch.where(tiny <= U, U, 1), 0)
    gradient = g.gather(1, labels) - (size * g).sum(dim=1, keepdim=True) / n
    counts = torch.stack([(size > 0).sum(dim=1), size.sum(dim=1)], dim=1).to(torch.int32)
    return E.squeeze(1), gradient, torch.where(finite, counts, -1)


@torch.library.custom_op("sar_vit::spatial_entropy", mutates_args=())
def _entropy_op(S: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return plain_entropy(S, width, eps)


@_entropy_op.register_kernel("cpu")
def _(S: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from . import entropy_cpu

    E, gradient, counts = entropy_cpu.entropy_and_gradient(S.numpy(), width, eps)
    return torch.from_numpy(E), torch.from_numpy(gradient), torch.from_numpy(counts)


@_entropy_op.register_kernel("cuda")
def _(S: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from . import entropy_triton

    if S.shape[1] > entropy_triton.MAX_PIXELS:
        return plain_entropy(S, width, eps)
    return entropy_triton.entropy_and_gradient(S, width, eps)


@_entropy_op.register_fake
def _(S: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return S.new_empty(S.shape[0]), torch.empty_like(S), S.new_empty(S.shape[0], 2, dtype=torch.int32)


def _setup(ctx: Any, inputs: tuple[Tensor, int, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, gradient, counts = output
    ctx.mark_non_differentiable(gradient, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)


def _backward(ctx: Any, grad_E: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
    if grad_E is None:
        return None, None, None
    [gradient] = ctx.saved_tensors
    return grad_E.unsqueeze(1) * gradient, None, None


_entropy_op.register_autograd(_backward, setup_context=_setup)


def entropy_and_counts(S: Tensor, eps: float = 1e-9) -> Entropy:
    """:func:`spatial_entropy` of each map, with the number of components and of foreground pixels.

    Args:
        S: ``(..., h, w)`` similarity maps.
        eps: as there.

    Returns:
        Entropy with gradient, counts without, all on the device of S; nothing is copied to the host.

    Raises:
        ValueError: if S holds no pixel or fewer than two dimensions, or eps is negative.

    Example:
        >>> found = entropy_and_counts(torch.eye(3))
        >>> found.values.item(), found.components.item(), found.foreground.item()
        (0.0, 1, 3)
    """
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    E, _, counts = _entropy_op(_checked(S).contiguous(), S.shape[-1], float(eps))
    components, foreground = counts.unbind(dim=1)
    lead = S.shape[:-2]
    return Entropy(E.reshape(lead), components.reshape(lead), foreground.reshape(lead))


def spatial_entropy(
    S: Tensor, eps: float = 1e-9, reduction: Reduction = "none", *, nonfinite: NonFinite = "mask"
) -> Tensor:
    r"""Spatial entropy of similarity maps: how evenly the mass above the mean is shared among blobs.

    .. math:: B = \mathrm{ReLU}(S - m) \;(5), \quad \{C_1..C_r\} = \mathrm{CC}(S > m) \;(6), \quad
        P_j = \frac{\sum_{C_j} B}{\sum B} \;(8), \quad E = -\sum_j P_j \log P_j \;(7)

    m is the mean of the map. Components are 8-connected, the grid does not wrap around, and a pixel at the mean is
    background. E is in nats, from 0 (one blob, or a constant map) to log r (r equal ones). It does not change when
    a map is shifted, multiplied by a positive number, mirrored or turned.

    Float32 inside for half precision, also under autocast; float64 stays. The gradient grows as 1 / contrast.

    Args:
        S: ``(..., h, w)``, in training ``(b, heads, h, w)``; pre-softmax products of the query with the patch keys.
        eps: added to every foreground pixel once the components are known; 0 is allowed.
        reduction: ``"none"`` one value a map; ``"mean"`` over all maps (Eq. 9), also those without a component;
            ``"per_head"`` the mean over images, ``(heads,)``.
        nonfinite: maps with NaN or infinity in them: ``"mask"`` counts each as a constant map; ``"skip_batch"``
            makes the whole batch 0, as the released code leaves the loss out of such a step; ``"raise"`` waits for
            the device and raises, for debugging.

    Returns:
        ``(...)``, a scalar, or ``(heads,)``, 0 or more; float32, or float64 for float64.

    Raises:
        ValueError: for an empty batch or grid, fewer dimensions than the reduction needs, or a negative eps.
        FloatingPointError: with ``nonfinite="raise"``.

    Example:
        >>> peaks = torch.zeros(1, 2, 5, 5)
        >>> peaks[0, 0, 0, 0] = peaks[0, 0, 4, 4] = 1.0  # two equal peaks: log 2
        >>> peaks[0, 1, 2, 1:4] = -7.0  # the ground around a valley is one component
        >>> spatial_entropy(peaks)
        tensor([[0.6931, 0.0000]])
        >>> spatial_entropy(peaks, reduction="mean")
        tensor(0.3466)

    References:
        Peruzzo et al., "Spatial Entropy as an Inductive Bias for Vision Transformers", arXiv 2206.04636, Eq. 5-9.
    """
    found = entropy_and_counts(S, eps)
    return reduced(without_nonfinite(found, nonfinite), reduction)


def without_nonfinite(found: Entropy, nonfinite: NonFinite) -> Tensor:
    """Entropies after what ``nonfinite`` of :func:`spatial_entropy` says about maps that are not finite.

    Args:
        found: of :func:`entropy_and_counts`, where these are 0 already.
        nonfinite: the policy.

    Returns:
        ``(...)``.

    Raises:
        ValueError: for an unknown policy.
        FloatingPointError: with ``"raise"``, if there is such a map.
    """
    if nonfinite == "mask":
        return found.values
    bad = found.components < 0
    if nonfinite == "skip_batch":
        return torch.where(bad.any(), 0, found.values)
    if nonfinite == "raise":
        if bad.any():
            first = bad.nonzero()[0].tolist()
            raise FloatingPointError(
                f"{int(bad.sum())} of {bad.numel()} similarity maps are not finite, the first at index {first}; look "
                "for overflow in the last block's queries and keys, or use nonfinite='mask'"
            )
        return found.values
    raise ValueError(f"nonfinite must be mask, skip_batch or raise, got {nonfinite!r}")


# --- Loss (Eq. 9) ----------------------------------------------------------------------------------


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """Values of single maps ``(..., heads)`` as the loss: ``L_se`` is their mean (Eq. 9).

    Args:
        values: one for each map, the heads in the last dimension.
        reduction: as in :func:`spatial_entropy`.

    Returns:
        The values, a scalar, or ``(heads,)``.

    Raises:
        ValueError: for an unknown reduction, or ``"per_head"`` of values without images and heads.

    Example:
        >>> reduced(torch.tensor([[1.0, 3.0], [3.0, 5.0]]), "per_head")
        tensor([2., 4.])
    """
    if reduction == "none":
        return values
    if reduction == "mean":
        return values.mean()
    if reduction == "per_head":
        if values.ndim < 2:
            raise ValueError(
                f"reduction='per_head' needs maps (b, heads, h, w); got {values.ndim + 2} dimensions"
            )
        return values.flatten(0, -2).mean(dim=0)
    raise ValueError(f"reduction must be none, mean or per_head, got {reduction!r}")


def total_variation(S: Tensor, p: int = 1, reduction: Reduction = "none") -> Tensor:
    r"""Total variation of similarity maps, the loss that spatial entropy is compared with (Eq. 14).

    .. math:: L_{tv} = \sum_{x,y} |S_{x,y} - S_{x,y+1}| + |S_{x,y} - S_{x+1,y}|

    Neighbours outside of the grid do not count. Unlike the entropy it depends on the scale of the attention.

    Args:
        S: ``(..., h, w)`` similarity maps.
        p: 1 for Eq. 14; 2 for the released code, half the sum of squared differences.
        reduction: as in :func:`spatial_entropy`.

    Returns:
        ``(...)``, a scalar, or ``(heads,)``, 0 or more; float32, or float64 for float64.

    Raises:
        ValueError: as :func:`spatial_entropy`, or for another p.

    Example:
        >>> total_variation(torch.tensor([[0.0, 1.0], [0.0, 3.0]])).item()
        6.0
    """
    _checked(S)
    S = S.to(torch.promote_types(S.dtype, torch.float32))
    right, below = S.diff(dim=-1), S.diff(dim=-2)
    if p == 1:
        return reduced(right.abs().sum((-2, -1)) + below.abs().sum((-2, -1)), reduction)
    if p == 2:
        return reduced((right.square().sum((-2, -1)) + below.square().sum((-2, -1))) / 2, reduction)
    raise ValueError(f"p must be 1 or 2, got {p}")


class Measured(NamedTuple):
    """The loss of collected maps, and what to log about them; see :meth:`SpatialEntropyLoss.measure`.

    Attributes:
        loss: with gradient; a scalar, or as the reduction says.
        components: scalar, mean number of components of a map.
        foreground: scalar in ``[0, 1]``, mean share of pixels above the mean.
        excluded: scalar, number of maps that are not finite.
    """

    loss: Tensor
    components: Tensor
    foreground: Tensor
    excluded: Tensor


class SpatialEntropyLoss(nn.Module):
    r"""The spatial entropy loss :math:`L_{se}` (Eq. 9), of maps or of a model's last forward passes.

    .. math:: L_{se} = \frac{1}{b\,h} \sum_{i=1}^{b} \sum_{j=1}^{h} E(S_{ij})

    Several forward passes count by their images, each on its own grid, as if they had been one batch.

    Args:
        eps: as in :func:`spatial_entropy`.
        reduction: as there, by default ``"mean"``.
        nonfinite: as there; ``"skip_batch"`` looks at all passes together.
        similarity: ``"dot"`` (Eq. 4), ``"cosine"`` (Eq. 15), or ``"softmax"``, a diagnostic that collapses when it
            is trained on; of models only.
        kind: ``"entropy"``; ``"tv"`` total variation instead (Eq. 14), ``"tv2"`` its form in the released code.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> loss = SpatialEntropyLoss()
        >>> S = torch.zeros(2, 1, 3, 3)
        >>> S[0, 0, 0, 0] = S[0, 0, 2, 2] = 1.0
        >>> loss(S)  # log 2 of one map of two
        tensor(0.3466)
        >>> [round(float(value), 3) for value in loss.measure(S)]
        [0.347, 1.0, 0.111, 0.0]
    """

    def __init__(
        self,
        eps: float = 1e-9,
        reduction: Reduction = "mean",
        *,
        nonfinite: NonFinite = "mask",
        similarity: Similarity = "dot",
        kind: Literal["entropy", "tv", "tv2"] = "entropy",
    ) -> None:
        super().__init__()
        known: dict[str, tuple[str, tuple[str, ...]]] = {
            "reduction": (reduction, ("none", "mean", "per_head")),
            "nonfinite": (nonfinite, ("mask", "skip_batch", "raise")),
            "similarity": (similarity, ("dot", "cosine", "softmax")),
            "kind": (kind, ("entropy", "tv", "tv2")),
        }
        for name, (value, names) in known.items():
            if value not in names:
                raise ValueError(f"{name} must be {', '.join(names[:-1])} or {names[-1]}, got {value!r}")
        if not eps >= 0:
            raise ValueError(f"eps must be 0 or more, got {eps}")
        self.eps = eps
        self.reduction: Reduction = reduction
        self.nonfinite: NonFinite = nonfinite
        self.similarity: Similarity = similarity
        self.kind = kind

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return f"{self.kind}, eps={self.eps}, {self.reduction}, {self.nonfinite}, {self.similarity}"

    def forward(self, source: Tensor | nn.Module) -> Tensor:
        """The loss; see :meth:`measure`."""
        return self.measure(source).loss

    def measure(self, source: Tensor | nn.Module) -> Measured:
        """The loss, with counts for the log; nothing is copied to the host.

        Args:
            source: similarity maps ``(..., h, w)``, or a model changed by :func:`sar_vit.apply_sar`, whose collected
                forward passes are used up.

        Returns:
            Loss and counts on the device of the maps.

        Raises:
            ValueError: for an empty batch, or a model without collector.
            RuntimeError: if the model has collected nothing since the last call.
        """
        if isinstance(source, Tensor):
            several = [source]
        else:
            from .surgery import take_maps

            several = take_maps(source, self.similarity)
        found = [entropy_and_counts(S if self.kind == "entropy" else S.detach(), self.eps) for S in several]
        components = _joined([entropy.components for entropy in found])
        shares = [entropy.foreground / (S.shape[-2] * S.shape[-1]) for entropy, S in zip(found, several)]
        if self.kind == "entropy":
            values = _joined([entropy.values for entropy in found])
        else:
            bounded = [_finite_maps(S, entropy.components) for S, entropy in zip(several, found)]
            values = _joined([total_variation(S, 1 if self.kind == "tv" else 2) for S in bounded])
        values = without_nonfinite(Entropy(values, components, components), self.nonfinite)
        return Measured(
            reduced(values, self.reduction),
            components.clamp_min(0).to(values.dtype).mean(),
            _joined(shares).clamp_min(0).mean(),
            (components < 0).sum(),
        )


def _joined(several: list[Tensor]) -> Tensor:
    return several[0] if len(several) == 1 else torch.cat(several)


def _finite_maps(S: Tensor, components: Tensor) -> Tensor:
    return torch.where((components < 0)[..., None, None], 0, S)


def entropy_weight(
    epoch: int,
    epochs: int,
    weight: float = 0.01,
    schedule: Schedule = "constant",
    *,
    warmup_epochs: int = 10,
) -> float:
    """The factor λ of the loss in an epoch.

    Args:
        epoch: counted from 0.
        epochs: of the whole training.
        weight: its largest value.
        schedule: ``"constant"``, as the paper says; ``"warmup_cosine"``, as the released trainer does: from 0 in the
            first epoch linearly to ``weight``, then half a cosine to almost 0 in the last.
        warmup_epochs: W; epochs W - 1 and W have the whole weight.

    Returns:
        λ of the epoch.

    Raises:
        ValueError: for an unknown schedule or a negative epoch.

    Example:
        >>> [round(entropy_weight(epoch, 100, schedule="warmup_cosine"), 4) for epoch in (0, 5, 9, 10, 55, 99)]
        [0.0, 0.0056, 0.01, 0.01, 0.005, 0.0]
    """
    if schedule not in ("constant", "warmup_cosine"):
        raise ValueError(f"schedule must be constant or warmup_cosine, got {schedule!r}")
    if epoch < 0:
        raise ValueError(f"epoch is counted from 0, got {epoch}")
    if schedule == "constant":
        return weight
    if epoch < warmup_epochs:
        return weight * epoch / max(warmup_epochs - 1, 1)
    done = min((epoch - warmup_epochs) / max(epochs - warmup_epochs, 1), 1.0)
    return weight * (1 + math.cos(math.pi * done)) / 2


def _checked(S: Tensor) -> Tensor:
    """``(m, n)``, float32 or float64, of maps ``(..., h, w)``."""
    shape: Sequence[int] = S.shape
    if S.ndim < 2 or not S.is_floating_point():
        raise ValueError(
            f"expected similarity maps (b, heads, h, w) of floats, got {tuple(shape)} of {S.dtype}"
        )
    if S.numel() == 0:
        raise ValueError(
            f"expected at least one map with a pixel, got shape {tuple(shape)}; leave empty batches out"
        )
    return S.to(torch.promote_types(S.dtype, torch.float32)).reshape(-1, shape[-2] * shape[-1])
