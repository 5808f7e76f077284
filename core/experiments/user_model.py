"""Naming a model on a command line: torchvision's by name, anybody's as ``package.module:function``."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn

from nm_sparsity.core.errors import SparsityError

Arguments = Sequence[Any] | Mapping[str, Any]
"""Of a function: by position or by name."""


def parse_arguments(text: str) -> Arguments:
    """The arguments that JSON `text` lists, or names: ``[10]`` or ``{"classes": 10}``.

    Raises:
        SparsityError: if it is neither.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list | dict):
        raise SparsityError(f"--args takes a JSON list or object, [10] or {{\"classes\": 10}}, found '{text}'")
    return found


def build(name: str, arguments: Arguments = ()) -> nn.Module:
    """The torchvision model `name` without its weights, or what ``package.module:function`` returns for `arguments`.

    The current folder is importable.

    Raises:
        SparsityError: if there is no such model, or building it fails, saying how.
    """
    module, _, function = name.partition(":")
    if function:
        return _call(name, module, function, arguments)
    try:
        from torchvision.models import get_model, get_model_builder, list_models
    except ImportError as error:
        raise SparsityError(f'"{name}" needs torchvision: pip install "nm-sparsity[classification]"') from error
    if name not in list_models():
        close = [known for known in list_models() if known.startswith(name[:4])] or list_models()
        raise SparsityError(
            f'unknown model "{name}"; torchvision has {", ".join(close[:8])} ...; '
            "for a model of your own write package.module:function"
        )
    # Detectors would otherwise fetch a pretrained backbone.
    takes = signature(get_model_builder(name)).parameters
    untrained = dict.fromkeys({"weights", "weights_backbone"} & set(takes))
    positional, named = _split(arguments)
    model: nn.Module = get_model(name, *positional, **{**untrained, **named})
    return model


def parse_shape(text: str) -> tuple[int, ...]:
    """The value of ``--input``: the shape of an input, batch first.

    Raises:
        SparsityError: if it is none.
    """
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise SparsityError(f'--input takes a shape such as 64,3,32,32; found "{text}"')
    return shape


def _split(arguments: Arguments) -> tuple[Sequence[Any], Mapping[str, Any]]:
    return ((), arguments) if isinstance(arguments, Mapping) else (arguments, {})


def _call(name: str, module: str, function: str, arguments: Arguments) -> nn.Module:
    positional, named = _split(arguments)
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), function)(*positional, **named)
    except Exception as error:  # Whatever a user's own code raises.
        raise SparsityError(f'cannot build "{name}": {error}') from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise SparsityError(f'"{name}" returned {type(model).__name__}, expected a torch.nn.Module')
    return model
