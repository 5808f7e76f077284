"""What 2:4 inference gains through torch's semi-structured tensors: `python -m nm_sparsity.benchmarks.inference`.

First single matrix products, eager and under CUDA graphs: those of the whole models below, and a sweep over the layers
of well-known ones. Then whole models, eager, compiled, and compiled under CUDA graphs. Every row of a sparse variant
gives the speed-up over dense (a product's with the same launch, a model's fastest), the most that the roofline allows,
how much of that gain was reached, and the relative error against the dense product with the same masked weight.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nm_sparsity.benchmarks import devices, models, plan, report, timing
from nm_sparsity.benchmarks.devices import DTYPES, FP8_CAPABILITY, Device, Product
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.benchmarks.timing import Budget, Call, CudaGraph
from nm_sparsity.core import SparsityError, finalize, keep_largest, sparsify
from nm_sparsity.core.deploy.backends import BACKENDS, DEFAULT, Backend
from nm_sparsity.core.deploy.clock import Clock, seconds
from nm_sparsity.core.deploy.convert import to_semi_structured
from nm_sparsity.core.experiments.command_line import command_line, make_parser

TOKENS = (4096, 1024, 16384, 512, 128, 16, 1)
"""The most wanted first, in case time runs out."""

MODELS = (("bert-large", 32), ("vit-l", 64), ("resnet50", 256), ("transformer-base", 64))
LAUNCHES = ("eager", "compiled", "compiled, graph")
SPARSE = ("cutlass", "cusparselt", "cusparselt, searched")
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

    def compare(self, calls: Mapping[tuple[str, str], Call], rounds: int) -> dict[tuple[str, str], timing.Timing]:
        """The timing of each of `calls`, which have the key (how, launch)."""
        timings = timing.compare({"|".join(key): c for key, c in calls.items()}, self.device, rounds, clock=self.clock)
        return dict(zip(calls, timings.values(), strict=True))


class Contender(NamedTuple):
    """A way to compute a product, and the bytes that its weight takes."""

    call: Call
    weight_bytes: int


def output_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that a product of 8-bit operands gives; None where it is the operands' own."""
    return {torch.int8: torch.int32, torch.float8_e4m3fn: torch.bfloat16}.get(dtype)


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
        xs = [_padded(x, 32) for x in xs] if rows <= 16 else xs
        return Contender(lambda i: torch._int_mm(xs[i % len(xs)], ws[i % len(ws)].t())[:rows], size)
    if dtype == torch.float8_e4m3fn:
        if xs[0].device.type != "cuda" or torch.cuda.get_device_capability(xs[0].device) < FP8_CAPABILITY:
            raise Unavailable("fp8 needs compute capability 8.9 or newer")
        one = torch.ones((), device=xs[0].device)
        options: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return Contender(lambda i: torch._scaled_mm(xs[i % len(xs)], ws[i % len(ws)].t(), **options), size)
    return Contender(lambda i: F.linear(xs[i % len(xs)], ws[i % len(ws)]), size)


def sparse(how: str, xs: list[Tensor], ws: list[Tensor], backends: Mapping[str, Backend] = BACKENDS) -> Contender:
    """The contender that multiplies by compressed weights in the way `how`, one of `SPARSE`.

    Raises:
        Unavailable: if the device, the dtype or the shape does not allow it.
    """
    backend, dtype = backends[how.split(",")[0]], xs[0].dtype
    if reason := backend.why_not_device(xs[0].device) or backend.why_not_matrix(ws[0].shape, dtype):
        raise Unavailable(reason)
    weights = [backend.compress(w) for w in ws]
    parts = (weights[0].packed, getattr(weights[0], "meta", None))
    compressed = sum(part.nbytes for part in parts if part is not None)
    half, searched = dtype in (torch.float16, torch.bfloat16), "searched" in how
    if half and not searched:
        return Contender(lambda i: F.linear(xs[i % len(xs)], weights[i % len(weights)]), compressed)
    rows, multiple, out = len(xs[0]), 8 if half else 16, output_dtype(dtype)
    choice = backend.search(weights[0], _padded(xs[0], multiple), out_dtype=out) if searched else DEFAULT

    def call(i: int) -> Tensor:
        x = _padded(xs[i % len(xs)], multiple)
        return backend.product(weights[i % len(weights)], x, out, choice)[:rows]

    return Contender(call, compressed)


def measure_product(result: Result, layer: str, product: Product, dtype: str, machine: Machine, rounds: int) -> None:
    """Add a row to `result` for each way and launch mode of a product."""
    report.progress(layer, product.tokens, f"{product.rows}x{product.columns}", dtype)
    x, w = random_operands(product, DTYPES[dtype], machine.device)
    copies = timing.copies_beyond_cache(x.nbytes + w.nbytes, machine.device)
    xs, ws = [x, *(x.clone() for _ in range(copies - 1))], [w, *(w.clone() for _ in range(copies - 1))]
    reference = x[:CHECKED_ROWS].float().double() @ w.float().double().t()
    head = {"layer": layer, "tokens": product.tokens, "weight": f"{product.rows}x{product.columns}", "dtype": dtype}

    makers: dict[str, Callable[[], Contender]] = {"dense": lambda: dense(xs, ws)}
    makers |= {how: lambda how=how: sparse(how, xs, ws, machine.backends) for how in SPARSE}  # type: ignore[misc]
    calls: dict[tuple[str, str], Call] = {}
    errors: dict[str, float] = {}
    weight_bytes: dict[str, int] = {}
    missing: dict[tuple[str, str], str] = {}
    for how, make in makers.items():
        try:
            call, weight_bytes[how] = make()
            errors[how] = relative_error(call(0), reference)
        except Unavailable as reason:
            missing[how, "eager"] = str(reason)
            continue
        except (RuntimeError, NotImplementedError) as error:  # a kernel that refuses this shape
            missing[how, "eager"] = first_line(error)
            continue
        calls[how, "eager"] = call
        if machine.graph is not None:
            try:
                calls[how, "graph"] = machine.graph(call, 2 * copies)
            except RuntimeError as error:
                missing[how, "graph"] = f"cannot be captured: {first_line(error)}"
    timings = machine.compare(calls, rounds)

    ceiling = product.ceiling(machine.known) if machine.known else None
    for how, launch in [*calls, *missing]:
        row = {**head, "how": how, "launch": launch}
        if (how, launch) in missing:
            result.add(**row, not_run=missing[how, launch])
            continue
        t = timings[how, launch]
        best_dense = timings.get(("dense", launch))
        speedup = best_dense.over(t)[0] if best_dense and how != "dense" else None
        result.add(
            **row,
            us=t.median * 1e6,
            quartiles=[q * 1e6 for q in t.quartiles],
            speedup=speedup,
            ceiling=None if how == "dense" else ceiling,
            gain=None if speedup is None else reached(speedup, ceiling),
            error=errors[how],
            weight_MB=weight_bytes[how] / 1e6,
        )


def measure_model(result: Result, name: str, batch: int, machine: Machine, rounds: int, budget: Budget) -> None:
    """Add a row for each way and launch of a whole model in fp16 (fp32 on a CPU)."""
    setup, device = models.workload(name), machine.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    head = {"model": name, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    torch.manual_seed(0)
    base = setup.build()
    sparsify(base, "2:4", exclude=setup.exclude)
    finalize(base)
    base = base.to(device, dtype).eval()
    inputs = [setup.inputs(batch, device, dtype) for _ in range(2)]
    if inputs[0].dim() == 4:
        base = base.to(memory_format=torch.channels_last)
    with torch.no_grad():
        reference = base(inputs[0]).double()
    tokens = inputs[0].numel() if inputs[0].dim() == 2 else batch * 196

    calls: dict[tuple[str, str], Call] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for how in ("dense", *SPARSE):
        model = copy.deepcopy(base)
        notes: dict[str, Any] = {}
        if how != "dense":
            try:
                backend = machine.backends[how.split(",")[0]]
                done = to_semi_structured(model, backend, "searched" in how, tokens, machine.clock)
                notes = {"sparse_layers": len(done.converted)}
            except SparsityError as error:
                rows[how, "eager"] = {"not_run": first_line(error)}
                continue
        models.compile_layers(model)
        compiled = model_call(model, inputs)
        for launch in LAUNCHES if machine.graph is not None else LAUNCHES[:2]:
            if budget.spent:
                rows[how, launch] = {"not_run": "out of time"}
                continue
            report.progress(name, how, launch)
            try:
                call = _launched(compiled, launch, len(inputs), machine)
                output = compiled(0) if isinstance(call, CudaGraph) else call(0)
                deviation = relative_error(output, reference)
            except Exception as failure:  # whatever a compiler raises: a result too
                rows[how, launch] = {"not_run": first_line(failure)}
                continue
            calls[how, launch], rows[how, launch] = call, {"error": deviation, **notes}
    timings = machine.compare(calls, rounds)
    ceiling = plan.for_workload(name, batch, machine.known).ceiling if machine.known else None
    best_dense = min((t for (how, _), t in timings.items() if how == "dense"), key=lambda t: t.median, default=None)
    for (how, launch), row in rows.items():
        if "not_run" not in row:
            t = timings[how, launch]
            row = {"ms": t.median * 1e3, "quartiles": [q * 1e3 for q in t.quartiles], **row}
            if best_dense is not None and how != "dense":
                speedup = best_dense.over(t)[0]
                row |= {"speedup": speedup, "ceiling": ceiling, "gain": reached(speedup, ceiling)}
        result.add(**head, how=how, launch=launch, **row)


def run_products(
    result: Result, machine: Machine, quick: bool, dtypes: Sequence[str], rounds: int, budget: Budget
) -> None:
    """Measure the whole models' products, then the sweep; the common cases first, in case time runs out."""
    if machine.device.type == "cpu":
        result.add(layer="every layer", how="2:4", not_run="needs an NVIDIA GPU; below: the dense product on this CPU")
    cases = list(_products(machine, quick, dtypes))
    for done, (layer, dtype, product) in enumerate(cases):
        if budget.spent:
            result.add(layer=f"{len(cases) - done} more products", not_run="out of time")
            return
        measure_product(result, layer, product, dtype, machine, rounds)


def _products(machine: Machine, quick: bool, dtypes: Sequence[str]) -> Iterator[tuple[str, str, Product]]:
    """(layer, dtype, product) of every case, in the order of measuring."""
    shapes = [
        (f"{model} {layer}", shape) for model, layers in models.LINEAR_SHAPES.items() for layer, shape in layers.items()
    ]
    tokens: Sequence[int] = TOKENS
    if quick:
        shapes, tokens = [("smallest", (256, 64)), ("small", (128, 256))], (1, 32)
    if machine.device.type == "cpu":
        shapes, tokens = shapes[:2], (1, 16)
    first = ("llama-7b", "bert-large", "vit-l")
    shapes.sort(key=lambda item: not item[0].startswith(first))

    def sweep(counts: Sequence[int]) -> Iterator[tuple[str, str, Product]]:
        for count, dtype, (layer, (rows, columns)) in itertools.product(counts, dtypes, shapes):
            yield layer, dtype, Product(count, rows, columns, DTYPES[dtype].itemsize)

    yield from sweep(tokens[:2])
    if machine.device.type == "cuda" and not quick and "fp16" in dtypes:
        known = machine.known or devices.find("h100")
        for name, batch in MODELS:
            for layer, alike in plan.for_workload(name, batch, known).alike().items():
                if not alike[0].why_not:
                    yield f"{name} {layer.removesuffix('.weight')}", "fp16", alike[0].product
    yield from sweep(tokens[2:])


def run_models(result: Result, machine: Machine, quick: bool, rounds: int, budget: Budget) -> None:
    """Measure whole models, the smallest alone on a CPU."""
    on_cpu = machine.device.type == "cpu"
    cases = [("transformer-base", 1)] if quick or on_cpu else MODELS
    for name, batch in cases:
        if budget.spent:
            result.add(model=name, batch=batch, not_run="out of time")
            continue
        measure_model(result, name, batch, machine, rounds, budget)
        torch.compiler.reset()
    if on_cpu:
        for name, batch in MODELS:
            result.add(model=name, batch=batch, how="2:4", not_run="needs an NVIDIA GPU")


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _launched(compiled: Call, launch: str, calls: int, machine: Machine) -> Call:
    """A call of a compiled model as one of `LAUNCHES`; `calls` are captured in a graph."""

    def eager(i: int) -> object:
        with torch.compiler.set_stance("force_eager"):
            return compiled(i)

    if launch == "eager":
        return eager
    return compiled if launch == "compiled" or machine.graph is None else machine.graph(compiled, calls)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else t.to(dtype)


def _padded(x: Tensor, multiple: int) -> Tensor:
    missing = -len(x) % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def model_call(model: Any, inputs: list[Tensor]) -> Callable[[int], Any]:
    """A forward pass without gradients on one of `inputs` in turn."""

    def call(i: int) -> Any:
        with torch.no_grad():
            return model(inputs[i % len(inputs)])

    return call


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Measure products and whole models from the command line."""
    parser = make_parser(__doc__)
    report.add_arguments(parser)
    parser.add_argument("--only", choices=["products", "models"], help="default: both")
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="of the products; may be repeated (default: all)"
    )
    parser.add_argument(
        "--minutes", type=float, help="stop measuring after these; what is left becomes a row that says so"
    )
    parser.add_argument("--rounds", type=int, default=10, help="samples of each way (default 10)")
    args = parser.parse_args(argv)
    machine, budget = Machine.of(report.set_up(args)), Budget(args.minutes)
    if args.only != "models":
        with report.saved("products", machine.device, args.out) as result:
            dtypes = args.dtype or default_dtypes(machine.device)
            run_products(result, machine, args.quick, dtypes, args.rounds, budget)
    if args.only != "products":
        with report.saved("models", machine.device, args.out) as result:
            run_models(result, machine, args.quick, args.rounds, budget)
    if (known := machine.known) is not None:
        found = plan.measured(known, "fp16", (args.out,))
        for name, batch in MODELS:
            print(f"\n{name}, batch {batch}, fp16, on {known.name}")
            print(plan.for_workload(name, batch, known).table(found))


if __name__ == "__main__":
    raise SystemExit(main())
