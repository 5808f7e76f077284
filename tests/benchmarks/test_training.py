"""The published listing, as timed, is the paper's method: its steps equal ours in plain fp32 training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from nm_sparsity.benchmarks import models, training
from nm_sparsity.benchmarks.report import Result


def small() -> nn.Module:
    return models.TextEncoder(1, 16, 2, 32, 12, head=True)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = models.Workload(small, (6,), 12, exclude=("head",))
    monkeypatch.setattr(models, "WORKLOADS", dict.fromkeys(models.WORKLOADS, setup))


def test_the_published_way_takes_the_same_steps(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "DECAY", 50.0)  # large enough to tell SR-STE from STE
    torch.manual_seed(0)
    base, inputs = small(), torch.randint(12, (4, 6))
    weights = {}
    for variant in ("SR-STE", "SR-STE, published code", "STE"):
        model = copy.deepcopy(base)
        training.VARIANTS[variant](model, ("head",))
        step = training.step(model, inputs, amp=False)
        for i in range(5):
            step(i)
        parameters = model.named_parameters()
        weights[variant] = {name.replace(".parametrizations.weight.original", ".weight"): p for name, p in parameters}
    ours, published, ste = weights.values()
    for name, p in ours.items():
        torch.testing.assert_close(p, published[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours["layers.0.feed_forward.0.weight"], ste["layers.0.feed_forward.0.weight"], rtol=1e-2)


@pytest.mark.parametrize("variant", training.VARIANTS)
def test_gradients_of_the_smallest_layers_are_normal_numbers(variant: str) -> None:
    """Subnormal ones would be timed in the place of the method: arithmetic with them is many times slower."""
    torch.manual_seed(0)
    (case,) = (case for case in training.CPU_CASES if case.model == "tiny-layers")
    model = models.workload(case.model).build()
    training.VARIANTS[variant](model, ())
    step = training.step(model, case.inputs(torch.device("cpu")), amp=False, case=case)
    for i in range(20):
        step(i)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert (p.grad.abs() >= torch.finfo(p.dtype).tiny).all(), name


def test_the_same_layers_are_converted(tiny: None) -> None:
    model = small()
    training.published(model, ("head",))
    converted = {name for name, module in model.named_modules() if nn.utils.parametrize.is_parametrized(module)}
    assert converted == {
        "layers.0.attention.query",
        "layers.0.attention.key_value",
        "layers.0.attention.out",
        "layers.0.feed_forward.0",
        "layers.0.feed_forward.2",
    }


def test_a_run_has_a_row_for_every_variant(tiny: None, tmp_path: Path) -> None:
    assert training.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("quick/training_*.json")
    rows = Result.load(path).rows
    assert [row["variant"] for row in rows[: len(training.VARIANTS)]] == list(training.VARIANTS)
    assert rows[0]["overhead"] == 0
    assert all(row.get("step_ms", row.get("us")) > 0 for row in rows if "not_run" not in row)
    assert [row["variant"] for row in rows if "us" in row][:2] == ["dense", "in a pass"]
    assert rows[-1]["not_run"] == "needs CUDA"


def test_autocast_steps_run() -> None:
    training.step(small(), torch.randint(12, (2, 6)), amp=True)(0)
