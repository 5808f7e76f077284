"""Which of cuSPARSELt's algorithms is the fastest that computes right, found by trying each in a process of its own.

The library's own search is not used: for fp16 on an H100, version 0.8 dies in it by an illegal instruction, after which
nothing runs in the process. Here a child tries one algorithm after the other; if it dies or hangs, the one it was at is
marked as bad, and another child goes on with the next.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nm_sparsity.core.deploy import cusparselt
from nm_sparsity.core.deploy.cache import Cache, Problem
from nm_sparsity.core.deploy.child import ChildError, answers, first_line, serve
from nm_sparsity.core.deploy.clock import CudaGraph, seconds
from nm_sparsity.core.deploy.cusparselt import Algorithm
from nm_sparsity.core.deploy.library import CuSparseLtError
from nm_sparsity.core.masks import keep_largest

BINS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
"""Numbers of tokens that are searched for; others take the next larger one's algorithm."""

SPLITS = ((-1, -1), (2, 1), (2, 2), (4, 1), (4, 2))
"""(split-k, mode) tried with the fastest algorithms: by segments, and in one kernel or two."""
SPLIT = 2
"""How many of the fastest."""

TOLERANCE = 0.02
"""The relative error (of norms) of a right result; integers must be equal."""

PATIENCE = 30.0
"""Seconds without an answer after which a child hangs; for the first one, `START`."""
START = 120.0
UNKNOWN = 64
"""Ids to try where the library does not tell how many it has; those that it has not are refused."""

IN_A_GRAPH = 4
"""Calls."""

SLOW = 1.3
"""An algorithm that takes so many times the best one's time is not timed again."""

DEATHS = 12
"""After so many, the search gives up."""


@dataclass
class Search:
    """What became of a search: the algorithm of every problem, and what did not go as it should."""

    algorithms: dict[Problem, Algorithm] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def bin_of(tokens: int) -> int:
    """The number of `BINS` whose algorithm these tokens take."""
    return next((count for count in BINS if tokens <= count), BINS[-1])


def search(
    problems: Sequence[Problem],
    device: torch.device,
    cache: Cache,
    patience: float = PATIENCE,
    limit: float = math.inf,
    progress: Callable[[str], object] = lambda text: None,
) -> Search:
    """The fastest right algorithm for each of `problems`: from `cache`, or by trying, and then kept there.

    Where the search is impossible, the library's default algorithm stands, and a note says why; it is not kept.

    Args:
        patience: seconds without an answer after which a child hangs.
        limit: seconds for everything; the problems that are left then have the fastest found so far, which is not kept.
        progress: is told what is tried.
    """
    done = Search({problem: cache.found[str(problem)] for problem in problems if str(problem) in cache.found})
    open_problems = [problem for problem in dict.fromkeys(problems) if problem not in done.algorithms]
    times: dict[Problem, dict[Algorithm, float]] = {problem: {} for problem in open_problems}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the child needs memory too
    deaths, end = 0, time.monotonic() + limit
    while open_problems:
        trying: tuple[Problem, Algorithm] | None = None
        bad = {dtype: sorted(algorithms) for dtype, algorithms in cache.bad.items()}
        tried = [[[*algorithm, s] for algorithm, s in times[problem].items()] for problem in open_problems]
        request = {"device": _identity(device), "problems": open_problems, "tried": tried, "bad": bad}
        reason = ""
        here = list(open_problems)
        try:
            for answer in answers(__spec__.name, request, patience, START, quiet=True):
                problem = here[answer["problem"]]
                if "trying" in answer:
                    trying = problem, Algorithm(*answer["trying"])
                    progress(f"{problem}: {trying[1]}")
                elif "seconds" in answer:
                    times[problem][Algorithm(*answer["tried"])] = answer["seconds"]
                    trying = None
                else:
                    open_problems.remove(problem)
                    if answer["failed"]:
                        done.notes.append(f"{problem}: not searched, {answer['failed']}")
                    else:
                        done.algorithms[problem] = cache.found[str(problem)] = _fastest(times[problem])
                        cache.save()  # at once, in case this process is ended
                if time.monotonic() > end:
                    done.notes.append(f"the search for algorithms was out of time with {len(open_problems)} to go")
                    break
        except ChildError as error:
            reason = str(error)
        if not reason:
            break
        deaths += 1
        if trying is None or deaths > DEATHS:
            done.notes.append(f"the search for algorithms stopped: {reason}; the default algorithm runs")
            break
        problem, algorithm = trying
        cache.bad.setdefault(problem.dtype, set()).add(algorithm)
        cache.save()
        done.notes.append(f"{problem.dtype}: algorithm {_text(algorithm)} is left out: {reason}")
    for problem in open_problems:
        done.algorithms[problem] = _fastest(times[problem])
    for problem in problems:
        done.algorithms.setdefault(problem, Algorithm())
    return done


def _fastest(times: dict[Algorithm, float]) -> Algorithm:
    right = [algorithm for algorithm, taken in times.items() if math.isfinite(taken)]
    return min(right, key=lambda algorithm: times[algorithm], default=Algorithm())


def _text(algorithm: Algorithm) -> str:
    if algorithm.split_k == 1:
        return str(algorithm.id)
    return f"{algorithm.id} with split-k {algorithm.split_k}, mode {algorithm.split_k_mode}"


def _identity(device: torch.device) -> str:
    """A name for a device that means the same in a child, whatever was done to `CUDA_VISIBLE_DEVICES` meanwhile."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def _device(identity: str) -> torch.device:
    if identity == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    for i in range(count):
        if str(torch.cuda.get_device_properties(i).uuid) == identity:
            return torch.device("cuda", i)
    raise RuntimeError(f"the child does not see the GPU {identity} among its {count}")


def _work(request: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    """In the child: say what is tried, and how long it took, of every problem."""
    device = _device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for number, fields in enumerate(request["problems"]):
        problem = Problem(*fields)
        times = {Algorithm(*numbers): s for *numbers, s in request["tried"][number]}
        bad = {Algorithm(*numbers) for numbers in request["bad"].get(problem.dtype, ())}
        failed = ""
        try:
            trial = _Trial(problem, device)
        except (RuntimeError, CuSparseLtError) as error:  # too little memory above all; no kernel has run yet
            failed = first_line(error)
        else:
            try:
                for event in trial.run(times, bad):
                    answer({"problem": number, **event})
            except (torch.OutOfMemoryError, CuSparseLtError) as error:
                failed = first_line(error)
            del trial
        answer({"problem": number, "failed": failed})
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Trial:
    """A problem with operands to try algorithms on."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        dtype, self.out_dtype = getattr(torch, problem.dtype), getattr(torch, problem.out_dtype)
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            t = torch.randn(size, device=device, generator=generator)
            return (t * 40).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else t.to(dtype)

        w = keep_largest(random(problem.rows, problem.columns).float(), "2:4")
        w, self.x = w.to(dtype), random(problem.tokens, problem.columns)
        bias = torch.randn(problem.rows, device=device, generator=generator).to(self.out_dtype)
        self.bias = bias if problem.bias else None
        self.packed = cusparselt.compress(w)
        # In fp32 every product of these types is exact enough, int8's sums included (below 2**24 in effect).
        y = self.x.float() @ w.float().t() if dtype != torch.int8 else self.x.double() @ w.double().t()
        y = y if self.bias is None else y + self.bias
        self.expected = cusparselt.activate(y, problem.activation).to(self.out_dtype)

    def run(self, times: dict[Algorithm, float], bad: set[Algorithm]) -> Iterator[dict[str, Any]]:
        """Try all algorithms that are neither in `times` nor `bad`."""
        problem = self.problem
        # The first plan tells how many there are, and the default algorithm may be bad.
        first = next((i for i in range(1000) if Algorithm(i) not in bad), 0)
        try:
            count = cusparselt.algorithms_of(self._product(Algorithm(first)))
        except CuSparseLtError:  # of the first, or of the question: the others may still do
            count = UNKNOWN
        ids = [Algorithm(i) for i in range(count)]
        for algorithm in ids:
            yield from self._try(algorithm, times, bad)
        right = sorted((a for a in ids if math.isfinite(times.get(a, math.inf))), key=lambda a: times[a])
        for algorithm in right[:SPLIT]:
            for split in SPLITS if problem.columns >= 1024 else ():
                yield from self._try(Algorithm(algorithm.id, *split), times, bad)
        if not right:
            raise CuSparseLtError("no algorithm of cuSPARSELt computes it right")

    def _try(self, algorithm: Algorithm, times: dict[Algorithm, float], bad: set[Algorithm]) -> Iterator[Any]:
        if algorithm in times or algorithm in bad:
            return
        yield {"trying": list(algorithm)}
        try:
            best = min(times.values(), default=math.inf)
            times[algorithm] = self._seconds(algorithm, best) if self._right(self._call(algorithm)) else math.inf
        except CuSparseLtError:
            times[algorithm] = math.inf
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # a context that is broken dies here, and not with the next algorithm
        yield {"tried": list(algorithm), "seconds": times[algorithm]}

    def _product(self, algorithm: Algorithm) -> cusparselt.Product:
        problem, device = self.problem, self.x.get_device()
        multiple = cusparselt.OPERANDS[self.x.dtype].multiple
        tokens = -(-problem.tokens // multiple) * multiple
        bias = 0 if self.bias is None else self.bias.data_ptr()
        sizes = (problem.rows, problem.columns, tokens)
        return cusparselt.Product(
            device, self.x.dtype, self.out_dtype, *sizes, bias, problem.activation, False, algorithm
        )

    def _call(self, algorithm: Algorithm) -> Tensor:
        problem = self.problem
        return cusparselt.linear(
            self.x,
            self.packed,
            self.bias,
            None,
            problem.rows,
            1.0,
            problem.activation,
            self.out_dtype,
            (problem.tokens, *algorithm),
        )

    def _right(self, found: Tensor) -> bool:
        if not found.is_floating_point():
            return torch.equal(found, self.expected)
        error = (found.float() - self.expected.float()).norm() / self.expected.float().norm()
        return bool(error <= TOLERANCE)  # not of NaN

    def _seconds(self, algorithm: Algorithm, best: float) -> float:
        def call(_: int) -> Tensor:
            return self._call(algorithm)

        launched = CudaGraph(call, IN_A_GRAPH) if self.device.type == "cuda" else call
        calls = launched.calls if isinstance(launched, CudaGraph) else 1
        first = seconds(launched, self.device, 1) / calls
        if first > SLOW * best:
            return first
        return statistics.median(seconds(launched, self.device, 2) / calls for _ in range(3))


if __name__ == "__main__":
    raise SystemExit(serve(_work))
