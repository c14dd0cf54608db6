r"""PTAP: pixel-wise top-k attention pooling, which makes one map of a feature tensor.

Ki et al., "Contrastive Attention Maps for Self-supervised Co-localization", ICCV 2021, supplement. At each pixel the k
largest of the C channels are averaged; which channels these are differs from pixel to pixel.

The operator ``contrastive_cam::ptap`` keeps one bit per value for the backward pass, 1/32 of a float32 input, and
neither the input nor an index tensor. It runs compiled by numba on a CPU, and as :func:`plain_pool` elsewhere.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

Mode = Literal["pixel", "channel", "max", "avg"]
Rank = Literal["value", "abs"]


def kept_channels(ratio: float, channels: int) -> int:
    """How many channels k a ratio keeps: ``floor(ratio * channels)``, at least 1.

    A hair is added before rounding down, so that 0.7 of 10 channels is 7 in spite of binary fractions.

    Args:
        ratio: r in ``(0, 1]``.
        channels: C, 1 or more.

    Raises:
        ValueError: if either is out of range.

    Example:
        >>> kept_channels(0.7, 2048), kept_channels(0.7, 10), kept_channels(0.01, 10)
        (1433, 7, 1)
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
    if channels < 1:
        raise ValueError(f"there must be a channel to pool, got {channels}")
    return max(1, math.floor(ratio * channels + 1e-9))


def ptap(features: Tensor, ratio: float = 0.7, mode: Mode = "pixel", *, rank: Rank = "value") -> Tensor:
    r"""Average the strongest channels of a feature tensor into one attention map.

    .. math:: A(b, p) = \tfrac{1}{k} \sum_{j=1}^{k} v_j, \qquad
        v_1 \ge v_2 \ge \dots \ge v_C \text{ the values } F(b, \cdot, p)

    The gradient takes the selection as constant: G/k to each selected value, 0 to the others. Among equal values the
    one of lower channel index is selected first. NaN counts as the largest value, as in ``torch.topk``.

    On post-ReLU features this is the plain mean times C/k wherever at most k channels are active: see
    :func:`active_fraction`.

    Args:
        features: ``(b, c, h, w)``, the weighted feature map :math:`F_w`; any sign.
        ratio: share r of channels to keep, in ``(0, 1]``; see :func:`kept_channels`.
        mode: ``"pixel"`` as above. ``"channel"``, the ablation: the k channels whose mean over the image is largest,
            the same at all pixels. ``"max"`` the maximum at each pixel, ``"avg"`` the mean of all channels; both
            leave ``ratio`` aside.
        rank: ``"value"``; or ``"abs"``, which selects by magnitude and averages the signed values. Of the mode
            ``"pixel"`` only.

    Returns:
        ``(b, h, w)``, neither normalised nor upsampled; float32 for half precision, also under autocast.

    Raises:
        ValueError: if the shape, ratio, mode or rank is none of these.

    Example:
        >>> F = torch.tensor([[4.0, 1.0], [0.0, 2.0], [2.0, 3.0], [1.0, 0.0]]).reshape(1, 4, 1, 2)
        >>> ptap(F, 0.5), ptap(F, 0.5, "channel"), ptap(F, mode="max"), ptap(F, mode="avg")
        (tensor([[[3.0000, 2.5000]]]), tensor([[[3., 2.]]]), tensor([[[4., 3.]]]), tensor([[[1.7500, 1.5000]]]))

    References:
        Ki et al., ICCV 2021, supplement, sections A and B (ratio 0.7: 1433 of 2048 channels).
    """
    if features.ndim != 4 or 0 in features.shape:
        raise ValueError(f"features must be (b, c, h, w) and not empty, got {tuple(features.shape)}")
    if mode not in ("pixel", "channel", "max", "avg"):
        raise ValueError(f"mode must be pixel, channel, max or avg, got {mode!r}")
    if rank not in ("value", "abs") or (rank == "abs" and mode != "pixel"):
        raise ValueError(f"rank must be value, or abs with mode='pixel', got {rank!r} with {mode!r}")
    channels = features.shape[1]
    k = 1 if mode == "max" else kept_channels(ratio, channels)
    with torch.autocast(features.device.type, enabled=False):
        F = features.to(torch.promote_types(features.dtype, torch.float32))
        if mode == "avg" or (k == channels):
            return F.mean(dim=1)
        if mode == "channel":
            return _channelwise(F, k)
        A, _ = _ptap_op(F.flatten(2).contiguous(), k, rank == "abs")
        return A.reshape(A.shape[0], *features.shape[2:])


def _channelwise(F: Tensor, k: int) -> Tensor:
    priority = F.detach().mean((2, 3), dtype=torch.float64)
    order = priority.argsort(dim=1, descending=True, stable=True)
    weight = torch.zeros_like(priority, dtype=F.dtype).scatter_(1, order[:, :k], 1 / k)
    return torch.bmm(weight.unsqueeze(1), F.flatten(2)).reshape(F.shape[0], *F.shape[2:])


# --- The operator ----------------------------------------------------------------------------------


def plain_pool(F: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    """Pixel-wise pooling and the selection behind it, in torch's own operations: the form to read.

    Args:
        F: ``(b, c, n)``, float32 or float64.
        k: channels to keep.
        absolute: whether to rank by magnitude.

    Returns:
        A ``(b, n)``, and the selection ``(b, ceil(c / 8), n)`` uint8: channel c is bit ``c % 8`` of byte ``c // 8``.

    Example:
        >>> A, selected = plain_pool(torch.tensor([[[1.0], [5.0], [5.0], [3.0]]]), 2, False)
        >>> A.item(), f"{selected.item():04b}"
        (5.0, '0110')
    """
    key = F.abs() if absolute else F
    key = torch.where(key.isnan(), torch.inf, key)
    least = key.topk(k, dim=1, sorted=True).values[:, -1:]  # the k-th largest value
    above, ties = key > least, key == least
    free = k - above.sum(dim=1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(dim=1) <= free))
    A = torch.where(chosen, F, 0).sum(dim=1) / k
    A = torch.where(
        F.isnan().any(dim=1), torch.nan, A
    )  # NaN is selected before infinity, which it ties with here
    return A, _packed(chosen)


def _packed(chosen: Tensor) -> Tensor:
    """Boolean ``(b, c, n)`` as bits ``(b, ceil(c / 8), n)``."""
    padded = functional.pad(chosen, (0, 0, 0, -chosen.shape[1] % 8))
    octets = rearrange(padded, "b (j i) n -> b j i n", i=8)
    return (octets << torch.arange(8, device=chosen.device).reshape(8, 1)).sum(dim=2).to(torch.uint8)


@torch.library.custom_op("contrastive_cam::ptap", mutates_args=())
def _ptap_op(F: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    return plain_pool(F, k, absolute)


@_ptap_op.register_kernel("cpu")
def _(F: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    from . import pooling_cpu

    A, selected = pooling_cpu.pool(F.numpy(), k, absolute)
    return torch.from_numpy(A), torch.from_numpy(selected)


@_ptap_op.register_fake
def _(F: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    b, c, n = F.shape
    return F.new_empty(b, n), F.new_empty(b, (c + 7) // 8, n, dtype=torch.uint8)


@torch.library.custom_op("contrastive_cam::ptap_spread", mutates_args=())
def _spread_op(selected: Tensor, G: Tensor, channels: int) -> Tensor:
    bits = selected.unsqueeze(2) >> torch.arange(8, device=G.device, dtype=torch.uint8).reshape(8, 1)
    chosen = rearrange(bits & 1, "b j i n -> b (j i) n")[:, :channels]
    return torch.where(chosen.bool(), G.unsqueeze(1), 0)


@_spread_op.register_kernel("cpu")
def _(selected: Tensor, G: Tensor, channels: int) -> Tensor:
    from . import pooling_cpu

    return torch.from_numpy(pooling_cpu.spread(selected.numpy(), G.numpy(), channels))


@_spread_op.register_fake
def _(selected: Tensor, G: Tensor, channels: int) -> Tensor:
    return G.new_empty(G.shape[0], channels, G.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    F, ctx.k, _ = inputs
    ctx.channels = F.shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, G: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
    if G is None:
        return None, None, None
    [selected] = ctx.saved_tensors
    return _spread_op(selected, (G / ctx.k).contiguous(), ctx.channels), None, None


_ptap_op.register_autograd(_backward, setup_context=_setup)


# --- When k matters --------------------------------------------------------------------------------


class ActiveFraction(NamedTuple):
    """How many channels are at work; see :func:`active_fraction`.

    Attributes:
        mean: scalar in ``[0, 1]``, mean over the pixels of the share of channels above 0.
        p95: scalar in ``[0, 1]``, their 95th percentile.
        acts: scalar in ``[0, 1]``, share of pixels where more than k channels are above 0: elsewhere PTAP is the mean
            of all channels times C/k.
    """

    mean: Tensor
    p95: Tensor
    acts: Tensor


@torch.no_grad()
def active_fraction(features: Tensor, ratio: float = 0.7) -> ActiveFraction:
    """Whether PTAP of these features can differ from their mean, without a copy to the host.

    Args:
        features: ``(b, c, h, w)``, 0 or more (post-ReLU), gated or not.
        ratio: of :func:`ptap`.

    Returns:
        Mean and percentile of the share of active channels, and the share of pixels where k matters.

    Raises:
        ValueError: for a ratio out of range.

    Example:
        >>> F = torch.zeros(1, 10, 1, 4)
        >>> F[:, :2], F[..., 0] = 1.0, 1.0  # 2 of 10 channels, and all of them at one pixel
        >>> mean, _, acts = active_fraction(F, 0.7)
        >>> round(mean.item(), 6), acts.item()
        (0.4, 0.25)
    """
    channels = features.shape[1]
    k = kept_channels(ratio, channels)
    active = (features > 0).sum(dim=1).flatten()
    rank = math.ceil(0.95 * active.numel())
    p95 = active.kthvalue(max(rank, 1)).values
    return ActiveFraction(
        active.float().mean() / channels, p95.float() / channels, (active > k).float().mean()
    )
