"""Files written atomically, and loaded without ever running code from them."""

from __future__ import annotations

import os
import pickle
import re
import secrets
import socket
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

    Where `path` is a link, the file that it points to is replaced. Temporary files that processes of this machine left
    in the folder when they were killed are removed.

    Raises:
        CheckpointError: if the disk is full or the folder not writable; a file that was there before stays.
    """
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a character that no path can have
        raise CheckpointError(f"could not write {str(path)!r}: {error}") from error
    temporary = target.with_name(f"{_TEMPORARY}{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError of its zip writer.
        raise CheckpointError(f"could not write {path} ({error}); the previous file, if any, is unchanged") from error
    finally:
        with suppress(OSError):  # of a folder that cannot be looked into
            temporary.unlink(missing_ok=True)


_TEMPORARY = f".nm_sparsity.{socket.gethostname()}."
"""How the names of temporary files begin: a process is known by its number only on its own machine."""


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files of processes that are no more."""
    for name in os.listdir(folder):
        found = name.startswith(_TEMPORARY) and re.fullmatch(r"(\d+)\.[0-9a-f]+\.tmp", name.removeprefix(_TEMPORARY))
        if found and not _is_alive(int(found[1])):
            (folder / name).unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # Signal 0 only asks.
    except (ProcessLookupError, OverflowError):  # or a number that no process has
        return False
    except OSError:
        pass
    return True


def load(path: str | Path) -> Any:
    """What `save` or any ``torch.save`` of tensors and plain containers wrote, on the CPU.

    A file is read once more than torch does it, for the checksums that lie in it (a second for each 2 GB or so): torch
    itself would load one with a flipped bit.

    Raises:
        CheckpointError: if the file is missing, truncated, damaged, foreign, or would run code.
    """
    if not os.path.isfile(path):  # of a path that cannot be one, too
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        if zipfile.is_zipfile(path):
            _check_sums(path)
        # Foreign files may be of another pickle protocol, which torch warns about.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "class" in str(error):
            raise CheckpointError(
                f"{path} holds more than tensors and plain values and was not loaded, since that would run code from "
                'it; save only a state dict, e.g. torch.save({"state_dict": model.state_dict()}, path)'
            ) from error
        raise CheckpointError(f"{path} is not a PyTorch checkpoint") from error
    except Exception as error:  # torch's reader answers damage with whatever it stumbles over.
        raise CheckpointError(f"{path} is truncated or not a PyTorch checkpoint") from error


def _check_sums(path: str | Path) -> None:
    """Compare every entry of a zip file with its CRC-32, which also finds what is wrong with names and sizes."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise CheckpointError(
                f"{path} is damaged: its entry {damaged} does not have the checksum that it was written with; "
                "take another copy or an earlier checkpoint"
            )
