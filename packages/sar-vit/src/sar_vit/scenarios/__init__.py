"""The trainings of the paper, section 4 and appendix D: each module makes a :class:`Setup` of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnmap_core.data.loaders import Transform
from attnmap_core.data.sources import ImageData
from attnmap_core.training import MakeSchedule, Task
from torch import nn

Measure = Callable[[Any, ImageData, Any], Mapping[str, float]]


def _unchanged(data: ImageData) -> ImageData:
    return data


@dataclass(kw_only=True)
class Setup:
    """What a scenario hands to the training loop, and to what comes after it.

    Attributes:
        model: with initial weights drawn from the configuration's seed, the same in every process.
        task: of the loop.
        transform: of training photos.
        measure: ``measure(model, data, accelerator)``, metrics by name of ``model`` in evaluation mode on a split; it
            runs in every process and gives all of them the same. Percent where a metric has a percent.
        save: ``save(model, folder)`` writes the model folder that users load.
        load: the inverse, ``load(folder)``.
        select_by: metric that chooses the best epoch where there is a split to choose on.
        select_mode: whether it should be large or small.
        make_schedule: of the loop; None for timm's as configured.
        prepare: what makes of a split the training images that the loaders take; ``measure`` does so by itself.
        with_segmentation: batches need ``pixel_labels``.
    """

    model: nn.Module
    task: Task
    transform: Transform
    measure: Measure
    save: Callable[[Any, Path], None]
    load: Callable[[Path], Any]
    select_by: str = "top1"
    select_mode: str = "max"
    make_schedule: MakeSchedule | None = None
    prepare: Callable[[ImageData], ImageData] = _unchanged
    with_segmentation: bool = False


def make_setup(config: Any, data: ImageData) -> Setup:
    """The setup of ``config.scenario`` for these training images.

    Args:
        config: a :class:`sar_vit.config.SarConfig`.
        data: the training split.

    Raises:
        InputError: for settings, weights or data that do not fit the scenario.
    """
    import importlib

    module = importlib.import_module(f".{config.scenario}", __name__)
    return module.make_setup(config, data)
