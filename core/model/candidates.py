"""Which weights of a model can be N:M sparse, along which dimensions their groups lie, and why others cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from nm_sparsity.core.masks.groups import reduction_size
from nm_sparsity.core.pattern import Layout, NMPattern

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, *_CONVS, *_TRANSPOSED, nn.MultiheadAttention)
_CONV1D = ("transformers.pytorch_utils", "Conv1D")
"""Where GPT-2's linear layer lives, whose weight is (in, out). By name, since Transformers need not be installed."""
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class Candidate:
    """One parameter of two or more dimensions, with every module that holds it (several when tied)."""

    param: nn.Parameter
    owners: list[tuple[str, nn.Module, str]]
    """(module name, module, parameter name in it), in the model's order."""
    why_not: str = ""
    """Why the weight cannot be sparse whatever the pattern; empty if it can."""

    @property
    def names(self) -> list[str]:
        """The parameter's names in the model's state dict, one per owner."""
        return [f"{module}.{param}" if module else param for module, _, param in self.owners]


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every candidate of `model`, those included whose absence a report must explain; each tied parameter once."""
    found: dict[int, Candidate] = {}
    foreign: dict[int, str] = {}
    for module_name, module in model.named_modules():
        sparse_names = _weight_names(module)
        for param_name, param in module._parameters.items():
            if param is None:
                continue
            lazy = isinstance(param, UninitializedParameter)
            if not lazy and param.dim() < 2:
                continue
            candidate = found.setdefault(id(param), Candidate(param, []))
            candidate.owners.append((module_name, module, param_name))
            if lazy:
                candidate.why_not = "not initialised yet: run a forward pass first"
            elif not param.dtype.is_floating_point or param.element_size() < 2:
                candidate.why_not = f"{param.dtype}: masks need fp64, fp32, bf16 or fp16"
            elif param_name not in sparse_names:
                foreign[id(param)] = _why_not_foreign(module)
    for key, candidate in found.items():
        if key in foreign:
            tied = len(candidate.owners) > 1
            candidate.why_not = f"tied to {foreign[key]}" if tied else foreign[key]
        yield candidate


def is_supported(module: nn.Module) -> bool:
    """Whether `module` is of a layer type whose weight can be sparse (or a subclass of one)."""
    return bool(_weight_names(module)) and ("weight" in module._parameters or isinstance(module, nn.MultiheadAttention))


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of `module` has its input channels first: a transposed convolution, or GPT-2's Conv1D."""
    return isinstance(module, _TRANSPOSED) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return any((kind.__module__, kind.__qualname__) == _CONV1D for kind in type(module).__mro__)


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION_WEIGHTS
    if isinstance(module, _LAYERS) or _is_conv1d(module):
        return ("weight",)
    return ()


def _why_not_foreign(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"recurrent layer {kind}: not supported"
    if isinstance(module, parametrize.ParametrizationList):
        return "parametrized: the weight is computed from other parameters"
    if _weight_names(module) == ("weight",):
        return "weight_norm or spectral_norm: the weight is computed from other parameters"
    return f"not a weight of a supported layer (belongs to {kind})"


def reduction_dims(module: nn.Module, weight_dims: int, layout: Layout) -> tuple[int, ...]:
    """The reduction dimensions of a weight with `weight_dims` dimensions of `module`, in grouping order.

    Linear and attention weights are (out, in): ``(1,)``. Convolutions are (out, in/groups, *kernel): ``(1,)`` in the
    channel layout, all but the first in the kernel layout. Transposed convolutions are (in, out/groups, *kernel), and
    Hugging Face's Conv1D (in, out): ``(0,)``, or dimension 0 and the kernel's.
    """
    if not is_transposed(module):
        return dims_by_shape(weight_dims, layout)
    return (0,) if layout == "channel" else (0, *range(2, weight_dims))


def dims_by_shape(weight_dims: int, layout: Layout) -> tuple[int, ...]:
    """The reduction dimensions of a tensor of which nothing but the shape is known: (out, in, *kernel) is assumed."""
    return (1,) if layout == "channel" else tuple(range(1, weight_dims))


def why_not_pattern(module: nn.Module, shape: tuple[int, ...], pattern: NMPattern, dims: tuple[int, ...]) -> str:
    """Why a weight of this shape in `module` cannot have `pattern` along `dims`; empty if it can."""
    size = run_length(module, shape, dims)
    if size % pattern.m:
        return f"reduction size {size} is not divisible by {pattern.m}"
    return ""


def run_length(module: nn.Module, shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    """How many entries of a weight of this shape in `module` follow each other along `dims`: what M must divide."""
    size = reduction_size(shape, dims)
    # A group must not span two convolution groups, whose input channels follow each other in dimension 0.
    return size // module.groups if isinstance(module, _TRANSPOSED) else size
