from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nm_sparsity.classification import evaluate
from nm_sparsity.classification.configs import ClassifierConfig, DataConfig
from nm_sparsity.classification.data import load_splits
from nm_sparsity.classification.models import build
from nm_sparsity.classification.train import train
from nm_sparsity.core.files.io import load

Tiny = Callable[..., ClassifierConfig]


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    capsys.readouterr()
    assert evaluate.main([*arguments, "--device", "cpu"]) == 0
    result: dict[str, float] = json.loads(capsys.readouterr().out)
    return result


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert evaluate.main([*arguments, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_every_kind_of_checkpoint_gives_the_same_accuracy(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(epochs=2, ema=0.5)
    summary = train(config)
    expected = {"loss": summary["test/loss"], "top1": summary["test/top1"], "top5": summary["test/top5"], "images": 360}
    # Anyone's file: the masked weights, and the dense shadow weights as the paper's authors published theirs.
    state = load(config.folder / "finalized.pt")["state_dict"]
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "foreign.pt")
    shadow = dict(state)
    weight = state["layer1.0.conv1.weight"]
    shadow["layer1.0.conv1.weight"] = torch.where(weight == 0, 1e-6, weight)
    torch.save(shadow, tmp_path / "shadow.pt")
    for arguments in (
        [str(config.folder)],
        [str(config.folder / "latest.pt")],
        [str(config.folder / "finalized.pt"), "--batch-size", "7"],
        [str(tmp_path / "foreign.pt"), "--config", "digits_2to4"],
        [str(tmp_path / "shadow.pt"), "--config", "digits_2to4"],
    ):
        found = measured(capsys, *arguments)
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)
    val = measured(capsys, str(config.folder), "--split", "val")
    assert val["top1"] == pytest.approx(summary["val/top1"])


def test_accuracy_is_that_of_a_plain_loop(tiny: Tiny) -> None:
    torch.manual_seed(0)
    images = load_splits(DataConfig("digits")).test
    model = build("resnet8_small", 10).train()
    found = evaluate.evaluate(model, evaluate.eval_batches(images, tiny()), torch.device("cpu"))
    assert model.training
    model.eval()
    pixels, labels = images.take(list(range(360)), augment=False)
    with torch.no_grad():
        logits = model(pixels)
    ranked = logits.argsort(1, descending=True)
    assert found.top1 == pytest.approx(
        100 * sum(int(r[0]) == int(y) for r, y in zip(ranked, labels, strict=True)) / 360
    )
    assert found.top5 == pytest.approx(100 * sum(int(y) in r[:5] for r, y in zip(ranked, labels, strict=True)) / 360)
    assert found.loss == pytest.approx(float(-logits.log_softmax(1)[torch.arange(360), labels].mean()), rel=1e-5)


def test_bad_checkpoints_are_named(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build("resnet8_small", 10).state_dict(), tmp_path / "foreign.pt")
    foreign = str(tmp_path / "foreign.pt")
    assert "name its recipe, e.g. --config resnet50_2to4" in failed(capsys, foreign)
    assert "known recipes" in failed(capsys, foreign, "--config", "digits_3to4")
    torch.save(build("resnet20_small", 10).state_dict(), tmp_path / "other.pt")
    assert "layer1.1.conv1.weight" in failed(capsys, str(tmp_path / "other.pt"), "--config", "digits_2to4")
    no_images = ["--config", "resnet50_2to4", "--data", str(tmp_path)]
    assert f"{tmp_path}/train is not there" in failed(capsys, foreign, *no_images)
    assert "there is no checkpoint" in failed(capsys, str(tmp_path / "nowhere.pt"))
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt" in failed(capsys, str(tmp_path / "text.pt"))
    (tmp_path / "folder").mkdir()
    assert "is it a run folder?" in failed(capsys, str(tmp_path / "folder"))


def test_a_checkpoint_that_broke_its_pattern_is_refused(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny()
    train(config)
    payload = load(config.folder / "finalized.pt")
    payload["state_dict"]["layer2.0.conv1.weight"].fill_(1.0)
    torch.save(payload, config.folder / "finalized.pt")
    assert "layer2.0.conv1.weight" in failed(capsys, str(config.folder))
