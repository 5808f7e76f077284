"""Checkpoints that are sparse as they stand, written atomically and loaded without ever running code from a file.

`split` gives the masked weights under the dense model's names, loadable by anyone with the accuracy of the sparse
model, and beside them the dropped values, from which `restore` rebuilds the dense shadow weights bit for bit. The mask
itself is not stored: masking what was kept keeps the same entries, since dropped ones are never larger.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nm_sparsity.core import masks, record
from nm_sparsity.core.errors import CheckpointError
from nm_sparsity.core.layers import sparse_weights

METADATA = "nm_sparsity"
"""The key of the second part of `split` in every checkpoint file of ours."""

FORMAT = 1
"""Of that second part; a reader refuses a newer one."""

_PREFIXES = ("module.", "_orig_mod.")


def save(path: str | Path, payload: object) -> None:
    """`torch.save` that never leaves a half-written file.

    Raises:
        CheckpointError: see `replacing`.
    """
    with replacing(path) as file:
        torch.save(payload, file)


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block is done: temporary file, fsync, rename.

    Raises:
        CheckpointError: if the disk is full or the folder not writable; a file that was there before stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError of its zip writer.
        raise CheckpointError(f"could not write {path} ({error}); the previous file, if any, is unchanged") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def load(path: str | Path) -> Any:
    """What `save` or any ``torch.save`` of tensors and plain containers wrote, on the CPU.

    Raises:
        CheckpointError: if the file is missing, truncated, foreign, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        # Foreign files may be of another pickle protocol, which torch warns about.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "class" in str(error):
            raise CheckpointError(
                f"{path} holds more than tensors and plain values and was not loaded, since that would run code from "
                'it; save only a state dict, e.g. torch.save({"state_dict": model.state_dict()}, path)'
            ) from error
        raise CheckpointError(f"{path} is not a PyTorch checkpoint") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or not a PyTorch checkpoint") from error


def split(model: nn.Module, state_dict: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint of `model` in two parts: a state dict of the masked weights under dense names, and the rest.

    The second part, to be stored under `METADATA`, holds the method and its memory, the table of sparse weights
    (pattern and reduction dimensions by name) and the dropped values. Both are plain containers of tensors, numbers
    and text. Under FSDP2 call it on every rank; the tensors are gathered.

    Args:
        state_dict: what to split instead of the model's own state dict, with the same names (averaged weights, say).
    """
    model = record.unwrap(model)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    names, dropped, tied = _names(model), {}, {}
    for name, param, sparse in sparse_weights(model):
        shadow = _whole(state[name])
        dropped[name] = shadow[~masks.nm_mask(shadow, sparse.pattern, sparse.dims)]
        masked = masks.keep_largest(shadow, sparse.pattern, sparse.dims)
        state.update(dict.fromkeys(names[id(param)], masked))
        tied.update({alias: name for alias in names[id(param)] if alias != name})
    state = {name: _whole(value) for name, value in state.items()}
    return state, {**describe(model), "dropped": dropped, "tied": tied, "state": sparsity_state(model)}


def merge(state_dict: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`: the state dict of dense shadow weights, bit for bit. Needs no model.

    Raises:
        CheckpointError: if the two parts do not belong together.
    """
    state = dict(state_dict)
    for name, dropped in metadata.get("dropped", {}).items():
        if name not in state or name not in metadata["layers"]:
            raise CheckpointError(f"the checkpoint holds dropped values of {name}, but no such sparse weight")
        pattern, dims = metadata["layers"][name]
        gaps = ~masks.nm_mask(state[name], pattern, tuple(dims))
        if int(gaps.sum()) != dropped.numel():
            raise CheckpointError(f"{name} has {int(gaps.sum())} dropped weights, the file {dropped.numel()} values")
        shadow = state[name].clone()
        shadow[gaps] = dropped.to(shadow)
        state[name] = shadow
    for alias, name in metadata.get("tied", {}).items():
        state[alias] = state[name]
    return state


def describe(model: nn.Module) -> dict[str, Any]:
    """The metadata of a sparsified or finalized model: format, method, layout, and the table of sparse weights."""
    found = record.any_of(model)
    return {
        "format": FORMAT,
        "method": found.method,
        "hyperparameters": dict(found.hyperparameters),
        "layout": found.layout,
        "layers": {name: (g.pattern, list(g.dims)) for name, g in record.table(model).items()},
    }


def restore(model: nn.Module, state_dict: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Load a checkpoint into `model`, strictly.

    With `metadata` of ours and a sparsified `model`, the dense shadow weights and the method's memory come back bit
    for bit. A dense model gets the masked weights, a sparsified one without `metadata` the weights as they are (a
    dense checkpoint to fine-tune). A prefix ``module.`` on all names is dropped.

    Raises:
        CheckpointError: if names, shapes, patterns or layouts differ. `model` is unchanged then.
    """
    model = record.unwrap(model)
    state = dict(state_dict)
    if state.keys() != model.state_dict().keys():
        state = strip_prefix(state)
    _check_names_and_shapes(model, state)
    resuming = metadata is not None and any(True for _ in sparse_weights(model))
    if metadata is not None and resuming:
        check_table(model, metadata)
        state = merge(state, metadata)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        # Imported late: it is slow to import and only sharded models need it.
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)
    if metadata is not None and resuming:
        load_sparsity_state(model, metadata.get("state", {}))


def check_table(model: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Compare the table of sparse weights in `metadata` with the model's.

    Raises:
        CheckpointError: naming the first weight whose pattern or reduction dimensions differ.
    """
    here, there = describe(model)["layers"], metadata.get("layers", {})
    for name in sorted({*here, *there}):
        mine, theirs = _groups(here.get(name)), _groups(there.get(name))
        if mine != theirs:
            raise CheckpointError(
                f"{name} is {mine} in this model and {theirs} in the checkpoint; sparsify the model as it was trained"
            )


def sparsity_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the method remembers of each sparse weight (ASP's masks, the sum of learning rates), by weight name."""
    return {
        name: {"lr_sum": float(sparse.lr_sum), "preconditioned": sparse.preconditioned, "state": dict(sparse.state)}
        for name, _, sparse in sparse_weights(record.unwrap(model))
    }


def load_sparsity_state(model: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Give back what `sparsity_state` returned.

    Raises:
        CheckpointError: if it names a weight that is not sparse in `model`.
    """
    weights = {name: sparse for name, _, sparse in sparse_weights(record.unwrap(model))}
    for name, memory in state.items():
        if name not in weights:
            raise CheckpointError(f"the method's state names {name}, which is not a sparse weight of this model")
        if missing := {"lr_sum", "preconditioned", "state"} - set(memory):
            raise CheckpointError(f"the method's state of {name} lacks {', '.join(sorted(missing))}")
    for name, memory in state.items():
        weights[name].state = dict(memory["state"])
        weights[name].lr_sum = memory["lr_sum"]
        weights[name].preconditioned = memory["preconditioned"]


def strip_prefix(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`state_dict` without a ``module.`` or ``_orig_mod.`` that all its names carry (wrappers add them)."""
    state = dict(state_dict)
    for prefix in (*_PREFIXES, *_PREFIXES):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def find_parts(payload: Any, path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The state dict and, if it is one of ours, the metadata in what a checkpoint file of any engine held.

    Raises:
        CheckpointError: if there is no state dict in it.
    """
    if isinstance(payload, Mapping):
        holders = [payload, *(value for value in payload.values() if isinstance(value, Mapping))]
        metadata = next((h[METADATA] for h in holders if METADATA in h), None)
        if metadata is not None and metadata["format"] > FORMAT:
            raise CheckpointError(f"{path} was written by a newer nm-sparsity (format {metadata['format']}): update it")
        clean = strip_prefix if metadata is None else dict  # our own names are the model's
        for key in ("state_dict", "model"):
            if isinstance(payload.get(key), Mapping):
                return clean(payload[key]), metadata
        if any(isinstance(value, Tensor) for value in payload.values()):
            return clean({k: v for k, v in payload.items() if k != METADATA}), metadata
    raise CheckpointError(f'{path} holds no state dict: neither names of tensors nor a "state_dict" or "model" entry')


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _names(model: nn.Module) -> dict[int, list[str]]:
    """id(parameter) -> all its names in the state dict: several when tied."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
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
        if _shape(value) != _shape(state[name]):
            raise CheckpointError(
                f"{name} has shape {_shape(value)} in {kind} and {_shape(state[name])} in the checkpoint"
            )


def _groups(entry: Any) -> str:
    return "dense" if entry is None else f"{entry[0]} along dimensions {list(entry[1])}"


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
