"""Decaying masks: dropped weights fade away.

Kao, Yazdanbakhsh, Subramanian, Agrawal, Evci, Krishna, "Training Recipe for N:M Structured Sparsity with Decaying
Pruning Mask", arXiv 2209.07617:

    W <- W - lr * g(W~),   W~ = (E + gamma * (1 - E)) * W,   E the N:M mask of W, gamma from 1 to 0 over the run

Deviations: any schedule of gamma, a linear one by default; the gradient passes straight through to all of W, and that
of dropped weights is not multiplied with gamma. In the paper dropped weights get no gradient in the end; here they do,
as with STE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nm_sparsity.core import masks
from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.methods.base import Method, WeightState, register
from nm_sparsity.core.methods.schedules import Schedule
from nm_sparsity.core.pattern import NMPattern

_FADING = Schedule("linear", 1.0, 0.0, 0.0, 0.5)
_FALLING = Schedule("linear", 0.0, 1.0, 0.0, 0.5)


@register
@dataclass(frozen=True)
class Decaying(Method):
    """The weights are N:M from where gamma is 0: half of the run by default."""

    name = "decaying"
    gamma: Schedule = _FADING

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_end("gamma", self.gamma, 0.0)

    def value(self, w: Tensor, state: WeightState) -> Tensor:
        w = w.detach()
        gamma = self.gamma.at(state.progress).to(w.dtype)
        # Selected where gamma is 0, since infinity times 0 is none.
        return torch.where(masks.nm_mask(w, state.pattern, state.dims), w, torch.where(gamma > 0, w * gamma, 0))


@register
@dataclass(frozen=True)
class StructureDecay(Method):
    """The same paper's structure decay: in each group of M the M - 1 largest weights are kept at first, N at last.

    `fall` is how far the number kept has come from M - 1 to N; it is rounded up.
    """

    name = "structure-decay"
    fall: Schedule = _FALLING

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_end("fall", self.fall, 1.0)

    def value(self, w: Tensor, state: WeightState) -> Tensor:
        w, (n, m) = w.detach(), (state.pattern.n, state.pattern.m)
        kept = n + torch.ceil((m - 1 - n) * (1 - self.fall.at(state.progress)))
        value = masks.keep_largest(w, state.pattern, state.dims)
        # As many launches as there are numbers between, since the present one is known on the device only.
        for more in range(n + 1, m):
            value = torch.where(kept >= more, masks.keep_largest(w, NMPattern(more, m), state.dims), value)
        return value


def _check_end(name: str, schedule: Schedule, end: float) -> None:
    low, high = sorted((schedule.first, schedule.last))
    if low < 0 or high > 1 or schedule.last != end:
        raise SparsityError(f"{name} must stay between 0 and 1 and end at {end:g}, found {schedule}")
