"""MATLAB files, which several data sets keep their annotations in."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError


def read_mat(path: Path, names: Sequence[str], *, squeeze: bool = True) -> list[Any]:
    """The variables ``names`` of a MATLAB file, without axes of length one if ``squeeze``.

    Raises:
        InputError: if the file is missing, not a MATLAB file, or lacks one of them.
    """
    from scipy.io import matlab  # only these layouts need it

    if not path.exists():
        raise InputError(f"{path}: no such file; the layout needs it, check the path")
    try:
        content: Any = matlab.loadmat(path, squeeze_me=squeeze, variable_names=list(names))
        return [content[name] for name in names]
    except (
        matlab.MatReadError,
        zlib.error,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,  # of older SciPy, for a file shorter than a header
        NotImplementedError,  # for files of version 7.3, which SciPy does not read
    ) as error:
        raise InputError(
            f"{path}: expected a MATLAB file with {' and '.join(names)} ({error}); get it again"
        ) from None


def whole_numbers(path: Path, name: str, values: Any) -> NDArray[np.int64]:
    """A list of whole numbers from a variable of ``path``.

    Raises:
        InputError: if there is anything else in it.
    """
    try:
        numbers = np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError):
        numbers = np.array([np.nan])
    if numbers.ndim != 1 or not (np.isfinite(numbers) & (numbers == np.floor(numbers))).all():
        raise InputError(f"{path}: {name} is not a list of whole numbers; get the file again")
    return numbers.astype(np.int64)
