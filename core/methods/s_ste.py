"""S-STE: a continuous projection to N:M, so that masks do not oscillate.

Hu, Zhu, Chen, "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training", arXiv 2409.09099:

    W <- W - lr * g(W~),   W~ = beta * S(W),   S(w) = sign(w) * max(0, |w| - t)

t is the (N+1)th largest magnitude of the group of w, and beta = <W, S(W)> / <S(W), S(W)>, which makes beta * S(W) as
near to W as it can be, is that of the weight tensor at the first optimizer step for the whole run.

Deviations: the paper's matrix products in FP8 and its unbiased estimator of 2:4 activation gradients, which save time,
are left out. Any N:M. The finalized weights are W~.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_sparsity.core import masks
from nm_sparsity.core.masks.batched import Batch
from nm_sparsity.core.methods.base import Method, Step, WeightState, register


@register
@dataclass(frozen=True)
class SSTE(Method):
    """No hyperparameters. The shadow weights are dense; the value is N:M, but no selection of them."""

    name = "s-ste"

    def value(self, w: Tensor, state: WeightState) -> Tensor:
        return masks.soft_threshold(w, state.pattern, state.dims, _beta(w, state).to(w.device))

    def values(self, batch: Batch, states: Sequence[WeightState], dtype: torch.dtype) -> list[Tensor]:
        return batch.soft_threshold([_beta(w, s) for w, s in zip(batch.weights, states, strict=True)], dtype)

    def before_step(self, step: Step) -> None:
        new = [i for i, state in enumerate(step.states) if "beta" not in state.memory]
        if new and step.moves:
            products = [torch.stack(_products(step.batch.weights[i], step.states[i])) for i in new]
            for i, sums in zip(new, step.over_ranks(torch.stack(products)), strict=True):
                step.states[i].memory["beta"] = _ratio(*sums)
        if step.fixing is not None:
            for w, state in zip(step.batch.weights, step.states, strict=True):
                w.copy_(torch.where(step.fixing, _soft(w, state), w))


def _beta(w: Tensor, state: WeightState) -> Tensor:
    beta: Tensor | None = state.memory.get("beta")
    return _ratio(*_products(w.detach(), state)) if beta is None else beta


def _soft(w: Tensor, state: WeightState) -> Tensor:
    """S(W)."""
    return masks.soft_threshold(w, state.pattern, state.dims, torch.ones((), device=w.device))


def _products(w: Tensor, state: WeightState) -> tuple[Tensor, Tensor]:
    """<W, S(W)> and <S(W), S(W)>, at least in fp32."""
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    soft = _soft(w, state)
    return (w * soft).sum(), (soft * soft).sum()


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 1.0)
