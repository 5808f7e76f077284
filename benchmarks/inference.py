"""What 2:4 inference gains through torch's semi-structured tensors: `python -m nm_sparsity.benchmarks.inference`.

First single matrix products, eager and under CUDA graphs, then whole models, eager and compiled. Every row of a sparse
variant gives the speed-up over the fastest dense one, the most that the roofline allows, how much of that gain was
reached, and the relative error against the dense product with the same masked weight.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nm_sparsity.benchmarks import devices, models, plan, report, timing
from nm_sparsity.benchmarks.devices import COMPRESSED, Product
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.benchmarks.timing import Budget, Call, CudaGraph
from nm_sparsity.core import SparsityError, export, finalize, keep_largest, sparsify
from nm_sparsity.core.errors import command_line

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
TOKENS = (1, 16, 128, 512, 1024, 4096, 16384)
MODELS = (("bert-large", 32), ("vit-l", 64), ("resnet50", 256), ("transformer-base", 64))
COMPILE_MODES = {"eager": None, "compiled": "default", "compiled, CUDA graphs": "reduce-overhead"}
SPARSE = ("cutlass", "cusparselt", "cusparselt, searched")
CHECKED_ROWS = 256
"""Rows of the output that are compared with the reference."""


class Unavailable(Exception):
    """Why a contender cannot run on this device, dtype or shape."""


def output_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What an 8-bit product gives; None where it is the operands' type."""
    return {torch.int8: torch.int32, torch.float8_e4m3fn: torch.bfloat16}.get(dtype)


def random_operands(product: Product, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x, w) for ``x @ w.T``, w 2:4."""
    scale = 40.0 if dtype == torch.int8 else 1.0
    x = torch.randn(product.tokens, product.columns, device=device) * scale
    w = keep_largest(torch.randn(product.rows, product.columns, device=device) * scale, "2:4")
    return _cast(x, dtype), _cast(w, dtype)


def dense(xs: list[Tensor], ws: list[Tensor]) -> Call:
    """torch's dense product of the dtype."""
    dtype = xs[0].dtype
    if dtype == torch.int8:
        if len(xs[0]) <= 16:
            raise Unavailable("torch._int_mm needs more than 16 rows")
        return lambda i: torch._int_mm(xs[i % len(xs)], ws[i % len(ws)].t())
    if dtype == torch.float8_e4m3fn:
        if xs[0].device.type != "cuda" or torch.cuda.get_device_capability(xs[0].device) < (8, 9):
            raise Unavailable("fp8 needs compute capability 8.9 or newer")
        one = torch.ones((), device=xs[0].device)
        return lambda i: torch._scaled_mm(
            xs[i % len(xs)], ws[i % len(ws)].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
    return lambda i: F.linear(xs[i % len(xs)], ws[i % len(ws)])


def sparse(how: str, xs: list[Tensor], ws: list[Tensor]) -> Call:
    """The product with compressed weights by `how`, one of `SPARSE`.

    Raises:
        Unavailable: if the device, the dtype or the shape does not allow it.
    """
    backend, dtype = how.split(",")[0], xs[0].dtype
    if reason := export.unavailable(backend, xs[0].device):
        raise Unavailable(reason)
    if reason := export.obstacle(torch.nn.Linear(1, 1), "weight", ws[0].shape, dtype, backend):
        raise Unavailable(reason)
    weights = [export.compress(w, backend) for w in ws]
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
        algorithm, split_k, mode = export.search_algorithm(weights[0].packed, first, out_dtype=out)
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

    makers: dict[str, Callable[[], Call]] = {"dense": lambda: dense(xs, ws)}
    makers |= {how: lambda how=how: sparse(how, xs, ws) for how in SPARSE}  # type: ignore[misc]
    calls: dict[tuple[str, str], Call] = {}
    errors: dict[str, float] = {}
    missing: dict[tuple[str, str], str] = {}
    for how, make in makers.items():
        try:
            call = make()
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
        weight_bytes = product.weight_bytes * (1 if how == "dense" else COMPRESSED[product.itemsize])
        result.add(
            **row,
            us=t.median * 1e6,
            quartiles=[q * 1e6 for q in t.quartiles],
            speedup=speedup,
            ceiling=None if how == "dense" else ceiling,
            gain=None if speedup is None else reached(speedup, ceiling),
            error=errors[how],
            weight_MB=weight_bytes / 1e6,
        )


def measure_model(result: Result, name: str, batch: int, device: torch.device, rounds: int, budget: Budget) -> None:
    """A whole model in fp16 (fp32 on a CPU): dense and 2:4, eager, compiled, and compiled with CUDA graphs."""
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

    modes = COMPILE_MODES if device.type == "cuda" else {k: COMPILE_MODES[k] for k in ("eager", "compiled")}
    calls: dict[tuple[str, str], Call] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for how in ("dense", *SPARSE):
        model = copy.deepcopy(base)
        notes: dict[str, Any] = {}
        if how != "dense":
            try:
                done = export.to_semi_structured(model, how.split(",")[0], search="searched" in how, tokens=tokens)
                notes = {"sparse_layers": len(done.converted)}
            except SparsityError as error:
                rows[how, "eager"] = {"not_run": first_line(error)}
                continue
        for launch, mode in modes.items():
            if how != "dense" and launch == "compiled" and device.type == "cuda":
                continue  # compiling takes minutes, and with CUDA graphs it is only faster
            if budget.spent:
                rows[how, launch] = {"not_run": "out of time"}
                continue
            report.progress(name, how, launch)
            runnable: Any = model if mode is None else torch.compile(model, mode=mode)
            call = model_call(runnable, inputs)
            try:
                deviation = relative_error(call(0), reference)
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
    """The sweep over layer shapes, tokens and dtypes; the common cases first, in case time runs out."""
    shapes = [
        (f"{model} {layer}", shape) for model, layers in models.LINEAR_SHAPES.items() for layer, shape in layers.items()
    ]
    tokens: Sequence[int] = TOKENS
    if quick:
        shapes, tokens = [("smallest", (256, 64)), ("small", (128, 256))], (1, 32)
    if device.type == "cpu":
        shapes, tokens = shapes[:2], tokens[:2]
        result.add(layer="every layer", how="2:4", not_run="needs an NVIDIA GPU; below: the dense product on this CPU")
    first = ("llama-7b", "bert-large", "vit-l")
    shapes.sort(key=lambda item: not item[0].startswith(first))
    tokens = sorted(tokens, key=lambda count: count not in (4096, 1024))
    cases = list(itertools.product(dtypes, tokens, shapes))
    for done, (dtype, count, (layer, (rows, columns))) in enumerate(cases):
        if budget.spent:
            result.add(layer=f"{len(cases) - done} more products", not_run="out of time")
            return
        product = Product(count, rows, columns, DTYPES[dtype].itemsize)
        measure_product(result, layer, product, dtype, device, rounds)


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
    if args.rounds < 1:
        raise SparsityError("--rounds must be at least 1")
    device, budget = report.choose_device(args.device), Budget(args.minutes)
    if args.only != "models":
        with report.saved("products", device, args.out) as result:
            run_products(result, device, args.quick, args.dtype or default_dtypes(device), args.rounds, budget)
    if args.only != "products":
        with report.saved("models", device, args.out) as result:
            run_models(result, device, args.quick, args.rounds, budget)


if __name__ == "__main__":
    raise SystemExit(main())
