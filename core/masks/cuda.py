"""The Triton kernels for CUDA tensors. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from nm_sparsity.core.masks.memory import Lines

BLOCK, LEAST_GROUPS = 2048, 128
"""Weights a program handles, 16 a thread; at least one group a thread."""

RESULTS = {"keep": 0, "mask": 1, "add": 2, "soft": 4}

_in_graphs: list[Tensor] = []
"""What a captured CUDA graph reads whenever it is replayed: it lives as long as the process."""


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def groups_per_program(m: int) -> int:
    """How many groups of `m` a program takes."""
    return max(BLOCK // m, LEAST_GROUPS)


class Rows:
    """The table of weights of one dtype, pattern and kind of lines that a launch takes, in the device's memory."""

    def __init__(self, weights: Sequence[Tensor], lines: Sequence[Lines], places: Sequence[int], n: int, m: int):
        self._device, self._from = weights[0].device, _type(weights[0].dtype)
        self._n, self._m, self._contiguous = n, m, lines[0][1] == 1
        self._compiled: dict[Any, Any] = {}
        """The compiled kernel of each form of a call: Triton takes longer to find it than to launch it."""
        groups = [outer * inner for outer, inner in lines]
        self._programs, first = _programs(tuple(groups), groups_per_program(m))
        self._columns = (groups, [inner for _, inner in lines], first, list(places))
        self._whole = not any(count % 16 for count in groups)
        self._uploads: dict[tuple[str, int], tuple[Sequence[int] | Tensor, Tensor]] = {}
        self.point([w.data_ptr() for w in weights])

    def point(self, weights: Sequence[int]) -> None:
        """The weights lie at these addresses now."""
        self._aligned = self._whole and not any(address % 16 for address in weights)
        self._table = list(chain(*zip(weights, *self._columns, strict=True)))

    def run(
        self,
        result: str,
        out: Tensor | None,
        places: Sequence[int],
        dtype: torch.dtype,
        scale: float | Tensor | list[int] = 0.0,
        changes: Tensor | None = None,
    ) -> None:
        """See `cpu.Rows.run`."""
        from nm_sparsity.core.masks import triton_kernel as kernels

        if not len(self._programs):
            return
        grid = len(self._programs), 1, 1
        aligned = self._aligned and (out is not None or not any(address % 16 for address in places))
        with _current(self._device):
            if isinstance(scale, list):
                scale = self._on_device("scales", scale)
            pointer = scale if isinstance(scale, Tensor) and scale.device == self._device else None
            form = result, dtype, out is None, aligned, changes is None, None if pointer is None else pointer.dtype
            args = (
                self._on_device("programs", self._programs),
                self._on_device("table", self._table),
                self._on_device(result, places),
                *(0 if out is None else out.data_ptr(), float(scale) if pointer is None else pointer, changes),
                *(self._n, self._m, groups_per_program(self._m), RESULTS[result], self._contiguous),
                *(self._from, _type(dtype), 1 if out is None else out.element_size()),
                *(aligned, changes is not None, pointer is not None),
            )
            compiled = self._compiled.get(form)
            if compiled is None:
                self._compiled[form] = kernels.select_rows[grid](*args)  # None from Triton's interpreter
            else:
                compiled[grid](*args)

    def _on_device(self, name: str, values: Sequence[int] | Tensor) -> Tensor:
        """`values` in the device's memory, uploaded when they changed, for each stream apart: streams do not wait.

        An upload that is captured in a graph happens at its replays only, so it is not kept for other calls.
        """
        key = name, stream(self._device)
        before, uploaded = self._uploads.get(key, (None, None))
        if uploaded is None or not (before is values or (isinstance(values, list) and before == values)):
            uploaded = _upload(values, self._device)
            if not capturing(self._device):
                self._uploads[key] = values, uploaded
        elif capturing(self._device):
            _in_graphs.append(uploaded)
        return uploaded


def select(
    result: str,
    w: Tensor,
    out: Tensor,
    lines: Lines,
    n: int,
    m: int,
    scale: Tensor | None = None,
    traced: bool = False,
) -> None:
    """The `result` of one weight, into `out`, which lies in memory as `w` does; `traced`: as a launch tracers see."""
    from nm_sparsity.core.masks import triton_kernel as kernels

    (outer, inner), per_program = lines, groups_per_program(m)
    if not outer:
        return
    launch: Any = torch.library.wrap_triton(kernels.select) if traced else kernels.select
    with nullcontext() if traced else _current(w.device):
        launch[(-(-outer * inner // per_program),)](
            w,
            out.view(torch.int8) if out.dtype == torch.bool else out,
            w if scale is None else scale,
            outer * inner,
            inner,
            N=n,
            M=m,
            G=per_program,
            RESULT=RESULTS[result],
            CONTIGUOUS=inner == 1,
        )


def apply_masks_(targets: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """See `cpu.apply_masks_`."""
    from nm_sparsity.core.masks import triton_kernel as kernels

    sizes, device = [t.numel() for t in targets], targets[0].device
    programs, first = _programs(tuple(sizes), BLOCK)
    if len(programs):
        columns = ([t.data_ptr() for t in targets], [t.data_ptr() for t in masks], sizes, first)
        with _current(device):
            kernels.apply_masks[(len(programs),)](
                _upload(programs, device),
                _upload(list(chain(*zip(*columns, strict=True))), device),
                B=BLOCK,
                BITS=8 * targets[0].element_size(),
            )


@lru_cache(8)
def _programs(sizes: tuple[int, ...], per_program: int) -> tuple[Tensor, list[int]]:
    """The row of each program where row i takes `sizes[i]` things, and the first program of each row."""
    counts = [-(-size // per_program) for size in sizes]
    numbers = torch.arange(len(sizes), dtype=torch.int32, device="cpu")
    rows = torch.repeat_interleave(numbers, torch.tensor(counts, device="cpu"))
    return rows, [0, *accumulate(counts)][:-1]


def _upload(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, asynchronously: from pinned memory, which a graph that captures this reads at replays.

    What is uploaded then is the graph's own, used and freed in the order of its stream.
    """
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64, device="cpu")
    if device.type != "cuda":  # Triton's interpreter
        return host
    pinned = host.pin_memory()
    uploaded = pinned.to(device, non_blocking=True)
    if capturing(device):
        _in_graphs.append(pinned)
    return uploaded


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a CUDA `device` has."""
    return torch.cuda.get_device_properties(device).total_memory


def stream(device: torch.device) -> int:
    """What tells the present stream of a CUDA `device` from its others."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _current(device: torch.device) -> Any:
    """A block in which `device` is the present one."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures what is launched on `device` now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _type(dtype: torch.dtype) -> Any:
    from triton import language

    return getattr(language, "int8" if dtype == torch.bool else str(dtype).removeprefix("torch."))
