"""Writing files so that a reader never meets half of one: to a temporary neighbour first, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# No permission, a file where a folder should be, or a mount point, which cannot be swapped.
_NOT_WRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EBUSY,
    errno.EXDEV,
}


@contextmanager
def _explained(target: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise InputError(
                f"{target}: no space left to write it ({os.strerror(error.errno or 0)}); nothing was replaced; "
                "free some space or choose another output folder"
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise InputError(
                f"{target}: cannot be written ({os.strerror(error.errno or 0)}); choose another output folder"
            ) from error
        raise


@contextmanager
def atomic_file(path: str | Path) -> Generator[Path]:
    """Give a temporary path beside ``path``; move it there when the block ends without an error.

    Args:
        path: the file to write; its folder is made when missing. An existing file is replaced.

    Raises:
        InputError: if the disk is full or the folder cannot be written; the old file is then untouched.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_file(Path(folder) / "a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    temporary: Path | None = None
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            temporary = None
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Generator[Path]:
    """Like :func:`atomic_file` for a folder: filled aside, then swapped in as a whole.

    An existing folder at ``path`` is replaced only after the new one is complete.
    """
    path = Path(path)
    temporary: Path | None = None
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}-"))
            try:
                yield temporary
            except InputError as error:  # of a file inside, which the reader shall know by its place to be
                raise InputError(str(error).replace(str(temporary), str(path))) from error
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}-old-"))
                try:
                    path.replace(retired / path.name)
                except OSError:
                    retired.rmdir()
                    raise
                temporary.replace(path)
                shutil.rmtree(retired)
            else:
                temporary.replace(path)
            temporary = None
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically; errors as in :func:`atomic_file`.

    A file name that is not Unicode, as Python holds it, is written with a backslash, as JSON would.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON atomically; refuses NaN, which JSON cannot say."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is an :class:`InputError` that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); write it again or delete it") from None


def new_output_folder(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Check that ``path`` may receive results and make it.

    A folder that already holds something is an error unless ``resume`` (keep) or ``overwrite``
    (delete its content first) is given.

    Raises:
        InputError: if the folder is not empty, is a file, or cannot be made.
    """
    path = Path(path)
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one of them")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, expected a folder; choose another output folder")
    if path.is_dir() and any(path.iterdir()) and not resume:
        if not overwrite:
            raise InputError(
                f"{path}: output folder exists and is not empty; pass --resume to go on, --overwrite to replace it, "
                "or choose another"
            )
        with _explained(path):
            for inside in path.iterdir():  # not the folder itself, which may be a link or a mount point
                shutil.rmtree(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
