"""What a run leaves, opened again: a checkpoint with the config that says what model and data it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.run import FINALIZED
from nm_sparsity.core.files.checkpoint import restore
from nm_sparsity.core.files.metadata import Metadata, find_parts
from nm_sparsity.detection import config as configs

LAST = "last_checkpoint"
"""In a run folder, MMEngine's: the path of the newest checkpoint."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, its finalized file, or anybody's state dict with the config that it belongs to."""

    path: Path
    payload: Any
    state: Mapping[str, Any]
    metadata: Metadata | None
    config: Any

    @classmethod
    def open(cls, path: Path, config: str | None = None) -> Trained:
        """Open a run folder (its last checkpoint, else its finalized file), or a file.

        Args:
            config: a packaged name, a config file or a run folder; without it, the config in the folder of the file.

        Raises:
            SparsityError: if there is no checkpoint or no config, or either cannot be read.
        """
        from nm_sparsity.detection.hooks import load_safely

        if config is None:
            found = config_of(path if path.is_dir() else path.parent)
        else:
            found = config_of(Path(config)) if Path(config).is_dir() else configs.read(config)
        if path.is_dir():
            alone = (path / FINALIZED).is_file() and not (path / LAST).is_file()
            path = path / FINALIZED if alone else last_checkpoint(path)
        payload = load_safely(path)
        return cls(path, payload, *find_parts(payload, path), found)

    @property
    def is_sparse(self) -> bool:
        """Whether the model is to be made sparse as the config says: the file says that it is, or is a bare state dict.

        A checkpoint that MMEngine wrote without `NMSparseHook` is taken as it stands.
        """
        if self.metadata is not None:
            return bool(self.metadata.layers)
        return self.sparsity is not None and self.sparsity.config.method != "dense" and "meta" not in self.payload

    @property
    def sparsity(self) -> Any:
        """The `NMSparseHook` of the config, if it has one."""
        return sparsity_of(self.config)

    def model(self) -> nn.Module:
        """The model with its weights, on the device that MMEngine chooses.

        Raises:
            SparsityError: if the file is of another model or pattern than the config.
        """
        from mmdet.registry import MODELS
        from mmengine.device import get_device
        from mmengine.registry import init_default_scope

        init_default_scope(self.config.get("default_scope", "mmdet"))
        model: nn.Module = MODELS.build(self.config.model).to(get_device())
        if self.is_sparse:
            if self.sparsity is None:
                raise SparsityError(f"{self.path} is sparse, but its config has no NMSparseHook: is it of this run?")
            config = self.sparsity.config
            if self.metadata is None:
                config.one_shot().sparsify(model)
            else:
                config.sparsify(model, self.metadata.hyperparameters.get("total_steps"))
        restore(model, self.state, self.metadata)
        return model


def sparsity_of(config: Any) -> Any:
    """The `NMSparseHook` of a config, if it has one."""
    from nm_sparsity.detection.hooks import NMSparseHook

    found = configs.hooks_of(config)
    return NMSparseHook(**{k: v for k, v in found[0].items() if k not in ("type", "_scope_")}) if found else None


def last_checkpoint(run: Path) -> Path:
    """The checkpoint in a run folder that was written last.

    Raises:
        SparsityError: if there is none.
    """
    try:
        # MMEngine writes the whole path; the folder may have been moved since.
        return run / Path((run / LAST).read_text().strip()).name
    except FileNotFoundError:
        raise SparsityError(f"{run} holds no checkpoint yet") from None


def config_of(run: Path) -> Any:
    """The newest config that MMEngine wrote into a run folder.

    Raises:
        SparsityError: if there is none.
    """
    files = sorted(run.glob("*.py"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SparsityError(
            f"{run} is not a run folder of nm_sparsity.detection.train: it holds no config; say with --config what the "
            "file is of"
        )
    return configs.read(str(files[-1]))
