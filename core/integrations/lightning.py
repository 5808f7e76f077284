"""`NMSparsity` makes any training by Lightning's `Trainer` N:M sparse.

    L.Trainer(callbacks=[NMSparsity("2:4", decay=2e-4)]).fit(model, data)

Every checkpoint that the Trainer writes is sparse as it stands, loads by ``load_from_checkpoint`` and verifies; beside
the weights lies what ``fit(ckpt_path=...)`` needs to continue bit for bit.
"""

from __future__ import annotations

import logging
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.files.checkpoint import check_table, load_sparsity_state, merge, split
from nm_sparsity.core.files.metadata import METADATA, Metadata
from nm_sparsity.core.integrations.callback import SparseTraining, is_converted, is_sparse

logger = logging.getLogger(__name__)


class NMSparsity(SparseTraining, Callback):  # type: ignore[misc]
    """Trains the LightningModule N:M sparse, finalizes and verifies it at the end of ``fit``.

    The module is converted in ``setup``: before the optimizers are made, before a strategy wraps it, and before a
    checkpoint is loaded. Name the classifier in `exclude`: a LightningModule does not tell which layer it is. SAD, flip
    rate and decay strength are logged with ``pl_module.log``.

    Args:
        pattern, interval, exclude, options: see `SparseTraining`.

    Raises:
        SparsityError: at once, for an option that `sparsify` would refuse; when ``fit`` begins, if no weight of the
            module can have the pattern, or under FSDP, DeepSpeed or a model-parallel strategy.
    """

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Convert the module, and stand between the Trainer and its checkpoints."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise SparsityError(
                f"NMSparsity works on one device and under DDP; {type(strategy).__name__} keeps the weights in pieces, "
                "which its checkpoints do not cover: use a training loop of your own with fully_shard"
            )
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # the Trainer calls it after this, and again for every stage
        if self.report is None or not is_converted(pl_module):
            # Asking for the number loads the data, which a run that does not change can do later.
            total_steps = int(trainer.estimated_stepping_batches) if self.needs_length else None
            logger.info("sparse model:\n%s", self.convert(pl_module, total_steps=total_steps))
        if not isinstance(strategy.checkpoint_io, SparseCheckpointIO):
            strategy.checkpoint_io = SparseCheckpointIO(trainer, strategy.checkpoint_io)

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
        """Remember the masks before a step that is to be measured."""
        self.before_step(pl_module, trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured."""
        pl_module.log_dict(self.after_step(pl_module))

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Finalize and verify the module, after the last checkpoint."""
        self.finish(pl_module)


class SparseCheckpointIO(CheckpointIO):  # type: ignore[misc]
    """Lightning's reading and writing of checkpoints, with weights that are sparse as they stand.

    Here and not in the callback's hooks, which are not called for ``save_weights_only`` and whose order decides what
    `WeightAveraging` saves.
    """

    def __init__(self, trainer: Any, inner: CheckpointIO) -> None:
        self.trainer = trainer
        self.inner = inner

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the masked weights, and beside them what a resume needs."""
        state_dict, metadata = split(self.trainer.lightning_module, checkpoint["state_dict"])
        self.inner.save_checkpoint({**checkpoint, "state_dict": state_dict, METADATA: metadata}, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; for a module that trains sparse, with the dense shadow weights and the method's memory."""
        checkpoint: dict[str, Any] = self.inner.load_checkpoint(path, *args, **kwargs)
        model = self.trainer.lightning_module
        if not is_sparse(model):
            return checkpoint
        if METADATA not in checkpoint:
            logger.warning("%s is of dense training, and its weights are masked from here on", path)
            return checkpoint
        metadata = Metadata.from_dict(checkpoint[METADATA], path)
        check_table(model, metadata)
        state_dict = merge(checkpoint["state_dict"], metadata)  # may refuse, before the model changes
        load_sparsity_state(model, metadata.state)
        return {**checkpoint, "state_dict": state_dict}

    def remove_checkpoint(self, path: Any) -> None:
        """As Lightning does."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """As Lightning does."""
        self.inner.teardown()
