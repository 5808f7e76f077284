"""The demo and the study: what they run, keep, go on with, and write down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nm_sparsity.core import SparsityError
from nm_sparsity.detection import demo, evaluate, study, train


def test_demo_trains_evaluates_and_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    assert demo.main(["--out", str(tmp_path), "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "31 weights are N:M; the finalized model scores the same" in printed
    files = [tmp_path / "curves.png", *(tmp_path / name / "predictions.png" for name in ("dense", "2to4"))]
    assert all(file.stat().st_size > 1000 for file in files)
    before = (tmp_path / "2to4" / "evaluation.json").stat().st_mtime_ns
    assert demo.main(["--out", str(tmp_path), "--epochs", "1"]) == 0
    assert (tmp_path / "2to4" / "evaluation.json").stat().st_mtime_ns == before
    assert study.validation_ap(tmp_path / "dense") >= 0


def test_a_detector_that_finds_nothing_has_ap_0(tmp_path: Path) -> None:
    """MMDetection logs no AP then; an earlier one does not count."""
    (tmp_path / "now" / "vis_data").mkdir(parents=True)
    lines = [{"loss": 2.0, "step": 1}, {"coco/bbox_mAP": 0.1, "step": 1}, {"loss": 9.0, "step": 2}, {"step": 2}]
    (tmp_path / "now" / "vis_data" / "scalars.json").write_text("\n".join(map(json.dumps, lines)))
    assert study.validation_ap(tmp_path) == 0.0


def test_a_failed_run_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match=r"(?s)train nothing .*failed; the end of .*neither a file nor one of"):
        list(study.execute([study.Experiment("x", ("nothing",))], tmp_path, processes=1))


def test_the_plan_is_every_method_at_every_pattern() -> None:
    plan = study.plan(study.STUDIES["fashion"], Path("d"), seeds=(0, 1), decay=0.1)
    assert len({experiment.name for experiment in plan}) == len(plan) == 2 * 7
    assert [e.name for e in plan if e.start == "dense_1"] == ["asp_2to4_1", "asp_2to8_1"]
    assert study.CHOICE_SEED not in (0, 1)


def test_asp_starts_from_the_dense_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(study, "_python", lambda module, *arguments, log: commands.append(arguments))
    (tmp_path / "dense_0").mkdir()
    (tmp_path / "dense_0" / "last_checkpoint").write_text("/elsewhere/epoch_6.pth")
    asp = study.plan(study.STUDIES["fashion"], data, seeds=(0,), decay=0.1)[-1]
    list(study.execute([asp], tmp_path, processes=1))
    assert train.main([*commands[0], "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert f"load_from = '{tmp_path / 'dense_0' / 'epoch_6.pth'}'" in printed
    assert "method='asp'" in printed


def test_results_are_means_and_deviations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    plan = study.plan(study.STUDIES["fashion"], Path("d"), seeds=(0, 1), decay=0.1)
    for name, ap in (("dense_0", 0.5), ("dense_1", 0.6), ("sr-ste_2to4_0", 0.4)):
        (tmp_path / name).mkdir()
        numbers = dict.fromkeys(evaluate.NUMBERS, ap)
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"box": numbers, "mask": numbers}))
    table = study.summarise("fashion", tmp_path, plan, {"decay": 0.1, "validation box AP": {0.1: 0.4}})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["method", "pattern", "seeds", "box AP", "box AP50", "mask AP", "mask AP50"]
    assert rows[2] == ["dense", "-", "2", *["55.0 ± 7.1"] * 4]
    assert rows[3] == ["sr-ste", "2:4", "1", *["40.0"] * 4]
    assert table in (tmp_path / "fashion.md").read_text()
    assert set(json.loads((tmp_path / "fashion.json").read_text())["runs"]) == {"dense_0", "dense_1", "sr-ste_2to4_0"}
