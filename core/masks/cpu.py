"""The compiled CPU kernel (`keep_largest.cpp`) through ctypes; what it does not cover goes to `reference`."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from nm_sparsity.core.masks import reference
from nm_sparsity.core.masks.memory import NAN_KEY, memory_layout, same_layout

_KEEP, _MASK, _ADD_DROPPED = range(3)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None (with one warning) where the package was installed without a compiler."""
    folder = Path(__file__).parent
    path = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_cpu{suffix}").exists()), None)
    if path is None:
        warnings.warn(
            "nm_sparsity's compiled CPU kernel is missing (no C++ compiler at install time?): "
            "masks are computed in pure PyTorch, with the same result but several times slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    kernel = ctypes.CDLL(str(path))
    i, i64, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    kernel.nm_select.argtypes = [i, i, pointer, pointer, i64, i, i64, i, i, ctypes.c_float, i]
    return kernel


def _select(result: int, w: Tensor, out: Tensor, n: int, m: int, axis: int, scale: float = 0.0) -> bool:
    """Run the compiled kernel into `out`, which lies in memory as `w` does; False where it does not apply."""
    layout = memory_layout(w, m, axis)
    if layout is None or (kernel := library()) is None:
        return False
    outer, inner = layout
    data, threads = (w.data_ptr(), out.data_ptr()), torch.get_num_threads()
    kernel.nm_select(result, w.element_size(), *data, outer, m, inner, n, NAN_KEY[w.dtype], scale, threads)
    return True


def keep_largest(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """See `reference.keep_largest`."""
    out = torch.empty_like(w)
    return out if _select(_KEEP, w, out, n, m, axis) else reference.keep_largest(w, n, m, axis)


def nm_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """See `reference.nm_mask`."""
    out = torch.empty_like(w, dtype=torch.bool)
    return out if _select(_MASK, w, out, n, m, axis) else reference.nm_mask(w, n, m, axis)


def add_dropped_(target: Tensor, w: Tensor, n: int, m: int, axis: int, scale: float | Tensor) -> Tensor:
    """See `reference.add_dropped_`: one pass over both where they are fp32 and lie in memory alike."""
    fused = target.dtype == w.dtype == torch.float32 and same_layout(target, w)
    if not (fused and _select(_ADD_DROPPED, w, target, n, m, axis, float(scale))):
        reference.add_dropped_(target, w, n, m, axis, scale)
    return target
