"""Figures S2 and S3: where blocks look in a triple, an image with one of its class and one of another."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attnmap_core import cli
from attnmap_core.errors import InputError
from attnmap_core.experiments import RunOptions
from attnmap_core.files import atomic_file, write_json
from attnmap_core.pictures import overlay, picture_grid, save_picture
from attnmap_core.recipes import run_record
from numpy.typing import NDArray
from PIL import Image

from ..diagnostics import TripleMaps, triple_maps
from ..evaluate import embed_data
from .runs import METHOD, finished, network_view, open_pair, recipe_config, seen


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Attention of some blocks on triples of unseen classes. A finished run is not repeated."""

    model: str = ""
    """Run folder with a stack; a run of the recipe where not given."""
    recipe: str = "tiny-mutual"
    """Recipe of that run, and of the data."""
    blocks: tuple[int, ...] = ()
    """Blocks to show, from 1; 2, 4 and 6 where the stack has them, else all."""
    triples: tuple[int, ...] = ()
    """Places of images in the test data, three for each triple; chosen at random where not given."""
    auto: int = 4
    """Triples to choose: a random image, its nearest one of the same class, its nearest of another."""
    direction: Literal["text", "caption"] = "text"
    """``text``: maps on the first image, asked by the other two; ``caption``: on the other two, asked by the first."""
    heads: bool = False
    """Also save the maps of each head."""
    seed: int = 0
    """Of the run and of the choice."""
    out: Path = Path("runs/fig-attention")
    """Folder of the pictures, triples.json and maps.npz."""


def attention_command(arguments: list[str]) -> None:
    """``crossattn-dml reproduce fig-attention [--model RUN --data cub:PATH]``."""
    options = cli.parse(Options, arguments, command="crossattn-dml reproduce fig-attention")
    folder = (
        options.model or finished(options, options.out / "run", options.recipe, options.seed, **METHOD).folder
    )
    model, stack = open_pair(folder, options.device)
    data = recipe_config(options.recipe, options.overrides()).load().query
    if len(options.triples) % 3 or any(not 0 <= place < len(data) for place in options.triples):
        raise InputError(
            f"--triples {list(options.triples)}: expected three places for each triple, of 0 to {len(data) - 1}"
        )
    triples = [options.triples[i : i + 3] for i in range(0, len(options.triples), 3)]
    if not triples:
        found = embed_data(model, data)
        triples = chosen_triples(found.z, found.labels, options.auto, options.seed)
    usual = tuple(block for block in (2, 4, 6) if block <= stack.depth)
    blocks = options.blocks or (usual if stack.depth >= 2 else (1,))
    arrays: dict[str, NDArray[np.float64]] = {}
    for number, places in enumerate(triples):
        photos = [network_view(model, data[int(place)].image) for place in places]
        maps = triple_maps(
            stack,
            seen(model, [data[int(place)].image for place in places]),
            blocks,
            direction=options.direction,
        )
        save_picture(triple_sheet(photos, maps), options.out / f"triple-{number}.png")
        for block, of in maps.items():
            arrays |= {f"{number}_block{block}_upper": of.upper, f"{number}_block{block}_lower": of.lower}
            if of.difference is not None:
                arrays[f"{number}_block{block}_sqdiff"] = of.difference
            if options.heads:
                arrays[f"{number}_block{block}_heads"] = of.heads
    with atomic_file(options.out / "maps.npz") as path:
        np.savez(path, **arrays)  # pyright: ignore[reportArgumentType] (names of arrays)
    said = [
        {
            "places": [int(place) for place in places],
            "photos": [data.image_ids[int(place)] for place in places],
            "classes": [data.labels[int(data.targets[int(place)])] for place in places],
        }
        for places in triples
    ]
    write_json(
        options.out / "triples.json",
        {"triples": said, "blocks": list(blocks), "direction": options.direction}
        | {"record": run_record(options.seed, ("crossattn-dml",))},
    )
    sys.stdout.write(f"{len(triples)} triples, blocks {', '.join(map(str, blocks))}: {options.out}\n")


def chosen_triples(
    z: NDArray[Any], labels: NDArray[np.int64], count: int, seed: int = 0
) -> list[tuple[int, int, int]]:
    """Random images, each with the nearest image of its class and the nearest of another.

    Args:
        z: ``(n, d)`` of length 1.
        labels: ``(n,)``.
        count: triples; fewer where fewer images have both.
        seed: of the choice.

    Raises:
        InputError: where no image has both.
    """
    triples: list[tuple[int, int, int]] = []
    for a in np.random.default_rng(seed).permutation(len(z)).tolist():
        same, other = labels == labels[a], labels != labels[a]
        same[a] = False
        if len(triples) < count and same.any() and other.any():
            similar = z @ z[a]
            near = [int(np.where(mask, similar, -np.inf).argmax()) for mask in (same, other)]
            triples.append((int(a), near[0], near[1]))
    if not triples:
        raise InputError("no image has another one of its class and one of another class; give other data")
    return triples


def triple_sheet(photos: Sequence[Image.Image], maps: Mapping[int, TripleMaps]) -> Image.Image:
    """The triple, then rows of maps: for the first partner, their squared difference, for the second; a column a block.

    Both maps of a block share a scale from 0 to their maximum; the difference has its own.
    """
    anchor, first, second = photos
    on_anchor = next(iter(maps.values())).difference is not None
    upper: list[Image.Image | None] = [first]
    middle: list[Image.Image | None] = [anchor]
    lower: list[Image.Image | None] = [second]
    for of in maps.values():
        top = max(float(of.upper.max()), float(of.lower.max())) or 1.0
        upper.append(
            overlay(anchor if on_anchor else first, smooth(of.upper / top, anchor.size), map_weight=0.5)
        )
        lower.append(
            overlay(anchor if on_anchor else second, smooth(of.lower / top, anchor.size), map_weight=0.5)
        )
        middle.append(None)
        if of.difference is not None:
            scale = float(of.difference.max()) or 1.0
            middle[-1] = overlay(anchor, smooth(of.difference / scale, anchor.size), map_weight=0.5)
    return picture_grid(
        [upper, middle, lower],
        ["same class", "difference²" if on_anchor else "image", "other class"],
        ["photos", *(f"block {block}" for block in maps)],
        cell_size=150,
        margin_after=(0, 1),
    )


def smooth(values: NDArray[np.float64], size_wh: tuple[int, int]) -> NDArray[np.float64]:
    """A map stretched bilinearly to a picture, in ``[0, 1]``."""
    stretched = Image.fromarray(values.astype(np.float32)).resize(size_wh, Image.Resampling.BILINEAR)
    return np.asarray(stretched, np.float64).clip(0, 1)
