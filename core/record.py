"""What a model remembers of having been sparsified: the table of its sparse weights, before and after `finalize`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.layers import sparse_layers, sparse_weights


class Groups(NamedTuple):
    """The pattern of a weight and the reduction dimensions along which its groups lie."""

    pattern: str
    dims: tuple[int, ...]


Table = dict[str, Groups]
"""State-dict name -> groups, of every sparse weight."""


@dataclass(frozen=True)
class Record:
    """Attached to the module that `sparsify` or `finalize` was called on."""

    method: str
    hyperparameters: dict[str, Any]
    layout: str
    table: Table | None = None
    """The weights that `finalize` made N:M, named relative to the module; ``None`` before."""


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
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


def live(model: nn.Module, action: str) -> Record:
    """The record of a model whose layers are sparse, to be finalized or reverted.

    Raises:
        SparsityError: naming `action`, if the model was never sparsified or is finalized.
    """
    found = [record for _, record in records(model)]
    for record in found:
        if record.table is None:
            return record
    if (part := _of_layers(model)) is not None:
        return part
    kind = type(model).__name__
    if found:
        raise SparsityError(f"cannot {action} {kind}: it is finalized already")
    raise SparsityError(f"cannot {action} {kind}: it was never sparsified; call sparsify first")


def any_of(model: nn.Module) -> Record:
    """The first record of `model`, or that of a dense model."""
    for _, record in records(model):
        return record
    return _of_layers(model) or Record("dense", {}, "channel")


def _of_layers(model: nn.Module) -> Record | None:
    """What a part of a model that was sparsified as a whole has for a record."""
    for _, layer in sparse_layers(model):
        sparse = next(iter(layer.nm_weights.values()))
        layout = "channel" if len(sparse.dims) == 1 else "kernel"
        return Record(sparse.method.name, sparse.method.hyperparameters(), layout)
    return None


def table(model: nn.Module) -> Table:
    """Every weight of `model` that is sparse or was finalized, with names relative to `model`."""
    merged = {name: Groups(str(sparse.pattern), sparse.dims) for name, _, sparse in sparse_weights(model)}
    for prefix, record in records(model):
        for name, groups in (record.table or {}).items():
            merged[f"{prefix}.{name}" if prefix else name] = groups
    return merged
