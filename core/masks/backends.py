"""Which compiled kernel masks a weight."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from nm_sparsity.core.masks import cpu, cuda
from nm_sparsity.core.masks.groups import Dims
from nm_sparsity.core.masks.memory import Lines, lines_in_memory

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}
"""The compiled kernels by device type, with `available`, `select` for one weight, `Rows` for many, `apply_masks_`."""


def backend_of(t: Tensor) -> ModuleType | None:
    """The compiled kernels for tensors where `t` is, or None if there are none."""
    backend = BACKENDS.get(t.device.type)
    return backend if backend is not None and backend.available() else None


def covering(w: Tensor, m: int, dims: Dims) -> tuple[ModuleType, Lines] | None:
    """The compiled kernels that cover `w` with groups of `m` along `dims`, and its lines for them; None if none do."""
    lines = lines_in_memory(w, m, dims)
    if lines is None or (backend := backend_of(w)) is None:
        return None
    return backend, lines


def rounds_to(w: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the kernels write the masked values of a weight of dtype `w` as `dtype` at once."""
    return dtype == w or (w == torch.float32 and dtype in (torch.bfloat16, torch.float16))
