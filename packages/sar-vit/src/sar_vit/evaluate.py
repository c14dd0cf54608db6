"""Evaluate SAR models: accuracy, spatial entropy of the attention, its overlap with objects, robustness."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from attnmap_core import cli
from attnmap_core.backbones import evaluating
from attnmap_core.data.images import resize_mask
from attnmap_core.data.loaders import eval_loader, gather_samples, samples_of
from attnmap_core.data.sources import ImageData, check_data_options, load_data
from attnmap_core.data.transforms import (
    Preprocessing,
    eval_transform,
    resample_segmentation,
)
from attnmap_core.errors import InputError
from attnmap_core.experiments import format_table
from attnmap_core.files import new_output_folder, read_json, write_json
from attnmap_core.metrics.classification import class_ranks
from attnmap_core.metrics.robustness import CORRUPTIONS, SEVERITIES, corruption_errors, mce
from attnmap_core.metrics.segmentation import VOID, jaccard_best_head
from numpy.typing import NDArray
from tqdm import tqdm

from .checkpoints import read_source
from .entropy import Query, entropy_and_counts
from .imagenet_a import IMAGENET_A
from .model import SARViT

Rows = dict[str, NDArray[Any]]
PROTOCOLS = ("standard", "imagenet-a", "voc-jaccard")
METRIC_NAMES = {
    "top1": "Top-1",
    "top5": "Top-5",
    "imagenet_a": "ImageNet-A",
    "mce": "mCE",
    "knn": "k-NN",
    "jaccard": "Jaccard",
    "spatial_entropy": "Entropy (nats)",
    "components": "Components",
    "foreground": "Foreground",
}
"""Titles of the metrics; all but entropy and components are percent."""
DIGITS = {"spatial_entropy": 3, "components": 2}
"""Decimals of a metric, where they are not one."""


@dataclass(kw_only=True)
class Evaluation:
    """What was measured on one split.

    Attributes:
        data, split: what it was measured on.
        rows: a value, or one of each head, for each image in order: ``index``, and of ``rank`` (place of the true
            class), ``rank_a`` (the same among the classes of ImageNet-A), ``entropy``, ``components``, ``foreground``
            (share of the patches) and ``jaccard`` (NaN without objects) those that were measured.
        notes: what was left out, and why.
    """

    data: str
    split: str
    rows: Rows
    notes: list[str] = field(default_factory=list[str])

    def metrics(self) -> dict[str, float]:
        """Means over images and heads, by the names of :data:`METRIC_NAMES`; what was not measured is not there."""
        found: dict[str, float] = {}
        if "rank" in self.rows:
            found |= {f"top{k}": _percent(self.rows["rank"] < k) for k in (1, 5)}
        if "rank_a" in self.rows:
            found["imagenet_a"] = _percent(self.rows["rank_a"] < 1)
        scores = self._jaccard()
        if len(scores):
            found["jaccard"] = _percent(scores)
        if "entropy" in self.rows:
            found["spatial_entropy"] = float(self.rows["entropy"].mean())
            found["components"] = float(self.rows["components"].mean())
            found["foreground"] = _percent(self.rows["foreground"])
        return found

    def heads(self) -> list[dict[str, float]]:
        """Entropy, components and foreground of each head of the last block, means over images."""
        if "entropy" not in self.rows:
            return []
        columns = {
            "spatial_entropy": self.rows["entropy"].mean(axis=0),
            "components": self.rows["components"].mean(axis=0),
            "foreground": 100 * self.rows["foreground"].mean(axis=0),
        }
        return [
            {name: float(values[head]) for name, values in columns.items()}
            for head in range(self.rows["entropy"].shape[1])
        ]

    def scores(self) -> tuple[str, dict[int, float]]:
        """What ranks the images, and its value by image, larger is better: Jaccard, or else minus the mean entropy."""
        if len(self._jaccard()):
            return "Jaccard", dict(zip(self.rows["index"].tolist(), self.rows["jaccard"].tolist()))
        if "entropy" in self.rows:
            means = -self.rows["entropy"].mean(axis=1)
            return "entropy", dict(zip(self.rows["index"].tolist(), means.tolist()))
        return "", {}

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        counts: dict[str, Any] = {"images": len(self.rows.get("index", ()))}
        if "jaccard" in self.rows:
            counts["images_with_objects"] = len(self._jaccard())
        found: dict[str, Any] = {"data": self.data, "split": self.split, **counts, "metrics": self.metrics()}
        return found | ({"heads": self.heads()} if self.heads() else {}) | {"notes": self.notes}

    def _jaccard(self) -> NDArray[np.float64]:
        values = self.rows.get("jaccard", np.zeros(0))
        return values[~np.isnan(values)]


def _percent(shares: NDArray[Any]) -> float:
    return float(100.0 * shares.mean())


@torch.inference_mode()
def evaluate_model(
    model: SARViT,
    data: ImageData,
    *,
    accelerator: Any = None,
    protocols: Sequence[str] = ("standard",),
    batch_size: int = 64,
    workers: int = 0,
    jaccard_mass: float = 0.6,
    jaccard_size: int = 480,
    exclude_void: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Run a model over images and measure its classes and its last block's attention.

    ============== ==================================================================================================
    protocol       what it measures
    ============== ==================================================================================================
    standard       accuracy where the model's classes are the data's; entropy, components and foreground of the
                   similarity maps; Jaccard with object masks at the model's own input, with class maps as below
    imagenet-a     as standard, and the accuracy among the 200 classes of ImageNet-A
    voc-jaccard    Jaccard with class maps alone: whole photos at 480x480 pixels, the attention's largest patches
                   with 60 % of its mass, the best head of each class in hindsight
    ============== ==================================================================================================

    Args:
        model: on its device; its mode does not matter.
        data: images; labels, masks and class maps where there are some.
        accelerator: for several processes; each takes whole batches, and all get the whole result.
        protocols: any of the above.
        batch_size, workers: of the loader.
        jaccard_mass: share of the attention's mass that makes a mask, in (0, 1].
        jaccard_size: side in pixels of images with class maps.
        exclude_void: leave void pixels out; by default they are background, as in the released evaluation.
        progress: show a bar on the main process.

    Returns:
        A few numbers of each image; nothing holds the images.

    Raises:
        InputError: for an unknown protocol, data or a model that do not fit it, or a model whose values are not
            finite.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
        >>> model = SARViT("vit", num_classes=4, img_size=32, backbone_options=tiny)
        >>> data = load_data("synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,test=4", "test")
        >>> list(evaluate_model(model, data, progress=False).metrics())
        ['top1', 'top5', 'jaccard', 'spatial_entropy', 'components', 'foreground']

    References:
        Naseer et al., "Intriguing Properties of Vision Transformers", NeurIPS 2021 (Jaccard); Hendrycks et al.,
        "Natural Adversarial Examples", CVPR 2021 (ImageNet-A).
    """
    if unknown := sorted(set(protocols) - set(PROTOCOLS)):
        raise InputError(f"protocol {unknown[0]}: unknown; expected {', '.join(PROTOCOLS)}")
    if not 0 < jaccard_mass <= 1:
        raise InputError(f"jaccard_mass {jaccard_mass}: expected a share above 0, up to 1; 0.6 is usual")
    if "imagenet-a" in protocols:
        _check_imagenet_a(model, data)
    objects = data.segmentation is not None and data.segmentation.labels[0] == "background"
    if "voc-jaccard" in protocols and not objects:
        raise InputError(
            f"{data.name}: no class maps with a background, which voc-jaccard needs; give voc-segmentation:PATH"
        )
    notes: list[str] = []
    reason = _classes_differ(model, data)
    if reason is not None and "imagenet-a" not in protocols and "standard" in protocols:
        notes.append(f"no accuracy: {reason}")

    if data.segmentation is not None and not objects:
        notes.append(f"no Jaccard: the class maps of {data.name} know no background")

    def overlap(network: SARViT, attention: torch.Tensor, targets: NDArray[np.uint8]) -> NDArray[np.float64]:
        rows = attention.double().flatten(2).cpu().numpy()
        grid = (attention.shape[2], attention.shape[3])
        found = jaccard_best_head(rows, targets, jaccard_mass, exclude_void=exclude_void, grid=grid)
        return np.asarray(found)

    def standard(batch: dict[str, Any]) -> Rows:
        logits, S, attention = _read(model, batch["images"])
        found = entropy_and_counts(S)
        rows: Rows = {
            "entropy": found.values.double().cpu().numpy(),
            "components": found.components.cpu().numpy(),
            "foreground": found.foreground.cpu().numpy() / (S.shape[-2] * S.shape[-1]),
        }
        labels = batch["labels"].numpy()
        if reason is None:
            rows["rank"] = class_ranks(logits, labels)
        if "imagenet-a" in protocols:
            rows["rank_a"] = class_ranks(logits[:, IMAGENET_A], labels)
        if data.segmentation is None:
            targets = [_object_map(batch, i, model.preprocessing) for i in range(len(labels))]
            rows["jaccard"] = overlap(model, attention, np.stack(targets))
        return rows

    def with_class_maps(network: SARViT) -> Callable[[dict[str, Any]], Rows]:
        def measure(batch: dict[str, Any]) -> Rows:
            _, _, attention = _read(network, batch["images"])
            maps = [
                _resampled(batch["segmentation"][i], network.preprocessing) for i in range(len(attention))
            ]
            return {"jaccard": overlap(network, attention, np.stack(maps))}

        return measure

    walk: dict[str, Any] = {
        "accelerator": accelerator,
        "batch_size": batch_size,
        "workers": workers,
        "progress": progress,
    }
    rows: Rows = {}
    with evaluating(model):
        if {"standard", "imagenet-a"} & set(protocols):
            rows |= _walk(data, model.preprocessing, standard, **walk)
        if objects and {"standard", "voc-jaccard"} & set(protocols):
            network = model.at_size(jaccard_size)
            # The released evaluation resizes bilinearly, whatever the model was trained with.
            preprocessing = Preprocessing(
                size=network.preprocessing.size,
                mean=network.preprocessing.mean,
                std=network.preprocessing.std,
            )
            rows |= _walk(data, preprocessing, with_class_maps(network), **walk)
    if np.isnan(rows.get("jaccard", np.zeros(1))).all():
        rows.pop("jaccard", None)  # no image has objects
    return Evaluation(data=data.name, split=data.split, rows=rows, notes=notes)


def _walk(
    data: ImageData,
    preprocessing: Preprocessing,
    measure: Callable[[dict[str, Any]], Rows],
    *,
    accelerator: Any,
    batch_size: int,
    workers: int,
    progress: bool,
) -> Rows:
    """``measure`` of every batch, put together over all processes."""
    processes, process = (
        (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    )
    samples = samples_of(data, eval_transform(preprocessing), seed=0, with_targets=True)
    loader = eval_loader(samples, batch_size, processes=processes, process=process, workers=workers)
    total = None if data.streaming else -(-len(data) // (batch_size * processes))
    parts: list[Rows] = []
    for batch in tqdm(
        loader,
        total=total,
        desc=f"evaluate {data.split}",
        leave=False,
        disable=None if progress and not process else True,
    ):
        parts.append({"index": batch["index"].numpy(), **measure(batch)})
    mine = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    return gather_samples(accelerator, mine)


def _read(model: SARViT, images: torch.Tensor) -> tuple[NDArray[np.float64], torch.Tensor, torch.Tensor]:
    """Logits ``(b, c)``, similarity maps and attention maps ``(b, heads, h, w)`` of a batch."""
    weight = next(model.parameters())
    with model.collector.recording() as record:
        logits = model(images.to(weight.device, weight.dtype))
    S = model.collector.maps(record)
    if not (torch.isfinite(logits).all() and torch.isfinite(S).all()):
        raise InputError(
            f"{type(model).__name__} gives values that are not finite; its weights are damaged or overflowed in "
            "training, load others"
        )
    return logits.double().cpu().numpy(), S, model.collector.maps(record, "softmax")


def _object_map(batch: Mapping[str, Any], i: int, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Of image i, in the frame of the network's input: 1 the object, 255 what counts as nothing, 0 else."""
    mask, ignore = batch["mask"][i], batch["ignore"][i]
    if mask is None:
        return np.zeros(preprocessing.size, np.uint8)
    target = mask.astype(np.uint8)
    if ignore is not None:
        target[resize_mask(ignore, mask.shape) & ~mask] = VOID
    return _resampled(target, preprocessing, batch["size_wh"][i])


def _resampled(
    target: NDArray[np.uint8], preprocessing: Preprocessing, size_wh: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """A class map as the network sees its photo, which may be of another size than the map."""
    height, width = target.shape
    photo_width, photo_height = size_wh or (width, height)
    left, top, right, bottom = preprocessing.seen_rectangle(photo_width, photo_height)
    x, y = width / photo_width, height / photo_height
    seen = (left * x, top * y, min(right * x, width), min(bottom * y, height))
    return resample_segmentation(target, seen, preprocessing.size).numpy().astype(np.uint8)


def _classes_differ(model: SARViT, data: ImageData) -> str | None:
    """Why accuracy says nothing; None where the classes are the same."""
    classes = model.num_classes
    if len(data.labels) < 2:
        return f"{data.name} has one class"
    if classes != len(data.labels):
        return f"the model has {classes} classes, {data.name} has {len(data.labels)}"
    for place, (ours, theirs) in enumerate(zip(model.labels, data.labels)):
        if ours != theirs:
            return f"class {place} of {data.name} is {theirs!r}, the model's is {ours!r}"
    return None


def _check_imagenet_a(model: SARViT, data: ImageData) -> None:
    _check_thousand(model, data.name)
    if len(data.labels) != len(IMAGENET_A):
        raise InputError(
            f"{data.name}: {len(data.labels)} classes, ImageNet-A has {len(IMAGENET_A)}; give imagenet-a:PATH"
        )
    for label, index in enumerate(IMAGENET_A):
        if model.labels and model.labels[index] != data.labels[label]:
            raise InputError(
                f"{data.name}: class {label} is {data.labels[label]!r}, class {index} of the model is "
                f"{model.labels[index]!r}; evaluate a model of the 1000 classes of ImageNet, by sorted wnid"
            )


def _check_thousand(model: SARViT, name: str) -> None:
    if model.num_classes != 1000:
        raise InputError(
            f"{name}: needs a model of the 1000 classes of ImageNet, this one has {model.num_classes}"
        )


# --- ImageNet-C ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CorruptionEvaluation:
    """Errors under the 15 corruptions of ImageNet-C at 5 severities.

    Attributes:
        data: the folder.
        errors: top-1 error, in [0, 1], by ``corruption/severity``.
    """

    data: str
    errors: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """``mce`` in percent, less is better; AlexNet has 100."""
        return {"mce": mce(self.table())}

    def table(self) -> dict[str, list[float]]:
        """Errors by corruption, mildest first."""
        return {
            corruption: [self.errors[f"{corruption}/{severity}"] for severity in range(1, SEVERITIES + 1)]
            for corruption in CORRUPTIONS
        }

    def rows(self) -> list[dict[str, Any]]:
        """For people: errors in percent, and their share of AlexNet's (CE)."""
        shares = corruption_errors(self.table())
        return [
            {"corruption": name}
            | {str(severity): 100 * error for severity, error in enumerate(errors, start=1)}
            | {"CE": float(100 * share)}
            for (name, errors), share in zip(self.table().items(), shares)
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"data": self.data, "metrics": self.metrics(), "errors": self.table()}


def evaluate_imagenet_c(
    model: SARViT,
    root: str | Path,
    *,
    progress_file: Path | None = None,
    accelerator: Any = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> CorruptionEvaluation:
    """Top-1 error of a model under every corruption of ImageNet-C at every severity: 75 test sets.

    Photos of ImageNet-C are 224x224 already. Of a network with that input the centre is therefore neither resized
    nor cropped; another one gets them resized to cover its input.

    Args:
        model: of the 1000 classes of ImageNet.
        root: folder of the corruptions, or of ``noise``, ``blur``, ``weather`` and ``digital``.
        progress_file: JSON that keeps what is done; where it exists, the rest is done.
        accelerator, batch_size, workers, progress: as :func:`evaluate_model`.

    Raises:
        InputError: for a model of other classes, a file that another model or folder left, and parts that are missing.

    References:
        Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
        2019.
    """
    _check_thousand(model, f"imagenet-c:{root}")
    pre = model.preprocessing
    preprocessing = Preprocessing(size=pre.size, mean=pre.mean, std=pre.std, crop="center")
    key = {"root": str(Path(root).resolve()), "weights": _fingerprint(model)}
    errors = _errors_so_far(progress_file, key)
    parts = [
        f"{corruption}/{severity}" for corruption in CORRUPTIONS for severity in range(1, SEVERITIES + 1)
    ]
    main = accelerator is None or accelerator.is_main_process
    bar = tqdm(parts, desc="imagenet-c", disable=None if progress and main else True)
    for part in bar:
        bar.set_postfix_str(part)
        if part in errors:
            continue
        data = load_data(f"imagenet-c:{root}@{part}", "test", progress=False)
        if (reason := _classes_differ(model, data)) is not None:
            raise InputError(
                f"imagenet-c: {reason}; evaluate a model of the classes of ImageNet, by sorted wnid"
            )

        def rank(batch: dict[str, Any]) -> Rows:
            logits, _, _ = _read(model, batch["images"])
            return {"rank": class_ranks(logits, batch["labels"].numpy())}

        with torch.inference_mode(), evaluating(model):
            rows = _walk(
                data,
                preprocessing,
                rank,
                accelerator=accelerator,
                batch_size=batch_size,
                workers=workers,
                progress=progress,
            )
        errors[part] = float((rows["rank"] > 0).mean())
        if progress_file is not None and main:
            write_json(progress_file, {**key, "errors": errors})
    return CorruptionEvaluation(data=f"imagenet-c:{Path(root).resolve().name}", errors=errors)


def _errors_so_far(path: Path | None, key: Mapping[str, str]) -> dict[str, float]:
    if path is None or not path.exists():
        return {}
    found: Any = read_json(path)
    for name, value in key.items():
        if not isinstance(found, dict) or found.get(name) != value:
            raise InputError(f"{path}: of another {name}; pass --overwrite, or choose another --out")
    return dict(found["errors"])


def _fingerprint(model: SARViT) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(model.preprocessing.to_dict()).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


# --- Models by name --------------------------------------------------------------------------------------------------


def open_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    query: Query = "cls",
    image_size: int | None = None,
) -> SARViT:
    """A model to look at: one of this package, or any of timm, whose last block is left as it is.

    Args:
        name: model folder, run folder or Hub id; or ``timm:NAME``.
        pretrained: download timm's weights.
        weights: local file of weights instead, by timm's names.
        query: for a timm network without class token, ``"avg"``.
        image_size: side of the input in pixels; what the model is made for where None.

    Returns:
        In evaluation mode. A timm model crops photos as its weights expect, and has the wnids of ImageNet as labels
        where it has these classes.

    Raises:
        InputError: if there is no such model, it is of another class, or a timm model is named without weights.

    Example:
        >>> open_model("timm:vit_tiny_patch16_224")
        Traceback (most recent call last):
        attnmap_core.errors.InputError: timm:vit_tiny_patch16_224: no weights; pass --pretrained or --weights FILE
    """
    architecture = name.removeprefix("timm:")
    if architecture == name:
        if pretrained or weights is not None:
            raise InputError(f"{name}: has weights of its own; --pretrained and --weights are for timm:NAME")
        model = SARViT.from_pretrained(cli.resolve_model(name))
        return model if image_size is None else model.at_size(image_size)
    if pretrained == (weights is not None):
        problem = (
            "give --pretrained or --weights, not both" if pretrained else "no weights; pass --pretrained or"
        )
        raise InputError(f"{name}: {problem}{'' if pretrained else ' --weights FILE'}")
    return _timm_model(architecture, weights, query, image_size)


def _timm_model(name: str, weights: str | Path | None, query: Query, image_size: int | None) -> SARViT:
    import timm
    from timm.data.imagenet_info import ImageNetInfo

    published: Any = timm.models.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    classes: int = published.num_classes if published is not None else 1000
    size = image_size or (published.input_size[1] if published is not None else 224)
    if weights is not None:
        bias = read_source(Path(weights)).state.get("head.bias")
        classes = 0 if bias is None else len(bias)
    labels = ImageNetInfo("imagenet-1k").label_names() if classes == 1000 else None
    model = SARViT(
        name,
        num_classes=classes,
        img_size=size,
        msa_skip=True,
        mlp_norm=True,
        mlp_skip=True,
        query=query,
        labels=labels,
        pretrained=weights is None,
        weights=None if weights is None else str(weights),
    )
    try:
        model.preprocessing = Preprocessing.from_timm(
            model.backbone.model, size=model.backbone.img_size, crop="center"
        )
    except ValueError as error:
        raise InputError(f"timm:{name}: {error}") from None
    return model.eval()


# --- For people ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure a model on images; writes metrics.json and report.html where ``out`` is given."""

    model: tyro.conf.Positional[str]
    """Model folder, run folder or Hub id; or timm:NAME, such as timm:deit_small_patch16_224."""
    data: str = "synthetic"
    """Data source; ``sar-vit list`` shows what it may be. imagenet-c:PATH alone is all of it, for mCE."""
    data_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Options of the data source, such as split_file."""
    skip_unreadable: bool = False
    """List and leave out photos that cannot be read."""
    split: Literal["train", "val", "test", "all"] | None = None
    """Part of the data to measure; test, and val of data with class maps."""
    protocols: tuple[Literal["standard", "imagenet-a", "voc-jaccard"], ...] = ()
    """Metric protocols; imagenet-a for its data, standard for others."""
    pretrained: bool = False
    """Download the weights of a timm model."""
    weights: Path | None = None
    """Local file of a timm model's weights."""
    query: Literal["cls", "avg"] = "cls"
    """Whose attention is measured, of a timm model: the class token's, or the mean patch's."""
    image_size: int | None = None
    """Side of the input in pixels; the model's own where not given."""
    jaccard_mass: float = 0.6
    """Share of the attention's mass that makes a mask."""
    jaccard_size: int = 480
    """Side of photos with class maps, in pixels."""
    exclude_void: bool = False
    """Leave void pixels out, which are background in the released evaluation."""
    batch_size: int = 64
    """Images a forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    out: Path | None = None
    """Folder for metrics.json and report.html; all of ImageNet-C keeps its progress there too."""
    resume: bool = False
    """Go on with an interrupted ImageNet-C in the folder."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def evaluate_command(arguments: list[str]) -> None:
    """``sar-vit evaluate MODEL --data ... [--protocols voc-jaccard] [--out FOLDER]``."""
    options = cli.parse(EvaluateOptions, arguments, command="sar-vit evaluate")
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: expected at least 1")
    model = open_model(
        options.model,
        pretrained=options.pretrained,
        weights=options.weights,
        query=options.query,
        image_size=options.image_size,
    ).to(cli.choose_device(options.device))
    if options.data.startswith("imagenet-c:") and "@" not in options.data:
        return _corruption_command(options, model)
    if options.resume:
        raise InputError("--resume: only for all of ImageNet-C (--data imagenet-c:PATH); leave it out")
    from .report import write_evaluation_report

    source: dict[str, Any] = {**options.data_options}
    source |= {"skip_unreadable": True} if options.skip_unreadable else {}
    check_data_options(source)
    data = load_split(options.data, options.split, source)
    protocols = options.protocols or ("imagenet-a" if options.data.startswith("imagenet-a:") else "standard",)
    if options.out is not None:
        new_output_folder(options.out, overwrite=options.overwrite)
    result = evaluate_model(
        model,
        data,
        protocols=protocols,
        batch_size=options.batch_size,
        workers=options.workers,
        jaccard_mass=options.jaccard_mass,
        jaccard_size=options.jaccard_size,
        exclude_void=options.exclude_void,
    )
    lines = [f"{data.name}, {data.split}, {result.to_json()['images']} images"]
    lines += [format_table([{"": options.model} | shown(result.metrics())])]
    heads = [{"head": str(i)} | shown(head) for i, head in enumerate(result.heads(), start=1)]
    lines += ["", format_table(heads)] if heads else []
    sys.stdout.write("\n".join([*lines, *result.notes]) + "\n")
    if options.out is not None:
        write_json(options.out / "metrics.json", result.to_json())
        report = write_evaluation_report(
            options.out / "report.html", model, data, result, mass=options.jaccard_mass
        )
        sys.stdout.write(f"\n{report}\n")


def load_split(spec: str, split: str | None, options: Mapping[str, Any]) -> ImageData:
    """The split asked for; where none is, ``test``, or ``val`` of data with class maps, which have no ``test``."""
    if split is not None:
        return load_data(spec, split, **options)
    if spec.startswith(("voc-segmentation:", "ade20k:")):
        return load_data(spec, "val", **options)
    return load_data(spec, "test", **options)


def _corruption_command(options: EvaluateOptions, model: SARViT) -> None:
    from .report import write_corruption_report

    if options.protocols or options.split not in (None, "test"):
        raise InputError("imagenet-c: has split test and its own protocol; leave --split and --protocols out")
    if options.out is not None:
        new_output_folder(options.out, resume=options.resume, overwrite=options.overwrite)
    result = evaluate_imagenet_c(
        model,
        Path(options.data.partition(":")[2]).expanduser(),
        progress_file=None if options.out is None else options.out / "progress.json",
        batch_size=options.batch_size,
        workers=options.workers,
    )
    sys.stdout.write(f"{format_table(result.rows())}\n\nmCE {result.metrics()['mce']:.1f} %\n")
    if options.out is not None:
        write_json(options.out / "metrics.json", result.to_json())
        sys.stdout.write(f"\n{write_corruption_report(options.out / 'report.html', model, result)}\n")


def shown(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metrics by their titles, as text with the decimals that suit each; others keep their names.

    Example:
        >>> shown({"top1": 71.239, "spatial_entropy": 1.23456, "last_top1": 70.0})
        {'Top-1': '71.2', 'Entropy (nats)': '1.235', 'last Top-1': '70.0'}
    """
    return {
        title_of(name): f"{value:.{digits_of(name)}f}"
        for name, value in metrics.items()
        if math.isfinite(value)
    }


def title_of(name: str) -> str:
    """Title of a metric, also of ``last_<metric>``."""
    last = "last " if name.startswith("last_") else ""
    bare = name.removeprefix("last_")
    return last + METRIC_NAMES.get(bare, bare.replace("_", " "))


def digits_of(name: str) -> int:
    """Decimals of a metric for people."""
    return DIGITS.get(name.removeprefix("last_"), 1)


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
