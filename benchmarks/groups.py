"""Groups of rows, each measured in a process of its own: a crash or a hang costs its group alone, and is a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from nm_sparsity.benchmarks import report
from nm_sparsity.benchmarks.report import Result, Row
from nm_sparsity.benchmarks.timing import Budget
from nm_sparsity.core.deploy.child import ChildError, answers

START = 120.0
"""Seconds until a process has imported everything and found its device."""
GRACE = 60.0
"""Seconds that a group may take longer than it was given, since it looks at the clock between rows only."""


@dataclass(frozen=True)
class Group:
    """Rows of one result file, which ``module.run(result, device, **options)`` measures."""

    what: str
    """The result that its rows go to."""
    module: str
    label: Row
    """What tells it from others, in the row that says why it was not run."""
    options: dict[str, Any] = field(default_factory=dict)
    share: float | None = None
    """Of the minutes, if there is a limit; ``run`` gets it as ``minutes``."""
    why_not: str = ""
    """Why it cannot be run here."""
    patience: float = 300.0
    """Seconds without a row after which it hangs."""


def run(groups: Iterable[Group], device: torch.device, out: str | Path, budget: Budget, threads: int = 1) -> list[str]:
    """Run `groups`, those of one result in a row, each into the file of its result; returns which failed and why."""
    failed = []
    for what, of_it in groupby(groups, key=lambda group: group.what):
        with report.saved(what, device, out) as result:
            for group in of_it:
                try:
                    _run(group, result, device, budget, threads)
                except ChildError as error:
                    result.add(**group.label, not_run=f"its process failed: {error}")
                    failed.append(f"{what} {' '.join(map(str, group.label.values()))}".rstrip())
                result.save(out)
            result.environment["gpu_after"] = report.gpu_state()
    return failed


def _run(group: Group, result: Result, device: torch.device, budget: Budget, threads: int) -> None:
    if group.why_not or budget.spent:
        result.add(**group.label, not_run=group.why_not or "out of time")
        return
    report.progress(group.what, *group.label.values())
    left = budget.minutes_left
    minutes = left if group.share is None or budget.minutes is None else min(left, group.share * budget.minutes)
    limited = minutes != float("inf")
    request = {
        "module": group.module,
        "what": group.what,
        "options": {**group.options, **({"minutes": minutes} if limited else {})},
        "device": device.type,
        "threads": threads,
    }
    total = START + 60 * minutes + GRACE if limited else None
    for row in answers("nm_sparsity.benchmarks.groups", request, group.patience, START + group.patience, total):
        result.add(**row)


def _work(request: Any, answer: Callable[[Row], None]) -> None:
    device = report.settle(torch.device(request["device"]), request["threads"])
    start = time.monotonic()
    result = Result(request["what"], device.type, sink=answer, environment={})
    import_module(request["module"]).run(result, device, **request["options"])
    report.progress(request["what"], f"took {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    from nm_sparsity.core.deploy.child import serve

    raise SystemExit(serve(_work))
