"""What became of a model's weights when its layers were to run 2:4."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nm_sparsity.core.deploy.measure import Times
from nm_sparsity.core.table import common_name, format_table


@dataclass(frozen=True)
class Row:
    """What became of one weight."""

    name: str
    shape: tuple[int, ...]
    runs: bool
    """Whether it runs 2:4 now."""
    note: str
    """Why not, or what runs with it."""
    tokens: int | None = None
    times: Times | None = None


@dataclass(frozen=True)
class Acceleration:
    """What became of each weight: both times, and why it runs 2:4 or stays dense. Prints as a table."""

    backend: str
    launch: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """What did not go as it should."""

    @property
    def converted(self) -> tuple[str, ...]:
        """The weights that run 2:4 now."""
        return tuple(row.name for row in self.rows if row.runs)

    def __str__(self) -> str:
        groups: dict[Any, list[Row]] = {}
        for row in self.rows:
            groups.setdefault((re.sub(r"\d+", "*", row.name), row.shape, row.runs, row.note, row.tokens), []).append(
                row
            )
        cells = []
        for alike in groups.values():
            first, times = alike[0], alike[0].times
            shape = "x".join(map(str, first.shape))
            both = (times.dense * 1e6, times.sparse * 1e6, f"{times.speedup:.2f}x") if times else (None, None, None)
            name = common_name([row.name for row in alike])
            cells.append(
                (name, len(alike), shape, first.tokens, *both, self.backend if first.runs else "dense", first.note)
            )
        table = format_table(
            ["weight", "", "shape", "tokens", "dense us", "2:4 us", "speed-up", "runs on", "note"], cells
        )
        done = f"{len(self.converted)} of {len(self.rows)} weights run 2:4 on {self.backend}"
        measured = any(row.times for row in self.rows)
        how = (
            f"timed as launched ({self.launch})" if measured else "nothing was measured: they may be slower than dense"
        )
        return "\n".join([table, f"{done}; {how}", *self.notes])
