"""One-shot magnitude masks, then training of what is left.

Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378 (NVIDIA's ASP recipe):
train dense, mask once by magnitude, train again with the mask fixed:

    E fixed;   W <- E * (W - lr * (E * g(W~)))

Deviations: the mask is fixed at the first optimizer step and not at conversion, since engines load the dense
checkpoint in between. No channel permutation search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nm_sparsity.core import masks
from nm_sparsity.core.methods.base import Method, WeightState, register


@register
@dataclass(frozen=True)
class ASP(Method):
    """Starts from a trained dense model; the mask never changes after the first step.

    Dropped weights are zero from then on, so the largest N of each group are the kept ones, and the layer's forward
    needs no mask of its own.
    """

    name = "asp"

    def before_step(self, w: Tensor, grad: Tensor, state: WeightState, scale: float | Tensor) -> None:
        if "mask" not in state.memory:
            state.memory["mask"] = masks.nm_mask(w, state.pattern, state.dims)
            _zero_dropped(w, state)
        _zero_dropped(grad, state)

    def after_step(self, w: Tensor, state: WeightState) -> None:
        # Momentum from before the mask was fixed would move dropped weights off zero.
        if "mask" in state.memory:
            _zero_dropped(w, state)


def _zero_dropped(t: Tensor, state: WeightState) -> None:
    mask = state.memory["mask"] = state.memory["mask"].to(t.device)
    torch.where(mask, t, torch.zeros((), dtype=t.dtype, device=t.device), out=t)
