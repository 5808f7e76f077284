from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from nm_sparsity.classification import evaluate
from nm_sparsity.classification.configs import ClassifierConfig, DataConfig
from nm_sparsity.classification.data import load_splits
from nm_sparsity.classification.models import build
from nm_sparsity.classification.train import train
from nm_sparsity.core.files.io import load

Tiny = Callable[..., ClassifierConfig]


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate.main([*arguments, "--device", "cpu", "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
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
        [str(tmp_path / "shadow.pt"), "--config", str(config.folder)],
        [str(tmp_path / "shadow.pt"), "--config", str(config.folder / "config.json")],
    ):
        found = measured(capsys, *arguments)
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)
    assert not (tmp_path / "evaluation.json").exists()
    kept = json.loads((config.folder / "evaluation.json").read_text())  # of the run as it stands
    assert kept["checkpoint"] == str(config.folder)
    val = measured(capsys, str(config.folder), "--split", "val", "--out", str(tmp_path / "val"))
    assert json.loads((tmp_path / "val" / "evaluation.json").read_text()) == val
    assert "val holds evaluation.json already" in failed(capsys, str(config.folder), "--out", str(tmp_path / "val"))
    assert val["top1"] == pytest.approx(summary["val/top1"])
    assert json.loads((config.folder / "evaluation.json").read_text()) == kept


def test_accuracy_is_that_of_a_plain_loop(tiny: Tiny) -> None:
    torch.manual_seed(0)
    images = load_splits(DataConfig("digits")).test
    model = build("resnet8_small", 10).train()
    found, confusion = evaluate.count(model, evaluate.eval_batches(images, tiny()), torch.device("cpu"), 10)
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
    expected = [[0] * 10 for _ in range(10)]
    for r, y in zip(ranked, labels, strict=True):
        expected[int(y)][int(r[0])] += 1
    assert confusion.tolist() == expected
    assert found.loss == pytest.approx(float(-logits.log_softmax(1)[torch.arange(360), labels].mean()), rel=1e-5)


def test_a_batch_size_is_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build("resnet8_small", 10).state_dict(), tmp_path / "dense.pt")
    sizes = set()
    hook = register_module_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    try:
        measured(capsys, str(tmp_path / "dense.pt"), "--config", "digits_2to4", "--batch-size", "16")
    finally:
        hook.remove()
    assert sizes == {16, 360 % 16}


def test_bad_checkpoints_are_named(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build("resnet8_small", 10).state_dict(), tmp_path / "foreign.pt")
    foreign = str(tmp_path / "foreign.pt")
    assert "name its recipe or its run, e.g. --config resnet50_2to4" in failed(capsys, foreign)
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


def test_every_class_is_reported_with_what_it_was_mistaken_for(
    tiny: Tiny, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("resnet18_2to4", data__root=folders, data__image_size=32, data__workers=0, batch_size=6)
    train(config)
    found = measured(capsys, str(config.folder))
    assert list(found["classes"]) == ["n01", "n02", "n03"]
    assert [sum(row) for row in found["confusion"]] == [2, 2, 2]
    for i, row in enumerate(found["classes"].values()):
        assert row["images"] == 2
        assert row["top1"] == 50 * found["confusion"][i][i]
        assert (row["mistaken_for"] is None) == (row["top1"] == 100)
    assert evaluate.main([str(config.folder), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"top-1 {found['top1']:.2f}%, top-5 100.00%, loss {found['loss']:.4f} on 6 images\n")
    assert "most often mistaken for" in shown
    # Other classes at the same place: the numbers would mean nothing.
    for part in ("train", "val"):
        (folders / part / "n02").rename(folders / part / "n02b")
    assert 'trained on other classes: number 1 is "n02", here "n02b"' in failed(capsys, str(config.folder))


def test_of_many_classes_the_worst_are_shown() -> None:
    confusion = torch.diag(torch.arange(1, 31))
    confusion[29, 3] = 90
    found = evaluate.Evaluation(evaluate.Accuracy(1.0, 2.0, 3.0, 4), [f"c{i}" for i in range(30)], confusion)
    lines = str(found).splitlines()
    assert lines[1] == "The 20 of 30 classes with the lowest accuracy (--json has all):"
    assert lines[5].split() == ["c29", "120", "25.00", "c3", "(90)"]
    assert len(lines) == 5 + 20
