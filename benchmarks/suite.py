"""Every benchmark in one call: `python -m nm_sparsity.benchmarks.suite --minutes 8 --out DIR`.

On a GPU: the kernels against the oracle and the memory bandwidth, the training overhead in bf16, the sweep of products,
and whole models until the time is over. On a CPU: what can run there. A benchmark that fails leaves its rows so far
and the reason, and the next one runs. Needs torch, torchvision, triton and numpy, and this repository
(``PYTHONPATH=.`` where it is not installed).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from nm_sparsity.benchmarks import inference, masks, report, training
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.benchmarks.timing import Budget
from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.command_line import command_line, make_parser
from nm_sparsity.core.experiments.folders import make_folder

Step = Callable[[Result], None]


def run(steps: Mapping[str, Step], device: torch.device, out: str | Path, budget: Budget) -> list[str]:
    """Run the benchmarks of `steps` by name, each into a result file in `out`; returns the names of those that failed.

    A benchmark that fails leaves its rows so far and the reason; one that the budget has no time for, a row saying so.
    """
    failed = []
    for name, step in steps.items():
        print(f"\n{name}", flush=True)
        try:
            with report.saved(name, device, out) as result:
                if budget.spent:
                    result.add(not_run="out of time")
                else:
                    step(result)
        except Exception as error:
            if not isinstance(error, SparsityError):
                traceback.print_exc()
            print(f"{name}: {error}")
            failed.append(name)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run every benchmark from the command line; exit status 1 if one failed."""
    parser = make_parser(__doc__)
    report.add_arguments(parser)
    parser.add_argument("--minutes", type=float, help="of measuring; what is left then becomes rows that say so")
    args = parser.parse_args(argv)
    device, budget = report.set_up(args), Budget(args.minutes)
    make_folder(Path(args.out))
    machine, quick, rounds = inference.Machine.of(device), args.quick, 3 if args.quick else 10
    dtypes = inference.default_dtypes(device)

    def part(share: float) -> float | None:
        """Minutes for one benchmark, so that enough is left for the others."""
        return args.minutes and share * args.minutes

    def products(result: Result) -> None:
        inference.run_products(result, machine, quick, dtypes, rounds, Budget(part(0.3)))

    steps: dict[str, Step] = {
        "masks": lambda result: masks.run(result, device, quick, minutes=part(0.2)),
        "training": lambda result: training.run(result, device, quick, minutes=part(0.4)),
        "products": products,
        "models": lambda result: inference.run_models(result, machine, quick, rounds, budget),
    }
    failed = run(steps, device, args.out, budget)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall done")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
