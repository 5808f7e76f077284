"""Where tensors lie: nobody asks a device for a value, and the default for new tensors is nobody's business.

The device is "meta". It has no values: whoever asks for one fails.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nm_sparsity.core import decay_strength, finalize, sparsify, verify
from nm_sparsity.core.files.checkpoint import restore, split
from nm_sparsity.core.files.io import load, save
from nm_sparsity.core.files.packed import load_packed, save_packed
from nm_sparsity.core.methods import make_method
from nm_sparsity.core.model.layers import sparse_weights
from nm_sparsity.core.model.strength import planned_strength

FIXED: list[dict[str, Any]] = [{"method": "ste"}, {"decay": 0.1}, {"method": "s-ste"}, {"method": "asp"}]
SCHEDULED: list[dict[str, Any]] = [
    {"total_steps": 10, **options}
    for options in (
        {"method": "decaying"},
        {"method": "structure-decay"},
        {"decay": "linear(0, 1)"},
        {"fix_at": 0.5},
        {"dense_until": 0.3},
        {"precondition": 0.3},
        {"precondition": "auto"},
    )
]


def make_net(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 16, device=device), nn.ReLU(), nn.Linear(16, 16, device=device), nn.Linear(16, 3, device=device)
    )


def step(net: nn.Module, optimizer: torch.optim.Optimizer, device: str = "cpu") -> None:
    optimizer.zero_grad()
    net(torch.ones(4, 16, device=device)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("options", FIXED + SCHEDULED, ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_asks_a_device_for_no_value(options: dict[str, Any], kind: Any) -> None:
    if kind is torch.optim.SGD and "precondition" in options:
        pytest.skip("there is nothing to hold")
    net = make_net("meta")
    sparsify(net, "2:4", **options)
    optimizer = kind(net.parameters(), lr=1e-3)
    for _ in range(3):
        step(net, optimizer, "meta")
    for _, _, state in sparse_weights(net):
        assert isinstance(state.lr_sum, torch.Tensor)
        assert state.lr_sum.is_meta, "a captured step must count its learning rate at replays"
        assert all(value.is_meta for value in state.memory.values())


@pytest.mark.parametrize("options", FIXED, ids=str)
def test_nothing_is_copied_to_a_device_at_every_step(options: dict[str, Any]) -> None:
    net = make_net("meta")
    sparsify(net, "2:4", **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(2):
        step(net, optimizer, "meta")
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        step(net, optimizer, "meta")
    names = {event.name for event in seen.events()}
    assert "aten::linear" in names
    assert "aten::_to_copy" not in names


@pytest.mark.parametrize("options", SCHEDULED, ids=str)
def test_a_model_on_two_devices(options: dict[str, Any]) -> None:
    """Weights that an optimizer holds on several devices are treated apart."""
    here, there, alone = make_net(), make_net("meta"), make_net()
    for net in (here, there, alone):
        sparsify(net, "2:4", **options)
    both = torch.optim.AdamW([*there.parameters(), *here.parameters()], lr=1e-3)
    one = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    for _ in range(6):
        both.zero_grad()
        there(torch.ones(4, 16, device="meta")).square().mean().backward()
        here(torch.ones(4, 16)).square().mean().backward()
        both.step()
        step(alone, one)
    for p, q in zip(here.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("options", FIXED + SCHEDULED, ids=str)
def test_the_default_device_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    nets = [make_net(), make_net()]
    for net, default in zip(nets, ("cpu", "meta"), strict=True):
        x = torch.ones(4, 16)
        with torch.device(default):
            sparsify(net, "2:4", **options)
            # The other implementations of torch 2.11 keep a count on the default device, and ask for it.
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
            for _ in range(10):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
            weights, metadata = split(net)
            save(tmp_path / "model.pt", {"weights": weights, "metadata": metadata})
            file = load(tmp_path / "model.pt")
            restore(net, file["weights"], file["metadata"])
            planned_strength(make_method("sr-ste", decay="linear(0, 1)", total_steps=3), [0.1] * 3)
            assert decay_strength(net) is None or torch.isfinite(torch.tensor(decay_strength(net), device="cpu"))
            finalize(net)
            verify(net, "2:4")
            save_packed(tmp_path / "packed.safetensors", net)
            load_packed(tmp_path / "packed.safetensors")
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q)
