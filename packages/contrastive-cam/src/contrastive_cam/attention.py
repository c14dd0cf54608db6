r"""From the features of a backbone to what training and inference read: the gate, the heads and the CAAM.

In the order of Ki et al., ICCV 2021 (supplement), and of Baek et al., "PsyNet", AAAI 2020, which it extends::

    F -> gate -> F_w -+-> 1x1 heads -> spatial mean -> logits of the pretext tasks
                      +-> PTAP -> attention map

The supplement names the weighted feature map F_w without its formula. The default gate is efficient channel attention
with kernel 3, after the only public reimplementation; it may not be what the authors used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Gate = Literal["eca3", "eca_adaptive", "se", "none"]

GATES: tuple[str, ...] = ("eca3", "eca_adaptive", "se", "none")
"""Kinds of :func:`channel_gate`, the default first."""


def caam(features: Tensor) -> Tensor:
    r"""Class-agnostic activation map: the mean over all channels.

    .. math:: \mathrm{CAAM}(b, p) = \tfrac{1}{C} \sum_c F(b, c, p)

    Args:
        features: ``(b, c, h, w)``.

    Returns:
        ``(b, h, w)``, neither normalised nor upsampled; float32 for half precision.

    Raises:
        ValueError: if there are no channels to average.

    Example:
        >>> caam(torch.tensor([0.0, 4.0]).reshape(1, 2, 1, 1))
        tensor([[[2.]]])

    References:
        Baek et al., "PsyNet", AAAI 2020.
    """
    if features.ndim != 4 or features.shape[1] == 0:
        raise ValueError(f"features must be (b, c, h, w) with a channel, got {tuple(features.shape)}")
    return features.mean(dim=1, dtype=torch.promote_types(features.dtype, torch.float32))


class ChannelGate(nn.Module):
    r"""Weights a feature map by channel: :math:`F_w(b, c, p) = a(b, c)\, F(b, c, p)`.

    Args:
        layer: timm's attention over channels, or None for a = 1.

    Example:
        >>> gate = channel_gate("eca3", 4)
        >>> F = torch.rand(2, 4, 3, 3)
        >>> bool((gate(F) < F).all()), gate.weights(F).shape
        (True, torch.Size([2, 4, 1, 1]))
    """

    def __init__(self, layer: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        """F_w ``(b, c, h, w)`` of ``features (b, c, h, w)``."""
        return features if self.layer is None else self.layer(features)

    def weights(self, features: Tensor) -> Tensor:
        """The gate a ``(b, c, 1, 1)`` in ``[0, 1]``."""
        ones = features.new_ones(*features.shape[:2], 1, 1)
        if self.layer is None:
            return ones
        kept: list[Tensor] = []
        gate: Any = self.layer.gate
        handle = gate.register_forward_hook(lambda _m, _i, output: kept.append(output))
        try:
            self.layer(features)
        finally:
            handle.remove()
        return kept[0].reshape(ones.shape)


def channel_gate(kind: Gate, channels: int) -> ChannelGate:
    r"""The gate a between features and weighted features.

    .. math:: g_c = \mathrm{mean}_p F(c, p), \quad z_c = \sum_j w_j\, g_{c + j}, \quad a_c = \sigma(z_c)

    Args:
        kind: ``"eca3"`` as above with three weights, zeros beyond the ends; ``"eca_adaptive"`` with more of them for
            more channels (7 for 2048, 5 for 512); ``"se"`` two dense layers (reduction 16); ``"none"`` a = 1.
        channels: C.

    Returns:
        The module, initialised as its layers are.

    Raises:
        ValueError: for another kind.

    Example:
        >>> [sum(p.numel() for p in channel_gate(kind, 2048).parameters()) for kind in ("eca3", "eca_adaptive", "none")]
        [3, 7, 0]

    References:
        Wang et al., "ECA-Net", CVPR 2020; Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
    """
    from timm.layers import EcaModule, SEModule

    if kind == "none":
        return ChannelGate(None)
    if kind == "eca3":
        return ChannelGate(EcaModule(kernel_size=3))
    if kind == "eca_adaptive":
        return ChannelGate(EcaModule(channels))
    if kind == "se":
        return ChannelGate(SEModule(channels))
    raise ValueError(f"gate must be one of {', '.join(GATES)}, got {kind!r}")


class PretextHeads(nn.Module):
    """One 1x1 convolution per pretext task, whose planes are averaged to logits.

    Args:
        channels: of the features.
        classes: number of classes by task.

    Example:
        >>> heads = PretextHeads(8, {"rotation": 4, "scale": 3})
        >>> {name: tuple(logits.shape) for name, logits in heads(torch.rand(2, 8, 5, 5)).items()}
        {'rotation': (2, 4), 'scale': (2, 3)}
    """

    def __init__(self, channels: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: nn.Conv2d(channels, number, 1) for name, number in classes.items()}
        )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits ``(b, n)`` by task: convolving the mean is the mean of the convolved planes."""
        pooled = features.mean((2, 3), keepdim=True)
        return {name: layer(pooled).flatten(1) for name, layer in self.layers.items()}

    def planes(self, features: Tensor) -> dict[str, Tensor]:
        """Score maps of the classes ``(b, n, h, w)`` by task, whose spatial means are the logits."""
        return {name: layer(features) for name, layer in self.layers.items()}
