"""Tests that need a GPU: `PYTHONPATH=. python3 -m pytest -s tests/gpu`, with the package uninstalled.

Each file runs in a process of its own, so that a broken CUDA context loses that file's results alone. With -s the
figures show that they print.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_CHILD = "NM_SPARSITY_GPU_TESTS"
"""Set in the processes that run the tests themselves."""


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Collector | None:
    if file_path.suffix == ".py" and file_path.name.startswith("test_") and _CHILD not in os.environ:
        return _File.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a file that has its process, the tests themselves do not run here as well."""
    if _CHILD not in os.environ:
        here = Path(__file__).parent
        items[:] = [item for item in items if item.path.parent != here or isinstance(item, _Process)]


class _File(pytest.File):
    def collect(self) -> Iterator[_Process]:
        yield _Process.from_parent(self, name="in a process of its own")


class _Process(pytest.Item):
    def runtest(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-s",
            "-c",
            str(Path(__file__).with_name("pytest.ini")),
            str(self.path),
        ]
        result = subprocess.run(command, env={**os.environ, _CHILD: "1"}, capture_output=True, text=True)
        print(result.stdout)
        if result.returncode:
            pytest.fail(result.stdout + result.stderr, pytrace=False)
