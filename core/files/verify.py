"""The check at the end of the contract: what came out is N:M, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nm_sparsity.core import masks
from nm_sparsity.core.errors import SparsityError, VerificationError
from nm_sparsity.core.files.io import load
from nm_sparsity.core.files.metadata import find_parts
from nm_sparsity.core.masks.groups import reduction_size
from nm_sparsity.core.model import record
from nm_sparsity.core.model.candidates import candidates, dims_by_shape, reduction_dims, why_not_pattern
from nm_sparsity.core.model.layers import sparse_layers
from nm_sparsity.core.model.rules import Rules
from nm_sparsity.core.model.wrappers import unwrap
from nm_sparsity.core.pattern import NMPattern, Placement, Table
from nm_sparsity.core.table import format_table


@dataclass(frozen=True)
class Check:
    """One weight: `violations` of its `groups` have more than N non-zeros; `skipped` says why it was not checked."""

    name: str
    pattern: str
    groups: int
    violations: int
    skipped: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify` looked at. Prints as a table."""

    checks: tuple[Check, ...]

    @property
    def violating(self) -> tuple[Check, ...]:
        """The weights that break their pattern."""
        return tuple(c for c in self.checks if c.violations)

    @property
    def checked(self) -> tuple[Check, ...]:
        """The weights that were looked at."""
        return tuple(c for c in self.checks if not c.skipped)

    def __str__(self) -> str:
        rows = [
            (
                c.name,
                c.pattern,
                None if c.skipped else c.groups,
                None if c.skipped else c.violations,
                c.skipped,
            )
            for c in self.checks
        ]
        total = f"{len(self.checked)} weights checked, {len(self.violating)} violate their pattern"
        return format_table(["weight", "pattern", "groups", "violating", "note"], rows) + "\n" + total


def verify(
    target: nn.Module | Mapping[str, Any] | str | Path,
    pattern: str | NMPattern | None = None,
    layout: str = "channel",
    exclude: Iterable[str] = (),
) -> Verification:
    """Check that every weight that should be N:M is, exactly.

    Which ones should be is read from the table that `sparsify` left on the model or our checkpoints carry. A model or
    file without a table is checked on all its eligible weights (a file: on tensors of two or more dimensions whose
    reduction size fits) against `pattern` along `layout`.

    Args:
        target: a finalized model, a state dict, or a checkpoint file of any engine.
        pattern: what the weights are expected to be; needed where there is no table, and compared with it where
            there is one.
        layout: how groups lie where there is no table.
        exclude: globs of weights that are meant to be dense where there is no table, as in `sparsify`.

    Returns:
        The table of what was checked and what was skipped.

    Raises:
        VerificationError: with the table of violating weights, or if the model is not finalized or of another pattern.
        CheckpointError: if the file cannot be read.
    """
    expected = None if pattern is None else NMPattern.parse(pattern)
    rules = Rules.parse(expected or "2:4", layout, (), exclude, {}, "dense")
    if isinstance(target, nn.Module):
        checks = list(_of_model(unwrap(target), expected, rules))
    else:
        checks = list(_of_file(target, expected, rules))
    result = Verification(tuple(checks))
    if bad := result.violating:
        raise VerificationError(
            f"{len(bad)} of {len(result.checked)} weights break their pattern:\n{Verification(tuple(bad))}"
        )
    return result


def _of_model(model: nn.Module, expected: NMPattern | None, rules: Rules) -> Iterator[Check]:
    if any(True for _ in sparse_layers(model)):
        raise VerificationError(
            f"{type(model).__name__} is not finalized: its parameters are the dense shadow weights; "
            "call finalize(model) first (on a copy.deepcopy to go on training)"
        )
    if any(True for _ in record.records(model)):
        dense = all(r.method == "dense" for _, r in record.records(model))
        yield from _by_table(
            model.state_dict(), {**record.lost(model), **record.table(model)}, expected, type(model).__name__, dense
        )
        return
    if expected is None:
        raise SparsityError(f'{type(model).__name__} was never sparsified; give verify a pattern, e.g. "2:4"')
    for candidate in candidates(model):
        name, module, shape = candidate.names[0], candidate.owners[0][1], tuple(candidate.param.shape)
        dims = reduction_dims(module, len(shape), rules.layout)
        reason = candidate.why_not or rules.choose(name)[1] or why_not_pattern(module, shape, expected, dims)
        yield _skip(name, reason) if reason else _check(name, candidate.param, Placement(expected, dims))


def _of_file(target: Mapping[str, Any] | str | Path, expected: NMPattern | None, rules: Rules) -> Iterator[Check]:
    where = "the state dict" if isinstance(target, Mapping) else str(target)
    payload = target if isinstance(target, Mapping) else load(target)
    state, metadata = find_parts(payload, where)
    if metadata is not None:
        yield from _by_table(state, metadata.layers, expected, where, metadata.method == "dense")
        return
    if expected is None:
        raise SparsityError(f"{where} carries no table of sparse weights; give a pattern to check against, e.g. 2:4")
    for name, placement, reason in placements_by_shape(state, rules):
        yield _check(name, state[name], placement) if placement else _skip(name, reason)


def placements_by_shape(state: Mapping[str, Any], rules: Rules) -> Iterator[tuple[str, Placement | None, str]]:
    """(name, placement or None, why not) of every tensor of two or more dimensions, of whose layer nothing is known."""
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        pattern, reason = rules.choose(name)
        dims = dims_by_shape(value.dim(), rules.layout)
        size = reduction_size(value.shape, dims)
        if pattern is None:
            yield name, None, reason
        elif not value.dtype.is_floating_point:
            yield name, None, f"{value.dtype}: not floating point"
        elif size % pattern.m:
            yield name, None, f"reduction size {size} is not divisible by {pattern.m}"
        else:
            yield name, Placement(pattern, dims), ""


def _by_table(
    state: Mapping[str, Any], table: Table, expected: NMPattern | None, where: str, dense: bool
) -> Iterator[Check]:
    if not table and not dense:
        raise VerificationError(f"{where} has no sparse weight: sparsify found none that it could convert")
    patterns = {placement.pattern for placement in table.values()}
    if expected is not None and table and expected not in patterns:
        found = ", ".join(map(str, sorted(patterns)))
        raise VerificationError(f"{where} was sparsified at {found}, not at {expected}")
    for name, placement in table.items():
        if name not in state:
            raise VerificationError(f"{where} lacks the weight {name} that its table of sparse weights names")
        yield _check(name, state[name], placement)


def _check(name: str, w: Tensor, placement: Placement) -> Check:
    pattern, dims = placement
    return Check(name, str(pattern), masks.group_count(w, pattern), masks.count_violations(w, pattern, dims))


def _skip(name: str, reason: str) -> Check:
    return Check(name, "dense", 0, 0, reason)
