"""The values of a pass equal those of single weights bit for bit, whatever happens around and in between."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

from nm_sparsity.core import SparsityError, finalize, frozen, keep_largest, sparsify, unsparsify
from nm_sparsity.core.masks.batched import Batch
from nm_sparsity.core.model import bank
from nm_sparsity.core.model.layers import sparse_weights


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each launch of values made."""
    made: list[int] = []
    original = Batch.keep_largest

    def count(self: Batch, dtype: torch.dtype | None = None) -> list[Tensor]:
        made.append(len(self.weights))
        return original(self, dtype)

    monkeypatch.setattr(Batch, "keep_largest", count)
    return made


def masked_twin(model: nn.Module, pattern: str = "2:4") -> nn.Module:
    """A dense model whose weights are truly masked, for a dense `model` that would be sparsified as a whole."""
    dense = copy.deepcopy(model)
    sparsify(model, pattern)
    for name, param, state in sparse_weights(model):
        dense.get_parameter(name).data.copy_(keep_largest(param.detach(), state.pattern, state.dims))
    return dense


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).relu())
        return y


def blocks(n: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(n)])


def assert_same(model: nn.Module, dense: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Outputs and gradients, bit for bit."""
    found = []
    for net in (model, dense):
        net.zero_grad()
        y = run(net, x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_launch_a_pass_and_nothing_is_left(launches: list[int]) -> None:
    model = blocks()
    dense, x = masked_twin(model), torch.randn(2, 16)
    launches.clear()
    assert_same(model, dense, x, lambda net, x: net(x))
    assert launches == [6]
    model[1](x)
    assert launches == [6, 2], "a block by itself is a pass of its own"
    assert not bank._thread.passes


@pytest.mark.filterwarnings("ignore:.*half:UserWarning")
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_that_are_no_selection_are_made_together(stepped: bool, dtype: torch.dtype) -> None:
    model = blocks().to(dtype)
    sparsify(model, method="s-ste")
    launches: list[bank.Launch] = []
    model[2].register_forward_hook(lambda *_: launches.extend(bank._thread.passes[-1].launches))
    x = torch.randn(2, 16, dtype=dtype)
    if stepped:
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        launches.clear()
    model(x)
    (launch,) = launches
    assert len(launch.values) == 6
    for value, w, state in zip(launch.values, launch.weights, launch.states, strict=True):
        assert torch.equal(value, state.value(w))
        assert ("beta" in state.memory) == stepped


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block_is_one_launch_when_it_is_recomputed(launches: list[int], reentrant: bool) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    model = Checkpointed(*blocks())
    dense, x = masked_twin(model), torch.randn(2, 16, requires_grad=True)
    launches.clear()
    assert_same(model, dense, x, lambda net, x: net(x))
    assert launches == [6, 2, 2, 2]


@pytest.mark.parametrize("change", ["load_state_dict", "data", "copy_", "swap", "functional_call", "optimizer"])
def test_a_weight_that_changes_between_two_passes(change: str) -> None:
    model = blocks()
    dense, x = masked_twin(model), torch.randn(2, 16)
    other = {name: value * 1.5 + 0.1 for name, value in model.state_dict().items()}
    model(x)
    if change == "functional_call":
        found = torch.func.functional_call(model, other, x)
    else:
        if change == "load_state_dict":
            model.load_state_dict(other)
        elif change == "optimizer":
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
            for name, p in model.named_parameters():
                p.grad = p.detach() - other[name]
            sparse = {id(p) for _, p, _ in sparse_weights(model)}
            for p in model.parameters():  # without the decay, which would go on top
                p.grad = p.grad if id(p) not in sparse else None
            optimizer.step()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(other[name])
        else:
            for name, p in model.named_parameters():
                if change == "data":
                    p.data = other[name].clone()
                elif change == "copy_":
                    p.data.copy_(other[name])
                else:
                    p.data, other[name] = other[name], p.data.clone()
        if change == "swap":
            other = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = model(x)
    for name, _, state in sparse_weights(model):
        other[name] = keep_largest(other[name], state.pattern, state.dims)
    dense.load_state_dict(other)
    assert torch.equal(found, dense(x))


def test_a_weight_that_changes_during_a_pass_is_computed_with_as_it_is() -> None:
    class Momentum(nn.Module):
        """Updates one branch from the other in its forward, as MoCo and BYOL do."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.query(x)
            with torch.no_grad():
                for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
                    k.mul_(0.9).add_(q, alpha=0.1)
            return y + self.key(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Momentum(), torch.randn(2, 16)
    dense = copy.deepcopy(model)
    sparsify(model)
    found = model(x)
    dense.key.load_state_dict(
        {n: 0.9 * v + 0.1 * dense.query.state_dict()[n] for n, v in dense.key.state_dict().items()}
    )
    for layer in (dense.query, dense.key):
        layer.weight.data = keep_largest(layer.weight.detach(), "2:4")
    torch.testing.assert_close(found, dense.query(x) + dense.key(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("inside", [True, False], ids=["autocast opened inside forward", "around it"])
def test_autocast_gives_half_values_at_once_and_fp32_where_it_is_closed(launches: list[int], inside: bool) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = blocks(), nn.Linear(16, 8)
            self.seen: list[torch.dtype] = []

        def body(self, x: Tensor) -> Tensor:
            self.seen.append(self.blocks[0].up.weight.dtype)
            x = self.blocks(x)
            with torch.autocast("cpu", enabled=False):
                self.seen.append(self.head.weight.dtype)
                return self.head(x.float())  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            if inside:
                with torch.autocast("cpu", torch.bfloat16):
                    return self.body(x)
            return self.body(x)

    model = Mixed()
    dense, x = masked_twin(model), torch.randn(2, 16)
    launches.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        assert_same(model, dense, x, lambda net, x: net(x))
    assert model.seen[:2] == [torch.bfloat16, torch.float32]
    assert launches == [7], "and what was made in vain for the head is made again, alone"
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_tied_weights_and_attention() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.encoder(x)).relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Net()
    dense, x = masked_twin(model), torch.randn(2, 5, 16)
    dense.b.weight = dense.a.weight
    assert_same(model, dense, x, lambda net, x: net(x))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), dense.eval()(x), rtol=0, atol=1e-6)


def test_parts_with_patterns_of_their_own_and_parts_made_dense_again(launches: list[int]) -> None:
    model = blocks()
    sparsify(model[0], "2:4")
    sparsify(model[1:], "1:4")
    x = torch.randn(2, 16)
    expected = model(x)
    assert launches == [2, 2, 2], "the slice that was sparsified is not what is called: its blocks are passes"
    finalize(model[0])
    assert torch.equal(model(x), expected)
    unsparsify(model[2])
    assert not torch.equal(model(x), expected)
    assert type(model[2].up) is nn.Linear


@pytest.mark.parametrize("revert", [unsparsify, lambda part: (finalize(part), unsparsify(part))], ids=["un", "final"])
def test_a_part_that_is_made_sparse_anew(revert: Callable[[nn.Module], object], launches: list[int]) -> None:
    model, x = blocks(), torch.randn(2, 16)
    dense = masked_twin(model)
    model(x)
    revert(model[1])
    sparsify(model[1], "1:4")
    for name, param, state in sparse_weights(model[1]):
        dense[1].get_parameter(name).data.copy_(keep_largest(param.detach(), state.pattern, state.dims))
    launches.clear()
    assert_same(model, dense, x, lambda net, x: net(x))
    assert launches == [4, 2]


def test_layers_that_are_taken_out_are_computed_no_more_and_freed(launches: list[int]) -> None:
    model = blocks()
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    gone = weakref.ref(model[2])
    model[2] = nn.Identity()
    gc.collect()
    assert gone() is None
    launches.clear()
    copied = pickle.loads(pickle.dumps(model))
    for net in (model, copied, copy.deepcopy(model)):
        net(torch.randn(2, 16)).sum().backward()
    assert launches == [4, 4, 4]
    optimizer.step()


def test_a_weight_that_comes_from_elsewhere_is_masked_in_a_pass_too() -> None:
    """A hypernetwork puts a tensor that it computed in the place of the Parameter."""
    model, x = blocks(), torch.randn(2, 16)
    dense = masked_twin(model)
    for net in (model, dense):
        w = net[0].up._parameters.pop("weight").detach().clone()
        net[0].up.weight = w
    assert torch.equal(model(x), dense(x))


def test_weights_that_were_tied_since_are_sparse_as_the_first_one() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(2, 16)
    sparsify(model, patterns={"1": "1:4"})
    model[1].weight = model[0].get_parameter("weight")
    value = keep_largest(model[0].get_parameter("weight").detach(), "2:4")
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda layer, *_: seen.append(layer.weight.detach().clone()))
    model(x)
    assert torch.equal(seen[0], value)


def test_an_exception_in_a_pass_leaves_nothing_behind() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fails = Block(), True

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            if self.fails:
                raise ZeroDivisionError
            return x

    model, x = Failing(), torch.randn(2, 16)
    dense = masked_twin(model)
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert not bank._thread.passes
    with torch.no_grad():
        model.block.up._parameters["weight"].zero_()
        dense.block.up.weight.zero_()
    model.fails = dense.fails = False
    assert torch.equal(model(x), dense(x))


def test_a_model_that_calls_itself(launches: list[int]) -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor, depth: int = 3) -> Tensor:
            x = self.block(x)
            return self(x, depth - 1) if depth else x

    model = Recursive()
    dense, x = masked_twin(model), torch.randn(2, 16)
    launches.clear()
    assert_same(model, dense, x, lambda net, x: net(x))
    assert launches == [2]
    assert not bank._thread.passes


def test_copies_and_pickles_have_passes_of_their_own() -> None:
    model, x = blocks(), torch.randn(2, 16)
    sparsify(model)
    twin = copy.deepcopy(model)
    part = copy.deepcopy(model[1])
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(x).equal(model(x))
    assert torch.equal(twin(x), x)
    assert torch.equal(part(x), model[1](x))


def test_a_model_is_freed_with_its_last_reference() -> None:
    model = blocks()
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    gc.collect()
    seen: list[int] = []
    gc.disable()
    try:
        weakref.finalize(model[0].up._parameters["weight"], seen.append, 1)
        del model, optimizer
    finally:
        gc.enable()
    assert seen, "no cycle keeps weights alive until the collector runs"


def run_together(*targets: Callable[[], None]) -> None:
    """Each in a thread of its own, to the end."""
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_threads_run_one_model_and_two_models() -> None:
    one, x = blocks(), torch.randn(2, 16)
    dense = masked_twin(one)
    two = blocks(2)
    sparsify(two)
    expected, wrong = dense(x), []

    def infer() -> None:
        with torch.no_grad():
            wrong.extend(not torch.equal(one(x), expected) for _ in range(50))

    def train() -> None:
        optimizer = torch.optim.SGD(two.parameters(), lr=0.01)
        for _ in range(50):
            optimizer.zero_grad()
            two(x).sum().backward()
            optimizer.step()

    run_together(infer, infer, train)
    assert len(wrong) == 100
    assert not any(wrong)


def test_two_threads_differentiate_one_model() -> None:
    model, x = blocks(), torch.randn(2, 16)
    sparsify(model)
    weights = list(model.parameters())
    expected, wrong = torch.autograd.grad(model(x).square().sum(), weights), []

    def differentiate() -> None:
        for _ in range(50):
            found = torch.autograd.grad(model(x).square().sum(), weights)
            wrong.append(not all(map(torch.equal, found, expected)))

    run_together(differentiate, differentiate)
    assert len(wrong) == 100
    assert not any(wrong)


def test_two_passes_at_a_time_share_no_values() -> None:
    model, x, seen = blocks(2), torch.randn(2, 16), {}
    sparsify(model)
    model(x)

    def note(layer: nn.Module, args: tuple[Tensor]) -> None:
        seen[threading.current_thread().name] = layer.weight.data_ptr()
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=model, args=args)
            other.start()
            other.join()

    model[0].up.register_forward_pre_hook(note)
    with torch.no_grad():
        model(x)
    assert len(set(seen.values())) == 2


def convolutions() -> nn.Sequential:
    """One layer whose graph saves the weight itself, and one whose graph saves a view of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 8))


def test_a_pass_takes_the_tensors_of_the_last_one() -> None:
    model, x, seen = convolutions(), torch.randn(2, 4, 3, 3), []
    sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for layer in (model[0], model[2]):
        layer.register_forward_pre_hook(lambda layer, _: seen.append((id(layer.weight), layer.weight.data_ptr())))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert seen[:2] == seen[2:4] == seen[4:], "nothing is made anew in a training step"


HOLDS: dict[str, Callable[[nn.Module], object]] = {
    "itself": lambda layer: layer.weight,
    "detached": lambda layer: layer.weight.detach(),
    "row": lambda layer: layer.weight[0],
    "array": lambda layer: layer.weight.detach().numpy(),
    "list": lambda layer: [layer.weight],
}


def content(held: Any) -> Tensor:
    return torch.as_tensor(held[0] if isinstance(held, list) else held).detach()


@pytest.mark.parametrize("recorded", [True, False], ids=["read with gradients", "read without"])
@pytest.mark.parametrize("hold", HOLDS)
def test_what_somebody_holds_of_a_pass_stays_as_it_is(hold: str, recorded: bool) -> None:
    model, x, held = convolutions(), torch.randn(2, 4, 3, 3), []
    sparsify(model)
    model(x).sum().backward()
    with torch.set_grad_enabled(recorded):
        handle = model[2].register_forward_pre_hook(lambda layer, _: held.append(HOLDS[hold](layer)))
        model(x)
        handle.remove()
        before = content(held[0]).clone()
        for p in model.parameters():
            p.data.mul_(-2)
        model(x)
    assert torch.equal(content(held[0]), before)


def test_graphs_of_earlier_passes_keep_their_values() -> None:
    model, x = convolutions(), torch.randn(2, 4, 3, 3, requires_grad=True)
    dense = masked_twin(model)
    model(x).sum().backward()  # whose tensors the next pass takes
    first = model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    second = model(x)
    inputs = [x, *model.parameters()]
    found = [torch.autograd.grad(y.square().sum(), inputs) for y in (second, first)]
    expected = [torch.autograd.grad(dense(x).square().sum(), [x, *dense.parameters()])]
    with torch.no_grad():
        for p in dense.parameters():
            p.mul_(2)
    expected.insert(0, torch.autograd.grad(dense(x).square().sum(), [x, *dense.parameters()]))
    for a, b in zip(found, expected, strict=True):
        assert all(map(torch.equal, a, b))


def test_gradients_arrive_in_the_order_of_the_dense_model() -> None:
    """What communicates during backward depends on it."""
    dense, x = blocks(), torch.randn(2, 16)
    model, orders = copy.deepcopy(dense), []
    sparsify(model)
    for net in (dense, model):
        order: list[str] = []
        orders.append(order)
        for name, p in net.named_parameters():
            p.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        for _ in range(3):
            net(x).sum().backward()
    assert orders[0] == orders[1]


def test_a_weight_that_takes_another_dtype_where_it_lies_gets_a_new_value() -> None:
    class Cast(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            before = self[0].weight
            w = self[0]._parameters["weight"]
            w.data = w.data.view(torch.bfloat16)
            assert before.dtype == torch.float16
            after: Tensor = self[0].weight
            return after

    model = Cast(nn.Linear(16, 16))
    sparsify(model)
    after = model.half()(torch.empty(0))
    assert torch.equal(after, keep_largest(model[0].get_parameter("weight").detach(), "2:4"))


def test_values_of_two_dtypes_take_turns() -> None:
    model, x = blocks(), torch.randn(2, 16)
    dense = masked_twin(model)
    for half in (True, False, True, False, True):

        def run(net: nn.Module, x: Tensor, half: bool = half) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return net(x)  # type: ignore[no-any-return]

        assert_same(model, dense, x, run)


@pytest.mark.parametrize("change", ["swap", "dtype", "form", "frozen"])
def test_a_parameter_that_becomes_another_tensor_between_steps_gets_the_gradient(change: str) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(2, 16)
    dense = masked_twin(model)
    for net in (model, dense):
        for _ in range(2):
            net(x).sum().backward()
        w = net[0].get_parameter("weight")
        w.grad = None
        if change == "swap":
            torch.utils.swap_tensors(w, nn.Parameter(w.detach().flip(0)))
        elif change == "dtype":
            net.double()
        elif change == "form":
            w.data = w.data.t().contiguous().t()
        else:
            w.requires_grad_(False)
            net(x).sum().backward()
            assert w.grad is None
            w.requires_grad_(True)
    x = x.double() if change == "dtype" else x
    assert_same(model, dense, x, lambda net, x: net(x))


def test_frozen_and_passes_agree() -> None:
    model, x = blocks(), torch.randn(2, 16)
    dense = masked_twin(model)
    with torch.no_grad(), frozen(model):
        assert torch.equal(model(x), dense(x))
        assert torch.equal(model[0](x), dense[0](x))


def test_a_compiled_model_is_one_graph_with_a_node_for_each_value() -> None:
    calls: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        calls.append([str(n.target) for n in graph.graph.nodes if "nm_sparsity" in str(n.target)])
        return graph.forward

    model = blocks()
    dense, x = masked_twin(model), torch.randn(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(model, dense, x, lambda net, x: compiled(x) if net is model else net(x))
    assert calls == [["nm_sparsity.keep_largest"] * len(list(sparse_weights(model)))]


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_blocks_alike_share_one_graph(how: str) -> None:
    """As those of dense models: more graphs than torch allows of one function would leave the others uncompiled."""
    model = blocks(12)
    dense, x = masked_twin(model), torch.randn(2, 16, requires_grad=True)
    graphs = torch._dynamo.testing.CompileCounter()
    for i, block in enumerate(model):
        if how == "wrapped":
            model[i] = torch.compile(block, fullgraph=True, backend=graphs)  # type: ignore[assignment]
        else:
            block.compile(fullgraph=True, backend=graphs)
    assert_same(model, dense, x, lambda net, x: net(x))
    assert graphs.frame_count == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # functorch's own
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp"])
@pytest.mark.parametrize("recorded", [True, False])
def test_transforms_inside_a_forward(transform: str, recorded: bool) -> None:
    """The first read made the values of all layers; one that is read in a transform first is none of them."""

    class Transforms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if transform == "jvp":
                tangent: Tensor = torch.func.jvp(self.second, (x,), (x,))[1]
                return tangent
            how = torch.func.grad if transform == "grad" else torch.func.jacrev
            gradient: Tensor = how(lambda z: self.second(z).square().sum())(x)
            return gradient

    model = Transforms()
    dense, x = masked_twin(model), torch.randn(2, 8)
    with torch.set_grad_enabled(recorded):
        assert torch.equal(model(x), dense(x))


def test_a_compiled_forward_sees_what_it_writes_to_a_weight() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            first = self.inner(x)
            with torch.no_grad():
                self.inner._parameters["weight"].mul_(2)  # type: ignore[union-attr]
            y: Tensor = self.inner(x) / first
            return y

    model = Halves()
    sparsify(model)
    with torch.no_grad():
        ratio = torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(2, 8))
    torch.testing.assert_close(ratio, torch.full((2, 8), 2.0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(12, 16), nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.mix.weight
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.again(self.mix(self.embedding(tokens)).relu()))  # type: ignore[no-any-return]


def train_resnet(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for seed in range(2):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def train_tied(net: nn.Module) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for seed in range(5):
        tokens = torch.randint(12, (4, 6), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


def train_adversaries(net: nn.Module) -> None:
    """A generator and a discriminator stepped in turn, the one through the other."""
    generator, discriminator = net[0], net[1]
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.01) for part in (generator, discriminator)]
    for seed in range(5):
        noise = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
        for part, sign in ((0, -1.0), (1, 1.0)):
            optimizers[part].zero_grad()
            (sign * discriminator(generator(noise)).sigmoid().mean()).backward()
            optimizers[part].step()


@pytest.mark.parametrize(
    ("make", "train"),
    [(resnet18, train_resnet), (Tied, train_tied), (lambda: blocks(2), train_adversaries)],
    ids=["ResNet-18", "tied weights", "adversaries"],
)
def test_training_in_passes_equals_training_with_single_reads(
    make: Callable[[], nn.Module], train: Callable[[nn.Module], None]
) -> None:
    torch.manual_seed(0)
    model = make()
    sparsify(model, "2:4", decay=0.5)
    alone = copy.deepcopy(model)
    bank.detach(alone)
    for net in (model, alone):
        train(net)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), make().parameters(), strict=True)]
    assert any(moved)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)


class Branches(nn.Module):
    """Reads a weight without gradients first, and leaves another unused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.a(x)
        return self.b(self.a(x)) + target  # type: ignore[no-any-return]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_gradients_are_the_eager_ones_where_parts_run_without(autocast: bool) -> None:
    torch.manual_seed(0)
    eager, x = Branches(), torch.randn(2, 16)
    sparsify(eager)
    twin = copy.deepcopy(eager)
    for net, call in ((eager, eager), (twin, torch.compile(twin, fullgraph=True, backend="aot_eager"))):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            call(x).float().square().sum().backward()
        assert net.unused._parameters["weight"].grad is None
    for p, q in zip(eager.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_a_compiled_model_with_checkpointed_blocks_has_no_graph_break() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model = Checkpointed(*blocks())
    dense, x = masked_twin(model), torch.randn(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for net, call in ((model, compiled), (dense, dense)):
        call(x).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_mode_inside_a_forward_does_not_reach_the_rest_of_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                self.a(x)
            return self.norm(self.a(x)).square()  # type: ignore[no-any-return]

    model = Mixed()
    dense, x = masked_twin(model), torch.randn(2, 16)
    assert_same(model, dense, x, lambda net, x: net(x))


def test_an_interrupt_in_a_forward_leaves_nothing_for_the_next() -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.interrupts = Block(), True

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            if self.interrupts:
                raise KeyboardInterrupt
            return x

    model, x = Interrupted(), torch.randn(2, 16)
    dense = masked_twin(model)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(x)
        for net in (model, dense):
            net.interrupts = False
            net.block.up._parameters["weight"].data.zero_()
        assert torch.equal(model(x), dense(x))
    assert not bank._thread.passes


def test_functional_weights_are_told_apart_and_not_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    sparsify(model)
    seen = []
    with torch.no_grad():
        for i in range(6):
            weights = {"0.weight": torch.full((4, 4), float(i))}
            seen.append(torch.func.functional_call(model, weights, torch.ones(1, 4))[0, 0].item())
            alive = weakref.ref(weights["0.weight"])
            del weights
            assert alive() is None
    assert seen == [2.0 * i for i in range(6)]


@pytest.mark.parametrize("shape", [(4, 6), (8,), (2, 2, 2)])
def test_a_weight_that_has_no_groups_any_more_is_refused(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4))
    sparsify(net, "2:4")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    weight = net[0]._parameters["weight"]
    weight.data = torch.ones(shape)
    with pytest.raises(SparsityError, match=r"has no 2:4 groups along dimensions \(1,\)"):
        net(torch.randn(2, shape[-1]))
    weight.grad = torch.ones(shape)
    with pytest.raises(SparsityError, match="has no 2:4 groups"):
        optimizer.step()


def test_frozen_keeps_what_it_computed_of_other_weights_apart() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    sparsify(net, "2:4")
    other, x = {name: torch.randn_like(p) for name, p in net.named_parameters()}, torch.randn(2, 8)
    with torch.no_grad():
        expected = [net(x), torch.func.functional_call(net, other, x)]
        with frozen(net):
            for _ in range(2):
                assert torch.equal(net(x), expected[0])
                assert torch.equal(torch.func.functional_call(net, other, x), expected[1])
