"""What every layout parser gives: rows, found without opening a photo; and how to complain about files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...boxes import xyxy_to_xywh
from ...errors import InputError

if TYPE_CHECKING:
    import datasets

BoxXYWH: TypeAlias = tuple[float, float, float, float]
IGNORED = 255
"""Class index of pixels that count for nothing, in a segmentation."""


@dataclass(slots=True)
class Record:
    """One photo of a listing.

    Attributes:
        image_id: names the photo in lists and messages: its path below the data set's image folder.
        path: where the file lies, or the encoded photo itself.
        label: class index.
        boxes_xywh: pixels, numbers as the annotation has them.
        masks: mask files, or PNG bytes, one an instance.
        ignore: mask of pixels that count for nothing.
        segmentation: class map file, or PNG bytes: a class number for each pixel, see :class:`SegmentationClasses`.
        size: ``(width, height)`` if the annotations state it.
    """

    image_id: str
    path: str | bytes
    label: int
    boxes_xywh: tuple[BoxXYWH, ...] = ()
    masks: tuple[str | bytes, ...] = ()
    ignore: str | bytes | None = None
    segmentation: str | bytes | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class SegmentationClasses:
    """What the numbers in class map files mean.

    Attributes:
        labels: names by class index, 0, 1, ...
        first: the number of class 0 in the files. Smaller numbers, and 255, are pixels to ignore.

    Example:
        >>> SegmentationClasses(labels=("wall", "sky"), first=1).indices(np.array([[0, 1, 2, 255]], np.uint8), "a.png")
        array([[255,   0,   1, 255]], dtype=uint8)
    """

    labels: tuple[str, ...]
    first: int = 0

    def indices(self, numbers: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """Class indices, :data:`IGNORED` where a pixel counts for nothing, from the numbers of a file.

        Args:
            numbers: ``(H, W)``.
            name: of the file, for the message.

        Raises:
            InputError: for a number that is no class.
        """
        end = self.first + len(self.labels)
        meaning = np.full(256, IGNORED, np.uint8)
        meaning[self.first : end] = np.arange(len(self.labels), dtype=np.uint8)
        strange = np.flatnonzero(np.bincount(numbers.ravel(), minlength=256)[end:IGNORED])
        if len(strange):
            raise InputError(
                f"{name}: class number {end + strange[0]} in the map, expected {self.first}..{end - 1}, "
                f"or {IGNORED} for pixels to ignore; correct the file"
            )
        return meaning[numbers]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A data set as its layout describes it.

    Attributes:
        name: the layout.
        root: the folder, for messages.
        labels: class names by index, the same for all splits.
        splits: a reader for each official split; ``{"all": reader}`` where the layout has none.
        upright: whether boxes refer to the photo as turned by its EXIF orientation. The classic benchmarks
            were annotated, and are evaluated, on the stored pixels.
        hints: for a split that is not there, how to get it.
        segmentation: what the class maps mean, where every photo has one.
        disjoint: whether the splits have different classes by intention, so that none shows all ``labels``.
        crop_bottom: pixel rows at the foot of every photo that are no part of it; boxes are cut with them.
    """

    name: str
    root: Path
    labels: list[str]
    splits: Mapping[str, Callable[[], list[Record]]]
    upright: bool = True
    hints: Mapping[str, str] = field(default_factory=dict[str, str])
    segmentation: SegmentationClasses | None = None
    disjoint: bool = False
    crop_bottom: int = 0

    @property
    def has_official_splits(self) -> bool:
        return "all" not in self.splits


class FolderIndex:
    """Which files exist, asked for millions of paths: every folder is listed once, no file is touched."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}
        self._below: dict[str, dict[str, str]] = {}

    def names(self, folder: str) -> frozenset[str]:
        """Names of everything in ``folder``; none if there is no such folder."""
        if folder not in self._names:
            self._names[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()
        return self._names[folder]

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self.names(folder)

    def find_below(self, folder: str, name: str) -> str | None:
        """Path of ``folder/name`` or, where files were sorted into subfolders, of ``folder/*/name``."""
        if name in self.names(folder):
            return os.path.join(folder, name)
        if folder not in self._below:
            subfolders = (os.path.join(folder, entry) for entry in sorted(self.names(folder)))
            self._below[folder] = {
                file: os.path.join(subfolder, file)
                for subfolder in subfolders
                for file in self.names(subfolder)
            }
        return self._below[folder].get(name)


def existing_folder(path: Path, what: str) -> Path:
    """``path`` if it is a folder with something in it.

    Raises:
        InputError: if it is missing, a file, or empty.
    """
    if not path.exists():
        raise InputError(f"{path}: no such folder, expected {what}; check the path")
    if not path.is_dir():
        raise InputError(f"{path}: is a file, expected a folder with {what}; name the folder")
    with os.scandir(path) as entries:
        if next(entries, None) is None:
            raise InputError(f"{path}: empty folder, expected {what}; check the path")
    return path


def find_home(root: Path, marker: str, *folders: str) -> Path:
    """``root``, or the first of ``folders`` below it that has the file or folder ``marker`` if root has not."""
    if (root / marker).exists():
        return root
    return next((root / name for name in folders if (root / name / marker).exists()), root)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their 1-based numbers.

    Raises:
        InputError: if the file is missing or not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the layout needs it, check the path") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a text file ({error}); download it again") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line and not line.isspace():
            yield number, line


def bad_row(path: Path, number: int, row: str, expected: str) -> InputError:
    """The error for a malformed row, to be raised by the caller."""
    return InputError(f"{path}:{number}: expected '{expected}', found '{row[:80]}'; correct the row")


def corners_to_xywh(corners_xyxy: Sequence[Sequence[float]]) -> tuple[BoxXYWH, ...]:
    """Boxes for a :class:`Record` from ``x0 y0 x1 y1`` rows."""
    if not corners_xyxy:
        return ()
    rows: list[list[float]] = xyxy_to_xywh(np.asarray(corners_xyxy, dtype=np.float64)).tolist()
    return tuple((x, y, width, height) for x, y, width, height in rows)


def check_files(records: Iterable[Record], source: Path) -> None:
    """Check that every photo, mask and class map file of the records exists.

    Raises:
        InputError: that names the first missing file and the annotation that speaks of it.
    """
    index = FolderIndex()
    for record in records:
        files = (record.path, *record.masks, record.ignore, record.segmentation)
        missing = next((file for file in files if isinstance(file, str) and not index.has(file)), None)
        if missing is not None:
            raise InputError(
                f"{missing}: no such file, but {source} has a row for {record.image_id}; "
                "add the file or remove the row"
            )


def import_datasets() -> Any:
    """The ``datasets`` library, which inference does without.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise InputError(
            'the package datasets is not installed, data sets need it; run: pip install "attnmap-core[train]"'
        ) from None
    return datasets


def image_features(labels: Sequence[str], *, segmentation: bool = False) -> datasets.Features:
    """The features that all sources share.

    ``image_id``: string. ``image``, ``ignore`` and each of ``masks``: ``{"path", "bytes"}``, undecoded.
    ``label``: class index. ``objects.bbox``: ``[x, y, width, height]`` each, float64 pixels, top left origin.
    ``segmentation``, only where ``segmentation`` is set: an undecoded class map.
    """
    library = import_datasets()
    # Sequence, not List: the oldest datasets supported has only the former.
    boxes = library.Sequence(library.Sequence(library.Value("float64"), length=4))
    features: dict[str, Any] = {
        "image_id": library.Value("string"),
        "image": library.Image(decode=False),
        "label": library.ClassLabel(names=list(labels)),
        "objects": {"bbox": boxes},
        "masks": library.Sequence(library.Image(decode=False)),
        "ignore": library.Image(decode=False),
    }
    if segmentation:
        features["segmentation"] = library.Image(decode=False)
    return library.Features(features)
