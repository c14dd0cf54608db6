"""What runs and evaluations leave for people: the model folder with its card, metrics.json and report.html."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attnmap_core.data.sources import ImageData
from attnmap_core.files import atomic_folder, read_json, write_json
from attnmap_core.model_card import Metric, write_card
from attnmap_core.pictures import training_panels
from attnmap_core.recipes import run_record
from attnmap_core.report import Report, Table, run_facts, write_report
from attnmap_core.training import TrainResult

from .config import DmlConfig
from .evaluate import EmbeddedData, percent, title_of
from .model import EmbeddingModel
from .published import published_rows
from .sheets import neighbour_galleries
from .zero_shot import ZeroShotData

_NOTE = (
    "Percent, on classes that training has not seen. R@k: share of queries with a photo of their class among their k "
    "nearest; mAP@R also counts the order of all photos of the class; NMI: of k-means with as many clusters as classes."
)


def write_run(
    run: Path,
    config: DmlConfig,
    chosen: Path,
    data: ZeroShotData,
    embedded: tuple[EmbeddedData, EmbeddedData | None],
    metrics: Mapping[str, float],
    result: TrainResult,
) -> None:
    """Write ``model/`` (ready for the Hub), ``metrics.json`` and ``report.html`` into a run folder.

    Args:
        run: the folder, which holds ``run.json``.
        config: of the run.
        chosen: model folder of the weights to keep.
        data: its classes.
        embedded: what these weights say of queries and gallery.
        metrics: fractions by name; what begins with ``last_`` is of the last epoch instead of the chosen one.
        result: of the training loop.

    Raises:
        InputError: if the folder has no ``run.json`` or cannot be written.
    """
    record = read_json(run / "run.json")
    with atomic_folder(run / "model") as folder:
        shutil.copytree(chosen, folder, dirs_exist_ok=True)
        write_card(folder, card_facts(config, data, metrics, record, result))
    write_json(
        run / "metrics.json",
        {
            "data": data.query.name,
            "classes": {"train": len(data.train.labels), "test": len(data.query.labels)},
            "images": {"train": len(data.train), "test": len(data.query)},
            "method": method_name(config),
            "selection": selection(config),
            "chosen": result.best,
            "metrics": dict(metrics),
        },
    )
    epochs = [_flat(line) for line in result.history if line["kind"] == "epoch"]
    own = {name: value for name, value in metrics.items() if not name.startswith("last_")}
    last = {name.removeprefix("last_"): value for name, value in metrics.items() if name.startswith("last_")}
    rows = [{"": f"{method_name(config)}, {'chosen' if last else 'last'} epoch"} | percent(own)]
    rows += [{"": f"{method_name(config)}, last epoch"} | percent(last)] if last else []
    published = published_rows(config.data)
    report = Report(
        title=f"{method_name(config)} on {data.query.name}",
        summary=f"{config.backbone}, {config.embedding_dim} channels; learnt from {len(data.train)} images of "
        f"{len(data.train.labels)} classes, searched among {len(data.gallery or data.query)} of "
        f"{len(data.query.labels)} others. {selection(config)}.",
        tables=[Table(title="Results", rows=rows, note=_NOTE)]
        + ([Table(title="Published, for scale", rows=published)] if published else []),
        plots=training_panels(epochs) if epochs else {},
        galleries=neighbour_galleries(data.query, data.gallery, *embedded),
        facts=run_facts(record),
    )
    write_report(run / "report.html", report)


def write_evaluation_report(
    path: Path,
    model: EmbeddingModel,
    query: ImageData,
    gallery: ImageData | None,
    found: EmbeddedData,
    searched: EmbeddedData | None,
    rows: Mapping[str, Mapping[str, float]],
) -> Path:
    """Write the report of the ``evaluate`` verb.

    Args:
        path: the file.
        model: what was measured.
        query, gallery: on what.
        found, searched: with which embeddings.
        rows: metrics by the name of the row.

    Returns:
        The path.
    """
    report = Report(
        title=f"{type(model).__name__} on {query.name}",
        summary=f"{len(query)} images of split {query.split}, {len(np.unique(query.targets))} classes"
        + (f", searching in {len(gallery)} of split {gallery.split}." if gallery is not None else "."),
        tables=[
            Table(title="Results", rows=[{"": name} | percent(row) for name, row in rows.items()], note=_NOTE)
        ],
        galleries=neighbour_galleries(query, gallery, found, searched),
        facts=run_facts(run_record(packages=("crossattn-dml",))),
    )
    return write_report(path, report)


def card_facts(
    config: DmlConfig,
    data: ZeroShotData,
    metrics: Mapping[str, float],
    record: Mapping[str, Any],
    result: TrainResult,
) -> dict[str, Any]:
    """What the run knows, for the model card."""
    return {
        "model_class": "EmbeddingModel",
        "package": "crossattn_dml",
        "repo_id": str(Path(config.output_dir) / "model"),
        "title": f"{method_name(config)}, {config.backbone}",
        "summary": "Photos to vectors, near where photos show the same kind of thing, also of classes never seen.",
        "limits": f"Learnt from {len(data.train.labels)} classes; how far it carries, only a test tells.",
        "pipeline_tag": "image-feature-extraction",
        "tags": ("metric-learning", "image-retrieval"),
        "paper": "https://doi.org/10.1109/CVPR52729.2023.01065",
        "metrics": [
            Metric(
                name=title_of(name),
                value=100 * value,
                data=data.query.name,
                split=f"{data.query.split}, unseen classes",
                seeds=(config.seed,),
            )
            for name, value in metrics.items()
            if not name.startswith("last_") and not name.endswith("_std")
        ],
        "recipe": "recipe.toml",
        "train_command": record["command"],
        "seeds": (config.seed,),
        "hardware": run_facts(record).get("hardware"),
        "duration": f"{result.seconds / 60:.1f} minutes",
        "commit": record["commit"],
        "versions": record["versions"],
        "labels": [],
        "license": "apache-2.0",
    }


def method_name(config: DmlConfig) -> str:
    """``Multi-similarity + cross-attention (mutual, N = 6)``, or the loss alone for the baseline.

    Example:
        >>> method_name(DmlConfig(stack=False)), method_name(DmlConfig(blocks=1, similarity="target"))
        ('Multi-similarity', 'Multi-similarity + cross-attention (mutual, target, N = 1)')
    """
    loss = config.loss.replace("_", "-").capitalize()
    if not config.stack:
        return loss
    form = dict.fromkeys((config.hierarchy, config.similarity))
    return f"{loss} + cross-attention ({', '.join(form)}, N = {config.blocks})"


def selection(config: DmlConfig) -> str:
    """Which epoch the numbers are of, in words."""
    return {
        "last": "Numbers of the last epoch",
        "val": f"Epoch chosen on {100 * config.val_share:g} % of the training classes, held out",
        "test": "Epoch chosen on the classes it is reported on, as papers do: optimistic",
    }[config.select_on]


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """One epoch's record with only what is worth a curve."""
    shown = {
        f"{title_of(name)}, validation, %": 100 * value
        for name, value in (line.get("metrics") or {}).items()
        if name in ("map_at_r", "recall@1") and value is not None
    }
    return {
        key: value for key, value in line.items() if key not in ("kind", "metrics", "seconds", "step")
    } | shown
