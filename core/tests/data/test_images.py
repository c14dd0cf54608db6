"""Photos of every kind come out as upright RGB, and what cannot be read is named in one line."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from attnmap_core.data import images
from attnmap_core.data.images import (
    list_images,
    load_class_map,
    load_image,
    load_mask,
    resize_mask,
    split_readable,
    walk_images,
)
from attnmap_core.errors import InputError
from PIL import Image

RED_LEFT = np.zeros((20, 40, 3), np.uint8)
RED_LEFT[:, :20, 0] = 255


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- What must work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "red_side"),
    [
        (1, "left"),
        (2, "right"),
        (3, "right"),
        (4, "left"),
        (5, "top"),
        (6, "top"),
        (7, "bottom"),
        (8, "bottom"),
    ],
)
def test_exif_orientation_is_applied(kind: str, orientation: int, red_side: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = load_image(encoded(Image.fromarray(RED_LEFT), kind, exif=exif))
    pixels = np.asarray(photo)[..., 0].astype(float)
    height, width = pixels.shape
    halves = {
        "left": pixels[:, : width // 2],
        "right": pixels[:, width // 2 :],
        "top": pixels[: height // 2],
        "bottom": pixels[height // 2 :],
    }
    assert photo.size == ((20, 40) if orientation >= 5 else (40, 20))
    assert max(halves, key=lambda side: halves[side].mean()) == red_side


def test_stored_pixels_are_kept_where_boxes_refer_to_them() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = load_image(encoded(Image.fromarray(RED_LEFT), "JPEG", exif=exif), upright=False)
    assert photo.size == (40, 20)


def test_a_flip_is_told_from_a_turn() -> None:
    corner = np.zeros((4, 6, 3), np.uint8)
    corner[0, 0] = 255
    at = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.asarray(load_image(encoded(Image.fromarray(corner), "PNG", exif=exif)))
        (row,), (column,) = np.nonzero(pixels[..., 0])
        at[orientation] = (row > 0, column > 0)  # whether it went down, to the right
    assert at == {
        1: (False, False), 2: (False, True), 3: (True, True), 4: (True, False),
        5: (False, False), 6: (False, True), 7: (True, True), 8: (True, False),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_cost_the_photo(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = encoded(Image.fromarray(RED_LEFT), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert load_image(content).size == (40, 20)

    def fails(_: Image.Image) -> None:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fails)
    assert load_image(Image.fromarray(RED_LEFT), "a.jpg").size == (40, 20)
    assert "a.jpg: unreadable EXIF data" in caplog.text


def test_cmyk() -> None:
    photo = load_image(encoded(Image.new("CMYK", (5, 4), (0, 255, 255, 0)), "JPEG", quality=95))
    assert photo.mode == "RGB"
    red, green, blue = photo.getpixel((2, 2))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_cut(kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    pixels = np.asarray(load_image(encoded(Image.fromarray(values), kind)))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (pixels[..., 0] == pixels[..., 1]).all()


def test_32_bit_and_float_gray() -> None:
    integers = Image.fromarray(np.array([[0, 65535, 70000]], np.int32))
    assert np.asarray(load_image(integers))[0, :, 0].tolist() == [0, 255, 255]
    floats = Image.fromarray(np.array([[0, 0.5, 1, 3, np.nan]], np.float32))
    assert np.asarray(load_image(floats))[0, :, 0].tolist() == [0, 128, 255, 255, 0]


def test_16_bit_rgb_png() -> None:
    # Pillow cannot write one: a 2 x 1 picture by hand.
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = struct.pack(">B6H", 0, 65535, 0, 257, 0, 65535, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")
    png = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    photo = load_image(png)
    assert [photo.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 1), (0, 255, 0)]


def test_palette_with_and_without_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert load_image(encoded(palette, "PNG")).getpixel((1, 0)) == (0, 0, 255)
    clear = load_image(encoded(palette, "PNG", transparency=1))
    assert [clear.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_transparency_is_composited_on_white() -> None:
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert load_image(half).getpixel((0, 0)) == (127, 127, 127)
    assert load_image(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    keyed = encoded(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG", transparency=(9, 9, 9))
    assert load_image(keyed).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "YCbCr", "LAB", "HSV"])
def test_other_modes(mode: str) -> None:
    white = {"YCbCr": (255, 128, 128), "LAB": (255, 128, 128), "HSV": (0, 0, 255)}.get(mode, "white")
    photo = load_image(Image.new(mode, (3, 2), white))
    assert (photo.mode, photo.size) == ("RGB", (3, 2))
    assert min(photo.getpixel((1, 1))) > 245


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(gif).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3)])
def test_extreme_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "green").save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == size


def test_sources_agree(tmp_path: Path) -> None:
    image = Image.fromarray(RED_LEFT)
    path = tmp_path / "a.png"
    image.save(path)
    with path.open("rb") as file:
        from_file = load_image(file)
    loaded = [
        load_image(path),
        load_image(str(path)),
        load_image(path.read_bytes()),
        from_file,
        load_image(image),
    ]
    assert all(np.array_equal(RED_LEFT, np.asarray(photo)) for photo in loaded)
    assert loaded[-1] is not image


# --- What must be refused ---------------------------------------------------------------------------------


def refused(source: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_image(source)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def test_zero_bytes(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert "0 bytes" in refused(path)
    assert "--skip-unreadable" in refused(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.9])
def test_truncated(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(content[: max(9, int(len(content) * share))])
    assert "--skip-unreadable" in refused(path)


def test_flipped_bytes_in_a_png(tmp_path: Path) -> None:
    content = bytearray(encoded(Image.fromarray(RED_LEFT), "PNG"))
    content[-30] ^= 0xFF
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    assert "corrupt" in refused(path)


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_text("<html>404</html>")
    message = refused(path)
    assert "not an image" in message
    assert "<html>40" in message  # what was found


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "gone.jpg")
    assert "is a folder" in refused(tmp_path)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (200, 200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    message = refused(path)
    assert "too many pixels" in message
    assert "40000" in message


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images, "open", denied, raising=False)
    assert "Permission denied" in refused(tmp_path / "secret.jpg")


def test_name_is_used_for_bytes() -> None:
    with pytest.raises(InputError, match=r"^row 7: "):
        load_image(b"", name="row 7")


# --- Listing ----------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for name in ("b/2.JPG", "b/deep/1.jpeg", "a.Png", "c.webp", ".hidden.jpg", ".git/x.png", "notes.txt"):
        path = tmp_path / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "album"


def test_list_images_searches_folders(album: Path) -> None:
    names = [path.relative_to(album).as_posix() for path in list_images(album)]
    assert names == ["a.Png", "b/2.JPG", "b/deep/1.jpeg", "c.webp"]
    assert walk_images(album) == names


def test_list_images_takes_files_folders_and_globs(album: Path) -> None:
    found = list_images([album / "b", album / "b" / "2.JPG", f"{album}/**/*.j*", album / "notes.txt"])
    assert [path.name for path in found] == ["2.JPG", "1.jpeg", "notes.txt"]


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].jpg").touch()
    assert list_images(tmp_path / "a[1].jpg") == [tmp_path / "a[1].jpg"]


def test_linked_folders_are_entered_but_not_loops(album: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "z.png").touch()
    try:
        os.symlink(tmp_path / "other", album / "link")
        os.symlink(album, album / "b" / "loop")
    except OSError:
        pytest.skip("this file system has no links")
    assert walk_images(album) == ["a.Png", "b/2.JPG", "b/deep/1.jpeg", "c.webp", "link/z.png"]


def test_list_images_refuses(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for given, says in [
        (tmp_path / "gone", "no such file or folder"),
        (tmp_path, "no images in this folder"),
        (f"{tmp_path}/*.jpg", "matches no image"),
        ([], "no photos given"),
    ]:
        with pytest.raises(InputError, match=says):
            list_images(given)


def test_split_readable_keeps_order_and_gives_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{i:02d}.png" for i in range(40)]
    for index, path in enumerate(paths):
        Image.new("RGB", (2, 2)).save(path)
        if index % 10 == 3:
            path.write_bytes(path.read_bytes()[:20])
    readable, unreadable = split_readable(paths)
    assert readable == [path for index, path in enumerate(paths) if index % 10 != 3]
    assert list(unreadable) == [paths[index] for index in (3, 13, 23, 33)]
    assert all(str(path) in reason for path, reason in unreadable.items())
    assert "checking photos" in capsys.readouterr().err
    split_readable(paths, progress=False)
    assert capsys.readouterr().err == ""


# --- Masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.array([[0, 1, 200]], np.uint8)),
        Image.fromarray(np.array([[0, 1, 60000]], np.uint16)),  # 1 of 65535 is foreground too
        Image.fromarray(np.array([[False, True, True]])),
        Image.fromarray(np.array([[[0, 0, 0, 255], [0, 9, 0, 255], [9, 9, 9, 255]]], np.uint8)),
        Image.fromarray(np.array([[[0, 0], [9, 0], [9, 255]]], np.uint8), "LA"),  # alpha says nothing
    ],
    ids=["L", "16", "1", "RGBA", "LA"],
)
def test_mask_is_everything_above_zero(image: Image.Image) -> None:
    assert load_mask(encoded(image, "PNG")).tolist() == [[False, True, True]]


def test_resize_mask_is_opencv_nearest() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(1)
    for shape, size in [
        ((37, 53), (224, 224)),
        ((300, 200), (224, 224)),
        ((5, 7), (10, 14)),
        ((8, 8), (3, 5)),
    ]:
        mask = rng.random(shape) > 0.5
        theirs = cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
        assert np.array_equal(resize_mask(mask, size), theirs)


@pytest.mark.parametrize("mode", ["P", "L", "1", "I", "I;16"])
def test_class_map_keeps_numbers_and_not_colours(mode: str) -> None:
    values = np.array([[0, 1, 0], [1, 0, 1]]) * (1 if mode == "1" else 255)
    kinds = {"1": np.bool_, "I": np.int32, "I;16": np.uint16}
    picture = Image.fromarray(values.astype(kinds.get(mode, np.uint8)))
    if mode == "P":
        picture.putpalette([7, 7, 7] * 256)  # as colours they would all be the same
    assert picture.mode == mode
    found = load_class_map(encoded(picture, "TIFF"))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK", "F"])
def test_class_map_of_colours_is_refused(mode: str) -> None:
    with pytest.raises(
        InputError, match=rf"^a\.tif: a picture of mode {mode}, expected class numbers"
    ) as caught:
        load_class_map(Image.new(mode, (3, 2)), "a.tif")
    assert "\n" not in str(caught.value)


def test_class_map_of_large_numbers_and_broken_ones() -> None:
    large = Image.fromarray(np.array([[256]], np.uint16))
    with pytest.raises(InputError, match=r"a\.png: class numbers 256\.\.256, expected 0\.\.255"):
        load_class_map(large, "a.png")
    with pytest.raises(InputError, match=r"a\.png: 0 bytes"):
        load_class_map(b"", "a.png")
