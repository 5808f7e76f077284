"""``decay="auto"`` for a detector: lambda from MMEngine's learning rates under SGD, else from short probes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.optim import OptimWrapper

from nm_sparsity.core import DecayChoice, SparsityConfig, choose_decay
from nm_sparsity.core.experiments.decay import with_chosen_decay
from nm_sparsity.core.training.auto_decay import decay_of_strength, probe_steps
from nm_sparsity.detection import config as configs
from nm_sparsity.detection.checkpoints import sparsity_of
from nm_sparsity.detection.hooks import kind_of

Build = Callable[[Any], Any]
"""Makes the runner of a config."""


def set_chosen_decay(config: Any, out: Path, resume: bool, build: Build) -> None:
    """Put a number in the place of ``decay="auto"`` in `config`, if it is there; noted in the run folder `out`.

    Raises:
        SparsityError: if a probe comes to no result.
    """
    hook = sparsity_of(config)
    if hook is None or not hook.config.decay_is_auto:
        return
    sparsity: SparsityConfig = hook.config

    def choose() -> DecayChoice:
        with TemporaryDirectory() as folder:
            rates = learning_rates(build(_probe(config, sparsity.with_decay(0.0), folder)))
        if kind_of(config.optim_wrapper.optimizer) == "SGD":
            return decay_of_strength(rates)
        return choose_decay(probe, sparsity, probe_steps(len(rates)))

    def probe(sparsity: SparsityConfig) -> None:
        with TemporaryDirectory() as folder:
            build(_probe(config, sparsity, folder)).train()

    chosen = with_chosen_decay(sparsity, out, resume, choose, is_main_process())
    configs.set_sparsity(config, chosen, interval=hook.interval, per_layer=hook.per_layer)


def learning_rates(runner: Any) -> list[float]:
    """The learning rate of each optimizer step of a runner that is built and not trained, its first group's."""
    loop, wrapper, group = runner._train_loop, runner.optim_wrapper, runner.optim_wrapper.param_groups[0]
    stand_in = OptimWrapper(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=group["lr"]))
    runner.scale_lr(stand_in, runner.auto_scale_lr)
    runner.optim_wrapper = stand_in
    schedulers = runner.build_param_scheduler(copy.deepcopy(runner.param_schedulers)) if runner.param_schedulers else []
    runner.optim_wrapper = wrapper
    parts, epoch, rates = getattr(wrapper, "_accumulative_counts", 1), len(loop.dataloader), []
    for iteration in range(1, loop.max_iters + 1):
        if iteration % parts == 0 or iteration == loop.max_iters:
            rates.append(float(stand_in.param_groups[0]["lr"]))
        stand_in.step()  # which the schedulers look for
        for scheduler in schedulers:
            if not scheduler.by_epoch or iteration % epoch == 0:
                scheduler.step()
    return rates


def _probe(config: Any, sparsity: SparsityConfig, folder: str) -> Any:
    """A run like that of `config` which leaves nothing behind and says nothing."""
    probe = copy.deepcopy(config)
    configs.set_sparsity(probe, sparsity)
    probe.merge_from_dict(
        {"work_dir": folder, "experiment_name": f"probe-{Path(folder).name}", "resume": False, "log_level": "ERROR"}
    )
    probe.visualizer = {"type": "Visualizer", "vis_backends": [], "name": probe.experiment_name}
    return probe
