"""What a sparse training method is, and the registry of them by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from torch import Tensor

from nm_sparsity.core import masks
from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.masks.batched import Batch
from nm_sparsity.core.pattern import NMPattern, Placement


@dataclass(frozen=True)
class Method:
    """How sparse weights are trained. Hyperparameters are the dataclass fields; the pattern is not one of them.

    A method is stateless: what it remembers of a weight, it keeps in ``state.memory`` (tensors and numbers only),
    which checkpoints carry.
    """

    name: ClassVar[str]
    trains_sparse: ClassVar[bool] = True
    starts_trained: ClassVar[bool] = False
    """Whether it prunes a trained model: commands then ask for one to start from."""

    def value(self, w: Tensor, state: WeightState) -> Tensor:
        """What a layer computes with for the shadow weight `w`, in its shape and dtype, without autograd.

        The straight-through gradient is not the method's business. Methods that keep this one get the values of all
        weights of a model in one kernel launch.
        """
        return masks.keep_largest(w.detach(), state.pattern, state.dims)

    def before_step(self, step: Step) -> None:
        """Change gradients in place, right before the optimizer's update."""

    def after_step(self, step: Step) -> None:
        """Change weights in place, right after the optimizer's update."""

    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters by name."""
        return asdict(self)


@dataclass
class Step:
    """The part of an optimizer step that one method treats: weights of one parameter group, and their gradients.

    All lists have one entry per weight. Weights are fp32 unless the user's are not; under FSDP2 they and the gradients
    are this rank's rows, so groups are whole.
    """

    states: list[WeightState]
    batch: Batch
    """The weights, for what is done with all of them at once; ``batch.weights`` lists them."""
    grads: list[Tensor | None]
    """Of the weights' shapes; None where backward gave none."""
    scale: float | Tensor
    """What to multiply with before adding to the gradients: the loss scale where a fused optimizer unscales inside
    ``step``, negative where the optimizer maximizes, 0 where the step moves no weight."""
    moves: bool = True
    """False where the learning rate is 0: no memory of a method should begin with such a step."""


@dataclass(slots=True)  # every read of a weight looks into it
class WeightState:
    """What makes one weight sparse: its pattern, its reduction dimensions, its method, and the method's memory."""

    pattern: NMPattern
    dims: tuple[int, ...]
    method: Method
    memory: dict[str, Any] = field(default_factory=dict)
    lr_sum: float | Tensor = 0.0
    """Sum of the learning rates of all optimizer steps so far: lambda * lr_sum is the strength of the decay."""
    preconditioned: bool = False
    """Whether an adaptive optimizer stepped it, under which the strength has no natural scale."""
    stepped: bool = field(default=False, compare=False)
    """Whether an optimizer of this process stepped it."""
    writes: int = field(default=0, compare=False)
    """How often something was written to the weight through what the layer handed out: values kept before are stale."""
    lost: bool = field(default=False, compare=False)
    """Whether something was written to what the layer handed out in a way that could not be sent on."""
    ended: bool = field(default=False, compare=False)
    """Whether the weight was finalized, or made dense again, by its user's wish."""

    @property
    def placement(self) -> Placement:
        """The pattern and the reduction dimensions."""
        return Placement(self.pattern, self.dims)

    @property
    def batched(self) -> bool:
        """Whether values come from `keep_largest`, for all weights of a model at once."""
        return type(self.method).value is Method.value

    def value(self, w: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The method's value for the shadow weight `w`, without autograd, rounded to `dtype` if one is given."""
        value = self.method.value(w, self)
        return (value if dtype is None else value.to(dtype)).data  # with a version counter that starts at 0


_METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Class decorator that makes `method` known by its ``name``."""
    _METHODS[method.name] = method
    return method


def method_names() -> list[str]:
    """The names that `make_method` accepts."""
    return sorted(_METHODS)


def make_method(name: str | Method, **hyperparameters: Any) -> Method:
    """The method called `name` with the given hyperparameters; a `Method` object passes through.

    A value given as text, as command lines and config files have it, is converted to the type of the method's field.

    Raises:
        SparsityError: for an unknown name, an unknown hyperparameter, or a value of the wrong type or out of range.
    """
    if isinstance(name, Method):
        if hyperparameters:
            raise SparsityError(f"give hyperparameters either in {name!r} or as keywords, not both")
        return name
    if name not in _METHODS:
        raise SparsityError(f'unknown method "{name}"; known methods: {", ".join(method_names())}')
    known = [f.name for f in fields(_METHODS[name])]
    for key, value in hyperparameters.items():
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise SparsityError(f'method "{name}" has no hyperparameter "{key}"; {takes}')
        if isinstance(value, str):
            kind = get_type_hints(_METHODS[name])[key]
            hyperparameters[key] = _parse(value, kind, f'hyperparameter "{key}" of method "{name}"')
    make: Callable[..., Method] = _METHODS[name]
    return make(**hyperparameters)


def _parse(text: str, kind: Any, what: str) -> Any:
    """The value of type `kind` that `text` stands for; of a union, the first type that fits."""
    kinds = get_args(kind) or (kind,)
    for option in kinds:
        if option is str:
            return text
        if option is NoneType and text.lower() == "none":
            return None
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option in (int, float):
            with suppress(ValueError):
                return option(text)
    names = " or ".join("None" if option is NoneType else option.__name__ for option in kinds)
    raise SparsityError(f'{what} must be {names}, found "{text}"')
