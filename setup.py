"""Finds the packages and builds the optional CPU kernel; everything else about the package is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

FOLDERS = ("benchmarks", "classification", "core", "detection", "translation")
OPENMP = "-fopenmp"


class BuildKernel(build_ext):
    """A compiler without OpenMP (Apple's) still gives the kernel, on one thread."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except CCompilerError:
            ext.extra_compile_args.remove(OPENMP)
            ext.extra_link_args.remove(OPENMP)
            super().build_extension(ext)


def layout() -> dict[str, object]:
    """The packages, and where they lie: behind the links in nm_sparsity/, or beside it where an archive lost them."""
    if all(Path("nm_sparsity", folder).is_dir() for folder in FOLDERS):
        return {"packages": find_packages(include=["nm_sparsity", "nm_sparsity.*"]), "package_dir": {"": "."}}
    beside = [f"nm_sparsity.{name}" for folder in FOLDERS for name in find_packages(include=[folder, f"{folder}.*"])]
    return {"packages": ["nm_sparsity", *beside], "package_dir": {f"nm_sparsity.{name}": name for name in FOLDERS}}


setup(
    **layout(),
    ext_modules=[
        Extension(
            "nm_sparsity.core.masks._cpu",
            ["core/masks/keep_largest.cpp" if Path("core").is_dir() else "nm_sparsity/core/masks/keep_largest.cpp"],
            # -O2 does not vectorise: several times slower. A product and its sum round as two operations, as in torch.
            # Of Python's own flags, debug information takes half as long again to compile, and numbers that wrap around
            # keep loops from being vectorised: S-STE's values of 3 x 3 kernels took several times as long.
            extra_compile_args=[
                *("-std=c++17", "-O3", "-g0", "-fno-wrapv", "-fno-trapping-math", "-ffp-contract=off", OPENMP)
            ],
            extra_link_args=[OPENMP],
            optional=True,  # without a compiler the pure-torch path runs, and says so once
        )
    ],
    cmdclass={"build_ext": BuildKernel},
)
