"""One spelling of options at every command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nm_sparsity.core.experiments.command_line import command_line, gather_values


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
