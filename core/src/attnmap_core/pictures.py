"""Pictures of score maps, boxes, masks and curves: pure functions, an image or a figure out.

Photos come in as PIL images or uint8 arrays and go out as PIL images whose longest side lies within
:data:`DISPLAY_LIMITS`, so that a 32-pixel photo can be read and a 20,000-pixel one can be opened. Plots
come out as matplotlib figures made without pyplot: nothing global is touched and no window can open.
:func:`save_picture` writes either, atomically and with the same bytes every time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from .errors import InputError
from .files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ImageLike: TypeAlias = Image.Image | NDArray[np.uint8]
Color: TypeAlias = tuple[int, int, int]

TRUTH_COLOR: Color = (224, 16, 32)
"""Red of true boxes; dark, so that it also differs from the green for colour-blind readers."""
PREDICTION_COLOR: Color = (48, 232, 72)
"""Green of predicted boxes and masks."""
DISPLAY_LIMITS = (320, 1600)
"""Smallest and largest longest side, in pixels, of a picture made here."""

PLOT_INK = "#3f4752"
"""Colour of the text and axes of every plot."""
_PLOT_COLORS = ("#2b7bd6", "#e07b1a", "#2a9d5c", "#c2408f", "#8a6fd1", "#b09000", "#1fa3b0", "#d1483c")
_LINE_STYLES = ("-", "--", ":", "-.")
_PLOT_STYLE: dict[Any, Any] = {
    "axes.edgecolor": PLOT_INK,
    "axes.grid": True,
    "axes.labelcolor": PLOT_INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": PLOT_INK,
    "axes.titlesize": 11,
    "font.family": ["DejaVu Sans", "sans-serif"],  # the first ships with matplotlib: alike on every machine
    "font.size": 9.5,
    "grid.alpha": 0.18,
    "grid.color": PLOT_INK,
    "legend.frameon": False,
    "legend.labelcolor": PLOT_INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "text.color": PLOT_INK,
    "xtick.color": PLOT_INK,
    "ytick.color": PLOT_INK,
}


# ---------------------------------------------------------------- photos


def overlay(
    image: ImageLike,
    score_map: ArrayLike,
    colormap: str = "jet",
    image_weight: float = 0.5,
    map_weight: float = 0.6,
    *,
    longest_side: tuple[int, int] | None = DISPLAY_LIMITS,
) -> Image.Image:
    """Lay a coloured score map over a photo: ``image_weight * photo + map_weight * colours``, clipped.

    The default weights are those of the SCM release; TS-CAM draws 0.2 and 0.8.

    Args:
        image: the photo, any colour mode of 8 bits.
        score_map: ``(h, w)`` in ``[0, 1]``, of any resolution and aspect: it is stretched to the photo.
        colormap: name of a matplotlib colour map.
        image_weight: share of the photo, at least 0.
        map_weight: share of the colours, at least 0.
        longest_side: bounds on the longest side of the result; smaller photos are enlarged, larger
            ones reduced. None keeps the photo's size.

    Returns:
        An RGB picture with the photo's aspect.

    Raises:
        ValueError: if the map is not 2-D, not finite or not in ``[0, 1]``, or the colour map is unknown.

    Example:
        >>> photo = Image.new("L", (640, 480), 100)
        >>> overlay(photo, np.eye(14)).size
        (640, 480)
        >>> overlay(photo, np.zeros((7, 7)), image_weight=1, map_weight=0).getpixel((0, 0))
        (100, 100, 100)
    """
    photo = for_display(image, longest_side)
    colors = colorize(score_map, photo.size, colormap)
    mixed = image_weight * np.asarray(photo, np.float32) + map_weight * colors.astype(np.float32)
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def draw_boxes(
    image: ImageLike,
    truth_xyxy: ArrayLike | None = None,
    predicted_xyxy: ArrayLike | None = None,
    scores: Sequence[float] | NDArray[np.floating] | None = None,
    labels: Sequence[str] | None = None,
    *,
    size_wh: tuple[int, int] | None = None,
    longest_side: tuple[int, int] | None = DISPLAY_LIMITS,
) -> Image.Image:
    """Draw true boxes in red and predicted boxes in green.

    Lines lie just inside the box and have a dark rim; the red line is the wider one, so that both show
    where the boxes coincide. Line width and text grow with the picture. What lies outside the photo is cut.

    Args:
        image: the photo, or a resized copy of it such as an :func:`overlay`.
        truth_xyxy: ``(k, 4)`` pixels of the photo, end exclusive.
        predicted_xyxy: ``(k, 4)``, the same.
        scores: one number per predicted box, written on it.
        labels: one text per predicted box, written on it.
        size_wh: width and height of the photo the boxes belong to, when ``image`` is a resized copy.
        longest_side: bounds on the longest side of the result, as in :func:`overlay`.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if boxes are not finite ``(k, 4)``, or scores or labels do not fit the predicted boxes.

    Example:
        >>> picture = draw_boxes(Image.new("RGB", (400, 300)), [[10, 20, 110, 90]], [[200, 20, 300, 90]])
        >>> picture.getpixel((10, 20)) == TRUTH_COLOR, picture.getpixel((299, 89)) == PREDICTION_COLOR
        (True, True)
    """
    photo = rgb_image(image)
    source_wh = np.asarray(size_wh or photo.size, np.float64)
    picture = for_display(photo, longest_side)
    scale = np.tile(np.asarray(picture.size) / source_wh, 2)
    truth = _boxes(truth_xyxy, "truth_xyxy") * scale
    predicted = _boxes(predicted_xyxy, "predicted_xyxy") * scale
    tags = _tags(len(predicted), scores, labels)

    picture = picture.copy() if picture is image else picture
    draw = ImageDraw.Draw(picture)
    width = max(1, round(0.17 * math.sqrt(max(picture.size))))
    for box in truth:
        _rectangle(draw, box, picture.size, TRUTH_COLOR, round(1.7 * width))
    for box in predicted:
        _rectangle(draw, box, picture.size, PREDICTION_COLOR, width)
    for box, (words, number) in zip(predicted, tags):
        if words or number:
            _tag(draw, box, picture.size, words, number)
    return picture


def binary_mask_overlay(
    image: ImageLike,
    mask: ArrayLike,
    color: Color = PREDICTION_COLOR,
    opacity: float = 0.4,
    *,
    longest_side: tuple[int, int] | None = DISPLAY_LIMITS,
) -> Image.Image:
    """Tint the foreground of a mask, outline it, and dim the rest of the photo.

    Args:
        image: the photo.
        mask: ``(h, w)`` bool, of any resolution: it is stretched to the photo without smoothing.
        color: RGB of tint and outline.
        opacity: of the tint, in ``[0, 1]``.
        longest_side: bounds on the longest side of the result, as in :func:`overlay`.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if the mask is not 2-D and boolean (compare a score map with its threshold first).

    Example:
        >>> picture = binary_mask_overlay(np.full((400, 400), 200, np.uint8), np.eye(2, dtype=bool))
        >>> picture.getpixel((100, 100)), picture.getpixel((300, 100))
        ((139, 213, 149), (100, 100, 100))
    """
    foreground = np.asarray(mask)
    if foreground.dtype != np.bool_ or foreground.ndim != 2 or foreground.size == 0:
        raise ValueError(f"mask must be a boolean (h, w) array, got {foreground.dtype} {foreground.shape}")
    photo = for_display(image, longest_side)
    stretched = Image.fromarray(foreground.astype(np.uint8)).resize(photo.size, Image.Resampling.NEAREST)
    inside = np.asarray(stretched, np.bool_)[..., None]
    pixels = np.asarray(photo, np.float32)
    tint = np.asarray(color, np.float32)
    mixed = np.where(inside, (1 - opacity) * pixels + opacity * tint, 0.5 * pixels)
    mixed[_rim(inside[..., 0], max(1, round(0.08 * math.sqrt(max(photo.size)))))] = tint
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def colorize(
    score_map: ArrayLike, size_wh: tuple[int, int] | None = None, colormap: str = "jet"
) -> NDArray[np.uint8]:
    """Colours of a score map, ``(H, W, 3)`` uint8, smoothly stretched to ``size_wh`` if given.

    Raises:
        ValueError: as in :func:`overlay`.

    Example:
        >>> colorize([[0.0, 1.0]]).tolist()
        [[[0, 0, 128], [128, 0, 0]]]
    """
    import matplotlib

    scores = np.asarray(score_map, np.float32)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"score map must be (h, w), got {scores.shape}")
    low, high = float(scores.min()), float(scores.max())
    if not (low >= -1e-5 and high <= 1 + 1e-5):
        raise ValueError(
            f"score map must be finite and in [0, 1], got {low:.4g} to {high:.4g}; normalise it first"
        )
    if colormap not in matplotlib.colormaps:
        raise ValueError(f"colormap {colormap!r} is unknown; matplotlib has jet, viridis, magma, ...")
    if size_wh is not None and size_wh != (scores.shape[1], scores.shape[0]):
        scores = np.asarray(Image.fromarray(scores).resize(size_wh, Image.Resampling.BICUBIC))
    colors = matplotlib.colormaps[colormap](np.clip(scores, 0, 1))  # bicubic resampling overshoots
    return np.rint(255 * colors[..., :3]).astype(np.uint8)


def for_display(image: ImageLike, longest_side: tuple[int, int] | None = DISPLAY_LIMITS) -> Image.Image:
    """The photo in RGB, enlarged or reduced until its longest side is within the two bounds.

    A photo that needs no change is returned itself, not a copy.

    Raises:
        ValueError: if ``image`` is not an 8-bit photo or the bounds are not ``1 <= low <= high``.

    Example:
        >>> for_display(Image.new("L", (20_000, 10))).size, for_display(Image.new("L", (1, 1))).size
        ((1600, 1), (320, 320))
    """
    photo = rgb_image(image)
    if longest_side is None:
        return photo
    low, high = longest_side
    if not 1 <= low <= high:
        raise ValueError(f"longest_side must be 1 <= low <= high, got {longest_side}")
    longest = max(photo.size)
    wanted = min(max(longest, low), high)
    if wanted == longest:
        return photo
    width, height = (max(1, round(side * wanted / longest)) for side in photo.size)
    # reducing_gap: a 20,000-pixel photo is first shrunk by whole factors, several times faster.
    return photo.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def rgb_image(image: ImageLike) -> Image.Image:
    """A PIL image in RGB from a PIL image of 8 bits or a uint8 ``(h, w)`` or ``(h, w, 3)`` array.

    Raises:
        ValueError: for other shapes and depths; ``attnmap_core.data.images.load_image`` reads 16-bit photos.

    Example:
        >>> rgb_image(np.zeros((3, 5), np.uint8)).size
        (5, 3)
    """
    if isinstance(image, np.ndarray):
        gray_or_rgb = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not gray_or_rgb or image.size == 0:
            raise ValueError(f"image must be uint8 (h, w) or (h, w, 3), got {image.dtype} {image.shape}")
        return Image.fromarray(image).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"image mode {image.mode} has more than 8 bits; read it with attnmap_core.data.images.load_image"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


# ---------------------------------------------------------------- sheets and grids


def contact_sheet(
    tiles: Sequence[ImageLike],
    captions: Sequence[str] | None = None,
    columns: int = 4,
    *,
    tile_size: int = 240,
    background: Color = (255, 255, 255),
) -> Image.Image:
    """Arrange pictures in rows, each with its caption below.

    Args:
        tiles: the pictures, at least one.
        captions: one text per tile; line breaks are kept, lines too long for the tile end in "…".
        columns: tiles in a row.
        tile_size: longest side of each picture on the sheet, in pixels.
        background: RGB of the sheet.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if there is no tile, or the captions do not fit the tiles.

    Example:
        >>> contact_sheet([Image.new("RGB", (30, 20))] * 5, columns=3, tile_size=100).size
        (324, 154)
    """
    if not tiles or columns < 1:
        raise ValueError(f"a contact sheet needs tiles and columns, got {len(tiles)} and {columns}")
    if captions is not None and len(captions) != len(tiles):
        raise ValueError(f"{len(captions)} captions do not fit {len(tiles)} tiles")
    columns = min(columns, len(tiles))
    blank = columns * math.ceil(len(tiles) / columns) - len(tiles)
    cells = [*tiles, *[None] * blank]
    texts = None if captions is None else [*captions, *[""] * blank]
    return picture_grid(
        [cells[i : i + columns] for i in range(0, len(cells), columns)],
        captions=texts and [texts[i : i + columns] for i in range(0, len(texts), columns)],
        cell_size=tile_size,
        background=background,
    )


def picture_grid(
    cells: Sequence[Sequence[ImageLike | None]],
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    *,
    captions: Sequence[Sequence[str]] | None = None,
    cell_size: int = 160,
    margin_after: tuple[int, int] = (0, 0),
    background: Color = (255, 255, 255),
) -> Image.Image:
    """A titled table of pictures, such as methods by photos.

    Args:
        cells: rows of pictures of any size; None leaves the place empty.
        row_titles: texts at the left.
        column_titles: texts on top.
        captions: texts below the cells, rows as in ``cells``.
        cell_size: longest side of each picture in the table, in pixels.
        margin_after: number of first rows and first columns set apart from the rest by a wider gap.
        background: RGB of the sheet.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if the rows differ in length, or titles or captions do not fit.

    Example:
        >>> black = Image.new("RGB", (8, 8))
        >>> picture_grid([[black, None], [black, black]], cell_size=100).size
        (220, 220)
    """
    rows, columns = len(cells), len(cells[0]) if cells else 0
    if not columns or any(len(row) != columns for row in cells):
        raise ValueError(f"cells must be rows of one length, got lengths {[len(row) for row in cells]}")
    if captions is not None and [len(row) for row in captions] != [columns] * rows:
        raise ValueError(f"captions must be {rows} rows of {columns}")
    for titles, wanted, name in ((row_titles, rows, "row"), (column_titles, columns, "column")):
        if titles is not None and len(titles) != wanted:
            raise ValueError(f"{len(titles)} {name} titles do not fit {wanted} {name}s")

    fitted = [
        [None if cell is None else for_display(cell, (cell_size, cell_size)) for cell in row] for row in cells
    ]
    heights = [max((p.height for p in row if p is not None), default=cell_size) for row in fitted]
    gap = max(4, cell_size // 30)
    font = _font(max(11, cell_size // 14))
    line = math.ceil(1.3 * font.size)
    pad = 2 * gap
    text_lines = max((text.count("\n") + 1 for row in captions or () for text in row), default=0)
    text_height = text_lines * line + gap if text_lines else 0
    left = pad + (max(math.ceil(font.getlength(title)) for title in row_titles) + pad if row_titles else 0)
    top = pad + (line + gap if column_titles else 0)
    apart_rows, apart_columns = (3 * gap if count else 0 for count in margin_after)
    size = (
        left + columns * (cell_size + gap) - gap + apart_columns + pad,
        top + sum(heights) + rows * (text_height + gap) - gap + apart_rows + pad,
    )
    ink: Color = (34, 38, 44) if sum(background) > 380 else (236, 238, 241)
    sheet = Image.new("RGB", size, background)
    draw = ImageDraw.Draw(sheet)

    y = top
    for r, (row, height) in enumerate(zip(fitted, heights)):
        y += apart_rows if r == margin_after[0] else 0
        if row_titles:
            draw.text((pad, y + height / 2), row_titles[r], ink, font, anchor="lm")
        for c, picture in enumerate(row):
            x = left + c * (cell_size + gap) + (apart_columns if c >= margin_after[1] else 0)
            if r == 0 and column_titles:
                title = _shortened(column_titles[c], font, cell_size + gap)
                draw.text((x + cell_size / 2, top - 1.5 * gap), title, ink, font, anchor="ms")
            if picture is not None:
                sheet.paste(
                    picture, (x + (cell_size - picture.width) // 2, y + (height - picture.height) // 2)
                )
            for i, text in enumerate(captions[r][c].split("\n") if captions else ()):
                at = (x + cell_size / 2, y + height + gap // 2 + i * line)
                draw.text(at, _shortened(text, font, cell_size), ink, font, anchor="ma")
        y += height + text_height + gap
    return sheet


def heatmap_grid(
    maps: Sequence[Sequence[ArrayLike]],
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    *,
    row_marginals: Sequence[ArrayLike] | None = None,
    column_marginals: Sequence[ArrayLike] | None = None,
    image: ImageLike | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    colormap: str = "jet",
    cell_size: int = 140,
) -> Image.Image:
    """A table of heat maps, with the maps that made each row and column on its border.

    Args:
        maps: rows of ``(h, w)`` score maps in ``[0, 1]``.
        row_titles: texts at the left.
        column_titles: texts on top.
        row_marginals: one map per row, set apart at the left (the semantic maps of a combination table).
        column_marginals: one map per column, set apart on top (the attention maps).
        image: photo to lay every map over; None shows the colours alone.
        captions: texts below the cells of ``maps``, for instance an IoU.
        colormap: name of a matplotlib colour map.
        cell_size: longest side of each map in the table, in pixels.

    Returns:
        An RGB picture.

    Raises:
        ValueError: if titles, captions or marginals do not fit the rows and columns, or a map is not
            finite in ``[0, 1]``.

    Example:
        >>> maps = [[np.eye(4)] * 3] * 2
        >>> heatmap_grid(maps, cell_size=100).size
        (324, 220)
    """
    rows, columns = len(maps), len(maps[0]) if maps else 0
    for given, wanted, name in ((row_marginals, rows, "row"), (column_marginals, columns, "column")):
        if given is not None and len(given) != wanted:
            raise ValueError(f"{len(given)} {name} marginals do not fit {wanted} {name}s")

    photo = None if image is None else for_display(image, (cell_size, cell_size))

    def picture(score_map: ArrayLike) -> Image.Image:
        if photo is not None:
            return overlay(photo, score_map, colormap, longest_side=None)
        height, width = np.shape(score_map)[:2]
        scale = cell_size / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return Image.fromarray(colorize(score_map, size, colormap))

    cells: list[list[Image.Image | None]] = [[picture(score_map) for score_map in row] for row in maps]
    texts = None if captions is None else [list(row) for row in captions]
    row_names = None if row_titles is None else list(row_titles)
    column_names = None if column_titles is None else list(column_titles)
    if row_marginals is not None:
        cells = [[picture(marginal), *row] for marginal, row in zip(row_marginals, cells)]
        texts = texts and [["", *row] for row in texts]
        column_names = column_names and ["", *column_names]
    if column_marginals is not None:
        corner = [None] if row_marginals is not None else []
        cells = [[*corner, *map(picture, column_marginals)], *cells]
        texts = texts and [[""] * len(cells[0]), *texts]
        row_names = row_names and ["", *row_names]
    apart = int(column_marginals is not None), int(row_marginals is not None)
    return picture_grid(
        cells, row_names, column_names, captions=texts, cell_size=cell_size, margin_after=apart
    )


# ---------------------------------------------------------------- plots


def training_curves(history: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Losses, learning rate and metrics over the epochs, one panel each, in one figure.

    Args:
        history: one mapping per epoch, as the training loop writes it. ``epoch`` (or ``step``) gives the
            x axis, every other number a curve, which passes over epochs without a value and has a gap at NaN.
        title: above the figure.

    Raises:
        ValueError: if the history holds no numbers.

    Example:
        >>> figure = training_curves([{"epoch": 1, "loss": 2.3, "lr": 1e-4, "gt_known": 0.4}])
        >>> [axes.get_title() for axes in figure.axes]
        ['loss', 'learning rate', 'metrics']
    """
    x, x_label, groups = _history_groups(history)
    with _plot_style():
        columns = min(len(groups), 3)
        rows = math.ceil(len(groups) / columns)
        figure = _figure(4.6 * columns, 3.6 * rows)
        if title:
            figure.suptitle(title)
        for i, (name, series) in enumerate(groups.items(), start=1):
            axes = figure.add_subplot(rows, columns, i)
            _draw_series(axes, x, series, x_label=x_label, title=name)
    return figure


def training_panels(history: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The panels of :func:`training_curves` as single figures by name, for pages that arrange them.

    Raises:
        ValueError: if the history holds no numbers.

    Example:
        >>> list(training_panels([{"loss": 2.3, "scm/lambda_1": 1.1, "scm/lambda_2": 0.9}]))
        ['loss', 'scm/lambda']
    """
    x, x_label, groups = _history_groups(history)
    figures: dict[str, Figure] = {}
    for name, series in groups.items():
        with _plot_style():
            figure = _figure(4.6, 3.2)
            _draw_series(figure.subplots(), x, series, x_label=x_label)
        figures[name] = figure
    return figures


def line_plot(
    x: Sequence[float] | Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str = "",
    y_label: str = "",
    title: str = "",
    errors: Mapping[str, Sequence[float]] | None = None,
    twin: Mapping[str, Sequence[float]] | None = None,
    twin_label: str = "",
) -> Figure:
    """Lines over a common x axis, with a second y axis at the right if wanted.

    Args:
        x: positions, or texts for equally spaced ones (``["1", "2", "4", "8", "16"]``).
        series: values by name; NaN leaves a gap.
        x_label: text of the x axis.
        y_label: text of the left axis.
        title: above the plot.
        errors: standard deviation by name, drawn as bars.
        twin: values by name for the right axis, dashed.
        twin_label: text of the right axis.

    Raises:
        ValueError: if a series does not fit ``x``, or ``errors`` names none of them.

    Example:
        >>> figure = line_plot(["1", "4", "16"], {"GT-known": [71, 77, 74]}, twin={"best τ": [0.3, 0.4, 0.3]})
        >>> len(figure.axes)
        2
    """
    errors = errors or {}
    unknown = set(errors) - {*series, *(twin or {})}
    if unknown:
        raise ValueError(f"errors for unknown series {sorted(unknown)}; there are {list(series)}")
    named = any(isinstance(value, str) for value in x)
    positions = list(range(len(x))) if named else [float(value) for value in x]
    with _plot_style():
        figure = _figure(5.6, 3.8)
        axes = figure.subplots()
        _draw_series(
            axes, positions, series, x_label=x_label, y_label=y_label, title=title, errors=errors,
            legend=not twin,
        )  # fmt: skip
        if twin:
            right = axes.twinx()
            _draw_series(
                right, positions, twin, x_label=x_label, y_label=twin_label, errors=errors,
                first_color=len(series), line_style="--", legend=False,
            )  # fmt: skip
            right.grid(False)
            right.spines["right"].set_visible(True)
            handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
            _legend(axes, [*series, *twin], handles)
        if named:  # last: twin axes share their ticks
            axes.set_xticks(positions, [str(value) for value in x])
    return figure


def threshold_curves(
    curves: Mapping[str, Mapping[float, ArrayLike]], thresholds: Sequence[float] | NDArray[np.floating]
) -> Figure:
    """Box accuracy against the score-map threshold, per IoU level, the best threshold marked.

    One method gives one panel with a line per level; several give a panel per level with a line per method.

    Args:
        curves: by method name, then by IoU level, ``(T,)`` shares of images in ``[0, 1]``.
        thresholds: ``(T,)`` shares of the map's maximum.

    Raises:
        ValueError: if there is no curve, the methods have different levels, or a curve is not ``(T,)``.

    Example:
        >>> tau = [0.0, 0.5, 1.0]
        >>> figure = threshold_curves({"SCM": {0.5: [0.2, 0.8, 0.1]}, "TS-CAM": {0.5: [0.2, 0.7, 0.1]}}, tau)
        >>> figure.axes[0].get_title()
        'IoU ≥ 0.5'
    """
    levels = list(next(iter(curves.values()), {}))
    if not levels or any(list(by_level) != levels for by_level in curves.values()):
        raise ValueError("curves must hold the same IoU levels, at least one, for every method")
    shares = {
        name: {level: np.asarray(values, np.float64) for level, values in by_level.items()}
        for name, by_level in curves.items()
    }
    if len(shares) == 1:
        panels = {
            name: {f"IoU ≥ {level:g}": share for level, share in by_level.items()}
            for name, by_level in shares.items()
        }
    else:
        panels = {
            f"IoU ≥ {level:g}": {name: by_level[level] for name, by_level in shares.items()}
            for level in levels
        }
    x = [float(threshold) for threshold in thresholds]
    with _plot_style():
        figure = _figure(4.6 if len(panels) == 1 else 3.6 * len(panels), 3.6)
        axes_row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (title, lines) in zip(axes_row, panels.items()):
            _draw_series(axes, x, lines, x_label="threshold τ", title=title, markers=False)
            for i, share in enumerate(lines.values()):
                if np.isfinite(share).any():
                    best = int(np.nanargmax(share))
                    axes.plot(x[best], share[best], "o", color=_color(i))
            axes.set_ylim(0, 1.02)
        axes_row[0].set_ylabel("box accuracy")
    return figure


def value_grid(
    values: ArrayLike,
    *,
    row_names: Sequence[str] | None = None,
    x_label: str = "",
    y_label: str = "",
    title: str = "",
    value_label: str = "",
    digits: int = 2,
    colormap: str = "viridis",
) -> Figure:
    """Numbers by row and column as colours with the numbers in them, such as one of each layer and head.

    Args:
        values: ``(rows, columns)``; what is not finite stays blank. Columns are counted from 1.
        row_names: of the rows; counted from 1 where not given.
        x_label: text of the columns.
        y_label: text of the rows.
        title: above the plot.
        value_label: text of the colour bar.
        digits: decimals of the numbers, which are left out beyond 400 cells.
        colormap: name of a matplotlib colour map.

    Raises:
        ValueError: if the values are not 2-D, or the names do not fit the rows.

    Example:
        >>> figure = value_grid([[0.1, 0.2], [1.3, 0.4]], x_label="head", y_label="layer")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['0.10', '0.20', '1.30', '0.40']
    """
    grid = np.asarray(values, np.float64)
    if grid.ndim != 2 or not grid.size:
        raise ValueError(f"values must be (rows, columns), got {grid.shape}")
    rows, columns = grid.shape
    names = [str(i + 1) for i in range(rows)] if row_names is None else list(row_names)
    if len(names) != rows:
        raise ValueError(f"{len(names)} names do not fit {rows} rows")
    with _plot_style():
        figure = _figure(1.7 + 0.52 * max(columns, 4), 1.1 + 0.34 * max(rows, 3))
        axes = figure.subplots()
        drawn = axes.imshow(np.ma.masked_invalid(grid), cmap=colormap, aspect="auto")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xticks(range(columns), [str(i + 1) for i in range(columns)])
        axes.set_yticks(range(rows), names)
        axes.tick_params(length=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title)
        figure.colorbar(drawn, ax=axes, label=value_label).outline.set_visible(False)
        if grid.size <= 400:
            brightness = np.asarray(drawn.to_rgba(grid))[..., :3] @ (0.3, 0.59, 0.11)
            for (row, column), value in np.ndenumerate(grid):
                if math.isfinite(value):
                    ink = "black" if brightness[row, column] > 0.5 else "white"
                    text = f"{value:.{digits}f}"
                    axes.text(column, row, text, color=ink, ha="center", va="center", fontsize=8)
    return figure


def save_picture(picture: Image.Image | Figure, path: str | Path) -> Path:
    """Write a picture (``.png``, ``.jpg``) or a plot (``.png``, ``.svg``) atomically.

    The bytes depend only on the picture: no date, no random ids.

    Raises:
        InputError: if the name ends otherwise, or the disk is full or read-only.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_picture(Image.new("RGB", (8, 8)), Path(folder) / "a.png").name
        'a.png'
    """
    path = Path(path)
    suffix = path.suffix.lower()
    photo = isinstance(picture, Image.Image)
    wanted = (".png", ".jpg", ".jpeg") if photo else (".png", ".svg")
    if suffix not in wanted:
        raise InputError(f"{path}: cannot write this picture as {suffix or 'a file without ending'}; "
                         f"use one of {', '.join(wanted)}")  # fmt: skip
    with atomic_file(path) as temporary:
        if photo:
            options: dict[str, Any] = {} if suffix == ".png" else {"quality": 92, "subsampling": 0}
            picture.save(temporary, **options)
        else:
            save_figure(picture, temporary, format=suffix[1:])
    return path


def save_figure(figure: Figure, target: Any, *, format: str, transparent: bool = False) -> None:
    """Write a plot to a path or binary file as ``png`` or ``svg``, the same bytes every time.

    SVG text stays text: it can be searched and takes the reader's fonts.
    """
    metadata = {"Date": None} if format == "svg" else {"Software": None}
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "attnmap", "svg.fonttype": "none"}):
        figure.savefig(target, format=format, dpi=160, transparent=transparent, metadata=metadata)


# ---------------------------------------------------------------- inner parts


def _boxes(boxes_xyxy: ArrayLike | None, name: str) -> NDArray[np.float64]:
    boxes = np.asarray([] if boxes_xyxy is None else boxes_xyxy, np.float64)
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(f"{name} must be finite (k, 4) pixels, got shape {boxes.shape}: {boxes.tolist()}")
    return boxes


def _tags(
    count: int, scores: Sequence[float] | NDArray[np.floating] | None, labels: Sequence[str] | None
) -> list[tuple[str, str]]:
    """Words and number written on each predicted box."""
    for given, name in ((scores, "scores"), (labels, "labels")):
        if given is not None and len(given) != count:
            raise ValueError(f"{len(given)} {name} do not fit {count} predicted boxes")
    words = [""] * count if labels is None else list(labels)
    numbers = [""] * count if scores is None else ["–" if math.isnan(s) else f"{s:.2f}" for s in scores]
    return list(zip(words, numbers))


def _inside(box: NDArray[np.float64], size_wh: tuple[int, int]) -> tuple[int, int, int, int]:
    """Corner pixels, ends included, of what the picture shows of a box: at least one pixel."""
    width, height = size_wh
    x0, y0, x1, y1 = (round(float(side)) for side in box)
    left, top = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return left, top, max(left, min(x1, width) - 1), max(top, min(y1, height) - 1)


def _rectangle(
    draw: ImageDraw.ImageDraw, box: NDArray[np.float64], size_wh: tuple[int, int], color: Color, width: int
) -> None:
    left, top, right, bottom = _inside(box, size_wh)
    rim = max(1, width // 4)
    width = min(width, (min(right - left, bottom - top) + 3) // 4 or 1)  # a small box keeps its inside
    draw.rectangle(
        (left - rim, top - rim, right + rim, bottom + rim), outline=(0, 0, 0), width=width + 2 * rim
    )
    draw.rectangle((left, top, right, bottom), outline=color, width=width)


def _tag(
    draw: ImageDraw.ImageDraw, box: NDArray[np.float64], size_wh: tuple[int, int], words: str, number: str
) -> None:
    left, top, _, _ = _inside(box, size_wh)
    font = _font(max(11, round(0.75 * math.sqrt(max(size_wh)))))
    ending = f" {number}" if words and number else number
    text = _shortened(words, font, size_wh[0] - 6 - font.getlength(ending)) + ending
    width, height = math.ceil(font.getlength(text)) + 6, math.ceil(1.35 * font.size)
    x = max(0, min(left, size_wh[0] - width))
    y = top - height if top >= height else top  # no room above: write inside the box
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=PREDICTION_COLOR)
    draw.text((x + 3, y + height / 2), text, (0, 0, 0), font, anchor="lm")


def _rim(inside: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Foreground within ``width`` steps of background; what lies beyond the photo counts as foreground."""
    core = inside.copy()
    for _ in range(width):
        padded = np.pad(core, 1, constant_values=True)
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # DejaVu has the Greek letters, superscripts and dashes that Pillow's own font lacks; the basic layout
    # engine places glyphs alike whether or not libraqm is installed.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _plot_style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_PLOT_STYLE)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _color(index: int) -> str:
    return _PLOT_COLORS[index % len(_PLOT_COLORS)]


def _draw_series(
    axes: Axes,
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None] | NDArray[np.float64]],
    *,
    x_label: str = "",
    y_label: str = "",
    title: str = "",
    errors: Mapping[str, Sequence[float]] | None = None,
    first_color: int = 0,
    line_style: str | None = None,
    markers: bool | None = None,
    legend: bool = True,
) -> None:
    from matplotlib.ticker import MaxNLocator

    if markers is None:
        markers = len(x) <= 40
    for i, (name, values) in enumerate(series.items(), start=first_color):
        if len(values) != len(x):
            raise ValueError(f"series {name!r} has {len(values)} values, expected {len(x)} as x")
        here = [position for position, value in zip(x, values) if value is not None]
        y = np.asarray([value for value in values if value is not None], np.float64)
        style = line_style or _LINE_STYLES[i // len(_PLOT_COLORS) % len(_LINE_STYLES)]
        label = name if np.isfinite(y).any() else f"{name} (–)"
        bars = (errors or {}).get(name)
        axes.errorbar(
            here, y, yerr=bars, label=label, color=_color(i), linestyle=style, marker="o" if markers else "",
            capsize=3,
        )  # fmt: skip
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    if all(float(value).is_integer() for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    if len(set(x)) == 1:
        axes.set_xlim(x[0] - 0.5, x[0] + 0.5)
    if legend and len(series) > 1:
        _legend(axes, list(series))


def _legend(axes: Axes, names: Sequence[str], handles: Sequence[Any] | None = None) -> None:
    """Below the plot, in as many columns as the longest name lets pass."""
    columns = max(1, min(len(names), 48 // (max(map(len, names)) + 5)))
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": columns}
    if handles is None:
        axes.legend(**place)
    else:
        axes.legend(handles=list(handles), **place)


def _history_groups(
    history: Sequence[Mapping[str, Any]],
) -> tuple[list[float], str, dict[str, dict[str, list[float | None]]]]:
    """X values, their name, and the curves by panel: losses, rate, metrics, then one per other name."""
    names = list(dict.fromkeys(name for row in history for name in row))
    columns = {name: [_number(row.get(name)) for row in history] for name in names}
    x_label = next((name for name in ("epoch", "step") if name in columns), "")
    positions = columns[x_label] if x_label else range(1, len(history) + 1)
    x = [math.nan if position is None else float(position) for position in positions]
    numeric = {
        name: values
        for name, values in columns.items()
        if name not in ("epoch", "step") and any(isinstance(row.get(name), Real) for row in history)
    }
    groups: dict[str, dict[str, list[float | None]]] = {name: {} for name in _PANELS}
    for name, values in numeric.items():
        groups.setdefault(_panel(name, values), {})[name] = values
    groups = {name: series for name, series in groups.items() if series}
    if not groups:
        raise ValueError(f"the history of {len(history)} rows holds no numbers to draw")
    return x, x_label or "epoch", groups


_PANELS = ("loss", "learning rate", "metrics", "metrics, %")
_METRIC_NAME = re.compile(r"acc|(^|[^a-z]|cor)loc|iou|pxap|recall|precision|known|cls|nmi|jaccard|map@")


def _panel(name: str, values: Sequence[float | None]) -> str:
    lowered = name.lower()
    last = lowered.rsplit("/", 1)[-1]
    if "loss" in lowered:
        return "loss"
    if last.startswith("lr") or "learning" in last:
        return "learning rate"
    known = [value for value in values if value is not None and math.isfinite(value)]
    if _METRIC_NAME.search(lowered) and all(0 <= value <= 100 for value in known):
        return "metrics" if all(value <= 1 for value in known) else "metrics, %"
    return name.rstrip("0123456789").rstrip("_./ ") or name  # lambda_1, lambda_2: one panel


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, Real) else None
