"""The check at the end of the contract: what came out is N:M, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nm_sparsity.core import checkpoint, grouping, masks, record
from nm_sparsity.core.errors import SparsityError, VerificationError
from nm_sparsity.core.layers import sparse_layers
from nm_sparsity.core.pattern import NMPattern
from nm_sparsity.core.rules import Rules
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
        checks = list(_of_model(record.unwrap(target), expected, rules))
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
        yield from _by_table(model.state_dict(), record.table(model), expected, type(model).__name__, dense)
        return
    if expected is None:
        raise SparsityError(f'{type(model).__name__} was never sparsified; give verify a pattern, e.g. "2:4"')
    for weight in grouping.weights(model):
        module = weight.owners[0][1]
        shape = tuple(weight.param.shape)
        dims = grouping.reduction_dims(module, len(shape), rules.layout)
        reason = weight.obstacle or rules.choose(weight.names[0])[1]
        reason = reason or grouping.reason_against(module, shape, expected, dims)
        yield (_skip(weight.names[0], reason) if reason else _check(weight.names[0], weight.param, expected, dims))


def _of_file(target: Mapping[str, Any] | str | Path, expected: NMPattern | None, rules: Rules) -> Iterator[Check]:
    where = "the state dict" if isinstance(target, Mapping) else str(target)
    payload = target if isinstance(target, Mapping) else checkpoint.load(target)
    state, metadata = checkpoint.find_parts(payload, where)
    if metadata is not None:
        table = {name: record.Groups(p, tuple(dims)) for name, (p, dims) in metadata["layers"].items()}
        yield from _by_table(state, table, expected, where, metadata["method"] == "dense")
        return
    if expected is None:
        raise SparsityError(f"{where} carries no table of sparse weights; give a pattern to check against, e.g. 2:4")
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        dims = grouping.dims_by_shape(value.dim(), rules.layout)
        size = torch.Size(value.shape[d] for d in dims).numel()
        if reason := rules.choose(name)[1]:
            yield _skip(name, reason)
        elif size % expected.m or not value.dtype.is_floating_point:
            yield _skip(name, f"reduction size {size} is not divisible by {expected.m}")
        else:
            yield _check(name, value, expected, dims)


def _by_table(
    state: Mapping[str, Any], table: record.Table, expected: NMPattern | None, where: str, dense: bool
) -> Iterator[Check]:
    if not table and not dense:
        raise VerificationError(f"{where} has no sparse weight: sparsify found none that it could convert")
    patterns = {groups.pattern for groups in table.values()}
    if expected is not None and table and str(expected) not in patterns:
        raise VerificationError(f"{where} was sparsified at {', '.join(sorted(patterns))}, not at {expected}")
    for name, groups in table.items():
        if name not in state:
            raise VerificationError(f"{where} lacks the weight {name} that its table of sparse weights names")
        yield _check(name, state[name], NMPattern.parse(groups.pattern), groups.dims)


def _check(name: str, w: Tensor, pattern: NMPattern, dims: tuple[int, ...]) -> Check:
    return Check(name, str(pattern), masks.group_count(w, pattern), masks.count_violations(w, pattern, dims))


def _skip(name: str, reason: str) -> Check:
    return Check(name, "dense", 0, 0, reason)
