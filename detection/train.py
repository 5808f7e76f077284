"""Train a detector: ``python -m nm_sparsity.detection.train CONFIG [KEY=VALUE ...]``.

Under torchrun with ``--launcher pytorch`` it trains on several devices (gloo where there is no GPU).
"""

from __future__ import annotations

import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from nm_sparsity.core import SparsityConfig, SparsityError
from nm_sparsity.core.errors import command_line
from nm_sparsity.core.run import environment, write_json
from nm_sparsity.detection import config as configs


def run(config: Any, out: Path, seed: int = 0, resume: bool = False, launcher: str = "none") -> Any:
    """Train `config` with MMEngine's Runner into the run folder `out`; returns the runner.

    The folder gets MMEngine's own files (config, log, ``epoch_*.pth``, ``scalars.json``, TensorBoard events) beside
    ``config.json`` and ``environment.json``.

    Raises:
        SparsityError: for data, a config, or a checkpoint that cannot be used.
    """
    from mmengine.dist import is_main_process
    from mmengine.runner import Runner

    configs.check_data(config)
    # MMEngine keeps loggers and visualizers by name; a second run in a process would share the first's.
    name = f"{out.name}_{time.time_ns()}"
    config.merge_from_dict({"work_dir": str(out), "randomness": {"seed": seed}, "resume": resume, "launcher": launcher})
    config.merge_from_dict({"experiment_name": name, "visualizer": {"name": name}})
    if launcher == "pytorch" and not torch.cuda.is_available():
        # MMEngine's own set-up asks for a GPU, unless the processes are connected already.
        torch.distributed.init_process_group("gloo")
        config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}
    if find_spec("tensorboard"):
        config.visualizer.vis_backends = [{"type": "LocalVisBackend"}, {"type": "TensorboardVisBackend"}]
    try:
        runner = Runner.from_cfg(config)
        if is_main_process():
            write_json(out / "config.json", configs.to_json(config))
            write_json(out / "environment.json", environment(seed))
        runner.train()
    except (KeyError, TypeError, AssertionError) as error:
        explained = _explained(error)
        if explained is None:
            raise
        raise explained from error
    return runner


def _explained(error: Exception) -> SparsityError | None:
    text = str(error).strip("\"'")
    if "is not in the" in text and "registry" in text:
        return SparsityError(
            f"{text.split('. ')[0]}: a config of another MMDetection version, or of a package that custom_imports lacks"
        )
    if match := re.search(r"failed to load image: \S+|got an unexpected keyword argument .*", text):
        return SparsityError(match[0])
    return None


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    tyro.cli(train, args=arguments, description=__doc__)


def train(
    config: tyro.conf.Positional[str],
    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),
    *,
    data: Path | None = None,
    pattern: str | None = None,
    method: str | None = None,
    decay: float | None = None,
    out: Path | None = None,
    seed: int = 0,
    resume: bool = False,
    launcher: Literal["none", "pytorch", "slurm", "mpi"] = "none",
    print_config: bool = False,
) -> None:
    """Train a detector with MMDetection.

    Args:
        config: a packaged name (e.g. tiny_mask_rcnn), a config file, or mmdet::folder/file.py.
        overrides: entries of the config, e.g. train_cfg.max_epochs=24 load_from=dense.pth.
        data: a folder that nm_sparsity.detection.prepare wrote; without it, the config's own data.
        pattern: N:M; with it or --method the config becomes sparse that way.
        method: dense, ste, sr-ste (default) or asp.
        decay: SR-STE's lambda.
        out: the run folder; default runs/CONFIG.
        seed: of initialisation and shuffling.
        resume: go on from the last checkpoint in the run folder.
        launcher: pytorch under torchrun.
        print_config: print the whole config and stop.
    """
    loaded = configs.read(config, overrides)
    if data is not None:
        configs.set_data(loaded, data)
    given: dict[str, Any] = {"pattern": pattern, "method": method, "decay": decay}
    if sparsity := {key: value for key, value in given.items() if value is not None}:
        configs.set_sparsity(loaded, SparsityConfig(**sparsity))
    if print_config:
        print(loaded.pretty_text)
        return
    run(loaded, out or Path("runs") / Path(config).stem, seed, resume, launcher)


if __name__ == "__main__":
    sys.exit(main())
