"""The cost of sparse training: a dense step against STE, SR-STE and S-STE, and the way of SR-STE's published code.

`python -m nm_sparsity.benchmarks.training`. The variants take their steps in turn; the ratio to the dense step is the
median over the rounds, with quartiles. On a GPU, the time that the host takes to launch a step and the number of its
kernels stand beside it: a step is slower than its kernels where the host is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nm_sparsity.benchmarks import models, report, timing
from nm_sparsity.benchmarks.masks import published_mask
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.core import SparsityError, sparsify
from nm_sparsity.core.deploy.clock import host_seconds
from nm_sparsity.core.experiments.command_line import command_line, make_parser

OURS = ("select", "select_rows", "apply_masks")
"""The names of our kernels."""
PATTERN = "2:4"
DECAY = 2e-4


class _Published(torch.autograd.Function):
    """The paper's listing: sort and scatter for the mask, keep it, add the decay in every backward."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, n: int, m: int, decay: float) -> Tensor:
        mask = published_mask(w, n, m)
        ctx.save_for_backward(w, mask)
        ctx.decay = decay
        return w * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        w, mask = ctx.saved_tensors
        return grad + ctx.decay * (1 - mask) * w, None, None, None


class _Listing(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        result: Tensor = _Published.apply(w, 2, 4, DECAY)
        return result


def published(model: nn.Module, exclude: Sequence[str]) -> None:
    """Give the layers that `sparsify` would convert the published listing, in place."""
    chosen = {row.name for row in sparsify(copy.deepcopy(model), PATTERN, exclude=exclude).sparse}
    for name, module in list(model.named_modules()):
        if f"{name}.weight" in chosen:
            parametrize.register_parametrization(module, "weight", _Listing())


VARIANTS: dict[str, Callable[[nn.Module, Sequence[str]], object]] = {
    "dense": lambda model, exclude: None,
    "STE": lambda model, exclude: sparsify(model, PATTERN, method="ste", exclude=exclude),
    "SR-STE": lambda model, exclude: sparsify(model, PATTERN, method="sr-ste", decay=DECAY, exclude=exclude),
    "S-STE": lambda model, exclude: sparsify(model, PATTERN, method="s-ste", exclude=exclude),
    "SR-STE, published code": published,
}


Launch = Literal["eager", "compiled", "compiled + graphs"]


@dataclass(frozen=True)
class Case:
    """A model on a batch of inputs of `size` pixels a side or tokens, and how its steps are made."""

    model: str
    batch: int
    size: int | None = None
    optimizer: Literal["SGD", "AdamW"] = "SGD"
    launch: Launch = "eager"
    more_rounds: int = 1
    """How many times as many rounds: the median of a short step wavers."""

    def inputs(self, device: torch.device) -> Tensor:
        """A random batch on `device`."""
        inputs = models.workload(self.model).inputs(self.batch, device)
        if inputs.dim() == 4:
            return inputs[..., : self.size, : self.size].contiguous(memory_format=torch.channels_last)
        return inputs[:, : self.size]

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum, or fused AdamW."""
        if self.optimizer == "SGD":
            return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def launched(self, model: nn.Module) -> Callable[..., Any]:
        """What is called in place of `model`."""
        if self.launch == "eager":
            return model
        compiled: Callable[..., Any] = torch.compile(
            model, mode="reduce-overhead" if self.launch == "compiled + graphs" else None
        )
        return compiled


CPU_CASES = (
    Case("tiny-layers", 4, more_rounds=20),
    Case("resnet18-cifar", 32, 32),
    Case("resnet50", 8, 128),
    Case("language-model", 8, 512),
)
GPU_CASES = (
    Case("resnet50", 256, 224),
    Case("language-model", 32, 512),
    *(
        Case(model, batch, size, "AdamW", launch)
        for launch in get_args(Launch)  # what compiles for long comes last
        for model, batch, size in (("language-model", 32, 512), ("vit-l", 64, 224), ("bert-large", 32, 384))
    ),
)
"""Those of real training; "tiny-layers" shows what a layer costs on the host, which a GPU would wait for."""


def step(model: nn.Module, inputs: Tensor, amp: bool, case: Case = Case("", 1)) -> Callable[[int], object]:
    """A call that takes one training step of `model` on one batch, to be timed."""
    optimizer = case.make_optimizer(model)
    forward = case.launched(model)

    def call(_: int) -> None:
        optimizer.zero_grad()
        with torch.autocast(inputs.device.type, torch.bfloat16) if amp else nullcontext():
            output = forward(inputs)
            if inputs.is_floating_point():
                loss = output.float().square().mean()
            else:
                loss = F.cross_entropy(output.flatten(0, -2), inputs.flatten() % output.shape[-1])
        loss.backward()
        optimizer.step()

    return call


def kernels(call: Callable[[int], object]) -> tuple[int, int]:
    """(kernel launches, those of ours among them) of one call on a CUDA device, by torch's profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
        call(0)
        torch.cuda.synchronize()
    device = [e.name for e in seen.events() if e.device_type.name == "CUDA"]  # not the calls to it
    names = [name for name in device if not name.lower().startswith(("memcpy", "memset"))]
    return len(names), sum(name in OURS for name in names)


def measure(
    result: Result,
    case: Case,
    device: torch.device,
    rounds: int,
    amp: bool = False,
    budget: timing.Budget | None = None,
) -> None:
    """Add a row to `result` for each variant of a case; when `budget` is spent, no further one is prepared or timed."""
    setup, inputs = models.workload(case.model), case.inputs(device)
    report.progress(case.model, tuple(inputs.shape), case.optimizer, case.launch)
    torch.manual_seed(0)
    base = setup.build().train()
    calls: dict[str, Callable[[int], object]] = {}
    for variant, convert in VARIANTS.items():
        if (case.launch != "eager" and convert is published) or (calls and budget is not None and budget.spent):
            continue
        model = copy.deepcopy(base).to(device)
        if inputs.dim() == 4:
            model = model.to(memory_format=torch.channels_last)
        convert(model, setup.exclude)
        calls[variant] = step(model, inputs, amp, case)
        for i in range(3 if case.launch == "compiled + graphs" else 1):  # gradients and momentum, and what is recorded
            calls[variant](i)
    timings = on_host = timing.compare(calls, device, rounds, budget=budget)
    if device.type == "cuda":
        on_host = timing.compare(calls, device, rounds, clock=host_seconds, budget=budget)
    # Memory only now: once a process has used the profiler, its steps take some percent longer.
    for variant, t in timings.items():
        ratio, *spread = t.over(timings["dense"])
        launches = kernels(calls[variant]) if device.type == "cuda" else (None, None)
        row = {
            "model": case.model,
            "input": "x".join(map(str, inputs.shape)),
            "dtype": "bf16 autocast" if amp else "fp32",
            "optimizer": case.optimizer,
            "launch": case.launch,
            "variant": variant,
            "step_ms": t.median * 1e3,
            "overhead": ratio - 1,
            "quartiles": [q - 1 for q in spread],
            "rounds": len(t.samples),
            "peak MiB": timing.peak_memory(calls[variant], device),
            "host_ms": on_host[variant].median * 1e3,
            "kernels": launches[0],
            "our_kernels": launches[1],
        }
        result.add(**row)


def reads(result: Result, rounds: int) -> None:
    """Add rows of what it takes to read a weight of 32 x 32 on a CPU: a parameter's, and a sparse layer's."""
    layer, dense = nn.Linear(32, 32), nn.Linear(32, 32)
    block, alone = nn.Sequential(layer), nn.Linear(32, 32)
    sparsify(block)
    sparsify(alone)

    def read(holder: nn.Module, grad: bool) -> Callable[[int], object]:
        def call(_: int) -> None:
            with torch.set_grad_enabled(grad):
                for _ in range(100):
                    holder.weight  # noqa: B018  (what is timed)

        return call

    kinds = {
        "dense": (dense, True),
        "in a pass": (layer, True),
        "in a pass, no grad": (layer, False),
        "outside": (alone, True),
        "outside, no grad": (alone, False),
    }
    measured: dict[str, timing.Timing] = {}

    def inside(module: nn.Module, args: object) -> None:
        calls = {name: read(*how) for name, how in kinds.items()}
        measured.update(timing.compare(calls, torch.device("cpu"), rounds))

    layer.register_forward_pre_hook(inside)
    block(torch.zeros(1, 32))
    for name, t in measured.items():
        result.add(model="one weight", input="32x32", dtype="fp32", variant=name, us=t.median * 1e4, rounds=rounds)


def run(
    result: Result,
    device: torch.device,
    quick: bool,
    rounds: int = 9,
    only: Collection[str] = (),
    minutes: float | None = None,
) -> None:
    """Measure every case into `result`: on small inputs on a CPU, on those of real training on a GPU.

    Args:
        only: the models to measure; empty means all.
        minutes: after which no further case begins; those left are rows that say so.
    """
    gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = gpu
    rounds = 2 if quick else rounds
    budget = timing.Budget(minutes)
    for case in GPU_CASES if gpu else CPU_CASES[:2] if quick else CPU_CASES:
        if only and case.model not in only:
            continue
        if quick:
            size = case.size if gpu or case.size is None else max(32, case.size // 4)
            case = replace(case, batch=max(2, case.batch // 8), size=size, more_rounds=1)
        if budget.spent:
            result.add(model=case.model, optimizer=case.optimizer, launch=case.launch, not_run="out of time")
            continue
        measure(result, case, device, rounds * case.more_rounds, gpu, budget)
        torch.compiler.reset()
        if gpu:
            torch.cuda.empty_cache()
    if not gpu:
        if not only:
            reads(result, rounds)
        result.add(model="vit-l", input="64x3x224x224", dtype="bf16 autocast", not_run="needs CUDA")


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cost of training from the command line."""
    parser = make_parser(__doc__)
    report.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each variant, of small models more (default 9)")
    parser.add_argument("--only", action="append", default=[], metavar="MODEL", help="only this model; may be repeated")
    parser.add_argument("--minutes", type=float, help="after which no further case begins")
    args = parser.parse_args(argv)
    device = report.set_up(args)
    known = dict.fromkeys(case.model for case in (GPU_CASES if device.type == "cuda" else CPU_CASES))
    if unknown := [model for model in args.only if model not in known]:
        raise SparsityError(f'no training of "{unknown[0]}" is measured on this device; known: {", ".join(known)}')
    with report.saved("training", device, args.out) as result:
        run(result, device, args.quick, args.rounds, args.only, args.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
