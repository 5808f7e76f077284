"""One call runs everything; a failure costs only its own benchmark."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from nm_sparsity.benchmarks import groups, suite
from nm_sparsity.benchmarks.groups import Group
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.benchmarks.timing import Budget

CPU = torch.device("cpu")


def files(folder: Path) -> dict[str, Result]:
    results = [Result.load(path) for path in folder.glob("*.json")]
    return {result.what: result for result in results}


def test_without_time_every_benchmark_has_a_file_that_says_so(tmp_path: Path) -> None:
    assert suite.main(["--device", "cpu", "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    found = files(tmp_path)
    assert sorted(found) == ["masks", "models", "products", "training"]
    reasons = {what: {row["not_run"].partition(";")[0] for row in result.rows} for what, result in found.items()}
    late, gpu = "out of time", "needs an NVIDIA GPU"
    assert reasons == {"masks": {late}, "training": {late}, "products": {gpu, late}, "models": {late, gpu}}
    assert all(result.environment["torch"] for result in found.values())


def run(result: Result, device: torch.device, how: str, minutes: float | None = None) -> None:
    """What this module measures, when a group names it."""
    result.add(how="first", pid=os.getpid(), minutes=minutes)
    if how == "crashes":
        os.kill(os.getpid(), signal.SIGILL)
    if how == "hangs":
        time.sleep(60)
    result.add(how="last")


@pytest.mark.slow
def test_a_crash_or_a_hang_costs_its_group_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    expected = {
        "crashes": "its process failed: it was ended by SIGILL",
        "hangs": "its process failed: no answer for 2 s",
        "works": None,
    }
    made = [Group("products", "test_suite", {"layer": how}, {"how": how}, patience=2.0) for how in expected]
    failed = groups.run(made, CPU, tmp_path, Budget())
    assert failed == ["products crashes", "products hangs"]
    rows = iter(files(tmp_path)["products"].rows)
    for how, reason in expected.items():
        first = next(rows)
        assert first["how"] == "first"
        assert first["pid"] != os.getpid()
        assert next(rows) == ({"how": "last"} if reason is None else {"layer": how, "not_run": reason})


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--minutes", "0"]) == 1
    assert "error: --minutes must be above 0" in capsys.readouterr().err
    assert suite.main(["--out", "/proc/none", "--device", "cpu"]) == 1
    assert "error: cannot write to the folder /proc/none" in capsys.readouterr().err
