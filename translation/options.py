"""The ``--nm-*`` options of the fairseq tasks, made from the fields of `SparsityConfig`."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, Optional

from omegaconf import II

from nm_sparsity.core import SparsityConfig, SparsityError

PREFIX = "nm_"

MAPPINGS = {"patterns": "GLOB=PATTERN", "hyperparameters": "NAME=VALUE"}
"""Fields that are mappings, and how an entry is written."""

# What the task has to know of fairseq's other options; they follow those and are none of their own.
_FOLLOWED = {
    "fp16": (bool, "common.fp16"),
    "bf16": (bool, "common.bf16"),
    "memory_efficient_fp16": (bool, "common.memory_efficient_fp16"),
    "memory_efficient_bf16": (bool, "common.memory_efficient_bf16"),
    "ddp_backend": (str, "distributed_training.ddp_backend"),
    "log_interval": (int, "common.log_interval"),
    "max_update": (int, "optimization.max_update"),
}


def add_options(config: type) -> Any:
    """A fairseq task dataclass with the fields of `config` and of `SparsityConfig`, those as ``nm_*``.

    Lists of globs are comma-separated text, and mappings are ``NAME=VALUE,...``.
    """
    help_texts = _attribute_docstrings(SparsityConfig)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(SparsityConfig):
        text = help_texts[field.name].replace("%", "%%")
        plain = isinstance(field.default, str)
        if field.name in ("include", "exclude", "trust"):
            text += " Comma-separated."
        if field.name == "include":
            text = text.replace("empty means all", "empty means encoder.layers and decoder.layers")
        if field.name in MAPPINGS:
            text += f" {MAPPINGS[field.name]},..."
        # fairseq reads typing.Optional and no newer spelling.
        default = dataclasses.field(default=field.default if plain else None, metadata={"help": text})
        fields.append((PREFIX + field.name, str if plain else Optional[str], default))  # noqa: UP045
    fields += [(name, kind, II(followed)) for name, (kind, followed) in _FOLLOWED.items()]
    return dataclasses.make_dataclass(f"NM{config.__name__}", fields, bases=(config,))


def sparsity_config(task_config: Any) -> SparsityConfig:
    """The `SparsityConfig` that the ``nm_*`` options of a task config stand for.

    Raises:
        SparsityError: for a value that is malformed or out of range.
    """
    values = {f.name: getattr(task_config, PREFIX + f.name) for f in dataclasses.fields(SparsityConfig)}
    if str(values["pattern"]).isdigit():
        raise SparsityError(
            f'nm_pattern is the number {values["pattern"]}: YAML reads N:M as one of base 60, so quote it: "2:4"'
        )
    if isinstance(values["decay"], str):
        with contextlib.suppress(ValueError):
            values["decay"] = float(values["decay"])
    for name in ("include", "exclude", "trust"):
        values[name] = _list(values[name])
    for name, form in MAPPINGS.items():
        items = _list(values[name])
        if malformed := [item for item in items if "=" not in item]:
            raise SparsityError(f'--nm-{name} "{malformed[0]}" is not {form}')
        values[name] = dict(item.split("=", 1) for item in items)
    return SparsityConfig(**values)


def as_options(config: SparsityConfig) -> dict[str, object]:
    """The ``nm-*`` command-line options that stand for `config`: those that differ from the defaults."""
    options: dict[str, object] = {}
    for field in dataclasses.fields(SparsityConfig):
        value = getattr(config, field.name)
        if field.name in ("pattern", "method") or value != getattr(SparsityConfig(), field.name):
            if isinstance(value, Mapping):
                value = ",".join(f"{key}={entry}" for key, entry in value.items())
            elif isinstance(value, tuple):
                value = ",".join(value)
            options[f"nm-{field.name}"] = value
    return options


def _list(text: str | None) -> tuple[str, ...]:
    """The entries of comma-separated text; commas in parentheses belong to an entry."""
    return tuple(item.strip() for item in re.split(r",(?![^(]*\))", text or "") if item.strip())


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass, which Python itself does not keep."""
    definition = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            assert isinstance(following.value, ast.Constant)
            texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts
