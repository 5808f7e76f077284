"""What predict says of a picture is what evaluate counted for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nm_sparsity.classification import evaluate, predict
from nm_sparsity.classification.configs import ClassifierConfig, DataConfig
from nm_sparsity.classification.data import load_splits
from nm_sparsity.classification.train import train

Tiny = Callable[..., ClassifierConfig]


def predicted(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, list[tuple[str, float]]]:
    capsys.readouterr()
    assert predict.main([*map(str, arguments), "--device", "cpu", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["picture"]: [(name, share) for name, share in line["classes"]] for line in lines}


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert predict.main([*map(str, arguments), "--device", "cpu"]) == 1
    return capsys.readouterr().err


@pytest.fixture
def run(tiny: Tiny, folders: Path) -> Path:
    """A run on the three classes of `folders`."""
    config = tiny("resnet18_2to4", data__root=folders, data__image_size=32, data__workers=0, batch_size=6)
    train(config)
    return config.folder


def test_pictures_get_the_classes_that_evaluate_counted(
    run: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run), "--device", "cpu", "--json"]) == 0
    confusion = json.loads(capsys.readouterr().out)["confusion"]
    found = predicted(capsys, run, folders / "val")
    assert len(found) == 6
    names = ["n01", "n02", "n03"]
    counted = [[0] * 3 for _ in range(3)]
    for picture, classes in found.items():
        assert sorted(name for name, _ in classes) == names
        shares = [share for _, share in classes]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
        counted[names.index(Path(picture).parent.name)][names.index(classes[0][0])] += 1
    assert counted == confusion
    # A run folder, a checkpoint and a state dict are opened alike.
    (picture,) = folders.glob("val/n01/0.*")
    state = torch.load(run / "finalized.pt", weights_only=True)["state_dict"]
    state["bn1.num_batches_tracked"] = state.pop("bn1.num_batches_tracked")  # a number, which comes last now
    torch.save(state, tmp_path / "plain.pt")
    expected = found[str(picture)]
    for checkpoint in ("finalized.pt", "latest.pt"):
        assert predicted(capsys, run / checkpoint, picture)[str(picture)] == expected
    # Classes are named by the data, by a file, or by their numbers, which is said.
    plain = [tmp_path / "plain.pt", picture, "--config", run]
    assert predicted(capsys, *plain)[str(picture)] == expected
    (tmp_path / "names").write_text("cat\ndog\nowl\n")
    animals = dict(zip(names, ("cat", "dog", "owl"), strict=True))
    found = predicted(capsys, *plain, "--classes", tmp_path / "names")
    assert found[str(picture)] == [(animals[name], share) for name, share in expected]
    (tmp_path / "two").write_text("cat\ndog\n")
    for file, message in (("two", "two names 2 classes, .*plain.pt tells 3 apart"), ("none", "cannot read .*none: No")):
        assert re.search(message, failed(capsys, *plain, "--classes", tmp_path / file))
    folders.rename(tmp_path / "elsewhere")
    assert predict.main([*map(str, plain[:1]), str(tmp_path / "elsewhere/val"), *map(str, plain[2:])]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("plain.pt does not name its classes: they are numbered (--classes FILE") == 1
    assert [set(re.findall(r"[:,] (\S+) ", line)) for line in shown.out.splitlines()] == [set("012")] * 6
    picture = next((tmp_path / "elsewhere").glob("val/n01/0.*"))
    assert predict.main([str(run), str(picture), "--top", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{picture}: {expected[0][0]} {expected[0][1]:.1%}\n"


def test_a_picture_of_a_digit_is_what_the_data_set_holds(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.datasets import load_digits

    config = tiny(epochs=3)
    train(config)
    images: Any = load_splits(DataConfig("digits")).test
    model_input, _ = images.take([0, 1, 2, 3], augment=False)
    pixels = np.asarray(load_digits().images * 255 / 16, dtype=np.uint8)
    assert model_input.shape == (4, 3, 8, 8)
    for i in range(4):
        Image.fromarray(images.images[i].numpy()).save(tmp_path / f"{i}.png")
        assert (pixels == images.images[i].numpy()).all((1, 2)).any()
    found = predicted(capsys, config.folder, *(tmp_path / f"{i}.png" for i in range(4)), "--top", "1")
    from nm_sparsity.classification.checkpoints import Trained

    logits = Trained.open(config.folder).model(10).eval()(model_input)
    assert [int(classes[0][0]) for classes in found.values()] == logits.argmax(1).tolist()
    assert [classes[0][1] for classes in found.values()] == pytest.approx(logits.softmax(1).amax(1).tolist())


def test_what_is_no_picture_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("hello")
    assert f"error: {tmp_path}/text.png cannot be read as an image" in failed(capsys, run, tmp_path / "text.png")
    assert f"error: there is no picture {tmp_path}/none.png" in failed(capsys, run, tmp_path / "none.png")
    assert f"error: {tmp_path}/empty holds no pictures" in failed(capsys, run, tmp_path / "empty")
    with pytest.raises(SystemExit):
        predict.main([str(run), str(tmp_path / "text.png"), "--top", "0"])
    assert "top must be at least 1, found 0" in capsys.readouterr().err
    assert "is it a run folder?" in failed(capsys, tmp_path / "empty", tmp_path / "text.png")
    (tmp_path / "text.pt").write_text("no checkpoint")  # pictures are looked for before a checkpoint is read
    unread = failed(capsys, tmp_path / "text.pt", tmp_path / "none.png")
    assert f"error: there is no picture {tmp_path}/none.png" in unread
