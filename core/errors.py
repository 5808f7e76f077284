"""Errors made for people: they name the thing, what was expected, what was found, and the way out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps


class SparsityError(ValueError):
    """A mistake that the user can mend. Command lines print it without a traceback."""


class CheckpointError(SparsityError):
    """A file that is missing, damaged, foreign, unsafe, or does not fit the model."""


class VerificationError(SparsityError):
    """A weight that breaks its N:M pattern."""


def command_line(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a ``main``: a `SparsityError` becomes ``error: ...`` on stderr and exit status 1.

    The wrapped function returns the exit status; ``main`` may return ``None`` for 0.
    """

    @wraps(main)
    def run(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except SparsityError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
