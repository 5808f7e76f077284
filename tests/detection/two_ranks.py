"""One rank of test_two_ranks_train_one_model: trains, compares all weights with the other rank's, and trains again
until one of them gets a signal."""

import signal
import sys
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from nm_sparsity.detection import config as configs
    from nm_sparsity.detection import train

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from nm_sparsity.core import SparsityConfig


@HOOKS.register_module()
class RanksAgree(Hook):  # type: ignore[misc]
    """Prints whether both ranks hold the same shadow weights at the end."""

    def after_train(self, runner: Any) -> None:
        mine = torch.cat([parameter.detach().flatten() for parameter in runner.model.parameters()])
        both = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        print("ranks agree" if torch.equal(*both) and torch.distributed.get_world_size() == 2 else "ranks differ")


@HOOKS.register_module()
class StopTheOther(Hook):  # type: ignore[misc]
    """SIGTERM to the rank that does not speak."""

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if torch.distributed.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)


data, out = map(Path, sys.argv[1:])
config = configs.read("tiny_mask_rcnn", ["train_cfg.max_epochs=1", "train_dataloader.batch_size=1"])
configs.set_data(config, data)
configs.set_sparsity(config, SparsityConfig(decay="auto"))
config.optim_wrapper.optimizer = {"type": "SGD", "lr": 0.01}
config.param_scheduler = []
config.custom_hooks.append({"type": "RanksAgree"})
config.val_dataloader = config.val_cfg = config.val_evaluator = None
train.run(config, out, launcher="pytorch")

config.custom_hooks.append({"type": "StopTheOther"})
try:
    train.run(config, out / "stopped", launcher="pytorch")
except SystemExit as end:
    print(f"ended with status {end.code}")
