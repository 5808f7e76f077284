"""The fairseq tasks ``nm_translation`` and ``nm_language_modeling``: fairseq's own, with an N:M sparse Transformer.

Every stock architecture goes sparse by options, without a copied model: the projections of attention and the
feed-forward layers of encoder and decoder. Embeddings and the output projection tied to them stay dense.

Importing this registers the tasks. What else has to change in fairseq, `install` changes when a task is set up.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import math
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nm_sparsity.core import CheckpointError, MaskTracker, SparsityError, frozen
from nm_sparsity.core.experiments.command_line import STOPS, Stop
from nm_sparsity.core.model.strength import decay_strength
from nm_sparsity.translation import trainer
from nm_sparsity.translation.options import add_options, sparsity_config
from nm_sparsity.translation.stock import (
    Dictionary,
    LanguageModelingConfig,
    LanguageModelingTask,
    TranslationConfig,
    TranslationTask,
    metrics,
    register_task,
)

logger = logging.getLogger(__name__)

LAYERS = ("encoder.layers", "decoder.layers")
"""What is sparse unless ``--nm-include`` says otherwise, where the model has it."""

DICTIONARIES = "nm_dictionaries"
"""Key in a checkpoint's ``task_state``: what tells one dictionary from another of the same size."""

FIGURES = ("sad", "flip_rate", "decay_strength")
"""What is measured at an update in ``--log-interval``, and so not in every epoch."""

_NOISE = (
    r".?torch\.cuda\.amp\.",
    r"'pin_memory' argument is set as true but no accelerator",
    r"(?s).*\bhydra\b",
    r"Support for mismatched key_padding_mask and attn_mask",
)
"""Warnings that fairseq causes by its age, and by pinning memory for no GPU."""


def install() -> None:
    """Let fairseq's trainer know of sparsity, its commands of our errors, and torch of the options in its checkpoints.

    Called when one of our tasks is set up. A second call changes nothing.
    """
    trainer.install()
    # fairseq's own commands know nothing of our errors, which are made to be read without a traceback.
    sys.excepthook = _without_traceback
    # fairseq puts its options into checkpoints as they come from the command line.
    torch.serialization.add_safe_globals([argparse.Namespace])
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)


class SparseTask:
    """What both tasks add to fairseq's own; a mixin that stands in front of them."""

    nm_stop = False
    """Set on every rank at once after one of them got a signal of `STOPS`: the update is finished, saved, and training
    ends."""
    _nm_came = Stop()

    @property
    def nm_signal(self) -> int:
        """The one that came, if it came to this rank; else SIGTERM."""
        return self._nm_came.number or signal.SIGTERM

    @property
    def nm_config(self) -> Any:
        """The task's config, which fairseq's older tasks call ``args``."""
        return self.cfg if self.cfg is not None else self.args  # type: ignore[attr-defined]

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> Any:
        """As fairseq's, after `install` and after checking that the data is there."""
        install()
        _check_data(cfg)
        return super().setup_task(cfg, **kwargs)  # type: ignore[misc]

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> torch.nn.Module:
        """fairseq's model, sparsified in place.

        Raises:
            SparsityError: for half-precision training through copies of the weights, which the decay cannot reach.
        """
        if not from_checkpoint:
            _check_precision(self.nm_config)
        model: torch.nn.Module = super().build_model(cfg, from_checkpoint)  # type: ignore[misc]
        config = sparsity_config(self.nm_config)
        if not config.include:
            names = {name for name, _ in model.named_modules()}
            config = replace(config, include=tuple(name for name in LAYERS if name in names))
        report = config.sparsify(model, total_steps=self.nm_config.max_update or None)
        if not from_checkpoint:
            logger.info("sparsity:\n%s", report)
        return model

    def begin_epoch(self, epoch: int, model: torch.nn.Module) -> None:
        """From here on SIGTERM and Ctrl-C end training with a checkpoint; a second one ends it at once."""
        super().begin_epoch(epoch, model)  # type: ignore[misc]
        for name in FIGURES:
            if (meter := metrics.get_meter("train", name)) is not None:
                meter.val = math.nan  # until it is measured; fairseq's None is no number for its log and TensorBoard
        if "_nm_came" not in vars(self):
            self._nm_came = Stop()
            self._nm_came.catch()

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """fairseq's, with word of a signal among the figures that it sums over the ranks anyway."""
        loss, sample_size, logging_output = super().train_step(*args, **kwargs)  # type: ignore[misc]
        return loss, sample_size, {**logging_output, "nm_stop": float(self._nm_came.number)}

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """fairseq's; every rank sees the same sum here, so all stop after the same update."""
        super().reduce_metrics(logging_outputs, criterion)  # type: ignore[misc]
        self.nm_stop |= sum(float(output.get("nm_stop", 0)) for output in logging_outputs) > 0

    def post_save(self, path: str, num_updates: int) -> None:
        """After a checkpoint and its copies are written: leave with status 143 or 130, if a signal asked for it."""
        if self.nm_stop:
            how = STOPS[signal.Signals(self.nm_signal)]
            logger.info("%s at update %d; the same command resumes from %s", how, num_updates, path)
            raise SystemExit(128 + self.nm_signal)

    def optimizer_step(self, optimizer: Any, model: torch.nn.Module, update_num: int) -> None:
        """fairseq's; every ``--log-interval`` updates with this update's SAD and flip rate, and lambda * sum(lr)."""
        due = (update_num + 1) % self.nm_config.log_interval == 0
        tracker = MaskTracker(trainer.unwrap(model)) if due else None
        super().optimizer_step(optimizer, model, update_num)  # type: ignore[misc]
        if tracker is not None:
            flips = tracker.update()
            if flips.sad:
                metrics.log_scalar("sad", flips.total_sad, priority=600, round=0)
                metrics.log_scalar("flip_rate", flips.rate, priority=601, round=6)
            if (strength := decay_strength(trainer.unwrap(model))) is not None:
                # Of weight 0: the latest, not the mean.
                metrics.log_scalar("decay_strength", strength, weight=0, priority=602, round=6)

    def valid_step(self, sample: Any, model: torch.nn.Module, criterion: Any) -> Any:
        """fairseq's, with each mask computed once."""
        with frozen(model):
            return super().valid_step(sample, model, criterion)  # type: ignore[misc]

    def inference_step(self, generator: Any, models: list[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        """fairseq's, with each mask computed once for all decoding steps of a batch."""
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(frozen(model))
            return super().inference_step(generator, models, *args, **kwargs)  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """What fairseq keeps of a task in checkpoints: with it, digests of the dictionaries."""
        return {**super().state_dict(), DICTIONARIES: _digests(self)}  # type: ignore[misc]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check and take what `state_dict` returned.

        Raises:
            CheckpointError: if the model was trained with other dictionaries.
        """
        check_dictionaries(self, state_dict)
        super().load_state_dict(  # type: ignore[misc]
            {key: value for key, value in state_dict.items() if key != DICTIONARIES}
        )


@register_task("nm_translation", dataclass=add_options(TranslationConfig))
class NMTranslationTask(SparseTask, TranslationTask):
    """fairseq's ``translation`` with an N:M sparse Transformer."""


@register_task("nm_language_modeling", dataclass=add_options(LanguageModelingConfig))
class NMLanguageModelingTask(SparseTask, LanguageModelingTask):
    """fairseq's ``language_modeling`` with an N:M sparse Transformer."""


def check_dictionaries(task: Any, state_dict: dict[str, Any]) -> None:
    """Check that `task`, ours or fairseq's own, has the dictionaries of the checkpoint with the ``task_state`` given.

    Raises:
        CheckpointError: if the model was trained with others.
    """
    there, here = state_dict.get(DICTIONARIES), _digests(task)
    if there is not None and there != here:
        sides = [side for side in here if there.get(side) != here[side]]
        raise CheckpointError(
            f"the checkpoint was trained with another {' and '.join(sides)} dictionary than this data has; give the "
            "folder that it was trained on"
        )


def _digests(task: Any) -> dict[str, str]:
    sides: dict[str, Dictionary] = {"source": task.source_dictionary, "target": task.target_dictionary}
    return {
        side: hashlib.sha256("\n".join(dictionary.symbols).encode()).hexdigest() for side, dictionary in sides.items()
    }


def _check_precision(config: Any) -> None:
    for name in ("fp16", "bf16"):
        if getattr(config, name) and not getattr(config, f"memory_efficient_{name}"):
            raise SparsityError(
                f"--{name} trains a copy of the weights, where the decay of dropped weights cannot reach; use --amp "
                f"(or --memory-efficient-{name}, which rounds the decay)"
            )
    if config.ddp_backend in ("fully_sharded", "slowmo"):
        raise SparsityError(
            f"--ddp-backend {config.ddp_backend} flattens the weights, and groups of M are lost; use pytorch_ddp or "
            "legacy_ddp"
        )


def _check_data(config: Any) -> None:
    """A clear line for what is fairseq's FileNotFoundError or failed inference of the languages."""
    folder = Path(str(config.data).split(":")[0])
    kind, files = ("translation", "dict.*.txt") if hasattr(config, "source_lang") else ("a language model", "dict.txt")
    dictionaries = sorted(path.name for path in folder.glob(files))
    if not dictionaries:
        raise SparsityError(
            f"{folder} holds no data for {kind} (no {files}); make some with "
            "python -m nm_sparsity.translation.prepare and give its bin folder"
        )
    languages = [getattr(config, f"{side}_lang", None) for side in ("source", "target")]
    for language in filter(None, languages):
        if f"dict.{language}.txt" not in dictionaries:
            there = ", ".join(name.removeprefix("dict.").removesuffix(".txt") for name in dictionaries)
            raise SparsityError(f'{folder} has no data in the language "{language}"; it has {there}')


_stock_excepthook = sys.excepthook


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, SparsityError):
        print(f"error: {error}", file=sys.stderr)
    else:
        _stock_excepthook(kind, error, trace)
