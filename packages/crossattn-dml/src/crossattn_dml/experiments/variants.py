"""What single settings do: each on top of a recipe, seed by seed, on held-out training classes.

A finer look than ``reproduce search``, which goes from setting to setting by means: here every variant is compared with
the recipe as it is, paired by seed, with an interval. What stands out has still to be shown on unseen classes.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnmap_core import cli
from attnmap_core.errors import InputError
from attnmap_core.experiments import RunOptions

from .evidence import on_held_out_classes, slug
from .main_results import table_rows
from .runs import recipe_config, scale_note, write_results

RECIPE = "as in the recipe"


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Variants of a recipe on held-out training classes, paired by seed. Finished runs are not repeated."""

    recipe: str = "tiny-stack"
    """Recipe of all runs."""
    variants: tuple[str, ...] = (
        "stack=false",
        "conditional_warmup_epochs=1",
        "conditional_warmup_epochs=3",
        "width=32",
        "width=128",
        "width=256",
    )
    """Each a line of the table: one field=value, or several with commas, as in "hierarchy=mutual, blocks=6"."""
    seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    """Seeds of weights, order and augmentation; other than those of the evidence."""
    val_share: float = 0.3
    """Share of the training classes that is held out."""
    vary_classes: bool = False
    """Also divide the classes anew by each seed (recipes with class_split random)."""
    jobs: int = 1
    """Runs at once, for machines with many cores; the numbers are the same."""
    out: Path = Path("runs/variants")
    """Folder of the runs and the table."""


def variants_command(arguments: list[str]) -> None:
    """``crossattn-dml reproduce variants [--recipe grocery-vit --data grocery:PATH --weights FILE]``."""
    options = cli.parse(Options, arguments, command="crossattn-dml reproduce variants")
    if not options.seeds or not options.variants:
        raise InputError(
            "--seeds and --variants: expected at least one of each, such as --variants width=128"
        )
    rows = {RECIPE: {}} | {text: changes_of(text) for text in options.variants}
    for changes in rows.values():  # before the first training
        recipe_config(options.recipe, {**options.overrides(), **changes})
    asked: list[tuple[Path, int, dict[str, Any]]] = []
    for seed in options.seeds:  # seed by seed, so that an interrupted comparison is a fair one
        for changes in rows.values():
            varied = {**changes, "split_seed": seed} if options.vary_classes else changes
            asked.append((options.out / "runs" / slug(varied), seed, varied))
    found = on_held_out_classes(options, options.recipe, asked, options.val_share, options.jobs)
    measured = {row: found[place :: len(rows)] for place, row in enumerate(rows)}
    config = recipe_config(options.recipe, options.overrides())
    lines = table_rows(measured)
    write_results(
        options.out,
        lines,
        title=f"Variants of {options.recipe} on held-out classes, {config.backbone} on {config.data}, percent",
        notes=[
            f"{len(options.seeds)} {'seeds and class splits' if options.vary_classes else 'seeds'}, last epoch, on "
            f"{100 * options.val_share:g} % of the training classes, held out: mean ± standard deviation. Differences "
            "are to the recipe as it is, paired by seed, with a 95 % interval of Student's t; "
            f"{len(rows) - 1} comparisons, not corrected for their number.",
            scale_note(config),
        ],
        digits=dict.fromkeys((title for line in lines for title in line), 2),
        seed=options.seeds[0],
        records=[
            {"row": row, "seed": seed, **values}
            for row, several in measured.items()
            for seed, values in zip(options.seeds, several)
        ],
    )


def changes_of(text: str) -> dict[str, Any]:
    """Fields of a variant. Words need no quotes.

    Raises:
        InputError: if the text is no list of assignments.

    Example:
        >>> changes_of("hierarchy=mutual, blocks=6, crop_scale=[0.2, 1]")
        {'hierarchy': 'mutual', 'blocks': 6, 'crop_scale': [0.2, 1]}
    """
    quoted = re.sub(r"=\s*(?!(?:true|false)\b)([A-Za-z][^\s,]*)", r'="\1"', text)
    try:
        found = tomllib.loads(f"it = {{{quoted}}}")["it"]
    except tomllib.TOMLDecodeError:
        found = None
    if not found:
        raise InputError(
            f"--variants {text}: expected field=value, or several with commas, such as width=128"
        )
    return found
