"""The cost of sparse training: a dense step against STE and SR-STE, ours and the way of the paper's published code.

`python -m nm_sparsity.benchmarks.training`. The variants take their steps in turn; the ratio to the dense step is the
median over the rounds, with quartiles. A step is forward, backward and SGD with momentum.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nm_sparsity.benchmarks import models, report, timing
from nm_sparsity.benchmarks.masks import published_mask
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.core import sparsify
from nm_sparsity.core.experiments.command_line import command_line

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
    "SR-STE, published code": published,
}


def step(model: nn.Module, inputs: Tensor, amp: bool) -> Callable[[int], object]:
    """A call that takes one training step of `model` on one batch, to be timed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def call(_: int) -> None:
        optimizer.zero_grad()
        with torch.autocast(inputs.device.type, torch.bfloat16) if amp else nullcontext():
            output = model(inputs)
            targets = inputs if inputs.dim() == 2 else torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
            loss = F.cross_entropy(output.flatten(0, -2), targets.flatten())
        loss.backward()
        optimizer.step()

    return call


def measure(result: Result, name: str, inputs: Tensor, device: torch.device, rounds: int, amp: bool = False) -> None:
    """Add a row to `result` for each variant of the model `name` on `inputs`."""
    setup = models.workload(name)
    report.progress(name, tuple(inputs.shape))
    torch.manual_seed(0)
    base = setup.build().train()
    calls, memory = {}, {}
    for variant, convert in VARIANTS.items():
        model = copy.deepcopy(base).to(device)
        if inputs.dim() == 4:
            model = model.to(memory_format=torch.channels_last)
        convert(model, setup.exclude)
        calls[variant] = step(model, inputs, amp)
        calls[variant](0)  # gradients and momentum
        memory[variant] = timing.peak_memory(calls[variant], device)
    timings = timing.compare(calls, device, rounds)
    for variant, t in timings.items():
        ratio, *spread = t.over(timings["dense"])
        row = {
            "model": name,
            "input": "x".join(map(str, inputs.shape)),
            "dtype": "bf16 autocast" if amp else "fp32",
            "variant": variant,
            "step_ms": t.median * 1e3,
            "overhead": ratio - 1,
            "quartiles": [q - 1 for q in spread],
            "rounds": rounds,
            "peak MiB": memory[variant],
        }
        result.add(**row)


def run(result: Result, device: torch.device, quick: bool, rounds: int = 9) -> None:
    """Measure every model into `result`: on small inputs on a CPU, on those of real training on a GPU."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        cases = [("resnet50", (32 if quick else 256, 224)), ("language-model", (8 if quick else 32, 512))]
    else:
        cases = [
            ("resnet18-cifar", (32, 32)),
            ("resnet50", (8, 32 if quick else 128)),
            ("language-model", (2 if quick else 8, 512)),
        ]
    for name, (batch, size) in cases:
        setup = models.workload(name)
        inputs = setup.inputs(batch, device)
        inputs = inputs[..., :size, :size] if inputs.dim() == 4 else inputs[:, :size]
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        measure(result, name, inputs, device, 2 if quick else rounds, amp=device.type == "cuda")
    if device.type == "cpu":
        result.add(model="resnet50", input="256x3x224x224", dtype="bf16 autocast", not_run="needs CUDA")


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cost of training from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    report.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each variant (default 9)")
    args = parser.parse_args(argv)
    device = report.set_up(args)
    with report.saved("training", device, args.out) as result:
        run(result, device, args.quick, args.rounds)


if __name__ == "__main__":
    raise SystemExit(main())
