"""Safetensors files of ours: any loader reads them, and a checksum of all that is in them tells of damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nm_sparsity.core.errors import CheckpointError, SparsityError
from nm_sparsity.core.files.io import replacing

SUM = "sha256"
"""The name of the checksum in a file's header."""


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write `tensors`, which must not share memory, with `header` and the checksum of both.

    Raises:
        SparsityError: if safetensors is not installed.
        CheckpointError: if the file cannot be written.
    """
    # Not save_file: that makes a file which only its owner can read.
    content = _safetensors().torch.save(dict(tensors), {**header, SUM: checksum(tensors, header)})
    with replacing(path) as file:
        file.write(content)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of anybody's safetensors file.

    Raises:
        SparsityError: if safetensors is not installed.
        CheckpointError: if the file is missing or damaged, which only a file of ours tells wherever the damage is.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    safetensors = _safetensors()
    try:
        # Older versions of safetensors follow torch's default device.
        with torch.device("cpu"), safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    of_ours = SUM in header or any("nm_sparsity" in entry for entry in (*header, header.get("format", "")))
    if of_ours and header.get(SUM) != checksum(tensors, header):
        raise CheckpointError(f"{path} is damaged: its content does not have the checksum it was written with")
    return tensors, header


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do, with the length of a JSON header and the header.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of everything that is in a file of ours but itself."""
    described = [header.get(key) for key in ("format", "layers", "tied")]
    described += [header[key] for key in ("nm_sparsity",) if key in header]
    described += [[name, str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())]  # type: ignore[misc]
    digest = hashlib.sha256(json.dumps(described).encode())
    for _, t in sorted(tensors.items()):
        digest.update(t.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def without_ties(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`state` on the CPU with each weight once, by its first name; and the other names of weights that have several.

    Raises:
        SparsityError: for what is no tensor.
    """
    once: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise SparsityError(f"{name} is {type(value).__name__}: safetensors files hold only tensors")
        if value.numel() and first.setdefault(place(value), name) != name:
            tied[name] = first[place(value)]
        else:
            once[name] = value.detach().cpu()
    return once, tied


def place(value: Tensor) -> Any:
    """What two names of one tensor have in common."""
    if value.is_meta or value.is_nested or value.layout is not torch.strided:
        return id(value)
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise SparsityError('safetensors files need safetensors: pip install "nm-sparsity[export]"') from error
    return safetensors
