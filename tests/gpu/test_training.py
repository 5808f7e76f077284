"""Sparse training on a GPU: lambda under loss scaling, few launches, no synchronisation, graphs, compiling."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nm_sparsity import decay_strength, finalize, keep_largest, nm_mask, sparsify, verify
from nm_sparsity.core.masks import batched

CUDA = "cuda"
LAMBDA, LR = 0.5, 0.25


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


def blocks(n: int = 4, width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(width) for _ in range(n)]).to(CUDA)


def masked_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            if p.dim() == 2:
                p.copy_(keep_largest(p, "2:4"))
    return twin


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(step: Callable[[], object]) -> list[str]:
    """The names of the kernels that run in `step`, by the profiler."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as seen:
        step()
        torch.cuda.synchronize()
    return [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def our_launches(step: Callable[[], object]) -> int:
    """How many of them are ours."""
    return sum(any(ours in name for ours in ("select", "nm_sparsity")) for name in launches(step))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_lambda_under_fp16_loss_scaling(fused: bool, unscale: bool) -> None:
    after = {}
    for method in ("ste", "sr-ste"):
        net = blocks(2)
        start = [p.detach().clone() for p in net.parameters()]
        sparsify(net, method=method, **({"decay": LAMBDA} if method == "sr-ste" else {}))
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, fused=fused)
        scaler = torch.amp.GradScaler(CUDA, init_scale=1024.0)
        with torch.autocast(CUDA, torch.float16):
            loss = net(torch.ones(4, 64, device=CUDA)).float().square().mean()
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        after[method] = list(net.parameters())
    for w, ste, sr_ste in zip(start, after["ste"], after["sr-ste"], strict=True):
        if w.dim() == 2:
            dropped = ~nm_mask(w, "2:4")
            found = ((ste - sr_ste).double() / LR)[dropped] @ w[dropped].double() / w[dropped].double().square().sum()
            assert found.item() == pytest.approx(LAMBDA, rel=1e-4)
        else:
            assert torch.equal(ste, sr_ste)


def test_a_skipped_fused_step_counts_nothing() -> None:
    net = blocks(1)
    sparsify(net, decay=LAMBDA)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler(CUDA)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 64, device=CUDA)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert decay_strength(net) == pytest.approx(LAMBDA * LR)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_forward_and_a_step_are_few_launches_and_equal_the_masked_model(autocast: bool) -> None:
    net = blocks(12)
    dense, x = masked_twin(net), torch.randn(8, 64, device=CUDA)
    sparsify(net, decay=LAMBDA)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def run(model: nn.Module) -> Tensor:
        with torch.autocast(CUDA, torch.bfloat16, enabled=autocast):
            y: Tensor = model(x)
        return y

    a, b = run(net), run(dense)
    assert torch.equal(a, b)
    a.float().square().sum().backward()
    b.float().square().sum().backward()
    for p, q in zip(net.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
    assert our_launches(lambda: run(net)) <= 4

    def step() -> None:
        optimizer.zero_grad()
        run(net).float().square().sum().backward()
        optimizer.step()

    assert our_launches(step) <= 8
    with no_synchronisation():
        step()


def test_values_that_are_no_selection_are_few_launches_too() -> None:
    net, x = blocks(12), torch.randn(8, 64, device=CUDA)
    sparsify(net, method="s-ste")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(CUDA, torch.bfloat16):
            y = net(x)
        y.float().square().sum().backward()
        optimizer.step()

    step()
    assert our_launches(step) <= 4
    with no_synchronisation():
        step()


def test_a_tensor_learning_rate_is_never_asked_for_its_value() -> None:
    net = blocks(2)
    sparsify(net, decay=LAMBDA)
    lr = torch.tensor(LR, device=CUDA)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, capturable=True)
    x = torch.randn(8, 64, device=CUDA)
    net(x).sum().backward()
    optimizer.step()
    with no_synchronisation():
        for _ in range(2):
            net(x).sum().backward()
            optimizer.step()
            lr.mul_(0.5)
    assert decay_strength(net) == pytest.approx(LAMBDA * LR * 2.5)


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "s-ste"}, {"decay": f"linear(0, {LAMBDA})"}, {"fix_at": 0.5}, {"dense_until": 0.3}]
    + [{"method": "decaying"}]
    + [{"precondition": until} for until in (0.3, "auto")],
    ids=str,
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_whole_step_captured_in_a_graph_and_replayed(options: dict[str, Any], tensor_lr: bool) -> None:
    """Phases and schedules go on while it is replayed: 103 steps, three of them before the capture."""
    nets = [blocks(2), blocks(2)]
    lambda_ = {} if "method" in options else {"decay": LAMBDA}
    for net in nets:
        sparsify(net, **{**lambda_, **options}, total_steps=103 if options else None)
    optimizers = []
    for net in nets:
        lr = torch.tensor(1e-3, device=CUDA) if tensor_lr else 1e-3
        optimizers.append(torch.optim.AdamW(net.parameters(), lr=lr, capturable=True))
    x = torch.randn(8, 64, device=CUDA)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(nets[0], optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        step(nets[1], optimizers[1])
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        nets[0](x).square().mean().backward()
        optimizers[0].step()
    for _ in range(100):
        graph.replay()
        step(nets[1], optimizers[1])
    torch.cuda.synchronize()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    strengths = [decay_strength(net) for net in nets]
    assert strengths[0] == pytest.approx(strengths[1])
    if not options:
        assert strengths[0] == pytest.approx(LAMBDA * 0.103)
    for net in nets:
        finalize(net)
        assert verify(net, "2:4")


def test_eager_passes_and_a_captured_one_keep_their_values_apart() -> None:
    net, x = blocks(2), torch.randn(8, 64, device=CUDA)
    sparsify(net)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            net(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = net(x)
        captured.sum().backward()
        captured = captured.detach()  # or its graph keeps nodes that belong to the stream of the capture
    for _ in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.normal_()
        eager = net(x)
        graph.replay()
        assert torch.equal(captured, eager)
        eager.sum().backward()


def test_values_of_a_small_model_serve_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = blocks(2), torch.randn(8, 64, device=CUDA)
    sparsify(net)
    read: list[Tensor] = []
    net[1].register_forward_pre_hook(lambda block, args: read.append(block.up.weight))
    net(x).sum().backward()
    addresses = [read.pop().data_ptr()]
    for _ in range(2):
        net(x).sum().backward()
        addresses.append(read.pop().data_ptr())
    held = net(x)
    kept = read.pop().data_ptr()
    net(x)
    assert addresses == [kept] * 3
    assert read.pop().data_ptr() != kept, "the graph of an output needs the first values"
    del held
    monkeypatch.setattr(batched, "_LITTLE", 0.0)
    for _ in range(2):
        net(x).sum().backward()
    assert not net.__dict__["_nm_scope"]._batch._lent, "what is more than a little is kept for nobody"


class OnTwoStreams(nn.Module):
    """Two layers that are computed beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 512), nn.Linear(512, 512)
        self.stream = torch.cuda.Stream()

    def forward(self, x: Tensor) -> Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(100_000_000)
            aside = self.first(x)
        y = self.second(x)
        torch.cuda.current_stream().wait_stream(self.stream)
        return y + aside


@torch.no_grad()
def test_streams_do_not_wait_for_each_others_values() -> None:
    torch.manual_seed(0)
    forked, plain, x = OnTwoStreams().to(CUDA), blocks(2), torch.randn(8, 512, device=CUDA)
    expected = masked_twin(forked.first)(x) + masked_twin(forked.second)(x), masked_twin(plain)(x[:, :64])
    sparsify(forked)
    sparsify(plain)
    torch.testing.assert_close(forked(x), expected[0])
    results = []
    for pause in (100_000_000, 0):  # the second call begins while the first has made nothing yet
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(pause)
            results.append(plain(x[:, :64]))
    torch.cuda.synchronize()
    for y in results:
        assert torch.equal(y, expected[1])


def test_training_with_the_gpu_as_the_default_device() -> None:
    nets = [blocks(2), blocks(2)]
    for net, default in zip(nets, ("cpu", CUDA), strict=True):
        x = torch.ones(8, 64, device=CUDA)
        with torch.device(default):
            sparsify(net, "2:4", method="asp")
            optimizer = torch.optim.SGD(net.parameters(), lr=LR)
            for _ in range(3):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_equals_eager(mode: str) -> None:
    eager = blocks(2)
    sparsify(eager, decay=1e-2)
    twin = copy.deepcopy(eager)
    compiled: Any = torch.compile(twin, fullgraph=True, mode=mode)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-3) for net in (eager, twin)]
    for seed in range(8):
        x = torch.randn(8, 64, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed))
        for net, optimizer in zip((eager, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_compiled_under_autocast_a_mask_is_launched_in_place_of_a_cast() -> None:
    found = {}
    for kind in ("dense", "sparse"):
        net = blocks(6)
        if kind == "sparse":
            sparsify(net)
        compiled: Any = torch.compile(net, fullgraph=True)
        x = torch.randn(8, 64, device=CUDA)

        def step(compiled: Any = compiled, x: Tensor = x) -> None:
            with torch.autocast(CUDA, torch.bfloat16):
                compiled(x).float().sum().backward()

        step()
        found[kind] = launches(step)
    assert sum("select" in name for name in found["sparse"]) == 12
    assert len(found["sparse"]) <= len(found["dense"])


def test_peak_memory_under_autocast_is_the_dense_ones() -> None:
    peaks = {}
    for kind in ("dense", "sparse"):
        net = blocks(8, 512)
        if kind == "sparse":
            sparsify(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        x = torch.randn(4096, 512, device=CUDA)
        for _ in range(2):
            optimizer.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast(CUDA, torch.bfloat16):
                loss = net(x).float().square().mean()
            loss.backward()
            optimizer.step()
        peaks[kind] = torch.cuda.max_memory_allocated()
        del net, optimizer, loss
    assert peaks["sparse"] <= 1.01 * peaks["dense"]


def test_train_finalize_verify() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(256, 8)
    )
    net = net.to(CUDA, memory_format=torch.channels_last)
    sparsify(net, "2:4", decay=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for seed in range(10):
        x = torch.randn(4, 8, 4, 4, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    before = net(x)
    finalize(net)
    assert torch.equal(net(x), before)
    assert len(verify(net, "2:4").checked) == 3
