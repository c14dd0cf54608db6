r"""Dense relative localisation: guess from two patches of the final grid how far apart they are.

Liu et al., "Efficient Training of Visual Transformers with Small Datasets", NeurIPS 2021 (DRLoc), as the released code
runs it: the peer that Table 13 of the SAR paper compares with, and a regulariser of its own. Of each image ``s`` pairs
of patches are drawn; a small MLP on both patches' features predicts the distances of their rows and of their columns:

.. math:: L_{drloc} = \frac{1}{2 b s} \sum_{image} \sum_{(a, b)} \lVert \mathrm{MLP}([F_a; F_b]) - t_{ab} \rVert_1,
    \qquad t_{ab} = |pos_a - pos_b|

Own code under the licence of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .model import SARViT
from .task import SupervisedTask

Target = Literal["absolute", "normalised", "signed"]


def sample_pairs(
    batch: int, pairs: int, grid: tuple[int, int], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Draw pairs of grid positions, uniformly and with replacement, from torch's global generator.

    Args:
        batch: images ``b``.
        pairs: of each image, ``s``.
        grid: ``(h, w)``.
        device: of the result, whose generator is used.

    Returns:
        Two of ``(b, s, 2)`` int64: row in ``0..h-1``, column in ``0..w-1``.

    Example:
        >>> a, b = sample_pairs(3, 16, (2, 5))
        >>> a.shape, a[..., 0].max() < 2, b[..., 1].max() < 5
        (torch.Size([3, 16, 2]), tensor(True), tensor(True))
    """
    drawn = [torch.randint(side, (2, batch, pairs), device=device) for side in grid]
    first, second = torch.stack(drawn, dim=-1)
    return first, second


def pair_features(features: Tensor, pos_a: Tensor, pos_b: Tensor) -> Tensor:
    """Features of both patches of each pair, one behind the other.

    Args:
        features: ``(b, c, h, w)`` final patch grid; it need not be square.
        pos_a: ``(b, s, 2)`` row and column of the first patches.
        pos_b: likewise of the second.

    Returns:
        ``(b, s, 2 c)``.

    Example:
        >>> features = torch.arange(6.0).view(1, 1, 2, 3)
        >>> pair_features(features, torch.tensor([[[1, 0]]]), torch.tensor([[[0, 2]]]))
        tensor([[[3., 2.]]])
    """
    width = features.shape[3]
    tokens = rearrange(features, "b c h w -> b (h w) c")

    def at(pos: Tensor) -> Tensor:
        index = pos[..., 0] * width + pos[..., 1]
        return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))

    return torch.cat([at(pos_a), at(pos_b)], dim=2)


def pair_offsets(pos_a: Tensor, pos_b: Tensor, grid: tuple[int, int], target: Target = "absolute") -> Tensor:
    r"""What is to be predicted of each pair.

    Args:
        pos_a: ``(b, s, 2)`` row and column.
        pos_b: likewise.
        grid: ``(h, w)`` that the positions are on.
        target: ``"absolute"``, as released: :math:`|\Delta|` in patches. ``"normalised"`` divides by ``h - 1`` and
            ``w - 1``. ``"signed"`` is :math:`(\Delta + h - 1) / (2 (h - 1))` of rows, likewise of columns.

    Returns:
        ``(b, s, 2)`` float32 of rows and columns: ``0..h-1`` and ``0..w-1``, or in ``[0, 1]``.

    Raises:
        ValueError: for another ``target``.

    Example:
        >>> a, b = torch.tensor([[[6, 1]]]), torch.tensor([[[3, 4]]])
        >>> [pair_offsets(a, b, (7, 7), target)[0, 0].tolist() for target in ("absolute", "normalised", "signed")]
        [[3.0, 3.0], [0.5, 0.5], [0.75, 0.25]]
    """
    if target not in get_args(Target):
        raise ValueError(f"target must be absolute, normalised or signed, got {target!r}")
    delta = (pos_a - pos_b).float()
    if target == "absolute":
        return delta.abs()
    # A single row has no distances: 0 whatever it is divided by.
    span = torch.tensor([max(side - 1, 1) for side in grid], dtype=delta.dtype, device=delta.device)
    return delta.abs() / span if target == "normalised" else (delta + span) / (2 * span)


def drloc_loss(prediction: Tensor, offsets: Tensor) -> Tensor:
    """Mean absolute error over images, pairs and both coordinates, in float32 or wider.

    Args:
        prediction: ``(b, s, 2)``.
        offsets: ``(b, s, 2)`` of :func:`pair_offsets`.

    Returns:
        A scalar, 0 or more.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> drloc_loss(torch.zeros(1, 2, 2), torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]))
        tensor(1.)
    """
    if prediction.shape != offsets.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and offsets {tuple(offsets.shape)} differ")
    return functional.l1_loss(prediction.to(torch.promote_types(prediction.dtype, torch.float32)), offsets)


def drloc_weight(epoch: int, epochs: int, weight: float, warmup_epochs: int = 20) -> float:
    """Weight of the loss in an epoch: linearly up from 0, then linearly down to 0 in the last one.

    Args:
        epoch: counted from 0.
        epochs: of the whole training.
        weight: the largest, reached in epoch ``warmup_epochs``; a shorter training does not reach it.
        warmup_epochs: 20 in the released code.

    Returns:
        In ``[0, weight]``.

    Raises:
        ValueError: for an epoch that is not of the training, or a negative setting.

    Example:
        >>> [round(drloc_weight(epoch, 300, 0.1), 4) for epoch in (0, 10, 20, 160, 299)]
        [0.0, 0.05, 0.1, 0.0498, 0.0]
    """
    if not weight >= 0 or warmup_epochs < 0 or not 0 <= epoch < epochs:
        raise ValueError(
            f"expected weight and warmup_epochs of 0 or more and 0 <= epoch < epochs, got {weight=}, "
            f"{warmup_epochs=}, {epoch=}, {epochs=}"
        )
    if epoch <= warmup_epochs:
        return weight * epoch / warmup_epochs if warmup_epochs else weight
    return weight * (epochs - 1 - epoch) / (epochs - 1 - warmup_epochs)


class DRLocHead(nn.Module):
    """Draw pairs of patches, and predict their offsets by an MLP of three layers.

    Args:
        channels: ``c`` of the final patch grid.
        pairs: of each image, ``s``.
        target: see :func:`pair_offsets`.
        pool: first average the grid over windows of 3x3 at stride 2, borders over what is there: the release does
            so with the 14x14 grids of T2T-ViT and CvT, which become 7x7, and not with ViT's.
        hidden: units of both hidden layers.

    Raises:
        ValueError: for no pairs, or another ``target``.

    Example:
        >>> prediction, offsets = DRLocHead(8, pairs=5)(torch.randn(2, 8, 4, 6))
        >>> prediction.shape, offsets.shape
        (torch.Size([2, 5, 2]), torch.Size([2, 5, 2]))
    """

    def __init__(
        self,
        channels: int,
        *,
        pairs: int = 64,
        target: Target = "absolute",
        pool: bool = False,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        if pairs < 1:
            raise ValueError(f"pairs must be 1 or more, got {pairs}")
        if target not in get_args(Target):
            raise ValueError(f"target must be absolute, normalised or signed, got {target!r}")
        self.pairs, self.pool = pairs, pool
        self.target: Target = target
        self.layers = nn.Sequential(
            nn.Linear(2 * channels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true offsets ``(b, s, 2)`` of pairs on ``features (b, c, h, w)``."""
        if self.pool:
            features = functional.avg_pool2d(features, 3, stride=2, padding=1, count_include_pad=False)
        grid = (features.shape[2], features.shape[3])
        pos_a, pos_b = sample_pairs(len(features), self.pairs, grid, features.device)
        prediction = self.layers(pair_features(features, pos_a, pos_b))
        return prediction, pair_offsets(pos_a, pos_b, grid, self.target)


class DRLocOutput(NamedTuple):
    """What one forward pass of :class:`DRLocViT` gives.

    Attributes:
        logits: ``(b, num_classes)``.
        prediction: ``(b, s, 2)`` offsets as the head sees them.
        offsets: ``(b, s, 2)`` as they are.
    """

    logits: Tensor
    prediction: Tensor
    offsets: Tensor


class DRLocViT(nn.Module):
    """A classifier with a relative localisation head, for the time of a training.

    Args:
        classifier: trained in place; it is what is evaluated and saved.
        pairs: of each image.
        target: see :func:`pair_offsets`.
        pool: see :class:`DRLocHead`; by default as released, on for T2T-ViT and CvT.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> model = DRLocViT(SARViT("vit", 4, (32, 48), backbone_options=tiny), pairs=5)
        >>> [tuple(part.shape) for part in model(torch.randn(2, 3, 32, 48))]
        [(2, 4), (2, 5, 2), (2, 5, 2)]
    """

    def __init__(
        self, classifier: SARViT, *, pairs: int = 64, target: Target = "absolute", pool: bool | None = None
    ) -> None:
        super().__init__()
        if pool is None:
            pool = classifier.arch.startswith(("t2t_", "cvt_"))
        self.classifier = classifier
        self.drloc = DRLocHead(classifier.backbone.num_features, pairs=pairs, target=target, pool=pool)

    def forward(self, images: Tensor) -> DRLocOutput:
        """Logits, and offsets of patches on the final grid, of ``images (b, 3, H, W)``."""
        features = self.classifier.backbone(images)
        return DRLocOutput(self.classifier.classify(features), *self.drloc(features.map))


class DRLocTask:
    """A supervised task with relative localisation besides; its weight follows the epochs.

    Args:
        supervised: the rest of the loss.
        weight: the largest; see :func:`drloc_weight`. The release has 0.1 for T2T-ViT and CvT, 0.5 for Swin.
        epochs: of the whole training.
        warmup_epochs: until the weight is largest.

    Raises:
        ValueError: for a negative setting.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> model = DRLocViT(SARViT("vit", num_classes=4, img_size=32, backbone_options=tiny))
        >>> task = DRLocTask(SupervisedTask(), epochs=40)
        >>> task.begin_epoch(10)
        >>> parts = task(model, {"images": torch.randn(2, 3, 32, 32), "labels": torch.tensor([3, 0])})
        >>> bool(parts["drloc"] > 0), round(parts["drloc_weight"].item(), 3)
        (True, 0.05)
    """

    def __init__(
        self, supervised: SupervisedTask, weight: float = 0.1, *, epochs: int = 1, warmup_epochs: int = 20
    ) -> None:
        self.supervised = supervised
        self.weight, self.epochs, self.warmup_epochs = weight, epochs, warmup_epochs
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Take the weights of this epoch, counted from 0."""
        self.supervised.begin_epoch(epoch)
        self.current_weight = drloc_weight(epoch, self.epochs, self.weight, self.warmup_epochs)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the model on a batch.

        Args:
            model: a :class:`DRLocViT`, bare or wrapped for distributed training or compilation.
            batch: as :class:`~sar_vit.task.SupervisedTask` takes it.

        Returns:
            What the supervised task gives, with ``drloc`` and ``drloc_weight``, all scalars.
        """
        run = _LogitsOf(model)
        parts = self.supervised(run, batch)
        # Also at weight 0: in distributed training each weight of the head must have a gradient.
        loss = drloc_loss(run.output.prediction, run.output.offsets)
        return {
            **parts,
            "loss": parts["loss"] + self.current_weight * loss,
            "drloc": loss.detach(),
            "drloc_weight": torch.full_like(loss.detach(), self.current_weight),
        }


class _LogitsOf(nn.Module):
    """The model of one step as the supervised task takes it, giving logits; the rest of the output stays here."""

    output: DRLocOutput

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        self.output = self.model(images)  # through the wrapper, so that its hooks gather gradients
        return self.output.logits


def with_drloc(model: SARViT, task: SupervisedTask, config: Any) -> tuple[DRLocViT, DRLocTask]:
    """Model and task of a run with relative localisation, as the ``drloc_*`` fields of ``config`` say.

    Args:
        model: the classifier, afterwards ``.classifier`` of the wrapper: the one to evaluate and save.
        task: the supervised one.
        config: a :class:`sar_vit.config.SarConfig`.
    """
    wrapped = DRLocViT(model, pairs=config.drloc_pairs, target=config.drloc_target)
    return wrapped, DRLocTask(
        task, config.drloc_weight, epochs=config.epochs, warmup_epochs=config.drloc_warmup_epochs
    )
