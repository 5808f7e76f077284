"""The straight-through estimator.

Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation", arXiv 1308.3432, applied to N:M masks by Zhou et al., arXiv 2102.04010, equation 3:

    W <- W - lr * g(W~),   W~ = E * W,   E the N:M mask of W

All weights, dropped ones too, move along the gradient with respect to the masked weight.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from nm_sparsity.core.methods.base import Method, register


@register
@dataclass(frozen=True)
class STE(Method):
    """SR-STE with a decay of zero."""

    name = "ste"
