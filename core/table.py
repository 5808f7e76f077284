"""Aligned text tables, for terminals and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]], markdown: bool = False) -> str:
    """Lines of left-aligned text and right-aligned numbers under `headers`; `None` prints as "-".

    A column is numeric if every cell in it is a number or ``None``; floats print with four significant digits.
    """
    raw = list(rows)
    table = [[_text(cell) for cell in row] for row in raw]
    numeric = [
        any(row[i] is not None for row in raw) and all(_is_number(row[i]) or row[i] is None for row in raw)
        for i in range(len(headers))
    ]
    widths = [max([3, len(header), *(len(row[i]) for row in table)]) for i, header in enumerate(headers)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()

    rule = [
        "-" * (width - 1) + ":" if right and markdown else "-" * width
        for width, right in zip(widths, numeric, strict=True)
    ]
    return "\n".join(line(cells) for cells in [list(headers), rule, *table])


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return str(cell)


def common_name(names: Sequence[str]) -> str:
    """One name for all of `names`, which differ in numbers only, with a star for each of those."""
    parts = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(part[0] if len(set(part)) == 1 else "*" for part in parts)
