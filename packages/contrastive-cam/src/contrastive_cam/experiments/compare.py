"""Training-free methods side by side on one folder, and the evidence on real photos: trained against training-free."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from attnmap_core import cli
from attnmap_core.data.loaders import eval_loader, samples_of
from attnmap_core.data.sources import ImageData, load_data
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.experiments import Run, mean_and_deviation, write_results
from attnmap_core.files import read_json, write_json
from attnmap_core.pictures import picture_grid, save_picture
from torch import Tensor

from ..config import ContrastiveConfig
from ..evaluate import METRIC_NAMES, Evaluation, evaluate_localizer
from ..frozen import VIT, FrozenMap, normalised
from ..inference import Multi
from ..localizers import Localizer, Method, Rule
from ..pictures import shown_photo

CNN = "mobilenetv2_100"
METRICS = tuple(METRIC_NAMES)
PICTURED = 6
"""Photos in the picture of ``compare``."""


@dataclass(frozen=True)
class Free:
    """A training-free method, or one unit on frozen features.

    Attributes:
        method: of :class:`Localizer`.
        network: ``"vit"`` or ``"cnn"``.
        layers: of the CNN; its last map where empty.
        blocks: of the ViT, whose keys are read.
        rule: the cut; the method's own where None.
        equivariance: of the region unit; :func:`contrastive_cam.localizers.default_turns` where None.
    """

    method: Method
    network: str
    layers: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    rule: Rule | None = None
    equivariance: float | None = None

    @property
    def drawn(self) -> bool:
        """Whether the seed matters."""
        return self.method == "region"


FREE: dict[str, Free] = {
    "CNN mean activation": Free("mean", "cnn"),
    "CNN SCDA": Free("scda", "cnn"),
    "CNN DDT": Free("ddt", "cnn", ("blocks.5",)),
    "CNN DDT+": Free("ddt+", "cnn", ("blocks.5", "blocks.4")),
    "CNN region unit": Free("region", "cnn", ("blocks.5",)),
    "ViT LOST": Free("lost", "vit", blocks=(-1,)),
    "ViT DDT, last block": Free("ddt", "vit", blocks=(-1,)),
    "ViT DDT, three blocks": Free("ddt", "vit", blocks=(-3, -2, -1)),
    "ViT region unit": Free("region", "vit", blocks=(-1,)),
}
"""What is compared: networks of ImageNet, whatever else is said."""


def localizer_of(free: Free, make: Mapping[str, Any]) -> Localizer:
    """The method on a network that ``make`` says how to construct.

    Args:
        free: the method.
        make: arguments of :class:`FrozenMap`, and ``mean`` and ``std`` of :func:`contrastive_cam.frozen.normalised`.
    """
    options = dict(make)
    mean, std = options.pop("mean", None), options.pop("std", None)

    def frozen(layers: tuple[str, ...]) -> FrozenMap:
        return normalised(FrozenMap(blocks=free.blocks, layers=layers, **options), mean, std)

    other = frozen(free.layers[1:]) if free.method == "ddt+" else None
    return Localizer(frozen(free.layers[:1]), free.method, free.rule, other)


def batches(data: ImageData, localizer: Localizer, batch_size: int, workers: int = 0) -> Iterator[Tensor]:
    """The photos of a data set as a network's input, in order."""
    samples = samples_of(data, eval_transform(localizer.model.preprocessing), seed=0)
    for batch in eval_loader(samples, batch_size, workers=workers):
        yield batch["images"]


def fitted(
    localizer: Localizer, data: ImageData, device: str, *, batch_size: int = 32, **region: Any
) -> Localizer:
    """A localizer that has seen all photos; ``region`` goes to :func:`contrastive_cam.frozen.fit_region`."""
    for model in (localizer.model, localizer.other):
        if model is not None:
            model.to(device).eval()
    localizer.fit(batches(data, localizer, batch_size), **(region if localizer.method == "region" else {}))
    return localizer


def free_rows(config: ContrastiveConfig, data: ImageData, device: str) -> list[dict[str, Any]]:
    """Rows of the training-free methods on the very network that a run starts from."""
    from ..train import build_model

    start: Any = build_model(config)
    vit = hasattr(start.backbone.model, "blocks") and hasattr(start.backbone.model, "patch_embed")
    make: dict[str, Any] = {
        "backbone": config.backbone,
        "img_size": config.image_size,
        "last_stage": config.last_stage,
        "preprocessing": start.preprocessing.to_dict(),
        "pretrained": config.pretrained,
        "weights": config.weights,
        "backbone_options": dict(config.backbone_options),
    }
    methods: dict[str, Free] = {
        "pretrained, mean activation": Free("mean", ""),
        "SCDA": Free("scda", ""),
        "DDT": Free("ddt", ""),
    }
    if vit:
        methods |= {"DDT on keys": Free("ddt", "", blocks=(-1,)), "LOST": Free("lost", "", blocks=(-1,))}
    rows: list[dict[str, Any]] = []
    for name, free in methods.items():
        localizer = localizer_of(free, make)
        # The same start, also where it is random.
        localizer.model.backbone.load_state_dict(start.backbone.state_dict())
        fitted(localizer, data, cli.choose_device(device), batch_size=config.eval_batch_size)
        found = evaluate_localizer(
            localizer, data, floors=False, multi=config.multi, batch_size=config.eval_batch_size
        ).metrics()
        rows.append(
            {"method": name, "trained": "no"} | {METRIC_NAMES[metric]: found[metric] for metric in METRICS}
        )
    return rows


# --- One folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """All training-free methods on one data set or folder with known boxes, beside floors."""

    data: str = "synthetic:classes=4,superclasses=1,test=60,train=1"
    """Data source with boxes."""
    data_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Options of the data source."""
    split: str = "test"
    """Part of the data; all for everything."""
    vit: str = VIT
    """timm name of the ViT."""
    vit_weights: str | None = None
    """Local file of its weights; downloaded where not given."""
    cnn: str = CNN
    """timm name of the CNN; the layers of the table are MobileNetV2's."""
    cnn_weights: str | None = None
    """Local file of its weights; downloaded where not given."""
    cnn_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Of the CNN besides output_stride 16, such as --cnn-options.pad_type same for weights from TensorFlow."""
    cnn_mean: tuple[float, float, float] | None = None
    """Per-channel mean that its weights expect; timm's of the network where not given."""
    cnn_std: tuple[float, float, float] | None = None
    """Per-channel standard deviation, likewise."""
    image_size: int = 224
    """Side of the square input of both, in pixels."""
    methods: tuple[str, ...] = tuple(FREE)
    """Rows of the table."""
    multi: Multi = "any"
    """Which of several annotated objects counts."""
    seeds: tuple[int, ...] = (0,)
    """Of the region units."""
    batch_size: int = 16
    """Photos a forward pass."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    out: Path = Path("runs/compare")
    """Folder of the table and, of ``compare``, the picture."""


def networks(options: CompareOptions) -> dict[str, dict[str, Any]]:
    """How the two networks of the table are made, by ``"vit"`` and ``"cnn"``."""
    shared: dict[str, Any] = {"img_size": options.image_size, "last_stage": "timm"}
    vit = shared | {
        "backbone": options.vit,
        "weights": options.vit_weights,
        "pretrained": options.vit_weights is None,
    }
    cnn = shared | {
        "backbone": options.cnn,
        "weights": options.cnn_weights,
        "pretrained": options.cnn_weights is None,
        "backbone_options": {"output_stride": 16, **options.cnn_options},
        "mean": options.cnn_mean,
        "std": options.cnn_std,
    }
    return {"vit": vit, "cnn": cnn}


def check_rows(rows: Sequence[str]) -> None:
    """Rows must be among :data:`FREE`.

    Raises:
        InputError: for another.
    """
    for row in rows:
        if row not in FREE:
            raise InputError(f"{row}: no such row; known: {'; '.join(FREE)}")


def measured(
    free: Free,
    make: Mapping[str, Any],
    data: ImageData,
    options: CompareOptions,
    *,
    rules: Sequence[Rule] = ("otsu",),
) -> tuple[Localizer, list[Evaluation]]:
    """A method fitted to all photos of a data set and scored on them; once a seed where the seed matters.

    Returns:
        The method as it was fitted last, and a score for each seed.

    Raises:
        InputError: if no photo has a known box.
    """
    localizer = localizer_of(free, make)
    device = cli.choose_device(options.device)
    found: list[Evaluation] = []
    for seed in options.seeds if free.drawn else options.seeds[:1]:
        weight = {} if free.equivariance is None else {"equivariance": free.equivariance}
        fitted(localizer, data, device, batch_size=options.batch_size, seed=seed, **weight)
        found.append(
            evaluate_localizer(
                localizer, data, rules=rules, multi=options.multi, batch_size=options.batch_size
            )
        )
        if not found[0].own.rows:
            raise InputError(f"{data.name}, {data.split}: no photo with a known box; give data with boxes")
    return localizer, found


def compare_command(arguments: list[str]) -> None:
    """``contrastive-cam reproduce compare --data voc:PHOTOS --split all``."""
    options = cli.parse(CompareOptions, arguments, command="contrastive-cam reproduce compare")
    check_rows(options.methods)
    if not options.seeds:
        raise InputError("--seeds: expected at least one, such as --seeds 0 1 2")
    source: dict[str, Any] = {**options.data_options}
    data = load_data(options.data, options.split, **source)
    make = networks(options)
    rows: list[dict[str, Any]] = []
    floors: dict[str, dict[str, float]] = {}
    some = np.linspace(0, len(data) - 1, min(PICTURED, len(data))).astype(int).tolist()
    pictures = [[data[i].image for i in some]]
    for name in options.methods:
        free = FREE[name]
        localizer, several = measured(free, make[free.network], data, options)
        pictures.append([shown_photo(localizer, data, i) for i in some])
        found = mean_and_deviation([one.metrics() for one in several], METRICS)
        rows.append(
            {"method": name, "cut": several[0].rule}
            | {METRIC_NAMES[metric]: found[metric] for metric in METRICS}
            | {"seconds a photo": several[0].facts["seconds"]}
        )
        floors = {floor: protocol.compute() for floor, protocol in several[0].floors.items()}
    rows += [
        {"method": f"floor: {floor}"} | {METRIC_NAMES[metric]: found[metric] for metric in METRICS}
        for floor, found in floors.items()
    ]
    write_results(
        options.out,
        rows,
        title=f"Training-free methods on {data.name}, {data.split}",
        distribution="contrastive-cam",
        notes=["Each method is fitted to the photos that it is scored on; no box has a part in that."],
        digits={"seconds a photo": 3},
        seed=options.seeds[0],
    )
    picture = picture_grid(pictures, row_titles=["photo", *options.methods])
    sys.stdout.write(f"{save_picture(picture, options.out / 'compare.png')}\n")


# --- Evidence ----------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "rotation (PsyNet)": {"contrastive_weight": 0.0, "pooling": "avg", "gate": "none"},
    "+ PTAP": {"contrastive_weight": 0.0},
    "+ contrastive maps": {"pooling": "avg", "gate": "none", "negatives": "batch"},
    "+ both": {"negatives": "batch"},
    "+ PTAP, maps without negatives": {"negatives": "none"},
}
"""Trainings, as changes to a recipe."""
RECIPES = {"CNN": "folder", "ViT": "folder-vit"}
"""Recipes of the trainings, by network."""
TRAININGS = {
    f"{net} {name}": (recipe, changes)
    for net, recipe in RECIPES.items()
    for name, changes in VARIANTS.items()
}
"""Recipe and changes of each row that is trained."""


@dataclass(frozen=True, kw_only=True)
class EvidenceOptions(CompareOptions):
    """Trained and training-free methods and floors on real photos, one folder after the other.

    Finished rows are not measured again. ``--folders voc:raccoon caltech101:animals#kangaroo`` takes one class of a
    data set after a ``#``.
    """

    folders: tuple[str, ...] = ()
    """Data sources with boxes, each of one kind of thing."""
    trainings: tuple[str, ...] = tuple(TRAININGS)
    """Rows that are trained."""
    epochs: int | None = None
    """Of each training; the recipe's own where not given."""
    changes: dict[str, bool | int | float | str] = field(default_factory=dict[str, bool | int | float | str])
    """Other fields of the recipe, such as --changes.lr 2e-3."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of trainings and region units."""
    out: Path = Path("runs/evidence")
    """Folder of runs and tables."""


def evidence_command(arguments: list[str]) -> None:
    """``contrastive-cam reproduce evidence --folders voc:PHOTOS ... --cnn-weights FILE --vit-weights FILE``."""
    options = cli.parse(EvidenceOptions, arguments, command="contrastive-cam reproduce evidence")
    check_rows(options.methods)
    for name in options.trainings:
        if name not in TRAININGS:
            raise InputError(f"{name}: no such training; known: {'; '.join(TRAININGS)}")
    if not options.folders or not options.seeds:
        raise InputError(
            "--folders and --seeds: expected one or more of each, such as --folders voc:PHOTOS --seeds 0"
        )
    make = networks(options)
    rows: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for folder in options.folders:
        source, only, data, title = open_folder(options, folder)
        floors: dict[str, dict[str, float]] = {}
        for name in options.methods:
            path = options.out / "free" / slug(title) / f"{slug(name)}.json"
            several = kept_rows(options, path, FREE[name], data, make)
            floors = several[0]["floors"]
            rows.append(_row(title, name, [one["metrics"] for one in several], several[0]["rule"]))
            records += [
                {"folder": title, "row": name, "seed": i, **one["metrics"]} for i, one in enumerate(several)
            ]
        for name in options.trainings:
            runs = [training(options, source, only, name, seed, title) for seed in options.seeds]
            rows.append(_row(title, name, [run.metrics["metrics"] for run in runs], runs[0].metrics["rule"]))
            records += [
                {"folder": title, "row": name, "seed": seed, **run.metrics["metrics"]}
                for seed, run in zip(options.seeds, runs)
            ]
            floors = floors or runs[0].metrics["floors"]
        rows += [_row(title, f"floor: {floor}", [found], "–") for floor, found in floors.items()]
        records += [
            {"folder": title, "row": f"floor: {floor}", "seed": 0, **found} for floor, found in floors.items()
        ]
    write_results(
        options.out,
        rows,
        tables={"CorLoc 0.5 / 0.7 by folder, and over all folders": by_folder(rows, records)},
        title="Evidence on real photos, CorLoc",
        distribution="contrastive-cam",
        notes=[
            "Every method sees all photos of a folder and no box; a hit on any annotated object counts. Means over "
            f"{len(options.seeds)} seeds where a seed has a part; over all folders with the standard deviation.",
        ],
        seed=options.seeds[0],
        records=records,
    )


def by_folder(
    rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A line for each method: CorLoc 0.5 / 0.7 of each folder, then means over the folders, seed by seed.

    Args:
        rows: of :func:`evidence_command`, means over seeds by folder and method.
        records: single runs by ``folder``, ``row`` and ``seed``.
    """
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["method"], {"method": row["method"], "cut": row["cut"]})
        line[row["folder"]] = " / ".join(f"{row[name]['mean']:.1f}" for name in ("CorLoc 0.5", "CorLoc 0.7"))
    for method, line in lines.items():
        runs = [record for record in records if record["row"] == method]
        seeds = dict.fromkeys(record["seed"] for record in runs)
        means = [
            {
                metric: float(np.mean([run[metric] for run in runs if run["seed"] == seed]))
                for metric in METRICS
            }
            for seed in seeds
        ]
        line |= {METRIC_NAMES[name]: cell for name, cell in mean_and_deviation(means, METRICS).items()}
    return list(lines.values())


def open_folder(options: CompareOptions, folder: str) -> tuple[str, dict[str, str], ImageData, str]:
    """Source, options of the class, photos and title of one of ``--folders``, such as ``caltech101:PATH#kangaroo``."""
    source, _, chosen = folder.partition("#")
    only = {"classes": chosen} if chosen else {}
    given: dict[str, Any] = {**options.data_options, **only}
    if source.partition(":")[0] == "synthetic":
        return source, only, load_data(source, "test", **given), "drawn creatures"
    data = load_data(source, "all", **given)
    return source, only, data, chosen or data.name.rpartition(":")[2]


def _row(folder: str, name: str, several: Sequence[Mapping[str, float]], rule: str) -> dict[str, Any]:
    found = mean_and_deviation(several, METRICS)
    return {"folder": folder, "method": name, "cut": rule} | {
        METRIC_NAMES[metric]: found.get(metric) for metric in METRICS
    }


def slug(name: str) -> str:
    """A file name of a row.

    Example:
        >>> slug("CNN DDT+")
        'cnn-ddt-plus'
    """
    text = name.lower().replace("+", "-plus ")
    return "-".join(filter(None, "".join(c if c.isalnum() else "-" for c in text).split("-")))


def kept_rows(
    options: CompareOptions,
    path: Path,
    free: Free,
    data: ImageData,
    make: Mapping[str, Mapping[str, Any]],
    *,
    rules: Sequence[Rule] = ("otsu",),
) -> list[dict[str, Any]]:
    """Evaluations of a training-free method as plain values, measured once, written to ``path``, and then read."""
    settings: Any = {
        "free": asdict(free),
        "network": {key: value for key, value in make[free.network].items() if key != "weights"},
        "multi": options.multi,
        "photos": len(data),
        "rules": list(rules),
        "seeds": list(options.seeds if free.drawn else options.seeds[:1]),
    }
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    if path.is_file():
        kept = read_json(path)
        if kept["settings"] == settings:
            return kept["evaluations"]
    _, found = measured(free, make[free.network], data, options, rules=rules)
    evaluations = [one.to_json() for one in found]
    write_json(path, {"settings": settings, "evaluations": evaluations})
    return evaluations


def training(
    options: EvidenceOptions, source: str, only: Mapping[str, str], name: str, seed: int, title: str
) -> Run:
    """A finished run of one of :data:`TRAININGS`."""
    from .tables import RUNNER

    recipe, variant = TRAININGS[name]
    net = name.split()[0].lower()
    made = networks(options)[net]
    changes: dict[str, Any] = {
        **variant,
        "data": source,
        "data_options": {**options.data_options, **only},
        **{
            key: made[key] for key in ("backbone", "weights", "pretrained", "backbone_options") if key in made
        },
        **{key: made[key] for key in ("mean", "std") if made.get(key) is not None},
        "multi": options.multi,
        "seed": seed,
        **options.changes,
    }
    if options.epochs is not None:
        changes["epochs"] = options.epochs
    folder = options.out / "runs" / slug(title) / slug(name) / f"seed{seed}"
    return RUNNER.finished(folder, recipe, **changes)
