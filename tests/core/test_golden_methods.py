"""Each method against its paper's equation, written out in fp64 without this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nm_sparsity.core import (
    Schedule,
    SparsityError,
    finalize,
    load_sparsity_state,
    sparsify,
    sparsity_state,
    verify,
)
from nm_sparsity.core.methods import make_method
from nm_sparsity.core.model.layers import sparse_weights
from nm_sparsity.core.model.strength import planned_strength

N, M, STEPS, LR = 2, 4, 10, 0.1
GENERATOR = torch.Generator().manual_seed(3)
START = torch.randn(6, 8, generator=GENERATOR, dtype=torch.float64)
INPUTS = torch.randn(STEPS, 5, 8, generator=GENERATOR, dtype=torch.float64)
TARGETS = torch.randn(STEPS, 5, 6, generator=GENERATOR, dtype=torch.float64)


def mask(w: Tensor, n: int = N) -> Tensor:
    """1 for the n largest of each M in a row, 0 for the others."""
    kept = torch.zeros_like(w)
    for i, row in enumerate(w.tolist()):
        for start in range(0, len(row), M):
            group = sorted(range(start, start + M), key=lambda j: -abs(row[j]))
            kept[i, group[:n]] = 1
    return kept


def gradient(value: Tensor, t: int) -> Tensor:
    """Of half the squared error of the products with `value` at step t."""
    return (INPUTS[t] @ value.T - TARGETS[t]).T @ INPUTS[t]


def trained(
    method: str,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = lambda params: torch.optim.SGD(params, LR),
    steps: int = STEPS,
    start: Tensor = START,
    **options: Any,
) -> Iterator[nn.Linear]:
    """The layer before the first step and after each."""
    layer = nn.Linear(8, 6, bias=False, dtype=torch.float64)
    layer.load_state_dict({"weight": start})
    sparsify(layer, f"{N}:{M}", method=method, total_steps=STEPS, **options)
    optimizer = make(list(layer.parameters()))
    yield layer
    for t in range(steps):
        optimizer.zero_grad()
        (0.5 * (layer(INPUTS[t]) - TARGETS[t]).square().sum()).backward()
        optimizer.step()
        yield layer


def shadow(layer: nn.Linear) -> Tensor:
    return layer.state_dict()["weight"]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def follows(run: Iterator[nn.Linear], value: Callable[[Tensor, int], Tensor], decay: Callable[[int], float]) -> None:
    """Assert that `run` computes with `value` of its weights and goes down the gradient of that, with SR-STE's term."""
    w = START.clone()
    for t, layer in enumerate(run):
        assert close(shadow(layer), w)
        assert close(layer.weight.detach(), value(w, t))
        if t < STEPS:
            w = w - LR * (gradient(value(w, t), t) + decay(t) * (1 - mask(w)) * w)


def test_sr_ste_with_a_growing_lambda() -> None:
    # W <- W - lr * (g(E * W) + lambda_t * (1 - E) * W), lambda_t linear from 0 to 0.8 over the run.
    follows(trained("sr-ste", decay="linear(0, 0.8)"), lambda w, t: mask(w) * w, lambda t: 0.8 * t / STEPS)


def test_decaying_masks() -> None:
    # W~ = (E + gamma_t * (1 - E)) * W, gamma_t linear from 1 to 0 over half of the run.
    def value(w: Tensor, t: int) -> Tensor:
        gamma = max(0.0, 1 - t / (STEPS / 2))
        return (mask(w) + gamma * (1 - mask(w))) * w

    follows(trained("decaying"), value, lambda t: 0)


def test_structure_decay() -> None:
    # 3 of 4 are kept until half of the run, then 2.
    follows(trained("structure-decay"), lambda w, t: mask(w, 3 if t < STEPS / 2 else 2) * w, lambda t: 0)


def test_s_ste() -> None:
    # W~ = beta * S(W), S(w) = sign(w) * max(0, |w| - the third largest of the four), beta that of the first step.
    def soft(w: Tensor) -> Tensor:
        groups = w.reshape(6, 2, M)
        threshold = groups.abs().sort(dim=-1, descending=True).values[..., N : N + 1]
        return (groups.sign() * (groups.abs() - threshold).clamp(min=0)).reshape(6, 8)

    beta = (START * soft(START)).sum() / soft(START).square().sum()
    assert beta > 1
    follows(trained("s-ste"), lambda w, t: beta * soft(w), lambda t: 0)


def test_dense_first_and_fixed_last() -> None:
    # Dense for three steps, SR-STE from then on, the mask fixed from the seventh.
    w, fixed = START.clone(), None
    for t, layer in enumerate(trained("sr-ste", decay=0.5, dense_until=0.3, fix_at=0.7)):
        assert close(shadow(layer), w)
        if t == STEPS:
            break
        e = torch.ones_like(w) if t < 3 else mask(w)
        assert close(layer.weight.detach(), e * w)
        if t == 7:
            fixed = e
        g = gradient(e * w, t) + 0.5 * (1 - e) * w
        w = w - LR * g if fixed is None else fixed * (w - LR * g)
    assert fixed is not None
    assert fixed.sum() == 6 * 4
    assert torch.equal(shadow(layer) != 0, fixed != 0)


@pytest.mark.parametrize("fraction", [0.3, "auto"])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize(
    "how", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True}, {"maximize": False}]
)
def test_step_holds_the_second_moment(fraction: float | str, coupled: bool, how: dict[str, bool]) -> None:
    lr, b1, b2, eps, decay = 0.02, 0.9, 0.95, 1e-8, 0.1
    kind = torch.optim.Adam if coupled else torch.optim.AdamW
    run = trained(
        "ste",
        lambda params: kind(params, lr, (b1, b2), eps, weight_decay=decay, **how),  # type: ignore[arg-type]
        precondition=fraction,
    )
    # "auto" cannot see gradients as large as these settle, and so holds from half of the run on.
    begin = 3 if fraction == 0.3 else STEPS // 2
    w, m, v, top = START.clone(), torch.zeros_like(START), torch.zeros_like(START), torch.zeros_like(START)
    for t, layer in enumerate(run):
        assert torch.allclose(shadow(layer), w, rtol=1e-9, atol=1e-11)
        if t == STEPS:
            break
        g = gradient(w if t < begin else mask(w) * w, t)
        g, w = (g + decay * w, w) if coupled else (g, w * (1 - lr * decay))
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g if t < begin else v
        top = torch.maximum(top, v)
        divisor = (top if how.get("amsgrad") else v) / (1 - b2 ** (t + 1))
        w = w - lr * m / (1 - b1 ** (t + 1)) / (divisor.sqrt() + eps)


def test_auto_holds_once_the_moment_changes_by_less_than_eps() -> None:
    # Gradients of about 1e-6: the second moment moves by some 1e-13 a step, far below eps, from the first step on.
    layer = nn.Linear(8, 6, bias=False)
    sparsify(layer, "2:4", method="ste", precondition="auto", total_steps=40)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    dense = []
    for _ in range(8):
        dense.append(bool((layer.weight != 0).all()))
        optimizer.zero_grad()
        (1e-6 * layer(torch.randn(4, 8)).sum()).backward()
        optimizer.step()
    # Not before a tenth of the run.
    assert dense == [True] * 4 + [False] * 4


def test_what_is_remembered_is_written_in_place_and_a_state_is_a_copy() -> None:
    """A captured graph reads and writes the same memory at every replay; who saved a state can go back to it."""
    layer = nn.Linear(8, 6, bias=False)
    sparsify(layer, "2:4", method="ste", precondition="auto", total_steps=40)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        layer(torch.randn(4, 8)).sum().backward()
        optimizer.step()

    step()  # Adam has no second moment before its first step
    step()
    ((_, _, weight),) = sparse_weights(layer)
    memory, state = dict(weight.memory), sparsity_state(layer)
    step()
    assert memory.keys() == {"log_change", "samples", "held"}
    assert all(weight.memory[key] is value for key, value in memory.items())
    assert (int(state["weight"]["state"]["samples"]), int(memory["samples"])) == (1, 2)
    load_sparsity_state(layer, state)
    step()
    assert int(state["weight"]["state"]["samples"]) == 1


def test_a_second_moment_of_zero_stays_finite_under_any_gradient() -> None:
    layer = nn.Linear(8, 6, bias=False)
    sparsify(layer, "2:4", method="ste", precondition=0.25, total_steps=8)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    for t in range(8):
        optimizer.zero_grad()
        # In the dense phase the second half of the inputs is off.
        inputs = torch.randn(4, 8) * (torch.arange(8) < 4 if t < 2 else 1e4)
        layer(inputs).square().sum().backward()
        optimizer.step()
        assert layer.state_dict()["weight"].isfinite().all()
        moment = optimizer.state[next(layer.parameters())]["exp_avg_sq"]
        if t == 1:
            held = moment.clone()
        assert t < 2 or torch.equal(moment, held)
    assert (held[:, 4:] == 0).all()
    assert (held[:, :4] > 0).all()


def test_there_is_nothing_to_hold_under_sgd() -> None:
    with pytest.raises(SparsityError, match="second moment, and SGD has none: use Adam or AdamW, or dense_until"):
        list(trained("ste", precondition=0.5))


def test_a_run_of_unknown_length_has_no_schedule() -> None:
    for options in ({"decay": "linear(0, 1)"}, {"dense_until": 0.1}, {"fix_at": 0.5}, {"precondition": 0.2}):
        with pytest.raises(SparsityError, match=r"give total_steps, the number of its optimizer steps"):
            sparsify(nn.Linear(8, 8), "2:4", method="sr-ste", **options)  # type: ignore[arg-type]


def test_what_is_not_sparse_yet_is_not_finalized() -> None:
    *_, layer = trained("decaying", steps=3)
    with pytest.raises(SparsityError, match=r'at step 3 of 10 of method "decaying", weight is not 2:4 yet; train to'):
        finalize(layer)
    assert len(list(sparse_weights(layer))) == 1
    *_, layer = trained("decaying")
    finalize(layer)
    verify(layer, "2:4")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("linear(1, 0, 0.25, 0.75)", [1, 1, 0.5, 0, 0]),
        ("linear(0, 2e-4)", [0, 0.5e-4, 1e-4, 1.5e-4, 2e-4]),
        ("cosine(0, 1, 0, 1)", [0, 0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125), 1]),
        ("exponential(1, 16)", [1, 2, 4, 8, 16]),
        ("step(0, 3, 0.5)", [0, 0, 3, 3, 3]),
    ],
)
def test_a_schedule_is_its_text_and_goes_from_the_first_value_to_the_last(text: str, values: list[float]) -> None:
    schedule = Schedule.parse(text)
    assert Schedule.parse(str(schedule)) == schedule
    found = schedule.at(torch.linspace(0, 1, 5, dtype=torch.float64)).tolist()
    assert found == pytest.approx(values, rel=1e-6)
    assert (found[0], found[-1]) == (values[0], pytest.approx(values[-1], rel=1e-7))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("linear(1)", r'"linear\(1\)" is not a schedule'),
        ("ramp(0, 1)", 'unknown schedule "ramp"'),
        ("linear(0, 1, 0.5, 0.5)", "start before end"),
        ("linear(0, 1, 0, 2)", "fractions of the run"),
        ("exponential(0, 1)", "numbers above 0"),
        ("linear(-1, 1)", "must be a finite number >= 0"),
        ("step(0, 1, 2)", "fractions of the run"),
    ],
)
def test_malformed_schedules_are_named(text: str, complaint: str) -> None:
    with pytest.raises(SparsityError, match=complaint):
        make_method("sr-ste", decay=text)


def test_the_planned_strength_of_a_growing_lambda_sums_its_steps() -> None:
    lrs = [0.1, 0.2, 0.3, 0.4]
    strength = planned_strength(make_method("sr-ste", decay="linear(0, 1)"), lrs)
    assert strength == pytest.approx(0.1 * 0 + 0.2 * 0.25 + 0.3 * 0.5 + 0.4 * 0.75)
    assert planned_strength(make_method("ste"), lrs) is None
