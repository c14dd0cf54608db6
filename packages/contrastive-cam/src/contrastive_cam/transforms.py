r"""The transformations whose parameter is the pretext label, and the same transformations of maps.

Baek et al., "PsyNet", AAAI 2020 (its released code), which Ki et al., ICCV 2021, build on. Each image draws its own
class of each task. A matrix leads from *output* to *input* coordinates, (x right, y down) in ``[-1, 1]``, and the
matrices of the tasks are multiplied in one fixed order, that of :data:`TASKS`:

.. math:: \theta = \mathrm{odd} \cdot \mathrm{rotation} \cdot \mathrm{translation} \cdot \mathrm{shear} \cdot
    \mathrm{flip} \cdot \mathrm{scale}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional

Padding = Literal["reflection", "zeros", "border"]

TASKS: dict[str, int] = {"odd": 5, "rotation": 4, "translation": 3, "shear": 3, "flip": 2, "scale": 3}
"""Number of classes by pretext task, in the order in which their matrices are multiplied."""

LETTERS = {
    "iccv": {"R": "rotation", "S": "scale", "T": "translation"},
    "psynet": {
        "R": "rotation",
        "T": "translation",
        "S": "shear",
        "H": "flip",
        "C": "scale",
        "O": "odd",
    },
}
"""Letters of the two papers. S is the scale in one and the shear in the other."""

_EXACT = 1e-6  # cells: positions this close to a cell's centre are meant to be there


# --- Tasks -----------------------------------------------------------------------------------------


def parse_tasks(tasks: str | Sequence[str], letters: Literal["iccv", "psynet"] = "iccv") -> tuple[str, ...]:
    """Names of pretext tasks, in the order of :data:`TASKS`.

    Args:
        tasks: full names, in a sequence or joined by ``+``; or letters so joined, as papers write them.
        letters: whose letters: ``"iccv"`` knows R, S (scale) and T.

    Returns:
        The names.

    Raises:
        ValueError: for an unknown, repeated or absent task.

    Example:
        >>> parse_tasks("R+S"), parse_tasks("R+S", "psynet"), parse_tasks(["scale", "odd"])
        (('rotation', 'scale'), ('rotation', 'shear'), ('odd', 'scale'))
    """
    if letters not in LETTERS:
        raise ValueError(f"letters must be iccv or psynet, got {letters!r}")
    given = tasks.split("+") if isinstance(tasks, str) else list(tasks)
    names = [LETTERS[letters].get(name.strip(), name.strip()) for name in given]
    if not names or len(set(names)) != len(names) or not set(names) <= TASKS.keys():
        known = ", ".join([*TASKS, *LETTERS[letters]])
        raise ValueError(f"tasks {tasks!r}: expected different ones of {known}; join them by +")
    return tuple(name for name in TASKS if name in names)


def task_matrix(task: str, labels: Tensor) -> Tensor:
    r"""Matrix of a task's class l, from output to input coordinates.

    ========== ======= ==============================================================================
    odd        0 .. 4  shift of x and y by 3 (l - 2) sides' halves; with reflection, a symmetric picture
    rotation   0 .. 3  90 l degrees: the image is seen turned counter-clockwise
    translation 0 .. 2 shift of x and y by 0.1 (l - 1): class 2 moves the content 5 % up and left
    shear      0 .. 2  x + y tan(30 (l - 1) degrees)
    flip       0, 1    class 0 is mirrored left to right, class 1 is not
    scale      0 .. 2  1 - 0.3 (l - 1): class 0 zooms out to 1/1.3, class 2 in to 1/0.7
    ========== ======= ==============================================================================

    Args:
        task: name in :data:`TASKS`.
        labels: ``(b,)`` integer classes.

    Returns:
        ``(b, 3, 3)`` float64; quarter turns are exact.

    Raises:
        ValueError: for an unknown task.

    Example:
        >>> task_matrix("scale", torch.tensor([0]))[0].tolist()
        [[1.3, 0.0, 0.0], [0.0, 1.3, 0.0], [0.0, 0.0, 1.0]]
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    table = torch.stack([_matrix(task, label) for label in range(TASKS[task])])
    return table.to(labels.device)[labels]


def _matrix(task: str, label: int) -> Tensor:
    matrix = torch.eye(3, dtype=torch.float64)
    if task == "odd":
        matrix[:2, 2] = 3.0 * (label - 2)
    elif task == "translation":
        matrix[:2, 2] = 0.1 * (label - 1)
    elif task == "rotation":
        cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[label]
        matrix[:2, :2] = torch.tensor([[cosine, -sine], [sine, cosine]])
    elif task == "shear":
        matrix[0, 1] = math.tan(math.radians(30.0 * (label - 1)))
    elif task == "flip":
        matrix[0, 0] = 2 * label - 1
    else:
        matrix[0, 0] = matrix[1, 1] = 1.0 - 0.3 * (label - 1)
    return matrix


def theta_of(labels: Mapping[str, Tensor]) -> Tensor:
    """Affine matrices of the classes that images drew.

    Args:
        labels: ``(b,)`` classes by task; tasks that are absent do nothing.

    Returns:
        ``(b, 2, 3)`` float64, from output to input coordinates.

    Raises:
        ValueError: without any task, or for an unknown one.

    Example:
        >>> theta_of({"translation": torch.tensor([2]), "scale": torch.tensor([2])})[0].tolist()
        [[0.7, 0.0, 0.1], [0.0, 0.7, 0.1]]
    """
    names = parse_tasks(list(labels))
    theta = task_matrix(names[0], labels[names[0]])
    for name in names[1:]:
        theta = theta @ task_matrix(name, labels[name])
    return theta[:, :2]


def inverse_theta(theta: Tensor) -> Tensor:
    """Matrices ``(b, 2, 3)`` of the inverse transformations, from input to output coordinates, in float64.

    Example:
        >>> inverse_theta(torch.tensor([[[2.0, 0.0, 1.0], [0.0, 2.0, 0.0]]]))[0].tolist()
        [[0.5, 0.0, -0.5], [0.0, 0.5, 0.0]]
    """
    theta = theta.double()
    inverse = torch.linalg.inv(theta[:, :, :2])
    return torch.cat([inverse, -inverse @ theta[:, :, 2:]], dim=2) + 0.0  # no -0


# --- Images ----------------------------------------------------------------------------------------


def warp_images(
    images: Tensor, theta: Tensor, padding: Padding = "reflection", *, align_corners: bool = False
) -> Tensor:
    """Sample images bilinearly where their matrices lead.

    Args:
        images: ``(b, c, H, W)``.
        theta: ``(b, 2, 3)``, from output to input coordinates.
        padding: what lies outside: a reflection, zeros, or the border repeated.
        align_corners: whether -1 and 1 are the centres of the outer pixels, rather than their outer edges.

    Returns:
        Images of the same shape and type.

    Raises:
        ValueError: for another padding.

    Example:
        >>> image = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> warp_images(image, theta_of({"flip": torch.tensor([0])}))
        tensor([[[[1., 0.],
                  [3., 2.]]]])
    """
    if padding not in ("reflection", "zeros", "border"):
        raise ValueError(f"padding must be reflection, zeros or border, got {padding!r}")
    with torch.autocast(images.device.type, enabled=False):
        grid = functional.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=align_corners)
        return functional.grid_sample(
            images, grid, "bilinear", padding_mode=padding, align_corners=align_corners
        )


def rotate_images(images: Tensor, labels: Tensor) -> Tensor:
    """Turn each square image by its class times 90 degrees, counter-clockwise, to the bit.

    Args:
        images: ``(b, c, n, n)``.
        labels: ``(b,)`` classes 0 to 3.

    Returns:
        Images of the same shape and type.

    Raises:
        ValueError: if the images are not square.

    Example:
        >>> rotate_images(torch.arange(4).reshape(1, 1, 2, 2), torch.tensor([1]))
        tensor([[[[1, 3],
                  [0, 2]]]])
    """
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"quarter turns need square images, got {tuple(images.shape)}; warp them instead")
    turned = images
    for quarter in (1, 2, 3):
        mine = rearrange(labels == quarter, "b -> b 1 1 1")
        turned = torch.where(mine, images.rot90(quarter, (2, 3)), turned)
    return turned


class Transformed(NamedTuple):
    """Transformed images; see :class:`PretextTransform`.

    Attributes:
        images: ``(b, c, H, W)``.
        theta: ``(b, 2, 3)`` float64, from output to input coordinates.
        labels: ``(b,)`` drawn classes by task.
    """

    images: Tensor
    theta: Tensor
    labels: dict[str, Tensor]


class PretextTransform:
    """Draws a class of each task for each image, and transforms it so.

    Quarter turns alone move pixels of square images instead of sampling them.

    Args:
        tasks: see :func:`parse_tasks`; with ``compat="psynet"`` letters are PsyNet's.
        padding: outside of the image; see :func:`warp_images`. PsyNet reflects. What the ICCV paper does is not known;
            its "undefined regions" and a collapsed baseline suggest a constant.
        align_corners: default False, so that one coordinate is the same place in the image and in its map.
        compat: ``"psynet"`` follows the released code: reflection, corners aligned, always sampled.

    Raises:
        ValueError: for an unknown task or padding, or settings that ``compat`` excludes.

    Example:
        >>> transform = PretextTransform("R+S", "zeros")
        >>> images, theta, labels = transform(torch.ones(2, 3, 8, 8))
        >>> images.shape, theta.shape, list(labels)
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 2, 3]), ['rotation', 'scale'])
    """

    def __init__(
        self,
        tasks: str | Sequence[str] = "rotation",
        padding: Padding | None = None,
        *,
        align_corners: bool | None = None,
        compat: Literal["psynet"] | None = None,
    ) -> None:
        if compat not in (None, "psynet"):
            raise ValueError(f"compat must be psynet or None, got {compat!r}")
        if compat and (padding not in (None, "reflection") or align_corners is False):
            raise ValueError(
                "compat='psynet' reflects and aligns corners; leave padding and align_corners out"
            )
        if padding not in (None, "reflection", "zeros", "border"):
            raise ValueError(f"padding must be reflection, zeros or border, got {padding!r}")
        self.tasks = parse_tasks(tasks, "psynet" if compat else "iccv")
        self.padding: Padding = padding or "reflection"
        self.align_corners = bool(compat) if align_corners is None else align_corners
        self.exact = self.tasks == ("rotation",) and not compat

    @property
    def classes(self) -> dict[str, int]:
        """Number of classes by task, as :class:`contrastive_cam.ContrastiveCAM` takes its heads."""
        return {name: TASKS[name] for name in self.tasks}

    def draw(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Classes ``(count,)`` of each task, uniform and independent, on the CPU."""
        return {
            name: torch.randint(classes, (count,), generator=generator)
            for name, classes in self.classes.items()
        }

    def __call__(self, images: Tensor, labels: Mapping[str, Tensor] | None = None) -> Transformed:
        """Transform ``images (b, c, H, W)``, by drawn classes unless ``labels`` gives them."""
        drawn = self.draw(len(images)) if labels is None else labels
        drawn = {name: drawn[name].to(images.device) for name in self.tasks}
        theta = theta_of(drawn)
        if self.exact and images.shape[-1] == images.shape[-2]:
            return Transformed(rotate_images(images, drawn["rotation"]), theta, drawn)
        warped = warp_images(images, theta, self.padding, align_corners=self.align_corners)
        return Transformed(warped, theta, drawn)


# --- Maps ------------------------------------------------------------------------------------------


class MapWarp(NamedTuple):
    r"""Bilinear sampling of maps with zeros outside, as two weights per output cell; see :func:`map_warp`.

    .. math:: W(A)_o = \sum_{y,x} R_{o,y} A_{y,x} C_{o,x}

    Products instead of gathers: the same bits every time, also backward on a GPU.

    Attributes:
        rows: R ``(b, n, h)``, weight of each input row.
        columns: C ``(b, n, w)``.
    """

    rows: Tensor
    columns: Tensor

    def __call__(self, A: Tensor) -> Tensor:
        """Each map ``A (b, h, w)`` warped by its own matrix: ``(b, n)``, n = h w in row-major order."""
        return (torch.bmm(self.rows.to(A.dtype), A) * self.columns.to(A.dtype)).sum(dim=2)

    def of_all(self, A: Tensor) -> Tensor:
        """Every map ``A (j, h, w)`` warped by every matrix: ``(b, j, n)``."""
        rows, columns = self.rows.to(A.dtype), self.columns.to(A.dtype)
        b, n, _ = rows.shape
        partial = rearrange(
            einsum(rows.flatten(0, 1), A, "o h, j h w -> o j w"), "(b n) j w -> b n j w", b=b, n=n
        )
        return einsum(partial, columns, "b n j w, b n w -> b j n")

    def validity(self) -> Tensor:
        """Share of each output cell that comes from inside of the map: ``(b, n)`` in ``[0, 1]``."""
        return self.rows.sum(dim=2) * self.columns.sum(dim=2)


def map_warp(
    theta: Tensor, size: tuple[int, int], *, align_corners: bool = False, dtype: torch.dtype = torch.float64
) -> MapWarp:
    """The warp of maps that goes with matrices; :func:`warp_maps` applies it.

    Args:
        theta: ``(b, 2, 3)``, from output to input coordinates; no gradient flows to it.
        size: ``(h, w)`` of the maps, before and after.
        align_corners: as in :func:`warp_images`.
        dtype: of the weights, which are worked out in float64.

    Returns:
        The weights. Positions within a millionth of a cell's centre are taken to be there, so that quarter turns of
        square maps, half turns and flips move values without touching them.

    Example:
        >>> warp = map_warp(theta_of({"scale": torch.tensor([0])}), (2, 2))
        >>> warp.validity()[0].round(decimals=4).tolist()  # zooming out shows a border that nobody saw
        [0.7225, 0.7225, 0.7225, 0.7225]
    """
    h, w = size
    theta = theta.detach().double()
    y, x = (_centres(side, align_corners, theta.device) for side in size)
    point = torch.stack(
        [x.expand(h, w), y.unsqueeze(1).expand(h, w), torch.ones(h, w, dtype=x.dtype, device=x.device)]
    )
    x_in, y_in = (theta @ point.flatten(1)).unbind(dim=1)  # (b, n) each
    return MapWarp(_hats(y_in, h, align_corners).to(dtype), _hats(x_in, w, align_corners).to(dtype))


def _centres(side: int, align_corners: bool, device: torch.device) -> Tensor:
    """Normalised coordinates of the cells of one axis."""
    index = torch.arange(side, dtype=torch.float64, device=device)
    if not align_corners:
        return (2 * index + 1) / side - 1
    return 2 * index / (side - 1) - 1 if side > 1 else torch.zeros_like(index)


def _hats(coordinate: Tensor, side: int, align_corners: bool) -> Tensor:
    """Bilinear weights ``(b, n, side)`` of a normalised coordinate; 0 outside."""
    position = (coordinate + 1) / 2 * (side - 1) if align_corners else ((coordinate + 1) * side - 1) / 2
    nearest = position.round()
    position = torch.where((position - nearest).abs() < _EXACT, nearest, position)
    cells = torch.arange(side, dtype=position.dtype, device=position.device)
    return (1 - (position.unsqueeze(-1) - cells).abs()).clamp_min(0)


def warp_maps(A: Tensor, theta: Tensor, *, align_corners: bool = False) -> Tensor:
    """Sample maps bilinearly where their matrices lead, zeros outside. Pass :func:`inverse_theta` to undo it.

    Args:
        A: ``(b, h, w)`` maps, with gradient.
        theta: ``(b, 2, 3)``, from output to input coordinates.
        align_corners: as in :func:`warp_images`.

    Returns:
        ``(b, h, w)``, in the precision of A.

    Example:
        >>> warp_maps(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), theta_of({"rotation": torch.tensor([1])}))
        tensor([[[2., 4.],
                 [1., 3.]]])
    """
    return map_warp(theta, (A.shape[1], A.shape[2]), align_corners=align_corners, dtype=A.dtype)(A).reshape(
        A.shape
    )


def map_validity(theta: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Share of each cell of the warped maps that comes from inside, ``(b, h, w)`` in ``[0, 1]``: maps of ones warped.

    Args:
        theta: ``(b, 2, 3)``.
        size: ``(h, w)``.
        align_corners: as in :func:`warp_images`.

    Example:
        >>> map_validity(theta_of({"translation": torch.tensor([2])}), (1, 4)).round(decimals=4)[0].tolist()
        [[0.95, 0.95, 0.95, 0.76]]
    """
    warp = map_warp(theta, size, align_corners=align_corners)
    return warp.validity().reshape(-1, *size)
