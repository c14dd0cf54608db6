"""Tiny versions of the architectures, which take milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sar_vit.architectures import ClassTokenTransformer, create_architecture
from torch import Tensor, nn

_T2T = {"embed_dim": 12, "depth": 3, "num_heads": 3, "token_dim": 4}
TINY: dict[str, dict[str, Any]] = {
    "t2t_vit_14": _T2T,
    "t2t_vit_14_transformer": _T2T,
    "pvt_small": {"embed_dims": (4, 6, 8, 12), "depths": (1, 2, 1, 2), "num_heads": (1, 2, 2, 3)},
    "cvt_13": {"embed_dims": (4, 6, 12), "depths": (1, 1, 3), "num_heads": (1, 2, 3)},
}

Make = Callable[..., Any]


@pytest.fixture(params=list(TINY))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make() -> Make:
    """A tiny architecture in float64 whose weights, norms and statistics are nowhere 0 or 1."""

    def make(name: str, **options: Any) -> ClassTokenTransformer:
        torch.manual_seed(0)
        options = TINY[name] | {"num_classes": 5, "img_size": 64} | options
        model = create_architecture(name, **options).double()
        randomise(model)
        return model.eval()

    return make


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or key == "pos_embed" or key.endswith(".w"):
                continue
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.ndim > 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
            else:
                tensor.add_(0.3 * torch.randn_like(tensor))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
