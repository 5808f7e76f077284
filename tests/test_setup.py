"""What `make` says on a machine where something is missing: one line, no traceback."""

import os
import shutil
import subprocess
import time
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


def test_two_at_once_install_once(tmp_path: Path) -> None:
    """The second one waits, and finds what it wants there."""
    (tmp_path / "constraints.txt").touch()
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in {
        "python": "true",
        "pip": "echo begin >> log; touch started; while [ ! -e go ]; do sleep 0.02; done; echo end >> log",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    python = fake_python(tmp_path, "3.11.2", True)
    (tmp_path / ".ci").mkdir()
    shutil.copy(SETUP, tmp_path / ".ci" / "setup")

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(tmp_path / ".ci" / "setup"), "benchmarks"],
            env={**os.environ, "PYTHON": python},
            stderr=subprocess.PIPE,
            text=True,
        )

    with start() as first:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        with start() as second:
            assert second.stderr is not None
            assert "waiting for another make" in second.stderr.readline()
            (tmp_path / "go").touch()
            assert (first.wait(), second.wait()) == (0, 0)
    assert (tmp_path / "log").read_text() == "begin\nend\n"


def test_clean_leaves_what_was_trained() -> None:
    lines = (SETUP.parent.parent / "Makefile").read_text().partition("\nclean:\n")[2]
    assert lines.startswith("\trm -rf .venv")
    assert not {"runs", "data"} & set(lines.split())
