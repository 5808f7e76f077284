"""A compact file of a finalized model: per group the N kept values and their positions, in safetensors.

2:4 in half precision takes 0.5625 of the dense bytes: half the values, and 2 bits for the position of each. Any N:M
packs, on the CPU, and unpacks to the same bits (a dropped -0 becomes +0).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nm_sparsity.core import masks
from nm_sparsity.core.errors import CheckpointError, SparsityError, VerificationError
from nm_sparsity.core.files.io import load, replacing
from nm_sparsity.core.files.metadata import find_parts
from nm_sparsity.core.masks.groups import reduction_last, restore_order
from nm_sparsity.core.model import record
from nm_sparsity.core.model.wrappers import unwrap
from nm_sparsity.core.pattern import NMPattern, Placement, Table

FORMAT = "nm_sparsity.packed 2"
POSITIONS = ".nm_positions"
"""Added to a weight's name: the positions of its kept values within their groups, ceil(log2 M) bits each."""


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
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise SparsityError(f"{name} is {type(value).__name__}: only tensors can be packed")
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        value = value.detach().cpu()
        if value.numel() and first.setdefault(place, name) != name:
            tied[name] = first[place]
        elif name in table:
            pattern, dims = placement = table[name]
            tensors[name], tensors[name + POSITIONS] = pack(name, value, placement)
            layers[name] = {"pattern": str(pattern), "dims": list(dims), "shape": list(value.shape)}
        else:
            tensors[name] = value.contiguous()
    metadata = {"format": FORMAT, "layers": json.dumps(layers), "tied": json.dumps(tied)}
    metadata["sha256"] = _digest(tensors, metadata)
    # Not save_file: that makes a file which only its owner can read.
    content = _safetensors().torch.save(tensors, metadata)
    with replacing(path) as file:
        file.write(content)
    return Path(path)


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The dense state dict in a packed file, zeros in place.

    Raises:
        CheckpointError: if the file is missing, damaged (a checksum covers all of it), or its metadata does not fit its
            tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise CheckpointError(f'{path} is not a packed file of ours: its format is "{found}", expected "{FORMAT}"')
    if metadata.get("sha256") != _digest(tensors, metadata):
        raise CheckpointError(f"{path} is damaged: its content does not have the checksum it was written with")
    try:
        layers, tied = json.loads(metadata["layers"]), json.loads(metadata["tied"])
        state = {name: value for name, value in tensors.items() if name.removesuffix(POSITIONS) not in layers}
        for name, layer in layers.items():
            placement = Placement(NMPattern.parse(layer["pattern"]), tuple(map(int, layer["dims"])))
            state[name] = unpack(tensors[name], tensors[name + POSITIONS], placement, torch.Size(layer["shape"]))
        state.update({alias: state[name] for alias, name in tied.items()})
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the metadata of {path} does not fit its tensors: {error}") from error
    return state


def pack(name: str, w: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """(kept values of shape (groups, N), their positions as bytes) of an N:M weight.

    Raises:
        VerificationError: naming the weight, if it breaks its pattern.
    """
    pattern, dims = placement
    rows = reduction_last(w, dims).reshape(-1, pattern.m)
    mask = reduction_last(masks.nm_mask(w, pattern, dims), dims).reshape(-1, pattern.m)
    if rows[~mask].count_nonzero():
        raise VerificationError(f"{name} is not {pattern}: finalize the model before packing it")
    positions = torch.arange(pattern.m).expand_as(mask)[mask].numpy().astype(np.uint32)
    width = np.arange(_position_bits(pattern.m), dtype=np.uint32)
    bits = np.packbits(((positions[:, None] >> width) & 1).astype(np.uint8))
    return rows[mask].reshape(-1, pattern.n), torch.from_numpy(bits)


def unpack(values: Tensor, positions: Tensor, placement: Placement, shape: torch.Size) -> Tensor:
    """The inverse of `pack`: the weight of `shape` with its zeros.

    Raises:
        ValueError: if the parts do not fit each other.
    """
    pattern, dims = placement
    width = _position_bits(pattern.m)
    if values.shape != (shape.numel() // pattern.m, pattern.n) or shape.numel() % pattern.m:
        raise ValueError(f"{tuple(values.shape)} values for a weight of {tuple(shape)} at {pattern}")
    if positions.dtype != torch.uint8 or positions.numel() != -(-values.numel() * width // 8):
        raise ValueError(f"{positions.numel()} bytes of positions for {values.numel()} values at {pattern}")
    bits = np.unpackbits(positions.numpy(), count=values.numel() * width).reshape(-1, width)
    index = torch.from_numpy((bits.astype(np.int64) << np.arange(width)).sum(1)).reshape(values.shape)
    if index.numel() and (index.max() >= pattern.m or not (index.diff(dim=1) > 0).all()):
        raise ValueError(f"positions are not {pattern.n} different ones below {pattern.m} in rising order")
    rows = torch.zeros(values.shape[0], pattern.m, dtype=values.dtype).scatter_(1, index, values)
    return restore_order(rows, shape, dims).contiguous()


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of everything that is in a packed file but itself."""
    described = [metadata.get(key) for key in ("format", "layers", "tied")]
    described += [[name, str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())]  # type: ignore[misc]
    digest = hashlib.sha256(json.dumps(described).encode())
    for _, t in sorted(tensors.items()):
        digest.update(t.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _position_bits(m: int) -> int:
    return (m - 1).bit_length()


def _state_and_table(source: nn.Module | Mapping[str, Any] | str | Path) -> tuple[Mapping[str, Any], Table]:
    if isinstance(source, nn.Module):
        model = unwrap(source)
        table = record.table(model)
        if not table or any(found.table is None for _, found in record.records(model)):
            raise SparsityError(f"{type(model).__name__} is not a finalized sparse model: call finalize(model) first")
        return model.state_dict(), table
    where = "the checkpoint" if isinstance(source, Mapping) else str(source)
    payload = source if isinstance(source, Mapping) else load(source)
    state, metadata = find_parts(payload, where)
    if metadata is None:
        raise SparsityError(f'{where} carries no table of sparse weights; make one with "nm-sparsity finalize" first')
    return state, metadata.layers


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise SparsityError('packed files need safetensors: pip install "nm-sparsity[export]"') from error
    return safetensors
