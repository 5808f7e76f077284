"""What a run leaves, opened again: its model, its config, and the names of its classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from nm_sparsity.classification import configs
from nm_sparsity.classification.configs import ClassifierConfig
from nm_sparsity.classification.models import build
from nm_sparsity.core import CheckpointError, SparsityError, verify
from nm_sparsity.core.experiments.folders import find_checkpoint
from nm_sparsity.core.experiments.run import FINALIZED
from nm_sparsity.core.experiments.user_model import parse_arguments
from nm_sparsity.core.files.checkpoint import restore
from nm_sparsity.core.files.io import load
from nm_sparsity.core.files.metadata import METADATA, Metadata, find_parts

LATEST, BEST = "latest.pt", "best.pt"
"""Beside `FINALIZED` in a run folder: the checkpoint to resume from, and the best on the validation images."""

CLASSES = "classes"
"""In a checkpoint: the names of the classes, in the order of the labels."""


def find(path: Path) -> Path:
    """`path` itself, or in a run folder its end product, or its latest checkpoint if it is still training.

    Raises:
        CheckpointError: if there is none.
    """
    return find_checkpoint(path, (FINALIZED, LATEST))


@dataclass(frozen=True)
class Trained:
    """A checkpoint of ours, or anybody's state dict with the config that it belongs to."""

    path: Path
    payload: Any
    state: Mapping[str, Any]
    metadata: Metadata | None
    config: ClassifierConfig
    names: tuple[str, ...] | None
    """Of the classes; None where the file does not say."""

    @classmethod
    def open(cls, path: Path, config: str | None = None, model: str | None = None) -> Trained:
        """Open a run folder, a checkpoint, a finalized file, or a state dict.

        Args:
            config: a recipe, the file of a config, or a run folder; for files that do not say what they are of.
            model: ``package.module:function``, for a model that is no library's. It has to be named here: the file,
                which may come from anywhere, does not decide which code runs.

        Raises:
            SparsityError: if the file cannot be read, breaks its pattern, or does not say what it is of.
        """
        path = find(path)
        payload = load(path)
        state, metadata = find_parts(payload, path)
        if config is not None:
            found = configs.get(config)
        elif metadata is not None and isinstance(payload.get("config"), dict):
            found = ClassifierConfig.from_dict(payload["config"])
        else:
            raise SparsityError(
                f"{path} does not say what it is a checkpoint of; name its recipe or its run, "
                "e.g. --config resnet50_2to4 or --config runs/resnet50_2to4"
            )
        if model is not None:
            found = replace(found, model=model, args=found.args if ":" in model else "[]")
        elif ":" in found.model:
            raise SparsityError(
                f"{path} is of the model {found.model}, which is code: say that it may run with --model {found.model}"
            )
        if metadata is not None and metadata.method != "dense":
            verify(payload)
        names = payload.get(CLASSES) if METADATA in payload else None
        return cls(path, payload, state, metadata, found, tuple(map(str, names)) if names else None)

    def model(self, classes: int) -> nn.Module:
        """The model with its weights; those of a state dict are masked to the pattern of the config."""
        config = self.config
        model = build(config.model, classes, parse_arguments(config.args))
        if self.metadata is None:
            config.sparsity.one_shot().sparsify(model)
        restore(model, self.state)
        return model

    def check_names(self, names: Sequence[str]) -> None:
        """Raise a `CheckpointError` unless the data's classes are those that the model was trained on."""
        check_names(self.path, self.names, names)


def check_names(path: Path, there: Sequence[str] | None, here: Sequence[str]) -> None:
    """Raise a `CheckpointError` unless the checkpoint's classes `there`, where it knows them, are the data's."""
    if there is None or tuple(there) == tuple(here):
        return
    if len(there) != len(here):
        raise CheckpointError(f"{path} was trained on {len(there)} classes, the data has {len(here)}")
    label = next(i for i, (one, other) in enumerate(zip(there, here, strict=True)) if one != other)
    raise CheckpointError(
        f'{path} was trained on other classes: number {label} is "{there[label]}", here "{here[label]}"'
    )
