"""CIFAR-10 and CIFAR-100 from their Python archives.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .listing import Listing, Record, existing_folder, find_home

_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def list_cifar10(root: Path) -> Listing:
    """List ``cifar-10-batches-py``: ``train`` from ``data_batch_1`` to ``5``, ``test`` from ``test_batch``.

    Args:
        root: that folder, or the one that holds it.

    Raises:
        InputError: for a missing file, one that holds anything but arrays, numbers, text and lists of these,
            batches of another size than ``batches.meta`` says, and labels that are no class.
    """
    root = find_home(existing_folder(root, "CIFAR-10"), "batches.meta", "cifar-10-batches-py")
    meta = read_pickle(root / "batches.meta", "label_names")
    labels, size = _names(root / "batches.meta", meta["label_names"], 10), meta.get("num_cases_per_batch")
    return Listing(
        name="cifar10",
        root=root,
        labels=labels,
        splits={
            split: partial(_records, root, names, "labels", len(labels), size)
            for split, names in _BATCHES.items()
        },
        upright=False,
    )


def list_cifar100(root: Path) -> Listing:
    """List ``cifar-100-python`` with its 100 fine labels: ``train`` and ``test``.

    Args:
        root: that folder, or the one that holds it.

    Raises:
        InputError: as :func:`list_cifar10`.
    """
    root = find_home(existing_folder(root, "CIFAR-100"), "meta", "cifar-100-python")
    meta = read_pickle(root / "meta", "fine_label_names")
    labels = _names(root / "meta", meta["fine_label_names"], 100)
    return Listing(
        name="cifar100",
        root=root,
        labels=labels,
        splits={
            split: partial(_records, root, [split], "fine_labels", len(labels), None)
            for split in ("train", "test")
        },
        upright=False,
    )


class _PlainUnpickler(pickle.Unpickler):
    """Gives containers, numbers, text and arrays of numbers; a pickle that names anything else is refused.

    A pickle is a program, and the names that it looks up are all that it can call. These build arrays.
    """

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # NumPy 1 wrote numpy.core, NumPy 2 writes numpy._core.
        name = f"{module_name.replace('numpy._core', 'numpy.core')}.{global_name}"
        if name not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return _ADMITTED[name]


def _empty_array(kind: Any, shape: Any, typecode: Any) -> NDArray[Any]:
    del shape, typecode  # what the array holds is set afterwards
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of the kind {kind!r}")
    return np.empty(0, np.uint8)


def _array_of(buffer: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    return np.frombuffer(buffer, kind).reshape(shape, order=order)


def _number(kind: Any, content: Any) -> Any:
    return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, kind)[0]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _number,
    "numpy.core.numeric._frombuffer": _array_of,  # protocol 5
    "_codecs.encode": _latin1,  # how Python 3 writes bytes for Python 2
}


def read_pickle(path: Path, *keys: str) -> dict[str, Any]:
    """Read the dictionary in a pickle of Python 2 or 3 without running what a hostile one would run.

    Only arrays, numbers, text and containers of these are admitted.

    Args:
        path: the file.
        keys: that must be there.

    Raises:
        InputError: for a missing file, anything else than such a dictionary, and missing keys.
    """
    try:
        with path.open("rb") as file:
            content = _unpickled(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the layout needs it, check the path") from None
    except Exception as error:  # a broken or hostile pickle can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: not a pickle of plain data ({reason}), expected arrays, numbers and text; get the archive again"
        ) from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: no {missing[0]} in it, found {found[:200]}; get the archive again")
    return content


def _unpickled(file: BinaryIO) -> Any:
    content: Any = _PlainUnpickler(file, encoding="latin1").load()
    if isinstance(content, dict):  # some archives were written anew with keys of bytes
        return {key.decode("latin1") if isinstance(key, bytes) else key: content[key] for key in content}
    return content


def _names(path: Path, names: Any, count: int) -> list[str]:
    found = [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]
    if len(found) != count or len(set(found)) != count:
        raise InputError(f"{path}: {len(found)} class names, expected {count}; get the archive again")
    return found


def _records(root: Path, names: Sequence[str], key: str, classes: int, size: Any) -> list[Record]:
    records: list[Record] = []
    for name in names:
        path = root / name
        content = read_pickle(path, "data", key)
        pixels, labels = content["data"], content[key]
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
            found = (
                f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            )
            raise InputError(f"{path}: data are {found}, expected uint8 (n, 3072); get the archive again")
        if len(labels) != len(pixels) or (isinstance(size, int) and len(pixels) != size):
            raise InputError(
                f"{path}: {len(pixels)} images and {len(labels)} labels, expected "
                f"{size if isinstance(size, int) else 'as many'} of both; get the archive again"
            )
        planes = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        for number, (image, label) in enumerate(zip(planes, labels)):
            if not isinstance(label, (int, np.integer)) or not 0 <= label < classes:
                raise InputError(
                    f"{path}: image {number} has label {label!r}, expected 0..{classes - 1}; get the archive again"
                )
            records.append(Record(image_id=f"{name}/{number:05d}", path=_ppm(image), label=int(label)))
    return records


def _ppm(pixels: NDArray[np.uint8]) -> bytes:
    """The pixels as they are, with a header that makes them an image file: nothing to compress or to lose."""
    return b"P6 32 32 255\n" + pixels.tobytes()
