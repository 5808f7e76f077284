"""STEP: Adam's second moment is estimated densely and then held, an option of every method.

Lu, Agrawal, Subramanian, Rybakov, De Sa, Yazdanbakhsh, "STEP: Learning N:M Structured Sparsity Masks from Scratch with
Precondition", arXiv 2302.01172: train dense with Adam until the second moment v has settled at v*, then sparse with

    W <- W - lr * m / (sqrt(v*) + eps),   m the first moment of the gradients g(W~)

It has settled (AutoSwitch) when the mean change |v_t - v_(t-1)| of an entry, averaged geometrically over about
1 / (1 - beta2) steps, is below Adam's eps; not before a tenth of the run, and at half of it at the latest.

So that the optimizer's own update, whichever implementation it is, divides by v*, the moment is set before it to

    v := (v* - (1 - beta2) * g^2) / beta2     which the update takes to     beta2 * v + (1 - beta2) * g^2 = v*

and to v* itself after it. Written back only after the update, v* would have been divided by too late.

Deviations: the average over the window is an exponential one. The test is made for each parameter group of the
optimizer and looks at its sparse weights. The optimizer goes on correcting v* for its bias, by 1 / (1 - beta2^t), which
falls to 1. v lands above v* by up to 1e-6 * (1 - beta2) * g^2 in fp32, so that rounding never takes it below 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.methods import Method, Step
from nm_sparsity.core.methods.base import AUTO_UNTIL

MARGIN = 8
"""How many units of rounding of (1 - beta2) * g^2 the moment lands above the one that is held."""

AUTO_FROM = 0.1
"""The fraction of the run before which "auto" does not hold; it does from `AUTO_UNTIL` on."""


_COUPLED = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)
"""Optimizers with a second moment that add the weight decay to the gradient."""


class Held(NamedTuple):
    """The second moments of a part's weights before the optimizer's update."""

    moments: list[Tensor]
    before: list[Tensor]


def hold(
    step: Step,
    method: Method,
    optimizer: Optimizer,
    group: dict[str, Any],
    moments: Callable[[Optimizer], list[Tensor | None]],
) -> Held | None:
    """Set the second moments so that the update takes them back to what they are, once they are held.

    Args:
        group: the parameter group of the step's weights.
        moments: gives ``exp_avg_sq`` of each weight, of the gradient's shape; None where there is none yet.

    Raises:
        SparsityError: if the optimizer has no second moment; on a CPU also if it has lost that of some weights, which a
            GPU would have to be waited for to tell.
    """
    if method.precondition is None:
        return None
    if "betas" not in group:
        raise SparsityError(
            f"precondition holds Adam's second moment, and {type(optimizer).__name__} has none: use Adam or AdamW, or "
            "dense_until for the dense phase alone"
        )
    beta2 = group["betas"][1]
    if not isinstance(beta2, Tensor) and not beta2:
        raise SparsityError("precondition holds Adam's second moment, and with beta2 = 0 there is none to hold")
    held = ~step.states[0].dense
    if held.is_cpu and not held and method.precondition != "auto":
        return None
    found = [
        (moment, grad, weight)
        for moment, grad, weight in zip(moments(optimizer), step.grads, step.batch.weights, strict=True)
        if moment is not None and grad is not None
    ]
    if held.is_cpu and held and len(found) < sum(grad is not None for grad in step.grads):
        raise SparsityError(
            "precondition holds Adam's second moment, but the optimizer has none of some weights: load its state too "
            "when resuming"
        )
    before = []
    for moment, grad, weight in found:
        g = grad.to(moment.dtype)
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            g = g / scale
        if decay := _l2_penalty(optimizer, group):
            g = g.add(weight, alpha=-decay if group.get("maximize") else decay)  # squared, so its sign is free
        before.append(moment.clone())
        share = (1 - beta2) * (1 - MARGIN * torch.finfo(moment.dtype).eps)
        moment.copy_(torch.where(held, (moment - share * g * g) / beta2, moment))
    return Held([moment for moment, *_ in found], before)


def restore(held: Held | None, step: Step, method: Method, group: dict[str, Any]) -> None:
    """After the update: what is held is exactly as it was; for "auto", see whether it has settled."""
    if held is None:
        return
    holds = ~step.states[0].dense
    if method.precondition == "auto":
        _look(held, step, group)
    for moment, before in zip(held.moments, held.before, strict=True):
        moment.copy_(torch.where(holds, before, moment))


def _look(held: Held, step: Step, group: dict[str, Any]) -> None:
    """AutoSwitch's test, remembered by all weights of the part alike."""
    first, beta2 = step.states[0], group["betas"][1]
    memory = first.memory
    if not held.moments:
        return
    changes = [(m - b).abs().sum(dtype=torch.float32) for m, b in zip(held.moments, held.before, strict=True)]
    total = torch.stack(changes).sum()
    # Filled where the sum is: a copy to the device would end the capture of a graph.
    change, entries = step.over_ranks(
        torch.stack([total, torch.full_like(total, sum(m.numel() for m in held.moments))])
    )
    moved = change > 0  # a step that the optimizer skipped is none
    after = first.steps + moved
    if "held" not in memory:
        memory.update(log_change=torch.zeros_like(total), samples=torch.zeros_like(after), held=after < 0)
    mean, count, holds = memory["log_change"], memory["samples"], memory["held"]
    # In place, where a graph that captured the step finds them at the next.
    mean.copy_(torch.where(moved, mean.lerp((change / entries).log(), 1 - beta2), mean))
    count.add_(moved)
    # The average began at 0; dividing by its weights so far corrects that.
    settled = (mean / (1 - beta2**count) < math.log(group["eps"] or 1e-300)) & (after >= first.boundary(AUTO_FROM))
    holds.logical_or_(settled | (after >= first.boundary(AUTO_UNTIL)))
    for state in step.states:
        state.memory.update(log_change=mean, samples=count, held=holds)


def _l2_penalty(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """The weight decay that the optimizer adds to the gradient, and so to what it squares."""
    coupled = isinstance(optimizer, _COUPLED) and not isinstance(optimizer, torch.optim.AdamW)
    return float(group.get("weight_decay", 0.0)) if coupled and not group.get("decoupled_weight_decay") else 0.0
