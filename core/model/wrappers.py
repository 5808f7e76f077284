"""What engines put around a model."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nm_sparsity.core.errors import SparsityError

_CHECKPOINTED = "_checkpoint_wrapped_module"
"""What torch's `checkpoint_wrapper` puts into the names of modules, but of no weight in a state dict."""


def name_in_state(name: str) -> str:
    """What a state dict calls the module or the weight that ``named_modules`` or ``named_parameters`` call `name`."""
    return ".".join(part for part in name.split(".") if part != _CHECKPOINTED)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside DistributedDataParallel, DataParallel and torch.compile wrappers.

    Raises:
        SparsityError: for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise SparsityError(f"expected a torch.nn.Module, found {type(model).__name__}")
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model
