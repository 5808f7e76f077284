"""The N:M pattern, of every M consecutive weights N are kept, and along which dimensions it lies in a weight."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from nm_sparsity.core.errors import SparsityError

Layout = Literal["channel", "kernel"]
"""M consecutive input channels at one position of a filter, or M consecutive weights of the flattened filter."""


@dataclass(frozen=True, order=True)
class NMPattern:
    """Keep ``n`` of every ``m`` consecutive weights along the reduction dimension.

    Raises:
        SparsityError: unless 1 <= n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (type(self.n) is int and type(self.m) is int and 1 <= self.n < self.m):
            raise SparsityError(
                f'pattern "{self.n}:{self.m}" is not N:M with 1 <= N < M; write e.g. "2:4" to keep 2 of every 4'
            )

    @classmethod
    def parse(cls, text: str | NMPattern) -> NMPattern:
        """``"2:4"`` -> ``NMPattern(2, 4)``; a pattern passes through.

        Raises:
            SparsityError: if the text is not two whole numbers N:M with 1 <= N < M.
        """
        if isinstance(text, NMPattern):
            return text
        match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text) if isinstance(text, str) else None
        if match is None:
            raise SparsityError(f'pattern "{text!s:.40}" is not of the form N:M; write e.g. "2:4" to keep 2 of every 4')
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """The fraction of weights kept, n / m."""
        return self.n / self.m

    def implies(self, other: NMPattern) -> bool:
        """Whether every weight of this pattern is one of `other`, too: 1:4 and 2:8 ones run as 2:4."""
        for start in range(0, math.lcm(self.m, other.m), other.m):
            # How many entries of this group of the other's lie in each group of ours.
            shared = Counter(i // self.m for i in range(start, start + other.m))
            if sum(min(self.n, entries) for entries in shared.values()) > other.n:
                return False
        return True

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


class Placement(NamedTuple):
    """The pattern of a weight and the reduction dimensions along which its groups lie."""

    pattern: NMPattern
    dims: tuple[int, ...]

    @property
    def plain(self) -> tuple[str, list[int]]:
        """As text and numbers, for files."""
        return str(self.pattern), list(self.dims)

    @classmethod
    def from_plain(cls, value: Any) -> Placement:
        """The placement that `plain` gave.

        Raises:
            ValueError or TypeError: if `value` is anything else.
        """
        pattern, dims = value
        if (
            not isinstance(dims, list | tuple)
            or not dims
            or not all(type(d) is int and d >= 0 for d in dims)
            or len(set(dims)) < len(dims)
        ):
            raise ValueError(f"{dims!r} are no dimensions")
        return cls(NMPattern.parse(pattern), tuple(dims))


Table = dict[str, Placement]
"""State-dict name -> placement, of every sparse weight."""


def check_layout(layout: str) -> Layout:
    """`layout` itself.

    Raises:
        SparsityError: unless it is "channel" or "kernel".
    """
    for known in get_args(Layout):
        if layout == known:
            return known
    raise SparsityError(f'unknown layout "{layout}"; known layouts: {", ".join(get_args(Layout))}')
