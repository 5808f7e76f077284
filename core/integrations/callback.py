"""What the callbacks of all engines share: they convert a model, measure its masks, and finish it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from torch import nn

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.files.verify import verify
from nm_sparsity.core.model import record
from nm_sparsity.core.model.config import SparsityConfig
from nm_sparsity.core.model.convert import finalize, unsparsify
from nm_sparsity.core.model.layers import sparse_layers
from nm_sparsity.core.model.report import SparsityReport
from nm_sparsity.core.model.strength import decay_strength
from nm_sparsity.core.pattern import NMPattern
from nm_sparsity.core.training.diagnostics import MaskTracker


class SparseTraining:
    """Trains a model N:M sparse in any engine that tells when training begins, steps and ends.

    Args:
        pattern: N:M, keep N of every M consecutive weights.
        interval: optimizer steps between measurements of SAD and flip rate; 0 is never.
        exclude: globs of layers that stay dense; None leaves them to the engine's callback.
        options: the other arguments of `sparsify`, hyperparameters of the method included.

    Raises:
        SparsityError: at once, for an option that `sparsify` would refuse.
    """

    def __init__(
        self,
        pattern: str | NMPattern = "2:4",
        *,
        interval: int = 50,
        exclude: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(interval, int) or interval < 0:
            raise SparsityError(f"interval is {interval!r}, expected 0 (never measure) or more optimizer steps")
        if isinstance(exclude, str):
            raise SparsityError(f'exclude takes a list of globs such as ["lm_head"], found {exclude!r}')
        known = {field.name for field in fields(SparsityConfig)} - {"hyperparameters"}
        self.config = SparsityConfig(
            str(pattern),
            exclude=tuple(exclude or ()),
            hyperparameters={name: value for name, value in options.items() if name not in known},
            **{name: value for name, value in options.items() if name in known},
        )
        self.interval = interval
        self.report: SparsityReport | None = None
        """What became of every weight, after conversion."""
        self._excludes_by_default = exclude is None
        self._tracker: MaskTracker | None = None

    @property
    def needs_length(self) -> bool:
        """Whether the number of optimizer steps must be known at conversion: something changes over the run."""
        method = self.config.make_method()
        return method.scheduled and method.total_steps is None

    def convert(self, model: nn.Module, exclude: Iterable[str] = (), total_steps: int | None = None) -> SparsityReport:
        """Make `model` sparse, in place; one that an earlier training finalized is made sparse anew.

        Args:
            exclude: globs of what stays dense where the user excluded nothing.
            total_steps: the optimizer steps of the run, which the engine knows.

        Raises:
            SparsityError: see `SparsityConfig.sparsify`.
        """
        if any(found.table is not None for _, found in record.records(model)):
            unsparsify(model)
        config = replace(self.config, exclude=tuple(exclude)) if self._excludes_by_default else self.config
        self.report = config.sparsify(model, total_steps)
        return self.report

    def before_step(self, model: nn.Module, step: int) -> None:
        """Remember the masks, if `step`, counted from 1, is an optimizer step to be measured."""
        if self.interval and step % self.interval == 0:
            self._tracker = MaskTracker(model)

    def after_step(self, model: nn.Module) -> dict[str, float]:
        """SAD and flip rate of the step, and lambda * sum(lr) so far, by name; empty unless the step was measured."""
        if self._tracker is None:
            return {}
        flips, self._tracker = self._tracker.update(), None
        strength = decay_strength(model)
        scalars = {"sad": float(flips.total_sad), "flip_rate": flips.rate}
        return scalars if strength is None else {**scalars, "decay_strength": strength}

    def finish(self, model: nn.Module) -> None:
        """Write the zeros, give the dense classes back, and check the result.

        Raises:
            VerificationError: if a weight is not N:M.
        """
        finalize(model)
        if self.config.make_method().trains_sparse:
            verify(model)


def is_sparse(model: nn.Module) -> bool:
    """Whether layers of `model` train sparse."""
    return any(True for _ in sparse_layers(model))


def is_converted(model: nn.Module) -> bool:
    """Whether `model` was made sparse and not finished since: by method "dense", no layer of it trains sparse."""
    return is_sparse(model) or any(found.table is None for _, found in record.records(model))
