"""Pictures of attention: masks of the heads, mosaics of them, and how the entropy of a map comes about.

Peruzzo et al., arXiv 2206.04636: figures 1, 4, 6, 7, 8 (masks) and 2 (schematic).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from attnmap_core.metrics.segmentation import mass_mask
from attnmap_core.pictures import (
    ImageLike,
    binary_mask_overlay,
    colorize,
    contact_sheet,
    for_display,
    overlay,
    picture_grid,
)
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from .entropy import map_components, spatial_entropy

MASK_COLOR = (255, 64, 48)
"""Red of attention masks, as in the paper."""
_OPACITY = 0.5
_BACKGROUND = (226, 229, 233)
_COLORS = "tab10"


def mass_mask_picture(
    image: ImageLike,
    attention: ArrayLike,
    mass: float = 0.6,
    *,
    opacity: float = _OPACITY,
    size: int | None = 480,
) -> Image.Image:
    """A photo with the patches of a head tinted and outlined that hold most of its attention (section 4.5).

    Args:
        image: the photo, of any size.
        attention: ``(h, w)`` of one head to the patches, not negative, of any sum.
        mass: share of the attention that the mask keeps, in ``(0, 1]``.
        opacity: of the tint, in ``[0, 1]``.
        size: the photo is first resized to a square of so many pixels, as the figures of the paper show it; None
            keeps its aspect and size.

    Returns:
        An RGB picture.

    Raises:
        ValueError: for attention that is not such a map, or a share outside ``(0, 1]``.

    Example:
        >>> picture = mass_mask_picture(np.full((40, 40), 200, np.uint8), [[0.7, 0.1], [0.1, 0.1]])
        >>> picture.size, picture.getpixel((200, 200)), picture.getpixel((400, 400))
        ((480, 480), (228, 132, 124), (100, 100, 100))
    """
    rows = np.asarray(attention, np.float64)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"attention of one head must be (h, w), got {rows.shape}")
    mask = mass_mask(rows.ravel(), mass).reshape(rows.shape)
    photo = for_display(image, None)
    if size is not None:
        photo = photo.resize((size, size), Image.Resampling.BILINEAR)
    return binary_mask_overlay(photo, mask, MASK_COLOR, opacity, longest_side=None)


def attention_picture(image: ImageLike, attention: ArrayLike, *, size: int | None = None) -> Image.Image:
    """A photo under a heat map of attention, stretched to its range.

    Args:
        image: the photo.
        attention: ``(h, w)`` finite, of any range.
        size: as in :func:`mass_mask_picture`.

    Example:
        >>> attention_picture(Image.new("RGB", (30, 20)), np.eye(4), size=64).size
        (64, 64)
    """
    photo = for_display(image, None)
    photo = photo if size is None else photo.resize((size, size), Image.Resampling.BILINEAR)
    return overlay(photo, _stretched(attention), longest_side=None)


def head_sheet(image: ImageLike, attention: ArrayLike, mass: float = 0.6) -> Image.Image:
    """The masks of all heads of a photo in one small picture, head by head in rows.

    Args:
        image: the photo.
        attention: ``(heads, h, w)``.
        mass: see :func:`mass_mask_picture`.

    Example:
        >>> head_sheet(Image.new("RGB", (60, 40)), np.ones((3, 2, 2))).mode
        'RGB'
    """
    heads = _heads(attention)
    columns = int(np.ceil(np.sqrt(len(heads))))
    return contact_sheet(
        [mass_mask_picture(image, head, mass, size=160) for head in heads], columns=columns, tile_size=160
    )


def attention_mosaic(
    photos: Sequence[ImageLike],
    attention: Mapping[str, Sequence[ArrayLike]],
    mass: float = 0.6,
    *,
    captions: Sequence[str] | None = None,
    cell_size: int = 160,
) -> Image.Image:
    """Photos and the masks of all heads: a row for each photo and model.

    Args:
        photos: of any size; each is shown beside the rows that belong to it.
        attention: by name of the model, maps ``(heads, h, w)`` for each photo; one model makes one row a photo, two
            (such as a baseline and SAR) make two, labelled. Fewer heads leave places empty.
        mass: see :func:`mass_mask_picture`.
        captions: a text for each photo, below its first picture.
        cell_size: side of a picture in pixels.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if a model has not one map stack for each photo, or there is nothing to show.

    Example:
        >>> photo = Image.new("RGB", (60, 40))
        >>> maps = [np.ones((2, 4, 4))]
        >>> attention_mosaic([photo], {"ViT": maps, "SAR": maps}, cell_size=100).size
        (367, 239)
    """
    if not photos or not attention:
        raise ValueError(f"a mosaic needs photos and models, got {len(photos)} and {len(attention)}")
    for name, several in attention.items():
        if len(several) != len(photos):
            raise ValueError(f"{name}: {len(several)} stacks of maps for {len(photos)} photos")
    if captions is not None and len(captions) != len(photos):
        raise ValueError(f"{len(captions)} captions for {len(photos)} photos")
    stacks = {name: [_heads(maps) for maps in several] for name, several in attention.items()}
    most = max(len(heads) for several in stacks.values() for heads in several)
    cells: list[list[Image.Image | None]] = []
    texts: list[list[str]] = []
    for i, photo in enumerate(photos):
        square = for_display(photo, None).resize((480, 480), Image.Resampling.BILINEAR)
        for row, several in enumerate(stacks.values()):
            masks = [mass_mask_picture(square, head, mass) for head in several[i]]
            cells.append([None if row else square, *masks, *[None] * (most - len(masks))])
            texts.append([captions[i] if captions is not None and not row else "", *[""] * most])
    return picture_grid(
        cells,
        list(stacks) * len(photos) if len(stacks) > 1 else None,
        ["photo", *(f"head {h}" for h in range(1, most + 1))],
        captions=texts if captions is not None else None,
        cell_size=cell_size,
        margin_after=(0, 1),
    )


def schematic(
    S: ArrayLike,
    image: ImageLike | None = None,
    attention: ArrayLike | None = None,
    *,
    mass: float = 0.6,
    cell_size: int = 220,
) -> Image.Image:
    """How the spatial entropy of a map comes about: S, what is above its mean, and the components (figure 2).

    Args:
        S: ``(heads, h, w)`` similarity maps, or one ``(h, w)``; any sign and scale. A row for each head.
        image: the photo they belong to, shown first.
        attention: ``(heads, h, w)`` attention maps, or one, for a last column with the masks; needs ``image``.
        mass: share of the attention that a mask keeps.
        cell_size: side of a picture in pixels.

    Returns:
        An RGB picture. Under the components are their number r, the shares P of the largest and the entropy E.

    Raises:
        ValueError: for maps that are not finite or do not fit together.

    Example:
        >>> S = np.zeros((6, 6))
        >>> S[1, 1] = S[4, 4] = 1
        >>> schematic(S, cell_size=100).size
        (324, 169)
    """
    maps = _heads(S)
    masks = None if attention is None else _heads(attention)
    if masks is not None and (image is None or len(masks) != len(maps)):
        raise ValueError("attention needs an image, and as many heads as S")
    photo = None if image is None else for_display(image, None).resize((480, 480), Image.Resampling.BILINEAR)
    cells: list[list[Image.Image]] = []
    captions: list[list[str]] = []
    for h, similarity in enumerate(maps):
        row, said = entropy_pictures(similarity, cell_size)
        texts = [f"head {h + 1}" if len(maps) > 1 else "", "", said]
        if photo is not None:
            row, texts = [photo, *row], ["", *texts]
        if masks is not None and photo is not None:
            row, texts = [*row, mass_mask_picture(photo, masks[h], mass)], [*texts, ""]
        cells.append(row)
        captions.append(texts)
    titles = ["similarity S", "B = relu(S - mean)", "components"]
    titles = (
        ["photo"] * (photo is not None) + titles + [f"{100 * mass:.0f} % of attention"] * (masks is not None)
    )
    return picture_grid(cells, column_titles=titles, captions=captions, cell_size=cell_size)


def entropy_pictures(S: ArrayLike, side: int = 220) -> tuple[list[Image.Image], str]:
    """The pictures of :func:`schematic` for one map, and what is said below them.

    Args:
        S: ``(h, w)``, finite.
        side: of each picture in pixels.

    Returns:
        S, B and the components, each patch a rectangle; and the number of components r, the entropy E in nats and
        the largest shares P, in two lines.

    Example:
        >>> S = np.zeros((6, 6))
        >>> S[1, 1], S[4, 4] = 3, 1
        >>> entropy_pictures(S)[1].splitlines()
        ['r = 2, E = 0.55', 'P: 0.76 0.24']
    """
    [similarity] = _heads(S)
    found = map_components(torch.from_numpy(similarity))
    entropy = float(spatial_entropy(torch.from_numpy(similarity), eps=0.0))
    shares = np.sort(found.shares.numpy())[::-1]
    shares = shares[shares > 0]
    said = " ".join(f"{share:.2f}" for share in shares[:3]) + (" …" if len(shares) > 3 else "")
    B = np.maximum(similarity - similarity.mean(), 0)
    colors = [
        colorize(_stretched(similarity), colormap="viridis"),
        colorize(_stretched(B), colormap="magma"),
        component_colors(found.labels.numpy(), found.shares.numpy()),
    ]
    # Every patch is a rectangle of one colour, as the components are of patches.
    pictures = [Image.fromarray(c).resize((side, side), Image.Resampling.NEAREST) for c in colors]
    return pictures, f"r = {len(shares)}, E = {entropy:.2f}\nP: {said}"


def component_colors(labels: NDArray[np.integer], shares: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours of labelled components, the largest share first in the palette; background is light grey.

    Args:
        labels: ``(h, w)`` of :func:`sar_vit.entropy.map_components`.
        shares: ``(h w,)``, likewise.

    Returns:
        ``(h, w, 3)``. Of more than ten components the smaller ones have colours again, but never the
        largest's.

    Example:
        >>> component_colors(np.array([[0, -1]]), np.array([1.0, 0.0])).tolist()
        [[[31, 119, 180], [226, 229, 233]]]
    """
    palette = colorize((np.arange(10) / 9)[None], colormap=_COLORS)[0]
    rank = np.empty(len(shares), np.int64)
    rank[np.argsort(-shares, kind="stable")] = np.arange(len(shares))
    again = np.where(
        rank > 0, 1 + (rank - 1) % (len(palette) - 1), 0
    )  # the first colour is the largest's alone
    colors = palette[again[np.maximum(labels, 0)]]
    return np.where((labels < 0)[..., None], np.array(_BACKGROUND, np.uint8), colors)


def _heads(maps: ArrayLike) -> NDArray[np.float64]:
    stack = np.asarray(maps, np.float64)
    stack = stack[None] if stack.ndim == 2 else stack
    if stack.ndim != 3 or not stack.size or not np.isfinite(stack).all():
        raise ValueError(f"maps must be finite (heads, h, w), got {stack.shape}")
    return stack


def _stretched(values: ArrayLike) -> NDArray[np.float64]:
    given = np.asarray(values, np.float64)
    low, span = given.min(), np.ptp(given)
    return (given - low) / span if span > 0 else np.zeros_like(given)
