"""One-shot magnitude masks, then training of what is left.

Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378 (NVIDIA's ASP recipe):
train dense, mask once by magnitude, train again with the mask fixed:

    E fixed;   W <- E * (W - lr * (E * g(W~)))

Deviations: the mask is fixed at the first optimizer step and not at conversion, since engines load the dense
checkpoint in between. No channel permutation search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nm_sparsity.core.masks.batched import apply_masks_
from nm_sparsity.core.methods.base import Method, Step, register


@register
@dataclass(frozen=True)
class ASP(Method):
    """Starts from a trained dense model; the mask never changes after the first step.

    Dropped weights are zero from then on, so the largest N of each group are the kept ones, and the layer's forward
    needs no mask of its own.
    """

    name = "asp"
    starts_trained = True

    def before_step(self, step: Step) -> None:
        new = [i for i, state in enumerate(step.states) if "mask" not in state.memory]
        if new and step.moves:
            masks = step.batch.nm_mask()
            for i in new:
                step.states[i].memory["mask"] = masks[i]
            apply_masks_([step.batch.weights[i] for i in new], [masks[i] for i in new])
        _apply(step, step.grads)

    def after_step(self, step: Step) -> None:
        # Momentum from before the mask was fixed would move dropped weights off zero.
        _apply(step, step.batch.weights)


def _apply(step: Step, targets: Sequence[Tensor | None]) -> None:
    masked = [(t, state.memory) for t, state in zip(targets, step.states, strict=True) if t is not None]
    masked = [(t, memory) for t, memory in masked if "mask" in memory]
    for t, memory in masked:
        memory["mask"] = memory["mask"].to(t.device)  # one from a file lies on the CPU
    apply_masks_([t for t, _ in masked], [memory["mask"] for _, memory in masked])
