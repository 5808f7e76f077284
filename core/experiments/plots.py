"""Curves of training runs as a picture: a row of panels, each with named series over one or more seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

Curve = Sequence[tuple[float, float]]
"""Points (x, y) of one run."""


def draw(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    x: str,
    y: str,
    linear_below: float | None = None,
    marker: str | None = None,
) -> None:
    """Write a PNG file of panels side by side on one vertical scale. Needs matplotlib.

    Args:
        panels: title -> name in the legend -> the curves of its runs, drawn as their mean within the band from the
            lowest to the highest.
        x: what lies along the horizontal axes.
        y: what lies along the vertical ones.
        linear_below: makes these logarithmic, but linear below this value, so that they show 0 too.
        marker: matplotlib's, for series of few points.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5 * len(panels), 4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
        for name, curves in series.items():
            points = [dict(curve) for curve in curves]
            # Runs that were cut off end earlier than the others.
            at = sorted(set.intersection(*map(set, points)))
            values = [[curve[place] for curve in points] for place in at]
            (line,) = axis.plot(at, list(map(mean, values)), label=name, marker=marker)
            band = list(map(min, values)), list(map(max, values))
            axis.fill_between(at, *band, color=line.get_color(), alpha=0.15)
            if marker:
                axis.vlines(at, *band, color=line.get_color(), alpha=0.5)
        axis.set(title=title, xlabel=x, ylabel=y)
        if linear_below is not None:
            axis.set_yscale("symlog", linthresh=linear_below)
        if series:
            axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
