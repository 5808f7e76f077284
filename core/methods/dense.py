"""Dense training: the baseline that shares every path with the sparse methods."""

from __future__ import annotations

from dataclasses import dataclass

from nm_sparsity.core.methods.base import Method, register


@register
@dataclass(frozen=True)
class Dense(Method):
    """No layer is converted; `finalize` finds nothing to do, and `verify` refuses what has no sparse weight."""

    name = "dense"
    trains_sparse = False
