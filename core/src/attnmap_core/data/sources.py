"""From ``--data`` to samples: one call for the synthetic default, official layouts, folders and the Hub.

Whatever the source, rows have the same features (:func:`image_features`): undecoded image, label, boxes as
``xywh`` pixels, masks. A :class:`Sample` is such a row decoded, with boxes as ``xyxy``. Listing a data set
opens no photo, and nothing keeps decoded ones.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..boxes import xywh_to_xyxy, xyxy_to_xywh
from ..errors import InputError
from .images import ImageSource, load_class_map, load_image, load_mask, reasons_not_to_read, resize_mask
from .layouts.ade20k import list_ade20k
from .layouts.aircraft import list_aircraft
from .layouts.caltech101 import list_caltech101
from .layouts.cars import list_cars
from .layouts.cifar import list_cifar10, list_cifar100
from .layouts.cub import list_cub
from .layouts.dogs import list_dogs
from .layouts.domainnet import is_domain, list_domainnet
from .layouts.flowers102 import list_flowers102
from .layouts.folder import list_folder
from .layouts.grocery import list_grocery
from .layouts.hub import class_names, open_hub, read_split, stream_split
from .layouts.imagenet import list_imagenet
from .layouts.imagenet_variants import list_imagenet_a, list_imagenet_c
from .layouts.inshop import list_inshop
from .layouts.listing import Listing, Record, SegmentationClasses, image_features, import_datasets
from .layouts.pets import list_pets
from .layouts.sop import list_sop
from .layouts.splits import SplitOptions, check_unique, only_classes, plan_split, read_class_list
from .layouts.voc import list_voc
from .layouts.voc_segmentation import VOC_FOLDERS, list_voc_segmentation
from .layouts.wsol import CubV2Boxes, list_wsol

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
# Annotators round: a box may reach this far beyond the image and is cut without a word.
_BOX_TOLERANCE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One decoded photo with its truth.

    Attributes:
        image: RGB.
        label: class index.
        boxes_xyxy: ``(k, 4)`` float64 pixels of ``image``, inside it, end exclusive; ``(0, 4)`` if none.
        mask: ``(H, W)`` foreground, the union of the instance masks; None if there is none. It covers the
            whole photo at the resolution of the mask files, which need not be that of ``image``
            (OpenImages): resize by nearest neighbour.
        ignore: ``(H, W)`` of the same kind: pixels that count neither as foreground nor as background.
            Where it has the size of ``mask``, foreground is already taken out; else do so after resizing.
        segmentation: ``(H, W)`` uint8 class index of each pixel of ``image``, 255 where a pixel counts for nothing;
            None if there is none.
        image_id: names the photo within its data set.
        index: its place in the :class:`ImageData` it came from.
    """

    image: Image.Image
    label: int
    boxes_xyxy: NDArray[np.float64]
    mask: NDArray[np.bool_] | None
    ignore: NDArray[np.bool_] | None
    image_id: str
    index: int
    segmentation: NDArray[np.uint8] | None = None


class ImageData:
    """One split of a data set: rows that become :class:`Sample` when they are asked for.

    Attributes:
        labels: class names by index, the same for all splits.
        name: of the data set, for reports.
        split: which part of it.
        streaming: rows can only be iterated; there is no length and no ``[i]``.
        upright: photos are turned as their EXIF orientation says.
        clip_boxes: boxes that leave the image are cut instead of refused.
        segmentation: what the class maps mean, with their class names; None where there are none.
        renamed: class index by the label of the rows, where these are others; None where they are the same.
        crop_bottom: pixel rows cut off at the foot of every photo, and of its boxes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (8, 6)).save(f"{folder}/a.png")
        ...     data = load_data(folder, "all")
        ...     data.labels, len(data), data[0].image.size, data[0].boxes_xyxy.shape
        (['object'], 1, (8, 6), (0, 4))
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        *,
        labels: Sequence[str],
        name: str,
        split: str,
        streaming: bool = False,
        upright: bool = True,
        clip_boxes: bool = False,
        segmentation: SegmentationClasses | None = None,
        renamed: Mapping[int, int] | None = None,
        crop_bottom: int = 0,
    ) -> None:
        self._rows: Any = dataset
        self.labels = list(labels)
        self.name = name
        self.split = split
        self.streaming = streaming
        self.upright = upright
        self.clip_boxes = clip_boxes
        self.segmentation = segmentation
        self.renamed = renamed
        self.crop_bottom = crop_bottom

    @property
    def dataset(self) -> datasets.Dataset | datasets.IterableDataset:
        """The undecoded rows."""
        return self._rows

    def __repr__(self) -> str:
        size = "streaming" if self.streaming else f"{len(self)} images"
        return f"ImageData({self.name}, {self.split}, {size}, {len(self.labels)} classes)"

    def __len__(self) -> int:
        self._needs_rows("has no length")
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        self._needs_rows("cannot be indexed")
        index = range(len(self))[index]
        return self.to_sample(self._rows[index], index)

    def __iter__(self) -> Iterator[Sample]:
        for index, row in enumerate(self._rows):
            yield self.to_sample(row, index)

    def to_sample(self, row: Row, index: int) -> Sample:
        """Decode one row of ``dataset``.

        Raises:
            InputError: that names the photo, if it, a mask or a class map cannot be read, a box lies outside of it, or
                a class map has another size or a number that is no class.
        """
        image_id = str(row["image_id"])
        image = load_image(*_source(row["image"], image_id), upright=self.upright)
        boxes = _inside(row["objects"]["bbox"], image.size, image_id, clip=self.clip_boxes)
        if self.crop_bottom:
            foot = max(image.height - self.crop_bottom, 1)
            image = image.crop((0, 0, image.width, foot))
            boxes[:, [1, 3]] = boxes[:, [1, 3]].clip(max=foot)
        mask, ignore = _masks(row, image_id)
        return Sample(
            image=image,
            label=self._label(int(row["label"])),
            boxes_xyxy=boxes,
            mask=mask,
            ignore=ignore,
            image_id=image_id,
            index=index,
            segmentation=self._class_map(row, image_id, image.size),
        )

    def _class_map(self, row: Row, image_id: str, size: tuple[int, int]) -> NDArray[np.uint8] | None:
        if self.segmentation is None:
            return None
        source, name = _source(row["segmentation"], image_id)
        numbers = load_class_map(source, name)
        if numbers.shape != (size[1], size[0]):
            raise InputError(
                f"{name}: a class map of {numbers.shape[1]}x{numbers.shape[0]} pixels, expected {size[0]}x{size[1]} "
                f"as its photo {image_id}; get both files again"
            )
        return self.segmentation.indices(numbers, name)

    @property
    def targets(self) -> NDArray[np.int64]:
        """``(len,)`` class indices, without opening a photo."""
        self._needs_rows("has no list of labels")
        return np.asarray([self._label(label) for label in self._column("label")], dtype=np.int64)

    @property
    def image_ids(self) -> list[str]:
        """Ids in order, without opening a photo."""
        self._needs_rows("has no list of ids")
        return [str(image_id) for image_id in self._column("image_id")]

    def select(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> ImageData:
        """The same data set with only these rows, in this order."""
        self._needs_rows("cannot be indexed")
        return self._with(self._rows.select([int(index) for index in indices]))

    def of_classes(self, classes: Sequence[int]) -> ImageData:
        """The images of these classes alone, which become labels 0, 1, ... in the order given.

        Two calls with other classes divide a data set by class, as learning for unseen classes is measured.

        Args:
            classes: indices of ``labels``, each once.

        Raises:
            ValueError: for a class that there is not, or one twice.

        Example:
            >>> data = load_data("synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,test=8", "test")
            >>> some = data.of_classes([3, 1])
            >>> some.targets.tolist(), some.labels == [data.labels[3], data.labels[1]]
            ([1, 0, 1, 0], True)
        """
        number = {label: place for place, label in enumerate(classes)}
        if len(number) != len(classes) or not all(0 <= label < len(self.labels) for label in number):
            raise ValueError(
                f"classes must be of 0..{len(self.labels) - 1}, each once, got {list(classes)[:20]}"
            )
        targets = self.targets
        chosen = self.select(np.flatnonzero(np.isin(targets, list(number))))
        before = self.renamed or {label: label for label in range(len(self.labels))}
        chosen.renamed = {row: number[label] for row, label in before.items() if label in number}
        chosen.labels = [self.labels[label] for label in classes]
        return chosen

    def describe(self) -> dict[str, Any]:
        """Counts for logs and reports: images, classes, and (if they are listed) boxes and masks."""
        counts: dict[str, Any] = {"name": self.name, "split": self.split, "classes": len(self.labels)}
        if self.streaming:
            return counts | {"images": "streaming"}
        per_class = np.bincount(self.targets, minlength=len(self.labels))
        counts |= {
            "images": len(self),
            "smallest_class": int(per_class.min(initial=len(self))),
            "largest_class": int(per_class.max(initial=0)),
        }
        if "objects" in self._rows.column_names:  # the synthetic table has them only when a row is drawn
            boxes = [len(objects["bbox"]) for objects in self._column("objects")]
            counts |= {
                "boxes": sum(boxes),
                "images_with_boxes": sum(map(bool, boxes)),
                "images_with_masks": sum(map(bool, self._column("masks"))),
            }
        if self.segmentation is not None:
            counts["segmentation_classes"] = len(self.segmentation.labels)
        return counts

    def _column(self, name: str) -> list[Any]:
        # Without a format a transform (the synthetic data have one) is left out and nothing is drawn.
        return self._rows.with_format(None).select_columns([name])[:][name]

    def _with(self, dataset: Any) -> ImageData:
        return ImageData(
            dataset,
            labels=self.labels,
            name=self.name,
            split=self.split,
            streaming=self.streaming,
            upright=self.upright,
            clip_boxes=self.clip_boxes,
            segmentation=self.segmentation,
            renamed=self.renamed,
            crop_bottom=self.crop_bottom,
        )

    def _label(self, label: int) -> int:
        return label if self.renamed is None else self.renamed[label]

    def readable(self, *, progress: bool) -> ImageData:
        """Without the photos that do not decode; each is named in the log.

        Raises:
            InputError: if none is left.
        """

        if self.streaming:
            return self._with(self._rows.filter(_decodes))
        reasons = list(
            reasons_not_to_read(len(self), lambda index: _decode(self._rows[index]), progress=progress)
        )
        for reason in filter(None, reasons):
            logger.warning("left out: %s", reason)
        kept = [index for index, reason in enumerate(reasons) if reason is None]
        if not kept:
            raise InputError(
                f"{self.name}: none of its {len(reasons)} photos can be read; first: {reasons[0]}"
            )
        if len(kept) < len(reasons):
            left_out = len(reasons) - len(kept)
            logger.warning("%s: left out %d unreadable of %d photos", self.name, left_out, len(reasons))
            return self.select(kept)
        return self

    def _needs_rows(self, what: str) -> None:
        if self.streaming:
            raise TypeError(f"{self.name} is streaming and {what}; load it without streaming")


def _decode(row: Row) -> Image.Image:
    return load_image(*_source(row["image"], str(row["image_id"])), upright=False)


def _decodes(row: Row) -> bool:
    try:
        _decode(row)
    except InputError as error:
        logger.warning("left out: %s", error)
        return False
    return True


def load_data(
    spec: str,
    split: str,
    *,
    streaming: bool = False,
    skip_unreadable: bool = False,
    val_fraction: float = 0.0,
    test_fraction: float = 0.3,
    seed: int = 0,
    split_file: str | Path | None = None,
    classes: str | Sequence[str] | None = None,
    classes_file: str | Path | None = None,
    fraction: float = 1.0,
    annotations: str | Path | None = None,
    clip_boxes: bool = False,
    cubv2_boxes: CubV2Boxes = "corners",
    labels: str | Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> ImageData:
    """Load one split of any data source.

    :func:`describe_sources` lists what ``spec`` may be. Official splits are used where there are some. Else,
    and where ``val`` is missing and ``val_fraction`` is given, images are dealt out class by class in the
    order of a hash of ``seed`` and their id: the same on every machine.

    Args:
        spec: the source, as in ``--data``.
        split: ``"train"``, ``"val"``, ``"test"``, or ``"all"``; of data that have them, ``"query"`` and ``"gallery"``.
        streaming: iterate only. Hub data are then not downloaded first.
        skip_unreadable: decode every photo once and leave out, with a warning, those that fail. (Streaming:
            the check is made on the way, at the price of decoding twice.)
        val_fraction: share of the training images held out as ``val`` where there is no official ``val``.
        test_fraction: share of all images that is ``test`` where there are no official splits at all.
        seed: of the dealing and of ``fraction``.
        split_file: JSON ``{"train": [...], "val": [...], "test": [...]}`` of image ids; takes the place of
            all other rules. Images it does not name are left out.
        classes: keep only images of these classes, which become labels 0, 1, ... in this order; a list,
            or one string with commas.
        classes_file: the same from a text file, one class a line; the labels keep the order that they have in the
            data set, so that the list and a folder with just these classes give the same.
        fraction: use only this share of the ``train`` images of each class, chosen by a hash of ``seed`` and their id:
            the same on every machine, and contained in every larger share. Other splits stay whole.
        annotations: boxes that lie elsewhere: a COCO or ``metadata.jsonl`` file for an image folder; an XML
            folder, list or CSV for ``imagenet:``.
        clip_boxes: cut boxes that leave the image by more than a pixel, instead of refusing them.
        cubv2_boxes: how CUBV2 rows are read, see :func:`attnmap_core.data.layouts.wsol.read_lists`.
        labels: class names of Hub data that do not tell them; a list, or one string with commas.
        cache_dir: where the ``datasets`` library puts Hub and parquet data, if not in its usual cache. Other
            sources write nothing.
        progress: show progress bars.

    Raises:
        InputError: for a source, split, file or annotation that is missing, malformed or contradictory; for
            a class without images in ``train`` (elsewhere that is a warning); if ``datasets`` is missing.
        ValueError: for an unknown split.

    Example:
        >>> data = load_data("synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,val=8", "val")
        >>> len(data), data[0].image.size, data[0].boxes_xyxy.shape, data[0].mask.dtype
        (8, (32, 32), (1, 4), dtype('bool'))
    """
    if split not in ("train", "val", "test", "all", "query", "gallery"):
        raise ValueError(f"split must be train, val, test, all, query or gallery, got {split!r}")
    options = SplitOptions(
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        file=Path(split_file) if split_file else None,
        fraction=fraction,
    )
    # A command line gives one string; taken as a sequence it would be letters.
    classes = classes.split(",") if isinstance(classes, str) else classes
    labels = labels.split(",") if isinstance(labels, str) else labels
    scheme, where = _parse(spec)
    disjoint = scheme == "synthetic"  # there classes are kept from a split on purpose
    _check_fit(
        scheme,
        split_file=split_file,
        classes=classes,
        classes_file=classes_file,
        fraction=fraction,
        annotations=annotations,
        cubv2_boxes=cubv2_boxes,
    )
    list_of_classes = None if classes_file is None else Path(classes_file)
    if scheme == "synthetic":
        data = _synthetic(where, split, streaming=streaming)
    elif scheme == "hf":
        rows, names, name = _read_hub(
            where, split, options, classes, list_of_classes, labels, cache_dir, streaming=streaming
        )
        data = ImageData(
            rows, labels=names, name=name, split=split, streaming=streaming, clip_boxes=clip_boxes
        )
    else:
        listing = _list(scheme, where, Path(annotations) if annotations else None, cubv2_boxes)
        if list_of_classes is not None:
            classes = read_class_list(list_of_classes, listing.labels)
        records, names = _choose_records(listing, split, options, classes)
        disjoint = listing.disjoint
        table: Any = records_to_dataset(
            _with_boxes_inside(records, clip=clip_boxes), names, segmentation=listing.segmentation is not None
        )
        data = ImageData(
            table.to_iterable_dataset() if streaming else table,
            labels=names,
            name=f"{listing.name}:{listing.root.resolve().name}",
            split=split,
            streaming=streaming,
            upright=listing.upright,
            clip_boxes=clip_boxes,
            segmentation=listing.segmentation,
            crop_bottom=listing.crop_bottom,
        )
    if skip_unreadable:
        data = data.readable(progress=progress)
    if not streaming and not disjoint:
        _check_classes(data)
    return data


def check_data_options(options: Mapping[str, Any]) -> None:
    """Refuse options that :func:`load_data` does not have.

    Raises:
        InputError: naming the option and those that there are.
    """
    known = list(inspect.signature(load_data).parameters)[2:]
    for name in options:
        if name not in known:
            raise InputError(f"data option {name}: unknown; expected one of {', '.join(known)}")


def check_labels(labels: Sequence[str] | None, data: ImageData) -> None:
    """The classes of a model must be those of the data, in the same order.

    Args:
        labels: the model's; None or none at all fits everything.
        data: what it is to be measured on.

    Raises:
        InputError: naming the first class that differs.
    """
    if not labels or list(labels) == data.labels:
        return
    pairs = zip([*labels, *["-"] * len(data.labels)], [*data.labels, *["-"] * len(labels)])
    place, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise InputError(
        f"{data.name}: class {place} is {theirs!r}, the model's is {ours!r} ({len(data.labels)} and "
        f"{len(labels)} classes); evaluate on data with the classes it was trained on"
    )


def records_to_dataset(
    records: Sequence[Record], labels: Sequence[str], *, segmentation: bool = False
) -> datasets.Dataset:
    """A table of ids, paths, labels and boxes in memory, with :func:`image_features`; writes no file."""
    library = import_datasets()
    features: Any = image_features(labels, segmentation=segmentation)
    columns: dict[str, list[Any]] = {
        "image_id": [record.image_id for record in records],
        "image": [_encoded(record.path) for record in records],
        "label": [record.label for record in records],
        "objects": [{"bbox": record.boxes_xywh} for record in records],
        "masks": [[_encoded(mask) for mask in record.masks] for record in records],
        "ignore": [_encoded(record.ignore) for record in records],
    }
    if segmentation:
        columns["segmentation"] = [_encoded(record.segmentation) for record in records]
    # Arrow converts millions of rows itself; the library would call Python for each value of each.
    schema = features.arrow_schema
    table = schema.empty_table().from_pydict(columns, schema=schema)
    return library.Dataset.from_dict({name: table[name] for name in columns}, features=features)


def _encoded(file: str | bytes | None) -> dict[str, str | bytes | None] | None:
    if file is None:
        return None
    return {"path": None, "bytes": file} if isinstance(file, bytes) else {"path": file, "bytes": None}


def describe_sources() -> dict[str, str]:
    """What ``--data`` takes, and what it means; for ``list`` and for error messages."""
    return {
        "synthetic[:name=value,...]": "the embedded default: drawn creatures with exact boxes and masks",
        "PATH": "most of the following, recognised by their files",
        "folder:PATH": "PATH/<class>/*.jpg or PATH/{train,val,test}/...; boxes: metadata.jsonl or COCO",
        "cub:PATH": "CUB-200-2011 (CUB_200_2011/), val from CUBV2 if unpacked there",
        "wsol:METADATA_DIR@IMAGE_ROOT": "lists of the WSOL evaluator: CUB, ILSVRC, OpenImages with masks",
        "imagenet:PATH": "ILSVRC2012 or some of its classes: train/<wnid>/, val/ (as split test), boxes from XML, "
        "list or CSV",
        "imagenet-a:PATH": "ImageNet-A: imagenet-a/<wnid>/, 200 classes, split test",
        "imagenet-c:PATH@CORRUPTION/SEVERITY": "ImageNet-C: one corruption at severity 1..5, split test",
        "cifar10:PATH": "CIFAR-10: cifar-10-batches-py/",
        "cifar100:PATH": "CIFAR-100, fine labels: cifar-100-python/",
        "flowers102:PATH": "Oxford 102 Flowers: jpg/, imagelabels.mat, setid.mat",
        "pets:PATH": "Oxford-IIIT Pets: images/, annotations/trainval.txt, annotations/test.txt",
        "aircraft:PATH": "FGVC-Aircraft: images/, images_box.txt, images_variant_*.txt; their banner is cut off",
        "aircraft-banner:PATH": "the same with the banner",
        "dogs:PATH": "Stanford Dogs: Images/, Annotation/, train_list.mat, test_list.mat, with boxes",
        "cars:PATH": "Stanford Cars: cars_train/, cars_test/, devkit/*.mat, with boxes",
        "grocery:PATH": "Grocery Store: train.txt, val.txt, test.txt, classes.csv; fine classes",
        "sop:PATH": "Stanford Online Products: Ebay_train.txt, Ebay_test.txt; a class is a product",
        "inshop:PATH": "In-Shop Clothes: Eval/list_eval_partition.txt, Img/; splits train, query, gallery",
        "domainnet:PATH/DOMAIN": "a domain of DomainNet with its lists beside it, or prepared as train/ and val/",
        "voc-segmentation:PATH": "Pascal VOC 2012 with SegmentationClass/: class maps, splits train and val",
        "ade20k:PATH": "ADEChallengeData2016: class maps of 150 classes, splits train and val",
        "voc:PATH": "images/ and annotations/*.xml (Pascal VOC)",
        "caltech101:PATH": "101_ObjectCategories/ and Annotations/: boxes, and outlines as masks",
        "hf://owner/name[:config][?label=COLUMN]": "a data set of the Hugging Face Hub",
        "hf:PATH": "parquet, arrow or any folder that datasets.load_dataset reads",
    }


_LAYOUTS: dict[str, Callable[[Path], Listing]] = {
    "ade20k": list_ade20k,
    "aircraft": list_aircraft,
    "aircraft-banner": partial(list_aircraft, crop_banner=False),
    "caltech101": list_caltech101,
    "cars": list_cars,
    "cifar10": list_cifar10,
    "cifar100": list_cifar100,
    "dogs": list_dogs,
    "domainnet": list_domainnet,
    "flowers102": list_flowers102,
    "grocery": list_grocery,
    "imagenet-a": list_imagenet_a,
    "inshop": list_inshop,
    "pets": list_pets,
    "sop": list_sop,
    "voc": list_voc,
    "voc-segmentation": list_voc_segmentation,
}
_SCHEMES = ("synthetic", "folder", "cub", "wsol", "imagenet", "imagenet-c", "hf", *_LAYOUTS)


def _parse(spec: str) -> tuple[str, str]:
    scheme, colon, rest = spec.strip().partition(":")
    if scheme in _SCHEMES and (colon or scheme == "synthetic"):
        if not rest and scheme != "synthetic":
            raise InputError(f"data '{spec}': nothing after '{scheme}:', expected a path; add it")
        return scheme, rest if rest.startswith("//") else os.path.expanduser(rest)
    path = Path(spec.strip()).expanduser()
    if not spec.strip() or not path.exists():
        forms = ", ".join(describe_sources())
        raise InputError(f"data '{spec}': no such file or folder, and none of {forms}; check the path")
    scheme = _recognise(path)
    logger.info("%s: read as %s (write %s:%s to say so, or another layout)", path, scheme, scheme, path)
    return scheme, str(path)


def _check_fit(
    scheme: str,
    *,
    split_file: str | Path | None,
    classes: Sequence[str] | None,
    classes_file: str | Path | None,
    fraction: float,
    annotations: str | Path | None,
    cubv2_boxes: CubV2Boxes,
) -> None:
    """Refuse options that this kind of data would not heed."""
    if cubv2_boxes not in ("corners", "xywh-bug"):
        raise InputError(f"cubv2_boxes {cubv2_boxes!r}: expected corners or xywh-bug; choose one")
    if scheme == "synthetic" and (split_file is not None or classes is not None):
        raise InputError(
            "synthetic data: split_file and classes do not apply; write synthetic:class_range=0:6,..."
        )
    if classes is not None and classes_file is not None:
        raise InputError(f"classes and classes_file {classes_file} exclude each other; give one of them")
    if scheme == "synthetic" and (classes_file is not None or fraction != 1):
        raise InputError(
            "synthetic data: classes_file and fraction do not apply; write synthetic:train=100,..."
        )
    if annotations is not None and scheme not in ("folder", "imagenet"):
        raise InputError(
            f"annotations {annotations}: {scheme} data bring their own; give it for folder or imagenet"
        )
    if cubv2_boxes != "corners" and scheme not in ("cub", "wsol"):
        raise InputError(f"cubv2_boxes {cubv2_boxes}: {scheme} data have no CUBV2; give it for cub or wsol")


def _recognise(path: Path) -> str:
    """The layout of a path, from the files that only this layout has."""

    def has(*names: str) -> bool:
        return all((path / name).exists() for name in names)

    def any_of(pattern: str) -> bool:
        return next(path.glob(pattern), None) is not None

    if path.is_file() or has("state.json") or has("dataset_dict.json"):
        return "hf"
    if has("images.txt", "image_class_labels.txt") or has("CUB_200_2011/images.txt"):
        return "cub"
    if has("batches.meta", "data_batch_1") or has("cifar-10-batches-py"):
        return "cifar10"
    if (has("meta", "train", "test") and (path / "meta").is_file()) or has("cifar-100-python"):
        return "cifar100"
    if has("setid.mat", "imagelabels.mat"):
        return "flowers102"
    if has("classes.csv", "train.txt", "test.txt"):
        return "grocery"
    if has("images_box.txt", "variants.txt"):
        return "aircraft"
    if has("Images", "Annotation") and (has("train_list.mat") or has("lists/train_list.mat")):
        return "dogs"
    if has("devkit/cars_train_annos.mat"):
        return "cars"
    if has("Ebay_train.txt", "Ebay_test.txt") or has("Info_Files/Ebay_train.txt"):
        return "sop"
    if has("Eval/list_eval_partition.txt") or has("list_eval_partition.txt"):
        return "inshop"
    if has("annotations/trainval.txt", "images"):
        return "pets"
    if has("ADEChallengeData2016") or has("images/training", "annotations/training"):
        return "ade20k"
    if any(has(f"{top}ImageSets/Segmentation", f"{top}SegmentationClass") for top in VOC_FOLDERS):
        return "voc-segmentation"
    if is_domain(path):
        return "domainnet"
    if has("ILSVRC/Data/CLS-LOC") or has("Data/CLS-LOC") or (any_of("train/n????????") and has("val")):
        return "imagenet"
    if has("101_ObjectCategories") or any_of("[Aa]nnotations/*/annotation_*.mat"):
        return "caltech101"
    if any_of("[Aa]nnotations/*.xml") or any_of("[Aa]nnotations/*/*.xml"):
        return "voc"
    if any((path / split / "image_ids.txt").exists() for split in ("", "train", "val", "test")):
        raise InputError(f"{path}: WSOL lists without their images; write wsol:{path}@IMAGE_ROOT")
    if any_of("*.parquet") or any_of("data/*.parquet") or any_of("*.arrow"):
        return "hf"
    return "folder"


def _list(scheme: str, where: str, annotations: Path | None, cubv2_boxes: CubV2Boxes) -> Listing:
    if scheme == "wsol":
        metadata, at, images = where.partition("@")
        if not (metadata and at and images):
            raise InputError(f"wsol:{where}: expected wsol:METADATA_DIR@IMAGE_ROOT; add the missing part")
        return list_wsol(Path(metadata), Path(images).expanduser(), cubv2_boxes=cubv2_boxes)
    if scheme == "imagenet-c":
        root, at, part = where.rpartition("@")
        if not (root and at and part):
            raise InputError(
                f"imagenet-c:{where}: expected imagenet-c:PATH@CORRUPTION/SEVERITY, such as "
                "...@gaussian_noise/3; add the missing part"
            )
        return list_imagenet_c(Path(root), part)
    path = Path(where)
    if scheme in _LAYOUTS:
        return _LAYOUTS[scheme](path)
    if scheme == "cub":
        return list_cub(path, cubv2_boxes=cubv2_boxes)
    if scheme == "imagenet":
        return list_imagenet(path, annotations=annotations)
    return list_folder(path, annotations=annotations)


def _choose_records(
    listing: Listing, split: str, options: SplitOptions, classes: Sequence[str] | None
) -> tuple[list[Record], list[str]]:
    plan = plan_split(listing.root, list(listing.splits), split, options, listing.hints)
    names, numbers = only_classes(listing.root, listing.labels, classes)
    records = [record for part in plan.read for record in listing.splits[part]()]
    ids = [record.image_id for record in records]
    check_unique(listing.root, ids)
    kept = [records[index] for index in plan.keep(ids, [record.label for record in records])]
    if classes is not None:
        kept = [replace(record, label=numbers[record.label]) for record in kept if numbers[record.label] >= 0]
    if not kept:
        raise InputError(f"{listing.root}: no images in split {split}; check its lists or folders")
    return kept, names


def _read_hub(
    where: str,
    split: str,
    options: SplitOptions,
    classes: Sequence[str] | None,
    list_of_classes: Path | None,
    labels: Sequence[str] | None,
    cache_dir: str | Path | None,
    *,
    streaming: bool,
) -> tuple[Any, list[str], str]:
    source = open_hub(where, labels=labels, streaming=streaming, cache_dir=cache_dir)
    chooses = options.file is not None or classes is not None or list_of_classes is not None
    if streaming:
        if chooses or options.fraction != 1:
            raise InputError(
                f"{source.name}: streaming cannot choose images by list, class or share; load without streaming"
            )
        return *stream_split(source, split), source.title
    if list_of_classes is not None:
        classes = read_class_list(list_of_classes, class_names(source))
    plan = plan_split(source.name, list(source.splits), split, options, {})
    rows, names = read_split(source, plan, classes)
    if not len(rows):
        raise InputError(f"{source.name}: no images in split {split}; choose another")
    return rows, names, source.title


def _synthetic(where: str, split: str, *, streaming: bool) -> ImageData:
    from . import synthetic

    spec = synthetic.SyntheticSpec.from_string(where)
    table: Any = synthetic.synthetic_dataset(spec, split)
    if not len(table):
        raise InputError(f"synthetic:{where}: no images in split {split}; give {split}=... above 0")
    name, labels = spec.to_string(), synthetic.class_names(spec)
    if streaming:  # a stream cannot take over the transform that draws the rows: it becomes a lazy map
        draw = table.format["format_kwargs"]["transform"]
        plain = table.with_format(None)
        table = plain.to_iterable_dataset().map(
            draw,
            batched=True,
            batch_size=8,
            remove_columns=plain.column_names,
            features=image_features(labels),
        )
    return ImageData(
        table,
        labels=labels,
        name=f"synthetic:{name}" if name else "synthetic",
        split=split,
        streaming=streaming,
    )


def _check_classes(data: ImageData) -> None:
    missing = sorted(set(range(len(data.labels))) - set(data.targets.tolist()))
    if not missing:
        return
    names = ", ".join(data.labels[label] for label in missing[:5]) + (", ..." if len(missing) > 5 else "")
    if data.split in ("train", "all"):
        raise InputError(
            f"{data.name}: {len(missing)} of {len(data.labels)} classes have no image in {data.split} "
            f"({names}); add images or choose the classes to keep"
        )
    logger.warning("%s: %d classes have no image in %s: %s", data.name, len(missing), data.split, names)


def _with_boxes_inside(records: list[Record], *, clip: bool) -> list[Record]:
    """Check the boxes of images whose size the annotations state, before anything is computed."""
    for record in records:
        if record.size is not None and record.boxes_xywh:
            found = np.asarray(record.boxes_xywh, dtype=np.float64)
            inside = xyxy_to_xywh(_inside(found, record.size, record.image_id, clip=clip))
            if not np.allclose(inside, found, rtol=0, atol=1e-9):
                record.boxes_xywh = tuple((x, y, w, h) for x, y, w, h in inside.tolist())
    return records


def _inside(boxes_xywh: Any, size: tuple[int, int], image_id: str, *, clip: bool) -> NDArray[np.float64]:
    """Boxes as ``(k, 4)`` corners within the image."""
    given = np.asarray(boxes_xywh, dtype=np.float64).reshape(-1, 4)
    boxes = xywh_to_xyxy(given)
    limits = np.array([*size, *size], dtype=np.float64)
    inside = boxes.clip(0, limits)
    reach = np.inf if clip else _BOX_TOLERANCE
    # Comparisons are written so that NaN fails them. Beyond the image altogether, nothing is left to cut.
    fits = (np.abs(boxes - inside) <= reach).all(axis=1) & (given[:, 2:] >= 0).all(axis=1)
    fits &= (boxes[:, :2] <= limits[:2]).all(axis=1) & (boxes[:, 2:] >= 0).all(axis=1)
    if not fits.all():
        x, y, width, height = given[int(np.argmin(fits))]
        raise InputError(
            f"{image_id}: box x={x:g} y={y:g} width={width:g} height={height:g} is not inside the image of "
            f"{size[0]}x{size[1]} pixels; correct the annotation or pass --clip-boxes"
        )
    return inside


def _source(image: Any, image_id: str) -> tuple[ImageSource, str]:
    """What to read, and its name in messages, of an undecoded image feature."""
    path, content = image["path"], image["bytes"]
    if content is not None:
        return content, path or image_id
    if "://" not in path:
        return path, path
    import fsspec  # streamed image folders give addresses; datasets depends on fsspec

    opened: Any = fsspec.open(path, "rb")
    with opened as file:
        return file.read(), path


def _masks(row: Row, image_id: str) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    instances = [load_mask(*_source(mask, image_id)) for mask in row["masks"] or ()]
    ignored = row["ignore"]
    ignore = None if ignored is None else load_mask(*_source(ignored, image_id))
    if not instances:
        return None, ignore
    # Instances of one photo agree in size as a rule; where they do not, the finest one decides.
    size = max((instance.shape for instance in instances), key=lambda shape: shape[0] * shape[1])
    mask = np.logical_or.reduce([resize_mask(instance, (size[0], size[1])) for instance in instances])
    if ignore is not None and ignore.shape == mask.shape:
        ignore &= ~mask
    return mask, ignore
