"""Which maps to multiply at test time: S^l ⊙ F^m for all pairs of layers (supplement 1.2, figure 2).

The same for weights that were trained as TS-CAM and passed through a calibration that was never trained: what of the
picture is due to training through the calibration, and what to the calibration itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from attnmap_core import cli
from attnmap_core.boxes import resize_boxes, upsample_score_map
from attnmap_core.data.sources import ImageData
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.metrics.localization import best_iou_curve
from attnmap_core.pictures import heatmap_grid, save_picture
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ..evaluate import METRIC_NAMES, evaluate_model
from ..model import SCM, TSCAM, Maps
from .runs import RunOptions, check_images, experiment_data, given_or_trained, scale_note, write_results

METRICS = ("gt_known", "top1_loc", "max_box_acc_v1")
UPPER = "⁰¹²³⁴⁵⁶⁷⁸⁹"


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """All pairs of semantic map S^l and attention map F^m of a trained SCM, in numbers and pictures."""

    model: str = ""
    """Trained SCM (folder or Hub id); trained by the recipe where not given."""
    control: str = ""
    """Trained TS-CAM for the control; trained by its recipe where neither it nor model is given."""
    recipe: str = "tiny-scm"
    """Recipe of the SCM, and of data where none are given."""
    control_recipe: str = "tiny-tscam"
    """Recipe of the TS-CAM."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Split to look at."""
    images: tuple[int, ...] = (0, 1, 2)
    """Images to draw, by their place in the split."""
    threshold: float | None = None
    """Threshold of GT-known and Top-1 Loc; the model's own (found on validation images) where not given."""
    table: bool = True
    """Measure all pairs on the split; off, only the pictures are drawn."""
    seed: int = 26
    """Seed of what is trained here."""
    out: Path = Path("runs/combine-maps")
    """Folder of the tables, the pictures and what is trained here."""


def command(arguments: list[str]) -> None:
    """``scm-wsol reproduce combine-maps``."""
    _run(cli.parse(Options, arguments, command="scm-wsol reproduce combine-maps"))


def figure_command(arguments: list[str]) -> None:
    """``scm-wsol reproduce fig-grid``: the pictures alone."""
    default = Options(table=False)
    _run(cli.parse(Options, arguments, command="scm-wsol reproduce fig-grid", default=default))


def _run(options: Options) -> None:
    config, data = experiment_data(options, options.recipe, options.split)
    check_images(options.images, data)
    models = dict(_models(options, data))
    for name, (model, _) in models.items():
        for index in options.images:
            picture = draw(model, data, index, options.threshold)
            save_picture(picture, options.out / f"grid_{index:03d}_{name}.png")
    if options.table:
        blocks = models["scm"][0].calibration.blocks
        rows: list[dict[str, Any]] = []
        tables: dict[str, list[dict[str, Any]]] = {}
        for model, title in models.values():
            measured = measure(model, data, options.threshold, config.threshold_step)
            rows += [
                {"weights": title, "S": i, "F": j, **_named(values)} for (i, j), values in measured.items()
            ]
            tables |= {f"{METRIC_NAMES[name]}, {title}": matrix(measured, name) for name in METRICS}
        write_results(
            options.out,
            rows,
            title=f"S^l ⊙ F^m of all layers, {data.name}, {data.split}, percent",
            notes=[
                "Top-1 Loc and GT-known at the model's own threshold, MaxBoxAccV1 at the best of each pair. S⁰, F⁰ is "
                "what the method uses. No numbers are published.",
                f"p of the blocks: {' '.join(str(block.iterations) for block in blocks)}.",
                None if "control" in models else "No control: --control names the TS-CAM for it.",
                scale_note(config, given=_given(options)),
            ],
            tables=tables,
            digits={"τ": 2},
            seed=options.seed,
        )
    else:
        sys.stdout.write(f"{options.out}\n")


def _models(options: Options, data: ImageData) -> Iterator[tuple[str, tuple[SCM, str]]]:
    model = given_or_trained(options, options.model, data, options.out / "scm", options.recipe, options.seed)
    if not isinstance(model, SCM):
        raise InputError(
            f"{options.model or options.recipe}: is {type(model).__name__}; expected a trained SCM"
        )
    yield "scm", (model, "SCM")
    if options.control or not options.model:
        plain = given_or_trained(
            options, options.control, data, options.out / "tscam", options.control_recipe, options.seed
        )
        if isinstance(plain, SCM):
            raise InputError(
                f"{options.control or options.control_recipe}: is an SCM; expected a trained TS-CAM"
            )
        yield "control", (untrained_like(model, plain), "TS-CAM weights, untrained SCM")


def _given(options: Options) -> tuple[str, ...]:
    return (options.model, *([options.control] if options.control or not options.model else []))


def untrained_like(model: SCM, plain: TSCAM) -> SCM:
    """The weights of ``plain`` with a fresh calibration of the same settings as that of ``model``."""
    blocks = model.calibration.blocks
    names = ("alpha", "laplacian", "sign", "filter", "residual", "stable_shrink", "clamp_beta", "dtype")
    return SCM.from_tscam(
        plain,
        blocks=len(blocks),
        iterations=[block.iterations for block in blocks],
        mean_one_weights=model.calibration.mean_one_weights,
        **{name: getattr(blocks[0], name) for name in names},
    )


class _AllPairs(nn.Module):
    """An SCM whose calibrated maps of a batch are computed once, whichever pairs are asked for."""

    def __init__(self, model: SCM) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = model.preprocessing
        self._latest: tuple[Maps, Tensor] | None = None

    def maps(self, images: Tensor) -> Maps:
        return self.model.maps(images)

    def class_maps(self, maps: Maps, classes: Tensor, kind: str) -> Tensor:
        if self._latest is None or self._latest[0] is not maps:
            combined = self.model.combined_maps(maps, rearrange(classes, "b -> b 1"))
            self._latest = maps, rearrange(combined, "b 1 l m h w -> l m b h w")
        layer, attention = map(int, kind.split(","))
        return self._latest[1][layer, attention]


def measure(
    model: SCM, data: ImageData, threshold: float | None, step: float
) -> dict[tuple[int, int], dict[str, float]]:
    """Standard metrics of every pair, from one forward pass per image."""
    layers = range(len(model.calibration.blocks) + 1)
    pairs = {f"{i},{j}": (i, j) for i in layers for j in layers}
    frozen = model.threshold if threshold is None else threshold
    evaluation = evaluate_model(
        cast(TSCAM, _AllPairs(model)), data, kinds=tuple(pairs), threshold=frozen, step=step
    )
    if evaluation.threshold() is None:
        raise InputError(f"{data.name}, {data.split}: no boxes; these tables need images with boxes")
    return {pair: evaluation.metrics(kind) for kind, pair in pairs.items()}


def _named(values: dict[str, float]) -> dict[str, float]:
    return {METRIC_NAMES[name]: values[name] for name in (*METRICS, "max_box_acc_v2")} | {
        "τ": values["threshold"]
    }


def matrix(measured: dict[tuple[int, int], dict[str, float]], name: str) -> list[dict[str, Any]]:
    """Rows S^l, columns F^m."""
    layers = sorted({i for i, _ in measured})
    return [{"": f"S{upper(i)}"} | {f"F{upper(j)}": measured[i, j][name] for j in layers} for i in layers]


def upper(number: int) -> str:
    """A number as superscript."""
    return "".join(UPPER[int(digit)] for digit in str(number))


@torch.inference_mode()
def draw(model: SCM, data: ImageData, index: int, threshold: float | None = None) -> Image.Image:
    """Heat maps of the true class for all pairs, IoU below each; S^l and F^m on the border."""
    sample, size = data[index], model.preprocessing.size
    device = next(model.parameters()).device
    maps = model.maps(eval_transform(model.preprocessing)(sample.image)[None].to(device))
    S, F = model.calibrated(maps)
    combined = model.combined_maps(maps, torch.tensor([[sample.label]], device=device))[0, 0]
    grids, rows, columns = (
        upsample_score_map(raw.double().cpu().numpy(), size)
        for raw in (combined, S[:, 0, sample.label], F[:, 0])
    )
    captions = None
    if len(sample.boxes_xyxy):
        boxes = resize_boxes(sample.boxes_xyxy, sample.image.size, (size[1], size[0]))
        frozen = model.threshold if threshold is None else threshold
        ious = [[best_iou_curve(grid, boxes, np.array([frozen]))[0] for grid in row] for row in grids]
        captions = [[f"IoU {iou:.2f}" for iou in row] for row in ious]
    layers = [upper(layer) for layer in range(len(grids))]
    return heatmap_grid(
        list(map(list, grids)),
        row_titles=[f"S{layer}" for layer in layers],
        column_titles=[f"F{layer}" for layer in layers],
        row_marginals=list(rows),
        column_marginals=list(columns),
        image=sample.image,
        captions=captions,
    )
