"""One ``report.html`` a run: what was run, what came out, and pictures to judge it by.

One file without network and without script, for phones and wide screens, light and dark. Its size is
bounded: small JPEG pictures, and whatever is left out is counted.
"""

from __future__ import annotations

import base64
import html
import io
import math
import string
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .files import write_text
from .pictures import (
    PLOT_INK,
    PREDICTION_COLOR,
    TRUTH_COLOR,
    colorize,
    draw_boxes,
    for_display,
    overlay,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from .prediction import Prediction

THUMBNAIL = 320
"""Longest side of a picture in a report, in pixels."""
MOST_TILES = 120
"""Tiles shown of one gallery."""
MOST_ROWS = 300
"""Rows shown of one table or list."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows for people: one mapping a row; numbers are shown with one decimal, what is missing as a dash.

    A column named ``ours`` is emphasised; :func:`compared` makes such a table.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One case of a gallery.

    Attributes:
        pictures: side by side.
        caption: its first line is emphasised.
        badge: a few characters in the corner, such as a score.
        legend: what the legend must explain: ``"truth"``, ``"prediction"``, ``"score map"``.
    """

    pictures: Sequence[Image.Image]
    caption: str
    badge: str = ""
    legend: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Tiles under a title; ``left_out`` says how many cases are not among them."""

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
        facts: command, commit, seed, hardware, versions (:func:`run_facts`).
        lists: further lists of lines by title, such as notes or photos that could not be read.
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

    Returns:
        The path.

    Raises:
        InputError: if the disk is full or the folder cannot be written; an old report stays as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_report(Path(folder) / "report.html", Report(title="<b>"))
        ...     "&lt;b&gt;" in path.read_text(encoding="utf-8")
        True
    """
    sections: list[tuple[str, str]] = [(table.title, _table(table)) for table in report.tables]
    if report.plots:
        plots = "\n".join(_plot(name, figure) for name, figure in report.plots.items())
        sections.append(("Curves", f'<div class="plots">\n{plots}\n</div>'))
    legend = _legend(report.galleries)
    for gallery in report.galleries:
        sections.append((gallery.title, legend + _gallery(gallery)))
        legend = ""  # once, above the first pictures
    sections += [(title, _list(lines)) for title, lines in report.lists.items()]
    if report.facts:
        sections.append(("What was run", _facts(report.facts)))

    links = "".join(f'<a href="#s{i}">{_text(title)}</a>' for i, (title, _) in enumerate(sections))
    body = [
        f"<header>\n<h1>{_text(report.title)}</h1>",
        f'<p class="lead">{_text(report.summary)}</p>' if report.summary else "",
        _meta(report.facts),
        "</header>",
        f"<nav><div>{links}</div></nav>" if len(sections) > 1 else "",
        "<main>",
        *(
            f'<section id="s{i}">\n<h2>{_text(title)}</h2>\n{content}\n</section>'
            for i, (title, content) in enumerate(sections)
        ),
        "</main>",
    ]
    template = resources.files("attnmap_core").joinpath("report_template.html").read_text(encoding="utf-8")
    page = string.Template(template).substitute(title=_text(report.title), body="\n".join(filter(None, body)))
    write_text(path, page)
    return Path(path)


def select_cases(scores: Mapping[int, float], each: int = 8, seed: int = 0) -> dict[str, list[int]]:
    """Keys of the best, worst and some random cases, without overlap.

    With fewer than ``3 * each`` cases every group gets about a third of them. Cases whose score is not
    finite have no place among the best and the worst and are left out.

    Args:
        scores: a number per case, larger is better.
        each: cases a group, at least 0.
        seed: of the random choice.

    Returns:
        ``best`` (best first), ``worst`` (worst first) and ``random`` (in order of rank).

    Example:
        >>> select_cases({10: 0.9, 11: 0.1, 12: 0.5}, each=1)
        {'best': [10], 'worst': [11], 'random': [12]}
    """
    known = sorted((key for key in scores if math.isfinite(scores[key])), key=lambda key: (-scores[key], key))
    worst_count = min(each, (len(known) + 1) // 3)
    best_count = min(each, (len(known) + 2) // 3)
    best, rest = known[:best_count], known[best_count:]
    worst, rest = rest[len(rest) - worst_count :][::-1], rest[: len(rest) - worst_count]
    chosen = np.random.default_rng(seed).permutation(len(rest))[:each]
    return {"best": best, "worst": worst, "random": [rest[i] for i in sorted(chosen.tolist())]}


def compared(
    title: str, ours: Mapping[str, Any], published: Mapping[str, Any] | None = None, note: str = ""
) -> Table:
    """A table metric | published | ours; without a published number there is no such column.

    Example:
        >>> compared("CUB", {"GT-known": 95.2, "PxAP": 70.1}, {"GT-known": 96.6}).rows[0]
        {'metric': 'GT-known', 'published': 96.6, 'ours': 95.2}
    """
    known = {name: value for name, value in (published or {}).items() if value is not None and name in ours}
    rows = [
        {"metric": name} | ({"published": known.get(name)} if known else {}) | {"ours": value}
        for name, value in ours.items()
    ]
    return Table(title=title, rows=rows, note=note)


def localization_tile(
    image: Image.Image,
    score_map: ArrayLike,
    caption: str,
    *,
    truth_xyxy: ArrayLike | None = None,
    predicted_xyxy: ArrayLike | None = None,
    badge: str = "",
) -> Tile:
    """A photo with its boxes (truth red, prediction green) beside its heat map.

    Args:
        image: the photo, of any size.
        score_map: ``(h, w)`` in ``[0, 1]``, stretched to the photo.
        caption: text below; the first line is emphasised.
        truth_xyxy: ``(k, 4)`` pixels of the photo, end exclusive; None where no truth is known.
        predicted_xyxy: ``(k, 4)``, the same.
        badge: a few characters in the corner.
    """
    limits = (THUMBNAIL, THUMBNAIL)
    photo = for_display(image, limits)
    heat = overlay(photo, score_map, longest_side=None)
    boxed = draw_boxes(photo, truth_xyxy, predicted_xyxy, size_wh=image.size, longest_side=None)
    explained = ("truth",) * (truth_xyxy is not None) + ("prediction",) * (predicted_xyxy is not None)
    return Tile(pictures=[boxed, heat], caption=caption, badge=badge, legend=(*explained, "score map"))


def run_facts(record: Mapping[str, Any]) -> dict[str, str]:
    """The record of a launch (:func:`attnmap_core.recipes.run_record`) as flat text.

    Example:
        >>> run_facts({"seed": 3, "commit": "ab12", "dirty": True, "versions": {"torch": "2.6"}, "gpus": []})
        {'seed': '3', 'commit': 'ab12, with uncommitted changes', 'versions': 'torch 2.6'}
    """

    def said(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{_words(name)} {said(item)}" for name, item in value.items() if _tells(item))
        if isinstance(value, (list, tuple)):
            return ", ".join(map(said, value))
        return str(value)

    facts = {_words(name): said(value) for name, value in record.items() if name != "dirty" and _tells(value)}
    if record.get("dirty") and "commit" in facts:
        facts["commit"] += ", with uncommitted changes"
    return facts


class PredictionReport:
    """Collects what a report on unlabelled photos shows, one prediction at a time, in bounded memory.

    Shown are the most and the least confident photos, so that both ends can be judged.

    Args:
        most: tiles shown; photos between the two ends are counted.
    """

    def __init__(self, most: int = MOST_TILES) -> None:
        if most < 2:
            raise ValueError(f"most must be at least 2, got {most}")
        self.most = most
        self.left_out = 0
        self.counts: Counter[str] = Counter()
        self.boxes = 0
        self.confidence: dict[str, float] = {}
        self._shown: list[tuple[float, int, Tile]] = []

    @property
    def tiles(self) -> list[Tile]:
        """The tiles to show, most confident first."""
        return [tile for _, _, tile in self._shown]

    def add(self, image: Image.Image, prediction: Prediction) -> None:
        """Take one photo and what a model says of it."""
        name, probability = prediction.label_name, prediction.probability
        self.counts[name] += 1
        self.confidence[name] = self.confidence.get(name, 0.0) + probability
        self.boxes += len(prediction.boxes_xyxy)
        key = (-probability, self.counts.total())  # the arrival number settles ties
        place = bisect(self._shown, key, key=lambda shown: shown[:2])
        half = (self.most + 1) // 2
        full = len(self._shown) == self.most
        self.left_out += full
        if full and place == half:
            return
        tile = localization_tile(
            image,
            prediction.score_map,
            f"{name}\n{Path(prediction.source).name}",
            predicted_xyxy=prediction.boxes_xyxy,
            badge=f"{100 * probability:.0f} %",
        )
        self._shown.insert(place, (*key, tile))
        if full:
            # With `half` photos above it and as many below, the middle one can never again be at an end.
            del self._shown[half]

    def write(
        self,
        path: str | Path,
        *,
        title: str,
        unreadable: Iterable[tuple[str, str]] = (),
        facts: Mapping[str, Any],
    ) -> Path:
        """Write the page.

        Args:
            path: the file.
            title: of the page.
            unreadable: photos that were skipped, with the reason.
            facts: as in :class:`Report`.
        """
        photos = self.counts.total()
        rows = [
            {"class": name, "photos": count, "mean confidence %": 100 * self.confidence[name] / count}
            for name, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        ]
        note = "The number is the confidence in the class. Click a picture to enlarge it."
        if self.left_out:
            half = (self.most + 1) // 2
            most, least = self.tiles[:half], self.tiles[half:][::-1]
            galleries = [
                Gallery(title="Most confident", tiles=most, note=note, left_out=self.left_out),
                Gallery(title="Least confident", tiles=least),
            ]
        else:
            galleries = [Gallery(title="Photos", tiles=self.tiles, note=f"Most confident first. {note}")]
        skipped = [reason if reason.startswith(name) else f"{name}: {reason}" for name, reason in unreadable]
        report = Report(
            title=title,
            summary=f"{_count(photos, 'photo')}, {_count(self.boxes, 'box', 'boxes')}, "
            f"{_count(len(self.counts), 'class', 'classes')}"
            + (f"; {_count(len(skipped), 'photo')} could not be read." if skipped else "."),
            tables=[Table(title="Classes", rows=rows)] if rows else [],
            galleries=galleries if photos else [],
            facts=facts,
            lists={f"Not readable ({len(skipped)})": skipped} if skipped else {},
        )
        return write_report(path, report)


# ---------------------------------------------------------------- pieces of the page


def _text(value: object) -> str:
    return html.escape(str(value)).replace("\n", "<br>")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _tells(value: object) -> bool:
    return value is not None and value not in ("", [], (), {})


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not isinstance(value, Real) or isinstance(value, (int, np.integer)):
        return _text(value)
    number = float(value)
    if not math.isfinite(number):
        return "–"
    # One decimal suits per cents; thresholds and other small numbers would vanish in it.
    return f"{number:.1f}" if number == 0 or abs(number) >= 1 else f"{number:.2g}"


def _left_out(count: int, what: str) -> str:
    return f'\n<p class="note">{count} more {what} not shown.</p>' if count > 0 else ""


def _table(table: Table) -> str:
    columns = list(dict.fromkeys(name for row in table.rows for name in row))
    start: dict[str, str] = {}
    for name in columns:
        # Numbers end at the right; what holds longer text starts at the left.
        wordy = any(isinstance(row.get(name), str) and len(row[name]) > 20 for row in table.rows)
        names = " ".join(["ours"] * (name == "ours") + ["text"] * wordy)
        start[name] = f' class="{names}"' if names else ""
    head = "".join(f"<th{start[name]}>{_text(name)}</th>" for name in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td{start[name]}>{_value(row.get(name))}</td>" for name in columns) + "</tr>"
        for row in table.rows[:MOST_ROWS]
    )
    note = f'\n<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<div class="card scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
        f"{_left_out(len(table.rows) - MOST_ROWS, 'rows are')}{note}"
    )


def _list(lines: Sequence[str]) -> str:
    items = "\n".join(f"<li>{_text(line)}</li>" for line in lines[:MOST_ROWS])
    return f'<ul class="card">\n{items}\n</ul>{_left_out(len(lines) - MOST_ROWS, "lines are")}'


def _meta(facts: Mapping[str, Any]) -> str:
    """The facts that tell one run from another, in one line under the title."""
    shown: list[str] = []
    if "date" in facts:
        shown.append(_text(str(facts["date"]).replace("T", " ").replace("+00:00", " UTC")))
    if "commit" in facts:
        shown.append(f"commit {_text(str(facts['commit'])[:8])}")
    if "seed" in facts:
        shown.append(f"seed {_text(facts['seed'])}")
    return f'<p class="meta">{" · ".join(shown)}</p>' if shown else ""


def _facts(facts: Mapping[str, Any]) -> str:
    command = f'<pre class="card">{html.escape(str(facts["command"]))}</pre>' if "command" in facts else ""
    rows = "\n".join(
        f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items() if name != "command"
    )
    return command + (f'<dl class="card">\n{rows}\n</dl>' if rows else "")


def _legend(galleries: Sequence[Gallery]) -> str:
    needed = {name for gallery in galleries for tile in gallery.tiles for name in tile.legend}
    entries: list[str] = []
    for name, color, words in (
        ("truth", TRUTH_COLOR, "true box"),
        ("prediction", PREDICTION_COLOR, "predicted box"),
    ):
        if name in needed:
            entries.append(f'<span><i style="border:3px solid rgb{color}"></i>{words}</span>')
    if "score map" in needed:
        entries.append(f'<span>score map: 0 <i class="bar" style="background:{_gradient()}"></i> 1</span>')
    return f'<div class="legend">{"".join(entries)}</div>\n' if entries else ""


def _gradient(colormap: str = "jet") -> str:
    stops = colorize(np.linspace(0, 1, 17)[None], colormap=colormap)[0]
    return f"linear-gradient(90deg,{','.join('#' + bytes(stop).hex() for stop in stops)})"


def _gallery(gallery: Gallery) -> str:
    tiles = "\n".join(map(_tile, gallery.tiles[:MOST_TILES]))
    note = f'<p class="note">{_text(gallery.note)}</p>\n' if gallery.note else ""
    left_out = gallery.left_out + max(0, len(gallery.tiles) - MOST_TILES)
    return f'{note}<div class="gallery">\n{tiles}\n</div>{_left_out(left_out, "are")}'


def _tile(tile: Tile) -> str:
    said = html.escape(tile.caption.replace("\n", ", "))
    first, _, rest = tile.caption.partition("\n")
    pictures = "".join(
        f'<img loading="lazy" alt="{said}" src="{_jpeg(picture)}">' for picture in tile.pictures
    )
    badge = f'<span class="badge">{_text(tile.badge)}</span>' if tile.badge else ""
    return (
        # A ticked box enlarges the pictures: no script is needed, and the keyboard works.
        f'<figure class="tile card"><label><input type="checkbox" aria-label="enlarge {said}">'
        f'<span class="pair">{pictures}{badge}</span></label>'
        f"<figcaption><b>{_text(first)}</b>{'<br>' * bool(rest)}{_text(rest)}</figcaption></figure>"
    )


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    # Full colour resolution: subsampling would smear the thin red and green lines.
    for_display(picture, (1, THUMBNAIL)).save(buffer, "JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plot(name: str, figure: Figure) -> str:
    """As an image, so that ids and styles of one plot cannot meet those of another."""
    buffer = io.BytesIO()
    save_figure(figure, buffer, format="svg", transparent=True)
    ink = f"svg{{color:{PLOT_INK}}}@media(prefers-color-scheme:dark){{svg{{color:#c3ccd6}}}}"
    svg = buffer.getvalue().decode().replace(PLOT_INK, "currentColor")
    svg = svg.replace("<defs>", f"<defs><style>{ink}</style>", 1)
    source = base64.b64encode(svg.encode()).decode()
    wide = ' class="card wide"' if figure.get_figwidth() > 7 else ' class="card"'
    return (
        f"<figure{wide}><figcaption>{_text(name)}</figcaption>"
        f'<img alt="{_text(name)}" src="data:image/svg+xml;base64,{source}"></figure>'
    )
