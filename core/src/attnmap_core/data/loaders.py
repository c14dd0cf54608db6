"""Who sees which image when: datasets, batch samplers and loaders for one or many processes, and gathering.

The rules that everything here follows, so that a run is the same however it is launched or interrupted:

- The order of an epoch and the augmentation of an image depend on the seed, the epoch and the image only,
  never on workers, processes or how often the run was resumed.
- One optimizer step takes ``batch_size x processes x accumulate`` images. It is cut into micro-batches of
  ``batch_size x processes``, and each of those into consecutive pieces of ``batch_size``, one a process. Two
  processes with ``batch_size`` 16 therefore see the same steps as one with 32, and 8 micro-batches of 1 the
  same as 1 of 8.
- Each micro-batch carries the ``weight`` that makes the gradient of a step exactly the mean over its images,
  ragged last step included: ``weight x (mean loss of the micro-batch)``, summed over the micro-batches of the
  step and averaged over the processes (as ``DistributedDataParallel`` does), is the mean loss of the step.
- For evaluation whole batches go to processes in turn, composed as in one process, so that what is computed
  for an image is bitwise the same whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState  # pyright: ignore[reportMissingTypeStubs]

Transform = Callable[[Image.Image], Tensor | Sequence[Tensor]]
Batch = dict[str, Any]
Step = list[Batch]
Value = TypeVar("Value")


def import_training_extra(module: str) -> Any:
    """Import a module that only training needs.

    Raises:
        InputError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise InputError(
            f'{error.name} is not installed, training needs it; run: pip install "attnmap-core[train]"'
        ) from None


class LabelledImage(Protocol):
    """What the loaders read of a sample; :class:`attnmap_core.data.sources.Sample` has it all.

    ``boxes_xyxy``, ``mask``, ``ignore`` and ``image_id`` are read only where targets are asked for.
    """

    @property
    def image(self) -> Image.Image: ...
    @property
    def label(self) -> int: ...


class Samples(Protocol):
    """Any sequence of samples: a length and ``[i]``."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> LabelledImage: ...


class SampleStream(Protocol):
    """Samples that can only be read in order.

    ``dataset`` is a Hugging Face ``IterableDataset`` of undecoded rows (or anything with its ``shuffle(seed=,
    buffer_size=)`` and ``set_epoch``); ``to_sample(row, index)`` decodes one.
    """

    @property
    def dataset(self) -> Iterable[Mapping[str, Any]]: ...
    def to_sample(self, row: Any, index: int, /) -> LabelledImage: ...


class Order(Protocol):
    """Which images an epoch takes, one after the other, in place of a permutation: how sampling by class is done.

    The list is that of all processes together. It is cut as explained at the top of this module: each
    ``batch_size x processes`` consecutive images are a micro-batch. It must be the same wherever and however often it
    is asked for, so that resumed runs and all processes see the same; an image may come several times.

    Example:
        >>> class EvenOnly:
        ...     def __len__(self):
        ...         return 2
        ...     def __call__(self, epoch):
        ...         return [0, 2]
        >>> [[draw.index for draw in batch] for batch in TrainBatches(3, batch_size=2, order=EvenOnly())]
        [[0, 2]]
    """

    def __len__(self) -> int:
        """Images of an epoch; all have as many."""
        ...

    def __call__(self, epoch: int, /) -> Sequence[int]:
        """Their places in the data set, in order, in the 0-based epoch."""
        ...


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of a training step.

    Attributes:
        epoch: of its augmentation.
        index: of the image.
        weight: of its micro-batch.
        repeat: how often the image came before in this epoch; each time it is augmented differently.
    """

    epoch: int
    index: int
    weight: float = 1.0
    repeat: int = 0


# --- Datasets: a sample becomes tensors ---------------------------------------------------------------------


class SampleDataset(Dataset[Batch]):
    """Samples through a transform, with randomness that belongs to the sample.

    An index is an ``int`` (epoch 0) or a :class:`Draw`, which is how a batch sampler tells a worker the
    epoch.

    Args:
        data: sequence of samples with ``image`` (PIL) and ``label``.
        transform: PIL image to ``(3, h, w)`` float tensor; may draw from ``random``, ``numpy.random`` or
            ``torch``.
        seed: with the epoch and the index it seeds those three for one call of ``transform``; their states
            are put back afterwards.
        with_targets: also pass on ``boxes_xyxy``, ``size_wh``, ``mask``, ``ignore`` and ``image_id``, and the
            ``segmentation`` of samples that have one, for evaluation.
        with_segmentation: also give ``pixel_labels``, the segmentation of each sample taken through the transform with
            its image: for that, ``transform`` has ``with_segmentation``, as those of
            :mod:`~attnmap_core.data.transforms` have.

    Example:
        >>> from types import SimpleNamespace
        >>> data = [SimpleNamespace(image=Image.new("RGB", (8, 6)), label=4)]
        >>> items = SampleDataset(data, lambda image: torch.rand(1), seed=26)
        >>> torch.equal(items[Draw(epoch=1, index=0)]["image"], items[Draw(epoch=1, index=0)]["image"])
        True
        >>> torch.equal(items[Draw(epoch=1, index=0)]["image"], items[Draw(epoch=2, index=0)]["image"])
        False
    """

    def __init__(
        self,
        data: Samples,
        transform: Transform,
        seed: int = 26,
        *,
        with_targets: bool = False,
        with_segmentation: bool = False,
    ) -> None:
        self.data = data
        self.transform = transform
        self.seed = seed
        self.with_targets = with_targets
        self.with_segmentation = with_segmentation

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | Draw) -> Batch:
        draw = index if isinstance(index, Draw) else Draw(0, int(index))
        item = _to_item(
            self.data[draw.index],
            self.transform,
            (self.seed, draw.epoch, draw.index, *((draw.repeat,) if draw.repeat else ())),
            self.with_targets,
            self.with_segmentation,
        )
        return {**item, "index": draw.index, "weight": draw.weight}


class StreamDataset(Dataset[Batch]):
    """The streaming counterpart of :class:`SampleDataset`; the loaders below take either.

    The process reads the undecoded rows and its workers decode and transform them, so neither the number of
    workers nor a resume changes anything. Training shuffles through a buffer seeded by seed and epoch, and
    splits the stream among processes by shards where their number allows it. Resuming reads past the rows
    already seen.

    Args:
        data: see :class:`SampleStream`.
        transform, seed, with_targets, with_segmentation: as in :class:`SampleDataset`. The randomness of a
            sample is seeded by its ``image_id`` here: in a shuffled stream it has no index, and ``index`` is -1
            in training batches.
        shuffle_buffer: rows held for shuffling.
    """

    def __init__(
        self,
        data: SampleStream,
        transform: Transform,
        seed: int = 26,
        *,
        with_targets: bool = False,
        with_segmentation: bool = False,
        shuffle_buffer: int = 1000,
    ) -> None:
        self.data = data
        self.transform = transform
        self.seed = seed
        self.with_targets = with_targets
        self.with_segmentation = with_segmentation
        self.shuffle_buffer = shuffle_buffer

    def __getitem__(self, index: _Row) -> Batch:
        sample: Any = self.data.to_sample(index.row, index.position)
        item = _to_item(
            sample,
            self.transform,
            (self.seed, index.epoch, sample.image_id),
            self.with_targets,
            self.with_segmentation,
        )
        return {**item, "index": index.position, "weight": 1.0}


class _Row(NamedTuple):
    """One undecoded row of a stream on its way to a worker."""

    epoch: int
    position: int
    row: Mapping[str, Any]


def _to_item(
    sample: LabelledImage,
    transform: Transform,
    seed: Sequence[Any],
    with_targets: bool,
    with_segmentation: bool,
) -> Batch:
    full: Any = sample
    item: Batch = {"label": int(sample.label)}
    with _seeded(seed):
        if with_segmentation:
            both: Any = transform
            item["image"], item["pixel_labels"] = both.with_segmentation(full.image, full.segmentation)
        else:
            item["image"] = transform(sample.image)
    if with_targets:
        item["boxes_xyxy"] = np.asarray(full.boxes_xyxy, dtype=np.float64).reshape(-1, 4)
        item["size_wh"] = full.image.size
        item |= {name: getattr(full, name) for name in ("mask", "ignore", "image_id")}
        if getattr(full, "segmentation", None) is not None:
            item["segmentation"] = full.segmentation
    return item


def samples_of(
    data: Any,
    transform: Transform,
    *,
    seed: int,
    with_targets: bool = False,
    with_segmentation: bool = False,
) -> SampleDataset | StreamDataset:
    """The data set of an :class:`~attnmap_core.data.sources.ImageData`, whether it streams or not.

    Raises:
        InputError: if segmentations are asked for and the data have none.
    """
    if with_segmentation and data.segmentation is None:
        raise InputError(
            f"{data.name}: no class maps, which segmentation needs; give data that have them, such as ade20k:PATH"
        )
    kind = StreamDataset if data.streaming else SampleDataset
    return kind(data, transform, seed, with_targets=with_targets, with_segmentation=with_segmentation)


@contextmanager
def _seeded(parts: Sequence[Any]) -> Generator[None]:
    """Seed ``random``, ``numpy.random`` and CPU ``torch`` from ``parts``; put their states back after."""
    digest = hashlib.blake2b(repr(tuple(parts)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.random.set_rng_state(before[2])


def collate(items: Sequence[Batch]) -> Batch:
    """Stack items of :class:`SampleDataset` into one batch.

    Returns:
        ``images`` ``(b, 3, h, w)`` float, or where the transform gives several views a list of such; ``labels`` and
        ``index`` ``(b,)`` int64; ``weight``, the float explained at the top of this module; with segmentations,
        ``pixel_labels`` ``(b, h, w)`` int64, 255 where a pixel counts for nothing; and, with targets, lists of length
        ``b``: ``boxes_xyxy`` (``(k, 4)`` pixels of the photo), ``size_wh`` (the photo's), ``mask`` and ``ignore``
        (``(H, W)`` bool or None), ``image_id``, and ``segmentation`` (``(H, W)`` uint8 of the photo) where samples
        have one.

    Example:
        >>> items = [{"image": torch.zeros(3, 2, 2), "label": k, "index": k, "weight": 0.5} for k in (4, 7)]
        >>> batch = collate(items)
        >>> tuple(batch["images"].shape), batch["labels"].tolist(), batch["weight"]
        ((2, 3, 2, 2), [4, 7], 0.5)
    """
    images = [item["image"] for item in items]
    batch: Batch = {
        "images": torch.stack(images)
        if isinstance(images[0], Tensor)
        else list(map(torch.stack, zip(*images))),
        "labels": torch.tensor([item["label"] for item in items]),
        "index": torch.tensor([item["index"] for item in items]),
        "weight": float(items[0]["weight"]),
    }
    if "pixel_labels" in items[0]:
        batch["pixel_labels"] = torch.stack([item["pixel_labels"] for item in items])
    extra = [name for name in items[0] if name not in {"image", "label", "index", "weight", "pixel_labels"}]
    return batch | {name: [item[name] for item in items] for name in extra}


# --- Batch samplers: which images, for which process --------------------------------------------------------


class TrainBatches(Sampler[list[Draw]]):
    """Seeded micro-batches of one process, epoch after epoch.

    Args:
        length: images in the data set.
        batch_size: images per micro-batch **of one process**.
        processes, process: how many share the work, and which this is.
        accumulate: micro-batches per optimizer step.
        seed: of the permutations.
        drop_last: leave out the last step of an epoch where it is not full; by default it is kept.
        repeats: take each image so many times in a row (repeated augmentation, Hoffer et al. 2020), and that much
            fewer images an epoch.
        order: images of each epoch in place of a permutation of all, which is then not drawn.

    Raises:
        InputError: if there is no image, or with ``drop_last`` not enough for one step; for an ``order`` and
            ``repeats`` together.

    Example:
        >>> batches = TrainBatches(5, batch_size=2, seed=26)
        >>> batches.steps, [len(batch) for batch in batches]
        (3, [2, 2, 1])
        >>> batches.start_at(2)
        >>> [len(batch) for batch in batches]
        [1]
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        processes: int = 1,
        process: int = 0,
        accumulate: int = 1,
        seed: int = 26,
        drop_last: bool = False,
        repeats: int = 1,
        order: Order | None = None,
    ) -> None:
        if batch_size < 1 or accumulate < 1 or not 0 <= process < processes:
            raise ValueError(
                "batch_size and accumulate must be >= 1 and 0 <= process < processes, got "
                f"{batch_size=}, {accumulate=}, {process=}, {processes=}"
            )
        if order is not None and repeats > 1:
            raise InputError(
                f"repeated_augmentation {repeats}: the order of this run is chosen image by image; give 1"
            )
        self.order = order
        self.images = length
        self.length = length = len(order) if order is not None else length
        self.batch_size = batch_size
        self.processes = processes
        self.process = process
        self.accumulate = accumulate
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0
        self._start = 0
        self._step_size = batch_size * processes * accumulate
        self.steps = length // self._step_size if drop_last else -(-length // self._step_size)
        """Optimizer steps per epoch."""
        if self.steps == 0:
            raise InputError(
                f"{length} training images, a step takes at least {self._step_size if drop_last else 1} "
                "(batch size x processes x accumulated); give more data or a smaller batch size"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration (0-based)."""
        self.epoch = epoch

    def start_at(self, step: int) -> None:
        """Begin the next iteration, and only that one, at this optimizer step of the epoch."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"step must be in 0..{self.steps}, got {step}")
        self._start = step

    def micro_batches(self, step: int) -> int:
        """Micro-batches of an optimizer step: ``accumulate``, or fewer in a ragged last one."""
        images = min(self._step_size, self.length - step * self._step_size)
        return -(-images // (self.batch_size * self.processes))

    def __len__(self) -> int:
        return sum(map(self.micro_batches, range(self._start, self.steps)))

    def __iter__(self) -> Iterator[list[Draw]]:
        start, self._start = self._start, 0
        order, times = self._images_of_epoch()
        for step in range(start, self.steps):
            images = order[step * self._step_size : (step + 1) * self._step_size]
            for micro in range(self.micro_batches(step)):
                first = (micro * self.processes + self.process) * self.batch_size
                mine = images[first : first + self.batch_size]
                position = step * self._step_size + first
                weight = len(mine) * self.processes / len(images)
                # Every process must run every micro-batch (the gradients are averaged collectively), so one
                # that has nothing left repeats an image of the step without letting it count.
                if mine:
                    yield [
                        Draw(self.epoch, index, weight, times[place])
                        for place, index in enumerate(mine, start=position)
                    ]
                else:
                    yield [Draw(self.epoch, images[0], weight, times[step * self._step_size])]

    def _images_of_epoch(self) -> tuple[list[int], list[int]]:
        """Places in the data set, and how often each image came before."""
        if self.order is None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
            times = [place % self.repeats for place in range(self.length)]
            return order.repeat(self.repeats)[: self.length].tolist(), times
        order = [int(index) for index in self.order(self.epoch)]
        if len(order) != self.length or (order and not 0 <= min(order) <= max(order) < self.images):
            raise ValueError(
                f"an order must give {self.length} images an epoch, of 0..{self.images - 1}, got {len(order)} of "
                f"{min(order, default=0)}..{max(order, default=0)}"
            )
        before: Counter[int] = Counter()
        times: list[int] = []
        for index in order:
            times.append(before[index])
            before[index] += 1
        return order, times


class EvalBatches(Sampler[list[int]]):
    """Batches of one process for evaluation: batch ``k`` of the data goes to process ``k % processes``.

    Processes may get different numbers of batches, so the model must be called without its distributed
    wrapper.

    Example:
        >>> [list(EvalBatches(5, batch_size=2, processes=2, process=p)) for p in (0, 1)]
        [[[0, 1], [4]], [[2, 3]]]
    """

    def __init__(self, length: int, batch_size: int, *, processes: int = 1, process: int = 0) -> None:
        if batch_size < 1 or not 0 <= process < processes:
            raise ValueError(
                "batch_size must be >= 1 and 0 <= process < processes, got "
                f"{batch_size=}, {process=}, {processes=}"
            )
        self.length = length
        self.batch_size = batch_size
        self._firsts = range(process * batch_size, length, processes * batch_size)

    def __len__(self) -> int:
        return len(self._firsts)

    def __iter__(self) -> Iterator[list[int]]:
        for first in self._firsts:
            yield list(range(first, min(first + self.batch_size, self.length)))


class _StreamTrainBatches(Sampler[list[_Row]]):
    """Shuffled rows of one process; ``skip`` batches are passed over, but the last of them comes first."""

    def __init__(
        self, source: StreamDataset, batch_size: int, seed: int, processes: int, process: int
    ) -> None:
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.processes, self.process = processes, process
        self.epoch = 0
        self.skip = 0

    def __iter__(self) -> Iterator[list[_Row]]:
        source: Any = self.source.data.dataset
        dataset = source.shuffle(seed=self.seed, buffer_size=self.source.shuffle_buffer)
        dataset.set_epoch(self.epoch)
        if self.processes > 1:
            distributed = import_training_extra("datasets.distributed")
            dataset = distributed.split_dataset_by_node(dataset, rank=self.process, world_size=self.processes)
        rows = (_Row(self.epoch, -1, row) for row in dataset)
        batches = iter(lambda: list(islice(rows, self.batch_size)), [])
        passed = deque(islice(batches, self.skip), maxlen=1)
        yield from passed
        yield from batches


class _StreamEvalBatches(Sampler[list[_Row]]):
    """:class:`EvalBatches` for rows that can only be read in order."""

    def __init__(self, source: StreamDataset, batch_size: int, processes: int, process: int) -> None:
        self.source, self.batch_size, self.processes, self.process = source, batch_size, processes, process

    def __iter__(self) -> Iterator[list[_Row]]:
        rows = (_Row(0, position, row) for position, row in enumerate(self.source.data.dataset))
        batches = iter(lambda: list(islice(rows, self.batch_size)), [])
        yield from islice(batches, self.process, None, self.processes)


# --- Loaders ------------------------------------------------------------------------------------------------


def eval_loader(
    dataset: SampleDataset | StreamDataset,
    batch_size: int,
    *,
    processes: int = 1,
    process: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterable[Batch]:
    """Batches of one process, dealt as :class:`EvalBatches` says; streams are dealt the same way.

    Raises:
        InputError: while iterating, for an image that cannot be read, in one line also when a worker met it.
    """
    if isinstance(dataset, StreamDataset):
        return _Loader(
            dataset, _StreamEvalBatches(dataset, batch_size, processes, process), workers, pin_memory
        )
    batches = EvalBatches(len(dataset), batch_size, processes=processes, process=process)
    return _Loader(dataset, batches, workers, pin_memory)


class TrainSteps:
    """Optimizer steps of one process, each a list of micro-batches: what the training loop walks through.

    Args:
        dataset: samples or a stream of them.
        batch_size: images per micro-batch of one process.
        accumulate: micro-batches per optimizer step.
        seed: of the order.
        processes, process: how many share the work, and which this is.
        workers: loader processes, 0 to load in this one.
        drop_last, repeats, order: see :class:`TrainBatches`; a stream always keeps its last step, takes images once
            and knows no order.
        pin_memory: page-locked batches, for copies to a GPU.
        all_sum: sum of an integer over the processes. Only streams ask for it: how many images a step has is
            known there only when it is drawn, and it makes the weights exact at any end of the shards.
    """

    def __init__(
        self,
        dataset: SampleDataset | StreamDataset,
        batch_size: int,
        *,
        accumulate: int = 1,
        seed: int = 26,
        processes: int = 1,
        process: int = 0,
        workers: int = 0,
        drop_last: bool = False,
        repeats: int = 1,
        order: Order | None = None,
        pin_memory: bool = False,
        all_sum: Callable[[int], int] = int,
    ) -> None:
        self._processes = processes
        self._accumulate = accumulate
        self._all_sum = all_sum
        self._batches: TrainBatches | _StreamTrainBatches
        if isinstance(dataset, StreamDataset):
            if repeats > 1:
                raise InputError(f"repeated_augmentation {repeats}: a stream takes each image once; give 1")
            if order is not None:
                raise InputError(
                    "a stream cannot choose its images by class; load the data without streaming"
                )
            self.images: int | None = None
            """Images in the data set; None for a stream."""
            self.steps: int | None = None
            """Optimizer steps per epoch; None for a stream."""
            self._batches = _StreamTrainBatches(dataset, batch_size, seed, processes, process)
        else:
            self._batches = TrainBatches(
                len(dataset),
                batch_size,
                processes=processes,
                process=process,
                accumulate=accumulate,
                seed=seed,
                drop_last=drop_last,
                repeats=repeats,
                order=order,
            )
            self.images, self.steps = len(dataset), self._batches.steps
        self._loader = _Loader(dataset, self._batches, workers, pin_memory)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Step]:
        """The steps of a 0-based epoch, from step ``start`` on."""
        if isinstance(self._batches, TrainBatches):
            return self._indexed_steps(self._batches, epoch, start)
        return self._stream_steps(self._batches, epoch, start)

    def _indexed_steps(self, batches: TrainBatches, epoch: int, start: int) -> Iterator[Step]:
        batches.set_epoch(epoch)
        batches.start_at(start)
        loaded = iter(self._loader)
        for step in range(start, batches.steps):
            yield list(islice(loaded, batches.micro_batches(step)))

    def _stream_steps(self, batches: _StreamTrainBatches, epoch: int, start: int) -> Iterator[Step]:
        batches.epoch, batches.skip = epoch, start * self._accumulate
        loaded = iter(self._loader)
        last = next(loaded, None) if start else None
        while True:
            step = list(islice(loaded, self._accumulate))
            images = self._all_sum(sum(len(batch["labels"]) for batch in step))
            if images == 0:
                return
            for batch in step:
                batch["weight"] = len(batch["labels"]) * self._processes / images
            if step:
                last = step[-1]
            elif last is not None:
                # The shards of this process ended before the others': take part without counting.
                step = [_first_of(last) | {"weight": 0.0}]
            else:
                raise InputError("the data stream has no image for one of the processes; launch fewer")
            yield step


def _first_of(batch: Batch) -> Batch:
    """The first sample of a batch, as a batch."""
    views = batch["images"]
    first: Batch = {name: value[:1] for name, value in batch.items() if name not in ("images", "weight")}
    return first | {"images": [view[:1] for view in views] if isinstance(views, list) else views[:1]}


class _Loader:
    """A ``DataLoader`` that draws nothing from the global generator and whose input errors stay one line."""

    def __init__(
        self, dataset: Dataset[Batch], batches: Sampler[Any], workers: int, pin_memory: bool
    ) -> None:
        # A loader draws a base seed for its workers whenever an iteration starts; from the global generator
        # that draw would shift every later dropout mask of a resumed run.
        self._loader: DataLoader[Batch] = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._loader
        except InputError as error:
            # One met in a worker arrives with the worker's traceback in its message.
            raise InputError(str(error).rsplit("InputError: ", 1)[-1].strip()) from None


# --- Gathering back -----------------------------------------------------------------------------------------


def gather_objects(accelerator: Accelerator | PartialState | None, value: Value) -> list[Value]:
    """One value of each process, on every process, in process order; for small states.

    Args:
        accelerator: None means a single process.
        value: anything that can be pickled.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return [value]
    return import_training_extra("accelerate.utils").gather_object([value])


def gather_samples(
    accelerator: Accelerator | None, rows: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Put per-sample values of all processes together, as one process would have them.

    Args:
        accelerator: None means a single process.
        rows: arrays with one row per sample, all of the same length; ``"index"`` says which sample a row
            belongs to. Processes may have different numbers of rows; one without any gives an empty mapping.

    Returns:
        The same names, rows in order of ``index``, each index once, equal on every process.

    Raises:
        ValueError: if ``"index"`` is missing, lengths differ, or processes disagree about the names.

    Example:
        >>> rows = {"index": np.array([2, 0, 2]), "correct": np.array([True, False, True])}
        >>> gather_samples(None, rows)["correct"].tolist()
        [False, True]
    """
    lengths = {name: len(values) for name, values in rows.items()}
    if rows and ("index" not in rows or len(set(lengths.values())) != 1):
        raise ValueError(f'expected "index" and arrays of one length, got lengths {lengths}')
    parts = [part for part in gather_objects(accelerator, dict(rows)) if part]
    if len({frozenset(part) for part in parts}) > 1:
        raise ValueError(f"processes gave different names: {[sorted(part) for part in parts]}")
    if not parts:
        return {}
    together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _, first = np.unique(together["index"], return_index=True)
    return {name: values[first] for name, values in together.items()}
