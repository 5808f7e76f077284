"""How an N:M weight lies in a packed file: the N kept values of each group, and their positions as bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nm_sparsity.core import masks
from nm_sparsity.core.errors import CheckpointError, VerificationError
from nm_sparsity.core.files.metadata import DAMAGE
from nm_sparsity.core.masks.groups import reduction_last, restore_order
from nm_sparsity.core.pattern import Placement, Table

FORMAT = "nm_sparsity.packed 2"
POSITIONS = ".nm_positions"
"""Added to a weight's name: the positions of its kept values within their groups, ceil(log2 M) bits each."""


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
    positions = torch.arange(pattern.m, device="cpu").expand_as(mask)[mask].numpy().astype(np.uint32)
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
    rows = values.new_zeros(values.shape[0], pattern.m).scatter_(1, index, values)
    return restore_order(rows, shape, dims).contiguous()


def _position_bits(m: int) -> int:
    return (m - 1).bit_length()


def unpack_all(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], where: str | Path
) -> tuple[dict[str, Tensor], Table]:
    """The dense state dict and the table of sparse weights, from what a packed file called `where` holds.

    Raises:
        CheckpointError: if its header does not fit its tensors.
    """
    table: Table = {}
    try:
        layers, tied = json.loads(header["layers"]), json.loads(header["tied"])
        state = {name: value for name, value in tensors.items() if name.removesuffix(POSITIONS) not in layers}
        for name, layer in layers.items():
            table[name] = Placement.from_plain((layer["pattern"], layer["dims"]))
            state[name] = unpack(tensors[name], tensors[name + POSITIONS], table[name], torch.Size(layer["shape"]))
        state.update({alias: state[name] for alias, name in tied.items()})
    except DAMAGE as error:
        raise CheckpointError(f"the metadata of {where} does not fit its tensors: {error}") from error
    return state, table
