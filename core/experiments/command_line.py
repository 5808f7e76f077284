"""What commands do alike: one line and an exit status for a mistake, renamed options, what to try next."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps

from nm_sparsity.core.errors import SparsityError


def command_line(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a ``main``: what its user can mend becomes ``error: ...`` on stderr and exit status 1.

    That is a `SparsityError`, and what the system says of files and folders. The wrapped function returns the exit
    status; ``main`` may return ``None`` for 0.
    """

    @wraps(main)
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
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """An `argparse` parser whose help begins with `description` as it is written and names the command as one calls it.

    From Python 3.14 on `argparse` finds that name by itself.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
    return argparse.ArgumentParser(program, None, description, formatter_class=argparse.RawDescriptionHelpFormatter)


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """A block in which SIGTERM does nothing but make what it yields return True; a second one ends the process at once.

    So what cannot be left undone is finished and saved first. Outside the main thread, where Python handles no signal,
    it changes nothing.
    """
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before)


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
