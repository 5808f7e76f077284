"""Installing without a compiler, and with one that has no OpenMP."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What building the kernel needs of the repository, without what is built already."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nm_sparsity").mkdir()
    shutil.copy(ROOT / "nm_sparsity" / "__init__.py", tmp_path / "nm_sparsity")
    shutil.copytree(ROOT / "core", tmp_path / "core", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def build(source: Path, compiler: str) -> list[Path]:
    """The libraries that an in-place build with `compiler` leaves; the build itself must succeed."""
    environment = {**os.environ, "CC": compiler, "CXX": compiler, "LDSHARED": f"{compiler} -shared"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return list((source / "core" / "masks").glob("*.so"))


def test_no_compiler_is_no_failure(source: Path) -> None:
    assert build(source, "/bin/false") == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_without_openmp_there_is_still_a_kernel(source: Path) -> None:
    compiler = source / "compiler"
    compiler.write_text('#!/bin/sh\ncase " $* " in *" -fopenmp "*) exit 1;; esac\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    (library,) = build(source, str(compiler))
    assert ctypes.CDLL(str(library)).nm_run
