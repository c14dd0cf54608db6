"""No class in two parts: splits by class of data with and without official ones, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnmap_core.errors import InputError
from crossattn_dml.zero_shot import load_zero_shot
from PIL import Image

UNSEEN = "synthetic:classes=10,superclasses=2,unseen=4,image_size=32,scale_min=0.4,train=36,test=16"


def folder(root: Path, **classes: int) -> str:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        for i in range(count):
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(path)
    return f"folder:{root}"


def labels_of(data) -> set[str]:
    return {data.labels[label] for label in data.targets}


def test_official_classes_count_from_0_and_are_apart():
    data = load_zero_shot(UNSEEN, val_share=0.4)
    parts = [data.train, data.val, data.query]
    assert [len(part.labels) for part in parts] == [4, 2, 4]
    for part in parts:
        assert sorted(set(part.targets.tolist())) == list(range(len(part.labels)))
        assert part[0].label == part.targets[0]
    assert not labels_of(data.train) & labels_of(data.val) | labels_of(data.train) & labels_of(data.query)
    assert len(data.train) + len(data.val) == 36
    assert data.gallery is None


def test_first_half_of_the_classes_of_all_photos(tmp_path):
    source = folder(tmp_path, a=3, b=2, c=4, d=2, e=2)
    data = load_zero_shot(source, class_split="first", train_share=0.5)
    assert (data.train.labels, data.query.labels) == (["a", "b"], ["c", "d", "e"])
    assert (len(data.train), len(data.query)) == (5, 8)


def test_random_classes_follow_the_seed(tmp_path):
    source = folder(tmp_path, **{name: 2 for name in "abcdefgh"})
    found = [load_zero_shot(source, class_split="random", split_seed=seed) for seed in (0, 0, 1)]
    assert found[0].train.labels == found[1].train.labels != found[2].train.labels
    for data in found:
        assert sorted(data.train.labels + data.query.labels) == list("abcdefgh")


def test_query_and_gallery(tmp_path):
    (tmp_path / "Eval").mkdir()
    rows = [("img/1.jpg", "id_1", "train"), ("img/2.jpg", "id_1", "train"), ("img/3.jpg", "id_2", "query")]
    rows += [("img/4.jpg", "id_2", "gallery"), ("img/5.jpg", "id_3", "gallery")]
    for name, _, _ in rows:
        (tmp_path / "Img" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12)).save(tmp_path / "Img" / name)
    lines = [str(len(rows)), "image_name item_id evaluation_status", *map(" ".join, rows)]
    (tmp_path / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines))
    data = load_zero_shot(f"inshop:{tmp_path}", query_split="query", gallery_split="gallery")
    assert data.gallery is not None
    assert data.query.labels == data.gallery.labels == ["id_2", "id_3"]
    assert (data.query.targets.tolist(), data.gallery.targets.tolist()) == ([0], [0, 1])


def test_the_split_of_cub_is_without_cubv2(tmp_path):
    names = [f"00{c}.Bird_{c}/{i}.jpg" for c in (1, 2, 3, 4) for i in (0, 1)]
    extra = [f"00{c}.Bird_{c}/v.jpg" for c in (1, 2, 3, 4)]
    for name in (*names, *extra):
        path = tmp_path / ("images" if name in names else "CUBV2") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12)).save(path)
    lists = {
        "images": [f"{i} {name}" for i, name in enumerate(names, 1)],
        "image_class_labels": [f"{i} {int(name[:3])}" for i, name in enumerate(names, 1)],
        "train_test_split": [f"{i} {i % 2}" for i in range(1, 9)],
        "bounding_boxes": [f"{i} 1 1 5 5" for i in range(1, 9)],
        "classes": [f"{c} 00{c}.Bird_{c}" for c in (1, 2, 3, 4)],
        "CUBV2/val/image_ids": extra,
        "CUBV2/val/class_labels": [f"{name},{c}" for c, name in enumerate(extra)],
        "CUBV2/val/image_sizes": [f"{name},12,12" for name in extra],
        "CUBV2/val/localization": [f"{name},1,1,5,5" for name in extra],
    }
    for name, rows in lists.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.txt").write_text("\n".join(rows))
    data = load_zero_shot(f"cub:{tmp_path}", class_split="first")
    assert (data.train.labels, data.query.labels) == (
        ["001.Bird_1", "002.Bird_2"],
        ["003.Bird_3", "004.Bird_4"],
    )
    assert sorted(data.train.image_ids + data.query.image_ids) == names
    assert data.train.targets.tolist().count(1) == 2


def test_shared_classes_are_an_error(tmp_path):
    source = folder(tmp_path, a=6, b=6)
    with pytest.raises(
        InputError, match="class 'a' and 1 more are in train and in test, expected other classes"
    ):
        load_zero_shot(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_share": 0.0, "class_split": "first"}, "train_share 0.0"),
        ({"train_share": 0.2, "class_split": "first"}, "leaves 0 of 2 classes for training"),
        ({"class_split": "half"}, "class_split half: expected official, first or random"),
        ({"class_split": "first", "val_share": 0.5}, "holds out 0 of 1 training classes"),
        ({"options": {"streaming": True}}, "a stream cannot be divided by class"),
    ],
)
def test_impossible_divisions(tmp_path, options, message):
    source = folder(tmp_path, a=2, b=2)
    with pytest.raises(InputError, match=message):
        load_zero_shot(source, **options)
