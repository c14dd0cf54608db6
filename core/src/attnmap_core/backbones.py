"""Any timm network as a backbone, and a tap on the attention of its transformer blocks.

:func:`create_backbone` gives tokens (ViT) or a feature map (CNN, hierarchical transformer) with their grid.
:class:`AttentionTap` reads the attention of chosen blocks, with gradient, while the network goes on using its
fused kernel: one query row costs ``O(n d)`` per head instead of the ``(n, n)`` matrix.
"""

# pyright: reportPrivateUsage=false
# The tap, its records and its hooks are one unit: they share underscored state that nobody else should see.

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import pickle
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from .errors import InputError

Query = Literal["cls", "avg"]

_logger = logging.getLogger(__name__)

_MOST_WAITING = 32  # records of forward passes in training that nobody takes, until that is an error


class Features(NamedTuple):
    """What a backbone says about a batch of images.

    Attributes:
        tokens: ``(b, n, c)`` patch tokens after the final norm, row-major over the grid; None for networks
            that give a map.
        prefix: ``(b, p, c)`` class, distillation and register tokens, class token first; None without any.
        map: ``(b, c, h, w)`` the same patch tokens as a map, or the last feature map of a CNN.
        grid: ``(h, w)`` of the map; ``n = h w``.
    """

    tokens: Tensor | None
    prefix: Tensor | None
    map: Tensor
    grid: tuple[int, int]


class Backbone(nn.Module):
    """A timm network without its classifier: images in, :class:`Features` out. See :func:`create_backbone`.

    The network is ``.model``: inside, the state dict holds timm's own keys. Layers that only serve the pooled
    classifier (attention pooling, a norm after pooling in some CNNs) are taken out, so that every weight left
    has a part in the features. A ViT whose final norm follows its pooling (``fc_norm``) has it on each token.

    Attributes:
        name: the name it was created by.
        model: the timm network.
        img_size: ``(height, width)`` in pixels it was made for.
        num_features: channels ``c`` of tokens and map.
        num_prefix_tokens: tokens ``p`` before the patch tokens.
        stride: ``(vertical, horizontal)`` pixels per cell of the grid; the patch size of a ViT.
        preprocessing_config: ``mean``, ``std`` (for images in ``[0, 1]``) and ``interpolation`` that its
            pretrained weights expect.

    Raises:
        InputError: if ``img_size`` is not a multiple of the patch size of a ViT of fixed size.
    """

    def __init__(self, model: nn.Module, name: str, img_size: tuple[int, int]) -> None:
        super().__init__()
        net = cast(Any, model)
        self.model = net
        self.name = name
        self.img_size = img_size
        self.num_prefix_tokens = int(getattr(net, "num_prefix_tokens", 0))
        self.stride = _pair(net.feature_info[-1]["reduction"])
        if self._has_patches():
            self.stride = _pair(net.patch_embed.feat_ratio(as_scalar=False))
            nearest = [max(1, round(pixels / cell)) * cell for pixels, cell in zip(img_size, self.stride)]
            if net.patch_embed.strict_img_size and nearest != list(img_size):
                raise InputError(
                    f"img_size {_by(img_size)}: not a multiple of the {_by(self.stride)} patches of {name}; "
                    f"choose {_by(nearest)}"
                )
        pretrained_cfg: dict[str, Any] = getattr(net, "pretrained_cfg", {})
        self.preprocessing_config: dict[str, Any] = {
            "mean": tuple(pretrained_cfg.get("mean", (0.485, 0.456, 0.406))),
            "std": tuple(pretrained_cfg.get("std", (0.229, 0.224, 0.225))),
            "interpolation": pretrained_cfg.get("interpolation", "bicubic"),
        }
        self.num_features = self._drop_idle_layers()

    @property
    def patch_size(self) -> tuple[int, int]:
        """``(vertical, horizontal)`` pixels per cell of the grid; another name of ``stride``."""
        return self.stride

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last, as :class:`AttentionTap` counts them.

        Raises:
            ValueError: if the network has no single stack of blocks.
        """
        return _blocks_of(self.model)

    def grid(self, img_size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """Cells ``(h, w)`` of the grid for images of ``img_size`` pixels; default: its own size."""
        height, width = self.img_size if img_size is None else _pair(img_size)
        return self._on_meta(height, width).grid

    def no_weight_decay(self) -> set[str]:
        """Names of weights that timm's recipes exempt from weight decay (position and class embeddings)."""
        exempt: Callable[[], Iterable[str]] = getattr(self.model, "no_weight_decay", set[str])
        own = {key for key, _ in self.named_parameters()}  # timm also names those of its other variants
        return own & {f"model.{key}" for key in exempt()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory (timm's own switch)."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, images: Tensor) -> Features:
        """Features of ``images`` ``(b, 3, H, W)``, normalised as ``preprocessing_config`` says.

        Raises:
            ValueError: if a network of fixed size gets images of another one.
        """
        net = self.model
        height, width = images.shape[-2:]
        patch_embed: Any = getattr(net, "patch_embed", None)
        if getattr(patch_embed, "strict_img_size", False) and (height, width) != tuple(patch_embed.img_size):
            raise ValueError(
                f"{self.name} takes images of {_by(patch_embed.img_size)} pixels, got {height}x{width}; "
                f"resize them, or create it with img_size=({height}, {width})"
            )
        output: Any = net.forward_features(images)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise ValueError(f"{type(net).__name__} gives neither tokens nor one feature map; choose another")
        if output.ndim == 4:
            channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"  # as timm marks it
            feature_map = rearrange(output, "b h w c -> b c h w") if channels_last else output
            return Features(None, None, feature_map, (feature_map.shape[2], feature_map.shape[3]))
        if isinstance(getattr(net, "norm", None), nn.Identity) and hasattr(net, "fc_norm"):
            output = net.fc_norm(output)
        prefix, tokens = output[:, : self.num_prefix_tokens], output[:, self.num_prefix_tokens :]
        if self._has_patches():
            h, w = patch_embed.dynamic_feat_size((height, width))
        else:
            h, w = -(-height // self.stride[0]), -(-width // self.stride[1])
        if tokens.shape[1] != h * w:
            raise ValueError(
                f"{type(net).__name__} gives {tokens.shape[1]} patch tokens for a grid of {h}x{w} cells; a "
                "backbone needs one for each (no patch dropout)"
            )
        feature_map = rearrange(tokens, "b (h w) c -> b c h w", h=h)
        return Features(tokens, prefix if self.num_prefix_tokens else None, feature_map, (h, w))

    def _has_patches(self) -> bool:
        """True for a plain ViT: one stack of blocks over the patches of one embedding."""
        return hasattr(self.model, "blocks") and hasattr(
            getattr(self.model, "patch_embed", None), "feat_ratio"
        )

    def _on_meta(self, height: int, width: int) -> Features:
        """Run without arithmetic, for the shapes alone."""
        tensors = {
            key: tensor.to("meta") for key, tensor in [*self.named_parameters(), *self.named_buffers()]
        }
        with torch.no_grad(), evaluating(self):
            return functional_call(self, tensors, torch.empty(1, 3, height, width, device="meta"))

    def _drop_idle_layers(self) -> int:
        """Replace the children that have no part in the features; return the number of channels."""
        ran: set[nn.Module] = set()

        def note(module: nn.Module, *_: object) -> None:
            ran.add(module)

        handles = [module.register_forward_hook(note) for module in self.model.modules()]
        try:
            features = self._on_meta(*self.img_size)
        finally:
            for handle in handles:
                handle.remove()
        for key, child in list(self.model.named_children()):
            if next(child.parameters(), None) is not None and ran.isdisjoint(child.modules()):
                setattr(self.model, key, nn.Identity())
        return features.map.shape[1]


def create_backbone(
    name: str,
    *,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = False,
    weights: str | Path | None = None,
    drop_path_rate: float = 0.0,
    **timm_kwargs: Any,
) -> Backbone:
    """Make a backbone from a timm name, or a small ViT from its sizes.

    Nothing is downloaded unless ``pretrained=True``.

    Args:
        name: any name of ``timm.list_models()``, with or without a ``.tag``; or ``"vit"`` for a plain
            :class:`timm.models.vision_transformer.VisionTransformer` whose sizes come from ``timm_kwargs``.
        img_size: pixels, one number or ``(height, width)``; default: the size timm lists for the name. A ViT
            is built for this size (position embeddings of ``weights`` are resampled); a CNN takes any.
        pretrained: download timm's weights for the name.
        weights: local ``.safetensors`` or ``.pth`` file with timm's keys; its classifier is dropped, all
            else must fit. Pickles are read with ``weights_only=True``.
        drop_path_rate: largest rate of stochastic depth, growing linearly from 0 over the blocks.
        **timm_kwargs: passed on, such as ``patch_size``, ``depth``, ``qk_norm``, ``dynamic_img_size``.

    Returns:
        The backbone, in training mode, with random weights unless some were asked for.

    Raises:
        InputError: if the name is unknown, the size does not fit the patches, or the file is missing,
            unreadable or does not fit; the message names the close matches or the keys.

    Example:
        >>> vit = create_backbone("vit", img_size=(32, 64), patch_size=8, embed_dim=24, depth=2, num_heads=3)
        >>> features = vit(torch.zeros(2, 3, 32, 64))
        >>> tuple(features.tokens.shape), tuple(features.map.shape), features.grid
        ((2, 32, 24), (2, 24, 4, 8), (4, 8))
    """
    if pretrained and weights is not None:
        raise InputError(f"pretrained=True and weights={str(weights)!r} exclude each other; give one of them")
    size = None if img_size is None else _pair(img_size)
    if drop_path_rate:
        timm_kwargs["drop_path_rate"] = drop_path_rate
    if name == "vit":
        if pretrained:
            raise InputError(
                "pretrained=True: the backbone 'vit' has no published weights; name a timm model"
            )
        from timm.models.vision_transformer import VisionTransformer

        size = size or (224, 224)
        with _foreign_options(name):
            net: Any = VisionTransformer(img_size=size, num_classes=0, **timm_kwargs)
    else:
        net, size = _create_timm(name, size, pretrained, timm_kwargs)
    if weights is not None:
        _load_weights(net, Path(weights))
    return Backbone(net, name, size)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a local ``.safetensors`` file, or a ``.pth``/``.pt``/``.bin`` pickle of tensors.

    The keys ``model`` and ``state_dict`` of training checkpoints are looked into. Nothing but tensors and
    plain containers is ever unpickled.

    Raises:
        InputError: if the file is missing, damaged, or holds anything else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; check the path, or start without it")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{path}: damaged, or more than weights ({reason}); expected tensors by name"
        ) from error
    for key in ("model", "state_dict"):
        loaded = loaded.get(key, loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{path}: holds no state dict; expected tensors by name, at most under 'model'")
    return cast(dict[str, Tensor], loaded)


def converted_weights(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of another release or image size as ``net``, a timm network, wants them; as they are if none applies.

    Args:
        net: the network; its class decides which conversions there are, resampled position embeddings among them.
        state: tensors by name, which may or may not fit.

    Returns:
        A new dict. Whether it fits is for :func:`mismatched_keys` to say.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> sizes = dict(patch_size=8, embed_dim=8, depth=1, num_heads=2)
        >>> small, large = VisionTransformer(img_size=16, **sizes), VisionTransformer(img_size=32, **sizes)
        >>> converted_weights(large, small.state_dict())["pos_embed"].shape
        torch.Size([1, 17, 8])
    """
    # timm keeps the conversions of each family beside its class under this name.
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            return dict(convert(dict(state), net))
        except (AttributeError, KeyError, RuntimeError, ValueError) as error:
            _logger.debug("the weights do not convert: %s", error)  # a comparison of keys says what is wrong
    return dict(state)


def mismatched_keys(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], limit: int = 8) -> str | None:
    """Say in one line how the tensors ``found`` in a file differ from those ``wanted``; None if they fit.

    Example:
        >>> one, two = torch.ones(1), torch.ones(2)
        >>> mismatched_keys({"a": two, "b": one}, {"b": two, "c": one})
        'missing: a; unexpected: c; other shape: b is (2,), expected (1,)'
    """
    shared = [key for key in wanted if key in found and wanted[key].shape != found[key].shape]
    kinds = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "other shape": [f"{k} is {tuple(found[k].shape)}, expected {tuple(wanted[k].shape)}" for k in shared],
    }
    parts = [
        f"{kind}: {', '.join(keys[:limit])}" + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
        for kind, keys in kinds.items()
        if keys
    ]
    return "; ".join(parts) or None


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """Put ``module`` in evaluation mode inside the block, then every submodule back in the mode it had."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


class AttentionRecord:
    """Attention of one forward pass of the tapped blocks, computed on request, in float32 (float64 stays).

    It refers to the queries and keys of that pass, which the fused kernel keeps for the backward pass anyway.
    Drop the record and they go.

    Attributes:
        image_size: ``(height, width)`` of the images of that pass, where the tap is attached ``in_training`` and
            the network itself or its patch embedding was called with images; otherwise None.
    """

    image_size: tuple[int, int] | None = None

    def __init__(self, wanted: int, query: Query, prefix: int, full: bool) -> None:
        self._wanted = wanted
        self._query = query
        self._prefix = prefix
        self._full = full
        self._captured: list[_Captured] = []

    def logits(self) -> Tensor:
        """``(b, blocks, heads, keys)`` scaled products of the query with every key, prefix tokens first."""
        return torch.stack([self._row(captured.logits()) for captured in self._complete()], dim=1)

    def rows(self) -> Tensor:
        """``(b, blocks, heads, keys)`` softmax of :meth:`logits`: the query's attention, summing to 1."""
        return self.logits().softmax(dim=-1)

    def weights(self) -> list[Tensor]:
        """For each block the attention weights ``(b, heads, n, n)`` of all queries, prefix tokens first.

        Raises:
            ValueError: if the tap was not made with ``full=True``.
        """
        if not self._full:
            raise ValueError("weights() needs a tap made with AttentionTap(..., full=True)")
        return [captured.logits().softmax(dim=-1) for captured in self._complete()]

    def queries_and_keys(self) -> list[tuple[Tensor, Tensor]]:
        """For each block the query ``(b, heads, d)`` and all keys ``(b, heads, keys, d)``, prefix tokens first.

        As they enter the kernel, after norms and rotary embedding, before the attention's scale.

        Raises:
            ValueError: if the pass ran without gradient and the tap was not made with ``keep_keys=True``.
        """
        found = [captured.queries_and_keys() for captured in self._complete()]
        return [(self._row(query), key) for query, key in found]

    def _row(self, logits: Tensor) -> Tensor:
        if self._full and self._query == "avg":
            return logits[:, :, self._prefix :].mean(dim=2)  # the product is linear in the query
        return logits[:, :, 0]

    def _complete(self) -> list[_Captured]:
        if not self._captured:
            raise RuntimeError(
                "the attention tap recorded nothing: either no forward pass ran while it was open, or the "
                "network had been compiled (torch.compile) before; open or attach() the tap, then compile"
            )
        if len(self._captured) < self._wanted:
            raise RuntimeError(
                f"the forward pass ran only {len(self._captured)} of the {self._wanted} tapped blocks"
            )
        return self._captured


class AttentionTap:
    """Reads the attention of a ViT's blocks, with gradient, without giving up fused attention.

    Fused kernels never form the attention matrix. The tap takes the queries and keys that enter the kernel
    (after their norms and rotary embedding) and computes what is asked for: by default the row of the class
    token alone. No weight, output or gradient of the network changes.

    Used as a context, its hooks are gone at the end, also after an exception::

        with AttentionTap(vit) as tap:
            output = vit(images)
            rows = tap.rows()

    Several forwards in a step are recorded apart: :meth:`pop` gives them one by one, oldest first. A record
    that was read by :meth:`rows`, :meth:`logits` or :meth:`weights` is dropped when the next forward begins.

    A model that always needs its attention keeps a tap: ``self.tap = AttentionTap(vit).attach()`` in the
    constructor and, in ``forward``, ``with self.tap.recording() as record: ...`` then ``record.rows()``.
    Outside of ``recording()`` such a tap records nothing. ``copy.deepcopy`` of the model copies it.
    ``attach(in_training=True)`` also records every forward pass in training mode with gradient, for a loss that
    takes them by :meth:`pop`; each must be taken.

    An attention of another class is read if it has ``scale``, a method ``queries_and_keys`` and, as timm's, modules
    ``q_norm`` and ``k_norm`` through which its ``forward`` passes the queries and then the keys.

    Works under autocast, ``torch.compile``, gradient checkpointing and DistributedDataParallel.

    Args:
        model: a :class:`Backbone` or timm ViT whose blocks hold plain or rotary self-attention.
        blocks: which blocks, as indices (negative: from the end), or one block itself of a network without a
            single stack of them; default: all. Records are in block order.
        query: ``"cls"`` the class token; ``"avg"`` the mean of the patch queries, for ViTs without one.
        full: offer the attention weights of all queries too, at ``O(n^2)``.
        keep_keys: keep the keys of passes without gradient too, for :meth:`AttentionRecord.queries_and_keys`.

    Raises:
        ValueError: if a block's attention is of an unsupported class (the message names it), a block index is
            out of range, or ``query="cls"`` is asked of a network without class token.
        RuntimeError: on reading, if nothing was recorded; never an older record instead.

    Example:
        >>> vit = create_backbone("vit", img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2)
        >>> with AttentionTap(vit, blocks=[-1]) as tap:
        ...     _ = vit(torch.zeros(1, 3, 16, 16))
        ...     rows = tap.rows()
        >>> tuple(rows.shape), round(rows[0, 0, 0].sum().item(), 4)  # keys: the class token and 4 patches
        ((1, 1, 2, 5), 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[int] | nn.Module | None = None,
        query: Query = "cls",
        full: bool = False,
        keep_keys: bool = False,
    ) -> None:
        net: Any = model
        for wrapper in ("_orig_mod", "module"):  # torch.compile, DistributedDataParallel
            net = getattr(net, wrapper, net)
        takes_images = [net]
        if isinstance(net, Backbone):
            net = net.model
            takes_images.append(net)
        if isinstance(getattr(net, "patch_embed", None), nn.Module):
            takes_images.append(net.patch_embed)  # which forward_features() calls in any case
        if query not in ("cls", "avg"):
            raise ValueError(f"query must be 'cls' or 'avg', got {query!r}")
        if query == "cls" and not _has_class_token(net):
            raise ValueError(
                f"this {type(net).__name__} has no class token; use query='avg' instead of 'cls'"
            )
        if isinstance(blocks, nn.Module):
            stack, blocks = [blocks], None
        else:
            stack = _blocks_of(net)
        chosen = range(len(stack)) if blocks is None else list(blocks)
        if not len(chosen) or not all(-len(stack) <= index < len(stack) for index in chosen):
            raise ValueError(f"blocks must be indices of the {len(stack)} blocks, got {list(chosen)}")
        self.blocks = sorted({index % len(stack) for index in chosen})
        self.query: Query = query
        self.full = full
        self.keep_keys = keep_keys
        self.num_prefix_tokens = int(getattr(net, "num_prefix_tokens", 0))
        self._takes_images = takes_images
        self._image_size: tuple[int, int] | None = None
        self._in_training = False
        self._sites = [_Site(self, stack[index], index, order) for order, index in enumerate(self.blocks)]
        self._handles: list[RemovableHandle] = []
        self._records: list[AttentionRecord] = []
        self._attached = False
        self._open = False
        self._was_read = False

    def attach(self, *, in_training: bool = False) -> Self:
        """Put the hooks in for good, for :meth:`recording`; gives the tap itself.

        Args:
            in_training: record, without being asked, each forward pass in training mode with gradient enabled.
        """
        self.detach()
        self._in_training = in_training
        self._hook()
        self._attached = True
        return self

    def clear(self) -> None:
        """Drop every record not yet popped, and the graphs they hold."""
        self._records = []
        self._was_read = False

    def detach(self) -> None:
        """Take the hooks of :meth:`attach` out and drop every record."""
        self._attached = False
        self._in_training = False
        self._close()

    def recording(self) -> _Recording:
        """Record the one forward pass that runs inside this context; gives its :class:`AttentionRecord`.

        Raises:
            RuntimeError: on leaving, if no forward pass was recorded, or several.
        """
        return _Recording(self)

    def __enter__(self) -> Self:
        if self._open:
            raise RuntimeError("this attention tap is open already; make another one")
        self._hook()
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __len__(self) -> int:
        """Forward passes recorded and not yet popped."""
        return len(self._records)

    def pop(self) -> AttentionRecord:
        """Take out the record of the oldest forward pass not yet popped.

        Raises:
            RuntimeError: if there is none, or that pass did not run all tapped blocks.
        """
        record = self._records.pop(0) if self._records else self._new_record()
        record._complete()
        return record

    def logits(self) -> Tensor:
        """``(b, blocks, heads, keys)`` of the forward pass just run; see :meth:`AttentionRecord.logits`."""
        return self._latest().logits()

    def rows(self) -> Tensor:
        """``(b, blocks, heads, keys)`` of the forward pass just run; see :meth:`AttentionRecord.rows`."""
        return self._latest().rows()

    def weights(self) -> list[Tensor]:
        """``(b, heads, n, n)`` for each block of the forward pass just run."""
        return self._latest().weights()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionTap:
        # The copy of a model (an EMA, say) gets a tap on its own blocks; records stay with the original.
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        fresh: dict[str, Any] = {"_records": [], "_open": False, "_was_read": False, "_image_size": None}
        copied.__dict__.update(copy.deepcopy(self.__dict__ | fresh, memo))
        return copied

    def _hook(self) -> None:
        if not self._attached:
            self._handles = [handle for site in self._sites for handle in site.hook()]
            if self._in_training:
                self._handles += [
                    module.register_forward_pre_hook(self._see) for module in self._takes_images
                ]

    def _close(self) -> None:
        self._open = False
        self.clear()
        for site in self._sites:
            site.query = site.rope = None
        if not self._attached:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _listens(self) -> bool:
        return self._open or (
            self._in_training and self._sites[0].attention.training and torch.is_grad_enabled()
        )

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._listens() and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            self._image_size = (args[0].shape[2], args[0].shape[3])

    def _new_record(self) -> AttentionRecord:
        return AttentionRecord(len(self._sites), self.query, self.num_prefix_tokens, self.full)

    def _latest(self) -> AttentionRecord:
        if len(self._records) > 1:
            raise RuntimeError(f"{len(self._records)} forward passes are waiting; take each with pop()")
        self._was_read = True
        return self._records[0] if self._records else self._new_record()

    def _collect(self, order: int, captured: _Captured) -> None:
        """Add one block's capture to the record of the pass that is running."""
        if order == 0:
            if self._was_read:
                self._records = []
                self._was_read = False
            if self._records and len(self._records[-1]._captured) < len(self._sites):
                self._records[-1]._captured = []  # the empty one of recording(), or a pass an error ended
            else:
                if len(self._records) >= _MOST_WAITING and not self._open:
                    raise RuntimeError(
                        f"{len(self._records)} forward passes were recorded and none was taken; pop() each, or "
                        "clear() or detach() the tap"
                    )
                self._records.append(self._new_record())
            self._records[-1].image_size, self._image_size = self._image_size, None
        if not self._records or len(self._records[-1]._captured) != order:
            raise RuntimeError(f"block {self.blocks[order]} ran out of order; a tap needs them in sequence")
        self._records[-1]._captured.append(captured)


class _Recording:
    """The context of :meth:`AttentionTap.recording`; a class, which torch.compile traces better."""

    def __init__(self, tap: AttentionTap) -> None:
        self._tap = tap

    def __enter__(self) -> AttentionRecord:
        tap = self._tap
        if tap._open:
            raise RuntimeError("this attention tap is recording already; end that first")
        tap._hook()
        record = tap._new_record()
        self._waiting = tap._records  # of passes in training, where the tap records those
        tap._records = [record]
        tap._open = True
        return record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        records = self._tap._records
        self._tap._close()
        if self._tap._attached:
            self._tap._records = self._waiting
        if kind is None:
            if len(records) > 1:
                raise RuntimeError(f"{len(records)} forward passes ran in one recording(); use one for each")
            records[0]._complete()


class _Captured:
    """Queries and keys of one block, as they enter the kernel but for the rotary embedding."""

    def __init__(self, site: _Site, query: Tensor, key: Tensor, rope: Tensor | None) -> None:
        self._site = site
        self._query = query
        self._key = key
        self._rope = rope

    def logits(self) -> Tensor:
        """``(b, heads, queries, keys)``, with one query (the class token, the mean patch) or all of them."""
        query, key = self.queries_and_keys()
        with torch.autocast(key.device.type, enabled=False):
            query = query * self._site.scale
            if query.shape[2] == 1:  # a product with one vector reads the keys as they lie
                return (key @ query.transpose(-2, -1)).transpose(-2, -1)
            return query @ key.transpose(-2, -1)

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """``(b, heads, queries, d)``, one query or all, and ``(b, heads, keys, d)``, as they enter the kernel."""
        site, dtype = self._site, torch.promote_types(self._key.dtype, torch.float32)
        with torch.autocast(self._key.device.type, enabled=False):
            query, key = self._query.to(dtype), self._key.to(dtype)
            if self._rope is not None:
                key = site.rotate(key, self._rope)
                query = query if site.only_cls else site.rotate(query, self._rope)  # prefix is never rotated
            if key.shape[1] != query.shape[1]:  # grouped-query attention
                key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            if site.only_average:
                query = query[:, :, site.prefix :].mean(dim=2, keepdim=True)
            return query, key


class _Computed(_Captured):
    """The logits alone: without gradients nothing else keeps queries and keys alive, nor does this."""

    def __init__(self, logits: Tensor) -> None:
        self._computed = logits

    def logits(self) -> Tensor:
        return self._computed

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "queries_and_keys() of a pass without gradient needs AttentionTap(..., keep_keys=True)"
        )


class _Site:
    """The hooks on one block's attention."""

    def __init__(self, tap: AttentionTap, block: nn.Module, index: int, order: int) -> None:
        attention: Any = getattr(block, "attn", block)
        forward: Any = type(attention).forward
        known = forward in _supported_forwards() or hasattr(attention, "queries_and_keys")
        if not known or not hasattr(attention, "q_norm"):
            raise ValueError(
                f"block {index}: a tap does not know the attention of {type(attention).__name__}; it reads "
                "timm's Attention, AttentionRope and EvaAttention"
            )
        self.tap = tap
        self.order = order
        self.attention = attention
        self.scale = float(attention.scale)
        self.prefix = tap.num_prefix_tokens
        self.only_cls = tap.query == "cls" and not tap.full
        self.only_average = tap.query == "avg" and not tap.full
        self.arguments = list(inspect.signature(forward).parameters)[1:]
        self.query: Tensor | None = None
        self.rope: Tensor | None = None

    def hook(self) -> list[RemovableHandle]:
        return [
            self.attention.register_forward_pre_hook(self.before, with_kwargs=True),
            self.attention.q_norm.register_forward_hook(self.on_query),
            self.attention.k_norm.register_forward_hook(self.on_key),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.tap._listens():
            return
        given = dict(zip(self.arguments, args)) | kwargs
        if given.get("attn_mask") is not None or given.get("is_causal"):
            raise ValueError(f"{type(module).__name__} got an attention mask; a tap reads unmasked attention")
        self.query, self.rope = None, given.get("rope")

    def on_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.tap._listens() and not output.is_meta and not _recomputing():
            self.query = output[:, :, :1] if self.only_cls else output

    def on_key(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not self.tap._listens() or self.query is None:
            return
        captured = _Captured(self, self.query, output, self.rope)
        self.query = self.rope = None
        if not torch.is_grad_enabled() and not self.tap.keep_keys:
            captured = _Computed(captured.logits())
        self.tap._collect(self.order, captured)

    def rotate(self, tokens: Tensor, rope: Tensor) -> Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        unrotated: int = self.attention.num_prefix_tokens
        half = {"half": True} if getattr(self.attention, "rotate_half", False) else {}
        rotated = apply_rot_embed_cat(tokens[:, :, unrotated:], rope, **half)
        return torch.cat([tokens[:, :, :unrotated], rotated], dim=2)


def _recomputing() -> bool:
    """True inside a backward pass: gradient checkpointing runs blocks again there, no new forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _supported_forwards() -> list[Any]:
    # The forward itself is compared, so that a subclass which computes something else is refused.
    import timm.layers
    from timm.models import eva, vision_transformer

    kinds: list[Any] = [vision_transformer.Attention, eva.EvaAttention]
    kinds.append(getattr(timm.layers, "AttentionRope", eva.EvaAttention))  # younger than the other two
    return [kind.forward for kind in kinds]


def _has_class_token(net: nn.Module) -> bool:
    # Hierarchical networks hold theirs in the stage where it joins.
    return getattr(net, "cls_token", None) is not None or any(
        name.endswith(".cls_token") for name, _ in net.named_parameters()
    )


def _blocks_of(net: Any) -> list[nn.Module]:
    if isinstance(every := getattr(net, "all_blocks", None), list):  # of all stages, where there are several
        return cast(list[nn.Module], every)
    blocks = getattr(net, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise ValueError(f"{type(net).__name__} has no stack of transformer blocks")
    return list(blocks)


def _create_timm(
    name: str, size: tuple[int, int] | None, pretrained: bool, kwargs: dict[str, Any]
) -> tuple[Any, tuple[int, int]]:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, [*timm.list_models(), "vit"], n=4)
        raise InputError(
            f"backbone {name!r}: no such timm model; "
            + (f"did you mean {' or '.join(close)}?" if close else "see timm.list_models(), or give 'vit'")
        )
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise InputError(
            f"backbone {name!r}: no weights tagged {tag!r}; expected {' or '.join(tags) or 'no tag'}"
        )
    if pretrained and not tags:
        raise InputError(f"pretrained=True: timm publishes no weights for {name!r}; choose another backbone")
    published: Any = timm.models.get_pretrained_cfg(name)
    if size is not None and published.fixed_input_size:
        kwargs["img_size"] = size
    try:
        with _foreign_options(name):
            net: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    except OSError as error:
        if not pretrained:
            raise
        raise InputError(
            f"backbone {name!r}: no weights downloaded ({error}); or give weights=FILE"
        ) from error
    return net, size or _pair(published.input_size[1:])


@contextmanager
def _foreign_options(name: str) -> Generator[None]:
    """Name an option that a network does not have, such as one of another backbone in a recipe."""
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise InputError(
            f"backbone {name!r}: has no option {unknown[1]!r}; leave it out of the backbone's options"
        ) from error


def _load_weights(net: Any, path: Path) -> None:
    """Load a timm state dict: its classifier dropped, position embeddings resampled, otherwise strictly."""
    pretrained_cfg: dict[str, Any] = getattr(net, "pretrained_cfg", {})
    classifier: str | Sequence[str] = pretrained_cfg.get("classifier") or "head"
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in read_weights(path).items() if not key.startswith(heads)}
    state = converted_weights(net, state)
    problem = mismatched_keys(net.state_dict(), state)
    if problem:
        raise InputError(
            f"{path}: not the weights of this {type(net).__name__} ({problem}); name their backbone"
        )
    net.load_state_dict(state)
    _logger.info("loaded the backbone's weights from %s", path)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
