"""What a checkpoint of ours says of itself: the one reader and writer of the entry ``nm_sparsity``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nm_sparsity.core.errors import CheckpointError
from nm_sparsity.core.model import record
from nm_sparsity.core.pattern import NMPattern, Placement, Table

METADATA = "nm_sparsity"
"""The key of this entry in every checkpoint file of ours, beside the state dict."""

FORMAT = 1
"""The format that is written. Older ones are read; a newer one is refused."""

_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Metadata:
    """The entry's content. `dropped`, `tied` and `state` are what a resume needs; a finalized file has none of them."""

    method: str
    hyperparameters: dict[str, Any]
    layout: str
    layers: Table
    """The sparse weights: the only truth of what is N:M, mixed patterns included."""
    dropped: dict[str, Tensor] = field(default_factory=dict)
    """Of each sparse weight, the values of the entries that are zero in the state dict, in memory order."""
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
            except (LookupError, TypeError, ValueError, AttributeError) as error:
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
            layers=read("layers", _dict_of(_placement)),
            dropped=read("dropped", _dict_of(_of(Tensor)), {}),
            tied=read("tied", _dict_of(_of(str)), {}),
            state=read("state", _dict_of(_dict_of(_anything)), {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers of tensors, numbers and text, as files hold them."""
        layers = {name: (str(pattern), list(dims)) for name, (pattern, dims) in self.layers.items()}
        entry = {
            "format": FORMAT,
            "method": self.method,
            "hyperparameters": dict(self.hyperparameters),
            "layout": self.layout,
            "layers": layers,
        }
        resume = {"dropped": dict(self.dropped), "tied": dict(self.tied), "state": dict(self.state)}
        return {**entry, **{key: value for key, value in resume.items() if value}}

    def finalized(self) -> Metadata:
        """This without what only a resume needs."""
        return replace(self, dropped={}, tied={}, state={})


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
                return clean(payload[key]), metadata
        if any(isinstance(value, Tensor) for value in payload.values()):
            return clean({k: v for k, v in payload.items() if k != METADATA}), metadata
    raise CheckpointError(f'{path} holds no state dict: neither names of tensors nor a "state_dict" or "model" entry')


def strip_prefix(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`state_dict` without a ``module.`` or ``_orig_mod.`` that all its names carry (wrappers add them)."""
    state = dict(state_dict)
    for prefix in (*_PREFIXES, *_PREFIXES):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _of(kind: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, kind):
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


def _placement(value: Any) -> Placement:
    pattern, dims = value
    if not dims or min(map(_whole_number, dims)) < 0:
        raise ValueError
    return Placement(NMPattern.parse(pattern), tuple(dims))


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"
