"""What the datasets library loads: columns by their usual names, splits, streaming; from local files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnmap_core.data.sources import ImageData, load_data
from PIL import Image

datasets = pytest.importorskip("datasets")


def png(value: int, size: tuple[int, int] = (20, 10)) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(columns: dict[str, list[Any]], **features: Any) -> Any:
    inferred = datasets.Dataset.from_dict({name: of for name, of in columns.items() if name not in features})
    return datasets.Dataset.from_dict(columns, features=datasets.Features({**inferred.features, **features}))


def photos(n: int = 6) -> list[dict[str, Any]]:
    return [png(10 * i) for i in range(n)]


NAMES = datasets.ClassLabel(names=["ant", "bee"])


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write data as parquet and load it, with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def of(data: Any, split: str = "all", query: str = "", **options: Any) -> ImageData:
        path = tmp_path / "data.parquet"
        data.to_parquet(path)
        return load_data(f"hf:{path}{query}", split, cache_dir=tmp_path / "cache", **options)

    return of


@pytest.fixture
def splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, n in {"train": 6, "validation": 4}.items():
        data = table(
            {"img": photos(n), "fine_label": [0, 1] * (n // 2)}, img=datasets.Image(), fine_label=NAMES
        )
        path = tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.to_parquet(path)
    return tmp_path / "hub"


@pytest.mark.parametrize("image", ["image", "img", "photo"])
@pytest.mark.parametrize("label", ["label", "labels", "fine_label", "class"])
def test_usual_column_names(load: Any, image: str, label: str) -> None:
    data = load(
        table({image: photos(2), label: [1, 0], "other": [0, 0]}, **{image: datasets.Image(), label: NAMES})
    )
    assert (data.labels, data.targets.tolist()) == (["ant", "bee"], [1, 0])
    assert data[1].image.getpixel((0, 0)) == (10, 0, 0)
    assert data.image_ids == ["train-00000000", "train-00000001"]


def test_named_columns(load: Any) -> None:
    data = table({"image": photos(2), "pic": photos(2)[::-1], "label": [0, 0], "breed": ["pug", "lab"]})
    data = data.cast_column("pic", datasets.Image())
    found = load(data, query="?label=breed&image=pic")
    assert (found.labels, found.targets.tolist()) == (["lab", "pug"], [1, 0])
    assert found[0].image.getpixel((0, 0)) == (10, 0, 0)


@pytest.mark.parametrize(
    ("column", "rows"),
    [
        (
            "objects",
            [{"bbox": [[1.0, 2, 3, 4], [0, 0, 5, 5]], "category": [0, 1]}, {"bbox": [], "category": []}],
        ),
        ("objects", [[{"bbox": [1.0, 2, 3, 4]}, {"bbox": [0.0, 0, 5, 5]}], []]),
        ("bbox", [[[1.0, 2, 3, 4], [0.0, 0, 5, 5]], []]),
        ("bboxes", [[[1.0, 2, 3, 4], [0.0, 0, 5, 5]], None]),
    ],
)
def test_boxes(load: Any, column: str, rows: list[Any]) -> None:
    data = load(
        table({"image": photos(2), "label": [0, 1], column: rows}, image=datasets.Image(), label=NAMES)
    )
    np.testing.assert_array_equal(data[0].boxes_xyxy, [[1, 2, 4, 6], [0, 0, 5, 5]])
    assert data[1].boxes_xyxy.shape == (0, 4)


def test_one_box_a_row(load: Any) -> None:
    data = load(table({"image": photos(1), "label": [0], "bbox": [[1, 2, 3, 4]]}, image=datasets.Image()))
    np.testing.assert_array_equal(data[0].boxes_xyxy, [[1, 2, 4, 6]])


def test_masks(load: Any) -> None:
    columns = {"image": photos(2), "label": [0, 0], "mask": [png(255), None]}
    data = load(table(columns, image=datasets.Image(), mask=datasets.Image()))
    assert data[0].mask is not None
    assert data[0].mask.all()
    assert data[1].mask is None


@pytest.mark.parametrize(
    ("values", "labels", "targets"),
    [([2, 0, 1, 2], ["0", "1", "2"], [2, 0, 1, 2]), (["b", "a", "b", "b"], ["a", "b"], [1, 0, 1, 1])],
)
def test_labels_without_names(load: Any, values: list[Any], labels: list[str], targets: list[int]) -> None:
    data = load(table({"image": photos(4), "label": values}, image=datasets.Image()))
    assert (data.labels, data.targets.tolist()) == (labels, targets)


def test_given_labels(load: Any) -> None:
    data = load(table({"image": photos(2), "label": [1, 0]}, image=datasets.Image()), labels=["x", "y"])
    assert data.labels == ["x", "y"]


def test_splits_by_their_usual_names(splits: Path) -> None:
    assert [len(load_data(str(splits), split)) for split in ("train", "val", "all")] == [6, 4, 10]
    assert load_data(str(splits), "val").name == "hf:hub"


def test_single_split_is_dealt_and_can_be_filtered(load: Any) -> None:
    data = table({"image": photos(20), "label": [0, 1] * 10}, image=datasets.Image(), label=NAMES)
    test, train = load(data, "test"), load(data, "train")
    assert (len(test), len(train)) == (6, 14)
    assert not set(test.image_ids) & set(train.image_ids)
    bees = load(data, "test", classes=["bee"])
    assert (bees.labels, bees.targets.tolist()) == (["bee"], [0, 0, 0])
    assert bees[0].image_id in test.image_ids


def test_same_features_as_every_source(splits: Path, tmp_path: Path, photo) -> None:
    photo(tmp_path / "folder" / "ant" / "1.jpg")
    photo(tmp_path / "folder" / "bee" / "1.jpg")
    folder = load_data(str(tmp_path / "folder"), "all").dataset.features
    for split in ("train", "all"):
        assert load_data(str(splits), split).dataset.features == folder
    assert load_data(str(splits), "train", streaming=True).dataset.features == folder


def test_streaming_gives_the_same_samples(splits: Path) -> None:
    plain, stream = load_data(str(splits), "val"), load_data(str(splits), "val", streaming=True)
    assert stream.streaming
    pairs = list(zip(plain, stream, strict=True))
    assert len(pairs) == 4
    for a, b in pairs:
        assert (a.image_id, a.label, a.index) == (b.image_id, b.label, b.index)
        assert a.image.tobytes() == b.image.tobytes()


def test_streaming_refuses_what_needs_a_list(splits: Path, load: Any, refusal, tmp_path: Path) -> None:
    assert "streaming cannot choose" in refusal(str(splits), "train", streaming=True, classes=["ant"])
    assert "no split 'test'" in refusal(str(splits), "test", streaming=True)
    load(table({"image": photos(2), "label": ["a", "b"]}, image=datasets.Image()))
    path = tmp_path / "data.parquet"
    assert "pass labels" in refusal(f"hf:{path}", "train", streaming=True)
    stream = load_data(f"hf:{path}", "train", streaming=True, labels=["b", "a"])
    assert [sample.label for sample in stream] == [1, 0]


@pytest.mark.parametrize("streaming", [False, True])
def test_skip_unreadable(load: Any, streaming: bool, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*photos(2), {"bytes": b"", "path": None}]
    data = table({"image": rows, "label": [0, 1, 1]}, image=datasets.Image(), label=NAMES)
    found = load(data, "train" if streaming else "all", streaming=streaming, skip_unreadable=True)
    assert [sample.image_id for sample in found] == ["train-00000000", "train-00000001"]
    assert "train-00000002: 0 bytes" in caplog.text


def test_saved_to_disk(tmp_path: Path) -> None:
    data = table({"image": photos(4), "label": [0, 1, 0, 1]}, image=datasets.Image(), label=NAMES)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0, 1])}).save_to_disk(tmp_path / "many")
    assert len(load_data(str(tmp_path / "one"), "all")) == 4
    assert len(load_data(str(tmp_path / "many"), "test")) == 2
    assert len(list(load_data(str(tmp_path / "many"), "test", streaming=True))) == 2


def test_our_own_rows_come_back(tmp_path: Path, photo) -> None:
    """A folder data set saved by the library and loaded again is the same."""
    for name in ("ant/1.png", "bee/1.png"):
        photo(tmp_path / "photos" / name)
    first = load_data(str(tmp_path / "photos"), "all")
    first.dataset.save_to_disk(tmp_path / "saved")
    again = load_data(str(tmp_path / "saved"), "all")
    assert again.image_ids == first.image_ids
    assert again.dataset.features == first.dataset.features
    assert again[1].image.tobytes() == first[1].image.tobytes()


def test_addresses_of_streamed_folders(tmp_path: Path, photo) -> None:
    path = photo(tmp_path / "a.png")
    data = ImageData([], labels=["x"], name="x", split="all", streaming=True)
    row = {"image_id": "a", "label": 0, "objects": {"bbox": []}, "masks": [], "ignore": None}
    sample = data.to_sample({**row, "image": {"path": f"file://{path}", "bytes": None}}, 0)
    assert sample.image.size == (20, 10)


@pytest.mark.parametrize(
    ("columns", "query", "says"),
    [
        ({"pixels": [0], "label": [0]}, "", "no image column (image, img"),
        ({"image": [png(0)], "text": ["a"]}, "", "no label column (label, labels"),
        ({"image": [png(0)], "label": [0]}, "?label=breed", "no column 'breed', found image, label"),
        ({"image": [png(0)], "label": [0]}, "?labels=breed", "unknown option 'labels'"),
        ({"image": [png(0)], "label": [[0, 1]]}, "", "expected one class name or number a row"),
        ({"image": [png(0)] * 2, "label": [0, None]}, "", "row 1 of train: label None"),
        ({"image": [png(0)], "label": [-1]}, "", "row 0 of train: label -1"),
        ({"image": [png(0)], "label": [0], "bbox": [[1, 2, 3]]}, "", "row 0 of train: bbox [1, 2, 3]"),
        ({"image": [png(0)], "label": [0], "bbox": [[1, 2, 30, 3]]}, "", "is not inside the image of 20x10"),
        ({"image": [png(0)] * 2, "label": [0, 0], "id": ["a", "a"]}, "", "image id 'a' occurs twice"),
    ],
)
def test_wrong_rows(
    load: Any, refusal, tmp_path: Path, columns: dict[str, Any], query: str, says: str
) -> None:
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "data.parquet")
    message = refusal(f"hf:{tmp_path / 'data.parquet'}{query}", "all", cache_dir=tmp_path / "cache")
    assert says in message


def test_what_cannot_be_loaded(tmp_path: Path, refusal, text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert "write hf://owner/name" in refusal(f"hf:{tmp_path / 'gone'}")
    text(tmp_path, {"a.txt": "x", "bad.parquet": "x"})
    assert "expected a folder or one of *.parquet" in refusal(f"hf:{tmp_path / 'a.txt'}")
    assert "bad.parquet: cannot be loaded" in refusal(
        f"hf:{tmp_path / 'bad.parquet'}", cache_dir=tmp_path / "cache"
    )


def test_share_and_list_of_classes(splits: Path, text, tmp_path: Path, refusal) -> None:
    half = load_data(f"hf:{splits}", "train", fraction=0.34)
    assert sorted(half.targets.tolist()) == [0, 1]
    assert len(load_data(f"hf:{splits}", "val", fraction=0.34)) == 4
    path = text(tmp_path, {"classes.txt": "bee"}) / "classes.txt"
    bees = load_data(f"hf:{splits}", "train", classes_file=path)
    assert (bees.labels, bees.targets.tolist()) == (["bee"], [0, 0, 0])
    for options in ({"fraction": 0.5}, {"classes_file": path}):
        assert "streaming cannot choose" in refusal(f"hf:{splits}", "train", streaming=True, **options)
