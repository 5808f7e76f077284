"""The masked weights of a forward pass: all made in one launch at the first read, gone when the pass ends.

`attach` gives a model and its blocks a *scope* each, the list of the sparse weights in it, and a pair of forward hooks.
The outermost call of such a module in a thread is a *pass*: a whole forward, a block that is called by itself, a
checkpointed block that is recomputed. Where FSDP2 shards the weights of a scope, the calls inside it are passes of
their own, as each unit is gathered. The first read of a weight in a pass makes the values of all its weights that are
there, in the dtype that autocast asks for at that moment; one that is written to during the pass is made anew. Memory
and tensor objects of a pass serve the next one if nobody holds them any more, no graph either.

Under `torch.compile` there are no passes: each read is a node of the graph, on a GPU a launch of its own in place of
the one that would cast the weight. So blocks alike share one graph, as those of dense models do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Container, Iterable
from functools import cached_property
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import TensorWeakRef

from nm_sparsity.core.masks.batched import Batch, on_stream
from nm_sparsity.core.masks.cuda import stream
from nm_sparsity.core.masks.ops import is_watched
from nm_sparsity.core.methods import Method, WeightState
from nm_sparsity.core.model.write_through import WriteThrough, hand_out

_SCOPE = "_nm_scope"
_NOTHING: dict[int, Any] = {}
_version: Callable[[Tensor], int] = attrgetter("_version")
_writes: Callable[[WeightState], int] = attrgetter("writes")
# Bound once: every read of a sparse weight asks.
_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
_records = torch.is_grad_enabled
_is_tracing = torch.compiler.is_dynamo_compiling
_CALL = nn.Module._call_impl.__code__
_generation = object()


def structure_changed() -> None:
    """To be called whenever a layer becomes sparse, is copied, becomes dense again, or is no more."""
    global _generation
    _generation = object()


class Member(NamedTuple):
    """A sparse weight: ``module._parameters[name]``."""

    owner: ref[nn.Module]
    """Weak: a module that is taken out of its model lives no longer for having been in it."""
    name: str
    state: WeightState

    @property
    def parameters(self) -> dict[str, nn.Parameter | None]:
        """The module's; none where it is no more."""
        module = self.owner()
        return {} if module is None else module._parameters

    @property
    def shadow(self) -> Tensor | None:
        """The shadow weight; None where the module is sparse no more, or FSDP2 has not gathered the weight."""
        module = self.owner()
        if module is None or module.__dict__.get("nm_weights", {}).get(self.name) is not self.state:
            return None
        w = module._parameters.get(self.name)
        return None if isinstance(w, DTensor) else w


def generation() -> object:
    """An object that is another one after `structure_changed`."""
    return _generation


class Holding:
    """What `_parameters` of modules hold under names, in a generation: shadow weights, or FSDP2's shards of them."""

    def __init__(self, generation: object, places: Iterable[tuple[dict[str, nn.Parameter | None], str]]) -> None:
        self._generation, found = generation, list(places)
        self._parameters, self._names = [parameters for parameters, _ in found], [name for _, name in found]
        self.weights = list(map(dict.get, self._parameters, self._names))

    def lasts(self) -> bool:
        """Whether they still hold the same, and are sparse as they were."""
        still = map(is_, map(dict.get, self._parameters, self._names), self.weights)
        return self._generation is _generation and all(still)


Origin = tuple[Tensor, WeightState]
"""A shadow weight and its state."""


Kind = tuple[torch.dtype, torch.device, Method | None]
"""What weights have in common whose values are made together; a method only if its values are no mere selection."""


def _kind(w: Tensor, state: WeightState) -> Kind:
    return w.dtype, w.device, None if state.selects else state.method


class Launch:
    """Values that were made together."""

    def __init__(
        self, values: list[Tensor], weights: list[Tensor], states: list[WeightState], places: dict[int, int]
    ) -> None:
        self.values = values
        self.weights = weights
        """Whose values they are. Kept alive, so that ids stay their own."""
        self.states = states
        self.places = places
        """Where each of them stands, by the id of the shadow weight."""
        # What tells, as far as that can be seen, that a weight was written to since.
        self._versions, self._pointers = list(map(_version, weights)), list(map(Tensor.data_ptr, weights))
        self._writes = list(map(_writes, states))
        self._device = weights[0].device if weights else torch.device("cpu")
        self._stream = stream(self._device) if self._device.type == "cuda" else None
        """The CUDA stream that they were made on, for which no other waits."""

    def serves(self, place: int, w: Tensor, state: WeightState) -> bool:
        """Whether the value at `place` is still that of `w`, on the present stream."""
        return (
            self._versions[place] == w._version
            and self._pointers[place] == w.data_ptr()
            and self._writes[place] == state.writes
            and (self._stream is None or self._stream == stream(self._device))
        )

    def note_lost(self) -> None:
        """Note what was written to a value in a way that was not sent on."""
        with torch._C.DisableTorchFunctionSubclass():  # or each value is asked for its __torch_function__ first
            written = self.values and not self.values[0].is_inference() and any(map(_version, self.values))
        if written:
            for value, state in zip(self.values, self.states, strict=True):
                if value._version:
                    state.lost = True


class Scope:
    """The sparse weights in a module, in its order, and the batch of the last launch."""

    def __init__(self, members: Iterable[Member]) -> None:
        self.members = tuple(members)
        self._known: dict[tuple[int, str], WeightState] = {}
        self._kind: Kind | None = None
        self._holding = Holding(None, [])
        self._batch = Batch([], [])
        self._states: list[WeightState] = []
        self._places: dict[int, int] = {}
        self._launch = threading.Lock()  # two threads may run one model
        self.inside: set[Scope] = set()
        """Scopes that were found to lie in this one."""
        self.left_out = 0
        """For the watchdog: optimizer steps in a row that left the weights out,"""
        self.gradient: TensorWeakRef | None = None
        """and the gradient of one of them at the last."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy has modules of its own.
        return {"members": [(module, *rest) for owner, *rest in self.members if (module := owner()) is not None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Scope.__init__(self, [Member(ref(module), *rest) for module, *rest in state["members"]])

    def has(self, module: object, name: str, state: WeightState) -> bool:
        """Whether a weight is one of the members, and sparse as it was."""
        if not self._known:
            self._known = {(id(member.owner()), member.name): member.state for member in self.members}
        return self._known.get((id(module), name)) is state

    def covers(self, other: Scope) -> bool:
        """Whether it has the weights of another one."""
        first = other.members[0]
        return self.has(first.owner(), first.name, first.state)

    def holding(self) -> Holding:
        """What the members' modules hold now."""
        return Holding(_generation, ((member.parameters, member.name) for member in self.members))

    def together(self, like: Origin, without: Container[int]) -> list[Origin]:
        """The shadow weights whose values one launch makes with that of `like`, but those with an id in `without`."""
        found: dict[int, Origin] = {}
        kind = _kind(*like)
        for member in self.members:
            w = member.shadow
            if w is not None and id(w) not in without and member.state.batched and _kind(w, member.state) == kind:
                found.setdefault(id(w), (w, member.state))  # of weights that were tied since, the first one's
        return list(found.values())

    def launch(self, like: Origin, without: Container[int], dtype: torch.dtype) -> Launch:
        """The values of what `together` finds."""
        with self._launch:
            kind = _kind(*like)
            if without or kind != self._kind or not self._holding.lasts():
                self._holding = self.holding()
                found = self.together(like, without)
                weights, self._states = [w for w, _ in found], [state for _, state in found]
                self._places = {id(w): place for place, w in enumerate(weights)}
                self._batch = Batch(weights, [state.placement for state in self._states])
                # Weights of `functional_call` come once and must not be kept alive.
                again = not without and all(type(w) is nn.Parameter for w in weights)
                self._kind = kind if again else None
            values = like[1].method.values(self._batch, self._states, dtype)
            launch = Launch(values, self._batch.weights, self._states, self._places)
            if self._kind is None:
                self._batch, self._holding = Batch([], []), Holding(None, [])
            return launch


class _Pass:
    """One call of a module with a scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.depth = 1
        self.launches: list[Launch] = []
        self.kept: dict[torch.dtype, dict[int, Launch]] = {}
        """The latest launch of each value, by dtype and the id of the shadow weight."""

    @cached_property
    def sharded(self) -> bool:
        """Whether FSDP2 has weights that are not gathered when the first call inside begins."""
        return DTensor in set(map(type, self.scope.holding().weights))

    def make(self, module: Any, name: str, w: Tensor, state: WeightState, dtype: torch.dtype) -> Launch | None:
        """The value of the shadow weight `w`, if it is one of the scope's, that was not made yet or is stale.

        The first one makes all others with it. What was written to, is read on another stream, or is the first that is
        read in a second dtype (the head of a model that closes autocast for it), is made alone; the next in that dtype
        makes all that lack it.
        """
        if w.is_inference() or not self.scope.has(module, name, state) or module._parameters.get(name) is not w:
            return None
        others = [values for key, values in self.kept.items() if key != dtype]
        kept = self.kept.setdefault(dtype, {})
        if id(w) in kept or not state.batched or (not kept and any(id(w) in values for values in others)):
            on_stream(w.device)
            launch = Launch([state.value(w, dtype)], [w], [state], {id(w): 0})
        else:
            launch = self.scope.launch((w, state), kept.keys(), dtype)
        kept.update(dict.fromkeys(launch.places, launch))
        self.launches.append(launch)
        return launch

    def close(self) -> None:
        """Note what was written to values that no layer will hand out again."""
        for launch in self.launches:
            launch.note_lost()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.passes: list[_Pass] = []
        self.trained: dict[int, ref[Scope]] = {}


_thread = _Thread()


def ready(w: Tensor, state: WeightState) -> WriteThrough | None:
    """What a layer hands out for the shadow weight `w` where gradients are recorded, if the innermost pass has it.

    The short way that nearly all reads of training go; None leaves it to `value_in_pass`.
    """
    if not _records() or is_watched() or not (passes := _thread.passes):
        return None
    key = id(w)
    launch = passes[-1].kept.get(computed_dtype(w), _NOTHING).get(key)
    if launch is None or state.lost or not launch.serves(place := launch.places[key], w, state):
        return None
    value = launch.values[place]
    return value if type(value) is WriteThrough and w.requires_grad else None


def value_in_pass(module: Any, name: str, w: Tensor, state: WeightState, dtype: torch.dtype) -> WriteThrough | None:
    """What a layer hands out for the shadow weight `w` in `dtype`, if a pass of this thread covers it."""
    key = id(w)
    for running in reversed(_thread.passes):
        launch = running.kept.get(dtype, _NOTHING).get(key)
        if launch is None or not launch.serves(launch.places[key], w, state):
            launch = running.make(module, name, w, state, dtype)
        if launch is not None:
            place = launch.places[key]
            return hand_out(launch.values, place, (launch.weights[place], launch.states[place]))
    return None


def computed_dtype(w: Tensor) -> torch.dtype:
    """The dtype that a product with `w` is computed in here: what autocast would round it to."""
    dtype = w.dtype
    if _autocast() and dtype == torch.float32:
        device = w.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return dtype


def end_passes() -> None:
    """Forget the values of this thread's passes, those too that an interrupt left open: weights are about to move."""
    _thread.passes.clear()


def trained() -> list[Scope]:
    """The scopes whose passes recorded gradients in this thread, since `forget_trained`."""
    return [scope for reference in _thread.trained.values() if (scope := reference()) is not None]


def left_out(model: nn.Module) -> int:
    """The optimizer steps in a row that left weights of `model` out, up to now; of its blocks, the largest number."""
    scopes = [module.__dict__[_SCOPE] for module in model.modules() if _SCOPE in module.__dict__]
    return max((scope.left_out for scope in scopes), default=0)


def forget_trained() -> None:
    """See `trained`."""
    _thread.trained.clear()


def attach(model: nn.Module) -> None:
    """Give `model` and its blocks their scopes and hooks: a block is an item of a list with several sparse weights.

    Blocks are what is checkpointed, sharded, compiled or called by itself; hooks on every module would cost as much as
    the values do.
    """
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    blocks = [item for group in model.modules() if isinstance(group, lists) for item in group.children()]
    for module in dict.fromkeys([model, *blocks]):
        members = [
            Member(ref(owner), name, state)
            for owner in module.modules()
            for name, state in owner.__dict__.get("nm_weights", {}).items()
        ]
        if members and (module is model or len(members) > 1) and _SCOPE not in module.__dict__:
            module.__dict__[_SCOPE] = Scope(members)
            module.register_forward_pre_hook(_open)
            module.register_forward_hook(_close, always_call=True)


def detach(model: nn.Module) -> None:
    """Take the scopes and hooks off `model` and its modules."""
    for module in model.modules():
        if module.__dict__.pop(_SCOPE, None) is None:
            continue
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_open, _close)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _open(module: nn.Module, args: tuple[Any, ...]) -> None:
    if _is_tracing():
        return
    scope: Scope = module.__dict__[_SCOPE]
    passes = _thread.passes
    if passes and scope in passes[-1].scope.inside and not passes[-1].sharded:
        return  # most calls: a block in the pass of its model
    if any(running.scope is scope for running in passes) and not _calls_itself(module):
        passes.clear()  # left open by an interrupt, which torch's hooks do not see
    if passes and passes[-1].scope is scope:
        passes[-1].depth += 1
    elif passes and passes[-1].scope.covers(scope) and not passes[-1].sharded:
        passes[-1].scope.inside.add(scope)
    else:
        passes.append(_Pass(scope))
        if torch.is_grad_enabled():
            _thread.trained[id(scope)] = ref(scope)


def _calls_itself(module: nn.Module) -> bool:
    """Whether `module`, which is being called, is running already."""
    calls, frame = 0, sys._getframe(2)
    while frame is not None and calls < 2:
        calls += frame.f_code is _CALL and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls > 1


def _close(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if _is_tracing():
        return
    scope: Scope = module.__dict__[_SCOPE]
    passes = _thread.passes
    if passes and passes[-1].scope is scope:
        passes[-1].depth -= 1
        if not passes[-1].depth:
            passes.pop().close()
