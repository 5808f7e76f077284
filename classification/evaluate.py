"""Accuracy of a model or a checkpoint, by class too: ``python -m nm_sparsity.classification.evaluate PATH``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from nm_sparsity.classification import distributed
from nm_sparsity.classification.checkpoints import Trained
from nm_sparsity.classification.data import eval_batches, load_splits
from nm_sparsity.core import SparsityError, frozen
from nm_sparsity.core.experiments.command_line import command_line, present_names
from nm_sparsity.core.experiments.folders import results_folder, what_was_written
from nm_sparsity.core.experiments.run import EVALUATION, write_json
from nm_sparsity.core.table import format_table

MOST_CLASSES = 20
"""How many classes are shown one by one; of more, the worst ones."""


@dataclass(frozen=True)
class Accuracy:
    """Means over `images` images; `top1` and `top5` in percent (top-5 is top-k where there are only k < 5 classes)."""

    loss: float
    top1: float
    top5: float
    images: int


class Tally:
    """What is counted while a model is evaluated, over all processes."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self._classes = classes

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (n, classes) and labels (n,)."""
        ranked = logits.topk(min(5, logits.shape[1])).indices
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self._sums += torch.stack([loss, (ranked == labels[:, None]).sum()])
        places = labels * self._classes + ranked[:, 0]
        self._confusion.scatter_add_(0, places, torch.ones_like(places))

    def gather(self) -> tuple[Accuracy, Tensor]:
        """The accuracy, and the confusion matrix: (classes, classes), how many images of class i were taken for j."""
        loss, top5 = distributed.total(self._sums.clone()).tolist()
        confusion = distributed.total(self._confusion.clone()).view(self._classes, -1).cpu()
        images = int(confusion.sum())
        top1 = 100 * int(confusion.trace()) / images
        return Accuracy(loss / images, top1, 100 * top5 / images, images), confusion


def logits_of(
    model: nn.Module, batches: Iterable[tuple[Tensor, Any]], device: torch.device, amp: str = "none"
) -> Iterator[tuple[Tensor, Any]]:
    """What `model` answers to each batch of images, in float32, with whatever comes with the batch.

    The model keeps its training mode.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), frozen(model):
            for images, more in batches:
                with autocast(device, amp):
                    logits = model(images.to(device, non_blocking=True))
                yield logits.float(), more
    finally:
        model.train(was_training)


def count(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    classes: int,
    amp: str = "none",
) -> tuple[Accuracy, Tensor]:
    """Accuracy and confusion matrix, see `Tally`, of `model` on this and all other processes' `batches`."""
    tally = Tally(classes, device)
    for logits, labels in logits_of(model, batches, device, amp):
        tally.add(logits, labels.to(device, non_blocking=True))
    return tally.gather()


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """The mixed-precision block that `ClassifierConfig.amp` names."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class Arguments:
    """Measure a checkpoint's accuracy."""

    path: tyro.conf.Positional[Path]
    """A run folder, one of our checkpoints, or any state_dict file (with --config)."""
    config: str | None = None
    """What a foreign state_dict belongs to: a recipe, a run folder or a config file that says the model, the data, the
    pattern. Its weights are masked to that pattern."""
    model: str | None = None
    """package.module:function, for a model of your own: the code that may run."""
    data: Path | None = None
    """Where the images lie, if not where the config says."""
    split: Literal["test", "val"] = "test"
    """The images to report on, or those held out to choose on."""
    batch_size: int | None = None
    """Images that a process takes at once; by default as many as the run itself takes in its evaluations."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: bool = False
    """Print JSON, with every class and the whole confusion matrix."""
    out: Path | None = None
    """A folder for that JSON, evaluation.json; by default that of a run on its own test images, else none."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise SparsityError(f"batch_size must be at least 1, found {self.batch_size}")

    @property
    def as_it_stands(self) -> Path | None:
        """The run folder, if it is measured as it was trained, on its own test images."""
        asked = self.config, self.data
        return self.path if self.path.is_dir() and asked == (None, None) and self.split == "test" else None


@dataclass(frozen=True)
class Evaluation:
    """What was found out about a checkpoint."""

    accuracy: Accuracy
    names: Sequence[str]
    """Of the classes."""
    confusion: Tensor
    """(classes, classes): how many images of class i were taken for j."""

    def classes(self) -> list[tuple[str, int, float | None, str | None]]:
        """Of each class its name, its images, its top-1 in percent, and what it was most often mistaken for."""
        rows: list[tuple[str, int, float | None, str | None]] = []
        for label, name in enumerate(self.names):
            row = self.confusion[label].clone()
            images, hits = int(row.sum()), int(row[label])
            row[label] = 0
            wrong = f"{self.names[int(row.argmax())]} ({int(row.max())})" if row.any() else None
            rows.append((name, images, 100 * hits / images if images else None, wrong))
        return rows

    def __str__(self) -> str:
        found, rows = self.accuracy, self.classes()
        lines = [
            f"top-1 {found.top1:.2f}%, top-5 {found.top5:.2f}%, loss {found.loss:.4f} on {found.images} images",
            "",
        ]
        matrix = None
        if len(rows) > MOST_CLASSES:
            rows = sorted((row for row in rows if row[2] is not None), key=lambda row: row[2] or 0.0)[:MOST_CLASSES]
            lines[1:] = [
                f"The {MOST_CLASSES} of {len(self.names)} classes with the lowest accuracy (--json has all):",
                "",
            ]
        else:
            counts = self.confusion.tolist()
            matrix = format_table(
                ["is \\ taken for", *self.names], zip(self.names, *zip(*counts, strict=True), strict=True)
            )
        cells = [(*row[:2], None if row[2] is None else f"{row[2]:.2f}", row[3]) for row in rows]
        lines.append(format_table(("class", "images", "top-1 %", "most often mistaken for"), cells))
        return "\n".join(lines + (["", matrix] if matrix else []))


def evaluate_checkpoint(arguments: Arguments, device: torch.device) -> Evaluation:
    """The accuracy of the checkpoint that `arguments` name.

    Raises:
        SparsityError: if it cannot be read, says nothing of its model while no config is given, breaks its pattern, or
            was trained on other classes than the data has.
    """
    trained = Trained.open(arguments.path, arguments.config, arguments.model)
    config = trained.config
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, root=arguments.data))
    config = replace(config, device=arguments.device)
    splits = load_splits(config.data)
    trained.check_names(splits.names)
    model = trained.model(splits.classes).to(device)
    images = splits.test if arguments.split == "test" else splits.val
    batches = eval_batches(images, config, arguments.batch_size)
    found, confusion = count(model, batches, device, splits.classes, config.amp)
    return Evaluation(found, splits.names, confusion)


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Measure the checkpoint that `arguments`, by default the command line's, name; print what was found."""
    given = present_names(sys.argv[1:] if arguments is None else arguments, {"--data.root": "--data"})
    parsed = tyro.cli(Arguments, args=given, prog="python -m nm_sparsity.classification.evaluate")
    folder = results_folder(parsed.as_it_stands, parsed.out, (EVALUATION,))
    with distributed.processes(parsed.device) as device:
        found = evaluate_checkpoint(parsed, device)
        if distributed.rank() > 0:
            return
    keys = ("images", "top1", "mistaken_for")
    classes = {name: dict(zip(keys, row, strict=True)) for name, *row in found.classes()}
    what = {"checkpoint": str(parsed.path), "split": parsed.split, **asdict(found.accuracy)}
    result = {**what, "classes": classes, "confusion": found.confusion.tolist()}
    if folder is not None:
        write_json(folder / EVALUATION, result)
    print(json.dumps(result) if parsed.json else f"{found}\n\n{what_was_written((EVALUATION,), folder)}")


if __name__ == "__main__":
    sys.exit(main())
