"""Methods side by side: ``python -m nm_sparsity.classification.study RECIPE``.

The test images are looked at once, at the end of each run; where there are none, no lambda is chosen. Runs that are
finished are not repeated, interrupted ones go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nm_sparsity.classification import configs
from nm_sparsity.classification.checkpoints import LATEST
from nm_sparsity.classification.data import load_splits
from nm_sparsity.classification.train import SUMMARY
from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.conduct import study_command
from nm_sparsity.core.experiments.plots import Curve
from nm_sparsity.core.experiments.run import read_metrics
from nm_sparsity.core.experiments.study import Column, Plot, Result, Run, Study, read_json


def _curve(x: str, y: str, run: Path) -> Curve:
    return [(line[x], line[y]) for line in read_metrics(run) if y in line]


@dataclass(frozen=True)
class ImageStudy(Study):
    """Runs of one recipe of `nm_sparsity.classification`."""

    recipe: tyro.conf.Positional[str] = "digits_dense"
    """The recipe whose data, model and optimizer all runs share."""
    patterns: tuple[str, ...] = ("2:4", "1:8")
    """The N:M patterns."""
    length: Annotated[int, tyro.conf.arg(name="epochs")] = 30
    """Epochs of each run; ASP fine-tunes for as many after its dense run."""
    images: int | None = None
    """Train on so many of the training images; None is all of them."""
    log_every: int = 10
    """Steps between two comparisons of masks."""

    unit = "epochs"
    result = SUMMARY
    checkpoint = LATEST
    progress = r"^epoch (\d+)/"
    columns = (
        Column("test top-1 %", lambda r: r["test/top1"], digits=2),
        Column("density", lambda r: r["model_density"], digits=4, spread=False),
        Column("flips/weight", lambda r: r["flips_per_weight"], 4, spread=False),
        Column("lambda*sum(lr)", lambda r: r["decay_strength"], digits=3, spread=False),
    )
    plots = (
        Plot("accuracy.png", "epoch", "validation top-1 (%)", lambda run: _curve("epoch", "val/top1", run)),
        Plot("sad.png", "step", "SAD per sparse weight and step", lambda run: _curve("step", "flip_rate", run), 1e-5),
    )

    @property
    def title(self) -> str:
        return self.recipe

    def prepare(self) -> None:
        data = configs.get(self.recipe).data
        splits = load_splits(data)  # A missing data set is one message now, not one for each run.
        if splits.val is splits.test and any(len(by_decay) > 1 for by_decay in self.candidates().values()):
            raise SparsityError(
                f"{data.root} has no test part, so lambda would be chosen on the very images that are reported: add "
                "test/CLASS/ folders, or give a single one with --decays"
            )

    def commands(self, run: Run) -> list[list[str]]:
        changes = [f"--epochs={run.steps}", f"--log-every={self.log_every}"]
        changes += [] if self.images is None else [f"--data.images={self.images}"]
        return [["nm_sparsity.classification.train", self.recipe, *self.options(run), *changes]]

    def validation(self, run: Path) -> float:
        return float(read_json(run / SUMMARY)["val/top1"])

    def notes(self, results: Sequence[Result]) -> list[str]:
        images = results[0]["test/images"]
        return [
            "Top-1 is that of the weights after the last epoch. "
            f"One of the {images:,} test images is {100 / images:.2f} points; differences of that size mean nothing.",
            "Density is that of the whole model. Flips/weight is SAD per sparse weight summed over all steps, from "
            f"every {self.log_every}th step.",
            f"These runs took {sum(result['seconds'] for result in results):.0f} s of training together.",
        ]


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Run or continue the study that the arguments describe, and print its table."""
    study_command(ImageStudy, arguments, "python -m nm_sparsity.classification.study")


if __name__ == "__main__":
    sys.exit(main())
