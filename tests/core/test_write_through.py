"""What is written to a sparse layer's weight reaches the shadow weight, or raises."""

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nm_sparsity.core import SparsityError, keep_largest, sparsify


class Reading(nn.Module):
    """Calls `inside` on its layer in the middle of a forward pass, when all values are made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inside: Callable[[nn.Module], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.inside is not None:
            self.inside(self.second)
        return self.second(x)


def copied(model: nn.Module, way: str) -> nn.Module:
    if way == "pickled":
        return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]
    return copy.deepcopy(model) if way == "copied" else model


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "zeros_": lambda layer: nn.init.zeros_(layer.weight),
    "normal_": lambda layer: nn.init.normal_(layer.weight),
    "trunc_normal_": lambda layer: nn.init.trunc_normal_(layer.weight),
    "kaiming_uniform_": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "dirac-like item": lambda layer: layer.weight.__setitem__((0, slice(None)), 3.0),
    "copy_": lambda layer: layer.weight.copy_(torch.ones(8, 8)),
    "augmented": lambda layer: layer.weight.__iadd__(1.0),
    "data": lambda layer: setattr(layer.weight, "data", torch.ones(8, 8)),
    "data +=": lambda layer: layer.weight.data.add_(1.0),
    "data.clamp_": lambda layer: layer.weight.data.clamp_(-0.01, 0.01),
}


@pytest.mark.parametrize("way", ["original", "copied", "pickled"])
@pytest.mark.parametrize("place", ["outside", "inside a pass"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_reaches_the_weight_as_it_does_a_parameter(write: str, place: str, way: str) -> None:
    torch.manual_seed(0)
    dense = Reading()
    model = copy.deepcopy(dense)
    sparsify(model, "2:4")
    model, x = copied(model, way), torch.randn(2, 8)

    @torch.no_grad()
    def change(layer: nn.Module) -> None:
        torch.manual_seed(1)
        WRITES[write](layer)

    change(dense.second)
    if place == "outside":
        change(model.second)
    else:
        model.inside = change
    found = model(x)
    shadow = model.second._parameters["weight"]
    assert torch.equal(shadow, dense.second.weight)
    layer = nn.functional.linear(x, keep_largest(model.first._parameters["weight"], "2:4"), model.first.bias)
    expected = nn.functional.linear(layer, keep_largest(shadow, "2:4"), model.second.bias)
    assert torch.equal(found, expected), "what is written during a pass is computed with in the same pass"
    model.inside = None
    assert torch.equal(model(x), expected), "and what showed the weight is masked in the next"


def test_a_write_leaves_what_was_taken_of_the_value_before() -> None:
    model, x, taken = Reading(), torch.randn(2, 8), []
    sparsify(model, "2:4")

    def change(layer: nn.Module) -> None:
        weight = layer.weight
        with torch.no_grad():
            value = layer.weight
            taken.append((value, value.clone()))
            weight.mul_(-2)

    for inside in (None, change, None):
        model.inside = inside
        found = model(x)
    ((value, before),) = taken
    assert torch.equal(value, before)
    first, second = (keep_largest(layer._parameters["weight"], "2:4") for layer in (model.first, model.second))
    expected = nn.functional.linear(x, first, model.first.bias)
    assert torch.equal(found, nn.functional.linear(expected, second, model.second.bias))


@pytest.mark.parametrize("grad", [True, False])
def test_idioms_around_gradients(grad: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsify(model, "2:4")
    with torch.set_grad_enabled(grad):
        model[0].weight.requires_grad = False
        model[1].weight.register_hook(torch.zeros_like)
        model[1].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "seen", True))
    model(torch.randn(2, 8)).sum().backward()
    frozen, zeroed = (layer._parameters["weight"] for layer in model)
    assert not frozen.requires_grad
    assert frozen.grad is None
    assert zeroed.grad is not None
    assert not zeroed.grad.any()
    assert zeroed.seen
    assert model[1].weight.grad is zeroed.grad
    model[1].weight.grad = None
    assert zeroed.grad is None
    assert model[0].weight.requires_grad_() is not None
    assert frozen.requires_grad


def test_an_augmented_assignment_writes_and_keeps_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, "2:4")
    shadow = model[0]._parameters["weight"]
    before = shadow.detach().clone()
    with torch.no_grad():
        model[0].weight *= 0.5
    assert model[0]._parameters["weight"] is shadow
    assert torch.equal(shadow, before * 0.5)
    assert torch.equal(model[0].weight, keep_largest(shadow, "2:4"))


def test_get_parameter_finds_the_parameter_whoever_watches() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
        sparsify(model)
    assert model.get_parameter("0.weight") is model[0]._parameters["weight"]
    model.to_empty(device="cpu")
    with FlopCounterMode(display=False):
        assert model.get_parameter("0.weight") is model[0]._parameters["weight"]


def test_get_parameter_finds_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, "2:4")
    assert model.get_parameter("0.weight") is model[0]._parameters["weight"]
    assert model[0].get_parameter("weight") is model[0]._parameters["weight"]


@pytest.mark.parametrize("grad", [True, False])
def test_get_parameter_finds_the_parameter_inside_a_forward(grad: bool) -> None:
    model, found = Reading(), []
    sparsify(model, "2:4")
    model.inside = lambda layer: found.extend([layer.weight, layer.get_parameter("weight"), layer.weight])
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            model(torch.randn(2, 8))
    for value, parameter, again in (found[:3], found[3:]):
        assert any(parameter is p for p in model.parameters())
        assert torch.equal(value, again)
        assert not torch.equal(value, parameter)


LOST: dict[str, Callable[[Any], object]] = {
    "orthogonal_": lambda layer: nn.init.orthogonal_(layer.weight),
    "eye_ (out=)": lambda layer: nn.init.eye_(layer.weight),
    "a row": lambda layer: layer.weight[0].zero_(),
    "transposed": lambda layer: layer.weight.t().mul_(2),
    "detached": lambda layer: layer.weight.detach().zero_(),
    "foreach": lambda layer: torch._foreach_add_([layer.weight], 1.0),
}


@pytest.mark.parametrize("recorded", [True, False], ids=["read with gradients", "read without"])
@pytest.mark.parametrize("write", LOST)
def test_a_write_that_cannot_be_sent_on_raises_at_the_next_use(write: str, recorded: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, "2:4")
    with torch.set_grad_enabled(recorded):
        reader = SimpleNamespace(weight=model[0].weight)
    with torch.no_grad():
        LOST[write](reader)
    del reader
    with pytest.raises(RuntimeError, match=r"written to SparseLinear.weight through a view, detach\(\), out="):
        model(torch.randn(2, 8))
    model(torch.randn(2, 8))  # said once


@pytest.mark.parametrize("recorded", [True, False], ids=["read with gradients", "read without"])
@pytest.mark.parametrize("write", LOST)
def test_a_lost_write_in_a_pass_raises_at_the_next(write: str, recorded: bool) -> None:
    model, x = Reading(), torch.randn(2, 8)
    sparsify(model, "2:4")

    def change(layer: nn.Module) -> None:
        reader = SimpleNamespace(weight=layer.weight)
        with torch.no_grad():
            LOST[write](reader)

    with torch.set_grad_enabled(recorded):
        model(x)  # whose values serve the next pass
        model.inside = change
        model(x)
        model.inside = None
        with pytest.raises(RuntimeError, match="did not reach the weight"):
            model(x)
        weights = [keep_largest(layer._parameters["weight"], "2:4") for layer in (model.first, model.second)]
        expected = nn.functional.linear(x, weights[0], model.first.bias)
        assert torch.equal(model(x), nn.functional.linear(expected, weights[1], model.second.bias))


def test_a_lost_write_before_a_read_with_gradients_in_the_same_pass_raises_at_the_next() -> None:
    model, x = Reading(), torch.randn(2, 8)
    sparsify(model, "2:4")

    @torch.no_grad()
    def change(layer: nn.Module) -> None:
        layer.weight[0].zero_()

    model.inside = change
    model(x)
    with pytest.raises(RuntimeError, match="did not reach the weight"):
        model(x)


def test_operations_give_plain_tensors_and_copies_are_plain() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, "2:4")
    weight = model[0].weight
    assert type(weight * 2) is Tensor
    assert type(model(torch.randn(2, 8))) is Tensor
    assert type(copy.deepcopy(weight)) is Tensor
    assert type(pickle.loads(pickle.dumps(weight))) is Tensor
    assert torch.equal(weight.detach(), keep_largest(model[0]._parameters["weight"], "2:4"))


def test_an_optimizer_of_values_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    sparsify(model, "2:4")
    decayed = [layer.weight for layer in model if hasattr(layer, "weight")]
    with pytest.raises(SparsityError, match=r"which is its masked value: give it the parameter"):
        torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}])
    decayed = [layer.get_parameter("weight") for layer in model if hasattr(layer, "weight")]
    torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}])


@pytest.mark.parametrize("inside", [True, False], ids=["in a pass", "outside"])
def test_the_value_stands_in_the_graph_where_the_weight_does(inside: bool) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    sparsify(model, "2:4")
    w, taken = model[0].get_parameter("weight"), []
    if inside:
        model[1].register_forward_pre_hook(lambda *_: taken.append(model[0].weight))
        model(x).sum().backward()
        w.grad = None
    else:
        taken.append(model[0].weight)
    (value,) = taken
    model(x).sum().backward()  # frees the graph of a pass, and with it what it held
    w.grad = None
    assert not value.is_leaf
    product = nn.functional.linear(x, value)
    node = product.grad_fn
    while not hasattr(node, "variable"):
        (node,) = [node for node, _ in node.next_functions if node is not None]  # no other but views
        assert node.name() in ("TBackward0", "torch::autograd::AccumulateGrad")
    assert node.variable is w
    for wanted in (value, w):
        (grad,) = torch.autograd.grad(product.sum(), wanted, retain_graph=True)
        assert torch.equal(grad, x.sum(0).expand(8, 8))
    product.sum().backward(inputs=[value])
    assert torch.equal(w.grad, grad)


def test_the_gradient_of_a_weight_that_was_computed_goes_on_to_what_it_was_computed_of() -> None:
    model, x = nn.Linear(8, 8), torch.randn(2, 8)
    sparsify(model, "2:4")
    factor = torch.tensor(3.0, requires_grad=True)
    w = model.get_parameter("weight").detach()
    torch.func.functional_call(model, {"weight": w * factor}, (x,)).sum().backward()
    assert torch.allclose(factor.grad, (x.sum(0) * w).sum())


@pytest.mark.parametrize("inside", [True, False], ids=["in a pass", "outside"])
def test_hooks_on_saved_tensors_see_those_of_the_dense_model(inside: bool) -> None:
    """As those of a checkpoint count them, and those that offload keep them."""
    dense, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(2, 8)
    model, seen, grads = copy.deepcopy(dense), [], []
    sparsify(model, "2:4")
    for w in (dense[0].weight, dense[2].weight):
        w.data.copy_(keep_largest(w.detach(), "2:4"))
    for net in (dense, model):
        shapes: list[torch.Size] = []
        seen.append(shapes)

        def pack(t: torch.Tensor, shapes: list[torch.Size] = shapes) -> torch.Tensor:
            shapes.append(t.shape)
            return t.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, torch.Tensor.clone):
            y = net(x) if inside else net[2](net[1](net[0](x)))
        y.square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert seen[0] == seen[1]
    assert all(map(torch.equal, *grads))


def test_a_model_trains_where_hooks_on_saved_tensors_are_disabled() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, "2:4")
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        model(torch.randn(2, 8)).sum().backward()
    assert model[0].get_parameter("weight").grad is not None


def test_gradients_that_are_enabled_in_inference_mode_are_not_recorded() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    sparsify(model, "2:4")
    expected = model(x)
    for _ in range(2):  # before and after a pass that records
        with torch.inference_mode(), torch.enable_grad():
            assert torch.equal(model(x), expected)
            assert torch.equal(model[1](model[0](x)), expected)
        model(x).sum().backward()
        model[1](model[0](x)).sum().backward()


def test_second_derivatives_pass_through() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    model, x = copy.deepcopy(dense), torch.randn(4, 8, dtype=torch.float64)
    sparsify(model, "2:4")
    with torch.no_grad():
        for layer in (dense[0], dense[2]):
            layer.weight.copy_(keep_largest(layer.weight, "2:4"))
    found = []
    for net in (model, dense):
        w = net[0]._parameters["weight"]
        (first,) = torch.autograd.grad(net(x).square().sum(), w, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), w)[0])
    torch.testing.assert_close(found[0], found[1])
