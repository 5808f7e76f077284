"""What a model remembers of having been sparsified: the table of its sparse weights, before and after `finalize`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.methods import WeightState
from nm_sparsity.core.model.layers import sparse_layers, sparse_weights
from nm_sparsity.core.model.wrappers import name_in_state
from nm_sparsity.core.pattern import Placement, Table


@dataclass(frozen=True)
class Record:
    """Attached to the module that `sparsify` or `finalize` was called on."""

    method: str
    hyperparameters: dict[str, Any]
    layout: str
    table: Table | None = None
    """The weights that `finalize` made N:M, named relative to the module; ``None`` before."""
    weights: dict[str, WeightState] = field(default_factory=dict)
    """Before `finalize`: what `sparsify` made sparse, by name, a tied weight by its first."""


def attach(model: nn.Module, record: Record) -> None:
    """Put `record` on `model`, as plain containers: a finalized model that is pickled whole needs nothing of ours."""
    table = None if record.table is None else {name: placement.plain for name, placement in record.table.items()}
    model.__dict__["_nm_record"] = {**vars(record), "table": table}


def detach(model: nn.Module) -> None:
    """Take every record off `model` and its submodules."""
    for module in model.modules():
        module.__dict__.pop("_nm_record", None)


def of(module: nn.Module) -> Record | None:
    """The record on this very module."""
    found = module.__dict__.get("_nm_record")
    if found is None:
        return None
    table = found["table"] and {name: Placement.from_plain(plain) for name, plain in found["table"].items()}
    return Record(**{**found, "table": table})


def records(model: nn.Module) -> Iterator[tuple[str, Record]]:
    """(name, record) of every submodule of `model` that `sparsify` was called on."""
    for name, module in model.named_modules():
        record = of(module)
        if record is not None:
            yield name_in_state(name), record


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
    """The record of a submodule of a sparsified model, read off its first sparse layer."""
    for _, layer in sparse_layers(model):
        state = next(iter(layer.nm_weights.values()))
        layout = "channel" if len(state.dims) == 1 else "kernel"
        return Record(state.method.name, state.method.hyperparameters(), layout)
    return None


def table(model: nn.Module) -> Table:
    """Every weight of `model` that is sparse or was finalized, with names relative to `model`."""
    merged = {name: Placement(state.pattern, state.dims) for name, _, state in sparse_weights(model)}
    for prefix, record in records(model):
        for name, placement in (record.table or {}).items():
            merged[f"{prefix}.{name}" if prefix else name] = placement
    return merged


def lost(model: nn.Module) -> Table:
    """What `sparsify` made sparse and `model` holds no more, by the names of then.

    Its layer was replaced, or its weight taken out of it. What moved within the model, under an adapter say, is not
    lost, nor what `finalize` or `unsparsify` gave back.
    """
    held = {
        id(state)
        for _, layer in sparse_layers(model)
        for name, state in layer.nm_weights.items()
        if layer._parameters.get(name) is not None
    }
    return {
        f"{prefix}.{name}" if prefix else name: state.placement
        for prefix, record in records(model)
        for name, state in record.weights.items()
        if not state.ended and id(state) not in held
    }
