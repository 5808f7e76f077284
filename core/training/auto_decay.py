"""SR-STE's lambda without guessing: from the planned learning rates under SGD, from how masks move under Adam.

Under SGD the decay has a natural scale, lambda * sum(lr), and the paper's ImageNet run tells what it should be:
`STRENGTH`. An adaptive optimizer divides the term by the gradient's magnitude, so there a short probe tells: the flip
rate, the fraction of masks that change in a step, over that of dense weights trained alike. STE lets masks move more
than dense weights would, too strong a decay freezes them; Hu et al., "Accelerating Transformer Pre-training with 2:4
Sparsity", ICML 2024, arXiv 2404.01847, find lambda feasible where the ratio of both lies in `FEASIBLE`.

Deviations: the paper compares at one moment of the warm-up and tries a given list; here it is the mean over the second
half of the probe, and lambda is bisected on a logarithmic scale until the ratio is feasible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.model.config import SparsityConfig
from nm_sparsity.core.model.strength import STRENGTH
from nm_sparsity.core.training import hooks

FEASIBLE = (0.60, 0.95)
"""The flip rate over the dense one where lambda is feasible, in the paper's words."""

_FIRST, _FACTOR, _SMALLEST, _LARGEST = 2e-4, 10.0, 1e-8, 1e2
"""Where the bisection begins, how far it goes while all ratios lie on one side, and where it ends."""


@dataclass(frozen=True)
class DecayChoice:
    """A lambda, and why it was chosen."""

    decay: float
    reason: str
    ratios: dict[float, float] = field(default_factory=dict)
    """The flip rate over the dense one for every lambda that was tried, in the order of the trials."""


def decay_of_strength(learning_rates: Sequence[float]) -> DecayChoice:
    """The lambda with which lambda * sum(lr) is `STRENGTH` over the planned steps of a run with SGD.

    Raises:
        SparsityError: if the learning rates do not add up to anything.
    """
    total = math.fsum(learning_rates)
    if not 0 < total < math.inf:
        raise SparsityError(f'decay="auto" divides by the sum of the planned learning rates, which is {total}')
    steps = f"{len(learning_rates):,} steps"
    return DecayChoice(_rounded(STRENGTH / total), f"lambda * sum(lr) is {STRENGTH:g} over the planned {steps} of SGD")


def choose_decay(train: Callable[[SparsityConfig], object], sparsity: SparsityConfig, steps: int = 100) -> DecayChoice:
    """The lambda with which the masks of a short training move somewhat less than those of dense weights would.

    The criterion of arXiv 2404.01847, for adaptive optimizers. It takes a dense probe and about four sparse ones, each
    of `steps` optimizer steps.

    Args:
        train: trains a fresh model from the beginning, made sparse by the configuration that it is given, with the
            same seed, data and learning rates each time. It is ended by an exception after `steps` optimizer steps,
            so it can be the training itself, with a folder that does not matter.
        sparsity: how the model is to be sparse. Of its hyperparameters none plays a part: a dense beginning would say
            nothing of lambda.
        steps: optimizer steps of a probe, more than a handful; where the learning rate warms up from 0, longer is
            better.

    Raises:
        SparsityError: if the method has no lambda, the training takes fewer steps, or no mask of it changes.
    """
    if not callable(train) or not isinstance(sparsity, SparsityConfig):
        found = ", ".join(type(argument).__name__ for argument in (train, sparsity))
        raise SparsityError(f"choose_decay takes a function that trains and a SparsityConfig, found {found}")
    if not hasattr(sparsity.make_method(), "decay"):
        raise SparsityError(f'method "{sparsity.method}" has no lambda to choose')
    plain = replace(sparsity, decay=None, hyperparameters={})
    dense = replace(plain, method="ste", hyperparameters={"dense_until": 1.0, "total_steps": steps + 1})
    yardstick = flip_rate(partial(train, dense), steps)
    if not yardstick:
        raise SparsityError(
            f"no mask of dense weights changes within {steps} optimizer steps, so there is nothing to compare with: "
            "make the probe longer, or give lambda as a number"
        )
    ratios: dict[float, float] = {}
    for decay in _bisection(ratios):
        ratios[decay] = flip_rate(partial(train, plain.with_decay(decay)), steps) / yardstick
    best = min(ratios, key=lambda decay: _distance(ratios[decay]))
    low, high = FEASIBLE
    probes = f"{len(ratios)} sparse probe{'s' * (len(ratios) > 1)} of {steps} steps"
    found = f"its masks flip {ratios[best]:.2f} times as often as dense weights' ({probes})"
    feasible = f"feasible from {low:g} to {high:g}"
    if _distance(ratios[best]):
        found, feasible = f"of those tried it comes closest: {found}", f"{feasible}, which none is"
    return DecayChoice(best, f"{found}; {feasible}", ratios)


def _bisection(ratios: dict[float, float]) -> Iterator[float]:
    """The next lambda to try, given the `ratios` so far, until one is feasible or the interval is used up."""
    low, high, decay = 0.0, math.inf, _FIRST
    for _ in range(12):
        if not _SMALLEST <= decay <= _LARGEST:
            return
        yield decay
        if not _distance(ratios[decay]):
            return
        if ratios[decay] > FEASIBLE[1]:
            low = decay
        else:
            high = decay
        if not low:
            decay = _rounded(high / _FACTOR)
        else:
            decay = _rounded(low * _FACTOR if high == math.inf else math.sqrt(low * high))


def _rounded(decay: float) -> float:
    """Three digits, as one would write it to do the run again."""
    return float(f"{decay:.3g}")


def _distance(ratio: float) -> float:
    """How far `ratio` is from the feasible ones."""
    return max(FEASIBLE[0] - ratio, 0.0, ratio - FEASIBLE[1])


def flip_rate(train: Callable[[], object], steps: int) -> float:
    """The flip rate of the N:M weights that `train` trains, as the mean over the second half of `steps` steps.

    It is ended by an exception that no ``except Exception`` catches as soon as they are made.

    Raises:
        SparsityError: if it ends by itself before that.
    """
    rates: list[float] = []
    with _counting(rates, steps):
        try:
            train()
        except _Enough:
            pass
        else:
            raise SparsityError(
                f"the probe ended after {len(rates)} optimizer steps of sparse weights, of the {steps} asked for"
            )
    return mean(rates[steps // 2 :])


class _Enough(BaseException):
    """All steps of a probe are made."""


@contextmanager
def _counting(rates: list[float], steps: int) -> Iterator[None]:
    """Append the flip rate of each optimizer step that steps sparse weights to `rates`; `_Enough` ends the last."""
    before: dict[int, list[list[Tensor]]] = {}

    def remember(optimizer: Optimizer, *_: Any) -> None:
        if batches := hooks.batches(optimizer):
            before[id(optimizer)] = [batch.nm_mask() for batch in batches]

    def count(optimizer: Optimizer, *_: Any) -> None:
        if (masks := before.pop(id(optimizer), None)) is None:
            return
        changed = size = 0
        for batch, old in zip(hooks.batches(optimizer), masks, strict=True):
            changed += int(batch.update_masks_(old).sum())
            size += sum(mask.numel() for mask in old)
        rates.append(changed / max(size, 1))
        if len(rates) == steps:
            raise _Enough

    handles = [register_optimizer_step_pre_hook(remember), register_optimizer_step_post_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe_steps(total_steps: int) -> int:
    """How long the probes of a run of `total_steps` are: a twentieth of it, between 50 and 500 steps."""
    return min(max(total_steps // 20, 50), 500, total_steps)
