"""The four places where fairseq must know of sparsity: writing a checkpoint, copying it, resuming from it, stopping.

They are replaced on fairseq's classes, since it has no hook there. Runs of other tasks and files of other programs go
fairseq's own way.

Checkpoints are sparse as they stand: ``model`` holds the masked weights under fairseq's names, so that any fairseq
loads them with the accuracy of the sparse model. Beside it, in ``extra_state``, lies what a resume needs.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nm_sparsity.core import CheckpointError, load_sparsity_state, sparsity_state
from nm_sparsity.core.files.checkpoint import restore, split
from nm_sparsity.core.files.io import load, save
from nm_sparsity.core.files.metadata import METADATA, Metadata, find_parts
from nm_sparsity.translation.stock import PathManager, Trainer, checkpoint_utils, utils

logger = logging.getLogger(__name__)

_stock_save, _stock_load, _stock_step, _stock_copy = (
    Trainer.save_checkpoint,
    Trainer.load_checkpoint,
    Trainer.train_step,
    PathManager.copy,
)
EMA = "nm_sparsity_ema"
"""Beside the averaged weights in ``extra_state``: what `METADATA` is beside the weights."""

_written: set[str] = set()
"""The checkpoint files that this process wrote."""


def install() -> None:
    """Put `save_checkpoint`, `load_checkpoint`, `train_step` and `copy` in the place of fairseq's."""
    Trainer.save_checkpoint = save_checkpoint
    Trainer.load_checkpoint = load_checkpoint
    Trainer.train_step = train_step
    PathManager.copy = staticmethod(copy)


def unwrap(model: Any) -> torch.nn.Module:
    """The model inside fairseq's distributed wrappers."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    assert isinstance(model, torch.nn.Module)
    return model


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file of fairseq's, this plug-in's or not.

    Raises:
        CheckpointError: if it is missing, damaged, or of something else.
    """
    # fairseq puts its options into checkpoints as they come from the command line.
    with torch.serialization.safe_globals([argparse.Namespace]):
        payload = load(path)
    parts = {"cfg": dict, "model": dict, "optimizer_history": list, "extra_state": dict, "task_state": dict}
    if not isinstance(payload, dict) or not all(isinstance(payload.get(name), kind) for name, kind in parts.items()):
        raise CheckpointError(f"{path} is not a checkpoint of fairseq's: it needs {', '.join(parts)}")
    return payload


def save_checkpoint(self: Any, filename: str, extra_state: dict[str, Any]) -> str | None:
    """`Trainer.save_checkpoint`: masked weights, and beside them what a resume needs; written atomically."""
    if not hasattr(self.task, "nm_config"):
        return _stock_save(self, filename, extra_state)
    if not self.should_save_checkpoint_on_current_rank:
        return None
    state = self.state_dict()
    extra = {**state["extra_state"], **extra_state, "task_state": state["task_state"]}
    state["model"], extra[METADATA] = split(self.get_model())
    if extra[METADATA].get("unfinished"):
        # The best checkpoint is the best of those that are N:M: until then, each validation's is.
        extra.pop("best", None)
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
    if "ema" in extra:
        load_sparsity_state(self.ema.get_model(), sparsity_state(self.get_model()))
        extra["ema"], extra[EMA] = split(self.ema.get_model())
    path = os.path.abspath(filename)
    save(path, plain(utils.move_to_cpu({**state, "extra_state": extra})))
    _written.add(path)
    logger.info("Finished saving checkpoint to %s", path)
    return path


def load_checkpoint(
    self: Any, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any
) -> dict[str, Any] | None:
    """`Trainer.load_checkpoint`: also brings back the dense shadow weights and the method's memory, bit for bit.

    Raises:
        CheckpointError: for a damaged file, or one of another architecture, pattern, method or dictionary.
    """
    if not hasattr(self.task, "nm_config"):
        return _stock_load(self, filename, reset_optimizer, *args, **kwargs)
    try:
        extra: dict[str, Any] | None = _stock_load(self, filename, reset_optimizer, *args, **kwargs)
    except Exception:
        if Path(filename).is_file():
            # fairseq only says that it failed; this says at which weight.
            restore(self.get_model(), *find_parts(load(filename), filename))
        raise
    if extra is None:
        return None
    self.task.load_state_dict(extra.pop("task_state", {}))
    metadata, ema = extra.pop(METADATA, None), extra.pop(EMA, None)
    if filename != self.cfg.checkpoint.finetune_from_model:
        _restore_shadow(self.get_model(), metadata, filename)
        if self.cfg.ema.store_ema:
            _restore_shadow(self.ema.get_model(), ema, filename)
    limits, next_epoch = self.cfg.optimization, extra.get("train_iterator", {}).get("epoch", 0)
    updates = 0 < limits.max_update <= self.get_num_updates()
    if updates or 0 < limits.max_epoch < next_epoch:
        logger.info("training ended after %d updates: nothing left to do", self.get_num_updates())
    if updates:
        # fairseq looks at --max-update only after one more update, but at this before it.
        self.cfg.optimization.max_epoch = -1
    return extra


def _restore_shadow(model: torch.nn.Module, entry: Mapping[str, Any] | None, filename: str) -> None:
    if entry is not None:
        metadata = Metadata.from_dict(entry, filename)
        there, here = _method(metadata), _method(Metadata.of(model))
        if there != here:
            raise CheckpointError(
                f"the checkpoint is of a run with {there}, not {here}: choose another --save-dir (and start from its "
                "weights with --finetune-from-model, if you like)"
            )
        before, now = (entry.hyperparameters.get("total_steps") for entry in (metadata, Metadata.of(model)))
        if before != now:
            logger.info("planned for %s updates, now for %s: every schedule is that of the new run", before, now)
        restore(model, model.state_dict(), metadata)


def _method(metadata: Metadata) -> str:
    """The method and its hyperparameters, but for the length of the run: a longer one goes on at its place in it."""
    values = (f"{name} {value}" for name, value in metadata.hyperparameters.items() if name != "total_steps")
    return " and ".join((metadata.method, *values))


def train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.train_step`: after SIGTERM or Ctrl-C this update is the last one; fairseq then saves and leaves."""
    result = _stock_step(self, *args, **kwargs)
    if getattr(self.task, "nm_stop", False):
        if self.cfg.checkpoint.no_save:
            raise SystemExit(128 + self.task.nm_signal)
        self.cfg.optimization.max_update = self.get_num_updates()
        self.cfg.dataset.disable_validation = True
    return result


def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """`PathManager.copy`, by which fairseq makes checkpoint_last.pt. Of a checkpoint of ours the copy is atomic, and a
    hard link where the disk can.

    Raises:
        CheckpointError: if the disk is full; a file that was there before stays.
    """
    if os.path.abspath(src_path) not in _written or PathManager.path_requires_pathmanager(dst_path):
        return bool(_stock_copy(src_path, dst_path, overwrite))
    temporary = Path(f"{dst_path}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(src_path, temporary)
        except OSError:
            shutil.copyfile(src_path, temporary)
        os.replace(temporary, dst_path)
    except OSError as error:
        raise CheckpointError(f"could not write {dst_path} ({error}); the previous file is unchanged") from error
    finally:
        # Also left behind by a rename onto a link to the same file.
        temporary.unlink(missing_ok=True)
    return True


def plain(value: Any) -> Any:
    """`value` without what only unsafe loading can read: options become dicts, numpy's numbers Python's."""
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value
