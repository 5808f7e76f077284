"""What a search found on a machine, in a file that others with the same machine can use."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nm_sparsity.core.deploy import library
from nm_sparsity.core.deploy.cusparselt import Algorithm
from nm_sparsity.core.errors import CheckpointError
from nm_sparsity.core.files.io import replacing

FORMAT = 1
FOLDER_VARIABLE = "NM_SPARSITY_CACHE"


class Problem(NamedTuple):
    """A product for which an algorithm is wanted; the dtypes by torch's names."""

    dtype: str
    out_dtype: str
    rows: int
    columns: int
    tokens: int
    bias: bool = False
    activation: str = ""

    def __str__(self) -> str:
        extras = (" bias" if self.bias else "") + (f" {self.activation}" if self.activation else "")
        return f"{self.dtype} {self.rows}x{self.columns} {self.out_dtype}{extras} @{self.tokens}"


def folder() -> Path:
    """Where caches are by default: of the platform, or what the variable `NM_SPARSITY_CACHE` names."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nm-sparsity"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nm-sparsity"


def machine(device: torch.device) -> dict[str, str]:
    """What a found algorithm depends on: GPU, driver, version of cuSPARSELt."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"gpu": name, "driver": driver(), "cusparselt": library.version() or "none"}


def driver() -> str:
    """The version of NVIDIA's kernel driver, "none" without one."""
    try:
        found = re.search(r"\d+\.[\d.]+", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        return "none"
    return found[0] if found else "unknown"


class Cache:
    """Algorithms found on one machine: `found` by problem, and those to keep from, `bad`, by dtype.

    A file that is damaged, of another format or machine is not used: a warning of one line says so.
    """

    def __init__(self, device: torch.device, path: str | Path | None = None) -> None:
        self.machine = machine(device)
        name = re.sub(r"[^a-z0-9.]+", "-", "_".join(self.machine.values()).lower())
        self.path = Path(path) if path is not None else folder() / f"{name}.json"
        self.found: dict[str, Algorithm] = {}
        self.bad: dict[str, set[Algorithm]] = {}
        self._read(warn=True)

    def _read(self, warn: bool) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            about = {key: content[key] for key in ("format", *self.machine)}
            found = {problem: Algorithm(*map(int, numbers)) for problem, numbers in content["found"].items()}
            bad = {dtype: {Algorithm(*map(int, n)) for n in numbers} for dtype, numbers in content["bad"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"is damaged ({type(error).__name__})"
        else:
            if about == {"format": FORMAT, **self.machine}:
                self.found = found | self.found
                for dtype, algorithms in bad.items():
                    self.bad.setdefault(dtype, set()).update(algorithms)
                return
            other = next(key for key, value in {"format": FORMAT, **self.machine}.items() if about[key] != value)
            why = f'is of another {other}: "{about[other]}"'
        if warn:
            warnings.warn(f"the cache of 2:4 algorithms {self.path} {why}; it will be written anew", stacklevel=2)

    def save(self) -> None:
        """Write what there is, with what other processes have written meanwhile; a warning if that is impossible."""
        self._read(warn=False)
        found = {problem: list(algorithm) for problem, algorithm in sorted(self.found.items())}
        bad = {dtype: sorted(map(list, algorithms)) for dtype, algorithms in sorted(self.bad.items())}
        content = {"format": FORMAT, **self.machine, "found": found, "bad": bad}
        try:
            with replacing(self.path) as file:
                file.write((json.dumps(content, indent=1) + "\n").encode())
        except CheckpointError as error:
            warnings.warn(f"the cache of 2:4 algorithms was not saved: {error}", stacklevel=2)

    def bins(self, problem: Problem) -> Iterator[tuple[int, Algorithm]]:
        """(tokens, algorithm) of everything found for this product, ascending; its own tokens do not count."""
        head = str(problem).rpartition("@")[0]
        tokens = [int(name.rpartition("@")[2]) for name in self.found if name.rpartition("@")[0] == head]
        for count in sorted(tokens):
            yield count, self.found[f"{head}@{count}"]


def flat(bins: Any) -> tuple[int, ...]:
    """Such pairs as the op takes them."""
    return tuple(number for tokens, algorithm in bins for number in (tokens, *algorithm))
