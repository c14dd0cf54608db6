"""CIFAR from pickles as Python 2 and 3 write them; a pickle that would run something is refused."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from attnmap_core.data.layouts.cifar import read_pickle
from attnmap_core.data.sources import load_data
from attnmap_core.errors import InputError
from numpy.typing import NDArray

Dump = Callable[[Any], bytes]
TEN = [f"thing {number}" for number in range(10)]


def python2(value: Any) -> bytes:
    """A pickle as Python 2 and its NumPy wrote the official archives: protocol 2, text of bytes, numpy.core."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("latin1")
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    assert isinstance(value, np.ndarray)
    content = value.tobytes()
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    shape = b"(" + b"".join(map(_python2, value.shape)) + b"t"
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + 2 * _python2(-1) + b"K\x00tb"
    return start + b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<i", len(content)) + content + b"tb"


def modern(protocol: int) -> Dump:
    return lambda value: pickle.dumps(value, protocol=protocol)


def pixels_of(seed: int, count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_cifar10(folder: Path, dump: Dump, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    meta = {"num_cases_per_batch": count, "label_names": TEN, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(dump(meta))
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for seed, name in reversed(list(enumerate(names))):
        labels = [(seed * count + i) % 10 for i in range(count)]
        batch = {"batch_label": name, "labels": labels, "data": pixels_of(seed, count)}
        (folder / name).write_bytes(dump(batch))
    return folder


@pytest.fixture(params=[python2, modern(2), modern(4), modern(5)], ids=["python2", "2", "4", "5"])
def dump(request: pytest.FixtureRequest) -> Dump:
    return request.param


def test_cifar10_equals_torchvision(tmp_path: Path, dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", dump)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "_load_meta", lambda self: setattr(self, "classes", TEN)
    )
    for split, train in (("train", True), ("test", False)):
        ours = load_data(f"cifar10:{folder}", split)
        theirs = torchvision.datasets.CIFAR10(str(tmp_path), train=train)
        assert (len(ours), ours.labels, ours.targets.tolist()) == (len(theirs), TEN, theirs.targets)
        for sample, (image, _) in zip(ours, theirs):
            assert sample.image.mode == "RGB"
            assert sample.image.tobytes() == image.tobytes()


def test_cifar10_in_its_parent_and_recognised(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", python2)
    for place in (tmp_path, folder):
        data = load_data(str(place), "train")
        assert data.name == "cifar10:cifar-10-batches-py"
        assert data.image_ids[:5] == [*(f"data_batch_1/0000{i}" for i in range(4)), "data_batch_2/00000"]


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    fine = [f"fine {number}" for number in range(100)]
    (folder / "meta").write_bytes(python2({"fine_label_names": fine, "coarse_label_names": TEN}))
    for name, labels in (("test", [99, 3]), ("train", list(range(100)))):
        batch = {"fine_labels": labels, "coarse_labels": [0] * len(labels), "data": pixels_of(1, len(labels))}
        (folder / name).write_bytes(python2(batch))
    train, test = load_data(f"cifar100:{tmp_path}", "train"), load_data(str(folder), "test")
    assert train.targets.tolist() == list(range(100))
    assert test.targets.tolist() == [99, 3]
    assert test.labels == fine
    assert (test.name, test[0].image.size) == ("cifar100:cifar-100-python", (32, 32))


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, protocol: int, refusal) -> None:
    folder, marker = write_cifar10(tmp_path / "cifar-10-batches-py", python2), tmp_path / "ran"
    bad = folder / "data_batch_3"
    bad.write_bytes(pickle.dumps({"data": [Hostile(marker)], "labels": []}, protocol=protocol))
    message = refusal(f"cifar10:{folder}")
    assert "data_batch_3: not a pickle of plain data (it asks for " in message
    assert ".mkdir)" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(U\x051 + 1tR.",
        b"cos\nsystem\n(U\x04truetR.",
        b"cnumpy\nload\n(U\x01xtR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\nK\x00\x85U\x01btR.",
        b"c_codecs\nencode\n(U\x01xU\x05rot13tR.",
        b"(iposixpath\nexists\n.",
        b"\x80\x02}",
        b"",
        b"nothing like it",
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match="a: not a pickle of plain data"):
        read_pickle(tmp_path / "a")


def test_arrays_and_numbers_survive(tmp_path: Path, dump: Dump) -> None:
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    (tmp_path / "a").write_bytes(dump({"array": values, "turned": values.T.copy(), "text": ["ab"]}))
    found = read_pickle(tmp_path / "a", "array")
    np.testing.assert_array_equal(found["array"], values)
    np.testing.assert_array_equal(found["turned"], values.T)
    assert found["text"] == ["ab"]
    turned = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    for protocol in (2, 4, 5):
        (tmp_path / "b").write_bytes(pickle.dumps({b"x": turned, b"y": np.int64(7)}, protocol=protocol))
        found = read_pickle(tmp_path / "b", "x", "y")
        np.testing.assert_array_equal(found["x"], turned)
        assert found["y"] == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": [0, 1, 2, 10]}, "data_batch_2: image 3 has label 10, expected 0..9"),
        ({"labels": [0, 1, -1, 2]}, "data_batch_2: image 2 has label -1"),
        ({"labels": [0, 1, 2]}, "data_batch_2: 4 images and 3 labels, expected 4 of both"),
        ({"data": pixels_of(0, 3), "labels": [0, 1, 2]}, "3 images and 3 labels, expected 4"),
        ({"data": pixels_of(0, 4)[:, :768]}, "data are uint8 (4, 768), expected uint8 (n, 3072)"),
        ({"data": "text"}, "data are str"),
    ],
)
def test_malformed_batches(tmp_path: Path, refusal, change: dict[str, Any], says: str) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", python2)
    batch = {"labels": [0, 1, 2, 3], "data": pixels_of(0, 4)} | change
    (folder / "data_batch_2").write_bytes(python2(batch))
    assert says in refusal(f"cifar10:{folder}")


def test_missing_files_and_names(tmp_path: Path, refusal) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", python2)
    (folder / "data_batch_4").unlink()
    assert "data_batch_4: no such file" in refusal(f"cifar10:{folder}")
    (folder / "data_batch_4").write_bytes(python2({"labels": []}))
    assert "data_batch_4: no data in it, found labels" in refusal(f"cifar10:{folder}")
    (folder / "batches.meta").write_bytes(python2({"label_names": TEN[:9]}))
    assert "batches.meta: 9 class names, expected 10" in refusal(f"cifar10:{folder}")
    (folder / "batches.meta").unlink()
    assert "batches.meta: no such file" in refusal(f"cifar10:{folder}")
    (tmp_path / "empty").mkdir()
    assert "empty folder, expected CIFAR-100" in refusal(f"cifar100:{tmp_path / 'empty'}")
