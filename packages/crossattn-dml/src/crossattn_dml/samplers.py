"""Which images share a batch: a few classes with a few images each, so that every batch has pairs to learn from.

A sampler is an :class:`attnmap_core.data.loaders.Order`: from the seed and the epoch alone it tells the images of an
epoch, of all processes together. Resumed runs and other numbers of processes therefore see the same batches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
from attnmap_core.errors import InputError
from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)

Sampler = Literal["m_per_class", "balanced", "random"]


class MPerClass:
    """Batches of ``batch_size / per_class`` classes with ``per_class`` images each.

    Drawn as the authors' group draws: classes uniformly with replacement, so that one may come twice in a batch, and
    images of a class with replacement. One image twice is augmented anew; it makes no pair with itself, see
    :class:`~crossattn_dml.task.ConditionalTraining`.

    Args:
        labels: ``(n,)`` class of each image.
        batch_size: images of all processes that a batch has together; a multiple of ``per_class``.
        per_class: images of a class in a batch, 2 or more.
        seed: with the epoch it decides every draw.

    Raises:
        InputError: for sizes that do not fit each other or the data. Classes with a single image are left out, as no
            pair comes of them, with a warning that says how many.

    Example:
        >>> labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
        >>> pairs = labels[MPerClass(labels, batch_size=4)(0)].reshape(-1, 2)
        >>> len(pairs), bool((pairs[:, 0] == pairs[:, 1]).all())
        (4, True)
    """

    def __init__(self, labels: ArrayLike, batch_size: int, *, per_class: int = 2, seed: int = 26) -> None:
        self.places = _by_class(labels)
        self.batch_size, self.per_class, self.seed = batch_size, per_class, seed
        images = sum(map(len, self.places))
        if per_class < 2 or batch_size % per_class:
            raise InputError(
                f"per_class {per_class}: expected 2 or more, and a divisor of {batch_size}, the images of a batch over "
                "all processes; change per_class or batch_size"
            )
        self.batches = images // batch_size
        if not self.batches:
            raise InputError(
                f"batch_size {batch_size}: expected at most {images}, the training images of classes with two or more; "
                "choose a smaller batch"
            )

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __call__(self, epoch: int) -> list[int]:
        """Places of the images of a 0-based epoch, batch after batch, class after class in each."""
        rng = np.random.default_rng([self.seed, epoch])
        return [place for _ in range(self.batches) for place in self._batch(rng)]

    def _batch(self, rng: np.random.Generator) -> list[int]:
        chosen = rng.integers(len(self.places), size=self.batch_size // self.per_class)
        return [int(p) for c in chosen for p in rng.choice(self.places[c], size=self.per_class)]


class Balanced(MPerClass):
    """As :class:`MPerClass` without repeats: all classes come equally often, and no image twice in a batch.

    Classes are gone through in random rounds, and so are the images of each; a class that has fewer than ``per_class``
    images gives all it has, again and again, as the batch must be full (what repeats makes no pair with itself).

    Args:
        labels, batch_size, per_class, seed: as in :class:`MPerClass`; there must be classes enough for a batch.

    Raises:
        InputError: as :class:`MPerClass`, and for fewer classes than a batch takes.

    Example:
        >>> sampler = Balanced([0, 0, 0, 1, 1, 2, 2, 2], batch_size=4)
        >>> all(len(set(sampler(0)[i : i + 4])) == 4 for i in (0, 4))
        True
    """

    def __init__(self, labels: ArrayLike, batch_size: int, *, per_class: int = 2, seed: int = 26) -> None:
        super().__init__(labels, batch_size, per_class=per_class, seed=seed)
        if batch_size // per_class > len(self.places):
            raise InputError(
                f"batch_size {batch_size}: takes {batch_size // per_class} classes with {per_class} images each, the "
                f"data have {len(self.places)} with two or more; raise per_class or choose a smaller batch"
            )

    def __call__(self, epoch: int) -> list[int]:
        """Places of the images of a 0-based epoch, batch after batch, class after class in each."""
        rng = np.random.default_rng([self.seed, epoch])
        waiting: list[int] = []
        left: list[list[int]] = [[] for _ in self.places]
        order: list[int] = []
        for _ in range(self.batches):
            batch: list[int] = []
            while len(batch) < self.batch_size // self.per_class:
                # A new round may begin with classes that the batch has: they wait for the next one.
                first = next((place for place, c in enumerate(waiting) if c not in batch), None)
                if first is None:
                    waiting += rng.permutation(len(self.places)).tolist()
                else:
                    batch.append(waiting.pop(first))
            for c in batch:
                order += self._images(rng, c, left)
        return order

    def _images(self, rng: np.random.Generator, c: int, left: list[list[int]]) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < self.per_class:
            fresh = [place for place in left[c] if place not in drawn]
            if not fresh:
                left[c] += rng.permutation(self.places[c]).tolist()
                fresh = [place for place in left[c] if place not in drawn] or left[c]
            left[c].remove(fresh[0])
            drawn.append(fresh[0])
        return drawn


def make_sampler(
    name: Sampler, labels: ArrayLike, batch_size: int, *, per_class: int = 2, seed: int = 26
) -> MPerClass | None:
    """The sampler of that name; None for ``"random"``, every image once an epoch in random order.

    Args:
        name: ``"m_per_class"``, ``"balanced"`` or ``"random"``.
        labels, batch_size, per_class, seed: as in :class:`MPerClass`.

    Raises:
        InputError: for another name, and what the samplers refuse.

    Example:
        >>> make_sampler("random", [0, 0], 2) is None
        True
    """
    if name not in ("m_per_class", "balanced", "random"):
        raise InputError(f"sampler {name}: expected m_per_class, balanced or random; choose one")
    if name == "random":
        return None
    kind = Balanced if name == "balanced" else MPerClass
    return kind(labels, batch_size, per_class=per_class, seed=seed)


def _by_class(labels: ArrayLike) -> list[NDArray[np.int64]]:
    """Places of the images of each class that has two or more."""
    values = np.asarray(labels)
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order])) + 1
    groups: Sequence[NDArray[np.int64]] = np.split(order, starts) if len(order) else []
    several = [group for group in groups if len(group) > 1]
    if len(several) < len(groups):
        logger.warning(
            "%d of %d classes have a single image and make no pair: left out of training",
            len(groups) - len(several),
            len(groups),
        )
    if not several:
        raise InputError(
            f"no class has two images among {len(values)}, expected pairs to learn from; add images or use other data"
        )
    return several
