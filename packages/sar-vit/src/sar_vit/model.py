r"""SARViT: a vision transformer with SAR's last block, as a classifier that shows where it looks.

Peruzzo et al., "Spatial Entropy as an Inductive Bias for Vision Transformers", arXiv 2206.04636. Any backbone works:
timm's (ViT, DeiT, DINOv2, DINOv3; Swin and PVT-v2 with ``query="avg"``) and T2T-ViT, PVT and CvT of
:mod:`sar_vit.architectures`. In inference it costs what the plain network costs; its parameters are fewer by the last
block's second norm.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from attnmap_core.backbones import Backbone, Features, create_backbone
from attnmap_core.errors import InputError
from attnmap_core.hub import Localization, PretrainedModel
from torch import Tensor, nn

from .checkpoints import SWITCHES, load_weights
from .entropy import Query
from .surgery import Collector, apply_sar, spatial_entropy_loss

_logger = logging.getLogger(__name__)


class SARViT(
    PretrainedModel,
    license="apache-2.0",
    tags=["vision-transformer", "attention-maps", "sar-vit"],
    pipeline_tag="image-classification",
    paper_url="https://arxiv.org/abs/2206.04636",
):
    r"""Classifier on the class token of a backbone whose last block is SAR's (Eq. 10-11).

    Train it with :class:`sar_vit.task.SupervisedTask`, or by hand with :meth:`spatial_entropy` after each forward
    pass in training mode.

    Args:
        backbone: timm name, name of :data:`sar_vit.architectures.ARCHITECTURES`, or ``"vit"`` with its sizes in
            ``backbone_options``.
        num_classes: outputs of the linear head; 0 for no head: a forward pass then gives the features, as training
            without labels wants them.
        img_size: input pixels, one number or ``(height, width)``.
        msa_skip: skip connection around the last attention; SAR has none.
        mlp_norm: norm before the last MLP; SAR has none.
        mlp_skip: skip connection around the last MLP.
        query: ``"cls"``, or ``"avg"`` for backbones without class token; see :func:`sar_vit.apply_sar`.
        drop_path_rate: largest stochastic depth rate, growing linearly over the blocks; training only. A branch
            without its skip has none.
        head_blocks: the head sees the class tokens of so many last blocks, each after the final norm, one after the
            other; 1 is the usual head, 4 the linear probe of DINO.
        interpolation: how score maps are upsampled, ``"bicubic"`` or ``"bilinear"``.
        threshold: share of a score map's maximum above which pixels make the boxes.
        labels: class names in the order of the logits.
        preprocessing: fields of :class:`attnmap_core.data.transforms.Preprocessing`; default: the whole photo at
            ``img_size``, normalised as the backbone's pretrained weights expect.
        pretrained: download timm's weights for the backbone; they are of a standard last block.
        weights: local weights instead; see :func:`sar_vit.checkpoints.load_weights`.
        new_surgery: let ``pretrained`` and ``weights`` be of another form of the last block than this one.
        reset_head: start the head anew also where a source has one of as many classes.
        heads: of the last block. Not a setting but a check, that ``config.json`` keeps: the backbone decides.
        grid: ``(h, w)`` of the last block's patch keys; likewise.
        backbone_options: passed to :func:`attnmap_core.backbones.create_backbone` or the architecture.

    Attributes:
        arch: name of the backbone.
        switches: ``msa_skip``, ``mlp_norm`` and ``mlp_skip`` by name.

    Raises:
        InputError: if the backbone is unknown or has no class token for ``query="cls"``, if weights do not fit or
            are of another form, or heads and grid are not the backbone's.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> model = SARViT("vit", num_classes=4, img_size=(32, 48), backbone_options=tiny)
        >>> logits = model(torch.randn(2, 3, 32, 48))
        >>> logits.shape, model.spatial_entropy().ndim, model.grid, model.heads
        (torch.Size([2, 4]), 0, (4, 6), 3)
        >>> model.eval().localize(torch.randn(2, 3, 32, 48)).score_maps.shape
        torch.Size([2, 4, 6])
    """

    def __init__(
        self,
        backbone: str = "deit_small_patch16_224",
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        *,
        msa_skip: bool = False,
        mlp_norm: bool = False,
        mlp_skip: bool = True,
        query: Query = "cls",
        drop_path_rate: float = 0.1,
        head_blocks: int = 1,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        threshold: float = 0.3,
        labels: Sequence[str] | None = None,
        preprocessing: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        new_surgery: bool = False,
        reset_head: bool = False,
        heads: int | None = None,
        grid: Sequence[int] | None = None,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be bicubic or bilinear, got {interpolation!r}")
        if labels is not None and len(labels) != num_classes:
            raise ValueError(f"{len(labels)} labels do not fit num_classes {num_classes}")
        # labels, preprocessing and threshold are already taken by PretrainedModel
        self.interpolation = interpolation
        self.arch = backbone
        self.num_classes, self.head_blocks = num_classes, head_blocks
        self.switches = dict(zip(SWITCHES, (msa_skip, mlp_norm, mlp_skip)))
        if pretrained and not all(self.switches.values()) and not new_surgery:
            raise InputError(
                f"pretrained=True: timm's weights are of a standard last block, this one has {self._said()}; keep all "
                "three switches on, or pass new_surgery=True"
            )
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.backbone = _backbone(backbone, size, pretrained, drop_path_rate, backbone_options or {})
        try:
            apply_sar(self.backbone, **self.switches, query=query)
        except ValueError as error:
            raise InputError(f"backbone {backbone}: {error}") from error
        self.has_class_token = any(
            name.endswith(".cls_token") for name, _ in self.backbone.named_parameters()
        )
        self._check_head_blocks()
        self.num_features = head_blocks * self.backbone.num_features
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.heads = self.collector.heads
        self.grid = self.collector.key_grid(size)
        for name, stated, own in (("heads", heads, self.heads), ("grid", grid and tuple(grid), self.grid)):
            if stated is not None and stated != own:
                raise InputError(
                    f"{name} {stated}: the last block of {backbone} has {own}; leave {name} out, or create the "
                    "backbone with the sizes of the one meant"
                )
        self._config |= {"heads": self.heads, "grid": list(self.grid)}  # stated in config.json from now on
        if pretrained and not reset_head:
            self._take_pretrained_head()
        if weights is not None:
            load_weights(self, weights, new_surgery=new_surgery, reset_head=reset_head)

    @property
    def collector(self) -> Collector:
        """What collects queries and keys for the loss."""
        net: Any = self.backbone.model
        return net.sar

    @property
    def norm2_name(self) -> str:
        """Name in the state dict, up to its last dot, of the norm that ``mlp_norm=False`` takes out."""
        block: Any = self.collector.block
        [name] = (name for name, module in self.named_modules() if module is block)
        return f"{name}.norm2."

    # --- Training ---

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(b, num_classes)`` of ``images (b, 3, H, W)``; in training the last block is collected."""
        return self.head(self.features(images))

    def classify(self, features: Features) -> Tensor:
        """Logits ``(b, num_classes)`` of what the backbone gives, for a head that sees its last block alone."""
        return self.head(self._pooled(features))

    def features(self, images: Tensor) -> Tensor:
        """What the head sees of ``images (b, 3, H, W)``: ``(b, num_features)``, after the final norm."""
        if self.head_blocks == 1:
            return self._pooled(self.backbone(images))
        network: Any = self.backbone.model
        tokens = network.forward_intermediates(
            images,
            indices=self.head_blocks,
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return torch.cat([prefix[:, 0] for _, prefix in tokens], dim=1)

    def _pooled(self, features: Features) -> Tensor:
        if self.has_class_token and features.prefix is not None:
            return features.prefix[:, 0]
        return features.map.mean((2, 3))

    def spatial_entropy(self, **options: Any) -> Tensor:
        """``L_se`` (Eq. 9) of the forward passes since the last call; see :func:`sar_vit.spatial_entropy_loss`."""
        return spatial_entropy_loss(self, **options)

    # --- Score maps ---

    def attention_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(b, c)``, and the query's attention to the patches in each head of the last block.

        Args:
            images: ``(b, 3, H, W)``, normalised.

        Returns:
            Logits, and maps ``(b, heads, h, w)`` in ``[0, 1]``; a map and the prefix tokens' share sum to 1.
        """
        with self.collector.recording() as record:
            logits = self(images)
        return logits, self.collector.maps(record, "softmax")

    def localize(self, images: Tensor) -> Localization:
        """Logits, and the attention averaged over heads, each map stretched to ``[0, 1]``; whatever the class.

        Raises:
            InputError: if the model has no head.
        """
        if not self.num_classes:
            raise InputError(
                "this SARViT has no head and names no class; train one on it (scenario probe), or take "
                "attention_maps() for where it looks"
            )
        logits, maps = self.attention_maps(images)
        return Localization(logits, _stretched(maps.mean(dim=1)))

    # --- Weights ---

    def at_size(self, img_size: int | Sequence[int]) -> SARViT:
        """A copy for images of another size, position embeddings resampled, that sees the whole photo.

        Args:
            img_size: input pixels, one number or ``(height, width)``.

        Returns:
            A new model in evaluation mode on the same device; this one stays as it is.

        Raises:
            InputError: for a size that the patches do not divide.

        Example:
            >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
            >>> SARViT("vit", num_classes=4, img_size=32, backbone_options=tiny).at_size((64, 48)).grid
            (8, 6)
        """
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        fixed = {name: value for name, value in self._config.items() if name not in ("img_size", "grid")}
        with torch.random.fork_rng(devices=[]):  # drawn weights that are replaced must not shift a training
            copied = type(self)(**fixed, img_size=size, labels=self.labels or None, threshold=self.threshold)
        copied.preprocessing = dataclasses.replace(self.preprocessing, size=size, resize=None, crop="none")
        network = _state_at(self.backbone.model, copied.backbone.model)
        copied.head.load_state_dict(self.head.state_dict())
        copied.backbone.model.load_state_dict(network)
        weight = next(self.parameters())
        return copied.to(weight.device, weight.dtype).eval()

    def no_weight_decay(self) -> set[str]:
        """Parameters that train without weight decay: embeddings of position and class, and all 1-D ones."""
        embeddings = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        return embeddings | {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def _check_head_blocks(self) -> None:
        network: Any = self.backbone.model
        several = (
            self.has_class_token and hasattr(network, "blocks") and hasattr(network, "forward_intermediates")
        )
        depth = len(network.blocks) if several else 1
        if not 1 <= self.head_blocks <= depth:
            raise InputError(
                f"head_blocks {self.head_blocks}: {self.arch} gives the class token of {depth} blocks; "
                f"choose 1 to {depth}"
            )

    def _said(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.switches.items())

    def _take_pretrained_head(self) -> None:
        import timm

        config = timm.models.get_pretrained_cfg(self.arch)
        if config is None or config.num_classes != self.num_classes:
            return
        network: Any = timm.create_model(self.arch, pretrained=True)  # its file is in the local cache by now
        self.head.load_state_dict(network.get_classifier().state_dict())
        _logger.info("the head is taken from the pretrained classifier")


def _backbone(
    name: str, size: tuple[int, int], pretrained: bool, drop_path_rate: float, options: dict[str, Any]
) -> Backbone:
    from .architectures import ARCHITECTURES, create_architecture

    if name not in ARCHITECTURES:
        return create_backbone(
            name, img_size=size, pretrained=pretrained, drop_path_rate=drop_path_rate, **options
        )
    if pretrained:
        raise InputError(
            f"pretrained=True: {name} is not timm's; give weights= with a file of its authors' release"
        )
    net = create_architecture(name, num_classes=0, img_size=size, drop_path_rate=drop_path_rate, **options)
    return Backbone(net, name, size)


def _state_at(net: Any, fresh: Any) -> dict[str, Tensor]:
    """The weights of ``net`` as ``fresh``, the same network made for images of another size, holds them."""
    if hasattr(net, "adapt_weights"):  # the architectures of this package
        return fresh.adapt_weights(net.state_dict())
    state: dict[str, Tensor] = net.state_dict()
    if isinstance(getattr(net, "pos_embed", None), nn.Parameter) and hasattr(net, "set_input_size"):  # timm
        from timm.layers import resample_abs_pos_embed

        # By hand: set_input_size of older timm keeps the table of another grid with as many patches.
        state["pos_embed"] = resample_abs_pos_embed(
            net.pos_embed,
            list(fresh.patch_embed.grid_size),
            old_size=list(net.patch_embed.grid_size),
            num_prefix_tokens=0 if net.no_embed_class else net.num_prefix_tokens,
        )
    return state


def _stretched(maps: Tensor) -> Tensor:
    low, high = torch.aminmax(maps.flatten(1), dim=1, keepdim=True)
    span = high - low
    stretched = (maps.flatten(1) - low) / torch.where(span > 0, span, 1)  # a constant map is 0
    return stretched.reshape(maps.shape)
