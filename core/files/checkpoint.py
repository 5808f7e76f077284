"""Checkpoints that are sparse as they stand, from which training resumes bit for bit.

`split` gives the masked weights under the dense model's names, loadable by anyone with the accuracy of the sparse
model, and beside them the dropped values, from which `restore` rebuilds the dense shadow weights bit for bit. The mask
itself is not stored: masking what was kept keeps the same entries, since dropped ones are never larger. Where a
method's values are no selection of the shadow weights, those lie beside them whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nm_sparsity.core import masks
from nm_sparsity.core.errors import CheckpointError
from nm_sparsity.core.files.metadata import DAMAGE, Metadata, read_state, strip_prefix
from nm_sparsity.core.methods import WeightState
from nm_sparsity.core.model import record
from nm_sparsity.core.model.layers import sparse_weights
from nm_sparsity.core.model.wrappers import name_in_state, unwrap
from nm_sparsity.core.pattern import Placement


def split(model: nn.Module, state_dict: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint of `model` in two parts: a state dict of the masked weights under dense names, and the rest.

    The second part, to be stored under `METADATA`, holds the method and its memory, the table of sparse weights
    (pattern and reduction dimensions by name) and the dropped values. Both are plain containers of tensors, numbers
    and text. Under FSDP2 call it on every rank; the tensors are gathered.

    Args:
        state_dict: what to split instead of the model's own state dict, with the same names (averaged weights, say).

    Raises:
        CheckpointError: if `state_dict` lacks a sparse weight.
    """
    model = unwrap(model)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    table = record.table(model)
    if missing := [name for name in table if name not in state]:
        raise CheckpointError(
            f"the state dict lacks {_some(missing)}, which is sparse: give split all weights, and leave out of its "
            "result what you do not want to keep"
        )
    names, dropped, shadows, tied, unfinished = _names(model), {}, {}, {}, ""
    for name, param, weight in sparse_weights(model):
        shadow = _whole(state[name]).detach()
        value = weight.value(shadow)
        if weight.selects or torch.equal(value, masks.keep_largest(shadow, weight.pattern, weight.dims)):
            dropped[name] = shadow[~masks.nm_mask(shadow, weight.pattern, weight.dims)]
        else:
            shadows[name] = shadow
            unfinished = unfinished or weight.why_unfinished(name, value)
        state.update(dict.fromkeys(names[id(param)], value))
        tied.update({alias: name for alias in names[id(param)] if alias != name})
    state = {name: _whole(value) for name, value in state.items()}
    if dropped or shadows:  # a part may be finalized already
        for name in [name for name in table if name not in {*dropped, *shadows}]:
            dropped[name] = state[name][~masks.nm_mask(state[name], *table[name])]
    metadata = replace(
        Metadata.of(model),
        unfinished=unfinished,
        dropped=dropped,
        shadows=shadows,
        tied=tied,
        state=sparsity_state(model),
    )
    return state, metadata.to_dict()


def merge(state_dict: Mapping[str, Any], metadata: Metadata | Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`: the state dict of dense shadow weights, bit for bit. Needs no model.

    Raises:
        CheckpointError: if the two parts do not belong together.
    """
    state, metadata = dict(state_dict), Metadata.from_dict(metadata)
    metadata.check_fits(state)
    for name, dropped in metadata.dropped.items():
        gaps = ~masks.nm_mask(state[name], *metadata.layers[name])
        if int(gaps.sum()) != dropped.numel():
            raise CheckpointError(f"{name} has {int(gaps.sum())} dropped weights, the file {dropped.numel()} values")
        shadow = state[name].clone()
        shadow[gaps] = dropped.to(shadow)
        if dropped.dtype is shadow.dtype and not torch.equal(masks.nm_mask(shadow, *metadata.layers[name]), ~gaps):
            raise CheckpointError(
                f"dropped values of {name} are larger than what is kept: they are of another moment of training than "
                "the weights; take both from one checkpoint"
            )
        state[name] = shadow
    state.update(metadata.shadows)
    state.update({alias: state[name] for alias, name in metadata.tied.items()})
    return state


def restore(
    model: nn.Module, state_dict: Mapping[str, Any], metadata: Metadata | Mapping[str, Any] | None = None
) -> None:
    """Load a checkpoint into `model`, strictly.

    With `metadata` of ours and a sparsified `model`, the dense shadow weights and the method's memory come back bit
    for bit. A dense model gets the masked weights, a sparsified one without `metadata` the weights as they are (a
    dense checkpoint to fine-tune). A prefix ``module.`` on all names is dropped.

    Raises:
        CheckpointError: if names, shapes, patterns or layouts differ. `model` is unchanged then.
    """
    model = unwrap(model)
    state = dict(state_dict)
    if state.keys() != model.state_dict().keys():
        state = strip_prefix(state)
    _check_names_and_shapes(model, state)
    metadata = None if metadata is None else Metadata.from_dict(metadata)
    resuming = metadata is not None and any(True for _ in sparse_weights(model))
    if metadata is not None and resuming:
        check_table(model, metadata)
        state = merge(state, metadata)
        _check_names_and_shapes(model, state)
        _check_sparsity_state(model, metadata.state)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        # Imported late: it is slow to import and only sharded models need it.
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)
    if metadata is not None and resuming:
        load_sparsity_state(model, metadata.state)


def check_table(model: nn.Module, metadata: Metadata) -> None:
    """Compare the table of sparse weights in `metadata` with the model's.

    Raises:
        CheckpointError: naming the first weight whose pattern or reduction dimensions differ.
    """
    here, there = record.table(model), metadata.layers
    for name in sorted({*here, *there}):
        mine, theirs = _placement(here.get(name)), _placement(there.get(name))
        if mine != theirs:
            raise CheckpointError(
                f"{name} is {mine} in this model and {theirs} in the checkpoint; sparsify the model as it was trained"
            )


def sparsity_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the method remembers of each sparse weight (ASP's masks, the sum of learning rates), by weight name.

    Under FSDP2 call it on every rank; what is of the weight's shape is gathered.
    """
    return {
        name: {
            "steps": int(weight.steps),
            "lr_sum": float(weight.lr_sum),
            "preconditioned": weight.preconditioned,
            "state": {key: _copied(_gathered(value, param)) for key, value in weight.memory.items()},
        }
        for name, param, weight in sparse_weights(unwrap(model))
    }


def load_sparsity_state(model: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Give back what `sparsity_state` returned.

    Raises:
        CheckpointError: if it names a weight that is not sparse in `model`, or is of one of another shape.
    """
    weights = _check_sparsity_state(model, state)
    for name, memory in state.items():
        param, weight = weights[name]
        weight.memory = {key: _copied(_shard(value, param)) for key, value in memory["state"].items()}
        weight.steps.fill_(memory.get("steps", 0))
        weight.lr_sum = memory["lr_sum"]
        weight.preconditioned = memory["preconditioned"]


def _check_sparsity_state(
    model: nn.Module, state: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[nn.Parameter, WeightState]]:
    """The sparse weights of `model` by name, if `state` is of such weights and has all that `sparsity_state` gives."""
    weights = {name: (param, weight) for name, param, weight in sparse_weights(unwrap(model))}
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the method's state is a {type(state).__name__}, not what sparsity_state returns")
    for name, memory in state.items():
        if name not in weights:
            raise CheckpointError(f"the method's state names {name}, which is not a sparse weight of this model")
        if missing := {"lr_sum", "preconditioned", "state"} - set(memory):
            raise CheckpointError(f"the method's state of {name} lacks {', '.join(sorted(missing))}")
        try:
            read_state({name: memory})
        except DAMAGE as error:
            raise CheckpointError(f"the method's state of {name} is not what sparsity_state returns") from error
        shape = weights[name][0].shape
        for key, value in memory["state"].items():
            if isinstance(value, Tensor) and (
                value.is_meta or value.layout is not torch.strided or value.shape not in (shape, ())
            ):
                raise CheckpointError(
                    f"the {key} of {name} has shape {tuple(value.shape)}, the weight {tuple(shape)}: it is of another"
                )
    return weights


def _gathered(value: Any, param: Tensor) -> Any:
    """What a method remembers of a weight, of all ranks' rows where `param` is sharded."""
    if not (isinstance(param, DTensor) and isinstance(value, Tensor) and value.shape == param.to_local().shape):
        return value
    plain = value.to(torch.uint8) if value.dtype == torch.bool else value  # gloo gathers no bool
    placed = DTensor.from_local(
        plain, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return placed.full_tensor().to(value.dtype)


def _shard(value: Any, param: Tensor) -> Any:
    """The inverse of `_gathered`."""
    if not (isinstance(param, DTensor) and isinstance(value, Tensor) and value.shape == param.shape):
        return value
    plain = value.to(param.device, torch.uint8 if value.dtype == torch.bool else value.dtype)
    return distribute_tensor(plain, param.device_mesh, param.placements).to_local().to(value.dtype)


def _copied(value: Any) -> Any:
    """Optimizer steps write to what a method remembers."""
    return value.clone() if isinstance(value, Tensor) else value


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _names(model: nn.Module) -> dict[int, list[str]]:
    """id(parameter) -> all its names in the state dict: several when tied."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name_in_state(name))
    return names


def _check_names_and_shapes(model: nn.Module, state: Mapping[str, Any]) -> None:
    own = model.state_dict()
    kind = type(model).__name__
    if missing := [name for name in own if name not in state]:
        raise CheckpointError(
            f"the checkpoint lacks {_some(missing)} of {kind}, the first of shape {_shape(own[missing[0]])}: "
            "is it of another model?"
        )
    if unexpected := [name for name in state if name not in own]:
        raise CheckpointError(f"the checkpoint holds {_some(unexpected)}, which {kind} does not have")
    for name, value in own.items():
        given = state[name]
        plain = isinstance(value, Tensor) and isinstance(given, Tensor)
        if plain and (given.is_meta or given.layout != value.layout):
            raise CheckpointError(f"{name} of the checkpoint is a tensor of layout {given.layout} on {given.device}")
        if _shape(value) != _shape(given):
            raise CheckpointError(f"{name} has shape {_shape(value)} in {kind} and {_shape(given)} in the checkpoint")


def _placement(placement: Placement | None) -> str:
    return "dense" if placement is None else f"{placement.pattern} along dimensions {list(placement.dims)}"


def _shape(value: Any) -> tuple[int, ...] | str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "a nested tensor" if value.is_nested else tuple(value.shape)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
