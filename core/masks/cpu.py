"""The compiled CPU kernel (`keep_largest.cpp`) through ctypes."""

from __future__ import annotations

import ctypes
import struct
import warnings
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from nm_sparsity.core.masks.memory import TYPES, Lines

RESULTS = {"keep": 0, "mask": 1, "add": 2, "apply": 3, "soft": 4}
_NUMBER = {dtype: number for number, dtype in enumerate(TYPES)}
_CALL = struct.Struct("6q d P q P q q P P q 4q")
"""`Call` in keep_largest.cpp: ctypes takes one argument much faster than many."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None (with one warning) where the package was installed without a compiler."""
    folder = Path(__file__).parent
    path = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_cpu{suffix}").exists()), None)
    kernel = None if path is None else ctypes.CDLL(str(path))
    if kernel is None or not hasattr(kernel, "nm_run"):
        reason = "missing (no C++ compiler at install time?)" if kernel is None else "an older one: install again"
        warnings.warn(
            f"nm_sparsity's compiled CPU kernel is {reason}: "
            "masks are computed in pure PyTorch, with the same result but several times slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    kernel.nm_run.argtypes = [ctypes.c_char_p]
    return kernel


def available() -> bool:
    """Whether the kernel is there."""
    return library() is not None


class Rows:
    """The table of weights of one dtype and pattern that the kernel takes in one call."""

    def __init__(self, weights: Sequence[Tensor], lines: Sequence[Lines], places: Sequence[int], n: int, m: int):
        self._form = (m, n)
        self._type = _NUMBER[weights[0].dtype]
        self._table = _table(weights, lines, places)

    def point(self, weights: Sequence[int]) -> None:
        """The weights lie at these addresses now."""
        self._table[::4] = array("q", weights)  # the first of each row

    def run(
        self,
        result: str,
        out: Tensor | None,
        places: Sequence[int],
        dtype: torch.dtype,
        scale: float | Tensor | list[int] = 0.0,
        changes: Tensor | None = None,
    ) -> None:
        """Compute `result`, "keep", "soft", "mask" or "add", of all weights.

        Args:
            result: "keep" writes the masked weights, "soft" `reference.soft_threshold` times `scale`, "mask" the masks,
                "add" adds `scale` times what is dropped.
            out: where the results lie, or None if `places` says it alone.
            places: the element of `out` where each result starts; without `out` their addresses, 0 for none.
            dtype: of the results.
            scale: for "add" and "soft"; for "soft" the addresses of an fp32 number for each weight.
            changes: int64, takes the number of entries of each mask that changed.
        """
        base, unit = (0, 1) if out is None else (out.data_ptr(), out.element_size())
        number, each = (0.0, scale) if isinstance(scale, list) else (float(scale), ())
        starts, scales = array("q", places), array("q", each)
        _run(
            *(RESULTS[result], self._type, _NUMBER.get(dtype, 0), *self._form),
            *(number, _address(scales), len(starts), _address(self._table), base, unit, _address(starts)),
            0 if changes is None else changes.data_ptr(),
        )


def select(result: str, w: Tensor, out: Tensor, lines: Lines, n: int, m: int, scale: Tensor | None = None) -> None:
    """The `result` of one weight, into `out`, which lies in memory as `w` does."""
    number = None if scale is None else scale.to(w.device, torch.float32)
    scales = array("q", [] if number is None else [number.data_ptr()])
    _run(
        *(RESULTS[result], _NUMBER[w.dtype], _NUMBER.get(out.dtype, 0), m, n),
        *(0.0, _address(scales), 1, 0, out.data_ptr(), 0, 0, 0),
        row=(w.data_ptr(), *lines, 0),
    )


def apply_masks_(targets: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero the entries of `targets`, of one element size, that `masks` drop; both lie in memory alike."""
    starts, sizes = array("q", [t.data_ptr() for t in targets]), [(t.numel(), 1) for t in targets]
    table = _table(masks, sizes, [0] * len(masks))
    form = RESULTS["apply"], 0, targets[0].element_size(), 1, 0
    _run(*form, 0.0, 0, len(targets), _address(table), 0, 1, _address(starts), 0)


def _table(tensors: Iterable[Tensor], lines: Iterable[Lines], places: Iterable[int]) -> array[int]:
    """A `Row` of keep_largest.cpp for each."""
    rows = ((t.data_ptr(), *line, place) for t, line, place in zip(tensors, lines, places, strict=True))
    return array("q", chain.from_iterable(rows))


def _run(*call: float, row: Sequence[int] = (0, 0, 0, 0)) -> None:
    kernel = library()
    if kernel is None or kernel.nm_run(_CALL.pack(_CALL.size, *call, torch.get_num_threads(), *row)):
        raise RuntimeError(f"the compiled CPU kernel does not know {call}: it is of another version, install again")


def _address(values: array[int]) -> int:
    """0 of an empty one."""
    return values.buffer_info()[0]
