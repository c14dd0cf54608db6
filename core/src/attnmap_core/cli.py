"""The verbs that every package offers: ``train evaluate predict reproduce push demo list``.

A package describes itself in a :class:`Program` and hands it to :func:`run`. A wrong input ends in one line
on stderr and exit code 2; an interrupt in exit code 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import tyro

from .errors import InputError
from .recipes import outdated_options

logger = logging.getLogger(__name__)
Options = TypeVar("Options")
Verb = Callable[[list[str]], None]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """One table or figure of a paper as a command: ``run(arguments)``; ``summary`` is shown by ``list``."""

    summary: str
    run: Verb


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the shared verbs need to know of a package.

    Attributes:
        name: console script and distribution, ``"scm-wsol"``.
        module: import package that holds the recipes, ``"scm_wsol"``.
        config: dataclass of a training run; recipes and ``--field value`` fill it.
        train: ``train(config, header, resume, overwrite)``; ``header`` is the recipe's comment block.
        evaluate: takes the arguments after the verb.
        load: model from a model folder or Hub id.
        reproductions: by name.
        verbs: further verbs of this package, by name, with a docstring each.
    """

    name: str
    module: str
    config: type[Any]
    train: Callable[[Any, str, bool, bool], None]
    evaluate: Verb
    load: Callable[[str], Any]
    reproductions: Mapping[str, Reproduction] = field(default_factory=dict[str, Reproduction])
    verbs: Mapping[str, Verb] = field(default_factory=dict[str, Verb])


def run(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 2 wrong input, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    verbs: dict[str, Verb] = {
        "train": lambda rest: _train(program, rest),
        "evaluate": program.evaluate,
        "predict": lambda rest: _say(predict(program, rest)),
        "reproduce": lambda rest: _reproduce(program, rest),
        "push": lambda rest: _push(program, rest),
        "demo": lambda rest: _demo(program, rest),
        "list": lambda rest: _list(program, rest),
        **program.verbs,
    }
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        _say(f"usage: {program.name} {{{','.join(verbs)}}} ...   ({program.name} VERB --help explains one)")
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb not in verbs:
            raise InputError(f"{verb}: no such verb; {_did_you_mean(verb, verbs)}")
        verbs[verb](rest)
        _leave_processes()
    except InputError as error:
        _complain(program.name, str(error))
        return 2
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        _complain(
            program.name, f"{error.filename or 'output'}: {error.strerror}; free some space and run again"
        )
        return 2
    except KeyboardInterrupt:
        again = "again" if verb == "reproduce" else "with --resume"
        _complain(
            program.name, f"interrupted; run the same command {again} to go on where it has checkpoints"
        )
        return 130
    return 0


def _leave_processes() -> None:
    """Close the process group that a verb has opened: one that is still open can abort the exit."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parse(
    options: type[Options], arguments: Sequence[str], *, command: str, default: Options | None = None
) -> Options:
    """Fill a dataclass from ``--field value`` arguments.

    Args:
        options: dataclass type; its docstrings are the help text.
        arguments: what the user typed after the verb.
        command: shown in ``--help`` and errors, ``"scm-wsol train cub-scm"``.
        default: values for the fields not given; the dataclass's own where None. Another value of ``NAME`` drops
            its ``NAME_options``, as :func:`attnmap_core.recipes.outdated_options` says.

    Raises:
        InputError: for an unknown field (with the closest name) or a value of the wrong type.

    Example:
        >>> @dataclass
        ... class Options:
        ...     epochs: int = 3
        >>> parse(Options, ["--epochs", "5"], command="demo").epochs
        5
        >>> parse(Options, ["--epoch", "5"], command="demo")
        Traceback (most recent call last):
        attnmap_core.errors.InputError: demo: no field --epoch; did you mean --epochs? (demo --help lists all)
    """
    arguments, entries = _take_entries(options, arguments, command)
    names = {f.name.replace("_", "-") for f in dataclasses.fields(cast(Any, options))}
    names |= {f"no-{name}" for name in names} | {"help"}
    for argument in arguments:
        given = argument[2:].split("=")[0].replace("_", "-")
        if argument.startswith("--") and given not in names:
            close = [f"; did you mean --{name}?" for name in _closest(given, names)]
            raise InputError(f"{command}: no field --{given}{''.join(close)} ({command} --help lists all)")
    said = io.StringIO()
    try:
        # tyro explains a bad value in a framed box; the one line that every other error has is made of it.
        with contextlib.redirect_stderr(said):
            parsed = cast(Any, tyro.cli(options, args=arguments, default=default, prog=command))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        words = " ".join(said.getvalue().translate({ord(c): " " for c in "╭╮╰╯─│"}).split())
        words = words.removeprefix("Parsing error").removeprefix("Required options").strip()
        raise InputError(f"{command}: {words}") from None
    void = outdated_options(vars(default), vars(parsed)) if default is not None else []
    merged: dict[str, Any] = {name: {} for name in void}
    for name, values in entries.items():
        merged[name] = {**merged.get(name, getattr(parsed, name)), **values}
    return cast(Options, dataclasses.replace(parsed, **merged) if merged else parsed)


def _take_entries(
    options: type[Any], arguments: Sequence[str], command: str
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Split ``--field.key value``, an entry of the mapping ``field``, from what tyro is to read."""
    mappings = {f.name for f in dataclasses.fields(cast(Any, options)) if "dict[" in str(f.type)}
    entries: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    queue = iter(arguments)
    for argument in queue:
        name, dot, key = argument.partition("=")[0].removeprefix("--").replace("-", "_").partition(".")
        if not (argument.startswith("--") and dot and name in mappings):
            rest.append(argument)
            continue
        value = argument.partition("=")[2] if "=" in argument else next(queue, None)
        if value is None:
            raise InputError(f"{command}: {argument} needs a value after it")
        entries.setdefault(name, {})[key] = _plain(value)
    return rest, entries


def _plain(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


# --- train ----------------------------------------------------------------------------------------------


def _train(program: Program, arguments: list[str]) -> None:
    """``train <recipe> [--resume] [--overwrite] [--any-field value]``."""
    from .recipes import list_recipes, load_recipe, recipe_header

    known = ", ".join(info.name for info in list_recipes(program.module))
    if not arguments or arguments[0].startswith("-"):
        if arguments[:1] in (["-h"], ["--help"]):
            tyro.cli(program.config, args=["--help"], prog=f"{program.name} train RECIPE")
        raise InputError(
            f"{program.name} train: which recipe? expected a name or a .toml file first; known: {known}"
        )
    recipe, rest = arguments[0], arguments[1:]
    resume, overwrite = "--resume" in rest, "--overwrite" in rest
    rest = [argument for argument in rest if argument not in {"--resume", "--overwrite"}]
    config = load_recipe(program.module, recipe, program.config)
    config = parse(program.config, rest, command=f"{program.name} train {recipe}", default=config)
    program.train(config, recipe_header(program.module, recipe), resume, overwrite)


# --- predict --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Boxes, heat maps and a report for photos."""

    photos: tyro.conf.Positional[list[str]]
    """Photos, folders of photos, or both."""
    model: str
    """Model folder, run folder or Hub id."""
    out: Path
    """Folder for the annotations, heat maps and report.html."""
    format: Literal["coco", "yolo", "voc", "csv"] = "coco"
    """Annotation format."""
    threshold: float | None = None
    """Share of the score map's maximum that bounds the object; the model's own where not given."""
    boxes: Literal["largest", "all"] = "largest"
    """One box around the largest region, or one for each region."""
    batch_size: int = 16
    """Photos a forward pass."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    skip_unreadable: bool = False
    """List and leave out photos that cannot be read, instead of stopping at the first."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def predict(program: Program, arguments: Sequence[str]) -> str:
    """The ``predict`` verb; returns the path of the report."""
    from .predicting import predict_folder

    options = parse(PredictOptions, arguments, command=f"{program.name} predict")
    model = program.load(resolve_model(options.model))
    return predict_folder(model, options, command=f"{program.name} predict {' '.join(arguments)}")


def resolve_model(name: str) -> str:
    """Path of the model folder inside ``name``: a model folder, a run folder (its ``model/``), or a Hub id.

    Raises:
        InputError: if it is none of them.
    """
    folder = Path(name)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if folder.exists():
        raise InputError(
            f"{name}: no config.json in it or in its model/ folder; expected a model or run folder"
        )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise InputError(
        f"{name}: no such folder; expected a model folder, a run folder or a Hub id like owner/name"
    )


def choose_device(name: str) -> str:
    """``auto`` becomes ``cuda``, ``mps`` or ``cpu``, whichever is there; other names are checked and kept."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return name


# --- reproduce, push, demo, list ------------------------------------------------------------------------


def _reproduce(program: Program, arguments: list[str]) -> None:
    known = program.reproductions
    if not arguments or arguments[0] in {"-h", "--help"}:
        _say(_table((name, item.summary) for name, item in known.items()))
        if not arguments:
            raise InputError(f"{program.name} reproduce: which table or figure? known: {', '.join(known)}")
        return
    if arguments[0] not in known:
        raise InputError(f"{arguments[0]}: no such table or figure; {_did_you_mean(arguments[0], known)}")
    known[arguments[0]].run(arguments[1:])


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Upload a finished run's model folder, card included, to the Hub."""

    run: tyro.conf.Positional[str]
    """Run folder or model folder."""
    repo_id: tyro.conf.Positional[str]
    """``owner/name`` on the Hub."""
    private: bool = False
    """Make the repository private when it is new."""
    message: str = "Upload model"
    """Commit message."""


def _push(program: Program, arguments: list[str]) -> None:
    from huggingface_hub import HfApi

    options = parse(PushOptions, arguments, command=f"{program.name} push")
    folder = resolve_model(options.run)
    if not Path(folder).is_dir():
        raise InputError(f"{options.run}: no such run or model folder")
    program.load(folder)  # a folder that does not load must not be published
    api = HfApi()
    url = api.create_repo(options.repo_id, private=options.private, exist_ok=True)
    api.upload_folder(repo_id=options.repo_id, folder_path=folder, commit_message=options.message)
    _say(str(url))


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """A page in the browser: drop a photo, see class, heat map and box."""

    model: tyro.conf.Positional[str]
    """Model folder, run folder or Hub id."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    share: bool = False
    """Make a public link."""


def _demo(program: Program, arguments: list[str]) -> None:
    from .demo import build_demo

    options = parse(DemoOptions, arguments, command=f"{program.name} demo")
    model = program.load(resolve_model(options.model)).to(choose_device(options.device)).eval()
    build_demo(model, title=program.name).launch(share=options.share)


def _list(program: Program, arguments: list[str]) -> None:
    from .data.sources import describe_sources
    from .recipes import list_recipes

    if arguments:
        raise InputError(f"{program.name} list: takes no arguments, got {' '.join(arguments)}")
    recipes = _table((info.name, info.summary) for info in list_recipes(program.module))
    tables = _table((name, item.summary) for name, item in program.reproductions.items())
    sources = _table(describe_sources().items())
    _say(
        f"recipes (train RECIPE)\n{recipes}\n\ntables and figures (reproduce NAME)\n{tables}\n\n"
        f"data (--data)\n{sources}"
    )


def _table(rows: Any) -> str:
    rows = [(str(name), str(text)) for name, text in rows]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def _closest(name: str, known: Iterable[str]) -> list[str]:
    """The first known name that begins with this one, else the one that is most like it, else nothing."""
    known = sorted(known)
    return [one for one in known if one.startswith(name)][:1] or difflib.get_close_matches(name, known, n=1)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = _closest(name, known)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _complain(name: str, message: str) -> None:
    sys.stderr.write(f"{name}: error: {' '.join(message.split())}\n")
