"""What commands do alike: one line and an exit status for a mistake, renamed options, what to try next."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps

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


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """A block in which a signal of `STOPS` does nothing but make what it yields return its number instead of 0.

    So what cannot be left undone is finished and saved first. A second one acts at once, as it did outside. One that
    the process ignores, as in the background of a shell, stays ignored. Outside the main thread, where Python handles
    no signal, it changes nothing.
    """
    asked = 0

    def note(number: int, _: object) -> None:
        nonlocal asked
        asked = number
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPS}
    before = {int(number): handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def print_next_steps(steps: Mapping[str, str]) -> None:
    """Print what to try next: ``{what it does: Python module with its arguments}``, for this interpreter."""
    python = os.path.relpath(sys.executable)
    print("What to try next:")
    for what, command in steps.items():
        print(f"  {python} -m {command}\n      {what}")
