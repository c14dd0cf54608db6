"""Train TS-CAM and SCM from scratch on drawn creatures, and look at what they find.

``python -m scm_wsol.quickstart`` or ``scm-wsol quickstart``. Nothing is downloaded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnmap_core import cli
from attnmap_core.data.sources import load_data
from attnmap_core.experiments import format_table
from attnmap_core.files import new_output_folder, write_json
from attnmap_core.pictures import contact_sheet, save_picture
from attnmap_core.recipes import load_recipe, run_record
from attnmap_core.report import Tile
from PIL import Image

from .config import ScmConfig
from .evaluate import Evaluation
from .report import case_tiles
from .train import load_split, train

RUNS = {"tscam": "tiny-tscam", "scm": "tiny-scm"}
FRESH = "synthetic:image_size=64,seed=1,test=24"
"""Images of the same classes that no run has seen."""


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """Train TS-CAM and SCM on the embedded default, compare them, and predict on fresh images."""

    output_dir: Path = Path("quickstart")
    """Folder for both runs, the table and the predictions."""
    overwrite: bool = False
    """Replace an earlier quickstart there."""
    epochs: int | None = None
    """Epochs of each run; the recipe's own where not given."""
    seed: int = 26
    """Seed of both runs."""


def quickstart_command(arguments: list[str]) -> None:
    """``scm-wsol quickstart [--output-dir DIR]``."""
    options = cli.parse(QuickstartOptions, arguments, command="scm-wsol quickstart")
    began = time.perf_counter()
    out = new_output_folder(options.output_dir, overwrite=options.overwrite)
    changes: dict[str, Any] = {"seed": options.seed} | ({"epochs": options.epochs} if options.epochs else {})
    rows: list[dict[str, Any]] = []
    floors: list[dict[str, Any]] = []
    for method, recipe in RUNS.items():
        config = load_recipe("scm_wsol", recipe, ScmConfig, changes | {"output_dir": str(out / method)})
        evaluation = train(config, recipe).evaluation
        rows += table_rows(evaluation, method)
        floors = table_rows(evaluation, method, floors=True)
    table = format_table(rows + floors)
    record = run_record(options.seed, ("scm-wsol",))
    write_json(out / "table.json", {"rows": rows + floors, "record": record})
    save_picture(examples(out), out / "examples.png")
    photos = draw_fresh_photos(out / "photos")
    shown = cli_predict(out, photos)
    pages = [out / "tscam" / "report.html", out / "scm" / "report.html", Path(shown), out / "examples.png"]
    sys.stdout.write(
        f"\nTest split of the embedded default, percent; floors are maps that see nothing.\n\n{table}\n\n"
        f"Look at {', '.join(map(str, pages))}\nDone in {time.perf_counter() - began:.0f} s.\n"
    )


def table_rows(evaluation: Evaluation, method: str, *, floors: bool = False) -> list[dict[str, Any]]:
    """The rows of one run, or its floors."""
    name = "SCM" if method == "scm" else "TS-CAM"
    found = evaluation.table(name)
    return found[len(evaluation.kinds) :] if floors else found[: len(evaluation.kinds)]


def examples(out: Path, images: Sequence[int] = (0, 1, 3, 5, 6, 7)) -> Image.Image:
    """Test images with true and predicted box, and the score maps of both methods beside them."""
    from .cli import load_model

    columns: dict[str, list[Tile]] = {}
    for method in RUNS:
        config = load_recipe("scm_wsol", str(out / method / "recipe.toml"), ScmConfig)
        model = load_model(str(out / method / "model"))
        columns[method] = case_tiles(model, load_split(config, "test"), images, {})
    pictures: list[Image.Image] = []
    captions: list[str] = []
    for tscam, scm in zip(columns["tscam"], columns["scm"]):
        for tile, name in ((tscam, "TS-CAM"), (scm, "SCM")):
            pictures += tile.pictures
            captions += [f"{name}: {tile.caption.splitlines()[0]}", f"{name}: score map"]
    return contact_sheet(pictures, captions, columns=4, tile_size=190)


def draw_fresh_photos(folder: Path) -> Path:
    """Write unseen images as ordinary files."""
    for sample in load_data(FRESH, "test"):
        save_picture(sample.image, folder / f"creature_{sample.index:02d}.png")
    return folder


def cli_predict(out: Path, photos: Path) -> str:
    """``predict`` with the TS-CAM model folder, as a user would; returns the path of the report."""
    from .cli import program

    arguments = [str(photos), "--model", str(out / "tscam"), "--out", str(out / "predictions")]
    return cli.predict(program(), arguments)


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["quickstart", *sys.argv[1:]]))
