"""Checkpoints are whole or absent, give everything back exactly, and never run what is in them."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attnmap_core.checkpoint import (
    check_same_run,
    list_checkpoints,
    load_checkpoint,
    random_state,
    read_checkpoint_state,
    save_checkpoint,
    set_random_state,
)
from attnmap_core.errors import InputError
from torch import nn

CPU = torch.device("cpu")


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with tied weights and a buffer, and its optimizer after one step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, seed: int = 0, keep: int = 2, **state) -> Path:
    model, optimizer = make(seed)
    return save_checkpoint(
        folder,
        step,
        model=model,
        ema=make(seed + 100)[0],
        optimizer=optimizer.state_dict(),
        scaler={"scale": 65536.0},
        random_states=[random_state(CPU)],
        state={"step": step, **state},
        keep=keep,
    )


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])


def test_everything_comes_back(tmp_path):
    path = save(tmp_path, 7, history=[1.1, None])
    model, ema = make(1)[0], make(2)[0]
    optimizer, scaler, states = load_checkpoint(path, model=model, ema=ema)
    assert_equal(model, make(0)[0])
    assert_equal(ema, make(100)[0])
    assert model[2].weight is model[0].weight
    assert scaler == {"scale": 65536.0}
    assert len(states) == 1
    assert read_checkpoint_state(path) == {"step": 7, "history": [1.1, None]}
    expected = make(0)[1].state_dict()
    assert optimizer["param_groups"] == expected["param_groups"]
    for key, values in expected["state"].items():
        assert all(torch.equal(values[name], optimizer["state"][key][name]) for name in values)


def test_generators_come_back_through_the_file(tmp_path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    np.random.standard_normal()  # leaves a second normal number in store  # noqa: NPY002

    def draw() -> list[float]:
        normal = np.random.standard_normal()  # noqa: NPY002
        return [random.random(), normal, np.random.random(), torch.rand(1).item()]  # noqa: NPY002

    path = save(tmp_path, 1)
    state = random_state(CPU)
    expected = draw()
    set_random_state(state, CPU)
    assert draw() == expected

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    np.random.standard_normal()  # noqa: NPY002
    state = random_state(CPU)
    expected = draw()
    torch.save([state], path / "random.pt")
    _, _, [loaded] = load_checkpoint(path, model=make(0)[0], ema=None)
    set_random_state(loaded, CPU)
    assert draw() == expected


def test_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000015", "step-000000020"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000015", "step-000000020"]
    assert list_checkpoints(tmp_path / "nothing") == []


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import attnmap_core.checkpoint as checkpoint
from pathlib import Path
import test_checkpoint
def die(path, value):
    path.write_bytes(b"half of the optim")
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint._save_tensors = die
test_checkpoint.save(Path({folder!r}), 10)
"""


def test_kill_in_the_middle_of_saving_leaves_the_older_one(tmp_path):
    older = save(tmp_path, 5)
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.iterdir())) == 2  # it had begun to write
    assert list_checkpoints(tmp_path) == [older]
    load_checkpoint(older, model=make(3)[0], ema=make(3)[0])
    save(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000005", "step-000000010"]


@pytest.mark.parametrize("limit", [100, 900, 2500])  # in the weights, in the optimizer, in the generators
def test_full_disk_is_one_line_and_leaves_the_older_one(tmp_path, limit):
    resource = pytest.importorskip("resource")
    older = save(tmp_path, 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(InputError, match=r"step-000000010: no space left to write it") as caught:
            save(tmp_path, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [older]
    load_checkpoint(older, model=make(3)[0], ema=make(3)[0])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "random.pt", "state.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damaged_file_is_an_input_error(tmp_path, name, damage):
    path = save(tmp_path, 5)
    whole = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")

    def load() -> None:
        read_checkpoint_state(path)
        load_checkpoint(path, model=make(1)[0], ema=make(1)[0])

    with pytest.raises(InputError, match=rf"step-000000005/{name}: ") as caught:
        load()
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path):
    path = save(tmp_path, 5)
    with pytest.raises(
        InputError, match=r"model\.safetensors: cannot be loaded .* check that the model is the same"
    ):
        load_checkpoint(path, model=nn.Linear(4, 4), ema=None)


class Dangerous:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "random.pt"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, name):
    path, proof = save(tmp_path / "c", 5), tmp_path / "proof"
    torch.save({"optimizer": Dangerous(proof)}, path / name)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_checkpoint(path, model=make(1)[0], ema=None)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Dangerous(proof)))  # the trap works
    assert proof.exists()


def test_other_settings_are_named():
    saved = {"lr": 0.1, "epochs": 3, "workers": 2, "gone": 1}
    check_same_run(Path("run"), saved, {**saved, "workers": 9}, {"workers"})
    with pytest.raises(InputError) as caught:
        check_same_run(Path("run"), saved, {"lr": 0.2, "epochs": 3, "workers": 9, "new": None}, {"workers"})
    expected = (
        "run: started with lr=0.1, gone=1, new=nothing, now lr=0.2, gone=nothing, new=None; resume with"
    )
    assert str(caught.value).startswith(expected)
