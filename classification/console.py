"""What a run says on the way: where it writes, how it goes within an epoch, and how a stopped one goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nm_sparsity.classification import distributed
from nm_sparsity.classification.checkpoints import LATEST
from nm_sparsity.classification.configs import ClassifierConfig
from nm_sparsity.core.experiments.run import METRICS


class Console:
    """The first process's lines and bar, if they are wanted at all.

    Args:
        lr: the learning rate of each step of the whole run.
        steps: of an epoch.
    """

    def __init__(self, config: ClassifierConfig, lr: Sequence[float], steps: int, wanted: bool) -> None:
        self._config, self._lr, self._steps = config, lr, steps
        self._wanted = wanted and distributed.rank() == 0

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._wanted:
            tqdm.write(line)

    def bar(self, first: int) -> Any:
        """A progress bar from step `first` on; only a terminal shows it."""
        hidden = None if self._wanted else True
        return tqdm(total=len(self._lr), initial=first, unit="step", desc=str(self._config.folder), disable=hidden)

    def begin(self, first: int, planned: int | None) -> None:
        """Say where the run writes and where it begins; `planned` epochs are what it was to take, if it is resumed."""
        config, folder = self._config, self._config.folder
        asked, warmup = config.optimizer.warmup_epochs, config.warmup_epochs
        if warmup != asked:
            self.say(f"the warm-up of {asked:g} epochs is longer than the run: it takes {warmup:g} epochs")
        if planned is None:
            self.say(f"writing {METRICS}, TensorBoard's events and, after every epoch, {LATEST} into {folder}")
            return
        self.say(f"resuming after {self._place(first)} from {folder / LATEST}")
        if planned != config.epochs and first < len(self._lr):
            self.say(
                f"the run was planned for {planned} epochs and takes {config.epochs} now: from here every schedule is "
                f"that of the longer run; the learning rate goes on at {self._lr[first]:.3g}"
            )

    def progress(self, bar: Any, step: int, loss: float, speed: float) -> None:
        """How it goes, at `speed` images a second: beside the bar, or where there is none on a line of its own."""
        how = f"loss {loss:.4f}, lr {self._lr[step - 1]:.3g}, {speed:.4g} images/s"
        bar.set_postfix_str(how, refresh=False)
        if bar.disable:
            left = tqdm.format_interval((len(self._lr) - step) * self._config.batch_size / speed)
            self.say(f"step {step}/{len(self._lr)}: {how}, {left} left")

    def stopped(self, how: str, step: int, saved: int | None) -> None:
        """Say how a run that stops after `step` goes on from its checkpoint after step `saved`, if it has one."""
        left = "nothing is saved yet"
        if saved is not None:
            command = f"python -m nm_sparsity.classification.train {self._config.folder} --resume"
            left = f"after step {saved} it goes on with {command}"
        self.say(f"{how} after {self._place(step)}; {left}")

    def wrote(self, names: Sequence[str], best: float) -> None:
        """Say what lies in the run folder at the end, and what to do with it."""
        folder: Path = self._config.folder
        self.say(f"wrote {', '.join(names)} into {folder}; the best val top-1 of an epoch was {best:.2f}%")
        model = f" --model {self._config.model}" if ":" in self._config.model else ""  # code is named by its user
        self.say(f"try it: python -m nm_sparsity.classification.predict {folder}{model} PICTURE ...")

    def _place(self, step: int) -> str:
        return f"step {step} of {len(self._lr)} (epoch {step / self._steps:.4g} of {self._config.epochs})"
