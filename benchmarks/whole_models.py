"""Whole models: dense beside 2:4, launched from Python, compiled, and compiled under a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nm_sparsity.benchmarks import float8, models, plan, report
from nm_sparsity.benchmarks.groups import Group
from nm_sparsity.benchmarks.products import Machine, reached, relative_error
from nm_sparsity.benchmarks.report import Result, Row
from nm_sparsity.benchmarks.timing import Budget
from nm_sparsity.core import SparsityError, finalize, sparsify
from nm_sparsity.core.deploy.acceleration import Acceleration
from nm_sparsity.core.deploy.child import first_line
from nm_sparsity.core.deploy.clock import Call, CudaGraph
from nm_sparsity.core.deploy.convert import to_semi_structured

MODELS = (
    ("llama-prefill", 1, "bf16"),
    ("bert-large", 32, "bf16"),
    ("vit-l", 64, "bf16"),
    ("llama-prefill", 4, "bf16"),
    ("llama-prefill", 1, "fp8"),
    ("llama-decode", 1, "bf16"),
    ("llama-decode", 256, "bf16"),
    ("bert-large", 32, "fp8"),
    ("llama-decode", 16, "bf16"),
    ("llama-decode", 64, "bf16"),
    ("resnet50", 256, "bf16"),
    ("transformer-base", 64, "bf16"),
)
"""(workload, batch, dtype), the most wanted first, in case time runs out."""

LAUNCHES = ("eager", "compiled", "compiled, graph")
SPARSE = ("cutlass", "torch", "cusparselt", "cusparselt, where it gains")
"""The 2:4 ways: every eligible layer by a backend, or those that were timed to gain."""


def run(
    result: Result,
    device: torch.device,
    name: str,
    batch: int,
    dtype: str,
    rounds: int = 10,
    minutes: float | None = None,
) -> None:
    """Measure one model."""
    measure(result, name, batch, dtype, Machine.of(device), rounds, Budget(minutes))


def measure(result: Result, name: str, batch: int, dtype: str, machine: Machine, rounds: int, budget: Budget) -> None:
    """Add a row to `result` for each way and launch of a whole model."""
    setup, device = models.workload(name), machine.device
    kept = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = {"model": name, "batch": batch, "dtype": dtype if device.type == "cuda" else "fp32"}
    torch.manual_seed(0)
    with torch.device(device):
        base = setup.build()
    sparsify(base, "2:4", exclude=setup.exclude)
    finalize(base)
    base = base.to(device, kept).eval()
    inputs = [setup.inputs(batch, device, kept) for _ in range(2)]
    if inputs[0].dim() == 4:
        base = base.to(memory_format=torch.channels_last)
    with torch.no_grad():
        reference = base(inputs[0]).double()
    if dtype == "fp8":
        float8.convert(base, inputs[0])
    known = machine.known_for(dtype)
    ceiling = plan.for_workload(name, batch, known, dtype=dtype).ceiling if known else None

    calls: dict[tuple[str, str], Call] = {}
    rows: dict[tuple[str, str], Row] = {}
    for how, launches, make in _variants(machine, dtype, inputs[0]):
        model = copy.deepcopy(base)
        try:
            notes = make(model)
        except SparsityError as error:
            rows[how, launches[0]] = {"not_run": first_line(error)}
            continue
        models.compile_layers(model)
        compiled = model_call(model, inputs)
        for launch in launches:
            if budget.spent:
                rows[how, launch] = {"not_run": "out of time"}
                continue
            report.progress(name, how, launch)
            try:
                call = launched(compiled, launch, len(inputs), machine)
                output = compiled(0) if isinstance(call, CudaGraph) else call(0)
                deviation = relative_error(output, reference)
            except Exception as failure:  # whatever a compiler raises: a result too
                rows[how, launch] = {"not_run": first_line(failure)}
                continue
            calls[how, launch], rows[how, launch] = call, {"error": deviation, **notes}
    timings = machine.compare(calls, rounds)
    best_dense = min((t for (how, _), t in timings.items() if how == "dense"), key=lambda t: t.median, default=None)
    for (how, launch), row in rows.items():
        if "not_run" not in row:
            t, same = timings[how, launch], timings.get(("dense", launch))
            row = {"ms": t.median * 1e3, "quartiles": [q * 1e3 for q in t.quartiles], **row}
            if best_dense is not None and how != "dense":
                speedup = best_dense.over(t)[0]
                row |= {"speedup": speedup, "ceiling": ceiling, "gain": reached(speedup, ceiling)}
                row["same launch"] = same.over(t)[0] if same is not None else None
        result.add(**head, how=how, launch=launch, **row)


Make = Callable[[nn.Module], Row]
"""Converts a model in place; returns what its rows say of that."""


def _variants(machine: Machine, dtype: str, x: Tensor) -> Iterator[tuple[str, tuple[str, ...], Make]]:
    """(how, launches, what makes the model)."""
    launches = LAUNCHES if machine.graph is not None else LAUNCHES[:2]
    yield "dense", launches, lambda model: {}
    if dtype == "fp8":
        yield "cusparselt", launches, lambda model: float8.to_semi_structured(model, machine.backends["cusparselt"])
        return

    def convert(model: nn.Module, how: str, **options: Any) -> Row:
        backend = machine.backends[how.split(",")[0]]
        done: Acceleration = to_semi_structured(model, x, backend=backend, clock=machine.clock, **options)
        return {"sparse_layers": len(done.converted)}

    for launch in reversed(launches[::2]):  # one model for Python, one for graphs

        def measured(model: nn.Module, launch: str = launch) -> Row:
            return convert(model, SPARSE[3], launch="eager" if launch == "eager" else "graph")

        yield SPARSE[3], (launch,), measured
    for how in reversed(SPARSE[:3]):
        yield how, launches, lambda model, how=how: convert(model, how, measure=False)  # type: ignore[misc]


def model_call(model: Any, inputs: list[Tensor]) -> Callable[[int], Any]:
    """A forward pass without gradients on one of `inputs` in turn."""

    def call(i: int) -> Any:
        with torch.no_grad():
            return model(inputs[i % len(inputs)])

    return call


def launched(compiled: Call, launch: str, calls: int, machine: Machine) -> Call:
    """A call of a compiled model as one of `LAUNCHES`; `calls` are captured in a graph."""

    def eager(i: int) -> object:
        with torch.compiler.set_stance("force_eager"):
            return compiled(i)

    if launch == "eager":
        return eager
    return compiled if launch == "compiled" or machine.graph is None else machine.graph(compiled, calls)


def groups(device: torch.device, quick: bool, rounds: int) -> Iterator[Group]:
    """Whole models, one a group; on a CPU the smallest alone."""
    on_cpu = device.type == "cpu"
    if quick or on_cpu:
        yield _group("transformer-base", 1, "bf16", rounds)
    for case in () if quick else MODELS:
        yield _group(*case, rounds, "needs an NVIDIA GPU" if on_cpu else "")


def _group(name: str, batch: int, dtype: str, rounds: int, why_not: str = "") -> Group:
    options = {"name": name, "batch": batch, "dtype": dtype, "rounds": rounds}
    label = {"model": name, "batch": batch, "dtype": dtype}
    return Group("models", "nm_sparsity.benchmarks.whole_models", label, options, 0.2, why_not, patience=400.0)
