"""Training: ``python -m nm_sparsity.classification.train CONFIG [overrides]``, alone or under torchrun."""

from __future__ import annotations

import io
import math
import signal
import sys
import time
import warnings
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nm_sparsity.classification import PACKAGES, distributed
from nm_sparsity.classification.checkpoints import BEST, CLASSES, LATEST, check_names, find
from nm_sparsity.classification.configs import RECIPES, ClassifierConfig, OptimizerConfig
from nm_sparsity.classification.console import Console
from nm_sparsity.classification.data import eval_batches, load_splits, part_size, steps_per_epoch, train_batches
from nm_sparsity.classification.evaluate import Accuracy, autocast, count
from nm_sparsity.classification.models import build, load_pretrained
from nm_sparsity.core import (
    CheckpointError,
    DecayChoice,
    MaskTracker,
    SparsityConfig,
    SparsityError,
    choose_decay,
    load_sparsity_state,
    sparsity_state,
)
from nm_sparsity.core.experiments.command_line import STOPS, Stopped, command_line, stopping
from nm_sparsity.core.experiments.decay import with_chosen_decay
from nm_sparsity.core.experiments.finalize import finalize_and_check, save_finalized
from nm_sparsity.core.experiments.folders import held
from nm_sparsity.core.experiments.recipes import difference
from nm_sparsity.core.experiments.run import FINALIZED, Run, forget_metrics_after, write_json
from nm_sparsity.core.experiments.user_model import parse_arguments
from nm_sparsity.core.files.checkpoint import restore, split
from nm_sparsity.core.files.io import load, save
from nm_sparsity.core.files.metadata import DAMAGE, METADATA, find_parts
from nm_sparsity.core.model.convert import unfinished
from nm_sparsity.core.model.strength import planned_strength, warn_if_strength_is_weak
from nm_sparsity.core.training.auto_decay import decay_of_strength, probe_steps

SUMMARY = "summary.json"
"""Written last: a run folder that has it is complete."""


def train(config: ClassifierConfig, progress: bool = True) -> dict[str, Any]:
    """Train as `config` says, evaluate, finalize, verify; returns what summary.json in the run folder holds.

    Raises:
        SparsityError: for anything the user can fix; checkpoints written so far stay.
    """
    with held(config.folder), distributed.processes(config.device) as device:
        config = replace(config, sparsity=_with_chosen_decay(config, device))
        return Trainer(config, device, progress).fit()


def _with_chosen_decay(config: ClassifierConfig, device: torch.device) -> SparsityConfig:
    def choose() -> DecayChoice:
        trainer = Trainer(replace(config, sparsity=config.sparsity.with_decay(0.0)), device, progress=False)
        if config.optimizer.name == "sgd":
            return decay_of_strength(trainer.lr)
        return choose_decay(probe, config.sparsity, probe_steps(len(trainer.lr)))

    def probe(sparsity: SparsityConfig) -> None:
        with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            Trainer(replace(config, sparsity=sparsity, folder=Path(folder), resume=False), device, False).fit()

    return with_chosen_decay(config.sparsity, config.folder, config.resume, choose, distributed.rank() == 0)


def learning_rates(config: ClassifierConfig, steps_per_epoch: int) -> list[float]:
    """The learning rate of each optimizer step: linear warm-up, then half a cosine to zero."""
    total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return [config.optimizer.lr * factor(step) for step in range(total)]


@dataclass
class Position:
    """How far a run is: the next step is number `step` of the whole run."""

    step: int = 0
    best: float = -1.0
    """The best top-1 on the validation images so far."""
    loss: float = 0.0
    """Sum of the training losses of the epoch that is not evaluated yet."""
    losses: int = 0
    """How many steps those are: all of the epoch's, if it was saved after its last one."""
    seconds: float = 0.0
    flips: float = 0.0
    """Sum of the flip rates of the steps at which masks were compared."""
    compared: int = 0


class Trainer:
    """A run from its config to its summary. All that training changes is saved by `_save` and read by `_resume`."""

    def __init__(self, config: ClassifierConfig, device: torch.device, progress: bool) -> None:
        self.config, self.device = config, device
        part_size(config)
        self._check_folder()
        self.splits = load_splits(config.data)
        self.steps_per_epoch = steps_per_epoch(self.splits.train, config)
        self.lr = learning_rates(config, self.steps_per_epoch)
        self.console = Console(config, self.lr, self.steps_per_epoch, progress)
        self.strength = planned_strength(config.sparsity.make_method(), self.lr)

        torch.manual_seed(config.seed)
        self.model = self._initial_model()
        self.report = config.sparsity.sparsify(self.model, total_steps=len(self.lr))
        self.format = torch.channels_last if config.channels_last else torch.preserve_format
        self.model.to(device).to(memory_format=self.format)
        self.ema = None
        if config.ema is not None:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self.optimizer = _optimizer(self.model, config.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.position = Position()
        self.saved: int | None = None
        """The step of the checkpoint to resume from."""
        self.planned: int | None = None
        """The epochs that a resumed run was to take."""
        # Dropout differs between processes; initial weights do not.
        torch.manual_seed(config.seed + distributed.rank())
        if config.resume:
            self._resume()
        self.parallel = self.model
        if distributed.world() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=ids)

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the moving average, if there is one, where its method is in the run."""
        if self.ema is None:
            return self.model
        load_sparsity_state(self.ema.module, sparsity_state(self.model))
        return self.ema.module

    def fit(self) -> dict[str, Any]:
        """Train from the current position to the end, then `_finish`."""
        config, first = self.config, self.position.step
        folder = config.folder if distributed.rank() == 0 else None
        with (
            stopping() as self.stopping,
            Run(folder, config.to_dict(), config.seed, config.resume, PACKAGES) as run,
            self.console.bar(first) as bar,
        ):
            self.console.say(self.report.summary())
            self.console.begin(first, self.planned)
            if self.strength is not None:
                self.console.say(f"lambda * sum(lr) of the planned {len(self.lr)} steps: {self.strength:.3g}")
                if config.optimizer.name == "sgd":
                    warn_if_strength_is_weak(self.strength)
            run.log(first, {"decay_strength_planned": self.strength, "sparse_density": self.report.sparse_density})
            try:
                # An epoch that was saved after its last step is evaluated first.
                for epoch in range((first - self.position.losses) // self.steps_per_epoch, config.epochs):
                    self._epoch(epoch, run, bar)
                return self._finish(run)
            except KeyboardInterrupt:
                self.console.stopped(STOPS[signal.SIGINT], self.position.step, self.saved)
                raise Stopped from None

    def _epoch(self, epoch: int, run: Run, bar: Any) -> None:
        config, here = self.config, self.position
        self.model.train()
        batches = train_batches(self.splits.train, config, epoch, here.step - epoch * self.steps_per_epoch)
        loss, since, steps = torch.zeros((), device=self.device), time.perf_counter(), 0
        total = torch.tensor(here.loss, device=self.device)
        for parts in batches:
            due = (here.step + 1) % config.log_every == 0
            tracker = MaskTracker(self.model) if due and self.report.sparse else None
            step_loss = self._step(parts, self.lr[here.step])
            loss, total = loss + step_loss, total + step_loss
            here.step, here.losses, steps = here.step + 1, here.losses + 1, steps + 1
            bar.update()
            if due:
                mean = self._finite(loss / steps)
                values = {"epoch": here.step / self.steps_per_epoch, "loss": mean, "lr": self.lr[here.step - 1]}
                values |= self._flips(tracker) if tracker else {}
                seconds = time.perf_counter() - since
                here.seconds += seconds
                speed = steps * config.batch_size / seconds
                run.log(here.step, {**values, "images_per_s": speed})
                self.console.progress(bar, here.step, mean, speed)
                loss, since, steps = torch.zeros_like(loss), time.perf_counter(), 0
            if number := self._stopped(due):
                here.loss = self._finite(total)
                self._save(LATEST)
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                self.console.stopped(STOPS[number], here.step, self.saved)
                raise SystemExit(128 + number)
            if config.checkpoint_every and here.step % config.checkpoint_every == 0:
                here.loss = self._finite(total)
                self._save(LATEST)
        mean = self._finite(total) / max(here.losses, 1)
        here.seconds += time.perf_counter() - since
        accuracy = self._evaluate()
        self.console.say(
            f"epoch {epoch + 1}/{config.epochs}: train loss {mean:.4f}, val loss {accuracy.loss:.4f}, "
            f"val top-1 {accuracy.top1:.2f}%"
        )
        yet = unfinished(self.evaluated)
        best = bool(yet) or accuracy.top1 > here.best
        here.best = -1.0 if yet else max(here.best, accuracy.top1)  # the best of those that are N:M
        here.loss, here.losses = 0.0, 0
        self._save(LATEST, *([BEST] if best else []))
        run.log(here.step, {"epoch": epoch + 1, "train/loss": mean, **_named("val", accuracy)})

    def _step(self, parts: list[tuple[Tensor, Tensor]], lr: float) -> Tensor:
        """One optimizer step on the mean loss over `parts`, which it returns."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for i, (images, labels) in enumerate(parts):
            images = images.to(self.device, memory_format=self.format, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            wait = isinstance(self.parallel, DistributedDataParallel) and i < len(parts) - 1
            with self.parallel.no_sync() if wait else nullcontext():  # type: ignore[operator]
                with autocast(self.device, config.amp):
                    logits = self.parallel(images)
                    loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing) / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if config.optimizer.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return total

    def _finite(self, loss: Tensor) -> float:
        """The mean of `loss` over all processes.

        Raises:
            SparsityError: if it is not finite, in every process alike.
        """
        mean = float(distributed.total(loss.detach().clone())) / distributed.world()
        if not math.isfinite(mean):
            raise self._diverged(f"the loss became {mean}")
        return mean

    def _diverged(self, what: str) -> SparsityError:
        kept = self.config.folder / LATEST
        return SparsityError(
            f"{what} by step {self.position.step}; "
            + (f"{kept} holds the last good state. " if kept.is_file() else "")
            + "Lower --optimizer.lr, set --optimizer.clip-norm 1"
            + (", or use --amp bf16" if self.config.amp == "fp16" else "")
        )

    def _flips(self, tracker: MaskTracker) -> dict[str, float]:
        flips = tracker.update()
        self.position.flips += flips.rate
        self.position.compared += 1
        layers = {f"sad/{name}": sad for name, sad in flips.sad.items()}
        rates = {f"flip_rate/{name}": rate for name, rate in flips.rates().items()}
        return {"sad": flips.total_sad, "flip_rate": flips.rate, **layers, **rates}

    def _evaluate(self) -> Accuracy:
        distributed.average_buffers(self.evaluated)
        images = eval_batches(self.splits.val, self.config)
        return count(self.evaluated, images, self.device, self.splits.classes, self.config.amp)[0]

    def _finish(self, run: Run) -> dict[str, Any]:
        """Evaluate, finalize a copy, verify it, evaluate that too; write finalized.pt and the summary."""
        config = self.config

        def score(model: nn.Module) -> dict[str, float]:
            images = eval_batches(self.splits.test, config)
            return asdict(count(model, images, self.device, self.splits.classes, config.amp)[0])

        distributed.average_buffers(self.evaluated)
        with warnings.catch_warnings():
            # That lambda is small was said when the run was planned.
            warnings.filterwarnings("ignore", message=r"lambda \* sum\(lr\) is")
            done = finalize_and_check(self.evaluated, score, gpu_tolerance=0.1)
        final, again = Accuracy(**done.score), Accuracy(**done.again)
        val = final if self.splits.val is self.splits.test else self._evaluate()
        report, verified = done.report, len(done.verification.checked)
        flip_rate = self.position.flips / self.position.compared if self.position.compared else None
        summary = {
            "config": config.to_dict(),
            **_named("test", final),
            **_named("finalized", again),
            **_named("val", val),
            "sparse_weights": sum(w.size for w in self.report.sparse),
            "sparse_density": report.sparse_density,
            "model_density": report.model_density,
            "verified_weights": verified,
            "flip_rate": flip_rate,
            "flips_per_weight": None if flip_rate is None else flip_rate * self.position.step,
            "decay_strength": self.strength,
            "steps": self.position.step,
            "seconds": self.position.seconds,
        }
        if distributed.rank() == 0:
            beside = {"config": config.to_dict(), CLASSES: list(self.splits.names)}
            save_finalized(done.model, config.folder / FINALIZED, **beside)
            write_json(config.folder / SUMMARY, summary)
        run.log(self.position.step, _named("test", final))
        images = "test images" if self.splits.val is not self.splits.test else "val images (there is no test part)"
        self.console.say(
            f"top-1 {final.top1:.2f}%, finalized {again.top1:.2f}% on {final.images} {images}; "
            f"{verified} sparse weights verified; density {report.model_density:.3f}"
        )
        self.console.wrote((FINALIZED, SUMMARY, BEST, LATEST), self.position.best)
        return summary

    def _stopped(self, waiting: bool) -> signal.Signals | None:
        """The signal that came, if one did. Several processes ask each other where they are `waiting` for each other
        anyway."""
        number = self.stopping()
        if distributed.world() > 1:
            if not waiting or not distributed.total(torch.tensor(float(number), device=self.device)):
                return None
            number = number or signal.SIGTERM
        return signal.Signals(number) if number else None

    def _initial_model(self) -> nn.Module:
        config = self.config
        model = build(config.model, self.splits.classes, parse_arguments(config.args))
        if ":" in config.model:
            self._check_shape(model)
        if config.resume:
            return model  # what it started from may be gone; the checkpoint has all of it
        if config.pretrained:
            if fresh := load_pretrained(model, config.model, config.pretrained):
                self.console.say(f"{', '.join(fresh)} start untrained: {config.pretrained} is for other classes")
        elif config.init_from:
            path = find(config.init_from)
            restore(model, find_parts(load(path), path)[0])
        elif config.sparsity.make_method().starts_trained:
            raise SparsityError(
                f"{config.sparsity.method} prunes a trained dense model: train one (e.g. the same recipe with --method "
                "dense) and give it with --init-from RUN, or use --pretrained"
            )
        return model

    def _check_shape(self, model: nn.Module) -> None:
        """See that a model of the user's takes these images and tells these classes apart, before it trains."""
        images = self.splits.val.take([0], augment=False)[0]
        training = model.training
        try:
            with torch.no_grad():
                found = model.eval()(images)
        except Exception as error:  # Whatever a user's model raises.
            raise SparsityError(f"{self.config.model} does not take images {tuple(images.shape)}: {error}") from error
        model.train(training)
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != (1, self.splits.classes):
            raise SparsityError(
                f"{self.config.model} gives {shape} for an image, expected (1, {self.splits.classes}), a number for "
                "each class; say how many there are with --args"
            )

    def _check_folder(self) -> None:
        latest = self.config.folder / LATEST
        if self.config.resume and not latest.is_file():
            raise CheckpointError(f"cannot resume: there is no {latest}; leave --resume out to start")
        if not self.config.resume and latest.is_file():
            raise SparsityError(
                f"{self.config.folder} holds a run already: continue it with --resume, or choose another --out"
            )

    def _save(self, *names: str) -> None:
        """Write the run's state; its ``state_dict`` is that of the evaluated model, sparse as it stands."""
        self._check_weights()
        distributed.average_buffers(self.model)
        generators = distributed.gather(torch.get_rng_state())
        if distributed.rank() > 0:
            return
        payload: dict[str, Any] = {"config": self.config.to_dict(), CLASSES: list(self.splits.names)}
        payload["state_dict"], payload[METADATA] = split(self.evaluated)
        training: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": asdict(self.position),
            "generators": generators,
        }
        if self.ema is not None:
            state, metadata = split(self.model)
            training["model"] = {
                "state_dict": state,
                METADATA: metadata,
                "averaged": int(self.ema.n_averaged),
            }
        for name in names:
            save(self.config.folder / name, {**payload, "training": training})
        self.saved = self.position.step

    def _check_weights(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self._diverged("the weights became infinite or NaN")

    def _resume(self) -> None:
        path = self.config.folder / LATEST
        payload = load(path)
        try:
            self._resume_from(path, payload)
        except SparsityError:
            raise
        except (*DAMAGE, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a checkpoint to resume from ({error!r:.200})") from error
        if distributed.rank() == 0:
            forget_metrics_after(self.config.folder, self.position.step)

    def _resume_from(self, path: Path, payload: Any) -> None:
        changed = difference(payload["config"], self.config)
        if changed:
            raise SparsityError(f"{path} is of a run with another config ({'; '.join(changed)}); choose another --out")
        check_names(path, payload.get(CLASSES), self.splits.names)
        training = payload["training"]
        self.planned = payload["config"]["epochs"]
        if training["position"]["step"] > len(self.lr):
            done = training["position"]["step"] / self.steps_per_epoch
            raise SparsityError(
                f"{path} has trained {done:.4g} epochs already, more than --epochs {self.config.epochs}"
            )
        restore(self.evaluated, payload["state_dict"], payload[METADATA])
        if self.ema is not None:
            averaged = training["model"]
            restore(self.model, averaged["state_dict"], averaged[METADATA])
            self.ema.n_averaged.fill_(training["model"]["averaged"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        self.position = Position(**training["position"])
        self.saved = self.position.step
        if distributed.rank() < len(training["generators"]):
            torch.set_rng_state(training["generators"][distributed.rank()])
        self._check_weights()


def _optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
    )


def _named(prefix: str, accuracy: Accuracy) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in asdict(accuracy).items()}


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Train a recipe with its overrides: `arguments`, by default the command line's."""
    given = sys.argv[1:] if arguments is None else arguments
    train(RECIPES.from_command_line(given, "python -m nm_sparsity.classification.train")[0])


if __name__ == "__main__":
    sys.exit(main())
