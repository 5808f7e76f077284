"""What every command of ours does alike: mistakes end in one line and an exit status, never in a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

from nm_sparsity.core.errors import SparsityError


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
