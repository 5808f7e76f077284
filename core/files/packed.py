"""A compact file of a finalized model: per group the N kept values and their positions, in safetensors.

2:4 in half precision takes 0.5625 of the dense bytes: half the values, and 2 bits for the position of each. Any N:M
packs, on the CPU, and unpacks to the same bits (a dropped -0 becomes +0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nm_sparsity.core.errors import CheckpointError, SparsityError, VerificationError
from nm_sparsity.core.files import sealed
from nm_sparsity.core.files.codec import FORMAT, POSITIONS, pack, unpack_all
from nm_sparsity.core.files.contents import read
from nm_sparsity.core.model import record
from nm_sparsity.core.model.wrappers import unwrap
from nm_sparsity.core.pattern import Table


def save_packed(path: str | Path, source: nn.Module | Mapping[str, Any] | str | Path) -> Path:
    """Write a finalized model, or a checkpoint of ours (its payload or file), packed.

    Raises:
        SparsityError: if there is no table of sparse weights, or safetensors is not installed.
        VerificationError: if a weight breaks its pattern.
        CheckpointError: if a file cannot be read or written.
    """
    state, table = _state_and_table(source)
    if missing := table.keys() - state.keys():
        raise VerificationError(f"the table of sparse weights names {min(missing)}, which is not in the state dict")
    once, tied = sealed.without_ties(state)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, value in once.items():
        if name in table:
            pattern, dims = placement = table[name]
            tensors[name], tensors[name + POSITIONS] = pack(name, value, placement)
            layers[name] = {"pattern": str(pattern), "dims": list(dims), "shape": list(value.shape)}
        else:
            tensors[name] = value.contiguous()
    sealed.write(path, tensors, {"format": FORMAT, "layers": json.dumps(layers), "tied": json.dumps(tied)})
    return Path(path)


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The dense state dict in a packed file, zeros in place.

    Raises:
        CheckpointError: if the file is missing, damaged (a checksum covers all of it), or its metadata does not fit its
            tensors.
    """
    tensors, header = sealed.read(path)
    if header.get("format") != FORMAT:
        found = header.get("format")
        raise CheckpointError(f'{path} is not a packed file of ours: its format is "{found}", expected "{FORMAT}"')
    return unpack_all(tensors, header, path)[0]


def _state_and_table(source: nn.Module | Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], Table]:
    if isinstance(source, nn.Module):
        model = unwrap(source)
        table = record.table(model)
        if not table or any(found.table is None for _, found in record.records(model)):
            raise SparsityError(f"{type(model).__name__} is not a finalized sparse model: call finalize(model) first")
        return model.state_dict(), table
    contents = read(source)
    if contents.metadata is None:
        raise SparsityError(
            f'{contents.where} carries no table of sparse weights; make one with "nm-sparsity finalize" first'
        )
    return contents.state, contents.metadata.layers
