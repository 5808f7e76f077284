"""One call runs everything; a failure costs only its own benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from nm_sparsity.benchmarks import inference, masks, suite, training
from nm_sparsity.benchmarks.report import Result


@pytest.fixture
def quick_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(result: Result, *args: object) -> None:
        result.add(how=result.what)

    monkeypatch.setattr(masks, "run", run)
    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(inference, "run_models", run)
    monkeypatch.setattr(inference, "run_products", run)


def files(folder: Path) -> dict[str, Result]:
    results = [Result.load(path) for path in folder.glob("*.json")]
    return {result.what: result for result in results}


def test_all_benchmarks_write_their_files(quick_steps: None, tmp_path: Path) -> None:
    assert suite.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    found = files(tmp_path)
    assert sorted(found) == ["masks", "models", "products", "training"]
    assert all(result.rows == [{"how": what}] for what, result in found.items())
    assert all(result.environment["torch"] for result in found.values())


@pytest.mark.usefixtures("quick_steps")
def test_a_failure_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(result: Result, *args: object) -> None:
        result.add(how="first")
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(training, "run", fail)
    assert suite.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    found = files(tmp_path)
    assert found["training"].rows[1] == {"not_run": "stopped by RuntimeError: CUDA out of memory"}
    assert found["products"].rows == [{"how": "products"}]
    assert "failed: training" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_steps")
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--minutes", "0"]) == 1
    assert "error: --minutes must be above 0" in capsys.readouterr().err
    assert suite.main(["--out", "/proc/none", "--device", "cpu"]) == 1
    assert "error: cannot write results to /proc/none" in capsys.readouterr().err
