"""A loop of one's own under accelerate: accumulation, autocast, and resuming by state dicts as the page shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from nm_sparsity.core import decay_strength, finalize, load_sparsity_state, sparsify, sparsity_state, verify


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps its precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Memory:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return sparsity_state(self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_sparsity_state(self.model, state)


def make(method: str, **options: Any) -> tuple[Accelerator, nn.Module, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsify(model, method=method, **({"decay": 1.0} if method == "sr-ste" else {}))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    accelerator.register_for_checkpointing(Memory(model))
    return accelerator, model, optimizer


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, batches: range) -> None:
    for i in batches:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["sr-ste", "asp"])
def test_a_resumed_loop_ends_with_the_same_bits(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    accelerator, straight, optimizer = make(method, **options)
    train(accelerator, straight, optimizer, range(6))
    accelerator.save_state(str(tmp_path))
    train(accelerator, straight, optimizer, range(6, 12))

    accelerator, resumed, optimizer = make(method, **options)
    accelerator.load_state(str(tmp_path))
    train(accelerator, resumed, optimizer, range(6, 12))
    for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    if method == "sr-ste":
        assert decay_strength(straight) == decay_strength(resumed) == pytest.approx(1.0 * 6 * 1e-2)
    finalize(accelerator.unwrap_model(resumed))
    verify(accelerator.unwrap_model(resumed), "2:4")
