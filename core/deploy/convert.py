"""From a finalized model to something faster: torch's semi-structured (2:4) tensors on NVIDIA GPUs, and ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from nm_sparsity.core import masks
from nm_sparsity.core.errors import SparsityError, VerificationError
from nm_sparsity.core.model import record
from nm_sparsity.core.model.layers import sparse_layers
from nm_sparsity.core.model.wrappers import unwrap
from nm_sparsity.core.pattern import NMPattern, Placement
from nm_sparsity.core.table import format_table

BACKENDS = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}
PATTERN = NMPattern(2, 4)
"""What sparse Tensor Cores run."""

_NO_PADDING = ((0, 0), "valid", "same")  # of a 1 x 1 convolution


@dataclass(frozen=True)
class Acceleration:
    """What became of each weight: the algorithm that runs it, or why it stays dense. Prints as a table."""

    backend: str
    rows: tuple[tuple[str, tuple[int, ...], int | None, str], ...]
    """(name, shape, algorithm or None, reason)."""

    @property
    def converted(self) -> tuple[str, ...]:
        """The weights that run 2:4 now."""
        return tuple(name for name, _, algorithm, _ in self.rows if algorithm is not None)

    def __str__(self) -> str:
        cells = [
            (name, "x".join(map(str, shape)), self.backend if algorithm is not None else "dense", algorithm, reason)
            for name, shape, algorithm, reason in self.rows
        ]
        table = format_table(["weight", "shape", "runs on", "algorithm", "note"], cells)
        return f"{table}\n{len(self.converted)} of {len(self.rows)} weights run 2:4 on {self.backend}"


class SemiStructuredLinear(nn.Linear):
    """A linear layer with a compressed 2:4 weight, for inference."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); any strides."""
        # torch hands cuSPARSELt the sizes of the input and not its strides: a view would be read wrongly.
        y = F.linear(x.reshape(-1, self.in_features).contiguous(), self.weight, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)


class SemiStructuredConv2d(nn.Conv2d):
    """A 1 x 1 convolution as a product over channels-last pixels, with a compressed 2:4 weight, for inference."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in, H, W) -> (..., C_out, H', W') in channels-last format."""
        pixels = x[..., :: self.stride[0], :: self.stride[1]].movedim(-3, -1)
        y = F.linear(pixels.reshape(-1, self.in_channels).contiguous(), self.weight, self.bias)
        return y.reshape(*pixels.shape[:-1], self.out_channels).movedim(-1, -3)


def to_semi_structured(
    model: nn.Module, backend: str = "auto", search: bool = True, tokens: int = 1024
) -> Acceleration:
    """Compress the 2:4 weights of the eligible layers of a finalized `model`, in place, for inference on its GPU.

    Eligible are `nn.Linear` and 1 x 1 `nn.Conv2d`, fp16 or bf16, of a shape that the backend takes. Save checkpoints
    before: compressed weights cannot be loaded with ``weights_only=True``. Works under `torch.compile`.

    Args:
        backend: ``"cusparselt"``, ``"cutlass"`` or ``"auto"``: the first that the GPU has.
        search: let cuSPARSELt search its fastest algorithm, and use it where it beats the default.
        tokens: the number of rows (tokens, pixels) of the input to search for.

    Returns:
        A report of every weight, with the reason for each that stays dense.

    Raises:
        SparsityError: without a fitting GPU, for an unknown backend, a model that is not finalized, or one in a dtype
            that the backend has not.
        VerificationError: naming a weight that should be 2:4 and is not; compressing it would drop values.
    """
    model = unwrap(model)
    if any(True for _ in sparse_layers(model)):
        raise SparsityError(f"{type(model).__name__} still trains sparse: call finalize(model) first")
    backend = choose_backend(backend, _device(model))
    _check_dtypes(model, backend)
    table = record.table(model)
    plan: list[tuple[str, nn.Module, nn.Parameter, str]] = []
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param.dim() > 1 and not isinstance(module, nn.Embedding):
                full_name = f"{prefix}.{name}" if prefix else name
                why = why_not_layer(module, name, param.shape, param.dtype, backend)
                plan.append((full_name, module, param, why or _why_not_2to4(full_name, param, table.get(full_name))))

    algorithms: dict[Any, int] = {}
    rows: list[tuple[str, tuple[int, ...], int | None, str]] = []
    for name, module, param, why in plan:
        shape = tuple(param.shape)
        if why:
            rows.append((name, shape, None, why))
            continue
        bias: Any = getattr(module, "bias", None)
        key = (shape[0], shape[1], bias is not None)
        matrix = param.detach().flatten(1).contiguous()
        weight = compress(matrix, backend)
        if search and backend == "cusparselt":
            if key not in algorithms:
                algorithms[key] = _fastest_algorithm(weight, bias, tokens)
            weight.alg_id_cusparselt = algorithms[key]
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.__class__ = SemiStructuredLinear if isinstance(module, nn.Linear) else SemiStructuredConv2d
        rows.append((name, shape, algorithms.get(key, 0), ""))
    if any(algorithm is not None for _, _, algorithm, _ in rows):
        _leave_fast_paths(model)
    return Acceleration(backend, tuple(rows))


def choose_backend(backend: str, device: torch.device) -> str:
    """`backend` itself, or for "auto" the one to take on `device`.

    Raises:
        SparsityError: if it is unknown or the device lacks it, saying why.
    """
    if backend not in ("auto", *BACKENDS):
        raise SparsityError(f'unknown backend "{backend}"; known: auto, {", ".join(BACKENDS)}')
    reasons = {name: why_not_backend(name, device) for name in BACKENDS}
    if backend == "auto":
        for name, reason in reasons.items():
            if not reason:
                return name
        why = "; ".join(dict.fromkeys(reasons.values()))
        raise SparsityError(f"2:4 cannot be accelerated here: {why} (a finalized model goes there by .half().cuda())")
    if reasons[backend]:
        raise SparsityError(f"{backend} is not available: {reasons[backend]}")
    return backend


def why_not_backend(backend: str, device: torch.device) -> str:
    """Why `backend` cannot run on `device`; empty if it can."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, found {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs sparse Tensor Cores (compute capability 8.0 or newer), and this GPU has {major}.{minor}"
    if backend == "cutlass" and major != 8:
        return f"torch's CUTLASS kernels run on compute capability 8.x only, and this GPU has {major}.{minor}"
    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    return ""


def why_not_layer(
    module: nn.Module, name: str, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, backend: str
) -> str:
    """Why torch cannot run the parameter `name` of `module` as a 2:4 product; empty if it can."""
    if isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses it outside of a layer"
    if isinstance(module, nn.Conv2d):
        if tuple(shape[2:]) != (1, 1) or module.groups != 1 or module.padding not in _NO_PADDING:
            return "torch has no 2:4 convolution but the plain 1 x 1"
        original: Callable[..., Any] = nn.Conv2d.forward
    elif isinstance(module, nn.Linear):
        original = nn.Linear.forward
    else:
        return f"torch has no 2:4 {type(module).__name__}"
    if type(module).forward is not original or name != "weight":
        return f"{type(module).__name__} computes in its own way"
    return why_not_matrix(shape, dtype, backend)


def why_not_matrix(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, backend: str) -> str:
    """Why `backend` does not take a weight of this shape and dtype; empty if it does."""
    constraints = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
    if constraints is None:
        return f"{backend} has no {str(dtype).removeprefix('torch.')}"
    rows, columns = constraints.sparse_min_rows, constraints.sparse_min_cols
    if shape[0] % rows or shape[1] % columns:
        return f"{backend} needs multiples of {rows} x {columns}"
    return ""


def compress(matrix: Tensor, backend: str) -> Any:
    """torch's compressed tensor of a 2:4 CUDA matrix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor", category=UserWarning)
        weight: Any = BACKENDS[backend].from_dense(matrix)
    weight.fuse_transpose_cusparselt = True  # up to torch 2.12 the product is a strided transpose without it
    return weight


def search_algorithm(
    packed: Tensor, dense: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[int, int, int]:
    """cuSPARSELt's fastest (algorithm, split-k, split-k mode) for ``packed @ dense`` with a transposed result."""
    cusparselt: Any = torch._C._cusparselt
    algorithm, split_k, mode, *_ = cusparselt.mm_search(packed, dense, bias, None, out_dtype, True)
    return algorithm, split_k, mode


def _device(model: nn.Module) -> torch.device:
    devices = {param.device for param in model.parameters()}
    if len(devices) != 1:
        raise SparsityError(f"the model must be on one device, found {', '.join(sorted(map(str, devices))) or 'none'}")
    return devices.pop()


def _check_dtypes(model: nn.Module, backend: str) -> None:
    known = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS
    found = {param.dtype for param in model.parameters() if param.dim() > 1}
    if found and not found & known.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise SparsityError(f"{backend} has no {names}: convert the model first, with model.half() or model.bfloat16()")


def _why_not_2to4(name: str, param: Tensor, placement: Placement | None) -> str:
    """Why a weight that is not 2:4 stays dense.

    Raises:
        VerificationError: if it should be 2:4, by the model's table or by being mostly zeros.
    """
    violations = masks.count_violations(param, PATTERN)
    if not violations:
        return ""
    if placement is not None and not placement.pattern.implies(PATTERN):
        return f"{placement.pattern}: the hardware runs only 2:4"
    if placement is not None or param.count_nonzero() < 0.75 * param.numel():
        raise VerificationError(
            f"{name} is not 2:4 along its input channels: {violations:,} of {masks.group_count(param, PATTERN):,} "
            "groups have more than 2 non-zeros, and compressing would drop them; was it changed after finalize, or "
            'trained with layout="kernel"?'
        )
    return "dense"


def _fastest_algorithm(weight: Any, bias: Tensor | None, tokens: int) -> int:
    rows = -(-tokens // 16) * 16  # as torch pads the input
    x = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    found, *_ = search_algorithm(weight.packed, x.t(), bias)
    times = {}
    for algorithm in {0, found}:
        weight.alg_id_cusparselt = algorithm
        times[algorithm] = _milliseconds(lambda: F.linear(x, weight, bias))
    return min(times, key=lambda algorithm: times[algorithm])


def _milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end) / repeats
    return milliseconds


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch's Transformer layers from handing the compressed weights to kernels that cannot read them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
