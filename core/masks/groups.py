"""How groups lie in a tensor: the one permutation that brings the reduction dimensions to the end, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Dims = tuple[int, ...]


def reduction_size(shape: Sequence[int], dims: Dims) -> int:
    """The number of weights along the reduction dimensions `dims` of a weight of `shape`."""
    size = 1
    for d in dims:  # no generator: torch.compile cannot trace one
        size *= shape[d]
    return size


def reduction_last(w: Tensor, dims: Dims) -> Tensor:
    """`w` with its reduction dimensions moved last and flattened, (*others, reduction); a view where strides allow."""
    others = _others(w.dim(), dims)
    return w.permute(*others, *dims).flatten(len(others))


def restore_order(flat: Tensor, shape: Sequence[int], dims: Dims) -> Tensor:
    """The inverse of `reduction_last` for a weight of `shape`: a view of `flat`."""
    others = _others(len(shape), dims)
    order = (*others, *dims)
    return flat.reshape([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


def _others(rank: int, dims: Dims) -> Dims:
    return tuple(d for d in range(rank) if d not in dims)
