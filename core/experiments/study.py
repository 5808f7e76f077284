"""What a study is: training runs of several methods, patterns and seeds that differ in nothing else.

A task subclasses `Study` and says how one of its runs is trained and what is read from a finished one. `conduct` does
the runs and `comparison` reports on them, alike for all tasks.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.plots import Curve
from nm_sparsity.core.methods import make_method
from nm_sparsity.core.pattern import NMPattern

COMMANDS = "commands.json"
"""What a run folder of a study holds from the beginning on: the commands that make the run."""

Result = Mapping[str, Any]
"""What a finished run's result file holds."""


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    name: str
    """Its folder inside the study's."""
    method: str
    """As the study names it, see `Variant`."""
    pattern: str
    """N:M; empty for a dense run."""
    seed: int
    steps: int
    """How long it trains, in the task's unit."""
    decay: float | str | None = None
    """SR-STE's lambda."""
    start: Run | None = None
    """The run whose trained weights it starts from."""

    @property
    def budget(self) -> tuple[int, ...]:
        """The steps of the phases that led to its weights, the first one first."""
        return (*(self.start.budget if self.start else ()), self.steps)


@dataclass(frozen=True)
class Variant:
    """What a study compares: a method with hyperparameters, as text ``ste+precondition=auto`` or ``asp+budget=equal``.

    ``budget=equal`` halves the length of a method that starts from a trained model, and that of the dense run that it
    starts from, so that both together train as long as one run of the other methods.
    """

    method: str
    hyperparameters: Mapping[str, str]
    equal_budget: bool

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant that `text` stands for.

        Raises:
            SparsityError: for an unknown method or hyperparameter, or a value out of range.
        """
        name, *options = re.split(r"\+(?=\w+=)", text)
        given = dict(option.split("=", 1) for option in options)
        budget = given.pop("budget", None)
        starts_trained = make_method(name, **given).starts_trained
        if budget is not None and (budget != "equal" or not starts_trained):
            raise SparsityError(
                f'"{text}": the one budget is budget=equal, of a method that starts from a trained model'
            )
        return cls(name, given, budget == "equal")

    @property
    def starts_trained(self) -> bool:
        """Whether its runs start from the dense run of their seed."""
        return make_method(self.method).starts_trained


@dataclass(frozen=True)
class Column:
    """A number of every finished run, shown as the mean over seeds."""

    header: str
    value: Callable[[Result], float | None]
    """Reads it from a result; ``None`` where there is no such number."""
    digits: int = 1
    """Decimal places."""
    spread: bool = True
    """Whether the sample standard deviation over seeds is shown too."""

    def cell(self, results: Iterable[Result]) -> str:
        """The mean over `results`, with the spread if there are two or more; "-" where there is no number."""
        known = [value for result in results if (value := self.value(result)) is not None]
        if not known:
            return "-"
        text = f"{mean(known):.{self.digits}f}"
        return f"{text} ± {stdev(known):.{self.digits}f}" if self.spread and len(known) > 1 else text


@dataclass(frozen=True)
class Plot:
    """A picture of curves: a panel for each pattern, a line for each method, a band over its seeds."""

    file: str
    x: str
    y: str
    curve: Callable[[Path], Curve]
    """Reads the curve from a run's folder; empty where it has none."""
    linear_below: float | None = None
    """As in `plots.draw`."""


@dataclass(frozen=True)
class Choice:
    """The lambda that a method trains with at one pattern."""

    decay: float
    scores: Mapping[float, float]
    """What it was chosen by: lambda -> mean score on the validation data; empty where there was nothing to choose."""


Choices = Mapping[tuple[str, str], Choice]
"""(method, pattern) -> its lambda."""


@dataclass(frozen=True)
class Study(ABC):
    """What is compared, and how long each run trains.

    Raises:
        SparsityError: for a value out of range, an unknown method, a malformed pattern, or seeds used twice.
    """

    out: Path = Path("runs/study")
    """The folder of the runs, the report, the raw results and the pictures."""
    methods: tuple[str, ...] = ("dense", "ste", "sr-ste", "asp")
    """The methods: dense runs once for each seed, every other one once for each pattern and seed. With hyperparameters
    as in ste+precondition=auto; asp+budget=equal trains as long as the others with its dense run."""
    patterns: tuple[str, ...] = ("2:4",)
    """The N:M patterns."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds of the runs that are reported."""
    length: int = 1
    """How long a run trains, in the task's unit."""
    decays: tuple[float, ...] = (0.02, 0.1, 0.5)
    """The lambdas that SR-STE chooses from, for each pattern on the validation data; a single one is taken as it is."""
    choosing_seeds: tuple[int, ...] = (100,)
    """The seeds of the runs that lambda is chosen by; none of them is reported."""
    reference: str = "ste"
    """The method that the others are compared with at the same pattern, beside dense."""
    jobs: int = 0
    """Runs at the same time, each on one CPU core; 0 is one for each core."""

    unit: ClassVar[str]
    """What `length` counts: epochs or updates."""
    result: ClassVar[str]
    """The file in a run's folder that is written last and holds its scores."""
    plots: ClassVar[Sequence[Plot]] = ()
    checkpoint: ClassVar[str] = ""
    """The file whose presence means that a run was cut off and goes on with ``--resume``; empty: it goes on anyway."""
    progress: ClassVar[str]
    """Regular expression of lines of a run's output; its group is how far the run is."""

    def __post_init__(self) -> None:
        if min(self.length, len(self.seeds), len(self.methods)) < 1 or self.jobs < 0:
            raise SparsityError("a study needs a method, a seed and a length of at least 1, and jobs of 0 or more")
        for name in ("methods", "patterns", "seeds", "decays"):
            values: tuple[object, ...] = getattr(self, name)
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise SparsityError(f"{name} has {twice[0]} twice: it would be the same run")
        if not all(0 <= decay < math.inf for decay in self.decays):
            raise SparsityError(f"decays are 0 or more, found {' '.join(f'{decay:g}' for decay in self.decays)}")
        has_decay(self.reference)  # It is a method.
        if shared := {*self.seeds} & {*self.choosing_seeds}:
            raise SparsityError(f"seed {min(shared)} chooses lambda and so must not be among those reported")
        for pattern in self.patterns:
            NMPattern.parse(pattern)
        if any(has_decay(method) for method in self.methods) and not (self.decays and self.choosing_seeds):
            raise SparsityError("lambda needs at least one value, and one seed to choose it by")

    @property
    @abstractmethod
    def title(self) -> str:
        """What the runs train."""

    @property
    @abstractmethod
    def columns(self) -> Sequence[Column]:
        """What the report shows; the first one is the score that runs are compared by."""

    @abstractmethod
    def commands(self, run: Run) -> list[list[str]]:
        """The commands that train and score `run`, as Python modules with their arguments."""

    @abstractmethod
    def validation(self, run: Path) -> float:
        """The score on the validation data of the finished run in a folder, more is better."""

    @abstractmethod
    def prepare(self) -> None:
        """Make or check what all runs need, before the first of them starts."""

    def steps(self, method: str) -> int:
        """How long a run of `method` trains, what it starts from left out."""
        return self.length

    def notes(self, results: Sequence[Result]) -> list[str]:
        """Sentences below the tables of the report on `results`."""
        return []

    def run(
        self, method: str, seed: int, pattern: str = "", decay: float | None = None, steps: int | None = None
    ) -> Run:
        """The run of `method` with `seed`; `steps` other than the method's own become part of its name."""
        words = [method, pattern.replace(":", "to"), "" if decay is None else f"{decay:g}", f"seed{seed}"]
        words += [] if steps is None else [f"{steps}{self.unit}"]
        name = re.sub(r"[^\w.+=-]+", "_", "-".join(filter(None, words)))
        variant, start = Variant.parse(method), None
        if variant.starts_trained:
            start = self.run("dense", seed, steps=self.length // 2 if variant.equal_budget else None)
        own = self.length - self.length // 2 if variant.equal_budget else self.steps(variant.method)
        return Run(name, method, pattern, seed, steps or own, decay, start)

    def runs(self, choices: Choices) -> list[Run]:
        """The runs that are reported, in the order of the report; without those whose lambda is not chosen yet."""
        found = [self.run("dense", seed) for seed in self.seeds if "dense" in self.methods]
        for pattern in self.patterns:
            for method in (method for method in self.methods if method != "dense"):
                choice = choices.get((method, pattern))
                if choice or not has_decay(method):
                    decay = choice.decay if choice else None
                    found += [self.run(method, seed, pattern, decay) for seed in self.seeds]
        return found

    def candidates(self) -> dict[tuple[str, str], dict[float, list[Run]]]:
        """(method, pattern) -> lambda -> the runs by which it is judged."""
        return {
            (method, pattern): {
                decay: [self.run(method, seed, pattern, decay) for seed in self.choosing_seeds if len(self.decays) > 1]
                for decay in sorted(self.decays)
            }
            for method in filter(has_decay, self.methods)
            for pattern in self.patterns
        }

    def options(self, run: Run) -> list[str]:
        """The options for `run` that the training commands of all tasks share."""
        variant = Variant.parse(run.method)
        more = [word for pair in variant.hyperparameters.items() for word in pair]
        values = {
            "out": self.out / run.name,
            "method": variant.method,
            "pattern": run.pattern or None,
            "decay": run.decay,
            "seed": run.seed,
            "init-from": self.out / run.start.name if run.start else None,
        }
        given = [f"--{name}={value}" for name, value in values.items() if value is not None]
        return [*(["--hyperparameters", *more] if more else []), *given]

    def result_of(self, run: Run) -> Result | None:
        """What the result file of `run` holds; ``None`` if it is not finished.

        Raises:
            SparsityError: if its folder holds another run.
        """
        folder = self.out / run.name
        if (folder / COMMANDS).is_file():
            there, here = ({*chain(*commands)} for commands in (read_json(folder / COMMANDS), self.commands(run)))
            if there != here:
                raise SparsityError(
                    f"{folder} holds another run ({' '.join(sorted(there - here))} instead of "
                    f"{' '.join(sorted(here - there))}); remove it or choose another --out"
                )
        return read_json(folder / self.result) if (folder / self.result).is_file() else None


def has_decay(method: str) -> bool:
    """Whether lambda is to be chosen for `method`: a hyperparameter of it that the text does not give."""
    variant = Variant.parse(method)
    return "decay" in make_method(variant.method).hyperparameters() and "decay" not in variant.hyperparameters


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))
