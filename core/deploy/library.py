"""NVIDIA's library cuSPARSELt, loaded by ctypes: its functions, constants, errors and opaque structures.

It is the one that torch has loaded, or the file that the environment variable `NM_SPARSITY_CUSPARSELT` names.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from contextlib import ExitStack
from ctypes import byref, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import lru_cache
from typing import Any

from nm_sparsity.core.errors import SparsityError

LIBRARY_VARIABLE = "NM_SPARSITY_CUSPARSELT"
OLDEST = (0, 8)
"""The oldest version whose interface is the one below."""

CONSTANTS = {
    "CUSPARSE_ORDER_COL": 1,
    "CUSPARSE_ORDER_ROW": 2,
    "CUSPARSE_OPERATION_NON_TRANSPOSE": 0,
    "CUSPARSE_OPERATION_TRANSPOSE": 1,
    "CUSPARSELT_SPARSITY_50_PERCENT": 0,
    "CUSPARSE_COMPUTE_32I": 0,
    "CUSPARSE_COMPUTE_32F": 2,
    "CUSPARSELT_MATMUL_ACTIVATION_RELU": 0,
    "CUSPARSELT_MATMUL_ACTIVATION_GELU": 3,
    "CUSPARSELT_MATMUL_ALPHA_VECTOR_SCALING": 5,
    "CUSPARSELT_MATMUL_BIAS_POINTER": 8,
    "CUSPARSELT_MATMUL_ALG_DEFAULT": 0,
    "CUSPARSELT_MATMUL_ALG_CONFIG_ID": 0,
    "CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID": 1,
    "CUSPARSELT_MATMUL_SPLIT_K": 3,
    "CUSPARSELT_MATMUL_SPLIT_K_MODE": 4,
    "CUDA_R_32F": 0,
    "CUDA_R_16F": 2,
    "CUDA_R_8I": 3,
    "CUDA_R_32I": 10,
    "CUDA_R_16BF": 14,
    "CUDA_R_8F_E4M3": 28,
}
"""Of the library's headers, by their names there."""

_P, _ENUM = c_void_p, c_int
SIGNATURES: dict[str, list[Any]] = {
    "Init": [_P],
    "Destroy": [_P],
    "GetProperty": [_ENUM, _P],
    "DenseDescriptorInit": [_P, _P, c_int64, c_int64, c_int64, c_uint32, _ENUM, _ENUM],
    "StructuredDescriptorInit": [_P, _P, c_int64, c_int64, c_int64, c_uint32, _ENUM, _ENUM, _ENUM],
    "MatDescriptorDestroy": [_P],
    "MatmulDescriptorInit": [_P, _P, _ENUM, _ENUM, _P, _P, _P, _P, _ENUM],
    "MatmulDescSetAttribute": [_P, _P, _ENUM, _P, c_size_t],
    "MatmulAlgSelectionInit": [_P, _P, _P, _ENUM],
    "MatmulAlgSelectionDestroy": [_P],
    "MatmulAlgSetAttribute": [_P, _P, _ENUM, _P, c_size_t],
    "MatmulAlgGetAttribute": [_P, _P, _ENUM, _P, c_size_t],
    "MatmulPlanInit": [_P, _P, _P, _P],
    "MatmulPlanDestroy": [_P],
    "MatmulGetWorkspace": [_P, _P, _P],
    "Matmul": [_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, c_int32],
    "SpMMACompressedSize2": [_P, _P, _P, _P],
    "SpMMACompress2": [_P, _P, c_int, _ENUM, _P, _P, _P, _P],
}
"""Arguments of the functions that are called, without the prefix ``cusparseLt``; each returns a status."""

_OPAQUE = 4096
"""Bytes for each of the library's structures: 512 up to version 0.8, and room for later ones."""
_OPAQUE_ALIGNMENT = 16


class CuSparseLtError(SparsityError):
    """What cuSPARSELt refused, in its own words."""


class Library:
    """cuSPARSELt in a file.

    Raises:
        SparsityError: if there is no such file, it is too old, or lacks a function.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            loaded = ctypes.CDLL(path)
        except OSError as error:
            raise SparsityError(
                f"cuSPARSELt cannot be loaded ({error}); torch for CUDA brings it, or name its file in the environment "
                f"variable {LIBRARY_VARIABLE}"
            ) from error
        self._functions: dict[str, Any] = {}
        for name, arguments in SIGNATURES.items():
            try:
                function = getattr(loaded, f"cusparseLt{name}")
            except AttributeError:
                raise SparsityError(f"{path} cannot be used as cuSPARSELt: it has no cusparseLt{name}") from None
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function
        self.matmul = self._functions["Matmul"]
        self._name, self._text = loaded.cusparseLtGetErrorName, loaded.cusparseLtGetErrorString
        self._name.restype = self._text.restype = ctypes.c_char_p
        self.version = tuple(self._property(which) for which in range(3))
        """Major, minor and patch."""
        if self.version < OLDEST:
            found, least = ".".join(map(str, self.version)), ".".join(map(str, OLDEST))
            raise SparsityError(f"cuSPARSELt {found} ({path}) is too old: at least {least} is needed")

    def _property(self, which: int) -> int:
        value = c_int()
        self.call("GetProperty", which, byref(value))
        return value.value

    def call(self, name: str, *arguments: Any) -> None:
        """Call ``cusparseLt<name>``.

        Raises:
            CuSparseLtError: if its status is not success.
        """
        if status := self._functions[name](*arguments):
            self.fail(f"cusparseLt{name}", status)

    def fail(self, what: str, status: int) -> None:
        """Raise the error that `status` stands for."""
        raise CuSparseLtError(f"{what}: {self._text(status).decode()} ({self._name(status).decode()})")


@lru_cache(maxsize=1)
def library() -> Library:
    """The cuSPARSELt of this process.

    Raises:
        SparsityError: see `Library`.
    """
    return Library(os.environ.get(LIBRARY_VARIABLE) or "libcusparseLt.so.0")


def version() -> str | None:
    """The version of cuSPARSELt, such as "0.8.1"; None where there is none. Needs no GPU."""
    try:
        return ".".join(map(str, library().version))
    except SparsityError:
        return None


class _Opaque:
    """Memory for one of the library's structures."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_OPAQUE + _OPAQUE_ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address = start + -start % _OPAQUE_ALIGNMENT


class Resources:
    """Structures of the library that are destroyed together: when asked to, or with the last reference."""

    def __init__(self, cusparselt: Library) -> None:
        self.library = cusparselt
        stack = self._stack = ExitStack()
        self._closing = weakref.finalize(self, _close, stack)
        self._closing.atexit = False  # the driver may be gone by then

    def make(self, init: str, destroy: str | None, *arguments: Any, handle: int | None = None) -> int:
        """The address of a structure that the function `init` fills and `destroy` ends."""
        opaque = _Opaque()
        self.library.call(init, *([] if handle is None else [handle]), opaque.address, *arguments)
        self._stack.callback(_destroy, self.library, destroy, opaque)
        return opaque.address

    def close(self) -> None:
        """Destroy them."""
        self._closing()


def _destroy(cusparselt: Library, destroy: str | None, opaque: _Opaque) -> None:
    if destroy is not None:
        cusparselt.call(destroy, opaque.address)


def _close(stack: ExitStack) -> None:
    if not sys.is_finalizing():
        stack.close()
