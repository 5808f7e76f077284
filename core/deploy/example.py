"""Example inputs of a model: an argument, a tuple of them, or a mapping of names to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nm_sparsity.core.deploy.child import first_line
from nm_sparsity.core.errors import SparsityError


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of the model's call."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def tensors(values: Any) -> list[Tensor]:
    """All tensors in nested containers of values, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def run(model: nn.Module, example: Any, device: torch.device) -> Any:
    """What a model on `device` gives for an example.

    Raises:
        SparsityError: if the example is elsewhere, or the model does not take it.
    """
    args, kwargs = arguments(example)
    for t in tensors((args, kwargs)):
        if t.device != device:
            raise SparsityError(f"the example inputs are on {t.device} and the model on {device}: move them there")
    try:
        return model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Whatever a user's model raises for an input that is not its own.
        shapes = ", ".join(f"{'x'.join(map(str, t.shape))} {t.dtype}" for t in tensors((args, kwargs))) or "no tensor"
        why = f"{type(error).__name__}: {first_line(error)}"
        raise SparsityError(f"the model does not take the example inputs ({shapes}): {why}") from error
