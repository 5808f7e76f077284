"""From a checkpoint to files, on a machine without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from nm_sparsity.benchmarks import accelerate
from nm_sparsity.core import finalize, sparsify
from nm_sparsity.core.files.contents import save_safetensors
from nm_sparsity.core.files.io import save
from nm_sparsity.core.files.metadata import METADATA, Metadata


def build(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 8))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = build(32)
    sparsify(model)
    finalize(model)
    save(tmp_path / "finalized.pt", {"state_dict": model.state_dict(), METADATA: Metadata.of(model).to_dict()})
    return tmp_path / "finalized.pt"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file, under a name that a command line can give."""
    monkeypatch.setitem(sys.modules, "my_models", sys.modules[__name__])


def build_text(width: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 16), build(width))


def run(checkpoint: Path, model: str, arguments: str = "[32]", shape: str = "4,16", *more: str) -> int:
    options = ["--model", model, "--args", arguments, "--input", shape, "--out", str(checkpoint.parent / "out")]
    return accelerate.main([str(checkpoint), *options, *more])


def test_every_step_reports(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    assert run(checkpoint, "my_models:build") == 0
    text = capsys.readouterr().out
    assert "2 weights checked, 0 violate" in text
    assert "gives the same weights back" in text
    assert (checkpoint.parent / "out" / "finalized.packed.safetensors").is_file()
    assert (checkpoint.parent / "out" / "finalized.onnx").is_file()


def test_the_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "to_onnx", lambda model, inputs, path: path)
    model = build(32)
    sparsify(model)
    finalize(model)
    given = tmp_path / "finalized.safetensors"
    save_safetensors(given, model.state_dict(), Metadata.of(model))
    before = given.read_bytes()
    assert run(given, "my_models:build", "[32]", "4,16", "--out", str(tmp_path)) == 0
    assert given.read_bytes() == before


def test_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_text(32)
    sparsify(model)
    finalize(model)
    save(tmp_path / "finalized.pt", {"state_dict": model.state_dict(), METADATA: Metadata.of(model).to_dict()})
    assert run(tmp_path / "finalized.pt", "my_models:build_text", "[32]", "4,7", "--vocabulary", "50") == 0
    assert run(tmp_path / "finalized.pt", "my_models:build_text", "[32]", "4,7") == 1
    assert "does not take an input of 4x7 (torch.float32)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "arguments", "shape", "message"),
    [
        ("my_models:build", "[64]", "4,16", "32"),
        ("my_models:nothing", "[32]", "4,16", 'cannot build "my_models:nothing"'),
        ("nothing", "[]", "4,16", 'unknown model "nothing"'),
        ("my_models:build", "[32]", "4;16", "--input takes a shape"),
        ("my_models:build", "[32]", "4,17", "the model does not take an input of 4x17"),
        (":build", "[32]", "4,16", 'cannot build ":build"'),
        ("my_models:build", "[32", "4,16", "--args takes a JSON list or object"),
    ],
)
def test_bad_arguments(
    checkpoint: Path, model: str, arguments: str, shape: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, model, arguments, shape) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
