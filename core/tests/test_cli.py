"""Command lines: wrong input ends in exit code 2 and one line; help in 0; a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import tyro
from attnmap_core.cli import (
    PredictOptions,
    Program,
    Reproduction,
    choose_device,
    parse,
    resolve_model,
    run,
)
from attnmap_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Config:
    """A tiny run."""

    output_dir: Path = Path("run")
    """Where results go."""
    epochs: int = 3
    """Passes over the data."""
    mode: Literal["fast", "slow"] = "fast"
    """How."""
    weights: str | None = None
    """File to start from."""
    flag: bool = False
    """Yes or no."""


Main = Callable[..., tuple[int, str, str]]


class Calls(list[Any]):
    """What the package's own functions were called with."""


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def program(tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Program:
    package = tmp_path / "toy_cli_package"
    (package / "recipes").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "recipes" / "toy-fast.toml").write_text("# Toy, fast\n# paper: 12.3\nepochs = 5\n")
    (package / "recipes" / "broken.toml").write_text("# Broken\nepochs = 'five'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, package.name, raising=False)

    def evaluate(arguments: list[str]) -> None:
        calls.append(("evaluate", arguments))

    def load(name: str) -> Any:
        calls.append(("load", name))
        raise InputError(f"{name}: no model")

    return Program(
        name="toy",
        module=package.name,
        config=Config,
        train=lambda *arguments: calls.append(("train", *arguments)),
        evaluate=evaluate,
        load=load,
        reproductions={"table-1": Reproduction(summary="Toy table", run=evaluate)},
        verbs={"wave": lambda arguments: calls.append(("wave", arguments))},
    )


@pytest.fixture
def main(program: Program, capsys: pytest.CaptureFixture[str]) -> Main:
    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = run(program, arguments)
        except SystemExit as stop:  # as the console script would end
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert err.startswith("toy: error: ")
    for word in words:
        assert word in err


# --- Wrong input ------------------------------------------------------------------------------------------


def test_unknown_verb(main: Main, calls: Calls) -> None:
    assert_one_line(main("trian"), "trian: no such verb", "did you mean train?")
    assert_one_line(main("xyzzy"), "known: ", "wave", "predict")
    assert calls == []


@pytest.mark.parametrize("argument", ["--epoch", "--epoch=3", "--epohcs", "--ep"])
def test_unknown_field(main: Main, calls: Calls, argument: str) -> None:
    assert_one_line(main("train", "toy-fast", argument, "7"), "no field --ep", "did you mean --epochs?")
    assert calls == []


def test_unknown_field_that_is_like_no_other(main: Main) -> None:
    """Not a list of the hundred fields that there are."""
    said = main("train", "toy-fast", "--xyzzy", "7")
    assert_one_line(said, "no field --xyzzy (toy train toy-fast --help lists all)")
    assert "--epochs" not in said[2]


def test_unknown_recipe(main: Main) -> None:
    assert_one_line(main("train", "toy-fsat"), "toy-fsat", "did you mean toy-fast?")
    assert_one_line(main("train", "no/such.toml"), "no/such.toml")
    assert_one_line(main("train"), "which recipe?", "toy-fast")


def test_a_broken_recipe(main: Main) -> None:
    assert_one_line(main("train", "broken"), "broken.toml", "epochs")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--mode", "medium"], ["medium", "fast", "slow"]),
        (["--epochs"], ["--epochs"]),
        (["stray"], ["stray"]),
        (["--flag", "--no-epochs"], ["no-epochs"]),
    ],
)
def test_wrong_values(main: Main, calls: Calls, arguments: list[str], words: list[str]) -> None:
    assert_one_line(main("train", "toy-fast", *arguments), "toy train toy-fast", *words)
    assert calls == []


def test_missing_options(main: Main) -> None:
    assert_one_line(main("predict", "a.jpg"), "toy predict", "--model", "--out")
    assert_one_line(main("push"), "toy push")
    assert_one_line(main("demo"), "toy demo")


def test_unknown_table(main: Main) -> None:
    assert_one_line(main("reproduce", "table-2"), "table-2", "did you mean table-1?")
    code, out, err = main("reproduce")
    assert code == 2
    assert "Toy table" in out
    assert err.count("\n") == 1


def test_list_takes_no_arguments(main: Main) -> None:
    assert_one_line(main("list", "everything"), "everything")


def test_missing_model(main: Main, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (("no/folder/there", "no such folder"), (str(tmp_path / "empty"), "no config.json")):
        assert_one_line(main("predict", "a.jpg", "--model", name, "--out", str(tmp_path / "o")), name, words)
        assert_one_line(main("push", name, "owner/name"), name, words)
    assert_one_line(main("predict", "a.jpg", "--model", "owner/name", "--out", "o"), "owner/name: no model")


def test_messages_of_several_lines_become_one(program: Program, main: Main) -> None:
    def complain(_: list[str]) -> None:
        raise InputError("first\n  second\n")

    program.verbs["wave"] = complain  # type: ignore[index]
    assert main("wave") == (2, "", "toy: error: first second\n")


# --- The machine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(program: Program, main: Main, number: int) -> None:
    def fill(_: list[str]) -> None:
        raise OSError(number, os.strerror(number), "/big/file")

    program.verbs["wave"] = fill  # type: ignore[index]
    assert_one_line(main("wave"), "/big/file", os.strerror(number), "free some space")


def test_an_interrupt_is_one_line_and_130(program: Program, main: Main) -> None:
    def stop(_: list[str]) -> None:
        raise KeyboardInterrupt

    program.verbs["wave"] = stop  # type: ignore[index]
    code, out, err = main("wave")
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert "--resume" in err


@pytest.mark.parametrize("bug", [RuntimeError("bug"), ValueError("bug"), OSError(errno.EIO, "bug")])
def test_a_bug_keeps_its_traceback(program: Program, main: Main, bug: Exception) -> None:
    def fail(_: list[str]) -> None:
        raise bug

    program.verbs["wave"] = fail  # type: ignore[index]
    with pytest.raises(type(bug), match="bug"):
        main("wave")


# --- Help and ordinary use --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "predict", "wave"]),
        (["-h"], ["reproduce"]),
        (["train", "--help"], ["--epochs", "Passes over the data."]),
        (["train", "toy-fast", "--help"], ["--epochs", "5"]),
        (["predict", "--help"], ["--skip-unreadable", "Photos"]),
        (["push", "--help"], ["--private"]),
        (["demo", "--help"], ["--share"]),
        (["reproduce", "--help"], ["table-1", "Toy table"]),
    ],
)
def test_help_is_no_error(main: Main, calls: Calls, arguments: list[str], words: list[str]) -> None:
    code, out, err = main(*arguments)
    assert (code, err, calls) == (0, "", [])
    for word in words:
        assert word in out


def test_no_verb_shows_the_verbs(main: Main) -> None:
    code, out, err = main()
    assert (code, err) == (2, "")
    assert "usage: toy" in out


def test_train_fills_the_config_from_recipe_and_command_line(main: Main, calls: Calls) -> None:
    assert main("train", "toy-fast", "--mode", "slow", "--resume", "--flag")[0] == 0
    config = Config(epochs=5, mode="slow", flag=True)
    assert calls == [("train", config, "Toy, fast\npaper: 12.3", True, False)]
    assert main("train", "toy-fast", "--overwrite", "--epochs", "9", "--weights", "w.pt")[0] == 0
    assert calls[1][1:] == (Config(epochs=9, weights="w.pt"), "Toy, fast\npaper: 12.3", False, True)


def test_a_recipe_may_be_a_file(main: Main, calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("# Mine\nepochs = 11\n")
    assert main("train", str(tmp_path / "own.toml"))[0] == 0
    assert calls == [("train", Config(epochs=11), "Mine", False, False)]


def test_verbs_get_the_arguments_that_follow(main: Main, calls: Calls) -> None:
    assert [
        main("evaluate", "a", "--b")[0],
        main("wave", "--c")[0],
        main("reproduce", "table-1", "-d")[0],
    ] == [0] * 3
    assert calls == [("evaluate", ["a", "--b"]), ("wave", ["--c"]), ("evaluate", ["-d"])]


def test_list_names_recipes_tables_and_data(main: Main) -> None:
    code, out, _ = main("list")
    assert code == 0
    for word in ("toy-fast", "Toy, fast", "table-1", "Toy table", "creatures"):
        assert word in out


# --- Pieces -----------------------------------------------------------------------------------------------


def test_parse_knows_the_ways_to_write_a_field() -> None:
    for arguments in (
        ["--output-dir", "x", "--flag"],
        ["--output_dir", "x", "--flag"],
        ["--output-dir=x", "--flag"],
    ):
        assert parse(Config, arguments, command="c") == Config(output_dir=Path("x"), flag=True)
    default = Config(flag=True, epochs=8)
    assert parse(Config, ["--no-flag"], command="c", default=default) == Config(epochs=8)
    assert parse(Config, ["--weights", "none"], command="c", default=Config(weights="w")).weights in (
        None,
        "none",
    )


def test_parse_of_entries_of_a_mapping() -> None:
    @dataclass
    class Options:
        options: dict[str, bool | int | float | str] = field(default_factory=dict)

    default = Options(options={"depth": 2, "width": 8})
    arguments = [
        "--options.depth",
        "3",
        "--options.rate=0.5",
        "--options.on",
        "true",
        "--options.kind",
        "a=b",
    ]
    parsed = parse(Options, arguments, command="c", default=default)
    assert parsed.options == {"depth": 3, "width": 8, "rate": 0.5, "on": True, "kind": "a=b"}
    assert default.options == {"depth": 2, "width": 8}
    for wrong in (["--options.depth"], ["--option.depth", "3"]):
        with pytest.raises(InputError, match="--option"):
            parse(Options, wrong, command="c")


def test_process_groups_are_closed(program: Program) -> None:
    def join(arguments: list[str]) -> None:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        if arguments:
            raise InputError("wrong")

    joining = replace(program, verbs={"join": join})
    assert run(joining, ["join"]) == 0
    assert not torch.distributed.is_initialized()
    assert run(joining, ["join", "wrongly"]) == 2  # other processes may still wait for this one: it just ends
    torch.distributed.destroy_process_group()


def test_parse_of_photos() -> None:
    options = parse(PredictOptions, ["a.jpg", "b", "--model", "m", "--out", "o"], command="c")
    assert (options.photos, options.model, options.out) == (["a.jpg", "b"], "m", Path("o"))
    assert (options.format, options.threshold, options.skip_unreadable) == ("coco", None, False)


def test_parse_of_a_field_without_default_names_it() -> None:
    @dataclass
    class Options:
        path: tyro.conf.Positional[Path]

    with pytest.raises(InputError, match="PATH") as failure:
        parse(Options, [], command="c")
    assert "\n" not in str(failure.value)


def test_models_are_found_in_model_and_run_folders(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    model = str(tmp_path / "run" / "model")
    assert resolve_model(str(tmp_path / "run")) == resolve_model(model) == model
    assert resolve_model("owner/name") == "owner/name"
    for wrong in ("name", "./owner/name", "a/b/c", "/absent/folder"):
        with pytest.raises(InputError, match="no such folder"):
            resolve_model(wrong)


def test_devices() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in {"cpu", "cuda", "mps"}
    with pytest.raises(InputError, match=r"--device abacus: not usable here .*--device cpu") as failure:
        choose_device("abacus")
    assert "\n" not in str(failure.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InputError, match="--device cuda: not usable here"):
        choose_device("cuda")
