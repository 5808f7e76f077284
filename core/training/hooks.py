"""Where sparse training touches the optimizer: right before and after each update, with no call of the user's.

Global step hooks of ``torch.optim`` find, at each step of any optimizer, the shadow weights that it holds. By then the
gradient has been accumulated, reduced over ranks, unscaled and clipped, so lambda keeps its nominal value. A step looks
at nothing but what its own optimizer holds: other models may be training in other threads.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import chain
from operator import attrgetter, is_
from types import FrameType, NoneType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.masks.batched import Batch
from nm_sparsity.core.methods import Step, WeightState
from nm_sparsity.core.model import bank, layers
from nm_sparsity.core.training import phases, second_moment, watchdog

_outside_graphs: Any = torch._disable_dynamo  # type: ignore[attr-defined]
"""What torch.optim uses itself: a compiled step calls the hooks as they are."""

_memory: Any = attrgetter("memory")
_PLAN, _HANDLE, _TREATED = "_nm_plan", "_nm_handle", "_nm_treated"
"""Attributes of an optimizer: what it holds, our place among its hooks, what was treated in the running step."""


class _Weight(NamedTuple):
    held: dict[str, nn.Parameter | None]
    """What its layer holds; the layer itself may go."""
    name: str
    param: nn.Parameter
    state: WeightState


class _Part:
    """The weights of one method and device in one parameter group of an optimizer, which are treated together."""

    def __init__(self, group: int, weights: list[_Weight]) -> None:
        self.group = group
        self.method = weights[0].state.method
        self.weights = weights
        self.params = [weight.param for weight in weights]
        self.states = [weight.state for weight in weights]
        self.counted = False
        self.places: list[Tensor] = []
        """Where the sums of learning rates are kept, once they are on a device."""
        self.sharded = any(isinstance(param, DTensor) for param in self.params)
        self.groups = _sharding_groups(self.params[0])
        self.batch = Batch([_local(w.param, w.state) for w in weights], [w.state.placement for w in weights])

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.batch.weights[0].device

    def is_local(self) -> bool:
        """Whether the batch still has this rank's shards, which ``model.to`` replaces in the same parameters."""
        return not self.sharded or all(
            # Each look at a shard may be a new tensor.
            _local(w.param, w.state).is_set_to(shard)
            for w, shard in zip(self.weights, self.batch.weights, strict=True)
        )

    def step(self, optimizer: Optimizer) -> Step:
        """What the method sees of the present step."""
        if self.method.scheduled or any(map(_memory, self.states)):
            for state, w in zip(self.states, self.batch.weights, strict=True):
                state.move_to(w.device)
        group = optimizer.param_groups[self.group]
        grads: list[Tensor | None] = [param.grad for param in self.params]
        if DTensor in set(map(type, grads)):
            grads = [g if g is None else _local(g, state) for g, state in zip(grads, self.states, strict=True)]
        # A fused optimizer divides by the loss scale inside step.
        scale = _beside(getattr(optimizer, "grad_scale", None), self.device)
        sign = -1.0 if group.get("maximize") else 1.0
        step = Step(self.states, self.batch, grads, sign if scale is None else scale * sign, sharded_over=self.groups)
        lr = group.get("lr")
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            # Not asked for its value. Whether all gradients are zero too would take a look at all of them.
            step.scale = step.scale * _beside(lr, self.device).ne(0)
        elif lr is not None and not float(lr):
            step.moves, step.counts = False, _any_nonzero(grads)
            step.scale = step.scale * step.counts
        return step

    def second_moments(self, optimizer: Optimizer) -> list[Tensor | None]:
        """Adam's second moment of each weight, this rank's rows of it; None where there is none."""
        found = [optimizer.state.get(param, {}).get("exp_avg_sq") for param in self.params]
        return [v if v is None else _local(v, state) for v, state in zip(found, self.states, strict=True)]

    def count(self, step: Step, lr: float | Tensor, skipped: Tensor | None, preconditioned: bool) -> None:
        """Add the learning rate of a step to the sums, on the device where it or the skipping is known only there."""
        treated = self.states
        if NoneType in set(map(type, step.grads)):
            treated = [state for state, grad in zip(self.states, step.grads, strict=True) if grad is not None]
        if self.method.scheduled:
            lr = lr * self.method.decay_share(self.states[0])
        lr, skipped = _beside(lr, self.device), _beside(skipped, self.device)
        taken = None if skipped is None else skipped == 0
        on_device = self.device.type != "cpu"  # where a graph may have captured the step
        if on_device or isinstance(lr, Tensor) or taken is not None or isinstance(self.states[0].lr_sum, Tensor):
            lr = lr if taken is None else lr * taken
            sums = self._sums()
            if len(treated) == len(self.states):
                sums.add_(lr)
            else:
                torch._foreach_add_([t for t, g in zip(sums.unbind(), step.grads, strict=True) if g is not None], lr)
        else:
            for state in treated:
                state.lr_sum = state.lr_sum + lr
        if self.method.scheduled:
            done = step.counts if taken is None else step.counts * taken
            torch._foreach_add_([state.steps for state in self.states], done)
        if not self.counted:
            for state in treated:
                state.stepped = True
                state.preconditioned |= preconditioned
            self.counted = len(treated) == len(self.states)

    def _sums(self) -> Tensor:
        """The sums as views of one tensor where the weights lie, so that one launch adds to all."""
        places = [state.lr_sum for state in self.states]
        if not self.places or not all(map(is_, places, self.places)):
            self.places = self._side_by_side()
        base: Tensor = self.places[0]._base  # type: ignore[assignment]
        return base

    def _side_by_side(self) -> list[Tensor]:
        sums, device = [state.lr_sum for state in self.states], self.device
        placed = [t for t in sums if isinstance(t, Tensor) and t.device == device]
        order = [(id(base), t.storage_offset(), base.numel()) for t in placed if (base := t._base) is not None]
        if order and order == [(order[0][0], i, len(sums)) for i in range(len(sums))]:
            return placed  # of an earlier plan: a graph that captured a step may add to them
        wide = torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # which other devices may lack
        places = list(torch.empty(len(sums), dtype=wide, device=device).unbind())
        for place, before, state in zip(places, sums, self.states, strict=True):
            place.copy_(before) if isinstance(before, Tensor) else place.fill_(before)
            state.lr_sum = place
        return places


def _beside(value: Any, device: torch.device) -> Any:
    """A number that lies on another GPU than `device`, brought there; others as they are."""
    if isinstance(value, Tensor) and value.device.type == device.type and value.device != device:
        return value.to(device, non_blocking=True)
    return value


class _Plan:
    """What an optimizer holds, by parameter group and method; made anew when that changes."""

    def __init__(self, optimizer: Optimizer) -> None:
        generation = bank.generation()
        self.held, self._sizes = list(_parameters(optimizer)), _group_sizes(optimizer)
        groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        found: dict[tuple[Any, ...], list[_Weight]] = {}
        seen: set[int] = set()
        for layer in layers.live_layers():
            for name, state in layer.nm_weights.items():
                param = layer._parameters.get(name)
                if param is not None and id(param) in groups and id(param) not in seen:
                    seen.add(id(param))
                    # Not methods that are equal: those of another `sparsify` are at another step of their run.
                    key = groups[id(param)], id(state.method), param.device, *map(id, _sharding_groups(param))
                    found.setdefault(key, []).append(_Weight(layer._parameters, name, param, state))
        self.parts = [_Part(group, weights) for (group, *_), weights in found.items()]
        places = [(w.held, w.name) for part in self.parts for w in part.weights]
        self._holding = bank.Holding(generation, places)
        self.ids = frozenset(groups)
        self.complete: WeakSet[bank.Scope] = WeakSet()
        """The scopes all of whose weights are held."""

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` still holds what it did, and the layers what they did."""
        return (
            _group_sizes(optimizer) == self._sizes
            and all(map(is_, _parameters(optimizer), self.held))
            and self._holding.lasts()
            and all(part.is_local() for part in self.parts)
        )


@torch.no_grad()
def _plan(optimizer: Optimizer) -> _Plan:
    plan: _Plan | None = optimizer.__dict__.get(_PLAN)
    if plan is None or not plan.holds(optimizer):
        plan = optimizer.__dict__[_PLAN] = _Plan(optimizer)
        if any(p.element_size() < 4 for part in plan.parts for p in part.batch.weights):
            _warn_half()
    return plan


def batches(optimizer: Optimizer) -> list[Batch]:
    """The sparse weights that `optimizer` holds, this rank's rows of them, as they are treated together."""
    return [part.batch for part in _plan(optimizer).parts]


def _group_sizes(optimizer: Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


@_outside_graphs
def _begin(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The global hook: makes `_before_step` the last of the optimizer's own, after the user's that clip gradients."""
    bank.end_passes()
    if _plan(optimizer).parts or watchdog.alert():
        handle = optimizer.__dict__.get(_HANDLE)
        if handle is None or next(reversed(optimizer._optimizer_step_pre_hooks), None) != handle.id:
            if handle is not None:
                handle.remove()
            optimizer.__dict__[_HANDLE] = optimizer.register_step_pre_hook(_before_step)


@_outside_graphs
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plan: _Plan = optimizer.__dict__[_PLAN]
    watchdog.look(plan.ids, plan.complete)
    parts = _own(optimizer, plan)
    if not parts:  # an outer step has treated them
        return None
    positional = len(args) > 1  # args[0] is the optimizer itself
    closure = args[1] if positional else kwargs.get("closure")
    if not callable(closure):  # None, or what an optimizer of one's own takes in its place
        _treat(optimizer, parts)
        return None

    def treated_closure() -> Any:
        # The backward pass runs inside step (Lightning, LBFGS, SAM), and may add to gradients from before.
        loss = closure()
        _treat(optimizer, parts)
        return loss

    if positional:
        return (args[0], treated_closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": treated_closure}


@torch.no_grad()
def _treat(optimizer: Optimizer, parts: list[_Part]) -> None:
    """Let each method change the gradients of its weights; the optimizer remembers which, until `_after_step`."""
    treated = optimizer.__dict__[_TREATED] = []
    for part in parts:
        step, group = part.step(optimizer), optimizer.param_groups[part.group]
        if set(map(type, step.grads)) != {NoneType}:
            phases.begin(step, part.method)
            part.method.before_step(step)
            phases.mask_gradients(step)
            held = second_moment.hold(step, part.method, optimizer, group, part.second_moments)
            treated.append((part, step, group, group.get("lr"), held))


@_outside_graphs
@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    bank.end_passes()
    skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer's, where gradients overflowed
    for part, step, group, lr, held in optimizer.__dict__.pop(_TREATED, ()):
        second_moment.restore(held, step, part.method, group)
        part.method.after_step(step)
        phases.mask_weights(step)
        part.count(step, 0.0 if lr is None else lr, skipped, not isinstance(optimizer, torch.optim.SGD))


def _sharding_groups(param: Tensor) -> list[ProcessGroup]:
    """The process groups over which the rows of `param` are sharded."""
    if not isinstance(param, DTensor):
        return []
    mesh = param.device_mesh
    return [mesh.get_group(i) for i, placement in enumerate(param.placements) if placement == Shard(0)]


def _any_nonzero(grads: list[Tensor | None]) -> Tensor | int:
    """1 if any gradient is not all zeros, else 0, on the device.

    A step with learning rate 0 and gradients of zeros is none: `torch.distributed.checkpoint` makes it to have
    optimizer states. One with learning rate 0 and real gradients begins a warm-up, and moves the optimizer's moments.
    """
    # An empty gradient is what FSDP2 leaves a rank of a weight with fewer rows than ranks.
    largest = torch._foreach_norm([grad for grad in grads if grad is not None and grad.numel()], torch.inf)
    return torch.stack([norm.to(largest[0]) for norm in largest]).amax().ne(0) if largest else 0


def _own(optimizer: Optimizer, plan: _Plan) -> list[_Part]:
    """The parts of `plan` that no outer step treats: one optimizer may step inside another's step (ZeRO) or closure.

    Read off the call stack: a flag would be left behind by a step that raises.
    """
    outer: set[int] = set()
    steps = [f for f in _frames() if f.f_code.co_name == "wrapper" and f.f_code.co_filename == torch_optimizer.__file__]
    if not steps:
        _warn_no_frame()
    for frame in steps[1:]:
        outer.update(map(id, _parameters(frame.f_locals["self"])))
    if not outer:
        return plan.parts
    own = []
    for part in plan.parts:
        weights = [weight for weight in part.weights if id(weight.param) not in outer]
        if weights:
            own.append(part if len(weights) == len(part.weights) else _Part(part.group, weights))
    return own


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _local(t: Tensor, state: WeightState) -> Tensor:
    """`t` itself or, of a sharded one, what this rank holds: whole rows, or an error."""
    if not isinstance(t, DTensor):
        return t
    if any(not (p == Replicate() or p == Shard(0)) for p in t.placements) or 0 in state.dims:
        raise SparsityError(
            f"a sparse weight of shape {tuple(t.shape)} is sharded as {t.placements}, across its groups: "
            "shard it along dimension 0 (fully_shard's default), and exclude transposed convolutions and Conv1D"
        )
    return t.to_local()


def _warn_half() -> None:
    warnings.warn(
        "an optimizer steps half-precision sparse weights, which rounds the decay of dropped weights away: "
        "keep fp32 weights and train under autocast",
        UserWarning,
        stacklevel=2,
    )


@cache
def _warn_no_frame() -> None:
    warnings.warn(
        "torch.optim's step was not found on the call stack: optimizers that step inside others cannot be told apart, "
        "and their weights may be decayed twice",
        RuntimeWarning,
        stacklevel=2,
    )


register_optimizer_step_pre_hook(_begin)
register_optimizer_step_post_hook(_after_step)
