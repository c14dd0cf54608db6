"""``sar-vit inspect``: how spatially ordered the attention of any vision transformer is, layer by layer, on photos.

For every block and head: the spatial entropy of its similarity map, number and size of its components and the share
of patches above the mean, as numbers and as pictures.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from attnmap_core import cli
from attnmap_core.backbones import AttentionTap, evaluating
from attnmap_core.data.images import list_images, load_image
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.experiments import format_table
from attnmap_core.files import atomic_folder, write_json
from attnmap_core.pictures import save_picture, value_grid
from attnmap_core.recipes import run_record
from attnmap_core.report import THUMBNAIL, Gallery, Report, Table, Tile, run_facts, write_report
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .entropy import map_components, maps_of_logits, spatial_entropy
from .evaluate import open_model
from .model import SARViT
from .pictures import attention_mosaic, attention_picture, entropy_pictures, head_sheet, schematic

logger = logging.getLogger(__name__)

COLUMNS = {
    "spatial_entropy": "Entropy (nats)",
    "components": "Components",
    "component_size": "Size (patches)",
    "largest_share": "Largest (%)",
    "foreground": "Foreground (%)",
}
"""What is measured of a map, with its title: entropy E; number of components; their mean size; the share P of the
largest, and of the patches above the mean, in percent."""
MOSAIC = 8


class LayerMaps(NamedTuple):
    """The maps of some images in every layer that was read.

    Attributes:
        similarity: S, ``(b, layers, heads, h, w)``.
        attention: softmax over all keys, of which the patches' are kept; the same shape.
    """

    similarity: Tensor
    attention: Tensor


class LayerReader:
    """Reads the similarity maps of a model's blocks.

    Blocks of earlier stages, whose keys are not on the grid of the last block, cannot be read with its query and are
    left out; so are all but the last of networks without a single stack of blocks.

    Args:
        model: any :class:`~sar_vit.SARViT`; the last block may be of any form.

    Attributes:
        layers: numbers of the blocks that are read, from 1.
        note: which are left out, and why; empty for none.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        >>> reader = LayerReader(SARViT("vit", num_classes=4, img_size=(32, 48), backbone_options=tiny))
        >>> reader.layers, reader(torch.zeros(1, 3, 32, 48)).similarity.shape
        ([1, 2], torch.Size([1, 2, 3, 4, 6]))
    """

    def __init__(self, model: SARViT) -> None:
        self.model = model
        self.note = ""
        query = model.collector.query
        net: Any = model.backbone.model
        try:
            every = AttentionTap(model.backbone, query=query, keep_keys=True)
        except ValueError as error:
            self._tap = AttentionTap(model.backbone, model.collector.block, query)
            stages = getattr(net, "layers", None) or getattr(net, "stages", ())
            self.layers = [sum(len(stage.blocks) for stage in stages) or 1]
            self.note = f"Only the last block is read: {error}."
            return
        blank = torch.zeros(1, 3, *model.preprocessing.size)
        keys = [key.shape[2] for key in self._keys(every, blank)]
        kept = [block for block, count in enumerate(keys) if count == keys[-1]]
        self._tap = AttentionTap(model.backbone, kept, query)
        self.layers = [block + 1 for block in kept]
        if len(kept) < len(keys):
            left = [str(block + 1) for block in range(len(keys)) if block not in kept]
            self.note = (
                f"Layers {', '.join(left)} are left out: their keys are on other grids than the last layer's."
            )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> LayerMaps:
        """The maps of ``images (b, 3, H, W)``, normalised."""
        images = self._placed(images)
        with evaluating(self.model), self._tap as tap:
            self.model(images)
            logits = tap.logits()
        b, layers, _, keys = logits.shape
        h, w = self.model.collector.key_grid((images.shape[2], images.shape[3]))
        if keys - self._prefix() != h * w:
            raise InputError(
                f"{self.model.arch}: {keys - self._prefix()} patch keys, but a grid of {h}x{w}; a map needs each patch"
            )
        flat = logits.flatten(0, 1)
        shape = (b, layers, -1, h, w)
        return LayerMaps(
            maps_of_logits(flat, (h, w)).reshape(shape),
            maps_of_logits(flat, (h, w), "softmax").reshape(shape),
        )

    @torch.inference_mode()
    def _keys(self, tap: AttentionTap, images: Tensor) -> list[Tensor]:
        with evaluating(self.model), tap:
            self.model(self._placed(images))
            return [key for _, key in tap.pop().queries_and_keys()]

    def _placed(self, images: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        return images.to(weight.device, weight.dtype)

    def _prefix(self) -> int:
        return self._tap.num_prefix_tokens


def map_statistics(S: Tensor) -> dict[str, NDArray[np.float64]]:
    """The columns of :data:`COLUMNS` for similarity maps.

    Args:
        S: ``(..., h, w)``, finite.

    Returns:
        ``(...)`` for each. A map without a component (constant) has size 0.

    Example:
        >>> S = torch.tensor([[[1.0, 0, 0, 0], [1.0, 0, 0, 2.0]]])
        >>> {name: round(float(values[0]), 2) for name, values in map_statistics(S).items()}
        {'spatial_entropy': 0.67, 'components': 2.0, 'component_size': 1.5, 'largest_share': 60.0, 'foreground': 37.5}
    """
    found = map_components(S)
    number, pixels = found.number.double(), found.sizes.sum(-1).double()
    values = {
        "spatial_entropy": spatial_entropy(S).double(),
        "components": number,
        "component_size": pixels / number.clamp_min(1),
        "largest_share": 100 * found.shares.amax(-1).double(),
        "foreground": 100 * pixels / (S.shape[-2] * S.shape[-1]),
    }
    return {name: tensor.cpu().numpy() for name, tensor in values.items()}


# --- The verb --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Spatial entropy, components and attention masks of every layer and head on photos."""

    model: tyro.conf.Positional[str]
    """Model folder, run folder or Hub id; or timm:NAME, such as timm:deit_small_patch16_224."""
    photos: tyro.conf.Positional[list[str]]
    """Photos, folders of photos, or both."""
    out: Path
    """Folder for layers.json, heads.csv, pictures and report.html."""
    pretrained: bool = False
    """Download the weights of a timm model."""
    weights: Path | None = None
    """Local file of a timm model's weights."""
    query: Literal["cls", "avg"] = "cls"
    """Whose similarity to the patches is looked at, of a timm model: the class token's, or the mean patch's."""
    image_size: int | None = None
    """Side of the input in pixels; the model's own where not given."""
    mass: float = 0.6
    """Share of the attention's mass that makes a mask."""
    pictures: int = 24
    """Photos to draw, the first ones; numbers are of all."""
    batch_size: int = 16
    """Photos a forward pass."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    skip_unreadable: bool = False
    """List and leave out photos that cannot be read, instead of stopping at the first."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def inspect_command(arguments: list[str]) -> None:
    """``sar-vit inspect MODEL PHOTO... --out FOLDER``."""
    options = cli.parse(InspectOptions, arguments, command="sar-vit inspect")
    if options.batch_size < 1 or options.pictures < 0:
        raise InputError(
            f"--batch-size {options.batch_size}, --pictures {options.pictures}: expected at least 1, and 0 or more"
        )
    if not 0 < options.mass <= 1:
        raise InputError(f"--mass {options.mass}: expected a share above 0, up to 1; 0.6 is usual")
    out = options.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not options.overwrite:
        raise InputError(f"{out}: output folder exists; pass --overwrite or choose another --out")
    photos = list_images(options.photos)
    if any(photo.resolve().is_relative_to(out.resolve()) for photo in photos):
        raise InputError(f"{out}: holds photos to inspect, which would be overwritten; choose another --out")
    model = open_model(
        options.model,
        pretrained=options.pretrained,
        weights=options.weights,
        query=options.query,
        image_size=options.image_size,
    ).to(cli.choose_device(options.device))
    # Maps are of the whole photo: what a crop takes away would have no attention.
    model.preprocessing = dataclasses.replace(model.preprocessing, resize=None, crop="none")
    with atomic_folder(out) as folder:
        said = _inspect(model, photos, options, folder)
    sys.stdout.write(f"{said}\n\n{out / 'report.html'}\n")


def _inspect(model: SARViT, photos: Sequence[Path], options: InspectOptions, folder: Path) -> str:
    """Fill the folder; returns the table for the screen."""
    reader = LayerReader(model)
    unreadable: list[str] = []
    sums: dict[str, NDArray[np.float64]] = {}
    drawn = _Drawn(folder / "pictures", options.mass)
    count = 0
    with (folder / "heads.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["photo", "layer", "head", *COLUMNS])
        batches = _batches(model, photos, options, unreadable)
        with tqdm(total=len(photos), desc="inspect", unit="photo", disable=None) as bar:
            for paths, images, inputs in batches:
                maps = reader(inputs)
                if not torch.isfinite(maps.similarity).all():
                    raise InputError(
                        f"{paths[0]} or a photo just after it: {model.arch} gives values that are not finite; its "
                        "weights are damaged, load others"
                    )
                found = map_statistics(maps.similarity)
                for name, values in found.items():
                    sums[name] = sums.get(name, 0) + values.sum(axis=0)
                for i, path in enumerate(paths):
                    for (layer, head), _ in np.ndenumerate(found["spatial_entropy"][i]):
                        numbers = [f"{found[name][i, layer, head]:.6g}" for name in COLUMNS]
                        table.writerow([path, reader.layers[layer], head + 1, *numbers])
                    if count < options.pictures:
                        entropies = found["spatial_entropy"][i, -1]
                        drawn.add(path, images[i], maps.similarity[i, -1], maps.attention[i, -1], entropies)
                    count += 1
                bar.update(len(paths))
    if not count:
        raise InputError(
            f"{' '.join(options.photos)}: none of {len(photos)} photos could be read; first: {unreadable[0]}"
        )
    means = {name: total / count for name, total in sums.items()}
    for reason in unreadable:
        logger.warning("skipped %s", reason)
    facts = {
        "model": options.model,
        "backbone": model.arch,
        "last block": " ".join(f"{name}={value}" for name, value in model.switches.items()),
        "query": model.collector.query,
        "input": "x".join(map(str, model.preprocessing.size)),
        "grid": "x".join(map(str, model.collector.key_grid(model.preprocessing.size))),
    }
    write_json(
        folder / "layers.json",
        {
            **facts,
            "photos": count,
            "unreadable": unreadable,
            "note": reader.note,
            "layers": reader.layers,
            "mean": {name: values.tolist() for name, values in means.items()},
        },
    )
    plots = {
        title: _plot(means[name], reader.layers, title) for name, title in COLUMNS.items() if name in _PLOTTED
    }
    save_picture(plots[COLUMNS["spatial_entropy"]], folder / "entropy.svg")
    drawn.finish(folder / "mosaic.jpg")
    rows = [
        {"layer": str(number)}
        | {title: f"{means[name][layer].mean():.3f}" for name, title in COLUMNS.items()}
        for layer, number in enumerate(reader.layers)
    ]
    heads = [
        {"head": str(head + 1)} | {title: f"{means[name][-1, head]:.3f}" for name, title in COLUMNS.items()}
        for head in range(model.heads)
    ]
    note = "Means over photos and heads. A map is cut at its mean; entropy 0 is one component. " + reader.note
    report = Report(
        title=f"Attention of {Path(options.model).name or options.model}",
        summary=f"{count} photos, {len(reader.layers)} layers of {model.heads} heads"
        + (f"; {len(unreadable)} photos could not be read." if unreadable else "."),
        tables=[
            Table(title="Layers", rows=rows, note=note),
            Table(title="Heads of the last layer", rows=heads),
        ],
        plots=plots,
        galleries=drawn.galleries(count),
        facts=facts | run_facts(run_record(packages=("sar-vit",))),
        lists={f"Not readable ({len(unreadable)})": unreadable} if unreadable else {},
    )
    write_report(folder / "report.html", report)
    return format_table(rows) + (f"\n{reader.note}" if reader.note else "")


_PLOTTED = ("spatial_entropy", "components", "largest_share")


def _plot(values: NDArray[np.float64], layers: Sequence[int], title: str) -> Any:
    return value_grid(
        values,
        row_names=list(map(str, layers)),
        x_label="head",
        y_label="layer",
        value_label=title,
        digits=2 if values.max() < 10 else 0,
    )


def _batches(
    model: SARViT, photos: Sequence[Path], options: InspectOptions, unreadable: list[str]
) -> Iterator[tuple[list[Path], list[Image.Image], Tensor]]:
    """Readable photos, at their own size and as input."""
    transform = eval_transform(model.preprocessing)
    paths: list[Path] = []
    images: list[Image.Image] = []
    inputs: list[Tensor] = []
    for i, path in enumerate(photos):
        try:
            image = load_image(path)
        except InputError as error:
            if not options.skip_unreadable:
                raise
            unreadable.append(str(error))
        else:
            paths.append(path)
            images.append(image)
            inputs.append(transform(image))
        if inputs and (len(inputs) == options.batch_size or i + 1 == len(photos)):
            yield paths, images, torch.stack(inputs)
            paths, images, inputs = [], [], []


class _Drawn:
    """Pictures of some photos: a file each, tiles for the report, and a mosaic of the first."""

    def __init__(self, folder: Path, mass: float) -> None:
        self.folder, self.mass = folder, mass
        self.masks: list[Tile] = []
        self.best: list[Tile] = []
        self.mosaic: list[tuple[Image.Image, NDArray[np.float64], str]] = []

    def add(
        self, path: Path, image: Image.Image, S: Tensor, attention: Tensor, entropies: NDArray[np.float64]
    ) -> None:
        """Take the last layer's maps ``(heads, h, w)`` of a photo, and their entropies ``(heads,)``."""
        similarity, maps = S.double().cpu().numpy(), attention.double().cpu().numpy()
        picture = schematic(similarity, image, maps, mass=self.mass)
        # The longest file name has 255 bytes.
        save_picture(picture, self.folder / f"{len(self.masks):06d}_{path.stem[:50]}.jpg")
        badge = f"E {entropies.mean():.2f}"
        pictures = [image, attention_picture(image, maps.mean(axis=0)), head_sheet(image, maps, self.mass)]
        self.masks.append(Tile(pictures=pictures, caption=path.name, badge=badge))
        head = int(entropies.argmin())
        steps, said = entropy_pictures(similarity[head], THUMBNAIL)
        caption = f"{path.name}\nhead {head + 1}, {said}"
        self.best.append(Tile(pictures=[image, *steps], caption=caption, badge=f"E {entropies[head]:.2f}"))
        if len(self.mosaic) < MOSAIC:
            self.mosaic.append((image.resize((480, 480)), maps, path.stem))

    def finish(self, path: Path) -> None:
        """Write the mosaic, if there is anything to show."""
        if self.mosaic:
            photos, maps, names = zip(*self.mosaic)
            save_picture(attention_mosaic(photos, {"": maps}, self.mass, captions=names), path)

    def galleries(self, photos: int) -> list[Gallery]:
        """For the report; ``photos`` is how many there are."""
        if not self.masks:
            return []
        left = photos - len(self.masks)
        share = f"{100 * self.mass:.0f} %"
        return [
            Gallery(
                title="Attention of the last layer",
                tiles=self.masks,
                note=f"Photo, mean attention of the heads, and of each head the patches with {share} of its attention. "
                "E is the mean spatial entropy of the heads, in nats.",
                left_out=left,
            ),
            Gallery(
                title="From similarity to components",
                tiles=self.best,
                note="The head with the lowest entropy: similarity S, what is above its mean, the components. "
                "All heads are in the folder pictures.",
                left_out=left,
            ),
        ]


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["inspect", *sys.argv[1:]]))
