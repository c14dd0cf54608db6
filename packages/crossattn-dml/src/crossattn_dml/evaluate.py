"""Embed a data set and measure how its images find each other: Recall@k, mAP@R, R-Precision, NMI; query and gallery."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from attnmap_core import cli
from attnmap_core.backbones import evaluating
from attnmap_core.data.loaders import eval_loader, gather_samples, samples_of
from attnmap_core.data.sources import ImageData, check_data_options, load_data
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.experiments import format_table
from attnmap_core.files import new_output_folder, write_json
from attnmap_core.metrics import retrieval
from numpy.typing import NDArray
from torch.nn import functional
from tqdm import tqdm

from .model import EmbeddingModel
from .zero_shot import ClassSplit, load_zero_shot

TIES_WARNING = 0.0005
"""Bounds of a metric further apart than this, a fraction, tell of embeddings that collapsed or were quantised."""


class EmbeddedData(NamedTuple):
    """What a model says of a data set.

    Attributes:
        z: ``(n, d)`` float32 of length 1, in the order of the images.
        labels: ``(n,)`` classes.
    """

    z: NDArray[np.float32]
    labels: NDArray[np.int64]


@torch.no_grad()
def embed_data(
    model: EmbeddingModel,
    data: ImageData,
    *,
    accelerator: Any = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> EmbeddedData:
    """Embeddings of all images, in evaluation mode.

    Args:
        model: on its device; its mode is untouched.
        data: the images.
        accelerator: for several processes; each takes whole batches, and all get the whole result.
        batch_size, workers: of the loader.
        progress: show a bar on the main process.

    Raises:
        InputError: for embeddings that are not finite.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
        >>> model = EmbeddingModel("vit", embedding_dim=6, img_size=32, backbone_options=tiny)
        >>> data = load_data("synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,test=5", "test")
        >>> embed_data(model, data, progress=False).z.shape
        (5, 6)
    """
    processes, process = (
        (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    )
    samples = samples_of(data, eval_transform(model.preprocessing), seed=0)
    loader = eval_loader(samples, batch_size, processes=processes, process=process, workers=workers)
    weight = model.head.weight
    parts: list[tuple[NDArray[Any], ...]] = []
    with evaluating(model):
        for batch in tqdm(
            loader,
            total=None if data.streaming else -(-len(data) // (batch_size * processes)),
            desc=f"embed {data.split}",
            leave=False,
            disable=None if progress and not process else True,
        ):
            u = model(batch["images"].to(weight.device, weight.dtype)).embeddings
            z = functional.normalize(u.to(torch.promote_types(u.dtype, torch.float32)), dim=1, eps=1e-12)
            parts.append((batch["index"].numpy(), z.float().cpu().numpy(), batch["labels"].numpy()))
    names = ("index", "z", "labels")
    mine: dict[str, NDArray[Any]] = {}
    if parts:
        mine = dict(zip(names, map(np.concatenate, zip(*parts))))
    rows = gather_samples(accelerator, mine)
    if not np.isfinite(rows["z"]).all():
        raise InputError(
            f"{data.name}: embeddings that are not finite, expected numbers; the weights are damaged or overflowed in "
            "training, load others or lower --lr"
        )
    return EmbeddedData(rows["z"], rows["labels"])


def measure(
    query: EmbeddedData,
    gallery: EmbeddedData | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    nmi_seeds: int = 0,
    ties: Literal["index", "bounds"] = "index",
    exclude_lone: bool = False,
    full: bool = False,
) -> dict[str, float]:
    """All metrics, as fractions.

    Args:
        query: of the queries.
        gallery: what they search in; by default the queries, each left out of its own result.
        ks: of Recall@k.
        nmi_seeds: k-means runs, of the gallery and the queries together, behind ``nmi`` and ``nmi_std``; 0 for none.
        ties: ``"bounds"`` adds what ties could do: metrics with ``_optimistic`` and ``_pessimistic`` after their names.
        exclude_lone, full: see :func:`attnmap_core.metrics.retrieval_metrics`.

    Raises:
        InputError: as there, and by name for a ``k`` larger than the gallery.

    Example:
        >>> z = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], np.float32)
        >>> found = measure(EmbeddedData(z, np.array([0, 0, 1, 1])), ks=(1,), nmi_seeds=2)
        >>> found["recall@1"], found["nmi"]
        (1.0, 1.0)
    """
    given: dict[str, Any] = {"ks": tuple(ks), "exclude_lone": exclude_lone, "full": full}
    if gallery is not None:
        given |= {"gallery": gallery.z, "gallery_labels": gallery.labels}
    found = retrieval.retrieval_metrics(query.z, query.labels, **given)
    if ties == "bounds":
        for policy in ("optimistic", "pessimistic"):
            bound = retrieval.retrieval_metrics(query.z, query.labels, ties=policy, **given)
            found |= {f"{name}_{policy}": value for name, value in bound.items()}
    if nmi_seeds:
        z = query.z if gallery is None else np.concatenate([query.z, gallery.z])
        labels = query.labels if gallery is None else np.concatenate([query.labels, gallery.labels])
        classes = len(np.unique(labels))
        values = [
            retrieval.nmi(labels, retrieval.kmeans(z, classes, seed=seed).clusters)
            for seed in range(nmi_seeds)
        ]
        found |= {
            "nmi": float(np.mean(values)),
            "nmi_std": float(np.std(values, ddof=1)) if nmi_seeds > 1 else 0.0,
        }
    return found


def evaluate_model(
    model: EmbeddingModel,
    query: ImageData,
    gallery: ImageData | None = None,
    *,
    accelerator: Any = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
    **options: Any,
) -> dict[str, float]:
    """:func:`embed_data` and :func:`measure` in one.

    Args:
        model, accelerator, batch_size, workers, progress: of :func:`embed_data`.
        query, gallery: images.
        **options: of :func:`measure`.

    Returns:
        Metrics by name, fractions.
    """
    walk: dict[str, Any] = {
        "accelerator": accelerator,
        "batch_size": batch_size,
        "workers": workers,
        "progress": progress,
    }
    searched = None if gallery is None else embed_data(model, gallery, **walk)
    return measure(embed_data(model, query, **walk), searched, **options)


def percent(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metrics by their titles in percent with two decimals, as the field prints them.

    Example:
        >>> percent({"recall@1": 0.70123, "map_at_r": 0.25, "nmi": 0.5, "nmi_std": 0.01})
        {'R@1': '70.12', 'mAP@R': '25.00', 'NMI': '50.00 ± 1.00'}
    """
    texts: dict[str, str] = {}
    for name, value in metrics.items():
        if not name.endswith("nmi_std"):
            spread = metrics.get(f"{name}_std") if name.endswith("nmi") else None
            texts[title_of(name)] = f"{100 * value:.2f}" + (
                f" ± {100 * spread:.2f}" if spread is not None else ""
            )
    return texts


_TITLES = {
    "r_precision": "R-Precision",
    "map_at_r": "mAP@R",
    "map": "mAP",
    "mrr": "MRR",
    "map_c": "mAP_c",
    "nmi": "NMI",
}


def title_of(name: str) -> str:
    """Title of a metric, also of ``last_<metric>`` and the bounds of ties.

    Example:
        >>> title_of("last_recall@10"), title_of("map_at_r_optimistic")
        ('last R@10', 'mAP@R optimistic')
    """
    last = "last " if name.startswith("last_") else ""
    bare = name.removeprefix("last_")
    end = next((end for end in ("_optimistic", "_pessimistic") if bare.endswith(end)), "")
    bare = bare.removesuffix(end)
    title = f"R@{bare.removeprefix('recall@')}" if bare.startswith("recall@") else _TITLES.get(bare, bare)
    return last + title + end.replace("_", " ")


def ties_matter(metrics: Mapping[str, float]) -> bool:
    """Whether the bounds of ties differ by more than :data:`TIES_WARNING` for some metric.

    Example:
        >>> ties_matter({"recall@1_optimistic": 0.7, "recall@1_pessimistic": 0.6})
        True
    """
    ends = ("_optimistic", "_pessimistic")
    names = [name.removesuffix(ends[0]) for name in metrics if name.endswith(ends[0])]
    return any(metrics[name + ends[0]] - metrics[name + ends[1]] > TIES_WARNING for name in names)


# --- For people ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure a model on images of classes; writes metrics.json and report.html where ``out`` is given."""

    model: tyro.conf.Positional[str]
    """Model folder, run folder or Hub id."""
    data: str = "synthetic:unseen=4"
    """Data source; ``crossattn-dml list`` shows what it may be."""
    data_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Options of the data source, such as split_file."""
    skip_unreadable: bool = False
    """List and leave out photos that cannot be read."""
    class_split: ClassSplit | None = None
    """Take the classes that a training with this split has not seen; by default all of the split."""
    train_share: float = 0.5
    """Of class_split first and random."""
    split_seed: int = 0
    """Of class_split random."""
    split: str = "test"
    """Split that is searched with."""
    gallery_split: str | None = None
    """Split that is searched in, such as gallery of In-Shop with --split query; the queries where none."""
    ks: tuple[int, ...] = (1, 2, 4, 8)
    """Of Recall@k."""
    nmi_seeds: int = 5
    """k-means runs behind NMI; 0 leaves it out."""
    ties: Literal["index", "bounds"] = "index"
    """``bounds`` also prints what equal similarities could do at best and at worst."""
    exclude_lone: bool = False
    """Leave queries without any other image of their class out of Recall@k."""
    rerank: int = 0
    """Also order the first so many of each result anew with the run's stack, a line of its own; 100 is usual."""
    rerank_weight: float = 0.5
    """Share of the conditional similarity in the score of --rerank."""
    batch_size: int = 64
    """Images a forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    out: Path | None = None
    """Folder for metrics.json and report.html."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def evaluate_command(arguments: list[str]) -> None:
    """``crossattn-dml evaluate MODEL --data ... [--rerank 100] [--out FOLDER]``."""
    options = cli.parse(EvaluateOptions, arguments, command="crossattn-dml evaluate")
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: expected at least 1")
    folder = cli.resolve_model(options.model)
    model = EmbeddingModel.from_pretrained(folder).to(cli.choose_device(options.device)).eval()
    query, gallery = _load(options)
    if options.out is not None:
        new_output_folder(options.out, overwrite=options.overwrite)
    walk: dict[str, Any] = {"batch_size": options.batch_size, "workers": options.workers}
    found = embed_data(model, query, **walk)
    searched = None if gallery is None else embed_data(model, gallery, **walk)
    asked: dict[str, Any] = {"ks": options.ks, "exclude_lone": options.exclude_lone}
    rows = {"embedding": measure(found, searched, nmi_seeds=options.nmi_seeds, ties=options.ties, **asked)}
    if options.rerank:
        from .rerank import rerank_data

        rows[f"re-ranked {options.rerank}"] = rerank_data(
            model, folder, query, gallery, count=options.rerank, weight=options.rerank_weight, **walk, **asked
        )
    name = f"{query.name}, {query.split}" + (f" in {gallery.split}" if gallery is not None else "")
    shown = {title: values for row, found in rows.items() for title, values in _apart(row, found).items()}
    table = format_table([{"": title} | percent(values) for title, values in shown.items()])
    classes = len(np.unique(query.targets))
    notes = ["Equal similarities decide more than 0.05 points: collapsed or quantised embeddings."]
    notes = notes if ties_matter(rows["embedding"]) else []
    sys.stdout.write("\n".join([f"{name}, {len(query)} images, {classes} classes", table, *notes]) + "\n")
    if options.out is not None:
        from .report import write_evaluation_report

        write_json(options.out / "metrics.json", {"data": query.name, "split": query.split, "metrics": rows})
        report = write_evaluation_report(
            options.out / "report.html", model, query, gallery, found, searched, rows
        )
        sys.stdout.write(f"\n{report}\n")


def _apart(row: str, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """A line of metrics, and one for each bound of ties where they have some."""
    ends = {"": row, "_optimistic": "ties at best", "_pessimistic": "ties at worst"}
    lines: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        end = next((end for end in ends if end and name.endswith(end)), "")
        lines.setdefault(ends[end], {})[name.removesuffix(end)] = value
    return lines


def _load(options: EvaluateOptions) -> tuple[ImageData, ImageData | None]:
    source: dict[str, Any] = {**options.data_options}
    source |= {"skip_unreadable": True} if options.skip_unreadable else {}
    check_data_options(source)
    if source.get("streaming"):
        raise InputError(f"{options.data}: a stream cannot be searched in; load it without streaming")
    if options.class_split is not None:
        data = load_zero_shot(
            options.data,
            source,
            class_split=options.class_split,
            train_share=options.train_share,
            split_seed=options.split_seed,
            query_split=options.split,
            gallery_split=options.gallery_split,
        )
        return data.query, data.gallery
    gallery = options.gallery_split
    query = load_data(options.data, options.split, **source)
    return query, None if gallery is None else load_data(options.data, gallery, **source)


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
