"""The figures of the paper: attention masks of plain and SAR models side by side, the schematic, accuracy by epoch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from attnmap_core import cli
from attnmap_core.data.sources import ImageData, load_data
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.files import write_json
from attnmap_core.pictures import line_plot, save_picture
from attnmap_core.recipes import run_record
from PIL import Image

from ..evaluate import open_model
from ..pictures import attention_mosaic, schematic
from .cases import TABLE_6, TABLE_9B, Case, Training
from .tables import Options as TableOptions
from .tables import check, scale_note, trained

FIG_3 = {"plain": {"300": 79.8}, "SAR": {"250": 79.9, "300": 80.7}}
"""What the text says about figure 3: top-1 by epoch on ImageNet-1K."""


@dataclass(frozen=True, kw_only=True)
class Options(TableOptions):
    """A figure of the paper, from trained models or from runs at either scale. Finished runs are not repeated."""

    models: dict[str, str] = field(default_factory=dict[str, str])
    """Trained models by the name they are shown with, in place of runs: --models.plain DIR --models.SAR DIR."""
    photos: tuple[str, ...] = ()
    """Photos to show; test images of the runs' data where not given."""
    images: tuple[int, ...] = ()
    """Which test images; spread over the split where not given."""


def figure_command(name: str, arguments: list[str]) -> None:
    """``sar-vit reproduce fig1 ... fig8``."""
    options = cli.parse(Options, arguments, command=f"sar-vit reproduce {name}")
    check(name, options)
    out = options.out / name
    if name == "fig3":
        picture, facts = accuracy_by_epoch(options)
    else:
        models, facts = shown_models(name, options)
        count = 8 if name == "fig8" else 1 if name == "fig2" else 4
        photos = chosen_photos(options, models, count)
        picture = (
            schematic_of(next(iter(models.values())), photos[0], options.device)
            if name == "fig2"
            else mosaic(models, photos, range(len(photos)), options.device)
        )
    saved = save_picture(picture, out / f"{name}.png")
    write_json(out / f"{name}.json", {**facts, "record": run_record(options.seeds[0], ("sar-vit",))})
    if facts.get("note"):
        sys.stdout.write(f"{facts['note']}\n")
    sys.stdout.write(f"{saved}\n")


def shown_models(name: str, options: Options) -> tuple[dict[str, Path], dict[str, Any]]:
    """Model folders by the name they are shown with: those given, or runs of the cases that the figure is about."""
    if options.models:
        return {title: Path(folder) for title, folder in options.models.items()}, {"models": options.models}
    supervised = {case.labels["model"].removeprefix("ViT-S, "): case for case in TABLE_6.cases}
    of: dict[str, dict[str, Case]] = {
        method: {
            f"{method}{'' if case.labels['model'] == 'plain' else ' + SAR'}": case
            for case in TABLE_9B.cases
            if case.labels["method"] == method
        }
        for method in ("MoCo-v3", "DINO")
    }
    wanted: dict[str, Case] = {
        "fig1": {"supervised": supervised["plain"], "DINO": of["DINO"]["DINO"], "SAR": supervised["SAR"]},
        "fig2": {"SAR": supervised["SAR"]},
        "fig6": of["MoCo-v3"],
        "fig7": of["DINO"],
    }.get(name, supervised)
    runs = {title: trained(case, options, options.seeds[0]) for title, case in wanted.items()}
    facts = {
        "models": {title: str(run.folder) for title, run in runs.items()},
        "note": scale_note(options, [run.config for run in runs.values()]),
    }
    return {title: run.folder for title, run in runs.items()}, facts


def chosen_photos(options: Options, models: Mapping[str, Path], count: int) -> Any:
    """Photos of the user, or test images of the data that the first model was trained on.

    Raises:
        InputError: for an index outside of the data, or models from elsewhere without photos.
    """
    if options.photos:
        from attnmap_core.data.images import load_image

        return [load_image(photo) for photo in options.photos]
    recipe = next(iter(models.values())) / "recipe.toml"
    if options.data:
        source: dict[str, Any] = {**options.data_options}
        data = load_data(options.data, "test", **source)
    elif recipe.is_file():
        from attnmap_core.recipes import load_recipe

        from ..config import SarConfig

        config = load_recipe("sar_vit", str(recipe), SarConfig)
        data = load_data(config.data, "test", **config.source_options())
    else:
        raise InputError("--models: no run folders, so their data are not known; give --photos or --data")
    wanted = options.images or [
        round(i * (len(data) - 1) / max(count - 1, 1)) for i in range(min(count, len(data)))
    ]
    for index in wanted:
        if not 0 <= index < len(data):
            raise InputError(f"--images {index}: no such image; {data.name}, test has 0 to {len(data) - 1}")
    return [data[index].image for index in wanted]


def mosaic(models: Mapping[str, str | Path], photos: Any, which: Sequence[int], device: str) -> Image.Image:
    """Attention masks of all heads: a row for each photo and model.

    Args:
        models: model or run folder, by the name to show.
        photos: images, or an :class:`ImageData`.
        which: of them.
        device: cpu, cuda, mps or auto.
    """
    images = [photos[i].image if isinstance(photos, ImageData) else photos[i] for i in which]
    attention = {title: attention_of(folder, images, device) for title, folder in models.items()}
    return attention_mosaic(images, attention)


@torch.inference_mode()
def attention_of(folder: str | Path, images: Sequence[Image.Image], device: str) -> list[Any]:
    """The last block's attention ``(heads, h, w)`` for each image, resized as a whole to the model's input."""
    model = open_model(str(folder)).to(cli.choose_device(device)).eval()
    transform = eval_transform(model.preprocessing)
    where = next(model.parameters()).device
    return [model.attention_maps(transform(image)[None].to(where))[1][0].cpu().numpy() for image in images]


@torch.inference_mode()
def schematic_of(folder: str | Path, image: Image.Image, device: str) -> Image.Image:
    """Similarity map, thresholded map and components of each head, with the masks of its attention."""
    model = open_model(str(folder)).to(cli.choose_device(device)).eval()
    pixels = eval_transform(model.preprocessing)(image)[None].to(next(model.parameters()).device)
    with model.collector.recording() as recorded:
        model(pixels)
    S, A = (model.collector.maps(recorded, kind)[0].cpu().numpy() for kind in ("dot", "softmax"))
    return schematic(S, image, A)


def accuracy_by_epoch(options: Options) -> tuple[Any, dict[str, Any]]:
    """Figure 3: test accuracy after each epoch, a line for each model."""
    curves: dict[str, list[float]] = {}
    configs: list[Any] = []
    for case in TABLE_6.cases:
        training: Training = getattr(case, options.scale)
        # The published curve is on the split that is reported.
        changes = {**training.changes, "evaluate_every": 1, "select_on": "test"}
        again = Training(recipe=training.recipe, changes=changes)
        run = trained(
            Case(labels=case.labels, published={}, tiny=again, paper=again), options, options.seeds[0]
        )
        curves[case.labels["model"]] = [record["metrics"]["top1"] for record in run.epochs()]
        configs.append(run.config)
    epochs = [str(i + 1) for i in range(len(next(iter(curves.values()))))]
    figure = line_plot(epochs, curves, x_label="epoch", y_label="top-1, %")
    return figure, {"top1": curves, "published": FIG_3, "note": scale_note(options, configs)}
