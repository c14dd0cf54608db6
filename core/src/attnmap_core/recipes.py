"""Recipes: TOML files that say a run, in the order a reader needs it.

A recipe opens with comments (the published number, hours and hardware, the exact command); below are fields
of the package's config dataclass::

    # SCM with DeiT-S on CUB-200-2011
    # paper: GT-known 96.6 (protocol scm); 2 hours on one A100
    # command: scm-wsol train cub-scm --data cub:CUB_200_2011
    method = "scm"
    lr = 5e-5
    betas = [0.9, 0.999]
    clip_grad = "none"

``"none"`` is the empty value of an optional field, which TOML itself cannot say.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import importlib.resources
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from .errors import InputError

Config = TypeVar("Config")


@dataclass(frozen=True)
class Recipe:
    """A recipe of a package: ``name`` to ask for it, its ``path``, ``header`` without comment signs."""

    name: str
    path: Path
    header: str

    @property
    def summary(self) -> str:
        """First line of the header."""
        return self.header.partition("\n")[0]


def list_recipes(source: str | Path) -> list[Recipe]:
    """Recipes of a package or folder, by name.

    Args:
        source: import name of a package, whose folder ``recipes`` is read; or a folder, as a :class:`Path`.
    """
    folder = source if isinstance(source, Path) else Path(str(importlib.resources.files(source))) / "recipes"
    return [Recipe(path.stem, path, _header(_read(path))) for path in sorted(folder.glob("*.toml"))]


def find_recipe(source: str | Path, name: str) -> Recipe:
    """The recipe of that name in ``source``, or the file where ``name`` ends with ``.toml``.

    Raises:
        InputError: if there is none, with the closest name and all known ones.
    """
    if name.endswith(".toml"):
        path = Path(name)
        return Recipe(path.stem, path, _header(_read(path)))
    known = {recipe.name: recipe for recipe in list_recipes(source)}
    if name not in known:
        hint = _did_you_mean(name, known)
        raise InputError(f"{name}: no such recipe; {hint}known: {', '.join(known)}, or any .toml file")
    return known[name]


def recipe_header(source: str | Path, name: str) -> str:
    """Comment block at the top of a recipe, without comment signs; see :func:`find_recipe`."""
    return find_recipe(source, name).header


def load_recipe(
    source: str | Path, name: str, config_class: type[Config], overrides: Mapping[str, Any] | None = None
) -> Config:
    """Read a recipe into the config dataclass.

    Args:
        source: see :func:`list_recipes`.
        name: a recipe's name, or a path that ends with ``.toml``.
        config_class: dataclass of plain-valued fields.
        overrides: values that replace the recipe's. Another value of a field without its ``_options`` drops the
            recipe's; see :func:`outdated_options`.

    Raises:
        InputError: for an unknown recipe or field (with the closest name), a value of the wrong type, or a
            file that is not TOML.

    Example:
        >>> import tempfile
        >>> @dataclass
        ... class Config:
        ...     lr: float = 0.1
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "quick.toml").write_text("# One minute on a laptop\\nlr = 1\\n")
        >>> load_recipe(folder, "quick", Config)
        Config(lr=1.0)
        >>> load_recipe(folder, "quick", Config, {"lrs": 1})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        attnmap_core.errors.InputError: overrides of quick: no field lrs; did you mean lr? ...
    """
    path = find_recipe(source, name).path
    try:
        values = tomllib.loads(_read(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML ({error}); correct that line") from None
    checked = _check_fields(str(path), config_class, values)
    replaced = _check_fields(f"overrides of {name}", config_class, overrides or {})
    defaults = {f.name: f.default for f in dataclasses.fields(cast(Any, config_class))}
    for options in outdated_options(defaults | checked, replaced):
        checked.pop(options, None)
    return config_class(**checked | replaced)


def outdated_options(values: Mapping[str, Any], replaced: Mapping[str, Any]) -> list[str]:
    """Fields ``NAME_options`` of a recipe that another value of ``NAME`` makes void: those of another network or loss.

    Options of a data source stay where only its path changes.

    Example:
        >>> values = {"backbone": "resnet50", "backbone_options": {"output_stride": 16}}
        >>> values |= {"data": "cub:", "data_options": {"split_file": "my.txt"}}
        >>> outdated_options(values, {"backbone": "vit", "data": "cub:/photos"})
        ['backbone_options']
    """

    def kind(name: str, value: Any) -> Any:
        return str(value).partition(":")[0] if name == "data" else value

    owners = (
        (options, options.removesuffix("_options")) for options in values if options.endswith("_options")
    )
    return [
        options
        for options, name in owners
        if name in replaced and kind(name, replaced[name]) != kind(name, values.get(name))
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read as a recipe ({reason}); check the path") from None


def _header(text: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(lines).strip()


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


# --- Values against types -----------------------------------------------------------------------------------


def _check_fields(where: str, config_class: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as the types of the fields, which must exist."""
    hints = typing.get_type_hints(config_class)
    known = {f.name: hints[f.name] for f in dataclasses.fields(config_class) if f.init}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(
                f"{where}: no field {name}; {_did_you_mean(name, known)}all fields: {', '.join(known)}"
            )
        try:
            checked[name] = _as_type(value, known[name])
        except TypeError:
            expected = _type_name(known[name])
            raise InputError(f"{where}: {name} = {value!r}: expected {expected}; correct it") from None
    return checked


def _as_type(value: Any, hint: Any) -> Any:
    """``value``, as TOML or Python gives it, as a value of type ``hint``; TypeError where it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in arguments and (value is None or value == "none"):
            return None
        # The very type first, so that 1 stays an int in float | int.
        for option in sorted(arguments, key=lambda option: type(value) is not option):
            try:
                return _as_type(value, option)
            except TypeError:
                continue
    elif origin is Literal:
        if value in arguments and type(value) in {type(option) for option in arguments}:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        items = cast(list[Any], value)
        kinds = arguments[:1] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(items):
            return tuple(_as_type(item, kind) for item, kind in zip(items, kinds))
    elif origin is list and isinstance(value, (list, tuple)):
        return [_as_type(item, arguments[0]) for item in cast(list[Any], value)]
    elif origin is dict and isinstance(value, Mapping):
        pairs = cast(Mapping[Any, Any], value).items()
        return {_as_type(key, arguments[0]): _as_type(item, arguments[1]) for key, item in pairs}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and issubclass(hint, Path) and isinstance(value, (str, Path)):
        return hint(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list of {_type_name(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(map(_type_name, arguments))}"
    if origin is dict:
        return f"a table of {_type_name(arguments[1])}"
    plain: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    plain |= {types.NoneType: "none", Path: "a path"}
    return plain.get(hint, str(hint))


# --- Writing down what ran ----------------------------------------------------------------------------------


def plain_values(config: Any) -> dict[str, Any]:
    """Fields of a config dataclass as JSON values: tuples become lists, paths become text.

    Example:
        >>> @dataclass
        ... class Config:
        ...     betas: tuple[float, float] = (0.9, 0.99)
        >>> plain_values(Config())
        {'betas': [0.9, 0.99]}
    """
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def resolved_toml(config: Any, header: str = "") -> str:
    """The whole configuration as a recipe: :func:`load_recipe` gives back an equal one.

    Args:
        config: dataclass of plain-valued fields.
        header: comment block for the top, without comment signs.

    Example:
        >>> @dataclass
        ... class Config:
        ...     lr: float = 5e-5
        ...     clip_grad: float | None = None
        >>> print(resolved_toml(Config(), "Two fields"))
        # Two fields
        <BLANKLINE>
        lr = 5e-05
        clip_grad = "none"
        <BLANKLINE>
    """
    comments = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    lines = "".join(f"{name} = {_toml(value)}\n" for name, value in plain_values(config).items())
    return f"{comments}\n{lines}" if comments else lines


def _toml(value: Any) -> str:
    match value:
        case None:
            return '"none"'
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value)  # inf and nan are spelled as in TOML
        case list():
            return "[" + ", ".join(map(_toml, cast(list[Any], value))) + "]"
        case dict():
            pairs = cast(dict[str, Any], value).items()
            return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in pairs) + "}"
        case _:
            # JSON's escapes are TOML's, which in addition escapes DEL.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def run_record(
    seed: int | None = None,
    packages: Iterable[str] = (),
    arguments: list[str] | None = None,
) -> dict[str, Any]:
    """What is needed to know later how a result came about, as JSON values.

    Args:
        seed: of the run.
        packages: distributions to list besides the core and what it stands on, such as ``("scm-wsol",)``.
        arguments: command line; default that of this process.

    Returns:
        ``command``, ``seed``, ``date`` (UTC), ``commit`` (of this code's repository, None where it is
        installed) and ``dirty`` (whether files differ from the commit), ``versions``, ``hardware``. No paths
        but those that were typed.
    """
    import torch

    stack = ("python", "attnmap-core", *packages, "torch", "timm", "numpy", "accelerate", "datasets")
    versions = {name: _version(name) for name in stack}
    commit, dirty = _commit()
    return {
        "command": _command(sys.argv if arguments is None else arguments),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "versions": {name: version for name, version in versions.items() if version is not None},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "ram_gb": _ram_gb(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def _version(distribution: str) -> str | None:
    if distribution == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command(arguments: list[str]) -> str:
    # python -m package.module puts the module's whole path first; say it as it was typed
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and arguments and Path(arguments[0]).suffix == ".py":
        return shlex.join(["python", "-m", module.name.removesuffix(".__main__"), *arguments[1:]])
    return shlex.join([Path(arguments[0]).name, *arguments[1:]]) if arguments else ""


def _commit() -> tuple[str | None, bool | None]:
    here = Path(__file__)

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *command], capture_output=True, text=True)
        except FileNotFoundError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment inside somebody else's repository must not report that repository's commit.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None, None
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _ram_gb() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
