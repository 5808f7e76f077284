"""Hyperparameters that change over a run, as functions of the fraction of its optimizer steps that are done."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_sparsity.core.errors import SparsityError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


_SHAPES: dict[str, Callable[[float, float, Tensor], Tensor]] = {
    "linear": lambda first, last, t: first + (last - first) * t,
    "cosine": lambda first, last, t: first + (last - first) * (1 - torch.cos(math.pi * t)) / 2,
    "exponential": lambda first, last, t: first * (last / first) ** t,
}


@dataclass(frozen=True)
class Schedule:
    """From `first` to `last` between the fractions `start` and `end` of a run's steps, constant before and after.

    As text: ``linear(0, 2e-4, 0, 0.5)``, or ``linear(0, 2e-4)`` over the whole run; likewise ``cosine`` (half a wave)
    and ``exponential`` (a constant factor a step). ``step(0, 2e-4, 0.5)`` jumps at one fraction.

    Raises:
        SparsityError: for an unknown shape, fractions that are not 0 <= start < end <= 1, numbers that are not finite,
            or an exponential one that does not stay above 0.
    """

    shape: str
    first: float
    last: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in (*_SHAPES, "step"):
            raise SparsityError(f'unknown schedule "{self.shape}"; known schedules: {", ".join(_SHAPES)}, step')
        if not (math.isfinite(self.first) and math.isfinite(self.last)):
            raise SparsityError(f"a schedule goes between finite numbers, found {self}")
        if not (0 <= self.start <= self.end <= 1) or (self.start == self.end) != (self.shape == "step"):
            raise SparsityError(f"a schedule's start and end are fractions of the run, start before end; found {self}")
        if self.shape == "exponential" and not min(self.first, self.last) > 0:
            raise SparsityError(f"an exponential schedule needs numbers above 0, found {self}")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that `text` stands for.

        Raises:
            SparsityError: if it is not of the form of the examples above.
        """
        match = re.fullmatch(r"\s*(\w+)\s*\(([^()]*)\)\s*", text)
        words = [word.strip() for word in match[2].split(",")] if match else []
        counts = (3,) if match and match[1] == "step" else (2, 4)
        if match is None or len(words) not in counts or not all(map(_NUMBER.fullmatch, words)):
            known = "linear(first, last, start, end), cosine(...), exponential(...) or step(first, last, at)"
            raise SparsityError(f'"{text}" is not a schedule; write {known}, start, end and at as fractions of the run')
        numbers = [float(word) for word in words]
        return cls(match[1], *numbers, *numbers[2:][: len(numbers) == 3])

    def __str__(self) -> str:
        bounds = (self.start,) if self.shape == "step" else (self.start, self.end)
        return f"{self.shape}({', '.join(repr(float(number)) for number in (self.first, self.last, *bounds))})"

    @property
    def largest(self) -> float:
        """The largest value it takes."""
        return max(self.first, self.last)

    @property
    def smallest(self) -> float:
        """The smallest value it takes."""
        return min(self.first, self.last)

    def at(self, progress: Tensor) -> Tensor:
        """Its value where `progress`, a 0-dim tensor, is the fraction of the run that is done; on its device."""
        if self.shape == "step":
            return torch.where(progress >= self.start, self.last, self.first)
        t = ((progress - self.start) / (self.end - self.start)).clamp(0, 1)
        # The ends exactly: a mask must have faded to 0, not to 1e-9.
        value = _SHAPES[self.shape](self.first, self.last, t)
        return torch.where(t <= 0, self.first, torch.where(t >= 1, self.last, value))
