"""Does the stack help? Baseline against method with equal budget, both tuned, seed by seed.

``reproduce search`` tunes each arm on held-out training classes, as many settings in both;
``reproduce evidence`` then measures the chosen settings on unseen classes over many seeds or class splits,
beside the baseline at half and one and a half times its learning rate: a difference that such a control also makes is
no evidence for the method.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from attnmap_core import cli
from attnmap_core.errors import InputError
from attnmap_core.experiments import Run, RunOptions
from attnmap_core.files import read_json, write_json
from attnmap_core.recipes import run_record

from ..rerank import rerank_data
from .main_results import percents, table_rows
from .runs import BASELINE, METHOD, finished_together, open_model, recipe_config, scale_note, write_results

logger = logging.getLogger(__name__)

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors of the recipe's learning rate that both arms try first, and again at the end."""
FORMS: tuple[dict[str, Any], ...] = (
    {"hierarchy": "running", "similarity": "target", "blocks": 1},
    {"hierarchy": "mutual", "similarity": "target", "blocks": 1},
    {"hierarchy": "mutual", "similarity": "mutual", "blocks": 1},
    {"hierarchy": "running", "similarity": "target", "blocks": 2, "supervise": "all"},
    {"hierarchy": "mutual", "similarity": "mutual", "blocks": 6},
)
"""Of the stack."""
WEIGHTS: tuple[dict[str, Any], ...] = (
    {"conditional_weight": 0.3},
    {"conditional_weight": 3.0},
    {"unconditional_weight": 0.0},
    {"stack_lr_scale": 30.0},
    {"conditional_warmup_epochs": 2},
)
"""Of the losses and the stack's learning rate."""
BASELINE_STAGES: tuple[dict[str, Any], ...] = (
    {"weight_decay": 1e-2},
    {"weight_decay": 0.0},
    {"head_lr_scale": 3.0},
    {"head_lr_scale": 30.0},
    {"crop_scale": [0.15, 1.0]},
    {"crop_scale": [0.8, 1.0]},
    {"per_class": 2},
    {"warmup_epochs": 1},
    {"clip_grad": 1.0},
    {"pool": "avg+max"},
)
"""What the baseline tries while the method tries forms and weights: as many settings."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(RunOptions):
    """Tune both arms on held-out training classes, stage by stage; the best mAP@R goes on. Finished runs are kept."""

    recipe: str = "tiny-stack"
    """Recipe of all runs; grocery-vit or grocery-mobilenet for photos."""
    seeds: tuple[int, ...] = (100, 101)
    """Seeds of each setting; other than those of the evidence."""
    val_share: float = 0.3
    """Share of the training classes that choose."""
    rates: tuple[float, ...] = RATES
    """Factors of the learning rate."""
    most: int = 10
    """Settings of each arm after the learning rate; both arms get as many."""
    jobs: int = 1
    """Runs at once, for machines with many cores; the numbers are the same."""
    out: Path = Path("runs/search")
    """Folder of the runs, the table and chosen.json."""


@dataclass(frozen=True)
class Trial:
    """A setting and what it reaches on held-out classes, percent."""

    stage: str
    changes: dict[str, Any]
    map_at_r: float
    recall: float


def search_command(arguments: list[str]) -> None:
    """``crossattn-dml reproduce search [--recipe grocery-vit --data grocery:PATH --weights FILE]``."""
    options = cli.parse(SearchOptions, arguments, command="crossattn-dml reproduce search")
    if not options.seeds or not options.rates:
        raise InputError("--seeds and --rates: expected at least one of each, such as --rates 0.5 1 2")
    settings = {"baseline": list(BASELINE_STAGES), "method": [*FORMS, *WEIGHTS]}
    chosen: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for arm, base in (("baseline", BASELINE), ("method", METHOD)):
        trials = search_arm(options, arm, base, settings[arm][: options.most])
        best = max(trials, key=lambda trial: trial.map_at_r)
        chosen[arm] = best.changes
        rows += [
            {"arm": arm, "stage": trial.stage, "setting": shown_changes(trial.changes), "R@1": trial.recall}
            | {"mAP@R": trial.map_at_r, "chosen": "yes" if trial is best else ""}
            for trial in trials
        ]
    config = recipe_config(options.recipe, options.overrides())
    write_json(
        options.out / "chosen.json",
        {
            "recipe": options.recipe,
            "data": config.data,
            "record": run_record(options.seeds[0], ("crossattn-dml",)),
        }
        | chosen,
    )
    write_results(
        options.out,
        rows,
        title=f"Settings on held-out classes, {config.backbone} on {config.data}, percent",
        notes=[
            f"Means over {len(options.seeds)} seeds, last epoch, on {100 * options.val_share:g} % of the training "
            "classes, held out. The best of many is flattered: only the evidence counts.",
            scale_note(config),
        ],
        digits={"R@1": 2, "mAP@R": 2},
        seed=options.seeds[0],
    )


def search_arm(
    options: SearchOptions, arm: str, base: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]
) -> list[Trial]:
    """Learning rates, then each setting on top of the best so far, then the learning rates around it once more."""
    config = recipe_config(options.recipe, {**options.overrides(), **base})
    tried: dict[str, Trial] = {}

    def attempt(stage: str, changes: dict[str, Any]) -> None:
        key = shown_changes(changes)
        if key not in tried:
            tried[key] = trial_of(options, arm, stage, {**base, **changes})
            logger.info("%s, %s: mAP@R %.2f", arm, key, tried[key].map_at_r)

    def best() -> dict[str, Any]:
        trial = max(tried.values(), key=lambda trial: trial.map_at_r)
        return {name: value for name, value in trial.changes.items() if name not in base}

    for rate in options.rates:
        attempt("learning rate", {"lr": config.lr * rate})
    for changes in settings:
        attempt("setting", {**best(), **changes})
    for factor in (0.5, 2.0):
        leader = best()
        attempt("learning rate again", {**leader, "lr": leader["lr"] * factor})
    return list(tried.values())


def trial_of(options: SearchOptions, arm: str, stage: str, changes: dict[str, Any]) -> Trial:
    """A setting's mean over the seeds on held-out classes."""
    asked = [(options.out / arm / slug(changes), seed, changes) for seed in options.seeds]
    found = on_held_out_classes(options, options.recipe, asked, options.val_share, options.jobs)
    recall = next(name for name in found[0] if name.startswith("R@"))
    return Trial(
        stage, changes, *(float(np.mean([row[name] for row in found])) for name in ("mAP@R", recall))
    )


def on_held_out_classes(
    options: RunOptions,
    recipe: str,
    asked: Sequence[tuple[Path, int, dict[str, Any]]],
    val_share: float,
    jobs: int,
) -> list[dict[str, float]]:
    """Percents of the last epoch of each folder, seed and change, on held-out training classes: never on tests."""
    held_out: dict[str, Any] = {"select_on": "val", "val_share": val_share, "nmi_seeds": 0}
    held_out["evaluate_every"] = recipe_config(recipe, options.overrides()).epochs
    runs = finished_together(
        options, recipe, [(out, seed, {**held_out, **changes}) for out, seed, changes in asked], jobs
    )
    return [percents(run.epochs()[-1]["metrics"]) for run in runs]


@dataclass(frozen=True, kw_only=True)
class EvidenceOptions(RunOptions):
    """Baseline, its controls and the method on unseen classes, seed by seed. Finished runs are not repeated."""

    recipe: str = "tiny-stack"
    """Recipe of all runs; grocery-vit or grocery-mobilenet for photos."""
    chosen: Path | None = None
    """chosen.json of a search: the settings of both arms; the recipe's own where not given."""
    seeds: tuple[int, ...] = tuple(range(8))
    """Seeds of weights, order and augmentation."""
    vary_classes: bool = False
    """Also divide the classes anew by each seed (recipes with class_split random)."""
    controls: tuple[float, ...] = (0.5, 1.5)
    """Factors of the baseline's learning rate."""
    rerank: int = 0
    """Also show the method with so many first results ordered anew by the stack, an extension at test time."""
    jobs: int = 1
    """Runs at once, for machines with many cores; the numbers are the same."""
    out: Path = Path("runs/evidence")
    """Folder of the runs and the table."""


def evidence_command(arguments: list[str]) -> None:
    """``crossattn-dml reproduce evidence [--chosen runs/search/chosen.json]``."""
    options = cli.parse(EvidenceOptions, arguments, command="crossattn-dml reproduce evidence")
    if not options.seeds or any(factor <= 0 for factor in options.controls):
        raise InputError(
            "--seeds and --controls: expected at least one seed and factors above 0, such as --controls 0.5 1.5"
        )
    rows = arms_of(options)
    asked: list[tuple[Path, int, dict[str, Any]]] = []
    for seed in options.seeds:  # seed by seed, so that an interrupted comparison is a fair one
        for changes in rows.values():
            varied = {**changes, "split_seed": seed} if options.vary_classes else changes
            asked.append((options.out / "runs" / slug(varied), seed, varied))
    runs = finished_together(options, options.recipe, asked, options.jobs)
    of_row = {row: runs[place :: len(rows)] for place, row in enumerate(rows)}
    measured = {row: [percents(run.metrics["metrics"]) for run in found] for row, found in of_row.items()}
    gained = None
    if options.rerank:
        again = f"method, re-ranked {options.rerank}"
        measured[again] = [reranked(run, options) for run in of_row["method"]]
        _, line = table_rows({row: measured[row] for row in ("method", again)})
        gained = f"What re-ranking adds to the method: R@1 {line['R@1 difference']}, mAP@R {line['mAP@R difference']}."
    config = recipe_config(options.recipe, options.overrides())
    if options.vary_classes and config.class_split != "random":
        logger.warning(
            "vary_classes: class_split is %s, so that all seeds have the same classes", config.class_split
        )
    what = "seeds and class splits" if options.vary_classes else "seeds"
    write_results(
        options.out,
        table_rows(measured),
        title=f"{config.backbone} on {config.data}, unseen classes, percent",
        notes=[
            f"{len(options.seeds)} {what}, equal epochs and batches, last epoch: mean ± standard deviation. "
            f"Differences are to {next(iter(rows))}, paired by seed, with a 95 % interval of Student's t; "
            f"{len(measured) - 1} comparisons, not corrected for their number.",
            gained,
            *(f"{row}: {shown_changes(changes)}." for row, changes in rows.items()),
            scale_note(config),
        ],
        digits=dict.fromkeys((title for row in table_rows(measured) for title in row), 2),
        seed=options.seeds[0],
        records=[
            {"row": row, "seed": seed, **values}
            for row, several in measured.items()
            for seed, values in zip(options.seeds, several)
        ],
    )


def reranked(run: Run, options: EvidenceOptions) -> dict[str, float]:
    """What :func:`percents` gives, after the first results were ordered anew by the stack of a run."""
    data, folder = run.config.load(), run.folder / "model"
    model = open_model(folder, options.device)
    return percents(
        rerank_data(model, folder, data.query, data.gallery, count=options.rerank, ks=run.config.ks)
    )


def arms_of(options: EvidenceOptions) -> dict[str, dict[str, Any]]:
    """Changes to the recipe by row: the baseline first, its controls, the method, and the method's form at its rate.

    Raises:
        InputError: for a chosen.json of another recipe or without both arms.
    """
    chosen: dict[str, Any] = {"baseline": dict(BASELINE), "method": dict(METHOD)}
    if options.chosen is not None:
        found: Any = read_json(options.chosen)
        if not isinstance(found, dict) or not {"recipe", "baseline", "method"} <= set(found):
            raise InputError(
                f"{options.chosen}: no settings of a search in it, expected baseline and method; search again"
            )
        if found["recipe"] != options.recipe:
            raise InputError(
                f"{options.chosen}: chosen for recipe {found['recipe']}, expected {options.recipe}; give --recipe "
                f"{found['recipe']} or search again"
            )
        chosen = {arm: {**chosen[arm], **found[arm]} for arm in chosen}
    config = recipe_config(options.recipe, {**options.overrides(), **chosen["baseline"]})
    rows: dict[str, dict[str, Any]] = {"baseline": chosen["baseline"]}
    for factor in options.controls:
        rows[f"baseline, lr x{factor:g}"] = {**chosen["baseline"], "lr": config.lr * factor}
    rows["method"] = chosen["method"]
    if chosen["method"].get("lr", config.lr) != config.lr:
        rows["method, lr of the baseline"] = {**chosen["method"], "lr": config.lr}
    return rows


def shown_changes(changes: Mapping[str, Any]) -> str:
    """Settings as a line of text; the recipe's own for none.

    Example:
        >>> shown_changes({"stack": True, "lr": 1e-4})
        'stack True, lr 0.0001'
    """
    return ", ".join(f"{name} {_text(value)}" for name, value in changes.items()) or "as in the recipe"


def slug(changes: Mapping[str, Any]) -> str:
    """Folder name of a setting, the same whatever the order of its fields.

    Example:
        >>> slug({"lr": 1e-4, "stack": True})
        'lr-0.0001_stack-true'
    """
    text = "_".join(f"{name}-{_text(changes[name])}" for name in sorted(changes)) or "recipe"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text).lower()


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
