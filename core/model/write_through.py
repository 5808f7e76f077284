"""What a sparse layer hands out as its weight: the masked value, tied to the shadow weight in both directions.

Backward, the gradient passes straight through to all of the shadow weight (Bengio et al., arXiv 1308.3432): in
autograd's graph the value stands where the shadow weight stands.
Forward, what is written to it is written to the shadow weight: in-place methods, ``data``, ``grad``,
``requires_grad`` and hooks, so initialisers, adapters and freezing reach it. Operations on it give plain tensors.

Whoever writes to it takes it for the weight, so from then on this very object shows the shadow weight: initialisers
that read what they wrote go on rightly, and the next read of ``layer.weight`` is masked again.

A write through a view of it, through ``detach()``, as an ``out=`` argument or in a foreach function cannot be sent on.
It shows in the version counter of the masked value, and the next use of the weight raises. One is not seen: one
through the ``detach()`` of what was read outside a pass and is held by nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.methods import WeightState

_set_data: Callable[[Tensor, Tensor], None] = Tensor.data.__set__  # type: ignore[attr-defined]
_make_subclass: Any = Tensor._make_subclass
_ignore_hooks: Any = torch._C._autograd._saved_tensors_hooks_set_tracing


class WriteThrough(Tensor):
    """A masked weight whose writes go to the shadow weight."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    origin: tuple[Tensor, WeightState]
    """The shadow weight and its state."""
    node: object
    """What keeps the shadow weight's place in the graph alive, where gradients are recorded."""
    shows_shadow = False

    @property
    def shadow(self) -> Tensor:
        """The shadow weight."""
        return self.origin[0]

    def _sent(self) -> None:
        """A write went to the shadow weight, which this object shows from now on; kept values are stale."""
        self._notice()
        self.origin[1].writes += 1
        self.shows_shadow = True
        _set_data(self, self.shadow.data)

    def _notice(self) -> None:
        """Note a write that was not sent on, where it shows."""

    @property
    def data(self) -> Tensor:
        """The shadow weight's data, dense, to be written to."""
        self.origin[1].writes += 1  # what is written to it leaves no trace
        return self.shadow.data

    @data.setter
    def data(self, value: Tensor) -> None:
        self.shadow.data = value
        self._sent()

    @property
    def grad(self) -> Tensor | None:
        """The shadow weight's gradient."""
        return self.shadow.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.shadow.grad = value

    @property
    def requires_grad(self) -> bool:
        """Whether the shadow weight requires a gradient."""
        return self.shadow.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.shadow.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> WriteThrough:
        """As `Tensor.requires_grad_`, of the shadow weight."""
        self.shadow.requires_grad_(requires_grad)
        return self

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """As `Tensor.register_hook`, of the shadow weight, so that it outlives this object."""
        return self.shadow.register_hook(hook)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> Any:
        """As `Tensor.register_post_accumulate_grad_hook`, of the shadow weight."""
        return self.shadow.register_post_accumulate_grad_hook(hook)

    def retain_grad(self) -> None:
        """The gradient is kept anyway: `grad` is that of the shadow weight."""

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """False, as of every value that is computed of a parameter."""
        return False

    @property
    def retains_grad(self) -> bool:  # type: ignore[override]
        """Only optimizers ask: they would step this value, and not the weight."""
        raise SparsityError(
            "an optimizer was given layer.weight of a sparse layer, which is its masked value: give it the parameter, "
            'from model.parameters(), model.named_parameters() or layer.get_parameter("weight")'
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        self.shadow[index] = value
        self._sent()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().clone().__reduce_ex__(protocol)


class _Watched(WriteThrough):
    """One whose value has a version counter of its own: a write that was not sent on shows when it dies."""

    def _notice(self) -> None:
        if self._version and not self.shows_shadow and hasattr(self, "origin"):
            self.origin[1].lost = True

    def __del__(self) -> None:
        self._notice()


def _sends(name: str) -> Callable[..., Tensor]:
    # ``layer.weight *= 2`` assigns what it gets to the layer, which takes a Parameter.
    augmented = name.startswith("__")

    def method(self: WriteThrough, *args: Any, **kwargs: Any) -> Tensor:
        getattr(self.shadow, name)(*args, **kwargs)
        self._sent()
        return self.shadow if augmented else self

    method.__name__, method.__doc__ = name, f"As `Tensor.{name}`, of the shadow weight."
    return method


_AUGMENTED = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__", "__imod__")
for _name in dir(Tensor):
    if _name in _AUGMENTED or (_name.endswith("_") and not _name.startswith("_") and _name not in vars(WriteThrough)):
        setattr(WriteThrough, _name, _sends(_name))


def hand_out(
    values: list[Tensor], place: int, origin: tuple[Tensor, WeightState], watched: bool = False
) -> WriteThrough:
    """``values[place]``, the masked value of the shadow weight in `origin`, as what a layer's ``weight`` is.

    Where gradients are recorded, it stands in the graph where the shadow weight does (see `_in_place_of`), and takes
    the value's place, for reads to come, those of later passes too where the list is filled again. What is `watched`
    notes when it dies that something was written to it.
    """
    (w, _), value = origin, values[place]
    recorded = torch.is_grad_enabled() and w.requires_grad and not torch.is_inference_mode_enabled()
    if recorded and type(value) is WriteThrough:
        return value
    kind = _Watched if watched and not value.is_inference() else WriteThrough
    out: WriteThrough
    if recorded:
        out = values[place] = _in_place_of(w, value, kind)
    else:
        out = _make_subclass(kind, value)
    out.origin = origin
    return out


def _in_place_of(w: Tensor, value: Tensor, kind: type[WriteThrough]) -> WriteThrough:
    """`value` where `w` stands in the graph: its gradient is that of `w`, with no node in between.

    Of a tensor that it saved, autograd makes another with the same place in the graph and the data that a hook gives.
    """
    others = _ignore_hooks(True)  # as those of a checkpoint, which count what is saved
    try:
        node: Any = torch.take(w, _no_indices(w.device)).grad_fn  # saves `w`, computes nothing
    finally:
        _ignore_hooks(others)
    data = [value]
    node._raw_saved_self.register_hooks(lambda _: None, lambda _: data.pop())
    out: WriteThrough = node._saved_self
    out.__class__ = kind
    out.node = node
    return out


@cache
def _no_indices(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)
