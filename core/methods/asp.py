"""One-shot magnitude masks, then training of what is left.

Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378 (NVIDIA's ASP recipe):
train dense, mask once by magnitude, train again with the mask fixed:

    E fixed;   W <- E * (W - lr * (E * g(W~)))

Deviations: the mask is fixed at the first optimizer step and not at conversion, since engines load the dense
checkpoint in between. No channel permutation search.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nm_sparsity.core.methods.base import Method, register


@register
@dataclass(frozen=True)
class ASP(Method):
    """Starts from a trained dense model; the mask never changes after the first step."""

    name = "asp"
    starts_trained = True
    fix_at: float | None = field(default=0.0, kw_only=True)
