"""The one sparsity configuration that all tasks share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.methods import Method, make_method
from nm_sparsity.core.methods.sr_ste import AUTO
from nm_sparsity.core.model.convert import sparsify
from nm_sparsity.core.model.report import SparsityReport
from nm_sparsity.core.model.rules import Rules


@dataclass(frozen=True)
class SparsityConfig:
    """The arguments of `sparsify` as data: for configs, command lines and run folders.

    Raises:
        SparsityError: at once, for a malformed pattern, an unknown method or layout, or a hyperparameter that the
            method lacks.
    """

    pattern: str = "2:4"
    """N:M, keep N of every M consecutive weights."""
    method: str = "sr-ste"
    """How weights are trained: dense, ste, sr-ste, s-ste, decaying, structure-decay or asp."""
    decay: float | str | None = None
    """SR-STE's lambda: a number, a schedule such as linear(0, 2e-4), or auto, which chooses it from the learning rates
    (SGD) or by short probes (Adam). None is the method's default (2e-4)."""
    hyperparameters: Mapping[str, str | float] = field(default_factory=dict)
    """The method's other hyperparameters, and options of every method such as dense_until, by name, as values or as
    text."""
    layout: str = "channel"
    """channel (what sparse Tensor Cores need) or kernel (the paper's original)."""
    include: tuple[str, ...] = ()
    """Globs of the layers to convert; empty means all."""
    exclude: tuple[str, ...] = ()
    """Globs of layers that stay dense."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Glob -> pattern, or "dense", for layers that differ; the last match wins."""
    remainder: str = "dense"
    """What to do with a weight whose reduction size M does not divide: dense or error."""
    trust: tuple[str, ...] = ()
    """Subclasses of layers, as package.module:Class, whose own forward multiplies with the weight as it is."""

    def __post_init__(self) -> None:
        self.make_method()
        Rules.parse(**self._arguments())

    def make_method(self) -> Method:
        """The method with its hyperparameters."""
        if self.decay is None:
            return make_method(self.method, **self.hyperparameters)
        if "decay" in self.hyperparameters:
            raise SparsityError("decay is given twice: as such and among the hyperparameters")
        return make_method(self.method, decay=self.decay, **self.hyperparameters)

    @property
    def decay_is_auto(self) -> bool:
        """Whether lambda is yet to be chosen."""
        return getattr(self.make_method(), "decay", None) == AUTO

    def with_decay(self, decay: float) -> SparsityConfig:
        """The same with another lambda."""
        others = {name: value for name, value in self.hyperparameters.items() if name != "decay"}
        return replace(self, decay=decay, hyperparameters=others)

    def one_shot(self) -> SparsityConfig:
        """The same choice of weights for dense ones that are not trained: the largest are kept, whatever the method."""
        method = "ste" if self.make_method().trains_sparse else "dense"
        return replace(self, method=method, decay=None, hyperparameters={})

    def sparsify(self, model: nn.Module, total_steps: int | None = None) -> SparsityReport:
        """`sparsify` `model` as configured, in place.

        Args:
            total_steps: the optimizer steps of the run, where the hyperparameters do not say it.

        Raises:
            SparsityError: also if nothing becomes sparse, of which `sparsify` only warns: who configures a run asked
                for a pattern.
        """
        method = self.make_method()
        if method.total_steps is None and method.scheduled:  # others may go on for longer than planned
            method = replace(method, total_steps=total_steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="sparsify converted no layer")
            report = sparsify(model, method=method, **self._arguments())
        if method.trains_sparse and not report.sparse:
            reasons = "; ".join(f"{row.name}: {row.note}" for row in report.weights[:3]) or "it has no such layer"
            raise SparsityError(f"nothing of {type(model).__name__} is sparse at {self.pattern} ({reasons})")
        return report

    def _arguments(self) -> dict[str, Any]:
        arguments = asdict(self)
        del arguments["method"], arguments["decay"], arguments["hyperparameters"]
        return arguments
