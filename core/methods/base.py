"""What a sparse training method is, and the registry of them by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor

from nm_sparsity.core import masks
from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.masks.batched import Batch
from nm_sparsity.core.methods.schedules import Schedule
from nm_sparsity.core.pattern import NMPattern, Placement

AUTO_UNTIL = 0.5
"""The fraction of the run at which ``precondition="auto"`` ends the dense phase at the latest."""


@dataclass(frozen=True)
class Method:
    """How sparse weights are trained. Hyperparameters are the dataclass fields; the pattern is not one of them.

    A method is stateless: what it remembers of a weight, it keeps in ``state.memory`` (tensors and numbers only),
    which checkpoints carry. The fields here are options of every method, which `nm_sparsity.core.training` carries
    out.

    Raises:
        SparsityError: for an option out of range.
    """

    name: ClassVar[str]
    trains_sparse: ClassVar[bool] = True
    starts_trained: ClassVar[bool] = False
    """Whether it prunes a trained model: commands then ask for one to start from."""

    total_steps: int | None = field(default=None, kw_only=True)
    """The optimizer steps of the whole run, which schedules and fractions of the run refer to."""
    dense_until: float = field(default=0.0, kw_only=True)
    """The fraction of the run before which weights are dense."""
    precondition: float | str | None = field(default=None, kw_only=True)
    """STEP: dense until this fraction of the run, or "auto", from where on Adam's second moment is held."""
    fix_at: float | None = field(default=None, kw_only=True)
    """The fraction of the run at which the mask is fixed for the rest."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, _plain(value))
        if self.total_steps is not None and self.total_steps < 1:
            raise SparsityError(
                f"total_steps must be the number of optimizer steps, at least 1, found {self.total_steps}"
            )
        for name in ("dense_until", "precondition", "fix_at"):
            value = getattr(self, name)
            if value is not None and not (value == "auto" if isinstance(value, str) else 0 <= value <= 1):
                expected = "a fraction of the run, from 0 to 1" + (', or "auto"' if name == "precondition" else "")
                raise SparsityError(f"{name} must be {expected}, found {value}")
        if self.precondition is not None and self.dense_until:
            raise SparsityError("precondition trains dense at first, too: leave dense_until out")

    @property
    def starts_dense(self) -> bool:
        """Whether weights are dense at first."""
        return self.precondition is not None or self.dense_until > 0

    @property
    def latest_start(self) -> float:
        """The fraction of the run at which weights become sparse at the latest."""
        return max(self.dense_until, AUTO_UNTIL if self.precondition == "auto" else float(self.precondition or 0))

    @cached_property
    def scheduled(self) -> bool:
        """Whether anything changes over the run, so that its length must be known."""
        return self.starts_dense or bool(self.fix_at) or any(isinstance(v, Schedule) for v in vars(self).values())

    def check_complete(self) -> None:
        """Raise unless all that training needs is known: the length of the run, where something changes over it.

        Raises:
            SparsityError: telling how to give it.
        """
        if self.scheduled and self.total_steps is None:
            raise SparsityError(
                f'method "{self.name}" as given changes over the run: give total_steps, the number of its optimizer '
                "steps, e.g. sparsify(..., total_steps=10_000)"
            )

    def now(self, hyperparameter: str, state: WeightState) -> float | Tensor:
        """What `hyperparameter` is at the step of `state`: itself, or a scheduled one's value as a 0-dim tensor."""
        value: Any = getattr(self, hyperparameter)
        return value.at(state.progress) if isinstance(value, Schedule) else value

    def decay_share(self, state: WeightState) -> Tensor:
        """The part of the largest lambda that acts at the step of `state`, as a 0-dim tensor: 0 while it is dense."""
        decay, share = getattr(self, "decay", None), torch.ones_like(state.progress)
        if isinstance(decay, Schedule):
            share = decay.at(state.progress) / (decay.largest or 1.0)
        return share * ~state.dense if self.starts_dense else share

    def value(self, w: Tensor, state: WeightState) -> Tensor:
        """What a layer computes with for the shadow weight `w`, in its shape and dtype, without autograd.

        The straight-through gradient is not the method's business.
        """
        return masks.keep_largest(w.detach(), state.pattern, state.dims)

    def values(self, batch: Batch, states: Sequence[WeightState], dtype: torch.dtype) -> list[Tensor]:
        """`value` of all weights in `batch` rounded to `dtype`, in one kernel launch.

        A method with another `value` than this one belongs to is asked for it a weight at a time.
        """
        return batch.keep_largest(dtype)

    def before_step(self, step: Step) -> None:
        """Change gradients in place, right before the optimizer's update."""

    def after_step(self, step: Step) -> None:
        """Change weights in place, right after the optimizer's update."""

    def hyperparameters(self) -> dict[str, Any]:
        """The method's own hyperparameters by name, and the options that are set; schedules as text."""
        options = [option.name for option in fields(Method)]
        shown = [f.name for f in fields(self) if f.name not in options or getattr(self, f.name) != f.default]
        values = {name: getattr(self, name) for name in sorted(shown, key=options.__contains__)}
        return {name: str(value) if isinstance(value, Schedule) else value for name, value in values.items()}


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
    counts: int | Tensor = 1
    """0 where the step is none: its learning rate and all gradients are 0."""
    fixing: Tensor | None = None
    """Whether the masks are fixed at this step, as a 0-dim tensor; None where it is known that they are not."""
    sharded_over: Sequence[dist.ProcessGroup] = ()
    """The process groups over which the rows of the weights are sharded."""

    def over_ranks(self, sums: Tensor) -> Tensor:
        """`sums` over the rows of this rank, summed over all ranks that hold rows of the same weights; in place."""
        for group in self.sharded_over:
            dist.all_reduce(sums, group=group)
        return sums


@dataclass(slots=True)  # every read of a weight looks into it
class WeightState:
    """What makes one weight sparse: its pattern, its reduction dimensions, its method, and the method's memory."""

    pattern: NMPattern
    dims: tuple[int, ...]
    method: Method
    memory: dict[str, Any] = field(default_factory=dict)
    selects: bool = field(init=False, compare=False)
    """Whether the value is `keep_largest` of the weight."""
    batched: bool = field(init=False, compare=False)
    """Whether values are made for all weights of a model at once."""
    steps: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64, device="cpu"), compare=False)
    """How many optimizer steps of the run are done, on the weight's device; counted where the method is scheduled."""
    lr_sum: float | Tensor = 0.0
    """Sum of the learning rates of all optimizer steps so far, each times the part of the largest lambda that acted:
    the largest lambda * lr_sum is the strength of the decay."""
    preconditioned: bool = False
    """Whether an adaptive optimizer stepped it, under which the strength has no natural scale."""
    stepped: bool = field(default=False, compare=False)
    """Whether an optimizer of this process stepped it."""
    writes: int = field(default=0, compare=False)
    """How often something was written to the weight through what the layer handed out: values kept before are stale."""
    lost: bool = field(default=False, compare=False)
    """Whether something was written to what the layer handed out in a way that could not be sent on."""
    settled: tuple[int, int] | None = field(default=None, compare=False)
    """`writes` and the weight's version when a fixed mask was last applied: others since tell of a weight loaded."""
    ended: bool = field(default=False, compare=False)
    """Whether the weight was finalized, or made dense again, by its user's wish."""

    @property
    def placement(self) -> Placement:
        """The pattern and the reduction dimensions."""
        return Placement(self.pattern, self.dims)

    def __post_init__(self) -> None:
        value, values = (_owner(type(self.method), name) for name in ("value", "values"))
        self.selects = value is values is Method and not self.method.starts_dense
        self.batched = issubclass(values, value) and not self.method.starts_dense

    def move_to(self, device: torch.device) -> None:
        """Take the count and the memory to the weight's `device`: what was made new, or comes from a file, may lie on
        another."""
        if self.steps.device != device:
            self.steps = self.steps.to(device)
        for key, value in self.memory.items():
            if isinstance(value, Tensor) and value.device != device:
                self.memory[key] = value.to(device)

    @property
    def progress(self) -> Tensor:
        """The fraction of the run that is done, as a 0-dim tensor on the weight's device."""
        assert self.method.total_steps is not None  # `sparsify` has checked
        wide = torch.float64 if self.steps.device.type == "cpu" else torch.float32  # which some devices lack
        return self.steps.to(wide) / self.method.total_steps

    def boundary(self, fraction: float) -> int:
        """The first step at which `fraction` of the run is done."""
        return math.ceil(fraction * (self.method.total_steps or 0) - 1e-6)

    def reached(self, fraction: float) -> Tensor:
        """Whether `fraction` of the run is done, as a 0-dim tensor on the weight's device."""
        return self.steps >= self.boundary(fraction)

    @property
    def dense(self) -> Tensor:
        """Whether the weight is dense yet, as a 0-dim tensor on the weight's device."""
        method = self.method
        if method.precondition == "auto":
            held = self.memory.get("held", torch.zeros_like(self.steps, dtype=torch.bool))
            return ~held.to(self.steps.device)
        return ~self.reached(method.latest_start)

    def why_unfinished(self, name: str, value: Tensor) -> str:
        """Why the `value` of the weight called `name` is not N:M: where its method is in the run; empty if it is."""
        if masks.satisfies(value, self.pattern, self.dims):
            return ""
        where = f"at step {int(self.steps):,} of {self.method.total_steps:,} of method"
        return f'{where} "{self.method.name}", {name} is not {self.pattern} yet'

    def value(self, w: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The method's value for the shadow weight `w`, without autograd, rounded to `dtype` if one is given."""
        if self.method.scheduled and self.steps.device != w.device:
            return replace(self, steps=self.steps.to(w.device)).value(w, dtype)
        value = self.method.value(w, self)
        if self.method.starts_dense:
            value = torch.where(self.dense, w.detach(), value)
        if value.stride() != w.stride():  # the same product in other strides may round otherwise
            value = torch.empty_like(w).copy_(value)
        if dtype is not None and dtype is not value.dtype:
            value = value.to(dtype)
        return value.data  # with a version counter that starts at 0


def _owner(method: type[Method], name: str) -> type:
    """The class that `method` has an attribute from."""
    return next(owner for owner in method.__mro__ if name in vars(owner))


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
    if not isinstance(name, str) or name not in _METHODS:
        raise SparsityError(f'unknown method "{name}"; known methods: {", ".join(method_names())}')
    options = [f.name for f in fields(Method)]
    own = [f.name for f in fields(_METHODS[name]) if f.name not in options]
    for key, value in hyperparameters.items():
        if key not in (*own, *options):
            takes = f"it takes {', '.join(own) or 'none of its own'}, and as every method {', '.join(options)}"
            raise SparsityError(f'method "{name}" has no hyperparameter "{key}"; {takes}')
        kind, what = get_type_hints(_METHODS[name])[key], f'hyperparameter "{key}" of method "{name}"'
        if isinstance(value, str):
            hyperparameters[key] = _parse(value, kind, what)
        elif not any(_is_of(value, option) for option in _options(kind)):
            raise SparsityError(f"{what} must be {_names(kind)}, found {value!r}")
    make: Callable[..., Method] = _METHODS[name]
    return make(**hyperparameters)


def _plain(value: Any) -> Any:
    """`value`, a number as one of Python's: files of numbers of NumPy load only where code of NumPy may run."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _options(kind: Any) -> Sequence[Any]:
    """The types in a union, text last; any other type alone."""
    union = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return sorted(union, key=lambda option: option is str)


def _names(kind: Any) -> str:
    return " or ".join("None" if option is NoneType else option.__name__.lower() for option in _options(kind))


def _is_of(value: Any, kind: Any) -> bool:
    kind = {float: Real, int: Integral}.get(kind, get_origin(kind) or kind)
    return not isinstance(kind, type) or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))


def _parse(text: str, kind: Any, what: str) -> Any:
    """The value of type `kind` that `text` stands for; of a union, the first type that fits, text last."""
    for option in _options(kind):
        if option is str:
            return text
        if option is NoneType and text.lower() == "none":
            return None
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option is Schedule and "(" in text:
            return Schedule.parse(text)
        if option in (int, float):
            with suppress(ValueError):
                return option(text)
    raise SparsityError(f'{what} must be {_names(kind)}, found "{text}"')
