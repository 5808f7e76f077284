"""Which weights of a model can be N:M sparse, along which dimensions their groups lie, and why others cannot be."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from nm_sparsity.core.masks.groups import reduction_size
from nm_sparsity.core.model.wrappers import name_in_state
from nm_sparsity.core.pattern import Layout, NMPattern

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, *_CONVS, *_TRANSPOSED, nn.MultiheadAttention)
_CONV1D = ("transformers.pytorch_utils", "Conv1D")
"""Where GPT-2's linear layer lives, whose weight is (in, out). By name, since Transformers need not be installed."""
_BASES = frozenset(_LAYERS)
_KNOWN = frozenset(
    {
        "mmcv.cnn.bricks.conv2d_adaptive_padding:Conv2dAdaptivePadding",
        "mmcv.cnn.bricks.wrappers:Conv2d",
        "mmcv.cnn.bricks.wrappers:Conv3d",
        "mmcv.cnn.bricks.wrappers:ConvTranspose2d",
        "mmcv.cnn.bricks.wrappers:ConvTranspose3d",
        "mmcv.cnn.bricks.wrappers:Linear",
        "mmcv.ops.masked_conv:MaskedConv2d",
        "timm.layers.conv2d_same:Conv2dSame",
        "timm.layers.conv2d_same:Conv2dSameExport",
        "timm.layers.linear:Linear",
        "transformers.models.deepseek_v4.modeling_deepseek_v4:DeepseekV4GroupedLinear",
        "transformers.models.dory.modeling_dory:DoryLMHead",
        "transformers.models.falcon.modeling_falcon:FalconLinear",
        "transformers.models.gemma4.modeling_gemma4:Gemma4AudioCausalConv1d",
        "transformers.models.idefics.modeling_idefics:IdeficsDecoupledLinear",
        "transformers.models.lasr.modeling_lasr:LasrEncoderCTCHead",
        "transformers.models.llama4.modeling_llama4:Llama4Router",
        "transformers.models.moonshine_streaming.modeling_moonshine_streaming:MoonshineStreamingCausalConv1d",
        "transformers.models.muse_spark.modeling_muse_spark:MuseSparkAudioCausalConv1d",
        "transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming:NemotronAsrStreamingEncoderCausalConv1d",
        "transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming:NemotronAsrStreamingEncoderCausalConv2D",
        "transformers.models.parakeet.modeling_parakeet:ParakeetEncoderCTCHead",
        "transformers.models.perceiver.modeling_perceiver:Conv2dSamePadding",
        "transformers.models.phimoe.modeling_phimoe:PhimoeTopKRouter",
        "transformers.models.voxtral_realtime.modeling_voxtral_realtime:VoxtralRealtimeCausalConv1d",
        ":".join(_CONV1D),
    }
)
"""Classes with a forward of their own that multiplies with the weight as it is. Others may standardise, normalise or
quantize it, and then what they compute with is not N:M."""
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


def candidates(model: nn.Module, trust: Collection[str] = ()) -> Iterator[Candidate]:
    """Every candidate of `model`, those included whose absence a report must explain; each tied parameter once.

    Classes named in `trust` (see `class_name`) are taken to multiply with their weight as it is.
    """
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
            candidate.owners.append((name_in_state(module_name), module, param_name))
            if lazy:
                candidate.why_not = "not initialised yet: run a forward pass first"
            elif reason := why_not_tensor(param):
                candidate.why_not = reason
            elif param_name not in sparse_names:
                foreign[id(param)] = _why_not_foreign(module)
            elif reason := _why_not_trusted(module, trust):
                foreign[id(param)] = reason
    for key, candidate in found.items():
        if key in foreign:
            tied = len(candidate.owners) > 1
            candidate.why_not = f"tied to {foreign[key]}" if tied else foreign[key]
        yield candidate


def find_ties_outside(model: nn.Module, found: Iterable[Candidate]) -> None:
    """Say why not of every candidate that a live module outside of `model` holds, too: that would go on dense."""
    # One reference an owner, one of the candidate, one of the call: whatever else holds a weight is looked for.
    held = {id(c.param): c for c in found if not c.why_not and sys.getrefcount(c.param) > len(c.owners) + 2}
    if not held:
        return
    gc.collect()  # what nothing can reach any more holds nothing
    inside = {id(module) for module in model.modules()}
    for module in gc.get_objects():
        if not issubclass(type(module), nn.Module) or id(module) in inside:
            continue
        for param in module.__dict__.get("_parameters", {}).values():
            if id(param) in held:
                held[id(param)].why_not = f"tied to a {type(module).__name__} outside of what was given to sparsify"


def class_name(kind: type) -> str:
    """``"package.module:Class"``, as `_KNOWN` and `trust` name classes."""
    return f"{kind.__module__}:{kind.__qualname__}"


def why_not_tensor(param: Tensor) -> str:
    """Why a tensor cannot be a sparse weight, whatever holds it; empty if it can."""
    if param.is_nested:
        return "a nested tensor"
    if type(param) is not nn.Parameter and not isinstance(param, DTensor | FakeTensor):
        return f"a {type(param).__name__}: quantized, or otherwise no plain tensor"
    if not param.dtype.is_floating_point or param.element_size() < 2:
        return f"{param.dtype}: masks need fp64, fp32, bf16 or fp16"
    return ""


def _why_not_trusted(module: nn.Module, trust: Collection[str]) -> str:
    """Why `module` may compute with something else than its weight as it is; empty if it does not."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        return f"a parametrized {kind.__bases__[0].__name__}"
    if class_name(kind) in trust:
        return ""
    if "forward" in vars(module):
        return f"a {kind.__name__} whose forward was replaced"
    for owner in kind.__mro__:
        if owner in _BASES or class_name(owner) in _KNOWN or class_name(owner) in trust:
            return ""
        if {"__call__", "forward", "_conv_forward"} & set(vars(owner)):
            return f"a {class_name(kind)}, with a forward of its own: trust it if that takes the weight as it is"
    return ""


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
