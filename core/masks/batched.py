"""Weights that are masked together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nm_sparsity.core import masks
from nm_sparsity.core.pattern import Placement


class Batch:
    """Weights that are masked together, each along its own placement.

    The batch keeps the tensors it was given; where one's storage is replaced, the next call follows it.
    """

    def __init__(self, weights: Sequence[Tensor], placements: Sequence[Placement]) -> None:
        self.weights = list(weights)
        self.placements = list(placements)

    def keep_largest(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The masked weights, without autograd, in their shapes and strides, and rounded to `dtype` if one is given."""
        with torch.no_grad():
            return [
                masks.keep_largest(w.detach(), *placement).to(dtype or w.dtype)
                for w, placement in zip(self.weights, self.placements, strict=True)
            ]

    def nm_mask(self) -> list[Tensor]:
        """The boolean mask of each weight."""
        return [masks.nm_mask(w, *placement) for w, placement in zip(self.weights, self.placements, strict=True)]

    def add_dropped_(self, targets: Sequence[Tensor | None], scale: float | Tensor) -> None:
        """``target += scale * (1 - mask) * w`` in place for each weight; one whose target is None is left out."""
        for w, placement, target in zip(self.weights, self.placements, targets, strict=True):
            if target is not None:
                masks.add_dropped_(target, w, *placement, scale)

    def update_masks_(self, masks: Sequence[Tensor]) -> Tensor:
        """Write the present masks into `masks`; the number of entries that changed, int64 (weights,), on their device."""
        changes = []
        for before, now in zip(masks, self.nm_mask(), strict=True):
            changes.append((before != now).sum())
            before.copy_(now)
        return torch.stack(changes) if changes else torch.zeros(0, dtype=torch.int64)


def apply_masks_(targets: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Entries whose mask is False become +0, whatever they were; in place, without autograd."""
    with torch.no_grad():
        for target, mask in zip(targets, masks, strict=True):
            target.masked_fill_(~mask, 0)
