"""Work in a Python process of its own, which may die or hang: it is asked in JSON and answers in JSON, line by line."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_ERROR = "child error"
_CHILD = "NM_SPARSITY_CHILD"
"""Set in a child: its own children stay in its group of processes."""


class ChildError(Exception):
    """Why a child ended before its work: in one line."""


def answers(
    module: str, request: Any, seconds: float, first: float = 0.0, total: float | None = None, quiet: bool = False
) -> Iterator[Any]:
    """What ``python -m <module>`` answers to `request` (see `serve`), one value at a time as it comes.

    The child imports from where this process does. It is ended when the iteration is.

    Args:
        seconds: the longest wait for an answer.
        first: for the first one, if that is longer.
        total: for all of them.
        quiet: drop what the child prints.

    Raises:
        ChildError: if it could not be started, failed, was ended by a signal, or ran out of time.
    """
    if not sys.executable:
        raise ChildError("this Python does not know its own program, so it cannot start a second one")
    environment = {**os.environ, _CHILD: "1", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            env=environment,
            start_new_session=_CHILD not in os.environ,  # so that what it starts, other children too, ends with it
        )
    except OSError as error:
        raise ChildError(f"no process could be started: {error.strerror or error}") from error
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its exit status will say why
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
        end = None if total is None else time.monotonic() + total
        for line in _lines(process, seconds, max(first, seconds), end):
            try:
                answer = json.loads(line)
            except ValueError:
                raise ChildError(f"it answered what is no JSON: {line[:80]!r}") from None
            if isinstance(answer, dict) and _ERROR in answer:
                raise ChildError(answer[_ERROR])
            yield answer
        status = process.wait()
        if status:
            raise ChildError(_reason(status))
    finally:
        with contextlib.suppress(ProcessLookupError):
            if _CHILD in os.environ:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _lines(process: subprocess.Popen[bytes], seconds: float, first: float, end: float | None) -> Iterator[bytes]:
    """The lines that a process writes.

    Raises:
        ChildError: if one takes longer than `seconds`, or it is `end` by the monotonic clock.
    """
    assert process.stdout is not None
    pipe, rest = process.stdout.fileno(), b""
    wait_until, waited = time.monotonic() + first, first
    while True:
        now = time.monotonic()
        last = wait_until if end is None else min(wait_until, end)
        if not select.select([pipe], [], [], max(0.0, last - now))[0]:
            raise ChildError("it ran out of time" if last == end else f"no answer for {waited:g} s")
        if not (read := os.read(pipe, 1 << 16)):
            return
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            yield line
            wait_until, waited = time.monotonic() + seconds, seconds


def _reason(status: int) -> str:
    if status > 0:
        return f"it ended with exit status {status}"
    try:
        return f"it was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was ended by signal {-status}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def serve(work: Callable[[Any, Callable[[Any], None]], None]) -> int:
    """The child's side: call ``work(request, answer)``, in which ``answer(value)`` sends; returns the exit status.

    What anything prints goes to stderr. An exception becomes the last answer.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.load(sys.stdin)

    def answer(value: Any) -> None:
        out.write(json.dumps(value) + "\n")

    try:
        work(request, answer)
    except Exception as error:
        answer({_ERROR: f"{type(error).__name__}: {first_line(error)}"})
        return 1
    return 0
