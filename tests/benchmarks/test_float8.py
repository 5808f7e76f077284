"""fp8 layers: dense and 2:4 give what the layers of bf16 gave, within fp8's rounding."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from nm_sparsity.benchmarks import float8
from nm_sparsity.core import SparsityError, finalize, sparsify
from nm_sparsity.core.deploy import cache
from nm_sparsity.core.deploy.backends import CuSparseLt
from nm_sparsity.core.deploy.cusparselt import Algorithm


class OnHost(CuSparseLt):
    """cuSPARSELt on a machine without a GPU."""

    def why_not_device(self, device: torch.device) -> str:
        return ""


def test_fp8_layers_equal_those_of_bf16_within_rounding(stand_in: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32, bias=False), nn.Linear(32, 8))
    sparsify(model, exclude=["3"])
    finalize(model)
    model = model.bfloat16()
    x = torch.randn(16, 64).bfloat16()
    dense = copy.deepcopy(model)
    float8.convert(dense, x)
    assert [type(layer) for layer in dense] == [float8.Float8Linear, nn.ReLU, float8.Float8Linear, nn.Linear]
    sparse = copy.deepcopy(dense)
    with pytest.raises(SparsityError, match="cusparselt is not available: needs an NVIDIA GPU, found cpu"):
        float8.to_semi_structured(sparse, CuSparseLt())
    known = cache.Cache(torch.device("cpu"))
    for rows, columns in ((64, 64), (32, 64)):
        problem = cache.Problem("float8_e4m3fn", "bfloat16", rows, columns, 16)
        known.found[str(problem)] = Algorithm()
    known.save()
    assert float8.to_semi_structured(sparse, OnHost()) == {"sparse_layers": 2}
    with torch.no_grad():
        expected = model(x).float()
        for converted in (dense, sparse):
            assert (converted(x).float() - expected).norm() < 0.1 * expected.norm()
        assert (dense(x) - sparse(x)).float().norm() < 0.05 * expected.norm()
