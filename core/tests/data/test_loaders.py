"""Order, weights and randomness belong to the data and the step, not to workers, processes or resumes."""

from __future__ import annotations

import random
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attnmap_core.data.loaders import (
    Draw,
    EvalBatches,
    SampleDataset,
    StreamDataset,
    TrainBatches,
    TrainSteps,
    collate,
    eval_loader,
    gather_objects,
    gather_samples,
    import_training_extra,
    samples_of,
)
from attnmap_core.data.transforms import Preprocessing, train_transform
from attnmap_core.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


class Photos:
    """Photo ``i`` has the gray value ``i`` and label ``i % 3``."""

    def __init__(self, length: int, broken: int | None = None) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> SimpleNamespace:
        if i == self.broken:
            raise InputError(f"photos/{i}.jpg: truncated, expected a whole JPEG; delete it")
        image = Image.new("RGB", (5, 4), (i, i, i))
        boxes = np.full((i % 3, 4), float(i))
        mask = np.ones((4, 5), bool) if i % 2 else None
        return SimpleNamespace(
            image=image, label=i % 3, index=i, image_id=f"{i}.jpg", boxes_xyxy=boxes, mask=mask, ignore=None
        )


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def noisy(image: Image.Image) -> torch.Tensor:
    """Uses all three generators."""
    return to_tensor(image) + random.random() + np.random.random() + torch.rand(3, 4, 5)  # noqa: NPY002


def flat(lists) -> list:
    return list(chain.from_iterable(lists))


def epoch_of(steps: TrainSteps, epoch: int = 0, start: int = 0) -> list:
    return list(steps.epoch(epoch, start))


def assert_equal_steps(a: list, b: list) -> None:
    assert [len(step) for step in a] == [len(step) for step in b]
    for ours, theirs in zip(flat(a), flat(b)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


# --- Randomness of a sample ---------------------------------------------------------------------------------


def test_augmentation_belongs_to_seed_epoch_and_index():
    data = SampleDataset(Photos(4), noisy, seed=5)
    first = data[Draw(epoch=1, index=2)]["image"]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)  # noqa: NPY002
    assert torch.equal(first, data[Draw(epoch=1, index=2)]["image"])
    others = [data[Draw(2, 2)]["image"], data[Draw(1, 1)]["image"] + 1]
    others.append(SampleDataset(Photos(4), noisy, seed=6)[Draw(1, 2)]["image"])
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(data[3]["image"], data[Draw(epoch=0, index=3)]["image"])


def test_augmentation_leaves_the_generators_as_they_were():
    def after(use) -> tuple:
        random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
        use()
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    data = SampleDataset(Photos(9), noisy)
    assert after(lambda: data[0]) == after(lambda: None)
    assert after(lambda: epoch_of(TrainSteps(data, 2))) == after(lambda: None)
    assert after(lambda: list(eval_loader(data, 2))) == after(lambda: None)


@pytest.mark.multiprocess
def test_workers_change_nothing():
    data = SampleDataset(Photos(7), noisy)
    alone, helped = TrainSteps(data, 2, accumulate=2), TrainSteps(data, 2, accumulate=2, workers=2)
    for epoch in (0, 1):
        assert_equal_steps(epoch_of(alone, epoch), epoch_of(helped, epoch))
    assert_equal_steps(epoch_of(alone, 1, start=1), epoch_of(helped, 1, start=1))
    assert_equal_steps([list(eval_loader(data, 3))], [list(eval_loader(data, 3, workers=2))])


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_photo_is_one_line(workers):
    data = SampleDataset(Photos(7, broken=4), to_tensor)
    with pytest.raises(InputError) as caught:
        list(eval_loader(data, 2, workers=workers))
    assert str(caught.value) == "photos/4.jpg: truncated, expected a whole JPEG; delete it"


def test_targets_pass_through_as_lists():
    [batch] = eval_loader(SampleDataset(Photos(3), to_tensor, with_targets=True), 3)
    assert [boxes.shape for boxes in batch["boxes_xyxy"]] == [(0, 4), (1, 4), (2, 4)]
    assert batch["boxes_xyxy"][2].dtype == np.float64
    assert batch["size_wh"] == [(5, 4)] * 3
    assert batch["image_id"] == ["0.jpg", "1.jpg", "2.jpg"]
    assert batch["mask"][0] is None
    assert batch["mask"][1].shape == (4, 5)
    assert batch["ignore"] == [None] * 3
    assert "mask" not in collate([SampleDataset(Photos(1), to_tensor)[0]])


# --- Training order and weights -----------------------------------------------------------------------------

LAUNCHES = {
    "length": st.integers(1, 40),
    "batch": st.integers(1, 5),
    "processes": st.integers(1, 4),
    "accumulate": st.integers(1, 4),
}


@given(**LAUNCHES)
@settings(max_examples=150, deadline=None)
def test_weights_make_each_step_the_mean_over_its_images(length, batch, processes, accumulate):
    """Every image counts once an epoch, and as much as any other of its step."""
    dealt = [
        TrainBatches(length, batch, processes=processes, process=p, accumulate=accumulate)
        for p in range(processes)
    ]
    one = TrainBatches(length, batch * processes * accumulate)
    micro_batches = [iter(sampler) for sampler in dealt]
    for step, [*images] in enumerate(one):
        share = dict.fromkeys((draw.index for draw in images), 0.0)
        for _ in range(dealt[0].micro_batches(step)):
            drawn = [next(batches) for batches in micro_batches]
            assert all(drawn)  # every process takes part, or the others would wait for it for ever
            for mine in drawn:
                for draw in mine:  # mean over the micro-batch, times weight, mean over the processes
                    share[draw.index] += draw.weight / len(mine) / processes
        assert list(share.values()) == pytest.approx([1 / len(images)] * len(images))
    assert [next(batches, None) for batches in micro_batches] == [None] * processes


@given(**LAUNCHES, start=st.integers(0, 5), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_start_at_continues_the_epoch(length, batch, processes, accumulate, start, epoch):
    sampler = TrainBatches(length, batch, processes=processes, accumulate=accumulate)
    sampler.set_epoch(epoch)
    whole, start = list(sampler), min(start, sampler.steps)
    assert len(sampler) == len(whole)
    sampler.start_at(start)
    assert len(sampler) == len(whole[start * accumulate :])
    assert list(sampler) == whole[start * accumulate :]
    assert list(sampler) == whole  # once only


def test_order_changes_with_epoch_and_seed():
    def order(epoch: int, seed: int) -> list[int]:
        sampler = TrainBatches(50, 50, seed=seed)
        sampler.set_epoch(epoch)
        return [draw.index for draw in next(iter(sampler))]

    assert sorted(order(0, 1)) == list(range(50))
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(epoch, seed)) for epoch in (0, 1) for seed in (1, 2)}) == 4


def test_processes_share_one_global_batch_in_order():
    pieces = [list(TrainBatches(20, 2, processes=2, process=p)) for p in (0, 1)]
    together = [a + b for a, b in zip(*pieces)]
    assert together == list(TrainBatches(20, 4))


def test_last_step_is_kept_or_dropped():
    assert [len(batch) for batch in TrainBatches(7, 3)] == [3, 3, 1]
    assert [len(batch) for batch in TrainBatches(7, 3, drop_last=True)] == [3, 3]
    with pytest.raises(InputError, match="5 training images, a step takes at least 6"):
        TrainBatches(5, 3, accumulate=2, drop_last=True)
    with pytest.raises(InputError, match="0 training images"):
        TrainBatches(0, 3)


@pytest.mark.parametrize("options", [{"processes": 2, "process": 2}, {"accumulate": 0}])
def test_impossible_launch_is_a_programming_error(options):
    with pytest.raises(ValueError, match="process"):
        TrainBatches(5, 1, **options)


def test_eval_batches_are_composed_as_in_one_process():
    alone = list(EvalBatches(11, 3))
    assert flat(alone) == list(range(11))
    for processes in (2, 3, 5):
        dealt = [list(EvalBatches(11, 3, processes=processes, process=p)) for p in range(processes)]
        assert sorted(flat(dealt)) == alone
        assert [len(EvalBatches(11, 3, processes=processes, process=p)) for p in range(processes)] == [
            len(batches) for batches in dealt
        ]


# --- Streams ------------------------------------------------------------------------------------------------


def stream(length: int, shards: int, transform=noisy, **options) -> StreamDataset:
    datasets = pytest.importorskip("datasets")
    photos = Photos(length)

    def rows(shard):
        for first in shard:
            yield from ({"i": i} for i in range(first, length, shards))

    dataset = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shard": list(range(shards))})
    source = SimpleNamespace(dataset=dataset, to_sample=lambda row, index: photos[row["i"]])
    return StreamDataset(source, transform, shuffle_buffer=4, **options)


def shades(batch: dict) -> list[int]:
    """Which photos a batch of untransformed ones holds."""
    return batch["images"][:, 0, 0, 0].int().tolist()


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_of_one_process(workers):
    steps = TrainSteps(stream(11, 3), 2, accumulate=2, workers=workers)
    assert steps.steps is None
    first, again, second = epoch_of(steps), epoch_of(steps), epoch_of(steps, 1)
    assert_equal_steps(first, again)
    assert not all(torch.equal(a["images"], b["images"]) for a, b in zip(flat(first), flat(second)))
    assert [[len(batch["labels"]) for batch in step] for step in first] == [[2, 2], [2, 2], [2, 1]]
    assert [[batch["weight"] for batch in step] for step in first][2] == pytest.approx([2 / 3, 1 / 3])
    for start in range(4):
        assert_equal_steps(epoch_of(steps, 0, start), first[start:])
    assert_equal_steps(first, epoch_of(TrainSteps(stream(11, 3), 2, accumulate=2)))


def test_stream_shows_every_photo_once_an_epoch():
    steps = TrainSteps(stream(11, 3, to_tensor), 3)
    orders = [[i for [batch] in epoch_of(steps, epoch) for i in shades(batch)] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(11))
    assert orders[0] != orders[1]
    assert orders[0] != list(range(11))


@pytest.mark.parametrize(("length", "shards"), [(11, 2), (11, 3), (4, 1), (5, 2)])
def test_stream_split_among_processes(length, shards):
    """Whole shards each where they can be dealt evenly, every second row otherwise: weights stay exact."""
    counts: list[list[int]] = [[], []]

    def run(process: int, all_sum) -> list:
        data = stream(length, shards, to_tensor)
        return epoch_of(TrainSteps(data, 2, accumulate=2, processes=2, process=process, all_sum=all_sum))

    # What the processes tell each other, collected first and then played back to both.
    for process in (0, 1):
        run(process, lambda n, process=process: counts[process].append(n) or n)
    most = max(map(len, counts))
    totals = [sum(column) for column in zip(*(c + [0] * (most - len(c)) for c in counts))]
    dealt = []
    for process in (0, 1):
        told = iter([*totals, 0])
        dealt.append(run(process, lambda n, told=told: next(told)))
    assert len(dealt[0]) == len(dealt[1])
    seen: list[int] = []
    for steps in zip(*dealt):
        share: dict[int, float] = {}
        for batch in flat(steps):
            for i in shades(batch):
                share[i] = share.get(i, 0) + batch["weight"] / len(batch["labels"]) / 2
        counted = {i: s for i, s in share.items() if s > 0}
        assert list(counted.values()) == pytest.approx([1 / len(counted)] * len(counted))
        seen += counted
    assert sorted(seen) == list(range(length))


def test_stream_resumes_where_the_shards_of_a_process_have_ended():
    lengths = iter([6, 4, 2, 0])  # another process goes on for longer than this one
    whole = epoch_of(TrainSteps(stream(2, 1), 2, processes=1, all_sum=lambda n: next(lengths)))
    assert [step[0]["weight"] for step in whole] == [1 / 3, 0.0, 0.0]
    lengths = iter([2, 0])
    rest = epoch_of(TrainSteps(stream(2, 1), 2, processes=1, all_sum=lambda n: next(lengths)), start=2)
    assert_equal_steps(rest, whole[2:])


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_evaluation_is_dealt_in_batches(workers):
    data = stream(11, 1, to_tensor, with_targets=True)
    alone = list(eval_loader(data, 3))
    assert [batch["index"].tolist() for batch in alone] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    dealt = [list(eval_loader(data, 3, processes=2, process=p, workers=workers)) for p in (0, 1)]
    assert [batch["image_id"] for batch in dealt[0]] == [alone[0]["image_id"], alone[2]["image_id"]]
    assert [batch["index"].tolist() for batch in dealt[1]] == [[3, 4, 5], [9, 10]]


# --- Gathering ----------------------------------------------------------------------------------------------


class Processes:
    """Stands for several processes: what each of them gives is known beforehand."""

    def __init__(self, monkeypatch, *values) -> None:
        self.num_processes = len(values)
        utils = SimpleNamespace(gather_object=lambda own: list(values))
        monkeypatch.setattr("attnmap_core.data.loaders.import_training_extra", lambda name: utils)


def test_gathered_rows_are_in_order_and_once(monkeypatch):
    parts = [
        {"index": np.array([4, 0, 1]), "score": np.array([0.4, 0.0, 0.1]), "id": np.array(["e", "a", "b"])},
        {},  # a process without any batch
        {"index": np.array([3, 2, 0]), "score": np.array([0.3, 0.2, 0.0]), "id": np.array(["d", "c", "a"])},
    ]
    rows = gather_samples(Processes(monkeypatch, *parts), parts[0])
    assert rows["index"].tolist() == [0, 1, 2, 3, 4]
    assert rows["score"].tolist() == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert "".join(rows["id"]) == "abcde"


def test_gathering_refuses_rows_that_do_not_fit(monkeypatch):
    with pytest.raises(ValueError, match=r"lengths \{'index': 2, 'a': 1\}"):
        gather_samples(None, {"index": np.arange(2), "a": np.arange(1)})
    with pytest.raises(ValueError, match='expected "index"'):
        gather_samples(None, {"a": np.arange(1)})
    parts = [{"index": np.arange(1)}, {"index": np.arange(1), "a": np.arange(1)}]
    with pytest.raises(ValueError, match="different names"):
        gather_samples(Processes(monkeypatch, *parts), parts[0])
    assert gather_samples(None, {}) == {}


def test_gather_objects_of_one_process():
    assert gather_objects(None, {"a": 1}) == [{"a": 1}]


def test_missing_extra_names_its_command():
    with pytest.raises(InputError, match=r'not_there is not installed.*pip install "attnmap-core\[train\]"'):
        import_training_extra("not_there.part")


# --- Class maps ---------------------------------------------------------------------------------------------


class Scenes(Photos):
    """Photos whose class map holds their number."""

    streaming = False
    segmentation = "some"

    def __getitem__(self, i: int) -> SimpleNamespace:
        sample = super().__getitem__(i)
        sample.segmentation = np.full((4, 5), i, np.uint8)
        return sample


def test_class_maps_go_through_the_transform_and_beside_it():
    resize = train_transform(Preprocessing(size=(6, 7)))
    both = SampleDataset(Scenes(5), resize, seed=3, with_targets=True, with_segmentation=True)
    [batch] = eval_loader(both, 5)
    assert (batch["pixel_labels"].dtype, batch["pixel_labels"].shape) == (torch.int64, (5, 6, 7))
    assert batch["pixel_labels"][:, 0, 0].tolist() == list(range(5))
    assert [classes.shape for classes in batch["segmentation"]] == [(4, 5)] * 5
    [plain] = eval_loader(SampleDataset(Scenes(5), resize, seed=3), 5)
    assert torch.equal(plain["images"], batch["images"])
    assert not {"pixel_labels", "segmentation"} & set(plain)


@pytest.mark.multiprocess
def test_class_maps_from_workers_and_in_training_steps():
    data = samples_of(Scenes(7), train_transform(Preprocessing(size=(6, 7))), seed=1, with_segmentation=True)
    alone, helped = (TrainSteps(data, 2, accumulate=2, workers=workers) for workers in (0, 2))
    assert_equal_steps(epoch_of(alone), epoch_of(helped))
    assert flat(epoch_of(alone))[0]["pixel_labels"].shape == (2, 6, 7)


def test_data_without_class_maps_are_refused():
    data = Scenes(2)
    data.segmentation, data.name = None, "folder:photos"
    with pytest.raises(InputError, match="folder:photos: no class maps"):
        samples_of(data, to_tensor, seed=0, with_segmentation=True)


def test_repeated_augmentation_draws_each_image_in_a_row_and_anew():
    draws = [draw for batch in TrainBatches(10, 4, repeats=3) for draw in batch]
    assert len(draws) == 10
    assert [draw.repeat for draw in draws] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    images = [draw.index for draw in draws]
    assert images[0] == images[1] == images[2] != images[3]
    pieces = [list(TrainBatches(10, 2, processes=2, process=p, repeats=3)) for p in (0, 1)]
    assert [draw for a, b in zip(*pieces) for draw in a + b][:8] == draws[:8]
    data = SampleDataset(Photos(3), noisy)
    first, second = (data[Draw(1, 0, 1.0, repeat)]["image"] for repeat in (0, 1))
    assert torch.equal(first, data[Draw(1, 0)]["image"])
    assert not torch.equal(first, second)


def test_several_views_are_stacked_one_by_one():
    def views(image):
        return [torch.zeros(3, 4, 4), torch.ones(3, 2, 2)]

    [batch] = list(eval_loader(SampleDataset(Photos(3), views), 4))
    assert [tuple(view.shape) for view in batch["images"]] == [(3, 3, 4, 4), (3, 3, 2, 2)]
    assert batch["labels"].shape == (3,)


# --- An order in place of a permutation -------------------------------------------------------------------------


class Drawn:
    """``length`` places of ``range(11)`` with repeats, by the epoch."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __call__(self, epoch: int) -> list[int]:
        return np.random.default_rng(epoch).integers(0, 11, self.length).tolist()


def test_order_decides_what_an_epoch_takes_and_repeats_are_counted():
    batches = TrainBatches(11, 4, order=Drawn(20))
    assert batches.steps == 5
    for epoch in (0, 3):
        batches.set_epoch(epoch)
        draws = flat(batches)
        assert [draw.index for draw in draws] == Drawn(20)(epoch)
        for place, draw in enumerate(draws):
            before = [other.index for other in draws[:place]]
            assert draw.repeat == before.count(draw.index)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 5),
    processes=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    start=st.integers(0, 5),
)
def test_order_is_cut_among_processes_and_resumed_like_a_permutation(
    length, batch, processes, accumulate, start
):
    wanted = Drawn(length)(2)
    own = []
    for process in range(processes):
        options = {"processes": processes, "process": process, "accumulate": accumulate}
        batches = TrainBatches(11, batch, order=Drawn(length), **options)
        batches.set_epoch(2)
        whole = list(batches)
        own.append(whole)
        start = min(start, batches.steps)
        batches.start_at(start)
        skipped = sum(batches.micro_batches(step) for step in range(start))
        assert list(batches) == whole[skipped:]
    together = [draw.index for micro in zip(*own) for part in micro for draw in part if draw.weight > 0]
    assert together == wanted


def test_order_reaches_the_steps_and_other_orders_are_refused():
    photos = SampleDataset(Photos(11), noisy)
    steps = epoch_of(TrainSteps(photos, 4, order=Drawn(8)), epoch=1)
    assert [batch["index"].tolist() for [batch] in steps] == [Drawn(8)(1)[:4], Drawn(8)(1)[4:]]
    twice = TrainSteps(SampleDataset(Photos(1), noisy), 2, order=Always(0, 0))
    [[batch]] = epoch_of(twice)
    assert not torch.equal(*batch["images"])  # one image twice, augmented anew
    with pytest.raises(InputError, match="give 1"):
        TrainSteps(photos, 4, order=Drawn(8), repeats=2)
    with pytest.raises(InputError, match="stream cannot choose"):
        TrainSteps(stream(6, 2), 2, order=Drawn(8))
    with pytest.raises(ValueError, match=r"2 images an epoch, of 0..10, got 2 of 0..11"):
        epoch_of(TrainSteps(photos, 4, order=Always(0, 11)))


class Always:
    """The same places in every epoch."""

    def __init__(self, *places: int) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __call__(self, epoch: int) -> list[int]:
        return list(self.places)
