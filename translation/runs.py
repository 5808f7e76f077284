"""What a run leaves, opened again: its model, fairseq's task, and the prepared folder that it was trained on."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from nm_sparsity.core import SparsityError
from nm_sparsity.translation.plugin import check_dictionaries, install
from nm_sparsity.translation.stock import checkpoint_utils, utils
from nm_sparsity.translation.trainer import read

TOKENS = 8000
"""At a time."""


def data_of(payload: Mapping[str, Any], checkpoint: Path, given: Path | None = None) -> Path:
    """The prepared folder `given`, or the one that a checkpoint, of which `read` gave `payload`, was trained on.

    Raises:
        SparsityError: if it is not there.
    """
    folder = given or Path(payload["cfg"]["task"]["data"]).parent
    if not folder.is_dir():
        raise SparsityError(
            f"there is no folder {folder}, which {checkpoint} was trained on (relative to where that was): name it "
            "with --data"
        )
    return folder


def load_run(checkpoint: Path, data: Path, payload: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Model and task of a checkpoint with the prepared folder `data`, in eval mode, on the GPU if there is one.

    `payload` is what `read` gave of the file, where it was read already.

    Raises:
        CheckpointError: if the file is damaged, or of another dictionary than `data`.
    """
    install()  # also for a checkpoint of fairseq's own tasks
    state = (payload or read(checkpoint))["task_state"]
    models, config, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], {"data": str(data / "bin")})
    check_dictionaries(task, state)
    model = models[0]
    model.eval()
    if torch.cuda.is_available():
        model.cuda()
    model.prepare_for_inference_(config)
    return model, task


def generate(
    model: Any, task: Any, samples: Iterable[Any], beam: int, lenpen: float, longer: tuple[float, int]
) -> list[str]:
    """The detokenized output for each input, in the order of their ids.

    Args:
        samples: inputs in batches, as `batches` gives them.
        longer: of an input of n pieces the output has at most ``longer[0] * n + longer[1]``.
    """
    limits = {"max_len_a": longer[0], "max_len_b": longer[1]}
    generator = task.build_generator([model], Namespace(beam=beam, lenpen=lenpen, **limits))
    outputs: dict[int, str] = {}
    for sample in samples:
        if torch.cuda.is_available():
            sample = utils.move_to_cuda(sample)
        for index, found in zip(sample["id"].tolist(), task.inference_step(generator, [model], sample), strict=True):
            tokens = found[0]["tokens"].int().cpu()
            outputs[index] = task.target_dictionary.string(tokens, "sentencepiece")
    return [outputs[index] for index in range(len(outputs))]


def batches(model: Any, task: Any, dataset: Any) -> Iterable[Any]:
    """The items of a dataset of fairseq's in batches."""
    batches: Iterable[Any] = task.get_batch_iterator(
        dataset=dataset,
        max_tokens=TOKENS,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        required_batch_size_multiple=1,
    ).next_epoch_itr(shuffle=False)
    return batches
