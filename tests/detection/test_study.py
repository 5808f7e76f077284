"""The demo and the study: what they run, keep, go on with, and read of a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nm_sparsity.core import SparsityError, verify
from nm_sparsity.core.experiments.conduct import conduct
from nm_sparsity.detection import config as configs
from nm_sparsity.detection import demo, evaluate, study, train
from nm_sparsity.detection.study import DetectionStudy


@pytest.mark.slow
def test_the_demo_trains_evaluates_and_is_done_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(demo.DEMO, out=tmp_path / "out", data=data, length=1)
    assert demo.main(short) == 0
    printed = capsys.readouterr().out
    assert "31 weights are N:M; the finalized model scores the same" in printed
    runs = [short.out / name for name in ("dense-seed0", "sr-ste-2to4-0.1-seed0")]
    pictures = [*(short.out / plot.file for plot in short.plots), *(run / "predictions.png" for run in runs)]
    assert all(file.stat().st_size > 1000 for file in pictures)
    results = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    for method, result in zip(("dense", "sr-ste"), results, strict=True):
        (row,) = [line.split() for line in printed.splitlines() if line.startswith(f"{method} ")]
        numbers = (result[kind][number] for kind in ("box", "mask") for number in ("AP", "AP50", "AP75"))
        assert row[-6:] == [f"{number:.1f}" for number in numbers]
    assert len(verify(short.out / "finalized.pt", "2:4").checked) == 31
    before = [(run / "evaluation.json").stat().st_mtime_ns for run in runs]
    assert demo.main(short) == 0
    assert [(run / "evaluation.json").stat().st_mtime_ns for run in runs] == before


def log(run: Path, *lines: dict[str, float]) -> None:
    (run / "now" / "vis_data").mkdir(parents=True)
    (run / "now" / "vis_data" / "scalars.json").write_text("\n".join(map(json.dumps, lines)))


def test_the_validation_score_is_the_last_epochs(tmp_path: Path) -> None:
    log(tmp_path, {"coco/bbox_mAP": 0.3, "step": 1}, {"loss": 9.0, "step": 2}, {"coco/bbox_mAP": 0.2, "step": 2})
    assert study.validation_ap(tmp_path) == 20.0


def test_a_detector_that_finds_nothing_has_ap_0(tmp_path: Path) -> None:
    """MMDetection logs no AP then; an earlier one does not count."""
    log(tmp_path, {"loss": 2.0, "step": 1}, {"coco/bbox_mAP": 0.1, "step": 1}, {"loss": 9.0, "step": 2}, {"step": 2})
    assert study.validation_ap(tmp_path) == 0.0


@pytest.mark.slow
def test_a_failed_run_shows_the_end_of_its_log(data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(data, tmp_path / "broken")
    for file in (broken / "annotations").glob("*.json"):
        file.write_text("{")
    wrong = DetectionStudy(out=tmp_path / "out", data=broken, config="tiny_mask_rcnn", methods=("dense",), seeds=(0,))
    with pytest.raises(SparsityError, match=r"(?s)detection\.train tiny_mask_rcnn .*failed; the end of .*JSON"):
        conduct(wrong)


def test_a_run_is_trained_as_the_study_says(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fashion = DetectionStudy(out=tmp_path, data=data)
    training, evaluation = fashion.commands(fashion.run("asp", 1, "2:8"))
    assert training[0] == train.__name__
    assert evaluation == [evaluate.__name__, str(tmp_path / "asp-2to8-seed1")]
    assert train.main([*training[1:], "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert f"load_from = '{tmp_path}/dense-seed1/epoch_6.pth'" in printed
    for line in ("method='asp'", "pattern='2:8'", "max_epochs=6", "T_max=6", "val_interval=1"):
        assert line in printed


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("mask_rcnn_r50_fpn_2x_coco_2to4", ["1.begin=0", "1.end=6", "1.milestones=[4, 5]"]),
        ("mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", ["1.begin=3", "1.end=6", "1.T_max=3"]),
        ("tiny_faster_rcnn", ["1.T_max=6"]),
    ],
)
def test_the_schedules_of_any_config_fit_the_length_of_a_run(
    data: Path, capsys: pytest.CaptureFixture[str], config: str, expected: list[str]
) -> None:
    one = DetectionStudy(data=data, config=config)
    training = one.commands(one.run("ste", 0, "2:4"))[0]
    assert [word for word in training if word.startswith("param_scheduler")] == [
        f"param_scheduler.{entry}" for entry in expected
    ]
    assert train.main([*training[1:], "--print-config"]) == 0


def test_a_config_that_counts_no_epochs_is_refused_before_pictures_are_made(tmp_path: Path) -> None:
    loop = "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=9)"
    (tmp_path / "mine.py").write_text(f"_base_ = '{configs.FOLDER}/tiny_mask_rcnn.py'\n{loop}")
    with pytest.raises(SparsityError, match=r"mine\.py does not train by epochs \(train_cfg\.max_epochs\)"):
        DetectionStudy(data=tmp_path / "data", config=str(tmp_path / "mine.py")).prepare()
    assert not (tmp_path / "data").exists()


def test_a_detector_without_masks_has_no_mask_ap() -> None:
    result = {"box": {"AP": 25.0, "AP50": 50.0, "AP75": None}}
    cells = {column.header: column.cell([result]) for column in DetectionStudy.columns}
    assert cells == {"box AP": "25.0", "box AP50": "50.0", "box AP75": "-"} | dict.fromkeys(
        ("mask AP", "mask AP50", "mask AP75"), "-"
    )
