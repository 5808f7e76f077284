"""`NMSparsity` makes any training by Hugging Face's `Trainer` N:M sparse.

    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[NMSparsity("2:4", decay=2e-4)]).train()

What `save_pretrained` and the Trainer write meanwhile is sparse as it stands and loads anywhere; the table of sparse
weights lies in ``config.json``, and in `RESUME` what ``resume_from_checkpoint`` needs to continue bit for bit.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.files.checkpoint import restore, split
from nm_sparsity.core.files.io import load, replacing, save
from nm_sparsity.core.files.metadata import METADATA, Metadata
from nm_sparsity.core.integrations.callback import SparseTraining, is_converted
from nm_sparsity.core.model.layers import frozen

logger = logging.getLogger(__name__)

RESUME = "nm-sparsity.pt"
"""The file beside ``model.safetensors`` with the dropped values and the method's memory."""


class NMSparsity(SparseTraining, TrainerCallback):  # type: ignore[misc]
    """Trains the Trainer's model N:M sparse, finalizes and verifies it at the end.

    The model is converted when the Trainer is made: before it is compiled or wrapped and before a checkpoint is loaded.
    Where that is not possible (``add_callback``, ``model_init``, a schedule, for which the length of the run must be
    known) it is converted when training begins; the optimizer, which exists by then, holds the same Parameters. SAD,
    flip rate and decay strength go to `Trainer.log`. Until the end the model's ``save_pretrained`` is the one below,
    and its ``generate`` runs inside `frozen`.

    Args:
        pattern: N:M, keep N of every M consecutive weights.
        interval: optimizer steps between measurements of SAD and flip rate; 0 is never.
        exclude: globs of layers that stay dense. None means the `heads` of the model, as recommended; ``[]`` none.
        options: the other arguments of `sparsify`: method, decay, layout, include, patterns, remainder, ...

    Raises:
        SparsityError: at once, for an option that `sparsify` would refuse; when the Trainer is made, if no weight of
            the model can have the pattern; when training begins, under DeepSpeed or FSDP.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Convert the model, if the Trainer has one yet."""
        if model is not None and not self.needs_length:
            self._prepare(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Convert the model unless that is done, and rebuild the shadow weights of a checkpoint."""
        if getattr(args, "deepspeed", None) or any(isinstance(p, DTensor) for p in model.parameters()):
            raise SparsityError(
                "NMSparsity works on one device and under DDP; DeepSpeed and FSDP keep the weights in pieces, which "
                "its checkpoints do not cover: use a training loop of your own with fully_shard"
            )
        if not is_converted(model):
            self._prepare(model, state.max_steps)
        loop = _running_loop()
        if (folder := loop.get("resume_from_checkpoint")) is not None:
            resume(model, folder)
        elif state.global_step and not loop:
            raise SparsityError(
                "NMSparsity cannot tell from which folder this Trainer resumes, since it has a loop of its own: leave "
                "the callback out, call sparsify before training, and resume of this module after loading"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Remember the masks before a step that is to be measured."""
        self.before_step(model, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Log what was measured."""
        scalars = self.after_step(model)
        if scalars and (trainer := _running_loop().get("self")) is not None:
            trainer.log(scalars)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make the checkpoint of a plain module sparse as it stands, which the Trainer writes by itself."""
        if not hasattr(model, "save_pretrained") and state.is_world_process_zero:
            from safetensors.torch import save as to_bytes

            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            masked, rest = split(model)
            with replacing(folder / "model.safetensors") as file:
                file.write(to_bytes(masked, {"format": "pt"}))
            save(folder / RESUME, rest)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Finalize and verify the model: what is saved from here on is plain and N:M."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer has loaded what the best model's layers compute with, which is not what they make it of.
            resume(model, state.best_model_checkpoint)
        self.finish(model)
        for name in _METHODS:
            model.__dict__.pop(name, None)
        if hasattr(model, "save_pretrained"):
            setattr(model.config, METADATA, _table(model, names_on_disk(model)))

    def _prepare(self, model: Any, total_steps: int | None = None) -> None:
        if hasattr(model, "peft_config"):
            raise SparsityError(
                f"{type(model).__name__} has adapters, which NMSparsity would make sparse as well: sparsify the base "
                "model before get_peft_model, and leave the callback out"
            )
        report = self.convert(model, heads(model), total_steps)
        logger.info("sparse model:\n%s", report)
        for name, function in _METHODS.items():
            if hasattr(model, name):
                setattr(model, name, partial(function, model))


def heads(model: Any) -> list[str]:
    """The names of the modules of a Transformers model that lie outside of its backbone, and its output embeddings.

    A classifier or an ``lm_head``, which the recipes keep dense, too. Empty for other models.
    """
    backbone = getattr(model, "base_model", model)
    found = [name for name, child in model.named_children() if backbone is not model and child is not backbone]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = [name for name, module in model.named_modules() if module is output and name.split(".")[0] not in found]
    return [
        name for name in (*found, *inside) if any(param.dim() > 1 for param in model.get_submodule(name).parameters())
    ]


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """As the ``save_pretrained`` of `model`, with weights that are sparse as they stand and, beside them, `RESUME`.

    For a sparsified model of Transformers, in any training loop; `NMSparsity` puts it in the place of the model's own.
    `resume` brings the dense shadow weights back.
    """
    # By the model's own names: the Trainer cannot resume from those of older releases.
    options |= {"is_main_process": is_main_process, "save_original_format": False}
    masked, rest = split(model, state_dict)
    setattr(model.config, METADATA, _table(model, {}))
    type(model).save_pretrained(model, save_directory, state_dict=masked, **options)
    if is_main_process:
        save(Path(save_directory) / RESUME, rest)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """As the ``generate`` of `model`, with each masked weight computed once and not once a token."""
    with frozen(model):
        return type(model).generate(model, *args, **kwargs)


_METHODS: dict[str, Callable[..., Any]] = {"save_pretrained": save_pretrained, "generate": _generate}
"""What stands in the place of a model's own methods while `NMSparsity` trains it."""


def names_on_disk(model: Any) -> dict[str, str]:
    """Name in `model` -> name in what its ``save_pretrained`` writes, where they differ.

    Transformers 5 renamed modules of ViT and others, and writes the names of before.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    probes = {name: torch.empty_like(w, device="meta") for name, w in model.state_dict().items()}
    written = {id(probe): name for name, probe in revert_weight_conversion(model, dict(probes)).items()}
    return {name: written[id(probe)] for name, probe in probes.items() if written.get(id(probe), name) != name}


def _table(model: nn.Module, names: Mapping[str, str]) -> dict[str, Any]:
    """The entry for ``config.json``: the table of the sparse weights, under the names of the file."""
    metadata = Metadata.of(model)
    layers = {names.get(name, name): placement for name, placement in metadata.layers.items()}
    return replace(metadata, layers=layers).to_dict()


def resume(model: nn.Module, folder: str | Path) -> None:
    """Rebuild the dense shadow weights and the method's memory of a sparsified `model`, bit for bit.

    Its weights have been loaded from `folder` already, as the Trainer does. Without a `RESUME` there, the folder is one
    of dense training, whose weights are masked from here on.

    Raises:
        CheckpointError: if the file is damaged, or of a model that was sparsified in another way.
    """
    path = Path(folder) / RESUME
    if not path.is_file():
        logger.warning("%s has no %s: it is of dense training, and its weights are masked from here on", folder, RESUME)
        return
    with torch.no_grad():
        restore(model, model.state_dict(), Metadata.from_dict(load(path), path))


def _running_loop() -> Mapping[str, Any]:
    """The local variables of the Trainer's running loop, since it tells its callbacks neither of itself nor of the
    folder it resumes from; empty outside of one."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_inner_training_loop":
        frame = frame.f_back
    return {} if frame is None else frame.f_locals
