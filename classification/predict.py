"""What is in these pictures: ``python -m nm_sparsity.classification.predict RUN PICTURE_OR_FOLDER ...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from nm_sparsity.classification import distributed
from nm_sparsity.classification.checkpoints import Trained
from nm_sparsity.classification.data import class_names, plain_transform, read_image
from nm_sparsity.classification.evaluate import logits_of
from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.images import named_classes, named_images

BATCH = 32
"""Pictures at a time."""


@dataclass(frozen=True)
class Arguments:
    """Say what is in pictures."""

    path: tyro.conf.Positional[Path]
    """A run folder, one of our checkpoints, or any state_dict file (with --config)."""
    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Files, and folders of files."""
    top: int = 5
    """How many classes to name, the likeliest first."""
    config: str | None = None
    """What a foreign state_dict belongs to: a recipe, a run folder or a config file."""
    model: str | None = None
    """package.module:function, for a model of your own: the code that may run."""
    classes: Path | None = None
    """Names of the classes, one a line, where the checkpoint and the data of the config do not tell them."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: bool = False
    """Print a line of JSON for each picture."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise SparsityError(f"top must be at least 1, found {self.top}")


def predict(arguments: Arguments, device: torch.device) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """Of each picture, the likeliest classes with their probabilities.

    Raises:
        SparsityError: if the checkpoint or a picture cannot be read; what came before was given.
    """
    files = [file for path in arguments.pictures for file in named_images(path)]
    trained = Trained.open(arguments.path, arguments.config, arguments.model)
    known = trained.names or class_names(trained.config.data)
    held = [value for value in trained.state.values() if isinstance(value, Tensor) and value.dim()]
    last: Sized = held[-1] if held else ()  # the classifier's, in most models
    names = named_classes(arguments.classes, known, len(trained.names or last), trained.path)
    model = trained.model(len(names)).to(device)
    transform = plain_transform(trained.config.data)

    def batches() -> Iterator[tuple[Tensor, list[Path]]]:
        for start in range(0, len(files), BATCH):
            some = files[start : start + BATCH]
            yield torch.stack([transform(read_image(file)) for file in some]), some

    for logits, some in logits_of(model, batches(), device, trained.config.amp):
        shares, labels = logits.softmax(1).topk(min(arguments.top, logits.shape[1]))
        for file, share, label in zip(some, shares.tolist(), labels.tolist(), strict=True):
            yield file, [(names[i], p) for i, p in zip(label, share, strict=True)]


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Say what is in the pictures that `arguments`, by default the command line's, name."""
    parsed = tyro.cli(Arguments, args=arguments, prog="python -m nm_sparsity.classification.predict")
    with distributed.processes(parsed.device) as device:
        for file, found in predict(parsed, device):
            if parsed.json:
                print(json.dumps({"picture": str(file), "classes": found}), flush=True)
            else:
                print(f"{file}: {', '.join(f'{name} {share:.1%}' for name, share in found)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
