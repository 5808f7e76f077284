"""What is found in pictures, from a run, a checkpoint and a finalized file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nm_sparsity.detection import config as configs
from nm_sparsity.detection import evaluate, pictures, predict
from nm_sparsity.detection.checkpoints import Trained


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run: Path = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "run")
    evaluate.evaluate(run, pictures=0)
    return run


def test_a_run_a_checkpoint_and_a_finalized_file_find_what_evaluate_finds(
    evaluated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(evaluated / "finalized.pt", tmp_path / "alone.pt")
    config = str(next(evaluated.glob("*.py")))
    found = []
    for path, more in (
        (evaluated, []),
        (evaluated / "epoch_1.pth", []),
        (evaluated / "finalized.pt", []),
        (tmp_path / "alone.pt", ["--config", config]),
    ):
        options = ["--score", "0", "--json", "--out", str(tmp_path / "drawn"), *more]
        assert predict.main([str(path), str(data / "test"), *options]) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")])
    assert found[0] == found[1] == found[2] == found[3]
    total = json.loads((evaluated / "evaluation.json").read_text())["detections"]
    assert sum(len(picture["found"]) for picture in found[0]) == total > 0
    one = found[0][0]["found"][0]
    assert set(one) == {"class", "score", "bbox", "segmentation"}
    assert one["class"] in map(str, range(10))
    for picture in found[0]:
        with Image.open(picture["drawn"]) as drawn:
            assert drawn.size == (384, 384 + pictures.LINE)
        scores = [one["score"] for one in picture["found"]]
        assert scores == sorted(scores, reverse=True)


def test_what_is_not_found_is_said(
    evaluated: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next((data / "test").iterdir())
    assert predict.main([str(evaluated), str(file), "--score", "1", "--out", str(tmp_path)]) == 0
    assert f"{file}: nothing with a score of 1; see {tmp_path}/{file.stem}.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda folder: folder / "gone.jpg", [], "there is no picture .*gone.jpg"),
        (lambda folder: (folder / "empty").mkdir() or folder / "empty", [], "empty holds no pictures"),
        (
            lambda folder: (folder / "x.jpg").write_text("x") and folder / "x.jpg",
            [],
            "x.jpg cannot be read as an image",
        ),
        (lambda folder: folder, ["--score", "2"], "--score 2.0: expected a number from 0 to 1"),
        (lambda folder: Path(__file__), ["--config", "nothing"], 'there is no config "nothing"'),
    ],
)
def test_bad_arguments_are_one_line(
    evaluated: Path,
    tmp_path: Path,
    make: Callable[[Path], Path],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert predict.main([str(evaluated), str(make(tmp_path)), "--out", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_classes_without_names_are_numbered_and_that_is_said(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MMDetection would call the ten of a config without names by the first ten of COCO's eighty."""
    trained = Trained.open(evaluated / "epoch_1.pth")
    del trained.config.test_dataloader.dataset["metainfo"]
    assert predict.class_names(trained) == tuple("0123456789")  # from the checkpoint
    bare = replace(trained, payload=trained.state)
    capsys.readouterr()
    assert predict.class_names(bare) == tuple("0123456789")
    assert "epoch_1.pth does not name its classes: they are numbered" in capsys.readouterr().err
    (tmp_path / "names").write_text("\n".join("abcdefghij"))
    assert predict.class_names(bare, tmp_path / "names") == tuple("abcdefghij")


def test_an_rpn_with_a_number_of_classes_is_no_classifier(data: Path) -> None:
    config = configs.read("mmdet::faster_rcnn/faster-rcnn_r50_fpn_fcos-rpn_1x_coco.py")
    trained = Trained(Path("theirs.pth"), {}, {}, None, config)
    assert len(predict.class_names(trained)) == 80
    configs.set_data(config, data)
    assert (config.model.rpn_head.num_classes, config.model.roi_head.bbox_head.num_classes) == (1, 10)
    assert len(predict.class_names(trained)) == 10


def test_a_box_a_mask_and_the_title_are_drawn(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), (10, 10, 10)).save(tmp_path / "dark.png")
    mask = np.zeros((50, 100), np.uint8, order="F")
    mask[20:30, 40:60] = 1
    one: dict[str, Any] = {
        "category_id": 7,
        "bbox": [40.0, 20.0, 20.0, 10.0],
        "score": 0.9,
        "segmentation": pictures.rle.encode(mask),
    }
    empty = np.asarray(pictures.draw(tmp_path / "dark.png", [], {7: "cat"}, "truth", 400))
    drawn = np.asarray(pictures.draw(tmp_path / "dark.png", [one], {7: "cat"}, "truth", 400))
    assert drawn.shape == (200 + pictures.LINE, 400, 3)
    assert (drawn[: pictures.LINE] == empty[: pictures.LINE]).all()
    assert drawn[: pictures.LINE].min() < 50  # the title's letters
    changed = (drawn != empty).any(2)[pictures.LINE :]
    assert changed[80:120, 160:240].all()
    assert not changed[125:].any()
    assert not changed[:, 245:].any()
