"""Fixed masks where weights are loaded: others give a new mask, a resume keeps it, also through DCP."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict

from nm_sparsity.core import CheckpointError, SparsityState, nm_mask, sparsify, sparsity_state
from nm_sparsity.core.model.layers import sparse_weights

METHODS: dict[str, dict[str, Any]] = {
    "asp": {},
    "sr-ste": {"decay": 0.5},
    "s-ste": {},
    "ste": {"fix_at": 0.5, "total_steps": 6},
}


def make(seed: int, method: str = "asp") -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    sparsify(net, "2:4", method=method, **METHODS[method])
    return net, torch.optim.AdamW(net.parameters(), lr=0.01)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def shadow(net: nn.Sequential) -> nn.Parameter:
    return net[0].get_parameter("weight")


def copy_in_place(net: nn.Sequential, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in state.items():
            net.get_parameter(name).copy_(value)


LOADS: dict[str, Callable[[nn.Sequential, dict[str, Tensor]], object]] = {
    "load_state_dict": lambda net, state: net.load_state_dict(state),
    "assign": lambda net, state: net.load_state_dict(state, assign=True),
    "set_model_state_dict": set_model_state_dict,
    "copy_": copy_in_place,
    "layer.weight.data": lambda net, state: net[0].weight.data.copy_(state["0.weight"]),
}


@pytest.mark.parametrize("how", LOADS)
def test_weights_loaded_after_the_first_step_get_a_mask_of_their_own(how: str) -> None:
    net, optimizer = make(0)
    train(net, optimizer)
    other = {name: value.clone() for name, value in make(1)[0].state_dict().items()}
    LOADS[how](net, copy.deepcopy(other))
    if how == "assign":
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, steps=1)
    assert torch.equal(shadow(net) != 0, nm_mask(other["0.weight"], "2:4"))


@pytest.mark.parametrize("how", LOADS)
def test_weights_that_fit_the_mask_keep_it_though_kept_ones_are_zero(how: str) -> None:
    net, optimizer = make(0)
    train(net, optimizer)
    kept = shadow(net) != 0
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["0.weight"][:, -4:] = 0  # a mask made anew would keep the first two of each group
    LOADS[how](net, state)
    if how == "assign":
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, steps=1)
    assert torch.equal(shadow(net) != 0, kept)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_resume_through_distributed_checkpoint_is_exact(method: str, tmp_path: Path) -> None:
    net, optimizer = make(0, method)
    train(net, optimizer)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    saved = {"model": model_state, "optimizer": optimizer_state, "sparsity": SparsityState(net)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    before = sparsity_state(net)

    resumed, its_optimizer = make(1, method)
    model_state, optimizer_state = get_state_dict(resumed, its_optimizer)
    loaded = {"model": model_state, "optimizer": optimizer_state, "sparsity": SparsityState(resumed)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(resumed, its_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for name, memory in sparsity_state(resumed).items():
        assert memory.keys() == before[name].keys()
        assert str(memory) == str(before[name])
    expected, found = train(net, optimizer), train(resumed, its_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(state.settled or method in ("sr-ste", "s-ste") for _, _, state in sparse_weights(resumed))


def test_bytes_that_are_no_state_are_refused() -> None:
    state = SparsityState(make(0)[0])
    for wrong in ({}, {"sparsity": b"123"}, {"sparsity": None}):
        with pytest.raises(CheckpointError, match=r"not what SparsityState\.state_dict returns"):
            state.load_state_dict(wrong)
