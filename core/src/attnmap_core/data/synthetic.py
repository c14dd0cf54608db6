"""The embedded default data: fine-grained creatures on cluttered backgrounds, from a seed, with exact truth.

A class is *superclass x part type x part colour*: the body plan (fish, bird, ...) and a wide range of body
hues tell the superclass, and one small part (say a red fan on the head) tells the class inside it. Shade,
pattern, proportions, pose, size, place and light vary inside a class and say nothing about it. Pieces that
look like limbs, heads and parts lie about in the background. So a classifier must find the part, its maps
light up the part rather than the animal, and classes kept for testing combine body plans, part types and part
colours that were seen in training.

The pixels are the same on every machine, by construction rather than by tolerance: random numbers are raw
Philox words (a published integer algorithm, keyed by seed and image), and the arithmetic is IEEE ``+ - * /``,
square root and comparisons only, which every platform rounds alike. There is no ``sin``, ``exp`` or ``pow``,
no matrix product and no ``sum`` of floats, whose last bits depend on the machine or on the versions of Python
and NumPy. (PNG *files* may be packed differently by another zlib; what they decode to is the same.)

Scenes live in the unit square: another ``image_size`` shows the same scene at another resolution.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputError

if TYPE_CHECKING:
    import datasets

Split = Literal["train", "val", "test"]
Floats = NDArray[np.floating[Any]]  # float32 throughout
Rgb = tuple[float, float, float]
T = TypeVar("T")

SPLITS: tuple[Split, ...] = ("train", "val", "test")

_WHITE: Rgb = (0.95, 0.95, 0.95)
_BLACK: Rgb = (0.05, 0.05, 0.05)

# A part's type is where it sits and what it looks like. Data sets of few classes use the first few.
PART_TYPES: tuple[tuple[str, str, str], ...] = (
    ("crest", "head", "fan"),
    ("ring", "flank", "ring"),
    ("tail-ball", "tail", "ball"),
    ("cross", "flank", "cross"),
    ("horn", "head", "spike"),
    ("tail-fork", "tail", "fork"),
    ("diamond", "flank", "diamond"),
    ("topknot", "head", "ball"),
    ("tail-fan", "tail", "fan"),
    ("spot", "flank", "ball"),
    ("antlers", "head", "fork"),
    ("tail-spike", "tail", "spike"),
)
PART_COLOURS: tuple[tuple[str, Rgb], ...] = (
    ("red", (0.90, 0.12, 0.12)),
    ("blue", (0.12, 0.30, 0.95)),
    ("yellow", (0.98, 0.86, 0.10)),
    ("violet", (0.62, 0.15, 0.80)),
    ("green", (0.10, 0.75, 0.25)),
    ("white", (0.97, 0.97, 0.97)),
    ("orange", (0.98, 0.50, 0.06)),
    ("black", (0.06, 0.06, 0.08)),
)


@dataclass(frozen=True, kw_only=True)
class SyntheticSpec:
    """What to draw; with the split and the index it fixes every pixel.

    What a class looks like does not depend on ``seed``: another seed gives fresh images of the same classes.

    Class-disjoint data (metric learning): ``unseen=6`` keeps the last six classes for ``test`` alone, and
    ``test`` then shows no others; ``class_range="0:6"`` cuts the class list for all splits. Labels and class
    names always count through all ``classes``. Consecutive labels walk through the superclasses, and each new
    round combines part types and part colours anew, so later classes are new combinations of known parts.

    Attributes:
        classes: number of classes; at most 96 a superclass.
        superclasses: body plans used, 1 to 8.
        image_size: side of the square images in pixels, at least 32.
        train, val, test: images of each split.
        per_class: images per class and split, in place of the three totals (few-per-class data); 0 is off.
        seed: of the whole data set.
        scale_min, scale_max: the longer side of the object's box as a share of the image's side.
        spread: share of the free room in which the object is placed; 1 is anywhere, 0 always the middle.
        clutter: 0 to 1, how many object-like pieces lie in the background.
        part_size: factor on the size of the discriminative part.
        part_hidden: share of images in which a leaf covers the part and what else of the animal is under it.
        domain_shift: 0 to 1, how far colours, light and textures of ``test`` leave those of the other splits.
        unseen: number of last classes that only ``test`` shows; 0 means that all splits show all classes.
        class_range: ``"first:end"`` (end exclusive) restricts the classes shown; empty means all.

    Raises:
        InputError: for a value out of range.

    Example:
        >>> spec = SyntheticSpec.from_string("classes=6,superclasses=2,image_size=64,seed=3")
        >>> spec.classes, spec.image_size, spec.train
        (6, 64, 2400)
        >>> class_names(spec)[:3]
        ['red crest fish', 'red crest bird', 'blue ring fish']
    """

    classes: int = 12
    superclasses: int = 4
    image_size: int = 96
    train: int = 2400
    val: int = 300
    test: int = 600
    per_class: int = 0
    seed: int = 0
    scale_min: float = 0.35
    scale_max: float = 0.7
    spread: float = 1.0
    clutter: float = 0.5
    part_size: float = 1.0
    part_hidden: float = 0.0
    domain_shift: float = 0.0
    unseen: int = 0
    class_range: str = ""

    def __post_init__(self) -> None:
        plans, limit = len(_BODY_PLANS), len(PART_TYPES) * len(PART_COLOURS)
        self._require(1 <= self.superclasses <= plans, "superclasses", f"1 to {plans}")
        most = self.superclasses * limit
        self._require(self.superclasses <= self.classes <= most, "classes", f"{self.superclasses} to {most}")
        self._require(32 <= self.image_size <= 4096, "image_size", "32 to 4096 pixels")
        for name in ("train", "val", "test", "per_class"):
            self._require(0 <= getattr(self, name) < 2**31, name, "a count of images, 0 or more")
        self._require(0 <= self.seed < 2**63, "seed", "a whole number from 0")
        self._require(0 < self.scale_min <= self.scale_max, "scale_min", f"above 0, at most {self.scale_max}")
        self._require(self.scale_max <= 0.95, "scale_max", "at most 0.95 of the side")
        smallest = 8 / self.image_size
        self._require(self.scale_min >= smallest, "scale_min", f"at least {smallest:.3f} (8 pixels)")
        for name in ("spread", "clutter", "part_hidden", "domain_shift"):
            self._require(0 <= getattr(self, name) <= 1, name, "a share in [0, 1]")
        self._require(0.25 <= self.part_size <= 1.5, "part_size", "a factor in [0.25, 1.5]")
        shown = self._range()
        self._require(0 <= self.unseen < len(shown), "unseen", f"fewer than the {len(shown)} classes shown")

    @classmethod
    def from_string(cls, text: str) -> SyntheticSpec:
        """Read ``"classes=12,image_size=96,seed=3"``; fields left out keep their defaults.

        Raises:
            InputError: for an unknown field, a field given twice or a value of the wrong kind.
        """
        kinds = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, Any] = {}
        for item in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = (piece.strip() for piece in item.partition("="))
            if not equals or name not in kinds:
                raise InputError(
                    f"synthetic data: unknown field {item!r}, expected name=value of {', '.join(kinds)}"
                )
            if name in values:
                raise InputError(f"synthetic data: field {name!r} is given twice in {text!r}; keep one")
            try:
                values[name] = kinds[name](value)
            except ValueError:
                kind = "a whole number" if kinds[name] is int else "a number"
                raise InputError(
                    f"synthetic data: {name} is {value!r}, expected {kind}; correct it"
                ) from None
        return cls(**values)

    def to_string(self) -> str:
        """The fields that differ from the defaults, as :meth:`from_string` reads them."""
        changed = ((field.name, getattr(self, field.name)) for field in fields(self))
        defaults = {field.name: field.default for field in fields(self)}
        return ",".join(f"{name}={value}" for name, value in changed if value != defaults[name])

    def labels_of(self, split: str) -> range:
        """The labels that ``split`` shows; image ``i`` has label ``labels[i % len(labels)]``."""
        shown = self._range()
        _check_split(split)
        if not self.unseen:
            return shown
        return shown[-self.unseen :] if split == "test" else shown[: -self.unseen]

    def size_of(self, split: str) -> int:
        """Number of images of ``split``."""
        labels = self.labels_of(split)
        return self.per_class * len(labels) if self.per_class else int(getattr(self, split))

    def _range(self) -> range:
        if not self.class_range:
            return range(self.classes)
        first, colon, end = self.class_range.partition(":")
        fits = bool(colon) and first.isdecimal() and end.isdecimal()
        self._require(
            fits and int(first) < int(end) <= self.classes,
            "class_range",
            f"first:end within 0:{self.classes}",
        )
        return range(int(first), int(end))

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise InputError(
                f"synthetic data: {name} is {getattr(self, name)!r}, expected {expected}; correct it"
            )


def _check_split(split: str) -> None:
    """Raise an :class:`InputError` unless ``split`` is ``train``, ``val`` or ``test``."""
    if split not in SPLITS:
        raise InputError(
            f"synthetic data: split {split!r} does not exist, expected one of {', '.join(SPLITS)}"
        )


def superclass_names(spec: SyntheticSpec) -> list[str]:
    """Names of the body plans, in the order of the ``superclass`` numbers."""
    return list(_BODY_PLANS)[: spec.superclasses]


def class_parts(spec: SyntheticSpec, label: int) -> tuple[int, int, int]:
    """What makes a class: ``(superclass, part type, part colour)``, indices into the three lists.

    Within a superclass the first classes use every type and every colour (the diagonal of the type x colour
    table), later ones the shifted diagonals: new combinations of parts that were all seen before.
    """
    if not 0 <= label < spec.classes:
        raise ValueError(f"label must be in 0..{spec.classes - 1}, got {label}")
    types, colours = _vocabulary(spec)
    combination, superclass = divmod(label, spec.superclasses)
    shift, part_type = divmod(combination, types)
    return superclass, part_type, (part_type + shift) % colours


def _vocabulary(spec: SyntheticSpec) -> tuple[int, int]:
    """How many part types and part colours are in use: about the root of the classes of a superclass."""
    wanted = -(-spec.classes // spec.superclasses)
    colours = min(len(PART_COLOURS), math.isqrt(wanted - 1) + 1)
    return max(colours, -(-wanted // colours)), colours


def class_names(spec: SyntheticSpec) -> list[str]:
    """Readable names by label, such as ``"red crest fish"``."""
    names: list[str] = []
    for label in range(spec.classes):
        superclass, part_type, colour = class_parts(spec, label)
        body = superclass_names(spec)[superclass]
        names.append(f"{PART_COLOURS[colour][0]} {PART_TYPES[part_type][0]} {body}")
    return names


# --- Random numbers -------------------------------------------------------------------------------

_POSE, _LOOK, _BACKGROUND, _PIECES, _LIGHT = range(5)


class _Draws:
    """Uniform numbers of one image and purpose: a change to one knob leaves the draws of the others alone."""

    def __init__(self, spec: SyntheticSpec, split: str, index: int, purpose: int) -> None:
        key = (purpose << 64) | spec.seed
        counter = (SPLITS.index(cast(Split, split)) << 192) | (index << 128)
        self._words = np.random.Philox(key=key, counter=counter)
        self._stock: list[float] = []

    def array(self, *shape: int) -> Floats:
        words = self._words.random_raw(math.prod(shape))
        return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)

    def unit(self) -> float:
        if not self._stock:
            self._stock = ((self._words.random_raw(128) >> np.uint64(11)) * 2.0**-53).tolist()
        return self._stock.pop()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.unit() * len(options))]

    def colour(
        self,
        saturation: tuple[float, float],
        value: tuple[float, float],
        hue: tuple[float, float] = (0.0, 1.0),
    ) -> Rgb:
        """A colour from ranges of hue (in turns), saturation and value: HSV, which is piecewise linear."""
        turn, chroma, light = self.between(*hue), self.between(*saturation), self.between(*value)
        hue6 = 6 * (turn - math.floor(turn))
        corners = (abs(hue6 - 3) - 1, 2 - abs(hue6 - 2), 2 - abs(hue6 - 4))
        red, green, blue = (light * (1 - chroma + chroma * min(1.0, max(0.0, corner))) for corner in corners)
        return red, green, blue


def _direction(turns: float) -> tuple[float, float]:
    """Cosine and sine of an angle in turns, to 1e-7, by polynomials: libm may round differently elsewhere."""
    quarters = math.floor(4 * turns + 0.5)
    angle = (turns - quarters / 4) * 6.283185307179586
    square = angle * angle
    sine = angle * (1 - square / 6 * (1 - square / 20 * (1 - square / 42 * (1 - square / 72))))
    cosine = 1 - square / 2 * (1 - square / 12 * (1 - square / 30 * (1 - square / 56)))
    for _ in range(quarters % 4):
        cosine, sine = -sine, cosine
    return cosine, sine


# --- Shapes: signed distances and supports --------------------------------------------------------


@dataclass(frozen=True)
class _Ellipse:
    x: float
    y: float
    rx: float
    ry: float
    turns: float = 0.0

    def distance(self, x: Floats, y: Floats) -> Floats:
        cosine, sine = _direction(self.turns)
        across, along = x - self.x, y - self.y
        u = (across * cosine + along * sine) / self.rx
        v = (along * cosine - across * sine) / self.ry
        k0 = np.sqrt(u * u + v * v)
        u, v = u / self.rx, v / self.ry
        k1 = np.sqrt(u * u + v * v)
        # First-order distance: exact on the outline, with slope 1 there. The tiny terms define the centre.
        return (k0 - 1.0) * (k0 + 1e-6) / (k1 + 1e-6)

    def support(self, ux: float, uy: float) -> float:
        cosine, sine = _direction(self.turns)
        a, b = self.rx * (ux * cosine + uy * sine), self.ry * (uy * cosine - ux * sine)
        return self.x * ux + self.y * uy + math.sqrt(a * a + b * b)


@dataclass(frozen=True)
class _Limb:
    """A stroke from one point to another whose radius goes from ``r0`` to ``r1``."""

    x0: float
    y0: float
    x1: float
    y1: float
    r0: float
    r1: float

    def distance(self, x: Floats, y: Floats) -> Floats:
        bx, by = self.x1 - self.x0, self.y1 - self.y0
        across, along = x - self.x0, y - self.y0
        t = np.clip((across * bx + along * by) / (bx * bx + by * by + 1e-12), 0.0, 1.0)
        dx, dy = across - t * bx, along - t * by
        return np.sqrt(dx * dx + dy * dy) - (self.r0 + t * (self.r1 - self.r0))

    def support(self, ux: float, uy: float) -> float:
        return max(self.x0 * ux + self.y0 * uy + self.r0, self.x1 * ux + self.y1 * uy + self.r1)


class _Polygon:
    """A convex polygon; corners as x, y, x, y, ... in either sense of rotation."""

    def __init__(self, *corners: float) -> None:
        self.points = list(zip(corners[::2], corners[1::2]))

    def distance(self, x: Floats, y: Floats) -> Floats:
        edges = list(zip(self.points, self.points[1:] + self.points[:1]))
        area = 0.0
        for (ax, ay), (bx, by) in edges:
            area += ax * by - bx * ay
        sign = 1.0 if area > 0 else -1.0
        furthest: Floats | None = None
        for (ax, ay), (bx, by) in edges:
            length = math.sqrt((bx - ax) * (bx - ax) + (by - ay) * (by - ay))
            nx, ny = sign * (by - ay) / length, sign * (ax - bx) / length
            beyond = (x - ax) * nx + (y - ay) * ny
            furthest = beyond if furthest is None else np.maximum(furthest, beyond)
        assert furthest is not None
        return furthest

    def support(self, ux: float, uy: float) -> float:
        return max(px * ux + py * uy for px, py in self.points)


@dataclass(frozen=True)
class _Ring:
    x: float
    y: float
    r: float
    width: float

    def distance(self, x: Floats, y: Floats) -> Floats:
        across, along = x - self.x, y - self.y
        return np.abs(np.sqrt(across * across + along * along) - self.r) - 0.5 * self.width

    def support(self, ux: float, uy: float) -> float:
        return self.x * ux + self.y * uy + self.r + 0.5 * self.width


_Shape = _Ellipse | _Limb | _Polygon | _Ring


@dataclass(frozen=True)
class _Frame:
    """Coordinates along and across the unit vector ``(ux, uy)``, from ``(x, y)``, in units of ``r``."""

    x: float
    y: float
    ux: float
    uy: float
    r: float

    def __call__(self, along: float, across: float) -> tuple[float, float]:
        x = self.x + self.r * (along * self.ux - across * self.uy)
        return x, self.y + self.r * (along * self.uy + across * self.ux)


def _glyph(name: str, at: _Frame) -> list[_Shape]:
    """The shapes of a part that fills its frame's unit circle and points along the frame's axis."""
    r = at.r

    def stroke(a: tuple[float, float], b: tuple[float, float], r0: float, r1: float) -> _Limb:
        return _Limb(*at(*a), *at(*b), r * r0, r * r1)

    if name == "ball":
        return [_Ellipse(at.x, at.y, 0.85 * r, 0.85 * r)]
    if name == "ring":
        return [_Ring(at.x, at.y, 0.7 * r, 0.55 * r)]
    if name == "cross":
        return [stroke((-0.8, -0.8), (0.8, 0.8), 0.28, 0.28), stroke((-0.8, 0.8), (0.8, -0.8), 0.28, 0.28)]
    if name == "diamond":
        return [_Polygon(*at(-1.1, 0), *at(0, -0.75), *at(1.1, 0), *at(0, 0.75))]
    if name == "spike":
        return [stroke((-0.5, 0), (1.4, 0), 0.6, 0.05)]
    if name == "fork":
        return [stroke((-0.9, 0), (1.2, side), 0.28, 0.2) for side in (-0.85, 0.85)]
    if name == "fan":
        return [stroke((-0.9, 0), (0.9, side), 0.22, 0.34) for side in (-0.95, 0.0, 0.95)]
    raise ValueError(f"no part looks like {name!r}")


# --- Body plans -----------------------------------------------------------------------------------
# Local coordinates: the creature faces +x, y points down, the body is about two units long.


@dataclass
class _Creature:
    layers: list[tuple[_Shape, str]]
    """Back to front; the word names the tone of the palette."""
    head: tuple[float, float, float, float]
    """Where a part on the head is rooted and the unit vector along which it grows; the others likewise."""
    tail: tuple[float, float, float, float]
    flank: tuple[float, float, float, float]
    part_radius: float = 0.36


def _eye(x: float, y: float, r: float = 0.11) -> list[tuple[_Shape, str]]:
    return [(_Ellipse(x, y, r, r), "white"), (_Ellipse(x + 0.25 * r, y, 0.55 * r, 0.55 * r), "black")]


def _fish(d: _Draws) -> _Creature:
    tall, fin, swing = d.between(0.52, 0.7), d.between(0.75, 1.0), d.between(-0.15, 0.15)
    return _Creature(
        [
            (_Polygon(-0.75, 0.0, -1.4, -0.6 + swing, -1.25, swing), "second"),
            (_Polygon(-0.75, 0.0, -1.4, 0.6 + swing, -1.25, swing), "second"),
            (_Polygon(-0.5, -0.3, 0.3, -0.3, -0.3, -fin), "second"),
            (_Polygon(-0.2, 0.3, 0.3, 0.3, -0.1, 0.25 + 0.6 * fin), "second"),
            (_Ellipse(0.0, 0.0, 1.0, tall), "body"),
            (_Ellipse(0.25, 0.18, 0.24, 0.1, 0.07), "second"),
            (_Limb(0.45, -0.28, 0.42, 0.28, 0.025, 0.025), "dark"),
            *_eye(0.68, -0.1),
        ],
        head=(0.5, -0.8 * tall, 0.2, -0.98),
        tail=(-1.28, swing, -1.0, 0.0),
        flank=(-0.2, -0.02, 0.0, -1.0),
    )


def _bird(d: _Draws) -> _Creature:
    neck, step, fan = d.between(-0.1, 0.12), d.between(-0.16, 0.16), d.between(-0.25, 0.1)
    hx, hy = 0.66, -0.62 + neck
    return _Creature(
        [
            (_Limb(0.0, 0.45, -0.05 + step, 0.9, 0.07, 0.055), "dark"),
            (_Limb(-0.05 + step, 0.9, 0.16 + step, 0.93, 0.055, 0.04), "dark"),
            (_Limb(0.14, 0.45, 0.17 - step, 0.9, 0.07, 0.055), "dark"),
            (_Limb(0.17 - step, 0.9, 0.38 - step, 0.93, 0.055, 0.04), "dark"),
            (_Polygon(-0.5, -0.15, -1.25, -0.2 + fan, -1.2, 0.16 + fan, -0.5, 0.3), "second"),
            (_Limb(0.3, -0.05, hx, hy, 0.45, 0.26), "body"),
            (_Polygon(hx + 0.22, hy - 0.15, hx + 0.66, hy + 0.06, hx + 0.22, hy + 0.18), "horn"),
            (_Ellipse(-0.02, 0.05, 0.8, 0.62, -0.05), "body"),
            (_Ellipse(hx, hy, 0.36, 0.34), "body"),
            (_Ellipse(-0.2, 0.04, 0.52, 0.32, -0.02), "second"),
            *_eye(hx + 0.1, hy - 0.06, 0.12),
        ],
        head=(hx - 0.08, hy - 0.26, -0.2, -0.98),
        tail=(-1.15, fan, -0.98, 0.2),
        flank=(-0.08, 0.08, 0.0, -1.0),
    )


def _beast(d: _Draws) -> _Creature:
    step, tail, nod = d.between(-0.22, 0.22), d.between(-0.75, 0.1), d.between(-0.15, 0.2)
    hx, hy = 1.02, -0.5 + nod
    return _Creature(
        [
            (_Limb(-0.6, 0.1, -0.6 - step, 0.9, 0.2, 0.15), "dark"),
            (_Limb(0.55, 0.1, 0.55 + step, 0.9, 0.19, 0.14), "dark"),
            (_Limb(-0.95, -0.15, -1.4, tail, 0.14, 0.09), "body"),
            (_Polygon(hx - 0.3, hy - 0.1, hx - 0.28, hy - 0.62, hx + 0.02, hy - 0.15), "second"),
            (_Limb(0.55, -0.1, hx, hy, 0.38, 0.28), "body"),
            (_Limb(-0.65, 0.0, 0.55, -0.05, 0.52, 0.47), "body"),
            (_Limb(-0.78, 0.15, -0.78 + step, 0.93, 0.24, 0.16), "body"),
            (_Limb(0.45, 0.15, 0.45 - step, 0.93, 0.22, 0.15), "body"),
            (_Ellipse(hx, hy, 0.39, 0.33, 0.05), "body"),
            (_Ellipse(hx + 0.33, hy + 0.1, 0.21, 0.14, 0.04), "light"),
            (_Ellipse(hx + 0.5, hy + 0.07, 0.07, 0.06), "black"),
            (_Polygon(hx - 0.12, hy - 0.18, hx + 0.0, hy - 0.66, hx + 0.2, hy - 0.18), "second"),
            *_eye(hx + 0.14, hy - 0.06, 0.1),
        ],
        head=(hx - 0.08, hy - 0.4, -0.1, -0.99),
        tail=(-1.38, tail, -0.86, -0.5),
        flank=(-0.08, -0.02, 0.0, -1.0),
    )


def _beetle(d: _Draws) -> _Creature:
    wide, sway = d.between(0.66, 0.85), d.between(-0.12, 0.12)
    layers: list[tuple[_Shape, str]] = []
    for side in (-1.0, 1.0):
        for root, knee, foot in ((0.6, 0.9, 1.05), (0.05, 0.1, -0.02), (-0.5, -0.75, -1.0)):
            bend = sway * side
            layers += [
                (_Limb(root, 0.35 * side, knee + bend, 0.9 * side, 0.11, 0.08), "dark"),
                (_Limb(knee + bend, 0.9 * side, foot + bend, 1.05 * side, 0.08, 0.06), "dark"),
            ]
        layers.append((_Limb(1.1, 0.08 * side, 1.45, 0.4 * side + sway, 0.06, 0.045), "dark"))
    return _Creature(
        [
            *layers,
            (_Ellipse(1.08, 0.0, 0.28, 0.3), "dark"),
            (_Ellipse(0.7, 0.0, 0.36, 0.8 * wide), "second"),
            (_Ellipse(-0.25, 0.0, 0.95, wide), "body"),
            (_Limb(0.6, 0.0, -1.18, 0.0, 0.03, 0.03), "dark"),
            (_Ellipse(1.2, -0.17, 0.08, 0.08), "white"),
            (_Ellipse(1.2, 0.17, 0.08, 0.08), "white"),
        ],
        head=(1.28, 0.0, 1.0, 0.0),
        tail=(-1.12, 0.0, -1.0, 0.0),
        flank=(-0.25, 0.0, 1.0, 0.0),
    )


def _snail(d: _Draws) -> _Creature:
    round_, lift = d.between(0.62, 0.76), d.between(-0.2, 0.1)
    sx, sy, hx, hy = -0.15, 0.35 - round_, 1.1, -0.25 + lift
    return _Creature(
        [
            (_Limb(hx, hy, hx + 0.12, hy - 0.5, 0.06, 0.05), "light"),
            (_Limb(hx + 0.05, hy, hx + 0.4, hy - 0.42, 0.06, 0.05), "light"),
            (_Ellipse(hx + 0.12, hy - 0.52, 0.09, 0.09), "black"),
            (_Ellipse(hx + 0.4, hy - 0.44, 0.09, 0.09), "black"),
            (_Limb(-1.25, 0.5, 0.2, 0.4, 0.06, 0.22), "light"),
            (_Limb(0.2, 0.4, 0.85, 0.36, 0.22, 0.22), "light"),
            (_Limb(0.85, 0.36, hx, hy, 0.22, 0.2), "light"),
            (_Ellipse(sx, sy, round_, 0.95 * round_), "body"),
            (_Ellipse(sx + 0.08, sy + 0.04, 0.7 * round_, 0.66 * round_), "second"),
            (_Ellipse(sx + 0.12, sy + 0.07, 0.45 * round_, 0.42 * round_), "body"),
        ],
        head=(hx - 0.05, hy - 0.18, -0.45, -0.9),
        tail=(-1.2, 0.45, -0.9, -0.43),
        flank=(sx + 0.1, sy + 0.05, 0.0, -1.0),
    )


def _turtle(d: _Draws) -> _Creature:
    dome, step, nod = d.between(0.6, 0.75), d.between(-0.15, 0.15), d.between(-0.25, 0.1)
    hx, hy = 1.25, -0.05 + nod
    return _Creature(
        [
            (_Polygon(-0.8, 0.1, -1.35, 0.36, -0.8, 0.34), "light"),
            (_Limb(-0.55, 0.25, -0.65 + step, 0.72, 0.2, 0.17), "light"),
            (_Limb(0.55, 0.25, 0.65 - step, 0.72, 0.2, 0.17), "light"),
            (_Limb(0.75, 0.15, hx, hy, 0.2, 0.2), "light"),
            (_Ellipse(hx + 0.05, hy, 0.3, 0.24), "light"),
            (
                _Polygon(-1.0, 0.3, -0.8, -0.6 * dome, -0.25, -dome, 0.3, -dome, 0.8, -0.6 * dome, 1.0, 0.3),
                "body",
            ),
            (_Limb(-0.95, 0.32, 0.95, 0.32, 0.09, 0.09), "second"),
            (_Limb(-0.3, -0.8 * dome, -0.42, 0.25, 0.03, 0.03), "dark"),
            (_Limb(0.3, -0.8 * dome, 0.42, 0.25, 0.03, 0.03), "dark"),
            *_eye(hx + 0.14, hy - 0.06, 0.09),
        ],
        head=(hx - 0.02, hy - 0.18, -0.1, -0.99),
        tail=(-1.28, 0.3, -1.0, 0.0),
        flank=(0.0, -0.2, 0.0, -1.0),
    )


def _rabbit(d: _Draws) -> _Creature:
    ear, lean, nod = d.between(-0.05, 0.06), d.between(-0.08, 0.08), d.between(-0.1, 0.1)
    hx, hy = 0.42 + lean, -0.45 + nod
    return _Creature(
        [
            (_Ellipse(-0.82, 0.55, 0.2, 0.2), "light"),
            (_Ellipse(hx - 0.12, hy - 0.7, 0.13, 0.5, -0.04 + ear), "second"),
            (_Ellipse(hx - 0.34, hy - 0.62, 0.13, 0.5, -0.08 + ear), "body"),
            (_Limb(0.3, 0.3, 0.48, 0.95, 0.16, 0.11), "dark"),
            (_Limb(-0.3, 0.35, 0.22, -0.1, 0.58, 0.4), "body"),
            (_Limb(0.16, 0.3, 0.3, 0.97, 0.17, 0.12), "body"),
            (_Ellipse(-0.38, 0.52, 0.42, 0.4), "second"),
            (_Limb(-0.45, 0.95, 0.0, 0.97, 0.12, 0.1), "second"),
            (_Ellipse(hx, hy, 0.4, 0.34, 0.04), "body"),
            (_Ellipse(hx + 0.36, hy + 0.08, 0.07, 0.06), "black"),
            *_eye(hx + 0.13, hy - 0.07, 0.1),
        ],
        head=(hx + 0.16, hy - 0.28, 0.45, -0.9),
        tail=(-0.95, 0.5, -0.95, -0.3),
        flank=(-0.2, 0.2, 0.0, -1.0),
    )


def _lizard(d: _Draws) -> _Creature:
    wave = d.between(0.18, 0.34) * d.pick((-1.0, 1.0))
    xs = (-1.9, -1.45, -1.0, -0.5, 0.0, 0.5, 0.95)
    ys = (0.3 * wave, 1.0 * wave, 0.6 * wave, -0.5 * wave, -0.8 * wave, 0.0, 0.3 * wave)
    radii = (0.03, 0.08, 0.15, 0.23, 0.27, 0.24, 0.2)
    spine: list[tuple[_Shape, str]] = [
        (_Limb(xs[i], ys[i], xs[i + 1], ys[i + 1], radii[i], radii[i + 1]), "body") for i in range(6)
    ]
    legs: list[tuple[_Shape, str]] = []
    for side in (-1.0, 1.0):
        for root, reach in ((3, -0.3), (5, 0.28)):
            x, y = xs[root], ys[root]
            legs.append((_Limb(x, y, x + reach * side, y + 0.5 * side, 0.11, 0.08), "second"))
            legs.append(
                (_Limb(x + reach * side, y + 0.5 * side, x + 0.3, y + 0.72 * side, 0.08, 0.06), "second")
            )
    return _Creature(
        [
            *legs,
            *spine,
            (_Ellipse(1.15, 0.3 * wave, 0.36, 0.26), "body"),
            (_Ellipse(1.22, 0.3 * wave - 0.17, 0.08, 0.08), "black"),
            (_Ellipse(1.22, 0.3 * wave + 0.17, 0.08, 0.08), "black"),
        ],
        head=(1.4, 0.3 * wave, 1.0, 0.0),
        tail=(-1.85, 0.35 * wave, -1.0, 0.0),
        flank=(-0.1, -0.75 * wave, 1.0, 0.0),
    )


_BODY_PLANS: dict[str, Callable[[_Draws], _Creature]] = {
    "fish": _fish,
    "bird": _bird,
    "beast": _beast,
    "beetle": _beetle,
    "snail": _snail,
    "rabbit": _rabbit,
    "turtle": _turtle,
    "lizard": _lizard,
}
_SEEN_FROM_ABOVE = {"beetle", "lizard"}
# The middle of each kind's range of body hues, a fifth of the circle wide: the first four keep apart.
_HUES = (0.55, 0.05, 0.80, 0.30, 0.92, 0.18, 0.42, 0.67)


# --- Painting -------------------------------------------------------------------------------------


class _Canvas:
    """An image under work: channels first, values in about [0, 1], coordinates in the unit square."""

    def __init__(self, size: int) -> None:
        self.size = size
        centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
        self.x, self.y = centres[None, :], centres[:, None]
        self.pixels: Floats = np.empty((3, size, size), np.float32)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        """Rows and columns of a box in the unit square and two pixels around it."""

        def span(low: float, high: float) -> slice:
            start, stop = math.floor(low * self.size) - 2, math.ceil(high * self.size) + 2
            return slice(min(max(start, 0), self.size), max(min(stop, self.size), 0))

        return span(y0, y1), span(x0, x1)

    def paint(
        self, rows: slice, columns: slice, distance: Floats, colour: Floats, rim: float = 0.35
    ) -> Floats:
        """Lay ``colour`` where ``distance`` (in image sides) is below 0, dark at the rim; return coverage."""
        pixels_away = distance * float(self.size)
        coverage = np.clip(0.5 - pixels_away, 0.0, 1.0)
        edge = np.clip(distance * 55.0 + 1.0, 0.0, 1.0)  # the rim is 1/55 of the side wide
        under = self.pixels[:, rows, columns]
        under += coverage * (colour * (1.0 - rim * edge) - under)
        return coverage

    def paint_part(
        self, rows: slice, columns: slice, distance: Floats, colour: Rgb, r: float
    ) -> tuple[Floats, Floats]:
        """Paint a part of radius ``r`` and its dark outline; return the coverage with and without outline."""
        outline = self.paint(rows, columns, distance - 0.14 * r, _rgb((0.08, 0.07, 0.07)), 0.0)
        return outline, self.paint(rows, columns, distance, _rgb(colour), 0.1)

    def window_of(self, shapes: Sequence[_Shape], margin: float = 0.0) -> tuple[slice, slice]:
        """The window of shapes given in the coordinates of the image."""
        x0, y0, x1, y1 = (
            max(shape.support(*direction) for shape in shapes)
            for direction in ((-1, 0), (0, -1), (1, 0), (0, 1))
        )
        return self.window(-x0 - margin, -y0 - margin, x1 + margin, y1 + margin)

    def paint_shape(self, shape: _Shape, colour: Rgb, rim: float = 0.35) -> None:
        """Paint one shape given in the coordinates of the image."""
        rows, columns = self.window_of([shape])
        self.paint(rows, columns, shape.distance(self.x[:, columns], self.y[rows]), _rgb(colour), rim)


def _union(shapes: Sequence[_Shape], x: Floats, y: Floats) -> Floats:
    distance = shapes[0].distance(x, y)
    for shape in shapes[1:]:
        distance = np.minimum(distance, shape.distance(x, y))
    return distance


def _rgb(colour: Rgb) -> Floats:
    return np.array(colour, np.float32).reshape(3, 1, 1)


def _mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    red, green, blue = (p + (q - p) * share for p, q in zip(a, b))
    return red, green, blue


def _wave(values: Floats) -> Floats:
    """A smooth periodic wave in [0, 1] of period 1: a triangle, rounded by smoothstep."""
    triangle = np.abs((values - np.floor(values)) * 2.0 - 1.0)
    return triangle * triangle * (3.0 - 2.0 * triangle)


def _noise(d: _Draws, cells: int, canvas: _Canvas) -> Floats:
    """Value noise in [0, 1]: random numbers on a ``cells x cells`` lattice, smoothly interpolated."""
    lattice = d.array(cells + 1, cells + 1)

    def corners(centres: Floats) -> tuple[NDArray[np.intp], Floats]:
        scaled = centres * float(cells)
        low = np.floor(scaled)
        part = scaled - low
        return low.astype(np.intp), part * part * (3.0 - 2.0 * part)

    row, down = corners(canvas.y[:, 0])
    column, right = corners(canvas.x[0])
    lines = lattice[row] + (lattice[row + 1] - lattice[row]) * down[:, None]
    return lines[:, column] + (lines[:, column + 1] - lines[:, column]) * right


def _pebbles(d: _Draws, cells: int, canvas: _Canvas) -> tuple[Floats, Floats]:
    """Voronoi cells of a jittered lattice: a number in [0, 1] for each cell, and closeness to its rim."""
    jitter = d.array(3, cells + 2, cells + 2)
    x, y = canvas.x * float(cells), canvas.y * float(cells)
    column, row = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
    nearest = np.full((canvas.size, canvas.size), 9.0, np.float32)
    second = nearest.copy()
    shade = np.zeros_like(nearest)
    for down in range(3):
        for right in range(3):
            r, c = row + down, column + right
            dx = x - (c + jitter[0, r, c] - 1.0).astype(np.float32)
            dy = y - (r + jitter[1, r, c] - 1.0).astype(np.float32)
            away = dx * dx + dy * dy
            closer = away < nearest
            second = np.where(closer, nearest, np.minimum(second, away))
            shade = np.where(closer, jitter[2, r, c], shade)
            nearest = np.where(closer, away, nearest)
    rim = np.clip(1.0 - 4.0 * (np.sqrt(second) - np.sqrt(nearest)), 0.0, 1.0)
    return shade, rim


def _paint_background(canvas: _Canvas, d: _Draws, shift: float) -> list[Rgb]:
    """Fill the canvas with one of four textures (a fifth under domain shift) and return the colours used."""
    colours = [_shifted(d.colour((0.05, 0.35), (0.25, 0.9)), shift) for _ in range(3)]
    first, second, third = (_rgb(colour) for colour in colours)
    kind = d.pick(("blotches", "stripes", "pebbles", "ground"))
    foreign = d.unit() < shift
    rough = _noise(d, 5, canvas)
    fine = _noise(d, 14, canvas)
    cosine, sine = _direction(d.unit())
    along = canvas.x * cosine + canvas.y * sine
    across = canvas.y * cosine - canvas.x * sine
    count = d.between(5, 14)
    if foreign:
        squares = _wave(along * count * 0.5) + _wave(across * count * 0.5)
        share, accent = np.clip((squares - 1.0) * 4.0 + 0.5, 0.0, 1.0), fine * 0.5
    elif kind == "blotches":
        share, accent = np.clip(rough * 5.0 - 2.0, 0.0, 1.0), np.clip(fine * 6.0 - 3.4, 0.0, 1.0)
    elif kind == "stripes":
        share, accent = _wave(along * count + rough * 1.5), np.clip(fine * 5.0 - 3.0, 0.0, 1.0)
    elif kind == "pebbles":
        share, accent = _pebbles(d, int(count), canvas)
    else:
        horizon = d.between(0.25, 0.75)
        share = np.clip((canvas.y - horizon + (rough - 0.5) * 0.2) * 12.0, 0.0, 1.0)
        accent = share * _wave(canvas.x * count * 2.0 + rough * 2.0 + canvas.y) * (0.5 + 0.5 * fine)
    base = first + (second - first) * share
    canvas.pixels[:] = base + (third - base) * (0.75 * accent)
    canvas.pixels *= 0.82 + 0.36 * _noise(d, 28, canvas)
    return colours


def _paint_pieces(canvas: _Canvas, d: _Draws, spec: SyntheticSpec) -> None:
    """Strew limbs, bellies, fins, heads and parts that belong to nobody, in the colours of any animal."""
    for _ in range(round(12 * spec.clutter)):
        x, y, r = d.unit(), d.unit(), d.between(0.025, 0.07)
        at = _Frame(x, y, *_direction(d.unit()), r)
        colour = _coat(d, int(d.unit() * spec.superclasses))
        kind = d.pick(("limb", "belly", "fin", "head", "part", "part"))
        if kind == "limb":
            canvas.paint_shape(_Limb(x, y, *at(d.between(2.0, 4.0), 0), 0.45 * r, 0.25 * r), colour)
        elif kind == "belly":
            canvas.paint_shape(_Ellipse(x, y, 2.2 * r, 1.3 * r, d.unit()), colour)
        elif kind == "fin":
            side = d.between(0.6, 1.2)
            canvas.paint_shape(_Polygon(*at(0, side), *at(0, -side), *at(2.4, 0)), colour)
        elif kind == "head":
            canvas.paint_shape(_Ellipse(x, y, 1.2 * r, r, d.unit()), colour)
            canvas.paint_shape(_Ellipse(*at(0.4, 0), 0.3 * r, 0.3 * r), _WHITE, rim=0)
            canvas.paint_shape(_Ellipse(*at(0.45, 0), 0.17 * r, 0.17 * r), _BLACK, rim=0)
        else:  # every other one is a part that some class of this data set really has
            types, colours = _vocabulary(spec) if d.unit() < 0.5 else (len(PART_TYPES), len(PART_COLOURS))
            shapes = _glyph(d.pick(PART_TYPES[:types])[2], at)
            colour = d.pick(PART_COLOURS[:colours])[1]
            rows, columns = canvas.window_of(shapes, margin=0.3 * r)
            distance = _union(shapes, canvas.x[:, columns], canvas.y[rows])
            canvas.paint_part(rows, columns, distance, colour, r)


def _difference(a: Rgb, b: Rgb) -> float:
    red, green, blue = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    return red * red + green * green + blue * blue


def _coat(d: _Draws, superclass: int) -> Rgb:
    """A body colour of one kind of animal."""
    return d.colour((0.4, 0.8), (0.45, 0.95), (_HUES[superclass] - 0.1, _HUES[superclass] + 0.1))


def _palette(d: _Draws, superclass: int, background: Sequence[Rgb], shift: float) -> dict[str, Rgb]:
    """Tones of one creature: of three body colours of its kind, the one furthest from the background's."""

    def stands_out(colour: Rgb) -> float:
        return min(_difference(colour, other) for other in background)

    body = max((_coat(d, superclass) for _ in range(3)), key=stands_out)
    second = _mix(body, d.colour((0.15, 0.6), (0.25, 0.95)), d.between(0.35, 0.8))
    body, second = _shifted(body, shift), _shifted(second, shift)
    return {
        "body": body,
        "second": second,
        "dark": _mix(second, (0.05, 0.05, 0.05), 0.55),
        "light": _mix(body, (1.0, 0.98, 0.9), 0.45),
        "horn": _mix(second, (0.9, 0.7, 0.3), 0.6),
        "white": _WHITE,
        "black": _BLACK,
    }


def _shifted(colour: Rgb, shift: float) -> Rgb:
    """Another domain's version of a colour: channels rotated, contrast halved."""
    red, green, blue = colour
    return _mix(colour, (0.3 + 0.5 * blue, 0.25 + 0.5 * red, 0.3 + 0.5 * green), shift)


# --- The scene ------------------------------------------------------------------------------------


def render(spec: SyntheticSpec, split: str, index: int) -> dict[str, Any]:
    """Draw one image with its exact truth.

    Args:
        spec: what to draw.
        split: ``"train"``, ``"val"`` or ``"test"``.
        index: ``0 .. spec.size_of(split) - 1``.

    Returns:
        ``image``: ``(size, size, 3)`` uint8. ``mask``: ``(size, size)`` bool, the visible object.
        ``part_mask``: likewise, the visible discriminative part. ``bbox_xywh``: four ints in pixels, tight
        around ``mask``. ``label``, ``superclass``: ints. ``image_id``: str.

    Raises:
        InputError: for an unknown split.
        IndexError: for an index out of range.

    Example:
        >>> scene = render(SyntheticSpec(image_size=64), "train", 5)
        >>> scene["image"].shape, scene["label"], class_names(SyntheticSpec())[scene["label"]]
        ((64, 64, 3), 5, 'blue ring bird')
    """
    _check_split(split)
    size = spec.size_of(split)
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside 0..{size - 1} of split {split!r}")
    labels = spec.labels_of(split)
    label = labels[index % len(labels)]
    superclass, part_type, part_colour = class_parts(spec, label)
    shift = spec.domain_shift if split == "test" else 0.0

    pose, look, behind, strewn, light = (
        _Draws(spec, split, index, purpose) for purpose in (_POSE, _LOOK, _BACKGROUND, _PIECES, _LIGHT)
    )
    canvas = _Canvas(spec.image_size)
    background = _paint_background(canvas, behind, shift)
    palette = _palette(look, superclass, background, shift)
    _paint_pieces(canvas, strewn, spec)
    mask, part_mask = _paint_creature(canvas, pose, look, spec, superclass, part_type, part_colour, palette)
    _light(canvas, light, shift)

    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    left, top = int(columns[0]), int(rows[0])
    # Half a grey level is added and the fraction dropped: no rounding mode is involved.
    image = np.floor(np.clip(canvas.pixels, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return {
        "image": np.ascontiguousarray(np.moveaxis(image, 0, -1)),
        "mask": mask,
        "part_mask": part_mask,
        "bbox_xywh": (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top),
        "label": label,
        "superclass": superclass,
        "image_id": _image_id(spec, split, index),
    }


def _image_id(spec: SyntheticSpec, split: str, index: int) -> str:
    return f"creature-{spec.seed}-{split}-{index:06d}"


def _paint_creature(
    canvas: _Canvas,
    pose: _Draws,
    look: _Draws,
    spec: SyntheticSpec,
    superclass: int,
    part_type: int,
    part_colour: int,
    palette: dict[str, Rgb],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw the creature and return the masks of what is visible of it and of its part."""
    name, plan = list(_BODY_PLANS.items())[superclass]
    creature = plan(pose)
    _, place, glyph = PART_TYPES[part_type]
    x, y, ux, uy = {"head": creature.head, "tail": creature.tail, "flank": creature.flank}[place]
    radius = creature.part_radius * spec.part_size
    if place != "flank":  # grows outwards from its root
        x, y = x + 0.75 * radius * ux, y + 0.75 * radius * uy
    part = _glyph(glyph, _Frame(x, y, ux, uy, radius))
    leaf = _Ellipse(x, y, 2.0 * radius, 1.8 * radius, look.unit())

    # Pose: turn (animals seen from above lie anyhow, others stand about upright), mirror, size, place.
    turns = pose.unit() if name in _SEEN_FROM_ABOVE else pose.between(-0.07, 0.07)
    mirror = pose.pick((-1.0, 1.0))
    cosine, sine = _direction(turns)
    right, down = (mirror * cosine, -sine), (mirror * sine, cosine)  # the image's axes in local coordinates
    shapes = [shape for shape, _ in creature.layers] + part
    x0, y0 = (-max(shape.support(-ax, -ay) for shape in shapes) for ax, ay in (right, down))
    x1, y1 = (max(shape.support(ax, ay) for shape in shapes) for ax, ay in (right, down))
    scale = pose.between(spec.scale_min, spec.scale_max) / max(x1 - x0, y1 - y0)
    width, height = scale * (x1 - x0), scale * (y1 - y0)
    left, top = ((1 - extent) * (0.5 + 0.5 * spec.spread * _outwards(pose)) for extent in (width, height))

    margin = scale * radius * 2.5  # room for the leaf
    rows, columns = canvas.window(left - margin, top - margin, left + width + margin, top + height + margin)
    across, along = (canvas.x[:, columns] - left) / scale + x0, (canvas.y[rows] - top) / scale + y0
    u = (across * cosine + along * sine) * mirror
    v = along * cosine - across * sine

    tones = {tone: _rgb(colour) for tone, colour in palette.items()}
    tones["body"] = _pattern(look, u, v, tones["body"], tones["second"])
    shade = 1.12 - 0.3 * np.clip((along - y0) / (y1 - y0), 0.0, 1.0)  # light comes from above
    covered = np.zeros(u.shape, np.float32)
    for shape, tone in creature.layers:
        coverage = canvas.paint(rows, columns, shape.distance(u, v) * scale, tones[tone] * shade)
        covered = np.maximum(covered, coverage)

    colour = PART_COLOURS[part_colour][1]
    outline, on_part = canvas.paint_part(rows, columns, _union(part, u, v) * scale, colour, radius * scale)
    visible_object, visible_part = np.maximum(covered, outline) >= 0.5, on_part >= 0.5

    if look.unit() < spec.part_hidden:
        away = leaf.distance(u, v) * scale
        beside = away > 0
        if (visible_object & beside).any():  # a leaf over the whole of a tiny animal would leave no object
            canvas.paint(rows, columns, away, _rgb(look.colour((0.3, 0.6), (0.3, 0.7))))
            visible_object, visible_part = visible_object & beside, visible_part & beside

    mask, part_mask = np.zeros((2, canvas.size, canvas.size), np.bool_)
    mask[rows, columns], part_mask[rows, columns] = visible_object, visible_part
    return mask, part_mask


def _outwards(d: _Draws) -> float:
    """A number in [-1, 1] that avoids 0: evenly placed objects would overlap the middle of most images."""
    side = 2 * d.unit() - 1
    return math.sqrt(side) if side > 0 else -math.sqrt(-side)


def _pattern(d: _Draws, u: Floats, v: Floats, body: Floats, second: Floats) -> Floats:
    """The coat of one animal, which tells nothing about the class: plain, stripes, spots or a pale belly."""
    kind, count, phase = d.pick(("plain", "stripes", "spots", "belly")), d.between(2.0, 4.0), d.unit()
    strength = d.between(0.5, 0.9)
    if kind == "plain":
        return np.broadcast_to(body, (3, *u.shape))
    if kind == "stripes":
        share = np.clip(_wave(u * count + v * 0.4 + phase) * 3.0 - 1.4, 0.0, 1.0)
    elif kind == "spots":
        share = np.clip((_wave(u * count + phase) + _wave(v * count + phase)) * 4.0 - 5.6, 0.0, 1.0)
    else:
        share = np.clip(v * 4.0, 0.0, 1.0)
    return body + (second - body) * (share * strength)


def _light(canvas: _Canvas, d: _Draws, shift: float) -> None:
    """Brightness, a gradient across the picture, fine grain; haze and dusk under domain shift."""
    gain, slope = d.between(0.78, 1.12), d.between(0.0, 0.35)
    cosine, sine = _direction(d.unit())
    ramp = 1.0 + slope * ((canvas.x - 0.5) * cosine + (canvas.y - 0.5) * sine)
    grain = (_noise(d, 60, canvas) - 0.5) * 0.08
    canvas.pixels *= ramp * (gain * (1 - 0.3 * shift))
    canvas.pixels += grain
    canvas.pixels += (_rgb((0.35, 0.38, 0.45)) - canvas.pixels) * (0.3 * shift)


# --- Data sets ------------------------------------------------------------------------------------


class SyntheticImages:
    """Map-style data set of decoded samples, drawn on access: no files, nothing kept.

    Each item is a dict with the fields of a sample: ``image`` (Pillow RGB), ``label`` (int), ``boxes_xyxy``
    (``(1, 4)`` float64 pixels, end exclusive), ``mask`` (``(h, w)`` bool), ``ignore`` (None), ``image_id``,
    ``index``.

    Example:
        >>> images = SyntheticImages(SyntheticSpec(image_size=64), "val")
        >>> len(images), images[3]["boxes_xyxy"].shape, images.labels[images[3]["label"]]
        (300, (1, 4), 'red crest beetle')
    """

    def __init__(self, spec: SyntheticSpec, split: str) -> None:
        self.spec, self.split = spec, split
        self.labels = class_names(spec)
        self._length = spec.size_of(split)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = render(self.spec, self.split, index)
        x, y, width, height = scene["bbox_xywh"]
        return {
            "image": Image.fromarray(scene["image"]),
            "label": scene["label"],
            "boxes_xyxy": np.array([[x, y, x + width, y + height]], np.float64),
            "mask": scene["mask"],
            "ignore": None,
            "image_id": scene["image_id"],
            "index": index,
        }


_KEPT_BYTES = 64 * 2**20
"""Compressed rows that a data set keeps, so that later epochs of a small one are not drawn again."""


class _RowsOnAccess:
    """Turns rows of the index table into full rows; a class, so that loader workers can pickle it."""

    def __init__(self, spec: SyntheticSpec, split: str) -> None:
        self.spec, self.split = spec, split
        self._kept: dict[int, dict[str, Any]] = {}
        self._room = _KEPT_BYTES

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "index" not in rows:  # one plain column was asked for, such as dataset["label"]
            return rows
        drawn = [self._row(index) for index in rows["index"]]
        return {name: [row[name] for row in drawn] for name in drawn[0]}

    def _row(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        scene = render(self.spec, self.split, index)
        image_id = scene["image_id"]
        image, mask = _png(scene["image"], f"{image_id}.png"), _png(scene["mask"], f"{image_id}_mask.png")
        row = {
            "image_id": image_id,
            "image": image,
            "label": scene["label"],
            "objects": {"bbox": [[float(side) for side in scene["bbox_xywh"]]]},
            "masks": [mask],
            "ignore": None,
        }
        size = len(image["bytes"]) + len(mask["bytes"])
        if size <= self._room:
            self._room -= size
            self._kept[index] = row
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "split": self.split, "_kept": {}, "_room": _KEPT_BYTES}


def synthetic_dataset(spec: SyntheticSpec, split: str) -> datasets.Dataset:
    """The images as a Hugging Face data set whose rows are drawn when they are read.

    Only a table of index, label and id is held (about 45 bytes an image); selecting, shuffling and sharding
    work as usual. Rows have ``image_id``, ``image`` and ``masks`` (``{"bytes", "path"}``, lossless PNG),
    ``label``, ``objects`` (``bbox`` as ``[x, y, w, h]`` pixels) and ``ignore`` (None).

    Raises:
        InputError: for an unknown split, or when the ``datasets`` package is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            'the package datasets is missing; install it with pip install "attnmap-core[train]"'
        ) from None

    size, labels = spec.size_of(split), np.array(spec.labels_of(split))
    columns = {
        "index": np.arange(size),
        "label": labels[np.arange(size) % len(labels)],
        "image_id": [_image_id(spec, split, index) for index in range(size)],
    }
    features = datasets.Features(
        {
            "index": datasets.Value("int64"),
            "label": datasets.ClassLabel(names=class_names(spec)),
            "image_id": datasets.Value("string"),
        }
    )
    table = datasets.Dataset.from_dict(columns, features=features)
    return table.with_transform(_RowsOnAccess(spec, split))


def _png(pixels: NDArray[Any], name: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": name}
