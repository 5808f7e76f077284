"""Average checkpoints, or export one: ``python -m nm_sparsity.translation.average FILE... --out FILE``.

The result is sparse as it stands and a checkpoint of fairseq's own ``translation`` or ``language_modeling`` task: it
needs neither our ``--user-dir`` nor this package. Averaged are the dense shadow weights, which are then masked: the
average of sparse weights with different masks would not be N:M.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import tyro

from nm_sparsity.core import CheckpointError, keep_largest, verify
from nm_sparsity.core.experiments.command_line import command_line, present_names
from nm_sparsity.core.files.checkpoint import merge
from nm_sparsity.core.files.io import save
from nm_sparsity.core.files.metadata import METADATA, Metadata
from nm_sparsity.core.pattern import Table
from nm_sparsity.translation.plugin import DICTIONARIES
from nm_sparsity.translation.trainer import EMA, read


def average(inputs: tyro.conf.Positional[tuple[Path, ...]], out: Path, ema: bool = False) -> dict[str, Any]:
    """Average checkpoints of one run, mask the result, write and verify it; returns what was written.

    Args:
        inputs: the checkpoints; of a single one, this is an export.
        out: the file to write.
        ema: take the exponential moving averages that ``--store-ema`` kept.

    Raises:
        CheckpointError: if a file is damaged, of another model, pattern or dictionary, or has no moving average.
    """
    if not inputs:
        raise CheckpointError("name at least one checkpoint")
    total: dict[str, torch.Tensor] = {}
    payload: dict[str, Any] = {}
    table: Table = {}
    for path in inputs:
        before, payload = payload, read(path)
        weights, metadata = _shadow(payload, path, ema)
        before_table, table = table, metadata.layers
        if before and before_table != table:
            raise CheckpointError(f"{path} is not sparse in the same way as {inputs[0]}")
        if total and {n: t.shape for n, t in total.items()} != {n: t.shape for n, t in weights.items()}:
            raise CheckpointError(f"{path} is of another model than {inputs[0]}: names or shapes differ")
        if before and _dictionaries(before) != _dictionaries(payload):
            raise CheckpointError(f"{path} was trained with another dictionary than {inputs[0]}")
        for name, value in weights.items():
            # In double precision, so that the order of the files does not matter.
            total[name] = total.get(name, 0) + value.double()
    model = {name: (value / len(inputs)).to(weights[name].dtype) for name, value in total.items()}
    for name, placement in metadata.layers.items():
        model[name] = keep_largest(model[name], *placement)
    extra = {key: value for key, value in payload["extra_state"].items() if key == "train_iterator"}
    extra[METADATA] = metadata.finalized().to_dict()
    task = {key: value for key, value in payload["cfg"]["task"].items() if not key.startswith("nm_")}
    task["_name"] = task["_name"].removeprefix("nm_")
    result = {
        **payload,
        "model": model,
        "cfg": {**payload["cfg"], "task": task},
        "extra_state": extra,
        "task_state": _dictionaries(payload),
        "last_optimizer_state": None,
    }
    save(out, result)
    if metadata.layers:
        verify(out)
    print(f"{out}: {len(inputs)} checkpoint(s), for any fairseq")
    return result


def _dictionaries(payload: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate` checks; fairseq's own task keeps it and does not look."""
    return {key: value for key, value in payload["task_state"].items() if key == DICTIONARIES}


def _shadow(payload: dict[str, Any], path: Path, ema: bool) -> tuple[dict[str, torch.Tensor], Metadata]:
    """Dense shadow weights and metadata of a checkpoint file; its values where they are no selection of those."""
    extra = payload["extra_state"]
    if METADATA not in extra:
        raise CheckpointError(f"{path} is not a checkpoint of nm_translation or nm_language_modeling")
    if ema and EMA not in extra:
        raise CheckpointError(f"{path} has no moving average; train with --store-ema")
    metadata = Metadata.from_dict(extra[EMA if ema else METADATA], path)
    values = extra["ema"] if ema else payload["model"]
    return (dict(values) if metadata.shadows else merge(values, metadata)), metadata


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Average what `arguments`, by default the command line's, name."""
    given = present_names(sys.argv[1:] if arguments is None else arguments, {"--output": "--out"})
    tyro.cli(average, args=given, prog="python -m nm_sparsity.translation.average", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
