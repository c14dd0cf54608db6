"""Weights from elsewhere into a :class:`~sar_vit.SARViT`: strict about the form of the last block and its heads.

A last block without its norm, or with another number of heads, takes most weights without any complaint of shapes
and then computes something else. So what is known about the source is compared first.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from attnmap_core.backbones import converted_weights, mismatched_keys, read_weights
from attnmap_core.errors import InputError
from attnmap_core.files import read_json
from attnmap_core.hub import CONFIG_FILE, WEIGHTS_FILE
from torch import Tensor

if TYPE_CHECKING:
    from .model import SARViT

SWITCHES: tuple[str, ...] = ("msa_skip", "mlp_norm", "mlp_skip")

_MOCO = ("base_encoder.", "momentum_encoder.")
_MOCO_HEADS = {"vit_small": 12, "vit_base": 12, "vit_conv_small": 12, "vit_conv_base": 12}
_NETWORK = "backbone.model."

_logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Weights with what is known about the network they are of.

    Attributes:
        state: tensors by the names of a :class:`~sar_vit.SARViT`.
        facts: any of ``msa_skip``, ``mlp_norm``, ``mlp_skip`` and ``heads``.
        where: the file, for messages.
    """

    state: dict[str, Tensor]
    facts: dict[str, Any]
    where: str


def load_weights(
    model: SARViT,
    path: str | Path,
    *,
    new_surgery: bool = False,
    reset_head: bool = False,
    branch: str = "base",
) -> None:
    """Load weights into ``model``: all must be there, none left over, and of the same form of last block.

    Args:
        model: loaded in place; untouched if anything is wrong.
        path: model folder of a :class:`~sar_vit.SARViT` or its ``model.safetensors``; or a file of weights by timm's
            names, by those of the authors' releases of T2T-ViT, PVT and CvT, or of MoCo-v3. Nothing but tensors and
            plain containers is ever unpickled. Position embeddings are resampled to the model's grid.
        new_surgery: allow another form of the last block: its ``norm2.*`` may then be missing (it stays as it is) or
            be left over, and nothing else.
        reset_head: keep the model's own head. It is kept too, with a note in the log, where the number of classes
            differs or the source has none.
        branch: of a MoCo-v3 checkpoint, ``"base"`` or ``"momentum"``.

    Raises:
        InputError: for another form without ``new_surgery``, another number of heads in any case, or weights that
            do not fit; the message says which.
    """
    source = read_source(Path(path), branch)
    _compare(model, source, new_surgery)
    net: Any = model.backbone.model
    inside = {name.removeprefix(_NETWORK): t for name, t in source.state.items() if name.startswith(_NETWORK)}
    adapt: Any = getattr(net, "adapt_weights", None)
    inside = adapt(inside) if adapt is not None else converted_weights(net, inside)
    state = {_NETWORK + name: tensor for name, tensor in inside.items()}
    wanted = model.state_dict()
    head = {name: tensor for name, tensor in source.state.items() if name.startswith("head.")}
    own_head = {name: tensor for name, tensor in wanted.items() if name.startswith("head.")}
    fits = head.keys() == own_head.keys() and all(head[name].shape == own_head[name].shape for name in head)
    if not fits and not reset_head:
        _logger.info("%s: no head of %d classes in it; the own one stays", source.where, model.num_classes)
    state |= head if fits and not reset_head else own_head
    norm = model.norm2_name
    if new_surgery:
        kept = {name: tensor for name, tensor in wanted.items() if name.startswith(norm)}
        state = {name: t for name, t in state.items() if not name.startswith(norm) or name in kept}
        state = kept | state
    problem = mismatched_keys(wanted, state, limit=4)
    if problem:
        raise InputError(
            f"{source.where}: not the weights of this {model.arch} ({problem}); name the backbone they are of"
        )
    model.load_state_dict(state)
    _logger.info("loaded %d tensors from %s", len(state), source.where)


def read_source(path: Path, branch: str = "base") -> Source:
    """Weights by the names of a :class:`~sar_vit.SARViT`, and what the file or its folder says about them.

    Args:
        path: as for :func:`load_weights`.
        branch: likewise.

    Returns:
        The source; a classifier of a timm file is under ``head.``.

    Raises:
        InputError: if the file is missing, damaged, or holds anything but weights.
    """
    if path.is_dir():
        path = path / WEIGHTS_FILE
    facts: dict[str, Any] = {}
    if path.suffix == ".safetensors" or not path.is_file():
        state = read_weights(path)
        config = path.parent / CONFIG_FILE
        if path.name == WEIGHTS_FILE and config.is_file():
            described: Any = read_json(config)
            if isinstance(described, dict):
                facts = dict(cast(dict[str, Any], described).get("model") or {})
    else:
        state, facts = _read_pickle(path)
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if any(name.startswith(_MOCO) for name in state):
        state = _moco_branch(state, branch)
        if "heads" not in facts:
            facts["heads"] = _MOCO_HEADS.get(str(facts.get("arch")))
        if facts["heads"] is None:
            raise InputError(
                f"{path}: a MoCo-v3 checkpoint that does not tell its architecture; heads cannot be seen from weights: "
                f"expected 'arch' to be one of {', '.join(_MOCO_HEADS)}, found {facts.get('arch')!r}"
            )
    if not any(name.startswith(_NETWORK) for name in state):
        state = {(name if name.startswith("head.") else _NETWORK + name): t for name, t in state.items()}
    return Source(
        state, {name: facts[name] for name in (*SWITCHES, "heads") if facts.get(name) is not None}, str(path)
    )


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{path}: damaged, or more than weights ({reason}); expected tensors by name"
        ) from error
    facts: dict[str, Any] = {}
    if isinstance(loaded, Mapping):
        outer = cast(Mapping[str, Any], loaded)
        facts = dict(outer.get("sar") or {})  # as the self-supervised trainings of this package write
        if isinstance(outer.get("arch"), str):
            facts.setdefault("arch", outer["arch"])
        for key in ("state_dict", "model"):
            loaded = loaded.get(key, loaded) if isinstance(loaded, Mapping) else loaded
    if (
        not isinstance(loaded, Mapping)
        or not loaded
        or not all(isinstance(t, Tensor) for t in loaded.values())
    ):
        raise InputError(
            f"{path}: holds no state dict; expected tensors by name, at most under 'state_dict' or 'model'"
        )
    return dict(cast(Mapping[str, Tensor], loaded)), facts


def _moco_branch(state: Mapping[str, Tensor], branch: str) -> dict[str, Tensor]:
    if branch not in ("base", "momentum"):
        raise InputError(f"branch {branch!r}: expected base or momentum")
    prefix = f"{branch}_encoder."
    inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    return {
        name: t for name, t in inside.items() if not name.startswith("head.")
    }  # the projector is no classifier


def _compare(model: SARViT, source: Source, new_surgery: bool) -> None:
    heads = source.facts.get("heads")
    if heads is not None and int(heads) != model.heads:
        raise InputError(
            f"{source.where}: weights of {heads} heads, but the last block of this model has {model.heads}; they would "
            f"load and give wrong maps: create it with {heads} heads (backbone_options num_heads), or load others"
        )
    if new_surgery:
        return
    found = {name: bool(source.facts[name]) for name in SWITCHES if name in source.facts}
    if not found and any(name.startswith(model.norm2_name) for name in source.state):
        found = dict.fromkeys(SWITCHES, True)  # nothing is said about them: the standard block
    wrong = [name for name in found if found[name] != model.switches[name]]
    if wrong:
        raise InputError(
            f"{source.where}: weights of a last block with {_listed(found, wrong)}, but this model has "
            f"{_listed(model.switches, wrong)}; give the model the same switches, or pass new_surgery=True"
        )


def _listed(switches: Mapping[str, bool], names: list[str]) -> str:
    return " ".join(f"{name}={switches[name]}" for name in names)
