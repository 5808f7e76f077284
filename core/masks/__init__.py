"""N:M masks of a weight: what is kept of it, which entries those are, and whether it has the pattern.

A group is `m` consecutive entries of the flattening of the *reduction dimensions* `dims`, the other dimensions fixed.
``dims=(1,)``: consecutive input channels of a filter or input features of a linear layer (the channel layout);
``dims=(1, 2, 3)``: consecutive weights of a filter flattened as (C_in/groups, kh, kw) (the kernel layout);
``dims=(0,)``: consecutive input channels of a transposed convolution, whose weight is (C_in, C_out/groups, kh, kw).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.masks import ops
from nm_sparsity.core.masks.batched import Batch
from nm_sparsity.core.masks.groups import Dims, reduction_last, reduction_size, restore_order
from nm_sparsity.core.pattern import NMPattern, Placement


def keep_largest(w: Tensor, pattern: str | NMPattern, dims: Dims = (1,), dtype: torch.dtype | None = None) -> Tensor:
    """`w` with exactly N of every group kept and the others +0; the gradient passes straight through to all of `w`.

    The largest magnitudes survive, the lowest index among equals, NaN before infinity. With `dtype` the result is
    rounded to it.

    Raises:
        SparsityError: if `w` or `dtype` is not floating point, `dims` are not dimensions of `w`, or the reduction size
            is not a multiple of M.
    """
    n, m, dims = _check(w, pattern, dims)
    if dtype is not None and not dtype.is_floating_point:
        raise SparsityError(f"masked values are rounded to a floating-point dtype, found {dtype}")
    return _along(dims, w, lambda w, axis: ops.keep_largest(w, n, m, axis, dtype))


def soft_threshold(w: Tensor, pattern: str | NMPattern, dims: Dims, scale: Tensor) -> Tensor:
    """`keep_largest` brought towards zero by the largest magnitude that its group drops, times `scale`, a 0-dim tensor.

    It has no gradient.
    """
    n, m, dims = _check(w, pattern, dims)
    if scale.dim():
        raise SparsityError(f"the scale of a weight is a 0-dim tensor, found one of shape {tuple(scale.shape)}")
    return _along(dims, w, lambda w, axis: ops.soft_threshold(w, n, m, axis, scale))


def nm_mask(w: Tensor, pattern: str | NMPattern, dims: Dims = (1,)) -> Tensor:
    """Boolean mask of the entries that `keep_largest` keeps, in the shape of `w`."""
    n, m, dims = _check(w, pattern, dims)
    return _along(dims, w.detach(), lambda w, axis: ops.nm_mask(w, n, m, axis))


def add_dropped_(target: Tensor, w: Tensor, pattern: str | NMPattern, dims: Dims, scale: float | Tensor) -> Tensor:
    """``target += scale * (1 - mask) * w`` in place, without autograd: the SR-STE term. Returns `target`.

    `scale` is a number or a 0-dim tensor on `w`'s device.
    """
    n, m, dims = _check(w, pattern, dims)
    Batch([w], [Placement(NMPattern(n, m), dims)]).add_dropped_([target], scale)
    return target


def satisfies(w: Tensor, pattern: str | NMPattern, dims: Dims = (1,)) -> bool:
    """Whether no group of `w` has more than N non-zeros."""
    return count_violations(w, pattern, dims) == 0


def count_violations(w: Tensor, pattern: str | NMPattern, dims: Dims = (1,)) -> int:
    """The number of groups of `w` with more than N non-zeros (NaN counts as a non-zero)."""
    n, m, dims = _check(w, pattern, dims)
    groups = reduction_last(w.detach(), dims).unflatten(-1, (-1, m))
    return int((groups.ne(0).sum(-1) > n).sum())


def group_count(w: Tensor, pattern: str | NMPattern) -> int:
    """The number of groups of `w`."""
    return w.numel() // NMPattern.parse(pattern).m


def _along(dims: Dims, w: Tensor, masked: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What `masked` makes of `w` along an axis, for groups along one dimension or several."""
    if len(dims) == 1:
        return masked(w, dims[0])
    return restore_order(masked(reduction_last(w, dims), w.dim() - len(dims)), w.shape, dims)


def _check(w: Tensor, pattern: str | NMPattern, dims: Dims) -> tuple[int, int, Dims]:
    """N, M and `dims` counted from 0."""
    pattern = NMPattern.parse(pattern)
    if not isinstance(w, Tensor):
        raise SparsityError(f"an N:M mask needs a tensor, found {type(w).__name__}")
    if w.layout != torch.strided:
        raise SparsityError(f"an N:M mask needs a dense tensor, found one of layout {w.layout}")
    shape, rank = w.shape, w.dim()
    given = dims if isinstance(dims, (tuple, list)) else ()
    places = tuple([d % rank for d in given if type(d) is int and -rank <= d < rank])
    if not places or len(set(places)) < len(given):
        raise SparsityError(f"dims are different dimensions, as (1,), of a weight of {tuple(shape)}; found {dims!r}")
    size = reduction_size(shape, places)
    if size % pattern.m:
        raise SparsityError(
            f"the reduction size {size} (dimensions {dims} of shape {tuple(shape)}) is not a multiple of "
            f"M = {pattern.m}; choose a pattern whose M divides it or leave the weight dense"
        )
    if not w.dtype.is_floating_point or w.dtype.itemsize < 2:
        raise SparsityError(f"an N:M mask needs a floating-point weight, found {w.dtype}; of 16 bits or more")
    return pattern.n, pattern.m, places
