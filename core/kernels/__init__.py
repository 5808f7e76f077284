"""The mask kernels behind one op, ``nm_sparsity::keep_largest``, which picks a backend by device.

Every backend fulfils the contract in `reference`. `w` is a dense floating-point tensor of any memory format whose
`axis` has a size divisible by `m`; callers (`nm_sparsity.core.masks`) have checked that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nm_sparsity.core.kernels import reference

_library = torch.library.Library("nm_sparsity", "DEF")
_library.define("keep_largest(Tensor w, int n, int m, int axis) -> Tensor")
_library.impl("keep_largest", reference.keep_largest, "CompositeExplicitAutograd")


@torch.library.register_fake("nm_sparsity::keep_largest", lib=_library)
def _fake(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    return torch.empty_like(w)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


torch.library.register_autograd("nm_sparsity::keep_largest", _straight_through, lib=_library)


def keep_largest(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """`w` with all but the `n` largest of every `m` entries along `axis` set to +0.

    Gradients pass straight through, to dropped entries too (Bengio et al., arXiv 1308.3432).
    """
    result: Tensor = torch.ops.nm_sparsity.keep_largest(w, n, m, axis)
    return result


def nm_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Boolean mask of what `keep_largest` keeps."""
    return reference.nm_mask(w, n, m, axis)


def add_dropped_(target: Tensor, w: Tensor, n: int, m: int, axis: int, scale: float | Tensor) -> Tensor:
    """``target += scale * (w - keep_largest(w))`` in place, without autograd; returns `target`."""
    with torch.no_grad():
        return reference.add_dropped_(target, w, n, m, axis, scale)
