"""Which images belong to which split, when the data set does not say: fixed lists, or a hash of the id."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import read_json
from .listing import numbered_lines

logger = logging.getLogger(__name__)

Keep = Callable[[Sequence[str], Sequence[int]], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """What to do without official splits, see :func:`attnmap_core.data.sources.load_data`."""

    val_fraction: float = 0.0
    test_fraction: float = 0.3
    seed: int = 0
    file: Path | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"{name} {getattr(self, name)}: expected a share in [0, 1), such as 0.1; change it"
                )
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction {self.fraction}: expected a share in (0, 1], such as 0.25; change it")


@dataclass(frozen=True)
class SplitPlan:
    """Which official splits to read, and which of their rows to keep: ``keep(ids, labels) -> indices``."""

    read: tuple[str, ...]
    keep: Keep


def plan_split(
    source: object, available: Sequence[str], split: str, options: SplitOptions, hints: Mapping[str, str]
) -> SplitPlan:
    """Decide how to get ``split`` from the ``available`` ones (``["all"]`` where there are none).

    Raises:
        InputError: if it cannot be had, with what to do about it.
    """
    plan = _whole_split(source, available, split, options, hints)
    if split != "train" or options.fraction == 1:
        return plan
    return SplitPlan(plan.read, partial(_sampled, options, plan.keep))


def _whole_split(
    source: object, available: Sequence[str], split: str, options: SplitOptions, hints: Mapping[str, str]
) -> SplitPlan:
    if options.file is not None:
        return SplitPlan(tuple(available), partial(_listed, options.file, split))
    if split == "all":
        return SplitPlan(tuple(available), _everything)
    holds_out = "val" not in available and options.val_fraction > 0
    if "all" in available:
        share = {"val": options.val_fraction, "test": options.test_fraction}.get(split, 1.0)
        if share == 0:
            raise InputError(
                f"{source}: no official splits and {split}_fraction is 0; give a share such as 0.1"
            )
        return SplitPlan(("all",), partial(_dealt, options, split))
    without_test = SplitOptions(val_fraction=options.val_fraction, test_fraction=0.0, seed=options.seed)
    if split in available:
        deals = split == "train" and holds_out
        return SplitPlan((split,), partial(_dealt, without_test, split) if deals else _everything)
    if split == "val" and "train" in available and holds_out:
        return SplitPlan(("train",), partial(_dealt, without_test, "val"))
    remedies = [hints[split]] if split in hints else []
    if split == "val" and "train" in available:
        remedies.append("hold out a part of train (val_fraction 0.1)")
    raise InputError(
        f"{source}: no split '{split}', found {', '.join(available)}; "
        f"{', or '.join(remedies) or 'choose one of those'}"
    )


def deal(
    image_ids: Sequence[str],
    labels: Sequence[int],
    *,
    val_fraction: float = 0.0,
    test_fraction: float = 0.3,
    seed: int = 0,
) -> dict[str, list[int]]:
    """Deal images into splits, class by class, in the order of a hash of seed and id.

    Args:
        image_ids: unique ids.
        labels: their classes; the shares hold in each class, to the nearest image.
        val_fraction: share of what is not test.
        test_fraction: share of all.
        seed: another seed deals otherwise.

    Returns:
        Indices for ``train``, ``val`` and ``test``, ascending; every class keeps an image for ``train``.

    Example:
        >>> dealt = deal([str(i) for i in range(20)], [0] * 20, val_fraction=0.5)
        >>> {name: len(indices) for name, indices in dealt.items()}
        {'train': 7, 'val': 7, 'test': 6}
    """
    dealt: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for indices in _shuffled_classes(image_ids, labels, seed):
        test = min(int(len(indices) * test_fraction + 0.5), len(indices) - 1)
        rest = len(indices) - test
        val = min(int(rest * val_fraction + 0.5), rest - 1)
        dealt["test"] += indices[:test]
        dealt["val"] += indices[test : test + val]
        dealt["train"] += indices[test + val :]
    return {name: sorted(indices) for name, indices in dealt.items()}


def sample(image_ids: Sequence[str], labels: Sequence[int], fraction: float, seed: int = 0) -> list[int]:
    """Choose a share of the images of each class, in the order of a hash of seed and id.

    A larger share contains every smaller one, and neither the machine nor the order of the files matters.

    Args:
        image_ids: unique ids.
        labels: their classes.
        fraction: of each class, to the nearest image; every class keeps one.
        seed: another seed chooses otherwise.

    Returns:
        Indices, ascending.

    Example:
        >>> sample([str(i) for i in range(8)], [0] * 4 + [1] * 4, 0.25)
        [2, 6]
    """
    return sorted(
        index
        for indices in _shuffled_classes(image_ids, labels, seed)
        for index in indices[: max(1, int(len(indices) * fraction + 0.5))]
    )


def _shuffled_classes(image_ids: Sequence[str], labels: Sequence[int], seed: int) -> Iterable[list[int]]:
    """The indices of each class, in the order of the hash."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{image_ids[index]}".encode(), digest_size=16).digest()

    return [sorted(indices, key=rank) for indices in of_class.values()]


def read_class_list(path: Path, labels: Sequence[str]) -> list[str]:
    """The classes that a text file names, one a line, in the order of ``labels``.

    Raises:
        InputError: for a file that is missing or empty, a class that is not one of ``labels``, or one twice.
    """
    lines: dict[str, int] = {}
    for number, line in numbered_lines(path):
        name = line.strip()
        if name in lines:
            raise InputError(f"{path}:{number}: class '{name}' again, as in line {lines[name]}; remove one")
        lines[name] = number
    if not lines:
        raise InputError(f"{path}: no classes in it, expected one a line; add them")
    for name, number in lines.items():
        if name not in labels:
            raise InputError(
                f"{path}:{number}: no class '{name}', the data have {_near(name, labels)} ...; correct it"
            )
    return [label for label in labels if label in lines]


def only_classes(
    source: object, labels: Sequence[str], classes: Sequence[str] | None
) -> tuple[list[str], list[int]]:
    """The class names that are kept, and for each old class its new index, -1 for one that is not kept.

    Raises:
        InputError: for a class that the data set does not have.
    """
    if classes is None:
        return list(labels), list(range(len(labels)))
    for name in classes:
        if name not in labels:
            raise InputError(
                f"{source}: no class '{name}', it has {_near(name, labels)} ...; correct the name"
            )
    if len(set(classes)) != len(classes) or not classes:
        raise InputError(
            f"{source}: classes {list(classes)}, expected each once and at least one; correct the list"
        )
    return list(classes), [classes.index(name) if name in classes else -1 for name in labels]


def _near(name: str, labels: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, labels, n=3)) or ", ".join(labels[:8])


def check_unique(source: object, image_ids: Sequence[str]) -> None:
    """Raise an :class:`InputError` if an id occurs twice."""
    if len(set(image_ids)) != len(image_ids):
        twice = next(image_id for image_id, count in Counter(image_ids).items() if count > 1)
        raise InputError(
            f"{source}: image id '{twice}' occurs twice, expected unique ids; remove or rename one"
        )


def _everything(image_ids: Sequence[str], labels: Sequence[int]) -> Sequence[int]:
    del labels
    return range(len(image_ids))


def _dealt(
    options: SplitOptions, split: str, image_ids: Sequence[str], labels: Sequence[int]
) -> Sequence[int]:
    return deal(
        image_ids,
        labels,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
    )[split]


def _sampled(
    options: SplitOptions, keep: Keep, image_ids: Sequence[str], labels: Sequence[int]
) -> Sequence[int]:
    kept = list(keep(image_ids, labels))
    ids, classes = [image_ids[index] for index in kept], [labels[index] for index in kept]
    return [kept[index] for index in sample(ids, classes, options.fraction, options.seed)]


def _listed(path: Path, split: str, image_ids: Sequence[str], labels: Sequence[int]) -> Sequence[int]:
    del labels
    lists = _read_lists(path)
    if split != "all" and split not in lists:
        raise InputError(
            f"{path}: no list '{split}', found {', '.join(lists)}; add it or choose another split"
        )
    index_of = {image_id: index for index, image_id in enumerate(image_ids)}
    for name, wanted in lists.items():
        for image_id in wanted:
            if image_id not in index_of:
                raise InputError(f"{path}: '{image_id}' of {name} is not in the data set; remove it")
    kept = [image_id for name, wanted in lists.items() if split in ("all", name) for image_id in wanted]
    logger.info("%s: %d of %d images are %s", path, len(kept), len(image_ids), split)
    return [index_of[image_id] for image_id in kept]


def _read_lists(path: Path) -> dict[str, list[str]]:
    content: Any = read_json(path)
    lists: dict[str, list[str]] = {}
    found_in: dict[str, str] = {}
    for name, wanted in content.items() if isinstance(content, dict) else [("", None)]:
        if name not in ("train", "val", "test") or not isinstance(wanted, list):
            raise InputError(
                f'{path}: expected {{"train": [ids], "val": [ids], "test": [ids]}}, found {name!r}'
                "; correct it"
            )
        lists[name] = [str(image_id) for image_id in wanted]
        for image_id in lists[name]:
            if image_id in found_in:
                raise InputError(
                    f"{path}: '{image_id}' is in {found_in[image_id]} and again in {name}; keep one"
                )
            found_in[image_id] = name
    return lists
