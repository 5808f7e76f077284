"""Builds the optional CPU kernel; everything else about the package is in pyproject.toml."""

from __future__ import annotations

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

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


setup(
    ext_modules=[
        Extension(
            "nm_sparsity.core.kernels._cpu",
            ["core/kernels/keep_largest.cpp"],
            extra_compile_args=["-std=c++17", "-O3", OPENMP],  # -O2 does not vectorise: several times slower
            extra_link_args=[OPENMP],
            optional=True,  # without a compiler the pure-torch path runs, and says so once
        )
    ],
    cmdclass={"build_ext": BuildKernel},
)
