"""The classification task that trains CAM, TS-CAM and SCM alike, and the schedule of their published runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn import functional

from .calibration import SpatialCalibration


class ClassificationTask:
    """Cross-entropy on the model's training logits: after calibration for SCM, the plain ones otherwise.

    No label smoothing, mixing or other regularizer: the published runs use none.

    Example:
        >>> task = ClassificationTask()
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> parts = task(model, {"images": torch.zeros(2, 3, 2, 2), "labels": torch.tensor([0, 2])})
        >>> sorted(parts)
        ['accuracy', 'loss']
    """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch.

        Args:
            model: a :class:`~scm_wsol.TSCAM` or :class:`~scm_wsol.SCM` in training mode, bare or wrapped for
                distributed training or compilation.
            batch: ``images`` ``(b, 3, H, W)`` normalised, ``labels`` ``(b,)`` class ids.

        Returns:
            Scalars: ``loss`` with gradient, the mean over the batch; without gradient ``accuracy``, and for
            SCM ``lambda_l`` and ``beta_l`` of each block l, ``active_share`` (of cells with T > 0.5, over all
            blocks) and ``mean_weight`` (of the pooling weights w, which scale the training logits).
        """
        logits = model(batch["images"])  # through the wrapper, so that its hooks gather gradients
        labels = batch["labels"]
        loss = functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        parts = {"loss": loss, "accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}
        calibration = getattr(_unwrapped(model), "calibration", None)
        return parts | _statistics(calibration) if isinstance(calibration, SpatialCalibration) else parts


@torch.no_grad()
def _statistics(calibration: SpatialCalibration) -> dict[str, Tensor]:
    statistics: dict[str, Tensor] = {}
    for i, block in enumerate(calibration.blocks):
        statistics[f"lambda_{i}"] = block.lam.detach().clone().squeeze()
        statistics[f"beta_{i}"] = block.beta.detach().clone().squeeze()
    T = calibration.last_activation
    if T is not None:
        statistics["active_share"] = (T > 0.5).float().mean()
        statistics["mean_weight"] = calibration.weights(T)[-1].mean().float()
    return statistics


def _unwrapped(model: nn.Module) -> nn.Module:
    # torch.compile around DistributedDataParallel or inside of it
    for wrapper in ("_orig_mod", "module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model


class DivisibleStep(Scheduler):
    """Step decay with a quirk of the published runs: an epoch that a listed step *divides* decays too.

    At the start of epoch e, counted from 1, the learning rate is multiplied by ``decay`` once if e is
    divisible by any of ``steps``. Steps 10 and 12 over 20 epochs thus lower it at 10, 12 and again at 20.

    Args:
        optimizer: its current learning rates are those before any decay.
        steps: epochs, counted from 1.
        decay: factor of each step.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = DivisibleStep(optimizer, steps=[2, 3])
        >>> rates = []
        >>> for epoch in range(6):  # timm counts from 0
        ...     scheduler.step(epoch)
        ...     rates.append(f"{optimizer.param_groups[0]['lr']:g}")
        >>> rates
        ['1', '0.1', '0.01', '0.001', '0.001', '0.0001']
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: Iterable[int], decay: float = 0.1) -> None:
        self.steps = sorted(steps)
        if any(step < 1 for step in self.steps):
            raise ValueError(f"steps are epochs counted from 1, got {self.steps}")
        self.decay = decay
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=True)
        self.step(0)

    def _get_lr(self, t: int) -> list[Any]:
        times = sum(any(epoch % step == 0 for step in self.steps) for epoch in range(1, t + 2))
        return [value * self.decay**times for value in self.base_values]
