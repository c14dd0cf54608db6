"""The chores of this repository, one session each: `nox -l` lists them, `nox -s tests` runs one.

Packages are found by their folders, `core` and `packages/*`: nothing here changes when one is added. uv
hard-links what it has downloaded into each environment, so one more of them with PyTorch costs seconds.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "types", "docs_check", "tests"]

ROOT = Path(__file__).parent
FOLDERS = {path.parent.name: path.parent for path in sorted(ROOT.glob("core/pyproject.toml"))}
FOLDERS |= {path.parent.name: path.parent for path in sorted(ROOT.glob("packages/*/pyproject.toml"))}
BENCHMARKS = {script.stem: script for script in sorted((ROOT / "benchmarks").glob("[!_]*.py"))}
TOOLS = nox.project.load_toml(ROOT / "pyproject.toml")
# One thread for each test worker, which together fill the cores; and no test may reach for the network.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
TEST_ENV = {**ONE_THREAD, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "agg"}
# Tests start many programs; where Python may not keep what it compiled, each compiles PyTorch for 10 s first.
TEST_ENV["PYTHONDONTWRITEBYTECODE"] = ""


def install_tree(session: nox.Session, *packages: str, extras: str = "train,test") -> None:
    """Install these packages from the tree, editable, together with core, on which each stands."""
    for_uv = (["-e", f"{FOLDERS[name]}[{extras}]"] for name in dict.fromkeys(["core", *packages]))
    session.install(*(argument for pair in for_uv for argument in pair))


def pytest(session: nox.Session, *arguments: str | Path) -> None:
    """Run pytest on all cores; what follows `--` on the command line comes last and so wins."""
    session.run("pytest", "--numprocesses=auto", *map(str, arguments), *session.posargs, env=TEST_ENV)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train two tiny models on the embedded default and show what they find: at most 4 minutes on 2 cores."""
    install_tree(session, "scm-wsol", extras="train")
    session.run(
        "python", "-m", "scm_wsol.quickstart", "--output-dir", "quickstart", "--overwrite", *session.posargs
    )


@nox.session
@nox.parametrize("package", list(FOLDERS), ids=list(FOLDERS))
def tests(session: nox.Session, package: str) -> None:
    """Test one package where it and core alone are installed: `nox -s "tests(scm-wsol)" -- -k boxes`."""
    install_tree(session, package)
    pytest(session, FOLDERS[package])


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style with ruff; `ruff check --fix . && ruff format .` repairs most of it."""
    session.install(*nox.project.dependency_groups(TOOLS, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of all packages with pyright, strict."""
    install_tree(session, *FOLDERS, extras="train,test,trackers,demo")
    session.install(*nox.project.dependency_groups(TOOLS, "types"))
    session.run("pyright", "--project", str(ROOT / "pyproject.toml"), *session.posargs)


@nox.session
def docs_check(session: nox.Session) -> None:
    """Run the code blocks of every README and of the other documents."""
    install_tree(session, *FOLDERS)
    pytest(session, ROOT / "docs/test_documents.py")


@nox.session
def golden(session: nox.Session) -> None:
    """Compare with the reference numbers of the optional golden data folder (ATTNMAP_GOLDEN)."""
    install_tree(session, *FOLDERS)
    pytest(session, "-m", "golden")


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that take minutes, which the other sessions leave out."""
    install_tree(session, *FOLDERS)
    pytest(session, "-m", "slow")


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Test with the lowest version that each package states of each dependency, on the lowest Python."""
    session.env["UV_RESOLUTION"] = "lowest-direct"
    install_tree(session, *FOLDERS)
    session.install("setuptools>=70")  # the oldest Triton and inductor need it and do not say so
    session.run("uv", "pip", "list", external=True)
    pytest(session)


@nox.session
def newest(session: nox.Session) -> None:
    """Test with the newest version of everything, pre-releases of PyTorch, timm and the rest included."""
    session.env["UV_PRERELEASE"] = "allow"
    install_tree(session, *FOLDERS)
    session.run("uv", "pip", "list", external=True)
    pytest(session)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build all distributions into dist/, install the wheels in a clean environment, test them elsewhere."""
    # Tests find the optional data folder beside the tree; away from it they have to be told.
    session.env["ATTNMAP_SHARED"] = os.environ.get("ATTNMAP_SHARED", str(ROOT.parent / "shared"))
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    build = ("uv", "build", "--all-packages", "--no-sources", "--out-dir", str(dist))
    session.run_install(*build, external=True)
    built = [check_wheel(session, folder, dist) for folder in FOLDERS.values()]
    session.install(*(f"{wheel}[train,test]" for wheel in built))
    with tempfile.TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        shutil.copy(ROOT / "pyproject.toml", ".")  # the settings of pytest
        for folder in FOLDERS.values():
            shutil.copytree(folder / "tests", folder.relative_to(ROOT) / "tests")
        pytest(session, "core", "packages", "--pyargs", *(wheel.name.split("-")[0] for wheel in built))


def check_wheel(session: nox.Session, folder: Path, dist: Path) -> Path:
    """Find the wheel of a package; it must hold exactly the sources and the licence."""
    sources = {path.relative_to(folder / "src") for path in (folder / "src").rglob("*") if path.is_file()}
    sources = {path for path in sources if "__pycache__" not in path.parts}
    [module] = {path.parts[0] for path in sources}
    [wheel] = dist.glob(f"{module}-*.whl")
    packed = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    packed_code = {path for path in packed if not path.parts[0].endswith(".dist-info")}
    if wrong := packed_code ^ sources:
        session.error(f"{wheel.name} and {folder.name}/src differ in {sorted(map(str, wrong))}")
    if not {"LICENSE", "py.typed"} <= {path.name for path in packed}:
        session.error(f"{wheel.name} lacks LICENSE or py.typed")
    return wheel


@nox.session(venv_backend="none")
def release(session: nox.Session) -> None:
    """Check that a tag may be released, `nox -s release -- scm-wsol==0.1.0`: version and changelog agree."""
    projects = (nox.project.load_toml(folder / "pyproject.toml")["project"] for folder in FOLDERS.values())
    versions = {project["name"]: project["version"] for project in projects}
    for tag in session.posargs:
        name, _, version = tag.partition("==")
        if versions.get(name) != version:
            session.error(
                f"{tag}: no such package and version in the pyproject.toml files, which say {versions}"
            )
        folder = dict(zip(versions, FOLDERS.values()))[name]
        changes = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
        if not re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
            session.error(
                f"{tag}: CHANGELOG.md has no heading '## {version} - YYYY-MM-DD'; write the entry first"
            )


@nox.session
def bench(session: nox.Session) -> None:
    """Run benchmarks by name, `nox -s bench -- wsol_evaluation --rounds 5`, or all; results in benchmarks/."""
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), session.posargs))
    options = session.posargs[len(names) :]
    if unknown := set(names) - set(BENCHMARKS):
        session.error(f"no benchmark {sorted(unknown)}; there are {sorted(BENCHMARKS)}")
    chosen = [BENCHMARKS[name] for name in names] or list(BENCHMARKS.values())
    install_tree(session, *FOLDERS)
    if peers := [peer for script in chosen for peer in nox.project.load_toml(script)["dependencies"]]:
        session.install(*peers)
    for script in chosen:
        session.run("python", str(script), *options, env=ONE_THREAD)
