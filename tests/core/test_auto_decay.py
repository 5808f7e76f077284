"""``decay="auto"``: lambda from planned learning rates under SGD, from flip rates of probes under Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nm_sparsity.core import SparsityConfig, SparsityError, choose_decay, decay_strength, nm_mask, sparsify
from nm_sparsity.core.training import auto_decay
from nm_sparsity.core.training.auto_decay import FEASIBLE, decay_of_strength, flip_rate, probe_steps

SPARSITY = SparsityConfig("2:4")


def test_under_sgd_the_strength_of_the_run_is_six() -> None:
    rates = [0.1 * 0.5 * (1 + math.cos(math.pi * step / 40)) for step in range(40)]
    model = nn.Linear(16, 16)
    sparsify(model, "2:4", decay=decay_of_strength(rates).decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        model(torch.ones(1, 16)).sum().backward()
        optimizer.step()
    assert decay_strength(model) == pytest.approx(6, rel=5e-3)


@pytest.mark.parametrize("rates", [[], [0.0, 0.0], [math.inf]])
def test_learning_rates_that_add_up_to_nothing(rates: list[float]) -> None:
    with pytest.raises(SparsityError, match="sum of the planned learning rates"):
        decay_of_strength(rates)


class Training:
    """Linear regression with Adam from a fixed start, which remembers its masks after every step."""

    def __init__(self, steps: int, lr: float = 0.01) -> None:
        self.steps, self.lr = steps, lr
        self.masks: list[list[torch.Tensor]] = []
        self.made = 0

    def __call__(self, sparsity: SparsityConfig) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
        sparsity.sparsify(model, total_steps=self.steps)
        weights = [p for p in model.parameters() if p.dim() == 2]
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)
        self.masks, self.made = [[nm_mask(w, "2:4") for w in weights]], 0
        for step in range(self.steps):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x[:, :8].roll(1, 1)).square().mean().backward()
            self.masks.append([])  # filled from the hook's point of view: after the step, whatever ends it
            try:
                optimizer.step()
            finally:
                self.masks[-1] = [nm_mask(w, "2:4") for w in weights]
                self.made += 1


def test_the_flip_rate_is_the_mean_over_the_second_half_and_ends_the_training() -> None:
    training = Training(steps=100)
    found = flip_rate(lambda: training(SPARSITY), steps=20)
    assert training.made == 20
    flips = [
        sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
        for before, after in zip(training.masks, training.masks[1:], strict=False)
    ]
    size = sum(mask.numel() for mask in training.masks[0])
    assert found == pytest.approx(sum(flips[10:20]) / 10 / size)
    training(SPARSITY)  # nothing is left behind that would end another one
    assert training.made == 100


def test_a_training_that_is_shorter_than_the_probe() -> None:
    with pytest.raises(SparsityError, match="ended after 5 optimizer steps of sparse weights, of the 20"):
        choose_decay(Training(steps=5), SPARSITY, steps=20)


def test_masks_that_do_not_move() -> None:
    with pytest.raises(SparsityError, match="no mask of dense weights changes"):
        choose_decay(Training(steps=20, lr=0.0), SPARSITY, steps=20)


def test_a_method_without_lambda() -> None:
    with pytest.raises(SparsityError, match='"ste" has no lambda'):
        choose_decay(Training(steps=20), SparsityConfig(method="ste"), steps=20)


def test_arguments_in_the_other_order() -> None:
    with pytest.raises(SparsityError, match="a function that trains and a SparsityConfig, found SparsityConfig, Trai"):
        choose_decay(SPARSITY, Training(steps=20))  # type: ignore[arg-type]


def test_a_probe_chooses_what_the_criterion_says() -> None:
    training = Training(steps=60)
    choice = choose_decay(training, SparsityConfig("2:4", hyperparameters={"dense_until": 0.5}), steps=60)

    def rate(sparsity: SparsityConfig) -> float:
        return flip_rate(lambda: training(sparsity), 60)

    dense = rate(SparsityConfig("2:4", method="ste", hyperparameters={"dense_until": 1.0, "total_steps": 1000}))
    ratio = rate(SparsityConfig("2:4", decay=choice.decay)) / dense
    assert choice.ratios[choice.decay] == pytest.approx(ratio)
    assert FEASIBLE[0] <= ratio <= FEASIBLE[1]
    assert f"{ratio:.2f}" in choice.reason


Ratio = Callable[[float], float]


@pytest.mark.parametrize(
    ("ratio", "feasible"),
    [
        (lambda decay: 1.5 / (1 + decay / 1e-4), True),
        (lambda decay: 1.5 / (1 + decay / 3.0), True),
        (lambda decay: 1.5 / (1 + decay / 1e-6), True),
        (lambda decay: 1.2 if decay < 0.017 else 0.2, False),  # a cliff: nothing is feasible
        (lambda decay: 0.3, False),
        (lambda decay: 1.3, False),
    ],
)
def test_the_bisection(ratio: Ratio, feasible: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up dependence of the flip rate on lambda, which falls as masks settle."""

    def rate(train: Callable[[], Any], steps: int) -> float:
        sparsity = train()
        return 1.0 if sparsity.method == "ste" else ratio(sparsity.decay)

    monkeypatch.setattr(auto_decay, "flip_rate", rate)
    choice = choose_decay(lambda sparsity: sparsity, SPARSITY)
    assert choice.ratios == {decay: ratio(decay) for decay in choice.ratios}
    assert len(choice.ratios) <= 12
    assert (FEASIBLE[0] <= ratio(choice.decay) <= FEASIBLE[1]) == feasible
    assert ("closest" in choice.reason) != feasible
    assert all(float(f"{decay:.3g}") == decay for decay in choice.ratios)  # as one writes it


def test_lambda_must_be_chosen_before_a_model_trains() -> None:
    with pytest.raises(SparsityError, match="choose_decay under an adaptive optimizer"):
        sparsify(nn.Linear(8, 8), "2:4", decay="auto")
    config = SparsityConfig(hyperparameters={"decay": "auto", "fix_at": "0.5"})
    assert config.decay_is_auto
    chosen = config.with_decay(0.1)
    assert not chosen.decay_is_auto
    assert (chosen.decay, dict(chosen.hyperparameters)) == (0.1, {"fix_at": "0.5"})
    with pytest.raises(SparsityError, match='a number, a schedule or "auto", found "often"'):
        SparsityConfig(decay="often")


def test_a_probe_is_a_twentieth_of_the_run() -> None:
    assert [probe_steps(total) for total in (20, 800, 4000, 10**6)] == [20, 50, 200, 500]
