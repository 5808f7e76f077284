"""The libraries through which torch multiplies by 2:4 weights on NVIDIA GPUs: cuSPARSELt and CUTLASS."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from nm_sparsity.core.errors import SparsityError

Choice = tuple[int, int, int]
"""Of cuSPARSELt's kernels: (algorithm, split-k, split-k mode)."""
DEFAULT: Choice = (0, 1, -1)


class Backend:
    """A library through which torch multiplies by 2:4 weights: what it takes, and its compressed weights."""

    name: str
    tensor: Any
    """torch's class of the compressed weights."""

    @property
    def constraints(self) -> Mapping[torch.dtype, Any]:
        """The dtypes of weights that it takes, each with the least number of rows and columns and their multiples."""
        constraints: Mapping[torch.dtype, Any] = self.tensor._DTYPE_SHAPE_CONSTRAINTS
        return constraints

    def why_not_device(self, device: torch.device) -> str:
        """Why it cannot run on `device`; empty if it can."""
        if device.type != "cuda":
            return f"needs an NVIDIA GPU, found {device.type}"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"needs sparse Tensor Cores (compute capability 8.0 or newer), and this GPU has {major}.{minor}"
        return self.why_not_capability(major, minor)

    def why_not_capability(self, major: int, minor: int) -> str:
        """Why it cannot run on a GPU that has sparse Tensor Cores; empty if it can."""
        raise NotImplementedError

    def why_not_matrix(self, shape: Sequence[int], dtype: torch.dtype) -> str:
        """Why it does not take a weight of this shape and dtype; empty if it does."""
        if dtype not in self.constraints:
            return f"{self.name} has no {str(dtype).removeprefix('torch.')}"
        rows, columns = self.constraints[dtype].sparse_min_rows, self.constraints[dtype].sparse_min_cols
        if shape[0] % rows or shape[1] % columns:
            return f"{self.name} needs multiples of {rows} x {columns}"
        return ""

    def compress(self, matrix: Tensor) -> Any:
        """torch's compressed tensor of a 2:4 CUDA matrix."""
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="The PyTorch API of SparseSemiStructuredTensor", category=UserWarning
            )
            weight: Any = self.tensor.from_dense(matrix)
        weight.fuse_transpose_cusparselt = True  # up to torch 2.12 the product is a strided transpose without it
        return weight

    def search(
        self, weight: Any, x: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Choice:
        """The kernel to take for ``x @ weight.T + bias``; x has a number of rows that the backend takes."""
        return DEFAULT

    def product(self, weight: Any, x: Tensor, out_dtype: torch.dtype | None = None, choice: Choice = DEFAULT) -> Tensor:
        """``x @ weight.T`` in `out_dtype`, by the kernel `choice`; x has a number of rows that the backend takes."""
        raise NotImplementedError


class CuSparseLt(Backend):
    """cuSPARSELt: every GPU with sparse Tensor Cores, 8- and 16-bit types, algorithms to choose from."""

    name, tensor = "cusparselt", SparseSemiStructuredTensorCUSPARSELT

    def why_not_capability(self, major: int, minor: int) -> str:
        return "" if torch.backends.cusparselt.is_available() else "this torch was built without cuSPARSELt"

    def search(
        self, weight: Any, x: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Choice:
        cusparselt: Any = torch._C._cusparselt
        algorithm, split_k, mode, *_ = cusparselt.mm_search(weight.packed, x.t(), bias, None, out_dtype, True)
        return algorithm, split_k, mode

    def product(self, weight: Any, x: Tensor, out_dtype: torch.dtype | None = None, choice: Choice = DEFAULT) -> Tensor:
        algorithm, split_k, mode = choice
        options: dict[str, Any] = {"alg_id": algorithm, "split_k": split_k, "split_k_mode": mode}
        return torch._cslt_sparse_mm(weight.packed, x.t(), out_dtype=out_dtype, transpose_result=True, **options)


class Cutlass(Backend):
    """torch's own CUTLASS kernels."""

    name, tensor = "cutlass", SparseSemiStructuredTensorCUTLASS

    def why_not_capability(self, major: int, minor: int) -> str:
        if major == 8:
            return ""
        return f"torch's CUTLASS kernels run on compute capability 8.x only, and this GPU has {major}.{minor}"

    def product(self, weight: Any, x: Tensor, out_dtype: torch.dtype | None = None, choice: Choice = DEFAULT) -> Tensor:
        return torch._sparse_semi_structured_mm(weight.packed, weight.meta, x.t(), out_dtype=out_dtype).t()


BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in (CuSparseLt(), Cutlass())}
"""By name, the one to prefer first."""


def choose_backend(backend: str | Backend, device: torch.device) -> Backend:
    """`backend` itself or the one of that name, or for "auto" the one to take on `device`.

    Raises:
        SparsityError: if it is unknown or the device lacks it, saying why.
    """
    if backend == "auto":
        reasons = {known: known.why_not_device(device) for known in BACKENDS.values()}
        for known, reason in reasons.items():
            if not reason:
                return known
        why = "; ".join(dict.fromkeys(reasons.values()))
        raise SparsityError(f"2:4 cannot be accelerated here: {why} (move a finalized model by .bfloat16().cuda())")
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise SparsityError(f'unknown backend "{backend}"; known: auto, {", ".join(BACKENDS)}')
        backend = BACKENDS[backend]
    if reason := backend.why_not_device(device):
        raise SparsityError(f"{backend.name} is not available: {reason}")
    return backend
