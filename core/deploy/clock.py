"""How long calls take on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Call = Callable[[int], object]
"""What is timed: it gets the running number of the call."""

Clock = Callable[[Call, torch.device, int], float]
"""What `seconds` is; a test can bring its own."""


def seconds(call: Call, device: torch.device, calls: int) -> float:
    """Seconds that each of `calls` calls in a row takes: by events on a CUDA device, by the wall clock elsewhere.

    `call` gets the running number of the call.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(calls):
            call(i)
        return (time.perf_counter() - start) / calls
    with torch.cuda.device(device):  # events are recorded on the current one
        torch.cuda.synchronize()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for i in range(calls):
            call(i)
        last.record()
        last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1e3 / calls


def host_seconds(call: Call, device: torch.device, calls: int) -> float:
    """Seconds of host time that each of `calls` calls takes to launch its work on a CUDA device that is idle before."""
    total = 0.0
    for i in range(calls):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call(i)
        total += time.perf_counter() - start
    torch.cuda.synchronize(device)
    return total / calls


class CudaGraph:
    """`calls` calls of a function captured as one CUDA graph, replayed by calling this; it counts for all of them.

    Without launches from Python between the kernels: what a small product costs on the GPU alone.
    All of them work on `device`, by default the current one.
    """

    def __init__(self, call: Call, calls: int, device: torch.device | None = None) -> None:
        self.calls = calls
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for i in range(3):
                    call(i)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph, stream=stream):  # torch's own is of the device that was current first
                for i in range(calls):
                    call(i)

    def __call__(self, _: int) -> None:
        self._graph.replay()
