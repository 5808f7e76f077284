"""Folders that commands write into, and the checkpoint in them that a command is to read."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from nm_sparsity.core.errors import CheckpointError, SparsityError

LOCK = ".lock"
"""The file in a folder that is being written into; it says by whom."""

_held: set[int] = set()
"""Descriptors of the locks of this process."""


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


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A block in which no other process writes into `folder`, which is made where it is not there.

    A process that dies holds it no longer, however it dies. Of processes that train together (torchrun's, SLURM's or
    MPI's) the first one holds it for all.

    Raises:
        SparsityError: if another process holds it, naming that one, or the folder cannot be written.
    """
    if any(os.environ.get(rank, "0") != "0" for rank in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")):
        yield
        return
    made = not folder.exists()
    make_folder(folder)
    lock = _lock(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        _held.discard(lock)
        os.close(lock)
        if made:
            with suppress(OSError):
                folder.rmdir()  # if nothing was written


def _lock(folder: Path) -> int:
    """The descriptor of the lock file, locked."""
    while True:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 1000).decode(errors="replace")
            os.close(lock)
            raise SparsityError(
                f"{folder} is in use{_about(owner)}: wait until it is done, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            warnings.warn(f"{folder} cannot be locked: see that nothing else writes there", UserWarning, stacklevel=4)
        # Whoever held it before may have removed the file meanwhile: then it is another one that counts.
        with suppress(FileNotFoundError):
            if os.path.sameopenfile(lock, there := os.open(folder / LOCK, os.O_RDONLY)):
                os.close(there)
                break
            os.close(there)
        os.close(lock)
    if not _held:
        os.register_at_fork(after_in_child=_let_go)  # a worker that outlives its parent must not hold the folder
    _held.add(lock)
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    os.truncate(lock, 0)
    os.write(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
    return lock


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


def _about(owner: str) -> str:
    try:
        found = json.loads(owner)
        return f" by process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, LookupError, TypeError):
        return " by another process"


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the name `out` when the block is done; if the block fails, it is removed.

    Raises:
        SparsityError: if it cannot be written, or there is something called `out` by then.
    """
    make_folder(out.parent)
    try:
        # Inside of another one, which nobody but its owner may enter.
        with tempfile.TemporaryDirectory(prefix=f".{out.name[:100]}.", suffix=".partial", dir=out.parent) as outer:
            inner = Path(outer) / "folder"
            inner.mkdir()
            yield inner
            inner.rename(out)
    except OSError as error:
        raise SparsityError(f"cannot write {out}: {error.strerror or error}") from error


def results_folder(run: Path | None, out: Path | None, names: Sequence[str]) -> Path | None:
    """Where an evaluation writes the files `names`; ``None``: nowhere, it only prints.

    It renews those of a `run` that is evaluated as it stands. Of anything else (a file, another checkpoint or other
    settings: then `run` is ``None``) it writes where `out` says, over nothing.

    Raises:
        SparsityError: if `out` holds one of them already, or the folder cannot be written.
    """
    if out is None:
        return None if run is None else make_folder(run)
    if there := [name for name in names if (out / name).exists()]:
        raise SparsityError(f"{out} holds {', '.join(there)} already: choose another --out")
    return make_folder(out)


def what_was_written(names: Sequence[str], folder: Path | None) -> str:
    """What an evaluation says of its files `names` in the folder that `results_folder` gave."""
    return "nothing is written (--out FOLDER)" if folder is None else f"wrote {', '.join(names)} into {folder}"


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
