"""What leaves a run scores as the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nm_sparsity.core import VerificationError, sparsify, verify
from nm_sparsity.core.experiments.finalize import finalize_and_check, save_finalized
from nm_sparsity.core.files.io import load
from nm_sparsity.core.model.layers import sparse_layers


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsify(model, "2:4")
    return model


def outputs(model: nn.Module) -> dict[str, Any]:
    found = model(torch.ones(2, 8)).detach()
    return {"sum": float(found.sum()), "outputs": found.tolist(), "AP_large": None}


def test_the_copy_is_finalized_and_the_model_goes_on_training(model: nn.Module, tmp_path: Path) -> None:
    done = finalize_and_check(model, outputs)
    assert len(list(sparse_layers(model))) == 2
    assert done.score == done.again == outputs(model)
    assert done.report.sparse_density == 0.5
    assert [check.name for check in done.verification.checked] == ["0.weight", "2.weight"]
    save_finalized(done.model, tmp_path / "finalized.pt", config={"epochs": 3})
    dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    payload = load(tmp_path / "finalized.pt")
    dense.load_state_dict(payload["state_dict"])
    assert outputs(dense) == done.score
    assert payload["config"] == {"epochs": 3}
    assert len(verify(tmp_path / "finalized.pt", "2:4").checked) == 2


def test_another_score_is_an_error_that_names_it(model: nn.Module) -> None:
    """As it would be if the finalized model were loaded wrongly."""

    def doubled(end: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in end.parameters():
                parameter *= 2
        return end

    before = outputs(model)["sum"]
    with pytest.raises(VerificationError, match=rf"^finalize changed sum from {before} to -?\d.*: please report"):
        finalize_and_check(model, outputs, reload=doubled)
    with pytest.raises(VerificationError, match=r"^finalize changed outputs from \[\[.*\.\.\. to \[\["):
        finalize_and_check(model, lambda m: {"outputs": outputs(m)["outputs"]}, reload=doubled)


def test_numbers_in_mappings_are_compared_one_by_one(model: nn.Module) -> None:
    """COCO's numbers, say, with None where nothing of that size is annotated."""
    same = {"box": {"AP": 0.5, "AP_large": None}}
    assert finalize_and_check(model, lambda _: same).again == same
    scores = iter([same, {"box": {"AP": 0.5, "AP_large": 0.0}}])
    with pytest.raises(VerificationError, match=r"changed box from \{'AP': 0\.5, 'AP_large': None\} to \{"):
        finalize_and_check(model, lambda _: next(scores))


def test_on_a_cpu_numbers_must_be_equal_whatever_a_gpu_may_do(model: nn.Module) -> None:
    scores = iter([1.0, 1.0 + 1e-6])
    with pytest.raises(VerificationError, match=r"from 1\.0 to 1\.000001"):
        finalize_and_check(model, lambda _: {"AP": next(scores)}, gpu_tolerance=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_numbers_may_lie_a_little_apart(model: nn.Module) -> None:
    model.cuda()
    for apart, refused in ((1e-4, False), (1e-2, True)):
        scores = iter([1.0, 1.0 + apart])
        try:
            finalize_and_check(model, lambda _, s=scores: {"AP": next(s)}, gpu_tolerance=1e-3)
        except VerificationError:
            assert refused
        else:
            assert not refused
