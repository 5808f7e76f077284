"""One contract, every backend: the pure-torch reference, the compiled CPU kernel, Triton (interpreted), the op."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nm_sparsity.core.masks import cpu, cuda, ops, reference
from nm_sparsity.core.masks.memory import memory_layout

GROUP_SIZES = [2, 4, 8, 16, 32]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(scope="module")
def interpreted_triton() -> Iterator[ModuleType]:
    """`cuda` with Triton's interpreter under it: it runs on CPU tensors, slowly."""
    triton = pytest.importorskip("triton")
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    kernel = importlib.import_module("nm_sparsity.core.masks.triton_kernel")
    importlib.reload(kernel)
    yield cuda
    triton.knobs.runtime.interpret = before
    importlib.reload(kernel)


@pytest.fixture(params=["reference", "compiled", "triton", "op"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with the three kernels. Compiled ones raise where they would hand the work to the reference."""
    if request.param in ("reference", "op"):
        return {"reference": reference, "op": ops}[request.param]
    if request.param == "compiled":
        if cpu.library() is None:
            pytest.skip("the compiled kernel is not installed")
        return cpu
    module: ModuleType = request.getfixturevalue("interpreted_triton")
    return module


def oracle_mask(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """A stable sort of each group in plain Python."""

    def keep(group: list[float]) -> list[bool]:
        order = sorted(range(m), key=lambda i: (not math.isnan(group[i]), -abs(group[i])))
        return [i in order[:n] for i in range(m)]

    moved = w.double().movedim(axis, -1)
    flat = [keep(group) for group in moved.reshape(-1, m).tolist()]
    return torch.tensor(flat, dtype=torch.bool).reshape(moved.shape).movedim(-1, axis)


def bits(w: Tensor) -> Tensor:
    """The raw bits, so that NaNs and signed zeros compare."""
    return w.detach().contiguous().view(INTEGER[w.element_size()])


def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
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


Layout = Callable[[int], tuple[tuple[int, ...], int, Callable[[Tensor], Tensor]]]
LAYOUTS: dict[str, Layout] = {
    "linear": lambda m: ((3, 2 * m), 1, lambda w: w),
    "transposed": lambda m: ((2 * m, 3), 1, lambda w: w.t()),
    "conv1d": lambda m: ((2, 2 * m, 3), 1, lambda w: w),
    "conv2d": lambda m: ((2, m, 3, 3), 1, lambda w: w),
    "channels_last": lambda m: ((2, 2 * m, 3, 2), 1, lambda w: w.to(memory_format=torch.channels_last)),
    "conv3d_channels_last": lambda m: ((2, m, 2, 1, 2), 1, lambda w: w.to(memory_format=torch.channels_last_3d)),
    "pointwise": lambda m: ((5, m, 1, 1), 1, lambda w: w.to(memory_format=torch.channels_last)),
    "conv_transpose": lambda m: ((2 * m, 3, 2, 2), 0, lambda w: w),
    "slice": lambda m: ((4, 2 * m), 1, lambda w: w[::2]),
    "empty": lambda m: ((0, m), 1, lambda w: w),
}


def check(backend: ModuleType, w: Tensor, n: int, m: int, axis: int) -> None:
    before, expected = bits(w).clone(), oracle_mask(w, n, m, axis)
    kept, mask = backend.keep_largest(w, n, m, axis), backend.nm_mask(w, n, m, axis)
    assert torch.equal(bits(w), before)
    assert kept.dtype == w.dtype
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)
    assert torch.equal(bits(kept), torch.where(expected, bits(w), 0))  # the same bits, or +0
    if memory_layout(w, m, axis) is not None:
        assert kept.stride() == w.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [4, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_memory_layout(backend: ModuleType, layout: str, m: int, dtype: torch.dtype) -> None:
    shape, axis, arrange = LAYOUTS[layout](m)
    check(backend, arrange(awkward(shape, dtype)), m // 2, m, axis)


@pytest.mark.parametrize("m", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_n(backend: ModuleType, m: int, dtype: torch.dtype) -> None:
    every = backend is not cuda or (m <= 16 and dtype == torch.float32)  # the interpreter is slow
    for n in range(1, m) if every else {1, m // 2, m - 1}:
        check(backend, awkward((5, 2 * m), dtype, seed=n), n, m, 1)


@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 5), (3, 7), (5, 12), (9, 33), (40, 64)])
def test_other_group_sizes_take_the_reference(backend: ModuleType, n: int, m: int) -> None:
    check(backend, awkward((3, 2 * m), torch.float32), n, m, 1)


def test_more_groups_than_a_tile(backend: ModuleType) -> None:
    for shape in ((300, 20), (7, 12, 5, 5), (2, 4, 600)):
        check(backend, awkward(shape, torch.float32), 2, 4, 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same(threads: int) -> None:
    w, before = awkward((64, 512), torch.float32), torch.get_num_threads()
    expected = reference.keep_largest(w, 2, 4, 1)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(bits(ops.keep_largest(w, 2, 4, 1)), bits(expected))
    finally:
        torch.set_num_threads(before)


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


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
@pytest.mark.parametrize("layout", ["linear", "conv2d", "channels_last", "transposed", "slice"])
def test_add_dropped(backend: ModuleType, layout: str, scale: float | Tensor) -> None:
    shape, axis, arrange = LAYOUTS[layout](8)
    w = arrange(torch.randn(shape))
    target = torch.randn(w.shape)
    same_format = torch.empty_like(w).copy_(target)
    expected = target + 0.25 * torch.where(oracle_mask(w, 3, 8, axis), 0, w)
    for given_target in (target, same_format):
        assert backend.add_dropped_(given_target, w, 3, 8, axis, scale) is given_target
        torch.testing.assert_close(given_target, expected, rtol=1e-6, atol=1e-7)


def test_add_dropped_leaves_the_kept_alone(backend: ModuleType) -> None:
    w = torch.tensor([[torch.inf, -3.0, 2.0, 1.0]])
    target = torch.zeros(1, 4)
    backend.add_dropped_(target, w, 2, 4, 1, 0.5)
    assert target.tolist() == [[0.0, 0.0, 1.0, 0.5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_add_dropped_other_dtypes(backend: ModuleType, dtype: torch.dtype) -> None:
    w, target = torch.randn(4, 16).to(dtype), torch.randn(4, 16).to(dtype)
    expected = target.double() + 0.5 * torch.where(oracle_mask(w, 1, 4, 1), 0, w).double()
    backend.add_dropped_(target, w, 1, 4, 1, 0.5)
    torch.testing.assert_close(target.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_gradients_pass_straight_through() -> None:
    w = torch.randn(4, 8, requires_grad=True)
    upstream = torch.randn(4, 8)
    (grad,) = torch.autograd.grad(ops.keep_largest(w, 2, 4, 1), w, upstream)
    assert torch.equal(grad, upstream)
    assert not ops.nm_mask(w, 2, 4, 1).requires_grad
    parameter = torch.nn.Parameter(torch.randn(4, 8))
    ops.add_dropped_(parameter, parameter.detach().clone(), 2, 4, 1, 0.1)  # in place on a leaf


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own
@pytest.mark.parametrize("layout", ["linear", "channels_last", "transposed"])
def test_opcheck(layout: str) -> None:
    shape, axis, arrange = LAYOUTS[layout](4)
    w = arrange(torch.randn(shape)).requires_grad_()
    torch.library.opcheck(torch.ops.nm_sparsity.keep_largest.default, (w, 2, 4, axis))
    torch.library.opcheck(torch.ops.nm_sparsity.nm_mask.default, (w.detach(), 2, 4, axis))


def test_compiled_training_equals_eager() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (torch.relu(x @ ops.keep_largest(w, 2, 4, 1).t()) * ops.nm_mask(w, 2, 4, 1).sum()).sum()

    w, x = torch.randn(8, 16, requires_grad=True), torch.randn(3, 16)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, result = loss(w, x), compiled(w, x)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, w), torch.autograd.grad(expected, w))


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


def test_without_the_compiled_kernel_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "EXTENSION_SUFFIXES", [])
    cpu.library.cache_clear()
    w = awkward((4, 16), torch.float32)
    try:
        with pytest.warns(RuntimeWarning, match="compiled CPU kernel is missing"):
            kept = ops.keep_largest(w, 2, 4, 1)
        assert torch.equal(bits(kept), bits(reference.keep_largest(w, 2, 4, 1)))
        ops.keep_largest(w, 2, 4, 1)  # a second warning would be an error here
    finally:
        cpu.library.cache_clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_the_compiled_kernel_takes_as_many_threads_as_torch_does() -> None:
    if cpu.library() is None:
        pytest.skip("the compiled kernel is not installed")
    script = """
import os, torch
from nm_sparsity.core.masks import ops
w = torch.ones(512, 512)
for threads in (2, 5):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    ops.keep_largest(w, 2, 4, 1)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout.split()[1:] == ["3"], result.stderr  # of the first 2, torch may have started one


def test_compiled_kernels_are_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only right because they fall back: what they promise to cover never reaches the reference."""

    def refuse(*args: object) -> Tensor:
        raise AssertionError("fell back to the reference")

    if cpu.library() is None:
        pytest.skip("the compiled kernel is not installed")
    for name in ("keep_largest", "nm_mask", "add_dropped_"):
        monkeypatch.setattr(reference, name, refuse)
    for layout in set(LAYOUTS) - {"slice"}:
        for m in GROUP_SIZES:
            shape, axis, arrange = LAYOUTS[layout](m)
            w = arrange(torch.randn(shape))
            ops.keep_largest(w, 1, m, axis)
            ops.nm_mask(w.bfloat16(), 1, m, axis)
            ops.add_dropped_(torch.empty_like(w), w, 1, m, axis, 0.1)
