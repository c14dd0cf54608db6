"""One ``report.html`` a run: what was run, what came out, and pictures to judge it by. One file, no network, no script."""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .files import write_text
from .pictures import draw_boxes, for_display, overlay, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from .prediction import Prediction

THUMBNAIL = 320
"""Longest side of a picture in a report, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows for people: one mapping a row; numbers are shown with one decimal, what is missing as a dash."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One case of a gallery: pictures side by side, a caption, and a number in the corner."""

    pictures: Sequence[Image.Image]
    caption: str
    badge: str = ""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Tiles under a title; ``left_out`` says how many cases are not shown."""

    title: str
    tiles: Sequence[Tile]
    note: str = ""
    left_out: int = 0


@dataclass(kw_only=True)
class Report:
    """Content of a report, from top to bottom.

    Attributes:
        title, summary: what this is, in a line and in a paragraph.
        tables: results.
        plots: matplotlib figures by title.
        galleries: pictures.
        facts: command, commit, seed, hardware, versions.
        lists: further lists of lines by title, such as photos that could not be read.
    """

    title: str
    summary: str = ""
    tables: list[Table] = field(default_factory=list[Table])
    plots: dict[str, Figure] = field(default_factory=dict[str, "Figure"])
    galleries: list[Gallery] = field(default_factory=list[Gallery])
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])


def write_report(path: str | Path, report: Report) -> Path:
    """Write one self-contained HTML page, atomically; the same content gives the same bytes.

    Args:
        path: the file.
        report: what it says; every text is escaped.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_report(Path(folder) / "report.html", Report(title="<b>"))
        ...     "&lt;b&gt;" in path.read_text()
        True
    """
    parts = [f"<h1>{_text(report.title)}</h1>"]
    if report.summary:
        parts.append(f'<p class="lead">{_text(report.summary)}</p>')
    parts += [_table(table) for table in report.tables]
    if report.plots:
        figures = "".join(
            f"<figure>{_svg(figure)}<figcaption>{_text(name)}</figcaption></figure>"
            for name, figure in report.plots.items()
        )
        parts.append(f'<h2>Curves</h2><div class="plots">{figures}</div>')
    parts += [_gallery(gallery) for gallery in report.galleries]
    for title, lines in report.lists.items():
        items = "".join(f"<li>{_text(line)}</li>" for line in lines)
        parts.append(f"<h2>{_text(title)}</h2><ul>{items}</ul>")
    if report.facts:
        rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in report.facts.items())
        parts.append(f"<h2>How it was made</h2><dl>{rows}</dl>")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(report.title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )
    write_text(path, page)
    return Path(path)


def select_cases(scores: Mapping[int, float], each: int = 8, seed: int = 0) -> dict[str, list[int]]:
    """Keys of the best, worst and some random cases, without overlap.

    With fewer than ``3 * each`` cases every group gets a third of them, the best what remains.

    Example:
        >>> select_cases({10: 0.9, 11: 0.1, 12: 0.5}, each=1)
        {'best': [10], 'worst': [11], 'random': [12]}
    """
    known = sorted((key for key in scores if math.isfinite(scores[key])), key=lambda key: (-scores[key], key))
    worst_count = min(each, len(known) // 3)
    best_count = min(each, len(known) - 2 * worst_count)
    best, rest = known[:best_count], known[best_count:]
    worst, rest = rest[len(rest) - worst_count :][::-1], rest[: len(rest) - worst_count]
    chosen = np.random.default_rng(seed).permutation(len(rest))[:each]
    return {"best": best, "worst": worst, "random": [rest[i] for i in sorted(chosen.tolist())]}


def localization_tile(
    image: Image.Image,
    score_map: ArrayLike,
    caption: str,
    *,
    truth_xyxy: ArrayLike | None = None,
    predicted_xyxy: ArrayLike | None = None,
    badge: str = "",
) -> Tile:
    """A photo with its boxes (truth red, prediction green) beside its heat map."""
    limits = (THUMBNAIL, THUMBNAIL)
    photo = for_display(image, limits)
    heat = overlay(image, score_map, longest_side=limits)
    boxed = draw_boxes(photo, truth_xyxy, predicted_xyxy, size_wh=image.size, longest_side=limits)
    return Tile(pictures=[boxed, heat], caption=caption, badge=badge)


def run_facts(record: Mapping[str, Any]) -> dict[str, str]:
    """The record of a launch (:func:`attnmap_core.recipes.run_record`) as flat text."""

    def said(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {said(item)}" for name, item in value.items() if item not in (None, "", []))
        if isinstance(value, (list, tuple)):
            return ", ".join(map(said, value))
        return str(value)

    return {name.replace("_", " "): said(value) for name, value in record.items() if value not in (None, "", [], {})}


class PredictionReport:
    """Collects what a report on unlabelled photos shows, one prediction at a time, in bounded memory.

    Args:
        most: tiles shown; photos beyond are counted.
    """

    def __init__(self, most: int = 120) -> None:
        self.most = most
        self.tiles: list[Tile] = []
        self.left_out = 0
        self.counts: Counter[str] = Counter()
        self.boxes = 0
        self.confidence: dict[str, float] = {}

    def add(self, image: Image.Image, prediction: Prediction) -> None:
        """Take one photo and what a model says of it."""
        self.counts[prediction.label_name] += 1
        self.confidence[prediction.label_name] = (
            self.confidence.get(prediction.label_name, 0.0) + prediction.probability
        )
        self.boxes += len(prediction.boxes_xyxy)
        if len(self.tiles) >= self.most:
            self.left_out += 1
            return
        caption = f"{Path(prediction.source).name}\n{prediction.label_name}"
        badge = f"{100 * prediction.probability:.0f} %"
        boxes = prediction.boxes_xyxy
        self.tiles.append(
            localization_tile(image, prediction.score_map, caption, predicted_xyxy=boxes, badge=badge)
        )

    def write(
        self, path: str | Path, *, title: str, unreadable: Iterable[tuple[str, str]] = (), facts: Mapping[str, Any]
    ) -> Path:
        """Write the page."""
        rows = [
            {"class": name, "photos": count, "mean confidence %": 100 * self.confidence[name] / count}
            for name, count in self.counts.most_common()
        ]
        skipped = [f"{name}: {reason}" for name, reason in unreadable]
        report = Report(
            title=title,
            summary=f"{sum(self.counts.values())} photos, {self.boxes} boxes. Green: predicted box; beside it the "
            "heat map (red is high). The number is the confidence in the class.",
            tables=[Table(title="Classes", rows=rows)],
            galleries=[Gallery(title="Photos", tiles=self.tiles, left_out=self.left_out)],
            facts=facts,
            lists={f"Not readable ({len(skipped)})": skipped} if skipped else {},
        )
        return write_report(path, report)


# --- Pieces of the page -------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value)).replace("\n", "<br>")


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.1f}" if isinstance(value, float) else _text(value)


def _table(table: Table) -> str:
    columns = list(dict.fromkeys(name for row in table.rows for name in row))
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_number(row.get(name))}</td>" for name in columns) + "</tr>" for row in table.rows
    )
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{_text(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _gallery(gallery: Gallery) -> str:
    tiles = "".join(
        '<figure class="tile"><div class="pair">'
        + "".join(f'<img loading="lazy" alt="" src="{_jpeg(picture)}">' for picture in tile.pictures)
        + (f'<span class="badge">{_text(tile.badge)}</span>' if tile.badge else "")
        + f"</div><figcaption>{_text(tile.caption)}</figcaption></figure>"
        for tile in gallery.tiles
    )
    note = f'<p class="note">{_text(gallery.note)}</p>' if gallery.note else ""
    rest = f'<p class="note">{gallery.left_out} more are not shown.</p>' if gallery.left_out else ""
    return f'<h2>{_text(gallery.title)}</h2>{note}<div class="gallery">{tiles}</div>{rest}'


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    for_display(picture, (1, THUMBNAIL)).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(figure: Figure) -> str:
    """As an image, so that ids and styles of one plot cannot meet those of another."""
    buffer = io.BytesIO()
    save_figure(figure, buffer, format="svg")
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


_STYLE = """
:root{--ink:#1d232b;--soft:#5b6673;--line:#dfe4ea;--page:#fff;--card:#f6f8fa;--accent:#2b7bd6;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaef;--soft:#98a3b0;--line:#333c47;--page:#14181d;--card:#1d232b}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 18px 60px}h1{font-size:26px;line-height:1.25;margin:0 0 8px}
h2{font-size:18px;margin:36px 0 10px;padding-top:14px;border-top:1px solid var(--line)}
.lead{color:var(--soft);max-width:75ch;margin:0}.note{color:var(--soft);font-size:13px;max-width:85ch}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:6px 12px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}th{color:var(--soft);font-weight:600;font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:16px}
.plots figure{margin:0;background:#fff;border:1px solid var(--line);border-radius:8px;padding:8px}
.plots figcaption{color:#5b6673;text-align:center;font-size:13px}.plots img{width:100%;height:auto}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:14px}
@media (max-width:420px){.gallery{grid-template-columns:1fr}}
.tile{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.pair{position:relative;display:flex;gap:2px}.pair img{flex:1 1 0;width:0;height:190px;object-fit:contain;background:#0c0f12}
.badge{position:absolute;left:6px;top:6px;background:rgba(0,0,0,.66);color:#fff;border-radius:5px;padding:0 7px;font-size:13px}
.tile figcaption{padding:7px 10px;font-size:13px;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 16px;font-size:13.5px}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere;font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:12.5px}
@media (max-width:600px){dl{grid-template-columns:1fr}dd{margin-bottom:8px}}
"""
