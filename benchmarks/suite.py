"""Every benchmark in one call: `python -m nm_sparsity.benchmarks.suite --minutes 8 --out DIR`.

On a GPU: the kernels against the oracle and the memory bandwidth, the training overhead in bf16, the sweep of products,
and whole models until the time is over. On a CPU: what can run there. Each group of rows has a process of its own with
a time limit: one that crashes or hangs leaves its rows so far and the reason, and the next one runs. Rows are written
as they come. Needs torch, torchvision, triton and numpy, and this repository (``PYTHONPATH=.`` if not installed).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nm_sparsity.benchmarks import groups, products, report, whole_models
from nm_sparsity.benchmarks.groups import Group
from nm_sparsity.benchmarks.timing import Budget
from nm_sparsity.core.experiments.command_line import command_line, make_parser
from nm_sparsity.core.experiments.folders import make_folder

WHAT = ("masks", "training", "products", "models")


def all_groups(device: torch.device, quick: bool) -> list[Group]:
    """Everything in the order of measuring, with its share of the time."""
    rounds = 3 if quick else 10
    options = {"quick": quick}
    return [
        Group("masks", "nm_sparsity.benchmarks.masks", {}, options, 0.1 if device.type == "cuda" else 0.2),
        Group("training", "nm_sparsity.benchmarks.training", {}, options, 0.2 if device.type == "cuda" else 0.4),
        *products.groups(device, quick, products.default_dtypes(device), rounds),
        *whole_models.groups(device, quick, rounds),
    ]


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run every benchmark from the command line; exit status 1 if one failed."""
    parser = make_parser(__doc__)
    report.add_arguments(parser)
    parser.add_argument("--minutes", type=float, help="of measuring; what is left then becomes rows that say so")
    parser.add_argument("--only", nargs="+", choices=WHAT, default=WHAT, help="default: all")
    args = parser.parse_args(argv)
    device, budget = report.set_up(args), Budget(args.minutes)
    make_folder(Path(args.out))
    wanted = [group for group in all_groups(device, args.quick) if group.what in args.only]
    failed = groups.run(wanted, device, args.out, budget, args.threads)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall done")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
