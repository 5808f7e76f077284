"""How much masks move: the sparse architecture divergence of the SR-STE paper, and the flip rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.masks.batched import Batch
from nm_sparsity.core.model.layers import sparse_weights
from nm_sparsity.core.model.wrappers import unwrap


@dataclass(frozen=True)
class Flips:
    """SAD between two moments, SAD_{i:j} = ||mask_j - mask_i||_1 (arXiv 2102.04010, section 4), by weight name."""

    sad: dict[str, int]
    sizes: dict[str, int]
    """The number of entries of each weight."""

    @property
    def total_sad(self) -> int:
        """SAD over all sparse weights."""
        return sum(self.sad.values())

    @property
    def rate(self) -> float:
        """SAD per sparse weight; across one optimizer step this is the flip rate. 0 without sparse weights."""
        total = sum(self.sizes.values())
        return self.total_sad / total if total else 0.0

    def rates(self) -> dict[str, float]:
        """SAD per weight, for each weight tensor."""
        return {name: sad / self.sizes[name] for name, sad in self.sad.items()}


class MaskTracker:
    """Remembers the masks of a model and counts what changes; one byte per sparse weight.

    For the flip rate, make one (or call `update`) right before an optimizer step and `update` right after it. Under
    FSDP2 it counts the rows that this rank holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._batch = Batch([], [])
        self._shapes = self._look()
        self._masks = self._batch.nm_mask()

    def update(self) -> Flips:
        """The flips since the last `update` or the beginning; the masks now become the ones remembered.

        Raises:
            SparsityError: if other weights of the model are sparse than at the beginning.
        """
        if self._look() != self._shapes:
            raise SparsityError("the model's sparse weights are not those that MaskTracker began with: make a new one")
        counts = self._batch.update_masks_(self._masks).tolist()
        sizes = {name: shape.numel() for name, shape in self._shapes.items()}
        return Flips(dict(zip(sizes, counts, strict=True)), sizes)

    @torch.no_grad()
    def _look(self) -> dict[str, torch.Size]:
        """The shapes of the sparse weights by name; the batch follows if tensors were replaced."""
        found = list(sparse_weights(self._model))
        local: list[Tensor] = [p.to_local() if isinstance(p, DTensor) else p for _, p, _ in found]
        if len(local) != len(self._batch.weights) or not all(map(Tensor.is_set_to, local, self._batch.weights)):
            self._batch = Batch(local, [state.placement for _, _, state in found])
        return {name: w.shape for (name, _, _), w in zip(found, local, strict=True)}
