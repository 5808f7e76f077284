"""A converted layer in all the places a layer goes, against a dense twin whose weights are truly masked."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

from nm_sparsity.core import Method, SparsityError, WeightState, finalize, frozen, keep_largest, sparsify, verify
from nm_sparsity.core.model.layers import SparseLayer, live_layers, sparse_weights


def twins(
    make: Callable[[], nn.Module], method: str = "ste", trust: Sequence[type[nn.Module]] = ()
) -> tuple[nn.Module, nn.Module]:
    """(sparse model, dense model holding the masked weights)."""
    torch.manual_seed(0)
    sparse = make()
    dense = copy.deepcopy(sparse)
    sparsify(sparse, "2:4", method=method, trust=trust)
    with torch.no_grad():
        for name, _, how in sparse_weights(sparse):
            parameter = dense.get_parameter(name)
            parameter.copy_(keep_largest(parameter, how.pattern, how.dims))
    return sparse, dense


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 8, 2, groups=2), nn.Flatten(), nn.LazyLinear(4)
    )


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


def attention() -> nn.Module:
    return SelfAttention()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


INPUTS = {mlp: (4, 16), attention: (2, 5, 16), encoder: (2, 5, 16)}


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradient_equal_the_truly_masked_model(make: Callable[[], nn.Module], training: bool) -> None:
    sparse, dense = twins(make)
    x = torch.randn(INPUTS[make])
    for model in (sparse, dense):
        model.train(training)
        model(x).square().sum().backward()
    torch.testing.assert_close(sparse(x), dense(x), rtol=0, atol=1e-6)
    for (name, a), b in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        # The straight-through gradient is the gradient with respect to the masked weight.
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_the_fused_encoder_path_of_inference_is_masked() -> None:
    sparse, dense = twins(encoder)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(sparse.eval()(x), dense.eval()(x), rtol=0, atol=1e-6)


def test_convolutions_and_transposed_ones_equal_the_truly_masked_model() -> None:
    x = torch.randn(2, 8, 6, 6)

    def initialised() -> nn.Module:
        model = conv()
        model(x)
        return model

    sparse, dense = twins(initialised)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-5, atol=1e-6)
    x = x.to(memory_format=torch.channels_last)
    sparse.to(memory_format=torch.channels_last)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-5, atol=1e-6)


def test_state_dicts_go_both_ways() -> None:
    sparse, dense = twins(mlp)
    other = mlp()
    assert other.load_state_dict(sparse.state_dict()).missing_keys == []
    sparse.load_state_dict(dense.state_dict())
    assert torch.equal(sparse[0]._parameters["weight"], dense[0].weight)
    assert torch.equal(sparse[0].weight, dense[0].weight), "masking what is masked changes nothing"


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch"])
def test_copies_are_independent_registered_and_equal(way: str) -> None:
    sparse, _ = twins(encoder)
    if way == "deepcopy":
        with frozen(sparse), torch.no_grad():
            sparse.eval()(torch.randn(1, 2, 16))
            twin = copy.deepcopy(sparse)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(sparse))
    else:
        file = io.BytesIO()
        torch.save(sparse, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(twin.eval()(x), sparse.eval()(x), rtol=0, atol=0)
    layers = [m for m in twin.modules() if isinstance(m, SparseLayer)]
    assert layers
    assert all(layer in live_layers() for layer in layers)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert sparse(x).abs().sum() > 0
    assert twin(x).abs().sum() == 0, "a copy must not keep weights cached by frozen()"
    finalize(twin)
    assert any(isinstance(m, SparseLayer) for m in sparse.modules())


def test_averaged_models_average_the_shadow_weights_and_stay_masked() -> None:
    sparse, _ = twins(mlp)
    average = AveragedModel(sparse, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    start = sparse[0]._parameters["weight"].detach().clone()
    average.update_parameters(sparse)
    with torch.no_grad():
        sparse[0]._parameters["weight"].mul_(3)
    average.update_parameters(sparse)
    torch.testing.assert_close(average.module[0]._parameters["weight"], 2 * start)
    torch.testing.assert_close(average.module[0].weight, keep_largest(2 * start, "2:4"))


def test_autocast_and_half_precision() -> None:
    sparse, dense = twins(mlp)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sparse(x), dense(x), rtol=0, atol=0)
    torch.testing.assert_close(sparse.bfloat16()(x.bfloat16()), dense.bfloat16()(x.bfloat16()), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("make", [mlp, encoder])
def test_compiled_without_graph_breaks_equals_eager(make: Callable[[], nn.Module]) -> None:
    sparse, _ = twins(make)
    x = torch.randn(INPUTS[make])
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    found = [p.grad.clone() for p in sparse.parameters() if p.grad is not None]
    sparse.zero_grad()
    sparse(x).square().sum().backward()
    expected = [p.grad for p in sparse.parameters() if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_training_follows_the_weights() -> None:
    """The mask must be computed anew in every compiled call, not folded in at compile time."""
    sparse, _ = twins(mlp, method="sr-ste")
    eager = copy.deepcopy(sparse)
    compiled = torch.compile(sparse, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (sparse, eager)]
    for step in range(3):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(sparse.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_export_after_finalize() -> None:
    sparse, _ = twins(mlp)
    finalize(sparse)
    x = torch.randn(4, 16)
    program = torch.export.export(sparse, (x,))
    torch.testing.assert_close(program.module()(x), sparse(x))
    assert set(program.state_dict) == set(mlp().state_dict())


def test_an_attribute_error_inside_the_property_is_not_swallowed() -> None:
    """nn.Module would answer it with the dense weight."""

    class Broken(Method):
        name = "broken"

        def value(self, w: Tensor, state: WeightState) -> Tensor:
            raise AttributeError("no such thing")

    sparse = mlp()
    sparsify(sparse, method=Broken())
    with pytest.raises(RuntimeError, match="the sparse weight weight of SparseLinear failed"):
        sparse(torch.randn(1, 16))


def test_an_attribute_error_inside_a_value_that_is_ready_is_not_swallowed() -> None:
    class Broken(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.__name__ == "__get__":
                raise AttributeError("no such thing")
            return func(*args, **(kwargs or {}))

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self[0](x)  # makes the values of both layers
            with Broken():
                _ = self[1].weight
            return y

    sparse = Watched(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify(sparse)
    with pytest.raises(RuntimeError, match="the sparse weight weight of SparseLinear failed"):
        sparse(torch.randn(1, 16))


def test_a_layer_whose_init_has_not_run_has_no_weight() -> None:
    sparse = mlp()
    sparsify(sparse)
    kind = type(sparse[0])
    assert not hasattr(kind.__new__(kind), "weight")


def test_a_compiled_layer_sees_the_shadow_weight_while_it_is_initialised() -> None:
    sparse = nn.Sequential(nn.Linear(16, 16, bias=False))
    sparsify(sparse)
    compiled = torch.compile(sparse[0], backend="eager")
    x, seen = torch.randn(2, 16), []
    masked = compiled(x)
    sparse.apply(lambda module: seen.append(compiled(x)) if module is sparse[0] else None)
    torch.testing.assert_close(seen[0], x @ sparse[0].get_parameter("weight").T)
    torch.testing.assert_close(compiled(x), masked)


def test_initialisers_reach_the_shadow_weight() -> None:
    sparse, _ = twins(mlp)

    def fill(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)

    sparse.apply(fill)
    assert (sparse[0]._parameters["weight"] == 0.5).all()
    sparse[0].reset_parameters()
    assert (sparse[0]._parameters["weight"] != 0.5).all()
    assert (sparse[0].weight == 0).any()


def test_setting_a_parameter_replaces_the_shadow_weight() -> None:
    sparse, _ = twins(mlp)
    new = nn.Parameter(torch.randn(16, 16))
    sparse[0].weight = new
    assert sparse[0]._parameters["weight"] is new
    torch.testing.assert_close(sparse[0].weight, keep_largest(new, "2:4"))
    # What DataParallel does in its replicas: no parameters, plain tensors as attributes.
    replica = sparse[0]._replicate_for_data_parallel()
    replica._parameters = {}
    replica.weight, replica.bias = new.detach() * 2, sparse[0].bias.detach()
    torch.testing.assert_close(replica.weight, keep_largest(new * 2, "2:4"))


def test_functional_call_masks_the_given_weight() -> None:
    sparse, dense = twins(mlp)
    other, x = {k: v * 2 for k, v in sparse.state_dict().items()}, torch.randn(2, 16)
    dense.load_state_dict(other)
    with torch.no_grad():
        for layer in (dense[0], dense[2]):
            layer.weight.copy_(keep_largest(layer.weight, "2:4"))
    torch.testing.assert_close(torch.func.functional_call(sparse, other, x), dense(x))


def test_frozen_computes_each_weight_once_and_leaves_no_trace() -> None:
    calls = []

    class Counting(Method):
        name = "counting"

        def value(self, w: Tensor, state: WeightState) -> Tensor:
            calls.append(1)
            return super().value(w, state)

    sparse = mlp()
    sparsify(sparse, method=Counting())
    x = torch.randn(2, 16)
    with torch.no_grad():
        expected = sparse(x)
        calls.clear()
        with frozen(sparse):
            assert all(torch.equal(sparse(x), expected) for _ in range(3))
            with frozen(sparse):
                sparse(x)
            sparse(x)
        assert len(calls) == 2, "two weights, each once, in nested blocks too"
        sparse[0]._parameters["weight"].mul_(2)
        assert not torch.equal(sparse(x), expected)


def test_frozen_blocks_that_overlap_in_two_threads_leave_no_trace() -> None:
    sparse, _ = twins(mlp)
    x = torch.randn(2, 16)
    first, second = frozen(sparse), frozen(sparse)
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        before = sparse(x)
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        sparse[0]._parameters["weight"].mul_(2)
        assert not torch.equal(sparse(x), before)


def test_fx_keeps_parameters_and_follows_them() -> None:
    sparse, _ = twins(mlp)
    traced = torch.fx.symbolic_trace(sparse)
    assert {name for name, _ in traced.named_parameters()} == {name for name, _ in sparse.named_parameters()}
    x = torch.randn(2, 16)
    with torch.no_grad():
        sparse[0]._parameters["weight"].mul_(2)
    torch.testing.assert_close(traced(x), sparse(x))


def test_a_layer_compiled_by_itself_can_be_copied() -> None:
    sparse, _ = twins(mlp)
    sparse[0].compile(backend="eager")
    twin = copy.deepcopy(sparse)
    torch.testing.assert_close(twin[0].weight, sparse[0].weight)


def test_the_class_of_a_sparse_layer_makes_dense_layers() -> None:
    sparse, _ = twins(mlp)
    layer = type(sparse[0])(8, 8)
    assert torch.equal(layer.weight, layer._parameters["weight"])


def test_what_takes_the_weight_away_is_told_why_not() -> None:
    sparse, _ = twins(mlp)
    layer = sparse[0]
    del layer._parameters["weight"]
    assert not hasattr(layer, "weight")
    with pytest.raises(SparsityError, match="cannot be replaced by a wrapper"):
        del layer.weight


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
@pytest.mark.parametrize("transform", ["grad", "jacfwd", "jacrev"])
def test_function_transforms_see_the_straight_through_derivative(transform: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 1, bias=False)
    sparsify(layer)
    x, parameters = torch.ones(1, 8), {"weight": layer._parameters["weight"].detach()}

    def output(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, p, (x,)).sum()

    found = getattr(torch.func, transform)(output)(parameters)["weight"]
    torch.testing.assert_close(found, torch.ones(1, 8), msg="the derivative of the sum is x, for dropped weights too")


def test_vmap_over_stacked_weights() -> None:
    weights = torch.randn(3, 4, 8)
    found = torch.vmap(lambda w: keep_largest(w, "2:4"), in_dims=1)(weights.movedim(0, 1))
    assert torch.equal(found, torch.stack([keep_largest(w, "2:4") for w in weights]))


def test_frozen_does_not_cut_gradients() -> None:
    sparse, _ = twins(mlp)
    with frozen(sparse):
        sparse(torch.randn(2, 16)).sum().backward()
    assert sparse[0]._parameters["weight"].grad is not None


def test_meta_device_model_can_be_converted_and_run() -> None:
    with torch.device("meta"):
        model = mlp()
        sparsify(model)
        assert model(torch.empty(2, 16)).shape == (2, 8)


def test_finalized_model_verifies_and_equals_the_sparse_one() -> None:
    sparse, _ = twins(encoder)
    x = torch.randn(2, 5, 16)
    before = sparse.eval()(x)
    finalize(sparse)
    torch.testing.assert_close(sparse(x), before, rtol=0, atol=0)
    assert len(verify(sparse, "2:4").checked) == 8


def test_a_subclass_of_a_layer_is_converted_under_its_own_name() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    sparse, dense = twins(lambda: nn.Sequential(Scaled(8, 8)), trust=[Scaled])
    assert type(sparse[0]).__name__ == "SparseScaled"
    torch.testing.assert_close(sparse(torch.ones(1, 8)), dense(torch.ones(1, 8)))
    with warnings.catch_warnings(action="error"):
        finalize(sparse)
    assert type(sparse[0]) is Scaled
