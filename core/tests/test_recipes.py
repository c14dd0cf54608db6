"""Recipes say a run: read, checked against the fields, written down again, and recorded."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import tyro
from attnmap_core.cli import parse
from attnmap_core.errors import InputError
from attnmap_core.recipes import (
    find_recipe,
    list_recipes,
    load_recipe,
    plain_values,
    recipe_header,
    resolved_toml,
    run_record,
)
from attnmap_core.training import TrainConfig
from hypothesis import given
from hypothesis import strategies as st


@dataclass(kw_only=True)
class Config:
    name: str = "x"
    path: Path = Path("run")
    steps: int = 1
    lr: float = 0.1
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    clip: float | None = None
    title: str | None = "t"
    alpha: float | Literal["auto"] = 0.002
    betas: tuple[float, float] = (0.9, 0.999)
    iterations: tuple[int, ...] = (4,)
    tags: list[str] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)
    options: dict[str, bool | int | float | str] = field(default_factory=dict)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "cub-scm.toml").write_text(
        "# SCM on CUB\n# paper: 96.6\n#\n# command: train cub-scm\n"
        'steps = 7\n# not the header\nmode = "slow"\n'
    )
    (tmp_path / "cub-tscam.toml").write_text("# TS-CAM on CUB\n")
    (tmp_path / "notes.txt").write_text("no recipe")
    return tmp_path


def read(tmp_path: Path, text: str, **overrides: Any) -> Config:
    (tmp_path / "r.toml").write_text(text)
    return load_recipe(tmp_path, "r", Config, overrides)


def test_recipe_fills_the_fields(folder):
    config = load_recipe(folder, "cub-scm", Config, {"steps": 9})
    assert (config.steps, config.mode, config.lr) == (9, "slow", 0.1)
    assert load_recipe("no_such_package", str(folder / "cub-scm.toml"), Config).steps == 7


@dataclass(kw_only=True)
class WithOptions:
    backbone: str = "resnet"
    backbone_options: dict[str, int] = field(default_factory=dict)
    data: str = "cub:"
    data_options: dict[str, int] = field(default_factory=dict)
    other_options: dict[str, int] = field(default_factory=dict)


def test_options_of_another_network_are_dropped(tmp_path):
    text = "[backbone_options]\nstride = 16\n[data_options]\nside = 8\n[other_options]\na = 1\n"
    (tmp_path / "r.toml").write_text(text)

    def options(**overrides: Any) -> tuple[dict, dict, dict]:
        by_load = load_recipe(tmp_path, "r", WithOptions, overrides)
        arguments: list[str] = []
        for name, value in overrides.items():
            if isinstance(value, dict):
                arguments += [text for key in value for text in (f"--{name}.{key}", str(value[key]))]
            else:
                arguments += [f"--{name}", value]
        default = load_recipe(tmp_path, "r", WithOptions)
        assert parse(WithOptions, arguments, command="c", default=default) == by_load
        return by_load.backbone_options, by_load.data_options, by_load.other_options

    everything = ({"stride": 16}, {"side": 8}, {"a": 1})
    assert options() == options(backbone="resnet", data="cub:/photos") == everything
    assert options(backbone="vit") == ({}, *everything[1:])
    assert options(backbone="vit", backbone_options={"depth": 3}) == ({"depth": 3}, *everything[1:])
    assert options(data="cars:/photos") == (everything[0], {}, everything[2])


def test_recipes_are_listed_with_their_header(folder):
    assert [(recipe.name, recipe.summary) for recipe in list_recipes(folder)] == [
        ("cub-scm", "SCM on CUB"),
        ("cub-tscam", "TS-CAM on CUB"),
    ]
    assert recipe_header(folder, "cub-scm") == "SCM on CUB\npaper: 96.6\n\ncommand: train cub-scm"
    assert find_recipe(folder, "cub-tscam").path == folder / "cub-tscam.toml"


def test_recipes_of_a_package(tmp_path, monkeypatch):
    (tmp_path / "some_package/recipes").mkdir(parents=True)
    (tmp_path / "some_package/__init__.py").touch()
    (tmp_path / "some_package/recipes/a.toml").write_text("# A\nlr = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [recipe.name for recipe in list_recipes("some_package")] == ["a"]
    assert load_recipe("some_package", "a", Config).lr == 3.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cub-scn",
            "cub-scn: no such recipe; did you mean cub-scm? known: cub-scm, cub-tscam, or any .toml file",
        ),
        ("zzz", "zzz: no such recipe; known: cub-scm, cub-tscam, or any .toml file"),
        (
            "nowhere/a.toml",
            "nowhere/a.toml: cannot be read as a recipe (No such file or directory); check the path",
        ),
    ],
)
def test_unknown_recipe_names_the_known(folder, name, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_recipe(folder, name, Config)


VALUES = [
    ('path = "a/b"', "path", Path("a/b")),
    ("lr = 1", "lr", 1.0),
    ("lr = 5e-5", "lr", 5e-5),
    ("clip = 1", "clip", 1.0),
    ('clip = "none"', "clip", None),
    ('title = "none"', "title", None),
    ('title = "some"', "title", "some"),
    ('alpha = "auto"', "alpha", "auto"),
    ("alpha = 1", "alpha", 1.0),
    ("betas = [0, 1]", "betas", (0.0, 1.0)),
    ("iterations = [16, 4]", "iterations", (16, 4)),
    ('tags = ["a"]', "tags", ["a"]),
    ('scales = {"backbone.*" = 1}', "scales", {"backbone.*": 1.0}),
    ("[options]\na = 1\nb = true\nc = 0.5\nd = 'x'", "options", {"a": 1, "b": True, "c": 0.5, "d": "x"}),
]


@pytest.mark.parametrize(("text", "name", "value"), VALUES)
def test_values_take_the_type_of_their_field(tmp_path, text, name, value):
    found = getattr(read(tmp_path, text), name)
    assert found == value
    assert type(found) is type(value)
    if name == "options":
        assert [type(item) for item in found.values()] == [int, bool, float, str]


WRONG = [
    ("steps = 1.5", "steps = 1.5: expected a whole number"),
    ("steps = true", "steps = True: expected a whole number"),
    ('lr = "fast"', "lr = 'fast': expected a number"),
    ("lr = true", "lr = True: expected a number"),
    ("flag = 1", "flag = 1: expected true or false"),
    ("name = 3", "name = 3: expected text"),
    ('mode = "quick"', "mode = 'quick': expected one of fast, slow"),
    ('clip = "much"', "clip = 'much': expected a number or none"),
    ('alpha = "own"', "alpha = 'own': expected a number or one of auto"),
    ("betas = [0.9]", "betas = [0.9]: expected a list of 2: a number, a number"),
    ("iterations = 4", "iterations = 4: expected a list of a whole number"),
    ("scales = {a = 'x'}", "scales = {'a': 'x'}: expected a table of a number"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_wrong_type_says_what_is_expected(tmp_path, text, message):
    with pytest.raises(InputError, match=re.escape(f"r.toml: {message}; correct it")):
        read(tmp_path, text)


def test_unknown_field_names_file_and_closest(tmp_path):
    with pytest.raises(
        InputError, match=r"r\.toml: no field iteration; did you mean iterations\? all fields: name, "
    ):
        read(tmp_path, "iteration = 4")
    with pytest.raises(InputError, match="overrides of r: no field step; did you mean steps"):
        read(tmp_path, "", step=4)


def test_text_that_is_not_toml(tmp_path):
    with pytest.raises(InputError, match=r"r\.toml: not valid TOML .*line 2"):
        read(tmp_path, "# header\nlr = \n")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_recipe(tmp_path, "r", Config)


numbers = st.floats(allow_nan=False)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda word: word != "none")
configs = st.builds(
    Config,
    name=words,
    path=st.just(Path("a b/c")),
    steps=st.integers(-(2**62), 2**62),
    lr=numbers,
    flag=st.booleans(),
    mode=st.sampled_from(["fast", "slow"]),
    clip=st.none() | numbers,
    title=st.none() | words,
    alpha=st.just("auto") | numbers,
    betas=st.tuples(numbers, numbers),
    iterations=st.lists(st.integers(0, 99)).map(tuple),
    tags=st.lists(words),
    scales=st.dictionaries(words, numbers, max_size=3),
    options=st.dictionaries(words, st.booleans() | st.integers(-9, 9) | numbers | words, max_size=3),
)


@given(config=configs, header=st.sampled_from(["", "One line", "Two\n\nlines"]))
def test_resolved_recipe_gives_an_equal_config(tmp_path_factory, config, header):
    path = tmp_path_factory.getbasetemp() / "resolved.toml"
    path.write_text(resolved_toml(config, header), encoding="utf-8", newline="\n")
    again = load_recipe(path.parent, str(path), Config)
    assert again == config
    assert [type(value) for value in again.options.values()] == [
        type(value) for value in config.options.values()
    ]
    assert recipe_header(path.parent, str(path)) == header


def test_training_fields_survive_recipe_and_command_line(tmp_path):
    """Every field is plain enough for TOML, JSON and tyro."""
    config = TrainConfig(lr_scales={"backbone.*": 0.1}, data_options={"root": "CUB", "small": True, "n": 3})
    path = tmp_path / "r.toml"
    path.write_text(resolved_toml(config))
    assert load_recipe(tmp_path, "r", TrainConfig) == config
    json.dumps(plain_values(config), allow_nan=False)
    assert tyro.cli(TrainConfig, args=[], default=config) == config
    given = (
        "--lr 0.5 --betas 0.8 0.9 --clip-grad 1 --ema-decay None --decay-epochs 3 5 --schedule cosine "
        "--compile --no-deterministic --output-dir o/p --lr-scales head.* 10 --no-decay a b "
        "--data-options.n 4"
    )
    config.lr_scales = {}  # tyro takes new keys where there are none yet, and --field.key value elsewhere
    changed = tyro.cli(TrainConfig, args=shlex.split(given), default=config)
    assert (changed.lr, changed.betas, changed.clip_grad, changed.ema_decay) == (0.5, (0.8, 0.9), 1.0, None)
    assert (changed.decay_epochs, changed.compile, changed.deterministic) == ((3.0, 5.0), True, False)
    assert (changed.output_dir, changed.lr_scales) == (Path("o/p"), {"head.*": 10.0})
    assert (changed.no_decay, changed.schedule) == (("a", "b"), "cosine")
    assert changed.data_options == {"root": "CUB", "small": True, "n": 4}


def test_every_training_field_is_documented():
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(TrainConfig))).body
    documented = {
        field.target.id
        for field, text in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert {f.name for f in fields(TrainConfig)} <= documented


# --- The record of a run ------------------------------------------------------------------------------------


def test_record_is_json_and_complete():
    record = run_record(
        seed=26, packages=["pytest", "not-installed-anywhere"], arguments=["/home/me/bin/tool", "a b"]
    )
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["seed"] == 26
    assert record["command"] == "tool 'a b'"
    assert record["versions"]["pytest"] == pytest.__version__
    assert "not-installed-anywhere" not in record["versions"]
    assert {"python", "torch", "timm", "attnmap-core"} <= record["versions"].keys()
    assert record["hardware"]["cores"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])


def test_record_tells_no_home_paths():
    text = json.dumps(run_record())
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert str(Path(sys.executable).parent) not in text
    assert str(Path(__file__).parent) not in text


def test_record_of_a_module_says_the_module(tmp_path):
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool/train.py").write_text(
        "from attnmap_core.recipes import run_record\nprint(run_record()['command'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tool.train", "cub", "--data", "/my/photos"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "python -m tool.train cub --data /my/photos\n", done.stderr


def test_record_has_the_commit_of_a_repository_only(monkeypatch, tmp_path):
    def git(*command: str) -> str:
        names = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *names, *command], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    module = tmp_path / "module.py"
    module.write_text("1\n")
    monkeypatch.setattr("attnmap_core.recipes.__file__", str(module))
    assert (run_record()["commit"], run_record()["dirty"]) == (None, None)
    git("init")
    assert run_record()["commit"] is None  # installed inside of somebody's repository, not part of it
    git("add", "module.py")
    git("commit", "-m", "m")
    assert (run_record()["commit"], run_record()["dirty"]) == (git("rev-parse", "HEAD"), False)
    module.write_text("2\n")
    assert run_record()["dirty"] is True
