"""Find photos by photos: an index of a folder, queries, groups of near-duplicates, and a page in the browser.

An index is a folder with ``index.safetensors`` (the embeddings) and ``index.json`` (which photo each row is, and which
model made it). Search is exact; a million photos of 512 channels take 2 GB and seconds a query.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from attnmap_core import cli
from attnmap_core.data.images import list_images, load_image
from attnmap_core.errors import InputError
from attnmap_core.experiments import format_table
from attnmap_core.files import atomic_folder, new_output_folder, read_json, write_json
from attnmap_core.metrics import retrieval
from attnmap_core.pictures import picture_grid, save_picture
from attnmap_core.recipes import run_record
from numpy.typing import NDArray
from PIL import Image

from .model import EmbeddingModel

FORMAT = 1
"""Of the index; raised when its files change meaning."""
_CELLS = 1 << 24  # similarities at a time


def fingerprint(model: EmbeddingModel) -> str:
    """A short text that two models share only if they give the same embeddings: of weights and preprocessing.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
        >>> model = EmbeddingModel("vit", embedding_dim=6, img_size=32, backbone_options=tiny)
        >>> len(fingerprint(model)), fingerprint(model) == fingerprint(model)
        (32, True)
    """
    digest = hashlib.blake2b(
        json.dumps(model.preprocessing.to_dict(), sort_keys=True).encode(), digest_size=16
    )
    digest.update(model.pool.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class PhotoIndex:
    """Embeddings of photos, ready to be searched.

    Attributes:
        z: ``(n, d)`` float32 of length 1.
        photos: their paths.
        model: name of the model that made it, as it was given.
        fingerprint: of that model.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
        >>> model = EmbeddingModel("vit", embedding_dim=6, img_size=32, backbone_options=tiny)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("red", "blue"):
        ...         Image.new("RGB", (40, 30), name).save(f"{folder}/{name}.png")
        ...     index = PhotoIndex.build(model, list_images(folder))
        ...     found = index.search(model, [f"{folder}/red.png"], k=1)
        ...     Path(index.photos[found.indices[0, 0]]).name
        'red.png'
    """

    z: NDArray[np.float32]
    photos: list[str]
    model: str
    fingerprint: str

    @classmethod
    def build(
        cls,
        model: EmbeddingModel,
        photos: Sequence[str | Path],
        *,
        name: str = "",
        batch_size: int = 32,
        skip_unreadable: bool = False,
    ) -> PhotoIndex:
        """Embed photos.

        Args:
            model: on its device.
            photos: paths.
            name: of the model, so that queries find it again.
            batch_size: photos that pass the network together.
            skip_unreadable: leave photos out that cannot be read, with a warning for each.

        Raises:
            InputError: for photos that cannot be read, and where none is left.
        """
        unreadable: set[str] = set()

        def skip(photo: object, reason: str) -> None:
            sys.stderr.write(f"skipped {reason}\n")
            unreadable.add(str(photo))

        paths = [str(photo) for photo in photos]
        z = model.encode(paths, batch_size=batch_size, on_unreadable=skip if skip_unreadable else "error")
        kept = [path for path in paths if path not in unreadable]
        if not kept:
            raise InputError(f"{len(paths)} photos: none can be read, expected photos; check the files")
        return cls(z, kept, name, fingerprint(model))

    def save(self, folder: str | Path) -> None:
        """Write the index as a folder, as a whole or not at all."""
        from safetensors.numpy import save_file

        with atomic_folder(folder) as temporary:
            save_file({"z": np.ascontiguousarray(self.z)}, temporary / "index.safetensors")
            facts = {
                "format": FORMAT,
                "model": self.model,
                "fingerprint": self.fingerprint,
                "photos": self.photos,
            }
            write_json(temporary / "index.json", facts | {"record": run_record(packages=("crossattn-dml",))})

    @classmethod
    def load(cls, folder: str | Path) -> PhotoIndex:
        """Read an index.

        Raises:
            InputError: for a folder that is none, or a damaged one.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise InputError(
                f"{folder}: no index.json in it, expected an index; make one: crossattn-dml index PHOTOS"
            )
        facts: Any = read_json(folder / "index.json")
        try:
            z = load_file(folder / "index.safetensors")["z"]
            index = cls(z, list(facts["photos"]), str(facts["model"]), str(facts["fingerprint"]))
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"{folder}: damaged index ({error}); make it again with --overwrite") from None
        if facts.get("format") != FORMAT or z.ndim != 2 or len(z) != len(index.photos):
            raise InputError(
                f"{folder}: format {facts.get('format')}, {z.shape} embeddings of {len(index.photos)} photos, expected "
                f"format {FORMAT} and a row for each; make it again with --overwrite"
            )
        return index

    def check_model(self, model: EmbeddingModel) -> None:
        """Refuse a model that did not make this index: its embeddings mean other things.

        Raises:
            InputError: if it is another one.
        """
        if fingerprint(model) != self.fingerprint:
            raise InputError(
                f"index of {len(self.photos)} photos: made by another model ({self.model or 'unnamed'}, fingerprint "
                f"{self.fingerprint[:8]}), expected this one ({fingerprint(model)[:8]}); use that model or index again"
            )

    def search(self, model: EmbeddingModel, photos: Any, k: int = 10) -> retrieval.Neighbours:
        """The ``k`` photos nearest to each query photo; one that is in the index finds itself first.

        Args:
            model: the one that made the index.
            photos: as for :meth:`crossattn_dml.EmbeddingModel.encode`.
            k: at most the photos that there are.

        Raises:
            InputError: for another model, unreadable photos, and a ``k`` out of range.
        """
        self.check_model(model)
        return retrieval.nearest(model.encode(photos), self.z, k)

    def photo(self, place: int) -> Image.Image:
        """One of the photos.

        Raises:
            InputError: if it is not where it was, or not readable.
        """
        path = self.photos[place]
        if not Path(path).is_file():
            raise InputError(
                f"{path}: is in the index but no longer there; put it back or index the folder again"
            )
        return load_image(path)


def groups_of_duplicates(z: NDArray[Any], threshold: float = 0.95) -> list[list[int]]:
    """Groups of vectors that are joined by cosine similarities of ``threshold`` or more, directly or by steps.

    Similarities are computed a piece at a time: memory is linear in the number of vectors.

    Args:
        z: ``(n, d)`` of length 1.
        threshold: in ``(-1, 1]``.

    Returns:
        Groups of two or more, the largest first, places rising.

    Raises:
        InputError: for a threshold out of range.

    Example:
        >>> groups_of_duplicates(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]]))
        [[0, 2]]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not -1 < threshold <= 1:
        raise InputError(
            f"--threshold {threshold}: expected a cosine above -1, up to 1, such as 0.95; change it"
        )
    vectors = np.asarray(z, np.float32)
    n, rows = len(vectors), np.arange(len(vectors))
    group = rows.copy()
    size = max(1, _CELLS // max(1, n))
    for start in range(0, n, size):
        near = (
            vectors[start : start + size] @ vectors.T >= threshold - 1e-6
        )  # of equals, float32 may say a bit less
        first, second = near.nonzero()
        # Joined to what is known, so that edges of one piece only are held.
        edges = (np.concatenate([first + start, rows]), np.concatenate([second, group]))
        graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(n, n))
        labels: NDArray[np.int64] = connected_components(graph, directed=False)[1]
        group = np.unique(labels, return_index=True)[1][labels]  # the first of each group speaks for it
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if n else []
    return sorted((part.tolist() for part in parts if len(part) > 1), key=lambda part: (-len(part), part[0]))


def result_sheet(
    queries: Sequence[Image.Image], names: Sequence[str], index: PhotoIndex, found: retrieval.Neighbours
) -> Image.Image:
    """A row for each query: the photo, then what was found, with cosines and names below."""
    from .sheets import neighbour_sheet

    photos = [[index.photo(int(i)) for i in row] for row in found.indices]
    captions = [
        [
            f"query\n{name}",
            *(f"{value:.3f}\n{Path(index.photos[int(i)]).name}" for i, value in zip(row, values)),
        ]
        for name, row, values in zip(names, found.indices, found.similarities)
    ]
    return neighbour_sheet(queries, photos, [[None] * len(row) for row in photos], captions)


# --- Verbs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Embed photos once, so that queries are fast."""

    photos: tyro.conf.Positional[list[str]]
    """Photos, folders of photos, or both."""
    model: str
    """Model folder, run folder or Hub id."""
    out: Path
    """Folder of the index."""
    batch_size: int = 32
    """Photos a forward pass."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    skip_unreadable: bool = False
    """List and leave out photos that cannot be read, instead of stopping at the first."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def index_command(arguments: list[str]) -> None:
    """``crossattn-dml index PHOTOS --model RUN --out INDEX``."""
    options = cli.parse(IndexOptions, arguments, command="crossattn-dml index")
    photos = list_images(options.photos)
    model = _open(options.model, options.device)
    new_output_folder(options.out, overwrite=options.overwrite)
    index = PhotoIndex.build(
        model,
        photos,
        name=options.model,
        batch_size=options.batch_size,
        skip_unreadable=options.skip_unreadable,
    )
    index.save(options.out)
    sys.stdout.write(f"{options.out}: {len(index.photos)} photos\n")


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """The photos of an index that are nearest to given ones, as text and as a picture."""

    photos: tyro.conf.Positional[list[str]]
    """Query photos, or folders of them."""
    index: Path
    """Folder of the index."""
    model: str | None = None
    """The model that made the index; where not given, the one it names."""
    k: int = 10
    """Photos to find for each query."""
    out: Path = Path("query.png")
    """Picture to write."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    overwrite: bool = False
    """Replace the picture where it exists."""


def query_command(arguments: list[str]) -> None:
    """``crossattn-dml query PHOTO --index INDEX``."""
    options = cli.parse(QueryOptions, arguments, command="crossattn-dml query")
    _check_new(options.out, options.overwrite)
    index, photos = PhotoIndex.load(options.index), list_images(options.photos)
    model = _open(options.model or _named(index, options.index), options.device)
    found = index.search(model, photos, options.k)
    rows: list[dict[str, Any]] = []
    for query, places, values in zip(photos, found.indices, found.similarities):
        for rank, (i, value) in enumerate(zip(places, values), start=1):
            photo = index.photos[int(i)]
            rows.append({"query": query.name, "rank": str(rank), "cosine": f"{value:.4f}", "photo": photo})
    sheet = result_sheet(
        [load_image(photo) for photo in photos], [photo.name for photo in photos], index, found
    )
    save_picture(sheet, options.out)
    sys.stdout.write(f"{format_table(rows)}\n\n{options.out}\n")


@dataclass(frozen=True, kw_only=True)
class DuplicatesOptions:
    """Groups of photos that show nearly the same."""

    photos: tyro.conf.Positional[list[str]]
    """Photos, folders of photos, or both."""
    model: str
    """Model folder, run folder or Hub id."""
    out: Path
    """Folder for groups.json and groups.png."""
    threshold: float = 0.95
    """Cosine similarity from which two photos belong together. It depends on the model: look at the picture."""
    most: int = 20
    """Groups in the picture; groups.json has all."""
    batch_size: int = 32
    """Photos a forward pass."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    skip_unreadable: bool = False
    """List and leave out photos that cannot be read, instead of stopping at the first."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def duplicates_command(arguments: list[str]) -> None:
    """``crossattn-dml duplicates PHOTOS --model RUN --out FOLDER``."""
    options = cli.parse(DuplicatesOptions, arguments, command="crossattn-dml duplicates")
    if not -1 < options.threshold <= 1:
        groups_of_duplicates(np.empty((0, 1)), options.threshold)
    photos, model = list_images(options.photos), _open(options.model, options.device)
    new_output_folder(options.out, overwrite=options.overwrite)
    index = PhotoIndex.build(
        model, photos, batch_size=options.batch_size, skip_unreadable=options.skip_unreadable
    )
    groups = groups_of_duplicates(index.z, options.threshold)
    named = [[index.photos[i] for i in group] for group in groups]
    record = run_record(packages=("crossattn-dml",))
    write_json(
        options.out / "groups.json", {"threshold": options.threshold, "groups": named, "record": record}
    )
    lines = [f"{len(groups)} groups of near-duplicates among {len(index.photos)} photos"]
    if groups:
        columns = min(8, max(map(len, groups)))
        cells = [[index.photo(i) for i in group[:columns]] for group in groups[: options.most]]
        texts = [[Path(index.photos[i]).name for i in group[:columns]] for group in groups[: options.most]]
        save_picture(
            picture_grid(
                [[*row, *[None] * (columns - len(row))] for row in cells],
                [f"{len(group)} photos" for group in groups[: options.most]],
                captions=[[*row, *[""] * (columns - len(row))] for row in texts],
            ),
            options.out / "groups.png",
        )
        lines.append(str(options.out / "groups.png"))
    sys.stdout.write("\n".join(lines) + "\n")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """A page in the browser: drop a photo, see the nearest ones of an index."""

    index: tyro.conf.Positional[Path]
    """Folder of the index."""
    model: str | None = None
    """The model that made the index; where not given, the one it names."""
    k: int = 8
    """Photos to find."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    share: bool = False
    """Make a public link."""


def demo_command(arguments: list[str]) -> None:
    """``crossattn-dml demo INDEX``."""
    options = cli.parse(DemoOptions, arguments, command="crossattn-dml demo")
    index = PhotoIndex.load(options.index)
    model = _open(options.model or _named(index, options.index), options.device)
    build_demo(model, index, min(options.k, len(index.photos))).launch(share=options.share)


def build_demo(model: EmbeddingModel, index: PhotoIndex, k: int = 8) -> Any:
    """Make the Gradio page of an index.

    Args:
        model: the one that made it.
        index: of the photos to find.
        k: photos shown.

    Returns:
        A ``gradio.Interface``; ``.launch()`` serves it.

    Raises:
        InputError: if Gradio is not installed, or for another model.
    """
    index.check_model(model)
    try:
        import gradio
    except ImportError:
        raise InputError('the demo needs Gradio; pip install "crossattn-dml[demo]"') from None

    def find(photo: Image.Image) -> Image.Image:
        found = retrieval.nearest(model.encode(photo), index.z, k)
        return result_sheet([photo], ["query"], index, found)

    return gradio.Interface(
        find,
        inputs=gradio.Image(type="pil", label="photo"),
        outputs=gradio.Image(type="pil", label="nearest photos"),
        title="crossattn-dml",
        flagging_mode="never",
    )


def _open(name: str, device: str) -> EmbeddingModel:
    return EmbeddingModel.from_pretrained(cli.resolve_model(name)).to(cli.choose_device(device)).eval()


def _named(index: PhotoIndex, folder: Path) -> str:
    if not index.model:
        raise InputError(f"{folder}: does not name its model, expected --model; give the one that made it")
    return index.model


def _check_new(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; pass --overwrite or choose another --out")


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["query", *sys.argv[1:]]))
