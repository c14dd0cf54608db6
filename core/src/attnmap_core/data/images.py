"""Photos in, upright 8-bit RGB out: all the ways a photo can be odd or broken are handled here."""

from __future__ import annotations

import glob
import io
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from ..errors import InputError

logger = logging.getLogger(__name__)

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image

# Compared in lower case.
_SUFFIXES = "bmp gif jfif jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())

_REMEDY = "replace or delete it, or pass --skip-unreadable"
# What Pillow's decoders raise on damaged files: the first two mostly, the rest from its Python plugins.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)


def load_image(source: ImageSource, name: str | None = None, *, upright: bool = True) -> Image.Image:
    """Decode one photo completely, as an upright 8-bit RGB image.

    Every mode that Pillow reads is converted: gray, palette, CMYK, 16-bit gray (``0..65535`` becomes
    ``0..255``, without stretching), float gray (``[0, 1]`` becomes ``0..255``). Transparency (an alpha
    channel or a transparent palette entry) is composited on white, as a page would show it: the colours
    stored below full transparency are arbitrary. Of several frames the first is taken.

    Args:
        source: a path, the file's bytes, an open binary file, or a PIL image (which is left as it is).
        name: what error messages call the photo; the path by default.
        upright: turn the photo as its EXIF orientation says. Only data sets whose boxes were drawn on the
            stored pixels switch this off.

    Returns:
        A new image in mode RGB that holds its pixels and no open file.

    Raises:
        InputError: in one line that names the file: missing, a folder, empty (0 bytes), not an image,
            truncated or corrupt, or with more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, which
            looks like a decompression bomb.

    Example:
        >>> load_image(Image.new("LA", (3, 2), (0, 0)), name="clear.png").getpixel((0, 0))
        (255, 255, 255)
        >>> load_image(b"", name="a.jpg")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        attnmap_core.errors.InputError: a.jpg: 0 bytes, expected an image; replace or ...
    """
    image, name = _read(source, name)
    rgb = _to_rgb(image)
    turn = _TURNS.get(_orientation(image, name)) if upright else None
    return rgb if turn is None else rgb.transpose(turn)


def list_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Find the photos behind files, folders and globs, in a fixed order.

    Folders are searched recursively for the suffixes of ``IMAGE_SUFFIXES`` (case does not matter; names that
    start with a dot are passed over). A file that is named itself is taken whatever its suffix.

    Args:
        paths: one or several files, folders or glob patterns (``**`` crosses folders).

    Returns:
        The photos, each once, sorted by path.

    Raises:
        InputError: if a path does not exist, a glob matches nothing, or a folder holds no image.

    Example:
        >>> list_images("no/folder")
        Traceback (most recent call last):
        attnmap_core.errors.InputError: no/folder: no such file or folder, expected photos; check the path
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise InputError("no photos given, expected files, folders or globs; name at least one")
    found: set[str] = set()
    for given_path in given:
        path = os.fspath(given_path)
        if os.path.exists(path):
            found.update(_images_at(path))
        elif glob.has_magic(path):
            matches = [match for match in glob.glob(path, recursive=True) if not os.path.isdir(match)]
            images = [match for match in matches if is_image_name(match)]
            if not images:
                raise InputError(f"{path}: matches no image ({len(matches)} files); check the pattern")
            found.update(images)
        else:
            raise InputError(f"{path}: no such file or folder, expected photos; check the path")
    return sorted(map(Path, found))


def split_readable(
    paths: Sequence[str | os.PathLike[str]], *, progress: bool = True
) -> tuple[list[Path], dict[Path, str]]:
    """Decode every photo once and tell the good ones from the bad: what ``--skip-unreadable`` does.

    Args:
        paths: the photos.
        progress: show a progress bar.

    Returns:
        The readable paths in their order, and for each unreadable one the reason in one line.
    """
    given = [Path(path) for path in paths]
    reasons = list(reasons_not_to_read(len(given), lambda index: load_image(given[index]), progress=progress))
    readable = [path for path, reason in zip(given, reasons) if reason is None]
    return readable, {path: reason for path, reason in zip(given, reasons) if reason is not None}


def reasons_not_to_read(count: int, load: Callable[[int], object], *, progress: bool) -> Iterator[str | None]:
    """Call ``load(0) ... load(count - 1)``; give for each, in order, what its InputError says, or None."""

    def reason(index: int) -> str | None:
        try:
            load(index)
        except InputError as error:
            return str(error)
        return None

    # Pillow decodes without the interpreter lock, so threads help.
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        reasons = pool.imap(reason, range(count), chunksize=16)
        yield from tqdm(reasons, total=count, desc="checking photos", unit="photo", disable=not progress)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for a photo: a known suffix and no leading dot."""
    base = os.path.basename(name)
    return os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES and not base.startswith(".")


def walk_images(folder: str | os.PathLike[str]) -> list[str]:
    """Relative paths with ``/`` of all photos below ``folder``, sorted; no file is opened.

    Linked folders are entered, unless they lead back up.
    """
    return sorted(_walk(os.fspath(folder), "", frozenset()))


def _walk(folder: str, prefix: str, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {real})
            elif is_image_name(entry.name):
                yield prefix + entry.name


def load_mask(source: ImageSource, name: str | None = None) -> NDArray[np.bool_]:
    """Decode a mask picture: ``(H, W)``, true wherever its gray value is above zero.

    Raises:
        InputError: as :func:`load_image`.

    Example:
        >>> load_mask(Image.new("L", (3, 2), 1)).shape
        (2, 3)
    """
    image, _ = _read(source, name)
    gray = image if _is_deep(image) else image.convert("L")  # drops alpha, looks palette colours up
    return np.asarray(gray) > 0


def load_class_map(source: ImageSource, name: str | None = None) -> NDArray[np.uint8]:
    """Decode a picture of class numbers: ``(H, W)``, the palette's indices or the gray values as stored.

    Raises:
        InputError: as :func:`load_image`; for a colour picture, whose classes cannot be known; and for numbers
            above 255.

    Example:
        >>> palette = Image.new("P", (2, 1), 7)
        >>> palette.putpalette([0, 128, 0] * 8)
        >>> load_class_map(palette)
        array([[7, 7]], dtype=uint8)
    """
    image, name = _read(source, name)
    if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
        raise InputError(
            f"{name}: a picture of mode {image.mode}, expected class numbers (a palette or a gray PNG); "
            "get the original file"
        )
    numbers = np.asarray(image)
    if numbers.min() < 0 or numbers.max() > 255:
        raise InputError(
            f"{name}: class numbers {numbers.min()}..{numbers.max()}, expected 0..255; get the original file"
        )
    return numbers.astype(np.uint8)


def resize_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Nearest-neighbour resize of a mask by OpenCV's rule: pixel ``i`` comes from ``floor(i * from / to)``.

    Args:
        mask: ``(H, W)``.
        size: ``(height, width)`` wanted.

    Example:
        >>> resize_mask(np.array([[True, False]]), (1, 4)).tolist()
        [[True, True, False, False]]
    """
    # In floating point and in this order, as OpenCV: where i * from / to is whole, the last bit decides.
    rows, columns = (
        np.minimum(np.floor(np.arange(to) * (1 / (to / of))).astype(np.intp), of - 1)
        for to, of in zip(size, mask.shape)
    )
    return mask[np.ix_(rows, columns)]


def _images_at(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    found = [os.path.join(path, name) for name in walk_images(path)]
    if not found:
        raise InputError(
            f"{path}: no images in this folder (suffixes looked for: {_SUFFIXES}); check the path"
        )
    return found


def _read(source: ImageSource, name: str | None) -> tuple[Image.Image, str]:
    """The decoded image in its own mode, and the name for messages."""
    if isinstance(source, Image.Image):
        return _decoded(source, name or str(getattr(source, "filename", "")) or "image")
    if isinstance(source, bytes):
        return _opened(io.BytesIO(source), name or "image")
    if not isinstance(source, (str, os.PathLike)):
        return _opened(source, name or str(getattr(source, "name", "image")))
    name = name or os.fspath(source)
    try:
        file = open(source, "rb")  # noqa: SIM115 (only the opening belongs under this try)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file, expected an image; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{name}: is a folder, expected an image; name the photos in it") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}), expected an image; {_REMEDY}") from None
    with file:
        return _opened(file, name)


def _opened(file: BinaryIO, name: str) -> tuple[Image.Image, str]:
    start = file.tell()
    head = file.read(8)
    file.seek(start)
    if not head:
        raise InputError(f"{name}: 0 bytes, expected an image; {_REMEDY}")
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {_bomb(error)}") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name}: not an image of a known type (begins with {head!r}), "
            f"expected JPEG, PNG or the like; {_REMEDY}"
        ) from None
    except _DECODING_ERRORS as error:
        raise InputError(f"{name}: not a whole image ({_one_line(error)}); {_REMEDY}") from None
    return _decoded(image, name)


def _decoded(image: Image.Image, name: str) -> tuple[Image.Image, str]:
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {_bomb(error)}") from None
    except _DECODING_ERRORS as error:
        raise InputError(f"{name}: truncated or corrupt image ({_one_line(error)}); {_REMEDY}") from None
    return image, name


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image, name: str) -> int:
    # Not ImageOps.exif_transpose: it writes the whole EXIF block anew, and one broken tag in it, harmless to
    # the picture, makes that fail.
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODING_ERRORS as error:
        logger.warning("%s: unreadable EXIF data (%s); the photo is taken as upright", name, _one_line(error))
        return 1
    return value if isinstance(value, int) else 1


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")  # I;16 and kin; older Pillow reads 16-bit PNG as I


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if not _is_deep(image):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    values = values.clip(0, 1) * 255 if image.mode == "F" else values.clip(0, 65535) / 257
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def _bomb(error: Image.DecompressionBombError) -> str:
    return f"too many pixels ({_one_line(error)}); make the photo smaller first"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
