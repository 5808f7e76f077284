"""From a finalized model to something faster: torch's semi-structured (2:4) tensors on NVIDIA GPUs, and ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nm_sparsity.core import masks
from nm_sparsity.core.deploy.backends import DEFAULT, Backend, choose_backend
from nm_sparsity.core.deploy.clock import Clock, seconds
from nm_sparsity.core.errors import SparsityError, VerificationError
from nm_sparsity.core.model import record
from nm_sparsity.core.model.layers import sparse_layers
from nm_sparsity.core.model.wrappers import unwrap
from nm_sparsity.core.pattern import NMPattern, Placement
from nm_sparsity.core.table import format_table

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
    model: nn.Module,
    backend: str | Backend = "auto",
    search: bool = True,
    tokens: int = 1024,
    clock: Clock = seconds,
) -> Acceleration:
    """Compress the 2:4 weights of the eligible layers of a finalized `model`, in place, for inference on its GPU.

    Eligible are `nn.Linear` and 1 x 1 `nn.Conv2d`, fp16 or bf16, of a shape that the backend takes. Save checkpoints
    before: compressed weights cannot be loaded with ``weights_only=True``. Works under `torch.compile`.

    Args:
        backend: ``"cusparselt"``, ``"cutlass"`` or ``"auto"``: the first that the GPU has; or a backend itself.
        search: let cuSPARSELt search its fastest algorithm, and use it where it beats the default.
        tokens: the number of rows (tokens, pixels) of the input to search for.
        clock: what times the algorithms.

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
        weight = backend.compress(matrix)
        if search:
            if key not in algorithms:
                algorithms[key] = _fastest_algorithm(backend, weight, bias, tokens, clock)
            weight.alg_id_cusparselt = algorithms[key]
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.__class__ = SemiStructuredLinear if isinstance(module, nn.Linear) else SemiStructuredConv2d
        rows.append((name, shape, algorithms.get(key, 0), ""))
    if any(algorithm is not None for _, _, algorithm, _ in rows):
        _leave_fast_paths(model)
    return Acceleration(backend.name, tuple(rows))


def why_not_layer(module: nn.Module, name: str, shape: Sequence[int], dtype: torch.dtype, backend: Backend) -> str:
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
    return backend.why_not_matrix(shape, dtype)


def _device(model: nn.Module) -> torch.device:
    devices = {param.device for param in model.parameters()}
    if len(devices) != 1:
        raise SparsityError(f"the model must be on one device, found {', '.join(sorted(map(str, devices))) or 'none'}")
    return devices.pop()


def _check_dtypes(model: nn.Module, backend: Backend) -> None:
    found = {param.dtype for param in model.parameters() if param.dim() > 1}
    if found and not found & backend.constraints.keys():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise SparsityError(
            f"{backend.name} has no {names}: convert the model first, with model.half() or model.bfloat16()"
        )


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


def _fastest_algorithm(backend: Backend, weight: Any, bias: Tensor | None, tokens: int, clock: Clock) -> int:
    rows = -(-tokens // 16) * 16  # as torch pads the input
    x = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    default, found = DEFAULT[0], backend.search(weight, x, bias)[0]
    times = {}
    for algorithm in {default, found} if found != default else ():
        weight.alg_id_cusparselt = algorithm
        for calls in (3, 20):  # the first ones warm up
            times[algorithm] = clock(lambda _: F.linear(x, weight, bias), x.device, calls)
    return min(times, key=lambda algorithm: times[algorithm], default=default)


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch's Transformer layers from handing the compressed weights to kernels that cannot read them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
