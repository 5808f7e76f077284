"""Top-1 and top-5 accuracy of a model or a checkpoint: ``python -m nm_sparsity.classification.evaluate PATH``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from nm_sparsity.classification import configs, distributed
from nm_sparsity.classification.configs import ClassifierConfig
from nm_sparsity.classification.data import eval_batches, load_splits
from nm_sparsity.classification.models import build
from nm_sparsity.core import CheckpointError, SparsityError, frozen, verify
from nm_sparsity.core.experiments.command_line import command_line, present_names
from nm_sparsity.core.experiments.run import FINALIZED
from nm_sparsity.core.files.checkpoint import restore
from nm_sparsity.core.files.io import load
from nm_sparsity.core.files.metadata import METADATA, find_parts

LATEST, BEST = "latest.pt", "best.pt"
"""Beside `FINALIZED` in a run folder: the checkpoint to resume from, and the best on the validation images."""


@dataclass(frozen=True)
class Accuracy:
    """Means over `images` images; `top1` and `top5` in percent (top-5 is top-k where there are only k < 5 classes)."""

    loss: float
    top1: float
    top5: float
    images: int


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, amp: str = "none"
) -> Accuracy:
    """The accuracy of `model` on this and all other processes' `batches`; the model keeps its training mode."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with torch.no_grad(), frozen(model):
        for images, labels in batches:
            labels = labels.to(device, non_blocking=True)
            with autocast(device, amp):
                logits = model(images.to(device, non_blocking=True)).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    model.train(was_training)
    loss, top1, top5, images = distributed.total(sums).tolist()
    return Accuracy(loss / images, 100 * top1 / images, 100 * top5 / images, int(images))


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """The mixed-precision block that `ClassifierConfig.amp` names."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def find_checkpoint(path: Path) -> Path:
    """`path` itself, or in a run folder its end product, or its latest checkpoint if it is still training.

    Raises:
        CheckpointError: if there is none.
    """
    if not path.is_dir():
        return path
    for name in (FINALIZED, LATEST):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path} holds neither {FINALIZED} nor {LATEST}; is it a run folder?")


@dataclass(frozen=True)
class Arguments:
    """Measure a checkpoint's accuracy."""

    path: tyro.conf.Positional[Path]
    """A run folder, one of our checkpoints, or any state_dict file (with --config)."""
    config: str | None = None
    """The recipe a foreign state_dict belongs to: its model, data, pattern. Its weights are masked to that pattern."""
    data: Path | None = None
    """Where the images lie, if not where the config says."""
    split: Literal["test", "val"] = "test"
    """The images to report on, or those held out to choose on."""
    batch_size: int | None = None
    """Images in an evaluation step, if not the config's."""
    device: str = "auto"
    """cpu, cuda, or auto."""


def evaluate_checkpoint(arguments: Arguments, device: torch.device) -> Accuracy:
    """The accuracy of the checkpoint that `arguments` name.

    Raises:
        SparsityError: if it cannot be read, says nothing of its model while no config is given, or breaks its pattern.
    """
    path = find_checkpoint(arguments.path)
    payload = load(path)
    state, metadata = find_parts(payload, path)
    config = _config(arguments, payload, path)
    splits = load_splits(config.data)
    model = build(config.model, splits.classes)
    if metadata is None:
        config.sparsity.sparsify(model)
    else:
        verify(payload)
    restore(model, state)
    model.to(device)
    images = splits.test if arguments.split == "test" else splits.val
    return evaluate(model, eval_batches(images, config), device, config.amp)


def _config(arguments: Arguments, payload: Any, path: Path) -> ClassifierConfig:
    if arguments.config is not None:
        config = configs.get(arguments.config)
    elif isinstance(payload.get("config"), dict) and METADATA in payload:
        config = ClassifierConfig.from_dict(payload["config"])
    else:
        raise SparsityError(
            f"{path} does not say what it is a checkpoint of; name its recipe, e.g. --config resnet50_2to4"
        )
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, root=arguments.data))
    batch_size = config.batch_size if arguments.batch_size is None else arguments.batch_size
    return replace(config, device=arguments.device, batch_size=batch_size, accumulation=1)


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Measure the checkpoint that `arguments`, by default the command line's, name; print the accuracy as JSON."""
    given = present_names(sys.argv[1:] if arguments is None else arguments, {"--data.root": "--data"})
    parsed = tyro.cli(Arguments, args=given, prog="python -m nm_sparsity.classification.evaluate")
    with distributed.processes(parsed.device) as device:
        accuracy = evaluate_checkpoint(parsed, device)
        if distributed.rank() == 0:
            print(json.dumps({"checkpoint": str(parsed.path), "split": parsed.split, **asdict(accuracy)}))


if __name__ == "__main__":
    sys.exit(main())
