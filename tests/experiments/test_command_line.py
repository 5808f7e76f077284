"""One spelling of options at every command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nm_sparsity.core.experiments import command_line as module
from nm_sparsity.core.experiments.command_line import STOPS, command_line, gather_values, stopping, values_of


@pytest.mark.parametrize(
    "given",
    [
        "--epochs 3 --exclude a b --patterns x.*=1:4 y=dense --resume",
        "--epochs 3 --exclude a --exclude b --patterns x.*=1:4 --patterns y=dense --resume",
        "--epochs 3 --exclude=a --patterns=x.*=1:4 --exclude=b --resume --patterns=y=dense",
        "--exclude a b --epochs 3 --resume --patterns x.* 1:4 y dense",
    ],
)
def test_values_follow_each_other_or_come_one_by_one(given: str) -> None:
    found = gather_values(given.split(), ("--include", "--exclude"), ("--patterns",))
    assert " ".join(found) == "--epochs 3 --resume --exclude a b --patterns x.* 1:4 y dense"


def test_values_are_found_however_they_are_given() -> None:
    given = ["--method", "ste", "--epochs=3", "--hyperparameters", "a", "1", "b", "2", "--method=asp", "--resume"]
    assert values_of(given, "--method") == ["ste", "asp"]
    assert values_of(given, "--hyperparameters") == ["a", "1", "b", "2"]
    assert values_of(given, "--resume") == values_of(given, "--out") == []


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """The signals that came through to what the process does with them."""
    numbers: list[int] = []
    before = {number: signal.signal(number, lambda number, _: numbers.append(number)) for number in STOPS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_noted_its_echo_is_not_heard_and_a_later_one_acts(
    heard: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopping() as asked:
        assert asked() == 0
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert (asked(), heard) == (signal.SIGTERM, [])
        monkeypatch.setattr(module, "ECHO", 0.0)  # a second goes by
        signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGINT]
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGINT, signal.SIGTERM]


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked() == 0
    finally:
        signal.signal(signal.SIGINT, before)


LOADER = """
import multiprocessing, subprocess
from nm_sparsity.core.experiments.command_line import leave_stops

def load(pipe):
    for _ in range(2):
        leave_stops()
    while True:
        pipe.send(pipe.recv())

context = multiprocessing.get_context("fork")
here, there = context.Pipe()
loader = context.Process(target=load, args=[there], daemon=True)
loader.start()
for number in ("TERM", "INT", "TERM"):
    here.send(number)
    assert here.recv() == number
    subprocess.run(["sh", "-c", f"kill -{number} {loader.pid}"], check=True)
here.send("still there")
assert here.recv() == "still there"
print(loader.pid)
"""


def test_what_loads_data_ends_by_the_process_that_started_it_and_by_no_other() -> None:
    command = [sys.executable, "-c", LOADER]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


WARNS = """
import warnings
from nm_sparsity.core.experiments.command_line import command_line

@command_line
def main() -> None:
    for place in range(2):
        warnings.warn("mind\\nthe gap")
    warnings.warn("mind\\nthe gap")

main()
warnings.warn("as ever")
"""


def test_a_warning_is_a_line_without_code_said_once() -> None:
    shown = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True, check=True).stderr
    assert shown == "warning: mind the gap\n<string>:12: UserWarning: as ever\n"


def test_what_the_system_says_of_a_file_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    @command_line
    def main() -> None:
        Path("/no/such/file").read_text()

    assert main() == 1
    assert capsys.readouterr().err == "error: /no/such/file: No such file or directory\n"
