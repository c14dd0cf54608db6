"""Order the first results anew by conditional similarity: an extension that needs the stack at test time (section 6).

It is not part of the method, whose point is that the stack is gone after training. Conditional similarities have seen
pairs of training classes only and may be over-confident: its numbers are reported apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from attnmap_core.backbones import evaluating
from attnmap_core.data.loaders import eval_loader, samples_of
from attnmap_core.data.sources import ImageData
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.metrics import retrieval
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from .model import EmbeddingModel
from .task import load_stack


def reordered(
    indices: ArrayLike, similarities: ArrayLike, conditional: ArrayLike, weight: float = 0.5
) -> NDArray[np.int64]:
    r"""Results in the order of :math:`(1 - \mu)\, S^0 + \mu\, S^N`, equals in the order they had.

    Args:
        indices: ``(q, k)`` results, best first.
        similarities: ``(q, k)`` their unconditional similarities.
        conditional: ``(q, k)`` their similarities on the last level of the stack.
        weight: μ in ``[0, 1]``.

    Raises:
        InputError: for a weight out of range.

    Example:
        >>> reordered([[7, 3, 5]], [[0.9, 0.8, 0.7]], [[0.1, 0.9, 0.3]])
        array([[3, 7, 5]])
    """
    if not 0 <= weight <= 1:
        raise InputError(f"rerank_weight {weight}: expected 0 to 1; 0.5 is usual")
    score = (1 - weight) * np.asarray(similarities, np.float64) + weight * np.asarray(conditional, np.float64)
    order = np.argsort(-score, axis=1, kind="stable")
    return np.take_along_axis(np.asarray(indices, np.int64), order, axis=1)


class TokenStore(NamedTuple):
    """Embeddings and tokens of a data set.

    Attributes:
        u: ``(n, d)`` float32, not normalised.
        tokens: ``(n, t, c)`` float16, in a file.
        grid: ``(h, w)`` of the tokens.
    """

    u: NDArray[np.float32]
    tokens: NDArray[np.float16]
    grid: tuple[int, int]


@torch.no_grad()
def store_tokens(
    model: EmbeddingModel, data: ImageData, path: Path, *, batch_size: int = 64, workers: int = 0
) -> TokenStore:
    """Embed a data set and keep the locations of all feature maps in a file: ``2 n t c`` bytes.

    Args:
        model: on its device.
        data: the images.
        path: ``.npy`` file to write.
        batch_size, workers: of the loader.
    """
    loader = eval_loader(
        samples_of(data, eval_transform(model.preprocessing), seed=0), batch_size, workers=workers
    )
    weight, start = model.head.weight, 0
    u = np.empty((len(data), model.embedding_dim), np.float32)
    tokens: Any = None
    grid = (0, 0)
    with evaluating(model):
        for batch in tqdm(loader, desc=f"tokens {data.split}", leave=False, disable=None):
            found = model(batch["images"].to(weight.device, weight.dtype))
            if tokens is None:
                shape = (len(data), *found.tokens.shape[1:])
                tokens = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
                grid = found.grid
            rows = slice(start, start + len(found.tokens))
            u[rows], tokens[rows] = found.embeddings.float().cpu().numpy(), found.tokens.half().cpu().numpy()
            start += len(found.tokens)
    return TokenStore(u, tokens, grid)


@torch.no_grad()
def rerank_data(
    model: EmbeddingModel,
    folder: str | Path,
    query: ImageData,
    gallery: ImageData | None = None,
    *,
    count: int = 100,
    weight: float = 0.5,
    ks: Sequence[int] = (1, 2, 4, 8),
    exclude_lone: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> dict[str, float]:
    """Metrics after the first ``count`` of each result were ordered anew; what comes after them stays.

    Args:
        model: on its device.
        folder: model folder, with the stack of its training beside it.
        query, gallery: images, as for :func:`~crossattn_dml.evaluate.evaluate_model`.
        count: results of each query that are ordered anew; Recall@k for larger k cannot change.
        weight: μ of :func:`reordered`.
        ks, exclude_lone: of the metrics.
        batch_size, workers: of the loader.

    Raises:
        InputError: where there is no stack, and for a count or a ``k`` that the gallery does not have.
    """
    stack = load_stack(model, folder)
    with tempfile.TemporaryDirectory() as place:
        stores = [
            store_tokens(model, data, Path(place) / f"{i}.npy", batch_size=batch_size, workers=workers)
            for i, data in enumerate((query, gallery))
            if data is not None
        ]
        asking, searched = stores[0], stores[-1]
        classes, found_classes = query.targets, (query if gallery is None else gallery).targets
        relevant = np.array([(found_classes == label).sum() for label in classes]) - (gallery is None)
        depth = min(max(count, *ks, int(relevant.max())), len(searched.u) - (gallery is None))
        near = retrieval.nearest(asking.u, None if gallery is None else searched.u, depth)
        head = near.indices[:, :count]
        if head.shape[1] < count:
            raise InputError(
                f"--rerank {count}: expected at most {depth}, the images that a query can find; lower it"
            )
        conditional = np.empty(head.shape)
        for row in tqdm(range(len(head)), desc="re-rank", leave=False, disable=None):
            own = _tensors(asking, [row], model)
            others = _tensors(searched, head[row], model)
            conditional[row] = stack.between(*own, *others, grid=asking.grid)[stack.depth][0].cpu().numpy()
        indices = near.indices.copy()
        indices[:, :count] = reordered(head, near.similarities[:, :count], conditional, weight)
    return retrieval.metrics_of_ranking(
        found_classes[indices] == classes[:, None], relevant, ks, exclude_lone=exclude_lone
    )


def _tensors(
    store: TokenStore, rows: Sequence[int] | NDArray[np.int64], model: EmbeddingModel
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = model.head.weight
    return (
        torch.from_numpy(store.u[rows]).to(weight.device, weight.dtype),
        torch.from_numpy(store.tokens[rows]).to(weight.device, weight.dtype),
    )
