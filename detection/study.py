"""Methods and patterns over seeds on composed pictures: ``python -m nm_sparsity.detection.study {fashion,composed}``.

Runs that are finished are not repeated, interrupted ones go on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.conduct import study_command
from nm_sparsity.core.experiments.plots import Curve
from nm_sparsity.core.experiments.run import EVALUATION
from nm_sparsity.core.experiments.study import Column, Plot, Result, Run, Study
from nm_sparsity.detection import config as configs
from nm_sparsity.detection import prepare

AP = "coco/bbox_mAP"
"""Box AP in MMEngine's log, from 0 to 1."""


def scalars(run: Path) -> list[dict[str, Any]]:
    """MMEngine's log of a run, in order: training lines have "loss", validation lines "coco/bbox_mAP"."""
    files = sorted(run.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def validation_ap(run: Path) -> float:
    """Box AP in percent on the validation split after the last epoch; MMDetection logs none where it finds nothing."""
    return 100 * float([line for line in scalars(run) if "loss" not in line][-1].get(AP, 0.0))


def _curve(run: Path, key: str, scale: float = 1.0) -> Curve:
    return [(line["step"], scale * line[key]) for line in scalars(run) if key in line]


def _column(kind: str, number: str) -> Column:
    return Column(f"{kind} {number}", lambda result: result.get(kind, {}).get(number))


_IN_EPOCHS = ("begin", "end", "T_max", "milestones", "step_size", "periods")
"""What a scheduler that goes by epochs counts in them."""


def _schedules(config: Any, epochs: int) -> Iterator[str]:
    """Overrides that fit the schedules of `config` which go by epochs to a run of so many."""
    own, planned = config.get("param_scheduler") or [], config.train_cfg.max_epochs
    named = {"": own} if isinstance(own, Mapping) else {f".{index}": scheduler for index, scheduler in enumerate(own)}

    def scaled(value: Any, least: int) -> Any:
        if isinstance(value, list | tuple):
            return [scaled(one, least) for one in value]
        return max(least, value * epochs // planned)

    for name, scheduler in named.items():
        for key in _IN_EPOCHS:
            if scheduler.get("by_epoch", True) and key in scheduler:
                least = 0 if key == "begin" else 1
                yield f"param_scheduler{name}.{key}={scaled(scheduler[key], least)}"


@dataclass(frozen=True)
class DetectionStudy(Study):
    """Runs of one config on one data set."""

    pictures: tyro.conf.Positional[Literal["fashion", "composed"]] = "fashion"
    """The pictures to make where `data` holds none: Fashion-MNIST's items, or digits, on photographs."""
    out: Path = Path("runs/study-detection")
    """The folder of the runs, the report, the raw results and the pictures."""
    data: Path | None = None
    """A folder that prepare wrote, or is to write; default: one in data/ named after the pictures."""
    config: str = "tiny_mask_rcnn"
    """The config that all runs share."""
    patterns: tuple[str, ...] = ("2:4", "2:8")
    """The N:M patterns."""
    length: Annotated[int, tyro.conf.arg(name="epochs")] = 6
    """Epochs of each run; ASP goes on for as many after its dense run."""

    unit = "epochs"
    result = EVALUATION
    checkpoint = "last_checkpoint"
    progress = r"Saving checkpoint at (\d+) epochs"
    columns = tuple(_column(kind, number) for kind in ("box", "mask") for number in ("AP", "AP50", "AP75"))
    plots = (
        Plot("loss.png", "iteration", "training loss", lambda run: _curve(run, "loss")),
        Plot("box-ap.png", "epoch", "box AP on the validation split, percent", lambda run: _curve(run, AP, 100)),
        Plot("flip-rate.png", "iteration", "flip rate of one iteration", lambda run: _curve(run, "flip_rate"), 1e-5),
    )

    @property
    def title(self) -> str:
        return f"{self.config} on {self.folder.name}"

    @property
    def folder(self) -> Path:
        """Where the data set lies."""
        return self.data or Path("data") / f"study-{self.pictures}"

    @cached_property
    def base(self) -> Any:
        """The config that all runs share, read.

        Raises:
            SparsityError: if it cannot be read, or does not train by epochs.
        """
        config = configs.read(self.config)
        if not config.train_cfg.get("max_epochs"):
            raise SparsityError(f"{self.config} does not train by epochs (train_cfg.max_epochs), as a study does")
        return config

    def prepare(self) -> None:
        _ = self.base  # What is wrong with it is one message now, not one after pictures are drawn.
        if not (self.folder / "annotations" / "instances_test.json").exists():
            if self.pictures == "fashion":
                prepare.fashion(self.folder, train=1600, val=200, size=128)
            else:
                prepare.composed(self.folder, train=1400)

    def commands(self, run: Run) -> list[list[str]]:
        changes = [
            f"train_cfg.max_epochs={run.steps}",
            f"train_cfg.val_interval={max(1, run.steps // 6)}",
            *_schedules(self.base, run.steps),
        ]
        if run.start:
            changes.append(f"load_from={self.out / run.start.name}/epoch_{run.start.steps}.pth")
        options = [f"--data={self.folder}", *self.options(replace(run, start=None))]
        return [
            ["nm_sparsity.detection.train", self.config, *changes, *options],
            ["nm_sparsity.detection.evaluate", str(self.out / run.name)],
        ]

    def validation(self, run: Path) -> float:
        return validation_ap(run)

    def notes(self, results: Sequence[Result]) -> list[str]:
        verified = sorted({result["verified"] for result in results if "verified" in result})
        return [f"AP in percent, on the test split of {results[0]['images']} pictures.", *(f"{v}." for v in verified)]


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Run or continue the study that the arguments describe, and print its table."""
    study_command(DetectionStudy, arguments, "python -m nm_sparsity.detection.study")


if __name__ == "__main__":
    sys.exit(main())
