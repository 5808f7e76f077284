"""The ways to multiply by 2:4 weights on NVIDIA GPUs: cuSPARSELt itself, cuSPARSELt through torch, and CUTLASS."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from nm_sparsity.core.deploy import cusparselt
from nm_sparsity.core.deploy.cusparselt import Algorithm, activate
from nm_sparsity.core.deploy.library import library
from nm_sparsity.core.errors import SparsityError

DEFAULT = Algorithm()
"""cuSPARSELt's own choice."""


class Backend:
    """A way to multiply by 2:4 weights: what it takes, its compressed weights and its product."""

    name: str
    tensor: Any
    """torch's class of compressed weights, which knows the sizes that the library takes."""
    activations: tuple[str, ...] = ()
    """Those that run within the product."""
    searched = False
    """Whether `linear` takes the algorithms that a search found."""

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
        """The compressed form of a 2:4 matrix (rows, columns), a tensor."""
        raise NotImplementedError

    def linear(
        self,
        x: Tensor,
        weight: Any,
        rows: int,
        bias: Tensor | None = None,
        activation: str = "",
        out_dtype: torch.dtype | None = None,
        algorithms: Sequence[int] = (),
    ) -> Tensor:
        """``activation(x @ w.T + bias)`` for x (..., columns) of any strides, in `out_dtype` if one is given.

        `algorithms` are those of `cusparselt.linear`.
        """
        flat = x.reshape(-1, x.shape[-1]).contiguous()  # the libraries are told sizes, not strides
        y = activate(self._product(flat, weight, bias, out_dtype, algorithms), activation)
        return y.reshape(*x.shape[:-1], rows)

    def _product(
        self, x: Tensor, weight: Any, bias: Tensor | None, out_dtype: torch.dtype | None, algorithms: Sequence[int]
    ) -> Tensor:
        raise NotImplementedError


class _NoGradient(torch.autograd.Function):
    """A result whose gradient, once it is asked for, is an error and not a silent zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Tensor | None) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return cusparselt.no_gradient()


class CuSparseLt(Backend):
    """cuSPARSELt with its plans kept (`nm_sparsity.core.deploy.cusparselt`): any GPU with sparse Tensor Cores."""

    name, tensor, searched = "cusparselt", SparseSemiStructuredTensorCUSPARSELT, True
    activations = tuple(filter(None, cusparselt.ACTIVATIONS))

    def why_not_capability(self, major: int, minor: int) -> str:
        try:
            library()
        except SparsityError as error:
            return str(error)
        return ""

    def compress(self, matrix: Tensor) -> Any:
        return cusparselt.compress(matrix)

    def linear(
        self,
        x: Tensor,
        weight: Any,
        rows: int,
        bias: Tensor | None = None,
        activation: str = "",
        out_dtype: torch.dtype | None = None,
        algorithms: Sequence[int] = (),
    ) -> Tensor:
        # A tracer needs the op; without one, going past the dispatcher takes half of the host's time.
        traced = torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
        call: Any = torch.ops.nm_sparsity.linear_2to4 if traced else cusparselt.linear
        y: Tensor = call(x, weight, bias, None, rows, 1.0, activation, out_dtype, algorithms)
        wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        return _NoGradient.apply(y, x, bias) if wanted and not traced else y


class TorchCuSparseLt(Backend):
    """cuSPARSELt through torch, which makes and ends its plan in every call: 0.35 to 0.6 ms of host time on an H100."""

    name, tensor, searched = "torch", SparseSemiStructuredTensorCUSPARSELT, True

    def why_not_capability(self, major: int, minor: int) -> str:
        return "" if torch.backends.cusparselt.is_available() else "this torch was built without cuSPARSELt"

    def compress(self, matrix: Tensor) -> Any:
        return torch._cslt_compress(matrix)

    def _product(
        self, x: Tensor, weight: Any, bias: Tensor | None, out_dtype: torch.dtype | None, algorithms: Sequence[int]
    ) -> Tensor:
        padded = _padded(x, 8 if x.element_size() == 2 else 16)
        algorithm, split_k, mode = cusparselt.choose(algorithms, len(x))
        options: dict[str, Any] = {"alg_id": algorithm, "split_k": split_k, "split_k_mode": mode}
        options["out_dtype"] = None if out_dtype == x.dtype else out_dtype
        y = torch._cslt_sparse_mm(weight, padded.t(), bias, transpose_result=True, **options)
        return y[: len(x)]


class Cutlass(Backend):
    """torch's own CUTLASS kernels."""

    name, tensor = "cutlass", SparseSemiStructuredTensorCUTLASS

    def why_not_capability(self, major: int, minor: int) -> str:
        if major == 8:
            return ""
        return f"torch's CUTLASS kernels run on compute capability 8.x only, and this GPU has {major}.{minor}"

    def compress(self, matrix: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="The PyTorch API of SparseSemiStructuredTensor", category=UserWarning
            )
            return self.tensor.from_dense(matrix)

    def _product(
        self, x: Tensor, weight: Any, bias: Tensor | None, out_dtype: torch.dtype | None, algorithms: Sequence[int]
    ) -> Tensor:
        if x.is_floating_point():
            return F.linear(x, weight, bias)
        y = torch._sparse_semi_structured_mm(weight.packed, weight.meta, _padded(x, 16).t(), out_dtype=out_dtype)
        return y.t()[: len(x)]


def _padded(x: Tensor, multiple: int) -> Tensor:
    missing = -len(x) % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in (CuSparseLt(), TorchCuSparseLt(), Cutlass())}
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
