"""One call for all sources: what a sample is, what rows hold, what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnmap_core.data import sources
from attnmap_core.data.layouts.listing import Record, SegmentationClasses, image_features
from attnmap_core.data.sources import ImageData, describe_sources, load_data, records_to_dataset
from attnmap_core.errors import InputError
from PIL import Image

TINY = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=8,val=4,test=6"


def data_of(*records: Record, labels: tuple[str, ...] = ("cat", "dog"), **options: Any) -> ImageData:
    return ImageData(records_to_dataset(records, labels), labels=labels, name="test", split="all", **options)


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.new("RGB", (20, 10), "gray").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Three classes of 2, 3 and 4 photos, of widths 1, 2, 3, ..."""
    names = [f"{of}/{i}.png" for count, of in ((2, "ant"), (3, "bee"), (4, "cow")) for i in range(count)]
    for width, name in enumerate(names, start=1):
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, 5)).save(tmp_path / "album" / name)
    return tmp_path / "album"


# --- Samples ----------------------------------------------------------------------------------------------


def test_sample_fields(photo: str) -> None:
    data = data_of(Record("a.png", photo, 1, boxes_xywh=((1.5, 2, 3, 4), (0, 0, 20, 10))))
    sample = data[0]
    assert (sample.image.mode, sample.image.size, sample.label) == ("RGB", (20, 10), 1)
    assert (sample.image_id, sample.index, sample.mask, sample.ignore) == ("a.png", 0, None, None)
    assert sample.boxes_xyxy.dtype == np.float64
    np.testing.assert_array_equal(sample.boxes_xyxy, [[1.5, 2, 4.5, 6], [0, 0, 20, 10]])


def test_rows_are_undecoded_with_the_documented_features(photo: str) -> None:
    data = data_of(
        Record("a.png", photo, 1, boxes_xywh=((1.5, 2, 3, 4),), masks=(b"png", photo), ignore=photo)
    )
    row = data.dataset[0]
    assert row == {
        "image_id": "a.png",
        "image": {"path": photo, "bytes": None},
        "label": 1,
        "objects": {"bbox": [[1.5, 2.0, 3.0, 4.0]]},
        "masks": [{"path": None, "bytes": b"png"}, {"path": photo, "bytes": None}],
        "ignore": {"path": photo, "bytes": None},
    }
    assert data.dataset.features == image_features(["cat", "dog"])


def test_box_numbers_survive_exactly(photo: str) -> None:
    box = (0.1, 0.7, 19.3, 8.300000000000001)
    assert data_of(Record("a", photo, 0, boxes_xywh=(box,))).dataset[0]["objects"]["bbox"] == [list(box)]


@pytest.mark.parametrize(
    ("box", "becomes"),
    [
        ((-1, 0, 21, 10), (0, 0, 20, 10)),
        ((0.5, 0.5, 20.4, 9.6), (0.5, 0.5, 20, 10)),
        ((5, 5, 0, 0), (5, 5, 5, 5)),
    ],
)
def test_rounding_at_the_border_is_tolerated(photo: str, box: Any, becomes: Any) -> None:
    np.testing.assert_array_equal(data_of(Record("a", photo, 0, boxes_xywh=(box,)))[0].boxes_xyxy, [becomes])


@pytest.mark.parametrize(
    "box",
    [(-1.1, 0, 5, 5), (0, 0, 21.1, 5), (0, 5, 5, 6.1), (3, 3, -1, 2), (float("nan"), 0, 1, 1), (25, 2, 3, 3)],
)
def test_box_outside_is_refused_with_its_numbers(photo: str, box: Any) -> None:
    x, _, width, _ = box
    with pytest.raises(
        InputError, match=rf"^a\.png: box x={x:g} .*width={width:g} .*20x10 pixels;.*--clip-boxes"
    ):
        data_of(Record("a.png", photo, 0, boxes_xywh=((1, 1, 2, 2), box)))[0]


def test_clip_boxes(photo: str) -> None:
    inside = data_of(Record("a", photo, 0, boxes_xywh=((-9, 2, 40, 40),)), clip_boxes=True)[0]
    np.testing.assert_array_equal(inside.boxes_xyxy, [[0, 2, 20, 10]])
    for nothing_left in ((25, 2, 3, 3), (-9, 2, 3, 3), (2, 2, -1, 3)):
        with pytest.raises(InputError, match="not inside"):
            data_of(Record("a", photo, 0, boxes_xywh=(nothing_left,)), clip_boxes=True)[0]


def test_exif_rotation_of_folders_but_not_of_benchmarks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert load_data(str(tmp_path), "all")[0].image.size == (10, 20)
    assert data_of(Record("a", str(tmp_path / "a.jpg"), 0), upright=False)[0].image.size == (20, 10)


def test_masks_of_several_sizes_meet_at_the_finest(tmp_path: Path, photo: str) -> None:
    fine, coarse = np.zeros((4, 8), np.uint8), np.zeros((2, 4), np.uint8)
    fine[0, 0] = coarse[1, 3] = 255
    for name, pixels in {"fine": fine, "coarse": coarse}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    masks = (str(tmp_path / "coarse.png"), str(tmp_path / "fine.png"))
    mask = data_of(Record("a", photo, 0, masks=masks))[0].mask
    assert mask is not None
    expected = np.zeros((4, 8), bool)
    expected[0, 0] = expected[2:, 6:] = True
    np.testing.assert_array_equal(mask, expected)


def test_unreadable_photo_and_mask_are_named(tmp_path: Path, photo: str) -> None:
    (tmp_path / "empty.png").touch()
    bad = str(tmp_path / "empty.png")
    for record in (
        Record("a", bad, 0),
        Record("a", photo, 0, masks=(bad,)),
        Record("a", photo, 0, ignore=bad),
    ):
        with pytest.raises(InputError, match=r"empty\.png: 0 bytes"):
            data_of(record)[0]


# --- ImageData --------------------------------------------------------------------------------------------


def test_indexing_iteration_and_selection(album: Path) -> None:
    data = load_data(str(album), "all")
    assert [sample.image.width for sample in data] == list(range(1, 10))
    assert data[-1].index == 8
    with pytest.raises(IndexError):
        data[9]
    picked = data.select(np.array([8, 0]))
    assert [sample.image.width for sample in picked] == [9, 1]
    assert (picked[0].index, picked.targets.tolist(), picked.image_ids) == (
        0,
        [2, 0],
        ["cow/3.png", "ant/0.png"],
    )
    assert (picked.labels, picked.name, picked.split) == (data.labels, data.name, data.split)


def test_describe_counts(photo: str) -> None:
    boxes = ((1.0, 1.0, 2.0, 2.0),)
    data = data_of(
        Record("a", photo, 0, boxes_xywh=boxes * 2),
        Record("b", photo, 1, masks=(photo,)),
        Record("c", photo, 1),
    )
    assert data.describe() == {
        "name": "test",
        "split": "all",
        "classes": 2,
        "images": 3,
        "smallest_class": 1,
        "largest_class": 2,
        "boxes": 2,
        "images_with_boxes": 1,
        "images_with_masks": 1,
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_goes_to_loader_workers(album: Path, streaming: bool) -> None:
    data = load_data(str(album), "all", streaming=streaming)
    again = pickle.loads(pickle.dumps(data))
    assert [sample.image_id for sample in again] == [sample.image_id for sample in data]


def test_streaming(album: Path) -> None:
    stream, plain = load_data(str(album), "all", streaming=True), load_data(str(album), "all")
    assert [(s.image_id, s.index, s.label) for s in stream] == [(s.image_id, s.index, s.label) for s in plain]
    for ask in (len, lambda data: data[0], lambda data: data.targets, lambda data: data.select([0])):
        with pytest.raises(TypeError, match="streaming"):
            ask(stream)
    assert stream.describe()["images"] == "streaming"


def test_listing_opens_no_photo_and_writes_nothing(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a photo was opened")

    monkeypatch.setattr(Image, "open", opened)
    before = sorted(album.rglob("*"))
    data = load_data(str(album), "train", val_fraction=0.2)
    data.describe()
    data.select([0])
    assert data.dataset.cache_files == []
    assert sorted(album.rglob("*")) == before


# --- Unreadable photos ------------------------------------------------------------------------------------


def test_skip_unreadable(album: Path, caplog: pytest.LogCaptureFixture) -> None:
    (album / "cow" / "1.png").write_bytes(b"")
    (album / "bee" / "0.png").write_bytes((album / "bee" / "0.png").read_bytes()[:43])
    with pytest.raises(InputError, match=r"0\.png: truncated"):
        list(load_data(str(album), "all"))
    kept = load_data(str(album), "all", skip_unreadable=True, progress=False)
    assert kept.targets.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert all(sample.image.height == 5 for sample in kept)
    assert "left out 2 unreadable of 9 photos" in caplog.text
    assert "1.png: 0 bytes" in caplog.text


def test_nothing_readable(album: Path) -> None:
    for path in album.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of its 9 photos can be read"):
        load_data(str(album), "all", skip_unreadable=True)


def test_class_that_loses_its_photos(album: Path) -> None:
    for path in (album / "ant").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"1 of 3 classes have no image in all \(ant\)"):
        load_data(str(album), "all", skip_unreadable=True)


# --- Synthetic --------------------------------------------------------------------------------------------


def test_synthetic_samples() -> None:
    data = load_data(TINY, "test")
    assert len(data) == 6
    assert data.targets.tolist() == [0, 1, 2, 3, 0, 1]
    assert len(set(data.image_ids)) == 6
    for sample in data:
        assert sample.image.size == (32, 32)
        rows, columns = np.nonzero(sample.mask)
        tight = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        np.testing.assert_array_equal(sample.boxes_xyxy, tight)
    assert data.describe()["largest_class"] == 2


def test_synthetic_rows_look_like_all_others() -> None:
    row = load_data(TINY, "val").dataset[0]
    assert set(row) == set(image_features([]))
    assert load_data("synthetic", "val").name == "synthetic"


def test_synthetic_selection_and_streaming() -> None:
    data = load_data(TINY, "train")
    assert data.select([5])[0].image.tobytes() == data[5].image.tobytes()
    stream = load_data(TINY, "train", streaming=True)
    assert [sample.image_id for sample in stream] == data.image_ids
    assert next(iter(stream)).image.tobytes() == data[0].image.tobytes()


# --- The spec ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("no/such/place", {}, "data 'no/such/place': no such file or folder"),
        ("", {}, "data '': no such file"),
        ("coco:x", {}, "data 'coco:x': no such file or folder, and none of synthetic"),
        ("cub:", {}, "nothing after 'cub:'"),
        ("synthetic:colour=red", {}, "colour=red"),
        ("synthetic:val=0", {}, "no images in split val"),
        ("synthetic", {"classes": ["a"]}, "write synthetic:class_range"),
        ("synthetic", {"split_file": "x.json"}, "do not apply"),
        ("voc:x", {"annotations": "a.json"}, "annotations a.json: voc data bring their own"),
        ("folder:x", {"cubv2_boxes": "xywh-bug"}, "folder data have no CUBV2"),
        ("cub:x", {"cubv2_boxes": "wrong"}, "expected corners or xywh-bug"),
        ("synthetic", {"test_fraction": 1.0}, "test_fraction 1.0: expected a share"),
    ],
)
def test_wrong_specs(spec: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_data(spec, "val", **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_name_tells_no_way_to_the_folder(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album)
    assert load_data(".", "all").name == load_data(f"folder:{album}", "all").name == "folder:album"


def test_home_folder(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(album.parent))
    monkeypatch.setenv("USERPROFILE", str(album.parent))
    assert len(load_data("~/album", "all")) == len(load_data("folder:~/album", "all")) == 9


def test_every_source_is_described() -> None:
    described = " ".join(describe_sources())
    assert all(scheme in described for scheme in sources._SCHEMES)


def test_import_needs_no_extra_and_missing_datasets_is_explained(album: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['datasets'] = None\n"
        "from attnmap_core.data import load_data, load_image, list_images\n"
        "from attnmap_core.errors import InputError\n"
        f"for spec in ({str(album)!r}, 'hf://a/b'):\n"
        "    try:\n"
        "        load_data(spec, 'all')\n"
        "    except InputError as error:\n"
        "        assert 'pip install \"attnmap-core[train]\"' in str(error), error\n"
        "    else:\n"
        "        raise SystemExit('no error')\n"
        "assert not {'torch', 'matplotlib', 'scipy.io', 'cv2'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- Class maps -------------------------------------------------------------------------------------------


def test_class_map_of_a_sample(tmp_path: Path, photo: str) -> None:
    numbers = np.full((10, 20), 2, np.uint8)
    numbers[0, :3] = 0, 255, 1
    Image.fromarray(numbers).save(tmp_path / "map.png")
    meaning = SegmentationClasses(labels=("wall", "sky"), first=1)
    records = [Record("a", photo, 0, segmentation=str(tmp_path / "map.png"))]
    table = records_to_dataset(records, ["photo"], segmentation=True)
    assert table.features == image_features(["photo"], segmentation=True)
    data = ImageData(table, labels=["photo"], name="test", split="all", segmentation=meaning)
    found = data[0].segmentation
    assert found is not None
    assert found[0, :4].tolist() == [255, 255, 0, 1]
    assert found[1:].tolist() == [[1] * 20] * 9
    assert data_of(Record("a", photo, 0))[0].segmentation is None


def test_encoded_photo_in_place_of_a_path(photo: str) -> None:
    content = Path(photo).read_bytes()
    assert data_of(Record("a", content, 0))[0].image.size == (20, 10)
    with pytest.raises(InputError, match=r"^a: truncated"):
        data_of(Record("a", content[:43], 0))[0]
