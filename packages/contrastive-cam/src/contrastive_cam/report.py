"""What runs and evaluations leave for people: the model folder with its card, metrics.json and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attnmap_core.data.sources import ImageData
from attnmap_core.data.transforms import eval_transform
from attnmap_core.files import atomic_folder, read_json, write_json
from attnmap_core.model_card import Metric, write_card
from attnmap_core.pictures import training_panels
from attnmap_core.report import (
    Gallery,
    Report,
    Table,
    Tile,
    localization_tile,
    run_facts,
    select_cases,
    write_report,
)
from attnmap_core.training import TrainResult

from .config import ContrastiveConfig
from .evaluate import METRIC_NAMES, Evaluation
from .frozen import FrozenMap
from .localizers import Localizer
from .model import ContrastiveCAM

TITLES = {"best": "Best cases", "worst": "Worst cases", "random": "Random cases"}
NOTE = (
    "CorLoc in percent: photos whose one box overlaps the known one by IoU 0.3, 0.5, 0.7 or more; a photo without a "
    "box counts as missed. The cut of the heat map is fixed before the test; other cuts are for comparison. Floors are "
    "boxes that see nothing."
)


def write_run(
    run: Path,
    config: ContrastiveConfig,
    model: ContrastiveCAM | FrozenMap,
    data: ImageData,
    evaluation: Evaluation,
    result: TrainResult,
) -> None:
    """Write ``model/`` (ready for the Hub), ``metrics.json`` and ``report.html`` into a run folder.

    Args:
        run: the folder, which holds ``run.json``.
        config: of the run.
        model: with the weights to keep, in evaluation mode.
        data: what ``evaluation`` measured.
        evaluation: of these weights.
        result: of the training loop.

    Raises:
        InputError: if the folder has no ``run.json`` or cannot be written.
    """
    from .train import localizer_of

    record = read_json(run / "run.json")
    with atomic_folder(run / "model") as folder:
        model.save_pretrained(folder)
        write_card(folder, card_facts(config, model, evaluation, record, result))
    write_json(run / "metrics.json", evaluation.to_json() | {"chosen": result.best})
    epochs = [_flat(line) for line in result.history if line["kind"] == "epoch"]
    report = evaluation_report(localizer_of(config, model), data, evaluation, facts=run_facts(record))
    report.title = f"{method_name(model)} on {data.name}"
    report.plots = training_panels(epochs) if epochs else {}
    warning = collapse(result.history)
    if warning:
        report.lists = {"Watch": [warning]}
    write_report(run / "report.html", report)


def write_evaluation_report(
    path: Path, localizer: Localizer, data: ImageData, evaluation: Evaluation, *, facts: Mapping[str, Any]
) -> Path:
    """Write the report of the ``evaluate`` verb; returns its path."""
    return write_report(path, evaluation_report(localizer, data, evaluation, facts=facts))


def evaluation_report(
    localizer: Localizer,
    data: ImageData,
    evaluation: Evaluation,
    *,
    facts: Mapping[str, Any],
    each: int = 8,
) -> Report:
    """Tables and a gallery of best, worst and random cases; random ones alone where no boxes are known.

    Args:
        localizer: what was measured.
        data: on what.
        evaluation: with what result.
        facts: of the launch.
        each: photos a gallery.
    """
    name = method_name(localizer.model)
    tables = [Table(title="Results", rows=evaluation.table(name), note=NOTE)] if evaluation.own.rows else []
    tables.append(Table(title="Heat maps", rows=[told(evaluation.facts)]))
    galleries: list[Gallery] = []
    if not data.streaming and len(data):
        rows = evaluation.own.rows
        scores = {i: row["iou"] for i, row in rows.items()} or dict.fromkeys(
            range(min(len(data), 3 * each)), 0.0
        )
        for group, indices in select_cases(scores, each).items():
            if indices and (rows or group == "random"):
                tiles = case_tiles(localizer, data, indices, scores if rows else {})
                galleries.append(Gallery(title=TITLES[group] if rows else "Photos", tiles=tiles))
    if galleries:
        note = "Red: known box; green: found box; beside it the heat map. The number is the IoU."
        galleries[0] = dataclasses.replace(galleries[0], note=note)
    images = len(evaluation.own.rows) or (0 if data.streaming else len(data))
    return Report(
        title=f"{name} on {data.name}",
        summary=f"{images} photos of split {data.split}; heat maps cut at {evaluation.rule}.",
        tables=tables,
        galleries=galleries,
        facts=facts,
    )


def told(facts: Mapping[str, float]) -> dict[str, float]:
    """Facts of an evaluation by the titles that people read.

    Example:
        >>> told({"mask_area": 40.0, "empty": 1.0})
        {'area above 0.2, %': 40.0, 'without a box': 1.0}
    """
    titles = {
        "mask_area": "area above 0.2, %",
        "active_fraction": "active channels, %",
        "ptap_acts": "pixels where k matters, %",
        "empty": "without a box",
        "unboxed": "without a known box",
        "seconds": "seconds a photo",
    }
    return {title: facts[name] for name, title in titles.items() if name in facts}


@torch.inference_mode()
def case_tiles(
    localizer: Localizer, data: ImageData, indices: Sequence[int], ious: Mapping[int, float]
) -> list[Tile]:
    """Found and known boxes and heat maps of chosen photos."""
    preprocessing = localizer.model.preprocessing
    transform = eval_transform(preprocessing)
    tiles: list[Tile] = []
    for index in indices:
        sample = data[index]
        [found] = localizer.find(transform(sample.image)[None])
        width, height = sample.image.size
        box = None
        if found.box_xyxy is not None:
            box = preprocessing.to_photo_coordinates(found.box_xyxy[None], width, height)
        tiles.append(
            localization_tile(
                sample.image,
                preprocessing.to_photo_map(found.heat.astype(np.float32), width, height),
                Path(sample.image_id).name,
                truth_xyxy=sample.boxes_xyxy if len(sample.boxes_xyxy) else None,
                predicted_xyxy=box,
                badge=f"IoU {ious[index]:.2f}" if index in ious else "",
            )
        )
    return tiles


def collapse(history: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say when maps have shrunk to spots: the mask area fell below half of its first value; None otherwise.

    Args:
        history: of a training loop.

    Example:
        >>> collapse([{"kind": "epoch", "mask_area": 0.4}, {"kind": "epoch", "mask_area": 0.1}])[:54]
        'The area above 0.2 of the maps fell from 40 % to 10 % '
    """
    areas = [line["mask_area"] for line in history if line.get("kind") == "epoch" and "mask_area" in line]
    if len(areas) < 2 or areas[-1] >= areas[0] / 2:
        return None
    return (
        f"The area above 0.2 of the maps fell from {100 * areas[0]:.0f} % to {100 * areas[-1]:.0f} % in training: maps "
        "may have become fingerprints of their photos. Lower --contrastive-weight, or take --negatives none."
    )


def card_facts(
    config: ContrastiveConfig,
    model: ContrastiveCAM | FrozenMap,
    evaluation: Evaluation,
    record: Mapping[str, Any],
    result: TrainResult,
) -> dict[str, Any]:
    """What the run knows, for the model card."""
    return {
        "model_class": type(model).__name__,
        "package": "contrastive_cam",
        "repo_id": str(Path(config.output_dir) / "model"),
        "title": f"{method_name(model)}, {config.backbone}",
        "summary": f"Heat map and box of one {config.name} per photo, trained without any label.",
        "limits": "One object of the one kind it was trained on; the box bounds the largest bright region.",
        "pipeline_tag": "object-detection",
        "metrics": [
            Metric(
                name=METRIC_NAMES[name],
                value=value,
                data=evaluation.data,
                split=evaluation.split,
                protocol=f"cut at {evaluation.rule}",
                seeds=(config.seed,),
            )
            for name, value in evaluation.metrics().items()
            if name in METRIC_NAMES
        ],
        "recipe": "recipe.toml",
        "train_command": record["command"],
        "seeds": (config.seed,),
        "hardware": run_facts(record).get("hardware"),
        "duration": f"{result.seconds / 60:.1f} minutes",
        "commit": record["commit"],
        "versions": record["versions"],
        "labels": list(model.labels),
        "license": "apache-2.0",
    }


def method_name(model: Any) -> str:
    """``Contrastive CAM`` or ``Frozen map``: what the class of a model is called."""
    return "Frozen map" if isinstance(model, FrozenMap) else "Contrastive CAM"


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """One epoch's record with only what is worth a curve."""
    metrics = line.get("metrics", {})
    shown = {f"{title}, validation": metrics[name] for name, title in METRIC_NAMES.items() if name in metrics}
    left_out = ("kind", "metrics", "seconds", "step")
    return {key: value for key, value in line.items() if key not in left_out} | shown
