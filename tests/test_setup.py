"""What `make` says on a machine where something is missing: one line, no traceback."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parent.parent / ".ci" / "setup"


def run(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    (folder / ".ci").mkdir()
    shutil.copy(SETUP, folder / ".ci" / "setup")
    return subprocess.run(
        [str(folder / ".ci" / "setup"), "dev"],
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_python(folder: Path, version: str, has_venv: bool) -> str:
    """A program that answers the questions that the set-up asks of Python."""
    path = folder / "python"
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in --version) echo "Python {version}" ;; *version_info*) exit {int(version < "3.11")} ;;\n'
        f"*ensurepip*) exit {int(not has_venv)} ;; esac\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        (lambda folder: "no-such-python", "no no-such-python found: install Python 3.11 or 3.12"),
        (lambda folder: fake_python(folder, "3.10.9", True), "Python 3.10.9 found, expected Python 3.11 or 3.12"),
        (lambda folder: fake_python(folder, "3.11.2", False), "apt-get install python3-venv"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, python: object, expected: str) -> None:
    assert callable(python)
    result = run(tmp_path, python(tmp_path))
    assert result.returncode == 1
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()
