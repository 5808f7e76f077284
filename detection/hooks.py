"""`NMSparseHook` makes any MMEngine training N:M sparse; MMDetection configs name it in ``custom_hooks``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, find_latest_checkpoint
from mmengine.utils import apply_to
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from nm_sparsity.core import (
    CheckpointError,
    MaskTracker,
    SparsityConfig,
    SparsityError,
    SparsityReport,
    decay_strength,
)
from nm_sparsity.core.files.checkpoint import restore, split
from nm_sparsity.core.files.io import load
from nm_sparsity.core.files.metadata import METADATA, find_parts
from nm_sparsity.core.model.strength import warn_if_weak

# What the log history in MMEngine's own checkpoints is made of; it runs no code. numpy 1 and 2 name parts differently.
_NUMPY: list[Any] = [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]
_HISTORY: list[Any] = [
    *(HistoryBuffer, getattr, np.ndarray, np.dtype),
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64", "uint32")),
    *((part, f"numpy.{core}.multiarray.{part.__name__}") for part in _NUMPY for core in ("core", "_core")),
]


def load_safely(path: str | Path) -> Any:
    """Load a file as `nm_sparsity.core.files.io.load` does, also one that MMEngine wrote without `NMSparseHook`."""
    with torch.serialization.safe_globals(_HISTORY):
        return load(path)


_GLOBS = ((list, tuple), 'a list of globs, e.g. ["backbone.*"]')
_OPTIONS: dict[str, tuple[Any, str]] = {
    "include": _GLOBS,
    "exclude": _GLOBS,
    "trust": ((list, tuple), 'a list of classes, e.g. ["package.module:MyConv"]'),
    "patterns": (Mapping, 'globs and their patterns, e.g. {"backbone.*": "1:4"}'),
    "decay": ((int, float, str), "a number or a schedule"),
    "hyperparameters": (Mapping, 'names and values, e.g. {"ramp": 1000}'),
    "interval": (int, "a number of iterations"),
}
"""Types of the hook's options; those not named here are text."""


@HOOKS.register_module()
class NMSparseHook(Hook):  # type: ignore[misc]
    """Trains the runner's model N:M sparse and writes checkpoints that are sparse as they stand.

    Args:
        interval: iterations between measurements of the flip rate; 0 is never.
        per_layer: log the SAD of every layer too.
        sparsity: the fields of `SparsityConfig`: pattern, method, decay, hyperparameters, layout, include, exclude,
            patterns, remainder, trust.

    Raises:
        SparsityError: for an unknown field, or one out of range.

    The model is converted before training, with the weights that the dense model would start from. A runner that only
    tests or validates is left alone: a checkpoint of ours has the sparse model's accuracy in a dense model.
    """

    # Convert before EMAHook copies the model, and see a checkpoint before EMAHook swaps its weights.
    priority = "VERY_HIGH"

    def __init__(self, interval: int = 50, per_layer: bool = False, **sparsity: Any) -> None:
        known = [field.name for field in fields(SparsityConfig)]
        if unknown := sorted(set(sparsity) - set(known)):
            raise SparsityError(f"NMSparseHook has no option {', '.join(unknown)}; it takes {', '.join(known)}")
        given = {name: value for name, value in sparsity.items() if value is not None}
        for name, value in {**given, "interval": interval}.items():
            kind, expected = _OPTIONS.get(name, (str, "text"))
            if not isinstance(value, kind):
                raise SparsityError(f"NMSparseHook: {name} is {value!r}, expected {expected}")
        if interval < 0:
            raise SparsityError(f"NMSparseHook: interval is {interval}, expected 0 (never measure) or more iterations")
        for name, plain in (
            ("include", tuple),
            ("exclude", tuple),
            ("trust", tuple),
            ("patterns", dict),
            ("hyperparameters", dict),
        ):
            if name in given:
                given[name] = plain(given[name])
        self.config = SparsityConfig(**given)
        self.interval = interval
        self.per_layer = per_layer
        self.report: SparsityReport | None = None
        self._tracker: MaskTracker | None = None

    def before_run(self, runner: Any) -> None:
        """Initialise the weights as the runner would, then convert the model."""
        trains = isinstance(runner._train_loop, BaseLoop)
        start = first_checkpoint(runner._load_from, runner._resume, runner.work_dir)
        for path in files_to_load(runner.cfg.get("model") if trains else None, start):
            load_safely(path)  # MMEngine itself would run the code in a pickle that it cannot load safely
        if self.report is not None or not trains:
            return
        if sum(isinstance(hook, NMSparseHook) for hook in runner.hooks) > 1:
            raise SparsityError("the config holds NMSparseHook more than once; use `patterns` for layers that differ")
        if isinstance(runner.model, FullyShardedDataParallel):
            raise SparsityError(
                "the model is sharded by FSDP before NMSparseHook can convert it; use MMDistributedDataParallel"
            )
        # The runner initialises the weights only after this hook, and its init functions would miss the shadow weights.
        runner._init_model_weights()
        runner._init_model_weights = lambda: None  # a second call would only log a warning
        parts = getattr(runner.optim_wrapper, "_accumulative_counts", 1)
        self.report = self.config.sparsify(_unwrapped(runner), total_steps=-(-runner.max_iters // parts))
        print_log(f"sparse model:\n{self.report}", logger="current")
        runner.register_hook(_SaveSparse())

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """On resume, rebuild the dense shadow weights and the method's memory; else check that the file fits at all."""
        if not runner._resume:
            _require_common_names(_unwrapped(runner), checkpoint, runner._load_from)
        if self.report is None or not runner._resume:
            return
        metadata = checkpoint.get(METADATA)
        if metadata is None:
            print_log("resumed a checkpoint of dense training: its weights are masked from here on", logger="current")
            return
        model = _unwrapped(runner)
        try:
            restore(model, checkpoint["state_dict"], metadata)
        except CheckpointError as error:
            raise CheckpointError(f"cannot resume: {error}") from error
        _replace(checkpoint["state_dict"], {name: value.clone() for name, value in model.state_dict().items()})
        scalars = checkpoint["message_hub"]["log_scalars"]
        scalars.update({name: HistoryBuffer(*history) for name, history in scalars.items()})

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Remember the masks before an optimizer step that is to be measured."""
        if self.interval and self._tracker is None and (runner.iter + 1) % self.interval == 0:
            self._tracker = MaskTracker(_unwrapped(runner))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Log SAD and flip rate once the step was made (with gradient accumulation, iterations later)."""
        if self._tracker is None or not runner.optim_wrapper.should_update():
            return
        flips = self._tracker.update()
        self._tracker = None
        scalars = {"sad": flips.total_sad, "flip_rate": flips.rate}
        if self.per_layer:
            scalars |= {f"sad_{name}": sad for name, sad in flips.sad.items()}
        for name, value in scalars.items():
            runner.message_hub.update_scalar(f"train/{name}", value)

    def after_train(self, runner: Any) -> None:
        """Say how strongly dropped weights were decayed, and warn if it was too weak to matter."""
        model = _unwrapped(runner)
        strength = decay_strength(model)
        if strength is not None:
            print_log(f"lambda * sum(lr) = {strength:.4g}", logger="current")
        warn_if_weak(model)


class _SaveSparse(Hook):  # type: ignore[misc]
    """Makes what is saved sparse as it stands. Apart from `NMSparseHook` because it must come after EMAHook, which puts
    the averaged weights into the checkpoint."""

    priority = "LOWEST"

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        masked, checkpoint[METADATA] = split(_unwrapped(runner), checkpoint["state_dict"])
        _replace(checkpoint["state_dict"], masked)
        # Plain values in place of MMEngine's and numpy's objects: then the file loads everywhere without running code.
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {name: [h.tolist() for h in log.data] for name, log in hub["log_scalars"].items()}
        hub["runtime_info"] = apply_to(hub["runtime_info"], lambda x: isinstance(x, np.generic), lambda x: x.item())


def _replace(state_dict: dict[str, Any], values: Mapping[str, Any]) -> None:
    """New values in the same dict, on the CPU: MMEngine keeps versions of layers in an attribute of it."""
    for name, value in values.items():
        state_dict[name] = value.cpu()


def _unwrapped(runner: Any) -> nn.Module:
    model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model


def _require_common_names(model: nn.Module, checkpoint: Any, path: str) -> None:
    """MMEngine only warns of names that differ, even if all do: then the weights stay random."""
    state_dict, _ = find_parts(checkpoint, path)
    if model.state_dict().keys().isdisjoint(state_dict):
        raise CheckpointError(
            f"no name in {path} is one of {type(model).__name__}'s (it has {next(iter(state_dict), 'nothing')}, ...); "
            'the weights of a backbone alone belong in model.backbone.init_cfg = {type: "Pretrained", checkpoint: ...}'
        )


def first_checkpoint(load_from: str | None, resume: bool, work_dir: str) -> str | None:
    """What a runner starts from: ``load_from``, or the last checkpoint to resume."""
    return load_from or (find_latest_checkpoint(work_dir) if resume else None)


_PRETRAINED = ("Pretrained", "PretrainedInit")
"""What loads the weights of a part: its name in MMEngine's registry, and that of its class."""


def files_to_load(model: Any, start: str | None) -> Iterator[str]:
    """The local files among `start` and the pretrained parts of the config `model`."""
    pretrained = (part.get("checkpoint") for part in mappings(model) if kind_of(part) in _PRETRAINED)
    for path in (start, *pretrained):
        if path is not None and not re.match(r"[\w-]+://", path):
            yield path


def mappings(config: Any) -> Iterator[Any]:
    """All mappings in a nested config, `config` itself included."""
    if isinstance(config, Mapping):
        yield config
        config = list(config.values())
    if isinstance(config, list | tuple):
        for entry in config:
            yield from mappings(entry)


def kind_of(part: Any) -> str:
    """The name of the type that a part of a config is built as; configs in Python's own style hold the class, and
    its whole path where they are written out."""
    kind = part.get("type", "nothing") if isinstance(part, Mapping) else type(part).__name__
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]
