"""Tiny data, configs and one trained run, made once for all detection tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what OpenMMLab's packages warn of when they are first imported
    import nm_sparsity.detection.plugin  # noqa: F401, I001  before mmdet: it stands in for mmcv's compiled operators
    import mmdet.apis
    import mmdet.engine
    import mmdet.visualization  # noqa: F401

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from nm_sparsity.core import SparsityConfig
from nm_sparsity.detection import config as configs
from nm_sparsity.detection import prepare, train

THIRD_PARTY = (
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # mmdet's masks
    'ignore:"(dropout|add_residual)" is deprecated in `FFN:DeprecationWarning',  # DETR's layers
    "ignore:The arguments `dropout` in MultiheadAttention:DeprecationWarning",
    "ignore:To copy construct from a tensor:UserWarning",  # DETR's loss
    "ignore:torch.meshgrid:UserWarning",  # FCOS's points
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pass what OpenMMLab's packages warn of, in this folder's tests only."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for entry in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(entry))


@HOOKS.register_module()
class Reseed(Hook):  # type: ignore[misc]
    """MMEngine does not save the random state: fix it at each epoch, so that runs can be compared bit for bit."""

    def before_train_epoch(self, runner: Any) -> None:
        torch.manual_seed(runner.epoch)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and four validation and test pictures of 64 pixels."""
    folder = tmp_path_factory.mktemp("data") / "composed"
    prepare.composed(folder, train=8, val=4, size=64)
    return folder


Make = Callable[..., Any]


@pytest.fixture(scope="session")
def make_config(data: Path) -> Make:
    """A config for `data`: two iterations an epoch, one epoch, no validation, SGD."""

    def make(name: str = "tiny_mask_rcnn", *overrides: str, **sparsity: Any) -> Any:
        config = configs.read(name, overrides)
        configs.set_data(config, data)
        if sparsity.get("method", "sr-ste") == "sr-ste":
            sparsity.setdefault("decay", 10.0)  # strong enough to be seen in two steps
        configs.set_sparsity(config, SparsityConfig(**sparsity))
        config.custom_hooks.append({"type": "Reseed"})
        config.train_dataloader.batch_size = 4
        config.optim_wrapper.optimizer = {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0}
        config.param_scheduler = []
        config.train_cfg.max_epochs = 1
        config.val_dataloader = config.val_cfg = config.val_evaluator = None
        config.log_level = "WARNING"
        return config

    return make


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """Trains a config in a fresh folder (or the one given) and returns the runner."""

    def run(config: Any, folder: Path | None = None, resume: bool = False) -> Any:
        folder = folder or tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return train.run(config, folder, resume=resume)

    return run


@pytest.fixture(scope="session")
def trained(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a 2:4 SR-STE run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    train.run(make_config(pattern="2:4"), folder)
    return folder
