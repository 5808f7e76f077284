"""``decay="auto"`` in MMEngine: lambda from the learning rates that a run will have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from nm_sparsity.core.files.io import load
from nm_sparsity.core.training.auto_decay import FEASIBLE
from nm_sparsity.detection import config as configs
from nm_sparsity.detection import decay
from nm_sparsity.detection.checkpoints import last_checkpoint

Make = Callable[..., Any]


@HOOKS.register_module()
class Rates(Hook):  # type: ignore[misc]
    """Keeps the learning rate of every optimizer step."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.rates: list[float] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.optim_wrapper.should_update():
            self.rates.append(runner.optim_wrapper.param_groups[0]["lr"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `scheduler.step", "ignore:Seems like")  # MMEngine accumulates so
@pytest.mark.parametrize("parts", [1, 2])
def test_under_sgd_lambda_comes_from_the_learning_rates(
    make_config: Make, run: Make, tmp_path: Path, parts: int
) -> None:
    config = make_config("tiny_faster_rcnn", decay="auto")
    config.train_cfg.max_epochs = 3
    config.optim_wrapper.accumulative_counts = parts
    config.param_scheduler = [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 4},
        {"type": "MultiStepLR", "milestones": [2], "by_epoch": True},
    ]
    config.custom_hooks.append({"type": "Rates"})
    runner = run(config, tmp_path / "run")
    rates = next(hook.rates for hook in runner.hooks if isinstance(hook, Rates))
    assert len(set(rates)) > 2
    chosen = json.loads((tmp_path / "run" / "decay.json").read_text())["decay"]
    assert chosen == pytest.approx(6 / sum(rates), rel=6e-3)  # three digits
    metadata = load(last_checkpoint(tmp_path / "run"))["nm_sparsity"]
    assert metadata["hyperparameters"]["decay"] == chosen


@pytest.mark.slow
def test_under_adamw_probes_choose_lambda_and_a_resume_keeps_it(make_config: Make, run: Make, tmp_path: Path) -> None:
    def config(epochs: int) -> Any:
        found = make_config("tiny_faster_rcnn", decay="auto")
        found.train_cfg.max_epochs, found.optim_wrapper.optimizer = epochs, {"type": "AdamW", "lr": 2e-3}
        return found

    run(config(2), tmp_path)
    choice = json.loads((tmp_path / "decay.json").read_text())
    assert choice["ratios"]
    ratio = choice["ratios"][str(choice["decay"])]
    assert "closest" in choice["reason"] or FEASIBLE[0] <= ratio <= FEASIBLE[1]
    before = (tmp_path / "decay.json").stat().st_mtime_ns
    longer = config(3)
    run(longer, tmp_path, resume=True)
    assert (tmp_path / "decay.json").stat().st_mtime_ns == before
    assert configs.hooks_of(longer)[0]["decay"] == choice["decay"]


def test_sgd_is_known_by_its_class_too(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs in Python's own style hold it."""
    config = make_config("tiny_faster_rcnn", decay="auto")
    config.optim_wrapper.optimizer.type = torch.optim.SGD
    monkeypatch.setattr(decay, "learning_rates", lambda runner: [0.01] * 100)
    decay.set_chosen_decay(config, tmp_path, False, lambda config: None)
    assert configs.hooks_of(config)[0]["decay"] == pytest.approx(6)
