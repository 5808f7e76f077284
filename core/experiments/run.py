"""The folder of a run: what was asked (config.json), where it ran (environment.json), what came out (metrics.jsonl)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.files.io import replacing

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
"""In every run folder: what was asked, where it ran, what came out."""

FINALIZED = "finalized.pt"
"""The end product in a run folder: dense names, zeros where weights were dropped, loadable without this package."""

EVALUATION = "evaluation.json"
"""What an evaluation found, in the folder that it writes into."""


def environment(seed: int | None = None, packages: Iterable[str] = ()) -> dict[str, Any]:
    """The provenance of a result: commit, versions, hardware, threads, seed, command, time.

    Args:
        packages: names of distributions whose versions matter too; those that are not installed are left out.
    """
    return {
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: found for name in ("nm-sparsity", "numpy", "triton", *packages) if (found := _version(name))},
        "cuda": torch.version.cuda,
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "seed": seed,
    }


class Run:
    """A run folder, open for writing metrics. On ranks other than 0 pass ``folder=None``: nothing is written.

    `config`, `seed` and `packages` (see `environment`) are recorded at once. TensorBoard events go beside the JSON
    lines if ``tensorboard`` is installed.

    Raises:
        SparsityError: if the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path | None,
        config: Any = None,
        seed: int | None = None,
        resume: bool = False,
        packages: Iterable[str] = (),
    ) -> None:
        self.folder = Path(folder) if folder is not None else None
        self._metrics: Any = None
        self._board: Any = None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / CONFIG, config)
            write_json(self.folder / ENVIRONMENT, environment(seed, packages))
            self._metrics = open(self.folder / METRICS, "a" if resume else "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise SparsityError(f"cannot write the run folder {self.folder}: {error}") from error
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(self.folder))

    def log(self, step: int, values: Mapping[str, float | str | None]) -> None:
        """Append one JSON line ``{"step": step, **values}``; numbers also go to TensorBoard under their names."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_json(value: Any) -> Any:
    """`value` (dataclasses allowed) as JSON types; what JSON does not know becomes text."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return json.loads(json.dumps(plain, default=str))


def write_json(path: Path, value: Any) -> None:
    """`value` (dataclasses allowed) as indented JSON in `path`, whole or not at all: others may be reading it."""
    with replacing(path) as file:
        file.write((json.dumps(as_json(value), indent=2) + "\n").encode())


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` in a run folder, without a last one that was cut off when the run was.

    Raises:
        SparsityError: if there is no such file, or another line is damaged.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise SparsityError(f"{folder} is not a run folder: it has no {METRICS}")
    lines = path.read_bytes().splitlines()
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            float(found["step"])
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            if number < len(lines):
                raise SparsityError(f"{path}, line {number} is damaged: remove it") from error
        else:
            metrics.append(found)
    return metrics


def forget_metrics_after(folder: str | Path, step: int) -> None:
    """Drop the metrics that an interrupted run wrote after the `step` of its checkpoint, and a line that was cut off.

    Raises:
        SparsityError: if a line is damaged, or the file cannot be written.
    """
    path = Path(folder) / METRICS
    kept = [line for line in read_metrics(folder) if line["step"] <= step] if path.is_file() else []
    with replacing(path) as file:
        file.writelines((json.dumps(line) + "\n").encode() for line in kept)


def _commit() -> str | None:
    """The commit of this repository, with "+" if the working tree differs; ``None`` where there is no git."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
