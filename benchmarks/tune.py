"""Find cuSPARSELt's fastest algorithms for a model's layers, once for a GPU: `python -m nm_sparsity.benchmarks.tune
bert-large --device cuda --tokens 1,128,4096`.

What is found goes to the cache file that `to_semi_structured` reads, which can be copied to machines with the same GPU,
driver and cuSPARSELt. Algorithms that compute wrongly, crash or hang are kept note of too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from nm_sparsity.benchmarks import models, report
from nm_sparsity.core import SparsityError
from nm_sparsity.core.deploy.backends import BACKENDS
from nm_sparsity.core.deploy.cache import Cache, Problem
from nm_sparsity.core.deploy.candidates import activations, why_not_layer
from nm_sparsity.core.deploy.search import Search, bin_of, search
from nm_sparsity.core.experiments import user_model
from nm_sparsity.core.experiments.command_line import command_line, make_parser
from nm_sparsity.core.table import format_table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def problems_of(model: nn.Module, dtype: torch.dtype, tokens: Sequence[int]) -> list[Problem]:
    """What is searched for a model's layers, each product once."""
    backend, name = BACKENDS["cusparselt"], str(dtype).removeprefix("torch.")
    follows = dict(activations(model))
    found = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear | nn.Conv2d) or not isinstance(weight, nn.Parameter):
            continue
        if not why_not_layer(module, "weight", weight.shape, dtype, backend):
            rows, columns = len(weight), weight.numel() // len(weight)
            activation = follows[module][0] if module in follows else ""
            head = (name, name, rows, columns)
            found += [Problem(*head, bin_of(count), module.bias is not None, activation) for count in tokens]
    return list(dict.fromkeys(found))


def tune(problems: Sequence[Problem], device: torch.device, cache: Cache) -> Search:
    """Search for all `problems`, saying on stderr what is tried."""
    return search(problems, device, cache, progress=report.progress)


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Fill the cache from the command line."""
    parser = make_parser(__doc__)
    models.add_model_arguments(parser)
    parser.add_argument("--device", default="cuda", help="cuda (default)")
    parser.add_argument("--tokens", default="1024", help="rows of the products, e.g. 1,128,4096 (default 1024)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    parser.add_argument("--out", type=Path, help="the cache file (default: this machine's)")
    args = parser.parse_args(argv)
    tokens = user_model.parse_shape(args.tokens)
    device = report.choose_device(args.device)
    if reason := BACKENDS["cusparselt"].why_not_device(device):
        raise SparsityError(f"nothing to tune: {reason}")
    with torch.device("meta"):
        model, _ = models.build_named(args.model, args.args)
    cache = Cache(device, args.out)
    done = tune(problems_of(model, DTYPES[args.dtype], tokens), device, cache)
    rows = [(str(problem), *algorithm) for problem, algorithm in done.algorithms.items()]
    print(format_table(["product", "algorithm", "split-k", "mode"], rows))
    print("\n".join([*done.notes, f"wrote {cache.path}"]))


if __name__ == "__main__":
    raise SystemExit(main())
