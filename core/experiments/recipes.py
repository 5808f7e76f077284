"""Training runs as data: what the configs of all tasks have in common, and named ones with a command line over them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar, get_type_hints

import tyro

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.command_line import gather_values, present_names, say_renamed, values_of
from nm_sparsity.core.experiments.run import CONFIG, as_json
from nm_sparsity.core.model.config import SparsityConfig
from nm_sparsity.core.table import format_table

OPTIONS = "options"
"""In the config.json of a run that took options that are no field: those, beside the tree as "config"."""


@dataclass(frozen=True)
class RunConfig:
    """One training run. Each task adds its fields."""

    may_change: ClassVar[tuple[str, ...]] = ("folder", "resume")
    """Fields, and fields in fields such as ``data.root``, in which a run that is resumed may differ from how it began.
    """
    renamed: ClassVar[Mapping[str, str]] = {"--sparsity.": "--"}
    """Options of the version before that still work: see `present_names`."""

    folder: Annotated[Path, tyro.conf.arg(name="out")] = Path("runs/run")
    """The run's folder: config, metrics, checkpoints."""
    resume: bool = False
    """Continue the run in this folder from its latest checkpoint."""
    init_from: Path | None = None
    """Start from the weights of another run (its folder or a checkpoint): ASP's trained dense model."""
    sparsity: Annotated[SparsityConfig, tyro.conf.arg(name="")] = field(default_factory=SparsityConfig)
    seed: int = 0
    """Seeds the initial weights, the order of the data and its augmentation."""

    def to_dict(self) -> dict[str, Any]:
        """The tree as JSON types; `from_dict` reads it back."""
        tree: dict[str, Any] = as_json(self)
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote; what an older version did not write has its default.

        Raises:
            SparsityError: for a field that does not exist or a value out of range.
        """
        config: Self = from_tree(cls, tree)
        return config


def from_tree(cls: type[Any], tree: Mapping[str, Any]) -> Any:
    """The dataclass `cls`, with dataclasses in it, from mappings, lists and text.

    Raises:
        SparsityError: for a field that does not exist.
    """
    hints = {name: kind for name, kind in get_type_hints(cls).items() if name in cls.__dataclass_fields__}
    if unknown := sorted(set(tree) - set(hints)):
        raise SparsityError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(hints))}")

    def value(kind: Any, found: Any) -> Any:
        if is_dataclass(kind):
            return from_tree(kind, found)  # type: ignore[arg-type]
        if isinstance(found, list):
            return tuple(found)
        return Path(found) if found is not None and "Path" in str(kind) else found

    return cls(**{name: value(hints[name], found) for name, found in tree.items()})


def difference(there: Mapping[str, Any], here: RunConfig) -> list[str]:
    """What makes `here` another run than the one that left the config `there`, as ``name: there -> here``."""
    return changes(there, here.to_dict(), here.may_change)


def changes(there: Mapping[str, Any], here: Mapping[str, Any], may_change: Sequence[str] = ()) -> list[str]:
    """What differs between two nested mappings, as ``name: there -> here``, but for the entries that `may_change`."""
    before, now = _leaves(there), _leaves(here)
    names = [name for name in {**before, **now} if not f"{name}.".startswith(tuple(f"{n}." for n in may_change))]
    return [f"{n}: {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n)]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


C = TypeVar("C", bound=RunConfig)


class Recipes(Generic[C]):
    """Configs by name, in the order they were added."""

    def __init__(self) -> None:
        self._configs: dict[str, C] = {}
        self._about: dict[str, str] = {}

    def add(self, name: str, about: str, config: C) -> C:
        """Make `config` known as `name`, its run folder runs/`name`; `about` is a line on what it trains."""
        self._configs[name], self._about[name] = replace(config, folder=Path("runs") / name), about
        return self._configs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._configs)

    def get(self, name: str) -> C:
        """The config called `name`; the spelling ``2by4`` of the version before still works for ``2to4``.

        What ends in ``.json`` is a file that ``--print-config`` or a run wrote, and a run folder stands for its own.

        Raises:
            SparsityError: for an unknown name, with the known ones, or a file that is no config.
        """
        return self._get(name)[0]

    def _get(self, name: str) -> tuple[C, list[str]]:
        """The config called `name`, and options that are none of its fields, where a run recorded some."""
        present = re.sub(r"(\d)by(\d)", r"\1to\2", name)
        if present in self._configs:
            if present != name:
                say_renamed(name, present)
            return self._configs[present], []
        if (folder := Path(name)).is_dir():
            config, more = self._read(folder / CONFIG)
            return replace(config, folder=folder), more
        if name.endswith(".json"):
            return self._read(Path(name))
        close = get_close_matches(present, self, 1)
        hint = f' (did you mean "{close[0]}"?)' if close else ""
        raise SparsityError(f'unknown recipe "{name}"{hint}; known recipes: {", ".join(self)}')

    def _read(self, path: Path) -> tuple[C, list[str]]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tree, more = content.get("config", content), content.get(OPTIONS, [])
            config = type(next(iter(self._configs.values()))).from_dict(tree)
        except OSError as error:
            raise SparsityError(f"cannot read the config {path}: {error.strerror}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise SparsityError(f"{path} is not a config that --print-config or a run wrote ({error})") from None
        return replace(config, resume=False), more

    def from_command_line(self, arguments: Sequence[str], prog: str, more: str | None = None) -> tuple[C, list[str]]:
        """``RECIPE [--field value ...]`` -> the config with its overrides, and the options that are none of its fields.

        The file of a config, or a run folder, does in the place of a recipe: see `get`.

        Without arguments or with ``--help`` alone it prints the recipes, with ``--print-config`` the resulting config,
        and exits.

        Args:
            more: what options that are no field are called in the usage; ``None`` refuses them.

        Raises:
            SparsityError: for an unknown recipe.
        """
        if not arguments or arguments[0] in ("-h", "--help"):
            usage = " ".join(
                filter(
                    None, (prog, "RECIPE|RUN|CONFIG.json [--print-config] [--field value ...]", more and f"[{more}]")
                )
            )
            print(f"usage: {usage}    ({prog} RECIPE --help lists the fields)\n")
            print(format_table(("recipe", "what it trains"), self._about.items()))
            sys.exit(0 if arguments else 2)
        base, recorded = self._get(arguments[0])
        overrides = present_names(arguments[1:], base.renamed)
        overrides = gather_values(overrides, ("--include", "--exclude"), ("--patterns", "--hyperparameters"))
        sparsity = base.sparsity
        if values_of(overrides, "--method")[-1:] not in ([], [sparsity.method]):
            # A recipe's hyperparameters belong to its method; another one starts from its own defaults.
            base = replace(base, sparsity=replace(sparsity, decay=None, hyperparameters={}))
        elif "decay" in values_of(overrides, "--hyperparameters")[::2]:
            base = replace(base, sparsity=replace(sparsity, decay=None))  # which this one takes the place of
        parse = partial(
            tyro.cli,
            type(base),
            default=base,
            args=[override for override in overrides if override != "--print-config"],
            prog=f"{prog} {arguments[0]}",
        )
        config, rest = (parse(), []) if more is None else parse(return_unknown_args=True)
        if "--print-config" in overrides:
            tree = config.to_dict()
            print(json.dumps({"config": tree, OPTIONS: rest} if rest else tree, indent=2))
            sys.exit(0)
        return config, [*recorded, *rest]
