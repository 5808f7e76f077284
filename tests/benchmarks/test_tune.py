"""The command that fills the cache of algorithms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nm_sparsity.benchmarks import tune
from nm_sparsity.core.deploy.backends import CuSparseLt
from nm_sparsity.core.deploy.cache import Cache, Problem


def test_each_product_of_a_model_is_a_problem_once() -> None:
    model = nn.Sequential(
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.Linear(32, 32),
        nn.Conv2d(32, 16, 1, bias=False),
        nn.Linear(32, 9),
    )
    names = [str(problem) for problem in tune.problems_of(model, torch.bfloat16, (1, 100))]
    assert names == [
        f"bfloat16 {what} @{tokens}"
        for what in ("32x64 bfloat16 bias relu", "32x32 bfloat16 bias", "16x32 bfloat16")
        for tokens in (1, 256)
    ]


@pytest.mark.slow
def test_the_command_fills_a_cache(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_FAST", "2")
    monkeypatch.setattr(CuSparseLt, "why_not_device", lambda self, device: "")
    (tmp_path / "nets.py").write_text("from torch import nn\ndef build(n):\n    return nn.Linear(n, n)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "algorithms.json"
    options = ["--args", "[32]", "--tokens", "16", "--device", "cpu", "--out", str(path)]
    assert tune.main(["nets:build", *options]) == 0
    text = capsys.readouterr().out
    assert "bfloat16 32x32 bfloat16 bias @16" in text
    assert f"wrote {path}" in text
    found = Cache(torch.device("cpu"), path).found
    assert found[str(Problem("bfloat16", "bfloat16", 32, 32, 16, True))].id == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bert-large", "--device", "cpu"], "nothing to tune: needs an NVIDIA GPU, found cpu"),
        (["bert-large", "--tokens", "1;2", "--device", "cpu"], "1;2"),
        (["nothing", "--device", "tpu"], 'unknown device "tpu"'),
    ],
)
def test_bad_arguments_give_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
