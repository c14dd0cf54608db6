"""The training module and its task: the loss of a step, repeated images, saving, and two processes as one."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attnmap_core.data.loaders import SampleDataset
from attnmap_core.errors import InputError
from attnmap_core.metrics import recall_at_k
from attnmap_core.training import TrainConfig, train
from crossattn_dml import EmbeddingModel
from crossattn_dml.losses import multi_similarity
from crossattn_dml.task import STACK_FILE, ConditionalTraining, MetricTask, load_stack
from torch import Tensor, nn

TINY = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
STACK = {"blocks": 2, "heads": 2, "init": "xavier"}


def make(stack=STACK, loss=None, **options) -> ConditionalTraining:
    torch.manual_seed(0)
    model = EmbeddingModel("vit", 8, 16, backbone_options=TINY)
    return ConditionalTraining(model, stack, loss, **options).double()


def batch(b: int = 8, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(b, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"images": images, "labels": torch.arange(b) // 2 % 3, "index": torch.arange(b)}


def test_loss_of_a_step():
    training, given = make(), batch()
    parts = MetricTask(weight=0.5)(training, given)
    embeddings, tokens, _ = training.model(given["images"])
    S = training.stack(embeddings, tokens, levels=(0, 2))
    each = [multi_similarity(S[n], given["labels"]).item() for n in (0, 2)]
    assert parts["unconditional"].item() == pytest.approx(each[0])
    assert parts["conditional"].item() == pytest.approx(each[1])
    assert parts["loss"].item() == pytest.approx(each[0] + 0.5 * each[1])
    assert parts["weight"] == 0.5
    assert parts["pairs"] == 4 * 3 + 2 * 1 + 2 * 1  # classes of 4, 2 and 2 images
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in training.parameters())


def test_baseline_has_no_stack():
    training = make(stack=None)
    parts = MetricTask()(training, batch())
    assert parts["conditional"] == 0
    assert parts["loss"] == parts["unconditional"]
    assert not any(name.startswith("stack") for name, _ in training.named_parameters())


def test_at_first_the_loss_is_a_multiple_of_the_baseline():
    parts = MetricTask(weight=0.7)(make(stack={"blocks": 3, "heads": 2}), batch())
    assert parts["loss"].item() == pytest.approx(1.7 * parts["unconditional"].item(), rel=1e-10)


def test_two_views_of_an_image_make_no_pair():
    training, given = make(), batch(6)
    twice = {name: torch.cat([values, values[:2]]) for name, values in given.items()}
    S = training.stack(*training.model(twice["images"])[:2], levels=(0,))[0]
    present = twice["index"][:, None] != twice["index"][None]
    expected = multi_similarity(S, twice["labels"], present).item()
    parts = training(**twice)
    assert parts["unconditional"].item() == pytest.approx(expected)
    unknown = twice | {"index": torch.full((8,), -1)}
    assert training(**unknown)["unconditional"].item() == pytest.approx(
        multi_similarity(S, twice["labels"]).item()
    )
    assert training(twice["images"], twice["labels"])["pairs"] > parts["pairs"]


@pytest.mark.parametrize("tile", [None, 3])
def test_mined_pairs_do_not_change_level_0(tile):
    given = batch(10)
    whole, mined = make(), make({**STACK, "tile": tile}, mined=True)
    assert mined(**given)["unconditional"].item() == pytest.approx(
        whole(**given)["unconditional"].item(), rel=1e-10
    )
    parts = mined(**given)
    parts["loss"].backward()
    assert torch.isfinite(parts["loss"])
    assert all(torch.isfinite(p.grad).all() for p in mined.parameters())
    with pytest.raises(InputError, match="mined True: expected loss multi_similarity"):
        make(loss={"loss": "triplet"}, mined=True)


@pytest.mark.parametrize(
    "loss",
    ["multi_similarity", "triplet", "margin", "contrastive", "nt_xent", "proxy_anchor", "normalised_softmax"],
)
def test_every_loss_trains(loss):
    training = make(loss={"loss": loss, "num_classes": 3, "supervise": "all"})
    optimizer = torch.optim.AdamW(training.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        torch.manual_seed(0)
        parts = MetricTask()(training, batch())
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        values.append(parts["loss"].item())
    assert np.isfinite(values).all()
    assert values[-1] < values[0]


def test_ramp_of_the_weight():
    task = MetricTask(weight=2.0, warmup_epochs=4)
    seen = []
    for epoch in range(6):
        task.begin_epoch(epoch)
        seen.append(task.current_weight)
    assert seen == [0, 0.5, 1, 1.5, 2, 2]
    with pytest.raises(InputError, match=r"weight -1\.0"):
        MetricTask(-1.0)


def test_saved_model_needs_no_stack_and_the_stack_comes_back(tmp_path):
    training = make({**STACK, "hierarchy": "running", "similarity": "target"}).float()
    training.save(tmp_path / "model")
    model = EmbeddingModel.from_pretrained(tmp_path / "model")
    assert not any("stack" in name for name, _ in model.named_parameters())
    stack = load_stack(model, tmp_path / "model")
    images = batch()["images"].float()
    with torch.no_grad():
        expected = training.eval().stack(*training.model(images)[:2])[2]
        assert torch.equal(stack(*model(images)[:2])[2], expected)
    other = EmbeddingModel("vit", 4, 16, backbone_options=TINY)
    with pytest.raises(InputError, match=r"not a stack of this model \(other shape"):
        load_stack(other, tmp_path / "model")
    (tmp_path / "model" / STACK_FILE).write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged, or no stack"):
        load_stack(model, tmp_path / "model")
    (tmp_path / "model" / STACK_FILE).unlink()
    with pytest.raises(InputError, match="no such file"):
        load_stack(model, tmp_path / "model")


class Colours:
    """Classes of colour pairs; the first half of the data trains, the second has other pairs."""

    def __init__(self, classes: list[tuple[int, int]], each: int, seed: int) -> None:
        self.classes, self.each, self.seed = classes, each, seed

    def __len__(self) -> int:
        return len(self.classes) * self.each

    def __getitem__(self, index: int):
        from types import SimpleNamespace

        label = index % len(self.classes)
        rng = np.random.default_rng([self.seed, index])
        pixels = rng.normal(0, 0.3, (16, 16, 3))
        for part in self.classes[label]:  # each part at a place of its own
            y, x = 8 * rng.integers(0, 2, 2)
            pixels[y : y + 8, x : x + 8] += np.eye(3)[part % 3] * (2 if part < 3 else -2)
        return SimpleNamespace(image=pixels, label=label)


def to_tensor(pixels) -> Tensor:
    return torch.from_numpy(np.asarray(pixels)).float().permute(2, 0, 1)


def test_core_trains_it(tmp_path):
    """A run of core's loop: the loss falls, and unseen classes are found far better than by chance."""
    train_data = Colours([(0, 1), (2, 3), (4, 5), (0, 3), (1, 4), (2, 5)], 8, 0)
    unseen = Colours([(0, 2), (1, 3), (3, 5), (2, 4)], 8, 1)
    training = make({"blocks": 1, "heads": 2}).float()
    config = TrainConfig(
        epochs=8, batch_size=24, lr=2e-3, workers=0, lr_scales={"stack.*": 3.0}, output_dir=tmp_path / "run"
    )
    result = train(
        MetricTask(), training, SampleDataset(train_data, to_tensor), config, tmp_path / "run",
        save_model=lambda module, folder: module.save(folder),
    )  # fmt: skip
    losses = [record["loss"] for record in result.history if record["kind"] == "epoch"]
    assert losses[-1] < 0.9 * losses[0]
    model = EmbeddingModel.from_pretrained(tmp_path / "run/model")
    images = torch.stack([to_tensor(unseen[k].image) for k in range(len(unseen))])
    with torch.no_grad():
        z = model(images).embeddings
    assert recall_at_k(z, [unseen[k].label for k in range(len(unseen))]) > 0.5  # chance: 7 of 31
    assert (tmp_path / "run/model" / STACK_FILE).is_file()


# --- Two processes --------------------------------------------------------------------------------------------

CASES = {
    "pairs": {"stack": STACK},
    "tiles": {"stack": {**STACK, "tile": 2, "similarity": "anchor", "hierarchy": "running"}},
    "mined": {"stack": STACK, "mined": True},
    "baseline": {"stack": None},
    "triplet": {"stack": STACK, "loss": {"loss": "contrastive", "supervise": "all"}},
}


def gradients(training: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in training.named_parameters()}


def one_of_two(rank: int, folder: str) -> None:
    """What each of the processes below runs: 8 images, 5 in the first process and 3 in the second."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, options in CASES.items():
        wrapped = nn.parallel.DistributedDataParallel(make(**options, gather=True))
        mine = {key: values[:5] if rank == 0 else values[5:] for key, values in batch().items()}
        parts = MetricTask()(wrapped, mine)
        parts["loss"].backward()
        found[name] = ({key: value.item() for key, value in parts.items()}, gradients(wrapped))
    # A process that only keeps step: its images do not count, nor does its loss.
    wrapped = nn.parallel.DistributedDataParallel(make(gather=True))
    given = batch() if rank == 0 else {key: values[:1] for key, values in batch(seed=9).items()}
    weight = 2.0 if rank == 0 else 0.0
    parts = MetricTask()(wrapped, given | {"weight": weight})
    (parts["loss"] * weight).backward()
    found["idle"] = ({key: value.item() for key, value in parts.items()}, gradients(wrapped))
    # Drawn triplets and partners are the same everywhere.
    for loss in ("margin", "proxy_anchor"):
        torch.manual_seed(rank)
        wrapped = make(gather=True, loss={"loss": loss, "num_classes": 3}, partners=2)
        torch.manual_seed(10 + rank)
        parts = MetricTask()(wrapped, mine)
        found[loss] = ({key: value.item() for key, value in parts.items()}, {})
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_equal_one(tmp_path):
    code = (
        f"import runpy, sys; runpy.run_path({__file__!r})['one_of_two'](int(sys.argv[1]), {str(tmp_path)!r})"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    found = [torch.load(Path(tmp_path) / f"{rank}.pt") for rank in (0, 1)]
    for name, options in {**CASES, "idle": {"stack": STACK}}.items():
        training = make(**copy.deepcopy(options))
        parts = MetricTask()(training, batch())
        parts["loss"].backward()
        for rank in (0, 1):
            numbers, theirs = found[rank][name]
            assert numbers == pytest.approx({key: value.item() for key, value in parts.items()}, rel=1e-10), (
                name
            )
            for key, gradient in gradients(training).items():
                torch.testing.assert_close(theirs[key], gradient, rtol=1e-8, atol=1e-11, msg=f"{name} {key}")
    for name in ("margin", "proxy_anchor"):
        assert found[0][name][0] == pytest.approx(found[1][name][0], rel=1e-12)
