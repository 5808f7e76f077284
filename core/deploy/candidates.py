"""Which weights of a model can run 2:4, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nm_sparsity.core import masks
from nm_sparsity.core.deploy.backends import Backend
from nm_sparsity.core.deploy.measure import Calls
from nm_sparsity.core.errors import VerificationError
from nm_sparsity.core.model import record
from nm_sparsity.core.pattern import NMPattern, Placement

PATTERN = NMPattern(2, 4)
"""What sparse Tensor Cores run."""

_NO_PADDING = ((0, 0), "valid", "same")  # of a 1 x 1 convolution


@dataclass
class Candidate:
    """A weight, and what is found out about it."""

    name: str
    layer: nn.Module
    param: nn.Parameter
    why: str
    activation: str = ""
    follows: tuple[nn.Sequential, str] | None = None
    """Where the activation stands."""
    calls: Calls = field(default_factory=dict)

    @property
    def kind(self) -> Any:
        """What is the same for layers that take the same time."""
        stride = getattr(self.layer, "stride", None)
        calls = tuple(sorted(self.calls.items(), key=str))
        return type(self.layer), tuple(self.param.shape), self.bias is not None, stride, self.activation, calls

    @property
    def bias(self) -> Tensor | None:
        bias: Any = self.layer.bias
        return bias


def candidates(model: nn.Module, backend: Backend) -> Iterator[Candidate]:
    """All weights of at least two dimensions, embeddings apart.

    Raises:
        VerificationError: see `_why_not_2to4`.
    """
    table = record.table(model)
    follows = dict(activations(model))
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param.dim() > 1 and not isinstance(module, nn.Embedding):
                full_name = f"{prefix}.{name}" if prefix else name
                why = why_not_layer(module, name, param.shape, param.dtype, backend)
                why = why or _why_not_2to4(full_name, param, table.get(full_name))
                candidate = Candidate(full_name, module, param, why)
                if not why and module in follows:
                    activation, holder, place = follows[module]
                    if activation in backend.activations:
                        candidate.activation, candidate.follows = activation, (holder, place)
                yield candidate


def activations(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, nn.Sequential, str]]]:
    """(layer, (activation, the `nn.Sequential` that holds both, the activation's place in it)).

    Only of layers that stand at one place, and where no hook would notice.
    """
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for holder in model.modules():
        if isinstance(holder, nn.Sequential) and type(holder).forward is nn.Sequential.forward:
            for (_, layer), (place, after) in pairwise(holder._modules.items()):
                if layer is None or after is None or places[id(layer)] != 1:
                    continue
                hooked = layer._forward_hooks or after._forward_pre_hooks or after._forward_hooks
                if not hooked and (activation := _activation(after)):
                    yield layer, (activation, holder, place)


def _activation(module: nn.Module) -> str:
    if type(module) is nn.ReLU:
        return "relu"
    return "gelu_tanh" if type(module) is nn.GELU and module.approximate == "tanh" else ""


def why_not_layer(module: nn.Module, name: str, shape: Sequence[int], dtype: torch.dtype, backend: Backend) -> str:
    """Why torch cannot run the parameter `name` of `module` as a 2:4 product; empty if it can."""
    if isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses it outside of a layer"
    if isinstance(module, nn.Conv2d):
        if tuple(shape[2:]) != (1, 1) or module.groups != 1 or module.padding not in _NO_PADDING:
            return "torch has no 2:4 convolution but the plain 1 x 1"
        base: type[nn.Module] = nn.Conv2d
    elif isinstance(module, nn.Linear):
        base = nn.Linear
    else:
        return f"torch has no 2:4 {type(module).__name__}"
    if _computes_otherwise(module, base) or name != "weight":
        return f"{type(module).__name__} computes in its own way"
    return backend.why_not_matrix(shape, dtype)


def _computes_otherwise(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether `module`, or its class, has another of the methods that `base` computes by."""
    kind, methods = type(module), ("__call__", "forward", "_conv_forward")
    return "forward" in vars(module) or any(getattr(kind, m, None) is not getattr(base, m, None) for m in methods)


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


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")
