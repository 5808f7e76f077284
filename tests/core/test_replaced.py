"""Sparse layers and weights that are taken away, replaced or wrapped after `sparsify`: refused, or named at the end."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from nm_sparsity.core import SparsityError, VerificationError, finalize, sparsify, unsparsify, verify
from nm_sparsity.core.model.layers import SparseLayer

WRAPPERS: dict[str, Callable[[nn.Module], object]] = {
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "parametrized bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Identity()),
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "prune.custom_from_mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.ones(8, 8)),
    "del": lambda layer: delattr(layer, "weight"),
    "None": lambda layer: setattr(layer, "weight", None),
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_sparse_weight_is_not_taken_away(wrap: str) -> None:
    model, x = mlp(), torch.ones(1, 8)
    sparsify(model)
    before, output = {name: value.clone() for name, value in model.state_dict().items()}, model(x)
    with pytest.raises(SparsityError, match="belongs to a sparse layer and cannot be replaced by a wrapper"):
        WRAPPERS[wrap](model[0])
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert torch.equal(model(x), output)
    finalize(model)
    assert [check.name for check in verify(model, "2:4").checks] == ["0.weight", "2.weight"]


def test_a_plain_parameter_in_place_of_a_sparse_weight_is_sparse() -> None:
    model = mlp()
    sparsify(model)
    model[0].weight = nn.Parameter(torch.ones(8, 8))
    assert model[0].weight.sum() == 32
    finalize(model)
    assert len(verify(model, "2:4").checked) == 2


def replace_layer(model: nn.Sequential) -> None:
    model[0] = nn.Linear(8, 8)


def delete_parameter(model: nn.Sequential) -> None:
    del model[0]._parameters["weight"]


def replace_all(model: nn.Sequential) -> None:
    model[0], model[2] = nn.Linear(8, 8), nn.Linear(8, 8)


@pytest.mark.parametrize("change", [replace_layer, delete_parameter, replace_all])
@pytest.mark.parametrize("travels", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_what_sparsify_made_sparse_and_is_gone_is_named(
    change: Callable[[nn.Sequential], None], travels: Callable[[nn.Module], nn.Sequential]
) -> None:
    model = mlp()
    sparsify(model)
    model = travels(model)
    change(model)
    with pytest.warns(UserWarning, match=r"sparsify made 0\.weight.* sparse, but its layer was replaced"):
        finalize(model)
    with pytest.raises(VerificationError, match=r"0\.weight"):
        verify(model, "2:4")


class Adapter(nn.Module):
    """As a LoRA layer holds the layer that it adapts."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return out


@pytest.mark.filterwarnings("error")
def test_what_moved_was_given_back_or_was_finalized_by_itself_is_not_named() -> None:
    moved = mlp()
    sparsify(moved)
    moved[0] = Adapter(moved[0])
    finalize(moved)
    assert {check.name for check in verify(moved).checks} == {"0.base_layer.weight", "2.weight"}

    given_back = mlp()
    sparsify(given_back)
    unsparsify(given_back[0])
    given_back[0] = nn.Linear(8, 3)
    finalize(given_back)
    assert [check.name for check in verify(given_back).checks] == ["2.weight"]

    in_parts = mlp()
    sparsify(in_parts)
    finalize(in_parts[0])
    finalize(in_parts)
    assert {check.name for check in verify(in_parts).checks} == {"0.weight", "2.weight"}

    tied_since = mlp()
    sparsify(tied_since)
    tied_since[2].weight = tied_since[0].get_parameter("weight")
    finalize(tied_since)
    verify(tied_since, "2:4")


@pytest.mark.parametrize("end", [finalize, unsparsify])
def test_a_layer_whose_class_was_changed_since_is_left_alone(end: Callable[[nn.Module], object]) -> None:
    model = mlp()
    model[2].register_buffer("scale", torch.ones(1))
    sparsify(model)
    parametrize.register_parametrization(model[2], "scale", nn.Identity())
    shadow = model[0].get_parameter("weight").clone()
    with pytest.raises(SparsityError, match='the sparse layer "2" was made a ParametrizedSparseLinear since'):
        end(model)
    assert torch.equal(model[0].get_parameter("weight"), shadow)
    assert isinstance(model[0], SparseLayer)
    parametrize.remove_parametrizations(model[2], "scale")
    with warnings.catch_warnings(action="error"):
        end(model)
    assert type(model[2]) is nn.Linear
