"""An index of photos, queries with their sheet, near-duplicates, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from attnmap_core.errors import InputError
from attnmap_core.metrics import nearest
from crossattn_dml import EmbeddingModel
from crossattn_dml.cli import main
from crossattn_dml.search import PhotoIndex, build_demo, fingerprint, groups_of_duplicates
from PIL import Image

TINY = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Photos (one twice under another name) and a model."""
    root = tmp_path_factory.mktemp("search")
    rng = np.random.default_rng(0)
    for k in range(6):
        pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        path = root / "photos" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((40 + k, 30), Image.Resampling.NEAREST).save(path)
    Image.open(root / "photos" / "2.png").save(root / "photos" / "copy.png")
    torch.manual_seed(0)
    EmbeddingModel("vit", 6, 32, backbone_options=TINY).save_pretrained(root / "model")
    torch.manual_seed(1)
    EmbeddingModel("vit", 6, 32, backbone_options=TINY).save_pretrained(root / "other")
    return root


@pytest.fixture(scope="module")
def index(place: Path) -> Path:
    arguments = [
        "index",
        str(place / "photos"),
        "--model",
        str(place / "model"),
        "--out",
        str(place / "index"),
    ]
    assert main(arguments) == 0
    return place / "index"


def test_index_holds_what_the_model_says(place, index):
    loaded = PhotoIndex.load(index)
    model = EmbeddingModel.from_pretrained(place / "model")
    np.testing.assert_array_equal(loaded.z, model.encode(loaded.photos))
    assert [Path(photo).name for photo in loaded.photos] == [*(f"{k}.png" for k in range(6)), "copy.png"]
    assert loaded.fingerprint == fingerprint(model)


def test_query_finds_the_photo_itself_and_writes_a_sheet(place, index, capsys):
    out = place / "found.png"
    assert (
        main(["query", str(place / "photos" / "4.png"), "--index", str(index), "--k", "3", "--out", str(out)])
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[:3] == ["4.png", "1", "1.0000"]
    assert said[1].endswith("4.png")
    loaded = PhotoIndex.load(index)
    expected = nearest(loaded.z[4:5], loaded.z, 3).indices[0]
    assert [Path(line.split()[3]).name for line in said[1:4]] == [
        Path(loaded.photos[i]).name for i in expected
    ]
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 150


def test_near_duplicates_of_a_folder(place, capsys):
    arguments = [
        "duplicates",
        str(place / "photos"),
        "--model",
        str(place / "model"),
        "--out",
        str(place / "groups"),
    ]
    assert main([*arguments, "--threshold", "0.99999"]) == 0
    found = json.loads((place / "groups" / "groups.json").read_text())
    assert [[Path(photo).name for photo in group] for group in found["groups"]] == [["2.png", "copy.png"]]
    assert "1 groups of near-duplicates among 7 photos" in capsys.readouterr().out
    assert (place / "groups" / "groups.png").stat().st_size > 0


@pytest.mark.parametrize("cells", [1, 40, 1 << 24])
def test_groups_are_the_components_of_the_graph(monkeypatch, cells):
    monkeypatch.setattr("crossattn_dml.search._CELLS", cells)
    rng = np.random.default_rng(3)
    z = rng.standard_normal((40, 3))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    z = z.astype(np.float32)
    for threshold in (0.9, 0.97, 1.0):
        near = z @ z.T >= threshold - 1e-6
        group = {i: {i} for i in range(40)}
        for i, j in zip(*near.nonzero()):
            if group[i] is not group[j]:
                group[i] |= group[j]
                for k in group[j]:
                    group[k] = group[i]
        expected = {tuple(sorted(members)) for members in group.values() if len(members) > 1}
        assert {tuple(found) for found in groups_of_duplicates(z, threshold)} == expected
    everything = groups_of_duplicates(np.ones((9, 2), np.float32) / np.sqrt(2), 0.9)  # collapsed embeddings
    assert everything == [list(range(9))]


def test_another_model_is_refused(place, index, refused):
    query = ("query", str(place / "photos" / "0.png"), "--index", str(index), "--out", str(place / "new.png"))
    assert "made by another model" in refused(*query, "--model", str(place / "other"))


def test_bad_input_is_one_line(place, index, refused, tmp_path):
    photo = str(place / "photos" / "0.png")
    query = ("query", photo, "--index", str(index), "--out", str(tmp_path / "new.png"))
    assert "k 8: expected 1 to 7" in refused(*query, "--k", "8")
    assert "no index.json in it" in refused(
        "query", photo, "--index", str(tmp_path), "--out", str(tmp_path / "a.png")
    )
    (tmp_path / "there.png").touch()
    assert "exists already" in refused(*query[:-1], str(tmp_path / "there.png"))
    assert "no such file or folder" in refused("query", "nothing.png", *query[2:])
    model = ("--model", str(place / "model"))
    assert "output folder exists" in refused("index", str(place / "photos"), *model, "--out", str(index))
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    assert "broken.jpg" in refused(
        "index", str(tmp_path / "broken.jpg"), *model, "--out", str(tmp_path / "i")
    )
    assert "none can be read" in refused(
        "index", str(tmp_path / "broken.jpg"), *model, "--out", str(tmp_path / "i"), "--skip-unreadable"
    )
    groups = ("duplicates", photo, *model, "--out", str(tmp_path / "groups"))
    assert "--threshold 2.0: expected a cosine" in refused(*groups, "--threshold", "2")


def test_damaged_index(index, tmp_path):
    good = PhotoIndex.load(index)
    PhotoIndex(good.z, good.photos[:-1], "", good.fingerprint).save(tmp_path / "short")
    with pytest.raises(InputError, match="embeddings of 6 photos"):
        PhotoIndex.load(tmp_path / "short")
    good.save(tmp_path / "cut")
    (tmp_path / "cut" / "index.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="damaged index"):
        PhotoIndex.load(tmp_path / "cut")
    with pytest.raises(InputError, match=r"gone.png: is in the index but no longer there"):
        PhotoIndex(good.z[:1], ["gone.png"], "", "").photo(0)


def test_fingerprint_follows_weights_and_preprocessing(place):
    model, other = (EmbeddingModel.from_pretrained(place / name) for name in ("model", "other"))
    assert fingerprint(model) != fingerprint(other)
    before = fingerprint(model)
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    assert fingerprint(model) != before


def test_demo_page_finds_photos(place, index):
    pytest.importorskip("gradio")
    page = build_demo(EmbeddingModel.from_pretrained(place / "model"), PhotoIndex.load(index), k=2)
    assert page.fn(Image.new("RGB", (20, 30))).width > 3 * 150
