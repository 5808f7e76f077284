"""Timing against a clock of our own, on the CPU and on a pretended GPU."""

from __future__ import annotations

import pytest
import torch

from nm_sparsity.benchmarks import timing
from nm_sparsity.benchmarks.timing import Budget, Timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def task(self, name: str, seconds: float) -> timing.Call:
        def call(_: int) -> None:
            self.now += seconds
            self.order.append(name)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: fake.now)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = fake.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return fake


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_alternatives_take_turns_and_short_ones_repeat(clock: Clock, device: torch.device) -> None:
    calls = {"slow": clock.task("slow", 0.5), "fast": clock.task("fast", 4e-4)}
    timings = timing.compare(calls, device, rounds=3)
    assert timings["slow"].median == pytest.approx(0.5)
    assert timings["fast"].median == pytest.approx(4e-4)
    assert clock.order[4:] == (["slow"] + ["fast"] * 3) * 3  # after two warm-up calls each


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_graph_counts_for_the_calls_in_it(clock: Clock, device: torch.device) -> None:
    class Replay(timing.CudaGraph):
        def __init__(self) -> None:
            self.calls = 4

        def __call__(self, _: int) -> None:
            clock.now += 2.0

    assert timing.sample(Replay(), device, 3) == pytest.approx(0.5)


def test_calls_get_running_numbers() -> None:
    seen: list[int] = []
    timing.sample(seen.append, CPU, 5)
    assert seen == [0, 1, 2, 3, 4]


def test_ratios_are_taken_within_rounds() -> None:
    ours, base = Timing((2.0, 20.0, 3.0)), Timing((1.0, 10.0, 2.0))
    ratio, low, high = ours.over(base)
    assert (ratio, low, high) == (2.0, 1.75, 2.0)
    assert ours.median == 3.0
    assert Timing((5.0,)).quartiles == (5.0, 5.0)


def test_a_budget_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    budget = Budget(2)
    assert not budget.spent
    now[0] += 121
    assert budget.spent
    assert not Budget().spent


def test_rotating_copies_exceed_the_cache() -> None:
    for size in (1, 1 << 20, 1 << 30):
        copies = timing.copies_beyond_cache(size, CPU)
        assert copies >= 2
        assert copies * size >= 64 << 20 or copies == 64


def test_bandwidth_counts_what_is_read_and_written(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_ = torch.Tensor.copy_

    def timed(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        clock.now += source.nbytes / 1e9  # a byte read and a byte written every nanosecond
        return copy_(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", timed)
    assert timing.copy_bandwidth(CPU, rounds=1) == pytest.approx(2e9)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def call(_: int) -> None:
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        b.mul(2).add_(1)

    assert timing.peak_memory(call, CPU) == pytest.approx(8, rel=0.01)  # two of 4 MiB at a time
