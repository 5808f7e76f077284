"""The alternatives compute what they claim, or a comparison with them would say nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nm_sparsity.benchmarks import masks, models
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.core import NMPattern, SparsityError, keep_largest
from nm_sparsity.core.masks.batched import Batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("how", masks.ALTERNATIVES)
@pytest.mark.parametrize("pattern", ["2:4", "1:16", "5:8"])
def test_every_alternative_gives_the_same_weights(how: str, pattern: str) -> None:
    w, nm = torch.randn(8, 64), NMPattern.parse(pattern)
    assert torch.equal(masks.ALTERNATIVES[how](w, nm.n, nm.m), keep_largest(w, pattern))


def test_the_check_passes() -> None:
    result = Result("masks", "cpu")
    masks.check(result, CPU)
    assert [row["dtype"] for row in result.rows] == ["float32", "bfloat16", "float16"]
    assert all(row["wrong"] == 0 for row in result.rows)


def negative_zeros(batch: Batch) -> list[torch.Tensor]:
    return [torch.where(mask, w, -0.0) for w, mask in zip(batch.weights, batch.nm_mask(), strict=True)]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("keep_largest", lambda batch: batch.weights),
        ("keep_largest", negative_zeros),
        ("nm_mask", lambda batch: [torch.ones_like(w, dtype=torch.bool) for w in batch.weights]),
        ("add_dropped_", lambda batch, targets, scale: None),
    ],
)
def test_the_check_would_notice(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., object]) -> None:
    monkeypatch.setattr(Batch, name, wrong)
    result = Result("masks", "cpu")
    with pytest.raises(SparsityError, match="differ from the reference"):
        masks.check(result, CPU)
    assert all(row["wrong"] > 0 for row in result.rows)


@pytest.mark.slow
def test_a_small_run_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "layer_set", lambda name: [(64, 32, 1, 1), (32, 64, 3, 3)])
    monkeypatch.setattr(masks, "SIZES", (1,))
    assert masks.main(["--quick", "--device", "cpu", "--rounds", "1", "--threads", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("quick/masks_*.json")
    rows = Result.load(path).rows
    copies = [row for row in rows if row["how"] == "copy"]
    assert all(row["x copy"] == 1 for row in copies)
    assert {row["how"] for row in rows} >= {"copy", masks.DECAY, *masks.ALTERNATIVES}
    assert Result.load(path).environment["threads"] == 2
    assert rows[-1] == {"weights": "resnet50", "how": "ours (Triton)", "not_run": "needs CUDA"}
    one = next(row for row in rows if row["weights"] == "one matrix")
    assert one["GB/s"] == pytest.approx(8 / one["ns/weight"], rel=1e-6)  # fp32, read and written
    bandwidth = next(row for row in rows if row["weights"] == "memory bandwidth")
    assert one["of bandwidth"] == pytest.approx(one["GB/s"] / bandwidth["GB/s"], rel=1e-6)
    assert "argsort+scatter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "there is no CUDA device here; use --device cpu"),
        (["--device", "tpu"], 'unknown device "tpu"'),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--out", "/proc/none"], "cannot write to the folder /proc/none"),
    ],
)
def test_bad_arguments_give_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a CUDA device here")
    assert masks.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
