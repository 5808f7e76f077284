"""What the compiled kernels share: how a weight lies in memory, and how magnitudes compare as integers."""

from __future__ import annotations

import torch
from torch import Tensor

NAN_KEY = {torch.float32: 0x7F800001, torch.bfloat16: 0x7F81, torch.float16: 0x7C01}
"""The dtypes of the compiled kernels, and the magnitude bits that stand for any NaN: infinity's plus one."""

GROUP_SIZES = (2, 4, 8, 16, 32)
"""The M of the compiled kernels."""


def memory_layout(w: Tensor, m: int, axis: int) -> tuple[int, int] | None:
    """``(outer, inner)`` such that `w` is (outer, m, inner) in memory order, and a group is one line along m.

    None where the compiled kernels do not apply: another dtype or M, gaps in memory (a slice, an expanded view).
    """
    if w.dtype not in NAN_KEY or m not in GROUP_SIZES:
        return None
    if not (w.is_contiguous() or (w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last))):
        filled = 1
        for stride, size in sorted(zip(w.stride(), w.shape, strict=True)):
            if stride != filled and size != 1:
                return None
            filled *= size
    inner = w.stride(axis)
    return w.numel() // (m * inner), inner


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether an index means one offset in two equally shaped tensors; the strides of size-1 axes are free."""
    return a.stride() == b.stride() or all(
        p == q or size == 1 for p, q, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )
