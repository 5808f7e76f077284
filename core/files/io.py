"""Files written atomically, and loaded without ever running code from them."""

from __future__ import annotations

import os
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from nm_sparsity.core.errors import CheckpointError


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
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
