"""Pure-torch N:M selection: the path that runs everywhere, and the contract that every kernel is tested against.

Along `axis`, entries ``g * m`` to ``g * m + m - 1`` form group ``g``. Exactly ``n`` of each group survive:
the largest magnitudes, the lowest index first among equals, NaN (all NaNs equal) above infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}

PAIRWISE_LIMIT = 8
"""Up to this M, comparing all pairs beats sorting."""


def magnitude_key(w: Tensor) -> Tensor:
    """Integers that order like |w|, with every NaN one above infinity. Same shape as `w`."""
    integer = _INTEGER[w.element_size()]
    infinity = torch.full((), torch.inf, dtype=w.dtype, device=w.device).view(integer)
    return (w.detach().resolve_neg().view(integer) & torch.iinfo(integer).max).clamp_(max=infinity + 1)


def nm_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Boolean mask of the entries of `w` that survive; `w.shape[axis]` is a multiple of `m`."""
    groups = magnitude_key(w).unflatten(axis, (-1, m))
    inner = axis + 1
    if m > PAIRWISE_LIMIT:
        order = groups.argsort(dim=inner, descending=True, stable=True).narrow(inner, 0, n)
        keep = torch.zeros(groups.shape, dtype=torch.bool, device=w.device).scatter_(inner, order, True)
        return keep.flatten(axis, inner)
    keys = groups.unbind(inner)
    ranks = [torch.zeros_like(key, dtype=torch.int8) for key in keys]
    for i in range(m):
        for j in range(i + 1, m):
            later_wins = keys[j] > keys[i]
            ranks[i] += later_wins
            ranks[j] += ~later_wins
    return torch.stack([rank < n for rank in ranks], inner).flatten(axis, inner)


def keep_largest(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """`w` with every dropped entry replaced by +0, in `w`'s own memory format."""
    out = torch.zeros_like(w)
    return torch.where(nm_mask(w, n, m, axis), w, out, out=out)


def soft_threshold(w: Tensor, n: int, m: int, axis: int, scale: Tensor) -> Tensor:
    """`scale` times what is kept, brought towards zero by the largest magnitude that its group drops; the rest is +0.

    Computed in fp32 (fp64 if `w` is) and rounded once.
    """
    size = w.abs().to(torch.promote_types(w.dtype, torch.float32))
    keep, one_more = nm_mask(w, n, m, axis), nm_mask(w, n + 1, m, axis)
    threshold = torch.where(one_more & ~keep, size, 0).unflatten(axis, (-1, m)).amax(axis + 1, keepdim=True)
    rest = (size.unflatten(axis, (-1, m)) - threshold).flatten(axis, axis + 1)
    return torch.where(keep, torch.where(w < 0, -rest, rest) * scale, 0).to(w.dtype)


def dropped(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """`w` with every kept entry replaced by +0: what `keep_largest` takes away."""
    return torch.where(nm_mask(w, n, m, axis), 0, w)


def add_scaled_(target: Tensor, addend: Tensor, scale: float | Tensor) -> Tensor:
    """``target += scale * addend`` in place, in fp32 (fp64 if either is) and rounded once to `target`'s dtype."""
    wide = torch.promote_types(torch.promote_types(target.dtype, addend.dtype), torch.float32)
    return target.copy_(addend.to(wide).mul(scale).add_(target))


def add_dropped_(target: Tensor, w: Tensor, n: int, m: int, axis: int, scale: float | Tensor) -> Tensor:
    """``target += scale * (w - keep_largest(w))``: the SR-STE term, in place, computed as `add_scaled_` does.

    Where an entry is kept, nothing is added, not even if it is infinite.
    """
    return add_scaled_(target, dropped(w, n, m, axis), scale)
