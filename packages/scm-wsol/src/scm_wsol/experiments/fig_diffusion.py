r"""What Newton-Schulz iterations do to one attention map (supplement, figure 1).

The start value is a multiple of the transposed Laplacian, which spreads attention to direct neighbours; every
iteration doubles the order of the polynomial, up to the (pseudo-)inverse, which amplifies whatever the Laplacian
almost loses. All in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from attnmap_core import cli
from attnmap_core.boxes import upsample_score_map
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.pictures import for_display, line_plot, overlay, picture_grid, save_picture
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from ..calibration import (
    ALPHA,
    dynamic_filter,
    grid_laplacian,
    minmax,
    modulated_laplacian,
    newton_schulz,
    similarity,
)
from ..model import SCM, TSCAM
from ..train import build_model
from .runs import RunOptions, check_images, experiment_data, given_or_trained, write_results

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """One attention map diffused by p iterations and by the exact pseudo-inverse, and the gain that p gives."""

    model: str = ""
    """Trained model (folder or Hub id); the recipe's model with fresh weights where not given."""
    recipe: str = "tiny-scm"
    """Recipe of data, and of the fresh model."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Split of the image."""
    image: int = 0
    """Place of the image in the split."""
    iterations: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of iterations p."""
    alpha: float = ALPHA
    """Start scale."""
    seed: int = 26
    """Seed of fresh weights."""
    out: Path = Path("runs/fig-diffusion")
    """Folder of table and figures."""


@dataclass(frozen=True, kw_only=True)
class Diffused:
    """What came out of one image.

    Attributes:
        maps: d ``(h, w)`` by name: F⁰, p = ..., exact.
        filtered: T ``(h, w)`` likewise, F⁰ excepted.
        residuals: ``‖X V - I‖_F / sqrt(n)``; largest: ``max |V|``.
        singular: of X, falling.
    """

    maps: dict[str, Floats]
    filtered: dict[str, Floats]
    residuals: dict[str, float]
    largest: dict[str, float]
    singular: Floats


def command(arguments: list[str]) -> None:
    """``scm-wsol reproduce fig-diffusion [--model RUN --image 0]``."""
    options = cli.parse(Options, arguments, command="scm-wsol reproduce fig-diffusion")
    counts = sorted(set(options.iterations))
    if not counts or not 0 < counts[0] <= counts[-1] <= 64:
        raise InputError(
            f"--iterations {list(options.iterations)}: expected whole numbers 1 to 64, such as 1 2 4 8 16"
        )
    if not options.alpha > 0:
        raise InputError(f"--alpha {options.alpha}: expected a number above 0, such as {ALPHA}")
    config, data = experiment_data(options, options.recipe, options.split)
    check_images([options.image], data)
    if options.model:
        model = given_or_trained(options, options.model, data, options.out, options.recipe, options.seed)
    else:
        config.seed = options.seed
        model = build_model(config, data.labels).eval()
    sample = data[options.image]
    found = diffuse(model, eval_transform(model.preprocessing)(sample.image), counts, options.alpha)
    rows = [
        {"p": name, "residual": found.residuals[name], "max |V|": found.largest[name], **_range(name, found)}
        for name in found.residuals
    ]
    low, high = found.singular[-1], found.singular[0]
    write_results(
        options.out,
        rows,
        title=f"Newton-Schulz on image {options.image} ({sample.image_id}) of {data.name}, {data.split}",
        notes=[
            f"residual: ‖X V − I‖_F / √n, n = {len(found.singular)}; d = V F⁰; p = 0 is the start value α Xᵀ. Singular "
            f"values of X: {low:.2g} to {high:.3g}; α σ_max² = {options.alpha * high**2:.2g}, which must stay below 2.",
            f"Weights: {options.model or f'fresh, of {options.recipe}'}.",
        ],
        digits={"residual": 4, "max |V|": 3},
        seed=options.seed,
    )
    save_picture(figure(sample.image, found, model.preprocessing.size), options.out / "diffusion.png")
    save_picture(gain_figure(counts, options.alpha, found.singular), options.out / "gain.png")


def _range(name: str, found: Diffused) -> dict[str, str]:
    d = found.maps.get(name)
    return {} if d is None else {"range of d": f"{d.min():.3g} to {d.max():.3g}"}


@torch.inference_mode()
def diffuse(model: TSCAM, image: Tensor, counts: Sequence[int], alpha: float) -> Diffused:
    """Steps 1 to 6 of the first block for each p, and with the exact pseudo-inverse.

    Args:
        model: whose maps are taken; an SCM also gives λ and β, which otherwise have their initial values.
        image: ``(3, H, W)`` preprocessed.
        counts: values of p.
        alpha: start scale.
    """
    weight = model.head.weight
    maps = model.maps(image[None].to(weight.device, weight.dtype))
    S, f = maps.semantic.double().cpu(), maps.attention.double().cpu()
    height, width = f.shape[1:]
    F0 = minmax(rearrange(f, "1 h w -> 1 (h w)"))
    block = model.calibration.blocks[0] if isinstance(model, SCM) else None
    rate, beta = (block.lam.item(), block.beta.item()) if block else (1.0, 0.5)
    form: dict[str, Any] = {"laplacian": block.laplacian, "sign": block.sign} if block else {}
    X = modulated_laplacian(similarity(S), grid_laplacian(height, width, dtype=torch.float64), rate, **form)
    inverses = {f"p = {p}": newton_schulz(X, p, alpha) for p in (0, *counts)}
    inverses["exact"] = torch.linalg.pinv(X, hermitian=True)
    identity = torch.eye(X.shape[-1], dtype=torch.float64)

    def grid(values: Tensor) -> Floats:
        return rearrange(values, "1 (h w) -> h w", h=height).numpy()

    diffused = {name: (V @ F0.mT).mT.squeeze(1) for name, V in inverses.items() if name != "p = 0"}
    return Diffused(
        maps={"F⁰": grid(F0)} | {name: grid(d) for name, d in diffused.items()},
        filtered={name: grid(dynamic_filter(d, F0, beta, stable=True)) for name, d in diffused.items()},
        residuals={
            name: float((X @ V - identity).norm() / len(identity) ** 0.5) for name, V in inverses.items()
        },
        largest={name: float(V.abs().max()) for name, V in inverses.items()},
        singular=torch.linalg.svdvals(X)[0].numpy(),
    )


def figure(photo: Any, found: Diffused, size: tuple[int, int]) -> Any:
    """Two rows of overlays, each map from its smallest to its largest value: d, and T after the filter."""

    def picture(score_map: Floats) -> Any:
        return overlay(photo, upsample_score_map(score_map, size))

    names = list(found.maps)
    captions = [[f"{d.min():.2g} to {d.max():.2g}" for d in found.maps.values()]]
    captions.append(
        [""] + [f"{100 * (found.filtered[name] > 0.5).mean():.0f} % above 0.5" for name in names[1:]]
    )
    return picture_grid(
        [
            [picture(d) for d in found.maps.values()],
            [for_display(photo), *(picture(found.filtered[name]) for name in names[1:])],
        ],
        row_titles=["d = V F⁰", "filtered T"],
        column_titles=["F⁰ (no diffusion)", *names[1:]],
        captions=captions,
    )


def gain(sigma: Floats, p: int, alpha: float) -> Floats:
    """``g_p(σ) = [1 - (1 - α σ²)^(2^p)] / σ``: what V_p makes of a singular value, 1/σ for the exact inverse."""
    return -np.expm1(2.0**p * np.log1p(-alpha * sigma**2)) / sigma


def gain_figure(counts: Sequence[int], alpha: float, singular: Floats) -> Any:
    """Gains over σ on logarithmic axes; ticks at the bottom are the singular values of the image's Laplacian."""
    high = min(8.0, 0.999 / alpha**0.5)  # σ <= 8 at λ = 1
    sigma = np.geomspace(1e-3, high, 200)
    lines = {f"p = {p}": gain(sigma, p, alpha).tolist() for p in counts}
    plot = line_plot(
        sigma.tolist(),
        lines | {"exact, 1/σ": (1 / sigma).tolist()},
        x_label="singular value σ of X (ticks: of this image)",
        y_label="gain $g_p(σ)$",
        title=f"Newton-Schulz, α = {alpha:g}",
    )
    axes = plot.axes[0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    inside = singular[(singular >= sigma[0]) & (singular <= high)]
    bottom, top = axes.get_ylim()
    axes.plot(
        inside, np.full(len(inside), bottom), "|", color="#3f4752", markersize=12, alpha=0.5, clip_on=False
    )
    axes.set_ylim(bottom, top)
    axes.lines[len(lines)].set_linestyle("--")
    return plot
