"""Small data sets in the official layouts, written by the tests themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from attnmap_core.data.sources import load_data
from attnmap_core.errors import InputError
from PIL import Image

Write = Callable[..., Path]


@pytest.fixture
def photo() -> Write:
    """Write a photo of a given size; its folders are made."""

    def write(path: Path, size: tuple[int, int] = (20, 10)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "gray").save(path)
        return path

    return write


@pytest.fixture
def text() -> Write:
    """Write text files: a mapping of names below a folder to their lines, without a last newline."""

    def write(folder: Path, files: Mapping[str, str]) -> Path:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return folder

    return write


@pytest.fixture
def refusal() -> Callable[..., str]:
    """Load, expect an InputError, give its message, which must be one line."""

    def load(spec: str, split: str = "train", **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            list(load_data(spec, split, **options))  # what is wrong with a photo shows when it is read
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return load
