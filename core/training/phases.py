"""The phases of a run, options of every method: dense first, then moving masks, then a fixed one.

`dense_until` is the fraction of the run before which a layer computes with the dense weight and the method does
nothing. At `fix_at` the mask is fixed for the rest: dropped weights become zero and stay so, hence the largest N of
each group are the kept ones, and a layer's forward needs no mask of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nm_sparsity.core.masks.batched import apply_masks_
from nm_sparsity.core.masks.groups import reduction_last, restore_order
from nm_sparsity.core.methods import Method, Step


def begin(step: Step, method: Method) -> None:
    """Before the method changes gradients: silence it while weights are dense, and tell it of a mask being fixed."""
    first = step.states[0]
    if method.starts_dense:
        step.scale = step.scale * ~first.dense
    if method.fix_at is None:
        return
    _renew(step)
    if method.scheduled:
        fixing = first.steps == first.boundary(max(method.fix_at, method.latest_start))
    else:
        fixing = torch.tensor(step.moves and any("mask" not in state.memory for state in step.states), device="cpu")
    if fixing.is_cpu and not fixing:
        return
    step.fixing = fixing
    for state, mask in zip(step.states, step.batch.nm_mask(), strict=True):
        before = state.memory.get("mask")
        if before is None:
            # On a device that is not asked, a mask is all True until it is fixed.
            state.memory["mask"] = mask if fixing.is_cpu else torch.where(fixing, mask, True)
        elif method.scheduled:
            before.copy_(torch.where(fixing, mask, before))  # in place, for a graph that captured the step


def mask_gradients(step: Step) -> None:
    """After the method changed gradients: a weight that is dropped for good gets none."""
    if step.states[0].method.fix_at is not None:
        _apply(step, step.grads)


def mask_weights(step: Step) -> None:
    """After the update: what momentum from before the mask was fixed moved becomes zero again."""
    if step.states[0].method.fix_at is None:
        return
    _apply(step, step.batch.weights)
    for w, state in zip(step.batch.weights, step.states, strict=True):
        state.settled = state.writes, w._version


def _renew(step: Step) -> None:
    """Give the groups a new mask that hold weights which theirs drops: others than the trained ones were loaded."""
    pairs = list(zip(step.states, step.batch.weights, strict=True))
    written = [i for i, (s, w) in enumerate(pairs) if "mask" in s.memory and s.settled != (s.writes, w._version)]
    if not written:
        return
    fresh = step.batch.nm_mask()
    for i in written:
        state, w = pairs[i]
        tensors = w, state.memory["mask"], fresh[i]
        values, old, new = (reduction_last(t, state.dims).unflatten(-1, (-1, state.pattern.m)) for t in tensors)
        unfit = (values.ne(0) & ~old).any(-1, keepdim=True)
        state.memory["mask"] = restore_order(torch.where(unfit, new, old).flatten(-2), w.shape, state.dims).contiguous()


def _apply(step: Step, targets: Sequence[Tensor | None]) -> None:
    masked = [(t, state.memory) for t, state in zip(targets, step.states, strict=True) if t is not None]
    masked = [(t, memory) for t, memory in masked if "mask" in memory]
    apply_masks_([t for t, _ in masked], [memory["mask"] for _, memory in masked])
