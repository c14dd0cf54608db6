"""In-Shop Clothes: one list for training photos, queries and gallery."""

from __future__ import annotations

from pathlib import Path

import pytest
from attnmap_core.data.sources import load_data

ROWS = [
    "img/WOMEN/Dresses/id_00000002/02_1_front.jpg                   id_00000002 train",
    "img/WOMEN/Dresses/id_00000001/01_1_front.jpg                   id_00000001 query",
    "img/WOMEN/Dresses/id_00000001/01_2_side.jpg                    id_00000001 gallery",
    "img/MEN/Denim/id_00000007/01_1_front.jpg                       id_00000007 gallery",
    "img/WOMEN/Dresses/id_00000002/02_2_side.jpg                    id_00000002 train",
]


def listed(rows: list[str], count: int | None = None) -> str:
    return "\n".join(
        [str(len(rows) if count is None else count), "image_name item_id evaluation_status", *rows, ""]
    )


@pytest.fixture
def inshop(tmp_path: Path, photo, text) -> Path:
    root = tmp_path / "Inshop_Clothes"
    for row in ROWS:
        photo(root / "Img" / row.split()[0])
    return text(root, {"Eval/list_eval_partition.txt": listed(ROWS)})


def test_splits(inshop: Path) -> None:
    found = {split: load_data(f"inshop:{inshop}", split) for split in ("train", "query", "gallery")}
    assert {split: data.targets.tolist() for split, data in found.items()} == {
        "train": [1, 1],
        "query": [0],
        "gallery": [0, 2],
    }
    assert all(data.labels == ["id_00000001", "id_00000002", "id_00000007"] for data in found.values())
    assert found["query"].image_ids == ["img/WOMEN/Dresses/id_00000001/01_1_front.jpg"]
    assert found["gallery"][1].image.size == (20, 10)
    assert len(load_data(f"inshop:{inshop}", "all")) == 5


def test_recognised_in_its_parent_and_without_folders(inshop: Path) -> None:
    for place in (inshop, f"inshop:{inshop.parent}"):
        assert load_data(str(place), "query").name == "inshop:Inshop_Clothes"
    (inshop / "Eval" / "list_eval_partition.txt").rename(inshop / "list_eval_partition.txt")
    (inshop / "Eval").rmdir()
    (inshop / "Img" / "img").rename(inshop / "img")
    (inshop / "Img").rmdir()
    assert load_data(str(inshop), "gallery").targets.tolist() == [0, 2]


def test_malformed(inshop: Path, text, refusal) -> None:
    spec = f"inshop:{inshop}"
    assert "no split 'test', found train, query, gallery; load query and gallery" in refusal(spec, "test")
    for rows, message in (
        ([*ROWS[:-1], "img/a.jpg id_00000009"], ":7: expected '<path> <item id>"),
        ([*ROWS[:-1], "img/a.jpg id_00000009 test"], "found 'img/a.jpg id_00000009 test'"),
        ([*ROWS[:-1], "img/a.jpg id_00000001 train"], "id_00000001 is in train and in query"),
        ([*ROWS, "img/a.jpg id_00000009 query"], "a.jpg: no such file, but"),
    ):
        text(inshop, {"Eval/list_eval_partition.txt": listed(rows)})
        assert message in refusal(spec, "query")
    text(inshop, {"Eval/list_eval_partition.txt": listed(ROWS, 6)})
    assert "5 rows, expected 6 as its first line says" in refusal(spec)
    text(inshop, {"Eval/list_eval_partition.txt": "\n".join(ROWS)})
    assert "expected the number of images" in refusal(spec)
    (inshop / "Eval" / "list_eval_partition.txt").unlink()
    assert "list_eval_partition.txt: no such file" in refusal(spec)
