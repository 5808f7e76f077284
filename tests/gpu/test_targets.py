"""What 2:4 is promised to gain on an H100: each figure is printed, and fails where it is missed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nm_sparsity import finalize, keep_largest, sparsify
from nm_sparsity.benchmarks import models, timing
from nm_sparsity.core.deploy.backends import BACKENDS, CuSparseLt
from nm_sparsity.core.deploy.cache import Cache, Problem, flat
from nm_sparsity.core.deploy.clock import host_seconds
from nm_sparsity.core.deploy.convert import to_semi_structured
from nm_sparsity.core.deploy.runner import accelerate
from nm_sparsity.core.deploy.search import search

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.filterwarnings("default")  # what compilers remark


@pytest.fixture(autouse=True)
def needs_an_h100() -> None:
    if reason := BACKENDS["cusparselt"].why_not_device(DEVICE):
        pytest.skip(reason)
    if torch.cuda.get_device_capability(DEVICE) != (9, 0):
        pytest.skip("the targets are an H100's")


def product(rows: int, columns: int, tokens: int) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor]]:
    """The dense and the 2:4 product, with the algorithm that is found for it."""
    x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
    w = keep_largest(torch.randn(rows, columns, device=DEVICE), "2:4").bfloat16()
    problem = Problem("bfloat16", "bfloat16", rows, columns, tokens)
    search([problem], DEVICE, cache := Cache(DEVICE))
    backend, packed, algorithms = CuSparseLt(), BACKENDS["cusparselt"].compress(w), flat(cache.bins(problem))
    return lambda i: F.linear(x, w), lambda i: backend.linear(x, packed, rows, algorithms=algorithms)


def test_a_call_costs_the_host_15_microseconds_more_than_a_dense_one() -> None:
    dense, sparse = product(256, 256, 64)
    took = []
    for call in (dense, sparse):
        host_seconds(call, DEVICE, 100)
        took.append(min(host_seconds(call, DEVICE, 200) for _ in range(5)) * 1e6)
    print(f"host time of a call: F.linear {took[0]:.1f} us, 2:4 {took[1]:.1f} us")
    assert took[1] - took[0] <= 15


@pytest.mark.parametrize(("rows", "columns"), [(11008, 4096), (4096, 11008)])
def test_llama_7b_ffn_products_at_4096_tokens_eager(rows: int, columns: int) -> None:
    dense, sparse = product(rows, columns, 4096)
    times = timing.compare({"dense": dense, "2:4": sparse}, DEVICE)
    speedup, low, high = times["dense"].over(times["2:4"])
    print(f"{rows}x{columns} at 4,096 tokens, eager: {speedup:.2f}x ({low:.2f} .. {high:.2f})")
    assert speedup >= 1.5


@pytest.mark.parametrize(
    ("name", "batch", "least"), [("llama-prefill", 1, 1.3), ("bert-large", 32, 1.2), ("vit-l", 64, 1.2)]
)
def test_whole_models_over_the_best_dense(name: str, batch: int, least: float) -> None:
    setup = models.workload(name)
    with torch.device(DEVICE):
        model = setup.build()
    sparsify(model, exclude=setup.exclude)
    finalize(model)
    model = model.bfloat16().eval()
    fast = accelerate(model, setup.inputs(batch, DEVICE, torch.bfloat16))
    print(fast.report)
    assert fast.report.speedup >= least


def test_eager_is_never_slower() -> None:
    setup = models.workload("bert-large")
    with torch.device(DEVICE):
        model = models.TextEncoder(4, 1024, 16, 4096, 30_522)
    sparsify(model)
    finalize(model)
    model = model.bfloat16().eval()
    for batch in (1, 8, 32):
        x = setup.inputs(batch, DEVICE)
        with torch.device(DEVICE):
            other = models.TextEncoder(4, 1024, 16, 4096, 30_522)
        other.load_state_dict(model.state_dict())
        other = other.bfloat16().eval()
        report = to_semi_structured(other, x)
        with torch.no_grad():
            times = timing.compare({"dense": lambda i, x=x: model(x), "2:4": lambda i, x=x, m=other: m(x)}, DEVICE, 10)
        speedup = times["dense"].over(times["2:4"])[0]
        print(f"eager, batch {batch}: {speedup:.2f}x with {len(report.converted)} of {len(report.rows)} weights 2:4")
        assert speedup >= 0.95
