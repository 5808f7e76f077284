"""Folders that commands write into, and the checkpoint in them that a command is to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nm_sparsity.core.errors import CheckpointError, SparsityError


def make_folder(folder: Path) -> Path:
    """Make `folder` and those above it where they are not there, and see that files can be written in it.

    Call it before hours of work rather than after them.

    Raises:
        SparsityError: if it cannot be made or written, naming it and why.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise SparsityError(f"cannot write to the folder {folder}: {error.strerror}; choose another place") from None
    return folder


def find_checkpoint(path: Path, names: Sequence[str]) -> Path:
    """`path` itself if it is a file, or in a run folder the first that is there of `names`.

    Raises:
        CheckpointError: if there is none.
    """
    found = [path] if not path.is_dir() else [path / name for name in names]
    for file in found:
        if file.is_file():
            return file
    if path.is_dir():
        raise CheckpointError(f"{path} holds neither {' nor '.join(names)}; is it a run folder?")
    raise CheckpointError(f"there is no checkpoint {path}")
