r"""ContrastiveCAM: a backbone, a channel gate, pretext heads, and PTAP, which makes the attention map.

Ki et al., "Contrastive Attention Maps for Self-supervised Co-localization", ICCV 2021, on the baseline of Baek et al.,
"PsyNet", AAAI 2020. Trained on photos that all show one kind of object, without any label::

    images -> backbone -> F -> gate -> F_w -+-> heads -> logits of the pretext tasks
                                            +-> PTAP  -> attention map A -> heat map, box

What of this the paper says and what is our own design is in the package's README.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from attnmap_core.hub import Localization, PretrainedModel
from torch import Tensor

from .attention import GATES, Gate, PretextHeads, caam, channel_gate
from .backbones import (
    Feature,
    LastStage,
    colocalization_backbone,
    first_cell,
    receptive_shift,
    shifted_upsampling,
)
from .pooling import Mode, Rank, kept_channels, ptap
from .transforms import TASKS, parse_tasks

EvalMap = Literal["ptap", "caam", "avg_fw"]


class Views(NamedTuple):
    """What the model sees in a batch; see :meth:`ContrastiveCAM.forward`.

    Attributes:
        logits: ``(b, n)`` by pretext task.
        attention: A ``(b, h, w)``, neither normalised nor upsampled; float32 at least.
        features: F ``(b, c, h, w)`` of the backbone.
        weighted: F_w ``(b, c, h, w)``.
    """

    logits: dict[str, Tensor]
    attention: Tensor
    features: Tensor
    weighted: Tensor


class ContrastiveCAM(
    PretrainedModel,
    license="apache-2.0",
    tags=["co-localization", "self-supervised-learning", "attention-maps", "contrastive-cam"],
    pipeline_tag="object-detection",
    paper_url="https://openaccess.thecvf.com/content/ICCV2021/html/"
    "Ki_Contrastive_Attention_Maps_for_Self-Supervised_Co-Localization_ICCV_2021_paper.html",
):
    r"""Co-localization without labels: one heat map and one box for each photo of one kind of object.

    Train it with :class:`contrastive_cam.task.ColocalizationTask`.

    Args:
        backbone: timm name of any CNN or ViT, or ``"vit"`` with its sizes in ``backbone_options``. PsyNet's are
            ``legacy_seresnet50`` (the default), ``resnet50``, ``vgg16``, ``vgg16_bn`` and ``vgg19``.
        tasks: pretext tasks, whose classes the heads tell apart; see :func:`contrastive_cam.transforms.parse_tasks`.
        img_size: input pixels, one number or ``(height, width)``.
        last_stage: see :func:`contrastive_cam.backbones.colocalization_backbone`.
        feature: likewise; with ``"pre_relu"`` features are signed, and k always matters.
        gate: kind of :func:`contrastive_cam.attention.channel_gate`.
        ratio: r of PTAP.
        pooling: mode of :func:`contrastive_cam.ptap`.
        rank: likewise.
        heads_read: what the heads see: ``"F_w"``, so that the gate learns from the pretext tasks too, or ``"F"``.
        eval_map: the map in inference: ``"ptap"`` as in training; ``"caam"`` the mean of F, the supplement's "PTAP off
            at test"; ``"avg_fw"`` the mean of F_w.
        map_offset: where cells lie in the heat map: ``"geometric"``, a plain grid, as published; or
            ``"receptive_field"``, where they look, see :func:`contrastive_cam.backbones.first_cell`.
        threshold: share of the heat map's maximum above which pixels make the box.
        labels: the name of what the photos show, one.
        preprocessing: fields of :class:`attnmap_core.data.transforms.Preprocessing`; default: the whole photo at
            ``img_size``, normalised as the backbone's pretrained weights expect.
        pretrained: download timm's ImageNet weights for the backbone.
        weights: local file of backbone weights instead.
        backbone_options: passed to :func:`attnmap_core.backbones.create_backbone`.

    Raises:
        InputError: if the backbone is unknown or lacks what is asked for.
        ValueError: for another value out of range.

    Example:
        >>> import torch
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> model = ContrastiveCAM("vit", "R+S", img_size=(32, 48), backbone_options=tiny)
        >>> views = model(torch.zeros(2, 3, 32, 48))
        >>> views.attention.shape, {task: tuple(logits.shape) for task, logits in views.logits.items()}
        (torch.Size([2, 4, 6]), {'rotation': (2, 4), 'scale': (2, 3)})
    """

    def __init__(
        self,
        backbone: str = "legacy_seresnet50",
        tasks: str | Sequence[str] = "rotation",
        img_size: int | Sequence[int] = 224,
        *,
        last_stage: LastStage = "stride1",
        feature: Feature = "post_relu",
        gate: Gate = "eca3",
        ratio: float = 0.7,
        pooling: Mode = "pixel",
        rank: Rank = "value",
        heads_read: Literal["F_w", "F"] = "F_w",
        eval_map: EvalMap = "ptap",
        map_offset: Literal["geometric", "receptive_field"] = "geometric",
        threshold: float = 0.2,
        labels: Sequence[str] = ("object",),
        preprocessing: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        choices: dict[str, tuple[object, tuple[str, ...]]] = {
            "gate": (gate, GATES),
            "pooling": (pooling, ("pixel", "channel", "max", "avg")),
            "rank": (rank, ("value", "abs")),
            "heads_read": (heads_read, ("F_w", "F")),
            "eval_map": (eval_map, ("ptap", "caam", "avg_fw")),
            "map_offset": (map_offset, ("geometric", "receptive_field")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if len(labels) != 1:
            raise ValueError(
                f"labels {list(labels)}: expected one, the name of what all photos show; there are no classes"
            )
        # labels, preprocessing and threshold are already taken by PretrainedModel
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.tasks = parse_tasks(tasks)
        self.ratio = ratio
        self.pooling: Mode = pooling
        self.rank: Rank = rank
        self.heads_read, self.eval_map, self.map_offset = heads_read, eval_map, map_offset
        self.interpolation = "bilinear"
        self.backbone = colocalization_backbone(
            backbone,
            size,
            last_stage=last_stage,
            feature=feature,
            pretrained=pretrained,
            weights=weights,
            **(backbone_options or {}),
        )
        channels = self.backbone.num_features
        kept_channels(ratio, channels)  # refuses a ratio out of range now rather than in the first pass
        if rank == "abs" and pooling != "pixel":
            raise ValueError(f"rank='abs' goes with pooling='pixel', got {pooling!r}")
        if map_offset == "receptive_field":
            first_cell(self.backbone)  # likewise
        self.gate = channel_gate(gate, channels)
        self.heads = PretextHeads(channels, {name: TASKS[name] for name in self.tasks})

    def forward(self, images: Tensor) -> Views:
        """Pretext logits and attention maps of ``images (b, 3, H, W)``, normalised."""
        F = self.backbone(images).map
        F_w = self.gate(F)
        return Views(self.heads(F_w if self.heads_read == "F_w" else F), self.pooled(F_w), F, F_w)

    def pooled(self, weighted: Tensor) -> Tensor:
        """The attention map A ``(b, h, w)`` of weighted features ``(b, c, h, w)``."""
        return ptap(weighted, self.ratio, self.pooling, rank=self.rank)

    def attention_map(self, images: Tensor) -> Tensor:
        """The map that inference uses, ``(b, h, w)`` on the backbone's grid; see ``eval_map``."""
        return self.map_of(self.backbone(images).map)

    def map_of(self, features: Tensor) -> Tensor:
        """The same from features ``(b, c, h, w)`` of the backbone."""
        if self.eval_map == "caam":
            return caam(features)
        F_w = self.gate(features)
        return caam(F_w) if self.eval_map == "avg_fw" else self.pooled(F_w)

    def localize(self, images: Tensor) -> Localization:
        """The attention map, and one logit: there is one class, of probability 1; its logit is the map's mean.

        Maps are ``(b, h, w)`` on the backbone's grid, or ``(b, H, W)`` where ``map_offset`` moves the cells.
        """
        A = self.attention_map(images)
        return Localization(A.mean((1, 2)).unsqueeze(1), self.placed(A, (images.shape[2], images.shape[3])))

    def placed(self, A: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps ``(b, h, w)`` where ``map_offset`` puts their cells: as they are, or moved, ``(b, *size)``."""
        if self.map_offset == "geometric":
            return A
        return shifted_upsampling(A, size, receptive_shift(self.backbone))
