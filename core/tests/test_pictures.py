"""Pictures: sizes, colours at known pixels, degenerate photos, plots without pyplot, files without halves."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attnmap_core.errors import InputError
from attnmap_core.pictures import (
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
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

GRAY = Image.new("RGB", (400, 300), (100, 100, 100))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.int64)


def has_color(image: Image.Image, color: tuple[int, int, int]) -> bool:
    return bool((pixels(image) == color).all(axis=-1).any())


# ---------------------------------------------------------------- photos


def test_importing_pictures_and_reports_loads_neither_matplotlib_nor_torch():
    code = (
        "import sys, attnmap_core.pictures, attnmap_core.report\n"
        "heavy = {'matplotlib', 'matplotlib.pyplot', 'torch', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_never_import_pyplot(tmp_path: Path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from attnmap_core.pictures import *\n"
        "from attnmap_core.report import Report, write_report\n"
        "history = [{'epoch': 1, 'loss': 2.0, 'lr': 0.1}]\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "save_picture(training_curves(history), folder / 'a.png')\n"
        "save_picture(line_plot([1, 2], {'a': [1, 2]}, twin={'b': [3, 4]}), folder / 'a.svg')\n"
        "save_picture(threshold_curves({'a': {0.5: [0, 1]}}, [0, 1]), folder / 'b.png')\n"
        "write_report(folder / 'r.html', Report(title='t', plots=training_panels(history)))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_leave_the_settings_of_matplotlib_alone(tmp_path: Path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    save_picture(training_curves([{"loss": 1.0}]), tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((640, 480), (640, 480)),
        ((32, 24), (320, 240)),
        ((1, 1), (320, 320)),
        ((20_000, 600), (1600, 48)),
        ((3, 9000), (1, 1600)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "RGBA"])
def test_every_photo_gets_a_readable_size_in_rgb(size: tuple[int, int], shown: tuple[int, int], mode: str):
    photo = Image.new(mode, size)
    pictures = [
        for_display(photo),
        overlay(photo, np.eye(14)),
        draw_boxes(photo, [[0, 0, *size]]),
        binary_mask_overlay(photo, np.eye(14) > 0),
    ]
    assert {(picture.mode, picture.size) for picture in pictures} == {("RGB", shown)}


def test_a_size_can_be_kept_or_chosen():
    assert overlay(Image.new("L", (7, 5)), np.eye(3), longest_side=None).size == (7, 5)
    assert draw_boxes(Image.new("L", (7, 5)), longest_side=(70, 80)).size == (70, 50)
    with pytest.raises(ValueError, match="low <= high"):
        for_display(GRAY, (10, 5))


def test_overlay_is_the_weighted_sum_of_photo_and_jet():
    picture = overlay(GRAY, np.zeros((14, 14)), image_weight=0.5, map_weight=0.6)
    assert picture.getpixel((200, 150)) == (50, 50, 50 + round(0.6 * 128))  # jet starts at (0, 0, 0.5)
    bright = overlay(Image.new("RGB", (400, 300), "white"), np.ones((14, 14)), image_weight=1, map_weight=1)
    assert bright.getpixel((0, 0)) == (255, 255, 255)  # clipped, not wrapped round


def test_overlay_stretches_any_map_to_the_photo_the_right_way_round():
    score_map = np.zeros((4, 9))
    score_map[0, -1] = 1  # top right
    heat = pixels(overlay(GRAY, score_map, image_weight=0, map_weight=1))
    red = heat[..., 0] - heat[..., 2]
    row, column = np.unravel_index(red.argmax(), red.shape)
    assert row < 75
    assert column > 350


@pytest.mark.parametrize(
    "bad", [np.zeros(4), np.zeros((0, 3)), np.full((2, 2), np.nan), np.full((2, 2), 1.5), [[-0.2, 0.3]]]
)
def test_a_map_that_is_no_score_map_is_refused(bad: np.ndarray):
    with pytest.raises(ValueError, match="score map must be"):
        overlay(GRAY, bad)


def test_an_unknown_colour_map_is_refused_by_name():
    with pytest.raises(ValueError, match="'rainbows'"):
        overlay(GRAY, np.eye(2), "rainbows")


def test_truth_is_red_and_prediction_green_just_inside_the_box():
    picture = draw_boxes(GRAY, [[10, 20, 110, 90]], [[200, 120, 300, 190]])
    for x, y in [(10, 20), (109, 89), (10, 89), (60, 20)]:
        assert picture.getpixel((x, y)) == TRUTH_COLOR
    for x, y in [(200, 120), (299, 189), (299, 150)]:
        assert picture.getpixel((x, y)) == PREDICTION_COLOR
    for x, y in [(60, 55), (250, 150), (390, 290)]:  # inside and outside of both
        assert picture.getpixel((x, y)) == (100, 100, 100)
    assert picture.getpixel((110, 55)) == (0, 0, 0)  # end exclusive: the dark rim begins here
    assert TRUTH_COLOR[0] > 2 * max(TRUTH_COLOR[1:])
    assert PREDICTION_COLOR[1] > 2 * max(PREDICTION_COLOR[0], PREDICTION_COLOR[2])


def test_both_boxes_show_where_they_coincide():
    picture = draw_boxes(GRAY, [[50, 50, 350, 250]], [[50, 50, 350, 250]])
    assert has_color(picture, TRUTH_COLOR)
    assert has_color(picture, PREDICTION_COLOR)


def test_drawing_leaves_the_photo_untouched():
    photo = GRAY.copy()
    draw_boxes(photo, [[0, 0, 50, 50]])
    assert photo.tobytes() == GRAY.tobytes()


def test_boxes_follow_an_enlarged_photo_and_a_resized_copy():
    small = Image.new("RGB", (40, 30), (100, 100, 100))
    enlarged = draw_boxes(small, [[10, 5, 30, 25]])  # 320 x 240: 8 times
    assert enlarged.getpixel((80, 40)) == TRUTH_COLOR
    assert enlarged.getpixel((239, 199)) == TRUTH_COLOR
    on_overlay = draw_boxes(overlay(small, np.zeros((3, 3))), [[10, 5, 30, 25]], size_wh=small.size)
    assert on_overlay.getpixel((80, 40)) == TRUTH_COLOR


def test_lines_grow_with_the_picture():
    def line_width(size: int) -> int:
        picture = draw_boxes(
            Image.new("RGB", (size, size)), None, [[size // 4, size // 4, size // 2, size // 2]]
        )
        return int((pixels(picture)[size * 3 // 8] == PREDICTION_COLOR).all(axis=-1).sum()) // 2

    assert 2 <= line_width(320) < line_width(900) < line_width(1600) <= 10


@given(
    box=st.tuples(*[st.floats(-1e4, 1e4)] * 4),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
@settings(max_examples=60, deadline=None)
def test_any_finite_box_can_be_drawn_on_any_photo(box: tuple[float, ...], size: tuple[int, int]):
    picture = draw_boxes(Image.new("L", size), [box], [box], [0.5], ["a"], longest_side=(40, 60))
    assert max(picture.size) in range(40, 61)


def test_scores_and_labels_are_written_and_a_missing_score_is_a_dash():
    plain = draw_boxes(GRAY, None, [[100, 100, 300, 250]])
    tagged = draw_boxes(GRAY, None, [[100, 100, 300, 250]], [0.87], ["crab"])
    assert (pixels(plain)[80:99] == 100).all()  # nothing above the rim without a tag
    assert has_color(tagged.crop((100, 84, 130, 98)), PREDICTION_COLOR)
    dashed = draw_boxes(GRAY, None, [[100, 100, 300, 250]], [math.nan])
    assert dashed.tobytes() == draw_boxes(GRAY, None, [[100, 100, 300, 250]], labels=["–"]).tobytes()


def test_a_long_label_is_cut_and_its_score_kept():
    def drawn(score: float) -> bytes:
        return draw_boxes(GRAY, None, [[10, 100, 300, 250]], [score], ["crayfish " * 40]).tobytes()

    assert drawn(0.12) != drawn(0.87)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"truth_xyxy": [1, 2, 3, 4]}, "truth_xyxy must be finite"),
        ({"predicted_xyxy": [[0, 0, math.nan, 1]]}, "predicted_xyxy must be finite"),
        ({"predicted_xyxy": [[0, 0, 1, 1]], "scores": [1.0, 2.0]}, "2 scores do not fit 1"),
        ({"labels": ["a"]}, "1 labels do not fit 0"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        draw_boxes(GRAY, **arguments)


def test_mask_is_tinted_outlined_and_the_rest_dimmed():
    mask = np.zeros((30, 40), bool)
    mask[10:20, 10:30] = True
    picture = binary_mask_overlay(GRAY, mask)
    inside, outside = picture.getpixel((200, 150)), picture.getpixel((20, 20))
    assert outside == (50, 50, 50)
    assert inside[1] > 100 > inside[0]
    assert picture.getpixel((100, 150)) == PREDICTION_COLOR  # first column of the foreground
    assert picture.getpixel((99, 150)) == (50, 50, 50)
    full = binary_mask_overlay(GRAY, np.ones((2, 2), bool))
    assert not has_color(full, PREDICTION_COLOR)  # the photo's border is not an edge of the mask


def test_a_score_map_is_not_taken_for_a_mask():
    with pytest.raises(ValueError, match="boolean"):
        binary_mask_overlay(GRAY, np.eye(3))


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_arrays_that_are_no_photo_are_refused(image: np.ndarray):
    with pytest.raises(ValueError, match="uint8"):
        rgb_image(image)


def test_a_16_bit_photo_is_refused_instead_of_clipped():
    with pytest.raises(ValueError, match="load_image"):
        rgb_image(Image.new("I;16", (4, 4), 40_000))


def test_colorize_keeps_the_ends_when_it_smooths():
    step = np.repeat([[0.0, 1.0]], 2, axis=0)
    colors = colorize(step, (100, 2))
    assert colors[0, 0].tolist() == [0, 0, 128]
    assert colors[0, -1].tolist() == [128, 0, 0]


# ---------------------------------------------------------------- sheets and grids


def test_contact_sheet_places_tiles_in_reading_order():
    tiles = [Image.new("RGB", (50, 50), color) for color in ("red", "lime", "blue")]
    sheet = contact_sheet(tiles, ["a", "b\nc", "d"], columns=2, tile_size=100)
    width, height = sheet.size
    assert sheet.getpixel((width // 4, 50)) == (255, 0, 0)
    assert sheet.getpixel((3 * width // 4, 50)) == (0, 255, 0)
    assert sheet.getpixel((width // 4, height * 3 // 4 - 20)) == (0, 0, 255)
    assert sheet.getpixel((3 * width // 4, height * 3 // 4)) == (255, 255, 255)  # nothing there
    assert contact_sheet(tiles, columns=2, tile_size=100).height < height  # captions take room


def test_a_caption_stays_below_its_own_tile():
    tiles = [Image.new("RGB", (100, 100), "white")] * 2
    empty = pixels(contact_sheet(tiles, ["", ""], columns=2, tile_size=100))
    written = pixels(contact_sheet(tiles, ["a very long caption " * 5, ""], columns=2, tile_size=100))
    columns = np.flatnonzero((empty != written).any(axis=(0, 2)))
    assert columns.size
    assert columns.max() < 100 + 12


def test_heatmap_grid_sets_the_marginals_on_the_border():
    low, high = np.zeros((4, 4)), np.ones((4, 4))
    grid = heatmap_grid(
        [[low, low], [low, low]], ["S⁰", "S¹"], ["F⁰", "F¹"],
        row_marginals=[high, high], column_marginals=[high, high], cell_size=100,
    )  # fmt: skip
    colors = [tuple(color) for _, color in grid.getcolors(1 << 20)]
    assert (0, 0, 128) in colors
    assert (128, 0, 0) in colors
    is_high = (pixels(grid) == (128, 0, 0)).all(axis=-1)
    is_low = (pixels(grid) == (0, 0, 128)).all(axis=-1)
    assert is_low.sum() == is_high.sum() == 4 * 100 * 100
    inner_rows, inner_columns = np.flatnonzero(is_low.any(1)), np.flatnonzero(is_low.any(0))
    assert not is_high[np.ix_(inner_rows, inner_columns)].any()
    assert is_high[: inner_rows.min()].any()  # above: columns
    assert is_high[:, : inner_columns.min()].any()  # left: rows


def test_heatmap_grid_lays_maps_over_the_photo():
    grid = heatmap_grid([[np.zeros((2, 2))]], image=GRAY, cell_size=100)
    assert grid.getpixel((grid.width // 2, grid.height // 2)) == overlay(GRAY, np.zeros((2, 2))).getpixel(
        (0, 0)
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"row_titles": ["a", "b"]},
        {"column_titles": ["a", "b"]},
        {"row_marginals": []},
        {"column_marginals": [np.eye(2)] * 2},
        {"captions": [["a", "b"]]},
    ],
)
def test_titles_and_marginals_must_fit(arguments: dict):
    with pytest.raises(ValueError, match=r"fit|must be"):
        heatmap_grid([[np.eye(2)]], **arguments)


def test_grids_and_sheets_of_nothing_are_refused():
    with pytest.raises(ValueError, match="needs tiles"):
        contact_sheet([])
    with pytest.raises(ValueError, match="captions"):
        contact_sheet([GRAY], ["a", "b"])
    with pytest.raises(ValueError, match="one length"):
        picture_grid([[GRAY], [GRAY, GRAY]])


# ---------------------------------------------------------------- plots


def lines_of(axes) -> dict[str, np.ndarray]:
    return {bars.get_label(): bars.lines[0].get_xydata() for bars in axes.containers}


def test_training_curves_sort_losses_rate_and_metrics():
    history = [
        {"epoch": e, "loss": 1 / e, "loss/ce": 1 / e, "lr": 1e-4, "accuracy": 0.5, "GT-known": 70.0,
         "MaxBoxAccV2": 55.0, "lambda_0": 1.0, "lambda_1": 1.1, "note": "text"}
        for e in (1, 2, 3)
    ]  # fmt: skip
    figure = training_curves(history, "SCM")
    panels = {axes.get_title(): set(lines_of(axes)) for axes in figure.axes}
    assert panels == {
        "loss": {"loss", "loss/ce"},
        "learning rate": {"lr"},
        "metrics": {"accuracy"},
        "metrics, %": {"GT-known", "MaxBoxAccV2"},
        "lambda": {"lambda_0", "lambda_1"},
    }
    assert list(training_panels(history)) == list(panels)


def test_curves_pass_over_missing_epochs_and_break_at_nan():
    history = [
        {"epoch": 1, "loss": 3.0},
        {"epoch": 2},
        {"epoch": 3, "loss": math.nan},
        {"epoch": 4, "loss": 1.0},
    ]
    (axes,) = training_curves(history).axes
    np.testing.assert_array_equal(lines_of(axes)["loss"], [[1, 3], [3, math.nan], [4, 1]])


def test_a_curve_without_a_finite_value_is_named_with_a_dash():
    (axes,) = training_curves([{"loss": 1.0, "loss/box": math.nan}]).axes
    assert set(lines_of(axes)) == {"loss", "loss/box (–)"}


def test_one_epoch_is_a_visible_point_with_one_tick(tmp_path: Path):
    figure = training_curves([{"epoch": 7, "loss": 2.0, "lr": 0.1}])
    save_picture(figure, tmp_path / "a.png")
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert low < 7 < high
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [7]
        assert axes.containers[0].lines[0].get_marker() == "o"


@pytest.mark.parametrize("history", [[], [{"epoch": 1}], [{"epoch": 1, "note": "text"}]])
def test_a_history_without_numbers_is_refused(history: list):
    with pytest.raises(ValueError, match="no numbers"):
        training_curves(history)


def test_line_plot_has_a_second_axis_and_one_legend():
    figure = line_plot(
        ["1", "4", "16"], {"GT-known": [70.0, 77.0, 74.0]}, errors={"GT-known": [1.0, 0.5, 2.0]},
        twin={"best τ": [0.3, 0.4, 0.2]}, y_label="%", twin_label="threshold", x_label="p",
    )  # fmt: skip
    left, right = figure.axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "4", "16"]
    assert (left.get_ylabel(), right.get_ylabel(), left.get_xlabel()) == ("%", "threshold", "p")
    assert lines_of(right)["best τ"][:, 1].tolist() == [0.3, 0.4, 0.2]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["GT-known", "best τ"]
    assert right.get_legend() is None


def test_line_plot_refuses_series_that_do_not_fit():
    with pytest.raises(ValueError, match="'a' has 3 values, expected 2"):
        line_plot([1, 2], {"a": [1, 2, 3]})
    with pytest.raises(ValueError, match="unknown series"):
        line_plot([1, 2], {"a": [1, 2]}, errors={"b": [1, 1]})


def test_threshold_curves_mark_the_best_threshold_of_each_level():
    tau = [0.0, 0.5, 1.0]
    one = threshold_curves({"SCM": {0.3: [0.2, 0.9, 0.1], 0.5: [0.6, 0.5, 0.0]}}, tau)
    assert [axes.get_title() for axes in one.axes] == ["SCM"]
    marked = [line.get_xydata()[0].tolist() for line in one.axes[0].lines if len(line.get_xydata()) == 1]
    assert marked == [[0.5, 0.9], [0.0, 0.6]]
    two = threshold_curves({name: {0.3: [0, 1, 0], 0.5: [0, 1, 0]} for name in ("SCM", "CAM")}, tau)
    assert [axes.get_title() for axes in two.axes] == ["IoU ≥ 0.3", "IoU ≥ 0.5"]
    assert set(lines_of(two.axes[0])) == {"SCM", "CAM"}


@pytest.mark.parametrize("curves", [{}, {"a": {}}, {"a": {0.5: [1, 2]}, "b": {0.3: [1, 2]}}])
def test_threshold_curves_without_common_levels_are_refused(curves: dict):
    with pytest.raises(ValueError, match="IoU levels"):
        threshold_curves(curves, [0.0, 1.0])


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plots_are_written_with_the_same_bytes_every_time(tmp_path: Path, ending: str):
    history = [{"epoch": e, "loss": 1 / e, "loss/ce": 2 / e} for e in (1, 2, 3)]
    written = [
        save_picture(training_curves(history), tmp_path / f"{name}.{ending}").read_bytes() for name in "ab"
    ]
    assert written[0] == written[1]
    assert len(written[0]) > 1000


def test_photos_are_written_whole_and_under_their_own_format(tmp_path: Path):
    assert Image.open(save_picture(GRAY, tmp_path / "new" / "a.jpg")).format == "JPEG"
    assert Image.open(save_picture(GRAY, tmp_path / "a.PNG")).format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.PNG", "new"]  # no temporary left


def test_a_failed_write_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_picture(GRAY, tmp_path / "a.png")
    before = path.read_bytes()

    def half(self: Image.Image, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise RuntimeError("interrupted")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(RuntimeError, match="interrupted"):
        save_picture(Image.new("RGB", (5, 5)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_ending_is_an_input_error_that_names_the_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"a\.bmp.*\.png, \.jpg"):
        save_picture(GRAY, tmp_path / "a.bmp")
    with pytest.raises(InputError, match=r"a\.jpg.*\.svg"):
        save_picture(training_curves([{"loss": 1.0}]), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())
