"""Which pattern the caller wants for which layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nm_sparsity.core.errors import SparsityError
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

    @classmethod
    def parse(
        cls,
        pattern: str | NMPattern,
        layout: str,
        include: Iterable[str],
        exclude: Iterable[str],
        patterns: Mapping[str, str],
        remainder: str,
    ) -> Rules:
        """See `sparsify`.

        Raises:
            SparsityError: for a malformed pattern, an unknown layout or remainder, or text where globs are expected.
        """
        for name, globs in (("include", include), ("exclude", exclude)):
            if isinstance(globs, str) or not isinstance(globs, Iterable):
                raise SparsityError(f'{name} takes a list of globs such as ["layer4.*", "fc"], found {globs!r}')
        if remainder not in ("dense", "error"):
            raise SparsityError(f'remainder must be "dense" or "error", found "{remainder}"')
        overrides = {glob: None if p == "dense" else NMPattern.parse(p) for glob, p in patterns.items()}
        return cls(
            NMPattern.parse(pattern),
            check_layout(layout),
            tuple(include),
            tuple(exclude),
            tuple(overrides.items()),
            remainder,
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


def _matches(glob: str, name: str) -> bool:
    """Whether `glob` matches the weight `name`, its layer, or any ancestor of that."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), glob) for i in range(1, len(parts) + 1))
