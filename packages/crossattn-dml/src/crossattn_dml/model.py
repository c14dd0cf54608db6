r"""EmbeddingModel: photos to vectors that are near where the photos show the same thing, and search among them.

Kotovenko, Ma, Milbich, Ommer, "Cross-Image-Attention for Conditional Embeddings in Deep Metric Learning", CVPR 2023.
This is all of the method that exists after training (section 6): the backbone and one linear layer. The cross-attention
that trained them is in :mod:`crossattn_dml.cross_attention` and not needed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from attnmap_core.backbones import create_backbone, evaluating
from attnmap_core.errors import InputError
from attnmap_core.hub import Localization, OnUnreadable, Photo, PretrainedModel
from attnmap_core.metrics import retrieval
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

Pool = Literal["avg", "avg+max"]
BatchNorm = Literal["frozen", "fixed", "trained"]
Memory = Literal["normed", "pre_norm"]


class Embedded(NamedTuple):
    """What the network says about a batch.

    Attributes:
        embeddings: ``(b, d)``, ``u``, not normalised.
        tokens: ``(b, n, c)`` ``X``, the locations of the feature map, row-major; without class token. What the stack
            reads: with ``memory="pre_norm"`` as they were before the ViT's final norm.
        grid: ``(h, w)`` of them.
    """

    embeddings: Tensor
    tokens: Tensor
    grid: tuple[int, int]


class EmbeddingModel(
    PretrainedModel,
    license="apache-2.0",
    tags=["metric-learning", "image-retrieval", "crossattn-dml"],
    pipeline_tag="image-feature-extraction",
    paper_url="https://doi.org/10.1109/CVPR52729.2023.01065",
):
    r"""Backbone, pooling over its locations, one linear layer.

    .. math:: u = W\, \mathrm{pool}(X) + b, \qquad z = u / \|u\|

    Args:
        backbone: timm name, or ``"vit"`` with its sizes in ``backbone_options``.
        embedding_dim: ``d``.
        img_size: input pixels, one number or ``(height, width)``.
        pool: mean over the locations, or ``"avg+max"``, the mean plus the maximum.
        batch_norm: in training: ``"frozen"`` uses the running statistics and leaves them, ``"fixed"`` does not train
            the scales and shifts either, ``"trained"`` is plain batch norm. ``train()`` keeps to it.
        memory: tokens that the stack reads: ``"normed"`` by the final norm of a ViT, as the embedding pools them, or
            as they were before it, ``"pre_norm"``.
        drop_path_rate: largest stochastic depth rate, growing linearly over the blocks; training only.
        threshold: share of a score map's maximum above which pixels make boxes.
        preprocessing: fields of :class:`attnmap_core.data.transforms.Preprocessing`; default: the whole photo at
            ``img_size``, normalised as the backbone's pretrained weights expect.
        pretrained: download timm's weights for the backbone.
        weights: local file of backbone weights instead.
        backbone_options: passed to :func:`attnmap_core.backbones.create_backbone`.

    Attributes:
        embedding_dim, memory_dim: channels of embeddings and of tokens, as the stack takes them.

    Raises:
        InputError: if the backbone is unknown, its weights do not fit, or an option is out of range.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
        >>> model = EmbeddingModel("vit", embedding_dim=8, img_size=32, backbone_options=tiny)
        >>> photos = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "red")]
        >>> z = model.encode(photos)
        >>> z.shape, bool(np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6))
        ((3, 8), True)
        >>> model.search(photos[:1], z, k=2).indices.tolist()
        [[0, 2]]
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        embedding_dim: int = 512,
        img_size: int | Sequence[int] = 224,
        *,
        pool: Pool = "avg",
        batch_norm: BatchNorm = "frozen",
        memory: Memory = "normed",
        drop_path_rate: float = 0.0,
        threshold: float = 0.3,
        preprocessing: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise InputError(f"embedding_dim {embedding_dim}: expected 1 or more; 128 and 512 are usual")
        if pool not in ("avg", "avg+max"):
            raise InputError(f"pool {pool}: expected avg or avg+max; choose one")
        if batch_norm not in ("frozen", "fixed", "trained"):
            raise InputError(f"batch_norm {batch_norm}: expected frozen, fixed or trained; choose one")
        if memory not in ("normed", "pre_norm"):
            raise InputError(f"memory {memory}: expected normed or pre_norm; choose one")
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.pool: Pool = pool
        self.batch_norm: BatchNorm = batch_norm
        self.backbone = create_backbone(
            backbone,
            img_size=size,
            pretrained=pretrained,
            weights=weights,
            drop_path_rate=drop_path_rate,
            **backbone_options or {},
        )
        self.norm = nn.Identity() if memory == "normed" else self._take_final_norm()
        self.embedding_dim, self.memory_dim = embedding_dim, self.backbone.num_features
        self.head = nn.Linear(self.memory_dim, embedding_dim)
        if batch_norm == "fixed":
            for module in self._batch_norms():
                module.requires_grad_(False)
        self.train()

    def _take_final_norm(self) -> nn.Module:
        """The norm that ends a ViT, out of the backbone: it treats each token alone and is as good after it."""
        net: Any = self.backbone.model
        for name in ("norm", "fc_norm"):
            norm = getattr(net, name, None)
            if isinstance(norm, nn.LayerNorm):
                setattr(net, name, nn.Identity())
                return norm
        raise InputError(
            f"memory pre_norm: expected a ViT that ends in a LayerNorm, got {self.backbone.name}; use normed"
        )

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]

    def train(self, mode: bool = True) -> Self:
        """Switch to training, batch norms as ``batch_norm`` says, or to evaluation."""
        super().train(mode)
        if self.batch_norm != "trained":
            for module in self._batch_norms():
                module.eval()
        return self

    def forward(self, images: Tensor) -> Embedded:
        """Embeddings and tokens of normalised ``images (b, 3, H, W)``."""
        features = self.backbone(images)
        tokens = features.tokens
        if tokens is None:
            tokens = rearrange(features.map, "b c h w -> b (h w) c")
        normed = self.norm(tokens)
        pooled = normed.mean(1)
        if self.pool == "avg+max":
            pooled = pooled + normed.amax(1)
        return Embedded(self.head(pooled), tokens, features.grid)

    def localize(self, images: Tensor) -> Localization:
        r"""Where in each image its embedding comes from: :math:`\langle z, W X_t + b \rangle` at each location.

        With ``pool="avg"`` the map's mean is the length of ``u`` exactly. There are no classes: the coordinates of the
        embedding stand in for logits, so that the label of a :class:`~attnmap_core.prediction.Prediction` means
        nothing; map and boxes do.
        """
        found = self(images)
        z = functional.normalize(found.embeddings, dim=1, eps=1e-12)
        maps = torch.einsum("bd,bnd->bn", z, self.head(self.norm(found.tokens)))
        return Localization(z, rearrange(maps, "b (h w) -> b h w", h=found.grid[0]))

    # --- Use ---

    def encode(
        self, photos: Photo | Iterable[Photo], *, batch_size: int = 32, on_unreadable: OnUnreadable = "error"
    ) -> NDArray[np.float32]:
        """Embeddings ``z`` of photos, in evaluation mode; the model's own mode is untouched.

        Args:
            photos: a path, bytes, an open file or a PIL image, or an iterable of these, in any colour mode and size.
            batch_size: photos that pass the network together.
            on_unreadable: raise, skip with a warning, or a function to call with the photo's name and why. Skipped
                photos have no row: where rows must stay aligned, let the function note them.

        Returns:
            ``(n, d)`` float32 of length 1; cosine similarity is their inner product.

        Raises:
            InputError: for a photo that cannot be read, unless skipping, and for embeddings that are not finite.
        """
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size}: expected 1 or more; 32 is usual")
        if isinstance(photos, (str, PathLike, bytes, Image.Image)) or hasattr(photos, "read"):
            photos = [photos]  # pyright: ignore[reportAssignmentType] (one photo)
        rows: list[Tensor] = []
        waiting: list[Tensor] = []
        names: list[str] = []
        weight = self.head.weight

        def flush() -> None:
            images = torch.stack(waiting).to(weight.device, weight.dtype)
            u = self(images).embeddings.to(torch.promote_types(weight.dtype, torch.float32))
            if not torch.isfinite(u).all():
                raise InputError(
                    f"{names[0]} or a photo just after it: the embedding is not finite, expected numbers; the "
                    "weights are damaged or overflowed in training, load others"
                )
            rows.append(functional.normalize(u, dim=1, eps=1e-12).float().cpu())
            waiting.clear()
            names.clear()

        with evaluating(self), torch.no_grad():
            for item in self._inputs(photos, on_unreadable):  # pyright: ignore[reportArgumentType]
                waiting.append(item.image)
                names.append(item.name)
                if len(waiting) == batch_size:
                    flush()
            if waiting:
                flush()
        return torch.cat(rows).numpy() if rows else np.empty((0, self.embedding_dim), dtype=np.float32)

    def search(
        self,
        query: NDArray[Any] | Tensor | Photo | Iterable[Photo],
        gallery: NDArray[Any] | Tensor | Iterable[Photo] | None = None,
        k: int = 10,
    ) -> retrieval.Neighbours:
        """The ``k`` gallery images nearest to each query by cosine similarity, exactly; of equals the first.

        Args:
            query: photos, or embeddings ``(q, d)`` of :meth:`encode`.
            gallery: photos or embeddings ``(g, d)``; by default the queries, each left out of its own result.
            k: at most the gallery has.

        Returns:
            ``indices`` and ``similarities``, ``(q, k)``.

        Raises:
            InputError: as :meth:`encode` and :func:`attnmap_core.metrics.nearest`.
        """
        queries, others = (
            given if isinstance(given, (np.ndarray, Tensor)) or given is None else self.encode(given)
            for given in (query, gallery)
        )
        if queries is None:
            raise InputError("query: none, expected photos or their embeddings; give at least one")
        return retrieval.nearest(queries, others, k)
