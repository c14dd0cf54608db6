"""Pictures of what finds what: a query and its nearest photos, in frames that say whether the class is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from attnmap_core.data.sources import ImageData
from attnmap_core.metrics import retrieval
from attnmap_core.pictures import for_display, picture_grid
from attnmap_core.report import Gallery, Tile, select_cases
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .evaluate import EmbeddedData

RIGHT, WRONG, QUERY = (46, 160, 67), (215, 58, 73), (90, 100, 110)
"""Frames: same class, another one, the query itself."""


def framed(image: Image.Image, colour: tuple[int, int, int], side: int = 150) -> Image.Image:
    """A picture, at most ``side`` pixels long, in a frame.

    Example:
        >>> framed(Image.new("RGB", (300, 150)), RIGHT).size
        (150, 80)
    """
    inner = for_display(image, (side - 10, side - 10))
    return ImageOps.expand(inner, border=5, fill=colour)


def neighbour_sheet(
    queries: Sequence[Image.Image],
    found: Sequence[Sequence[Image.Image]],
    right: Sequence[Sequence[bool | None]],
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """A row for each query: the photo, then what it finds, nearest first.

    Args:
        queries: one photo a row.
        found: of each query, as many photos in all rows.
        right: whether the class is the query's; None where no class is known.
        captions: a text for the query and for each photo, row by row.

    Returns:
        An RGB picture.
    """
    rows = [
        [
            framed(query, QUERY),
            *(
                framed(photo, QUERY if same is None else RIGHT if same else WRONG)
                for photo, same in zip(photos, of)
            ),
        ]
        for query, photos, of in zip(queries, found, right)
    ]
    return picture_grid(rows, captions=captions, cell_size=150, margin_after=(0, 1))


def neighbour_galleries(
    query: ImageData,
    gallery: ImageData | None,
    found: EmbeddedData,
    searched: EmbeddedData | None,
    *,
    each: int = 6,
    shown: int = 5,
) -> list[Gallery]:
    """Queries with their nearest photos: those that find most of their class, least, and some at random.

    Args:
        query, gallery: the images.
        found, searched: what a model says of them.
        each: queries a gallery.
        shown: photos of each.
    """
    others, target = gallery or query, searched or found
    near = retrieval.nearest(
        found.z, None if searched is None else searched.z, min(shown, len(target.z) - (searched is None))
    )
    right: NDArray[np.bool_] = target.labels[near.indices] == found.labels[:, None]
    galleries: list[Gallery] = []
    titles = {"best": "Best cases", "worst": "Worst cases", "random": "Random cases"}
    for group, chosen in select_cases(dict(enumerate(right.mean(axis=1).tolist())), each).items():
        tiles = [
            Tile(
                pictures=[
                    framed(query[i].image, QUERY),
                    *(
                        framed(others[int(j)].image, RIGHT if same else WRONG)
                        for j, same in zip(near.indices[i], right[i])
                    ),
                ],
                caption=f"{query.labels[int(found.labels[i])]}\n{int(right[i].sum())} of {right.shape[1]} of its class",
            )
            for i in chosen
        ]
        if tiles:
            note = (
                "The query, then its nearest photos: green of its class, red of another."
                if not galleries
                else ""
            )
            galleries.append(Gallery(title=titles[group], tiles=tiles, note=note))
    return galleries


def rows_of(
    data: ImageData,
    indices: NDArray[np.int64],
    picture: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> list[list[Image.Image]]:
    """Photos of a table of places ``(rows, columns)``, each read once."""
    read: dict[int, Image.Image] = {int(i): picture(data[int(i)].image) for i in np.unique(indices)}
    return [[read[int(i)] for i in row] for row in indices]
