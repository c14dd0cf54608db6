"""Photos and what they find, nearest first: of any folder or data set, without a projection to two dimensions."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from attnmap_core import cli
from attnmap_core.data.sources import check_data_options, load_data
from attnmap_core.errors import InputError
from attnmap_core.files import write_json
from attnmap_core.metrics import retrieval
from attnmap_core.pictures import save_picture
from attnmap_core.recipes import run_record

from ..evaluate import embed_data
from ..sheets import neighbour_sheet, rows_of
from .runs import open_model


@dataclass(frozen=True, kw_only=True)
class Options:
    """A sheet of queries with their nearest photos; frames are green and red where classes are known."""

    model: str
    """Model folder, run folder or Hub id."""
    data: str
    """A folder of photos, or any data source."""
    data_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Options of the data source."""
    split: str = "all"
    """Part of the data."""
    queries: int = 8
    """Photos that ask, evenly spaced over a random order."""
    k: int = 8
    """Photos found by each."""
    seed: int = 0
    """Of the choice."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    out: Path = Path("runs/neighbours")
    """Folder of neighbours.png and neighbours.json."""


def neighbours_command(arguments: list[str]) -> None:
    """``crossattn-dml reproduce neighbours --model RUN --data PHOTOS``."""
    options = cli.parse(Options, arguments, command="crossattn-dml reproduce neighbours")
    if options.queries < 1:
        raise InputError(f"--queries {options.queries}: expected 1 or more; 8 is usual")
    check_data_options(options.data_options)
    data = load_data(options.data, options.split, **options.data_options)  # pyright: ignore[reportArgumentType]
    model = open_model(options.model, options.device)
    found = embed_data(model, data)
    chosen = np.random.default_rng(options.seed).permutation(len(data))[: options.queries]
    # A photo of the data finds itself: one more is asked for, and it is left out by its place.
    near = retrieval.nearest(found.z[chosen], found.z, options.k + 1)
    indices = np.array(
        [[i for i in row if i != query][: options.k] for query, row in zip(chosen, near.indices)]
    )
    known = len(data.labels) > 1
    right = [
        [bool(found.labels[i] == found.labels[q]) if known else None for i in row]
        for q, row in zip(chosen, indices)
    ]
    cosines = np.einsum("qd,qkd->qk", found.z[chosen], found.z[indices])
    captions = [
        [
            data.labels[int(found.labels[q])] if known else Path(data.image_ids[q]).name,
            *(
                f"{value:.2f} "
                + (data.labels[int(found.labels[i])] if known else Path(data.image_ids[i]).name)
                for i, value in zip(row, values)
            ),
        ]
        for q, row, values in zip(chosen, indices, cosines)
    ]
    queries = [data[int(q)].image for q in chosen]
    save_picture(
        neighbour_sheet(queries, rows_of(data, indices), right, captions), options.out / "neighbours.png"
    )
    ids = data.image_ids
    rows = [
        {"query": ids[q], "found": [ids[i] for i in row], "cosines": [round(float(v), 4) for v in values]}
        for q, row, values in zip(chosen, indices, cosines)
    ]
    record = run_record(options.seed, ("crossattn-dml",))
    write_json(options.out / "neighbours.json", {"data": data.name, "rows": rows, "record": record})
    sys.stdout.write(f"{options.out / 'neighbours.png'}\n")
