"""A weight that may be N:M, wherever it was found, and what the caller's rules make of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nm_sparsity.core.files.metadata import why_not_counted
from nm_sparsity.core.model.rules import Rules
from nm_sparsity.core.pattern import Placement


@dataclass(frozen=True)
class Weight:
    """A tensor of two or more dimensions of a model without a table of sparse weights."""

    name: str
    value: Tensor
    dims: tuple[int, ...]
    """Its reduction dimensions."""
    size: int
    """How many entries follow each other along them: what M must divide."""
    why_not: str = ""
    """Why it cannot be N:M whatever the pattern."""
    guess: str = ""
    """Why it is probably not meant to be; who names it in a glob has it nevertheless."""
    dims_are_assumed: bool = False
    """Whether nothing tells its layer, so that `dims` are those of most."""

    def placement(self, rules: Rules) -> tuple[Placement | None, str]:
        """Where its groups lie, or ``None`` and why it stays dense."""
        pattern, reason = rules.choose(self.name)
        reason = self.why_not or reason or ("" if rules.names(self.name) else self.guess) or why_not_counted(self.value)
        if pattern is None or reason:
            return None, reason
        if self.size % pattern.m:
            return None, f"reduction size {self.size} is not divisible by {pattern.m}"
        return Placement(pattern, self.dims), ""
