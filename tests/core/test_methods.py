"""What holds for every registered method, those added later included; and how hyperparameters reach a method."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nm_sparsity.core import (
    Method,
    SparsityConfig,
    SparsityError,
    finalize,
    load_sparsity_state,
    make_method,
    sparsify,
    sparsity_state,
    unsparsify,
    verify,
)
from nm_sparsity.core.experiments.recipes import from_tree
from nm_sparsity.core.experiments.run import as_json
from nm_sparsity.core.files.checkpoint import restore, split
from nm_sparsity.core.files.io import load, save
from nm_sparsity.core.files.metadata import Metadata
from nm_sparsity.core.methods import WeightState, base, method_names
from nm_sparsity.core.methods.s_ste import SSTE
from nm_sparsity.core.model.layers import sparse_weights

STEPS = 6
"""How long a run is here."""

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sr-ste growing": ("sr-ste", {"decay": "linear(0, 0.5)"}),
    "sr-ste late": ("sr-ste", {"dense_until": 0.25}),
    "s-ste late, then fixed": ("s-ste", {"dense_until": 0.2, "fix_at": 0.6}),
    "ste, then fixed": ("ste", {"fix_at": 0.5}),
    "sr-ste preconditioned": ("sr-ste", {"precondition": 0.4}),
    "ste preconditioned": ("ste", {"precondition": "auto"}),
}
"""Methods with options and schedules, which go through the same tests as plain ones."""

every_method = pytest.mark.parametrize("name", [*method_names(), *OPTIONS])

BATCHES = torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Ramped(Method):
    """A method of a user's own, with a hyperparameter of every type."""

    name = "ramped"
    decay: float = 2e-4
    ramp: int = 1000
    start: float | None = None
    nested: bool = False
    shape: str = "linear"


@pytest.fixture
def ramped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._METHODS, "ramped", Ramped)


@pytest.fixture(autouse=True)
def _weak_decays_are_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"lambda \* sum\(lr\) is")
        yield


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(16, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))
    method, options = OPTIONS.get(name, (name, {}))
    sparsify(model, "2:4", method=method, total_steps=STEPS, **options)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    if any(state.method.precondition for _, _, state in sparse_weights(model)):
        return torch.optim.AdamW(model.parameters(), lr=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    parts: int = 1,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """One optimizer step a batch, on the mean over `parts` equal parts of it."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for step in steps:
        optimizer.zero_grad()
        for part in BATCHES[step].unsqueeze(2).chunk(parts):
            scaler.scale((model(part) - 1).square().mean() / parts).backward()
        scaler.step(optimizer)
        scaler.update()


def shadow(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same shadow weights, and compute the same, bit for bit."""
    a, b = shadow(one), shadow(other)
    images = BATCHES[0].unsqueeze(2)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and torch.equal(one(images), other(images))


@every_method
def test_a_config_is_the_method_through_json_and_through_text(name: str) -> None:
    method = make_method(OPTIONS[name][0], **OPTIONS[name][1]) if name in OPTIONS else make_method(name)
    values = method.hyperparameters()
    for hyperparameters in (values, {key: str(value) for key, value in values.items()}):
        config = SparsityConfig(method=method.name, hyperparameters=hyperparameters)
        assert config.make_method() == method
        assert from_tree(SparsityConfig, json.loads(json.dumps(as_json(config)))) == config


def test_numbers_of_numpy_become_pythons_own(tmp_path: Path) -> None:
    model = make("sr-ste")
    unsparsify(model)
    sparsify(model, decay=np.float64(6.0), total_steps=np.int64(100), fix_at=np.float32(0.5))
    save(tmp_path / "x.pt", Metadata.of(model).to_dict())
    read = Metadata.from_dict(load(tmp_path / "x.pt")).hyperparameters
    assert {name: type(value) for name, value in read.items()} == {"decay": float, "total_steps": int, "fix_at": float}


class Doubled(SSTE):
    """Overrides one of two that belong together."""

    name = "doubled"

    def value(self, w: Tensor, state: WeightState) -> Tensor:
        return 2 * super().value(w, state)


def test_a_value_of_ones_own_is_asked_for_inside_a_pass_too() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify(net, method=Doubled())
    x = torch.randn(2, 16)
    y = net(x)
    assert torch.equal(y, net[1](net[0](x)))
    finalize(net)
    assert torch.equal(y, net(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("pattern", "dtype"), [("2:4", torch.float32), ("2:4", torch.float64), ("1:3", torch.float32)])
def test_s_ste_in_other_hands(pattern: str, dtype: torch.dtype) -> None:
    """Compiled and traced, where compiled kernels mask and where they do not, in another memory format."""
    net = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1))
    net = net.to(dtype, memory_format=torch.channels_last)
    sparsify(net, pattern, method="s-ste")
    x = torch.randn(2, 12, 4, 4, dtype=dtype)
    expected = net(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(net, x, check_trace=False)(x), expected)


@every_method
def test_a_resumed_run_is_the_whole_one_bit_for_bit(name: str) -> None:
    whole, first, second = make(name), make(name), make(name)
    train(whole, optimizer_of(whole), range(6))
    optimizer = optimizer_of(first)
    train(first, optimizer, range(3))
    restore(second, *split(first))
    resumed = optimizer_of(second)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(3, 6))
    assert same(second, whole)


@every_method
def test_copies_and_pickles_train_on_alike(name: str) -> None:
    model = make(name)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    memory = copy.deepcopy(optimizer.state_dict())
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in (model, *others):
        optimizer = optimizer_of(one)
        optimizer.load_state_dict(copy.deepcopy(memory))
        train(one, optimizer, range(3, 6))
    assert all(same(other, model) for other in others)


@every_method
def test_a_finalized_model_computes_what_the_trained_one_did(name: str) -> None:
    model = make(name)
    train(model, optimizer_of(model), range(6))
    images = BATCHES[0].unsqueeze(2)
    before = model.eval()(images)
    finalize(model)
    assert torch.equal(model(images), before)
    if name != "dense":  # of which there is nothing to verify
        assert len(verify(model).checked) == 2


@every_method
def test_what_is_remembered_loads_from_a_file_without_trust(name: str) -> None:
    model = make(name)
    train(model, optimizer_of(model), range(2))
    file = io.BytesIO()
    torch.save(sparsity_state(model), file)
    file.seek(0)
    load_sparsity_state(model, torch.load(file, weights_only=True))


@every_method
def test_loss_scaling_and_accumulation_change_rounding_only(name: str) -> None:
    plain, scaled, parts = make(name), make(name), make(name)
    before = shadow(plain)
    train(plain, optimizer_of(plain), range(4))
    train(scaled, optimizer_of(scaled), range(4), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12))
    train(parts, optimizer_of(parts), range(4), parts=4)
    for key, value in shadow(plain).items():
        assert not torch.equal(value, before[key])
        torch.testing.assert_close(shadow(scaled)[key], value, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(shadow(parts)[key], value, atol=1e-6, rtol=1e-5)


def test_text_becomes_the_type_of_the_field(ramped: None) -> None:
    given = {"ramp": "10", "start": "0.5", "nested": "true", "shape": "cosine"}
    config = SparsityConfig(method="ramped", decay=0.5, hyperparameters=given)
    assert config.make_method() == Ramped(0.5, 10, 0.5, True, "cosine")
    assert SparsityConfig(method="ramped", hyperparameters={"start": "none"}).make_method() == Ramped(start=None)
    assert {type(value) for value in config.make_method().hyperparameters().values()} == {float, int, bool, str}
    own = [f.name for f in fields(Ramped) if f.name not in {option.name for option in fields(Method)}]
    assert own == list(config.make_method().hyperparameters())


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"ramp": "fast"}, 'hyperparameter "ramp" of method "ramped" must be int, found "fast"'),
        ({"ramp": "0.5"}, "must be int"),
        ({"start": "early"}, 'must be float or None, found "early"'),
        ({"nested": "1"}, "must be bool"),
        ({"rate": "1"}, 'has no hyperparameter "rate"; it takes decay, ramp, start, nested, shape'),
        ({"decay": "1"}, "decay is given twice"),
    ],
)
def test_hyperparameters_that_do_not_fit_are_named(given: dict[str, str], complaint: str, ramped: None) -> None:
    with pytest.raises(SparsityError, match=complaint):
        SparsityConfig(method="ramped", decay=1.0, hyperparameters=given)


class LoggedAdam(torch.optim.Adam):
    """Of a module of one's own."""


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, LoggedAdam, torch.optim.AdamW])
def test_the_moment_is_held_whatever_the_optimizer_squares(kind: type[torch.optim.Adam], maximize: bool) -> None:
    torch.manual_seed(0)
    net = nn.Linear(16, 16)
    sparsify(net, "2:4", method="ste", precondition=0.5, total_steps=20)
    optimizer = kind(net.parameters(), lr=1e-2, weight_decay=0.1, maximize=maximize)
    weight, sign, held = net.get_parameter("weight"), -1 if maximize else 1, torch.empty(0)
    for step in range(20):
        optimizer.zero_grad()
        (sign * net(torch.randn(32, 16)).square().mean() * (30 if step >= 10 else 1)).backward()
        optimizer.step()
        moment = optimizer.state[weight]["exp_avg_sq"]
        held = moment.clone() if step == 9 else held
        assert step <= 9 or torch.equal(moment, held)
    assert weight.isfinite().all()


def test_a_second_moment_that_forgets_all_is_refused() -> None:
    net = nn.Linear(16, 16)
    sparsify(net, "2:4", method="ste", precondition=0.5, total_steps=20)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.0))
    net(torch.randn(2, 16)).sum().backward()
    with pytest.raises(SparsityError, match="beta2 = 0"):
        optimizer.step()
