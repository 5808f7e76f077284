"""What commands do alike: one line and an exit status for a mistake, renamed options, what to try next."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from nm_sparsity.core.errors import SparsityError

STOPS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
"""The signals that end a run once it is saved, and what is said of that; Ctrl-C is the first one."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, once its user was told what it left: a command says no more of it."""


def command_line(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a ``main``: what its user can mend becomes ``error: ...`` on stderr and exit status 1.

    That is a `SparsityError`, and what the system says of files and folders. A warning is a line too, said once. The
    wrapped function returns the exit status; ``main`` may return ``None`` for 0.
    """

    @wraps(main)
    @_warnings_as_lines()
    def run(*args: object, **kwargs: object) -> int:
        try:
            status = main(*args, **kwargs) or 0
            sys.stdout.flush()
            return status
        except SparsityError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # Whoever read the output has seen enough, as head has.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            what = error if error.filename is None else f"{str(error.filename)[:200]}: {error.strerror}"
            print(f"error: {what}", file=sys.stderr)
            return 1
        except Stopped:
            return 128 + signal.SIGINT
        except KeyboardInterrupt:
            print(STOPS[signal.SIGINT], file=sys.stderr)
            return 128 + signal.SIGINT

    return run


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """A block in which a warning that is shown is a line without the place in the code, and is shown once."""
    said = set()

    def as_line(message: Warning | str, *_: object) -> str:
        text = " ".join(str(message).split())
        if text in said:
            return ""
        said.add(text)
        return f"warning: {text}\n"

    before = warnings.formatwarning
    warnings.formatwarning = as_line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """An `argparse` parser whose help begins with `description` as it is written and names the command as one calls it.

    From Python 3.14 on `argparse` finds that name by itself.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    return argparse.ArgumentParser(program, None, description, formatter_class=argparse.RawDescriptionHelpFormatter)


ECHO = 1.0
"""Seconds within which another signal is an echo of the first one: timeout, torchrun and batch systems send one to a
process and to its group, so that it comes twice."""


class Stop:
    """What came of the signals of `STOPS`: the first one is noted, its echo is not heard, a later one acts at once."""

    def __init__(self) -> None:
        self.number = 0
        """The one that came first; 0 if none did."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def catch(self) -> None:
        """Note them from here on, but for one that the process ignores, as in the background of a shell.

        Outside the main thread, where Python handles no signal, it changes nothing.
        """
        if threading.current_thread() is threading.main_thread():
            handlers = {int(number): signal.getsignal(number) or signal.SIG_DFL for number in STOPS}
            self._before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._note)

    def release(self) -> None:
        """Let them act as they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
        elif now - self._since >= ECHO:
            self.release()
            signal.raise_signal(number)


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """A block in which a signal of `STOPS` does nothing but make what it yields return its number instead of 0.

    So what cannot be left undone is finished and saved first. A second one, no `ECHO`, acts at once, as it did outside.
    """
    stop = Stop()
    stop.catch()
    try:
        yield lambda: stop.number
    finally:
        stop.release()


def leave_stops(*_: object) -> None:
    """In a process that loads data for the one that trains, take the signals of `STOPS` from that one only.

    They go to all processes of a terminal or a batch job, and the one that trains decides what they mean; as it exits,
    it ends the others by SIGTERM. A second call changes nothing. Where no process can be told who sent a signal, as on
    macOS, they leave Ctrl-C alone only.
    """
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    parent = multiprocessing.parent_process()
    if parent is not None and not STOPS.keys() <= signal.pthread_sigmask(signal.SIG_BLOCK, STOPS):
        threading.Thread(target=_end_by, args=[parent.pid], daemon=True).start()


def _end_by(parent: int) -> None:
    while signal.sigwaitinfo(STOPS).si_pid != parent:
        pass
    os._exit(0)


def say_renamed(old: str, new: str) -> None:
    """Say on stderr that the name `old` still works, and which one replaces it."""
    print(f"{old} is called {new} now; the old name goes with the next version", file=sys.stderr)


def present_names(arguments: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """`arguments` with the option names of the version before replaced by the present ones, saying so.

    Args:
        renamed: old option -> new one. One that ends in a dot is the beginning of many: with ``{"--sparsity.": "--"}``,
            ``--sparsity.pattern=1:4`` becomes ``--pattern=1:4``.
    """
    result = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        for old, new in renamed.items():
            if option == old or (old.endswith(".") and option.startswith(old)):
                say_renamed(option, new + option.removeprefix(old))
                option = new + option.removeprefix(old)
                break
        result.append(option + equals + value)
    return result


def gather_values(arguments: Sequence[str], lists: Sequence[str], mappings: Sequence[str] = ()) -> list[str]:
    """`arguments` with each option of several values once, at the end, however often it was given.

    Args:
        lists: options whose values may follow each other, as in ``--exclude a b``, or be given one by one, as in
            ``--exclude a --exclude b``.
        mappings: those whose values are ``NAME=VALUE``; they become two words, as tyro reads them.
    """
    rest: list[str] = []
    found: dict[str, list[str]] = {}
    current = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option in (*lists, *mappings):
            found.setdefault(current := option, [])
            if not equals:
                continue
            argument = value
        elif argument.startswith("-"):
            current = ""
        if not current:
            rest.append(argument)
        elif current in mappings:
            found[current] += argument.rsplit("=", 1)
        else:
            found[current].append(argument)
    return [*rest, *(word for option, words in found.items() for word in (option, *words))]


def values_of(arguments: Sequence[str], option: str) -> list[str]:
    """What `arguments` give for `option`, as ``--option A B`` or ``--option=A``, in their order."""
    found: list[str] = []
    current = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            current = name == option
            found += [value] if current and equals else []
        elif current:
            found.append(argument)
    return found


def print_next_steps(steps: Mapping[str, str]) -> None:
    """Print what to try next: ``{what it does: Python module with its arguments}``, for this interpreter."""
    python = os.path.relpath(sys.executable)
    print("What to try next:")
    for what, command in steps.items():
        print(f"  {python} -m {command}\n      {what}")
