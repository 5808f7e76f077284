from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from nm_sparsity.classification import demo, study
from nm_sparsity.classification.study import Study
from nm_sparsity.core import SparsityError
from nm_sparsity.core.files.io import load

SMALL = Study(folder=Path("runs/demo"), seeds=1, choosing_seeds=1, epochs=1, decays=(0.5, 2.0), workers=2)


def test_the_demo_trains_reports_verifies_and_says_what_is_next(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.main(SMALL) == 0
    printed = capsys.readouterr().out
    table = [line.split() for line in printed.splitlines() if line.startswith(("-  ", "2:4", "1:8"))]
    methods = [
        ["-", "dense"],
        *([pattern, method] for pattern in ("2:4", "1:8") for method in ("STE", "SR-STE", "ASP")),
    ]
    assert [row[:2] for row in table] == methods
    folder = tmp_path / "runs" / "demo"
    report = (folder / "report.md").read_text()
    for row in table:
        assert " ".join(row[-2:]) in " ".join(report.replace("|", " ").split())
    for plot in ("accuracy.png", "sad.png"):
        with Image.open(folder / plot) as image:
            assert image.width > 800
    assert len(load(folder / "finalized.pt")["nm_sparsity"]["layers"]) == 8

    # Complete runs are not trained again.
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    assert len(written) == 9
    with monkeypatch.context() as patch:
        patch.setattr(study, "_train", None)
        study.conduct(SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")} == written
    with pytest.raises(SparsityError, match=r"dense-seed0 holds another run .epochs: 1 -> 2.; remove it or"):
        study.conduct(replace(SMALL, epochs=2))

    for what, command in demo.next_steps(SMALL):
        assert f"{command}\n      {what}" in printed
        subprocess.run(shlex.split(command), env=environment, check=True, capture_output=True, timeout=200)


def test_lambda_is_chosen_on_validation_images(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {  # decay, seed -> validation top-1, loss, test top-1
        (0.1, 0): (90.0, 0.3, 99.0),
        (0.1, 1): (92.0, 0.3, 99.0),
        (0.2, 0): (93.0, 0.5, 10.0),
        (0.2, 1): (91.0, 0.5, 10.0),
        (0.4, 0): (92.0, 0.4, 10.0),
        (0.4, 1): (92.0, 0.4, 10.0),
    }

    def summary(config: study.Config) -> dict[str, float]:
        decay = config.sparsity.decay
        assert decay is not None
        return dict(zip(("val/top1", "val/loss", "test/top1"), scores[decay, config.seed], strict=True))

    monkeypatch.setattr(study, "_summary", summary)
    assert study._best_decay(Study(decays=(0.1, 0.2, 0.4), choosing_seeds=2), "2:4") == 0.4


def test_methods_differ_in_nothing_but_the_method() -> None:
    fashion = Study(recipe="fashion_mnist_dense", folder=Path("out"), epochs=7, log_every=3)
    dense = fashion.config("dense", 1)
    sparse = fashion.config("sr-ste", 1, "1:8", 0.5)
    assert replace(sparse, folder=dense.folder, sparsity=dense.sparsity) == dense
    assert sparse.folder == Path("out/sr-ste-1by8-0.5-seed1")
    asp = fashion.config("asp", 1, "1:8")
    assert asp.init_from == dense.folder
    assert replace(asp, folder=dense.folder, sparsity=dense.sparsity, init_from=None) == dense


def test_out_of_range_studies_and_missing_data_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study.main(["digits_dense", "--seeds=0"])
    assert "at least 1" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SparsityError, match="choosing_seeds 4 must not be more than seeds 3"):
        Study(choosing_seeds=4)
    assert study.main(["digits", f"--folder={tmp_path}"]) == 1
    assert "known recipes" in capsys.readouterr().err
    assert study.main(["resnet18_dense", f"--folder={tmp_path}"]) == 1
    assert "data/imagenet/train is not there" in capsys.readouterr().err
