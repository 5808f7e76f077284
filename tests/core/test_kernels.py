"""One contract, every backend: the pure-torch reference, the compiled CPU kernel, Triton (interpreted), the ops."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nm_sparsity.core import NMPattern, SparsityError, keep_largest
from nm_sparsity.core.masks import backends, cpu, cuda, ops, reference
from nm_sparsity.core.masks.batched import Batch, apply_masks_
from nm_sparsity.core.masks.memory import is_dense, lines_in_memory
from nm_sparsity.core.pattern import Placement

GROUP_SIZES = [2, 4, 8, 16, 32]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Backend:
    """The kernels under test, in the place of those for CPU tensors."""

    def __init__(self, name: str, module: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = name
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(backends, "BACKENDS", {} if module is None else {"cpu": module})

    @contextmanager
    def alone(self, covered: bool = True) -> Iterator[None]:
        """What compiled kernels cover fails here when it reaches the reference."""

        def refuse(*args: object) -> Tensor:
            raise AssertionError(f"the {self.name} kernel handed its work to the reference")

        with self._monkeypatch.context() as patch:
            if covered and self.name != "reference":
                for name in ("keep_largest", "nm_mask", "dropped", "soft_threshold"):
                    patch.setattr(reference, name, refuse)
            yield


@pytest.fixture(scope="module")
def interpreted_triton() -> Iterator[ModuleType]:
    """`cuda` with Triton's interpreter under it: it runs on CPU tensors, slowly."""
    triton = pytest.importorskip("triton")
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    kernel = importlib.import_module("nm_sparsity.core.masks.triton_kernel")
    importlib.reload(kernel)
    with pytest.MonkeyPatch.context() as patch:
        # There is no device to make current.
        patch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
        yield cuda
    triton.knobs.runtime.interpret = before
    importlib.reload(kernel)


@pytest.fixture(params=["reference", "compiled", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    module = None
    if request.param == "compiled":
        if cpu.library() is None:
            pytest.skip("the compiled kernel is not installed")
        module = cpu
    elif request.param == "triton":
        module = request.getfixturevalue("interpreted_triton")
    return Backend(request.param, module, monkeypatch)


def oracle_mask(w: Tensor, n: int, m: int, dims: tuple[int, ...]) -> Tensor:
    """A stable sort of each group in plain Python."""

    def keep(group: list[float]) -> list[bool]:
        order = sorted(range(m), key=lambda i: (not math.isnan(group[i]), -abs(group[i])))
        return [i in order[:n] for i in range(m)]

    others = [d for d in range(w.dim()) if d not in dims]
    moved = w.double().permute(*others, *dims)
    flat = [keep(group) for group in moved.reshape(-1, m).tolist()]
    mask = torch.tensor(flat, dtype=torch.bool).reshape(moved.shape)
    return mask.permute([[*others, *dims].index(d) for d in range(w.dim())])


def bits(w: Tensor) -> Tensor:
    """The raw bits, so that NaNs and signed zeros compare."""
    return w.detach().contiguous().view(INTEGER[w.element_size()])


def awkward(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values with many ties, zeros of both signs, subnormals, infinities and NaNs of several payloads and signs."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGER[dtype.itemsize]
    w = torch.randn(shape, generator=generator).to(dtype)
    inf = torch.full((), torch.inf, dtype=dtype).view(integer)
    nans = [(inf + payload).view(dtype) for payload in (1, 3, 7)]
    tiny = torch.ones((), dtype=integer).view(dtype)
    pool = [0.0, -0.0, 0.5, -0.5, 0.25, 1.0, -1.0, tiny, -tiny, math.inf, -math.inf, *nans, -nans[0], -nans[2]]
    special = torch.stack([torch.as_tensor(value, dtype=dtype) for value in pool])
    chosen = special[torch.randint(len(pool), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.5, w, chosen)


def placement(n: int, m: int, *dims: int) -> Placement:
    return Placement(NMPattern(n, m), dims or (1,))


LAYOUTS: dict[str, Callable[[int], tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor], Tensor]]]] = {
    "linear": lambda m: ((3, 2 * m), (1,), lambda w: w),
    "transposed": lambda m: ((2 * m, 3), (1,), lambda w: w.t()),
    "conv1d": lambda m: ((2, 2 * m, 3), (1,), lambda w: w),
    "conv2d": lambda m: ((2, m, 3, 3), (1,), lambda w: w),
    "channels_last": lambda m: ((2, 2 * m, 3, 2), (1,), lambda w: w.to(memory_format=torch.channels_last)),
    "conv3d_channels_last": lambda m: ((2, m, 2, 1, 2), (1,), lambda w: w.to(memory_format=torch.channels_last_3d)),
    "pointwise": lambda m: ((5, m, 1, 1), (1,), lambda w: w.to(memory_format=torch.channels_last)),
    "conv_transpose": lambda m: ((2 * m, 3, 2, 2), (0,), lambda w: w),
    "kernel": lambda m: ((3, m, 3, 1), (1, 2, 3), lambda w: w),
    "kernel_pointwise": lambda m: ((3, m, 1, 1), (1, 2, 3), lambda w: w.to(memory_format=torch.channels_last)),
    "kernel_channels_last": lambda m: ((3, m, 3, 2), (1, 2, 3), lambda w: w.to(memory_format=torch.channels_last)),
    "kernel_transpose": lambda m: ((m, 3, 2, 2), (0, 2, 3), lambda w: w),
    "slice": lambda m: ((4, 2 * m), (1,), lambda w: w[::2]),
    "odd_offset": lambda m: ((3 * m + 1,), (1,), lambda w: w[1:].view(3, m)),
    "one_group": lambda m: ((1, m), (1,), lambda w: w),
    "empty": lambda m: ((0, m), (1,), lambda w: w),
}
UNCOVERED = {"slice", "kernel_channels_last", "kernel_transpose"}
"""Gaps in memory, or a reduction that jumps in it."""


def check(backend: Backend, w: Tensor, n: int, m: int, dims: tuple[int, ...] = (1,)) -> None:
    before, expected = bits(w).clone(), oracle_mask(w, n, m, dims)
    batch = Batch([w], [placement(n, m, *dims)])
    with backend.alone(lines_in_memory(w, m, dims) is not None):
        results = [(batch.keep_largest()[0], batch.nm_mask()[0])]
        if len(dims) == 1:
            results.append((ops.keep_largest(w, n, m, *dims), ops.nm_mask(w, n, m, *dims)))
    assert torch.equal(bits(w), before)
    for kept, mask in results:
        assert kept.dtype == w.dtype
        assert mask.dtype == torch.bool
        assert torch.equal(mask, expected)
        assert torch.equal(bits(kept), torch.where(expected, bits(w), 0))  # the same bits, or +0
    if is_dense(w):
        assert all(result.stride() == w.stride() for result in results[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [4, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_memory_layout(backend: Backend, layout: str, m: int, dtype: torch.dtype) -> None:
    m = min(m, 8) if backend.name == "triton" else m  # the interpreter is slow
    shape, dims, arrange = LAYOUTS[layout](m)
    check(backend, arrange(awkward(shape, dtype)), m // 2, m, dims)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_cover_what_they_promise(layout: str) -> None:
    for m, dtype in itertools.product(GROUP_SIZES, DTYPES):
        shape, dims, arrange = LAYOUTS[layout](m)
        covered = lines_in_memory(arrange(torch.zeros(shape, dtype=dtype)), m, dims) is not None
        assert covered == (layout not in UNCOVERED and dtype != torch.float64)


@pytest.mark.parametrize("m", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["contiguous", "strided"])
def test_every_n(backend: Backend, m: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    quick = backend.name == "triton" and (m > 8 or dtype != torch.float32)  # the interpreter is slow
    for n in {m // 2} if quick else range(1, m):
        check(backend, awkward((shape[0], 2 * m, *shape[1:]), dtype, seed=n), n, m)


@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 5), (3, 7), (5, 12), (9, 33), (40, 64)])
def test_other_group_sizes_take_the_reference(backend: Backend, n: int, m: int) -> None:
    check(backend, awkward((3, 2 * m)), n, m)


@pytest.mark.parametrize("shape", [(300, 20), (7, 12, 5, 5), (7, 12, 3, 3), (2, 4, 600), (2, 4, 257)])
def test_more_groups_than_a_tile(backend: Backend, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(backend, awkward(shape, dtype), 2, 4)


def mixed(backend: Backend) -> tuple[list[Tensor], list[Placement]]:
    """Every layout, dtype and several patterns in one batch, alike ones apart, with a duplicate."""
    weights, placements = [], []
    sizes = (2, 3) if backend.name == "triton" else (4, 8, 3)  # the interpreter is slow
    for i, (layout, m, dtype) in enumerate(itertools.product(LAYOUTS, sizes, DTYPES)):
        shape, dims, arrange = LAYOUTS[layout](m)
        weights.append(arrange(awkward(shape, dtype, seed=i)))
        placements.append(placement(1, m, *dims))
    return [*weights, weights[0]], [*placements, placements[0]]


def test_a_mixed_batch_gives_what_each_weight_gives(backend: Backend) -> None:
    weights, placements = mixed(backend)
    batch = Batch(weights, placements)
    for w, (pattern, dims), kept, mask in zip(weights, placements, batch.keep_largest(), batch.nm_mask(), strict=True):
        expected = oracle_mask(w, pattern.n, pattern.m, dims)
        assert torch.equal(mask, expected)
        assert torch.equal(bits(kept), torch.where(expected, bits(w), 0))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert {kept.dtype for kept in batch.keep_largest(dtype)} == {dtype}
    nothing = Batch([], [])
    assert nothing.keep_largest() == nothing.nm_mask() == []
    nothing.add_dropped_([], 0.1)
    assert nothing.update_masks_([]).shape == (0,)


def test_the_default_device_is_nobodys_business(backend: Backend) -> None:
    w, other, target = torch.randn(8, 16), torch.randn(4, 8), torch.zeros(8, 16)
    mask = oracle_mask(w, 2, 4, (1,))
    with torch.device("meta"):
        batch = Batch([w, other], [placement(2, 4)] * 2)
        kept, _ = batch.keep_largest()
        batch.add_dropped_([target, None], 0.5)
        other_mask = batch.nm_mask()[1]
        apply_masks_([other], [other_mask])
        changes = batch.update_masks_([mask.clone(), ~other_mask])
    assert torch.equal(bits(kept), torch.where(mask, bits(w), 0))
    assert torch.equal(target, 0.5 * torch.where(mask, 0.0, w))
    assert changes.tolist() == [0, other.numel()]


def test_five_thousand_weights() -> None:
    w = awkward((5000, 3, 8))
    weights = [part.t().contiguous().t() if i % 2 else part.clone() for i, part in enumerate(w)]
    expected = torch.where(oracle_mask(w, 2, 4, (2,)), bits(w), 0)
    kept = Batch(weights, [placement(2, 4)] * len(weights)).keep_largest()
    assert torch.equal(torch.stack([bits(value) for value in kept]), expected)


def test_results_beyond_two_billion_entries(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("has no table")
    module, w, start = backends.BACKENDS["cpu"], awkward((16, 64), torch.bfloat16), 2**31 + 512
    out = torch.empty(start + w.numel(), dtype=torch.bfloat16)  # never touched but at its end
    module.Rows([w], [(256, 1)], [0], 2, 4).run("keep", out, [start], torch.bfloat16)
    assert torch.equal(bits(out[start:]), torch.where(oracle_mask(w, 2, 4, (1,)), bits(w), 0).flatten())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same(threads: int) -> None:
    shapes = [(64, 512), (4, 4), (32, 64, 3, 3), *[(32, 32)] * 40, (0, 8)]
    weights, before = [awkward(shape, seed=i) for i, shape in enumerate(shapes)], torch.get_num_threads()
    batch = Batch(weights, [placement(2, 4)] * len(weights))
    masks = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    torch.set_num_threads(threads)
    try:
        kept, changed = batch.keep_largest(), batch.update_masks_(masks)
    finally:
        torch.set_num_threads(before)
    assert changed.tolist() == [w.numel() // 2 for w in weights]
    for w, value in zip(weights, kept, strict=True):
        assert torch.equal(bits(value), bits(reference.keep_largest(w, 2, 4, 1)))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_no_other_choice_keeps_more(data: st.DataObject) -> None:
    m = data.draw(st.sampled_from([2, 4, 8]))
    n = data.draw(st.integers(1, m - 1))
    group = data.draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=m, max_size=m))
    w = torch.tensor([group])
    mask = ops.nm_mask(w, n, m, 1)
    best = max(
        sorted((abs(w[0, i].item()) for i in chosen), reverse=True) for chosen in itertools.combinations(range(m), n)
    )
    assert int(mask.sum()) == n
    assert sorted(w[mask].abs().tolist(), reverse=True) == best


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(16384, 4), (1820, 4, 9)], ids=["contiguous", "strided"])
def test_half_precision_values_round_as_torch_rounds(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Kept are the values of both dtypes, the midpoints between them, their neighbours, and random bits."""
    if backend.name == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bf16 off; tests/gpu has it on a GPU")
    generator = torch.Generator().manual_seed(0)
    size = math.prod(shape)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float().view(torch.int32)
    half_a_step = 2**12 if dtype == torch.float16 else 2**15
    near = every[torch.randint(len(every), (size,), generator=generator)]
    near += torch.tensor([0, half_a_step, half_a_step - 1, half_a_step + 1, 1, -1]).repeat(size)[:size].int()
    anything = torch.randint(-(2**31), 2**31, (size,), generator=generator).int()
    w = torch.where(torch.rand(size, generator=generator) < 0.5, near, anything).view(torch.float32).view(shape)
    with backend.alone():
        (kept,) = Batch([w], [placement(3, 4)]).keep_largest(dtype)
        single = ops.keep_largest(w, 3, 4, 1, dtype)
    expected = torch.where(oracle_mask(w, 3, 4, (1,)), w, 0).to(dtype)
    for result in (kept, single):
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(bits(result.nan_to_num(0)), bits(expected.nan_to_num(0)))


def oracle_soft(w: Tensor, n: int, m: int, dims: tuple[int, ...], scale: Tensor) -> Tensor:
    """Each group's largest dropped magnitude from a sort in plain Python, the rest in fp32 (fp64), rounded once."""
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    others = [d for d in range(w.dim()) if d not in dims]
    groups = wide.permute(*others, *dims).reshape(-1, m)
    ordered = [sorted(map(abs, g), key=lambda x: (not math.isnan(x), -x)) for g in groups.tolist()]
    threshold = torch.tensor([[(*g, 0.0)[n]] for g in ordered], dtype=wide.dtype).view(-1, 1)
    rest = (groups.abs() - threshold) * scale
    moved = torch.where(groups < 0, -rest, rest).reshape(wide.permute(*others, *dims).shape)
    soft = moved.permute([[*others, *dims].index(d) for d in range(w.dim())])
    return torch.where(oracle_mask(w, n, m, dims), soft, 0).to(w.dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether values are the same, NaNs where there are NaNs."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_soft_threshold(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    for n, m in [(1, 4), (2, 4), (5, 8)]:
        shape, dims, arrange = LAYOUTS[layout](m)
        w = arrange(torch.where(torch.rand(shape) < 0.8, torch.randn(shape).to(dtype), awkward(shape, dtype, seed=n)))
        expected = oracle_soft(w, n, m, dims, scale := torch.tensor(1.37))
        with backend.alone(lines_in_memory(w, m, dims) is not None):
            results = Batch([w], [placement(n, m, *dims)]).soft_threshold([scale])
            if len(dims) == 1:
                results.append(ops.soft_threshold(w, n, m, *dims, scale))
        for found in results:
            assert found.dtype == dtype
            if backend.name == "triton" and dtype == torch.bfloat16:  # the interpreter cuts bf16 off
                torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-38, equal_nan=True)
            else:
                assert same(found, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # Triton's interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_soft_thresholds_of_a_mixed_batch_each_with_its_scale(backend: Backend) -> None:
    weights, placements = mixed(backend)
    scales = [torch.tensor(1 + i / 7, dtype=torch.promote_types(w.dtype, torch.float32)) for i, w in enumerate(weights)]
    batch = Batch(weights, placements)
    for dtype in (torch.float16, None):
        for w, (pattern, dims), scale, soft in zip(
            weights, placements, scales, batch.soft_threshold(scales, dtype), strict=True
        ):
            if backend.name != "triton" or w.dtype != torch.bfloat16:
                assert same(soft, oracle_soft(w, pattern.n, pattern.m, dims, scale).to(dtype or w.dtype))
    before = [value.clone() for value in batch.soft_threshold(scales)]
    batch.keep_largest()
    assert all(map(same, batch.soft_threshold(scales), before)), "values of one kind are not lent as those of another"


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_dropped(backend: Backend, layout: str, dtype: torch.dtype, scale: float | Tensor) -> None:
    shape, dims, arrange = LAYOUTS[layout](8)
    generator = torch.Generator().manual_seed(1)
    w = arrange(torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randn(w.shape, generator=generator).to(dtype)
    same_format = torch.empty_like(w).copy_(target)
    wide = torch.promote_types(dtype, torch.float32)
    dropped = torch.where(oracle_mask(w, 3, 8, dims), 0, w).to(wide)
    expected = (target.to(wide) + dropped * torch.tensor(float(scale), dtype=wide)).to(dtype)  # in fp32, rounded once
    for given_target in (target, same_format):
        alike = lines_in_memory(w, 8, dims) is not None and given_target.stride() == w.stride()
        with backend.alone(alike):
            Batch([w], [placement(3, 8, *dims)]).add_dropped_([given_target], scale)
        # GPUs may multiply and add at once, and Triton's interpreter cuts bf16 off.
        step = torch.finfo(dtype).eps if backend.name == "triton" and dtype != torch.float16 else 0.0
        torch.testing.assert_close(given_target, expected, rtol=step, atol=step)


def test_add_dropped_leaves_out_what_has_no_target(backend: Backend) -> None:
    weights = [torch.randn(4, 8), torch.randn(8, 4, 3, 3), torch.randn(4, 8), torch.randn(4, 6)]
    placements = [*[placement(2, 4)] * 3, placement(1, 3)]
    targets = [None, torch.zeros(8, 4, 3, 3), torch.zeros(4, 8), None]
    Batch(weights, placements).add_dropped_(targets, 2.0)
    for w, target, where in zip(weights, targets, placements, strict=True):
        if target is not None:
            assert torch.equal(target, 2 * (w - keep_largest(w, *where)))
            assert target._version > 0


def test_add_dropped_follows_its_targets(backend: Backend) -> None:
    weights = [torch.randn(8, 8), torch.randn(8, 8)]
    batch, dropped = Batch(weights, [placement(2, 4)] * 2), [w - keep_largest(w, *placement(2, 4)) for w in weights]
    plain, memory = torch.zeros(8, 8), torch.zeros(64)
    for other in (
        torch.zeros(8, 8),
        memory.view(8, 8),
        memory.view(8, 8).t(),  # other strides at the same address
        torch.zeros(8, 8, dtype=torch.float64),
        torch.zeros(8, 16)[:, ::2],
        None,
    ):
        for _ in range(2):  # what it has seen before takes a shorter way
            targets = [plain.zero_(), other if other is None else other.zero_()]
            batch.add_dropped_(targets, 1.0)
            assert torch.equal(plain, dropped[0])
            assert other is None or torch.equal(other, dropped[1].to(other.dtype))


@pytest.mark.parametrize("shape", [(2, 8), (16, 8), (8,), (4, 8, 1)])
def test_targets_of_another_shape_are_refused_and_none_is_written(backend: Backend, shape: tuple[int, ...]) -> None:
    weights = [torch.randn(8, 8), torch.randn(4, 8)]
    batch = Batch(weights, [placement(2, 4)] * 2)
    targets = [torch.zeros(8, 8), torch.zeros(shape)]
    with pytest.raises(SparsityError, match=rf"shape {re.escape(str(shape))} does not go with a weight of \(4, 8\)"):
        batch.add_dropped_(targets, 1.0)
    marks = [t.bool() for t in targets]
    with pytest.raises(SparsityError, match="does not go with"):
        batch.update_masks_(marks)
    assert not any(t.any() for t in [*targets, *marks])


def test_values_that_lie_in_memory_with_the_other_sign(backend: Backend) -> None:
    """As those of conjugates do."""
    w, target = torch._neg_view(torch.randn(4, 8)), torch._neg_view(torch.randn(4, 8))
    found = target.clone() + 0.5 * (w.clone() - keep_largest(w.clone(), *placement(2, 4)))
    for kept in (keep_largest(w, "2:4"), *Batch([w], [placement(2, 4)]).keep_largest()):
        assert torch.equal(kept, keep_largest(w.clone(), "2:4"))
    for weight in (w, w.clone()):
        goal = torch._neg_view(-target.clone())
        Batch([weight], [placement(2, 4)]).add_dropped_([goal], 0.5)
        torch.testing.assert_close(goal, found)


def test_add_dropped_leaves_the_kept_alone(backend: Backend) -> None:
    target, w = torch.zeros(1, 4), torch.tensor([[torch.inf, -3.0, 2.0, 1.0]])
    Batch([w], [placement(2, 4)]).add_dropped_([target], 0.5)
    assert target.tolist() == [[0.0, 0.0, 1.0, 0.5]]


def test_masks_are_updated_and_their_changes_counted(backend: Backend) -> None:
    weights, placements = mixed(backend)
    batch = Batch(weights, placements)
    masks = [torch.rand(w.shape) < 0.5 for w in weights]
    masks = [torch.empty_like(w, dtype=torch.bool).copy_(mask) for w, mask in zip(weights, masks, strict=True)]
    masks[3] = torch.empty(masks[3].shape[::-1], dtype=torch.bool).permute(1, 0).copy_(masks[3])  # another layout
    now = [oracle_mask(w, pattern.n, pattern.m, dims) for w, (pattern, dims) in zip(weights, placements, strict=True)]
    expected = [int((before != after).sum()) for before, after in zip(masks, now, strict=True)]
    assert batch.update_masks_(masks).tolist() == expected
    assert all(map(torch.equal, masks, now))
    assert batch.update_masks_(masks).tolist() == [0] * len(weights)


def test_applied_masks_zero_whatever_was_there(backend: Backend) -> None:
    targets = [
        arrange(awkward(shape, dtype)) for dtype in DTYPES for shape, _, arrange in (f(4) for f in LAYOUTS.values())
    ]
    targets.append(torch.arange(5000).remainder(7).view(50, 100).to(torch.int8))
    masks = [torch.rand(t.shape) < 0.5 for t in targets]
    masks = [
        torch.empty_like(t, dtype=torch.bool).copy_(m) if i % 3 else m
        for i, (t, m) in enumerate(zip(targets, masks, strict=True))
    ]
    expected = [torch.where(mask, bits(t), 0) for t, mask in zip(targets, masks, strict=True)]
    apply_masks_(targets, masks)
    assert all(torch.equal(bits(t), e) for t, e in zip(targets, expected, strict=True))
    assert all(t._version > 0 for t in targets if t.numel())


def test_results_are_tensors_of_their_own(backend: Backend) -> None:
    weights = [torch.randn(4, 12), torch.randn(4, 12), torch.randn(4, 4, 3, 3), torch.randn(1, 4)]
    for values in (
        Batch(weights, [placement(2, 4)] * 4).keep_largest(),
        Batch(weights, [placement(2, 4)] * 4).nm_mask(),
    ):
        before = [value._version for value in values]
        values[0].zero_()
        assert [value._version for value in values] == [before[0] + 1, *before[1:]]
    first, second, *_ = Batch(weights, [placement(2, 4)] * 4).keep_largest()
    x = torch.randn(3, 12, requires_grad=True)
    y = (x @ second.t()).sum()
    first.zero_()
    y.backward()  # raises if it takes `second` for changed
    assert torch.equal(x.grad, second.sum(0).expand(3, -1))


def test_compiled_results_start_at_256_bytes_of_one_allocation() -> None:
    weights = [torch.randn(1, 4), torch.randn(3, 20), torch.randn(1, 4)]
    for values in (
        Batch(weights, [placement(2, 4)] * 3).keep_largest(torch.bfloat16),
        Batch(weights, [placement(2, 4)] * 3).nm_mask(),
    ):
        base = values[0].untyped_storage().data_ptr()
        assert {value.untyped_storage().data_ptr() for value in values} == {base}
        assert all((value.data_ptr() - base) % 256 == 0 for value in values)


def test_memory_is_used_again_when_nobody_holds_the_results() -> None:
    w = torch.randn(64, 64)
    batch = Batch([w, w.clone()], [placement(2, 4)] * 2)
    first = batch.keep_largest()
    address, before = first[0].data_ptr(), first[1].clone()
    w.neg_()
    batch.weights[1].neg_()
    held = first[1].view(-1)[5:]  # a view keeps all of it
    del first
    second = batch.keep_largest()
    assert second[0].data_ptr() != address
    assert torch.equal(held, before.view(-1)[5:])
    address = second[0].data_ptr()
    del second
    with torch.inference_mode():
        assert not batch.keep_largest()[0].is_inference(), "a pass may go on outside of inference mode"
    third = batch.keep_largest()
    assert not third[0].is_inference()
    address = third[0].data_ptr()
    del third
    fourth = batch.keep_largest()
    assert fourth[0].data_ptr() == address
    assert torch.equal(fourth[0], keep_largest(w, "2:4"))


def test_lent_memory_that_was_made_smaller_is_not_used_again() -> None:
    w = torch.randn(1024, 64)
    batch = Batch([w], [placement(2, 4)])
    values = batch.keep_largest()
    memory, size = values[0].untyped_storage(), w.numel() * w.element_size()
    address = memory.data_ptr()
    for part in range(1, 16):
        memory.resize_(size * part // 16)
        if memory.data_ptr() == address:  # as allocators like to give it back
            break
    del values, memory
    assert torch.equal(batch.keep_largest()[0], keep_largest(w, "2:4"))


def test_one_call_for_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    library, calls = cpu.library(), []
    if library is None:
        pytest.skip("the compiled kernel is not installed")

    class Counting:
        @staticmethod
        def nm_run(*args: object) -> int:
            calls.append(args)
            return library.nm_run(*args)

    monkeypatch.setattr(cpu, "library", Counting)
    weights = [torch.randn(8, 16) for _ in range(50)] + [torch.randn(8, 16, 3, 3) for _ in range(50)]
    batch = Batch(weights, [placement(2, 4)] * 100)
    for call in (
        batch.keep_largest,
        batch.nm_mask,
        lambda: batch.add_dropped_(weights, 0.1),
        lambda: batch.update_masks_([torch.zeros_like(w, dtype=torch.bool) for w in weights]),
    ):
        calls.clear()
        call()
        assert len(calls) == 2  # contiguous and strided
    masks = batch.nm_mask()
    calls.clear()
    apply_masks_(weights, masks)
    assert len(calls) == 1


def test_a_batch_follows_its_weights(backend: Backend) -> None:
    weights = [torch.nn.Parameter(awkward((8, 16, 2, 2), seed=i)) for i in range(3)]
    batch = Batch(weights, [placement(2, 4)] * 3)

    def right() -> bool:
        for _ in range(2):  # what it has seen before takes a shorter way
            with backend.alone(all(lines_in_memory(w, 4, (1,)) for w in weights)):
                values = batch.keep_largest()
            masked = [torch.where(oracle_mask(w, 2, 4, (1,)), bits(w), 0) for w in weights]
            if not all(
                torch.equal(bits(v), e) and v.stride() == w.stride()
                for v, e, w in zip(values, masked, weights, strict=True)
            ):
                return False
        return True

    assert right()
    with torch.autocast("cpu"):
        assert right()
    with torch.inference_mode():
        assert right()
    same_memory = weights[1].data.flatten()
    for _ in range(2):
        weights[1].data = same_memory.view(2, 2, 8, 16).permute(2, 3, 0, 1)  # other strides at the same address
        assert right()
        weights[1].data = same_memory.view(8, 16, 2, 2)  # and back
        assert right()
    weights[0].data = awkward((8, 16, 2, 2), seed=10)  # another storage
    assert right()
    with torch.no_grad():
        weights[1].copy_(awkward((8, 16, 2, 2), seed=11))  # other values
    assert right()
    weights[2].data = weights[2].data.to(memory_format=torch.channels_last)  # other strides
    assert right()
    weights[0].data = weights[0].data.bfloat16()  # another dtype
    assert right()
    weights[1].data = same_memory[:256].view(4, 16, 2, 2)  # a part of it
    assert right()
    weights[1].data = same_memory.view(torch.bfloat16)[:512].view(8, 16, 2, 2)  # another dtype at the same address
    assert right()
    storage = weights[0].untyped_storage()
    size = storage.size()
    storage.resize_(0)  # as FSDP frees a gathered weight ...
    others = [torch.empty(size, dtype=torch.uint8) for _ in range(4)]
    storage.resize_(size)  # ... and gathers it again
    with torch.no_grad():
        weights[0].fill_(1)
    assert right()
    del others


def test_gradients_pass_straight_through() -> None:
    w = torch.randn(4, 8, requires_grad=True)
    upstream = torch.randn(4, 8)
    for masked in (ops.keep_largest, torch.ops.nm_sparsity.keep_largest):
        (grad,) = torch.autograd.grad(masked(w, 2, 4, 1), w, upstream)
        assert torch.equal(grad, upstream)
        half = masked(w, 2, 4, 1, torch.bfloat16)
        (grad,) = torch.autograd.grad(half, w, upstream.bfloat16())
        assert grad.dtype == w.dtype
        assert torch.equal(grad, upstream.bfloat16().float())
        (again,) = torch.autograd.grad(
            torch.autograd.grad((masked(w, 2, 4, 1) ** 3).sum(), w, create_graph=True)[0].sum(), w
        )
        assert torch.equal(again, 6 * masked(w, 2, 4, 1))
    assert not ops.nm_mask(w, 2, 4, 1).requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # functorch's own
def test_transforms() -> None:
    w, tangent = torch.randn(4, 8), torch.randn(4, 8)
    masked = ops.keep_largest(w, 2, 4, 1)
    value, derivative = torch.func.jvp(lambda w: ops.keep_largest(w, 2, 4, 1), (w,), (tangent,))
    assert torch.equal(value, masked)
    assert torch.equal(derivative, tangent)
    stacked = torch.stack([w, tangent])
    mapped = torch.func.vmap(lambda w: ops.keep_largest(w, 2, 4, 1), in_dims=2)(stacked.permute(1, 2, 0))
    assert torch.equal(mapped, torch.stack([ops.keep_largest(one, 2, 4, 1) for one in stacked]))
    gradient = torch.func.grad(lambda w: (ops.keep_largest(w, 2, 4, 1) ** 2).sum())(w)
    assert torch.equal(gradient, 2 * masked)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_who_watches_sees_the_op_and_nobody_else_pays_for_it() -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(op.name())
            return op(*args, **(kwargs or {}))

    seen: list[str] = []
    w = torch.randn(4, 8)
    with Watching():
        watched = ops.keep_largest(w, 2, 4, 1)
    assert "nm_sparsity::keep_largest" in seen
    assert torch.equal(watched, ops.keep_largest(w, 2, 4, 1))
    with FakeTensorMode() as mode:
        fake = ops.keep_largest(mode.from_tensor(w), 2, 4, 1, torch.bfloat16)
    assert (fake.shape, fake.dtype) == (w.shape, torch.bfloat16)
    traced = torch.jit.trace(lambda w: ops.keep_largest(w, 2, 4, 1), w, check_trace=False)
    assert "nm_sparsity::keep_largest" in str(traced.graph)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        ops.keep_largest(w, 2, 4, 1)
    assert not [event.key for event in profile.key_averages() if "nm_sparsity" in event.key]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("layout", ["linear", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # which has no compiled kernel
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    shape, (axis,), arrange = LAYOUTS[layout](4)
    w = arrange(torch.randn(shape, dtype=dtype)).requires_grad_()
    torch.library.opcheck(torch.ops.nm_sparsity.keep_largest.default, (w, 2, 4, axis))
    torch.library.opcheck(torch.ops.nm_sparsity.keep_largest.default, (w, 2, 4, axis, torch.bfloat16))
    torch.library.opcheck(torch.ops.nm_sparsity.nm_mask.default, (w.detach(), 2, 4, axis))
    torch.library.opcheck(torch.ops.nm_sparsity.soft_threshold.default, (w.detach(), 2, 4, axis, torch.tensor(1.5)))


def test_compiled_training_equals_eager() -> None:
    def loss(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
        hidden = torch.relu(x @ ops.keep_largest(w, 2, 4, 1).t()) * ops.nm_mask(w, 2, 4, 1).sum()
        soft = ops.soft_threshold(v, 2, 4, 1, v.abs().amax().detach())
        return (hidden @ (ops.keep_largest(v, 2, 4, 1) + soft).t()).sum()

    w, v, x = torch.randn(8, 16, requires_grad=True), torch.randn(4, 8, requires_grad=True), torch.randn(3, 16)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, result = loss(w, v, x), compiled(w, v, x)
    torch.testing.assert_close(result, expected)
    for a, b in zip(torch.autograd.grad(result, [w, v]), torch.autograd.grad(expected, [w, v]), strict=True):
        torch.testing.assert_close(a, b)


def test_compilers_see_the_launch_on_cuda() -> None:
    """The graph that torch.compile's backend gets has the Triton kernel itself, and export's the op."""
    pytest.importorskip("triton")
    script = """
import torch, triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from nm_sparsity.core.masks import ops
class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(Driver())
with FakeTensorMode(allow_non_fake_inputs=True):
    w = torch.empty(8, 16, device="cuda")
    one = torch.ones((), device="cuda")
    for masked in (lambda w: ops.keep_largest(w, 2, 4, 1, torch.bfloat16),
                   lambda w: torch.ops.nm_sparsity.soft_threshold(w, 2, 4, 1, one)):
        graph = aot_export_joint_simple(lambda w: (masked(w),), [w], trace_joint=False)
        print(*[node.target for node in graph.graph.nodes if node.op == "call_function"])
class Sparse(torch.nn.Module):
    def forward(self, w): return ops.keep_largest(w, 2, 4, 1)
print(torch.export.export(Sparse(), (torch.randn(4, 8),)).graph)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    *launches, exported = result.stdout.split("\n", 2)
    for launch in launches:
        assert "triton_kernel_wrapper" in launch
        assert "nm_sparsity." not in launch
    assert "nm_sparsity.keep_largest" in exported


@pytest.mark.slow
def test_triton_compiles_for_the_gpus() -> None:
    """In a process of its own: the interpreter of the other tests leaves its marks on Triton."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("cross_compile_triton.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "compiled for sm_80 and sm_90"


def test_fake_and_meta_tensors_keep_the_layout() -> None:
    w = torch.empty(8, 16, 3, 3, device="meta").to(memory_format=torch.channels_last)
    kept = ops.keep_largest(w, 2, 4, 1)
    assert (kept.shape, kept.stride(), kept.device.type) == (w.shape, w.stride(), "meta")


OLDER = SimpleNamespace(CDLL=lambda path: SimpleNamespace())  # which has none of today's functions


@pytest.mark.parametrize(
    ("name", "instead", "reason"), [("EXTENSION_SUFFIXES", [], "missing"), ("ctypes", OLDER, "an older one")]
)
def test_without_the_compiled_kernel_it_says_so_once(
    monkeypatch: pytest.MonkeyPatch, name: str, instead: object, reason: str
) -> None:
    monkeypatch.setattr(cpu, name, instead)
    cpu.library.cache_clear()
    w = awkward((4, 16))
    try:
        with pytest.warns(RuntimeWarning, match=f"compiled CPU kernel is {reason}"):
            kept = ops.keep_largest(w, 2, 4, 1)
        assert torch.equal(bits(kept), bits(reference.keep_largest(w, 2, 4, 1)))
        ops.keep_largest(w, 2, 4, 1)  # a second warning would be an error here
    finally:
        cpu.library.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_the_compiled_kernel_takes_as_many_threads_as_torch_does() -> None:
    if cpu.library() is None:
        pytest.skip("the compiled kernel is not installed")
    script = """
import os, torch
from nm_sparsity.core.masks import ops
w, tiny = torch.ones(512, 512), torch.ones(8, 8)
for threads in (2, 5):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    ops.keep_largest(tiny, 2, 4, 1)
    assert len(os.listdir("/proc/self/task")) == before  # no threads for so little
    ops.keep_largest(w, 2, 4, 1)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout.split()[1:] == ["3"], result.stderr  # of the first 2, torch may have started one
