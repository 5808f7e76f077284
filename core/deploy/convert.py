"""From a finalized model to one whose layers run 2:4 on sparse Tensor Cores where they gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nm_sparsity.core.deploy import measure as measuring
from nm_sparsity.core.deploy.acceleration import Acceleration, Row
from nm_sparsity.core.deploy.backends import DEFAULT, Backend, choose_backend
from nm_sparsity.core.deploy.cache import Cache, Problem, flat
from nm_sparsity.core.deploy.candidates import Candidate, candidates, short
from nm_sparsity.core.deploy.child import first_line
from nm_sparsity.core.deploy.clock import Clock, seconds
from nm_sparsity.core.deploy.layers import become, compressed
from nm_sparsity.core.deploy.library import CuSparseLtError
from nm_sparsity.core.deploy.measure import Input, Times
from nm_sparsity.core.deploy.search import bin_of, search
from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.model.layers import sparse_layers
from nm_sparsity.core.model.wrappers import unwrap

TOKENS = 1024
"""For which algorithms are searched where no example says how many there are."""


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
    and 2:4 on inputs like those that it gets from the example, and stays dense where 2:4 does not gain. A ReLU or a
    tanh GELU behind it in an `nn.Sequential` becomes part of the product, if the example shows that no one else calls
    the layer. Save checkpoints before: compressed weights are no dense ones. Works under `torch.compile` and CUDA
    graphs. A failure leaves the model as it was.

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
    found = list(candidates(model, backend))
    notes: list[str] = []
    try:
        rows, ready = _prepare(
            model, found, example_inputs, launch, measure, backend, tokens, algorithms, cache, clock, notes
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
    weights: list[Candidate],
    example: Any,
    launch: str,
    measure: bool,
    backend: Backend,
    tokens: int,
    algorithms: bool,
    cache: Cache | None,
    clock: Clock,
    notes: list[str],
) -> tuple[list[Row], list[tuple[Candidate, nn.Module]]]:
    """What becomes of each weight, and the layers to become; the model is only looked at."""
    device = device_of(model)
    _note_calls(model, [candidate for candidate in weights if not candidate.why], example, tokens)
    measure = measure and example is not None
    one_of: dict[Any, Candidate] = {}
    for candidate in weights:
        if not candidate.why:
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
        if not chosen.get(kind) and short(candidate.param.dtype) in dangerous:
            trials[kind] = _Trial(why="the default algorithm crashes or hangs here, and no other was found")
        else:
            trials[kind] = _trial(candidate, backend, chosen.get(kind, ()), launch if measure else None, clock)

    rows: list[Row] = []
    ready: list[tuple[Candidate, nn.Module]] = []
    for candidate in weights:
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


def _note_calls(model: nn.Module, eligible: list[Candidate], example: Any, tokens: int) -> None:
    """Note what each layer is called with, by the example or by the number of tokens, or why it stays dense then."""
    if example is None:
        for candidate in eligible:
            candidate.calls = {_input(candidate, tokens): 1}
            candidate.activation, candidate.follows = "", None  # the layer may be called by itself, too
        return
    holders = {id(candidate.follows[0]): candidate.follows[0] for candidate in eligible if candidate.follows}
    noted = [*(candidate.layer for candidate in eligible), *holders.values()]
    called = measuring.calls_of(model, noted, example, device_of(model))
    for candidate in eligible:
        candidate.calls = called[id(candidate.layer)]
        if candidate.follows and sum(called[id(candidate.follows[0])].values()) != sum(candidate.calls.values()):
            candidate.activation, candidate.follows = "", None  # the layer is called by itself, too
        others = {one.dtype for one in candidate.calls} - {candidate.param.dtype}
        if not candidate.calls:
            candidate.why = "the example does not reach it"
        elif others:
            candidate.why = f"its inputs are {short(others.pop())}, its weight {short(candidate.param.dtype)}"


@dataclass(frozen=True)
class _Trial:
    """What is found out about all layers of a kind by one of them."""

    activation: str = ""
    """That runs within the product."""
    why: str = ""
    """Why they stay dense."""
    times: Times | None = None


def _trial(
    candidate: Candidate, backend: Backend, algorithms: tuple[int, ...], launch: str | None, clock: Clock
) -> _Trial:
    """Check the layer's 2:4 form, with the activation if the library takes it, and time it if there is a `launch`."""
    layer, calls, weight, why = candidate.layer, candidate.calls, None, ""
    for activation in dict.fromkeys((candidate.activation, "")):
        try:
            sparse = compressed(layer, backend, algorithms, activation, weight)
            weight = sparse.weight
            error = measuring.deviation(layer, sparse, activation, calls)
            if error > measuring.TOLERANCE:
                return _Trial(why=f"its 2:4 product is wrong: relative error {error:.2g}")
            if launch is None:
                return _Trial(activation)
            times = measuring.compare(layer, sparse, activation, calls, launch, clock)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # not the layer's fault: of the memory, or of a device that runs nothing any more
        except (CuSparseLtError, RuntimeError) as refused:  # torch's own calls raise the latter
            why = first_line(refused)
            continue
        if times.speedup >= measuring.MARGIN:
            return _Trial(activation, times=times)
        slower = times.speedup < 1 / measuring.MARGIN
        return _Trial(activation, "2:4 is slower" if slower else "2:4 gains nothing", times)
    return _Trial(why=why)


def _algorithms(
    one_of: dict[Any, Candidate], fused: bool, cache: Cache, notes: list[str]
) -> dict[Any, tuple[int, ...]]:
    """For each kind, the algorithms that are found for its product, of all bins of tokens that are known.

    Args:
        fused: with the activation.
    """
    problems: dict[Any, list[Problem]] = {}
    for kind, candidate in one_of.items():
        dtype, (rows, columns) = short(candidate.param.dtype), candidate.param.flatten(1).shape
        bins = sorted({bin_of(one.tokens(candidate.layer)) for one in candidate.calls})
        more = (candidate.bias is not None, candidate.activation if fused else "")
        problems[kind] = [Problem(dtype, dtype, rows, columns, count, *more) for count in bins]
    if problems:
        device = next(iter(one_of.values())).param.device
        notes += search([problem for of_kind in problems.values() for problem in of_kind], device, cache).notes
    return {kind: flat(cache.bins(of_kind[0])) for kind, of_kind in problems.items()}


def _input(candidate: Candidate, tokens: int) -> Input:
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
        names = ", ".join(sorted(short(dtype) for dtype in found))
        raise SparsityError(
            f"{backend.name} has no {names}: convert the model first, with model.bfloat16() or model.half()"
        )


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch's Transformer layers from handing the compressed weights to kernels that cannot read them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
