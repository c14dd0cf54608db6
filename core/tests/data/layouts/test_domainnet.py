"""DomainNet: official lists beside the folder of a domain, or a prepared image folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from attnmap_core.data.sources import load_data
from PIL import Image

# One of the real classes is called "train", which must not be taken for a split.
CLASSES = ["aircraft_carrier", "train", "zebra"]


@pytest.fixture
def domainnet(tmp_path: Path, photo, text) -> Path:
    root = tmp_path / "domainnet"
    for domain in ("clipart", "sketch"):
        rows = {"train": [], "test": []}
        for label, name in enumerate(CLASSES):
            for i in range(1, 4):
                photo(root / domain / name / f"{domain}_{i}.jpg")
                rows["test" if i == 3 else "train"].append(f"{domain}/{name}/{domain}_{i}.jpg {label}")
        text(root, {f"{domain}_{split}.txt": "\n".join(reversed(of)) for split, of in rows.items()})
    return root


def test_official_lists(domainnet: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train = load_data(f"domainnet:{domainnet / 'clipart'}", "train")
    assert train.labels == CLASSES
    assert train.image_ids[0] == "zebra/clipart_2.jpg"
    assert train.targets.tolist() == [2, 2, 1, 1, 0, 0]
    assert "lists of 9 images" in caplog.text
    test = load_data(f"domainnet:{domainnet / 'sketch'}", "test")
    assert (test.name, test.targets.tolist()) == ("domainnet:sketch", [2, 1, 0])


def test_recognised_in_any_spelling(domainnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_data(str(domainnet / "clipart"), "test").name == "domainnet:clipart"
    monkeypatch.chdir(domainnet / "clipart")
    assert load_data(".", "test").name == load_data("domainnet:.", "test").name == "domainnet:clipart"


def test_a_list_of_something_else_beside_a_folder(tmp_path: Path, photo, text) -> None:
    photo(tmp_path / "photos" / "cat" / "a.jpg")
    text(tmp_path, {"photos_train.txt": "a.jpg", "photos_test.txt": "a.jpg"})
    assert load_data(str(tmp_path / "photos"), "all").name == "folder:photos"


@pytest.mark.parametrize("name", ["val", "test"])
def test_prepared_folders(tmp_path: Path, photo, name: str) -> None:
    for split in ("train", name):
        for of in reversed(CLASSES):
            photo(tmp_path / "clipart" / split / of / "a.jpg")
    for split in ("train", "test"):
        data = load_data(f"domainnet:{tmp_path / 'clipart'}", split)
        assert (data.name, data.labels, len(data)) == ("domainnet:clipart", CLASSES, 3)


def test_gray_cmyk_and_broken_photos(domainnet: Path, refusal) -> None:
    folder = domainnet / "clipart"
    Image.new("L", (5, 4)).save(folder / "zebra" / "clipart_3.jpg")
    Image.new("CMYK", (5, 4)).save(folder / "train" / "clipart_3.jpg")
    assert {sample.image.mode for sample in load_data(f"domainnet:{folder}", "test")} == {"RGB"}
    (folder / "zebra" / "clipart_3.jpg").write_bytes(b"no photo")
    assert "clipart_3.jpg: not an image" in refusal(f"domainnet:{folder}", "test")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            "clipart/zebra/clipart_3.jpg",
            "clipart_test.txt:1: expected 'clipart/<class>/<file> <label 0..344>'",
        ),
        ("clipart/zebra/clipart_3.jpg 345", "clipart_test.txt:1: expected"),
        ("clipart/zebra/clipart_3.jpg -1", "clipart_test.txt:1: expected"),
        ("sketch/zebra/sketch_3.jpg 2", "clipart_test.txt:1: expected"),
        ("clipart/clipart_3.jpg 2", "clipart_test.txt:1: expected"),
        ("clipart/zebra/clipart_3.jpg 1", "the folder zebra has label 1, but before train had 1"),
        (
            "clipart/zebra/clipart_3.jpg 3",
            "the folder zebra has label 3, but before zebra had 3 or zebra had 2",
        ),
        ("clipart/zebra/x.jpg 2", "x.jpg: no such file, but"),
        (
            "clipart/zebra/clipart_3.jpg 2\nclipart/zebra/clipart_3.jpg 2\n",
            "clipart_test.txt:2: second row of",
        ),
    ],
)
def test_malformed_lists(domainnet: Path, text, refusal, rows: str, says: str) -> None:
    text(domainnet, {"clipart_test.txt": rows})
    assert says in refusal(f"domainnet:{domainnet / 'clipart'}", "test")


def test_no_domain(domainnet: Path, refusal) -> None:
    assert f"such as {domainnet / 'clipart'}" in refusal(f"domainnet:{domainnet}")
    for path in domainnet.glob("*.txt"):
        path.unlink()
    assert "add the lists beside the folder" in refusal(f"domainnet:{domainnet / 'clipart'}")
    assert "no such folder" in refusal(f"domainnet:{domainnet / 'real'}")


def test_one_list_only(domainnet: Path, refusal) -> None:
    (domainnet / "clipart_test.txt").unlink()
    assert "no split 'test', found train; add the list" in refusal(
        f"domainnet:{domainnet / 'clipart'}", "test"
    )
