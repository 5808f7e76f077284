"""Weights masked together: one kernel launch for all, a few where devices, dtypes, patterns or lines differ."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.masks import reference
from nm_sparsity.core.masks.backends import backend_of, covering, rounds_to
from nm_sparsity.core.masks.cuda import capturing, memory_of, stream
from nm_sparsity.core.masks.groups import reduction_last, reduction_size, restore_order
from nm_sparsity.core.masks.memory import Lines, Look, is_dense, lie_alike
from nm_sparsity.core.pattern import NMPattern, Placement

_ALIGNMENT = 256
"""Each result of a call starts at a multiple of this many entries, so of as many bytes; cuBLAS asks for 256."""

_LITTLE = 0.01
"""The part of a GPU's memory that is kept between calls at most."""

_version: Any = attrgetter("_version")


class Batch:
    """Weights that are masked together, each along its own placement.

    A table of where they lie is built once. The batch keeps the tensor objects, and every call looks whether their
    storage was replaced since (``.data =``, FSDP's gathering): the table follows.
    """

    def __init__(self, weights: Sequence[Tensor], placements: Sequence[Placement]) -> None:
        self.weights = list(weights)
        self.placements = list(placements)
        self._pointers: list[int] = []
        self._forms: list[Any] = []
        self._look = Look([])
        self._parts: list[_Part] = []
        self._others: list[int] = []
        """Weights that no compiled kernel covers."""
        self._order: list[int] = []
        """Where each weight's result stands among the parts' and then the others'."""
        self._lent: dict[tuple[str, torch.dtype | None], _Lent] = {}

    def keep_largest(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The masked weights, detached, in the shapes and strides of the weights.

        With `dtype` they are rounded to it as ``.to(dtype)`` rounds; which NaN a NaN becomes is left open. All lie in
        one stretch of memory (one per launch), each a tensor of its own: writing to one leaves the others' version.

        The list is lent: once nobody holds it, nor anything in it, the next call returns the very same tensors with
        their new values. Whoever holds the list may put others that share their memory in their places.
        """
        return self._values("keep", dtype)

    def soft_threshold(self, scales: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """As `keep_largest`, of `reference.soft_threshold` of each weight times its 0-dim scale, on any device."""
        return self._values("soft", dtype, scales)

    def _values(self, result: str, dtype: torch.dtype | None, scales: Sequence[Tensor] = ()) -> list[Tensor]:
        self._refresh()
        streams = [on_stream(part.device) for part in self._parts]
        lends = None not in streams
        lent = self._lent.get((result, dtype)) if lends else None
        if lent is not None and lent.streams == streams and lent.is_back():
            for part, memory in zip(self._parts, lent.memory, strict=True):
                part.fill(result, memory, scales)
            return lent.list[0]
        values, memories = self._new(result, dtype, scales)
        self._lent.pop((result, dtype), None)
        if lends and not self._others and all(m.dtype is (dtype or m.dtype) for m in memories) and _affords(memories):
            self._lent[result, dtype] = _Lent(values, memories, streams)
            _register(self)
        return values

    @torch.inference_mode(False)  # what is made in a pass may be used outside of inference mode, too
    @torch.no_grad()
    def _new(
        self, result: str, dtype: torch.dtype | None, scales: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The values in new tensors, and the memory of each launch that they lie in."""
        made, memories = [], []
        for part in self._parts:
            target = part.dtype if dtype is None else dtype
            memory = part.new(target if rounds_to(part.dtype, target) else part.dtype)
            part.fill(result, memory, scales)
            made += [value if value.dtype is target else value.to(target) for value in part.results(memory)]
            memories.append(memory)
        for i in self._others:
            w = self.weights[i]
            function = (
                reference.keep_largest if result == "keep" else partial(reference.soft_threshold, scale=scales[i])
            )
            made.append(_like(w, self._reference(function, i)).to(dtype or w.dtype).data)
        return [made[k] for k in self._order], memories

    @torch.no_grad()
    def nm_mask(self) -> list[Tensor]:
        """The boolean mask of each weight, in its shape and strides."""
        self._refresh()
        filled = [part.fill("mask", part.new(torch.bool)) for part in self._parts]
        values = [value for part, memory in zip(self._parts, filled, strict=True) for value in part.results(memory)]
        values += [_like(self.weights[i], self._reference(reference.nm_mask, i)) for i in self._others]
        return [values[k] for k in self._order]

    @torch.no_grad()
    def add_dropped_(self, targets: Sequence[Tensor | None], scale: float | Tensor) -> None:
        """``target += scale * (1 - mask) * w`` in place, without autograd, for each weight: the SR-STE term.

        A weight whose target is None is left out. `scale` is a number or a 0-dim tensor on the weights' device, which
        is never asked for its value there. Computed in fp32 and rounded once.
        """
        for i in self._into("add", targets, None, scale):
            if (target := targets[i]) is not None:
                reference.add_scaled_(target, self._reference(reference.dropped, i), scale)

    @torch.no_grad()
    def update_masks_(self, masks: Sequence[Tensor]) -> Tensor:
        """Write the present masks into `masks`, boolean tensors shaped like the weights.

        Returns:
            How many entries of each changed: int64 (weights,), on the first weight's device.
        """
        devices = dict.fromkeys([w.device for w in self.weights] or [torch.device("cpu")])
        changes = {device: torch.zeros(len(self.weights), dtype=torch.int64, device=device) for device in devices}
        for i in self._into("mask", masks, torch.bool, changes=changes):
            mask = self._reference(reference.nm_mask, i)
            changes[mask.device][i] = (masks[i] != mask).sum()
            masks[i].copy_(mask)
        first, *rest = changes.values()
        return sum((other.to(first.device) for other in rest), first)

    def _into(
        self,
        result: str,
        targets: Sequence[Tensor | None],
        dtype: torch.dtype | None,
        scale: float | Tensor = 0.0,
        changes: dict[torch.device, Tensor] | None = None,
    ) -> list[int]:
        """Compute `result` into `targets` of `dtype`, or the weights' own; which ones are left to the reference."""
        self._refresh()
        found = [part.addresses(targets, dtype or part.dtype) for part in self._parts]
        left = [*self._others, *chain(*(refused for _, refused in found))]
        for i in left:
            if (target := targets[i]) is not None and target.shape != (w := self.weights[i]).shape:
                raise SparsityError(
                    f"a gradient or mask of shape {tuple(target.shape)} does not go with a weight of {tuple(w.shape)}"
                )
        for part, (addresses, _) in zip(self._parts, found, strict=True):
            part.rows.run(
                *(result, None, addresses, dtype or part.dtype, scale),
                None if changes is None else changes[part.device],
            )
        increment_version([target for target in targets if target is not None])
        return left

    def _refresh(self) -> None:
        """Rebuild what the table says of the weights where it is out of date."""
        pointers = list(map(Tensor.data_ptr, self.weights))
        same = self._look.is_of(self.weights)
        if same and pointers == self._pointers:
            return
        forms = self._forms if same else [(w.dtype, w.device, w.shape, w.stride()) for w in self.weights]
        if forms != self._forms:
            self._build()
            self._lent = {}
        elif pointers != self._pointers:
            for part in self._parts:
                part.rows.point([pointers[i] for i in part.places])
            self._lent = {}
        self._pointers, self._forms = pointers, forms
        if not same:
            self._look = Look(self.weights)

    def _build(self) -> None:
        groups: dict[Any, list[tuple[int, Lines]]] = defaultdict(list)
        self._others = []
        for i, (w, (pattern, dims)) in enumerate(zip(self.weights, self.placements, strict=True)):
            if max(dims, default=0) >= w.dim() or reduction_size(w.shape, dims) % pattern.m:
                raise SparsityError(
                    f"a weight of shape {tuple(w.shape)} has no {pattern} groups along dimensions {dims}: it had "
                    "another shape when it was made sparse"
                )
            if (found := covering(w, pattern.m, dims)) is None:
                self._others.append(i)
            else:
                backend, lines = found
                groups[backend, pattern, w.device, w.dtype, lines[1] == 1].append((i, lines))
        self._parts = [
            _Part(backend, self.weights, members, pattern) for (backend, pattern, *_), members in groups.items()
        ]
        places = [*chain(*(part.places for part in self._parts)), *self._others]
        self._order = sorted(range(len(places)), key=places.__getitem__)

    def _reference(self, function: Callable[[Tensor, int, int, int], Tensor], i: int) -> Tensor:
        """What `function` of the reference makes of weight `i`."""
        w, (pattern, dims) = self.weights[i], self.placements[i]
        flat = function(reduction_last(w, dims), pattern.n, pattern.m, w.dim() - len(dims))
        return restore_order(flat, w.shape, dims)


class _Part:
    """Weights of a batch that one launch covers: of one device, dtype, pattern and kind of lines."""

    def __init__(
        self, backend: ModuleType, weights: Sequence[Tensor], members: Sequence[tuple[int, Lines]], pattern: NMPattern
    ) -> None:
        # Weights alike lie side by side, so that one call makes the tensors of all their results.
        alike: dict[Any, list[tuple[int, Lines]]] = defaultdict(list)
        for i, one in members:
            alike[weights[i].shape, weights[i].stride()].append((i, one))
        self.places, lines = zip(*(member for group in alike.values() for member in group), strict=True)
        """The positions in the batch of the part's weights."""
        self._fitting: dict[torch.dtype, Look] = {}
        """Of what look targets of a dtype were that lie in memory as the weights do."""
        self._starts: list[int] = []
        self._stretches: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        self._size = 0
        for (shape, strides), group in alike.items():
            step = -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT
            self._stretches.append((self._size, (len(group), *shape), (step, *strides)))
            self._starts += [self._size + step * k for k in range(len(group))]
            self._size += step * len(group)
        first = weights[self.places[0]]
        self.dtype, self.device = first.dtype, first.device
        self._weights = [weights[i] for i in self.places]
        self.rows = backend.Rows(self._weights, lines, self.places, pattern.n, pattern.m)

    def new(self, dtype: torch.dtype) -> Tensor:
        """Memory for a result of every weight."""
        return torch.empty(self._size, dtype=dtype, device=self.device)

    def fill(self, result: str, memory: Tensor, scales: Sequence[Tensor] = ()) -> Tensor:
        """Write the `result` of every weight into `memory`, and return it; `scales` are those of all the batch's."""
        numbers = [scales[i].to(self.device, torch.float32) for i in self.places] if scales else []
        self.rows.run(result, memory, self._starts, memory.dtype, list(map(Tensor.data_ptr, numbers)) or 0.0)
        return memory

    def results(self, memory: Tensor) -> list[Tensor]:
        """What lies in `memory`, a tensor for each weight."""
        # Below autograd's bookkeeping of views, so that each result counts its own versions.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return [
                value
                for start, shape, strides in self._stretches
                for value in memory.as_strided(shape, strides, start).unbind()
            ]

    def addresses(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[list[int], list[int]]:
        """Where those of `tensors` lie that go with the part's weights, 0 where the kernel must leave one out.

        The second list has the positions in the batch of those that do not lie in memory as the weight does, or have
        another dtype than `dtype`.
        """
        present = [t for i in self.places if (t := tensors[i]) is not None]
        if (fit := self._fitting.get(dtype)) is not None and fit.is_of(present):
            return list(map(Tensor.data_ptr, present)), []
        addresses, refused = [], []
        for i, w in zip(self.places, self._weights, strict=True):
            t = tensors[i]
            fits = t is not None and t.dtype is dtype and lie_alike(t, w)
            addresses.append(t.data_ptr() if fits else 0)
            if t is not None and not fits:
                refused.append(i)
        if len(present) - len(refused) == len(self.places):
            self._fitting[dtype] = Look(present)
        return addresses, refused


def apply_masks_(targets: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Entries whose mask is False become +0, whatever they were; in place, without autograd, in one launch."""
    groups: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    with torch.no_grad():
        for target, mask in zip(targets, masks, strict=True):
            if mask.shape != target.shape:
                raise SparsityError(
                    f"a mask of shape {tuple(mask.shape)} is not one of a weight of {tuple(target.shape)}"
                )
            alike = mask.dtype is torch.bool and lie_alike(mask, target) and is_dense(target)
            backend = backend_of(target) if alike and target.element_size() in (2, 4, 8) else None
            if backend is None:
                target.masked_fill_(~mask, 0)
            else:
                groups[backend, target.device, target.element_size()].append((target, mask))
    for (backend, _, _), members in groups.items():
        backend.apply_masks_(*zip(*members, strict=True))
        increment_version([target for target, _ in members])


class _Lent:
    """The values of one call. On the host, new tensors and untouched pages cost more than the masks do."""

    def __init__(self, values: list[Tensor], memory: list[Tensor], streams: list[int | None]) -> None:
        self.list = [values]
        self.memory = memory
        self.streams = streams
        """On which each memory was made."""
        self._pointers = list(map(Tensor.data_ptr, values))
        self._sizes, self._holders = list(map(_size, memory)), sum(map(_holders, memory))

    def is_back(self) -> bool:
        """Whether nobody else holds the list, a tensor in it or their memory, and all is as it was handed out."""
        with torch._C.DisableTorchFunctionSubclass():  # or each value is asked for its __torch_function__ first
            return (
                _alone(self.list)
                and _alone(self.list[0])  # a graph that saved a tensor counts, too
                and list(map(Tensor.data_ptr, self.list[0])) == self._pointers
                and not any(map(_version, self.list[0]))
                and list(map(_size, self.memory)) == self._sizes
                and sum(map(_holders, self.memory)) == self._holders
            )


_lenders: dict[int, ref[Batch]] = {}
"""The batches that have lent values."""


def _register(batch: Batch) -> None:
    key = id(batch)
    _lenders[key] = ref(batch, lambda _: _lenders.pop(key, None))


_streams: dict[torch.device, int | None] = {}
"""The stream of each device that values were last made on; None for one that was captured."""


def on_stream(device: torch.device) -> int | None:
    """What tells the present stream of `device` from others; None while it is captured. On a new one all that was lent
    is let go.

    The memory belongs to the stream it was made on, and so do the nodes of autograd that the values keep alive: on
    another stream they wait for the first, which ends the capture of a graph.
    """
    if device.type != "cuda":
        return 0
    now = None if capturing(device) else stream(device)
    if now is None or _streams.get(device) != now:
        for batch in _lending():
            batch._lent = {}
    _streams[device] = now
    return now


def _lending() -> list[Batch]:
    return [batch for reference in list(_lenders.values()) if (batch := reference()) is not None]


def _affords(memories: Sequence[Tensor]) -> bool:
    """Whether these may be lent, too: larger models keep a GPU busy, and need its memory."""
    limits = {m.device: memory_of(m.device) * _LITTLE for m in memories if not m.is_cpu}
    if not limits:
        return True
    kept = [m for batch in _lending() for lent in list(batch._lent.values()) for m in lent.memory]
    return all(sum(m.nbytes for m in [*kept, *memories] if m.device == device) <= limits[device] for device in limits)


def _alone(objects: list[Any]) -> bool:
    """Whether each of `objects` is held by this list alone."""
    return max(map(sys.getrefcount, objects), default=0) <= _ONE


def _holders(t: Tensor) -> int:
    """How many references to the memory of `t` there are."""
    return int(torch._C._storage_Use_Count(t.untyped_storage()._cdata))


def _size(t: Tensor) -> int:
    """The bytes of the memory of `t`."""
    return t.untyped_storage().nbytes()


_ONE = max(map(sys.getrefcount, [object()]))


def _like(w: Tensor, value: Tensor) -> Tensor:
    """`value` in the strides of `w`."""
    return value if value.stride() == w.stride() else torch.empty_like(w, dtype=value.dtype).copy_(value)
