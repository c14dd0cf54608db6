"""``contrastive-cam label``: boxes for a folder of photos that all show one kind of thing, without any label.

Two passes: a few hundred photos, spread over the folder, tell what is common; then every photo gets its box, streaming,
so that the size of the folder does not matter. Whatever is finished is on disk, a line a photo, and is not done again
by ``--resume``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from attnmap_core import cli
from attnmap_core.data.images import IMAGE_SUFFIXES, list_images, load_image
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.experiments import format_table
from attnmap_core.export import Format, export_predictions
from attnmap_core.files import new_output_folder, read_json, write_json
from attnmap_core.pictures import overlay
from attnmap_core.prediction import Prediction
from attnmap_core.recipes import run_record
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .evaluate import floor_protocols, shown
from .frozen import VIT, FrozenMap, normalised
from .inference import CorLocProtocol, parse_rule
from .localizers import Found, Localizer, doubtful

logger = logging.getLogger(__name__)

KINDS = 0.12
"""Silhouette of two groups of photos above which a folder looks like several kinds of things."""
KIND_PHOTOS = 100
"""So many photos are asked for that."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Boxes and heat maps for photos of one kind of thing, with a confidence each and a report, doubtful ones first.

    Nothing is labelled and nothing is trained: the default asks what the photos have in common (DDT on the keys of a
    pretrained ViT). Without --weights the network's published weights are downloaded.
    """

    photos: tyro.conf.Positional[list[str]]
    """Photos, folders of photos, or both."""
    out: Path
    """A folder, or a .json (COCO) or .csv file; the report and the heat maps then go to a folder of its name beside
    it."""
    format: Literal["coco", "yolo", "voc", "csv"] | None = None
    """Annotation format; by the suffix of --out where not given, COCO for a folder."""
    name: str = "object"
    """What the photos show, as the annotations shall call it."""
    method: Literal["ddt", "region", "scda", "mean", "lost"] = "ddt"
    """ddt: what all photos have in common; region: a linear unit trained for some seconds by contrasting regions; scda,
    mean, lost: each photo by itself."""
    model: str | None = None
    """A trained model (model or run folder) in place of method and backbone."""
    backbone: str = VIT
    """Any timm ViT or CNN."""
    weights: str | None = None
    """Local file of the backbone's weights."""
    backbone_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Of the backbone, such as --backbone-options.output_stride 16 for a MobileNet."""
    mean: tuple[float, float, float] | None = None
    """Per-channel mean of photos in [0, 1] that the weights expect; timm's of the backbone where not given."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation, likewise."""
    blocks: tuple[int, ...] = ()
    """Blocks of a ViT whose keys are read; where not given, the last three of ddt, the last one of other methods."""
    layers: tuple[str, ...] = ()
    """Layers of a CNN that are read, such as blocks.5; its last map where not given."""
    image_size: int = 224
    """Photos are squeezed to a square of this side, in pixels."""
    threshold: str = "auto"
    """Where heat maps are cut: a share such as 0.5, or mean, otsu, zero; auto: what suits the method."""
    fit_photos: int = 500
    """So many photos, spread over the folder, tell what is common; 3 to 10 suffice, more do not harm."""
    truth: str | None = None
    """Data with known boxes of these photos (a COCO .json, or voc:PATH, cub:PATH, ...): scores, beside what boxes
    that see nothing reach."""
    batch_size: int = 16
    """Photos a forward pass."""
    seed: int = 0
    """Of the choice of photos, and of --method region."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    skip_unreadable: bool = False
    """List and leave out photos that cannot be read, instead of stopping at the first."""
    resume: bool = False
    """Go on with what is there: only photos without a line are done."""
    overwrite: bool = False
    """Replace what is there."""


_FREE_ON_RESUME = {
    "photos",
    "out",
    "format",
    "truth",
    "batch_size",
    "device",
    "skip_unreadable",
    "resume",
    "overwrite",
}


def label_command(arguments: list[str]) -> None:
    """``contrastive-cam label photos/ --out boxes.json``."""
    options = cli.parse(LabelOptions, arguments, command="contrastive-cam label")
    report = label_folder(options, command=f"contrastive-cam label {' '.join(arguments)}")
    sys.stdout.write(f"{report}\n")


def label_folder(options: LabelOptions, *, command: str = "") -> Path:
    """Label photos as asked; see :class:`LabelOptions`.

    The folder then holds the annotations, ``photos.jsonl`` (a line a photo: box, confidence and its signs, or why it
    could not be read), ``heatmaps/``, ``model/`` (what was fitted, for ``contrastive-cam predict``), ``label.json``
    (the settings) and ``report.html``.

    Args:
        options: the settings.
        command: for the report.

    Returns:
        Path of the report.

    Raises:
        InputError: for photos, settings or a folder that cannot be used.
    """
    from .label_report import write_label_report

    rule = parse_rule(options.threshold)
    for name in ("fit_photos", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    folder, format, target = output_of(options.out, options.format)
    photos = list_images(options.photos)
    if any(photo.resolve().is_relative_to(folder.resolve()) for photo in photos):
        raise InputError(f"{folder}: holds photos to label, and receives results; choose another --out")
    aside = other_files(options.photos)
    truth = None if options.truth is None else known_boxes(options.truth, options.photos)
    device = cli.choose_device(options.device)
    settings = {name: value for name, value in plain(options).items() if name not in _FREE_ON_RESUME}
    if not (options.resume or options.overwrite) and target is not None and target.exists():
        raise InputError(f"{target}: exists; pass --resume to go on, --overwrite to replace it")
    # What is wrong with the network must not leave a folder behind.
    model: Any = None if options.resume and (folder / "model").is_dir() else network_of(options)
    fresh = not folder.exists()
    new_output_folder(folder, resume=options.resume, overwrite=options.overwrite)
    journal = Journal(folder, settings)
    waiting = journal.without_line(photos)
    if len(waiting) < len(photos):
        logger.info("%d of %d photos are done already", len(photos) - len(waiting), len(photos))
    if aside:
        logger.info("left aside, no photos: %s", ", ".join(f"{n} {suffix}" for suffix, n in aside.items()))
    notes: list[str] = journal.notes
    if model is None:
        model = load_fitted(folder / "model", options.model is not None)
    localizer = Localizer(model.to(device).eval(), "model" if options.model else options.method, rule)
    read = Reader(localizer, options.skip_unreadable, options.batch_size)
    if not (folder / "model").is_dir():
        try:
            notes = list(dict.fromkeys([*notes, *fit(localizer, read, photos, options)]))
        except InputError:
            if fresh:
                shutil.rmtree(folder)  # nothing in it that a second launch could go on with
            raise
        journal.keep_notes(notes)
        if options.model is None:
            model.save_pretrained(folder / "model")
    (folder / "heatmaps").mkdir(exist_ok=True)
    started = time.monotonic()
    with tqdm(total=len(photos), initial=len(photos) - len(waiting), desc="label", unit="photo") as bar:
        done = 0
        for batch in read(waiting):
            journal.add(batch, localizer.find(batch.images) if len(batch.images) else [], localizer)
            bar.update(len(batch.sources))
            first, done = not done, done + len(batch.sources)
            if first and len(waiting) > done:
                left = (time.monotonic() - started) / done * (len(waiting) - done)
                logger.info("%d photos on %s: about %s", len(waiting), device, duration(left))
    lines = journal.of(photos)
    found = [line for line in lines if "error" not in line]
    if not found:
        raise InputError(
            f"{' '.join(options.photos)}: none of {len(photos)} photos could be read; first: {lines[0]['error']}"
        )
    predictions = [prediction_of(line, options.name, localizer) for line in found]
    written = export_predictions(predictions, folder, format, [options.name])
    if target is not None:
        shutil.copyfile(written[0], target)
    tables: list[tuple[str, list[dict[str, Any]]]] = scored(found, truth) if truth is not None else []
    for title, rows in tables:
        sys.stdout.write(f"{title}\n{format_table(rows)}\n\n")
    empty = sum(line["box"] is None for line in found)
    if empty:
        notes.append(f"{empty} of {len(found)} photos have no box: nothing stands out in their heat map.")
    if aside:
        notes.append(
            "Left aside, no photos: " + ", ".join(f"{n} {suffix}" for suffix, n in aside.items()) + "."
        )
    for note in notes:
        logger.warning("%s", note)
    skipped = [line for line in lines if "error" in line]
    for line in skipped:
        logger.warning("skipped %s", line["error"])
    few = int(doubtful([line["confidence"] for line in found]).sum())
    logger.info(
        "%d photo%s labelled, %d worth a look: the least sure come first in the report",
        len(found),
        "" if len(found) == 1 else "s",
        few,
    )
    return write_label_report(
        folder, localizer, found, skipped, notes, tables, truth or {}, run_record(options.seed), command
    )


# --- What the user gives ---------------------------------------------------------------------------


def output_of(out: Path, format: Format | None) -> tuple[Path, Format, Path | None]:
    """The folder that receives everything, the format, and the annotation file asked for, if it was a file.

    Raises:
        InputError: if the two do not fit.

    Example:
        >>> output_of(Path("boxes.json"), None)
        (PosixPath('boxes'), 'coco', PosixPath('boxes.json'))
        >>> output_of(Path("boxes"), "yolo")
        (PosixPath('boxes'), 'yolo', None)
    """
    of_suffix: dict[str, Format] = {".json": "coco", ".csv": "csv"}
    found = of_suffix.get(out.suffix.lower())
    if found is None:
        return out, format or "coco", None
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give a file name, or a folder without the suffix {out.suffix}")
    if format not in (None, found):
        raise InputError(f"--out {out}: a {out.suffix} file is {found}, not {format}; name a folder instead")
    return out.with_suffix(""), found, out


def other_files(photos: Sequence[str]) -> dict[str, int]:
    """How many files in the folders are no photos, by suffix: they are left aside."""
    counts: Counter[str] = Counter()
    for given in photos:
        if os.path.isdir(given):
            for _, _, names in os.walk(given):
                suffixes = (os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))
                counts.update(
                    suffix or "without suffix" for suffix in suffixes if suffix not in IMAGE_SUFFIXES
                )
    return dict(counts.most_common(8))


def known_boxes(spec: str, photos: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """True boxes by resolved path of the photo: ``(k, 4)`` xyxy pixels, end exclusive.

    Args:
        spec: a data source with boxes, or a COCO file for the one folder of photos.
        photos: as the user gave them.

    Raises:
        InputError: for data that cannot be read or have no box.
    """
    from attnmap_core.boxes import xywh_to_xyxy
    from attnmap_core.data.sources import load_data

    if spec.endswith(".json"):
        if len(photos) != 1 or not os.path.isdir(photos[0]):
            raise InputError(
                f"--truth {spec}: a COCO file goes with one folder of photos; give a data source"
            )
        data = load_data(f"folder:{photos[0]}", "all", annotations=spec)
    else:
        data = load_data(spec, "all")
    rows: Any = data.dataset
    found = {
        os.path.realpath(row["image"]["path"]): xywh_to_xyxy(
            np.asarray(row["objects"]["bbox"], dtype=np.float64).reshape(-1, 4)
        )
        for row in rows
        if row["image"]["path"] and row["objects"]["bbox"]
    }
    if not found:
        raise InputError(f"--truth {spec}: no photo with a box; give data with boxes, or leave it out")
    return found


def network_of(options: LabelOptions) -> Any:
    """The model that ``label`` was asked for, not yet fitted.

    Raises:
        InputError: for a network or weights that cannot be had.
    """
    from .cli import load_model

    if options.model is not None:
        return load_model(cli.resolve_model(options.model))
    blocks: Sequence[int] = options.blocks
    wants_keys = not options.blocks and not options.layers and is_vit(options.backbone)
    if wants_keys:
        blocks = (-3, -2, -1) if options.method == "ddt" else (-1,)
    own = options.method in ("ddt", "region") and not blocks  # cut at the boundary that the map draws itself
    try:
        model = FrozenMap(
            options.backbone,
            options.image_size,
            blocks=blocks,
            layers=options.layers,
            last_stage="dilated" if is_resnet(options.backbone) else "timm",
            positive=own,
            threshold=0.0 if own else 0.5,
            labels=[options.name],
            pretrained=options.weights is None,
            weights=options.weights,
            backbone_options=dict(options.backbone_options),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--blocks and --layers: {error}") from error
    return normalised(model, options.mean, options.std)


def is_vit(name: str) -> bool:
    """Whether a timm name is that of a plain vision transformer, whose keys can be read.

    Example:
        >>> is_vit("vit_tiny_patch16_224"), is_vit("resnet50"), is_vit("vit")
        (True, False, True)
    """
    from timm.models import is_model_in_modules

    return name == "vit" or is_model_in_modules(name.partition(".")[0], {"vision_transformer", "deit"})


def is_resnet(name: str) -> bool:
    """Whether the last stage of a network of this timm name can be opened by dilation."""
    from timm.models import is_model_in_modules

    return is_model_in_modules(name.partition(".")[0], {"resnet", "senet"})


def load_fitted(folder: Path, trained: bool) -> Any:
    """The model that an earlier launch left in a label folder."""
    from .cli import load_model

    if trained:
        raise InputError(f"{folder}: was fitted, but --model names a trained one; choose another --out")
    return load_model(str(folder))


def plain(options: LabelOptions) -> dict[str, Any]:
    """The settings as JSON says them."""
    return json.loads(json.dumps(asdict(options), default=str))


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(40), duration(400), duration(9000)
        ('40 seconds', '7 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


# --- Reading ---------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Photos that were read together.

    Attributes:
        sources: all of them.
        photos: those that could be read, with their index in ``sources``.
        images: ``(b, 3, H, W)`` of these.
        errors: why others could not, by index.
    """

    sources: list[Path]
    photos: list[tuple[int, Image.Image]]
    images: Tensor
    errors: dict[int, str]


class Reader:
    """Reads photos in batches, by threads, one batch ahead of the network.

    Args:
        localizer: whose network's input they become.
        skip_unreadable: report photos that cannot be read instead of raising.
        batch_size: photos a batch.
    """

    def __init__(self, localizer: Localizer, skip_unreadable: bool, batch_size: int) -> None:
        self.transform = eval_transform(localizer.model.preprocessing)
        self.size = localizer.model.preprocessing.size
        self.skip, self.batch_size = skip_unreadable, batch_size

    def __call__(self, photos: Sequence[Path]) -> Iterator[Batch]:
        """The batches, in order.

        Raises:
            InputError: that names a photo that cannot be read, unless skipping.
        """
        parts = [list(photos[i : i + self.batch_size]) for i in range(0, len(photos), self.batch_size)]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            ahead = [pool.submit(self._read, photo) for photo in parts[0]] if parts else []
            for number, part in enumerate(parts):
                following = parts[number + 1] if number + 1 < len(parts) else []
                now, ahead = ahead, [pool.submit(self._read, photo) for photo in following]
                yield self._batch(part, [future.result() for future in now])

    def _read(self, photo: Path) -> tuple[Image.Image, Tensor] | str:
        try:
            image = load_image(photo)
        except InputError as error:
            if not self.skip:
                raise
            return str(error)
        return image, self.transform(image)

    def _batch(self, sources: list[Path], read: list[tuple[Image.Image, Tensor] | str]) -> Batch:
        errors = {i: item for i, item in enumerate(read) if isinstance(item, str)}
        good = [(i, *item) for i, item in enumerate(read) if not isinstance(item, str)]
        images = torch.stack([tensor for _, _, tensor in good]) if good else torch.zeros(0, 3, *self.size)
        return Batch(sources, [(i, image) for i, image, _ in good], images, errors)


# --- Fitting ---------------------------------------------------------------------------------------


def fit(localizer: Localizer, read: Reader, photos: Sequence[Path], options: LabelOptions) -> list[str]:
    """Let a method see what photos have in common, and say what looks wrong about the folder.

    Args:
        localizer: changed in place.
        read: the photos' reader.
        photos: all of them.
        options: of the launch.

    Returns:
        Sentences for the user.

    Raises:
        InputError: where none of the photos that were looked at can be read.
    """
    order = np.random.default_rng(options.seed).permutation(len(photos))
    chosen = [photos[i] for i in np.sort(order[: options.fit_photos])]
    if localizer.needs_fit:
        with tqdm(total=len(chosen), desc=f"look ({localizer.method})", unit="photo") as bar:

            def batches() -> Iterator[Tensor]:
                for batch in read(chosen):
                    if len(batch.images):
                        yield batch.images
                    bar.update(len(batch.sources))

            localizer.fit(batches(), **({"seed": options.seed} if localizer.method == "region" else {}))
    some = [photos[i] for i in np.sort(order[:KIND_PHOTOS])]
    looks = [
        found.descriptor
        for batch in read(some)
        if len(batch.images)
        for found in localizer.find(batch.images)
    ]
    return doubts(np.array([look for look in looks if look.any()]), len(photos), localizer.needs_fit)


def doubts(looks: NDArray[np.float64], photos: int, together: bool = True) -> list[str]:
    """What some photos say against labelling their folder as one kind of thing.

    Args:
        looks: ``(n, c)`` descriptor of the object in each photo, see :class:`contrastive_cam.localizers.Found`.
        photos: how many there are in the folder.
        together: whether the method compares photos.

    Returns:
        Sentences: too few photos, all the same, several kinds.

    Example:
        >>> doubts(np.ones((5, 3)), 5)
        ['All photos look the same: what they have in common is everything, and boxes may be of anything.']
    """
    found: list[str] = []
    if photos < 3 and together:
        found.append(
            f"{photos} photo{'s' * (photos > 1)}: what is common is better told from 3 or more; add photos of the same "
            "kind."
        )
    if len(looks) > 1 and float(np.ptp(looks, axis=0).max()) < 1e-5:
        found.append(
            "All photos look the same: what they have in common is everything, and boxes may be of anything."
        )
    elif len(looks) >= 8 and (apart := two_groups(looks)) > KINDS:
        found.append(
            f"The photos fall into two groups (silhouette {apart:.2f}): if they show several kinds of things, label "
            "each kind in a folder of its own."
        )
    return found


def two_groups(looks: NDArray[np.float64]) -> float:
    """How well photos fall into two groups: the mean silhouette of 2-means on centred directions, in ``[-1, 1]``.

    Args:
        looks: ``(n, c)``, n at least 3.

    Returns:
        Near 0 for one kind, near 1 for two kinds far apart; 0 where one of the groups has less than a twentieth of the
        photos, which are odd ones rather than a kind.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> one = rng.normal(size=(40, 64))
        >>> two_groups(one) < 0.12, two_groups(one + 25 * np.repeat(np.eye(64)[:2], 20, axis=0)) > 0.5
        (True, True)
    """
    from attnmap_core.metrics import kmeans
    from scipy.spatial.distance import cdist

    centred = looks - looks.mean(axis=0)
    rows = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    along = rows @ np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][0]
    # From the two ends of what differs most: no chance in it.
    labels = kmeans(rows, start=rows[[along.argmin(), along.argmax()]], iterations=50).clusters
    sizes = np.bincount(labels, minlength=2)
    if sizes.min() < max(2, len(rows) / 20):
        return 0.0
    distance = cdist(rows, rows)
    to = np.stack([distance[:, labels == group].sum(axis=1) for group in (0, 1)], axis=1)
    index = np.arange(len(rows))
    own = to[index, labels] / (sizes[labels] - 1)
    other = to[index, 1 - labels] / sizes[1 - labels]
    return float(((other - own) / np.maximum(own, other)).mean())


# --- The record ------------------------------------------------------------------------------------


class Journal:
    """``photos.jsonl``: a line for each photo that is done, appended as it is, so that an interruption loses nothing.

    Args:
        folder: of the results.
        settings: what must be the same to go on.

    Raises:
        InputError: for results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.path, self._state = folder, folder / "photos.jsonl", folder / "label.json"
        self.notes: list[str] = []
        if self._state.is_file():
            state = read_json(self._state)
            for name, value in settings.items():
                if state["settings"].get(name) != value:
                    raise InputError(
                        f"--{name.replace('_', '-')} {value}: {folder} was begun with "
                        f"{state['settings'].get(name)}; give that to go on, or --overwrite"
                    )
            self.notes = list(state["notes"])
        elif any(folder.iterdir()):
            raise InputError(f"{folder}: holds no labelling to resume (label.json); choose another --out")
        self._settings = settings
        self.keep_notes(self.notes)
        self._lines = self._read()

    def keep_notes(self, notes: Sequence[str]) -> None:
        """Write settings and what was said about the folder."""
        write_json(self._state, {"settings": self._settings, "notes": list(notes)})

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the last line was being written
            self.path.write_text(whole, encoding="utf-8")
        return {line["source"]: line for line in map(json.loads, whole.splitlines())}

    def without_line(self, photos: Sequence[Path]) -> list[Path]:
        """Photos still to be done; those that could not be read are tried again."""
        return [photo for photo in photos if "error" in self._lines.get(str(photo), {"error": ""})]

    def of(self, photos: Sequence[Path]) -> list[dict[str, Any]]:
        """The lines of photos, in their order."""
        return [self._lines[str(photo)] for photo in photos]

    def add(self, batch: Batch, found: Sequence[Found], localizer: Localizer) -> None:
        """Write the heat maps and lines of a batch."""
        lines: list[dict[str, Any]] = [
            {"source": str(batch.sources[i]), "error": error} for i, error in batch.errors.items()
        ]
        preprocessing = localizer.model.preprocessing
        for (i, photo), one in zip(batch.photos, found):
            source = batch.sources[i]
            box = None
            if one.box_xyxy is not None:
                box = preprocessing.to_photo_coordinates(one.box_xyxy[None], photo.width, photo.height)[0]
            name = f"{len(self._lines) + len(lines):06d}_{source.stem[:50]}.jpg"
            heat = preprocessing.to_photo_map(one.heat.astype(np.float32), photo.width, photo.height)
            overlay(photo, heat, longest_side=(1, 640)).save(self.folder / "heatmaps" / name, quality=88)
            lines.append({
                "source": str(source),
                "width": photo.width,
                "height": photo.height,
                "box": None if box is None else [round(float(v), 2) for v in box],
                "confidence": round(one.confidence, 4),
                **{sign: round(value, 4) for sign, value in one.signs.items()},
                "heatmap": f"heatmaps/{name}",
            })  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        self._lines |= {line["source"]: line for line in lines}


def prediction_of(line: dict[str, Any], name: str, localizer: Localizer) -> Prediction:
    """A line as the exports take it; the score of its box is the confidence."""
    boxes = [] if line["box"] is None else [line["box"]]
    threshold = localizer.rule if isinstance(localizer.rule, float) else 0.0
    return Prediction(
        source=line["source"],
        width=line["width"],
        height=line["height"],
        label=0,
        label_name=name,
        probability=1.0,
        boxes_xyxy=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        box_scores=np.array([line["confidence"]] * len(boxes), dtype=np.float64),
        score_map=np.zeros((0, 0), np.float32),
        threshold=threshold,
    )


# --- Scores ----------------------------------------------------------------------------------------


def scored(
    lines: Sequence[dict[str, Any]], truth: dict[str, NDArray[np.float64]]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """CorLoc of the boxes beside that of boxes that see nothing; and by confidence. A hit on any object counts.

    Args:
        lines: of the journal, readable photos.
        truth: boxes by resolved path; photos without are left out.

    Returns:
        Tables by title.

    Raises:
        InputError: if none of the photos has a known box.
    """
    known = [line for line in lines if os.path.realpath(line["source"]) in truth]
    if not known:
        raise InputError("--truth: names none of the photos; check that both are the same files")
    ours = CorLocProtocol(multi="any")
    floors = floor_protocols("any")
    for index, line in enumerate(known):
        boxes, size = truth[os.path.realpath(line["source"])], (line["width"], line["height"])
        ours.add(index, box_xyxy=line["box"], boxes_xyxy=boxes)
        for box, protocol in floors.values():
            protocol.add(index, box_xyxy=box * np.tile(size, 2), boxes_xyxy=boxes)
    rows = [{"": "found boxes"} | shown(ours.compute())]
    rows += [{"": f"floor: {name}"} | shown(protocol.compute()) for name, (_, protocol) in floors.items()]
    ious, confidence = ours.column("iou"), np.array([line["confidence"] for line in known])
    parts = np.array_split(np.argsort(-confidence, kind="stable"), min(4, len(known)))
    quarters = [
        {
            "confidence": f"{confidence[part].min():.2f} to {confidence[part].max():.2f}",
            "photos": len(part),
            "CorLoc 0.5": 100 * float((ious[part] >= 0.5).mean()),
            "CorLoc 0.7": 100 * float((ious[part] >= 0.7).mean()),
        }
        for part in parts
    ]
    return [(f"Against {len(known)} known boxes", rows), ("By confidence", quarters)]
