"""Every benchmark in one call: `python -m nm_sparsity.benchmarks.suite --minutes 8 --out DIR`.

On a GPU: the kernels against the oracle and the memory bandwidth, the training overhead in bf16, the sweep of products,
and whole models until the time is over. On a CPU: what can run there. A benchmark that fails leaves its rows so far
and the reason, and the next one runs. Needs torch, torchvision, triton and numpy, and this repository
(``PYTHONPATH=.`` where it is not installed).
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Sequence

import torch

from nm_sparsity.benchmarks import inference, masks, report, training
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.benchmarks.timing import Budget
from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.command_line import command_line


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    report.add_arguments(parser)
    parser.add_argument("--minutes", type=float, help="of measuring; what is left then becomes rows that say so")
    args = parser.parse_args(argv)
    device, budget = report.set_up(args), Budget(args.minutes)
    report.writable(args.out)

    def sweep() -> Budget:
        """A part of the time, so that enough is left for compiling whole models."""
        return Budget(args.minutes and 0.3 * args.minutes)

    quick, dtypes, rounds = args.quick, inference.default_dtypes(device), 3 if args.quick else 10
    steps: dict[str, Callable[[Result], None]] = {
        "masks": lambda result: masks.run(result, device, quick),
        "training": lambda result: training.run(result, device, quick),
        "products": lambda result: inference.run_products(result, device, quick, dtypes, rounds, sweep()),
        "models": lambda result: inference.run_models(result, device, quick, rounds, budget),
    }
    failed = []
    for name, step in steps.items():
        print(f"\n{name}", flush=True)
        try:
            with report.saved(name, device, args.out) as result:
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
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall done")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
