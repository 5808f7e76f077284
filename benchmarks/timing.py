"""How every figure is timed: alternatives in turn, round after round, so that a busy machine disturbs all alike.

By `seconds`, or by a clock that the caller brings; medians and quartiles of the rounds. Each round takes them in
another order, since what ran before leaves its caches behind, which is worth some percent. Callables take a running
number, with which they choose among inputs that together exceed the cache.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from nm_sparsity.core.deploy.clock import Call, Clock, CudaGraph, seconds


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample of each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds: a quarter of the samples is below the first, above the second."""
        return quartiles(self.samples)

    def over(self, other: Timing) -> tuple[float, float, float]:
        """This time / the other's: median and quartiles of the ratios within each round."""
        ratios = [a / b for a, b in zip(self.samples, other.samples, strict=True)]
        return (statistics.median(ratios), *quartiles(ratios))


def quartiles(values: list[float] | tuple[float, ...]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def compare(
    alternatives: Mapping[str, Call],
    device: torch.device,
    rounds: int = 20,
    least_seconds: float = 1e-3,
    clock: Clock = seconds,
    budget: Budget | None = None,
) -> dict[str, Timing]:
    """The timings of all alternatives: one sample of each in every round, of as many calls as take `least_seconds`.

    When `budget` is spent, no further round begins; the first one always does.
    """

    def sample(call: Call, calls: int) -> float:
        return clock(call, device, calls) / (call.calls if isinstance(call, CudaGraph) else 1)

    calls = {}
    for name, call in alternatives.items():
        first = sample(call, 1)  # with first-call work: compilation, allocation, autotuning
        once = first if first > 1000 * least_seconds else sample(call, 1)
        calls[name] = min(1000, int(least_seconds / max(once, 1e-7)) + 1)
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    order, shuffle = list(alternatives.items()), random.Random(0).shuffle
    for done in range(rounds):
        if done and budget is not None and budget.spent:
            break
        shuffle(order)
        for name, call in order:
            samples[name].append(sample(call, calls[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


class Budget:
    """A number of minutes, counted from now on; without a number, endless."""

    def __init__(self, minutes: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.minutes = minutes
        self._now, self._end = now, math.inf if minutes is None else now() + 60 * minutes

    @property
    def minutes_left(self) -> float:
        """At least 0; infinite without a number."""
        return max(0.0, (self._end - self._now()) / 60)

    @property
    def spent(self) -> bool:
        """Whether the minutes are over."""
        return self._now() > self._end


def copies_beyond_cache(bytes_each: int, device: torch.device) -> int:
    """How many rotating copies of an input of `bytes_each` exceed twice the last-level cache."""
    cache = 32 << 20
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-2 * cache // max(1, bytes_each))))


def copy_bandwidth(device: torch.device, rounds: int = 9, clock: Clock = seconds) -> float:
    """Bytes a second, read and written, of copying 256 MiB into memory that is there already: the median."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source).fill_(0)
    copying = compare({"copy": lambda _: target.copy_(source)}, device, rounds, clock=clock)["copy"]
    return 2 * source.nbytes / copying.median


def peak_memory(call: Call, device: torch.device) -> float:
    """MiB that one call allocates at its peak, beyond what was allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(0)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    profile: Any = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    )
    with _quiet(), profile:
        call(0)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most: int = max(accumulate((size for _, size in changes), initial=0))
    return most / 2**20


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what native code prints to stderr: the profiler's log of itself and of a driver that is not there."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
