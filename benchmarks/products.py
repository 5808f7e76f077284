"""Single matrix products: dense beside every 2:4 way, eager and under CUDA graphs, from one token to many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nm_sparsity.benchmarks import devices, models, report, timing
from nm_sparsity.benchmarks.devices import DTYPES, FP8_CAPABILITY, Device, Product
from nm_sparsity.benchmarks.groups import Group
from nm_sparsity.benchmarks.report import Result, Row
from nm_sparsity.benchmarks.timing import Budget
from nm_sparsity.core import keep_largest
from nm_sparsity.core.deploy.backends import BACKENDS, Backend
from nm_sparsity.core.deploy.cache import Cache, Problem, flat
from nm_sparsity.core.deploy.child import first_line
from nm_sparsity.core.deploy.clock import Call, Clock, CudaGraph, host_seconds, seconds
from nm_sparsity.core.deploy.cusparselt import OPERANDS
from nm_sparsity.core.deploy.library import CuSparseLtError
from nm_sparsity.core.deploy.search import bin_of, search

TOKENS = (4096, 1024, 16384, 512, 128, 16, 1)
"""The most wanted first, in case time runs out."""

SPARSE = ("cutlass", "torch", "torch, searched", "cusparselt", "cusparselt, searched")
"""The 2:4 ways: a backend, with its default algorithm or with the one that our search found."""

CHECKED_ROWS = 256
"""Rows of the output that are compared with the reference."""


class Unavailable(Exception):
    """The reason why a contender cannot run on this device, dtype or shape."""


@dataclass(frozen=True)
class Machine:
    """What is measured on, and with: a device and its data sheet, the 2:4 backends, a clock, CUDA graphs."""

    device: torch.device
    known: Device | None
    backends: Mapping[str, Backend] = field(default_factory=lambda: BACKENDS)
    clock: Clock = seconds
    graph: Callable[[Call, int], Call] | None = None
    """Captures so many calls of a function as one CUDA graph; None where there are no graphs."""

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """This machine, with `device`."""
        return cls(device, devices.present(device), graph=CudaGraph if device.type == "cuda" else None)

    def known_for(self, dtype: str) -> Device | None:
        """The data sheet, if it has tensor cores for `dtype`: without them there is no ceiling."""
        return self.known if self.known is not None and not self.known.why_not(dtype) else None

    def compare(self, calls: Mapping[tuple[str, str], Call], rounds: int) -> dict[tuple[str, str], timing.Timing]:
        """The timing of each of `calls`, which have the key (how, launch)."""
        timings = timing.compare({"|".join(key): c for key, c in calls.items()}, self.device, rounds, clock=self.clock)
        return dict(zip(calls, timings.values(), strict=True))


class Contender(NamedTuple):
    """A way to compute a product, and the bytes that its weight takes."""

    call: Call
    weight_bytes: int


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a product of such operands gives."""
    return OPERANDS[dtype].outputs[0]


def random_operands(product: Product, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random operands (x, w) of the product ``x @ w.T``, with w 2:4."""
    scale = 40.0 if dtype == torch.int8 else 1.0
    x = torch.randn(product.tokens, product.columns, device=device) * scale
    w = keep_largest(torch.randn(product.rows, product.columns, device=device) * scale, "2:4")
    return _cast(x, dtype), _cast(w, dtype)


def dense(xs: list[Tensor], ws: list[Tensor]) -> Contender:
    """The contender that multiplies by dense weights, through torch's call for the dtype."""
    dtype, rows, size = xs[0].dtype, len(xs[0]), ws[0].nbytes
    if dtype == torch.int8:
        # torch._int_mm takes no fewer rows; padded before the clock runs, which favours dense.
        xs = [F.pad(x, (0, 0, 0, 32 - rows)) for x in xs] if rows <= 16 else xs
        return Contender(lambda i: torch._int_mm(xs[i % len(xs)], ws[i % len(ws)].t())[:rows], size)
    if dtype == torch.float8_e4m3fn:
        if xs[0].device.type != "cuda" or torch.cuda.get_device_capability(xs[0].device) < FP8_CAPABILITY:
            raise Unavailable("fp8 needs compute capability 8.9 or newer")
        one = torch.ones((), device=xs[0].device)
        options: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return Contender(lambda i: torch._scaled_mm(xs[i % len(xs)], ws[i % len(ws)].t(), **options), size)
    return Contender(lambda i: F.linear(xs[i % len(xs)], ws[i % len(ws)]), size)


def sparse(
    how: str,
    xs: list[Tensor],
    ws: list[Tensor],
    backends: Mapping[str, Backend] = BACKENDS,
    algorithms: Sequence[int] = (),
) -> Contender:
    """The contender that multiplies by compressed weights in the way `how`, one of `SPARSE`.

    Args:
        algorithms: what was searched for, as `cusparselt.linear` takes it.

    Raises:
        Unavailable: if the device, the dtype or the shape does not allow it.
    """
    backend, dtype = backends[how.split(",")[0]], xs[0].dtype
    if reason := backend.why_not_device(xs[0].device) or backend.why_not_matrix(ws[0].shape, dtype):
        raise Unavailable(reason)
    searched = "searched" in how
    if searched and not algorithms:
        raise Unavailable("no algorithm was found for it")
    weights = [backend.compress(w) for w in ws]
    parts = [getattr(weights[0], name, None) for name in ("packed", "meta")]
    size = sum(part.nbytes for part in parts if part is not None) or weights[0].nbytes
    options: dict[str, Any] = {"out_dtype": output_dtype(dtype), "algorithms": algorithms if searched else ()}
    rows = len(ws[0])
    return Contender(lambda i: backend.linear(xs[i % len(xs)], weights[i % len(weights)], rows, **options), size)


def problem_of(product: Product, dtype: str) -> Problem:
    """What is searched for a product."""
    operand = DTYPES[dtype]
    name, output = (str(t).removeprefix("torch.") for t in (operand, output_dtype(operand)))
    return Problem(name, output, product.rows, product.columns, bin_of(product.tokens))


def measure(
    result: Result,
    layer: str,
    product: Product,
    dtype: str,
    machine: Machine,
    rounds: int,
    algorithms: Sequence[int] = (),
) -> None:
    """Add a row to `result` for each way and launch mode of a product."""
    report.progress(layer, product.tokens, f"{product.rows}x{product.columns}", dtype)
    x, w = random_operands(product, DTYPES[dtype], machine.device)
    copies = timing.copies_beyond_cache(x.nbytes + w.nbytes, machine.device)
    xs, ws = [x, *(x.clone() for _ in range(copies - 1))], [w, *(w.clone() for _ in range(copies - 1))]
    reference = x[:CHECKED_ROWS].float().double() @ w.float().double().t()
    head = {"layer": layer, "tokens": product.tokens, "weight": f"{product.rows}x{product.columns}", "dtype": dtype}

    makers: dict[str, Callable[[], Contender]] = {"dense": lambda: dense(xs, ws)}
    for name in SPARSE:
        makers[name] = lambda name=name: sparse(name, xs, ws, machine.backends, algorithms)  # type: ignore[misc]
    calls: dict[tuple[str, str], Call] = {}
    facts: dict[str, Row] = {}
    missing: dict[tuple[str, str], str] = {}
    for how, make in makers.items():
        try:
            call, size = make()
            facts[how] = {"error": relative_error(call(0), reference), "weight_MB": size / 1e6}
        except Unavailable as reason:
            missing[how, "eager"] = str(reason)
            continue
        except (RuntimeError, NotImplementedError, CuSparseLtError) as error:  # a kernel that refuses this shape
            missing[how, "eager"] = first_line(error)
            continue
        calls[how, "eager"] = call
        if machine.graph is not None:
            try:
                calls[how, "graph"] = machine.graph(call, 2 * copies)
            except RuntimeError as error:
                missing[how, "graph"] = f"cannot be captured: {first_line(error)}"
    timings = machine.compare(calls, rounds)

    known = machine.known_for(dtype)
    ceiling = product.ceiling(known) if known else None
    for how, launch in [*calls, *missing]:
        row: Row = {**head, "how": how, "launch": launch}
        if (how, launch) in missing:
            result.add(**row, not_run=missing[how, launch])
            continue
        t = timings[how, launch]
        best_dense = timings.get(("dense", launch))
        speedup = best_dense.over(t)[0] if best_dense and how != "dense" else None
        on_host = machine.device.type == "cuda" and launch == "eager"
        result.add(
            **row,
            us=t.median * 1e6,
            quartiles=[q * 1e6 for q in t.quartiles],
            host_us=host_seconds(calls[how, launch], machine.device, 50) * 1e6 if on_host else None,
            speedup=speedup,
            ceiling=None if how == "dense" else ceiling,
            gain=None if speedup is None else reached(speedup, ceiling),
            **facts[how],
        )


def crossovers(rows: Sequence[Row], how: str = SPARSE[-1]) -> Iterator[Row]:
    """For each product and launch in `rows`: the measured number of tokens from which on `how` is not slower."""
    speedups: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        if row.get("how") == how and row.get("speedup") is not None:
            key = tuple(row[name] for name in ("layer", "weight", "dtype", "launch"))
            speedups.setdefault(key, {})[row["tokens"]] = row["speedup"]
    for (layer, weight, dtype, launch), by_tokens in speedups.items():
        wins = None
        for tokens in sorted(by_tokens, reverse=True):
            if by_tokens[tokens] < 1:
                break
            wins = tokens
        about = {"layer": layer, "weight": weight, "dtype": dtype, "how": how, "launch": launch}
        yield {**about, "wins_from": "never" if wins is None else f"{wins:,} tokens"}


def run(
    result: Result,
    device: torch.device,
    layers: Sequence[Sequence[Any]],
    dtype: str,
    tokens: Sequence[int],
    rounds: int = 10,
    minutes: float | None = None,
) -> None:
    """Measure products of `layers`, each (name, rows, columns), and where 2:4 begins to win; many tokens first."""
    machine, budget = Machine.of(device), Budget(minutes)
    itemsize = DTYPES[dtype].itemsize
    cases = [(name, Product(n, rows, columns, itemsize)) for n in tokens for name, rows, columns in layers]
    chosen: dict[Problem, tuple[int, ...]] = {}
    if device.type == "cuda" and not machine.backends["cusparselt"].why_not_device(device):
        cache = Cache(device)
        problems = [problem_of(product, dtype) for _, product in cases]
        limit = math.inf if minutes is None else 60 * minutes / 2
        for note in search(problems, device, cache, limit=limit, progress=report.progress).notes:
            result.add(layer="search", dtype=dtype, not_run=note)
        chosen = {problem_of(p, dtype): flat(cache.bins(problem_of(p, dtype))) for _, p in cases}
    for done, (name, product) in enumerate(cases):
        if budget.spent:
            result.add(layer=f"{len(cases) - done} more products", dtype=dtype, not_run="out of time")
            break
        measure(result, name, product, dtype, machine, rounds, chosen.get(problem_of(product, dtype), ()))
    for row in crossovers(result.rows):
        result.add(**row)


def groups(device: torch.device, quick: bool, dtypes: Sequence[str], rounds: int) -> Iterator[Group]:
    """All products in the order of measuring; on a CPU two small ones, to see that it runs."""
    module = "nm_sparsity.benchmarks.products"
    if device.type == "cpu":
        label = {"layer": "every layer", "how": "2:4"}
        yield Group("products", module, label, why_not="needs an NVIDIA GPU; below: the dense product on this CPU")
    if device.type == "cpu" or quick:
        shapes = [("smallest", 256, 64), ("small", 128, 256)] if quick else _layers("bert-base")[:2]
        for dtype in dtypes:
            options = {"layers": shapes, "dtype": dtype, "tokens": (1, 32) if quick else (1, 16), "rounds": rounds}
            yield Group("products", module, {"layer": "all", "dtype": dtype}, options)
        return
    cases = [
        ("bf16", ("llama-7b",), 0.1),
        ("bf16", ("bert-large", "vit-l"), 0.1),
        ("fp8", ("llama-7b", "bert-large"), 0.07),
        ("bf16", ("llama-3-8b", "qwen2.5-7b"), 0.1),
        ("fp16", ("llama-7b", "bert-large"), 0.06),
        ("int8", ("llama-7b", "bert-large"), 0.05),
        ("fp8", ("llama-3-8b", "qwen2.5-7b"), 0.05),
        ("bf16", ("bert-base", "resnet50-1x1", "llama-70b"), 0.06),
    ]
    for dtype, names, share in cases:
        if dtype in dtypes:
            layers = [layer for name in names for layer in _layers(name)]
            options = {"layers": layers, "dtype": dtype, "tokens": TOKENS, "rounds": rounds}
            yield Group("products", module, {"layer": ", ".join(names), "dtype": dtype}, options, share)


def _layers(name: str) -> list[tuple[str, int, int]]:
    return [(f"{name} {layer}", *shape) for layer, shape in models.LINEAR_SHAPES[name].items()]


def default_dtypes(device: torch.device) -> list[str]:
    """The dtypes that are measured unless others are asked for: all of `DTYPES` on a GPU, one on a CPU."""
    return list(DTYPES) if device.type == "cuda" else ["bf16"]


def relative_error(found: Any, reference: Tensor) -> float:
    """||found - reference|| / ||reference||, over the rows that the reference has."""
    found = found[: len(reference)].double()
    return float((found - reference).norm() / reference.norm())


def reached(speedup: float, ceiling: float | None) -> float | None:
    """The part of the possible gain that was reached: 0 for no speed-up, 1 at the ceiling."""
    return None if ceiling is None or ceiling < 1.01 else (speedup - 1) / (ceiling - 1)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else t.to(dtype)
