"""What holds for the repository as a whole, read from its files; skipped where the tests run away from it.

After a wanted change of the public names: ``python core/tests/test_repository.py`` writes the new lists.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CORE = "attnmap_core"
EXTRAS = ("accelerate", "datasets", "gradio", "tensorboard", "wandb", "trackio", "cv2", "pycocotools")

# "The rest is that of :func:`other`" in place of explaining the same parameters twice.
REST = re.compile(r"\bthe (?:rest|others?)\b[^.]*`", re.IGNORECASE)

pytestmark = pytest.mark.skipif(not (ROOT / "noxfile.py").is_file(), reason="the source tree is elsewhere")


class Package(NamedTuple):
    """A distribution of this repository."""

    folder: Path
    project: dict
    source: Path

    @property
    def modules(self) -> dict[str, ast.Module]:
        """Dotted name and syntax tree of each module."""
        trees = {}
        for path in sorted(self.source.rglob("*.py")):
            parts = path.relative_to(self.source.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        return trees


def find_packages() -> list[Package]:
    found = []
    for file in [*ROOT.glob("core/pyproject.toml"), *sorted(ROOT.glob("packages/*/pyproject.toml"))]:
        [source] = (path.parent for path in file.parent.glob("src/*/__init__.py"))
        found.append(Package(file.parent, tomllib.loads(file.read_text(encoding="utf-8"))["project"], source))
    return found


PACKAGES = find_packages()
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.folder.name)


def imported_packages(tree: ast.Module) -> Iterator[str]:
    """First component of every absolute import, wherever in the module it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@each_package
def test_imports_lead_to_core_only(package: Package) -> None:
    """Core knows no paper, and no package knows another."""
    ours = {other.source.name for other in PACKAGES} - {package.source.name, CORE}
    wrong = {name: ours.intersection(imported_packages(tree)) for name, tree in package.modules.items()}
    assert not any(wrong.values()), {name: found for name, found in wrong.items() if found}


@each_package
def test_imports_are_declared(package: Package) -> None:
    """What the code imports is a dependency or in an extra, not there by luck of another package's needs."""
    [core] = (other for other in PACKAGES if other.source.name == CORE)
    needs = [*package.project["dependencies"]]
    for owner in (core, package):  # the extras of a package are those of core and more
        needs += [need for extra in owner.project["optional-dependencies"].values() for need in extra]
    declared = {canonicalize_name(Requirement(need).name) for need in needs}
    imported = {name for tree in package.modules.values() for name in imported_packages(tree)}
    # Triton is a part of the PyTorch builds that have CUDA, and on no index for other platforms.
    foreign = imported - set(sys.stdlib_module_names) - {package.source.name, "triton"}
    providers = packages_distributions()
    missing = {
        name for name in foreign if declared.isdisjoint(map(canonicalize_name, providers.get(name, [name])))
    }
    assert not missing, f"add to {package.folder.name}/pyproject.toml: {missing}"


def public_names(package: Package) -> list[str]:
    """Functions and classes without underscore, and what ``__all__`` or an ``__init__`` offers besides."""
    names = set()
    for module, tree in package.modules.items():
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add((module, node.name))
            elif (
                isinstance(node, ast.ImportFrom)
                and (package.source.parent / module.replace(".", "/")).is_dir()
            ):
                names |= {(module, alias.asname or alias.name) for alias in node.names if node.level}
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= {(module, name) for name in ast.literal_eval(node.value)}
    return sorted(f"{module}.{name}" for module, name in names if not name.startswith("_"))


@each_package
def test_no_public_name_is_lost(package: Package) -> None:
    """New names may come as they like; one that goes was perhaps relied upon."""
    listed = (package.folder / "tests/public_names.txt").read_text(encoding="utf-8").split()
    gone = sorted(set(listed) - set(public_names(package)))
    assert not gone, f"if this is wanted, python core/tests/test_repository.py writes the new list: {gone}"


def documented(tree: ast.Module) -> Iterator[tuple[str, str, list[str]]]:
    """Name, docstring and parameters of the public functions, classes and methods of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list):
                continue  # the signatures of one function, which is explained once
            yield node.name, ast.get_docstring(node) or "", parameters(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            init = next((method for method in methods if method.name == "__init__"), None)
            fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            text = ast.get_docstring(node) or ""
            if init and not section(text, "Args"):
                text += "\n" + (ast.get_docstring(init) or "")
            yield node.name, text, parameters(init) if init else fields
            for method in methods:
                if not method.name.startswith("_") and ast.get_docstring(method):
                    yield f"{node.name}.{method.name}", ast.get_docstring(method) or "", parameters(method)


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, [given.vararg, given.kwarg])]
    return [argument.arg for argument in every if argument.arg not in {"self", "cls"}]


def section(docstring: str, title: str) -> list[str]:
    """Names explained in a section of a Google style docstring; ``a, b: both`` are two."""
    found = re.search(rf"^( *){title}:\n((?:\1 +.*\n|\s*\n)+)", docstring + "\n", re.MULTILINE)
    if not found:
        return []
    lines = [line for line in found[2].splitlines() if line.strip()]
    indent = len(lines[0]) - len(lines[0].lstrip())
    entries = (line.strip() for line in lines if len(line) - len(line.lstrip()) == indent)
    names = (entry.split(":")[0] for entry in entries if ":" in entry)
    return [name.strip(" `*") for entry in names for name in entry.split(",")]


def unnamed(names: list[str], text: str) -> list[str]:
    return [name for name in names if not re.search(rf"\b{name}\b", text)]


@each_package
def test_docstrings_fit_their_signatures(package: Package) -> None:
    """Every public thing is explained; an ``Args`` section names each parameter and nothing else."""
    complaints = []
    for module, tree in package.modules.items():
        if not ast.get_docstring(tree):
            complaints.append(f"{module}: no docstring")
        for name, text, names in documented(tree):
            explained = section(text, "Args")
            if not text:
                complaints.append(f"{module}.{name}: no docstring")
            elif unknown := [arg for arg in explained if arg not in names]:
                complaints.append(f"{module}.{name}: explains {unknown}, which it does not take")
            elif explained and not REST.search(text) and (silent := unnamed(names, text)):
                complaints.append(f"{module}.{name}: does not explain {silent}")
    assert not complaints, "\n".join(complaints)


@each_package
def test_version_has_one_value_and_a_changelog_entry(package: Package) -> None:
    version = package.project["version"]
    init = (package.source / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.*)"$', init, re.MULTILINE) == [version]
    changelog = (package.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE)


@each_package
def test_licence_is_the_same_everywhere(package: Package) -> None:
    assert (package.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_no_path_of_one_machine_and_no_registry_host() -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    roots = "home|root|work|tmp|mnt|opt|Users"
    hosts = r"pypi\.org|pythonhosted|download\.pytorch"
    # /home/me stands for anybody's, in examples and tests.
    pattern = re.compile(rf"(?<![\w./:>)\]}}-])/(?:{roots})/(?!me/)\w|{hosts}")
    found = []
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yml", ".json", ".html", ".txt"} and path != Path(
            __file__
        ):
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            found += [
                f"{name}:{number}: {line}" for number, line in enumerate(lines, 1) if pattern.search(line)
            ]
    assert not found, "\n".join(found)


def test_workflows_ask_for_sessions_that_exist() -> None:
    sessions = re.findall(
        r"^@nox.session.*\n(?:@.*\n)*def (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE
    )
    for path in [ROOT / ".ci/run", *ROOT.glob(".github/workflows/*.yml")]:
        text = path.read_text(encoding="utf-8")
        asked = re.findall(r"--sessions \"?([a-z_ ]+)|^ +session: \[(.*)\]", text, re.MULTILINE)
        names = set(re.findall(r"\w+", " ".join(map(" ".join, asked))))
        assert names, f"{path.name} asks for no session"
        assert names <= set(sessions), f"{path.name}: {names - set(sessions)}"


def test_only_the_publishing_job_gets_more_than_read_access() -> None:
    for path in ROOT.glob(".github/workflows/*.yml"):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, path.name
        granted = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
        assert granted == ({"publish": {"id-token": "write"}} if path.stem == "release" else {}), path.name
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        unpinned = [step["uses"] for step in steps if "uses" in step and "@" not in step["uses"]]
        assert not unpinned, path.name


IMPORT_ALL = """
import importlib, pkgutil, sys
module, *blocked = sys.argv[1:]
sys.modules.update(dict.fromkeys(blocked))  # None there makes an import of that name fail
package = importlib.import_module(module)
from attnmap_core.errors import InputError
for found in pkgutil.walk_packages(package.__path__, module + "."):
    try:
        importlib.import_module(found.name)
    except InputError as error:
        assert "[train]" in str(error) or "[demo]" in str(error), f"{found.name}: {error}"
slow = {"matplotlib", "pandas", "scipy.io"} & set(sys.modules)
assert not slow, f"imported before they are needed: {slow}"
"""


@each_package
def test_imports_need_no_extra_and_say_nothing(package: Package) -> None:
    paths = [
        str(other.source.parent) for other in PACKAGES if other.source.name in {CORE, package.source.name}
    ]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package.source.name, *EXTRAS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


if __name__ == "__main__":
    for package in PACKAGES:
        names = "\n".join(public_names(package))
        (package.folder / "tests/public_names.txt").write_text(names + "\n", encoding="utf-8")
