"""Fields of an scm-wsol run: core's training fields plus the model, the data transforms and the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from attnmap_core.errors import InputError
from attnmap_core.training import TrainConfig

Method = Literal["cam", "tscam", "scm"]


@dataclass(kw_only=True)
class ScmConfig(TrainConfig):
    """One run of SCM, TS-CAM or CAM. Defaults are those of the method; recipes change them."""

    method: Method = "scm"
    """``scm`` trains through the spatial calibration module; ``tscam`` and ``cam`` share one training."""
    backbone: str = "deit_small_patch16_224"
    """Any timm ViT, or ``vit`` with ``backbone_options`` for a custom one."""
    backbone_options: dict[str, int] = field(default_factory=dict[str, int])
    """For ``vit``: patch_size, embed_dim, depth, num_heads."""
    weights: str | None = None
    """Local file of pretrained backbone weights (.safetensors, or .pth that needs no unpickling)."""
    pretrained: bool = False
    """Download timm's weights for the backbone; off, nothing is ever downloaded."""
    reset_head_bias: bool = False
    """Do not take the pretrained head's bias even where its shape fits (it does for 1000 classes)."""
    drop_path_rate: float = 0.1
    """Largest stochastic depth rate; grows linearly over the blocks."""
    head_kernel: int = 3
    """Kernel of the convolution head; 1 makes it the linear head of plain CAM."""

    image_size: int = 224
    """Side of the square network input, in pixels."""
    resize: int = 256
    """Training photos are resized to exactly this square, then cropped at random to ``image_size``."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean of the backbone's pretraining; 0.5 each for AugReg weights."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation, likewise."""

    skip_unreadable: bool = False
    """Decode every photo once before the run; list and leave out those that cannot be read."""
    clip_boxes: bool = False
    """Cut boxes that leave their photo, instead of stopping at the first."""

    iterations: tuple[int, ...] = (4,)
    """Newton-Schulz iterations p of each block; one number stands for all blocks."""
    calibration_blocks: int = 4
    """Activation diffusion blocks L."""
    sign: Literal["release", "supplement"] = "release"
    """Sign of the modulated Laplacian; see the README."""
    laplacian: Literal["hadamard", "rowsum"] = "hadamard"
    """Diagonal of the modulated Laplacian."""
    filter: Literal["tanhshrink", "softshrink", "none"] = "tanhshrink"
    """Dynamic filter."""
    residual: bool = True
    """S' = S(1+T), F' = F+T; off: S' = S T, F' = T."""
    alpha: float | Literal["auto"] = 0.002
    """Newton-Schulz start scale."""
    detach_ns_init: bool = True
    """Take the start value as a constant for gradients, as the released code does."""
    stable_shrink: bool = False
    """Series for u - tanh(u) at small u: exact where float32 cancels."""
    backend: Literal["stencil", "dense"] = "stencil"
    """Calibration without matrices, or by n x n matrices as the equations are written: the same numbers."""
    mean_one_weights: bool = False
    """Control: divide the pooling weights by their mean, so that calibration cannot scale the logits."""
    logit_scale: float = 1.0
    """Control: multiply the training logits of any method."""

    lr_steps: tuple[int, ...] = ()
    """Epochs, counted from 1: the learning rate falls tenfold at each that one of these divides (as released).
    Empty: ``schedule`` decides."""

    select_on: Literal["val", "test", "last"] = "val"
    """Split whose GT-known chooses the best checkpoint. ``test`` reproduces the released code's habit."""
    protocols: tuple[str, ...] = ("standard",)
    """Metric protocols of the final evaluation: standard, scm, tscam."""
    threshold_step: float = 0.01
    """Thresholds of box metrics are arange(0, 1, step)."""
    fixed_threshold: float = 0.1
    """Box threshold of the model folder and of protocol ``tscam``, unless validation finds one."""

    def __post_init__(self) -> None:
        if self.image_size > self.resize:
            raise InputError(
                f"resize {self.resize}: expected at least image_size {self.image_size}; raise --resize"
            )
        if not 0 < self.threshold_step < 1:
            raise InputError(
                f"threshold_step {self.threshold_step}: expected a number between 0 and 1, such as 0.01"
            )
        if len(self.iterations) not in (1, self.calibration_blocks):
            raise InputError(
                f"iterations {list(self.iterations)}: expected 1 number, or one for each of {self.calibration_blocks} "
                "calibration_blocks"
            )

    def source_options(self) -> dict[str, Any]:
        """What :func:`attnmap_core.data.sources.load_data` takes besides source and split."""
        flags = {"skip_unreadable": self.skip_unreadable, "clip_boxes": self.clip_boxes}
        return {**self.data_options, **{name: True for name, given in flags.items() if given}}

    def calibration_options(self) -> dict[str, Any]:
        """The fields that :class:`scm_wsol.SpatialCalibration` takes."""
        names = (
            "sign",
            "laplacian",
            "filter",
            "residual",
            "alpha",
            "detach_ns_init",
            "stable_shrink",
            "backend",
            "mean_one_weights",
        )
        iterations = self.iterations[0] if len(self.iterations) == 1 else list(self.iterations)
        return {"blocks": self.calibration_blocks, "iterations": iterations} | {
            n: getattr(self, n) for n in names
        }
