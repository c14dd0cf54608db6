"""Reports: one page without script or network, the same bytes each time, of bounded size."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnmap_core.errors import InputError
from attnmap_core.pictures import PLOT_INK, line_plot
from attnmap_core.prediction import Prediction
from attnmap_core.report import (
    MOST_ROWS,
    MOST_TILES,
    THUMBNAIL,
    Gallery,
    PredictionReport,
    Report,
    Table,
    Tile,
    compared,
    localization_tile,
    run_facts,
    select_cases,
    write_report,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

VOID = {"meta", "img", "br", "input", "link", "hr"}
EVIL = "<script>alert('x')</script> & \"q\" 猫"


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what a browser would show and load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        assert self.source.startswith("<!doctype html>")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())

    def attributes(self, name: str) -> list[str]:
        return [values[name] or "" for _, values in self.tags if name in values]


def picture(seed: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def full_report() -> Report:
    score_map = np.linspace(0, 1, 49).reshape(7, 7)
    tile = localization_tile(
        picture(), score_map, f"{EVIL}\nsecond line", truth_xyxy=[[5, 5, 30, 30]],
        predicted_xyxy=[[8, 8, 40, 30]], badge="0.71",
    )  # fmt: skip
    return Report(
        title=EVIL,
        summary=EVIL,
        tables=[Table(title=EVIL, rows=[{EVIL: EVIL, "n": 3}, {"n": None}], note=EVIL)],
        plots={EVIL: line_plot([1, 2, 3], {"loss": [3, 2, float("nan")]})},
        galleries=[Gallery(title=EVIL, tiles=[tile, tile], note=EVIL, left_out=7)],
        facts={"command": EVIL, "seed": 3, EVIL: EVIL},
        lists={EVIL: [EVIL, "two"]},
    )


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(write_report(tmp_path / "report.html", full_report()))


# --- The page ---------------------------------------------------------------------------------------------


def test_no_script_and_nothing_from_elsewhere(page: Page) -> None:
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed", "link", "base"})
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    sources = page.attributes("src") + page.attributes("href") + page.attributes("srcset")
    assert sources
    assert not [source for source in sources if not source.startswith(("data:image/", "#"))]
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|//", style)


def test_all_text_is_escaped_and_shown(page: Page) -> None:
    assert "<script" not in page.source
    assert page.text.count(EVIL) >= 10  # title twice, summary, table, note, curve, gallery, list, facts
    assert "second line" in page.text
    assert "7 more" in page.text


def test_pictures_have_words_for_those_who_cannot_see_them(page: Page) -> None:
    images = [values for tag, values in page.tags if tag == "img"]
    assert len(images) == 2 * 2 + 1
    assert all(values.get("alt") for values in images)


def test_links_lead_somewhere(page: Page) -> None:
    anchors = set(page.attributes("id"))
    assert len(anchors) == len(page.attributes("id"))
    targets = [target[1:] for target in page.attributes("href") if target.startswith("#")]
    assert targets
    assert set(targets) <= anchors


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    pages = [write_report(tmp_path / f"{i}.html", full_report()).read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


def test_a_report_of_nothing_is_a_page(tmp_path: Path) -> None:
    assert Page(write_report(tmp_path / "r.html", Report(title="Empty"))).text.count("Empty") == 2


def test_values_are_shown_for_people(tmp_path: Path) -> None:
    rows = [
        {"a": 71.2345, "b": 12, "c": None, "d": float("nan"), "e": True, "f": 0.0123, "g": 0.0, "h": "x"},
        {"a": np.float32(5.25), "b": np.int64(7)},
    ]
    page = Page(write_report(tmp_path / "r.html", Report(title="t", tables=[Table(title="T", rows=rows)])))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.source)
    assert cells[:8] == ["71.2", "12", "–", "–", "yes", "0.012", "0.0", "x"]
    assert cells[8:] == ["5.2", "7", "–", "–", "–", "–", "–", "–"]


def test_a_browser_is_told_to_load_nothing(page: Page) -> None:
    policy = [values["content"] for _, values in page.tags if "http-equiv" in values]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_it_suits_phones_and_dark_screens(page: Page) -> None:
    metas = [values for tag, values in page.tags if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert {"name": "color-scheme", "content": "light dark"} in metas
    assert "prefers-color-scheme: dark" in page.source


def test_plots_load_nothing_and_take_the_ink_of_the_theme(page: Page) -> None:
    start = "data:image/svg+xml;base64,"
    plots = [source[len(start) :] for source in page.attributes("src") if source.startswith(start)]
    assert len(plots) == 1
    svg = base64.b64decode(plots[0]).decode()
    assert "<script" not in svg
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))
    assert "prefers-color-scheme:dark" in svg
    assert "currentColor" in svg
    assert PLOT_INK not in svg.replace(f"svg{{color:{PLOT_INK}}}", "")


def test_the_run_stands_on_top_and_its_command_below(tmp_path: Path) -> None:
    facts = {
        "command": "scm-wsol train",
        "seed": 3,
        "commit": "0123456789ab",
        "date": "2026-01-02T03:04:05+00:00",
    }
    page = Page(write_report(tmp_path / "r.html", Report(title="t", facts=facts)))
    assert "2026-01-02 03:04:05 UTC · commit 01234567 · seed 3" in page.text
    assert "What was run scm-wsol train" in page.text
    assert "commit 0123456789ab" in page.text


def test_a_dollar_sign_is_no_placeholder(tmp_path: Path) -> None:
    report = Report(title="t", summary="costs $title and $$5")
    assert "costs $title and $$5" in Page(write_report(tmp_path / "r.html", report)).text


def test_the_legend_stands_once_and_names_what_is_shown(page: Page, tmp_path: Path) -> None:
    for words in ("true box", "predicted box", "score map: 0"):
        assert page.text.count(words) == 1
    unlabelled = localization_tile(picture(), np.eye(3), "x", predicted_xyxy=np.zeros((0, 4)))
    galleries = [Gallery(title=name, tiles=[unlabelled]) for name in "ab"]
    page = Page(write_report(tmp_path / "r.html", Report(title="t", galleries=galleries)))
    assert page.text.count("predicted box") == 1
    assert "true box" not in page.text


def test_a_report_that_fails_half_way_keeps_the_old_one(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", Report(title="old"))
    broken: Any = Tile(pictures=["no picture"], caption="x")  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        write_report(path, Report(title="new", galleries=[Gallery(title="G", tiles=[broken])]))
    assert "old" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_long_tables_lists_and_galleries_are_cut_and_counted(tmp_path: Path) -> None:
    small = Image.new("RGB", (2, 2))
    report = Report(
        title="t",
        tables=[Table(title="T", rows=[{"n": i} for i in range(MOST_ROWS + 11)])],
        galleries=[
            Gallery(title="G", tiles=[Tile(pictures=[small], caption="c")] * (MOST_TILES + 13), left_out=4)
        ],
        lists={"L": ["line"] * (MOST_ROWS + 5)},
    )
    page = Page(write_report(tmp_path / "r.html", report))
    assert [tag for tag, _ in page.tags].count("img") == MOST_TILES
    assert [tag for tag, _ in page.tags].count("li") == MOST_ROWS
    for count in (11, 17, 5):
        assert f"{count} more" in page.text


def test_big_pictures_are_made_small(tmp_path: Path) -> None:
    tile = Tile(pictures=[picture(size=(2400, 1600))], caption="big")
    path = write_report(tmp_path / "r.html", Report(title="t", galleries=[Gallery(title="G", tiles=[tile])]))
    assert path.stat().st_size < 150_000
    tile = localization_tile(picture(size=(2400, 1600)), np.eye(4), "x")
    assert {max(shown.size) for shown in tile.pictures} == {THUMBNAIL}


def test_pictures_that_jpeg_cannot_compress_are_written_too(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (THUMBNAIL, THUMBNAIL, 3), dtype=np.uint8) * np.uint8(255)
    tile = Tile(pictures=[Image.fromarray(noise)], caption="noise")
    path = write_report(tmp_path / "r.html", Report(title="t", galleries=[Gallery(title="G", tiles=[tile])]))
    assert path.stat().st_size < 300_000


def test_a_report_that_cannot_be_written_keeps_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path / "file" / "report.html", Report(title="t"))


# --- Pieces -----------------------------------------------------------------------------------------------


@given(
    scores=st.dictionaries(st.integers(0, 99), st.floats(allow_nan=True, allow_infinity=True)),
    each=st.integers(0, 6),
)
def test_selected_cases_are_best_worst_and_others(scores: dict[int, float], each: int) -> None:
    finite = {key: value for key, value in scores.items() if np.isfinite(value)}
    chosen = select_cases(scores, each, seed=1)
    best, worst, random = chosen["best"], chosen["worst"], chosen["random"]
    everyone = best + worst + random
    assert len(set(everyone)) == len(everyone) == min(3 * each, len(finite))
    assert set(everyone) <= set(finite)
    assert max(map(len, chosen.values())) <= each
    assert [finite[key] for key in best] == sorted(finite.values(), reverse=True)[: len(best)]
    assert [finite[key] for key in worst] == sorted(finite.values())[: len(worst)]
    assert chosen == select_cases(scores, each, seed=1)


@pytest.mark.parametrize(
    ("count", "groups"), [(0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 1, 0]), (5, [2, 2, 1])]
)
def test_few_cases_are_shared_out(count: int, groups: list[int]) -> None:
    chosen = select_cases({i: float(i) for i in range(count)}, each=8)
    assert [len(keys) for keys in chosen.values()] == groups


def test_another_seed_selects_other_random_cases() -> None:
    scores = {i: i / 100 for i in range(100)}
    first, second = select_cases(scores, 5, seed=0), select_cases(scores, 5, seed=1)
    assert first["best"] == second["best"] == [99, 98, 97, 96, 95]
    assert first["worst"] == [0, 1, 2, 3, 4]
    assert first["random"] != second["random"]


def test_a_tile_shows_both_boxes_and_the_map() -> None:
    gray = Image.new("RGB", (320, 320), (128, 128, 128))
    boxed, heat = localization_tile(
        gray, np.zeros((4, 4)), "x", truth_xyxy=[[20, 20, 100, 100]], predicted_xyxy=[[200, 200, 300, 300]]
    ).pictures
    red, green = boxed.getpixel((21, 60)), boxed.getpixel((201, 250))
    assert isinstance(red, tuple)
    assert isinstance(green, tuple)
    assert red[0] > 150 > max(red[1:])
    assert green[1] > 150 > max(green[0], green[2])
    blue = heat.getpixel((160, 160))
    assert isinstance(blue, tuple)
    assert blue[2] > blue[0]  # jet: low is blue
    assert localization_tile(gray, np.zeros((4, 4)), "x").legend == ("score map",)


def test_published_numbers_stand_beside_ours() -> None:
    ours = {"GT-known": 95.0, "PxAP": 70.0}
    assert compared("t", ours, {"GT-known": 96.6, "PxAP": None}).rows == [
        {"metric": "GT-known", "published": 96.6, "ours": 95.0},
        {"metric": "PxAP", "published": None, "ours": 70.0},
    ]
    assert compared("t", ours).rows[0] == {"metric": "GT-known", "ours": 95.0}


def test_facts_are_flat_text() -> None:
    facts = run_facts({"git_commit": "ab", "sizes": [1, 2], "versions": {"a": "1", "b": None}, "none": None})
    assert facts == {"git commit": "ab", "sizes": "1, 2", "versions": "a 1"}
    assert run_facts({"commit": "ab", "dirty": True}) == {"commit": "ab, with uncommitted changes"}
    assert run_facts({"commit": "ab", "dirty": False, "gpus": []}) == {"commit": "ab"}


# --- Reports on predictions -------------------------------------------------------------------------------


def prediction(i: int, probability: float, boxes: int = 1) -> Prediction:
    return Prediction(
        source=f"photos/{i}.jpg", width=60, height=40, label=i % 2, label_name=f"class {i % 2}",
        probability=probability, boxes_xyxy=np.tile([5.0, 5.0, 30.0, 30.0], (boxes, 1)),
        box_scores=np.ones(boxes), score_map=np.zeros((4, 4), np.float32), threshold=0.2,
    )  # fmt: skip


def write(report: PredictionReport, path: Path, **options: Any) -> Page:
    return Page(report.write(path, **({"title": "Photos", "facts": {"command": "x"}} | options)))


def test_most_and_least_confident_photos_are_shown(tmp_path: Path) -> None:
    report = PredictionReport(most=4)
    probabilities = np.random.default_rng(0).permutation(20) / 20
    for i, probability in enumerate(probabilities):
        report.add(picture(i), prediction(i, float(probability)))
    assert len(report.tiles) == 4
    assert report.left_out == 16
    assert [tile.badge for tile in report.tiles] == ["95 %", "90 %", "5 %", "0 %"]
    page = write(report, tmp_path / "r.html")
    assert "20 photos, 20 boxes, 2 classes" in page.text
    assert [tag for tag, _ in page.tags].count("img") == 2 * 4
    assert page.text.count("16 more are not shown") == 1
    assert re.findall(r"\d+ %", page.text) == [
        "95 %",
        "90 %",
        "0 %",
        "5 %",
    ]  # each end begins with its extreme


@pytest.mark.parametrize("most", [2, 3, 6, 11, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_both_ends_of_a_stream_are_kept_exactly(most: int, seed: int) -> None:
    report, count = PredictionReport(most), 12
    for i in np.random.default_rng(seed).permutation(count).tolist():
        report.add(Image.new("L", (2, 2)), prediction(i, i / count))
        assert len(report.tiles) <= most
    half = (most + 1) // 2
    wanted = [*range(count)][::-1][:half] + [*range(most - half)][::-1]
    assert [tile.caption for tile in report.tiles] == [f"class {i % 2}\n{i}.jpg" for i in wanted]
    assert report.left_out == count - most


def test_equal_confidence_keeps_the_order_and_classes_are_counted(tmp_path: Path) -> None:
    report = PredictionReport()
    for i in (4, 1, 2):
        report.add(Image.new("L", (9, 9)), prediction(i, 0.5))
    page = write(report, tmp_path / "r.html")
    assert re.findall(r"(\d)\.jpg", page.text) == ["4", "1", "2"]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.source)
    assert cells == ["class 0", "2", "50.0", "class 1", "1", "50.0"]  # the most frequent first
    assert "true box" not in page.text


def test_a_report_on_many_photos_is_no_bigger(tmp_path: Path) -> None:
    sizes: list[int] = []
    for count in (6, 60):
        report = PredictionReport(most=6)
        for i in range(count):
            report.add(picture(0), prediction(i, 0.5))
        sizes.append(len(write(report, tmp_path / "r.html").source))
    assert sizes[1] < 1.1 * sizes[0]


def test_skipped_photos_are_listed_with_the_reason(tmp_path: Path) -> None:
    report = PredictionReport()
    report.add(picture(), prediction(0, 0.5, boxes=0))
    page = write(
        report, tmp_path / "r.html", unreadable=[("a.jpg", "0 bytes"), (EVIL, "no image"), ("b", "b: cut")]
    )
    assert "1 photo, 0 boxes, 1 class; 3 photos could not be read." in page.text
    assert "b: cut" in page.text
    assert "b: b" not in page.text
    assert "a.jpg: 0 bytes" in page.text
    assert f"{EVIL}: no image" in page.text


def test_fewer_than_two_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="2"):
        PredictionReport(most=1)
