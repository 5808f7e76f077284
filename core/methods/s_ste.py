"""S-STE: a continuous projection to N:M, so that masks do not oscillate.

Hu, Zhu, Chen, "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training", arXiv 2409.09099:

    W <- W - lr * g(W~),   W~ = beta * S(W),   S(w) = sign(w) * max(0, |w| - t)

t is the (N+1)th largest magnitude of the group of w, and beta = <W, S(W)> / <S(W), S(W)>, which makes beta * S(W) as
near to W as it can be, is that of the weight tensor at the first optimizer step for the whole run.

Deviations: the paper's matrix products in FP8 and its unbiased estimator of 2:4 activation gradients, which save time,
are left out. Any N:M. The finalized weights are W~.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nm_sparsity.core import masks
from nm_sparsity.core.masks.groups import reduction_last, restore_order
from nm_sparsity.core.methods.base import Method, Step, WeightState, register
from nm_sparsity.core.pattern import NMPattern


@register
@dataclass(frozen=True)
class SSTE(Method):
    """No hyperparameters. The shadow weights are dense; the value is N:M, but no selection of them."""

    name = "s-ste"

    def value(self, w: Tensor, state: WeightState) -> Tensor:
        soft = soft_threshold(w, state)
        beta = state.memory["beta"] if "beta" in state.memory else _ratio(*_products(w.detach(), soft))
        return soft * beta.to(w)

    def before_step(self, step: Step) -> None:
        new = [i for i, state in enumerate(step.states) if "beta" not in state.memory]
        if new and step.moves:
            weights = [step.batch.weights[i] for i in new]
            soft = [soft_threshold(w, step.states[i]) for i, w in zip(new, weights, strict=True)]
            products = [torch.stack(_products(w, s)) for w, s in zip(weights, soft, strict=True)]
            for i, sums in zip(new, step.over_ranks(torch.stack(products)), strict=True):
                step.states[i].memory["beta"] = _ratio(*sums)
        if step.fixing is not None:
            for w, state in zip(step.batch.weights, step.states, strict=True):
                w.copy_(torch.where(step.fixing, soft_threshold(w, state), w))


def soft_threshold(w: Tensor, state: WeightState) -> Tensor:
    """S(W), in the shape of `w`."""
    pattern, dims = state.pattern, state.dims
    w = w.detach()
    kept = masks.keep_largest(w, pattern, dims)
    one_more = w if pattern.n + 1 == pattern.m else masks.keep_largest(w, NMPattern(pattern.n + 1, pattern.m), dims)
    # The two differ by the (N+1)th largest alone.
    groups = reduction_last(kept, dims).unflatten(-1, (-1, pattern.m))
    next_one = (reduction_last(one_more, dims).unflatten(-1, (-1, pattern.m)) - groups).abs().amax(-1, keepdim=True)
    return restore_order((groups - groups.sign() * next_one).flatten(-2), w.shape, dims)


def _products(w: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """<W, S(W)> and <S(W), S(W)>, at least in fp32."""
    wide = torch.promote_types(w.dtype, torch.float32)
    w, soft = w.to(wide), soft.to(wide)
    return (w * soft).sum(), (soft * soft).sum()


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 1.0)
