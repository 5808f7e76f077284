"""How every figure is timed: alternatives in turn, round after round, so that a busy machine disturbs all alike.

On CUDA by events, on the CPU by the wall clock; medians and quartiles of the rounds. Callables take a running number,
with which they choose among inputs that together exceed the cache.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one sample a round."""

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
    alternatives: Mapping[str, Call], device: torch.device, rounds: int = 20, least_seconds: float = 1e-3
) -> dict[str, Timing]:
    """Time each alternative once a round, as many calls in a row as take `least_seconds`."""
    calls = {}
    for name, call in alternatives.items():
        sample(call, device, 1)  # first-call work: compilation, allocation, autotuning
        calls[name] = min(1000, int(least_seconds / max(sample(call, device, 1), 1e-7)) + 1)
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, call in alternatives.items():
            samples[name].append(sample(call, device, calls[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def sample(call: Call, device: torch.device, calls: int) -> float:
    """Seconds a call, over `calls` calls in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(calls):
            call(i)
        return (time.perf_counter() - start) / calls
    torch.cuda.synchronize(device)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for i in range(calls):
        call(i)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def cuda_graph(call: Call, calls: int) -> Call:
    """`calls` calls of `call` captured as one CUDA graph; the result replays it and must be divided by `calls`.

    Without launches from Python between the kernels: what a small product costs on the GPU alone.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return lambda _: graph.replay()


def copies_beyond_cache(bytes_each: int, device: torch.device) -> int:
    """How many rotating copies of an input of `bytes_each` exceed twice the last-level cache."""
    cache = 32 << 20
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-2 * cache // max(1, bytes_each))))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills ``["mib"]`` of the yielded dict with the peak memory of the block: allocated on CUDA, resident on Linux."""
    result: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result["mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        return
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the peak starts at what is resident now
    except OSError:
        yield result
        return
    yield result
    match: Any = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    result["mib"] = int(match[1]) / 1024
