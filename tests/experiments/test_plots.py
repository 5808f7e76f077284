"""Pictures of curves, looked at as pixels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nm_sparsity.core.experiments.plots import draw

BLUE = (31, 119, 180)
"""matplotlib's first colour."""


def rows_of_the_line(path: Path) -> np.ndarray:
    """Where the first series' line lies: for each column of pixels that has it, the mean row."""
    blue = (np.asarray(Image.open(path).convert("RGB")).astype(int) - BLUE).__abs__().sum(2) < 30
    return np.array([np.flatnonzero(column).mean() for column in blue.T if column.any()])


def test_a_series_is_the_mean_of_its_runs(tmp_path: Path) -> None:
    """Runs that rise and fall alike have a level mean; the last one was cut off, so that x = 2 is left out."""
    runs = [[(0, 0.0), (1, 1.0), (2, 50.0)], [(0, 1.0), (1, 0.0)]]
    draw(tmp_path / "level.png", {"": {"a": runs}}, "x", "y")
    rows = rows_of_the_line(tmp_path / "level.png")
    assert len(rows) > 300
    assert np.median(np.abs(rows - np.median(rows))) < 1
    draw(tmp_path / "rising.png", {"": {"a": runs[:1]}}, "x", "y")
    assert np.ptp(rows_of_the_line(tmp_path / "rising.png")) > 200


@pytest.mark.parametrize("count", [1, 3])
def test_panels_lie_side_by_side(tmp_path: Path, count: int) -> None:
    panels = {f"{n}:4": {"ste": [[(0, 0.0), (1, 1e-3)]]} for n in range(count)}
    draw(tmp_path / "panels.png", panels, "step", "SAD", linear_below=1e-5)
    with Image.open(tmp_path / "panels.png") as image:
        assert image.size == (600 * count, 480)


@pytest.mark.slow
def test_importing_loads_no_matplotlib() -> None:
    code = "import sys, nm_sparsity.core.experiments.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
