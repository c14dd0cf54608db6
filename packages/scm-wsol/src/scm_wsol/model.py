r"""TS-CAM and SCM: a vision transformer trained on image labels that localizes what it names.

Bai et al., "Weakly Supervised Object Localization via Transformer with Implicit Spatial Calibration", ECCV
2022; Gao et al., "TS-CAM: Token Semantic Coupled Attention Map for Weakly Supervised Object Localization",
ICCV 2021.

A backbone gives patch tokens, a convolution head turns them into one semantic map per class (S), and the
class token's attention to the patches, summed over the blocks, gives an attention map (F). Their product is
the score map of a class. SCM adds a calibration of the two maps that is trained through and then dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import torch
from attnmap_core.backbones import AttentionTap, create_backbone, read_weights
from attnmap_core.errors import InputError
from attnmap_core.hub import Localization, PretrainedModel
from einops import einsum, rearrange
from torch import Tensor, nn

from .calibration import SpatialCalibration, minmax

_logger = logging.getLogger(__name__)

Method = Literal["tscam", "cam"]
_Model = TypeVar("_Model", bound="TSCAM")


class Maps(NamedTuple):
    """What the backbone and the head see in a batch of images, before any class is chosen.

    Attributes:
        logits: ``(b, c)``, the mean of the semantic maps over the grid.
        semantic: S⁰ ``(b, c, h, w)``, one raw score per class and patch; any sign.
        attention: f ``(b, h, w)``, the class token's attention summed over blocks; 0 or more, not normalised.
    """

    logits: Tensor
    semantic: Tensor
    attention: Tensor


class TSCAM(
    PretrainedModel,
    license="apache-2.0",
    tags=["weakly-supervised-object-localization", "scm-wsol"],
    pipeline_tag="image-classification",
    paper_url="https://arxiv.org/abs/2103.14862",
):
    r"""Token semantic coupled attention map: classifier and localizer in one.

    .. math:: S^0 = \mathrm{conv}(Z), \quad f = \sum_k \tfrac{1}{h} \sum_{\mathrm{heads}} A^k_{\mathrm{cls}},
        \quad M_c = S^0_c \odot f

    Z are the backbone's patch tokens, :math:`A^k_{\mathrm{cls}}` is the class token's softmax row in block k.

    Args:
        backbone: timm name of a ViT with a class token, or ``"vit"`` with its sizes in ``backbone_options``.
        num_classes: classes C.
        img_size: input pixels, one number or ``(height, width)``.
        head_kernel: side of the convolution head; 1 makes it the linear head of plain CAM.
        drop_path_rate: largest stochastic depth rate, growing linearly over the blocks; training only.
        method: whose score map :meth:`localize` gives: ``"tscam"`` or ``"cam"`` (S⁰ alone).
        attention_blocks: blocks whose attention is summed; default all.
        normalise_attention: bring f to [0, 1] before it multiplies S⁰. Default: as the method does (TS-CAM
            no, SCM yes). Calibration always starts from the normalised map.
        logit_scale: factor of the training logits; other than 1 it is a control, not the published method.
        interpolation: how score maps are upsampled, ``"bicubic"`` or ``"bilinear"``.
        threshold: share of a score map's maximum above which pixels belong to the object.
        labels: class names in the order of the logits.
        preprocessing: fields of :class:`attnmap_core.data.transforms.Preprocessing`; default: the whole photo
            at ``img_size``, normalised as the backbone's pretrained weights expect.
        pretrained: download timm's weights for the backbone.
        weights: local file of backbone weights instead.
        reset_head_bias: do not take the bias of the pretrained classifier where its shape fits.
        backbone_options: passed to :func:`attnmap_core.backbones.create_backbone`.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> model = TSCAM("vit", num_classes=4, img_size=(32, 48), backbone_options=tiny).eval()
        >>> maps = model.maps(torch.zeros(2, 3, 32, 48))
        >>> tuple(maps.semantic.shape), tuple(model.class_maps(maps, torch.tensor([3, 0])).shape)
        ((2, 4, 4, 6), (2, 4, 6))
    """

    _normalised = False  # whether the method brings the attention map to [0, 1]

    def __init__(
        self,
        backbone: str = "deit_small_patch16_224",
        num_classes: int = 200,
        img_size: int | Sequence[int] = 224,
        *,
        head_kernel: int = 3,
        drop_path_rate: float = 0.1,
        method: Method = "tscam",
        attention_blocks: Sequence[int] | None = None,
        normalise_attention: bool | None = None,
        logit_scale: float = 1.0,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        threshold: float = 0.1,
        labels: Sequence[str] | None = None,
        preprocessing: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        reset_head_bias: bool = False,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if method not in ("tscam", "cam"):
            raise ValueError(f"method must be tscam or cam, got {method!r}")
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be bicubic or bilinear, got {interpolation!r}")
        if num_classes < 1 or head_kernel < 1 or head_kernel % 2 == 0:
            raise ValueError(
                f"expected num_classes >= 1 and odd head_kernel, got {num_classes}, {head_kernel}"
            )
        if labels is not None and len(labels) != num_classes:
            raise ValueError(f"{len(labels)} labels do not fit num_classes {num_classes}")
        # labels, preprocessing and threshold are already taken by PretrainedModel
        self.method = method
        self.normalise_attention = self._normalised if normalise_attention is None else normalise_attention
        self.logit_scale = logit_scale
        self.interpolation = interpolation
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.backbone = create_backbone(
            backbone,
            img_size=size,
            pretrained=pretrained,
            weights=weights,
            drop_path_rate=drop_path_rate,
            **(backbone_options or {}),
        )
        try:
            self.tap = AttentionTap(self.backbone, attention_blocks).attach()
        except ValueError as error:
            raise InputError(
                f"backbone {backbone}, attention_blocks {attention_blocks}: {error}; "
                "choose a ViT with a class token, and some of its blocks"
            ) from error
        # The head keeps PyTorch's own initialisation, as in the released code.
        self.head = nn.Conv2d(self.backbone.num_features, num_classes, head_kernel, padding=head_kernel // 2)
        if not reset_head_bias:
            self._take_pretrained_head(backbone, pretrained, weights)

    # --- S⁰ and f ---

    def semantic_maps(self, images: Tensor) -> Tensor:
        """S⁰ ``(b, c, h, w)`` of ``images (b, 3, H, W)``; attention is left alone."""
        return self.head(self.backbone(images).map)

    def maps(self, images: Tensor) -> Maps:
        """All that inference needs, of ``images (b, 3, H, W)``; with gradient where it is enabled."""
        with self.tap.recording() as record:
            S = self.semantic_maps(images)
        rows = record.rows()[..., self.tap.num_prefix_tokens :]  # softmax over all tokens, patches kept
        f = rows.mean(dim=2).sum(dim=1)  # mean over heads, sum over blocks
        return Maps(_pool(S), S, rearrange(f, "b (h w) -> b h w", h=S.shape[2]))

    # --- Training ---

    def training_logits(self, images: Tensor) -> Tensor:
        """Logits ``(b, c)`` that the loss sees: the pooled S⁰. The attention map is not computed."""
        return _pool(self.semantic_maps(images)) * self.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(b, c)``: :meth:`training_logits` in training mode, the pooled S⁰ in evaluation mode."""
        return self.training_logits(images) if self.training else _pool(self.semantic_maps(images))

    # --- Score maps ---

    def class_maps(self, maps: Maps, classes: Tensor, kind: str | None = None) -> Tensor:
        """Raw score maps of chosen classes, on the patch grid.

        Args:
            maps: of :meth:`maps`.
            classes: class ids, ``(b,)`` or ``(b, k)``.
            kind: ``"cam"`` S⁰; ``"att"`` f, the same for all classes; ``"tscam"`` S⁰ ⊙ f; ``"scm"``
                S⁰ ⊙ minmax(f); ``"combine:l,m"`` S^l ⊙ F^m, for :class:`SCM` only. Default: the model's own.

        Returns:
            ``(b, h, w)`` or ``(b, k, h, w)``, any sign and scale: upsample, then normalise.
        """
        kind = kind or self.own_kind
        several = classes if classes.ndim == 2 else rearrange(classes, "b -> b 1")
        result = self._class_maps(maps, several, kind)
        return result if classes.ndim == 2 else rearrange(result, "b 1 h w -> b h w")

    def _class_maps(self, maps: Maps, classes: Tensor, kind: str) -> Tensor:
        S = _of_classes(maps.semantic, classes)
        f = rearrange(maps.attention, "b h w -> b 1 h w")
        if kind == "cam":
            return S
        if kind == "att":
            return f.expand_as(S)
        if kind == "tscam":
            return S * f
        if kind == "scm":
            return S * rearrange(_normalise(maps.attention), "b h w -> b 1 h w")
        raise ValueError(f"kind must be one of {', '.join(self.kinds)}, got {kind!r}")

    kinds: tuple[str, ...] = ("cam", "att", "tscam", "scm")
    """What ``kind`` of :meth:`class_maps` may be."""

    @property
    def own_kind(self) -> str:
        """The kind of score map that :meth:`localize` gives."""
        if self.method == "cam":
            return "cam"
        return "scm" if self.normalise_attention else "tscam"

    def localize(self, images: Tensor) -> Localization:
        """Logits and the score map of the predicted class, on the patch grid."""
        maps = self.maps(images)
        return Localization(maps.logits, self.class_maps(maps, maps.logits.argmax(dim=1)))

    # --- Weights ---

    def no_weight_decay(self) -> set[str]:
        """Parameters that train without weight decay: embeddings of position and class, and all 1-D ones."""
        embeddings = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        return embeddings | {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def _take_pretrained_head(self, backbone: str, pretrained: bool, weights: str | None) -> None:
        """Take what fits of the pretrained classifier, as the released code does.

        A linear weight never fits the convolution; its bias does where the number of classes is the same.
        """
        if weights is not None:
            found = read_weights(Path(weights))
        elif pretrained:
            found = _timm_head(backbone, self.head.out_channels)
        else:
            return
        with torch.no_grad():
            for name, parameter in self.head.named_parameters(prefix="head"):
                if name in found and found[name].shape == parameter.shape:
                    parameter.copy_(found[name])
                    _logger.info("%s taken from the pretrained classifier", name)


class SCM(TSCAM, paper_url="https://arxiv.org/abs/2207.10447"):
    r"""TS-CAM trained through the spatial calibration module, which inference drops.

    .. math:: (S^L, F^L) = \mathrm{calibration}(S^0, F^0), \quad F^0 = \mathrm{minmax}(f), \quad
        M_c = S^0_c \odot F^0

    Training logits are the pooled :math:`S^L`; logits and maps in evaluation are those of :math:`S^0` and
    :math:`F^0`. The two differ in scale by design.

    Args:
        calibration_options: of :class:`SpatialCalibration`, such as ``{"iterations": "release"}``. The rest
            as for :class:`TSCAM`.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> model = SCM("vit", num_classes=4, img_size=32, backbone_options=tiny)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 4])
    """

    _normalised = True
    kinds = (*TSCAM.kinds, "combine:l,m")

    def __init__(
        self,
        backbone: str = "deit_small_patch16_224",
        num_classes: int = 200,
        img_size: int | Sequence[int] = 224,
        *,
        head_kernel: int = 3,
        drop_path_rate: float = 0.1,
        method: Method = "tscam",
        attention_blocks: Sequence[int] | None = None,
        normalise_attention: bool | None = None,
        logit_scale: float = 1.0,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        threshold: float = 0.1,
        labels: Sequence[str] | None = None,
        preprocessing: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        reset_head_bias: bool = False,
        backbone_options: dict[str, Any] | None = None,
        calibration_options: dict[str, Any] | None = None,
    ) -> None:
        # All by name in the signature, so that config.json holds every value.
        super().__init__(
            backbone,
            num_classes,
            img_size,
            head_kernel=head_kernel,
            drop_path_rate=drop_path_rate,
            method=method,
            attention_blocks=attention_blocks,
            normalise_attention=normalise_attention,
            logit_scale=logit_scale,
            interpolation=interpolation,
            threshold=threshold,
            labels=labels,
            preprocessing=preprocessing,
            pretrained=pretrained,
            weights=weights,
            reset_head_bias=reset_head_bias,
            backbone_options=backbone_options,
        )
        self.calibration = SpatialCalibration(**(calibration_options or {}))

    @classmethod
    def from_tscam(cls, model: TSCAM, **calibration_options: Any) -> Self:
        """An untrained calibration on the weights of ``model``: the control for training through it."""
        config = dict(model._config)
        config.update(normalise_attention=None, calibration_options=calibration_options)
        return _with_weights_of(model, cls(**config))

    def without_calibration(self) -> TSCAM:
        """The same predictions from a model that holds no calibration."""
        config = dict(self._config)
        config.update(normalise_attention=self.normalise_attention)
        del config["calibration_options"]
        return _with_weights_of(self, TSCAM(**config))

    def training_logits(self, images: Tensor) -> Tensor:
        """Logits ``(b, c)`` that the loss sees: the pooled S^L."""
        maps = self.maps(images)
        S, _ = self.calibration(maps.semantic, _flat(_normalise(maps.attention)))
        return _pool(S) * self.logit_scale

    def calibrated(self, maps: Maps) -> tuple[Tensor, Tensor]:
        """S^l ``(L+1, b, c, h, w)`` and F^m ``(L+1, b, h, w)`` of all blocks; index 0 is S⁰ and F⁰."""
        S, F = self.calibration(maps.semantic, _flat(_normalise(maps.attention)), return_layers=True)
        return S, rearrange(F, "l b (h w) -> l b h w", h=maps.semantic.shape[2])

    def combined_maps(self, maps: Maps, classes: Tensor) -> Tensor:
        """S^l_c ⊙ F^m for all pairs of layers, ``(b, k, L+1, L+1, h, w)``, of ``classes (b, k)``."""
        S, F = self.calibrated(maps)
        S = torch.stack([_of_classes(layer, classes) for layer in S])
        return einsum(S, F, "l b k h w, m b h w -> b k l m h w")

    def _class_maps(self, maps: Maps, classes: Tensor, kind: str) -> Tensor:
        if not kind.startswith("combine:"):
            return super()._class_maps(maps, classes, kind)
        pair = kind.removeprefix("combine:").split(",")
        layers = len(self.calibration.blocks)
        if len(pair) != 2 or not all(part.isdecimal() and int(part) <= layers for part in pair):
            raise ValueError(
                f'kind must be like "combine:0,{layers}" with layers 0 to {layers}, got {kind!r}'
            )
        S, F = self.calibrated(maps)
        return _of_classes(S[int(pair[0])], classes) * rearrange(F[int(pair[1])], "b h w -> b 1 h w")


def _with_weights_of(source: TSCAM, model: _Model) -> _Model:
    """Give ``model`` the backbone and head of ``source``, and what else a model folder would hold."""
    model.backbone.load_state_dict(source.backbone.state_dict())
    model.head.load_state_dict(source.head.state_dict())
    model.labels, model.threshold = list(source.labels), source.threshold
    model.preprocessing = source.preprocessing
    return model.to(source.head.weight.device, source.head.weight.dtype).train(source.training)


def _pool(S: Tensor) -> Tensor:
    """Mean over the grid, in float32 or wider also under autocast."""
    return S.mean(dim=(2, 3), dtype=torch.promote_types(S.dtype, torch.float32))


def _flat(attention: Tensor) -> Tensor:
    return rearrange(attention, "b h w -> b (h w)")


def _normalise(attention: Tensor) -> Tensor:
    """F⁰ = minmax(f), on the grid."""
    return rearrange(minmax(_flat(attention)), "b (h w) -> b h w", h=attention.shape[1])


def _of_classes(S: Tensor, classes: Tensor) -> Tensor:
    """``(b, k, h, w)``: the semantic maps of ``classes (b, k)``."""
    return S.gather(1, rearrange(classes, "b k -> b k 1 1").expand(-1, -1, *S.shape[2:]))


def _timm_head(name: str, num_classes: int) -> dict[str, Tensor]:
    """The published classifier (its file is in the local cache by now), if it has as many classes."""
    import timm

    config = timm.models.get_pretrained_cfg(name)
    if config is None or config.num_classes != num_classes:
        return {}
    network: Any = timm.create_model(name, pretrained=True)
    return {f"head.{key}": value for key, value in network.get_classifier().state_dict().items()}
