"""The creatures: the same pixels everywhere, exact truth, and classes that make the papers' problem real."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import pickle
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from attnmap_core.data import synthetic
from attnmap_core.data.synthetic import (
    PART_COLOURS,
    PART_TYPES,
    SyntheticImages,
    SyntheticSpec,
    class_names,
    class_parts,
    render,
    superclass_names,
    synthetic_dataset,
)
from attnmap_core.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

SMALL = SyntheticSpec(image_size=64)


def digest(spec: SyntheticSpec, split: str, indices: range) -> str:
    """SHA-256 over pixels, masks and boxes, in an order that does not depend on the machine's byte order."""
    sha = hashlib.sha256()
    for index in indices:
        scene = render(spec, split, index)
        for name in ("image", "mask", "part_mask"):
            sha.update(scene[name].astype(np.uint8).tobytes())
        sha.update(repr((scene["bbox_xywh"], scene["label"], scene["superclass"])).encode())
    return sha.hexdigest()


# --- The same pixels on every machine -----------------------------------------------------------

PINNED = {
    "": "427d8519debc5f33465dd1a9b2c9f7b16cf6e7896a7dad436df167125b177598",
    "image_size=64,classes=40,superclasses=8,seed=7,clutter=1,part_hidden=0.5": (
        "8e990efc8d7e4951ce696ad61635bbedf1cc22a4483c754a46763057ff48da2b"
    ),
    "image_size=77,domain_shift=0.8,spread=0.3,per_class=3,unseen=4": (
        "fa867b1cc8a1d48ef68ce43eb91a402d85985508f14128b7e5b15f8d6f6578cc"
    ),
}


@pytest.mark.parametrize("text", PINNED)
def test_pixels_are_pinned(text: str) -> None:
    """No tolerance: the arithmetic is chosen so that these bytes come out on every platform."""
    assert digest(SyntheticSpec.from_string(text), "test", range(12)) == PINNED[text]


def test_only_correctly_rounded_arithmetic_is_used() -> None:
    """The claim of the module text: nothing of NumPy or math whose last bit depends on the platform."""
    exact = {
        *("abs", "arange", "array", "ascontiguousarray", "broadcast_to", "clip", "empty", "floor", "full"),
        *("maximum", "minimum", "moveaxis", "nonzero", "sqrt", "where", "zeros", "zeros_like"),
        *(
            "bool_",
            "float32",
            "float64",
            "floating",
            "intp",
            "uint8",
            "uint64",
            "random",
            "ceil",
            "isqrt",
            "prod",
        ),
    }
    tree = ast.parse(inspect.getsource(synthetic))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("np", "math")
    }
    assert used <= exact
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    # ``sum`` of floats changed in Python 3.12; reductions, products and dots depend on the processor.
    assert not called & {"sum", "mean", "dot", "matmul", "einsum", "pow", "std", "hypot", "fsum"}
    powers = {type(node.op) for node in ast.walk(tree) if isinstance(node, ast.BinOp)} & {ast.MatMult}
    assert not powers


def test_random_words_are_those_of_the_published_philox() -> None:
    """Philox-4x64-10 written out: what the images are made of does not depend on NumPy's own seeding."""

    def philox(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(10):
            product0, product1 = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
            counter = [
                (product1 >> 64) ^ counter[1] ^ key[0],
                product1 & (2**64 - 1),
                (product0 >> 64) ^ counter[3] ^ key[1],
                product0 & (2**64 - 1),
            ]
            key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
        return counter

    draws = synthetic._Draws(SyntheticSpec(seed=5), "test", index=9, purpose=3)
    words = [*philox([1, 0, 9, 2], [5, 3]), *philox([2, 0, 9, 2], [5, 3])]
    expected = [(word >> 40) / 2**24 for word in words]
    np.testing.assert_array_equal(draws.array(8), np.array(expected, np.float32))


def test_everything_stays_single_precision() -> None:
    """A stray double would round differently under another NumPy's rules for mixing scalars and arrays."""
    canvas = synthetic._Canvas(32)
    draws = synthetic._Draws(SMALL, "train", 0, 0)
    shapes = [
        synthetic._Ellipse(0.4, 0.5, 0.2, 0.1, 0.1),
        synthetic._Limb(0.1, 0.2, 0.5, 0.6, 0.1, 0.05),
        synthetic._Polygon(0.1, 0.1, 0.5, 0.2, 0.3, 0.6),
        synthetic._Ring(0.5, 0.5, 0.2, 0.1),
    ]
    arrays = [shape.distance(canvas.x, canvas.y) for shape in shapes]
    arrays += [synthetic._noise(draws, 5, canvas), *synthetic._pebbles(draws, 6, canvas)]
    arrays += [synthetic._wave(canvas.x), canvas.pixels, draws.array(3)]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "shape",
    [
        synthetic._Ellipse(0.45, 0.5, 0.3, 0.15, 0.1),
        synthetic._Limb(0.2, 0.3, 0.7, 0.6, 0.15, 0.05),
        synthetic._Polygon(0.2, 0.2, 0.8, 0.3, 0.4, 0.8),
        synthetic._Polygon(0.4, 0.8, 0.8, 0.3, 0.2, 0.2),
        synthetic._Ring(0.5, 0.5, 0.3, 0.1),
    ],
)
def test_supports_bound_the_shapes(shape: synthetic._Shape) -> None:
    """The half-planes of ``support`` touch the pixels of negative distance; boxes and scales rest on it."""
    canvas = synthetic._Canvas(512)
    inside = shape.distance(canvas.x, canvas.y) < 0
    for turns in np.linspace(0, 1, 16, endpoint=False):
        ux, uy = synthetic._direction(float(turns))
        furthest = (canvas.x * ux + canvas.y * uy)[inside].max()
        assert furthest == pytest.approx(shape.support(ux, uy), abs=2 / 512)


def test_cosine_and_sine() -> None:
    for turns in np.linspace(-2, 2, 997).tolist():
        cosine, sine = synthetic._direction(turns)
        assert cosine == pytest.approx(np.cos(2 * np.pi * turns), abs=1e-7)
        assert sine == pytest.approx(np.sin(2 * np.pi * turns), abs=1e-7)


def test_another_process_draws_the_same() -> None:
    code = (
        "import hashlib; from attnmap_core.data.synthetic import *;"
        "print(hashlib.sha256(render(SyntheticSpec(image_size=64), 'val', 3)['image'].tobytes()).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = hashlib.sha256(render(SMALL, "val", 3)["image"].tobytes()).hexdigest()
    assert printed.strip() == here


def test_numpys_global_seed_has_no_influence() -> None:
    np.random.seed(0)  # noqa: NPY002 - the point of the test
    first = render(SMALL, "train", 4)["image"]
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(first, render(SMALL, "train", 4)["image"])


def test_seed_split_and_index_all_matter() -> None:
    scenes = [
        render(SMALL, "train", 0)["image"],
        render(SMALL, "train", 12)["image"],
        render(SMALL, "val", 0)["image"],
        render(SMALL, "test", 0)["image"],
        render(SyntheticSpec(image_size=64, seed=1), "train", 0)["image"],
    ]
    for i, one in enumerate(scenes):
        for other in scenes[i + 1 :]:
            assert np.abs(one.astype(int) - other).mean() > 10


def test_importing_needs_nothing_of_training() -> None:
    """`datasets` and torch stay out until they are needed."""
    code = (
        "import sys; import attnmap_core.data.synthetic;"
        "print([name for name in ('datasets', 'torch', 'matplotlib', 'cv2') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


# --- Exact truth --------------------------------------------------------------------------------


def _dilated(mask: np.ndarray, pixels: int) -> np.ndarray:
    height, width = mask.shape
    padded, near = np.pad(mask, pixels), np.zeros_like(mask)
    for down in range(2 * pixels + 1):
        for right in range(2 * pixels + 1):
            near |= padded[down : down + height, right : right + width]
    return near


def _eroded(mask: np.ndarray) -> np.ndarray:
    return ~_dilated(~mask, 1)


@pytest.mark.parametrize("size", [32, 64, 97, 224])
@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_box_is_tight_around_the_mask(size: int, hidden: float) -> None:
    spec = SyntheticSpec(image_size=size, superclasses=8, classes=96, part_hidden=hidden)
    for index in range(0, 96, 4):
        scene = render(spec, "train", index)
        assert scene["image"].shape == (size, size, 3)
        assert scene["image"].dtype == np.uint8
        assert scene["mask"].shape == scene["part_mask"].shape == (size, size)
        assert scene["mask"].dtype == scene["part_mask"].dtype == np.bool_
        x, y, width, height = scene["bbox_xywh"]
        assert all(type(value) is int for value in scene["bbox_xywh"])
        inside = np.zeros((size, size), bool)
        inside[y : y + height, x : x + width] = True
        assert not (scene["mask"] & ~inside).any()
        for edge in (
            scene["mask"][y, :],
            scene["mask"][y + height - 1, :],
            scene["mask"][:, x],
            scene["mask"][:, x + width - 1],
        ):
            assert edge.any()


def test_the_mask_is_where_the_animal_is() -> None:
    """An image with no pieces, drawn once more with another body palette, differs inside the mask alone."""
    spec = SyntheticSpec(image_size=96, clutter=0)
    other = SyntheticSpec(image_size=96, clutter=0, class_range="1:12")  # the same scenes with the next class
    for index in range(0, 22, 3):
        one, two = render(spec, "train", index), render(other, "train", index)
        changed = (one["image"].astype(int) - two["image"]).any(axis=-1)
        either = one["mask"] | two["mask"]
        near = _dilated(either, 2)
        assert not (changed & ~near).any()  # the background is the same to the last bit
        assert changed[either].mean() > 0.9  # and the animals are another colour


def test_parts_are_visible_and_small() -> None:
    for size, least in ((64, 6), (96, 12)):
        spec = SyntheticSpec(image_size=size, superclasses=8, classes=768)
        shares = []
        for label in range(0, 768, 7):
            scene = render(spec, "train", label)
            part, whole = int(scene["part_mask"].sum()), int(scene["mask"].sum())
            assert part >= least
            assert not (scene["part_mask"] & ~scene["mask"]).any()
            shares.append(part / whole)
        assert 0.03 < np.median(shares) < 0.25


def test_part_colours_show_in_the_part() -> None:
    """In bright light the part's pixels are nearer to their own colour than to any other of the list."""
    spec = SyntheticSpec(image_size=96, superclasses=2, classes=128, clutter=0)
    colours = np.array([colour for _, colour in PART_COLOURS])
    right = total = 0
    for label in range(128):
        scene = render(spec, "train", label)
        mean = scene["image"][scene["part_mask"]].mean(axis=0) / 255
        mean, listed = mean / np.linalg.norm(mean), colours / np.linalg.norm(colours, axis=1, keepdims=True)
        _, _, colour = class_parts(spec, label)
        if PART_COLOURS[colour][0] in ("white", "black"):  # differ in brightness, not in direction
            continue
        total += 1
        right += int((listed @ mean).argmax() == colour)
    assert right / total > 0.95


def test_a_leaf_hides_the_part() -> None:
    bare = SyntheticSpec(superclasses=8, classes=768)
    covered = SyntheticSpec(superclasses=8, classes=768, part_hidden=1.0)
    for label in range(0, 768, 9):
        open_scene, scene = render(bare, "train", label), render(covered, "train", label)
        assert not scene["part_mask"].any()
        assert scene["mask"].any()
        assert not (scene["mask"] & ~open_scene["mask"]).any()
        assert not (scene["mask"] & open_scene["part_mask"]).any()
        # Where the leaf is not, the picture is the same: what the mask keeps is what the image shows.
        np.testing.assert_array_equal(
            scene["image"][_eroded(scene["mask"])], open_scene["image"][_eroded(scene["mask"])]
        )


def test_share_of_hidden_parts() -> None:
    spec = SyntheticSpec(image_size=32, part_hidden=0.3, train=300)
    hidden = np.mean([not render(spec, "train", index)["part_mask"].any() for index in range(300)])
    assert 0.22 < hidden < 0.38


def test_another_size_shows_the_same_scene() -> None:
    small, large = SyntheticSpec(image_size=64), SyntheticSpec(image_size=128)
    differences, foreign = [], []
    for index in range(10):
        one, two = render(small, "train", index), render(large, "train", index)
        halved = two["image"].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        differences.append(np.abs(one["image"] - halved).mean())
        foreign.append(np.abs(render(small, "train", index + 12)["image"] - halved).mean())
        np.testing.assert_allclose(np.array(two["bbox_xywh"]) / 2, one["bbox_xywh"], atol=2.0)
    assert max(differences) < 6 < 20 < np.mean(foreign)


# --- Scale, place and floors --------------------------------------------------------------------


def boxes_of(spec: SyntheticSpec, split: str, count: int) -> np.ndarray:
    """Boxes as ``x0, y0, x1, y1`` in shares of the side."""
    boxes = np.array([render(spec, split, index)["bbox_xywh"] for index in range(count)], float)
    boxes[:, 2:] += boxes[:, :2]
    return boxes / spec.image_size


def accuracy_of_a_centred_box(boxes: np.ndarray, side: float, level: float) -> float:
    low, high = 0.5 - side / 2, 0.5 + side / 2
    overlap = np.prod(
        np.clip(np.minimum(boxes[:, 2:], high) - np.maximum(boxes[:, :2], low), 0, None), axis=1
    )
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return float((overlap / (areas + side * side - overlap) >= level).mean())


def test_the_centre_prior_is_weak() -> None:
    """Whole image and centred 80 % box fail, and so does every other centred square."""
    boxes = boxes_of(SyntheticSpec(image_size=48, test=400), "test", 400)
    floors = {
        side: accuracy_of_a_centred_box(boxes, side, 0.5) for side in (1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    }
    print("share of boxes with IoU >= 0.5 for a centred square of side:", floors)
    assert floors[1.0] < 0.02
    assert floors[0.8] < 0.09
    assert max(floors.values()) < 0.13
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert np.abs(middle.mean(axis=0) - 0.5).max() < 0.04  # no corner is favoured either
    assert middle.std(axis=0).min() > 0.15


def test_scale_range_is_kept() -> None:
    spec = SyntheticSpec(image_size=128, scale_min=0.4, scale_max=0.5)
    boxes = boxes_of(spec, "train", 60)
    longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert longer.min() > 0.36  # shapes end in thin tips that cover less than half a pixel
    assert longer.max() < 0.53  # the outline of the part adds a pixel or two
    assert longer.max() - longer.min() > 0.06


def test_spread_zero_is_the_middle() -> None:
    boxes = boxes_of(SyntheticSpec(image_size=96, spread=0), "train", 40)
    assert np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5).max() < 0.05


def test_clutter_adds_pieces_and_leaves_the_animal_alone() -> None:
    changed = []
    for index in range(8):
        empty, full = (
            render(SyntheticSpec(image_size=96, clutter=clutter), "train", index) for clutter in (0.0, 1.0)
        )
        np.testing.assert_array_equal(empty["mask"], full["mask"])
        differs = (empty["image"] != full["image"]).any(axis=-1)
        # Inside, only a seam of half-covered pixels between two shapes may let the background through.
        assert differs[_eroded(full["mask"])].mean() < 0.03
        changed.append(differs.mean())
    assert 0.05 < np.mean(changed) < 0.4


# --- Classes ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data(), superclasses=st.integers(1, 8))
def test_every_class_is_another_combination(data: st.DataObject, superclasses: int) -> None:
    classes = data.draw(st.integers(superclasses, 96 * superclasses))
    spec = SyntheticSpec(classes=classes, superclasses=superclasses)
    combinations = [class_parts(spec, label) for label in range(classes)]
    assert len(set(combinations)) == classes
    assert len(set(class_names(spec))) == classes
    superclass, part_type, colour = (max(column) for column in zip(*combinations))
    assert superclass < superclasses
    assert part_type < len(PART_TYPES)
    assert colour < len(PART_COLOURS)
    counts = np.bincount([superclass for superclass, _, _ in combinations], minlength=superclasses)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("classes", "superclasses"), [(12, 4), (40, 4), (200, 8), (100, 2)])
def test_unseen_classes_combine_seen_parts(classes: int, superclasses: int) -> None:
    spec = SyntheticSpec(classes=classes, superclasses=superclasses, unseen=classes // 2)
    seen = {class_parts(spec, label) for label in spec.labels_of("train")}
    unseen = {class_parts(spec, label) for label in spec.labels_of("test")}
    assert spec.labels_of("val") == spec.labels_of("train")
    assert not seen & unseen
    assert len(seen) + len(unseen) == classes
    for axis in range(3):
        assert {parts[axis] for parts in unseen} <= {parts[axis] for parts in seen}


def test_splits_show_their_classes_evenly() -> None:
    spec = SyntheticSpec(image_size=32, unseen=5, class_range="1:12", train=18, test=15)
    assert [render(spec, "train", index)["label"] for index in range(18)] == [1, 2, 3, 4, 5, 6] * 3
    assert [render(spec, "test", index)["label"] for index in range(15)] == [7, 8, 9, 10, 11] * 3
    assert len(class_names(spec)) == 12


def test_few_images_per_class() -> None:
    spec = SyntheticSpec(classes=500, superclasses=8, per_class=5, unseen=250)
    assert spec.size_of("train") == 1250
    labels = [spec.labels_of("train")[index % 250] for index in range(1250)]
    assert set(np.bincount(labels, minlength=250)) == {5}


def test_names_and_superclass() -> None:
    spec = SyntheticSpec(image_size=32, train=24)
    for index in range(24):
        scene = render(spec, "train", index)
        assert class_names(spec)[scene["label"]].endswith(superclass_names(spec)[scene["superclass"]])
        assert scene["image_id"] == f"creature-0-train-{index:06d}"


def test_classes_do_not_depend_on_the_seed() -> None:
    assert class_names(SyntheticSpec(seed=1)) == class_names(SyntheticSpec(seed=2))


def test_domain_shift_changes_only_the_test_split() -> None:
    spec = SyntheticSpec(image_size=64, domain_shift=1.0)
    np.testing.assert_array_equal(render(spec, "train", 3)["image"], render(SMALL, "train", 3)["image"])
    shifted, plain = render(spec, "test", 3), render(SMALL, "test", 3)
    np.testing.assert_array_equal(shifted["mask"], plain["mask"])
    assert np.abs(shifted["image"].astype(int) - plain["image"]).mean() > 20


# --- Difficulty ---------------------------------------------------------------------------------


def test_body_colour_tells_the_superclass_but_not_the_class() -> None:
    """Nearest neighbours on colours alone, of the animal with its part cut out and of the background."""
    spec = SyntheticSpec(train=720)
    scenes = [render(spec, "train", index) for index in range(720)]
    superclass, part_type, colour = np.array([class_parts(spec, scene["label"]) for scene in scenes]).T

    def colours(scene: dict[str, np.ndarray], where: np.ndarray) -> np.ndarray:
        pixels = scene["image"][where].astype(float)
        return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)])

    # The part's outline is two pixels wide; a rim of the background goes with it.
    body = np.stack([colours(s, _eroded(s["mask"]) & ~_dilated(s["part_mask"], 4)) for s in scenes])
    background = np.stack([colours(s, ~_dilated(s["mask"], 2)) for s in scenes])

    def accuracy(features: np.ndarray, targets: np.ndarray) -> float:
        known = len(targets) * 2 // 3
        scaled = (features - features.mean(axis=0)) / features.std(axis=0)
        distance = ((scaled[known:, None] - scaled[None, :known]) ** 2).sum(axis=-1)
        votes = targets[:known][np.argsort(distance, axis=1)[:, :9]]
        winner = np.array([np.bincount(row).argmax() for row in votes])
        return float((winner == targets[known:]).mean())

    # Classes that differ in the colour of one part, so that the hole it leaves tells nothing: chance is 1/2.
    same = part_type == 0
    found = accuracy(body, superclass), accuracy(body[same], colour[same])
    behind = accuracy(background, superclass), accuracy(background[same], colour[same])
    print("superclass and part colour from the body's colours:", found, "from the background's:", behind)
    assert found[0] > 0.8
    assert found[1] < 0.62
    assert behind[0] < 0.35
    assert behind[1] < 0.62


def test_drawing_takes_milliseconds() -> None:
    render(SMALL, "train", 0)
    started = time.process_time()
    for index in range(40):
        render(SMALL, "train", index)
    assert (time.process_time() - started) / 40 < 0.03  # 2 ms on an idle core


# --- The description ----------------------------------------------------------------------------


def test_string_round_trip() -> None:
    spec = SyntheticSpec.from_string(
        " classes=40, superclasses=8,clutter=0.3 ,seed=3,class_range=4:20,unseen=2 "
    )
    assert (spec.classes, spec.clutter, spec.class_range) == (40, 0.3, "4:20")
    assert SyntheticSpec.from_string(spec.to_string()) == spec
    assert SyntheticSpec.from_string("") == SyntheticSpec()
    assert SyntheticSpec().to_string() == ""


@settings(max_examples=50, deadline=None)
@given(clutter=st.floats(0, 1), seed=st.integers(0, 2**63 - 1), size=st.integers(32, 300))
def test_string_round_trip_keeps_every_bit(clutter: float, seed: int, size: int) -> None:
    spec = SyntheticSpec(clutter=clutter, seed=seed, image_size=size)
    assert SyntheticSpec.from_string(spec.to_string()) == spec


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("clases=12", r"unknown field 'clases=12'.*classes"),
        ("classes", "unknown field 'classes'.*name=value"),
        ("classes=12,classes=13", "'classes' is given twice"),
        ("classes=twelve", "classes is 'twelve', expected a whole number"),
        ("clutter=much", "clutter is 'much', expected a number"),
        ("classes=3", "classes is 3, expected 4 to 384"),
        ("classes=400", "classes is 400, expected 4 to 384"),
        ("superclasses=9", "superclasses is 9, expected 1 to 8"),
        ("image_size=31", "image_size is 31, expected 32"),
        ("train=-1", "train is -1"),
        ("seed=-1", "seed is -1"),
        ("scale_min=0.8", "scale_min is 0.8, expected above 0, at most 0.7"),
        ("scale_max=1.2", "scale_max is 1.2"),
        ("image_size=32,scale_min=0.1", "scale_min is 0.1, expected at least 0.25"),
        ("clutter=nan", "clutter is nan"),
        ("part_hidden=2", "part_hidden is 2"),
        ("part_size=0", "part_size is 0"),
        ("unseen=12", "unseen is 12, expected fewer than the 12"),
        ("class_range=6", "class_range is '6', expected first:end within 0:12"),
        ("class_range=6:13", "class_range is '6:13'"),
        ("class_range=6:6", "class_range is '6:6'"),
    ],
)
def test_wrong_descriptions_are_one_line_input_errors(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        SyntheticSpec.from_string(text)
    assert "\n" not in str(caught.value)


def test_wrong_split_and_index() -> None:
    for call in (render, lambda *arguments: SyntheticImages(*arguments[:2]), synthetic_dataset_of):
        with pytest.raises(InputError, match=r"split 'trian'.*train, val, test"):
            call(SMALL, "trian", 0)
    with pytest.raises(IndexError, match=r"0\.\.299 of split 'val'"):
        render(SMALL, "val", 300)
    with pytest.raises(IndexError):
        render(SMALL, "val", -1)


def synthetic_dataset_of(spec: SyntheticSpec, split: str, index: int) -> None:
    pytest.importorskip("datasets")
    synthetic_dataset(spec, split)


# --- Data sets ----------------------------------------------------------------------------------


def test_samples_are_those_of_render() -> None:
    images = SyntheticImages(SMALL, "val")
    assert len(images) == 300
    sample, scene = images[7], render(SMALL, "val", 7)
    assert set(sample) == {"image", "label", "boxes_xyxy", "mask", "ignore", "image_id", "index"}
    assert sample["image"].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(sample["image"]), scene["image"])
    np.testing.assert_array_equal(sample["mask"], scene["mask"])
    x, y, width, height = scene["bbox_xywh"]
    np.testing.assert_array_equal(sample["boxes_xyxy"], [[x, y, x + width, y + height]])
    assert sample["boxes_xyxy"].dtype == np.float64
    assert (sample["label"], sample["index"], sample["ignore"]) == (7, 7, None)
    assert images.labels[7] == class_names(SMALL)[7]
    assert len(list(SyntheticImages(SyntheticSpec(image_size=32, val=3), "val"))) == 3  # iteration ends


def test_data_sets_can_be_sent_to_workers() -> None:
    images = pickle.loads(pickle.dumps(SyntheticImages(SMALL, "val")))
    np.testing.assert_array_equal(images[5]["mask"], render(SMALL, "val", 5)["mask"])


def test_table_rows_are_drawn_on_access() -> None:
    pytest.importorskip("datasets")
    table = synthetic_dataset(SMALL, "val")
    assert len(table) == 300
    row, scene = table[7], render(SMALL, "val", 7)
    assert set(row) == {"image_id", "image", "label", "objects", "masks", "ignore"}
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), scene["image"])
    mask = Image.open(io.BytesIO(row["masks"][0]["bytes"]))
    np.testing.assert_array_equal(np.asarray(mask) > 0, scene["mask"])
    assert row["objects"]["bbox"] == [list(map(float, scene["bbox_xywh"]))]
    assert (row["label"], row["image_id"], row["ignore"]) == (7, scene["image_id"], None)
    assert row["image"]["path"] == f"{scene['image_id']}.png"


def test_table_survives_selecting_shuffling_and_pickling() -> None:
    pytest.importorskip("datasets")
    table = synthetic_dataset(SMALL, "val")
    assert table.features["label"].names == class_names(SMALL)
    assert list(table["label"])[:14] == [*range(12), 0, 1]  # a column alone draws nothing
    chosen = table.shuffle(seed=1).select(range(5))
    for row in (chosen[3], pickle.loads(pickle.dumps(chosen))[3]):
        index = int(row["image_id"].rsplit("-", 1)[1])
        expected = render(SMALL, "val", index)
        assert row["label"] == expected["label"]
        image = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        np.testing.assert_array_equal(image, expected["image"])
    assert len(table[:3]["image"]) == 3


def test_a_hundred_thousand_images_need_no_memory() -> None:
    pytest.importorskip("datasets")
    spec = SyntheticSpec(image_size=224, train=100_000)
    synthetic_dataset(SMALL, "val")  # imports are not what is measured
    tracemalloc.start()
    table = synthetic_dataset(spec, "train")
    images = SyntheticImages(spec, "train")
    image = images[99_999]["image"]
    assert table[99_999]["image_id"] == "creature-0-train-099999"
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert image.size == (224, 224)
    assert held < 10e6  # the pictures would be 15 GB
    assert table.with_format(None).data.nbytes < 6e6
