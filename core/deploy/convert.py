"""From a finalized model to one whose layers run 2:4 on sparse Tensor Cores where they gain."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nm_sparsity.core import masks
from nm_sparsity.core.deploy import measure as measuring
from nm_sparsity.core.deploy.backends import DEFAULT, Backend, choose_backend
from nm_sparsity.core.deploy.cache import Cache, Problem, flat
from nm_sparsity.core.deploy.child import first_line
from nm_sparsity.core.deploy.clock import Clock, seconds
from nm_sparsity.core.deploy.layers import become, compressed
from nm_sparsity.core.deploy.library import CuSparseLtError
from nm_sparsity.core.deploy.measure import Calls, Input, Times
from nm_sparsity.core.deploy.search import bin_of, search
from nm_sparsity.core.errors import SparsityError, VerificationError
from nm_sparsity.core.model import record
from nm_sparsity.core.model.layers import sparse_layers
from nm_sparsity.core.model.wrappers import unwrap
from nm_sparsity.core.pattern import NMPattern, Placement
from nm_sparsity.core.table import common_name, format_table

PATTERN = NMPattern(2, 4)
"""What sparse Tensor Cores run."""

TOKENS = 1024
"""For which algorithms are searched where no example says how many there are."""

_NO_PADDING = ((0, 0), "valid", "same")  # of a 1 x 1 convolution


@dataclass(frozen=True)
class Row:
    """What became of one weight."""

    name: str
    shape: tuple[int, ...]
    runs: bool
    """Whether it runs 2:4 now."""
    note: str
    """Why not, or what runs with it."""
    tokens: int | None = None
    times: Times | None = None


@dataclass(frozen=True)
class Acceleration:
    """What became of each weight: both times, and why it runs 2:4 or stays dense. Prints as a table."""

    backend: str
    launch: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """What did not go as it should."""

    @property
    def converted(self) -> tuple[str, ...]:
        """The weights that run 2:4 now."""
        return tuple(row.name for row in self.rows if row.runs)

    def __str__(self) -> str:
        groups: dict[Any, list[Row]] = {}
        for row in self.rows:
            groups.setdefault((re.sub(r"\d+", "*", row.name), row.shape, row.runs, row.note, row.tokens), []).append(
                row
            )
        cells = []
        for alike in groups.values():
            first, times = alike[0], alike[0].times
            shape = "x".join(map(str, first.shape))
            both = (times.dense * 1e6, times.sparse * 1e6, f"{times.speedup:.2f}x") if times else (None, None, None)
            name = common_name([row.name for row in alike])
            cells.append(
                (name, len(alike), shape, first.tokens, *both, self.backend if first.runs else "dense", first.note)
            )
        table = format_table(
            ["weight", "", "shape", "tokens", "dense us", "2:4 us", "speed-up", "runs on", "note"], cells
        )
        done = f"{len(self.converted)} of {len(self.rows)} weights run 2:4 on {self.backend}"
        measured = any(row.times for row in self.rows)
        how = (
            f"timed as launched ({self.launch})" if measured else "nothing was measured: they may be slower than dense"
        )
        return "\n".join([table, f"{done}; {how}", *self.notes])


@dataclass
class _Candidate:
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


def to_semi_structured(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    launch: str = "eager",
    measure: bool = True,
    backend: str | Backend = "auto",
    tokens: int = TOKENS,
    algorithms: bool = True,
    cache: Cache | None = None,
    clock: Clock = seconds,
) -> Acceleration:
    """Let the layers of a finalized `model` run 2:4 where they gain, in place, for inference on its GPU.

    Eligible are `nn.Linear` and 1 x 1 `nn.Conv2d`, fp16 or bf16, of a shape that the backend takes. Each is timed dense
    and 2:4 on inputs like those that it gets from the example, and stays dense where 2:4 does not gain. In an
    `nn.Sequential`, a ReLU or a tanh GELU behind it becomes part of the product. Save checkpoints before: compressed
    weights are no dense ones. Works under `torch.compile` and CUDA graphs. A failure leaves the model as it was.

    Args:
        example_inputs: an argument of the model, a tuple of them, or a mapping for named ones; of the batch size and
            length that the model will serve. Without it nothing can be measured: all eligible layers are converted.
        launch: how the model will be launched, ``"eager"`` (from Python) or ``"graph"`` (CUDA graph); layers that gain
            in a graph can lose when Python launches each.
        measure: False converts all eligible layers, whether they gain or not.
        backend: ``"cusparselt"``, ``"torch"``, ``"cutlass"`` or ``"auto"``: the first that the GPU has; or one itself.
        tokens: the number of rows (tokens, pixels) to choose algorithms for, where there is no example.
        algorithms: search for cuSPARSELt's fastest algorithms, once for each product on this machine: in a process of
            its own, kept in `cache`.
        cache: of algorithms; by default that of this machine.
        clock: what times the layers.

    Returns:
        A report of every weight: both times, and the reason for each that stays dense.

    Raises:
        SparsityError: without a fitting GPU, for an unknown backend or launch, a model that is not finalized, or one in
            a dtype that the backend has not, example inputs that the model does not take, or too little memory.
        VerificationError: naming a weight that should be 2:4 and is not; compressing it would drop values.
    """
    model = unwrap(model)
    if any(True for _ in sparse_layers(model)):
        raise SparsityError(f"{type(model).__name__} still trains sparse: call finalize(model) first")
    if launch not in measuring.LAUNCHES:
        raise SparsityError(f'unknown launch "{launch}"; known: {", ".join(measuring.LAUNCHES)}')
    device = device_of(model)
    backend = choose_backend(backend, device)
    _check_dtypes(model, backend)
    candidates = list(_candidates(model, backend))
    notes: list[str] = []
    try:
        rows, ready = _prepare(
            model, candidates, example_inputs, launch, measure, backend, tokens, algorithms, cache, clock, notes
        )
    except torch.OutOfMemoryError as error:
        raise SparsityError(
            f"out of memory on {device} while preparing 2:4 layers: {first_line(error)}; the model is as it was"
        ) from error
    for candidate, layer in ready:  # from here on nothing fails
        become(candidate.layer, layer)
        if candidate.follows is not None and candidate.activation:
            holder, place = candidate.follows
            holder._modules[place] = nn.Identity()
    if ready:
        _leave_fast_paths(model)
    return Acceleration(backend.name, launch, tuple(rows), tuple(dict.fromkeys(notes)))


def _prepare(
    model: nn.Module,
    candidates: list[_Candidate],
    example: Any,
    launch: str,
    measure: bool,
    backend: Backend,
    tokens: int,
    algorithms: bool,
    cache: Cache | None,
    clock: Clock,
    notes: list[str],
) -> tuple[list[Row], list[tuple[_Candidate, nn.Module]]]:
    """What becomes of each weight, and the layers to become; the model is only looked at."""
    eligible = [candidate for candidate in candidates if not candidate.why]
    device = device_of(model)
    if example is not None:
        called = measuring.calls_of(model, [candidate.layer for candidate in eligible], example, device)
        for candidate in eligible:
            candidate.calls = called[id(candidate.layer)]
            others = {one.dtype for one in candidate.calls} - {candidate.param.dtype}
            if not candidate.calls:
                candidate.why = "the example does not reach it"
            elif others:
                candidate.why = f"its inputs are {_short(others.pop())}, its weight {_short(candidate.param.dtype)}"
    else:
        for candidate in eligible:
            candidate.calls = {_input(candidate, tokens): 1}
    eligible = [candidate for candidate in eligible if not candidate.why]
    measure = measure and example is not None

    one_of: dict[Any, _Candidate] = {}
    for candidate in eligible:
        one_of.setdefault(candidate.kind, candidate)
    chosen: dict[Any, tuple[int, ...]] = {}
    dangerous: frozenset[str] = frozenset()
    if backend.searched and algorithms and one_of:
        cache = cache or Cache(device)
        chosen = _algorithms(one_of, True, cache, notes)
        refused = {kind: c for kind, c in one_of.items() if c.activation and not chosen[kind]}
        chosen |= _algorithms(refused, False, cache, notes)
        dangerous = frozenset(dtype for dtype, bad in cache.bad.items() if DEFAULT in bad)
    trials: dict[Any, _Trial] = {}
    for kind, candidate in one_of.items():
        if not chosen.get(kind) and _short(candidate.param.dtype) in dangerous:
            trials[kind] = _Trial(why="the default algorithm crashes or hangs here, and no other was found")
        else:
            trials[kind] = _trial(candidate, backend, chosen.get(kind, ()), launch if measure else None, clock)

    rows: list[Row] = []
    ready: list[tuple[_Candidate, nn.Module]] = []
    for candidate in candidates:
        name, shape = candidate.name, tuple(candidate.param.shape)
        if candidate.why:
            rows.append(Row(name, shape, False, candidate.why))
            continue
        trial = trials[candidate.kind]
        count = sum(one.tokens(candidate.layer) * times for one, times in candidate.calls.items())
        rows.append(Row(name, shape, not trial.why, trial.why or trial.activation, count, trial.times))
        if not trial.why:
            layer = compressed(candidate.layer, backend, chosen.get(candidate.kind, ()), trial.activation)
            candidate.activation = trial.activation
            ready.append((candidate, layer))
    return rows, ready


@dataclass(frozen=True)
class _Trial:
    """What is found out about all layers of a kind by one of them."""

    activation: str = ""
    """That runs within the product."""
    why: str = ""
    """Why they stay dense."""
    times: Times | None = None


def _trial(
    candidate: _Candidate, backend: Backend, algorithms: tuple[int, ...], launch: str | None, clock: Clock
) -> _Trial:
    """Check the layer's 2:4 form, with the activation if the library takes it, and time it if there is a `launch`."""
    layer, calls, why = candidate.layer, candidate.calls, ""
    weight = compressed(layer, backend).weight
    for activation in dict.fromkeys((candidate.activation, "")):
        sparse = compressed(layer, backend, algorithms, activation, weight)
        try:
            error = measuring.deviation(layer, sparse, activation, calls)
            if error > measuring.TOLERANCE:
                return _Trial(why=f"its 2:4 product is wrong: relative error {error:.2g}")
            if launch is None:
                return _Trial(activation)
            times = measuring.compare(layer, sparse, activation, calls, launch, clock)
        except CuSparseLtError as refused:
            why = first_line(refused)
            continue
        if times.speedup >= measuring.MARGIN:
            return _Trial(activation, times=times)
        slower = times.speedup < 1 / measuring.MARGIN
        return _Trial(activation, "2:4 is slower" if slower else "2:4 gains nothing", times)
    return _Trial(why=why)


def _algorithms(
    one_of: dict[Any, _Candidate], fused: bool, cache: Cache, notes: list[str]
) -> dict[Any, tuple[int, ...]]:
    """For each kind, the algorithms that are found for its product, of all bins of tokens that are known.

    Args:
        fused: with the activation.
    """
    problems: dict[Any, list[Problem]] = {}
    for kind, candidate in one_of.items():
        dtype, (rows, columns) = _short(candidate.param.dtype), candidate.param.flatten(1).shape
        bins = sorted({bin_of(one.tokens(candidate.layer)) for one in candidate.calls})
        more = (candidate.bias is not None, candidate.activation if fused else "")
        problems[kind] = [Problem(dtype, dtype, rows, columns, count, *more) for count in bins]
    if problems:
        device = next(iter(one_of.values())).param.device
        notes += search([problem for of_kind in problems.values() for problem in of_kind], device, cache).notes
    return {kind: flat(cache.bins(of_kind[0])) for kind, of_kind in problems.items()}


def _candidates(model: nn.Module, backend: Backend) -> Iterator[_Candidate]:
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
                candidate = _Candidate(full_name, module, param, why)
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
        original: Callable[..., Any] = nn.Conv2d.forward
    elif isinstance(module, nn.Linear):
        original = nn.Linear.forward
    else:
        return f"torch has no 2:4 {type(module).__name__}"
    if type(module).forward is not original or name != "weight":
        return f"{type(module).__name__} computes in its own way"
    return backend.why_not_matrix(shape, dtype)


def _input(candidate: _Candidate, tokens: int) -> Input:
    """What a layer of no example may get."""
    param = candidate.param
    features = param.shape[1]
    if param.dim() == 2:
        return Input((tokens, features), (features, 1), param.dtype)
    stride: Any = candidate.layer.stride
    height, width = (tokens - 1) * stride[0] + 1, 1
    return Input((1, features, height, width), (features * height, 1, features * width, features), param.dtype)


def device_of(model: nn.Module) -> torch.device:
    """The device of all parameters of `model`.

    Raises:
        SparsityError: if there is none, or more than one.
    """
    devices = {param.device for param in model.parameters()}
    if len(devices) != 1:
        raise SparsityError(f"the model must be on one device, found {', '.join(sorted(map(str, devices))) or 'none'}")
    return devices.pop()


def _check_dtypes(model: nn.Module, backend: Backend) -> None:
    found = {param.dtype for param in model.parameters() if param.dim() > 1}
    if found and not found & backend.constraints.keys():
        names = ", ".join(sorted(_short(dtype) for dtype in found))
        raise SparsityError(
            f"{backend.name} has no {names}: convert the model first, with model.bfloat16() or model.half()"
        )


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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch's Transformer layers from handing the compressed weights to kernels that cannot read them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
