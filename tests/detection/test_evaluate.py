"""Scores, the finalized file, pictures, and the command lines."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmdet
import pytest
from PIL import Image
from pycocotools.coco import COCO

from nm_sparsity.core import verify
from nm_sparsity.detection import config as configs
from nm_sparsity.detection import evaluate, prepare, train

README = Path(__file__).parents[2] / "detection" / "README.md"


@pytest.fixture(scope="session")
def truth(data: Path) -> COCO:
    return COCO(str(data / "annotations" / "instances_test.json"))


def perfect(truth: COCO) -> evaluate.Detections:
    return [{**a, "segmentation": truth.annToRLE(a), "score": 0.9} for a in truth.anns.values()]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_scores_one(truth: COCO, kind: str) -> None:
    score = evaluate.score(truth, perfect(truth), kind, sorted(truth.cats))
    assert list(score.numbers) == list(evaluate.NUMBERS)
    assert score.numbers["AP"] == score.numbers["AP75"] == score.numbers["AR_100"] == pytest.approx(1)
    assert score.numbers["AP_large"] is None  # no object of 96 x 96 pixels in pictures of 64
    present = {truth.cats[a["category_id"]]["name"] for a in truth.anns.values()}
    assert score.classes == {c["name"]: pytest.approx(1) if c["name"] in present else None for c in truth.cats.values()}


def test_a_box_of_iou_0_6_counts_at_two_of_ten_thresholds(truth: COCO) -> None:
    """IoU 0.6 passes 0.5 and 0.55 (and 0.6, if rounding is kind): AP is 0.2 or 0.3, AP75 is 0."""
    detections = perfect(truth)
    for detection in detections:
        x, y, width, height = detection["bbox"]
        detection["bbox"] = [x, y, width * 0.59, height]
    numbers = evaluate.score(truth, detections, "bbox", sorted(truth.cats)).numbers
    assert numbers["AP"] == pytest.approx(0.2, abs=0.02)
    assert numbers["AP50"] == pytest.approx(1)
    assert numbers["AP75"] == pytest.approx(0)


def test_mask_scores_do_not_depend_on_boxes(truth: COCO) -> None:
    detections = perfect(truth)
    for detection in detections:
        detection["bbox"] = [0.0, 0.0, 1.0, 1.0]
    assert evaluate.score(truth, detections, "segm", sorted(truth.cats)).numbers["AP"] == pytest.approx(1)


def test_nothing_found_scores_zero(truth: COCO) -> None:
    assert set(evaluate.score(truth, [], "bbox", sorted(truth.cats)).numbers.values()) == {0.0}


def test_evaluate_finalizes_verifies_and_draws(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    assert evaluate.main([str(run), "--pictures", "2"]) == 0
    printed = capsys.readouterr().out
    assert "31 weights are N:M; the finalized model scores the same" in printed
    result = json.loads((run / "evaluation.json").read_text())
    assert result["images"] == 4
    assert result["detections"] > 0
    for kind in ("box", "mask"):
        assert set(evaluate.NUMBERS) < set(result[kind])
        assert len(result[kind]["classes"]) == 10
    assert f"{result['box']['AP']:.4g}" in printed
    assert verify(run / "finalized.pth", "2:4").checked
    with Image.open(run / "predictions.png") as picture:
        assert picture.size == (2 * 388, 2 * 388)


def test_a_run_without_the_hook_is_evaluated(
    make_config: Callable[..., Any], run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(method="dense")
    config.custom_hooks = []
    run(config, tmp_path / "run")
    assert evaluate.main([str(tmp_path / "run")]) == 0
    assert "dense model: no pattern to verify" in capsys.readouterr().out
    assert not (tmp_path / "run" / "finalized.pth").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path)]) == 1
    assert "is not a run folder" in capsys.readouterr().err
    (tmp_path / "config.py").write_text("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'")
    assert evaluate.main([str(tmp_path)]) == 1
    assert "holds no checkpoint yet" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_ranks_train_one_model(data: Path, tmp_path: Path) -> None:
    """MMEngine's pytorch launcher, gloo: the ranks end with the same weights, and the file is 2:4."""
    worker = Path(__file__).parent / "two_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    result = subprocess.run(
        [*command, str(worker), str(data), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("ranks agree") == 2
    assert len(verify(tmp_path / "epoch_1.pth", "2:4").checked) == 31


def test_print_config_shows_what_would_be_trained(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny_mask_rcnn", "--data", str(data), "--pattern", "1:4", "--decay", "0.3", "--print-config"]
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "pattern='1:4'" in printed
    assert "decay=0.3" in printed
    assert "num_classes=10" in printed


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert train.main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_train_names_unknown_configs_and_bad_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a file nor one of faster_rcnn" in failure(capsys, "tiny_mask_rcn")
    assert "is not of the form key=value" in failure(capsys, "tiny_mask_rcnn", "train_cfg.max_epochs")
    assert 'pattern "2-4" is not of the form N:M' in failure(capsys, "tiny_mask_rcnn", "--pattern", "2-4")
    assert "cannot override" in failure(capsys, "tiny_mask_rcnn", "model.backbone.init_cfg.checkpoint=x.pth")


def test_train_names_configs_of_other_versions(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.py").write_text("model = dict()\ndata = dict()\noptimizer = dict()\ntotal_epochs = 12\n")
    assert "config of MMDetection 2 (it has data, optimizer, total_epochs)" in failure(capsys, str(tmp_path / "old.py"))
    (tmp_path / "other.py").write_text("model = dict()\n")
    assert "not an MMDetection training config" in failure(capsys, str(tmp_path / "other.py"))
    arguments = ("tiny_mask_rcnn", "model.type=MaskRCNNv9", "--data", str(data), "--out", str(tmp_path / "run"))
    error = failure(capsys, *arguments)
    assert "MaskRCNNv9 is not in the" in error
    assert "another MMDetection version" in error


def test_train_checks_its_data_first(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/train/000003.jpg").unlink()
    error = failure(capsys, "tiny_mask_rcnn", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"))
    assert "000003.jpg is missing" in error
    assert "no such annotation file" in failure(capsys, "tiny_mask_rcnn", "--data", str(tmp_path))


def test_train_names_a_corrupt_picture(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    for picture in (tmp_path / "data/train").iterdir():
        picture.write_bytes(b"not a JPEG")
    arguments = ("tiny_mask_rcnn", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"))
    assert re.search(r"failed to load image: .*/00000\d\.jpg", failure(capsys, *arguments))


def test_configs_can_be_read_and_pointed_at_data(data: Path) -> None:
    for name in configs.names():
        config = configs.read(name)
        configs.set_data(config, data)
        configs.check_data(config)
        assert config.model.roi_head.bbox_head.num_classes == 10
        assert config.test_dataloader.dataset.data_prefix["img"] == "test/"
    assert len(configs.names()) == 10


def test_prepare_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["composed", "--out", str(tmp_path), "--train", "2", "--val", "1", "--size", "64"]
    assert prepare.main(arguments) == 0
    assert capsys.readouterr().out.count("in 10 categories") == 3
