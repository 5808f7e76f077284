"""How much masks move: the sparse architecture divergence of the SR-STE paper, and the flip rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nm_sparsity.core import masks
from nm_sparsity.core.model.layers import sparse_weights
from nm_sparsity.core.model.wrappers import unwrap


@dataclass(frozen=True)
class Flips:
    """SAD between two moments, SAD_{i:j} = ||mask_j - mask_i||_1 (arXiv 2102.04010, section 4), by weight name."""

    sad: dict[str, int]
    weights: dict[str, int]
    """The size of each weight."""

    @property
    def total_sad(self) -> int:
        """SAD over all sparse weights."""
        return sum(self.sad.values())

    @property
    def rate(self) -> float:
        """SAD per sparse weight; across one optimizer step this is the flip rate. 0 without sparse weights."""
        total = sum(self.weights.values())
        return self.total_sad / total if total else 0.0

    def rates(self) -> dict[str, float]:
        """SAD per weight, for each weight tensor."""
        return {name: sad / self.weights[name] for name, sad in self.sad.items()}


class MaskTracker:
    """Remembers the masks of a model and counts what changes; one byte per sparse weight.

    For the flip rate, make one (or call `update`) right before an optimizer step and `update` right after it. Under
    FSDP2 it counts the rows that this rank holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._masks = self._now()

    def update(self) -> Flips:
        """The flips since the last `update` or the beginning; the masks now become the ones remembered."""
        now = self._now()
        counts = {name: torch.count_nonzero(mask ^ self._masks[name]) for name, mask in now.items()}
        self._masks = now
        return Flips({n: int(c) for n, c in counts.items()}, {n: mask.numel() for n, mask in now.items()})

    def _now(self) -> dict[str, Tensor]:
        return {
            name: masks.nm_mask(p.to_local() if isinstance(p, DTensor) else p, sparse.pattern, sparse.dims)
            for name, p, sparse in sparse_weights(self._model)
        }
