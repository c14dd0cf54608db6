"""The tables of the paper: trains what is not trained yet, and prints published beside ours.

``sar-vit reproduce table1b`` runs on the embedded default, in minutes; ``--scale paper`` runs the paper's recipes on
the data given. Finished runs are kept below ``--runs`` and shared between tables and figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from attnmap_core import cli
from attnmap_core.errors import InputError
from attnmap_core.experiments import Run, Runner, RunOptions, mean_and_deviation, write_results
from attnmap_core.hub import read_config
from attnmap_core.pictures import line_plot, save_picture
from attnmap_core.recipes import load_recipe

from ..config import SarConfig
from ..evaluate import METRIC_NAMES
from ..train import train
from .cases import ARCHITECTURES, PUBLISHED_SIZES, TABLES, Case, Training
from .robustness import robustness_of

RUNNER = Runner(module="sar_vit", config=SarConfig, train=train)
TITLES = METRIC_NAMES | {"mean_iou": "mIoU"}
DIGITS = {"spatial_entropy": 3, "components": 2}


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """A table of the paper: published beside ours. Finished runs are not repeated."""

    scale: Literal["tiny", "paper"] = "tiny"
    """tiny: minutes on a CPU, on the embedded default; paper: its recipes, on its data."""
    seeds: tuple[int, ...] = (26,)
    """Seeds of each row."""
    only: tuple[str, ...] = ()
    """Only rows with one of these words in a column, such as SAR or PVT-Small."""
    runs: Path = Path("runs/reproduce/runs")
    """Folder of all runs, shared by tables and figures."""
    out: Path = Path("runs/reproduce")
    """Folder of the tables."""
    imagenet_a: str = ""
    """table5 at the paper's scale: imagenet-a:PATH."""
    imagenet_c: str = ""
    """table5 at the paper's scale: imagenet-c:PATH."""
    voc: str = ""
    """table6 and table9b at the paper's scale: voc-segmentation:PATH."""


def table_command(name: str, arguments: list[str]) -> None:
    """``sar-vit reproduce table1a ... table13, appB``."""
    options = cli.parse(Options, arguments, command=f"sar-vit reproduce {name}")
    check(name, options)
    table = TABLES[name]
    cases = chosen(table.cases, options.only)
    rows: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    configs: list[SarConfig] = []
    for case in cases:
        measured: list[dict[str, float]] = []
        for seed in options.seeds:
            run = trained(case, options, seed)
            measured.append(numbers(name, run, options))
            configs.append(run.config)
            records += [record(case, run, seed, measured[-1], metric) for metric in table.metrics]
        cells = mean_and_deviation(measured, (*table.metrics, *table.besides))
        row: dict[str, Any] = dict(case.labels)
        for metric in table.metrics:
            row |= {f"{TITLES[metric]}, published": case.published.get(metric)}
            row |= {f"{TITLES[metric]}, ours": cells.get(metric)}
        row |= {TITLES[metric]: cells[metric] for metric in table.besides if metric in cells}
        rows.append(row | (sizes(case) if name == "table2" else {}))
    out = options.out / name
    write_results(
        out,
        [_without_numbers(row) for row in rows],
        title=table.title,
        distribution="sar-vit",
        notes=[*table.notes, scale_note(options, configs)],
        digits={TITLES[metric]: DIGITS.get(metric, 1) for metric in table.besides} | {"published": 2},
        seed=options.seeds[0],
        records=records,
    )
    if name == "table1a" and len(cases) > 1:
        save_picture(curve(rows), out / "weights.png")


def check(name: str, options: Options) -> None:
    """Refuse what would only be noticed after the first training.

    Raises:
        InputError: without a seed, or for Table 5 on photos at the tiny scale.
    """
    if not options.seeds:
        raise InputError("--seeds: expected at least one, such as --seeds 26")
    made = name == "table5" and options.scale == "tiny"
    if made and options.data and not options.data.startswith("synthetic:"):
        raise InputError(
            f"--data {options.data}: the tiny scale shifts the domain of synthetic:... alone; give such data, or "
            "--scale paper"
        )


def chosen(cases: tuple[Case, ...], words: tuple[str, ...]) -> list[Case]:
    """Cases with one of the words in a label.

    Raises:
        InputError: for a word that is in none.
    """
    for word in words:
        if not any(word.lower() in label.lower() for case in cases for label in case.labels.values()):
            known = ", ".join(dict.fromkeys(label for case in cases for label in case.labels.values()))
            raise InputError(f"--only {word}: in no row; the columns hold {known}")
    if not words:
        return list(cases)
    return [
        case
        for case in cases
        if any(word.lower() in label.lower() for word in words for label in case.labels.values())
    ]


# --- Runs -------------------------------------------------------------------------------------------------------------


def trained(case: Case, options: Options, seed: int) -> Run:
    """The finished run of a case, after the one it starts with."""
    training: Training = getattr(case, options.scale)
    changes: dict[str, Any] = {**training.changes, "seed": seed}
    if case.start is not None:
        changes["start"] = str(trained(case.start, options, seed).folder / "model")
    given = options.overrides()
    if "data_options" in given and "data_options" in changes:
        given["data_options"] = {**given["data_options"], **changes["data_options"]}
    recipe_epochs: int = load_recipe("sar_vit", training.recipe, SarConfig).epochs
    epochs = int(given.pop("epochs", changes.get("epochs", recipe_epochs)))
    changes = {**changes, **given, "epochs": round(epochs * training.longer)}
    return RUNNER.finished(
        options.runs / folder_name(training.recipe, changes) / f"seed{seed}", training.recipe, **changes
    )


def folder_name(recipe: str, changes: Mapping[str, Any]) -> str:
    """Name of the folder of all seeds of a training: the same for the same fields, whichever table asks.

    Example:
        >>> folder_name("tiny-sar", {"lr": 0.1, "seed": 1}) == folder_name("tiny-sar", {"lr": 0.1, "seed": 2})
        True
    """
    told = {name: value for name, value in changes.items() if name != "seed"}
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{Path(recipe).stem}-{digest}"


def numbers(name: str, run: Run, options: Options) -> dict[str, float]:
    """What a table shows of a run: its metrics, and for some tables what is measured on further data."""
    found: dict[str, float] = dict(run.metrics["metrics"])
    if name == "table5":
        found |= robustness_of(run, options)
    if name in ("table6", "table9b") and options.voc:
        from ..evaluate import evaluate_model, load_split, open_model

        model = open_model(str(run.folder)).to(cli.choose_device(options.device)).eval()
        data = load_split(options.voc, "val", {})
        found["jaccard"] = evaluate_model(model, data, protocols=("voc-jaccard",)).metrics()["jaccard"]
    return found


def record(case: Case, run: Run, seed: int, found: Mapping[str, float], metric: str) -> dict[str, Any]:
    """One number for programs: what was run, what came out, what was published, and the difference."""
    ours, published = found.get(metric), case.published.get(metric)
    difference = None if ours is None or published is None else ours - published
    return {**case.labels, "run": str(run.folder), "seed": seed, "metric": metric, "ours": ours,
            "published": published, "difference": difference}  # fmt: skip


# --- For people -------------------------------------------------------------------------------------------------------


@cache
def full_size(backbone: str, plain: bool) -> tuple[float, float]:
    """Parameters in millions and multiply-adds in billions of a full-size network with 1000 classes at 224 px."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from ..model import SARViT

    model = SARViT(backbone, msa_skip=plain, mlp_norm=plain).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted everywhere
        model(torch.zeros(1, 3, 224, 224))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


def sizes(case: Case) -> dict[str, Any]:
    """Columns of Table 2 about the network at its full size, whatever the scale of the training."""
    name = case.labels["architecture"]
    config = load_recipe("sar_vit", ARCHITECTURES[name][0], SarConfig)
    parameters, products = full_size(config.backbone, case.labels["model"] == "plain")
    published = PUBLISHED_SIZES[name]
    return {
        "M params, published": published[0],
        "M params, ours": parameters,
        "G mult-adds, published": published[1],
        "G mult-adds, ours": products,
    }


def scale_note(options: Options, configs: list[SarConfig]) -> str | None:
    """How far the runs are from the paper's; None at its scale."""
    if options.scale == "paper":
        return None

    def told(values: Callable[[SarConfig], Any]) -> str:
        return ", ".join(dict.fromkeys(str(values(config)) for config in configs))

    return (
        f"Reduced scale: {told(lambda c: c.data)}; {told(network)} at {told(lambda c: c.image_size)} px, epochs "
        f"{told(lambda c: c.epochs)}, batch {told(lambda c: c.batch_size)}, seeds {len(options.seeds)}. These numbers "
        "show that everything runs; they cannot be compared with published ones."
    )


def network(config: SarConfig) -> str:
    """``vit (patch_size 8, embed_dim 64, depth 3)``; of a run that starts with a model, that model's."""
    backbone, options = config.backbone, config.backbone_options
    if config.start is not None:
        described: dict[str, Any] = read_config(config.start)["model"]
        backbone, options = described["backbone"], described.get("backbone_options") or {}
    wanted = ("patch_size", "embed_dim", "depth", "num_heads")
    said = ", ".join(f"{name} {options[name]}" for name in wanted if name in options)
    return f"{backbone} ({said})" if said else backbone


def curve(rows: list[dict[str, Any]]) -> Any:
    """Accuracy over λ, ours and published."""
    ours = [row["Top-1, ours"] for row in rows]
    return line_plot(
        [row["λ"] for row in rows],
        {"ours": [cell["mean"] for cell in ours]},
        x_label="weight λ of the spatial entropy loss",
        y_label="top-1, %, ours",
        errors={"ours": [cell["std"] for cell in ours]} if ours[0]["n"] > 1 else None,
        twin={"published": [row["Top-1, published"] for row in rows]},
        twin_label="top-1, %, published",
    )


def _without_numbers(row: dict[str, Any]) -> dict[str, Any]:
    # Published numbers keep the decimals they were printed with.
    return {
        name: f"{value:g}" if name.endswith("published") and value is not None else value
        for name, value in row.items()
    }
