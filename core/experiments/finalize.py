"""The end of every run: the model that leaves it is finalized, verified, and scores as it did while it was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nm_sparsity.core.errors import VerificationError
from nm_sparsity.core.files.io import save
from nm_sparsity.core.files.metadata import METADATA, Metadata
from nm_sparsity.core.files.verify import Verification, verify
from nm_sparsity.core.model.convert import finalize
from nm_sparsity.core.model.report import SparsityReport

Score = Mapping[str, Any]
"""What an evaluation found, by name: numbers, mappings of them, or anything comparable, such as the translations."""


@dataclass(frozen=True)
class Finalized:
    """A finalized copy of a trained model, with what was found out about it."""

    model: nn.Module
    score: Score
    """Of the trained model."""
    again: Score
    """Of the finalized one."""
    report: SparsityReport
    verification: Verification


def finalize_and_check(
    model: nn.Module,
    score: Callable[[nn.Module], Score],
    *,
    gpu_tolerance: float = 0.0,
    reload: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Finalized:
    """Score a sparsified `model`, finalize a copy of it, verify the copy, and score that: it must score the same.

    Args:
        score: an evaluation; it must leave the model as it is.
        gpu_tolerance: how far numbers may lie apart where the model is on a GPU, which may choose another algorithm
            for the same product; on a CPU they are equal.
        reload: what the finalized copy goes through before it is scored again: a file, say, and the loader of whoever
            will use it.

    Raises:
        VerificationError: if a weight of the copy breaks its pattern, or the copy scores otherwise.
    """
    before = score(model)
    end = copy.deepcopy(model)
    report = finalize(end)
    verification = Verification(()) if report.method == "dense" else verify(end)
    after = score(reload(end))
    on_gpu = any(parameter.is_cuda for parameter in end.parameters())
    for name, value in before.items():
        if not _equal(value, after[name], gpu_tolerance if on_gpu else 0.0):
            raise VerificationError(
                f"finalize changed {name} from {_brief(value)} to {_brief(after[name])}: please report this as a bug"
            )
    return Finalized(end, before, after, report, verification)


def save_finalized(model: nn.Module, path: Path, **more: Any) -> None:
    """Write a finalized `model` as a checkpoint whose ``state_dict`` any program with the dense model loads.

    `more` lies beside it.
    """
    save(path, {"state_dict": model.state_dict(), METADATA: Metadata.of(model).to_dict(), **more})


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key], tolerance) for key in a)
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= tolerance
    return bool(a == b)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
