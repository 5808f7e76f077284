"""Sparse-refined straight-through estimator.

Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
ICLR 2021, arXiv 2102.04010, equation 5:

    W <- W - lr * (g(W~) + lambda * (1 - E) * W),   W~ = E * W,   E the N:M mask of W

The decay of the dropped weights keeps them from coming back by chance, so masks settle. A lambda that grows over the
run, ``linear(0, 2e-4)``, is annealed SR-STE: Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive
Sparse Training", arXiv 2407.20584.

Deviations: the term is added to the gradient at the optimizer step and not in backward, so that lambda keeps its
value under loss scaling, gradient accumulation, averaging over ranks and clipping. Without any of these the two agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.methods.base import Method, Step, register
from nm_sparsity.core.methods.schedules import Schedule

AUTO = "auto"
"""In the place of lambda: whoever trains is to choose it."""


@register
@dataclass(frozen=True)
class SRSTE(Method):
    """`decay` is lambda. Its natural scale is lambda * sum(lr): about 6 in the paper's ImageNet run, so short runs
    need a larger lambda (see `nm_sparsity.decay_strength`). "auto" leaves it to the training command, see
    `nm_sparsity.choose_decay`."""

    name = "sr-ste"
    decay: float | Schedule | str = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.decay, str):
            if self.decay != AUTO:
                raise SparsityError(f'decay (lambda) must be a number, a schedule or "{AUTO}", found "{self.decay}"')
            return
        least = self.decay.smallest if isinstance(self.decay, Schedule) else self.decay
        if not (math.isfinite(least) and least >= 0):
            raise SparsityError(f"decay (lambda) must be a finite number >= 0, found {self.decay}")

    def check_complete(self) -> None:
        """As every method's; besides, lambda must have been chosen."""
        super().check_complete()
        if self.decay == AUTO:
            raise SparsityError(
                f'decay="{AUTO}" is chosen by the commands that train; in a loop of your own take 6 / sum(lr) under '
                "SGD, and choose_decay under an adaptive optimizer (docs/choosing.md)"
            )

    def before_step(self, step: Step) -> None:
        step.batch.add_dropped_(step.grads, step.scale * self.now("decay", step.states[0]))
