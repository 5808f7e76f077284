"""What a model remembers of having been sparsified: the table of its sparse weights, before and after `finalize`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nm_sparsity.core.errors import SparsityError


class Groups(NamedTuple):
    """The pattern of a weight and the reduction dimensions along which its groups lie."""

    pattern: str
    dims: tuple[int, ...]


Table = dict[str, Groups]
"""State-dict name -> groups, of every sparse weight: the only truth about which weights are sparse, and how."""


@dataclass
class Record:
    """Attached to the module that `sparsify` was called on; names in the table are relative to it."""

    method: str
    hyperparameters: dict[str, Any]
    layout: str
    table: Table
    finalized: bool = False


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def attach(model: nn.Module, record: Record) -> None:
    """Put `record` on `model`."""
    model.__dict__["_nm_record"] = record


def detach(model: nn.Module) -> None:
    """Take every record off `model` and its submodules."""
    for module in model.modules():
        module.__dict__.pop("_nm_record", None)


def of(module: nn.Module) -> Record | None:
    """The record on this very module."""
    found: Record | None = module.__dict__.get("_nm_record")
    return found


def records(model: nn.Module) -> Iterator[tuple[str, Record]]:
    """(name, record) of every submodule of `model` that `sparsify` was called on."""
    for name, module in model.named_modules():
        record = of(module)
        if record is not None:
            yield name, record


def owned(model: nn.Module, action: str) -> list[tuple[str, Record]]:
    """The records of a model that is sparsified and not finalized.

    Raises:
        SparsityError: naming `action`, if there are none or they are finalized.
    """
    found = list(records(model))
    if not found:
        raise SparsityError(f"cannot {action} {type(model).__name__}: it was never sparsified; call sparsify first")
    if all(record.finalized for _, record in found):
        raise SparsityError(f"cannot {action} {type(model).__name__}: it is finalized already")
    return [(name, record) for name, record in found if not record.finalized]


def table(model: nn.Module) -> Table:
    """The tables of all records of `model` in one, with names relative to `model`."""
    merged: Table = {}
    for prefix, record in records(model):
        for name, groups in record.table.items():
            merged[f"{prefix}.{name}" if prefix else name] = groups
    return merged
