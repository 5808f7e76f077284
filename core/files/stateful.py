"""What a method remembers, for engines that save whatever has a `state_dict`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nm_sparsity.core.errors import CheckpointError
from nm_sparsity.core.files.checkpoint import load_sparsity_state, sparsity_state


class SparsityState:
    """`sparsity_state` and `load_sparsity_state` of `model` as an object, beside the model in a checkpoint:

        dcp.save({"model": model, "sparsity": SparsityState(model)}, checkpoint_id=folder)

    `torch.distributed.checkpoint` reads only entries that the model to be loaded has, too, and a new one remembers
    nothing yet. So the state is one entry, the same on all ranks; under FSDP2 every rank takes part.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, bytes]:
        """The state as one entry of bytes, whatever is in it."""
        file = io.BytesIO()
        torch.save(sparsity_state(self._model), file)
        return {"sparsity": file.getvalue()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Give back what `state_dict` returned.

        Raises:
            CheckpointError: if it is not that, or of a model with other sparse weights.
        """
        try:
            state = torch.load(io.BytesIO(state_dict["sparsity"]), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch raises at damaged bytes
            raise CheckpointError(f"this is not what SparsityState.state_dict returns: {error}") from error
        load_sparsity_state(self._model, state)
