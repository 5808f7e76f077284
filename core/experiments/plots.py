"""Curves of training runs as a picture: a row of panels, each with named series over one or more seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Curve = Sequence[tuple[float, float]]
"""Points (x, y) of one run."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    """What lies along the horizontal axis."""
    y: str
    series: Mapping[str, Sequence[Curve]]
    """Name in the legend -> the curves of its runs, drawn as their mean within the band from lowest to highest."""
    linear_below: float | None = None
    """Draw y on a logarithmic axis that is linear below this value, and so shows 0 too."""


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Write `panels`, side by side, as a PNG file; those with the same `y` share its scale. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shared = len({panel.y for panel in panels}) == 1
    size = (5 * len(panels), 4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=shared, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, curves in panel.series.items():
            points = [dict(curve) for curve in curves]
            # Runs that were cut off end earlier than the others.
            at = sorted(set.intersection(*map(set, points)))
            values = [[curve[x] for curve in points] for x in at]
            (line,) = axis.plot(at, list(map(statistics.mean, values)), label=name)
            axis.fill_between(at, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.15)
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        if panel.linear_below is not None:
            axis.set_yscale("symlog", linthresh=panel.linear_below)
        if panel.series:
            axis.legend()
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
