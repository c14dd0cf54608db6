"""What MoCo-v3 and DINO share: encoder, spatial entropy beside their loss, schedules, and k-NN to watch them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from attnmap_core.data.loaders import eval_loader, gather_samples, samples_of
from attnmap_core.data.sources import ImageData
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.training import Schedule, timm_schedule
from numpy.typing import NDArray
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from ..augmentation import preprocessing
from ..config import SarConfig
from ..entropy import SpatialEntropyLoss, entropy_weight
from ..model import SARViT
from .supervised import measure as measure_attention

# --- The encoder ----------------------------------------------------------------------------------------------------


def make_encoder(config: SarConfig, data: ImageData, **backbone_options: Any) -> SARViT:
    """The vision transformer that a config describes, without head, with weights drawn from ``config.seed``.

    Args:
        config: of the run.
        data: the training split.
        **backbone_options: added to those of the config.

    Raises:
        InputError: for settings that training without labels has no use for, or under which it would not be what it
            says.
    """
    _check(config, data)
    torch.manual_seed(config.seed)
    options: dict[str, Any] = {
        "query": config.query,
        "drop_path_rate": config.drop_path_rate,
        "preprocessing": preprocessing(config).to_dict(),
        "backbone_options": dict(config.backbone_options) | backbone_options,
        **config.switches(),
    }
    try:
        return SARViT(config.backbone, 0, config.image_size, **options)
    except InputError as error:
        if not any(f"no option {name!r}" in str(error) for name in backbone_options):
            raise
        raise InputError(
            f"backbone {config.backbone}: cannot be made with {', '.join(backbone_options)}, as scenario "
            f"{config.scenario} needs it; choose a plain ViT"
        ) from error


def _check(config: SarConfig, data: ImageData) -> None:
    def expect(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name} {getattr(config, name)}: with scenario {config.scenario} {expected}")

    for name in ("start", "weights", "pretrained"):
        expect(name, not getattr(config, name), "weights are drawn at random; leave it out")
    for name in ("lr_scales", "layer_decay", "no_decay"):
        expect(name, not getattr(config, name), "all weights have one learning rate and decay; leave it out")
    expect("drloc_weight", config.drloc_weight == 0, "there is no relative localisation; give 0")
    expect("drop_last", config.drop_last, "all steps need batches of one size; give true")
    if data.streaming:
        raise InputError(f"{data.name}: a stream, whose last step is not full; load it without streaming")
    for name in ("temperature", "teacher_temperature", "teacher_warmup_temperature"):
        expect(name, getattr(config, name) > 0, "expected a number above 0")
    for name in ("momentum_start", "center_momentum"):
        expect(name, 0 <= getattr(config, name) <= 1, "expected a number from 0 to 1")
    for name in ("projection_dim", "hidden_dim", "prototypes"):
        expect(name, getattr(config, name) >= 1, "expected 1 or more")
    clip = config.clip_each
    expect("clip_each", clip is None or clip > 0, "expected a number above 0 or none")
    if clip is not None and config.mixed_precision == "fp16":
        raise InputError(f"clip_each {clip}: gradients are scaled in fp16; give mixed_precision bf16 or no")


def momentum_at(progress: float, start: float) -> float:
    """Momentum of the branch that follows: from ``start`` to 1 along half a cosine.

    Args:
        progress: share of the training that is done, in ``[0, 1]``.
        start: its first value.

    Example:
        >>> [round(momentum_at(progress, 0.99), 4) for progress in (0, 0.5, 1)]
        [0.99, 0.995, 1.0]
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def follow(followers: Iterable[nn.Module], leaders: Iterable[nn.Module], momentum: float) -> None:
    """Move the parameters of the followers to ``momentum`` times themselves plus the rest times the leaders'.

    Parameters that are equal stay so, bit for bit. Buffers stay as they are.

    Example:
        >>> slow, fast = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = nn.init.ones_(slow.weight), nn.init.zeros_(fast.weight)
        >>> follow([slow], [fast], momentum=0.75)
        >>> slow.weight.item()
        0.75
    """
    for follower, leader in zip(followers, leaders, strict=True):
        for slow, fast in zip(follower.parameters(), leader.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)


# --- Several processes ----------------------------------------------------------------------------------------------


def processes() -> tuple[int, int]:
    """Number of processes of this launch, and which this is."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, as many of each, in process order; without gradient."""
    count, _ = processes()
    if count == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count)]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


# --- Loss and optimizer ---------------------------------------------------------------------------------------------


class PretrainingTask:
    """Spatial entropy beside a loss without labels; :meth:`parts` puts them together.

    .. math:: L_{tot} = L_{main} + \\lambda L_{se}

    Args:
        config: of the run.

    Attributes:
        epoch: counted from 0; the training loop calls :meth:`begin_epoch`.
    """

    def __init__(self, config: SarConfig) -> None:
        self.config = config
        self.entropy = SpatialEntropyLoss(
            nonfinite=config.nonfinite, similarity=config.similarity, kind=config.regulariser
        )
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Take λ of this epoch, counted from 0."""
        config, self.epoch = self.config, epoch
        self.weight = entropy_weight(
            epoch,
            config.epochs,
            config.entropy_weight,
            config.entropy_schedule,
            warmup_epochs=config.entropy_warmup_epochs,
        )

    def parts(self, name: str, main: Tensor, source: Tensor | nn.Module) -> dict[str, Tensor]:
        """Loss and what to report.

        Args:
            name: of the main loss.
            main: its value, a scalar with gradient.
            source: similarity maps that count, or the model whose collected forward passes all count.

        Returns:
            Scalars: ``loss`` with gradient; the rest as of :class:`sar_vit.task.SupervisedTask`.
        """
        found = self.entropy.measure(source)
        return {
            "loss": main + self.weight * found.loss if self.weight else main,
            name: main.detach(),
            "spatial_entropy": found.loss.detach(),
            "entropy_weight": torch.full_like(main.detach(), self.weight),
            "components": found.components,
            "foreground": found.foreground,
            "excluded": found.excluded.float(),
        }

    def before_update(self, model: nn.Module) -> None:
        """Clip the gradient of each weight by itself where the config asks for it."""
        if self.config.clip_each is not None:
            for parameter in model.parameters():
                nn.utils.clip_grad_norm_(parameter, self.config.clip_each)


def make_schedule(
    optimizer: torch.optim.Optimizer, config: SarConfig, steps_per_epoch: int | None
) -> Schedule:
    """:class:`CosineSchedule` where the config asks for a cosine of steps, timm's schedules otherwise.

    Raises:
        InputError: for a weight decay that should follow a cosine when nothing else does.
    """
    if config.schedule == "cosine" and config.schedule_per_step and steps_per_epoch is not None:
        return CosineSchedule(optimizer, config, steps_per_epoch)
    if config.final_weight_decay is not None:
        raise InputError(
            f"final_weight_decay {config.final_weight_decay}: needs schedule cosine with schedule_per_step true"
        )
    return timm_schedule(optimizer, config, steps_per_epoch)


class CosineSchedule:
    r"""Learning rate and weight decay at each step t of T, as MoCo-v3 and DINO have them.

    The rate grows linearly from ``warmup_lr`` during W steps, then half a cosine over the T - W steps that are left
    takes it to ``min_lr``. Weight decay, where there is some, goes over all steps to ``final_weight_decay``:

    .. math:: wd(t) = wd_T + (wd_0 - wd_T) (1 + \cos(\pi t / T)) / 2

    Args:
        optimizer: whose groups are set.
        config: of the run.
        steps_per_epoch: optimizer steps in an epoch.

    Raises:
        InputError: if the warm-up takes the whole training.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2, 2))
        >>> config = SarConfig(lr=1.0, warmup_lr=0, warmup_epochs=1, epochs=3, weight_decay=0, final_weight_decay=0.4)
        >>> optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.2}], lr=config.lr)
        >>> schedule = CosineSchedule(optimizer, config, steps_per_epoch=4)
        >>> for step in (0, 1, 4, 8):
        ...     schedule.step_update(step)
        ...     print(optimizer.param_groups[0]["lr"])
        0.0
        0.25
        1.0
        0.5
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: SarConfig, steps_per_epoch: int) -> None:
        self.optimizer = optimizer
        self.start, self.end = config.weight_decay, config.final_weight_decay
        self.steps = config.epochs * steps_per_epoch
        warmup = round(config.warmup_epochs * steps_per_epoch)
        if warmup >= self.steps:
            raise InputError(
                f"warmup_epochs {config.warmup_epochs}: expected less than epochs {config.epochs}"
            )
        self.rate = CosineLRScheduler(
            optimizer,
            t_initial=self.steps - warmup,
            lr_min=config.min_lr,
            warmup_t=warmup,
            warmup_lr_init=config.warmup_lr,  # pyright: ignore[reportArgumentType] (timm says int)
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.decayed = [group["weight_decay"] > 0 for group in optimizer.param_groups]

    def step(self, epoch: int, /) -> None:
        """Nothing changes with the epoch."""

    def step_update(self, num_updates: int, /) -> None:
        """Set the rates of the step after ``num_updates`` steps."""
        self.rate.step_update(num_updates)
        if self.end is None:
            return
        cosine = (1 + math.cos(math.pi * num_updates / self.steps)) / 2
        for group, decayed in zip(self.optimizer.param_groups, self.decayed):
            if decayed:
                group["weight_decay"] = self.end + (self.start - self.end) * cosine


# --- Evaluation without a head --------------------------------------------------------------------------------------


def neighbour_votes(
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes for each class by the k nearest images of a bank, each weighing ``exp(cosine / temperature)``.

    Args:
        queries: ``(q, c)`` embeddings of length 1.
        bank: ``(n, c)`` likewise.
        labels: ``(n,)`` class ids of the bank.
        classes: number of classes.
        k: neighbours that vote; all of a bank that has fewer.
        temperature: of the weights.

    Returns:
        ``(q, classes)``, 0 or more. Memory is ``q n``: give few queries at a time.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> neighbour_votes(torch.tensor([[0.6, 0.8]]), bank, torch.tensor([2, 0, 0]), classes=3, k=2).argmax(1)
        tensor([0])

    References:
        Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018.
    """
    similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    weights = (similarity / temperature).exp()
    return (functional.one_hot(labels[nearest], classes) * weights[..., None]).sum(dim=1)


@torch.no_grad()
def measure(
    config: SarConfig, encoder: SARViT, data: ImageData, bank: ImageData, accelerator: Any
) -> dict[str, float]:
    """How well the embeddings tell classes, and what the attention of the last block looks like.

    Args:
        config: of the run.
        encoder: in evaluation mode, on its device.
        data: images to be classified by their 20 nearest neighbours, see :func:`neighbour_votes`.
        bank: training images, the neighbours; not the same images.
        accelerator: for several processes, which share the work and all get the result; None for one.

    Returns:
        ``knn``, accuracy in percent, and what :func:`sar_vit.evaluate.evaluate_model` finds without classes.
    """
    attention = measure_attention(config, encoder, data, accelerator)
    known = gather_samples(accelerator, _joined(_embedded(config, encoder, bank, accelerator)))
    device = next(encoder.parameters()).device
    features, labels = (torch.from_numpy(known[name]).to(device) for name in ("features", "labels"))
    rows: list[Mapping[str, NDArray[Any]]] = []
    for batch in _embedded(config, encoder, data, accelerator):
        queries = torch.from_numpy(batch["features"]).to(device)
        votes = neighbour_votes(queries, features, labels, len(bank.labels)).argmax(dim=1)
        rows.append({"index": batch["index"], "correct": votes.cpu().numpy() == batch["labels"]})
    found = gather_samples(accelerator, _joined(rows))
    return {"knn": 100 * float(found["correct"].mean()), **attention}


def _embedded(
    config: SarConfig, encoder: SARViT, data: ImageData, accelerator: Any
) -> Iterator[dict[str, NDArray[Any]]]:
    """Batch by batch of this process, features of length 1 with index and label."""
    count, process = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    samples = samples_of(data, eval_transform(encoder.preprocessing), seed=0)
    loader = eval_loader(
        samples, config.eval_batch_size, processes=count, process=process, workers=config.workers
    )
    device = next(encoder.parameters()).device
    for batch in loader:
        with contextlib.nullcontext() if accelerator is None else accelerator.autocast():
            features = encoder.features(batch["images"].to(device))
        rows = {
            "features": functional.normalize(features.float(), dim=1),
            "index": batch["index"],
            "labels": batch["labels"],
        }
        yield {name: values.cpu().numpy() for name, values in rows.items()}


def _joined(rows: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    listed = list(rows)
    return {name: np.concatenate([row[name] for row in listed]) for name in (listed[0] if listed else ())}
