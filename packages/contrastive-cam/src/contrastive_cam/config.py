"""Fields of a contrastive-cam run: core's training fields plus model, transformations, loss and scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from attnmap_core.errors import InputError
from attnmap_core.training import TrainConfig

from .attention import Gate
from .backbones import Feature, LastStage
from .inference import Multi, parse_rule
from .loss import Align, Frame, Negatives, Similarity, StopGrad, Undefined
from .model import EvalMap
from .pooling import Mode, Rank
from .task import Kind
from .transforms import Padding, parse_tasks


@dataclass(kw_only=True)
class ContrastiveConfig(TrainConfig):
    """One training without labels. Defaults are the full method on SE-ResNet50 by PsyNet's schedule."""

    train: Literal["network", "head"] = "network"
    """``network`` is the paper's training; ``head`` leaves the network as it is and trains one linear unit on its
    features by contrasting regions."""
    name: str = "object"
    """What the photos show; class labels of the data are ignored."""

    # --- Model ---
    backbone: str = "legacy_seresnet50"
    """Any timm CNN or ViT, or ``vit`` with ``backbone_options`` for a custom one."""
    backbone_options: dict[str, bool | int | float | str | tuple[int, ...]] = field(
        default_factory=dict[str, bool | int | float | str | tuple[int, ...]]
    )
    """Of the backbone; for ``vit``: patch_size, embed_dim, depth, num_heads."""
    weights: str | None = None
    """Local file of pretrained backbone weights (.safetensors, or .pth that needs no unpickling)."""
    pretrained: bool = False
    """Download timm's weights for the backbone; off, nothing is ever downloaded."""
    last_stage: LastStage = "stride1"
    """How the last stage of a CNN is brought to the resolution of the one before."""
    feature: Feature = "post_relu"
    """``pre_relu`` leaves the last ReLU out: then k of PTAP always matters."""
    gate: Gate = "eca3"
    """Weights of the channels before PTAP."""
    ratio: float = 0.7
    """Share of channels that PTAP keeps at each pixel."""
    pooling: Mode = "pixel"
    """PTAP; or channel, max, avg."""
    rank: Rank = "value"
    """Whether PTAP selects by value or by magnitude."""
    heads_read: Literal["F_w", "F"] = "F_w"
    """Features that the pretext heads see."""
    eval_map: EvalMap = "ptap"
    """The map in inference; ``caam`` is PTAP off at test."""
    map_offset: Literal["geometric", "receptive_field"] = "geometric"
    """Where the cells of the map lie in the photo."""
    blocks: tuple[int, ...] = ()
    """Of ``head``: transformer blocks whose keys are read."""
    layers: tuple[str, ...] = ()
    """Of ``head``: layers of a CNN that are read instead, such as blocks.5."""
    freeze: tuple[str, ...] = ()
    """Name patterns of parameters that are not trained, such as backbone.model.blocks.[0-4].*"""
    freeze_norms: bool = False
    """Batch norm keeps its statistics."""

    # --- Pretext tasks ---
    tasks: str = "rotation"
    """Joined by +: rotation (R), scale (S), translation (T), and PsyNet's shear, flip, odd."""
    padding: Padding | None = None
    """Outside of the photo: reflection (the default), zeros, border."""
    compat: Literal["psynet"] | None = None
    """``psynet`` samples as the released code, and takes its letters for the tasks."""

    # --- Loss ---
    contrastive_weight: float = 1.0
    """λ; 0 trains PsyNet."""
    pretext_weight: float = 1.0
    """Weight of the pretext tasks; 0 trains by the contrastive term alone."""
    contrastive_warmup_epochs: int = 0
    """λ grows linearly so long."""
    kind: Kind = "maps"
    """What is contrasted: attention maps, or features of foreground and background (fgbg)."""
    tau: float = 0.1
    """Temperature."""
    align: Align = "forward"
    undefined: Undefined = "zero"
    similarity: Similarity = "cosine"
    negatives: Negatives = "batch"
    """Maps of other photos; ``none`` asks for equal maps only."""
    negatives_frame: Frame = "own"
    stop_grad: StopGrad = "none"
    equivariance: float = 1.0
    """Of ``head``: weight of maps turning with their photos."""

    # --- Images ---
    image_size: int = 224
    """Side of the square network input, in pixels."""
    resize: int = 256
    """Training photos are resized to exactly this square, then cropped at random to ``image_size``."""
    crop_padding: int = 4
    """Pixels that are mirrored at each side before the crop."""
    mean: tuple[float, float, float] | None = None
    """Per-channel mean; that of the backbone's pretraining where not given."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation, likewise."""
    skip_unreadable: bool = False
    """Decode every photo once before the run; list and leave out those that cannot be read."""
    clip_boxes: bool = False
    """Cut boxes that leave their photo, instead of stopping at the first."""
    whole: bool = False
    """Train on all photos and score the same ones: no label is used, and these are the photos to be labelled."""

    # --- Evaluation ---
    threshold: str = "0.2"
    """Where heat maps are cut: a share, or mean, otsu; of ``head`` also zero, its own boundary."""
    rules: tuple[str, ...] = ("mean", "otsu")
    """Further cuts to report."""
    psynet: bool = False
    """Also the evaluation of the released PsyNet code."""
    multi: Multi = "first"
    """Which of several annotated objects counts."""
    select_on: Literal["val", "test", "last"] = "last"
    """Split with boxes on which the best epoch is chosen. ``test`` does what the released PsyNet code does."""

    def __post_init__(self) -> None:

        if not 0 < self.ratio <= 1:
            raise InputError(
                f"ratio {self.ratio}: expected a share of channels above 0, up to 1; the paper has 0.7"
            )
        if self.image_size > self.resize:
            raise InputError(
                f"resize {self.resize}: expected at least image_size {self.image_size}; raise --resize"
            )
        if not 0 <= self.crop_padding < self.resize:
            raise InputError(f"crop_padding {self.crop_padding}: expected 0 to below resize {self.resize}")
        for text in (self.threshold, *self.rules):
            parse_rule(text)
        try:
            parse_tasks(self.tasks, "psynet" if self.compat else "iccv")
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.contrastive_weight < 0 or self.pretext_weight < 0 or self.equivariance < 0:
            raise InputError(
                f"weights {self.contrastive_weight}, {self.pretext_weight}, {self.equivariance} of the losses: "
                "expected 0 or more"
            )
        if self.whole and self.select_on != "last":
            raise InputError(f"whole: leaves no split to choose on; use select_on last, not {self.select_on}")
        if self.train == "head" and self.select_on != "last":
            raise InputError(
                f"select_on {self.select_on}: which side of the unit is the object is told at the end; use last"
            )
        if not self.tau > 0:
            raise InputError(f"tau {self.tau}: expected a temperature above 0, such as 0.1")
        if self.train == "network" and self.threshold == "zero":
            raise InputError("threshold zero: of train head only; give a share, mean or otsu")

    def source_options(self) -> dict[str, Any]:
        """What :func:`attnmap_core.data.sources.load_data` takes besides source and split."""
        flags = {"skip_unreadable": self.skip_unreadable, "clip_boxes": self.clip_boxes}
        return {**self.data_options, **{name: True for name, given in flags.items() if given}}

    def loss_options(self) -> dict[str, Any]:
        """The fields that :func:`contrastive_cam.contrastive_map_loss` takes."""
        names = ("tau", "align", "undefined", "similarity", "negatives", "negatives_frame", "stop_grad")
        return {name: getattr(self, name) for name in (names if self.kind == "maps" else names[:1])}
