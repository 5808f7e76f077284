"""One call runs everything; a failure costs only its own benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nm_sparsity.benchmarks import suite
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
    assert all(result.rows == [{"not_run": "out of time"}] for result in found.values())
    assert all(result.environment["torch"] for result in found.values())


def test_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    def fail(result: Result) -> None:
        result.add(how="first")
        raise RuntimeError("CUDA out of memory")

    steps = {"training": fail, "products": lambda result: result.add(how="second")}
    assert suite.run(steps, CPU, tmp_path, Budget()) == ["training"]
    found = files(tmp_path)
    assert found["training"].rows == [{"how": "first"}, {"not_run": "stopped by RuntimeError: CUDA out of memory"}]
    assert found["products"].rows == [{"how": "second"}]


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--minutes", "0"]) == 1
    assert "error: --minutes must be above 0" in capsys.readouterr().err
    assert suite.main(["--out", "/proc/none", "--device", "cpu"]) == 1
    assert "error: cannot write to the folder /proc/none" in capsys.readouterr().err
