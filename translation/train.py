"""Train a recipe with fairseq's own trainer: ``python -m nm_sparsity.translation.train RECIPE [--field value ...]``.

Prints the plain ``fairseq-train`` command it stands for, then runs it. Options that are not a recipe's field go to
fairseq as they are, e.g. ``--max-update 500``. The same command resumes a run that was interrupted.
"""

from __future__ import annotations

import io
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from nm_sparsity.core import CheckpointError, DecayChoice, SparsityConfig, SparsityError, choose_decay
from nm_sparsity.core.experiments.command_line import STOPS, Stopped, command_line
from nm_sparsity.core.experiments.decay import with_chosen_decay
from nm_sparsity.core.experiments.folders import held
from nm_sparsity.core.experiments.recipes import OPTIONS, difference
from nm_sparsity.core.experiments.run import CONFIG, ENVIRONMENT, environment, write_json
from nm_sparsity.core.training.auto_decay import probe_steps
from nm_sparsity.translation import PACKAGES, plugin
from nm_sparsity.translation.prepare import Prepared
from nm_sparsity.translation.recipes import LAST, RECIPES, TransformerConfig, recorded
from nm_sparsity.translation.stock import train as fairseq_train

LOG = "fairseq.log"
"""In a run folder: all that fairseq said."""

SHOWN = ("nm_sparsity", "train", "valid")
"""How the names of loggers begin that tell how training goes."""


def train(config: TransformerConfig, more: Sequence[str] = ()) -> None:
    """Run fairseq's trainer in this process, with the arguments `more` after those of `config`.

    Raises:
        SparsityError: if the data is not prepared, what ASP starts from is missing, or the folder holds another run.
        SystemExit: with status 143 after SIGTERM and 130 after Ctrl-C, once the checkpoint is written.
    """
    prepared = Prepared.read(config.data)
    if config.sparsity.make_method().starts_trained and config.init_from is None:
        raise SparsityError(f"{config.sparsity.method} prunes a trained dense model: name its run with --init-from")
    # Where processes are started one by one, the first one holds the folder for all.
    others = any(int(rank) > 0 for option, rank in pairwise(more) if option == "--distributed-rank" and rank.isdigit())
    with nullcontext() if others else held(config.folder):
        there = (config.folder / LAST).is_file()
        sparsity = with_chosen_decay(config.sparsity, config.folder, there, lambda: _choose_decay(config, more))
        _train(replace(config, sparsity=sparsity), more, prepared)


def _choose_decay(config: TransformerConfig, more: Sequence[str]) -> DecayChoice:
    """By short probes, whatever the optimizer: fairseq's learning rates are known only to its trainer."""
    if any("distributed" in word for word in more) or torch.cuda.device_count() > 1:
        raise SparsityError(
            'decay="auto" probes in this process, and fairseq would start one for each device: let one device choose '
            "lambda (CUDA_VISIBLE_DEVICES=0), then give it as a number"
        )

    def probe(sparsity: SparsityConfig) -> None:
        logging.disable(logging.WARNING)
        try:
            with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
                elsewhere = replace(config, sparsity=sparsity, folder=Path(folder), resume=False)
                # It keeps its TensorBoard writers for the rest of the process.
                _run_fairseq([*elsewhere.arguments(), *more, "--no-save", "--tensorboard-logdir", ""])
        finally:
            logging.disable(logging.NOTSET)

    updates = [word for option, word in pairwise([*config.arguments(), *more]) if option == "--max-update"]
    return choose_decay(probe, config.sparsity, probe_steps(int(updates[-1]) if updates else 2000))


def _run_fairseq(arguments: Sequence[str]) -> None:
    plugin.install()  # before fairseq reads its options, which is noisy
    sys.argv = ["fairseq-train", *arguments]
    handlers = {number: signal.getsignal(number) for number in STOPS}
    try:
        fairseq_train.cli_main()
    finally:
        for number, handler in handlers.items():  # which the task replaced by its own
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


def _train(config: TransformerConfig, more: Sequence[str], prepared: Prepared) -> None:
    arguments = [*config.arguments(), *more]
    _check_folder(config)
    record = {"config": config.to_dict(), OPTIONS: list(more), "corpus": asdict(prepared)}
    module, last = "python -m nm_sparsity.translation", config.folder / LAST
    with _record(config.folder / CONFIG, record, last):
        write_json(config.folder / ENVIRONMENT, environment(config.seed, PACKAGES))
        print(shlex.join(["fairseq-train", *arguments]), flush=True)
        _set_up_log(config.folder / LOG)
        try:
            _run_fairseq(arguments)
        except KeyboardInterrupt:  # before the first update, or the second one
            left = f"{module}.train {config.folder} goes on from {last}" if last.is_file() else "nothing is saved yet"
            print(f"{STOPS[signal.SIGINT]}; {left}", flush=True)
            raise Stopped from None
    print(f"score it: {module}.evaluate {config.folder}\ntry it: {module}.predict {config.folder} 'A sentence.'")


@contextmanager
def _record(path: Path, record: Mapping[str, Any], checkpoint: Path) -> Iterator[None]:
    """A block in which the file `path` holds `record`, and after it too, unless it failed before it wrote `checkpoint`.

    Then the file is what it was: an option that fairseq does not know, or that our task refuses, is none that the run
    goes on with.
    """

    def written() -> int | None:
        return checkpoint.stat().st_mtime_ns if checkpoint.is_file() else None

    before, since = path.read_bytes() if path.is_file() else b"", written()
    write_json(path, record)
    try:
        yield
    except BaseException:
        if written() == since:
            path.unlink()
            if before:
                path.write_bytes(before)
        raise


def _set_up_log(path: Path) -> None:
    """Of fairseq's log the console shows how training goes, or with fairseq's variable LOGLEVEL what that says; the
    file has all of it."""
    console = logging.StreamHandler(sys.stdout)
    if "LOGLEVEL" not in os.environ:
        console.addFilter(_is_shown)
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        handlers=[console, logging.FileHandler(path, encoding="utf-8")],
        force=True,  # something else may have been imported first
    )


def _is_shown(record: logging.LogRecord) -> bool:
    first = not dist.is_initialized() or dist.get_rank() == 0
    return record.levelno > logging.INFO or (first and record.name.startswith(SHOWN))


def _check_folder(config: TransformerConfig) -> None:
    """fairseq resumes whatever is in the folder, and would mix two runs into one."""
    trained = (config.folder / LAST).is_file()
    if config.resume and not trained:
        raise CheckpointError(f"cannot resume: {config.folder} holds no {LAST}; leave --resume out to start")
    there = recorded(config.folder)
    if there and trained and (changed := difference(there, config)):
        raise SparsityError(
            f"{config.folder} holds another run ({'; '.join(changed)}): choose another folder with --out"
        )


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Train a recipe with its overrides: `arguments`, by default the command line's."""
    given = sys.argv[1:] if arguments is None else arguments
    config, more = RECIPES.from_command_line(
        given, "python -m nm_sparsity.translation.train", "fairseq-train's options"
    )
    # Matrices this small are slower on several threads.
    if "OMP_NUM_THREADS" not in os.environ and config.fairseq.get("num-workers") == 0:
        torch.set_num_threads(1)
    train(config, more)


if __name__ == "__mp_main__":  # in the processes that fairseq starts, one for each device, with its arguments
    _set_up_log(Path(sys.argv[sys.argv.index("--save-dir") + 1]) / LOG)
if __name__ == "__main__":
    sys.exit(main())
