"""The cost of the N:M mask: our kernels against the ways people use, over the weights of whole models.

`python -m nm_sparsity.benchmarks.masks`. Every row gives nanoseconds per weight, the ratio to a copy of the weights
(``clone``, in the same rounds), and the memory traffic, one read and one write of every weight, per second and as a
fraction of the memory bandwidth. Memory is got as in training: on a CPU ours takes that of results which nobody holds
any more, and the alternatives allocate theirs each time, which is the larger part for big matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nm_sparsity.benchmarks import devices, models, report, timing
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.core import NMPattern, SparsityError
from nm_sparsity.core.deploy.clock import Call
from nm_sparsity.core.experiments.command_line import command_line, make_parser
from nm_sparsity.core.masks import reference
from nm_sparsity.core.masks.batched import Batch
from nm_sparsity.core.pattern import Placement

Masking = Callable[[Tensor, int, int], Tensor]
SIZES = (1, 4, 16, 64, 250, 500)
"""Millions of weights, for how the cost grows."""


def published_mask(w: Tensor, n: int, m: int) -> Tensor:
    """The mask as the paper's published code makes it: sort every group, scatter zeros into a mask of ones."""
    groups = w.detach().abs().reshape(-1, m)
    drop = groups.argsort(dim=1)[:, : m - n]
    return torch.ones_like(groups).scatter_(1, drop, 0.0).reshape(w.shape)


def topk(w: Tensor, n: int, m: int) -> Tensor:
    """`w` with the n largest of every group kept, by torch.topk and a scatter."""
    groups = w.reshape(-1, m)
    chosen = groups.abs().topk(n, dim=1, sorted=False).indices
    return torch.zeros_like(groups).scatter_(1, chosen, groups.gather(1, chosen)).reshape(w.shape)


def kthvalue(w: Tensor, n: int, m: int) -> Tensor:
    """`w` with what exceeds a threshold of its group kept, by torch.kthvalue; on ties that is more than n."""
    groups = w.reshape(-1, m)
    magnitude = groups.abs()
    threshold = magnitude.kthvalue(m - n, dim=1, keepdim=True).values
    return torch.where(magnitude > threshold, groups, 0).reshape(w.shape)


OURS = "ours"
"""All weights in one call, as a training step computes them."""

ALTERNATIVES: dict[str, Masking] = {
    OURS: lambda w, n, m: _batch([w], NMPattern(n, m)).keep_largest()[0],
    "ours, pure torch": lambda w, n, m: reference.keep_largest(w, n, m, 1),
    "argsort+scatter": lambda w, n, m: w * published_mask(w, n, m),
    "topk": topk,
    "kthvalue": kthvalue,
}


DECAY = "ours, decay"
"""``g += lambda * (w - w_masked)``: what SR-STE does besides, once per step. Gradients are read and written, too."""


def measure(
    result: Result,
    label: str,
    weights: Sequence[Tensor],
    pattern: NMPattern,
    names: Sequence[str],
    rounds: int,
    bandwidth: float,
    budget: timing.Budget,
) -> None:
    """Time every alternative over all `weights` in one call, interleaved with a copy of them; one row each."""
    device = weights[0].device
    report.progress(label, f"{sum(w.numel() for w in weights):,}", weights[0].dtype, pattern)
    bytes_once = sum(w.numel() * w.element_size() for w in weights)
    sets = [list(weights)]
    if device.type == "cuda":  # a training step finds none of its weights in the cache
        sets += [[w.clone() for w in weights] for _ in range(1, timing.copies_beyond_cache(bytes_once, device))]

    def run(masking: Masking) -> Call:
        def call(i: int) -> list[Tensor]:
            return [masking(w, pattern.n, pattern.m) for w in sets[i % len(sets)]]  # all live at once, as in training

        return call

    gradients = [torch.zeros_like(w) for w in weights]

    batches = [_batch(weights, pattern) for weights in sets]
    calls = {"copy": run(lambda w, n, m: w.clone()), **{name: run(ALTERNATIVES[name]) for name in names}}
    calls[OURS] = lambda i: batches[i % len(batches)].keep_largest()
    calls[DECAY] = lambda i: batches[i % len(batches)].add_dropped_(gradients, 2e-4)
    timings = timing.compare(calls, device, rounds, budget=budget)
    size = sum(w.numel() for w in weights)
    for name, t in timings.items():
        traffic = (3 if name == DECAY else 2) * bytes_once
        row = {
            "weights": label,
            "millions": round(size / 1e6, 2),
            "dtype": str(weights[0].dtype).removeprefix("torch."),
            "pattern": str(pattern),
            "how": name,
            "ns/weight": t.median / size * 1e9,
            "quartiles": [q / size * 1e9 for q in t.quartiles],
            "x copy": t.over(timings["copy"])[0],
            "x argsort": None,
            "GB/s": traffic / t.median / 1e9,
            "of bandwidth": traffic / t.median / bandwidth,
        }
        if "argsort+scatter" in timings and name != DECAY:
            row["x argsort"] = timings["argsort+scatter"].over(t)[0]
        result.add(**row)


def check(result: Result, device: torch.device) -> None:
    """Check the kernels of `device` against the pure-torch reference on the CPU, bit by bit: one row for each dtype.

    Raises:
        SparsityError: if anything differs: measuring a wrong kernel says nothing.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = ("1:2", "2:4", "4:8", "1:16", "4:32")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wrong = 0
        for pattern in map(NMPattern.parse, patterns):
            for shape in ((96, 64), (8, 64, 3, 3), (8, 64, 1, 1)):
                w = torch.randn(shape, generator=generator).to(dtype)
                special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 2.0], dtype=dtype)
                where = torch.rand(shape, generator=generator) < 0.5
                w = torch.where(where, special[torch.randint(8, shape, generator=generator)], w)
                for arranged in (w, w.to(memory_format=torch.channels_last)) if w.dim() == 4 else (w,):
                    found, expected = _everything(arranged.to(device), pattern), _expected(arranged, pattern)
                    wrong += sum(_differing_bits(a.cpu(), b) for a, b in zip(found, expected, strict=True))
        name = str(dtype).removeprefix("torch.")
        result.add(weights="with ties, 0, inf, NaN", dtype=name, pattern=" ".join(patterns), how="ours", wrong=wrong)
    if wrong := sum(row["wrong"] for row in result.rows):
        raise SparsityError(f"the kernels on {device} differ from the reference in {wrong:,} entries: not timed")


def _batch(weights: Sequence[Tensor], pattern: NMPattern) -> Batch:
    return Batch(weights, [Placement(pattern, (1,))] * len(weights))


def _everything(w: Tensor, pattern: NMPattern) -> list[Tensor]:
    """What the kernels make of `w`: masked weight, mask, and decay by a scale that rounds nothing, in both forms."""
    batch, decayed = _batch([w], pattern), [torch.ones_like(w), torch.ones_like(w)]
    batch.add_dropped_(decayed[:1], 0.5)
    batch.add_dropped_(decayed[1:], torch.tensor(0.5, device=w.device))
    return [*batch.keep_largest(), *batch.nm_mask(), *decayed]


def _expected(w: Tensor, pattern: NMPattern) -> list[Tensor]:
    """What the reference makes of `w`."""
    form = (pattern.n, pattern.m, 1)
    decayed = reference.add_dropped_(torch.ones_like(w), w, *form, 0.5)
    return [reference.keep_largest(w, *form), reference.nm_mask(w, *form), decayed, decayed]


def _differing_bits(a: Tensor, b: Tensor) -> int:
    both_nan = (a.isnan() & b.isnan()).flatten()
    a, b = (t.flatten().view(torch.uint8).view(t.numel(), -1) for t in (a, b))
    return int(((a != b).any(1) & ~both_nan).sum())


def run(result: Result, device: torch.device, quick: bool, rounds: int = 7, minutes: float | None = None) -> None:
    """Check the kernels, then measure all weights, patterns and alternatives into `result`.

    Args:
        minutes: after which no further set of weights is measured; those left are a row that says so.
    """
    rounds, budget = 3 if quick else rounds, timing.Budget(minutes)
    check(result, device)
    known = devices.present(device)
    bandwidth = known.bandwidth * 1e12 if known else timing.copy_bandwidth(device)
    source = "data sheet" if known else "a copy into memory that is there"
    result.add(weights="memory bandwidth", how=source, **{"GB/s": bandwidth / 1e9, "of bandwidth": 1.0})
    cases = list(_cases(quick))
    for done, (label, shapes, dtype, pattern, contenders, layout) in enumerate(cases):
        if budget.spent:
            result.add(weights=f"{len(cases) - done} more", not_run="out of time")
            break
        weights = [torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout) for shape in shapes]
        measure(result, label, weights, pattern, contenders, rounds, bandwidth, budget)
        del weights
    if device.type == "cpu":
        result.add(weights="resnet50", how="ours (Triton)", not_run="needs CUDA")


Case = tuple[str, list[tuple[int, ...]], torch.dtype, NMPattern, list[str], torch.memory_format]


def _cases(quick: bool) -> Iterator[Case]:
    """(label, shapes, dtype, pattern, contenders, memory format) of all that is measured."""
    resnet50, first = models.layer_set("resnet50"), "resnet50"
    if quick:
        resnet50, first = resnet50[:8], "the first 8 of resnet50"
    others = [] if quick else ["bert-large", "llama-7b-ffn"]
    for label, shapes in ((first, resnet50), *((name, models.layer_set(name)) for name in others)):
        for dtype in (torch.float32, torch.bfloat16):
            contenders = [*ALTERNATIVES] if dtype == torch.float32 else [OURS]
            for text in ("2:4", "4:8", "1:16", "4:32") if label == first else ("2:4",):
                yield label, shapes, dtype, NMPattern.parse(text), contenders, torch.preserve_format
    fp32, ours = (torch.float32, NMPattern(2, 4)), [OURS]
    yield f"{first}, channels last", resnet50, *fp32, ours, torch.channels_last
    for millions in SIZES[:1] if quick else SIZES:
        yield "one matrix", [(millions * 250, 4000)], *fp32, ours, torch.preserve_format


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Measure masks from the command line."""
    parser = make_parser(__doc__)
    report.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7, help="samples of each alternative (default 7)")
    parser.add_argument("--minutes", type=float, help="after which no further weights are measured")
    args = parser.parse_args(argv)
    device = report.set_up(args)
    with report.saved("masks", device, args.out) as result:
        run(result, device, args.quick, args.rounds, args.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
