"""The page that ``contrastive-cam label`` leaves: doubtful boxes first, so that a person checks those only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attnmap_core.data.images import load_image
from attnmap_core.pictures import draw_boxes, for_display
from attnmap_core.report import MOST_TILES, THUMBNAIL, Gallery, Report, Table, Tile, run_facts, write_report
from numpy.typing import NDArray
from PIL import Image

from .localizers import METHODS, SIGNS, Localizer, doubtful

Tables = Sequence[tuple[str, list[dict[str, Any]]]]


def write_label_report(
    folder: Path,
    localizer: Localizer,
    lines: Sequence[dict[str, Any]],
    skipped: Sequence[dict[str, Any]],
    notes: Sequence[str],
    tables: Tables,
    truth: Mapping[str, NDArray[np.float64]],
    record: Mapping[str, Any],
    command: str,
) -> Path:
    """Write ``report.html``.

    Args:
        folder: of the results.
        localizer: what found the boxes.
        lines: of the photos that were read, see :class:`contrastive_cam.labelling.Journal`.
        skipped: lines of those that were not.
        notes: sentences for the user.
        tables: scores by title, where boxes are known.
        truth: these boxes by resolved path.
        record: of the launch.
        command: the command line.

    Returns:
        Path of the page.
    """
    ranked = sorted(lines, key=lambda line: (line["confidence"], line["source"]))
    confidence = np.array([line["confidence"] for line in ranked])
    few = int(doubtful(confidence).sum())
    first, sure = ranked[: MOST_TILES - 12], ranked[MOST_TILES - 12 :]
    some = [sure[i] for i in np.linspace(0, len(sure) - 1, min(12, len(sure))).astype(int)]
    galleries = [
        Gallery(
            title="Doubtful first",
            tiles=[_tile(folder, line, truth) for line in first],
            note="The number is the confidence: the geometric mean of how stable the box is when the cut moves, how "
            "well the heat map parts in two, and how much of it lies in one piece. No label has a part in it. Click a "
            "picture to enlarge it.",
            left_out=len(sure) - len(some),
        )
    ]
    if some:
        galleries.append(
            Gallery(title="A few of the others", tiles=[_tile(folder, line, truth) for line in some])
        )
    empty = sum(line["box"] is None for line in lines)
    counts, edges = np.histogram(confidence, bins=10, range=(0, 1))
    shares = [
        {"confidence": f"{low:.1f} to {low + 0.1:.1f}", "photos": int(count)}
        for count, low in zip(counts, edges)
        if count
    ]
    report = Report(
        title=f"{len(lines)} photos, a box each",
        summary=f"{METHODS[localizer.method]}; {localizer.model.backbone.name}, heat maps cut at {localizer.rule}. "
        f"{few} are worth a look, the least sure; {empty} photos have no box.",
        tables=[Table(title=title, rows=rows) for title, rows in tables]
        + [Table(title="Confidence", rows=shares)],
        galleries=galleries,
        facts=run_facts(record) | ({"command": command} if command else {}),
        lists={
            **({"About this folder": list(notes)} if notes else {}),
            **({f"Not readable ({len(skipped)})": [line["error"] for line in skipped]} if skipped else {}),
        },
    )
    return write_report(folder / "report.html", report)


def _tile(folder: Path, line: Mapping[str, Any], truth: Mapping[str, NDArray[np.float64]]) -> Tile:
    photo = for_display(load_image(line["source"]), (1, THUMBNAIL))
    known = truth.get(os.path.realpath(line["source"]))
    box = None if line["box"] is None else np.array([line["box"]])
    boxed = draw_boxes(photo, known, box, size_wh=(line["width"], line["height"]), longest_side=None)
    with Image.open(folder / line["heatmap"]) as heat:
        heat.load()
    name = Path(line["source"]).name
    why = "no box" if box is None else ", ".join(f"{sign} {line[sign]:.2f}" for sign in SIGNS)
    legend = ("truth",) * (known is not None) + ("prediction",) * (box is not None) + ("score map",)
    return Tile(
        pictures=[boxed, heat], caption=f"{name}\n{why}", badge=f"{line['confidence']:.2f}", legend=legend
    )
