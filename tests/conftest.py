"""What all tests share: a fresh torch.compile, and a cuSPARSELt that computes on the host's memory."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nm_sparsity.core.deploy import cusparselt, library

SOURCE = Path(__file__).parent / "cusparselt_stand_in"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """What was compiled before, and counts towards the limit of recompilations, is not the test's."""
    torch.compiler.reset()


def _compile(to: Path, *options: str, source: Path = SOURCE / "stand_in.c") -> Path:
    """The stand-in as a shared library, compiled against the header that comes with torch for CUDA."""
    nvidia = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    headers = [nvidia / "cusparselt" / "include", *sorted(nvidia.glob("cu*/include"))]
    if not (headers[0] / "cusparseLt.h").exists() or len(headers) < 2:
        pytest.skip("needs the headers of cuSPARSELt and CUDA, which torch for CUDA brings")
    if not (compiler := shutil.which("gcc")):
        pytest.skip("needs gcc")
    includes = [f"-I{folder}" for folder in (SOURCE / "include", *headers)]
    # The header is C++'s: what it takes from there, C gets beforehand.
    command = [
        compiler,
        "-w",
        "-std=gnu11",
        "-include",
        "stdalign.h",
        "-include",
        "stdint.h",
        "-O2",
        "-shared",
        "-fPIC",
    ]
    result = subprocess.run([*command, *options, *includes, source, "-lm", "-o", to], capture_output=True, text=True)
    if "_Float16" in result.stderr:
        pytest.skip("needs a gcc with _Float16")
    assert not result.returncode, result.stderr[:2000]
    return to


@pytest.fixture(scope="session")
def compile_stand_in() -> Callable[..., Path]:
    """``compile_stand_in(to, *options, source=...)`` makes a shared library of the stand-in or another source."""
    return _compile


@pytest.fixture(scope="session")
def stand_in_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compile(tmp_path_factory.mktemp("cusparselt") / "stand_in.so")


@pytest.fixture
def stand_in(stand_in_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """cuSPARSELt is the stand-in, in children too; returns its log of calls. Caches go to the test's folder."""
    log = tmp_path / "calls.log"
    log.touch()
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(stand_in_library))
    monkeypatch.setenv("STAND_IN_LOG", str(log))
    monkeypatch.setenv("NM_SPARSITY_CACHE", str(tmp_path / "cache"))
    cusparselt.forget()
    yield log
    cusparselt.forget()
