"""What a run leaves for people: the model folder with its card, metrics.json and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attnmap_core.boxes import boxes_from_score_map, upsample_score_map
from attnmap_core.data.sources import ImageData
from attnmap_core.data.transforms import eval_transform
from attnmap_core.files import atomic_folder, read_json, write_json
from attnmap_core.model_card import Metric, write_card
from attnmap_core.pictures import threshold_curves, training_panels
from attnmap_core.report import (
    Gallery,
    Report,
    Table,
    Tile,
    compared,
    localization_tile,
    run_facts,
    select_cases,
    write_report,
)
from attnmap_core.training import TrainResult

from .config import ScmConfig
from .evaluate import KIND_NAMES, METRIC_NAMES, Evaluation
from .model import TSCAM
from .published import published_value

TITLES = {"best": "Best cases", "worst": "Worst cases", "random": "Random cases"}
BOX_NOTE = (
    "Percent. Box metrics in the frame of the network input, IoU counting pixels inclusively; GT-known, Top-1 and "
    "Top-5 Loc at the one threshold that is best for GT-known on this split. Floors are maps that see nothing."
)


def write_run(
    run: Path, config: ScmConfig, model: TSCAM, data: ImageData, evaluation: Evaluation, result: TrainResult
) -> None:
    """Write ``model/`` (ready for the Hub), ``metrics.json`` and ``report.html`` into a run folder."""
    record = read_json(run / "run.json")
    with atomic_folder(run / "model") as folder:
        model.save_pretrained(folder)
        write_card(folder, card_facts(config, model, evaluation, record, result))
    write_json(run / "metrics.json", evaluation.to_json())
    epochs = [_flat(line) for line in result.history if line["kind"] == "epoch"]
    report = evaluation_report(model, data, evaluation, facts=run_facts(record))
    report.title = f"{method_name(model)} on {data.name}"
    report.plots = training_panels(epochs) | report.plots
    write_report(run / "report.html", report)


def write_evaluation_report(
    path: Path, model: TSCAM, data: ImageData, evaluation: Evaluation, *, facts: Mapping[str, Any]
) -> Path:
    """Write the report of the ``evaluate`` verb."""
    return write_report(path, evaluation_report(model, data, evaluation, facts=facts))


def evaluation_report(
    model: TSCAM, data: ImageData, evaluation: Evaluation, *, facts: Mapping[str, Any], each: int = 8
) -> Report:
    """Tables, threshold curves and a gallery of best, worst and random cases."""
    name = method_name(model)
    tables = [Table(title="Results, protocol standard", rows=evaluation.table(name), note=BOX_NOTE)]
    theirs = {METRIC_NAMES[m]: published_value(data.name, model.own_kind, m) for m in METRIC_NAMES}
    if any(value is not None for value in theirs.values()):
        ours = {METRIC_NAMES[m]: v for m, v in evaluation.metrics().items() if m in METRIC_NAMES}
        note = "The published row is of DeiT-S, under its own protocol: see the package's README."
        tables.append(compared("Published and ours", ours, theirs, note))
    for protocol, measured in evaluation.others.items():
        rows = [{"metric": metric, "value": value} for metric, value in measured.compute().items()]
        tables.append(Table(title=f"Results, protocol {protocol}", rows=rows))
    own = evaluation.kinds[evaluation.own]
    ious = own.ious()
    plots = {}
    if ious:
        plots["box accuracy by threshold"] = threshold_curves(
            {name: own.box_accuracy_curves()}, own.thresholds
        )
    galleries: list[Gallery] = []
    if not data.streaming:
        scores = ious or dict.fromkeys(range(min(len(data), 3 * each)), 0.0)
        for group, indices in select_cases(scores, each).items():
            if indices:
                tiles = case_tiles(model, data, indices, ious)
                galleries.append(Gallery(title=TITLES[group], tiles=tiles, left_out=0))
    if galleries:
        galleries[0] = dataclasses.replace(
            galleries[0],
            note="Red: true box; green: predicted box of the true class at the model's threshold; beside it that "
            "class's score map. The number is the IoU at the threshold of GT-known.",
        )
    return Report(
        title=f"{name} on {data.name}",
        summary=f"{len(own.rows)} images of split {data.split}, {len(data.labels)} classes. "
        f"Box threshold of the model: {model.threshold:.2f}.",
        tables=tables,
        plots=plots,
        galleries=galleries,
        facts=facts,
    )


@torch.inference_mode()
def case_tiles(
    model: TSCAM, data: ImageData, indices: Sequence[int], ious: Mapping[int, float]
) -> list[Tile]:
    """The true class's map and box of chosen images, at the model's threshold."""
    transform, device = eval_transform(model.preprocessing), next(model.parameters()).device
    tiles: list[Tile] = []
    for index in indices:
        sample = data[index]
        maps = model.maps(transform(sample.image)[None].to(device))
        label = torch.tensor([sample.label], device=device)
        raw = model.class_maps(maps, label)[0].double().cpu().numpy()
        score_map = upsample_score_map(raw, model.preprocessing.size)
        box = boxes_from_score_map(score_map, model.threshold, convention="tscam").astype(np.float64)
        probability, predicted = maps.logits[0].softmax(dim=0).max(dim=0)
        caption = data.labels[sample.label]
        if int(predicted) != sample.label:
            caption += f"\nnamed {data.labels[int(predicted)]} ({100 * float(probability):.0f} %)"
        width, height = sample.image.size
        tiles.append(
            localization_tile(
                sample.image,
                model.preprocessing.to_photo_map(score_map.astype(np.float32), width, height),
                caption,
                truth_xyxy=sample.boxes_xyxy,
                predicted_xyxy=model.preprocessing.to_photo_coordinates(box, width, height),
                badge=f"IoU {ious[index]:.2f}" if index in ious else "",
            )
        )
    return tiles


def card_facts(
    config: ScmConfig, model: TSCAM, evaluation: Evaluation, record: Mapping[str, Any], result: TrainResult
) -> dict[str, Any]:
    """What the run knows, for the model card."""
    metrics = [
        Metric(
            name=METRIC_NAMES[name],
            value=value,
            data=evaluation.data,
            split=evaluation.split,
            protocol="standard",
            seeds=(config.seed,),
            published=published_value(config.data, model.own_kind, name),
        )
        for name, value in evaluation.metrics().items()
        if name in METRIC_NAMES
    ]
    return {
        "model_class": type(model).__name__,
        "package": "scm_wsol",
        "repo_id": str(Path(config.output_dir) / "model"),
        "title": f"{method_name(model)}, {config.backbone}",
        "summary": "Class, heat map and box of one object per photo, trained on image labels only.",
        "limits": "One object of a known class per photo; the box bounds what exceeds a share of the map's maximum.",
        "metrics": metrics,
        "recipe": (Path(config.output_dir) / "recipe.toml").name,
        "train_command": record["command"],
        "seeds": (config.seed,),
        "hardware": run_facts(record).get("hardware"),
        "duration": f"{result.seconds / 60:.1f} minutes",
        "commit": record["commit"],
        "versions": record["versions"],
        "labels": model.labels,
        "license": "apache-2.0",
    }


def method_name(model: TSCAM) -> str:
    """``SCM``, ``TS-CAM`` or ``CAM``."""
    return "SCM" if type(model).__name__ == "SCM" else KIND_NAMES[model.method]


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """One epoch's record with only what is worth a curve."""
    shown = ("top1_cls", "gt_known", "max_box_acc_v2", "pxap")
    metrics = {METRIC_NAMES[name]: line.get("metrics", {}).get(name) for name in shown if "metrics" in line}
    return {
        key: value for key, value in line.items() if key not in ("kind", "metrics", "seconds", "step")
    } | metrics
