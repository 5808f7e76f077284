"""Timing against a clock of our own; the real one on the CPU and on a pretended GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nm_sparsity.benchmarks import timing
from nm_sparsity.benchmarks.timing import Budget, Timing
from nm_sparsity.core.deploy.clock import seconds

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class FakeClock:
    """Seconds that pass only when a task says so; measures as `seconds` does."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def task(self, name: str, seconds: float) -> timing.Call:
        def call(_: int) -> None:
            self.now += seconds
            self.order.append(name)

        return call

    def __call__(self, call: timing.Call, device: torch.device, calls: int) -> float:
        start = self.now
        for i in range(calls):
            call(i)
        return (self.now - start) / calls


def test_alternatives_take_turns_and_short_ones_repeat() -> None:
    clock = FakeClock()
    calls = {"slow": clock.task("slow", 0.5), "fast": clock.task("fast", 4e-4)}
    timings = timing.compare(calls, CPU, rounds=8, clock=clock)
    assert timings["slow"].median == pytest.approx(0.5)
    assert timings["fast"].median == pytest.approx(4e-4)
    after_warm_up = clock.order[4:]  # two calls each
    rounds = [tuple(after_warm_up[i : i + 4]) for i in range(0, len(after_warm_up), 4)]
    assert len(rounds) == 8
    assert set(rounds) == {("slow", "fast", "fast", "fast"), ("fast", "fast", "fast", "slow")}


def test_a_spent_budget_ends_the_rounds_after_the_first() -> None:
    clock = FakeClock()
    budget = Budget(1.0, now=lambda: clock.now)  # 60 s; two warm-up calls and a round of two take 100 s
    calls = {"a": clock.task("a", 20.0), "b": clock.task("b", 30.0)}
    timings = timing.compare(calls, CPU, rounds=9, clock=clock, budget=budget)
    assert [len(t.samples) for t in timings.values()] == [1, 1]
    assert [len(t.samples) for t in timing.compare(calls, CPU, 3, clock=clock, budget=Budget()).values()] == [3, 3]


def test_a_graph_counts_for_the_calls_in_it() -> None:
    clock = FakeClock()

    class Replay(timing.CudaGraph):
        def __init__(self) -> None:
            self.calls, self.replay = 4, clock.task("graph", 2.0)

        def __call__(self, i: int) -> None:
            self.replay(i)

    assert timing.compare({"graph": Replay()}, CPU, rounds=3, clock=clock)["graph"].samples == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("cuda", 1)], ids=str)
def test_seconds_of_one_call(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    clock, current = FakeClock(), [torch.device("cuda", 0)]

    @contextmanager
    def switch(to: torch.device) -> Iterator[None]:
        current.append(to)
        yield
        current.pop()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            assert current[-1] == device
            self.at = clock.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert seconds(clock.task("a", 0.25), device, 4) == pytest.approx(0.25)


def test_calls_get_running_numbers() -> None:
    seen: list[int] = []
    seconds(seen.append, CPU, 5)
    assert seen == [0, 1, 2, 3, 4]


def test_ratios_are_taken_within_rounds() -> None:
    ours, base = Timing((2.0, 20.0, 3.0)), Timing((1.0, 10.0, 2.0))
    ratio, low, high = ours.over(base)
    assert (ratio, low, high) == (2.0, 1.75, 2.0)
    assert ours.median == 3.0
    assert Timing((5.0,)).quartiles == (5.0, 5.0)


def test_a_budget_runs_out() -> None:
    clock = FakeClock()
    budget = Budget(2, now=lambda: clock.now)
    assert not budget.spent
    clock.now += 121
    assert budget.spent
    assert not Budget().spent


def test_rotating_copies_exceed_the_cache() -> None:
    for size in (1, 1 << 20, 1 << 30):
        copies = timing.copies_beyond_cache(size, CPU)
        assert copies >= 2
        assert copies * size >= 64 << 20 or copies == 64


def test_bandwidth_counts_what_is_read_and_written() -> None:
    bandwidth = timing.copy_bandwidth(CPU, rounds=1, clock=lambda call, device, calls: 0.25)
    assert bandwidth == 2 * 2**28 / 0.25  # 256 MiB read and as many written


def test_peak_memory_counts_what_is_alive_at_once_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    def call(_: int) -> None:
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        b.mul(2).add_(1)

    assert timing.peak_memory(call, CPU) == pytest.approx(8, rel=0.01)  # two of 4 MiB at a time
    assert capfd.readouterr() == ("", "")
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"
