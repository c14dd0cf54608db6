"""Figures S4 and S5: two locations of an image, and the parts of other images most like them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attnmap_core import cli
from attnmap_core.data.sources import ImageData
from attnmap_core.errors import InputError
from attnmap_core.experiments import RunOptions
from attnmap_core.files import write_json
from attnmap_core.pictures import picture_grid, save_picture
from attnmap_core.recipes import run_record
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..cross_attention import CrossAttentionStack
from ..diagnostics import Part, part_rectangle, salient_locations, similar_parts
from ..model import EmbeddingModel
from ..rerank import TokenStore, store_tokens
from ..sheets import RIGHT, WRONG, framed
from .runs import METHOD, finished, network_view, open_pair, places_of, recipe_config

ORANGE = (255, 140, 0)


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Parts of unseen classes that look alike to the network. A finished run is not repeated."""

    model: str = ""
    """Run folder with a stack; a run of the recipe where not given."""
    recipe: str = "tiny-mutual"
    """Recipe of that run, and of the data."""
    queries: tuple[int, ...] = ()
    """Places of query images in the test data; random ones where not given."""
    locations: tuple[int, ...] = ()
    """Rows and columns of two locations of every query, as row column row column; where the last block looks if not."""
    auto: int = 2
    """Query images to choose."""
    descriptor: str = "tokens"
    """``tokens`` of the encoder, or ``keys:B`` of block B."""
    most: int = 8
    """Matches of each location."""
    random_locations: int = 200
    """Random locations behind the share of matches that have the query's class."""
    seed: int = 0
    """Of the run and of the choice."""
    out: Path = Path("runs/fig-parts")
    """Folder of the pictures and parts.json."""


def parts_command(arguments: list[str]) -> None:
    """``crossattn-dml reproduce fig-parts [--model RUN --data cub:PATH]``."""
    options = cli.parse(Options, arguments, command="crossattn-dml reproduce fig-parts")
    if len(options.locations) not in (0, 4):
        raise InputError(
            f"--locations {list(options.locations)}: expected four numbers, row column row column; change it"
        )
    folder = (
        options.model or finished(options, options.out / "run", options.recipe, options.seed, **METHOD).folder
    )
    model, stack = open_pair(folder, options.device)
    data = recipe_config(options.recipe, options.overrides()).load().query
    if any(not 0 <= query < len(data) for query in options.queries):
        raise InputError(
            f"--queries {list(options.queries)}: expected places of 0 to {len(data) - 1}; change it"
        )
    rng = np.random.default_rng(options.seed)
    queries = options.queries or tuple(sorted(int(i) for i in rng.permutation(len(data))[: options.auto]))
    targets = data.targets
    said: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        store = store_tokens(model, data, Path(place) / "tokens.npy")
        described = descriptors(store, stack, options.descriptor)
        for query in queries:
            given = options.locations
            where = (
                [(given[0], given[1]), (given[2], given[3])]
                if given
                else looked_at(store, stack, data, query)
            )
            found = [similar_parts(described, query, r, c, store.grid, most=options.most) for r, c in where]
            save_picture(
                parts_sheet(model, data, query, where, found, store.grid), options.out / f"parts-{query}.png"
            )
            for (row, col), parts in zip(where, found):
                matches = [
                    part._asdict() | {"same_label": bool(targets[part.image] == targets[query])}
                    for part in parts
                ]
                said.append({"query_image": query, "row": row, "col": col, "top": matches})
        share = share_of_same_class(
            described, targets, store.grid, options.random_locations, options.most, options.seed
        )
    write_json(
        options.out / "parts.json",
        {
            "queries": said,
            "grid": list(store.grid),
            "descriptor": options.descriptor,
            "same_class_share": share,
        }
        | {"record": run_record(options.seed, ("crossattn-dml",))},
    )
    sys.stdout.write(
        f"{len(queries)} queries; of the {options.most} matches of {options.random_locations} random locations "
        f"{100 * share:.1f} % have the class of the query: {options.out}\n"
    )


@torch.no_grad()
def descriptors(store: TokenStore, stack: CrossAttentionStack, name: str) -> NDArray[Any]:
    """``(n, t, c)`` of all locations: the tokens themselves, or the keys of a block.

    Raises:
        InputError: for another name, or a block that there is not.
    """
    if name == "tokens":
        return store.tokens
    kind, _, number = name.partition(":")
    if kind != "keys" or not number.isdecimal() or not 1 <= int(number) <= stack.depth:
        raise InputError(f"--descriptor {name}: expected tokens, or keys:1 to keys:{stack.depth}; change it")
    block = stack.block(int(number))
    weight = block.key.weight
    parts: list[NDArray[Any]] = []
    for start in range(0, len(store.tokens), 64):
        some = torch.from_numpy(store.tokens[start : start + 64]).to(weight.device, weight.dtype)
        keys = block.key(block.norm_memory(some))  # all heads one after the other
        parts.append(keys.half().cpu().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def looked_at(
    store: TokenStore, stack: CrossAttentionStack, data: ImageData, query: int, partners: int = 16
) -> list[tuple[int, int]]:
    """Two locations of an image at which the last block looks most, asked by others of its class."""
    same = [i for i in places_of(data)[int(data.targets[query])] if i != query][:partners]
    rows = [query, *(same or [query])]
    weight = next(stack.parameters())
    u, tokens = (
        torch.from_numpy(values[rows]).to(weight.device, weight.dtype) for values in (store.u, store.tokens)
    )
    A = stack.attention_maps(u, tokens, grid=store.grid)[stack.depth]
    mean = A[0, 1:].mean(dim=(0, 1)).double().cpu().numpy().reshape(store.grid)
    return salient_locations(mean)


def share_of_same_class(
    described: NDArray[Any],
    targets: NDArray[np.int64],
    grid: tuple[int, int],
    locations: int,
    most: int,
    seed: int,
) -> float:
    """Share of the matches of random locations that have the class of their image, a fraction; a number to track."""
    rng = np.random.default_rng([seed, 1])
    right: list[bool] = []
    for _ in range(locations):
        image, place = int(rng.integers(len(described))), int(rng.integers(grid[0] * grid[1]))
        if np.any(described[image, place]):
            parts = similar_parts(described, image, *divmod(place, grid[1]), grid, most=most)
            right += [bool(targets[part.image] == targets[image]) for part in parts]
    return float(np.mean(right)) if right else 0.0


def parts_sheet(
    model: EmbeddingModel,
    data: ImageData,
    query: int,
    where: Sequence[tuple[int, int]],
    found: Sequence[Sequence[Part]],
    grid: tuple[int, int],
) -> Image.Image:
    """A row for each location: the image with it in orange, then matches, green of the same class, red of another."""
    targets = data.targets
    shown = network_view(model, data[query].image)
    rows: list[list[Image.Image | None]] = []
    texts: list[list[str]] = []
    for (row, col), parts in zip(where, found):
        marked = shown.copy()
        x0, y0, x1, y1 = part_rectangle(row, col, grid, shown.size)
        ImageDraw.Draw(marked).rectangle(
            (x0, y0, x1 - 1, y1 - 1), outline=ORANGE, width=max(2, shown.width // 60)
        )
        cells: list[Image.Image | None] = [marked]
        for part in parts:
            view = network_view(model, data[part.image].image)
            crop = view.crop(part_rectangle(part.row, part.col, grid, view.size))
            same = targets[part.image] == targets[query]
            cells.append(framed(crop.resize((140, 140), Image.Resampling.BILINEAR), RIGHT if same else WRONG))
        rows.append(cells)
        texts.append([data.labels[int(targets[query])], *(f"{part.cosine:.2f}" for part in parts)])
    return picture_grid(rows, captions=texts, cell_size=150, margin_after=(0, 1))
