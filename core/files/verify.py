"""The check at the end of the contract: what came out is N:M, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nm_sparsity.core import masks
from nm_sparsity.core.errors import SparsityError, VerificationError
from nm_sparsity.core.files.contents import read, weights_of_model
from nm_sparsity.core.files.metadata import Metadata
from nm_sparsity.core.files.weights import Weight
from nm_sparsity.core.model import record
from nm_sparsity.core.model.layers import sparse_layers
from nm_sparsity.core.model.rules import Rules
from nm_sparsity.core.model.wrappers import unwrap
from nm_sparsity.core.pattern import NMPattern, Placement
from nm_sparsity.core.table import format_table


@dataclass(frozen=True)
class Check:
    """One weight: `violations` of its `groups` have more than N non-zeros; `skipped` says why it was not checked."""

    name: str
    pattern: str
    groups: int
    violations: int
    skipped: str = ""
    hint: str = ""
    """Why it may break its pattern."""


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
                c.skipped or c.hint,
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
    *,
    include: Iterable[str] = (),
    patterns: Mapping[str, str] | None = None,
) -> Verification:
    """Check that every weight that should be N:M is, exactly.

    Which ones should be is read from the table that `sparsify` left on the model or our checkpoints carry. Without one
    all eligible weights are checked: a model's layers, also those of a Hugging Face folder; the initialisers that an
    ONNX model multiplies by; of other files the tensors of two or more dimensions, taken for (out, in, *kernel), but
    for those whose names say that they are embeddings.

    Args:
        target: a finalized model; a state dict or a checkpoint's payload; a checkpoint or safetensors file of any
            engine, a packed file of ours, a folder of Hugging Face's ``save_pretrained``, or an ONNX file.
        pattern: what the weights are expected to be; needed where there is no table. Where there is one, every pattern
            in it must imply this one, as 1:4 and 2:8 imply 2:4.
        layout: how groups lie where there is no table.
        exclude: globs of weights that are meant to be dense, as in `sparsify`; only where there is no table.
        include: globs of the weights that are meant to be sparse; only where there is no table.
        patterns: glob -> pattern, or ``"dense"``, of weights that differ; only where there is no table.

    Returns:
        The table of what was checked and what was skipped; something was checked.

    Raises:
        VerificationError: with the table of violating weights; if no weight was checked; if the model is not finalized
            or its pattern does not imply `pattern`.
        CheckpointError: if the file cannot be read.
        SparsityError: for a malformed argument, or a glob that matches nothing or meets a table.
    """
    expected = None if pattern is None else NMPattern.parse(pattern)
    rules = Rules.parse(expected or "2:4", layout, include, exclude, patterns or {}, "dense")
    if not isinstance(target, nn.Module | Mapping | str | Path):
        raise SparsityError(f"verify takes a model, a state dict or a path, found {type(target).__name__}")
    if isinstance(target, nn.Module):
        where, checks = _of_model(unwrap(target), expected, rules)
    else:
        where, checks = _of_file(target, expected, rules)
    result = Verification(tuple(checks))
    if bad := result.violating:
        raise VerificationError(
            f"{len(bad)} of {len(result.checked)} weights break their pattern:\n{Verification(tuple(bad))}"
        )
    if not result.checked:
        reasons = "; ".join(f"{check.name}: {check.skipped}" for check in result.checks[:3])
        more = f" ... ({len(result.checks)} in all)" if len(result.checks) > 3 else ""
        raise VerificationError(
            f"no weight of {where} was checked, so nothing is verified: {reasons or 'it has none'}{more}"
        )
    return result


def _of_model(model: nn.Module, expected: NMPattern | None, rules: Rules) -> tuple[str, list[Check]]:
    where = type(model).__name__
    if any(True for _ in sparse_layers(model)):
        raise VerificationError(
            f"{where} is not finalized: its parameters are the dense shadow weights; "
            "call finalize(model) first (on a copy.deepcopy to go on training)"
        )
    if any(True for _ in record.records(model)):
        metadata = Metadata.of(model)
        metadata = replace(metadata, layers={**record.lost(model), **metadata.layers})
        state = model.state_dict()
        if missing := [name for name in metadata.layers if name not in state]:
            raise VerificationError(f"{where} lacks the weight {missing[0]} that its table of sparse weights names")
        metadata.check_fits(state, where)
        return where, _by_table(state, metadata, expected, rules, where)
    if expected is None:
        raise SparsityError(f'{where} was never sparsified; give verify a pattern, e.g. "2:4"')
    return where, _by_rules(weights_of_model(model, rules.layout), rules)


def _of_file(
    target: Mapping[str, Any] | str | Path, expected: NMPattern | None, rules: Rules
) -> tuple[str, list[Check]]:
    contents = read(target)
    if contents.metadata is not None and contents.metadata.unfinished:
        raise VerificationError(f"{contents.where}: {contents.metadata.unfinished}; train to the end")
    if contents.metadata is not None:
        return contents.where, _by_table(contents.state, contents.metadata, expected, rules, contents.where)
    if expected is None:
        raise SparsityError(
            f"{contents.where} carries no table of sparse weights; give a pattern to check against, e.g. 2:4"
        )
    return contents.where, _by_rules(contents.weights(rules.layout), rules)


def _by_table(
    state: Mapping[str, Any], metadata: Metadata, expected: NMPattern | None, rules: Rules, where: str
) -> list[Check]:
    refuse_globs(rules, where)
    if not metadata.layers and metadata.method == "dense":
        raise VerificationError(f"{where} has no sparse weight: it was trained dense")
    if not metadata.layers:
        raise VerificationError(f"{where} has no sparse weight: sparsify found none that it could convert")
    other = {name: found for name, (found, _) in metadata.layers.items() if expected and not found.implies(expected)}
    if other:
        found, (first, *more) = ", ".join(map(str, sorted(set(other.values())))), other
        raise VerificationError(
            f"{where} was sparsified at {found}, which is not {expected}: {first}"
            + (f" and {len(more)} more" if more else "")
        )
    return [_check(name, state[name], placement) for name, placement in metadata.layers.items()]


def _by_rules(weights: Iterable[Weight], rules: Rules) -> list[Check]:
    weights = list(weights)
    rules.check_globs([weight.name for weight in weights])
    checks = []
    for weight in weights:
        placement, reason = weight.placement(rules)
        check = _check(weight.name, weight.value, placement) if placement else Check(weight.name, "dense", 0, 0, reason)
        if placement and check.violations and weight.dims_are_assumed:
            check = replace(check, hint=_hint(weight.value, placement.pattern))
        checks.append(check)
    return checks


def _hint(w: Tensor, pattern: NMPattern) -> str:
    """Whether the weight of a layer that nothing is known of may lie as those do whose inputs are in dimension 0."""
    if w.shape[0] % pattern.m or masks.count_violations(w, pattern, (0,)):
        return ""
    return (
        f"it is {pattern} along dimension 0, as in a transposed convolution or Conv1D: give verify the model, which "
        "tells, or exclude it"
    )


def refuse_globs(rules: Rules, where: str) -> None:
    """Raise a `SparsityError` if globs were given for a file called `where`, whose table says what is sparse."""
    if not rules.is_plain:
        raise SparsityError(
            f"{where} carries a table of its sparse weights; include, exclude and patterns are for files without one"
        )


def _check(name: str, w: Tensor, placement: Placement) -> Check:
    pattern, dims = placement
    return Check(name, str(pattern), masks.group_count(w, pattern), masks.count_violations(w, pattern, dims))
