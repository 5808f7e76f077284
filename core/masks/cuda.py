"""The Triton kernel for CUDA tensors; what it does not cover goes to `reference`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from nm_sparsity.core.masks import reference
from nm_sparsity.core.masks.memory import NAN_KEY, memory_layout, same_layout

BLOCK, LEAST_GROUPS = 2048, 128
"""Weights a program handles, 16 a thread; at least one group a thread."""


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _select(result: str, w: Tensor, out: Tensor, n: int, m: int, axis: int, scale: float | Tensor = 0.0) -> bool:
    """Run the kernel into `out`, which lies in memory as `w` does; False where it does not apply."""
    layout = memory_layout(w, m, axis)
    if layout is None or not _has_triton():
        return False
    from nm_sparsity.core.masks import triton_kernel

    outer, inner = layout
    groups, per_program = outer * inner, max(BLOCK // m, LEAST_GROUPS)
    if groups:
        with torch.cuda.device_of(w):
            triton_kernel.select[(-(-groups // per_program),)](
                w,
                out,
                scale,
                groups,
                inner,
                N=n,
                M=m,
                G=per_program,
                NAN_KEY=NAN_KEY[w.dtype],
                RESULT=getattr(triton_kernel, result),
                CONTIGUOUS=inner == 1,
                SCALE_IS_POINTER=isinstance(scale, Tensor),
            )
    return True


def keep_largest(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """See `reference.keep_largest`."""
    out = torch.empty_like(w)
    return out if _select("KEEP", w, out, n, m, axis) else reference.keep_largest(w, n, m, axis)


def nm_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """See `reference.nm_mask`."""
    out = torch.empty_like(w, dtype=torch.bool)
    return out if _select("MASK", w, out.view(torch.int8), n, m, axis) else reference.nm_mask(w, n, m, axis)


def add_dropped_(target: Tensor, w: Tensor, n: int, m: int, axis: int, scale: float | Tensor) -> Tensor:
    """See `reference.add_dropped_`: one pass over both where they lie in memory alike."""
    if not (same_layout(target, w) and _select("ADD_DROPPED", w, target, n, m, axis, scale)):
        reference.add_dropped_(target, w, n, m, axis, scale)
    return target
