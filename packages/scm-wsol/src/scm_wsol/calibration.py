r"""Spatial calibration: semantic similarity steers how attention spreads over the patch grid.

Bai et al., "Weakly Supervised Object Localization via Transformer with Implicit Spatial Calibration",
ECCV 2022.
Equation numbers are those of the paper's supplementary material, steps run as in the released code. Symbols:

======  =================  ==========================================================
symbol  shape              meaning
======  =================  ==========================================================
S       ``(b, c, h, w)``   semantic maps: one class score per patch and class
F       ``(b, n)``         attention map, ``n = h * w`` patches in row-major order
D - A   ``(n, n)``         Laplacian of the 4-neighbour grid
E       ``(b, n, n)``      cosine similarity of the patches' class scores
X       ``(b, n, n)``      Laplacian modulated by E and λ
V       ``(b, n, n)``      Newton-Schulz estimate of the inverse of X
T       ``(b, n)``         the block's activation in ``[0, 1]``
======  =================  ==========================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
from attnmap_core.errors import InputError
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .arithmetic import divide, matmul
from .stencil import stencil_diffusion, stencil_similarity

ALPHA = 0.002
"""Start scale of Newton-Schulz: converges for any similarity while ``|λ| < 2.95``."""

ITERATIONS = {"release": (16, 4, 4, 4)}
"""Newton-Schulz iteration counts per block, by name; ``release``: as the published weights were trained."""

Sign = Literal["release", "supplement"]
Laplacian = Literal["hadamard", "rowsum"]
Filter = Literal["tanhshrink", "softshrink", "none"]


class DivergedError(InputError, FloatingPointError):
    """Numbers stopped being finite: the message names the values to look at."""


# --- Step 1: the patch grid as a graph -------------------------------------------------------------


def grid_laplacian(
    height: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Degree minus adjacency of the grid whose patches touch left, right, above and below.

    Args:
        height, width: patches per column and row; a single row or column is allowed.
        dtype, device: of the result.

    Returns:
        ``(n, n)``, ``n = height * width``, patches in row-major order. Kept per size: do not write into it.

    Example:
        >>> grid_laplacian(1, 3).int().tolist()
        [[1, -1, 0], [-1, 2, -1], [0, -1, 1]]
    """
    return _grid_laplacian(height, width, dtype, torch.device(device))


@lru_cache(maxsize=16)
def _grid_laplacian(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    def path(length: int) -> Tensor:
        edges = torch.ones(length - 1, dtype=dtype, device=device)
        adjacency = torch.diag(edges, 1) + torch.diag(edges, -1)
        return torch.diag(adjacency.sum(0)) - adjacency

    def eye(length: int) -> Tensor:
        return torch.eye(length, dtype=dtype, device=device)

    # Kept between calls, and a tensor born in inference mode could never take part in training later.
    with torch.inference_mode(False):
        return torch.kron(path(height), eye(width)) + torch.kron(eye(height), path(width))


# --- Step 2: semantic similarity -------------------------------------------------------------------


def similarity(S: Tensor) -> Tensor:
    r"""Cosine similarity of the class scores of every pair of patches.

    .. math:: E_{nm} = \frac{v_n \cdot v_m}{\|v_n\| \|v_m\|}, \quad v_n = S[:, n]

    Args:
        S: ``(b, c, h, w)`` semantic maps, any sign.

    Returns:
        ``(b, n, n)`` in ``[-1, 1]``, diagonal 1. An all-zero patch has similarity 0 to the others.

    Example:
        >>> similarity(torch.tensor([[[[2.0, 0.0, -1.0]], [[0.0, 3.0, 0.0]]]])).tolist()
        [[[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]]
    """
    v = rearrange(S, "b c h w -> b (h w) c")
    length = torch.linalg.vector_norm(v, dim=-1)
    lengths = rearrange(length, "b n -> b n 1") * rearrange(length, "b m -> b 1 m")
    itself = torch.diag_embed((lengths.diagonal(dim1=-2, dim2=-1) == 0).to(S.dtype))  # 1 for all-zero patches
    return divide(matmul(v, v.mT), lengths) + itself


# --- Step 3: modulated Laplacian -------------------------------------------------------------------


def modulated_laplacian(
    E: Tensor,
    grid: Tensor,
    rate: Tensor | float,
    *,
    laplacian: Laplacian = "hadamard",
    sign: Sign = "release",
) -> Tensor:
    r"""Grid Laplacian whose edges are weakened where neighbours look alike.

    .. math:: X = (D - A) \circ (\lambda E - 1)

    At the initial λ = 1 the diagonal is zero: edges between *dissimilar* neighbours weigh most.

    Args:
        E: ``(b, n, n)`` similarity, diagonal 1.
        grid: ``(n, n)`` of :func:`grid_laplacian`.
        rate: λ.
        laplacian: ``"hadamard"`` as above (the diagonal is ``degree * (λ - 1)``); ``"rowsum"`` puts minus the
            sum of a row's edges on the diagonal, as a derivation from the flow equation (Eq. 1) gives.
        sign: ``"release"`` as above; ``"supplement"`` follows Eq. 3 to the letter, which negates X and in the
            end turns the activation T into 1 - T.

    Returns:
        ``(b, n, n)``, symmetric, non-zero only between neighbours and on the diagonal.
    """
    X = grid * (rate * E - 1)  # Eq. 3, in the sign of the paper's figure and code
    if laplacian == "rowsum":
        X = X - torch.diag_embed(X.sum(-1))  # every row then sums to 0
    return -X if sign == "supplement" else X


# --- Steps 4 and 5: diffusion ----------------------------------------------------------------------


def newton_schulz(
    X: Tensor, iterations: int, alpha: float | Literal["auto"] = ALPHA, *, detach_init: bool = True
) -> Tensor:
    r"""Iterate towards the inverse of X; a few steps make a truncated one, which is the point.

    .. math:: V_0 = \alpha X^\top, \quad V_{i+1} = V_i (2I - X V_i)

    In closed form :math:`V_p = [I - (I - \alpha X^\top X)^{2^p}] X^{-1}`: a singular value σ of X has the
    gain :math:`[1 - (1 - \alpha\sigma^2)^{2^p}] / \sigma` instead of 1/σ.

    Args:
        X: ``(b, n, n)``, not necessarily symmetric.
        iterations: p, at least 0.
        alpha: converges where ``0 < alpha * sigma_max(X) ** 2 < 2``; ``"auto"`` takes ``1 / (‖X‖₁ ‖X‖∞)`` of
            each sample, which always converges but changes what a given p means.
        detach_init: take V_0 as a constant in the gradient, as the released code does. False gives the true
            derivative: the same forward pass, another training.

    Returns:
        ``(b, n, n)``, V_p.

    Example:
        >>> newton_schulz(torch.tensor([[[2.0]]]), iterations=12)
        tensor([[[0.5000]]])
    """
    start = X.detach() if detach_init else X
    scale: Tensor | float
    if alpha == "auto":
        size = start.abs()
        norms = size.sum(-2).amax(-1) * size.sum(-1).amax(-1)  # ‖X‖₁ ‖X‖∞ >= σ_max²
        scale = rearrange(divide(torch.ones_like(norms), norms), "b -> b 1 1")
    else:
        scale = alpha
    V = scale * start.mT
    two = 2 * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    for _ in range(iterations):
        V = matmul(V, two - matmul(X, V))
    return V


def dense_diffusion(
    S: Tensor,
    F: Tensor,
    rate: Tensor | float,
    *,
    iterations: int,
    alpha: float | Literal["auto"] = ALPHA,
    laplacian: Laplacian = "hadamard",
    sign: Sign = "release",
    detach_init: bool = True,
    E: Tensor | None = None,
) -> Tensor:
    """Attention after diffusion along the similarity graph, by explicit ``(n, n)`` matrices (steps 1 to 5).

    Args:
        S: ``(b, c, h, w)`` semantic maps.
        F: ``(b, h * w)`` attention map.
        rate: λ. The other arguments are those of :func:`modulated_laplacian` and :func:`newton_schulz`.
        E: :func:`similarity` of S, where it is known already.

    Returns:
        ``(b, h * w)``, the redistributed map d.
    """
    grid = grid_laplacian(S.shape[-2], S.shape[-1], dtype=S.dtype, device=S.device)  # step 1
    E = similarity(S) if E is None else E  # step 2
    X = modulated_laplacian(E, grid, rate, laplacian=laplacian, sign=sign)  # step 3, Eq. 3
    V = newton_schulz(X, iterations, alpha, detach_init=detach_init)  # step 4
    # step 5: d = V F, equilibrium of the flow (Eqs. 2 and 5)
    return matmul(V.mT, F.unsqueeze(-1)).squeeze(-1)


class Backend(NamedTuple):
    """A way to compute steps 1 to 5.

    Attributes:
        similarity: E of S, in whatever form the second function takes.
        diffusion: arguments and result as of :func:`dense_diffusion`.
    """

    similarity: Callable[[Tensor], Tensor]
    diffusion: Callable[..., Tensor]


BACKENDS = {
    "stencil": Backend(stencil_similarity, stencil_diffusion),
    "dense": Backend(similarity, dense_diffusion),
}
"""By name: ``stencil``, linear in the number of patches, and ``dense``, the equations as they are written."""


# --- Step 6: dynamic filter ------------------------------------------------------------------------


def minmax(v: Tensor) -> Tensor:
    """Shift and scale each row of ``(b, n)`` to ``[0, 1]``; a constant row becomes zeros with zero gradient.

    Minimum and maximum pass their gradient to one element each.

    Example:
        >>> minmax(torch.tensor([[2.0, 6.0, 3.0], [5.0, 5.0, 5.0]])).tolist()
        [[0.0, 1.0, 0.25], [0.0, 0.0, 0.0]]
    """
    shifted = v - v.min(dim=-1, keepdim=True).values
    return divide(shifted, shifted.max(dim=-1, keepdim=True).values)


def stable_tanhshrink(u: Tensor) -> Tensor:
    """``u - tanh(u)`` by its series for ``|u| < 0.05``, where the difference cancels to rounding noise."""
    u2 = u * u
    series = u * u2 * (1 / 3 - u2 * (2 / 15 - u2 * (17 / 315)))
    return torch.where(u.abs() < 0.05, series, functional.tanhshrink(u))


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanhshrink": functional.tanhshrink,
    "softshrink": functional.softshrink,
    "none": lambda u: u,
}


def dynamic_filter(
    d: Tensor, F: Tensor, beta: Tensor | float, *, filter: Filter = "tanhshrink", stable: bool = False
) -> Tensor:
    r"""Keep the strong part of a diffused map, relative to the attention's maximum.

    .. math:: T = \mathrm{minmax}(u - \tanh u), \quad u_n = \frac{d_n}{\beta \max_m F_m}

    Args:
        d: ``(b, n)`` diffused map; any sign.
        F: ``(b, n)`` attention map before diffusion.
        beta: β.
        filter: ``"tanhshrink"`` as above, ``"softshrink"`` (threshold 0.5 on u) or ``"none"``.
        stable: use :func:`stable_tanhshrink`.

    Returns:
        ``(b, n)`` in ``[0, 1]``, minimum 0 and maximum 1 (all zeros where the filtered map is constant).
    """
    peak = F.max(dim=-1, keepdim=True).values
    u = d / (beta * torch.where(peak == 0, 1.0, peak))  # no attention at all: d is 0 too, and T comes out 0
    shrink = stable_tanhshrink if stable and filter == "tanhshrink" else FILTERS[filter]
    return minmax(shrink(u))


# --- The block and the stack -----------------------------------------------------------------------


class ActivationDiffusionBlock(nn.Module):
    r"""One round of calibration: attention diffuses, is filtered, and re-weights the semantic maps.

    .. math:: S' = S \odot (1 + T), \quad F' = F + T

    Two scalars are learnt: λ (``lam``, how similarity weakens an edge) and β (``beta``, scale of the filter).
    Everything runs in float32 at least, whatever autocast or TF32 setting surrounds it: the filter cancels
    leading digits, and bfloat16 would give NaN.

    Args:
        iterations: Newton-Schulz steps p.
        alpha: start scale, or ``"auto"``; see :func:`newton_schulz`.
        laplacian, sign: see :func:`modulated_laplacian`.
        filter: see :func:`dynamic_filter`.
        residual: False gives S' = S ⊙ T and F' = T.
        detach_ns_init: no gradient through V_0, as released; see :func:`newton_schulz`.
        stable_shrink: no cancellation in the filter; differs from the released numbers by their rounding
            error. Use it, or float64, for p <= 2.
        clamp_beta: keep β at 1e-3 or above.
        lam_init, beta_init: start values.
        dtype: ``"float32"`` or ``"float64"``: the least precision of the computation; wider inputs stay wide.
        chunk_size: images calibrated at a time; what belongs to a chunk is rebuilt in the backward pass, so
            that the matrices of the dense form do not grow with the batch (its E apart, if a stack shares it).
            Same numbers.
        backend: name in ``BACKENDS``: the same numbers, to rounding.

    Shape:
        S ``(b, c, h, w)`` and F ``(b, h * w)``, to the same shapes; any grid.

    Raises:
        DivergedError: from ``forward``, if T is not finite.

    Example:
        >>> S, F = torch.randn(2, 5, 3, 4), torch.rand(2, 12)
        >>> S_next, F_next = ActivationDiffusionBlock(iterations=4)(S, F)
        >>> S_next.shape == S.shape, bool((F_next >= F).all())
        (True, True)
    """

    def __init__(
        self,
        iterations: int = 4,
        *,
        alpha: float | Literal["auto"] = ALPHA,
        laplacian: Laplacian = "hadamard",
        sign: Sign = "release",
        filter: Filter = "tanhshrink",
        residual: bool = True,
        detach_ns_init: bool = True,
        stable_shrink: bool = False,
        clamp_beta: bool = False,
        lam_init: float = 1.0,
        beta_init: float = 0.5,
        dtype: Literal["float32", "float64"] = "float32",
        chunk_size: int | None = None,
        backend: str = "stencil",
    ) -> None:
        super().__init__()
        _check_choice("laplacian", laplacian, ("hadamard", "rowsum"))
        _check_choice("sign", sign, ("release", "supplement"))
        _check_choice("filter", filter, FILTERS)
        _check_choice("dtype", dtype, ("float32", "float64"))
        _check_choice("backend", backend, BACKENDS)
        if iterations < 0:
            raise ValueError(f"iterations must be 0 or more, got {iterations}")
        if alpha != "auto" and not (isinstance(alpha, (int, float)) and alpha > 0):
            raise ValueError(f'alpha must be a positive number or "auto", got {alpha!r}')
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be 1 or more, or None for the whole batch, got {chunk_size}")
        self.iterations = iterations
        self.alpha: float | Literal["auto"] = alpha
        self.laplacian: Laplacian = laplacian
        self.sign: Sign = sign
        self.filter: Filter = filter
        self.residual = residual
        self.detach_ns_init = detach_ns_init
        self.stable_shrink = stable_shrink
        self.clamp_beta = clamp_beta
        self.dtype = dtype
        self.chunk_size = chunk_size
        self.backend = backend
        self.lam = nn.Parameter(torch.full((1,), lam_init))
        self.beta = nn.Parameter(torch.full((1,), beta_init))

    def forward(self, S: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
        return self.update(S, F, self.activation(S, F))

    def activation(self, S: Tensor, F: Tensor, E: Tensor | None = None) -> Tensor:
        """T ``(b, h * w)``, steps 1 to 6, in the block's working precision.

        Args:
            S, F: as for the block.
            E: :meth:`similarity` of S, or of S times a positive number per patch, where it is known already.
        """
        if S.ndim != 4 or F.shape != (S.shape[0], S.shape[2] * S.shape[3]):
            raise ValueError(
                f"F {tuple(F.shape)} does not fit S {tuple(S.shape)}: expected (b, h * w) and (b, c, h, w)"
            )
        with torch.autocast(S.device.type, enabled=False):
            S = self._widened(S)
            F = F.to(S.dtype)
            if self.chunk_size is None or self.chunk_size >= len(S):
                T = self._activation(S, F, E)
            else:
                chunks = [x.split(self.chunk_size) for x in (S, F, E) if x is not None]
                T = torch.cat([_recomputed(self._activation, *chunk) for chunk in zip(*chunks)])
            # A compiled graph has no place to stop in; there the training loop finds a loss that is not finite.
            if not torch.compiler.is_compiling() and not torch.isfinite(T).all():
                raise DivergedError(self._diagnosis(S, F))
        return T

    def similarity(self, S: Tensor) -> Tensor:
        """E of S, step 2, in the form and precision that :meth:`activation` takes."""
        with torch.autocast(S.device.type, enabled=False):
            return BACKENDS[self.backend].similarity(self._widened(S))

    def _widened(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, getattr(torch, self.dtype)))

    def _activation(self, S: Tensor, F: Tensor, E: Tensor | None = None) -> Tensor:
        lam, beta = self.lam.to(S.dtype), self.beta.to(S.dtype)
        d = BACKENDS[self.backend].diffusion(  # steps 1 to 5
            S,
            F,
            lam,
            iterations=self.iterations,
            alpha=self.alpha,
            laplacian=self.laplacian,
            sign=self.sign,
            detach_init=self.detach_ns_init,
            E=E,
        )
        beta = beta.clamp(min=1e-3) if self.clamp_beta else beta
        return dynamic_filter(d, F, beta, filter=self.filter, stable=self.stable_shrink)  # step 6

    def update(self, S: Tensor, F: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
        """Step 7: S' and F', float32 or wider. F' is not brought back to [0, 1]."""
        T = T.to(torch.promote_types(S.dtype, torch.float32))
        T_grid = rearrange(T, "b (h w) -> b 1 h w", h=S.shape[2])
        return (S + S * T_grid, F + T) if self.residual else (S * T_grid, T)

    @torch.no_grad()
    def _diagnosis(self, S: Tensor, F: Tensor) -> str:
        values = f"λ = {self.lam.item():.4g}, β = {self.beta.item():.4g}"
        if not (S.isfinite().all() and F.isfinite().all()):
            return (
                f"SCM: the maps before calibration are not finite ({values}, σ_max unknown): "
                "training diverged ahead of this block; lower the learning rate or check the images"
            )
        grid = grid_laplacian(S.shape[2], S.shape[3], dtype=S.dtype, device=S.device)
        lam = self.lam.to(S.dtype)
        X = modulated_laplacian(similarity(S), grid, lam, laplacian=self.laplacian, sign=self.sign)
        # the largest singular value of a matrix that may itself have overflowed
        largest = torch.linalg.matrix_norm(X, ord=2).max().item() if X.isfinite().all() else math.inf
        return (
            f"SCM: activation is not finite with {values}, σ_max = {largest:.4g}, α = {self.alpha}, "
            f"{self.iterations} iterations; expected α·σ_max² < 2 and β away from 0: "
            'lower the learning rate of λ and β, or set alpha = "auto"'
        )

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}, alpha={self.alpha}, sign={self.sign}, backend={self.backend}"


class SpatialCalibration(nn.Module):
    r"""Activation diffusion blocks in a row; training looks through them, inference drops them.

    Every block multiplies patch n by a positive number, the same for all classes, hence
    :math:`S^L = S^0 \odot w` with :math:`w_n = \prod_l (1 + T^l_n) \in [1, 2^L]`: pooling the calibrated maps
    is a weighted pooling of the plain ones. All blocks therefore see the same similarity E, which is computed once.

    Args:
        blocks: L.
        iterations: Newton-Schulz steps: one number for all blocks, one per block, or a name in ``ITERATIONS``
            (``"release"`` is 16, 4, 4, 4).
        mean_one_weights: divide w by its mean over the patches, which takes the change of logit scale out of
            the effect of calibration: a control, not the published method.
        block_options: see :class:`ActivationDiffusionBlock`.

    Example:
        >>> calibration = SpatialCalibration(iterations="release")
        >>> [block.iterations for block in calibration.blocks]
        [16, 4, 4, 4]
        >>> S_layers, F_layers = calibration(torch.randn(2, 5, 4, 4), torch.rand(2, 16), return_layers=True)
        >>> S_layers.shape, F_layers.shape
        (torch.Size([5, 2, 5, 4, 4]), torch.Size([5, 2, 16]))
    """

    def __init__(
        self,
        blocks: int = 4,
        iterations: int | Sequence[int] | str = 4,
        *,
        mean_one_weights: bool = False,
        **block_options: Any,
    ) -> None:
        super().__init__()
        if isinstance(iterations, str):
            _check_choice("iterations", iterations, ITERATIONS)
            iterations = ITERATIONS[iterations]
        counts = [iterations] if isinstance(iterations, int) else list(iterations)
        counts = counts * blocks if len(counts) == 1 else counts
        if blocks < 1 or len(counts) != blocks:
            raise ValueError(
                f"iterations {counts} do not fit {blocks} blocks; give one number or one per block"
            )
        self.mean_one_weights = mean_one_weights
        stack = nn.ModuleList(ActivationDiffusionBlock(count, **block_options) for count in counts)
        self.blocks = cast("Sequence[ActivationDiffusionBlock]", stack)
        self.last_activation: Tensor | None = None
        """``(L, b, n)`` activations T of the latest call, without gradient: for logs and figures."""

    def forward(self, S: Tensor, F: Tensor, return_layers: bool = False) -> tuple[Tensor, Tensor]:
        """Calibrated ``S^L (b, c, h, w)`` and ``F^L (b, h * w)``.

        With ``return_layers`` also those on the way, stacked in front: index 0 is the input.
        """
        first = self.blocks[0]
        # Blocks only scale patches, by more than 0 where the residual is on: one E for all, as said above.
        E = first.similarity(S) if first.residual else None
        S_layers, F_layers = [S], [F]
        T_layers: list[Tensor] = []
        for block in self.blocks:
            T = block.activation(S, F, E)
            S, F = block.update(S, F, T)
            T_layers.append(T)
            S_layers.append(S)
            F_layers.append(F)
        T = torch.stack(T_layers)
        self.last_activation = T.detach()
        if self.mean_one_weights:
            mean = rearrange(self.weights(T).mean(-1), "l b -> l b 1 1 1").to(S.dtype)
            S_layers[1:] = [divide(layer, m) for layer, m in zip(S_layers[1:], mean)]
        if return_layers:
            S_layers[0], F_layers[0] = S_layers[0].to(S.dtype), F_layers[0].to(F.dtype)
            return torch.stack(S_layers), torch.stack(F_layers)
        return S_layers[-1], F_layers[-1]

    def weights(self, T: Tensor) -> Tensor:
        """Pooling weights w ``(L, b, n)`` after each block, from the activations T ``(L, b, n)``."""
        return torch.cumprod(1 + T if self.blocks[0].residual else T, dim=0)


# --- Helpers ---------------------------------------------------------------------------------------


def _recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)`` whose intermediate values are rebuilt in the backward pass rather than kept."""
    result = checkpoint(function, *inputs, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
