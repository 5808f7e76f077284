"""A finalized model made as fast as it gets here: compiled, under CUDA graphs, its layers 2:4 where they gain."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from nm_sparsity.core.deploy.acceleration import Acceleration
from nm_sparsity.core.deploy.backends import Backend, choose_backend
from nm_sparsity.core.deploy.cache import Cache
from nm_sparsity.core.deploy.child import first_line
from nm_sparsity.core.deploy.clock import Clock, seconds
from nm_sparsity.core.deploy.convert import device_of, to_semi_structured
from nm_sparsity.core.deploy.example import arguments, run, tensors
from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.model.modes import evaluating
from nm_sparsity.core.model.wrappers import unwrap
from nm_sparsity.core.table import format_table

TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.08}
"""The relative error (of norms) of a whole model's outputs over the eager dense ones: about ten roundings."""

REPEATED = 4
"""Blocks of one class that stand in a row are compiled one by one if there are so many: once, and used for all."""

NEARLY_ALL = 0.9
"""The part of a model's parameters (counted, not by size) from which on its repeated blocks stand for the whole."""

ROUNDS = 9


@dataclass(frozen=True)
class Way:
    """A way to run the model, and how it did on the examples."""

    name: str
    seconds: float
    error: float
    """Relative, over the eager dense model."""


@dataclass(frozen=True)
class Report:
    """What was tried, which way runs, and what became of each layer. Prints on one screen."""

    about: str
    ways: tuple[Way, ...]
    runs: str
    """The name of the way that runs."""
    layers: Acceleration
    notes: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """What runs, over the fastest dense way."""
        dense = min(way.seconds for way in self.ways if "2:4" not in way.name)
        return dense / next(way.seconds for way in self.ways if way.name == self.runs)

    def __str__(self) -> str:
        rows = [(way.name, way.seconds * 1e3, way.error, "runs" if way.name == self.runs else "") for way in self.ways]
        table = format_table(["way", "ms", "error", ""], rows)
        total = f"{self.speedup:.2f}x over the fastest dense way"
        return "\n".join([self.about, "", table, total, *self.notes, "", str(self.layers)])


class Accelerated:
    """A model for inference, called as the model was. `report` says what runs and why.

    Calls of the examples' shapes run their CUDA graph; others run the model as it was given. Outputs are the caller's.
    """

    def __init__(self, model: nn.Module, fast: dict[Hashable, Callable[..., Any]], report: Report) -> None:
        self.model, self.report, self._fast = model, report, fast

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives, without gradients."""
        fast = self._fast.get(_signature(args, kwargs))
        if fast is None:
            with evaluating(self.model):
                return self.model(*args, **kwargs)
        with torch.no_grad():
            return fast(*args, **kwargs)


def accelerate(
    model: nn.Module,
    example_inputs: Any,
    *,
    backend: str | Backend = "auto",
    cache: Cache | None = None,
    clock: Clock = seconds,
    compiler: Callable[[nn.Module], object] | None = None,
) -> Accelerated:
    """The fastest way to run a finalized `model` on its GPU for the shapes of the examples; the model stays as it is.

    Tried are the dense model from Python, the dense model compiled under a CUDA graph, and the same with layers 2:4
    where they gain in a graph. Outputs are compared: a way whose outputs differ by more than rounding does not run.

    Moving or casting `model` afterwards does not reach what runs. Writing to its weights, as `load_state_dict` and
    training do, reaches dense layers and not the compressed weights: accelerate again.

    Args:
        example_inputs: an argument of the model, a tuple of them, or a mapping for named ones; or a list of such
            examples, one for each shape to serve. The first one decides which layers gain.
        backend: see `to_semi_structured`.
        cache: of algorithms; by default that of this machine.
        clock: what times.
        compiler: compiles a model in place; by default `compile_blocks`.

    Raises:
        SparsityError: see `to_semi_structured`; also for an empty list of examples, and for a model whose outputs
            cannot be compared, or differ from one call to the next.
    """
    model = unwrap(model)
    examples = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not examples:
        raise SparsityError("accelerate needs at least one example of the model's inputs")
    device = device_of(model)
    chosen = choose_backend(backend, device)
    notes: list[str] = []
    with evaluating(model):
        outputs = [run(model, example, device) for example in examples]
        if (unknown := _opaque(tree_leaves(outputs))) is not None:
            raise SparsityError(
                f"the model gives a {type(unknown).__name__}, in which outputs cannot be compared: give tensors in "
                "tuples, lists or dicts, or make the class known by torch.export.register_dataclass"
            )
        expected = [tensors(output) for output in outputs]
        sparse = _twin(model)
        launch = "graph" if device.type == "cuda" else "eager"
        layers = to_semi_structured(sparse, examples[0], launch=launch, backend=chosen, cache=cache, clock=clock)
        contenders: dict[str, dict[Hashable, Callable[..., Any]]] = {"dense, eager": {}}
        variants = {"dense, compiled": _twin(model)} | ({"2:4, compiled": sparse} if layers.converted else {})
        for name, variant in variants.items():
            try:
                (compiler or compile_blocks)(variant)
                fast: dict[Hashable, Callable[..., Any]] = {}
                for example in examples:
                    args, kwargs = arguments(example)
                    variant(*args, **kwargs)
                    if (key := _signature(args, kwargs)) is None:
                        raise SparsityError("the inputs hold something else than tensors, numbers and text")
                    fast[key] = _Captured(variant, args, kwargs, device) if device.type == "cuda" else variant
                contenders[name + (" + graph" if device.type == "cuda" else "")] = fast
            except Exception as error:  # whatever a compiler raises: the other ways are left
                notes.append(f"{name}: does not run here: {type(error).__name__}: {first_line(error)}")
        dtype = next((p.dtype for p in model.parameters() if p.dtype in TOLERANCE), torch.bfloat16)
        ways = _measured(model, contenders, examples, expected, device, clock)
    if (changed := ways[0].error) > TOLERANCE[dtype]:  # the model itself, called again
        raise SparsityError(
            f"{type(model).__name__} gives other outputs for the same inputs at the next call (relative error "
            f"{changed:.2g}), so no way can be compared with it: leave out what is random or remembers calls"
        )
    right = [way for way in ways if way.error <= TOLERANCE[dtype]]
    notes += [f"{way.name}: wrong by {way.error:.2g}, so it does not run" for way in ways if way not in right]
    best = min(right, key=lambda way: way.seconds)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    shapes = "; ".join(", ".join("x".join(map(str, t.shape)) for t in tensors(example)) for example in examples)
    about = f"{type(model).__name__}, {str(dtype).removeprefix('torch.')}, inputs {shapes}, on {hardware}"
    return Accelerated(model, contenders[best.name], Report(about, tuple(ways), best.name, layers, tuple(notes)))


def compile_blocks(model: nn.Module) -> None:
    """Compile `model` in place: its repeated blocks as one that serves for all, or the whole if they are not all of it.

    What stands outside of the blocks, an embedding, a norm and a head, runs from Python then.
    """
    blocks: list[nn.Module] = []
    for holder in model.modules():
        if isinstance(holder, nn.ModuleList | nn.Sequential):
            kinds = Counter(type(child) for child in holder)
            repeated = [child for child in holder if kinds[type(child)] >= REPEATED and list(child.children())]
            blocks += [child for child in repeated if type(child) not in _CONTAINERS]
    held = {id(param) for block in blocks for param in block.parameters()}
    for module in blocks if len(held) > NEARLY_ALL * len(list(model.parameters())) else [model]:
        module.compile(dynamic=False)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Not alike for being of one class: they hold anything. All but the first are never called."""


def _measured(
    model: nn.Module,
    contenders: dict[str, dict[Hashable, Callable[..., Any]]],
    examples: list[Any],
    expected: list[list[Tensor]],
    device: torch.device,
    clock: Clock,
) -> list[Way]:
    """Every contender's seconds for all examples, in turn, and its error."""
    calls: dict[str, Callable[[int], object]] = {}
    errors = {}
    for name, fast in contenders.items():

        def call(_: int, fast: dict[Hashable, Callable[..., Any]] = fast) -> list[Any]:
            outputs = []
            for example in examples:
                args, kwargs = arguments(example)
                outputs.append(fast.get(_signature(args, kwargs), model)(*args, **kwargs))
            return outputs

        calls[name] = call
        found = [tensors(output) for output in call(0)]
        errors[name] = max(
            (_error(*pair) for pairs in zip(found, expected, strict=True) for pair in zip(*pairs, strict=True)),
            default=0.0,
        )
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name in calls:
        clock(calls[name], device, 2)
    for _ in range(ROUNDS):
        for name in calls:
            samples[name].append(clock(calls[name], device, 3))
    return [Way(name, median(samples[name]), errors[name]) for name in calls]


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not found.is_floating_point():
        return 0.0  # ids and masks may tip over by rounding
    found, expected = found.double(), expected.double()
    odd = ~expected.isfinite()  # masked logits: no difference can be taken, so they must be the same
    if not torch.allclose(found[odd], expected[odd], rtol=0.0, atol=0.0, equal_nan=True):
        return float("inf")
    error = (found - expected).masked_fill(odd, 0.0).norm() / expected.masked_fill(odd, 0.0).norm().clamp_min(1e-30)
    return float(error.nan_to_num(float("inf"), float("inf")))


def _twin(model: nn.Module) -> nn.Module:
    """A copy of `model` on the same memory, which it holds: moving or casting `model` gives its parameters another."""
    aliases: dict[int, Any] = {id(t): t.detach() for t in model.buffers()}
    aliases |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, aliases)


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
"""What a graph may have taken in as it was captured: its text tells it from any other."""


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What makes a call the same for a graph: structure, shapes and dtypes, values of everything but tensors.

    None where something else is given, which may hold tensors that the graph would never see again.
    """
    leaves, structure = tree_flatten((args, kwargs))
    if _opaque(leaves) is not None:
        return None
    kinds = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf))
        for leaf in leaves
    )
    return str(structure), kinds


def _opaque(leaves: list[Any]) -> Any:
    """The first of `leaves` that may hold tensors nobody finds; None if there is none."""
    return next((leaf for leaf in leaves if not isinstance(leaf, Tensor) and type(leaf) not in _PLAIN), None)


class _Captured:
    """A model's call on inputs of one signature as a CUDA graph, with memory of its own for inputs and outputs."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> None:
        self._lock, self._device = threading.Lock(), device
        inputs: Any = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        self._inputs = tensors(inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    model(*inputs[0], **inputs[1])
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph, stream=stream):  # torch's own is of the device that was current first
                self._outputs = model(*inputs[0], **inputs[1])
        self._model = model  # a twin: it keeps the memory that the graph reads
        self._done = torch.cuda.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock, torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)  # of the last call, which may be on another stream
            for held, given in zip(self._inputs, tensors((args, kwargs)), strict=True):
                held.copy_(given)
            self._graph.replay()
            outputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._outputs)
            self._done.record()
            return outputs
