"""Fields of a crossattn-dml run: core's training fields plus classes, model, stack, loss, measure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from attnmap_core.data.transforms import Preprocessing
from attnmap_core.errors import InputError
from attnmap_core.training import TrainConfig

from .cross_attention import Hierarchy, Init, Mode, Positions, Similarity
from .losses import PROXY_LOSSES, TRIPLET_LOSSES, LossName, Miner, Supervise
from .model import BatchNorm, Memory, Pool
from .samplers import Sampler
from .zero_shot import ClassSplit, ZeroShotData, load_zero_shot


@dataclass(kw_only=True)
class DmlConfig(TrainConfig):
    """One training. The pipeline is the authors' group's; what the paper leaves open is our choice, see README."""

    # --- Classes ---
    class_split: ClassSplit = "official"
    """``official``: splits of the source, whose classes must differ; ``first``: the first train_share of the classes of
    all photos (the standard of CUB-200-2011 and Cars196); ``random``: a random train_share of them."""
    train_share: float = 0.5
    """Share of the classes that is learnt from, of ``first`` and ``random``."""
    split_seed: int = 0
    """Of ``random``."""
    val_share: float = 0.2
    """Share of the training classes held out to choose an epoch by; only with select_on val."""
    query_split: str = "test"
    """Split that is searched with, of ``official``."""
    gallery_split: str | None = None
    """Split that is searched in; the queries themselves where none."""
    skip_unreadable: bool = False
    """Decode every photo once before the run; list and leave out those that cannot be read."""

    # --- Model ---
    backbone: str = "resnet50.tv_in1k"
    """Any timm encoder, or ``vit`` with ``backbone_options``."""
    backbone_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Of the backbone; for ``vit``: patch_size, embed_dim, depth, num_heads."""
    weights: str | None = None
    """Local file of pretrained backbone weights (.safetensors, or .pth that needs no unpickling)."""
    pretrained: bool = False
    """Download timm's weights for the backbone; off, nothing is ever downloaded."""
    embedding_dim: int = 512
    """Length of the embedding."""
    pool: Pool = "avg"
    """``avg`` of the locations, or ``avg+max``."""
    batch_norm: BatchNorm = "frozen"
    """``frozen``: running statistics in training too; ``fixed``: nor are its scales trained; ``trained``."""
    drop_path_rate: float = 0.0
    """Largest stochastic depth rate; grows linearly over the blocks."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained, such as model.backbone.*"""

    # --- Stack (method) ---
    stack: bool = True
    """Train through the cross-attention stack; off, this is the baseline: the same run without the method."""
    blocks: int = 6
    """N."""
    heads: int = 8
    """Of each block."""
    width: int | None = None
    """Channels inside the stack; those of the embedding where none."""
    memory: Memory = "normed"
    """Tokens that it reads: ``normed`` by the final norm of a ViT, or ``pre_norm``, as they were before it."""
    hierarchy: Hierarchy = "mutual"
    """``mutual``: both images of a pair keep a stream; ``running``: one stream starts at the partner."""
    similarity: Similarity = "mutual"
    """Which embeddings a similarity compares: ``mutual`` both conditional, ``target``, ``anchor``."""
    mode: Mode = "block"
    """``block``; ``no_ffn``; ``ca_only``, the bare attention, which needs init xavier."""
    share_blocks: bool = False
    """One block N times."""
    positions: Positions = "none"
    """``sincos2d_keys`` adds the place of a token to its key."""
    init: Init = "zero_out"
    """``zero_out`` starts where the baseline starts."""
    stack_dropout: float = 0.0
    tile: int | None = None
    """Process pairs in tiles of so many images squared and compute each again in the backward pass: less memory."""
    mined: bool = False
    """Compute only the pairs that multi-similarity's mining keeps."""
    gather: bool = False
    """Form pairs over all processes; off, within each."""

    # --- Loss ---
    loss: LossName = "multi_similarity"
    loss_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Of the loss, such as alpha, beta, threshold, epsilon."""
    unconditional_weight: float = 1.0
    """w_0, of the loss on the embeddings themselves."""
    conditional_weight: float = 1.0
    """λ, of the loss on the levels of the stack."""
    conditional_warmup_epochs: int = 0
    """λ grows linearly from 0 so long."""
    supervise: Supervise = "last"
    """Levels with a loss: the ``last``, ``all``, or all with ``increasing`` weights."""
    miner: Miner = "distance"
    """Of triplet and margin loss."""
    partners: int = 8
    """Of losses with proxies: images that the others are conditioned on, at each step."""

    # --- Batches and rates ---
    sampler: Sampler = "m_per_class"
    """``m_per_class`` draws with replacement; ``balanced`` takes every class equally often and no image twice in a
    batch; ``random`` is a plain permutation."""
    per_class: int = 2
    """Images of a class in a batch."""
    head_lr_scale: float = 1.0
    """Learning rate of the linear layer, as a multiple."""
    stack_lr_scale: float = 10.0
    """Likewise of the stack."""
    class_lr_scale: float = 100.0
    """Likewise of proxies; of the boundaries of the margin loss it is 500."""

    # --- Images ---
    image_size: int = 224
    """Side of the square network input, in pixels."""
    test_resize: int | None = 256
    """Test photos: the shorter side becomes this, then the centre is cropped; none takes the whole photo."""
    augmentation: Literal["crop_flip", "flip"] = "crop_flip"
    """``crop_flip``: random resized crop and flip; ``flip``: the whole photo, flipped at random."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the photo that a random resized crop takes."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean of the network's normalisation."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation, likewise."""

    # --- Measure ---
    ks: tuple[int, ...] = (1, 2, 4, 8)
    """Of Recall@k."""
    nmi_seeds: int = 5
    """k-means runs behind NMI at the end; 0 leaves it out."""
    select_on: Literal["val", "test", "last"] = "last"
    """``val`` holds training classes out and takes the epoch that is best on them; ``test`` does what papers do, and
    flatters; ``last`` takes the last epoch and learns from all training classes."""

    def __post_init__(self) -> None:
        if self.per_class < 2:
            raise InputError(f"per_class {self.per_class}: expected 2 or more; 2 and 4 are usual")
        if self.sampler != "random" and self.batch_size % self.per_class:
            raise InputError(
                f"per_class {self.per_class}: expected a divisor of batch_size {self.batch_size}; change one of them"
            )
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"ks {list(self.ks)}: expected one or more numbers from 1, such as 1 2 4 8")
        if self.test_resize is not None and self.test_resize < self.image_size:
            raise InputError(
                f"test_resize {self.test_resize}: expected at least image_size {self.image_size}, or none; change one"
            )
        if self.nmi_seeds < 0:
            raise InputError(f"nmi_seeds {self.nmi_seeds}: expected 0 or more; 5 is usual")

    def source_options(self) -> dict[str, Any]:
        """What :func:`attnmap_core.data.sources.load_data` takes besides source and split."""
        return {**self.data_options, **({"skip_unreadable": True} if self.skip_unreadable else {})}

    def load(self) -> ZeroShotData:
        """The data, divided by class as configured."""
        return load_zero_shot(
            self.data,
            self.source_options(),
            class_split=self.class_split,
            train_share=self.train_share,
            split_seed=self.split_seed,
            val_share=self.val_share if self.select_on == "val" else 0.0,
            query_split=self.query_split,
            gallery_split=self.gallery_split,
        )

    def preprocessing(self) -> Preprocessing:
        """From a test photo to the network's input."""
        size = (self.image_size, self.image_size)
        if self.test_resize is None:
            return Preprocessing(size=size, mean=self.mean, std=self.std)
        return Preprocessing(size=size, mean=self.mean, std=self.std, resize=self.test_resize, crop="center")

    def stack_options(self) -> dict[str, Any] | None:
        """The fields that :class:`crossattn_dml.CrossAttentionStack` takes; None for the baseline."""
        if not self.stack:
            return None
        names = (
            "blocks",
            "heads",
            "width",
            "hierarchy",
            "similarity",
            "mode",
            "share_blocks",
            "positions",
            "init",
            "tile",
        )
        return {name: getattr(self, name) for name in names} | {"dropout": self.stack_dropout}

    def make_loss_options(self, classes: int) -> dict[str, Any]:
        """What :class:`crossattn_dml.ConditionalEmbeddingLoss` takes, for so many training classes."""
        chosen: dict[str, Any] = {
            "loss": self.loss,
            "weight": self.conditional_weight,
            "unconditional_weight": self.unconditional_weight,
            "supervise": self.supervise,
            **self.loss_options,
        }
        if self.loss in ("margin", *PROXY_LOSSES):
            chosen["num_classes"] = classes
        if self.loss in TRIPLET_LOSSES:
            chosen["miner"] = self.miner
        return chosen

    def with_lr_scales(self) -> DmlConfig:
        """The same run with the rates of head, stack and class parameters among ``lr_scales``, as core reads them."""
        scales = {"model.head.*": self.head_lr_scale}
        if self.stack:
            scales["stack.*"] = self.stack_lr_scale
        if self.loss == "margin":
            scales["loss.boundaries"] = 500.0
        if self.loss in PROXY_LOSSES:
            scales["loss.proxies.*"] = self.class_lr_scale
        wanted = {name: scale for name, scale in scales.items() if scale != 1}
        return dataclasses.replace(self, lr_scales={**wanted, **self.lr_scales})
