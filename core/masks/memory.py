"""How a weight lies in memory, as the compiled kernels see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nm_sparsity.core.masks.groups import Dims

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of the compiled kernels; the C kernel numbers them in this order."""

GROUP_SIZES = (2, 4, 8, 16, 32)
"""The M of the compiled kernels."""

_Guards: Any = torch._C._dynamo.guards.TensorGuards

Lines = tuple[int, int]
"""``(outer, inner)`` of a weight that is (outer, m, inner) in memory order: a group is one line along m."""


def lines_in_memory(w: Tensor, m: int, dims: Dims) -> Lines | None:
    """The lines of `w` with groups of `m` along the reduction dimensions `dims`.

    None where the compiled kernels do not apply: another dtype or M, gaps in memory (a slice, an expanded view),
    values that lie there with the other sign, reduction dimensions that do not follow each other in memory.
    """
    if w.dtype not in TYPES or m not in GROUP_SIZES or w.is_neg() or not is_dense(w):
        return None
    if not w.numel():
        return 0, 1
    shape, strides = w.shape, w.stride()
    inner = filled = 0
    for d in reversed(dims):
        if shape[d] == 1:
            continue
        if not inner:
            inner = strides[d]
        elif strides[d] != filled:
            return None
        filled = strides[d] * shape[d]
    return w.numel() // (m * inner), inner


def is_dense(t: Tensor) -> bool:
    """Whether `t` fills a stretch of memory, in whatever order of its dimensions."""
    if t.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != filled:
                return False
            filled *= size
    return True


def lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same indices, each at the same offset; the strides of size-1 axes are free."""
    if a.shape != b.shape or a.device != b.device or a.is_neg() or b.is_neg():
        return False
    return a.stride() == b.stride() or all(
        p == q or size == 1 for p, q, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


class Look:
    """Of what dtype, device, sizes and strides tensors are, which one call compares: the guards of compiled graphs.

    They compare more (the type, autocast, whether a gradient is required): that it is not the same proves nothing.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        sizes, strides = ([list(form(t)) for t in tensors] for form in (Tensor.size, Tensor.stride))
        self._check = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors` surely look as these did."""
        return len(tensors) == self._count and bool(self._check(*tensors))
