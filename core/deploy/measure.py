"""Whether a layer gains: its dense and its 2:4 form timed in turn on inputs like those that it gets."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nm_sparsity.core.deploy.clock import Clock, CudaGraph, seconds
from nm_sparsity.core.deploy.cusparselt import activate
from nm_sparsity.core.deploy.example import run, tensors
from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.model.modes import evaluating

LAUNCHES = ("eager", "graph")
"""How a model will be launched: from Python, or as a CUDA graph."""

MARGIN = 1.02
"""The speed-up from which on a layer is said to gain: below it noise decides."""

TOLERANCE = 0.02
"""The relative error (of norms) between a layer and its 2:4 form in half precision."""

ROUNDS, WARM_UP, IN_A_ROW, IN_A_GRAPH = 5, 3, 20, 8


class Input(NamedTuple):
    """What a layer is called with."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def random(self, device: torch.device) -> Tensor:
        """A tensor like it."""
        ends = [(size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True)]
        memory = torch.empty(max(0, 1 + sum(ends)), dtype=self.dtype, device=device)
        return memory.normal_().as_strided(self.shape, self.stride)  # which an expanded input lies in several times

    def tokens(self, layer: nn.Module) -> int:
        """The number of rows of `layer`'s product."""
        count = 1
        if isinstance(layer, nn.Conv2d):
            *images, _, height, width = self.shape
            pixels = (-(-size // stride) for size, stride in zip((height, width), layer.stride, strict=True))
            for size in (*images, *pixels):
                count *= size
        else:
            for size in self.shape[:-1]:
                count *= size
        return count


Calls = Mapping[Input, int]
"""How often a layer is called with which inputs."""


def calls_of(model: nn.Module, layers: Iterable[nn.Module], example: object, device: torch.device) -> dict[int, Calls]:
    """What each of `layers` is called with when `model` gets an example, by the layer's id.

    Raises:
        SparsityError: if the model does not take the example.
    """
    found: dict[int, dict[Input, int]] = {id(layer): {} for layer in layers}

    def note(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        for x in tensors((args, kwargs))[:1]:
            key = Input(tuple(x.shape), x.stride(), x.dtype)
            found[id(layer)][key] = found[id(layer)].get(key, 0) + 1

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it goes past the layers, which converted ones do not
    try:
        # What was compiled before would go past the hooks.
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            run(model, example, device)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    return dict(found)


@dataclass(frozen=True)
class Times:
    """Seconds of all calls of a layer, dense and 2:4: medians over the rounds."""

    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        """Dense over 2:4."""
        return self.dense / self.sparse


def deviation(layer: nn.Module, sparse: nn.Module, activation: str, inputs: Iterable[Input]) -> float:
    """The largest relative error of the 2:4 form of a layer over random inputs."""
    device, worst = next(layer.parameters()).device, 0.0
    with torch.no_grad():
        for one in inputs:
            x = one.random(device)
            expected = activate(layer.forward(x), activation).float()
            error = (sparse.forward(x).float() - expected).norm() / expected.norm()
            worst = max(worst, float(error.nan_to_num(torch.inf, torch.inf)))
    return worst


def compare(
    layer: nn.Module, sparse: nn.Module, activation: str, calls: Calls, launch: str = "eager", clock: Clock = seconds
) -> Times:
    """The times of a layer with the activation behind it, and of its 2:4 form, launched as one of `LAUNCHES`.

    Weights and inputs are taken in turn from copies that exceed the cache, as the layers of a model do.

    Raises:
        SparsityError: for another launch.
    """
    if launch not in LAUNCHES:
        raise SparsityError(f'unknown launch "{launch}"; known: {", ".join(LAUNCHES)}')
    device = next(layer.parameters()).device
    totals = [0.0, 0.0]
    with torch.no_grad():
        for one, count in calls.items():
            copies = _copies(sum(p.nbytes for p in layer.parameters()), device)
            xs = [one.random(device) for _ in range(min(2, copies))]
            denses, sparses = ([m, *(_copy(m) for _ in range(copies - 1))] for m in (layer, sparse))

            def dense_call(i: int, denses: list[nn.Module] = denses, xs: list[Tensor] = xs) -> object:
                return activate(denses[i % len(denses)].forward(xs[i % len(xs)]), activation)

            def sparse_call(i: int, sparses: list[nn.Module] = sparses, xs: list[Tensor] = xs) -> object:
                return sparses[i % len(sparses)].forward(xs[i % len(xs)])

            for which, taken in enumerate(_in_turn((dense_call, sparse_call), device, launch, clock)):
                totals[which] += count * taken
    return Times(*totals)


def _in_turn(
    calls: Iterable[Callable[[int], object]], device: torch.device, launch: str, clock: Clock
) -> tuple[float, ...]:
    """The median seconds of each call."""
    graphs = launch == "graph" and device.type == "cuda"
    launched = [CudaGraph(call, IN_A_GRAPH, device) if graphs else call for call in calls]
    each, divisor = (2, IN_A_GRAPH) if graphs else (IN_A_ROW, 1)
    samples: list[list[float]] = [[] for _ in launched]
    for call in launched:
        clock(call, device, WARM_UP)
    for _ in range(ROUNDS):
        for call, of_it in zip(launched, samples, strict=True):
            of_it.append(clock(call, device, each) / divisor)
    return tuple(statistics.median(of_it) for of_it in samples)


def _copies(size: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(8, -(-2 * cache // max(1, size))))


def _copy(layer: nn.Module) -> nn.Module:
    """`layer` with a weight of its own; the bias is shared, since plans are made for its address."""
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    weight = layer._parameters["weight"]
    if type(weight) is nn.Parameter:  # and not one of torch's compressed ones, which cannot be cloned
        new._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return new
