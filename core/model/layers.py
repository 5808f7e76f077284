"""How a layer becomes sparse: its class is swapped for a subclass whose weight is a property.

The property returns the masked weight, so whoever reads ``layer.weight`` (forward, fused attention, an exporter)
computes with the sparse one, while ``_parameters`` and ``state_dict`` keep the dense shadow weight under its own name.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from nm_sparsity.core import masks
from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.masks.batched import on_stream
from nm_sparsity.core.masks.ops import is_plain, straight_through
from nm_sparsity.core.methods import WeightState
from nm_sparsity.core.model import bank
from nm_sparsity.core.model.candidates import why_not_tensor
from nm_sparsity.core.model.wrappers import name_in_state, unwrap
from nm_sparsity.core.model.write_through import WriteThrough, hand_out

_live: dict[int, ref[SparseLayer]] = {}
_GET_PARAMETER = nn.Module.get_parameter.__code__
"""What looks for a Parameter by name, as Hugging Face's loader does."""
_WRAPPERS = {id(inspect.unwrap(f).__code__) for f in (WeightNorm.apply, parametrize.register_parametrization)}
"""What reads a weight to put something else in its place, and writes before it takes the Parameter out of the layer."""
_QUANTIZE = "finalize the model, then quantize it; quantization-aware training prepares it before sparsify"
_blocks = threading.Lock()


def live_layers() -> list[SparseLayer]:
    """Every sparse layer alive, deep copies and unpickled ones too: where optimizer steps find the shadow weights."""
    # A dict is copied in one go, whatever other threads and the garbage collector do meanwhile.
    return [layer for reference in list(_live.values()) if (layer := reference()) is not None and layer.nm_weights]


def _register(layer: SparseLayer) -> None:
    key = id(layer)

    def gone(_: object) -> None:
        _live.pop(key, None)
        bank.structure_changed()

    _live[key] = ref(layer, gone)
    bank.structure_changed()


class SparseLayer:
    """Mixin in front of a dense layer class; made by `convert`, undone by `revert`."""

    # Defaults on the class, so that ``type(layer)(...)`` makes a layer that is dense until it is converted.
    nm_weights: dict[str, WeightState] = {}  # noqa: RUF012
    """What makes each weight sparse, by parameter name."""
    _nm_raw = False
    """While set, the weight properties return the shadow weights."""
    _nm_frozen: dict[tuple[str, torch.dtype, int], tuple[Tensor, Tensor]] | None = None
    """Inside `frozen`: the shadow weights and the masked weights computed of them so far, by stream."""
    _nm_blocks = 0
    """How many `frozen` blocks the layer is in."""
    _parameters: dict[str, nn.Parameter | None]

    def apply(self, fn: Callable[[nn.Module], None]) -> SparseLayer:
        """As `nn.Module.apply`, with `fn` seeing the shadow weight, so that initialisers reach it."""
        with _raw(self):
            super().apply(fn)  # type: ignore[misc]
        return self

    def reset_parameters(self) -> None:
        """As the dense layer's, on the shadow weight."""
        with _raw(self):
            super().reset_parameters()  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        # What `spectral_norm` and FSDP1 begin with.
        if name in self._parameters and self.nm_weights:
            raise _not_replaced(self, name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module.register_parameter`; a sparse weight makes way for nothing but another plain Parameter."""
        if isinstance(param, WriteThrough) or (param is None and name in self.nm_weights):
            raise _not_replaced(self, name)  # what `prune` begins with
        if param is not None and name in self.nm_weights and (reason := why_not_tensor(param)):
            raise SparsityError(f"{name} of a {type(self).__name__} cannot become {reason}; {_QUANTIZE}")
        super().register_parameter(name, param)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = self.__getstate__()
        transient = ("_nm_raw", "_nm_frozen", "_nm_blocks")
        kept = {key: value for key, value in state.items() if key not in transient}
        return _rebuild, (dense_class(self), tuple(self.nm_weights)), kept

    @property
    def qconfig(self) -> None:
        """What `torch.ao.quantization` puts on every layer that it means to replace; a sparse one never has it."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        if value is not None:
            raise SparsityError(f"a {type(self).__name__} cannot be prepared for quantization: {_QUANTIZE}")

    def extra_repr(self) -> str:
        patterns = sorted({str(sparse.pattern) for sparse in self.nm_weights.values()})
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join(filter(None, [own, *patterns]))


def convert(module: nn.Module, weights: dict[str, WeightState]) -> None:
    """Swap the class of `module` so that the parameters named in `weights` are sparse. In place; no tensor changes."""
    module.__dict__["nm_weights"] = weights
    module.__class__ = sparse_class(type(module), tuple(weights))  # type: ignore[arg-type]
    assert isinstance(module, SparseLayer)
    _register(module)


def revert(module: nn.Module) -> None:
    """Give a converted `module` its dense class back. In place; no tensor changes."""
    assert isinstance(module, SparseLayer)
    for state in module.nm_weights.values():
        state.ended = True
    _live.pop(id(module), None)
    bank.structure_changed()
    module.__class__ = dense_class(module)  # type: ignore[assignment]
    for key in ("nm_weights", "_nm_raw", "_nm_frozen", "_nm_blocks"):
        module.__dict__.pop(key, None)


def dense_class(module: SparseLayer) -> type[nn.Module]:
    """The class that a sparse layer had before."""
    made = next(cls for cls in type(module).__mro__ if SparseLayer in cls.__bases__)
    dense: type[nn.Module] = made.__bases__[1]
    return dense


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """The converted modules of `model` with their names, each once."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            yield name, module


def sparse_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, WeightState]]:
    """(state-dict name, shadow weight, what makes it sparse) of `model`, a tied parameter once, by its first name."""
    seen = set()
    for name, layer in sparse_layers(model):
        for param_name, sparse in layer.nm_weights.items():
            param = layer._parameters.get(param_name)
            if param is not None and id(param) not in seen:
                seen.add(id(param))
                yield name_in_state(f"{name}.{param_name}" if name else param_name), param, sparse


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A block in which each masked weight of `model` is computed once and reused: for evaluation and decoding.

    Weights must not change inside: what is written to them is not seen. Reads with gradients enabled are not cached, so
    training inside stays correct.
    """
    layers = [layer for _, layer in sparse_layers(unwrap(model))]
    with _blocks:
        for layer in layers:
            if not layer._nm_blocks:
                layer._nm_frozen = {}
            layer._nm_blocks += 1
    try:
        yield
    finally:
        with _blocks:
            for layer in layers:
                layer._nm_blocks -= 1
                if not layer._nm_blocks:
                    layer._nm_frozen = None


@contextmanager
def _raw(layer: SparseLayer) -> Iterator[None]:
    before, layer._nm_raw = layer._nm_raw, True
    try:
        yield
    finally:
        layer._nm_raw = before


@cache
def sparse_class(dense: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of a layer's class whose parameters `names` are sparse."""
    # torch.fx takes layers of torch.nn as they are, by their module's name.
    members = {"__module__": dense.__module__, **{name: _property(name) for name in names}}
    return type(f"Sparse{dense.__name__}", (SparseLayer, dense), members)


def _rebuild(dense: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    module: Any = dense.__new__(sparse_class(dense, names))  # type: ignore[arg-type]
    _register(module)
    return module


def _property(name: str) -> property:
    def get(layer: SparseLayer) -> Any:
        w = layer._parameters.get(name)
        if w is None and name not in layer._parameters:
            if name not in layer.__dict__:
                raise AttributeError(f"{type(layer).__name__} has no {name}: something took its parameter away")
            w = layer.__dict__[name]
        state = layer.nm_weights.get(name)
        if w is None or state is None or layer._nm_raw:
            return w
        try:
            weight = bank.ready(w, state)
            if weight is None or sys._getframe(1).f_code is _GET_PARAMETER:
                return _effective(layer, name, w, state)
            return weight
        except AttributeError as error:
            # nn.Module would answer an AttributeError with the dense weight from _parameters, in silence.
            raise RuntimeError(f"the sparse weight {name} of {type(layer).__name__} failed: {error}") from error

    def set_plain(layer: SparseLayer, value: Any) -> None:
        # nn.Module handles Parameters itself; DataParallel's replicas carry plain tensors.
        layer.__dict__[name] = value

    def delete(layer: SparseLayer) -> None:
        raise _not_replaced(layer, name)

    return property(get, set_plain, delete)


def _not_replaced(layer: SparseLayer, name: str) -> SparsityError:
    return SparsityError(
        f"{type(layer).__name__}.{name} belongs to a sparse layer and cannot be replaced by a wrapper (FSDP1, "
        "prune, parametrize, weight_norm): use fully_shard, or call finalize or unsparsify first"
    )


def _effective(layer: SparseLayer, name: str, w: Tensor, state: WeightState) -> Any:
    """What `layer` computes with: inside a pass the value made there, otherwise one made now."""
    if not torch.compiler.is_dynamo_compiling() and sys._getframe(2).f_code is _GET_PARAMETER:
        return w
    if not is_plain(w):
        return _seen(layer, name, w, state)
    dtype = bank.computed_dtype(w)
    if state.lost:
        state.lost = False
        raise RuntimeError(
            f"something was written to {type(layer).__name__}.{name} through a view, detach(), out= or a foreach "
            "function of it, and did not reach the weight: write to model.get_parameter(...) instead"
        )
    frozen_values = layer._nm_frozen
    if (
        frozen_values is not None
        and not torch.is_grad_enabled()
        and (where := on_stream(w.device)) is not None  # a graph that is captured makes its own
    ):
        of, value = frozen_values.get((name, dtype, where), (None, w))
        if of is not w:  # which `functional_call` replaces
            value = state.value(w, dtype)
            frozen_values[name, dtype, where] = w, value
        return hand_out([value], 0, (w, state))
    weight = bank.value_in_pass(layer, name, w, state, dtype)
    if weight is not None:
        return weight
    if id(sys._getframe(2).f_code) in _WRAPPERS:
        raise _not_replaced(layer, name)
    on_stream(w.device)
    return hand_out([state.value(w, dtype)], 0, (w, state), watched=True)


def _seen(layer: SparseLayer, name: str, w: Tensor, state: WeightState) -> Tensor:
    """What `layer` computes with where somebody watches, who sees nothing but operations."""
    if type(w) is DTensor:
        return _sharded(layer, name, w, state)
    dtype = bank.computed_dtype(w)
    if state.selects:
        return masks.keep_largest(w, state.pattern, state.dims, dtype)
    return straight_through(w, state.value(w, dtype))


def _sharded(layer: SparseLayer, name: str, w: DTensor, state: WeightState) -> DTensor:
    """`w` itself, which FSDP2 reads outside of forward to register its shard; inside it has gathered a plain tensor."""
    if 0 in state.dims:
        raise RuntimeError(
            f"{type(layer).__name__}.{name} groups its dimension 0, which FSDP2 shards: "
            "exclude transposed convolutions and Conv1D from sparsify when using fully_shard"
        )
    frame = None if torch.compiler.is_dynamo_compiling() else sys._getframe(2)
    while frame is not None and not (frame.f_code.co_name == "forward" and frame.f_locals.get("self") is layer):
        frame = frame.f_back
    if frame is not None or torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            f"{type(layer).__name__}.{name} is a tensor-parallel DTensor: N:M layers support FSDP2's "
            "fully_shard and DDP, not tensor parallelism; exclude this layer from sparsify"
        )
    return w
