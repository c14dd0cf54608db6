"""Files and folders that are whole or not there; wrong output folders in one line."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from attnmap_core.errors import InputError
from attnmap_core.files import (
    atomic_file,
    atomic_folder,
    new_output_folder,
    read_json,
    write_json,
    write_text,
)

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere"
)


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- Files ------------------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent  # on the same disk: renaming is one step
        assert temporary.suffix == ".txt"
        temporary.write_text("whole")
        assert not path.exists()
    assert content(tmp_path) == {"new/a.txt": "whole"}


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "Größe 猫")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Größe 猫"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt(), FULL])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    wanted = InputError if failure is FULL else type(failure)
    with pytest.raises(wanted), atomic_file(path) as temporary:  # noqa: PT012
        temporary.write_text("ha")
        raise failure
    assert content(tmp_path) == {"a.txt": "old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_in_one_line(tmp_path: Path, number: int) -> None:
    with pytest.raises(InputError) as failure, atomic_file(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "a.txt") in one_line(failure)
    assert "space" in one_line(failure)


def test_a_bug_is_not_taken_for_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="odd") as failure, atomic_file(tmp_path / "a.txt"):
        raise OSError(errno.EIO, "odd")
    assert not isinstance(failure.value, ValueError)


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as failure:
        write_text(tmp_path / "file" / "a.txt", "x")
    assert "cannot be written" in one_line(failure)


@as_root
def test_a_folder_without_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"a\.txt: cannot be written"):
        write_text(locked / "a.txt", "x")
    with pytest.raises(InputError, match="run: cannot be written"), atomic_folder(locked / "run"):
        pytest.fail("the block must not run")
    with pytest.raises(InputError, match="run: cannot be written"):
        new_output_folder(locked / "run")


def test_permissions_are_those_of_ordinary_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    write_text(tmp_path / "a.txt", "")
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "folder"):
        pass
    for ours, ordinary in (("a.txt", "plain.txt"), ("folder", "plain")):
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (ours, ordinary)]
        assert modes[0] == modes[1]


def test_long_names_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".txt")
    write_text(path, "x")
    assert path.read_text() == "x"


# --- JSON -------------------------------------------------------------------------------------------------


def test_json_is_readable_and_comes_back(tmp_path: Path) -> None:
    value = {"name": 'Größe 猫 "q"', "list": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "猫" in text
    assert text.endswith("}\n")
    assert read_json(tmp_path / "a.json") == value == json.loads(text)


def test_text_that_is_not_unicode_comes_back_from_json(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    write_json(tmp_path / "a.json", [name])
    assert read_json(tmp_path / "a.json") == [name]


def test_json_cannot_say_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert content(tmp_path) == {"a.json": "1\n"}


@pytest.mark.parametrize(("data", "words"), [(b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON")])
def test_broken_json_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError) as failure:
        read_json(tmp_path / "a.json")
    assert f"{tmp_path / 'a.json'}: {words}" in one_line(failure)


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")


# --- Folders ----------------------------------------------------------------------------------------------


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    with atomic_folder(path) as temporary:
        (temporary / "a.txt").write_text("1")
        assert not path.exists()
    assert content(tmp_path) == {"new/run/a.txt": "1"}


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with atomic_folder(path) as temporary:
        (temporary / "new.txt").write_text("new")
        assert content(path) == {"old.txt": "old"}
    assert content(tmp_path) == {"run/new.txt": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt(), FULL])
def test_a_failure_keeps_the_old_folder(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises((type(failure), InputError)), atomic_folder(path) as temporary:  # noqa: PT012
        (temporary / "half.txt").write_text("ha")
        raise failure
    assert content(tmp_path) == {"run/old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_errors_name_the_file_where_it_was_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FULL

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError) as failure, atomic_folder(tmp_path / "run") as temporary:
        write_json(temporary / "a.json", 1)
    assert one_line(failure).startswith(f"{tmp_path / 'run' / 'a.json'}: no space left")


def test_a_folder_that_cannot_be_swapped_is_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mounted"
    path.mkdir()
    (path / "old.txt").write_text("old")
    rename = Path.replace

    def busy(self: Path, target: Any) -> Path:
        if self == path:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(InputError) as failure, atomic_folder(path) as temporary:
        (temporary / "new.txt").write_text("new")
    assert "mounted" in one_line(failure)
    assert content(tmp_path) == {"mounted/old.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["mounted"]


def test_a_new_output_folder_is_made(tmp_path: Path) -> None:
    assert new_output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    assert new_output_folder(str(tmp_path / "a" / "b")).is_dir()  # an empty one is as good as none


def test_a_folder_with_something_in_it_needs_a_word(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(InputError) as failure:
        new_output_folder(tmp_path)
    assert "--resume" in one_line(failure)
    assert "--overwrite" in one_line(failure)
    assert content(new_output_folder(tmp_path, resume=True)) == {"old.txt": "old"}
    assert content(new_output_folder(tmp_path, overwrite=True)) == {}


def test_a_linked_output_folder_is_emptied_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old.txt").write_text("old")
    (tmp_path / "run").symlink_to(tmp_path / "disk", target_is_directory=True)
    folder = new_output_folder(tmp_path / "run", overwrite=True)
    assert folder.is_symlink()
    assert content(tmp_path / "disk") == {}


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="file: is a file, expected a folder"):
            new_output_folder(tmp_path / "file", **words)
    assert (tmp_path / "file").is_file()


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(InputError, match="exclude"):
        new_output_folder(tmp_path, resume=True, overwrite=True)
    assert content(tmp_path) == {"old.txt": "old"}
