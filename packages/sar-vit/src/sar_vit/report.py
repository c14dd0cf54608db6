"""What runs and evaluations leave for people: the model folder with its card, metrics.json and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attnmap_core.data.images import resize_mask
from attnmap_core.data.sources import ImageData, Sample
from attnmap_core.data.transforms import eval_transform
from attnmap_core.files import atomic_folder, read_json, write_json
from attnmap_core.hub import CONFIG_FILE
from attnmap_core.model_card import Metric, write_card
from attnmap_core.pictures import binary_mask_overlay, for_display, line_plot, training_panels
from attnmap_core.recipes import run_record
from attnmap_core.report import THUMBNAIL, Gallery, Report, Table, Tile, run_facts, select_cases, write_report
from attnmap_core.training import TrainResult

from .config import SarConfig
from .evaluate import CorruptionEvaluation, Evaluation, evaluate_model, shown, title_of
from .model import SARViT
from .pictures import attention_picture, head_sheet

if TYPE_CHECKING:
    from .scenarios import Setup

CANDIDATES = 96
"""Images among which a run's report looks for its cases."""
_NOTE = (
    "Accuracy, Jaccard and foreground in percent; entropy, components and foreground are of the similarity maps of the "
    "last block, means over images and heads. Jaccard: of each object the best head in hindsight."
)
_METHODS = {
    "supervised": "ViT",
    "mocov3": "MoCo-v3",
    "dino": "DINO",
    "probe": "Linear probe",
    "segmentation": "Semantic FPN",
}
_COUNTS = ("spatial_entropy", "components", "images")
"""Metrics that are not percent, or parts of their names."""


# --- Runs ------------------------------------------------------------------------------------------------------------


def write_run(
    run: Path,
    config: SarConfig,
    setup: Setup,
    model: Any,
    data: ImageData,
    metrics: Mapping[str, float],
    result: TrainResult,
) -> None:
    """Write ``model/`` (ready for the Hub), ``metrics.json`` and ``report.html`` into a run folder.

    Args:
        run: the folder, which holds ``run.json``.
        config: of the run.
        setup: of its scenario.
        model: with the weights to keep, in evaluation mode; of any class that ``setup.save`` takes. One with attention
            heads gets a gallery of them.
        data: what ``metrics`` were measured on.
        metrics: by name; what begins with ``last_`` is of the last epoch instead of the chosen one.
        result: of the training loop.

    Raises:
        InputError: if the folder has no ``run.json`` or cannot be written.
    """
    record = read_json(run / "run.json")
    with atomic_folder(run / "model") as folder:
        setup.save(model, folder)
        if (folder / CONFIG_FILE).is_file():
            write_card(folder, card_facts(config, model, data, metrics, record, result))
    write_json(
        run / "metrics.json",
        {
            "data": data.name,
            "split": data.split,
            "scenario": config.scenario,
            "chosen": result.best,
            "metrics": dict(metrics),
        },
    )
    epochs = [_flat(line) for line in result.history if line["kind"] == "epoch"]
    name = method_name(config)
    report = Report(
        title=f"{name} on {data.name}",
        summary=_summary(config, data, result),
        tables=[
            Table(title="Results", rows=_result_rows(name, metrics), note=_NOTE if "top1" in metrics else "")
        ],
        plots=training_panels(epochs) if epochs else {},
        facts=run_facts(record),
    )
    if isinstance(model, SARViT) and not data.streaming:
        candidates = np.random.default_rng(0).permutation(len(data))[:CANDIDATES]
        some = data.select(np.sort(candidates))
        measured = evaluate_model(
            model,
            some,
            batch_size=config.eval_batch_size,
            workers=config.workers,
            jaccard_mass=config.jaccard_mass,
            progress=False,
        )
        report.tables += _head_tables(measured, f"Of {len(some)} images of split {data.split}.")
        report.galleries = attention_galleries(model, some, measured, config.jaccard_mass)
    write_report(run / "report.html", report)


def card_facts(
    config: SarConfig,
    model: Any,
    data: ImageData,
    metrics: Mapping[str, float],
    record: Mapping[str, Any],
    result: TrainResult,
) -> dict[str, Any]:
    """What the run knows, for the model card."""
    classifies = isinstance(model, SARViT) and "top1" in metrics
    return {
        "model_class": type(model).__name__,
        "package": "sar_vit",
        "repo_id": str(Path(config.output_dir) / "model"),
        "title": f"{method_name(config)}, {config.backbone}",
        "summary": (
            "Image classifier whose class token's attention maps show where it looks."
            if classifies
            else f"Weights of the training {_METHODS[config.scenario]} ({config.scenario})."
        ),
        "limits": "Attention maps show what the class token attends to; they are not trained as segmentations.",
        "pipeline_tag": (
            "image-classification"
            if classifies
            else "image-segmentation"
            if config.scenario == "segmentation"
            else "image-feature-extraction"
        ),
        "tags": ("vision-transformer", "attention-maps"),
        "paper": "https://arxiv.org/abs/2206.04636",
        "metrics": [
            Metric(
                name=title_of(name),
                value=value,
                data=data.name,
                split=data.split,
                seeds=(config.seed,),
                unit="" if any(part in name for part in _COUNTS) else "%",
            )
            for name, value in metrics.items()
            if not name.startswith("last_") and np.isfinite(value)
        ],
        "recipe": "recipe.toml",
        "train_command": record["command"],
        "seeds": (config.seed,),
        "hardware": run_facts(record).get("hardware"),
        "duration": f"{result.seconds / 60:.1f} minutes",
        "commit": record["commit"],
        "versions": record["versions"],
        "labels": list(getattr(model, "labels", None) or ()),
        "license": "apache-2.0",
    }


def method_name(config: SarConfig) -> str:
    """``ViT + SAR``, ``MoCo-v3``, ...: the training, and whether block and loss are SAR's.

    Example:
        >>> method_name(SarConfig()), method_name(SarConfig(msa_skip=True, mlp_norm=True, entropy_weight=0))
        ('ViT + SAR', 'ViT')
        >>> method_name(SarConfig(entropy_weight=0)), method_name(SarConfig(msa_skip=True, mlp_norm=True))
        ('ViT, last block of SAR', 'ViT + spatial entropy')
    """
    name = _METHODS[config.scenario]
    if config.start is not None or config.scenario in ("probe", "segmentation"):
        block = False  # the block is that of the weights
    else:
        block = (config.msa_skip, config.mlp_norm, config.mlp_skip) == (False, False, True)
    loss = config.entropy_weight > 0 and config.scenario not in ("probe", "segmentation")
    if loss:
        other = "spatial entropy" if config.regulariser == "entropy" else "total variation"
        return f"{name} + {'SAR' if block and config.regulariser == 'entropy' else other}"
    return f"{name}, last block of SAR" if block else name


def _summary(config: SarConfig, data: ImageData, result: TrainResult) -> str:
    size = "a stream" if data.streaming else f"{len(data)} images"
    chosen = "the last epoch"
    if result.best is not None:
        chosen = f"epoch {result.best['epoch']}, chosen by {result.best['metric']} on {config.select_on}"
    return f"{config.backbone}, {size} of split {data.split}; weights of {chosen}."


def _result_rows(name: str, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    chosen = {key: value for key, value in metrics.items() if not key.startswith("last_")}
    last = {key.removeprefix("last_"): value for key, value in metrics.items() if key.startswith("last_")}
    rows = [{"": f"{name}, chosen epoch" if last else name} | shown(chosen)]
    return rows + ([{"": f"{name}, last epoch"} | shown(last)] if last else [])


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """One epoch's record with only what is worth a curve."""
    names = ("top1", "jaccard", "spatial_entropy", "mean_iou", "knn")
    # A training loss has parts of these names: the validation's are told apart.
    metrics = {
        f"{title_of(name)}, validation": line["metrics"][name]
        for name in names
        if name in line.get("metrics", {})
    }
    return {
        key: value for key, value in line.items() if key not in ("kind", "metrics", "seconds", "step")
    } | metrics


# --- Evaluations -----------------------------------------------------------------------------------------------------


def write_evaluation_report(
    path: Path, model: SARViT, data: ImageData, evaluation: Evaluation, *, mass: float = 0.6
) -> Path:
    """Write the report of the ``evaluate`` verb.

    Args:
        path: the file.
        model: what was measured.
        data: on what.
        evaluation: with what result.
        mass: share of the attention's mass that makes a mask.

    Returns:
        The path.
    """
    counted = evaluation.to_json()["images"]
    report = Report(
        title=f"{model.arch} on {data.name}",
        summary=f"{counted} images of split {data.split}. Last block: "
        + ", ".join(f"{name} {'on' if value else 'off'}" for name, value in model.switches.items())
        + ".",
        tables=[
            Table(title="Results", rows=[shown(evaluation.metrics())], note=_NOTE),
            *_head_tables(evaluation),
        ],
        galleries=[] if data.streaming else attention_galleries(model, data, evaluation, mass),
        facts=run_facts(run_record(packages=("sar-vit",))),
        lists={"Left out": evaluation.notes} if evaluation.notes else {},
    )
    return write_report(path, report)


def write_corruption_report(path: Path, model: SARViT, evaluation: CorruptionEvaluation) -> Path:
    """Write the report of all of ImageNet-C: errors by corruption and severity, and mCE.

    Returns:
        The path.
    """
    mean = np.array(list(evaluation.table().values())).mean(axis=0)
    report = Report(
        title=f"{model.arch} on ImageNet-C",
        summary=f"mCE {evaluation.metrics()['mce']:.1f} % (AlexNet 100 %; less is better).",
        tables=[
            Table(
                title="Errors",
                rows=evaluation.rows(),
                note="Top-1 error in percent by severity; CE is their mean as a share of AlexNet's.",
            )
        ],
        plots={
            "error by severity": line_plot(
                list(range(1, len(mean) + 1)), {"mean error, %": (100 * mean).tolist()}, x_label="severity"
            )
        },
        facts=run_facts(run_record(packages=("sar-vit",))),
    )
    return write_report(path, report)


def attention_galleries(
    model: SARViT, data: ImageData, evaluation: Evaluation, mass: float = 0.6, each: int = 8
) -> list[Gallery]:
    """Masks of the heads of the last block in the best, the worst and some random images.

    Args:
        model: what was measured.
        data: the images; those that ``evaluation`` has rows of.
        evaluation: its Jaccard, or else its entropy, ranks them.
        mass: share of the attention's mass that makes a mask.
        each: images a gallery.
    """
    by, scores = evaluation.scores()
    titles = (
        {"best": "Best cases", "worst": "Worst cases", "random": "Random cases"}
        if by == "Jaccard"
        else {"best": "Lowest entropy", "worst": "Highest entropy", "random": "Random images"}
    )
    galleries: list[Gallery] = []
    for group, indices in select_cases(scores, each).items():
        if indices:
            galleries.append(
                Gallery(title=titles[group], tiles=_tiles(model, data, indices, by, scores, mass))
            )
    if galleries:
        photo, number = (
            ("Photo", "mean entropy, nats") if by == "entropy" else ("Photo and objects", "Jaccard, percent")
        )
        note = (
            f"{photo}; mean attention of the heads; of each head the patches with {100 * mass:.0f} % of its attention. "
            f"The number is the {number}."
        )
        galleries[0] = dataclasses.replace(galleries[0], note=note)
    return galleries


@torch.inference_mode()
def _tiles(
    model: SARViT, data: ImageData, indices: Sequence[int], by: str, scores: Mapping[int, float], mass: float
) -> list[Tile]:
    transform, weight = eval_transform(model.preprocessing), next(model.parameters())
    tiles: list[Tile] = []
    for index in indices:
        sample = data[index]
        image = transform(sample.image)[None].to(weight.device, weight.dtype)
        logits, maps = model.attention_maps(image)
        attention = maps[0].double().cpu().numpy()
        seen = sample.image.crop(model.preprocessing.seen_rectangle(*sample.image.size))
        badge = f"{100 * scores[index]:.0f} %" if by == "Jaccard" else f"E {-scores[index]:.2f}"
        pictures = [
            _with_outline(sample),
            attention_picture(seen, attention.mean(axis=0)),
            head_sheet(seen, attention, mass),
        ]
        tiles.append(Tile(pictures=pictures, caption=_caption(model, data, sample, logits[0]), badge=badge))
    return tiles


def _caption(model: SARViT, data: ImageData, sample: Sample, logits: torch.Tensor) -> str:
    if len(data.labels) < 2:
        return sample.image_id
    true = data.labels[sample.label]
    if len(model.labels) != len(logits) or model.labels != data.labels:
        return true
    predicted = int(logits.argmax())
    probability = 100 * float(logits.softmax(dim=0)[predicted])
    return (
        true
        if predicted == sample.label
        else f"{true}\nnamed {model.labels[predicted]} ({probability:.0f} %)"
    )


def _with_outline(sample: Sample) -> Any:
    """The photo, its objects lit where they are known."""
    mask = sample.mask
    if mask is None and sample.segmentation is not None:
        mask = (sample.segmentation > 0) & (sample.segmentation < 255)
    if mask is None or not mask.any():
        return sample.image
    photo = for_display(sample.image, (THUMBNAIL, THUMBNAIL))
    return binary_mask_overlay(
        photo, resize_mask(mask, (photo.height, photo.width)), opacity=0.15, longest_side=None
    )


def _head_tables(evaluation: Evaluation, note: str = "") -> list[Table]:
    rows = [{"head": str(i)} | shown(head) for i, head in enumerate(evaluation.heads(), start=1)]
    return [Table(title="Heads of the last block", rows=rows, note=note)] if rows else []
