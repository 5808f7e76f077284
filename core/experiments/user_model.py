"""Naming a model on a command line: torchvision's by name, anybody's as ``package.module:function``."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
    except (ValueError, RecursionError):
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
        with _user_code(name):
            return _make(name, getattr(importlib.import_module(module), function), arguments)
    try:
        from torchvision.models import get_model_builder, list_models
    except ImportError as error:
        raise SparsityError(f'"{name}" needs torchvision: pip install "nm-sparsity[classification]"') from error
    if name not in list_models():
        close = [known for known in list_models() if known.startswith(name[:4])] or list_models()
        raise SparsityError(
            f'unknown model "{name}"; torchvision has {", ".join(close[:8])} ...; '
            "for a model of your own write package.module:function"
        )
    if arguments and not isinstance(arguments, Mapping):  # whose first may be that pretrained weights be fetched
        raise SparsityError(f'--args of torchvision\'s "{name}" go by name, as {{"num_classes": 10}}')
    builder = get_model_builder(name)
    # Detectors would otherwise fetch a pretrained backbone.
    untrained = dict.fromkeys({"weights", "weights_backbone"} & set(signature(builder).parameters))
    with _user_code(name):
        return _make(name, partial(builder, **untrained), arguments)


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


@contextmanager
def _user_code(name: str) -> Iterator[None]:
    """A block that runs code of the user's, with the current folder importable; whatever it raises is one error."""
    sys.path.insert(0, "")
    try:
        yield
    except SparsityError:
        raise
    except (Exception, SystemExit) as error:
        raise SparsityError(f'cannot build "{name}": {error}') from error
    finally:
        sys.path.remove("")


def _make(name: str, function: Callable[..., Any], arguments: Arguments) -> nn.Module:
    positional, named = ((), arguments) if isinstance(arguments, Mapping) else (arguments, {})
    model = function(*positional, **named)
    if not isinstance(model, nn.Module):
        raise SparsityError(f'"{name}" returned {type(model).__name__}, expected a torch.nn.Module')
    return model
