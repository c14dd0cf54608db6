"""Whatever the ``datasets`` library loads: the Hub, parquet, arrow, ``save_to_disk``; streaming too."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ...errors import InputError
from .listing import image_features, import_datasets
from .splits import SplitPlan, check_unique, only_classes

# What columns are usually called; the first that is there is taken.
_COLUMNS = {
    "image": ("image", "img", "picture", "photo", "jpg", "png", "webp"),
    "label": ("label", "labels", "fine_label", "class", "cls", "category", "target"),
    "image_id": ("image_id", "id", "file_name", "filename", "__key__"),
    "bbox": ("objects", "bbox", "bboxes"),
    "mask": ("masks", "mask"),
    "ignore": ("ignore",),
}
_SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "validation": "val", "valid": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A data set of the ``datasets`` library, opened but not read.

    Attributes:
        name: as the user wrote it, for messages; ``title`` the same without the way to a local folder.
        splits: the library's name of each of our splits; ``{"all": name}`` if there is a single one.
        load: library's split name to its rows.
        columns: our column to theirs.
        labels: class names, if they were given or the data tell them.
    """

    name: str
    title: str
    splits: Mapping[str, str]
    load: Callable[[str], Any]
    columns: Mapping[str, str]
    labels: Sequence[str] | None


def open_hub(
    where: str,
    *,
    labels: Sequence[str] | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> HubSource:
    """Open ``//owner/name[:config]`` or a local path, with ``?column=name&...`` after it where needed.

    Columns are found by their usual names: image (``image``, ``img``, ...), label (``label``, ``labels``,
    ``fine_label``, ...), and if they are there image_id, bbox (``objects.bbox``, ``bbox`` or ``bboxes``;
    ``[x, y, width, height]`` in pixels), mask (``mask`` or ``masks``) and ignore. ``?label=breed`` names one;
    ``?revision=...`` chooses a version. Of ``val``, ``validation``, ``valid``, ``dev`` the one that is there
    is ``val``. A data set of one split counts as not split.

    Raises:
        InputError: if it cannot be loaded, or lacks an image or a label column.
    """
    path, _, query = where.partition("?")
    chosen = dict(parse_qsl(query))
    for key in chosen:
        if key not in (*_COLUMNS, "revision"):
            raise InputError(
                f"hf:{where}: unknown option '{key}', expected {', '.join(_COLUMNS)} or revision"
            )
    name = f"hf:{path}"
    found, load = _loader(name, path, chosen.pop("revision", None), streaming=streaming, cache_dir=cache_dir)
    splits: dict[str, str] = {}
    for theirs in found:
        splits.setdefault(_SPLITS.get(theirs, theirs), theirs)
    features = load(splits.get("train", found[0])).features
    if features is None:
        raise InputError(f"{name}: its columns are not known when streaming; load it without streaming")
    columns = _columns(name, list(features), chosen)
    return HubSource(
        name=name,
        title=name if path.startswith("//") else f"hf:{Path(path).resolve().name}",
        splits={"all": found[0]} if len(found) == 1 and not streaming else splits,
        load=load,
        columns=columns,
        labels=labels if labels is not None else getattr(features[columns["label"]], "names", None),
    )


def class_names(source: HubSource) -> list[str]:
    """The class names of all splits, from the label column where the data do not tell them.

    Raises:
        InputError: for a label column that holds no class names or numbers.
    """
    return list(source.labels) if source.labels is not None else _labels_found(source)


def read_split(source: HubSource, plan: SplitPlan, classes: Sequence[str] | None) -> tuple[Any, list[str]]:
    """The rows that the plan keeps, with our features, and the class names.

    The images stay where the library has them (memory-mapped); ids, labels, boxes and encoded masks are
    copied.

    Raises:
        InputError: for labels, boxes or ids that are missing or of the wrong kind, with the row.
    """
    labels = class_names(source)
    names, numbers = only_classes(source.name, labels, classes)
    tables = [_table(source, source.splits[split], labels, names, numbers) for split in plan.read]
    table = import_datasets().concatenate_datasets(tables).select_columns(list(image_features(names)))
    column = table.select_columns(["image_id", "label"])[:]
    check_unique(source.name, column["image_id"])
    kept = [i for i in plan.keep(column["image_id"], column["label"]) if column["label"][i] >= 0]
    return (table if kept == list(range(len(table))) else table.select(kept)), names


def stream_split(source: HubSource, split: str) -> tuple[Any, list[str]]:
    """The rows of one official split as they come, with our features, and the class names.

    Raises:
        InputError: if there is no such split or the class names are not known beforehand.
    """
    if split not in source.splits:
        raise InputError(
            f"{source.name}: no split '{split}', found {', '.join(source.splits)}; choose one of those"
        )
    if source.labels is None:
        raise InputError(
            f"{source.name}: the column {source.columns['label']} tells no class names, and streaming cannot "
            "collect them; pass labels"
        )
    library = import_datasets()
    theirs, labels, image = source.splits[split], list(source.labels), source.columns["image"]
    rows = source.load(theirs)
    standard = partial(_stream_row, source.name, dict(source.columns), theirs, labels)
    return (
        rows.cast_column(image, library.Image(decode=False)).map(
            standard, with_indices=True, remove_columns=list(rows.features), features=image_features(labels)
        ),
        labels,
    )


def _loader(
    name: str, path: str, revision: str | None, *, streaming: bool, cache_dir: str | Path | None
) -> tuple[list[str], Callable[[str], Any]]:
    """The library's split names, and a function that loads one of them (once)."""
    library = import_datasets()
    cache_dir = None if cache_dir is None else str(cache_dir)
    try:
        if path.startswith("//"):
            repository, _, config = path[2:].partition(":")
            arguments: dict[str, Any] = {"path": repository, "revision": revision}
            found = library.get_dataset_split_names(
                repository, config or None, revision=revision, cache_dir=cache_dir
            )
            arguments["name"] = config or None
        elif any((Path(path) / marker).exists() for marker in ("state.json", "dataset_dict.json")):
            saved: Any = library.load_from_disk(path)
            parts = saved if isinstance(saved, library.DatasetDict) else {"all": saved}
            if streaming:
                parts = {split: rows.to_iterable_dataset() for split, rows in parts.items()}
            return list(parts), parts.__getitem__
        elif not os.path.exists(path):
            raise InputError(
                f"{name}: no such file or folder; for a data set of the Hub write hf://owner/name"
            )
        elif os.path.isfile(path):
            kind = _KINDS.get(os.path.splitext(path)[1])
            if kind is None:
                raise InputError(f"{name}: expected a folder or one of *{', *'.join(_KINDS)}; check the path")
            arguments = {"path": kind, "data_files": path}
            found = ["train"]
        else:
            arguments = {"path": path}
            found = library.get_dataset_split_names(path, cache_dir=cache_dir)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise _not_loaded(name, error) from error

    @cache
    def load(split: str) -> Any:
        try:
            return library.load_dataset(
                **arguments,
                split=split,
                streaming=streaming,
                cache_dir=cache_dir,
            )
        except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
            raise _not_loaded(name, error) from error

    return list(found), load


_KINDS = {".parquet": "parquet", ".arrow": "arrow"}


def _not_loaded(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(
        f"{name}: cannot be loaded ({reason}); check the name, the configuration and the network"
    )


def _columns(name: str, found: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for ours, usual in _COLUMNS.items():
        theirs = chosen.get(ours) or next((column for column in usual if column in found), None)
        if theirs is not None and theirs not in found:
            raise InputError(f"{name}: no column '{theirs}', found {', '.join(found)}; correct ?{ours}=")
        if theirs is not None:
            columns[ours] = theirs
        elif ours in ("image", "label"):
            raise InputError(
                f"{name}: no {ours} column ({', '.join(usual)}), found {', '.join(found)}; "
                f"name it with ?{ours}=COLUMN"
            )
    return columns


def _plain(rows: Any, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Columns as stored: nothing is decoded."""
    return rows.select_columns(list(columns)).with_format("arrow")[:].to_pydict()


def _labels_found(source: HubSource) -> list[str]:
    """Class names from the label column of train (or the first split), so that all splits agree."""
    theirs = source.splits.get("train", next(iter(source.splits.values())))
    column = source.columns["label"]
    found = [label for label in _plain(source.load(theirs), [column])[column] if label is not None]
    kinds = sorted({type(label).__name__ for label in found})
    if kinds == ["int"]:
        return [str(label) for label in range(max(found) + 1)]
    if kinds == ["str"]:
        return sorted(set(found))
    raise InputError(
        f"{source.name}: the column {column} holds {', '.join(kinds) or 'nothing'}, "
        "expected one class name or number a row; name another with ?label=COLUMN"
    )


def _table(
    source: HubSource, theirs: str, labels: Sequence[str], names: Sequence[str], numbers: Sequence[int]
) -> Any:
    library = import_datasets()
    rows = source.load(theirs)
    image = source.columns["image"]
    own = {ours: column for ours, column in source.columns.items() if ours != "image"}
    plain = _plain(rows, list(own.values()))
    index_of = {label: index for index, label in enumerate(labels)}
    columns: dict[str, list[Any]] = {"image_id": [], "label": [], "objects": [], "masks": [], "ignore": []}
    for number in range(len(rows)):
        row = {ours: plain[column][number] for ours, column in own.items()}
        for name, value in _standard(source.name, theirs, number, row, index_of).items():
            columns[name].append(value)
    columns["label"] = [numbers[label] for label in columns["label"]]
    features = image_features(names)
    others = library.Dataset.from_dict(columns, features=library.Features({n: features[n] for n in columns}))
    images = rows.select_columns([image])
    if image != "image":
        images = images.rename_column(image, "image")
    images = images.cast_column("image", features["image"])
    return library.concatenate_datasets([images, others], axis=1)


def _stream_row(
    name: str,
    columns: Mapping[str, str],
    theirs: str,
    labels: Sequence[str],
    row: Mapping[str, Any],
    number: int,
) -> dict[str, Any]:
    own = {ours: row[column] for ours, column in columns.items()}
    index_of = {label: index for index, label in enumerate(labels)}
    return {"image": own.pop("image")} | _standard(name, theirs, number, own, index_of)


def _standard(
    name: str, theirs: str, number: int, row: Mapping[str, Any], index_of: Mapping[str, int]
) -> dict[str, Any]:
    """All but the image of one row, in our features."""
    where = f"{name}: row {number} of {theirs}"
    label: Any = row["label"]
    if isinstance(label, str):
        label = index_of.get(label)
    if not isinstance(label, int) or not 0 <= label < len(index_of):
        raise InputError(
            f"{where}: label {row['label']!r}, expected one of {len(index_of)} classes; "
            "choose a split that has labels or another ?label=COLUMN"
        )
    masks = row.get("mask") or []
    return {
        "image_id": str(row["image_id"]) if row.get("image_id") is not None else f"{theirs}-{number:08d}",
        "label": int(label),
        "objects": {"bbox": _boxes(where, row.get("bbox"))},
        "masks": list(masks) if isinstance(masks, (list, tuple)) else [masks],
        "ignore": row.get("ignore"),
    }


def _boxes(where: str, value: Any) -> list[list[float]]:
    """From ``{"bbox": rows}``, ``[{"bbox": row}, ...]``, rows, or one row."""
    if isinstance(value, Mapping):
        value = value.get("bbox")
    if not value:
        return []
    if isinstance(value[0], Mapping):
        value = [item.get("bbox") for item in value]
    rows: Any = [value] if isinstance(value[0], (int, float)) else value
    try:
        boxes = [[float(side) for side in row] for row in rows]
    except (TypeError, ValueError):
        boxes = [[]]
    if any(len(box) != 4 for box in boxes):
        raise InputError(f"{where}: bbox {value!r}, expected [x, y, width, height] in pixels; correct it")
    return boxes
