"""Resumable state of a run on disk: complete or not there at all, and loaded without running anything in it.

A checkpoint is a folder ``step-000000120`` that is filled aside and renamed when it is whole, so that a
process killed at any moment leaves the newest visible one intact. It holds ``model.safetensors``,
``ema.safetensors``, ``optimizer.pt`` (with the gradient scaler), ``random.pt`` (the generators of every
process) and ``state.json`` (position, history, configuration). The two ``.pt`` files are read with
``weights_only=True``.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from .errors import InputError
from .files import atomic_folder, read_json

RandomState = dict[str, Any]


# --- Random generators --------------------------------------------------------------------------------------


def random_state(device: torch.device) -> RandomState:
    """States of the generators of this process: ``random``, ``numpy.random``, ``torch`` and its device's.

    Made of tensors and plain values only.

    Example:
        >>> before = random_state(torch.device("cpu"))
        >>> first = torch.rand(1)
        >>> set_random_state(before, torch.device("cpu"))
        >>> torch.equal(first, torch.rand(1))
        True
    """
    name, keys, position, has_gauss, gauss = cast(Any, np.random.get_state())  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
    }


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Put back what :func:`random_state` gave."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"])


# --- Saving -------------------------------------------------------------------------------------------------


@contextmanager
def disk_errors() -> Generator[None]:
    """Turn the disk errors of safetensors into the ``OSError`` that :mod:`attnmap_core.files` explains."""
    try:
        yield
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Mapping[str, Any],
    scaler: Mapping[str, Any] | None,
    random_states: Sequence[RandomState],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write one checkpoint and then remove all but the ``keep`` newest.

    Args:
        folder: holds the checkpoints of the run.
        step: optimizer steps done; names the checkpoint.
        model, ema: without any wrapper; tied weights are stored once.
        optimizer, scaler: their ``state_dict()``.
        random_states: of every process, in order.
        state: JSON values.
        keep: at least 1.

    Raises:
        InputError: if the disk is full or the folder cannot be written; older checkpoints are then untouched.
    """
    path = folder / f"step-{step:09d}"
    with atomic_folder(path) as temporary, disk_errors():
        save_model(model, str(temporary / "model.safetensors"))
        if ema is not None:
            save_model(ema, str(temporary / "ema.safetensors"))
        _save_tensors(temporary / "optimizer.pt", {"optimizer": dict(optimizer), "scaler": scaler})
        _save_tensors(temporary / "random.pt", list(random_states))
        (temporary / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
    _remove_old(folder, keep)
    return path


def _save_tensors(path: Path, value: Any) -> None:
    # Through memory: written directly, torch turns "disk full" into a RuntimeError without an error number.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def _remove_old(folder: Path, keep: int) -> None:
    for path in list_checkpoints(folder)[:-keep]:
        # Hidden first: a checkpoint that is visible is whole, also when its removal is interrupted.
        path.rename(Path(tempfile.mkdtemp(dir=folder, prefix=f".{path.name}-")) / path.name)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first; an empty list where there are none or no folder."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


# --- Loading ------------------------------------------------------------------------------------------------


def read_checkpoint_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint; broken or missing is an :class:`InputError`."""
    return cast(dict[str, Any], read_json(path / "state.json"))


def load_checkpoint(
    path: Path, *, model: nn.Module, ema: nn.Module | None
) -> tuple[dict[str, Any], dict[str, Any] | None, list[RandomState]]:
    """Load weights into ``model`` and ``ema`` in place; return the rest.

    Returns:
        The optimizer's ``state_dict``, the scaler's (or None), and the random states of every process.

    Raises:
        InputError: if a file is missing, broken, or does not fit the model.
    """
    for module, name in ((model, "model.safetensors"), (ema, "ema.safetensors")):
        if module is not None:
            with _readable(path / name):
                load_model(module, str(path / name), strict=True)
    with _readable(path / "optimizer.pt"):
        saved: dict[str, Any] = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    with _readable(path / "random.pt"):
        states: list[RandomState] = torch.load(path / "random.pt", map_location="cpu", weights_only=True)
    return saved["optimizer"], saved["scaler"], states


@contextmanager
def _readable(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be loaded ({reason}); check that the model is the same, or delete "
            f"{path.parent.name} to resume from an older checkpoint"
        ) from error


def check_same_run(
    path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Set[str] = frozenset()
) -> None:
    """Refuse to resume a run with other settings than it was started with.

    Args:
        path: the checkpoint, for the message.
        saved, now: plain values by field name.
        may_change: fields that do not influence the result.

    Raises:
        InputError: naming every field that differs.

    Example:
        >>> check_same_run(Path("run"), {"lr": 0.1, "workers": 2}, {"lr": 0.1, "workers": 4}, {"workers"})
        >>> check_same_run(Path("run"), {"lr": 0.1}, {"lr": 0.2})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        attnmap_core.errors.InputError: run: started with lr=0.1, now lr=0.2; resume with the same values...
    """
    absent = object()
    names = [name for name in {**saved, **now} if name not in may_change]
    different = [name for name in names if saved.get(name, absent) != now.get(name, absent)]

    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={values.get(name, 'nothing')}" for name in different)

    if different:
        raise InputError(
            f"{path}: started with {listed(saved)}, now {listed(now)}; resume with the same values or start "
            "a new run in another folder"
        )
