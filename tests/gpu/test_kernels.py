"""The Triton kernels on a GPU: bit for bit the reference's results, in one launch, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from nm_sparsity.core import NMPattern
from nm_sparsity.core.masks import ops, reference
from nm_sparsity.core.masks.batched import Batch, apply_masks_
from nm_sparsity.core.pattern import Placement

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HALF = (torch.bfloat16, torch.float16)
SHAPES = [(96, 64), (8, 64, 3, 3), (8, 64, 1, 1), (1, 64), (0, 64), (40, 32, 5, 5)]


def bits(w: Tensor) -> Tensor:
    return w.detach().contiguous().view(INTEGER[w.element_size()])


def awkward(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Ties, zeros of both signs, subnormals, infinities and NaNs among random values."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, 6e-8, -3e-6, torch.inf, -torch.inf, torch.nan, 70000.0])
    values = torch.randn(shape, generator=generator) * 10 ** torch.randint(-6, 6, shape, generator=generator).float()
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.4, chosen, values).to("cuda", dtype)


def placement(pattern: str = "2:4", *dims: int) -> Placement:
    return Placement(NMPattern.parse(pattern), dims or (1,))


def mixed(dtype: torch.dtype) -> tuple[list[Tensor], list[Placement]]:
    """Shapes and layouts of every kind, an odd offset among them."""
    weights = []
    for i, shape in enumerate(SHAPES):
        w = awkward(shape, dtype, seed=i)
        weights += [w, w.to(memory_format=torch.channels_last)] if w.dim() == 4 else [w]
    placements = [placement()] * len(weights)
    weights += [awkward((4097,), dtype)[1:].view(64, 64), awkward((8, 16, 3, 1), dtype), awkward((6, 64), dtype)[::2]]
    placements += [placement(), placement("2:4", 1, 2, 3), placement()]
    return weights, placements


def expected_mask(w: Tensor, where: Placement) -> Tensor:
    if len(where.dims) > 1:
        return reference.nm_mask(w.flatten(1), where.pattern.n, where.pattern.m, 1).view(w.shape)
    return reference.nm_mask(w, where.pattern.n, where.pattern.m, *where.dims)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the payload of NaNs."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(bits(a)[~a.isnan()], bits(b)[~b.isnan()])


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(call: Callable[[], object]) -> list[str]:
    """Names of the device's kernels that `call` runs."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
def test_everything_equals_the_reference(dtype: torch.dtype) -> None:
    weights, placements = mixed(dtype)
    batch = Batch(weights, placements)
    expected = [expected_mask(w, where) for w, where in zip(weights, placements, strict=True)]
    zero = torch.zeros((), device="cuda", dtype=dtype)
    for to in (dtype, *(HALF if dtype == torch.float32 else ())):
        for w, mask, kept in zip(weights, expected, batch.keep_largest(to), strict=True):
            assert same(kept, torch.where(mask, w, zero).to(to))
            if w.is_contiguous():
                assert kept.stride() == w.stride()
    assert all(map(torch.equal, batch.nm_mask(), expected))
    masks = [torch.zeros_like(mask) for mask in expected]
    assert batch.update_masks_(masks).tolist() == [int(mask.sum()) for mask in expected]
    assert all(map(torch.equal, masks, expected))
    for scale in (0.5, torch.tensor(0.5, device="cuda")):  # rounds nothing in the product
        targets = [torch.ones_like(w) for w in weights]
        batch.add_dropped_(targets, scale)
        for w, mask, target in zip(weights, expected, targets, strict=True):
            one = torch.ones_like(w)
            assert same(target, reference.add_scaled_(one, torch.where(mask, zero, w), 0.5))
    copies = [w.clone() for w in weights]
    apply_masks_(copies, expected)
    assert all(
        torch.equal(bits(c), torch.where(m, bits(w), 0)) for c, m, w in zip(copies, expected, weights, strict=True)
    )
    for w, where, mask in zip(weights, placements, expected, strict=True):
        if len(where.dims) == 1:
            assert torch.equal(ops.nm_mask(w, where.pattern.n, where.pattern.m, *where.dims), mask)
            kept = ops.keep_largest(w, where.pattern.n, where.pattern.m, *where.dims)
            assert same(kept, torch.where(mask, w, zero))


@pytest.mark.parametrize("pattern", ["1:2", "3:8", "5:16", "9:32"])
def test_every_group_size(pattern: str) -> None:
    weights = [awkward((96, 64)), awkward((8, 64, 3, 3))]
    for w, kept in zip(weights, Batch(weights, [placement(pattern)] * 2).keep_largest(), strict=True):
        assert same(kept, reference.keep_largest(w, *map(int, pattern.split(":")), 1))


def test_more_than_two_billion_entries() -> None:
    w = torch.randn(2**20, 64, device="cuda", dtype=torch.bfloat16)
    (w := w.expand(34, -1, -1).reshape(-1, 64)).view(-1)[-4:] = torch.tensor([1.0, 4.0, 2.0, 3.0], device="cuda")
    weights = [torch.randn(8, 16, device="cuda", dtype=torch.bfloat16), w, torch.randn_like(w[:8])]
    kept = Batch(weights, [placement()] * 3).keep_largest()
    assert kept[1].view(-1)[-4:].tolist() == [0, 4, 0, 3]
    assert torch.equal(kept[1][: 2**20], ops.keep_largest(w[: 2**20].clone(), 2, 4, 1))
    assert torch.equal(kept[2], reference.keep_largest(weights[2], 2, 4, 1))


def test_soft_thresholds_are_the_references() -> None:
    for dtype in (torch.float32, *HALF):
        weights = [torch.randn(shape, device="cuda").to(dtype) for shape in SHAPES]
        scales = [torch.tensor(1 + i / 7, device="cuda") for i in range(len(SHAPES))]
        batch = Batch(weights, [placement()] * len(SHAPES))
        for out in (None, *(HALF if dtype == torch.float32 else ())):
            for w, scale, soft in zip(weights, scales, batch.soft_threshold(scales, out), strict=True):
                expected = reference.soft_threshold(w, 2, 4, 1, scale).to(out or dtype)
                assert torch.equal(soft, expected)


def test_one_launch_for_many_weights() -> None:
    weights = [torch.randn(64, 64, device="cuda") for _ in range(300)]
    batch = Batch(weights, [placement()] * 300)
    scales = list(torch.rand(300, device="cuda").unbind())
    targets, masks = [torch.zeros_like(w) for w in weights], batch.nm_mask()
    for call in (
        batch.keep_largest,
        lambda: batch.keep_largest(torch.bfloat16),
        lambda: batch.soft_threshold(scales, torch.bfloat16),
        lambda: batch.add_dropped_(targets, 0.1),
        lambda: batch.update_masks_(masks),
    ):
        call()
        names = launches(call)
        assert names.count("select_rows") == 1
        assert len(names) <= 2  # and counts of changes are zeroed
    assert launches(lambda: apply_masks_(targets, masks)) == ["apply_masks"]


def test_nothing_waits_for_the_device() -> None:
    weights = [torch.nn.Parameter(torch.randn(64, 64, device="cuda")) for _ in range(20)]
    scale, masks = torch.tensor(0.1, device="cuda"), [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    with no_waiting():
        batch = Batch(weights, [placement()] * 20)
        for _ in range(2):
            batch.keep_largest(torch.bfloat16)
            batch.nm_mask()
            batch.add_dropped_([torch.zeros_like(w) for w in weights], scale)  # at new addresses
            batch.update_masks_(masks)
            apply_masks_(weights, masks)
            weights[3].data = weights[3].data.clone()
        ops.keep_largest(weights[0], 2, 4, 1).sum().backward()


@pytest.mark.parametrize("warm", [True, False], ids=["after a call", "at the first call"])
def test_a_captured_graph_replays(warm: bool) -> None:
    weights = [torch.randn(64, 64, device="cuda") for _ in range(20)]
    batch, scale = Batch(weights, [placement()] * 20), torch.tensor(0.5, device="cuda")
    masks = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    total = torch.zeros(20, dtype=torch.int64, device="cuda")
    eager = [torch.zeros_like(w) for w in weights]
    if warm:
        batch.add_dropped_(eager, 0.0)
    else:
        Batch(weights[:1], [placement()]).add_dropped_(eager[:1], torch.tensor(0.0, device="cuda"))  # compiled already
        Batch(weights[:1], [placement()]).keep_largest()
        Batch(weights[:1], [placement()]).update_masks_(masks[:1])
        apply_masks_(eager[:1], masks[:1])
        masks[0].zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = batch.keep_largest()
        targets = [torch.zeros_like(w) for w in weights]
        batch.add_dropped_(targets, scale)
        total += batch.update_masks_(masks)
        apply_masks_(targets, [~mask for mask in masks])
    batch.add_dropped_(eager, 1.0)  # before any replay: tables of the graph are none of its business
    for w, target in zip(weights, eager, strict=True):
        assert torch.equal(target, w - reference.keep_largest(w, 2, 4, 1))
    del batch
    for step in range(100):
        for w in weights:
            w.normal_()
        if step % 10 == 0:
            torch.empty(2**20, device="cuda").fill_(7)  # who frees a table too early finds this in it
        graph.replay()
    for w, value, target, mask in zip(weights, values, targets, masks, strict=True):
        kept = reference.keep_largest(w, 2, 4, 1)
        assert torch.equal(value, kept)
        assert torch.equal(target, 0.5 * (w - kept))
        assert torch.equal(mask, reference.nm_mask(w, 2, 4, 1))
    assert (total > 100 * 1000).all()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_launches_the_kernel_itself(mode: str) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (x @ ops.keep_largest(w, 2, 4, 1, torch.bfloat16).t()).float().square().mean()

    w = torch.randn(128, 64, device="cuda", requires_grad=True)
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    (expected,) = torch.autograd.grad(loss(w, x), w)
    for _ in range(4):
        (found,) = torch.autograd.grad(compiled(w, x), w)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)
    if mode == "default":
        with torch.profiler.profile(acc_events=True) as profile:
            compiled(w, x)
        assert not [event.key for event in profile.key_averages() if "nm_sparsity::" in event.key]
        assert any(name.startswith("select") for name in launches(lambda: compiled(w, x)))
