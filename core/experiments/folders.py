"""Folders that commands write into."""

from __future__ import annotations

from pathlib import Path

from nm_sparsity.core.errors import SparsityError


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
