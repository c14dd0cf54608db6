"""Which classes are learnt from, which choose settings, and which are searched: no class does two of these.

Standard splits of the field: CUB-200-2011 and Cars196 take the first half of the classes of *all* their photos for
training, whatever their official split; Stanford Online Products and In-Shop have lists of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from attnmap_core.data.sources import ImageData, load_data
from attnmap_core.errors import InputError

ClassSplit = Literal["official", "first", "random"]


class ZeroShotData(NamedTuple):
    """The parts of a data set, by class.

    Attributes:
        train: to learn from; labels count from 0.
        val: classes held out of the training ones, to choose settings by; None where none are.
        query: unseen classes to search with.
        gallery: what they search in; None where it is the queries themselves, each left out of its own result.
    """

    train: ImageData
    val: ImageData | None
    query: ImageData
    gallery: ImageData | None


def load_zero_shot(
    source: str,
    options: Mapping[str, Any] | None = None,
    *,
    class_split: ClassSplit = "official",
    train_share: float = 0.5,
    split_seed: int = 0,
    val_share: float = 0.0,
    query_split: str = "test",
    gallery_split: str | None = None,
) -> ZeroShotData:
    """Divide a data set by class.

    Args:
        source: as for :func:`attnmap_core.data.sources.load_data`.
        options: of the source.
        class_split: ``"official"`` takes the source's own splits, whose classes must differ; ``"first"`` the first
            ``train_share`` of the classes of all photos for training and the others for tests; ``"random"`` a random
            ``train_share`` of them.
        train_share: of the classes; their number is rounded down.
        split_seed: of ``"random"``.
        val_share: of the training classes, the last ones in their order, that are held out.
        query_split, gallery_split: of ``"official"``: which splits are searched with and searched in.

    Raises:
        InputError: for a class that training and test share, shares that leave nothing, data that stream, and what
            the source refuses.

    Example:
        >>> source = "synthetic:classes=8,superclasses=2,unseen=3,image_size=32,scale_min=0.4,train=20,test=9"
        >>> data = load_zero_shot(source, val_share=0.4)
        >>> [len(part.labels) for part in (data.train, data.val, data.query)]
        [3, 2, 3]
    """
    if not 0 < train_share < 1 or not 0 <= val_share < 1:
        raise InputError(
            f"train_share {train_share}, val_share {val_share}: expected shares between 0 and 1; change them"
        )
    if class_split not in ("official", "first", "random"):
        raise InputError(f"class_split {class_split}: expected official, first or random; choose one")
    given = dict(options or {})
    if given.get("streaming"):
        raise InputError(f"{source}: a stream cannot be divided by class; load it without streaming")
    gallery: ImageData | None = None
    if class_split == "official":
        train, query = load_data(source, "train", **given), load_data(source, query_split, **given)
        gallery = None if gallery_split is None else load_data(source, gallery_split, **given)
        learnt = _shown(train)
        tested = sorted({*_shown(query), *(_shown(gallery) if gallery is not None else ())})
        if both := sorted({train.labels[k] for k in learnt} & {query.labels[k] for k in tested}):
            raise InputError(
                f"{source}: class '{both[0]}' and {len(both) - 1} more are in train and in {query_split}, expected "
                "other classes in each; divide by class with --class-split first or random, or correct the splits"
            )
        train, query = train.of_classes(learnt), query.of_classes(tested)
        gallery = None if gallery is None else gallery.of_classes(tested)
    else:
        everything = _every_photo(source, given)
        classes = _shown(everything)
        if class_split == "random":
            classes = [classes[i] for i in np.random.default_rng(split_seed).permutation(len(classes))]
        count = int(len(classes) * train_share)
        if not 0 < count < len(classes):
            raise InputError(
                f"train_share {train_share}: leaves {count} of {len(classes)} classes for training, expected some for "
                "training and some for tests; change it"
            )
        train = everything.of_classes(classes[:count])
        query = everything.of_classes(classes[count:])
    val: ImageData | None = None
    if val_share:
        held_out = int(len(train.labels) * val_share)
        if not 0 < held_out < len(train.labels):
            raise InputError(
                f"val_share {val_share}: holds out {held_out} of {len(train.labels)} training classes, expected one or "
                "more and some left; change it"
            )
        first = len(train.labels) - held_out
        train, val = (
            train.of_classes(list(part)) for part in (range(first), range(first, len(train.labels)))
        )
    return ZeroShotData(train, val, query, gallery)


def _every_photo(source: str, options: Mapping[str, Any]) -> ImageData:
    """All photos; of CUB-200-2011 and Cars196 those of their splits ``train`` and ``test``, as the field has it:
    CUBV2, where it is unpacked there, is no part of them, and a missing list of test photos is not passed over."""
    everything = load_data(source, "all", **options)
    if everything.name.partition(":")[0] not in ("cub", "cars"):
        return everything
    own = {name for split in ("train", "test") for name in load_data(source, split, **options).image_ids}
    return everything.select([i for i, name in enumerate(everything.image_ids) if name in own])


def _shown(data: ImageData) -> list[int]:
    """Classes that have an image, rising."""
    return np.unique(data.targets).tolist()
