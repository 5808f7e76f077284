"""GPT-2's linear layer, Transformers' Conv1D, whose weight is (in, out): its groups lie along dimension 0."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from nm_sparsity.core import finalize, sparsify, verify
from nm_sparsity.core.model.flops import count_flops

OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [torch.optim.SGD, torch.optim.AdamW]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["sr-ste", "asp"])
def test_it_trains_as_a_linear_layer_of_the_transposed_weight(
    optimizer: Callable[..., torch.optim.Optimizer], method: str
) -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(16, 8).double(), Conv1D(8, 16).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    for layer in (linear, conv):
        report = sparsify(layer, method=method, **({"decay": 0.5} if method == "sr-ste" else {}))
        assert len(report.sparse) == 1
    steps = [optimizer(layer.parameters(), lr=0.05) for layer in (linear, conv)]
    for _ in range(10):
        x = torch.randn(4, 16, dtype=torch.float64)
        for layer, step in zip((linear, conv), steps, strict=True):
            step.zero_grad()
            layer(x).square().sum().backward()
            step.step()
    torch.testing.assert_close(conv.get_parameter("weight"), linear.get_parameter("weight").T)
    for layer in (linear, conv):
        finalize(layer)
        verify(layer, "2:4")
    groups = conv.weight.T.reshape(-1, 4)
    assert (groups.count_nonzero(dim=1) == 2).all()


def test_gpt2() -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    dense = copy.deepcopy(model)
    report = sparsify(model)
    layers = [name for name, module in dense.named_modules() if isinstance(module, Conv1D)]
    assert [w.name for w in report.sparse] == [f"{name}.weight" for name in layers]
    assert {w.kind for w in report.sparse} == {"Conv1D"}

    tokens = torch.randint(32, (2, 8))
    masked = model(tokens).logits
    finalize(model)
    assert torch.equal(model(tokens).logits, masked)
    verify(model, "2:4")
    for name in layers:
        weight, before = model.get_parameter(f"{name}.weight"), dense.get_parameter(f"{name}.weight")
        assert (weight.T.reshape(-1, 4).count_nonzero(dim=1) == 2).all()
        assert torch.equal(weight[weight != 0], before[weight != 0])


def test_its_flops_are_those_of_the_product() -> None:
    layer = Conv1D(8, 16)
    assert count_flops(layer, torch.randn(5, 16)) == (2 * 5 * 16 * 8, {"weight": 2 * 5 * 16 * 8})
