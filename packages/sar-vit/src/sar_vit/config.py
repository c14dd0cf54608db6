"""Fields of a sar-vit run: core's training fields plus scenario, model, loss, augmentation and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from attnmap_core.errors import InputError
from attnmap_core.training import TrainConfig

from .entropy import Query, Schedule, Similarity

Scenario = Literal["supervised", "mocov3", "dino", "probe", "segmentation"]


@dataclass(kw_only=True)
class SarConfig(TrainConfig):
    """One training. Defaults are SAR on DeiT-S with DeiT's protocol; recipes change them."""

    scenario: Scenario = "supervised"
    """``supervised`` trains or fine-tunes a classifier; ``mocov3`` and ``dino`` train without labels; ``probe`` a
    linear layer on frozen features; ``segmentation`` a Semantic FPN on PVT."""

    # --- Model ---
    backbone: str = "deit_small_patch16_224"
    """Any timm ViT; t2t_vit_14, pvt_small, cvt_13 of this package; or ``vit`` with ``backbone_options``."""
    backbone_options: dict[str, bool | int | float | str | tuple[int, ...]] = field(
        default_factory=dict[str, bool | int | float | str | tuple[int, ...]]
    )
    """Of the backbone; for ``vit``: patch_size, embed_dim, depth, num_heads."""
    msa_skip: bool = False
    """Skip connection around the last attention; SAR has none."""
    mlp_norm: bool = False
    """Norm before the last MLP; SAR has none."""
    mlp_skip: bool = True
    """Skip connection around the last MLP."""
    query: Query = "cls"
    """Whose similarity to the patches counts: the class token's, or ``avg`` for networks without one."""
    drop_path_rate: float = 0.1
    """Largest stochastic depth rate; grows linearly over the blocks."""
    pretrained: bool = False
    """Download timm's weights for the backbone; off, nothing is ever downloaded."""
    weights: str | None = None
    """Local file of pretrained weights (.safetensors, or .pth that needs no unpickling)."""
    start: str | None = None
    """Model or run folder, or Hub id, to start from: fine-tuning and probing. Its backbone and its form of the last
    block are kept, so that the fields above do not count; only the loss is switched."""
    new_surgery: bool = False
    """Let pretrained weights be of another form of the last block."""

    # --- Loss ---
    entropy_weight: float = 0.01
    """λ of the spatial entropy loss; 0 leaves it out of the loss and still reports it."""
    entropy_schedule: Schedule = "constant"
    """``warmup_cosine`` is what the released trainer does: 0 to λ over entropy_warmup_epochs, then a cosine to 0."""
    entropy_warmup_epochs: int = 10
    similarity: Similarity = "dot"
    """Of queries and keys: ``dot`` (Eq. 4), ``cosine`` (Eq. 15), ``softmax`` (collapses; a diagnostic)."""
    regulariser: Literal["entropy", "tv", "tv2"] = "entropy"
    """``tv`` is total variation instead of spatial entropy (Eq. 14), ``tv2`` its form in the released code."""
    nonfinite: Literal["mask", "skip_batch", "raise"] = "mask"
    """What similarity maps with NaN or infinity in them do; see sar_vit.spatial_entropy."""
    drloc_weight: float = 0.0
    """Weight of the relative localisation loss (DRLoc), the peer of Table 13; 0.1 there."""
    drloc_pairs: int = 64
    """Pairs of patches an image."""
    drloc_target: Literal["absolute", "normalised", "signed"] = "absolute"
    """Row and column distances as they are (released), over k - 1, or with their sign in [0, 1]."""
    drloc_warmup_epochs: int = 20
    """Its weight grows linearly from 0 so long, then falls linearly to 0."""

    # --- Images ---
    imagenet100: bool = False
    """Only the 100 classes of ImageNet-100, out of ImageNet's."""
    image_size: int = 224
    """Side of the square network input, in pixels."""
    test_crop: float = 0.875
    """Test photos: the shorter side is resized to image_size / test_crop, the centre is cropped; 1 takes no crop."""
    augmentation: Literal["deit", "crop_flip", "flip"] = "deit"
    """``deit``: random resized crop, flip, RandAugment, erasing; ``crop_flip`` the first two; ``flip`` a resize and a
    flip."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the photo that a random resized crop takes."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment; none for none."""
    color_jitter: float = 0.4
    """Without RandAugment only, as in timm."""
    erasing: float = 0.25
    """Probability of random erasing."""
    crop_interpolation: Literal["bicubic", "random"] = "bicubic"
    """``random`` chooses bilinear or bicubic for each photo."""
    mixup: float = 0.8
    """Mixup's alpha; 0 for none."""
    cutmix: float = 1.0
    """CutMix's alpha; 0 for none."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    label_smoothing: float = 0.1
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean of the network's normalisation."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation, likewise."""
    skip_unreadable: bool = False
    """Decode every photo once before the run; list and leave out those that cannot be read."""

    # --- Schedule ---
    legacy_lag: bool = False
    """Step the learning rate at the end of an epoch, as DeiT's code of 2021: its first two epochs are alike."""

    # --- Self-supervised (mocov3, dino) ---
    momentum_start: float = 0.99
    """Of the momentum encoder or teacher; a cosine takes it to 1. DINO: 0.996."""
    temperature: float = 0.2
    """Of the logits of MoCo-v3, or DINO's student (0.1)."""
    projection_dim: int = 256
    """Outputs of MoCo-v3's heads, or of the bottleneck of DINO's."""
    hidden_dim: int = 4096
    """Hidden units of the heads; DINO: 2048."""
    prototypes: int = 65536
    """Outputs of DINO's head."""
    teacher_temperature: float = 0.04
    teacher_warmup_temperature: float = 0.04
    """Where the teacher's temperature starts."""
    teacher_warmup_epochs: int = 0
    center_momentum: float = 0.9
    freeze_last_layer_epochs: int = 1
    """DINO's last layer does not move so long."""
    local_crops: int = 10
    """DINO's small crops a photo."""
    local_size: int = 96
    """Their side in pixels."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the photo in DINO's two large crops."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the photo in the small ones."""
    entropy_views: Literal["global", "all"] = "global"
    """Views of DINO whose entropy counts; ``all`` weighs every crop alike, each on its own grid."""
    final_weight_decay: float | None = None
    """A cosine takes the weight decay there; DINO: 0.4."""
    sync_batchnorm: bool = True
    """Statistics of MoCo-v3's heads, and of the head for segmentation, over all processes (on GPUs)."""
    clip_each: float | None = None
    """Largest norm of the gradient of each weight by itself, as the released DINO clips it (3); clip_grad is that of
    all weights together."""
    save_branch: Literal["default", "student", "teacher"] = "default"
    """Encoder that is evaluated and saved: ``student`` learns by gradient, ``teacher`` follows it (MoCo-v3: base and
    momentum encoder). ``default`` is the student of MoCo-v3 and the teacher of DINO."""

    # --- Linear probe ---
    probe_blocks: int = 1
    """Class tokens of so many last blocks are the features; DINO: 4."""

    # --- Segmentation (image_size is the side of training crops and the shorter side of photos in tests) ---
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Training photos are resized to a shorter side of image_size times a random number from this range."""
    class_share: float = 0.75
    """A crop in which one class has this share or more is drawn again; 1 takes any."""
    photometric: bool = True
    """Random brightness, contrast, saturation and hue."""
    neck_channels: int = 256
    """Channels of the feature pyramid."""
    head_channels: int = 128
    """Channels of the convolutions after it."""
    head_dropout: float = 0.1
    """Before the classifier of pixels."""

    # --- Evaluation ---
    select_on: Literal["val", "test", "last"] = "val"
    """Split on which the best epoch is chosen. ``test`` does what the papers do: they print the best epoch on the
    split they report. ``last`` takes the last epoch."""
    jaccard_mass: float = 0.6
    """Share of an attention map's mass that makes its mask, for the Jaccard index of images with masks."""

    def __post_init__(self) -> None:
        if not self.entropy_weight >= 0 or not self.drloc_weight >= 0:
            raise InputError(
                f"entropy_weight {self.entropy_weight}, drloc_weight {self.drloc_weight}: expected 0 or more"
            )
        if not 0 < self.test_crop <= 1:
            raise InputError(
                f"test_crop {self.test_crop}: expected a number above 0, up to 1; 0.875 is usual"
            )
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing {self.label_smoothing}: expected 0 to below 1, such as 0.1")
        if self.start is not None and (self.weights is not None or self.pretrained):
            raise InputError(f"start {self.start}: excludes weights and pretrained; give one of them")

    def source_options(self) -> dict[str, Any]:
        """What :func:`attnmap_core.data.sources.load_data` takes besides source and split."""
        chosen: dict[str, Any] = {"skip_unreadable": True} if self.skip_unreadable else {}
        if self.imagenet100:
            from .imagenet100 import IMAGENET_100

            chosen["classes"] = IMAGENET_100
        return {**self.data_options, **chosen}

    def switches(self) -> dict[str, bool]:
        """The form of the last block, as :func:`sar_vit.apply_sar` takes it."""
        return {"msa_skip": self.msa_skip, "mlp_norm": self.mlp_norm, "mlp_skip": self.mlp_skip}
