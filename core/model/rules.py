"""Which pattern the caller wants for which layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.model.candidates import class_name
from nm_sparsity.core.pattern import Layout, NMPattern, check_layout


@dataclass(frozen=True)
class Rules:
    """The arguments of `sparsify` that choose patterns, checked. Globs match a layer or any ancestor of it."""

    pattern: NMPattern
    layout: Layout
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    patterns: tuple[tuple[str, NMPattern | None], ...]
    """(glob, pattern or None for dense); the last match wins."""
    remainder: str
    trust: frozenset[str] = frozenset()
    """Classes by name, as `class_name` gives it."""

    @classmethod
    def parse(
        cls,
        pattern: str | NMPattern,
        layout: str,
        include: Iterable[str],
        exclude: Iterable[str],
        patterns: Mapping[str, str],
        remainder: str,
        trust: Iterable[type[nn.Module] | str] = (),
    ) -> Rules:
        """See `sparsify`.

        Raises:
            SparsityError: for a malformed pattern, an unknown layout or remainder, or an argument of another type.
        """
        include, exclude = _globs("include", include), _globs("exclude", exclude)
        if remainder not in ("dense", "error"):
            raise SparsityError(f'remainder must be "dense" or "error", found "{remainder}"')
        if not isinstance(patterns, Mapping) or not all(isinstance(glob, str) for glob in patterns):
            raise SparsityError(f'patterns takes a mapping such as {{"fc": "1:4"}}, found {patterns!r}')
        overrides = {glob: None if p == "dense" else NMPattern.parse(p) for glob, p in patterns.items()}
        return cls(
            NMPattern.parse(pattern),
            check_layout(layout),
            include,
            exclude,
            tuple(overrides.items()),
            remainder,
            frozenset(map(_class_name, _list("trust", trust, 'classes such as [MyLinear, "package.module:MyConv"]'))),
        )

    def choose(self, name: str) -> tuple[NMPattern | None, str]:
        """The pattern for the weight `name`, or ``None`` and why the caller wants it dense."""
        for glob in self.exclude:
            if _matches(glob, name):
                return None, f'excluded by "{glob}"'
        for glob, pattern in reversed(self.patterns):
            if _matches(glob, name):
                return pattern, "" if pattern else f'"dense" by "{glob}"'
        if self.include and not any(_matches(glob, name) for glob in self.include):
            return None, "not included"
        return self.pattern, ""

    def names(self, name: str) -> bool:
        """Whether a glob asks for the weight `name` to be sparse."""
        globs = (*self.include, *(glob for glob, pattern in self.patterns if pattern))
        return any(_matches(glob, name) for glob in globs)

    @property
    def is_plain(self) -> bool:
        """Whether no glob is given."""
        return not (self.include or self.exclude or self.patterns)

    def check_globs(self, names: list[str]) -> None:
        """Raise a `SparsityError` for a glob that matches none of the weights `names`."""
        for glob in (*self.include, *self.exclude, *(glob for glob, _ in self.patterns)):
            if not any(_matches(glob, name) for name in names):
                layers = [name.removesuffix(".weight") for name in names]
                raise SparsityError(
                    f'the glob "{glob}" matches no layer of the model; its layers are {", ".join(layers[:4])}'
                    + (f" ... {layers[-1]}" if len(layers) > 4 else "")
                )

    def check_trust(self, model: nn.Module) -> None:
        """Raise a `SparsityError` for a trusted class that no module of `model` is of."""
        there = {class_name(kind) for module in model.modules() for kind in type(module).__mro__}
        if unknown := sorted(self.trust - there):
            raise SparsityError(
                f'trust names "{unknown[0]}", but no layer of the model is one; it takes classes or text as '
                '"package.module:Class"'
            )


def _list(name: str, values: Any, example: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise SparsityError(f"{name} takes a list of {example}, found {values!r}")
    return list(values)


def _globs(name: str, values: Any) -> tuple[str, ...]:
    globs = _list(name, values, 'globs such as ["layer4.*", "fc"]')
    for glob in globs:
        if not isinstance(glob, str):
            raise SparsityError(f"{name} takes globs of layer names as text, found {glob!r}")
    return tuple(globs)


def _class_name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return class_name(kind)
    if isinstance(kind, str) and ":" in kind:
        return kind
    raise SparsityError(f'trust takes classes of layers or text as "package.module:Class", found {kind!r}')


def _matches(glob: str, name: str) -> bool:
    """Whether `glob` matches the weight `name`, its layer, or any ancestor of that."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), glob) for i in range(1, len(parts) + 1))
