"""What TS-CAM and SCM see in the same photos: boxes, heat map, region above the threshold, the maps behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from attnmap_core import cli
from attnmap_core.boxes import (
    box_iou,
    boxes_from_score_map,
    score_map_to_uint8,
    threshold_levels,
    upsample_score_map,
)
from attnmap_core.data.sources import ImageData, Sample
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.pictures import binary_mask_overlay, draw_boxes, overlay, picture_grid, save_picture

from ..model import TSCAM
from ..report import method_name
from .runs import RunOptions, check_images, experiment_data, given_or_trained, scale_note, write_results

STYLES = {"release": (0.5, 0.6), "tscam": (0.2, 0.8)}
"""Weights of photo and colours in an overlay, as the released codes of SCM and TS-CAM draw them."""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Boxes (truth red, prediction green), heat map, binary mask, S⁰ of the true class and F⁰, method by method."""

    tscam: str = ""
    """Trained TS-CAM (folder or Hub id); trained by its recipe where not given."""
    scm: str = ""
    """Trained SCM, likewise."""
    tscam_recipe: str = "tiny-tscam"
    """Recipe of the TS-CAM."""
    scm_recipe: str = "tiny-scm"
    """Recipe of the SCM, and of data where none are given."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Split to look at."""
    images: tuple[int, ...] = (0, 1, 2, 3)
    """Images to draw, by their place in the split."""
    threshold: float | None = None
    """Threshold τ of mask and box; each model's own where not given (SCM's released code draws at 0.35)."""
    style: Literal["release", "tscam"] = "release"
    """Overlay weights: 0.5 photo + 0.6 colours, or 0.2 + 0.8."""
    seed: int = 26
    """Seed of what is trained here."""
    out: Path = Path("runs/fig-qualitative")
    """Folder of the figure, the table of IoUs and what is trained here."""


def command(arguments: list[str]) -> None:
    """``scm-wsol reproduce fig-qualitative [--tscam RUN --scm RUN --images 0 1 2]``."""
    options = cli.parse(Options, arguments, command="scm-wsol reproduce fig-qualitative")
    if not options.images:
        raise InputError("--images: expected at least one place in the split, such as 0 1 2")
    if options.threshold is not None and not 0 <= options.threshold < 1:
        raise InputError(
            f"--threshold {options.threshold}: expected a share of the maximum from 0 to below 1"
        )
    config, data = experiment_data(options, options.scm_recipe, options.split)
    check_images(options.images, data)
    models = [
        given_or_trained(options, given, data, options.out / name, recipe, options.seed)
        for name, given, recipe in (
            ("tscam", options.tscam, options.tscam_recipe),
            ("scm", options.scm, options.scm_recipe),
        )
    ]
    cells: list[list[Any]] = []
    captions: list[list[str]] = []
    titles: list[str] = []
    rows: list[dict[str, Any]] = []
    for index in options.images:
        sample = data[index]
        for model in models:
            threshold = model.threshold if options.threshold is None else options.threshold
            pictures, facts = look(model, data, sample, threshold, STYLES[options.style])
            name = method_name(model)
            cells.append(pictures)
            captions.append(_captions(facts, threshold))
            titles.append(name)
            rows.append({"image": sample.image_id, "method": name, **facts})
    columns = ["truth and prediction", "heat map S⁰ ⊙ F", "above τ", "semantic map S⁰", "attention map F"]
    save_picture(
        picture_grid(cells, titles, columns, captions=captions, cell_size=200),
        options.out / "qualitative.png",
    )
    write_results(
        options.out,
        rows,
        title=f"Single images of {data.name}, {data.split}",
        notes=[
            "Map and box of the true class; IoU in pixels of the photo.",
            scale_note(config, given=(options.tscam, options.scm)),
        ],
        digits={"IoU": 2, "τ": 2},
        seed=options.seed,
    )


@torch.inference_mode()
def look(
    model: TSCAM, data: ImageData, sample: Sample, threshold: float, weights: tuple[float, float]
) -> tuple[list[Any], dict[str, Any]]:
    """The five pictures of one row, and its numbers."""
    pre, device = model.preprocessing, next(model.parameters()).device
    maps = model.maps(eval_transform(pre)(sample.image)[None].to(device))
    label = torch.tensor([sample.label], device=device)
    fused, semantic, attention = (
        upsample_score_map(model.class_maps(maps, label, kind)[0].double().cpu().numpy(), pre.size)
        for kind in (model.own_kind, "cam", "att")
    )
    values = score_map_to_uint8(fused)
    mask = values > threshold_levels(threshold, int(values.max()))
    box = boxes_from_score_map(fused, threshold, convention="tscam").astype(np.float64)
    box = pre.to_photo_coordinates(box, *sample.image.size)
    iou = float(box_iou(box, sample.boxes_xyxy, "continuous").max()) if len(sample.boxes_xyxy) else None
    photo_weight, map_weight = weights

    def heat(score_map: Any) -> Any:
        laid_out = pre.to_photo_map(score_map.astype(np.float32), *sample.image.size)
        return overlay(sample.image, laid_out, image_weight=photo_weight, map_weight=map_weight)

    seen = pre.to_photo_map(mask.astype(np.float32), *sample.image.size) > 0.5
    pictures = [
        draw_boxes(sample.image, sample.boxes_xyxy, box),
        draw_boxes(heat(fused), sample.boxes_xyxy, box, size_wh=sample.image.size),
        binary_mask_overlay(sample.image, seen),
        heat(semantic),
        heat(attention),
    ]
    predicted = data.labels[int(maps.logits[0].argmax())]
    facts = {"class": data.labels[sample.label], "predicted": predicted, "IoU": iou, "τ": threshold}
    return pictures, facts | {"area": f"{100 * mask.mean():.0f} %"}


def _captions(facts: dict[str, Any], threshold: float) -> list[str]:
    named = "" if facts["predicted"] == facts["class"] else f"\nnamed {facts['predicted']}"
    iou = "" if facts["IoU"] is None else f"IoU {facts['IoU']:.2f}"
    return [f"{facts['class']}{named}", iou, f"τ = {threshold:.2f}: {facts['area']}", "", ""]
