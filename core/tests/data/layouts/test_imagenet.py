"""ILSVRC2012: class = rank of the wnid, flat and sorted val folders, boxes in three formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnmap_core.data.sources import load_data

WNIDS = ["n01440764", "n01443537", "n02084071"]
# Validation images and their classes; the second has two boxes.
VAL = {"ILSVRC2012_val_00000001": 2, "ILSVRC2012_val_00000002": 0, "ILSVRC2012_val_00000003": 1}
BOXES = {
    "ILSVRC2012_val_00000001": [[1, 1, 9, 9]],
    "ILSVRC2012_val_00000002": [[0, 0, 20, 10], [2, 3, 5, 6]],
    "ILSVRC2012_val_00000003": [[4, 4, 8, 8]],
}


def xml_of(stem: str, size: tuple[int, int] = (20, 10)) -> str:
    objects = "".join(
        f"<object><name>{WNIDS[VAL[stem]]}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object>"
        for x0, y0, x1, y1 in BOXES[stem]
    )
    width, height = size
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"


def list_of(stem: str, number: str = "{}") -> str:
    numbers = " ".join(number.format(side) for box in BOXES[stem] for side in box)
    return f"{WNIDS[VAL[stem]]}/{stem}.JPEG {VAL[stem]} {numbers}"


def csv_of(stem: str) -> str:
    wnid = WNIDS[VAL[stem]]
    return f"{stem},{' '.join(f'{wnid} ' + ' '.join(map(str, box)) for box in BOXES[stem])} "


@pytest.fixture
def imagenet(tmp_path: Path, photo) -> Path:
    root = tmp_path / "ILSVRC2012"
    for wnid in reversed(WNIDS):
        for number in (2, 10):
            photo(root / "train" / wnid / f"{wnid}_{number}.JPEG")
    for stem in VAL:
        photo(root / "val" / f"{stem}.JPEG")
    return root


@pytest.fixture(params=["xml", "xml by wnid", "list", "float list", "box a row", "csv"])
def annotations(request: pytest.FixtureRequest, tmp_path: Path, text) -> Path:
    kind, folder = request.param, tmp_path / "boxes"
    if kind == "xml":
        return text(folder, {f"{stem}.xml": xml_of(stem) for stem in VAL})
    if kind == "xml by wnid":
        return text(folder, {f"{WNIDS[VAL[stem]]}/{stem}.xml": xml_of(stem) for stem in VAL})
    if kind == "list":
        return text(folder, {"val.txt": "\n".join(map(list_of, VAL))}) / "val.txt"
    if kind == "float list":
        return text(folder, {"val.txt": "\n".join(list_of(stem, "{}.0") for stem in VAL)}) / "val.txt"
    if kind == "box a row":
        rows = [
            f"{WNIDS[VAL[stem]]}/{stem}.JPEG {VAL[stem]} {' '.join(map(str, box))}"
            for stem in VAL
            for box in BOXES[stem]
        ]
        return text(folder, {"val.txt": "\n".join(rows)}) / "val.txt"
    rows = ["ImageId,PredictionString", *map(csv_of, reversed(VAL))]
    return text(folder, {"LOC_val_solution.csv": "\n".join(rows)}) / "LOC_val_solution.csv"


@pytest.mark.parametrize("sorted_by_wnid", [False, True])
def test_boxes_of_all_formats(imagenet: Path, annotations: Path, sorted_by_wnid: bool) -> None:
    if sorted_by_wnid:
        for stem, label in VAL.items():
            (imagenet / "val" / WNIDS[label]).mkdir(exist_ok=True)
            (imagenet / "val" / f"{stem}.JPEG").rename(imagenet / "val" / WNIDS[label] / f"{stem}.JPEG")
    test = load_data(f"imagenet:{imagenet}", "test", annotations=annotations)
    assert test.labels == WNIDS
    found = dict(zip(test.image_ids, test.targets.tolist()))
    assert found == {f"val/{stem}.JPEG": label for stem, label in VAL.items()}
    for sample in test:
        np.testing.assert_array_equal(sample.boxes_xyxy, BOXES[Path(sample.image_id).stem])


def test_train_is_ranked_by_wnid_and_opens_no_photo(imagenet: Path) -> None:
    for path in (imagenet / "train").rglob("*.JPEG"):
        path.write_bytes(b"")  # listing would fail if it opened one
    (imagenet / "val").rename(imagenet / "val_elsewhere")
    train = load_data(f"imagenet:{imagenet}", "train")
    assert train.labels == WNIDS
    assert train.image_ids[:2] == ["train/n01440764/n01440764_10.JPEG", "train/n01440764/n01440764_2.JPEG"]
    assert train.targets.tolist() == [0, 0, 1, 1, 2, 2]


def test_nested_official_folders(imagenet: Path, tmp_path: Path, text) -> None:
    home = tmp_path / "kaggle" / "ILSVRC"
    (home / "Data").mkdir(parents=True)
    imagenet.rename(home / "Data" / "CLS-LOC")
    text(home / "Annotations" / "CLS-LOC" / "val", {f"{stem}.xml": xml_of(stem) for stem in VAL})
    for root in (home, home.parent):
        data = load_data(str(root), "test")
        assert data.name.startswith("imagenet:")
        assert sum(len(sample.boxes_xyxy) for sample in data) == 4


def test_csv_beside_the_folders_is_found(imagenet: Path, text) -> None:
    text(imagenet, {"LOC_val_solution.csv": "ImageId,PredictionString\n" + "\n".join(map(csv_of, VAL))})
    assert load_data(f"imagenet:{imagenet}", "test").targets.tolist() == list(VAL.values())


def test_validation_split(imagenet: Path, refusal) -> None:
    assert "split 'test'" in refusal(f"imagenet:{imagenet}", "val")
    held_out = load_data(f"imagenet:{imagenet}", "val", val_fraction=0.5)
    kept = load_data(f"imagenet:{imagenet}", "train", val_fraction=0.5)
    assert held_out.targets.tolist() == kept.targets.tolist() == [0, 1, 2]
    assert not set(held_out.image_ids) & set(kept.image_ids)


def test_flat_val_without_annotations(imagenet: Path, refusal) -> None:
    assert "class unknown (flat folder" in refusal(f"imagenet:{imagenet}", "test")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "val.txt",
            "n01440764/ILSVRC2012_val_00000001.JPEG 0 1 2 3",
            "val.txt:1: expected '<wnid>/<file> <class>",
        ),
        ("val.txt", "n01440764/ILSVRC2012_val_00000001.JPEG 0 1 2 3 x", "val.txt:1: expected"),
        ("val.txt", "n01440764/ILSVRC2012_val_00000001.JPEG 0 9 2 3 4", "val.txt:1: expected 'x0 <= x1"),
        ("val.txt", "n01440764/ILSVRC2012_val_00000001.JPEG 7 1 2 3 4", "class 7 of ILSVRC2012_val_00000001"),
        (
            "val.txt",
            "a/x_1.JPEG 0 1 2 3 4\na/x_1.JPEG 1 1 2 3 4",
            "val.txt:2: a/x_1.JPEG has class 1, but 0 before",
        ),
        ("val.csv", "ILSVRC2012_val_00000001,n01440764 1 2 3", "val.csv:1: expected '<ImageId>"),
        ("val.csv", "ILSVRC2012_val_00000001,n99 1 2 3 4", "class n99 of ILSVRC2012_val_00000001"),
        ("val.csv", "a,n01440764 1 2 3 4\na,n01440764 1 2 3 4", "val.csv:2: second row of a"),
        ("xml/a.xml", "<annotation>", "a.xml: not an XML file"),
        ("xml/a.xml", "<annotation/>", "a.xml: objects of 0 classes"),
        ("xml/a.txt", "", "no XML files"),
    ],
)
def test_malformed_annotations(
    imagenet: Path, tmp_path: Path, text, refusal, name: str, content: str, says: str
) -> None:
    text(tmp_path / "bad", {name: content})
    path = tmp_path / "bad" / name.split("/")[0]
    assert says in refusal(f"imagenet:{imagenet}", "test", annotations=path)


def test_annotation_of_a_photo_that_is_not_there(imagenet: Path, annotations: Path, refusal) -> None:
    (imagenet / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()
    message = refusal(f"imagenet:{imagenet}", "test", annotations=annotations)
    assert "annotates ILSVRC2012_val_00000003, which is not in" in message


def test_folder_and_annotation_disagree(imagenet: Path, tmp_path: Path, text, refusal) -> None:
    (imagenet / "val" / WNIDS[0]).mkdir()
    first = "ILSVRC2012_val_00000001.JPEG"
    (imagenet / "val" / first).rename(imagenet / "val" / WNIDS[0] / first)
    path = text(tmp_path, {"val.txt": "\n".join(map(list_of, VAL))}) / "val.txt"
    message = refusal(f"imagenet:{imagenet}", "test", annotations=path)
    assert f"is a {WNIDS[2]}, but lies in the folder {WNIDS[0]}" in message


def test_not_imagenet(tmp_path: Path, text, refusal) -> None:
    text(tmp_path, {"readme.txt": ""})
    assert "neither train nor val" in refusal(f"imagenet:{tmp_path}")
    assert "no such file or folder, expected boxes" in refusal(
        f"imagenet:{tmp_path}", annotations=tmp_path / "gone.txt"
    )
