"""Official checkpoints of SCM and TS-CAM, and plain DeiT files, as models of this package.

The official files are pickles that hold ``epoch``, ``state_dict`` and ``best_map``; names carry the prefix
``module.``, and each calibration block has ``layers.{i}.fuse._loss_rate`` (λ) and ``layers.{i}.thred`` (β).
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attnmap_core.backbones import mismatched_keys, read_weights
from attnmap_core.errors import InputError
from torch import Tensor

from .model import SCM, TSCAM

_logger = logging.getLogger(__name__)

_SCALARS = {"fuse._loss_rate": "lam", "thred": "beta"}
_WIDTHS = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
_PUBLISHED_CLASSES = 1000


def import_checkpoint(path: str | Path, *, backbone: str | None = None, **options: Any) -> TSCAM:
    """Read an official checkpoint into a model; nothing in the file is executed.

    Args:
        path: ``.pth`` file. With calibration scalars it becomes an :class:`SCM` (iterations as in the
            released code, 16, 4, 4, 4, unless ``calibration_options`` say otherwise), without them a
            :class:`TSCAM`. A plain DeiT file gives a :class:`TSCAM` whose head still has to be trained.
        backbone: timm name; default: the DeiT of the file's width.
        **options: arguments of the model, such as ``labels``, ``threshold``, ``backbone_options``, or
            ``num_classes`` (for plain DeiT files).

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: if the file is missing, damaged, needs unpickling of more than tensors and numbers, or
            does not fit the backbone; the message names the keys.
    """
    path = Path(path)
    state = {key.removeprefix("module."): value for key, value in _read(path).items()}
    missing = [name for name in ("pos_embed", "patch_embed.proj.weight") if name not in state]
    if missing:
        raise InputError(
            f"{path}: no {' and no '.join(missing)}; expected the names of a DeiT checkpoint, "
            f"found {', '.join(list(state)[:4])}"
        )
    width, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[2]
    if backbone is None and (backbone := _WIDTHS.get(width)) is None:
        raise InputError(
            f"{path}: width {width} is of no DeiT ({', '.join(map(str, _WIDTHS))}); give the backbone"
        )
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
    options.setdefault("img_size", side)
    options.setdefault("preprocessing", {"size": [side, side], "interpolation": "bilinear"})

    head = state.get("head.weight")
    trained = head is not None and head.ndim == 4
    if head is not None and trained:
        options |= {"num_classes": head.shape[0], "head_kernel": head.shape[2]}
    else:
        options.setdefault("num_classes", _PUBLISHED_CLASSES if head is None else head.shape[0])
        _logger.warning(
            "%s: no convolution head; it starts at random, so train the model before use", path.name
        )

    blocks = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    model: TSCAM
    if blocks:
        calibration = {"blocks": blocks, "iterations": "release" if blocks == 4 else 4}
        calibration |= options.pop("calibration_options", None) or {}
        model = SCM(backbone, calibration_options=calibration, **options)
    else:
        model = TSCAM(backbone, **options)
    if options.get("reset_head_bias"):
        state = {key: value for key, value in state.items() if trained or not key.startswith("head.")}
    _load(model, state, path, trained_head=trained)
    return model.eval()


def official_state_dict(model: TSCAM) -> dict[str, Tensor]:
    """The model's weights under the names of the official checkpoints, ``module.`` included.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
        >>> names = official_state_dict(SCM("vit", num_classes=2, img_size=16, backbone_options=tiny))
        >>> [name for name in names if "layers.0" in name]
        ['module.layers.0.fuse._loss_rate', 'module.layers.0.thred']
    """
    scalars = {ours: official for official, ours in _SCALARS.items()}

    def official(name: str) -> str:
        if match := re.fullmatch(r"calibration\.blocks\.(\d+)\.(\w+)", name):
            return f"layers.{match[1]}.{scalars[match[2]]}"
        return name.removeprefix("backbone.model.")

    return {f"module.{official(name)}": value for name, value in model.state_dict().items()}


def _read(path: Path) -> dict[str, Tensor]:
    # ``best_map`` may be a NumPy number. Its parts run no code, so they may be unpickled.
    number: list[Any] = [
        np.dtype,
        np.float64,
        np.float32,
        type(np.dtype(np.float64)),
        type(np.dtype(np.float32)),
    ]
    scalar = np.float64(0).__reduce__()[0]
    number += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(number):
            return read_weights(path)
    except InputError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError) and "weights_only" in str(error.__cause__):
            raise InputError(
                f"{path}: holds more than tensors and numbers, and unpickling the rest could run any code; "
                "save it again with its state_dict alone"
            ) from error
        raise


def _load(model: TSCAM, state: Mapping[str, Tensor], path: Path, *, trained_head: bool) -> None:
    wanted = model.state_dict()
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", key):
            if match[2] not in _SCALARS:
                _logger.warning("%s: %s is not used (it serves training only)", path.name, key)
                continue
            ours[f"calibration.blocks.{match[1]}.{_SCALARS[match[2]]}"] = value.reshape(1)
        elif not key.startswith("head."):
            ours[f"backbone.model.{key}"] = value
        elif trained_head:
            ours[key] = value
        elif key in wanted and wanted[key].shape == value.shape:
            ours[key] = value  # the rule of the released code: of a linear head only a bias can fit
    if not trained_head:
        ours = {key: value for key, value in wanted.items() if key.startswith("head.")} | ours
    if problem := mismatched_keys(wanted, ours):
        raise InputError(
            f"{path}: does not fit {model.backbone.name} ({problem}); give the backbone it was made with"
        )
    model.load_state_dict(ours)
