"""Masks along any reduction dimensions, against a brute force over all combinations and a stable argsort."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nm_sparsity.core import SparsityError, keep_largest, masks, nm_mask, satisfies
from nm_sparsity.core.masks import count_violations

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), -float("inf"), float("nan")]


def groups_of(shape: tuple[int, ...], dims: tuple[int, ...], m: int) -> list[list[tuple[int, ...]]]:
    """The indices of each group, walked entry by entry."""
    others = [d for d in range(len(shape)) if d not in dims]
    result = []
    for outer in itertools.product(*(range(shape[d]) for d in others)):
        line = []
        for inner in itertools.product(*(range(shape[d]) for d in dims)):
            index = [0] * len(shape)
            for d, i in zip([*others, *dims], [*outer, *inner], strict=True):
                index[d] = i
            line.append(tuple(index))
        result += [line[i : i + m] for i in range(0, len(line), m)]
    return result


def order(value: float) -> float:
    return math.inf if math.isnan(value) else abs(value) if math.isfinite(value) else 1e300


def brute_force(w: Tensor, n: int, m: int, dims: tuple[int, ...]) -> Tensor:
    """Of all ways to keep n of m, the one of largest sorted magnitudes, the first in index order among equals."""
    mask = torch.zeros(w.shape, dtype=torch.bool)
    for group in groups_of(tuple(w.shape), dims, m):
        best = max(
            itertools.combinations(range(m), n),
            key=lambda kept: (sorted((order(float(w[group[i]])) for i in kept), reverse=True), [-i for i in kept]),
        )
        for i in best:
            mask[group[i]] = True
    return mask


def stable_sort(w: Tensor, n: int, m: int, dims: tuple[int, ...]) -> Tensor:
    others = [d for d in range(w.dim()) if d not in dims]
    moved = w.permute(*others, *dims)
    groups = moved.reshape(-1, m).abs()
    kept = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).reshape(moved.shape)
    return mask.permute([[*others, *dims].index(d) for d in range(w.dim())])


CASES = [
    ((3, 8), (1,)),
    ((2, 8, 3, 3), (1,)),
    ((2, 4, 2, 2), (1, 2, 3)),
    ((8, 2, 3), (0,)),
    ((4, 3, 2, 2), (0, 2, 3)),
    ((2, 8, 1, 1), (1, 2, 3)),
]


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    n=st.integers(1, 3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    channels_last=st.booleans(),
    data=st.data(),
)
def test_mask_is_the_brute_force_best(
    case: tuple[tuple[int, ...], tuple[int, ...]], n: int, dtype: torch.dtype, channels_last: bool, data: st.DataObject
) -> None:
    shape, dims = case
    values = st.one_of(st.sampled_from(SPECIAL), st.floats(-4, 4, width=16))
    size = math.prod(shape)
    w = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    if channels_last and w.dim() == 4:
        w = w.to(memory_format=torch.channels_last)
    expected = brute_force(w, n, 4, dims)
    assert torch.equal(nm_mask(w, f"{n}:4", dims), expected)
    kept = keep_largest(w, f"{n}:4", dims)
    assert torch.equal(kept.nan_to_num(7, 8, 9), torch.where(expected, w, 0).nan_to_num(7, 8, 9))
    assert not torch.signbit(kept[~expected]).any()
    assert kept.dtype == dtype


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (2, 4, 8, 16, 32) for n in range(1, m)] + [(2, 3), (5, 7)])
def test_mask_is_the_stable_sort_for_every_pattern(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n * 100 + m)
    # Few distinct values: most groups have ties.
    w = torch.randint(-3, 4, (6, 2 * m, 2, 3), generator=generator).float()
    for dims in [(1,), (1, 2, 3)]:
        assert torch.equal(nm_mask(w, f"{n}:{m}", dims), stable_sort(w, n, m, dims))
    transposed = w.transpose(0, 1).contiguous()
    assert torch.equal(nm_mask(transposed, f"{n}:{m}", (0,)), stable_sort(transposed, n, m, (0,)))


def test_gradient_passes_straight_through_to_dropped_entries() -> None:
    w = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 8, dtype=torch.float64)
    keep_largest(w, "1:4").backward(upstream)
    assert torch.equal(w.grad, upstream)


@settings(max_examples=50, deadline=None)
@given(case=st.sampled_from(CASES), n=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_add_dropped_adds_the_formula(case: tuple[tuple[int, ...], tuple[int, ...]], n: int, seed: int) -> None:
    shape, dims = case
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    for target, weight in [(grad.clone(), w), (grad.clone(), w.transpose(0, 1).contiguous().transpose(0, 1))]:
        expected = target + 0.3 * (1 - nm_mask(w, f"{n}:4", dims).double()) * w
        returned = masks.add_dropped_(target, weight, f"{n}:4", dims, 0.3)
        assert returned is target
        torch.testing.assert_close(target, expected, rtol=1e-15, atol=1e-15)


def test_add_dropped_leaves_kept_infinities_alone() -> None:
    w = torch.full((1, 2, 1, 2), 1.0)
    w[0, 0, 0, 0] = torch.inf
    for dims in [(1, 2, 3), (1,)]:
        target = masks.add_dropped_(torch.zeros_like(w), w, "1:2", dims, 0.5)
        assert not target.isnan().any()


def test_satisfies_counts_nonzeros_in_groups() -> None:
    w = torch.zeros(2, 8)
    w[0, :2] = 1
    w[1, 4:6] = torch.nan
    assert satisfies(w, "2:4")
    w[0, 3] = -1
    assert not satisfies(w, "2:4")
    assert masks.count_violations(w, "2:4") == 1
    assert masks.count_violations(w, "1:4") == 2
    assert satisfies(w, "3:4")


def test_refuses_sizes_and_types_that_have_no_groups() -> None:
    with pytest.raises(SparsityError, match=r"reduction size 10 .* not a multiple of M = 4"):
        nm_mask(torch.zeros(4, 10), "2:4")
    with pytest.raises(SparsityError, match=r"floating-point weight, found torch\.int32"):
        keep_largest(torch.zeros(4, 8, dtype=torch.int32), "2:4")


def test_dimensions_are_counted_from_the_end_too() -> None:
    w = torch.randn(4, 6, 8)
    for dims, same in (((-1,), (2,)), ((-2, -1), (1, 2)), ((0, -1), (0, 2))):
        assert torch.equal(nm_mask(w, "2:4", dims), nm_mask(w, "2:4", same))
        assert torch.equal(keep_largest(w, "2:4", dims), keep_largest(w, "2:4", same))
        assert count_violations(keep_largest(w, "2:4", same), "2:4", dims) == 0
