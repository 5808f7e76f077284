from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from nm_sparsity.classification import configs, demo, study, train
from nm_sparsity.classification.study import ImageStudy
from nm_sparsity.core import SparsityConfig, SparsityError
from nm_sparsity.core.files.io import load

SMALL = ImageStudy(out=Path("runs/demo"), seeds=(0,), patterns=("2:4",), length=1, decays=(2.0,))


@pytest.mark.slow
def test_the_demo_trains_reports_verifies_and_says_what_is_next(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.main(SMALL) == 0
    printed = capsys.readouterr().out
    table = [line.split() for line in printed.splitlines() if line.startswith(("dense ", "ste ", "sr-ste ", "asp "))]
    assert [row[:2] for row in table] == [
        ["dense", "-"],
        *([method, "2:4"] for method in ("ste", "sr-ste", "asp")),
    ]
    folder = tmp_path / "runs" / "demo"
    report = " ".join((folder / "report.md").read_text().replace("|", " ").split())
    assert all(" ".join(row) in report for row in table)
    for plot in ("accuracy.png", "sad.png"):
        with Image.open(folder / plot) as image:
            assert image.width == 600
    assert len(load(folder / "finalized.pt")["nm_sparsity"]["layers"]) == 8
    summary = json.loads((folder / "asp-2to4-seed0" / "summary.json").read_text())
    assert f"{summary['test/top1']:.2f}" in table[3]
    assert summary["config"]["init_from"] == "runs/demo/dense-seed0"

    # Finished runs are not trained again.
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    assert len(written) == 4
    assert demo.main(SMALL) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")} == written

    steps = printed.partition("What to try next:\n")[2].splitlines()
    assert len(steps) == 10
    for command in steps[::2]:
        subprocess.run(shlex.split(command), env=environment, check=True, capture_output=True, timeout=200)


def test_methods_differ_in_nothing_but_the_method() -> None:
    fashion = replace(SMALL, recipe="fashion_mnist_dense", out=Path("out"), length=7, log_every=3)

    def config(run: study.Run) -> configs.ClassifierConfig:
        (command,) = fashion.commands(run)
        assert command[0] == train.__name__
        return configs.RECIPES.from_command_line(command[1:], "train")[0]

    dense = config(fashion.run("dense", 1))
    assert (dense.epochs, dense.log_every, dense.seed) == (7, 3, 1)
    sparse = config(fashion.run("sr-ste", 1, "1:8", 0.5))
    assert sparse.sparsity == SparsityConfig(pattern="1:8", method="sr-ste", decay=0.5, exclude=("fc",))
    assert replace(sparse, folder=dense.folder, sparsity=dense.sparsity) == dense
    assert sparse.folder == Path("out/sr-ste-1to8-0.5-seed1")
    asp = config(fashion.run("asp", 1, "1:8"))
    assert asp.init_from == dense.folder
    assert replace(asp, folder=dense.folder, sparsity=dense.sparsity, init_from=None) == dense


def test_lambda_is_not_chosen_by_the_images_that_are_reported(folders: Path, tmp_path: Path) -> None:
    config = configs.get("resnet18_dense")
    config = replace(config, data=replace(config.data, root=folders, image_size=32))
    (tmp_path / "mine.json").write_text(json.dumps(config.to_dict()))
    chooses = ImageStudy(recipe=str(tmp_path / "mine.json"), methods=("dense", "sr-ste"))
    with pytest.raises(SparsityError, match=r"images has no test part.* give a single one with --decays"):
        chooses.prepare()
    replace(chooses, decays=(0.1,)).prepare()
    replace(chooses, methods=("dense", "ste", "sr-ste+decay=0.1")).prepare()
    shutil.copytree(folders / "val", folders / "test")
    chooses.prepare()


def test_mistakes_and_missing_data_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["digits", f"--out={tmp_path}"]) == 1
    assert "known recipes" in capsys.readouterr().err
    assert study.main(["resnet18_dense", f"--out={tmp_path}"]) == 1
    assert "data/imagenet/train is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main(["digits_dense", "--epochs=0"])
    assert "a length of at least 1" in " ".join(capsys.readouterr().err.split())
