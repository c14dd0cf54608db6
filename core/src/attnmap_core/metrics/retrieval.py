r"""Retrieval metrics of deep metric learning: Recall@k, R-Precision, MAP@R, and NMI of a clustering.

Every query ranks a gallery by falling similarity, ties by rising gallery index. Where queries are the gallery, a query
is left out of its own ranking *by its index*: dropping the first column is wrong as soon as a duplicate exists. All
values are fractions in ``[0, 1]``; papers print them times 100.

Rankings are exact: as if all similarities had been computed in float64. They come from a float32 product whose error
has a known bound; queries for which something within that bound could matter are computed again in float64. The result
depends neither on the chunk size nor on threads. Memory is the embeddings and one chunk, never queries times gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import InputError

Similarity = Literal["cosine", "dot", "euclidean"]
Ties = Literal["index", "optimistic", "pessimistic"]
Vectors: TypeAlias = "ArrayLike | Tensor"

_CHUNK_BYTES = 64 << 20  # of similarities at a time
_GROUP = 64  # gallery items that one maximum stands for, when the best few are looked for
_PAD = 8  # candidates beyond those needed, at first, where float64 decides


class Neighbours(NamedTuple):
    """The nearest gallery items of each query.

    Attributes:
        indices: ``(q, k)`` int64, nearest first.
        similarities: ``(q, k)`` float64; of ``"euclidean"`` the negative squared distance.
    """

    indices: NDArray[np.int64]
    similarities: NDArray[np.float64]


def nearest(
    queries: Vectors,
    gallery: Vectors | None = None,
    k: int = 1,
    *,
    similarity: Similarity = "cosine",
    chunk_size: int | None = None,
) -> Neighbours:
    """The ``k`` nearest gallery items of each query, exactly.

    Args:
        queries: ``(q, d)`` finite; an array, or a tensor of any device.
        gallery: ``(g, d)``; by default the queries themselves, each left out of its own list.
        k: ``1 <= k <= g`` (less one where a query is left out).
        similarity: ``"cosine"``, inner product, or negative squared Euclidean distance.
        chunk_size: queries at a time; default: what fits 64 MB of similarities.

    Raises:
        InputError: for vectors that are not finite or do not fit each other, and ``k`` out of range.

    Example:
        >>> found = nearest(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 2.0]]), k=2)
        >>> found.indices.tolist(), found.similarities.round(4).tolist()  # of equals, the first
        ([[1, 2]], [[0.7071, 0.7071]])
    """
    search = _Search(queries, gallery, similarity)
    search.check_k(k)
    indices = np.empty((search.count, k), dtype=np.int64)
    similarities = np.empty((search.count, k), dtype=np.float64)
    for rows, block in search.chunks(k, chunk_size):
        found, values = search.ordered(rows, block, k)
        indices[rows.start : rows.stop] = found.cpu().numpy()
        similarities[rows.start : rows.stop] = values.cpu().numpy()
    return Neighbours(indices, similarities)


def approximate_nearest(
    queries: Vectors,
    gallery: Vectors | None = None,
    k: int = 1,
    *,
    similarity: Similarity = "cosine",
    probes: int = 32,
    seed: int = 0,
) -> Neighbours:
    """About the ``k`` nearest gallery items of each query: for all-against-all searches beyond a million.

    An inverted file of faiss: k-means parts the gallery in cells, of which the nearest few are searched. What is found
    is ordered by float64 similarities; what is missed is missed silently, so never take metrics of a paper from it.

    Args:
        queries, gallery, k, similarity: as in :func:`nearest`.
        probes: cells searched for each query; more finds more. From all of them on, everything is found.
        seed: of the vectors that k-means sees, 64 for each cell.

    Raises:
        InputError: as :func:`nearest`, for less than one probe, and without faiss.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(300, 8))
        >>> about, exactly = approximate_nearest(x, k=3), nearest(x, k=3)  # so few: all cells are probed
        >>> bool((about.indices == exactly.indices).all())
        True
    """
    try:
        import faiss
    except ImportError:
        raise InputError('approximate search needs faiss; pip install "attnmap-core[faiss]"') from None
    search = _Search(queries, gallery, similarity)
    search.check_k(k)
    if probes < 1:
        raise InputError(f"probes {probes}: expected 1 or more; 32 is usual")
    # On the host: faiss there takes any number of cells and neighbours. Cosines are products of unit vectors.
    asking, items = (
        search.for_product(vectors, norms, torch.empty_like(vectors, dtype=torch.float32)).cpu().numpy()
        for vectors, norms in ((search.queries, search.query_norms), (search.gallery, search.norms))
    )
    cells = min(int(4 * search.size**0.5), -(-search.size // 64))
    lists: Any = faiss
    flat = lists.IndexFlatL2 if similarity == "euclidean" else lists.IndexFlatIP
    metric = lists.METRIC_L2 if similarity == "euclidean" else lists.METRIC_INNER_PRODUCT
    index = lists.IndexIVFFlat(flat(items.shape[1]), items.shape[1], cells, metric)
    chosen = np.random.default_rng(seed).permutation(search.size)[: 64 * cells]
    index.train(items[np.sort(chosen)])
    index.add(items)
    index.nprobe = min(probes, cells)
    found: NDArray[np.int64] = index.search(asking, min(k + 1, search.size))[1]
    indices = np.empty((search.count, k), dtype=np.int64)
    similarities = np.empty((search.count, k), dtype=np.float64)
    size = max(1, _CHUNK_BYTES // (64 * (k + 1)))
    for start in range(0, search.count, size):
        rows = np.arange(start, min(start + size, search.count))
        columns = found[rows]
        wanted = columns >= 0
        if search.to_itself:
            wanted &= columns != rows[:, None]
        short = wanted.sum(axis=1) < k  # the cells held too little
        exact = search.exact(
            torch.from_numpy(rows).to(search.device), torch.from_numpy(columns.clip(0)).to(search.device)
        )
        values = np.where(wanted, exact.cpu().numpy(), -np.inf)
        columns = np.where(wanted, columns, search.size)
        order = np.lexsort((columns, -values), axis=1)[:, :k]
        indices[rows] = np.take_along_axis(columns, order, axis=1)
        similarities[rows] = np.take_along_axis(values, order, axis=1)
        for row in rows[short]:
            indices[row], similarities[row] = search.all_of(int(row), k)
    return Neighbours(indices, similarities)


@overload
def recall_at_k(embeddings: Vectors, labels: ArrayLike, k: int = 1, **options: Any) -> float: ...


@overload
def recall_at_k(
    embeddings: Vectors, labels: ArrayLike, k: Sequence[int], **options: Any
) -> dict[int, float]: ...


def recall_at_k(
    embeddings: Vectors, labels: ArrayLike, k: int | Sequence[int] = 1, **options: Any
) -> float | dict[int, float]:
    r"""Share of queries with an image of their class among their ``k`` nearest.

    This is the Recall@K of deep metric learning (a hit rate), not the recall of information retrieval: a query counts
    once, however many relevant images it has.

    .. math:: R@k = \tfrac{1}{Q} \sum_q \mathbb{1}[\exists\, g \in \mathrm{top}_k(q) : y_g = y_q]

    Args:
        embeddings: ``(n, d)`` of the queries.
        labels: ``(n,)`` their classes.
        k: one number, or several from one search.
        **options: ``gallery`` and ``gallery_labels``, ``similarity``, ``ties``, ``exclude_lone``, ``chunk_size`` of
            :func:`retrieval_metrics`.

    Returns:
        A fraction, or one for each ``k``.

    Raises:
        InputError: as :func:`retrieval_metrics`.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.3]])
        >>> recall_at_k(x, [0, 0, 1, 1])
        0.75
        >>> recall_at_k(x, [0, 0, 1, 1], k=(1, 3))
        {1: 0.75, 3: 1.0}

    References:
        Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016.
    """
    ks = (k,) if isinstance(k, int) else tuple(k)
    found = _evaluate(embeddings, labels, ks, ("recall",), **options)
    values = {key: found[f"recall@{key}"] for key in ks}
    return values[k] if isinstance(k, int) else values


def r_precision(embeddings: Vectors, labels: ArrayLike, **options: Any) -> float:
    r"""Mean share of a query's ``R`` nearest that have its class, ``R`` the number of gallery images that do.

    Queries without any are left out.

    Args:
        embeddings: ``(n, d)`` of the queries.
        labels: ``(n,)`` their classes.
        **options: as in :func:`recall_at_k`.

    Raises:
        InputError: as :func:`retrieval_metrics`.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.3]])
        >>> r_precision(x, [0, 0, 1, 1])
        0.75

    References:
        Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020.
    """
    return _evaluate(embeddings, labels, (), ("r_precision",), **options)["r_precision"]


def map_at_r(embeddings: Vectors, labels: ArrayLike, **options: Any) -> float:
    r"""Mean average precision at ``R``: as :func:`r_precision`, and the order among the ``R`` nearest counts.

    .. math:: \frac{1}{R_q} \sum_{r=1}^{R_q} P_q(r)\, rel_q(r), \qquad P_q(r) = \frac1r \sum_{s \le r} rel_q(s)

    Args:
        embeddings: ``(n, d)`` of the queries.
        labels: ``(n,)`` their classes.
        **options: as in :func:`recall_at_k`.

    Raises:
        InputError: as :func:`retrieval_metrics`.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.3]])
        >>> map_at_r(x, [0, 0, 1, 1])
        0.75

    References:
        Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020.
    """
    return _evaluate(embeddings, labels, (), ("map_at_r",), **options)["map_at_r"]


def retrieval_metrics(
    embeddings: Vectors,
    labels: ArrayLike,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    gallery: Vectors | None = None,
    gallery_labels: ArrayLike | None = None,
    similarity: Similarity = "cosine",
    ties: Ties = "index",
    exclude_lone: bool = False,
    full: bool = False,
    chunk_size: int | None = None,
) -> dict[str, float]:
    """All metrics of one search.

    Args:
        embeddings: ``(n, d)`` of the queries, finite.
        labels: ``(n,)`` their classes, numbers or strings.
        ks: of Recall@k.
        gallery: ``(g, d)``; by default the queries themselves, each left out of its own ranking.
        gallery_labels: ``(g,)``.
        similarity: ``"cosine"``, ``"dot"``, or ``"euclidean"`` (negative squared distance).
        ties: ``"index"`` ranks equals by gallery index; ``"optimistic"`` those of the query's class first,
            ``"pessimistic"`` last: the bounds of what ties can do.
        exclude_lone: leave queries without any image of their class in the gallery out of Recall@k; else they miss.
        full: also ``map`` (over the whole ranking), ``mrr`` and ``map_c``, an older variant whose cut-off and divisor
            count the query itself: a perfect ranking is less than 1. It costs the sorting of the whole gallery.
        chunk_size: queries at a time; default: what fits 64 MB of similarities.

    Returns:
        ``recall@k`` for each k, ``r_precision``, ``map_at_r``, fractions in ``[0, 1]``.

    Raises:
        InputError: for embeddings that are not finite, sizes that do not fit, ``k`` larger than the gallery, or where
            no query has an image of its class to find.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.3]])
        >>> retrieval_metrics(x, [0, 0, 1, 1], ks=(1, 2))
        {'recall@1': 0.75, 'recall@2': 0.75, 'r_precision': 0.75, 'map_at_r': 0.75}
    """
    names = ("recall", "r_precision", "map_at_r") + (("map", "mrr", "map_c") if full else ())
    return _evaluate(
        embeddings,
        labels,
        tuple(ks),
        names,
        gallery=gallery,
        gallery_labels=gallery_labels,
        similarity=similarity,
        ties=ties,
        exclude_lone=exclude_lone,
        chunk_size=chunk_size,
    )


def _evaluate(
    embeddings: Vectors,
    labels: ArrayLike,
    ks: tuple[int, ...],
    names: tuple[str, ...],
    *,
    gallery: Vectors | None = None,
    gallery_labels: ArrayLike | None = None,
    similarity: Similarity = "cosine",
    ties: Ties = "index",
    exclude_lone: bool = False,
    chunk_size: int | None = None,
) -> dict[str, float]:
    if ties not in ("index", "optimistic", "pessimistic"):
        raise InputError(f"ties {ties}: expected index, optimistic or pessimistic; choose one")
    if (gallery is None) != (gallery_labels is None):
        raise InputError(
            "gallery and gallery_labels belong together: expected both or none; give the other one too"
        )
    search = _Search(embeddings, gallery, similarity)
    query_classes, classes = _classes(labels, gallery_labels, search)
    for k in ks:
        search.check_k(k)
    sizes = np.bincount(classes, minlength=int(query_classes.max()) + 1)
    relevant = sizes[query_classes] - (gallery is None)
    if not relevant.any():
        raise InputError(
            f"labels: no query has another image of its class among {search.size} gallery images, expected two images "
            "of at least one class; check the labels"
        )
    only_recall = names == ("recall",)
    depth = search.available if "map" in names else max(ks + (() if only_recall else (int(relevant.max()),)))
    device = search.device
    query_classes, classes, R = (
        torch.from_numpy(values).to(device) for values in (query_classes, classes, relevant)
    )
    sums: dict[str, float] = {}
    for rows, block in search.chunks(depth, chunk_size):
        hits = search.hits(rows, block, depth, query_classes, classes, ties, only_first=only_recall)
        for name, values in _per_query(hits, R[rows.start : rows.stop], ks, names).items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    with_some = int((relevant > 0).sum())
    counts = {f"recall@{k}": with_some if exclude_lone else search.count for k in ks} | {
        "map_c": search.count
    }
    return {name: total / counts.get(name, with_some) for name, total in sums.items()}


def metrics_of_ranking(
    hits: ArrayLike, relevant: ArrayLike, ks: Sequence[int] = (1, 2, 4, 8), *, exclude_lone: bool = False
) -> dict[str, float]:
    """The metrics of rankings that were made elsewhere, such as re-ranked ones.

    Args:
        hits: ``(q, depth)`` bool: is the item at each rank of the query's class?
        relevant: ``(q,)`` how many such items the gallery has.
        ks: of Recall@k.
        exclude_lone: leave queries without any out of Recall@k; else they miss.

    Returns:
        ``recall@k`` for each k, ``r_precision``, ``map_at_r``, as :func:`retrieval_metrics` gives them.

    Raises:
        InputError: for rankings that are less deep than a ``k`` or the largest ``relevant``, and where no query has
            anything to find.

    Example:
        >>> metrics_of_ranking([[False, True], [True, False]], [1, 1], ks=(1,))
        {'recall@1': 0.5, 'r_precision': 0.5, 'map_at_r': 0.5}
    """
    found = torch.from_numpy(np.asarray(hits, dtype=bool))
    R = torch.from_numpy(np.asarray(relevant, dtype=np.int64))
    if found.ndim != 2 or R.shape != found.shape[:1] or not (R > 0).any():
        raise InputError(
            f"hits {tuple(found.shape)}, relevant {tuple(R.shape)}: expected rankings (q, depth) and a number each, "
            "one of them above 0; give both of the same queries"
        )
    wanted = max(*ks, int(R.max())) if ks else int(R.max())
    if found.shape[1] < wanted:
        raise InputError(
            f"hits: {found.shape[1]} ranks, expected {wanted} or more; rank deeper or choose a smaller k"
        )
    with_some = int((R > 0).sum())
    count = {f"recall@{k}": with_some if exclude_lone else len(R) for k in ks}
    values = _per_query(found, R, tuple(ks), ("recall", "r_precision", "map_at_r"))
    return {name: float(value.double().sum()) / count.get(name, with_some) for name, value in values.items()}


def _per_query(hits: Tensor, R: Tensor, ks: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Values of each query from ``hits (b, depth)`` bool; 0 for those without anything to find."""
    found: dict[str, Tensor] = {}
    if "recall" in names:
        found |= {f"recall@{k}": hits[:, :k].any(1) for k in ks}
    if len(found) and len(names) == 1:
        return found
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    within = hits & (rank <= R[:, None])
    divisor = R.clamp_min(1).double()
    if "r_precision" in names:
        found["r_precision"] = within.sum(1) / divisor
    if names == ("r_precision",):
        return found
    precision = hits.cumsum(1).double() / rank
    if "map_at_r" in names:
        found["map_at_r"] = (precision * within).sum(1) / divisor
    if "map" in names:
        found["map"] = (precision * hits).sum(1) / divisor
        found["mrr"] = (hits / rank.double()).amax(1)
        found["map_c"] = (precision * (hits & (rank <= R[:, None] + 1))).sum(1) / (R + 1)
    return found


def _classes(
    labels: ArrayLike, gallery_labels: ArrayLike | None, search: _Search
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes of queries and gallery, counted from 0."""
    given = [_to_numpy(labels)] + ([] if gallery_labels is None else [_to_numpy(gallery_labels)])
    for name, values, size in zip(("labels", "gallery_labels"), given, (search.count, search.size)):
        if values.shape != (size,):
            raise InputError(
                f"{name}: shape {values.shape}, expected one for each of {size} embeddings; check them"
            )
    classes = np.unique(np.concatenate(given), return_inverse=True)[1].reshape(-1).astype(np.int64)
    queries = classes[: search.count]
    return queries, queries if gallery_labels is None else classes[search.count :]


def _to_numpy(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


# --- The search ---------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """Similarities of a chunk of queries, ``(b, columns)`` float32, and the error that each row may have, ``(b,)``."""

    scores: Tensor
    error: Tensor


class _Search:
    """A gallery ready to be searched."""

    def __init__(self, queries: Vectors, gallery: Vectors | None, similarity: Similarity) -> None:
        if similarity not in ("cosine", "dot", "euclidean"):
            raise InputError(f"similarity {similarity}: expected cosine, dot or euclidean; choose one")
        self.similarity = similarity
        self.to_itself = gallery is None
        self.queries = _vectors("embeddings", queries)
        self.gallery = self.queries if gallery is None else _vectors("gallery", gallery)
        if self.gallery.shape[1] != self.queries.shape[1]:
            raise InputError(
                f"gallery: vectors of {self.gallery.shape[1]} channels, expected {self.queries.shape[1]} as the "
                "queries have; embed both with one model"
            )
        self.gallery = self.gallery.to(self.queries)
        self.device = self.queries.device
        self.count, self.size = len(self.queries), len(self.gallery)
        self.available = self.size - self.to_itself
        self.query_norms = _norms(self.queries)
        self.norms = self.query_norms if self.to_itself else _norms(self.gallery)
        groups = -(-self.size // _GROUP)
        self.columns = groups * _GROUP
        self.rows = torch.empty(self.columns, self.gallery.shape[1], device=self.device)
        self.rows[self.size :] = 0
        self.for_product(self.gallery, self.norms, out=self.rows[: self.size])
        self.squares = self.norms.square().float()

    def check_k(self, k: int) -> None:
        if not 1 <= k <= self.available:
            raise InputError(
                f"k {k}: expected 1 to {self.available}, the gallery images that a query can find; choose a smaller k"
            )

    def for_product(self, vectors: Tensor, norms: Tensor, out: Tensor) -> Tensor:
        """The float32 vectors whose product is taken, in ``out``."""
        if self.similarity == "cosine":
            return torch.div(vectors, norms.clamp_min(1e-12)[:, None].to(vectors.dtype), out=out)
        return out.copy_(vectors)

    def chunks(self, depth: int, chunk_size: int | None) -> Generator[tuple[range, _Block]]:
        """Rows of queries with their similarities to all of the gallery, which last until the next ones."""
        if chunk_size is not None and chunk_size < 1:
            raise InputError(f"chunk_size {chunk_size}: expected 1 or more; leave it out for the default")
        size = chunk_size or max(1, _CHUNK_BYTES // (4 * self.columns))
        size = min(size, self.count)
        # Any order of summation errs by at most u per term of the sum of |q_i g_i|, which the norms bound.
        unit = (self.queries.shape[1] + 8) * 1.1 * 2.0**-24
        largest = self.norms.max()
        buffer = torch.empty(size, self.columns, device=self.device)
        with torch.no_grad(), _full_precision():
            for start in range(0, self.count, size):
                rows = range(start, min(start + size, self.count))
                norms = self.query_norms[rows.start : rows.stop]
                if self.to_itself:
                    chunk = self.rows[rows.start : rows.stop]
                else:
                    asking = self.queries[rows.start : rows.stop]
                    chunk = self.for_product(asking, norms, torch.empty_like(asking, dtype=torch.float32))
                scores = buffer[: len(rows)]
                if self.similarity == "euclidean":
                    torch.mm(chunk * 2, self.rows.T, out=scores)
                    scores[:, : self.size] -= self.squares
                    error = unit * (2 * norms * largest + largest.square())
                else:
                    torch.mm(chunk, self.rows.T, out=scores)
                    error = unit * (norms * largest if self.similarity == "dot" else torch.ones_like(norms))
                scores[:, self.size :] = -torch.inf
                if self.to_itself:
                    here = torch.arange(len(rows), device=self.device)
                    scores[here, here + start] = -torch.inf
                yield rows, _Block(scores, error)

    def best(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``(b, count)`` largest values and their columns, falling."""
        groups = self.columns // _GROUP
        if count * 4 >= groups:
            found = scores.topk(count, dim=1)
            return found.values, found.indices
        # The largest lie in the groups with the largest maxima.
        chosen = scores.view(len(scores), groups, _GROUP).amax(2).topk(count, dim=1, sorted=False).indices
        columns = (chosen[:, :, None] * _GROUP + torch.arange(_GROUP, device=scores.device)).flatten(1)
        found = scores.gather(1, columns).topk(count, dim=1)
        return found.values, columns.gather(1, found.indices)

    def hits(
        self,
        rows: range,
        block: _Block,
        depth: int,
        query_classes: Tensor,
        classes: Tensor,
        ties: Ties,
        *,
        only_first: bool,
    ) -> Tensor:
        """``(b, depth)``: is the item at each rank of the query's class? Exact at all, or to the first that is."""
        wanted = query_classes[rows.start : rows.stop, None]

        def is_hit(columns: Tensor, of: Tensor | slice) -> Tensor:
            return classes[columns.clamp_max(self.size - 1)] == wanted[of]

        values, columns = self.best(block.scores, min(depth + 1, self.available))
        hits = is_hit(columns, slice(None))
        close = values[:, :-1] - values[:, 1:] <= 2 * block.error[:, None]
        # Items in doubt matter where their classes differ; beyond the last rank nobody knows.
        matters = hits[:, :-1] != hits[:, 1:]
        matters[:, depth - 1 :] = True
        if only_first:
            matters &= hits[:, :-1].cumsum(1) <= hits[:, :-1]  # no hit at an earlier rank
        doubtful = (close & matters).any(1).nonzero()[:, 0]
        hits = hits[:, :depth]
        for some in doubtful.split(max(1, _CHUNK_BYTES // (64 * (depth + _PAD)))):
            order = {"index": None, "optimistic": 1, "pessimistic": -1}[ties]
            first = None if order is None else (lambda c, of, sign=order: sign * is_hit(c, of).to(torch.int8))
            columns, _ = self._exactly(rows, block, some, depth, first)
            hits[some] = is_hit(columns, some)
        return hits

    def ordered(self, rows: range, block: _Block, k: int) -> tuple[Tensor, Tensor]:
        """``(b, k)`` columns by falling similarity and, of equals, rising index; with the similarities, float64."""
        values, columns = self.best(block.scores, min(k + 1, self.available))
        close = (values[:, :-1] - values[:, 1:] <= 2 * block.error[:, None]).any(1)
        every = torch.arange(len(rows), device=self.device)
        columns = columns[:, :k]
        similarities = self.exact(every + rows.start, columns)
        doubtful = close.nonzero()[:, 0]
        columns[doubtful], similarities[doubtful] = self._exactly(rows, block, doubtful, k, None)
        return columns, similarities

    def _exactly(
        self,
        rows: range,
        block: _Block,
        some: Tensor,
        depth: int,
        first: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """The ``depth`` nearest of ``some`` rows of the chunk in float64; equals by ``first``, then by index."""
        columns = torch.empty(len(some), depth, dtype=torch.int64, device=self.device)
        similarities = torch.empty(len(some), depth, dtype=torch.float64, device=self.device)
        open_rows, pad = torch.arange(len(some), device=self.device), _PAD
        while len(open_rows):
            of = some[open_rows]
            count = min(depth + pad, self.available)
            values, found = block.scores[of].topk(count, dim=1)
            found = found.sort(1).values
            exact = self.exact(of + rows.start, found)
            if first is not None:
                order = first(found, of).sort(dim=1, descending=True, stable=True).indices
                found, exact = found.gather(1, order), exact.gather(1, order)
            order = exact.sort(dim=1, descending=True, stable=True).indices[:, :depth]
            columns[open_rows], similarities[open_rows] = found.gather(1, order), exact.gather(1, order)
            if count == self.available:
                break
            bound = values[:, -1].double() + block.error[of]  # of everything that is no candidate
            if self.similarity == "euclidean":
                bound = bound - self.query_norms[of + rows.start].square()
            open_rows = open_rows[similarities[open_rows, -1] <= bound]
            pad *= 4
        return columns, similarities

    def all_of(self, query: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The ``k`` nearest of one query, from all similarities in float64."""
        every = torch.arange(self.size, device=self.device)
        values = self.exact(torch.tensor([query], device=self.device), every[None])[0].cpu().numpy()
        if self.to_itself:
            values[query] = -np.inf
        order = np.argsort(-values, kind="stable")[:k]
        return order, values[order]

    def exact(self, queries: Tensor, columns: Tensor) -> Tensor:
        """``(b, m)`` in float64, of queries ``(b,)`` and columns ``(b, m)``. Equal rows give equal bits."""
        flat = columns.flatten()
        asking = queries[:, None].expand_as(columns).flatten()
        result = torch.empty(len(flat), dtype=torch.float64, device=self.device)
        piece = max(1, _CHUNK_BYTES // (32 * self.queries.shape[1]))
        for start in range(0, len(flat), piece):
            part = slice(start, start + piece)
            q, g = self.queries[asking[part]].double(), self.gallery[flat[part]].double()
            if self.similarity == "euclidean":
                result[part] = -(q - g).square().sum(1)
                continue
            product = (q * g).sum(1)  # a matrix product might sum one row in another order than the next
            if self.similarity == "cosine":
                lengths = self.query_norms[asking[part]] * self.norms[flat[part]]
                product = product / lengths.clamp_min(1e-24)
            result[part] = product
        return result.view(columns.shape)


def _norms(vectors: Tensor) -> Tensor:
    """``(n,)`` float64 lengths; a part at a time, since the whole in float64 would take twice the memory."""
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in vectors.split(128)]
    return torch.cat(parts)


def _vectors(name: str, values: Vectors) -> Tensor:
    tensor = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if tensor.ndim != 2 or not tensor.numel():
        raise InputError(
            f"{name}: shape {tuple(tensor.shape)}, expected vectors (n, d); give one row for each image"
        )
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    finite = torch.isfinite(tensor.sum(1))  # one pass; a sum may also overflow
    if not finite.all() and not torch.isfinite(tensor).all():
        row = int((~torch.isfinite(tensor).all(1)).nonzero()[0])
        raise InputError(
            f"{name}: row {row} holds values that are not finite, expected numbers; the model's weights are damaged, "
            "load others"
        )
    return tensor


@contextmanager
def _full_precision() -> Generator[None]:
    """float32 products in float32, whatever the program allows elsewhere (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- Clustering -----------------------------------------------------------------------------------------------


def nmi(
    labels: ArrayLike,
    clusters: ArrayLike,
    normalisation: Literal["arithmetic", "geometric", "min", "max"] = "arithmetic",
) -> float:
    r"""Normalised mutual information of classes and clusters.

    .. math:: \frac{2\, I(Y; C)}{H(Y) + H(C)}

    Chance level is high where clusters are small: compare values of one data set only.

    Args:
        labels: ``(n,)`` classes.
        clusters: ``(n,)`` cluster of each image, for example of :func:`kmeans`.
        normalisation: mean of the two entropies.

    Returns:
        A fraction; 1 where both are one group, 0 where only one of them is.

    Raises:
        InputError: for no images, or shapes that disagree.

    Example:
        >>> nmi([0, 0, 1, 1], [5, 5, 3, 3])
        1.0
        >>> nmi([0, 0, 1, 1], [5, 5, 5, 5])
        0.0
    """
    given = [_to_numpy(labels), _to_numpy(clusters)]
    if given[0].ndim != 1 or given[0].shape != given[1].shape or not len(given[0]):
        raise InputError(
            f"labels {given[0].shape} and clusters {given[1].shape}: expected two lists of one length, not empty; "
            "give one class and one cluster for each image"
        )
    means: dict[str, Callable[[float, float], float]] = {
        "arithmetic": lambda a, b: (a + b) / 2,
        "geometric": lambda a, b: float(np.sqrt(a * b)),
        "min": min,
        "max": max,
    }
    if normalisation not in means:
        raise InputError(f"normalisation {normalisation}: expected {', '.join(means)}; choose one")
    classes, groups = (np.unique(values, return_inverse=True)[1].reshape(-1) for values in given)
    joint = np.unique(classes.astype(np.int64) * (int(groups.max()) + 1) + groups, return_counts=True)[1]
    h_classes, h_groups, h_joint = (
        _entropy(counts) for counts in (np.bincount(classes), np.bincount(groups), joint)
    )
    if h_classes == 0 or h_groups == 0:
        return float(h_classes == h_groups)
    return float(max(h_classes + h_groups - h_joint, 0.0) / means[normalisation](h_classes, h_groups))


def _entropy(counts: NDArray[np.int64]) -> float:
    if len(counts) == 1:
        return 0.0
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


class Clustering(NamedTuple):
    """What :func:`kmeans` finds.

    Attributes:
        clusters: ``(n,)`` int64, nearest centroid of each vector.
        centroids: ``(k, d)``.
    """

    clusters: NDArray[np.int64]
    centroids: NDArray[np.floating[Any]]


def kmeans(
    embeddings: Vectors,
    k: int | None = None,
    *,
    start: Vectors | None = None,
    iterations: int = 20,
    seed: int = 0,
) -> Clustering:
    """Lloyd's k-means on all vectors, without sub-sampling; distances a chunk at a time.

    Args:
        embeddings: ``(n, d)`` finite; float64 is computed in float64, all else in float32.
        k: clusters, at most ``n``.
        start: ``(k, d)`` first centroids instead of ``k`` vectors drawn at random.
        iterations: of assigning all vectors (to the first of equally near centroids) and moving the centroids. A
            cluster that is empty keeps its centroid.
        seed: of the draw.

    Raises:
        InputError: for vectors that are not finite or do not fit, and ``k`` out of range.

    Example:
        >>> x = np.array([[0.0], [0.1], [5.0], [5.2]])
        >>> kmeans(x, start=x[[0, 2]]).centroids.round(2).tolist()
        [[0.05], [5.1]]
    """
    x = _vectors("embeddings", embeddings)
    if (k is None) == (start is None):
        raise InputError(
            "k and start exclude each other: expected the number of clusters or their centroids; give one"
        )
    if start is not None:
        centroids = _vectors("start", start).to(x, copy=True)
        if centroids.shape[1] != x.shape[1]:
            raise InputError(
                f"start: {centroids.shape[1]} channels, expected {x.shape[1]}; give centroids of these vectors"
            )
    else:
        if k is None or not 1 <= k <= len(x):
            raise InputError(f"k {k}: expected 1 to {len(x)}, the number of vectors; choose fewer clusters")
        chosen = np.random.default_rng(seed).choice(len(x), size=k, replace=False)
        centroids = x[torch.from_numpy(chosen).to(x.device)]
    size = max(1, _CHUNK_BYTES // (x.element_size() * len(centroids)))
    with torch.no_grad(), _full_precision():
        clusters = _assign(x, centroids, size)
        for _ in range(iterations):
            counts = torch.bincount(clusters, minlength=len(centroids))
            sums = torch.zeros_like(centroids).index_add_(0, clusters, x)
            filled = counts > 0
            centroids[filled] = sums[filled] / counts[filled, None]
            clusters = _assign(x, centroids, size)
    return Clustering(clusters.cpu().numpy(), centroids.cpu().numpy())


def _assign(x: Tensor, centroids: Tensor, size: int) -> Tensor:
    half = centroids.square().sum(1) / 2
    return torch.cat([(half - part @ centroids.T).argmin(1) for part in x.split(size)])
