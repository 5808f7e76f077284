"""What a checkpoint of ours says of itself: the one reader and writer of the entry ``nm_sparsity``."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nm_sparsity.core.errors import CheckpointError
from nm_sparsity.core.masks.groups import reduction_size
from nm_sparsity.core.model import record
from nm_sparsity.core.pattern import Placement, Table

METADATA = "nm_sparsity"
"""The key of this entry in every checkpoint file of ours, beside the state dict."""

FORMAT = 2
"""The format that is written. Older ones are read; a newer one is refused. Format 1 knew no `shadows`."""

DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What reading an entry that is not of the expected kind ends in."""

_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Metadata:
    """The entry's content. `dropped`, `shadows`, `tied` and `state` are what a resume needs; a finalized file has none
    of them."""

    method: str
    hyperparameters: dict[str, Any]
    layout: str
    layers: Table
    """The sparse weights: the only truth of what is N:M, mixed patterns included."""
    unfinished: str = ""
    """Why the weights are not N:M yet, if they are not."""
    dropped: dict[str, Tensor] = field(default_factory=dict)
    """Of each sparse weight, the values of the entries that are zero in the state dict, in memory order."""
    shadows: dict[str, Tensor] = field(default_factory=dict)
    """The dense weights of which the values in the state dict are no selection; they have no entry in `dropped`."""
    tied: dict[str, str] = field(default_factory=dict)
    """Other name -> the name in `layers`, of weights with several names."""
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the method remembers of each weight, see `sparsity_state`."""

    @classmethod
    def of(cls, model: nn.Module) -> Metadata:
        """That of a sparsified or finalized model, without what a resume needs."""
        found = record.any_of(model)
        return cls(found.method, dict(found.hyperparameters), found.layout, record.table(model))

    @classmethod
    def from_dict(cls, raw: Any, where: str | Path = "the checkpoint") -> Metadata:
        """Read the entry of a file called `where` in messages; what was read already passes through.

        Raises:
            CheckpointError: if it is of a newer format, or anything in it is not of the kind that `to_dict` writes.
        """

        def read(key: str, convert: Callable[[Any], Any], *default: Any) -> Any:
            if key not in raw and default:
                return default[0]
            try:
                return convert(raw[key])
            except DAMAGE as error:
                found = f"{key} is {_brief(raw[key])}" if key in raw else f"it lacks {key}"
                raise CheckpointError(f'the entry "{METADATA}" of {where} is damaged: {found}') from error

        if isinstance(raw, Metadata):
            return raw
        if not isinstance(raw, Mapping):
            raise CheckpointError(f'the entry "{METADATA}" of {where} is damaged: it is {_brief(raw)}')
        if read("format", _positive) > FORMAT:
            raise CheckpointError(f"{where} was written by a newer nm-sparsity (format {raw['format']}): update it")
        return cls(
            method=read("method", _of(str)),
            hyperparameters=read("hyperparameters", _dict_of(_anything)),
            layout=read("layout", _of(str)),
            layers=read("layers", _dict_of(Placement.from_plain)),
            unfinished=read("unfinished", _of(str), ""),
            dropped=read("dropped", _dict_of(_of(Tensor)), {}),
            shadows=read("shadows", _dict_of(_of(Tensor)), {}),
            tied=read("tied", _dict_of(_of(str)), {}),
            state=read("state", read_state, {}),
        )

    def check_fits(self, state: Mapping[str, Any], where: str | Path = "the checkpoint") -> None:
        """Check that the table and the dropped values are of weights in the state dict `state`.

        Raises:
            CheckpointError: naming the first one that is missing, or to which its pattern cannot apply.
        """
        for name, placement in self.layers.items():
            if reason := why_not_placed(state.get(name), placement):
                raise CheckpointError(f"the table of sparse weights in {where} does not fit {name}: {reason}")
        for name, values in self.dropped.items():
            if name not in self.layers:
                raise CheckpointError(f"{where} holds dropped values of {name}, but no such sparse weight")
            if values.dim() != 1 or why_not_counted(values):
                found = why_not_counted(values) or f"they have shape {tuple(values.shape)}"
                raise CheckpointError(f"the dropped values of {name} in {where} are damaged: {found}")
        for name, shadow in self.shadows.items():
            if name not in self.layers or shadow.shape != state[name].shape or why_not_counted(shadow):
                raise CheckpointError(f"{where} holds dense weights of {name} that do not fit its sparse ones")
        known = {*self.dropped, *self.shadows}  # none in what was finalized
        if known and (missing := sorted(self.layers.keys() - known)):
            raise CheckpointError(f"{where} lacks the dropped values of {missing[0]}, and has those of others")
        for alias, name in self.tied.items():
            if name not in state:
                raise CheckpointError(f"{where} ties {alias} to {name}, which it does not hold")

    def to_dict(self) -> dict[str, Any]:
        """Plain containers of tensors, numbers and text, as files hold them."""
        layers = {name: placement.plain for name, placement in self.layers.items()}
        entry = {
            "format": FORMAT,
            "method": self.method,
            "hyperparameters": dict(self.hyperparameters),
            "layout": self.layout,
            "layers": layers,
        }
        more = {
            "unfinished": self.unfinished,
            "dropped": dict(self.dropped),
            "shadows": dict(self.shadows),
            "tied": dict(self.tied),
            "state": dict(self.state),
        }
        return {**entry, **{key: value for key, value in more.items() if value}}

    def finalized(self) -> Metadata:
        """This without what only a resume needs."""
        return replace(self, dropped={}, shadows={}, tied={}, state={})


def why_not_placed(value: Any, placement: Placement) -> str:
    """Why groups of a placement cannot lie in what a state dict holds under a name; empty if they can."""
    if not isinstance(value, Tensor):
        return "it is not in the state dict" if value is None else f"it is {type(value).__name__}, not a tensor"
    if max(placement.dims) >= value.dim():
        return f"it has shape {tuple(value.shape)} and no dimension {max(placement.dims)}"
    size = reduction_size(value.shape, placement.dims)
    if size % placement.pattern.m:
        return f"its reduction size {size} is not a multiple of {placement.pattern.m}"
    return why_not_counted(value)


def why_not_counted(value: Tensor) -> str:
    """Why a tensor's zeros cannot be counted; empty if they can."""
    if value.is_meta:
        return "it is on the meta device and has no values"
    if value.is_nested:
        return "it is a nested tensor"
    if value.layout is not torch.strided:
        return f"it is stored as {value.layout}, not densely"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "it is expanded: its entries share memory"
    if not value.dtype.is_floating_point or value.element_size() < 2:
        return f"{value.dtype}: masks need fp64, fp32, bf16 or fp16"
    return ""


def read_state(raw: Any) -> dict[str, dict[str, Any]]:
    """What `sparsity_state` returned, checked.

    Raises:
        one of `DAMAGE`: if it is not that.
    """
    return _dict_of(_memory)(raw)


def find_parts(payload: Any, path: str | Path) -> tuple[dict[str, Any], Metadata | None]:
    """The state dict and, if it is one of ours, the metadata in what a checkpoint file of any engine held.

    Raises:
        CheckpointError: if there is no state dict in it, or the metadata is damaged.
    """
    if isinstance(payload, Mapping):
        holders = [payload, *(value for value in payload.values() if isinstance(value, Mapping))]
        entry = next((h[METADATA] for h in holders if METADATA in h), None)
        metadata = None if entry is None else Metadata.from_dict(entry, path)
        clean = strip_prefix if metadata is None else dict  # our own names are the model's
        for key in ("state_dict", "model"):
            if isinstance(payload.get(key), Mapping):
                return _checked(clean(_named(payload[key], path)), metadata, path)
        if any(isinstance(value, Tensor) for value in payload.values()):
            state = {name: value for name, value in payload.items() if name != METADATA}
            return _checked(clean(_named(state, path)), metadata, path)
    raise CheckpointError(f'{path} holds no state dict: neither names of tensors nor a "state_dict" or "model" entry')


def _named(state: Mapping[Any, Any], path: str | Path) -> Mapping[str, Any]:
    if wrong := [name for name in state if not isinstance(name, str)]:
        raise CheckpointError(f"{path} holds no state dict: {_brief(wrong[0])} is no name of a tensor")
    return state


def _checked(
    state: dict[str, Any], metadata: Metadata | None, path: str | Path
) -> tuple[dict[str, Any], Metadata | None]:
    if metadata is not None:
        metadata.check_fits(state, path)
    return state, metadata


def strip_prefix(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`state_dict` without a ``module.`` or ``_orig_mod.`` that all its names carry (wrappers add them)."""
    state = dict(state_dict)
    for prefix in (*_PREFIXES, *_PREFIXES):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _of(*kinds: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise TypeError
        return value

    return convert


def _anything(value: Any) -> Any:
    return value


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _positive(value: Any) -> int:
    if _whole_number(value) < 1:
        raise ValueError
    return int(value)


def _dict_of(convert: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {_of(str)(name): convert(entry) for name, entry in value.items()}


def _memory(value: Any) -> dict[str, Any]:
    if isinstance(value["lr_sum"], bool) or not math.isfinite(value["lr_sum"]):
        raise ValueError
    steps = _whole_number(value.get("steps", 0))  # format 1 counted none
    if not 0 <= steps < 2**63:
        raise ValueError
    return {
        "steps": steps,
        "lr_sum": float(value["lr_sum"]),
        "preconditioned": _of(bool)(value["preconditioned"]),
        "state": _dict_of(_of(Tensor, int, float, str))(value["state"]),
    }


def _brief(value: Any) -> str:
    text = reprlib.repr(value)  # of any size and depth
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"
