"""Train a detector: ``python -m nm_sparsity.detection.train CONFIG [KEY=VALUE ...]``.

Under torchrun with ``--launcher pytorch`` it trains on several devices (gloo where there is no GPU).
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from mmengine.dist import all_reduce, init_dist, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.utils.dl_utils import set_multi_processing

from nm_sparsity.core import CheckpointError, SparsityConfig, SparsityError
from nm_sparsity.core.experiments.command_line import STOPS, Stopped, command_line, gather_values, stopping
from nm_sparsity.core.experiments.folders import held
from nm_sparsity.core.experiments.recipes import changes
from nm_sparsity.core.experiments.run import CONFIG, ENVIRONMENT, as_json, environment, write_json
from nm_sparsity.core.files.metadata import find_parts
from nm_sparsity.detection import PACKAGES
from nm_sparsity.detection import config as configs
from nm_sparsity.detection.checkpoints import LAST, last_checkpoint, sparsity_of
from nm_sparsity.detection.decay import set_chosen_decay
from nm_sparsity.detection.hooks import files_to_load, first_checkpoint, kind_of, load_safely


def run(config: Any, out: Path, seed: int | None = None, resume: bool = False, launcher: str = "none") -> Any:
    """Train `config` with MMEngine's Runner into the run folder `out`; returns the runner.

    The folder gets MMEngine's own files (config, log, ``epoch_*.pth``, ``scalars.json``, TensorBoard events) beside
    ``config.json`` and ``environment.json``.

    Args:
        seed: of initialisation and shuffling; by default the config's ``randomness.seed``, or 0.

    Raises:
        SparsityError: for data, a config, or a checkpoint that cannot be used.
    """
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise SparsityError("--launcher pytorch is for torchrun: torchrun --nproc-per-node 8 -m ... --launcher pytorch")
    configs.check_data(config)
    _check_folder(out, resume)
    if resume:  # MMEngine would go on from the whole path that it noted, or from ``load_from``
        config.load_from = str(last_checkpoint(out))
    done = _check_files(config, out, resume)
    if seed is None:
        seed = (config.get("randomness") or {}).get("seed") or 0
    # MMEngine keeps loggers and visualizers by name; a second run in a process would share the first's.
    name = f"{out.name}_{time.time_ns()}"
    config.merge_from_dict({"work_dir": str(out), "randomness": {"seed": seed}, "resume": resume, "launcher": launcher})
    if launcher != "none":
        _connect(config, launcher)
    set_chosen_decay(config, out, resume, _build)
    if resume:
        _check_same_run(config, out)
    config.merge_from_dict({"experiment_name": name, "visualizer": {"name": name}})
    config.visualizer.vis_backends = _backends(config.visualizer.get("vis_backends") or [])
    runner = _build(config)
    if is_main_process():
        write_json(out / CONFIG, config.to_dict())
        write_json(out / ENVIRONMENT, environment(seed, PACKAGES))
        _say_begin(runner, out, done if resume else None)
    with stopping() as asked:
        runner.register_hook(_Stop(asked, out), priority="LOWEST")
        try:
            runner.train()
        except KeyboardInterrupt:
            _say_stopped(signal.SIGINT, runner, out)
            raise Stopped from None
        except Exception as error:
            if number := asked():  # Sent to a whole process group, it ended those that load the data too.
                _say_stopped(number, runner, out)
                raise SystemExit(128 + number) from None
            if match := re.search(r"failed to load image: \S+", str(error)):
                raise SparsityError(match[0]) from error
            raise
    if is_main_process() and (out / LAST).is_file():
        print(f"wrote {last_checkpoint(out)}; score it: python -m nm_sparsity.detection.evaluate {out}")
    return runner


def _connect(config: Any, launcher: str) -> None:
    """Join the processes that train together, as MMEngine's Runner does, but before any part of one is built: from here
    on the main one speaks and writes for all."""
    settings = config.get("env_cfg") or {}
    try:
        if launcher == "pytorch" and not torch.cuda.is_available():
            # MMEngine's own set-up asks for a GPU.
            config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}
            if not is_distributed():
                torch.distributed.init_process_group("gloo")
        elif not is_distributed():
            # Else init_dist chooses another way to start processes, which the Runner then changes with a warning.
            set_multi_processing(**settings.get("mp_cfg", {}), distributed=True)
            init_dist(launcher, **settings.get("dist_cfg", {}))
    except Exception as error:
        raise SparsityError(f"cannot connect by --launcher {launcher}: {type(error).__name__}: {error}") from error


def _backends(own: Any) -> list[Any]:
    """Where the config writes what is measured, and the files of a run folder."""
    own = [own] if isinstance(own, Mapping) else list(own)
    files = ["LocalVisBackend", *(["TensorboardVisBackend"] if find_spec("tensorboard") else [])]
    return own + [{"type": kind} for kind in files if kind not in map(kind_of, own)]


class _Runner(Runner):  # type: ignore[misc]
    """MMEngine's, whose console shows how training goes and not the whole config, unless ``log_level=DEBUG``; the
    log file has all of it."""

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler and handler.level > logging.DEBUG:
                handler.addFilter(_is_news)
        return logger


def _is_news(record: logging.LogRecord) -> bool:
    """Neither what a runner says of itself while it is made, nor MMEngine's warnings of its own old parts."""
    made = record.module == "runner" and record.funcName in ("__init__", "_log_env", "wrap_model")
    return record.levelno > logging.WARNING or not (made or "will be deprecated" in record.getMessage())


class _Stop(Hook):  # type: ignore[misc]
    """Ends training after the iteration in which SIGTERM or Ctrl-C came: never while a checkpoint is being written.

    Processes that train together ask each other: one that left alone would keep the others waiting.
    """

    def __init__(self, asked: Callable[[], int], out: Path) -> None:
        self._asked, self._out = asked, out

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        asked = torch.tensor(self._asked())
        all_reduce(asked, "max")
        if (number := int(asked)) == signal.SIGINT:
            raise KeyboardInterrupt
        if number:
            _say_stopped(number, runner, self._out)
            raise SystemExit(128 + number)


def _say_begin(runner: Any, out: Path, done: int | None) -> None:
    if done is None:
        print(f"writing logs and, as the config says, epoch_*.pth into {out}", flush=True)
    elif isinstance(runner._train_loop, EpochBasedTrainLoop) and done >= runner.max_epochs:
        print(f"training ended after {done} epochs: nothing left to do (more: train_cfg.max_epochs={2 * done})")
    else:
        print(f"resuming from {last_checkpoint(out)}, written after {done} epochs", flush=True)


def _say_stopped(number: int, runner: Any, out: Path) -> None:
    """MMEngine resumes at the begin of an epoch only: what came after its checkpoint is trained again."""
    if not is_main_process():
        return
    left = "nothing is saved yet: the first checkpoint is written after an epoch"
    if (out / LAST).is_file():
        left = f"the same command with --resume goes on from {last_checkpoint(out)}"
    how = STOPS[signal.Signals(number)]
    print(f"{how} in epoch {runner.epoch + 1} (iteration {runner.iter}); {left}", flush=True)


def _check_folder(out: Path, resume: bool) -> None:
    """MMEngine would write one run's files over another's."""
    last, found = out / LAST, sorted(path.name for path in out.glob("*.pth"))
    if found and not last.is_file():
        raise CheckpointError(
            f"{out} holds {', '.join(found)} but no {LAST}, as if a run had been cut off while it first saved: remove "
            "what is there and start without --resume, or choose another --out"
        )
    if resume and not last.is_file():
        raise CheckpointError(f"cannot resume: there is no {last}; leave --resume out to start")
    if not resume and last.is_file():
        raise SparsityError(f"{out} holds a run already: continue it with --resume, or choose another --out")


def _check_files(config: Any, out: Path, resume: bool) -> int:
    """Refuse a file with code in it, which MMEngine would run, and to go on densely where a run was sparse. MMEngine
    would write this config over the run's. Returns after how many epochs a run to resume was saved."""
    done = 0
    start = first_checkpoint(config.get("load_from"), resume, str(out))
    sparse = any(hook.get("method") != "dense" for hook in configs.hooks_of(config))
    for path in files_to_load(config.model, start):
        if path != start and not Path(path).is_file():
            recipe = Path(path).parent.name
            raise SparsityError(
                f"{path}, with which the model starts, is not there: say where it is, e.g. with "
                "model.backbone.init_cfg.checkpoint=PATH, or train it: python -m nm_sparsity.classification.train "
                + (recipe if re.fullmatch(r"resnet\d+_\dto\d+", recipe) else "RECIPE")
            )
        payload = load_safely(path)
        if path == start and resume:
            done = (payload.get("meta") or {}).get("epoch", 0)
        if path != start or not resume or sparse:
            continue
        if (metadata := find_parts(payload, path)[1]) and metadata.layers:
            patterns = map(str, sorted({pattern for pattern, _ in metadata.layers.values()}))
            raise CheckpointError(
                f"{path} is {', '.join(patterns)} sparse, trained with {metadata.method}, but this config is dense; "
                "resume with the --pattern, --method and --decay that the run was started with"
            )

    return done


def _check_same_run(config: Any, out: Path) -> None:
    """Refuse to go on as another run: MMEngine would take the optimizer's options from the checkpoint without a word,
    and the rest from here. A folder that MMEngine's own tool wrote has no ``config.json`` to compare with."""
    path = out / CONFIG
    if not path.is_file():
        return
    try:
        there = _identity(json.loads(path.read_text()))
    except (ValueError, AttributeError, TypeError) as error:
        raise SparsityError(f"{path} is damaged: {error}") from error
    if changed := changes(there, _identity(as_json(config.to_dict())), may_change=["model.backbone.init_cfg"]):
        raise SparsityError(f"{out} holds another run ({'; '.join(changed)}): choose another folder with --out")


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What stays the same in a run that is resumed, of a config as JSON: not its length, its devices or its paths."""
    hook = sparsity_of(config)
    sparsity = {} if hook is None else as_json(hook.config)
    return {"sparsity": sparsity, **{key: config.get(key) for key in ("model", "optim_wrapper", "randomness")}}


def _build(config: Any) -> Any:
    """The runner, with the parts that MMEngine would build when training starts: what is wrong in a config shows here.

    Raises:
        SparsityError: with what the class that cannot be built says, whatever it is.
    """
    part = "model, hooks or work_dir"
    try:
        runner = _Runner.from_cfg(config)
        with redirect_stdout(io.StringIO()):  # pycocotools'
            part = "train_dataloader or train_cfg"
            runner._train_loop = runner.build_train_loop(runner._train_loop)
            part = f"optim_wrapper with {config.optim_wrapper.get('optimizer')}"
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            part = "val_dataloader, val_cfg or val_evaluator"
            if runner._val_loop is not None:
                runner._val_loop = runner.build_val_loop(runner._val_loop)
    except SparsityError:
        raise
    except Exception as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error)  # a KeyError puts its text in quotes
        if "is not in the" in text and "registry" in text:
            text = f"{text.split('. ')[0]}: of another MMDetection version, or of a package that custom_imports lacks"
        raise SparsityError(f"cannot build {part}: {type(error).__name__}: {text}") from error
    return runner


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Train what `arguments`, by default the command line's, say."""
    given = gather_values(sys.argv[1:] if arguments is None else arguments, (), ("--hyperparameters",))
    tyro.cli(train, args=given, prog="python -m nm_sparsity.detection.train", description=__doc__)


def train(
    config: tyro.conf.Positional[str],
    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[KEY=VALUE ...]")] = (),
    *,
    data: Path | None = None,
    pattern: str | None = None,
    method: str | None = None,
    decay: float | str | None = None,
    hyperparameters: Mapping[str, str] | None = None,
    out: Path | None = None,
    seed: int | None = None,
    resume: bool = False,
    launcher: Literal["none", "pytorch", "slurm", "mpi"] = "none",
    print_config: bool = False,
) -> None:
    """Train a detector with MMDetection.

    Args:
        config: a packaged name (e.g. tiny_mask_rcnn), a config file, or mmdet::folder/file.py.
        overrides: entries of the config, e.g. train_cfg.max_epochs=24 load_from=dense.pth.
        data: a folder in COCO's format, such as nm_sparsity.detection.prepare writes, or a COCO 2017 folder; without
            it, the config's own data.
        pattern: N:M; with it or --method a dense config becomes sparse, else it trains as it is. In a sparse one, what
            is given here takes the place of the same entry of its NMSparseHook.
        method: how weights are trained; default the config's, or sr-ste.
        decay: SR-STE's lambda: a number, a schedule, or auto.
        hyperparameters: the method's other hyperparameters, by name.
        out: the run folder; default runs/CONFIG.
        seed: of initialisation and shuffling; default the config's randomness.seed, or 0.
        resume: go on from the last checkpoint in the run folder.
        launcher: pytorch under torchrun.
        print_config: print the whole config and stop.
    """
    loaded = configs.read(config, overrides)
    if data is not None:
        configs.set_data(loaded, data)
    options = {"pattern": pattern, "method": method, "decay": decay, "hyperparameters": hyperparameters}
    given = {name: value for name, value in options.items() if value is not None}
    if given or not configs.hooks_of(loaded):  # the checkpoints of dense runs hold plain values and say so, too
        _set_sparsity(loaded, given)
    if print_config:
        print(loaded.pretty_text)
        return
    folder = out or Path("runs") / Path(config).stem
    with held(folder):
        run(loaded, folder, seed, resume, launcher)


def _set_sparsity(config: Any, given: Mapping[str, Any]) -> None:
    """Put what is `given` in the place of the same fields of the config's own hook, if it has one.

    Another method than the hook's starts from its own decay and hyperparameters.

    Raises:
        SparsityError: if nothing that is given makes a dense config sparse, or a value is out of range.
    """
    hook = sparsity_of(config)
    own = SparsityConfig(method="dense") if hook is None else hook.config
    if given:
        if own.method == "dense" and not given.keys() & {"pattern", "method"}:
            names = " and ".join(f"--{name}" for name in given)
            raise SparsityError(f"the config is dense, to which {names} means nothing: give --pattern or --method too")
        method = given.get("method", "sr-ste" if own.method == "dense" else own.method)
        fresh: dict[str, Any] = {} if method == own.method else {"decay": None, "hyperparameters": {}}
        own = replace(own, **{**fresh, "method": method, **given})
    measuring: dict[str, Any] = {} if hook is None else {"interval": hook.interval, "per_layer": hook.per_layer}
    configs.set_sparsity(config, own, **measuring)


if __name__ == "__main__":
    sys.exit(main())
