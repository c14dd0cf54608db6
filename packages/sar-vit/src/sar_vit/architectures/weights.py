"""Reading the published checkpoints of T2T-ViT, PVT and CvT into the models here, strictly.

Own code under the licence of this package. The checkpoints are their authors': T2T-ViT under the Clear BSD
licence, PVT under Apache-2.0, CvT under MIT.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from attnmap_core.backbones import mismatched_keys, read_weights
from attnmap_core.errors import InputError
from torch import Tensor

from .layers import ClassTokenTransformer

_logger = logging.getLogger(__name__)

_AVERAGED = ("state_dict_ema", "model_ema")
_PLAIN = ("state_dict", "model")


def load_published(
    model: ClassTokenTransformer,
    source: str | Path | Mapping[str, Any],
    *,
    ema: bool = True,
    new_head: bool = False,
    new_last_block: bool = False,
) -> None:
    """Load a checkpoint of the authors' release, or one with the same names, into ``model``.

    Every weight must be there, none left over, all of the same shape. What may differ is a prefix ``module.``,
    a wrapper ``state_dict``, ``model``, ``state_dict_ema`` or ``model_ema`` around the weights, and the image
    size, for which position tables are resampled. A dense PVT leaves out class token, final norm and head.

    Args:
        model: loaded in place; untouched if anything is wrong.
        source: file (``.safetensors``, or a pickle, of which nothing but tensors and plain containers is ever
            unpickled), or what such a file holds.
        ema: take the averaged weights where there are both, as T2T-ViT's published numbers do.
        new_head: keep the model's own head, for other classes.
        new_last_block: allow ``norm2`` of the last block to be missing, or to be left over, because its
            switches differ from those of the source.

    Raises:
        InputError: naming what is missing, left over or of another shape.

    Example:
        >>> from sar_vit.architectures import create_architecture
        >>> tiny = dict(img_size=32, embed_dim=8, depth=1, num_heads=2, token_dim=4, num_classes=2)
        >>> source = create_architecture("t2t_vit_14", **tiny)
        >>> model = create_architecture("t2t_vit_14", **tiny)
        >>> load_published(model, {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}})
        >>> bool((model.head.weight == source.head.weight).all())
        True
    """
    where = "the given weights" if isinstance(source, Mapping) else str(source)
    loaded = source if isinstance(source, Mapping) else _read(Path(source))
    state = model.adapt_weights(_without_prefix(_unwrapped(loaded, where, ema)))
    wanted = dict(model.state_dict())
    if new_head:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        state |= {key: value for key, value in wanted.items() if key.startswith("head.")}
    if new_last_block:
        [name] = (name for name, module in model.named_modules() if module is model.last_block)
        norm = {key: value for key, value in wanted.items() if key.startswith(f"{name}.norm2.")}
        state = {k: v for k, v in state.items() if not k.startswith(f"{name}.norm2.") or k in norm}
        state = norm | state
    problem = mismatched_keys(wanted, state, limit=3)
    if problem:
        raise InputError(
            f"{where}: not the weights of this {type(model).__name__} ({problem}); create the architecture "
            "they are of, or allow new_head or new_last_block"
        )
    model.load_state_dict(state)
    _logger.info("loaded %d tensors from %s", len(state), where)


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors" or not path.is_file():
        return read_weights(path)
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{path}: damaged, or more than weights ({reason}); expected tensors and plain containers"
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: holds no state dict but {type(loaded).__name__}; expected tensors by name")
    return cast(dict[str, Any], loaded)


def _unwrapped(loaded: Mapping[str, Any], where: str, ema: bool) -> Mapping[str, Tensor]:
    order = (*_AVERAGED, *_PLAIN) if ema else (*_PLAIN, *_AVERAGED)
    for _ in range(2):  # some files wrap twice
        key = next((key for key in order if isinstance(loaded.get(key), Mapping)), None)
        if key is None:
            break
        _logger.info("%s: taking the weights under %r", where, key)
        loaded = loaded[key]
    others = [key for key, value in loaded.items() if not isinstance(value, Tensor)]
    if others or not loaded:
        raise InputError(
            f"{where}: expected tensors by name, at most under {', '.join(order)}; "
            + (f"found {others[0]!r}, no tensor" if others else "found none")
        )
    return loaded


def _without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    while all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state
