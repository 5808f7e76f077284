"""The search for algorithms on a GPU: right ones are found for every type, and fp16's crash costs a child only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nm_sparsity.core.deploy.backends import BACKENDS
from nm_sparsity.core.deploy.cache import Cache, Problem
from nm_sparsity.core.deploy.search import search

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.filterwarnings("default")  # what compilers remark


@pytest.fixture(autouse=True)
def needs_sparse_tensor_cores() -> None:
    if reason := BACKENDS["cusparselt"].why_not_device(DEVICE):
        pytest.skip(reason)


def test_every_type_is_searched_and_this_process_lives_on(tmp_path: Path) -> None:
    kinds = [("bfloat16", "bfloat16"), ("int8", "int32"), ("int8", "bfloat16"), ("float16", "float16")]
    if torch.cuda.get_device_capability(DEVICE) >= (8, 9):
        kinds.append(("float8_e4m3fn", "bfloat16"))
    problems = [Problem(*kind, 1024, 1024, 1024) for kind in kinds]
    known = Cache(DEVICE, tmp_path / "cache.json")
    found = search(problems, DEVICE, known, limit=90.0)
    print(*found.notes, {str(p): tuple(a) for p, a in found.algorithms.items()}, known.bad, sep="\n")
    assert {str(problem) for problem in problems[:2]} <= set(known.found)
    assert torch.ones(3, device=DEVICE).sum().item() == 3  # the context is whole
    again = search(problems[:2], DEVICE, Cache(DEVICE, tmp_path / "cache.json"))
    assert again.algorithms == {problem: found.algorithms[problem] for problem in problems[:2]}
