"""What 2:4 inference gains: `python -m nm_sparsity.benchmarks.inference`.

First single matrix products of well-known layers, eager and under CUDA graphs, from which number of tokens on 2:4 wins,
and what a call costs on the host; then whole models, eager, compiled, and compiled under CUDA graphs. Every row of a
sparse variant gives the speed-up over dense (a product's with the same launch, a model's fastest), the most that the
roofline allows, how much of that gain was reached, and the relative error against the dense product with the same
masked weight. Each group of rows has a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nm_sparsity.benchmarks import devices, groups, plan, products, report, whole_models
from nm_sparsity.benchmarks.devices import DTYPES
from nm_sparsity.benchmarks.timing import Budget
from nm_sparsity.core.experiments.command_line import command_line, make_parser
from nm_sparsity.core.experiments.folders import make_folder


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    """Measure products and whole models from the command line; exit status 1 if a group of rows failed."""
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
    device, budget = report.set_up(args), Budget(args.minutes)
    make_folder(Path(args.out))
    found: list[groups.Group] = []
    if args.only != "models":
        dtypes = args.dtype or products.default_dtypes(device)
        found += products.groups(device, args.quick, dtypes, args.rounds)
    if args.only != "products":
        found += whole_models.groups(device, args.quick, args.rounds)
    failed = groups.run(found, device, args.out, budget, args.threads)
    if (known := devices.present(device)) is not None:
        for name, batch, dtype in whole_models.MODELS:
            print(f"\n{name}, batch {batch}, {dtype}, on {known.name}")
            if reason := known.why_not(dtype):
                print(reason)
                continue
            found_here = plan.measurements(known, dtype, (args.out,))
            print(plan.for_workload(name, batch, known, dtype=dtype, measured=found_here))
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
