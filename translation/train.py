"""Train a recipe with fairseq's own trainer: ``python -m nm_sparsity.translation.train RECIPE [--field value ...]``.

Prints the plain ``fairseq-train`` command it stands for, then runs it. Options that are not a recipe's field go to
fairseq as they are, e.g. ``--max-update 500``. The same command resumes a run that was interrupted.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
import tyro
from fairseq_cli import train as fairseq_train

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.folders import make_folder
from nm_sparsity.core.experiments.run import environment, write_json
from nm_sparsity.core.table import format_table
from nm_sparsity.translation.prepare import Prepared
from nm_sparsity.translation.recipes import CONFIG, RECIPES, Config, difference, get, recorded

PROGRAM = "python -m nm_sparsity.translation.train"


def from_command_line(arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """``RECIPE [--field value ...] [fairseq options]`` -> the config, and what is fairseq's.

    Without arguments or with ``--help`` alone it prints the recipes and exits.

    Raises:
        SparsityError: for an unknown recipe.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} RECIPE [--field value ...] [fairseq-train's options]    ({PROGRAM} RECIPE --help)\n")
        rows = [(name, (make.__doc__ or "").split("\n")[0]) for name, make in RECIPES.items()]
        print(format_table(("recipe", "what it trains"), rows))
        sys.exit(0 if arguments else 2)
    base = get(arguments[0])
    if any(argument.startswith("--sparsity.method") for argument in arguments):
        # A recipe's lambda belongs to its method; another one starts from its own default.
        base = replace(base, sparsity=replace(base.sparsity, decay=None))
    config, unknown = tyro.cli(
        Config,
        default=base,
        args=list(arguments[1:]),
        prog=f"{PROGRAM} {arguments[0]}",
        return_unknown_args=True,
    )
    return config, unknown


def train(config: Config, more: Sequence[str] = ()) -> None:
    """Run fairseq's trainer in this process, with the arguments `more` after those of `config`.

    Raises:
        SparsityError: if the data is not prepared, what ASP starts from is missing, or the folder holds another run.
        SystemExit: with status 143 after SIGTERM, once the checkpoint is written.
    """
    prepared = Prepared.read(config.data)
    if config.sparsity.method == "asp" and config.init_from is None:
        raise SparsityError("ASP prunes a trained dense model: name its run with --init-from")
    arguments = [*config.arguments(), *more]
    _check_folder(config)
    make_folder(config.run)
    write_json(config.run / CONFIG, {"config": config.to_dict(), "fairseq": list(more), "corpus": asdict(prepared)})
    write_json(config.run / "environment.json", environment(config.seed))
    print(shlex.join(["fairseq-train", *arguments]), flush=True)
    # As fairseq-train does it, unless something else was imported first.
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s", level="INFO", stream=sys.stdout, force=True
    )
    sys.argv = ["fairseq-train", *arguments]
    fairseq_train.cli_main()


def _check_folder(config: Config) -> None:
    """fairseq resumes whatever is in the folder, and would mix two runs into one."""
    there = recorded(config.run)
    if there and (config.run / "checkpoint_last.pt").is_file() and (changed := difference(there, config.to_dict())):
        raise SparsityError(f"{config.run} holds another run ({'; '.join(changed)}): choose another folder with --run")


@command_line
def main() -> None:
    """The command line."""
    config, more = from_command_line(sys.argv[1:])
    # Matrices this small are slower on several threads.
    if "OMP_NUM_THREADS" not in os.environ and config.fairseq.get("num-workers") == 0:
        torch.set_num_threads(1)
    train(config, more)


if __name__ == "__main__":
    sys.exit(main())
