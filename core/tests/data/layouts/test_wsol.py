"""The WSOL evaluator's lists: boxes, masks, missing sizes, and the placements of their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnmap_core.data.layouts.wsol import read_lists
from attnmap_core.data.sources import load_data
from PIL import Image

IDS = ["001.A/11.jpg", "002.B/12.jpg", "001.A/13.jpg"]


@pytest.fixture
def lists(tmp_path: Path, text) -> Path:
    files = {
        "image_ids.txt": "\n".join(IDS),
        "class_labels.txt": f"{IDS[1]},1\n{IDS[0]},0\n{IDS[2]},0",
        "image_sizes.txt": "\n".join(f"{name},20,10" for name in IDS),
        "localization.txt": f"{IDS[0]},1,2,9,8\n{IDS[1]},0,0,20,10\n{IDS[0]},3,3,4,4",
    }
    metadata = tmp_path / "metadata" / "CUB"
    for split in ("train", "test"):
        text(metadata / split, files)
    for empty in ("image_sizes.txt", "localization.txt"):
        (metadata / "train" / empty).write_text("")
    return metadata


@pytest.fixture
def spec(lists: Path, tmp_path: Path, photo) -> str:
    for name in IDS:
        photo(tmp_path / "data" / name)
    return f"wsol:{lists}@{tmp_path / 'data'}"


def test_rows_without_images(lists: Path) -> None:
    rows = read_lists(lists / "test")
    assert [(row.image_id, row.label, row.size) for row in rows] == [
        (IDS[0], 0, (20, 10)),
        (IDS[1], 1, (20, 10)),
        (IDS[2], 0, (20, 10)),
    ]
    assert [row.boxes_xyxy for row in rows] == [[(1, 2, 9, 8), (3, 3, 4, 4)], [(0, 0, 20, 10)], []]


def test_empty_size_and_box_files(lists: Path) -> None:
    assert all(row.size is None and row.boxes_xyxy == [] for row in read_lists(lists / "train"))


def test_samples(spec: str) -> None:
    test = load_data(spec, "test")
    assert test.labels == ["001.A", "002.B"]
    assert test.targets.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(test[0].boxes_xyxy, [[1, 2, 9, 8], [3, 3, 4, 4]])
    assert test[2].boxes_xyxy.shape == (0, 4)
    assert load_data(spec, "train")[0].mask is None


@pytest.mark.parametrize("below", ["images", "CUBV2", "CUBV2/images"])
def test_image_placements(lists: Path, tmp_path: Path, photo, below: str) -> None:
    for name in IDS:
        photo(tmp_path / "CUB_200_2011" / below / name)
    assert len(load_data(f"wsol:{lists}@{tmp_path / 'CUB_200_2011'}", "test")) == 3


def test_ilsvrc_val_sorted_into_class_folders(tmp_path: Path, text, photo) -> None:
    image_id = "val/ILSVRC2012_val_00000001.JPEG"
    photo(tmp_path / "data" / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG")
    text(tmp_path / "lists" / "test", {"image_ids.txt": image_id, "class_labels.txt": f"{image_id},0"})
    data = load_data(f"wsol:{tmp_path / 'lists'}@{tmp_path / 'data'}", "test")
    assert data.image_ids == [image_id]
    assert data[0].image.size == (20, 10)


def test_class_names_agree_between_splits(tmp_path: Path, text, photo) -> None:
    """ILSVRC: train knows the wnids, the test images lie in one folder."""
    names = {"train": ["train/n01/a.JPEG", "train/n02/b.JPEG"], "test": ["val/c.JPEG", "val/d.JPEG"]}
    for split, ids in names.items():
        labels = "\n".join(f"{name},{label}" for label, name in enumerate(ids))
        text(tmp_path / "lists" / split, {"image_ids.txt": "\n".join(ids), "class_labels.txt": labels})
        for name in ids:
            photo(tmp_path / "data" / name)
    spec = f"wsol:{tmp_path / 'lists'}@{tmp_path / 'data'}"
    assert load_data(spec, "test").labels == load_data(spec, "train").labels == ["n01", "n02"]
    text(tmp_path / "lists", {"classes.txt": "1 tench\n2 gold fish"})
    assert load_data(spec, "test").labels == ["tench", "gold fish"]
    text(tmp_path / "lists", {"classes.txt": "tench\ngold fish"})
    assert load_data(spec, "test").labels == ["tench", "gold fish"]


def test_masks_are_united_and_ignore_loses_the_foreground(tmp_path: Path, text, photo) -> None:
    """OpenImages: masks beside the images, the ignore mask on the first row only, no sizes."""
    image_id, root = "test/01226z/7af.jpg", tmp_path / "data"
    photo(root / image_id, (8, 4))
    pixels = np.zeros((3, 2, 4), np.uint8)
    pixels[0, :, 0] = pixels[1, :, 1] = 255
    pixels[2, 0] = 255
    names = [f"test/01226z/7af_{kind}.png" for kind in ("m01226z_1", "m01226z_2", "ignore")]
    for name, mask in zip(names, pixels):
        Image.fromarray(mask).save(root / name)
    text(
        tmp_path / "lists" / "test",
        {
            "image_ids.txt": image_id,
            "class_labels.txt": f"{image_id},0",
            "image_sizes.txt": "",
            "localization.txt": f"{image_id},{names[0]},{names[2]}\n{image_id},{names[1]},",
        },
    )
    sample = load_data(f"wsol:{tmp_path / 'lists'}@{root}", "test")[0]
    assert sample.mask is not None
    assert sample.ignore is not None
    assert sample.mask.tolist() == [[True, True, False, False]] * 2  # at the resolution of the masks
    assert sample.ignore.tolist() == [[False, False, True, True], [False] * 4]
    assert sample.image.size == (8, 4)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("image_ids.txt", "\n".join([*IDS, IDS[0]]), f"image_ids.txt:4: image id {IDS[0]} occurs twice"),
        ("class_labels.txt", f"{IDS[0]},0\n{IDS[1]},1", f"no label of {IDS[2]} (image_ids.txt:3)"),
        ("class_labels.txt", f"{IDS[0]},zero", "class_labels.txt:1: expected '<image_id>,<label"),
        ("class_labels.txt", f"{IDS[0]},-1", "class_labels.txt:1: expected '<image_id>,<label"),
        (
            "class_labels.txt",
            "\n".join(f"{name},0" for name in [*IDS, "003.C/99.jpg"]),
            "class_labels.txt:4: row for 003.C/99.jpg, which image_ids.txt does not have",
        ),
        ("class_labels.txt", "\n".join(f"{name},0" for name in [*IDS, IDS[0]]), f"second label of {IDS[0]}"),
        ("class_labels.txt", "\n".join(f"{name},5" for name in IDS), "has class 5, expected 0..1"),
        ("image_sizes.txt", f"{IDS[0]},20", "image_sizes.txt:1: expected '<image_id>,<width>,<height>'"),
        ("image_sizes.txt", "x.jpg,20,10", "image_sizes.txt:1: row for x.jpg"),
        (
            "localization.txt",
            f"{IDS[0]},1,2,3,x",
            "localization.txt:1: expected '<image_id>,<x0>,<y0>,<x1>,<y1>'",
        ),
        ("localization.txt", f"{IDS[0]},1,2,3", "localization.txt:1: expected"),
        ("localization.txt", f"{IDS[0]},9,2,3,4", "with x0 <= x1"),
        ("localization.txt", "x.jpg,1,2,3,4", "localization.txt:1: row for x.jpg"),
        (
            "localization.txt",
            f"{IDS[0]},1,2,22,8",
            "box x=1 y=2 width=21 height=6 is not inside the image of 20x10",
        ),
        ("localization.txt", f"{IDS[0]},m.png,", "m.png: no such file"),
        ("image_ids.txt", "", "no image ids in it"),
    ],
)
def test_contradictions_are_named(
    spec: str, lists: Path, refusal, file: str, content: str, says: str
) -> None:
    (lists / "test" / file).write_text(content)
    if content == "":
        (lists / "test" / "class_labels.txt").write_text("")
        (lists / "test" / "image_sizes.txt").write_text("")
        (lists / "test" / "localization.txt").write_text("")
    assert says in refusal(spec, "test")


def test_images_are_not_there(spec: str, lists: Path, tmp_path: Path, refusal) -> None:
    (tmp_path / "data" / IDS[2]).unlink()
    message = refusal(spec, "test")
    assert f"{IDS[2]}: no such file" in message
    assert str(lists / "test") in message
    (tmp_path / "elsewhere" / "x").mkdir(parents=True)
    assert "is not below" in refusal(f"wsol:{lists}@{tmp_path / 'elsewhere'}", "test")


def test_form_of_the_spec(spec: str, lists: Path, tmp_path: Path, refusal) -> None:
    assert "expected wsol:METADATA_DIR@IMAGE_ROOT" in refusal(f"wsol:{lists}", "test")
    assert f"write wsol:{lists}@" in refusal(f"wsol:{lists / 'test'}@{tmp_path / 'data'}", "test")
    assert "WSOL lists without their images" in refusal(str(lists), "test")
    assert "no split 'val', found train, test" in refusal(spec, "val")


def test_xywh_bug_needs_sizes_and_leaves_test_alone(spec: str, lists: Path, text, refusal) -> None:
    with_bug = load_data(spec, "test", cubv2_boxes="xywh-bug")
    np.testing.assert_array_equal(with_bug[0].boxes_xyxy[0], [1, 2, 9, 8])
    text(lists / "val", {path.name: path.read_text() for path in (lists / "test").iterdir()})
    np.testing.assert_array_equal(
        load_data(spec, "val", cubv2_boxes="xywh-bug")[0].boxes_xyxy, [[1, 2, 10, 10], [3, 3, 7, 7]]
    )
    (lists / "val" / "image_sizes.txt").write_text("")
    assert "needs the size" in refusal(spec, "val", cubv2_boxes="xywh-bug")
