"""Pictures: known sizes, known colours at known pixels, the same bytes every time, no window toolkit."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnmap_core.errors import InputError
from attnmap_core.pictures import (
    DISPLAY_LIMITS,
    PREDICTION_COLOR,
    TRUTH_COLOR,
    binary_mask_overlay,
    colorize,
    contact_sheet,
    draw_boxes,
    for_display,
    heatmap_grid,
    line_plot,
    overlay,
    picture_grid,
    rgb_image,
    save_picture,
    threshold_curves,
    training_curves,
    training_panels,
    value_grid,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

GRAY = (120, 120, 120)


def plain(width: int = 400, height: int = 300, color: tuple[int, int, int] = GRAY) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


# --- Sizes ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(width=st.integers(1, 2500), height=st.integers(1, 2500))
def test_shown_photos_keep_their_aspect_within_the_limits(width: int, height: int) -> None:
    shown = for_display(Image.new("L", (width, height)))
    low, high = DISPLAY_LIMITS
    assert shown.mode == "RGB"
    assert max(shown.size) == min(max(width, height, low), high)
    scale = max(shown.size) / max(width, height)
    assert abs(shown.width - width * scale) <= 1
    assert abs(shown.height - height * scale) <= 1


def test_a_photo_of_its_own_size_is_not_resampled() -> None:
    photo = plain(33, 21)
    assert for_display(photo, None).size == (33, 21)
    for bad in ((0, 10), (20, 10)):
        with pytest.raises(ValueError, match="longest_side"):
            for_display(photo, bad)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "YCbCr"])
def test_photos_of_any_8_bit_mode(mode: str) -> None:
    assert rgb_image(Image.new(mode, (4, 3))).mode == "RGB"


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.zeros((3, 3, 4), np.uint8), np.zeros((0, 3), np.uint8)])
def test_arrays_that_are_no_photos_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="uint8"):
        rgb_image(bad)


def test_deep_photos_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="load_image"):
        rgb_image(Image.new("I;16", (4, 4)))


# --- Colours at pixels ------------------------------------------------------------------------------------


def test_truth_is_red_and_prediction_green() -> None:
    picture = draw_boxes(plain(), [[50, 40, 150, 140]], [[200, 60, 350, 260]])
    for point in ((50, 40), (50, 90), (149, 139), (100, 139)):
        assert picture.getpixel(point) == TRUTH_COLOR, point
    for point in ((200, 60), (200, 200), (349, 259), (300, 259)):
        assert picture.getpixel(point) == PREDICTION_COLOR, point
    for rim in ((150, 90), (100, 140), (350, 160), (49, 90)):  # the end is exclusive
        assert picture.getpixel(rim) == (0, 0, 0), rim
    for inside_or_far in ((100, 90), (275, 160), (10, 10), (399, 299)):
        assert picture.getpixel(inside_or_far) == GRAY, inside_or_far


def test_boxes_that_coincide_both_show() -> None:
    colors = {c for _, c in draw_boxes(plain(), [[50, 40, 150, 140]], [[50, 40, 150, 140]]).getcolors() or ()}
    assert {TRUTH_COLOR, PREDICTION_COLOR, GRAY} <= colors


def test_boxes_follow_a_resized_photo() -> None:
    picture = draw_boxes(plain(400, 300), [[5, 4, 15, 14]], size_wh=(40, 30))
    assert picture.getpixel((50, 40)) == picture.getpixel((149, 139)) == TRUTH_COLOR
    small = draw_boxes(plain(40, 30), [[5, 4, 15, 14]], longest_side=(400, 400))
    assert small.size == (400, 300)
    assert small.getpixel((50, 40)) == small.getpixel((149, 139)) == TRUTH_COLOR


@pytest.mark.parametrize(
    "box", [[-50, -50, 900, 900], [399, 299, 400, 300], [500, 10, 600, 20], [30, 30, 30, 30]]
)
def test_boxes_at_and_beyond_the_border_are_cut(box: list[float]) -> None:
    picture = draw_boxes(plain(), [box])
    assert picture.size == (400, 300)
    assert TRUTH_COLOR in {color for _, color in picture.getcolors() or ()}


def test_scores_and_labels_are_written() -> None:
    box = [[100, 100, 300, 250]]
    bare = draw_boxes(plain(), None, box)
    for options in (
        {"scores": [0.71]},
        {"labels": ["fox"]},
        {"scores": [float("nan")], "labels": ["x" * 500]},
    ):
        tagged = draw_boxes(plain(), None, box, **options)
        assert tagged.tobytes() != bare.tobytes()
    assert draw_boxes(plain(), None, box, scores=[0.71]).tobytes() != (
        draw_boxes(plain(), None, box, scores=[0.72]).tobytes()
    )
    with pytest.raises(ValueError, match="do not fit"):
        draw_boxes(plain(), None, box, scores=[0.1, 0.2])


def test_a_long_label_is_cut_and_its_score_kept() -> None:
    low, high = (
        draw_boxes(plain(), None, [[9, 99, 300, 250]], [score], ["crab " * 99]).tobytes()
        for score in (0.1, 0.9)
    )
    assert low != high


def test_a_missing_score_is_a_dash() -> None:
    box = [[100, 100, 300, 250]]
    dashed = draw_boxes(plain(), None, box, [float("nan")])
    assert dashed.tobytes() == draw_boxes(plain(), None, box, labels=["–"]).tobytes()


def test_lines_grow_with_the_picture() -> None:
    widths: list[int] = []
    for side in (320, 900, 1600):
        row = np.asarray(draw_boxes(plain(side, side), None, [[side / 4, side / 4, side / 2, side / 2]]))[
            side * 3 // 8
        ]
        widths.append(int((row == PREDICTION_COLOR).all(axis=1).sum()) // 2)
    assert 2 <= widths[0] < widths[1] < widths[2] <= 10


@settings(deadline=None, max_examples=40)
@given(box=st.tuples(*[st.floats(-1e4, 1e4)] * 4), width=st.integers(1, 60), height=st.integers(1, 60))
def test_any_finite_box_can_be_drawn_on_any_photo(box: tuple[float, ...], width: int, height: int) -> None:
    picture = draw_boxes(Image.new("L", (width, height)), [box], [box], [0.5], ["a"], longest_side=(40, 60))
    assert 40 <= max(picture.size) <= 60


@pytest.mark.parametrize("bad", [[[0, 0, np.nan, 5]], [[0, 0, 5]], [0, 0, 5, 5]])
def test_boxes_that_are_none_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="truth_xyxy"):
        draw_boxes(plain(), bad)


def test_drawing_leaves_the_photo_as_it_was() -> None:
    photo = plain()
    draw_boxes(photo, [[50, 40, 150, 140]])
    overlay(photo, np.eye(3))
    binary_mask_overlay(photo, np.eye(3, dtype=bool))
    assert photo.tobytes() == plain().tobytes()


def test_overlay_weighs_photo_and_colours() -> None:
    blue, red = (0, 0, 128), (128, 0, 0)  # the ends of jet
    halves = np.zeros((2, 400))
    halves[:, 200:] = 1
    picture = overlay(plain(color=(100, 200, 50)), halves)
    for x, color in ((10, blue), (390, red)):
        expected = [min(255, 0.5 * p + 0.6 * c) for p, c in zip((100, 200, 50), color)]
        assert np.abs(np.subtract(picture.getpixel((x, 150)), expected)).max() <= 1
    assert overlay(plain(), halves, image_weight=0, map_weight=1).getpixel((10, 150)) == blue


@pytest.mark.parametrize(
    "bad", [np.full((2, 2), 1.5), np.full((2, 2), np.nan), np.zeros(4), np.zeros((0, 2))]
)
def test_maps_out_of_range_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="score map"):
        overlay(plain(), bad)


def test_an_unknown_colormap_is_refused() -> None:
    with pytest.raises(ValueError, match="rainbow9"):
        colorize(np.eye(2), colormap="rainbow9")


def test_a_stretched_map_stays_within_its_colours() -> None:
    steps = colorize(np.eye(2), (200, 200))  # bicubic overshoots
    known = {tuple(color) for color in colorize(np.linspace(0, 1, 256)[None])[0]}
    assert {tuple(color) for color in steps.reshape(-1, 3)} <= known


def test_a_mask_is_tinted_outlined_and_the_rest_dimmed() -> None:
    mask = np.zeros((4, 4), bool)
    mask[:, :2] = True
    picture = binary_mask_overlay(plain(), mask, color=(255, 0, 0), opacity=0.5)
    assert picture.getpixel((100, 150)) == (188, 60, 60)
    assert picture.getpixel((300, 150)) == (60, 60, 60)
    assert picture.getpixel((199, 150)) == (255, 0, 0)
    with pytest.raises(ValueError, match="boolean"):
        binary_mask_overlay(plain(), mask.astype(np.uint8))


def test_a_map_lies_on_the_photo_the_right_way_round() -> None:
    score_map = np.zeros((4, 9))
    score_map[0, -1] = 1  # top right
    heat = np.asarray(overlay(plain(), score_map, image_weight=0, map_weight=1), int)
    y, x = np.unravel_index((heat[..., 0] - heat[..., 2]).argmax(), heat.shape[:2])
    assert y < 75
    assert x > 350


def test_the_border_of_the_photo_is_no_edge_of_a_mask() -> None:
    whole = binary_mask_overlay(plain(), np.ones((2, 2), bool))
    assert len(whole.getcolors() or ()) == 1


# --- Grids ------------------------------------------------------------------------------------------------


def test_cells_are_where_they_belong() -> None:
    red, green, blue = (plain(8, 8, color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    sheet = picture_grid([[red, green], [None, blue]], cell_size=100)
    pixels = np.asarray(sheet)
    centres = {}
    for name, color in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        y, x = np.nonzero((pixels == color).all(axis=2))
        assert len(x) == 100 * 100
        centres[name] = (x.mean(), y.mean())
    assert centres["red"][1] == centres["green"][1] < centres["blue"][1]
    assert centres["red"][0] < centres["green"][0] == centres["blue"][0]


def test_titles_and_captions_make_room_and_are_drawn() -> None:
    cells = [[plain(8, 8)] * 3] * 2
    bare = picture_grid(cells)
    titled = picture_grid(cells, ["SCM", "TS-CAM"], ["a", "λ", "b"], captions=[["IoU 0.7\nok", "", ""]] * 2)
    assert titled.width > bare.width
    assert titled.height > bare.height
    other = picture_grid(cells, ["SCM", "TS-CAM"], ["a", "λ", "b"], captions=[["IoU 0.8\nok", "", ""]] * 2)
    assert other.size == titled.size
    assert other.tobytes() != titled.tobytes()


def test_a_contact_sheet_wraps() -> None:
    sizes = [contact_sheet([plain()] * count, columns=3, tile_size=60).size for count in (3, 4, 6, 7)]
    assert len({width for width, _ in sizes}) == 1
    assert sizes[0][1] < sizes[1][1] == sizes[2][1] < sizes[3][1]
    assert contact_sheet([plain()] * 2, columns=9, tile_size=60).width < sizes[0][0]
    contact_sheet([plain()], ["a caption much too long for a tile of this size"], tile_size=60)


def test_a_caption_stays_below_its_own_tile() -> None:
    tiles = [plain(100, 100)] * 2
    bare, written = (
        np.asarray(contact_sheet(tiles, [text, ""], columns=2, tile_size=100))
        for text in ("", "caption " * 9)
    )
    columns = np.flatnonzero((bare != written).any(axis=(0, 2)))
    assert columns.size > 0
    assert columns.max() < 8 + 100


@pytest.mark.parametrize(
    "call",
    [
        lambda: contact_sheet([]),
        lambda: contact_sheet([plain()], ["a", "b"]),
        lambda: picture_grid([]),
        lambda: picture_grid([[plain()], [plain(), plain()]]),
        lambda: picture_grid([[plain()]], row_titles=["a", "b"]),
        lambda: picture_grid([[plain()]], captions=[["a", "b"]]),
        lambda: heatmap_grid([[np.eye(2)]], row_marginals=[np.eye(2)] * 2),
        lambda: heatmap_grid([[np.eye(2) * 2]]),
    ],
)
def test_grids_that_do_not_fit_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"tile|fit|rows|score map"):
        call()


def test_heat_maps_have_their_marginals_on_the_border() -> None:
    zero, one = np.zeros((2, 2)), np.ones((2, 2))
    bare = heatmap_grid([[zero, zero]], cell_size=60)
    framed = heatmap_grid([[zero, zero]], row_marginals=[one], column_marginals=[one, one], cell_size=60)
    assert framed.width > bare.width
    assert framed.height > bare.height
    high = (np.asarray(framed) == (128, 0, 0)).all(axis=2)
    assert high.sum() == 3 * 60 * 60
    assert (np.asarray(heatmap_grid([[zero]], image=plain(60, 60), cell_size=60)) != (0, 0, 128)).any()


def test_marginals_stand_above_and_left_of_the_table() -> None:
    zero, one = np.zeros((2, 2)), np.ones((2, 2))
    framed = heatmap_grid(
        [[zero] * 2] * 2,
        ["S⁰", "S¹"],
        ["F⁰", "F¹"],
        row_marginals=[one] * 2,
        column_marginals=[one] * 2,
        cell_size=60,
    )
    high, low = ((np.asarray(framed) == color).all(axis=2) for color in ((128, 0, 0), (0, 0, 128)))
    assert high.sum() == low.sum() == 4 * 60 * 60
    rows, columns = np.flatnonzero(low.any(axis=1)), np.flatnonzero(low.any(axis=0))
    assert high[: rows[0], columns].any(axis=0).all()
    assert high[rows, : columns[0]].any(axis=1).all()
    assert high[: rows[0], columns].sum() + high[rows, : columns[0]].sum() == high.sum()


# --- Plots ------------------------------------------------------------------------------------------------


def test_one_epoch_can_be_drawn() -> None:
    figure = training_curves([{"epoch": 1, "loss": 2.3, "lr": 1e-4, "gt_known": 0.4}], title="one")
    for axes, value in zip(figure.axes, (2.3, 1e-4, 0.4)):
        [line] = axes.get_lines()[:1]
        assert np.asarray(line.get_xydata()).tolist() == [[1.0, value]]
        assert line.get_marker() == "o"  # a line of one point would be invisible
        low, high = axes.get_xlim()
        assert low < 1 < high
    assert png(figure).startswith(b"\x89PNG")


def test_gaps_stay_gaps() -> None:
    history = [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": None}, {"epoch": 3}, {"epoch": 4, "loss": 1.0}]
    history[2]["loss"] = float("nan")
    [axes] = training_curves(history).axes
    line = axes.get_lines()[0]
    drawn = dict(zip(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()))
    assert (drawn[1], drawn[4]) == (3.0, 1.0)
    assert np.isnan(drawn[3])
    assert png(training_curves(history))
    assert png(line_plot([1, 2], {"all": [float("nan")] * 2, "some": [1, float("nan")]}))
    assert png(threshold_curves({"SCM": {0.5: [np.nan, 0.2], 0.7: [np.nan, np.nan]}}, [0.0, 0.5]))


def test_panels_are_the_parts_of_the_whole() -> None:
    history = [
        {"epoch": i, "train/loss": 1 / (i + 1), "lr": 0.1, "gt_known": 0.5, "l_1": 1.0, "l_2": 2.0}
        for i in range(3)
    ]
    panels = training_panels(history)
    assert list(panels) == [axes.get_title() for axes in training_curves(history).axes]
    assert list(panels) == ["loss", "learning rate", "metrics", "l"]
    assert len(panels["l"].axes[0].get_legend().get_texts()) == 2


def test_metrics_in_percent_and_as_shares_have_panels_of_their_own() -> None:
    row = {
        "loss/ce": 2.0,
        "lr": 0.1,
        "accuracy": 0.5,
        "GT-known": 70.0,
        "MaxBoxAccV2": 55.0,
        "mean_weight": 1.7,
    }
    panels = {
        name: [container.get_label() for container in figure.axes[0].containers]
        for name, figure in training_panels([{"epoch": 1} | row]).items()
    }
    assert panels == {
        "loss": ["loss/ce"],
        "learning rate": ["lr"],
        "metrics": ["accuracy"],
        "metrics, %": ["GT-known", "MaxBoxAccV2"],
        "mean_weight": ["mean_weight"],
    }


def test_a_curve_without_a_finite_value_is_named_with_a_dash() -> None:
    [axes] = training_curves([{"loss": 1.0, "loss/box": float("nan")}]).axes
    assert [container.get_label() for container in axes.containers] == ["loss", "loss/box (–)"]


def test_two_axes_share_their_ticks_and_one_legend() -> None:
    figure = line_plot(
        ["1", "4", "16"], {"GT-known": [70, 77, 74]}, errors={"GT-known": [1, 0.5, 2]},
        twin={"best τ": [0.3, 0.4, 0.2]}, x_label="p", y_label="%", twin_label="threshold",
    )  # fmt: skip
    left, right = figure.axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "4", "16"]
    assert (left.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("p", "%", "threshold")
    assert np.asarray(right.get_lines()[0].get_ydata()).tolist() == [0.3, 0.4, 0.2]
    legend = left.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["GT-known", "best τ"]
    assert right.get_legend() is None


@pytest.mark.parametrize("history", [[], [{"epoch": 1}], [{"epoch": 1, "name": "text"}]])
def test_a_history_without_numbers_is_refused(history: Any) -> None:
    with pytest.raises(ValueError, match="no numbers"):
        training_curves(history)


def test_the_best_threshold_is_marked() -> None:
    figure = threshold_curves({"SCM": {0.5: [0.1, 0.9, 0.3]}}, [0.0, 0.2, 0.4])
    points = [np.asarray(line.get_xydata()).tolist() for line in figure.axes[0].get_lines()]
    assert [[0.2, 0.9]] in points
    two = threshold_curves(
        {"SCM": {0.3: [0, 1], 0.5: [0, 1]}, "TS-CAM": {0.3: [1, 0], 0.5: [0, 1]}}, [0, 0.5]
    )
    assert [axes.get_title() for axes in two.axes] == ["IoU ≥ 0.3", "IoU ≥ 0.5"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: line_plot([1, 2], {"a": [1, 2, 3]}),
        lambda: line_plot([1], {"a": [1]}, errors={"b": [1]}),
        lambda: threshold_curves({}, [0.0]),
        lambda: threshold_curves({"a": {0.5: [1]}, "b": {0.3: [1]}}, [0.0]),
        lambda: threshold_curves({"a": {0.5: [1, 2]}}, [0.0]),
    ],
)
def test_series_that_do_not_fit_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"expected|unknown|same"):
        call()


# --- Files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "plot.png", "plot.svg"])
def test_the_same_picture_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    written: list[bytes] = []
    for i in range(2):
        picture: Any = (
            draw_boxes(plain(), [[5, 5, 90, 90]], [[20, 20, 100, 100]], [0.5], ["fox"])
            if name.startswith("photo")
            else line_plot([1, 2, 3], {"a": [1, 2, 3], "b": [3, 2, 1]}, title="T")
        )
        written.append(save_picture(picture, tmp_path / f"{i}-{name}").read_bytes())
    assert written[0] == written[1]


def test_other_endings_are_refused(tmp_path: Path) -> None:
    for picture, name in ((plain(), "a.svg"), (plain(), "a"), (line_plot([1], {"a": [1]}), "a.jpg")):
        with pytest.raises(InputError, match="cannot write this picture"):
            save_picture(picture, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_grid_of_values_says_each_number_once() -> None:
    values = np.array([[0.1, np.nan, 1.3], [0.4, 0.25, 0.0]])
    figure = value_grid(values, row_names=["5", "6"], x_label="head", y_label="layer", value_label="E")
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.10", "1.30", "0.40", "0.25", "0.00"]
    assert [text.get_color() for text in axes.texts] == ["white", "black", "white", "white", "white"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["5", "6"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
    assert bar.get_ylabel() == "E"
    assert png(value_grid(values)) == png(value_grid(values))
    assert not value_grid(np.zeros((21, 20))).axes[0].texts  # too many to read
    for wrong in (np.zeros(3), np.zeros((0, 2))):
        with pytest.raises(ValueError, match="rows, columns"):
            value_grid(wrong)
    with pytest.raises(ValueError, match="1 names do not fit 2 rows"):
        value_grid(values, row_names=["5"])


def test_a_full_disk_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_picture(plain(), tmp_path / "a.png").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="space"):
        save_picture(plain(9, 9), tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [old]


def test_no_window_toolkit_and_no_global_state_are_touched() -> None:
    code = (
        "import sys, numpy as np, attnmap_core.pictures as p\n"
        "assert 'matplotlib' not in sys.modules, 'importing must be quick'\n"
        "from PIL import Image\nimport io, matplotlib\n"
        "def settings(): return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "photo = p.draw_boxes(p.overlay(Image.new('RGB', (40, 30)), np.eye(3)), [[1, 2, 9, 9]], [[1, 2, 9, 9]], [.5])\n"
        "p.contact_sheet([photo], ['x'])\n"
        "p.save_figure(p.line_plot([1, 2], {'a': [1, 2]}), io.BytesIO(), format='svg')\n"
        "p.save_figure(p.training_curves([{'loss': 1.0}]), io.BytesIO(), format='png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert settings() == before\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
