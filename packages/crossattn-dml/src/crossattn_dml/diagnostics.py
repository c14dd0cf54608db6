"""What the paper's figures are made of (section 8): gradients at the encoder's output, attention, like parts.

Functions on models and arrays; the commands around them are in :mod:`crossattn_dml.experiments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from attnmap_core.backbones import evaluating
from attnmap_core.errors import InputError
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .cross_attention import CrossAttentionStack
from .model import Embedded
from .task import ConditionalTraining

EDGES = np.round(np.arange(-140, 21) / 10, 1)
"""Of the histograms of log10 |g|: 160 bins of 0.1."""
_MOST = 1 << 24  # values that percentiles are taken of


# --- Gradients at the encoder's output (8.1) -------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientHistogram:
    r"""How large the entries of a gradient are, on a logarithmic scale.

    Attributes:
        counts: ``(160,)`` int64 entries by :math:`\log_{10} |g|`, between :data:`EDGES`.
        zeros: entries that are 0 and have no logarithm.
        underflow, overflow: entries below the first and from the last edge on.
        percentiles: 5, 50 and 95 % of :math:`\log_{10} |g|` over the entries that are not 0; NaN where all are.
    """

    counts: NDArray[np.int64]
    zeros: int
    underflow: int
    overflow: int
    percentiles: tuple[float, float, float]

    def density(self) -> NDArray[np.float64]:
        """``(160,)`` that integrates to 1 over the bins; all 0 where no entry lies in them."""
        return self.counts / (max(1, int(self.counts.sum())) * 0.1)


def gradient_histogram(gradients: Iterable[ArrayLike]) -> GradientHistogram:
    """Count the entries of gradients, batch after batch.

    Args:
        gradients: arrays of any shape. Beyond 16 million entries percentiles are those of evenly spaced ones.

    Example:
        >>> found = gradient_histogram([[0.0, 0.011, -0.012, 1e-20]])
        >>> found.counts[120], found.zeros, found.underflow
        (np.int64(2), 1, 1)
    """
    counts = np.zeros(len(EDGES) - 1, np.int64)
    zeros = underflow = overflow = 0
    logs: list[NDArray[np.float64]] = []
    for values in gradients:
        g = np.abs(np.asarray(values, np.float64)).ravel()
        log = np.log10(g[g > 0])
        zeros += len(g) - len(log)
        underflow += int((log < EDGES[0]).sum())
        overflow += int((log >= EDGES[-1]).sum())
        inside = log[(log >= EDGES[0]) & (log < EDGES[-1])]
        counts += np.histogram(inside, bins=EDGES)[0]
        logs.append(log)
    every = np.concatenate(logs) if logs else np.empty(0)
    every = every[:: max(1, -(-len(every) // _MOST))]
    found = np.percentile(every, (5, 50, 95)) if len(every) else np.full(3, np.nan)
    return GradientHistogram(
        counts, zeros, underflow, overflow, (float(found[0]), float(found[1]), float(found[2]))
    )


def token_gradients(
    training: ConditionalTraining,
    batches: Iterable[Mapping[str, Any]],
    *,
    granularity: Literal["element", "token"] = "element",
    normalise: bool = False,
    seed: int = 0,
) -> Iterable[NDArray[np.float32]]:
    r"""Yield :math:`|\partial L / \partial X|` at the output of the encoder, batch after batch.

    In float32 and evaluation mode: batch norms keep their statistics and nothing is dropped.

    Args:
        training: network, stack and loss.
        batches: of :func:`attnmap_core.data.loaders.collate`; the same for all models that are compared.
        granularity: every entry, or the length of each token's gradient.
        normalise: divide by :math:`w_0 + \lambda`: a second term of the loss makes gradients larger for that reason
            alone, 0.30 in the logarithm at the start.
        seed: of the triplets that losses draw.
    """
    weight = training.model.head.weight
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, features: Any) -> None:
        values: Tensor = features.map if features.tokens is None else features.tokens
        if not values.requires_grad:
            values.requires_grad_()
        values.retain_grad()
        kept.append(values)

    handle = training.model.backbone.register_forward_hook(keep)
    divisor = training.loss.unconditional_weight + (
        training.loss.weight if training.stack is not None else 0.0
    )
    try:
        with evaluating(training):
            for number, batch in enumerate(batches):
                torch.manual_seed(seed + number)
                kept.clear()
                parts = training(
                    batch["images"].to(weight.device),
                    batch["labels"].to(weight.device),
                    batch["index"].to(weight.device),
                )
                [gradient] = torch.autograd.grad(parts["loss"], kept)
                if granularity == "token":
                    dim = 1 if gradient.ndim == 4 else 2
                    gradient = torch.linalg.vector_norm(gradient, dim=dim)
                if normalise and divisor > 0:
                    gradient = gradient / divisor
                yield gradient.abs().float().cpu().numpy()
    finally:
        handle.remove()


# --- Attention of a triple (8.2) -------------------------------------------------------------------------------------


class TripleMaps(NamedTuple):
    """Attention of one block for an image and two others.

    Attributes:
        upper, lower: ``(h, w)`` head means, each of sum 1: where the block looks for the first and the second partner.
        difference: ``(h, w)`` their squared difference; None where they lie on different images.
        heads: ``(2, heads, h, w)`` before the mean.
    """

    upper: NDArray[np.float64]
    lower: NDArray[np.float64]
    difference: NDArray[np.float64] | None
    heads: NDArray[np.float64]


@torch.no_grad()
def triple_maps(
    stack: CrossAttentionStack,
    found: Embedded,
    blocks: Sequence[int],
    *,
    direction: Literal["text", "caption"] = "text",
) -> dict[int, TripleMaps]:
    """Where blocks look in a triple: an image, one of its class, one of another.

    Args:
        stack: of the training.
        found: what the network says of the three images, in this order.
        blocks: counted from 1.
        direction: ``"text"``, as the supplement's text has it: both maps lie on the first image, asked by the other
            two, and can be subtracted. ``"caption"``, as its captions have it: the maps lie on the other two images,
            asked by the first, and places do not correspond.

    Raises:
        InputError: for blocks that there are not.
    """
    if not blocks or min(blocks) < 1 or max(blocks) > stack.depth:
        raise InputError(
            f"--blocks {list(blocks)}: expected some of 1 to {stack.depth}, as the stack has; change it"
        )
    maps = stack.attention_maps(found.embeddings, found.tokens, levels=sorted(set(blocks)), grid=found.grid)
    result: dict[int, TripleMaps] = {}
    for block in blocks:
        A = maps[block].double().cpu().numpy()
        both = np.stack([A[0, 1], A[0, 2]] if direction == "text" else [A[1, 0], A[2, 0]])
        heads = both.reshape(*both.shape[:2], *found.grid)
        upper, lower = heads.mean(axis=1)
        result[block] = TripleMaps(upper, lower, (upper - lower) ** 2 if direction == "text" else None, heads)
    return result


# --- Parts (8.3) -----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A location of an image that is like a given one: ``image`` of the data set, ``row``, ``col``, ``cosine``."""

    image: int
    row: int
    col: int
    cosine: float


def similar_parts(
    tokens: NDArray[Any],
    image: int,
    row: int,
    col: int,
    grid: tuple[int, int],
    *,
    most: int = 8,
    chunk: int = 256,
) -> list[Part]:
    """The locations most like one, of all other images, at most one of each.

    Args:
        tokens: ``(n, h * w, c)`` descriptors of all images, also as a memory map; they are read a chunk at a time.
        image, row, col: the location asked for.
        grid: ``(h, w)``.
        most: matches.
        chunk: images at a time; the result does not depend on it.

    Returns:
        Matches by falling cosine, equals by rising image and location. Locations without a direction are passed over.

    Raises:
        InputError: for a location that there is not, or one that is all zeros.

    Example:
        >>> tokens = np.array([[[1.0, 0], [0, 1]], [[0, 2.0], [1, 1]], [[3.0, 0], [0, 0]]])
        >>> similar_parts(tokens, 0, 0, 0, (1, 2), most=1)
        [Part(image=2, row=0, col=0, cosine=1.0)]
    """
    h, w = grid
    if not (0 <= image < len(tokens) and 0 <= row < h and 0 <= col < w):
        raise InputError(
            f"location {image} {row} {col}: expected an image of 0 to {len(tokens) - 1}, a row below {h} and a column "
            f"below {w}; change it"
        )
    asked = np.asarray(tokens[image, row * w + col], np.float64)
    length = np.linalg.norm(asked)
    if length == 0:
        raise InputError(
            f"location {image} {row} {col}: its features are all 0 and have no direction; take another"
        )
    best: list[Part] = []
    for start in range(0, len(tokens), chunk):
        some = np.asarray(tokens[start : start + chunk], np.float64)
        lengths = np.linalg.norm(some, axis=2)
        cosine = np.where(lengths > 0, some @ (asked / length) / np.where(lengths > 0, lengths, 1), -np.inf)
        if start <= image < start + len(some):
            cosine[image - start] = -np.inf
        places = cosine.argmax(axis=1)
        values = cosine[np.arange(len(some)), places]
        best += [
            Part(start + i, int(place) // w, int(place) % w, float(value))
            for i, (place, value) in enumerate(zip(places, values))
            if np.isfinite(value)
        ]
        best = sorted(best, key=lambda part: (-part.cosine, part.image))[:most]
    return best


def part_rectangle(
    row: int, col: int, grid: tuple[int, int], size_wh: tuple[int, int], cells: int = 3
) -> tuple[int, int, int, int]:
    """``(x0, y0, x1, y1)`` around a location, ``cells`` cells wide, moved to stay inside the image.

    Example:
        >>> part_rectangle(0, 3, (7, 7), (224, 224))
        (64, 0, 160, 96)
    """
    corners: list[tuple[int, int]] = []
    for place, count, length in ((col, grid[1], size_wh[0]), (row, grid[0], size_wh[1])):
        side = min(length, round(cells * length / count))
        start = round((place + 0.5) * length / count - side / 2)
        start = min(max(start, 0), length - side)
        corners.append((start, start + side))
    (x0, x1), (y0, y1) = corners
    return x0, y0, x1, y1


def salient_locations(
    weights: NDArray[np.floating[Any]], count: int = 2, apart: int = 2
) -> list[tuple[int, int]]:
    """The largest entries of a map that are ``apart`` rows or columns from each other, or more.

    Args:
        weights: ``(h, w)``.
        count: locations; fewer where there is no room.
        apart: Chebyshev distance.

    Example:
        >>> salient_locations(np.array([[5.0, 4.0, 1.0], [0.0, 0.0, 2.0]]))
        [(0, 0), (1, 2)]
    """
    chosen: list[tuple[int, int]] = []
    for place in np.argsort(-weights, axis=None, kind="stable").tolist():
        row, col = divmod(int(place), weights.shape[1])
        if all(max(abs(row - r), abs(col - c)) >= apart for r, c in chosen):
            chosen.append((row, col))
        if len(chosen) == count:
            break
    return chosen
