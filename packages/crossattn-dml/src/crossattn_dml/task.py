"""The training task: a batch of photos to the loss of section 4, in one process or over all of them.

:class:`ConditionalTraining` is what the loop of :mod:`attnmap_core.training` trains: the embedding model, the stack
that exists in training only, and the loss, whose proxies and boundaries are trained too. :class:`MetricTask` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attnmap_core.backbones import mismatched_keys
from attnmap_core.errors import InputError
from attnmap_core.files import atomic_file
from torch import Tensor, nn

from .cross_attention import CrossAttentionStack, closed, cosines, unit
from .distributed import gather_rows, processes
from .losses import ConditionalEmbeddingLoss, mine, pair_masks
from .model import EmbeddingModel

STACK_FILE = "stack.safetensors"


class ConditionalTraining(nn.Module):
    """Embedding model, stack and loss as one module, so that distributed training sees all that is trained.

    Args:
        model: the network that stays.
        stack: options of :class:`~crossattn_dml.CrossAttentionStack` besides its channels; None builds none: the
            baseline, the same run without the method.
        loss: options of :class:`~crossattn_dml.ConditionalEmbeddingLoss` besides ``dim``.
        mined: compute only the pairs that multi-similarity's mining keeps on level 0, with ``epsilon`` as there.
        gather: form pairs over all processes: each then computes its share of them on the images of all, and the
            result is that of one process with the whole batch. Otherwise pairs stay within a process.
        partners: for losses with proxies: images that the others are conditioned on, drawn at each step.

    Raises:
        InputError: for options that contradict each other, and those of the parts.

    Example:
        >>> tiny = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
        >>> model = EmbeddingModel("vit", embedding_dim=8, img_size=16, backbone_options=tiny)
        >>> training = ConditionalTraining(model, stack={"blocks": 2, "heads": 2})
        >>> parts = training(torch.randn(4, 3, 16, 16), torch.tensor([0, 0, 1, 1]))
        >>> bool(torch.isclose(parts["loss"], 2 * parts["unconditional"]))  # at first all levels are equal
        True
    """

    def __init__(
        self,
        model: EmbeddingModel,
        stack: Mapping[str, Any] | None,
        loss: Mapping[str, Any] | None = None,
        *,
        mined: bool = False,
        gather: bool = False,
        partners: int = 8,
    ) -> None:
        super().__init__()
        self.model = model
        self.stack_options = None if stack is None else dict(stack)
        self.stack = None if stack is None else make_stack(model, stack)
        given: dict[str, Any] = {**(loss or {}), "dim": model.embedding_dim}
        self.loss = ConditionalEmbeddingLoss(**given)
        if mined and (self.loss.loss != "multi_similarity" or self.loss.options.get("epsilon", 0.1) is None):
            raise InputError(
                f"mined True: expected loss multi_similarity with its epsilon, got {self.loss.loss}; leave mined out"
            )
        if partners < 1:
            raise InputError(f"partners {partners}: expected 1 or more; 8 is usual")
        self.mined, self.gather, self.partners = mined, gather, partners

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
        *,
        weight: float | None = None,
        counts: bool = True,
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            images: ``(b, 3, H, W)`` normalised.
            labels: ``(b,)`` class ids.
            index: ``(b,)`` places in the data set: two views of one image make no pair. Default: all differ.
            weight: λ of this step.
            counts: False for a batch that only keeps step with other processes; used where these are gathered.

        Returns:
            Scalars: ``loss`` with gradient; ``unconditional``, ``conditional``, ``weight`` (λ), ``pairs`` (ordered
            pairs of one class) without.
        """
        embeddings, tokens, grid = self.model(images)
        if index is None:
            index = torch.full_like(labels, -1)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        everywhere = self.gather and processes()[1] > 1
        if everywhere:
            rows = slice(None) if counts else slice(0)
            embeddings, tokens, labels, index = gather_rows(
                embeddings[rows], tokens[rows], labels[rows], index[rows]
            )
        present = (index[:, None] != index[None]) | (index < 0)  # streams do not know places, and say -1
        levels: dict[int, Tensor] = {
            0: embeddings if self.loss.takes_embeddings else cosines(unit(embeddings))
        }
        partners: Tensor | None = None
        if self.stack is not None:
            supervised = sorted(self.loss.level_weights(self.stack.depth))
            if self.loss.takes_embeddings:
                partners = self._draw(len(labels), labels.device, everywhere)
                levels |= self.stack.conditional(
                    embeddings, tokens, partners=partners, levels=supervised, grid=grid
                )
            else:
                if self.mined:
                    kept = mine(
                        levels[0], *pair_masks(labels, present), self.loss.options.get("epsilon", 0.1)
                    )
                    present = closed(kept[0] | kept[1])
                levels |= self.stack(
                    embeddings,
                    tokens,
                    levels=supervised,
                    pairs=present if self.mined else None,
                    grid=grid,
                    distributed=everywhere,
                )
        generator = self._common_generator(labels.device) if everywhere else None
        found = self.loss(levels, labels, present, partners=partners, weight=weight, generator=generator)
        factor = self.loss.weight if weight is None else weight
        return {
            "loss": found.total,
            "unconditional": found.unconditional.detach(),
            "conditional": found.conditional.detach(),
            "weight": torch.full_like(found.total.detach(), factor),
            "pairs": pair_masks(labels, present)[0].sum().to(found.total.dtype),
        }

    def _draw(self, count: int, device: torch.device, everywhere: bool) -> Tensor:
        generator = self._common_generator(torch.device("cpu")) if everywhere else None
        return torch.randperm(count, generator=generator)[: self.partners].to(device)

    def _common_generator(self, device: torch.device) -> torch.Generator:
        """One that draws the same in every process."""
        seed = torch.randint(2**31, (1,)).to(self.model.head.weight.device)
        return torch.Generator(device).manual_seed(int(gather_rows(seed)[0][0]))

    def save(self, folder: str | Path) -> None:
        """Write the model folder, and beside it the stack: the embedding loads and runs without that."""
        self.model.save_pretrained(folder)
        if self.stack is not None:
            from safetensors.torch import save_file

            state = {name: tensor.contiguous() for name, tensor in self.stack.state_dict().items()}
            with atomic_file(Path(folder) / STACK_FILE) as path:
                save_file(state, path, metadata={"format": "pt", "stack": json.dumps(self.stack_options)})


def make_stack(model: EmbeddingModel, options: Mapping[str, Any]) -> CrossAttentionStack:
    """A stack of the model's channels."""
    given: dict[str, Any] = {**options, "dim": model.embedding_dim, "memory_dim": model.memory_dim}
    return CrossAttentionStack(**given)


def load_stack(model: EmbeddingModel, folder: str | Path) -> CrossAttentionStack:
    """The stack that :meth:`ConditionalTraining.save` left beside a model, in evaluation mode.

    Raises:
        InputError: if there is none, or it is damaged or not of this model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / STACK_FILE
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, expected the stack of a training; only the model can be used"
        )
    try:
        with safe_open(path, framework="pt") as file:
            options = json.loads((file.metadata() or {})["stack"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: damaged, or no stack ({error}); save the training again") from error
    stack = make_stack(model, options)
    problem = mismatched_keys(stack.state_dict(), state)
    if problem:
        raise InputError(f"{path}: not a stack of this model ({problem}); load the model that lies beside it")
    stack.load_state_dict(state)
    return stack.to(model.head.weight.device, model.head.weight.dtype).eval()


class MetricTask:
    """Batches to the losses of a :class:`ConditionalTraining`.

    Args:
        weight: λ, reached at the end of the ramp.
        warmup_epochs: epochs over which λ grows linearly from 0, a step an epoch.

    Attributes:
        epoch: counted from 0; the training loop calls :meth:`begin_epoch`.

    Example:
        >>> task = MetricTask(weight=1.0, warmup_epochs=4)
        >>> task.begin_epoch(1)
        >>> task.current_weight
        0.25
    """

    def __init__(self, weight: float = 1.0, *, warmup_epochs: int = 0) -> None:
        if not weight >= 0 or warmup_epochs < 0:
            raise InputError(
                f"weight {weight}, warmup_epochs {warmup_epochs}: expected 0 or more; change them"
            )
        self.weight, self.warmup_epochs = weight, warmup_epochs
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Take the weight of this epoch, counted from 0."""
        self.epoch = epoch
        ramp = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        self.current_weight = self.weight * ramp

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run a :class:`ConditionalTraining`, bare or wrapped, on a batch.

        Args:
            model: the training module.
            batch: ``images``, ``labels`` and, where known, ``index`` and ``weight`` of
                :func:`attnmap_core.data.loaders.collate`.

        Returns:
            What :meth:`ConditionalTraining.forward` does.
        """
        counts = batch.get("weight", 1.0) > 0
        return model(
            batch["images"], batch["labels"], batch.get("index"), weight=self.current_weight, counts=counts
        )
