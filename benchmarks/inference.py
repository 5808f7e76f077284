"""What 2:4 inference gains through torch's semi-structured tensors: `python -m nm_sparsity.benchmarks.inference`.

First single matrix products, eager and under CUDA graphs: those of the whole models below, and a sweep over the layers
of well-known ones. Then whole models, eager, compiled, and compiled under CUDA graphs. Every row of a sparse variant
gives the speed-up over dense (a product's with the same launch, a model's fastest), the most that the roofline allows,
how much of that gain was reached, and the relative error against the dense product with the same masked weight.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nm_sparsity.benchmarks import devices, models, plan, report, timing
from nm_sparsity.benchmarks.devices import DTYPES, FP8_CAPABILITY, Product
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.benchmarks.timing import Budget, Call, CudaGraph
from nm_sparsity.core import SparsityError, finalize, keep_largest, sparsify
from nm_sparsity.core.deploy import convert
from nm_sparsity.core.experiments.command_line import command_line

TOKENS = (4096, 1024, 16384, 512, 128, 16, 1)
"""The most wanted first, in case time runs out."""

MODELS = (("bert-large", 32), ("vit-l", 64), ("resnet50", 256), ("transformer-base", 64))
LAUNCHES = ("eager", "compiled", "compiled, graph")
SPARSE = ("cutlass", "cusparselt", "cusparselt, searched")
CHECKED_ROWS = 256
"""Rows of the output that are compared with the reference."""


class Unavailable(Exception):
    """Why a contender cannot run on this device, dtype or shape."""


class Contender(NamedTuple):
    """A way to compute a product, and the bytes its weight takes."""

    call: Call
    weight_bytes: int


def output_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What an 8-bit product gives; None where it is the operands' type."""
    return {torch.int8: torch.int32, torch.float8_e4m3fn: torch.bfloat16}.get(dtype)


def random_operands(product: Product, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x, w) for ``x @ w.T``, w 2:4."""
    scale = 40.0 if dtype == torch.int8 else 1.0
    x = torch.randn(product.tokens, product.columns, device=device) * scale
    w = keep_largest(torch.randn(product.rows, product.columns, device=device) * scale, "2:4")
    return _cast(x, dtype), _cast(w, dtype)


def dense(xs: list[Tensor], ws: list[Tensor]) -> Contender:
    """torch's dense product of the dtype."""
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


def sparse(how: str, xs: list[Tensor], ws: list[Tensor]) -> Contender:
    """The product with compressed weights by `how`, one of `SPARSE`.

    Raises:
        Unavailable: if the device, the dtype or the shape does not allow it.
    """
    backend, dtype = how.split(",")[0], xs[0].dtype
    if reason := convert.why_not_backend(backend, xs[0].device):
        raise Unavailable(reason)
    if reason := convert.why_not_matrix(ws[0].shape, dtype, backend):
        raise Unavailable(reason)
    weights = [convert.compress(w, backend) for w in ws]
    compressed = sum(part.nbytes for part in (weights[0].packed, getattr(weights[0], "meta", None)) if part is not None)
    return Contender(_sparse_call(how, xs, weights), compressed)


def _sparse_call(how: str, xs: list[Tensor], weights: list[Any]) -> Call:
    backend, dtype = how.split(",")[0], xs[0].dtype
    if how != "cusparselt, searched" and dtype in (torch.float16, torch.bfloat16):
        return lambda i: F.linear(xs[i % len(xs)], weights[i % len(weights)])
    multiple = 8 if dtype in (torch.float16, torch.bfloat16) else 16
    rows, out = len(xs[0]), output_dtype(dtype)
    if backend == "cutlass":
        return lambda i: torch._sparse_semi_structured_mm(
            weights[i % len(weights)].packed,
            weights[i % len(weights)].meta,
            _padded(xs[i % len(xs)], multiple).t(),
            out_dtype=out,
        ).t()[:rows]
    algorithm, split_k, mode = 0, 1, -1
    if how == "cusparselt, searched":
        first = _padded(xs[0], multiple).t()
        algorithm, split_k, mode = convert.search_algorithm(weights[0].packed, first, out_dtype=out)
    return lambda i: torch._cslt_sparse_mm(
        weights[i % len(weights)].packed,
        _padded(xs[i % len(xs)], multiple).t(),
        out_dtype=out,
        transpose_result=True,
        alg_id=algorithm,
        split_k=split_k,
        split_k_mode=mode,
    )[:rows]


def measure_product(
    result: Result, layer: str, product: Product, dtype: str, device: torch.device, rounds: int
) -> None:
    """One row for each way and launch mode of a product."""
    report.progress(layer, product.tokens, f"{product.rows}x{product.columns}", dtype)
    x, w = random_operands(product, DTYPES[dtype], device)
    copies = timing.copies_beyond_cache(x.nbytes + w.nbytes, device)
    xs, ws = [x, *(x.clone() for _ in range(copies - 1))], [w, *(w.clone() for _ in range(copies - 1))]
    reference = x[:CHECKED_ROWS].float().double() @ w.float().double().t()
    head = {"layer": layer, "tokens": product.tokens, "weight": f"{product.rows}x{product.columns}", "dtype": dtype}

    makers: dict[str, Callable[[], Contender]] = {"dense": lambda: dense(xs, ws)}
    makers |= {how: lambda how=how: sparse(how, xs, ws) for how in SPARSE}  # type: ignore[misc]
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
        if device.type == "cuda":
            try:
                calls[how, "graph"] = CudaGraph(call, 2 * copies)
            except RuntimeError as error:
                missing[how, "graph"] = f"cannot be captured: {first_line(error)}"
    timings = timing.compare({"|".join(key): call for key, call in calls.items()}, device, rounds)

    known = devices.present() if device.type == "cuda" else None
    ceiling = product.ceiling(known) if known else None
    for how, launch in [*calls, *missing]:
        row = {**head, "how": how, "launch": launch}
        if (how, launch) in missing:
            result.add(**row, not_run=missing[how, launch])
            continue
        t = timings[f"{how}|{launch}"]
        best_dense = timings.get(f"dense|{launch}")
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


def measure_model(result: Result, name: str, batch: int, device: torch.device, rounds: int, budget: Budget) -> None:
    """A whole model in fp16 (fp32 on a CPU): dense and 2:4, eager, compiled, and compiled under CUDA graphs."""
    setup = models.workload(name)
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
                done = convert.to_semi_structured(model, how.split(",")[0], search="searched" in how, tokens=tokens)
                notes = {"sparse_layers": len(done.converted)}
            except SparsityError as error:
                rows[how, "eager"] = {"not_run": first_line(error)}
                continue
        models.compile_layers(model)
        compiled = model_call(model, inputs)
        for launch in LAUNCHES if device.type == "cuda" else LAUNCHES[:2]:
            if budget.spent:
                rows[how, launch] = {"not_run": "out of time"}
                continue
            report.progress(name, how, launch)
            try:
                call = _launched(compiled, launch, len(inputs))
                output = compiled(0) if isinstance(call, CudaGraph) else call(0)
                deviation = relative_error(output, reference)
            except Exception as failure:  # whatever a compiler raises: a result too
                rows[how, launch] = {"not_run": first_line(failure)}
                continue
            calls[how, launch], rows[how, launch] = call, {"error": deviation, **notes}
    timings = timing.compare({"|".join(key): call for key, call in calls.items()}, device, rounds)
    known = devices.present() if device.type == "cuda" else None
    ceiling = plan.for_workload(name, batch, known).ceiling if known else None
    best_dense = min(
        (t for key, t in timings.items() if key.startswith("dense|")), key=lambda t: t.median, default=None
    )
    for (how, launch), row in rows.items():
        if "not_run" not in row:
            t = timings[f"{how}|{launch}"]
            row = {"ms": t.median * 1e3, "quartiles": [q * 1e3 for q in t.quartiles], **row}
            if best_dense is not None and how != "dense":
                speedup = best_dense.over(t)[0]
                row |= {"speedup": speedup, "ceiling": ceiling, "gain": reached(speedup, ceiling)}
        result.add(**head, how=how, launch=launch, **row)


def run_products(
    result: Result, device: torch.device, quick: bool, dtypes: Sequence[str], rounds: int, budget: Budget
) -> None:
    """The whole models' products, then the sweep; the common cases first, in case time runs out."""
    if device.type == "cpu":
        result.add(layer="every layer", how="2:4", not_run="needs an NVIDIA GPU; below: the dense product on this CPU")
    cases = list(_products(device, quick, dtypes))
    for done, (layer, dtype, product) in enumerate(cases):
        if budget.spent:
            result.add(layer=f"{len(cases) - done} more products", not_run="out of time")
            return
        measure_product(result, layer, product, dtype, device, rounds)


def _products(device: torch.device, quick: bool, dtypes: Sequence[str]) -> Iterator[tuple[str, str, Product]]:
    """(layer, dtype, product)."""
    shapes = [
        (f"{model} {layer}", shape) for model, layers in models.LINEAR_SHAPES.items() for layer, shape in layers.items()
    ]
    tokens: Sequence[int] = TOKENS
    if quick:
        shapes, tokens = [("smallest", (256, 64)), ("small", (128, 256))], (1, 32)
    if device.type == "cpu":
        shapes, tokens = shapes[:2], (1, 16)
    first = ("llama-7b", "bert-large", "vit-l")
    shapes.sort(key=lambda item: not item[0].startswith(first))

    def sweep(counts: Sequence[int]) -> Iterator[tuple[str, str, Product]]:
        for count, dtype, (layer, (rows, columns)) in itertools.product(counts, dtypes, shapes):
            yield layer, dtype, Product(count, rows, columns, DTYPES[dtype].itemsize)

    yield from sweep(tokens[:2])
    if device.type == "cuda" and not quick and "fp16" in dtypes:
        known = devices.present() or devices.find("h100")
        for name, batch in MODELS:
            for layer, alike in plan.for_workload(name, batch, known).alike().items():
                if not alike[0].obstacle:
                    yield f"{name} {layer.removesuffix('.weight')}", "fp16", alike[0].product
    yield from sweep(tokens[2:])


def run_models(result: Result, device: torch.device, quick: bool, rounds: int, budget: Budget) -> None:
    """Whole models."""
    cases = [("transformer-base", 1)] if quick or device.type == "cpu" else MODELS
    for name, batch in cases:
        if budget.spent:
            result.add(model=name, batch=batch, not_run="out of time")
            continue
        measure_model(result, name, batch, device, rounds, budget)
        torch.compiler.reset()
    if device.type == "cpu":
        for name, batch in MODELS:
            result.add(model=name, batch=batch, how="2:4", not_run="needs an NVIDIA GPU")


def default_dtypes(device: torch.device) -> list[str]:
    """All of `DTYPES` on a GPU, one on a CPU."""
    return list(DTYPES) if device.type == "cuda" else ["bf16"]


def relative_error(found: Any, reference: Tensor) -> float:
    """||found - reference|| / ||reference||, over the rows that the reference has."""
    found = found[: len(reference)].double()
    return float((found - reference).norm() / reference.norm())


def reached(speedup: float, ceiling: float | None) -> float | None:
    """The part of the possible gain: 0 for no speed-up, 1 at the ceiling."""
    return None if ceiling is None or ceiling < 1.01 else (speedup - 1) / (ceiling - 1)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _launched(compiled: Call, launch: str, calls: int) -> Call:
    """A call of a compiled model as one of `LAUNCHES`; `calls` are captured in a graph."""

    def eager(i: int) -> object:
        with torch.compiler.set_stance("force_eager"):
            return compiled(i)

    if launch == "eager":
        return eager
    return compiled if launch == "compiled" else CudaGraph(compiled, calls)


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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    device, budget = report.set_up(args), Budget(args.minutes)
    if args.only != "models":
        with report.saved("products", device, args.out) as result:
            run_products(result, device, args.quick, args.dtype or default_dtypes(device), args.rounds, budget)
    if args.only != "products":
        with report.saved("models", device, args.out) as result:
            run_models(result, device, args.quick, args.rounds, budget)
    if (known := devices.present()) is not None and device.type == "cuda":
        found = plan.measured(known, "fp16", (args.out,))
        for name, batch in MODELS:
            print(f"\n{name}, batch {batch}, fp16, on {known.name}")
            print(plan.for_workload(name, batch, known).table(found))


if __name__ == "__main__":
    raise SystemExit(main())
