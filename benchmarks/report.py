"""Result files, their pictures, and the page that is drawn from them.

A result is one JSON document: the environment, and rows of one measurement each. A measurement that this machine
cannot do is a row too, with the reason under "not_run". `python -m nm_sparsity.benchmarks.report` draws README.md and
the pages with all rows that it links.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from nm_sparsity.core import SparsityError
from nm_sparsity.core.deploy import library
from nm_sparsity.core.experiments.command_line import command_line, make_parser
from nm_sparsity.core.experiments.folders import make_folder
from nm_sparsity.core.experiments.run import environment
from nm_sparsity.core.files.io import replacing
from nm_sparsity.core.table import format_table

Row = dict[str, Any]
NOT_RUN = "not_run"
DEFAULT_FOLDER = "runs/benchmarks"
COMMITTED = Path(__file__).parent / "results"
MOST_BARS = 60
MOST_ROWS = 10
"""In a table of README.md; a file may have thousands."""


@dataclass
class Result:
    """The rows of one benchmark on one device, with the environment in which they were measured."""

    what: str
    device: str
    rows: list[Row] = field(default_factory=list)
    environment: dict[str, Any] = field(
        default_factory=lambda: {
            **environment(packages=("torchvision",)),
            "driver": driver(),
            "cusparselt": library.version(),
            "gpu_before": gpu_state(),
        }
    )
    folder: Path | None = field(default=None, compare=False)
    """Where `add` saves what there is, in case the process is ended from outside."""
    sink: Callable[[Row], None] | None = field(default=None, compare=False)
    """What gets each row as it comes."""

    def add(self, **row: Any) -> None:
        """Append a row; the values are text, numbers, None or lists of numbers."""
        self.rows.append(row)
        if self.sink is not None:
            self.sink(row)
        if self.folder is not None:
            self.save(self.folder)

    def table(self, markdown: bool = False, rows: Sequence[Row] | None = None) -> str:
        """A table of all rows or of those given, "not run: why" in the last column where it applies."""
        rows = self.rows if rows is None else rows
        names = list(dict.fromkeys(key for row in rows for key in row if key != NOT_RUN))
        notes = any(NOT_RUN in row for row in rows)
        cells = [
            [_cell(row.get(name)) for name in names]
            + ([f"not run: {row[NOT_RUN]}" if NOT_RUN in row else ""] if notes else [])
            for row in rows
        ]
        return format_table([*names, *([""] if notes else [])], cells, markdown)

    @property
    def name(self) -> str:
        """The name of its file without the suffix: ``<what>_<device>_<torch>_<time>``, another one for every run."""
        time = datetime.fromisoformat(self.environment["time"]).strftime("%Y-%m-%d-%H%M%S")
        return f"{self.what}_{slug(self.device)}_{str(self.environment['torch']).partition('+')[0]}_{time}"

    def save(self, folder: str | Path) -> Path:
        """Write ``<name>.json`` into `folder`.

        Raises:
            SparsityError: if it cannot be written.
        """
        path = make_folder(Path(folder)) / f"{self.name}.json"
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        head = json.dumps({"what": self.what, "device": self.device, "environment": self.environment}, indent=1)
        with replacing(path) as file:
            file.write(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'.encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """The result in a file.

        Raises:
            SparsityError: if it is not one.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise SparsityError(f"{path} is not a result file: {error}") from error


def driver() -> str | None:
    """The version of the NVIDIA driver, if there is one."""
    found = _nvidia_smi("driver_version")
    return found.split()[0] if found else None


def gpu_state() -> str | None:
    """Clocks, temperature and power of the first GPU now, if there is one."""
    found = _nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw", "")
    if not found:
        return None
    sm, memory, temperature, power = (part.strip() for part in found.splitlines()[0].split(","))
    return f"SM {sm}, memory {memory}, {temperature} C, {power}"


def _nvidia_smi(query: str, options: str = ",nounits") -> str:
    """What nvidia-smi answers, nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={query}", f"--format=csv,noheader{options}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def progress(*what: object) -> None:
    """Print what is being measured to stderr."""
    print("...", *what, file=sys.stderr, flush=True)


def slug(text: str) -> str:
    """`text` in lower case with everything but letters, digits and dots as single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def device_name(device: torch.device) -> str:
    """The name of the hardware behind `device`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(environment()["cpu"])


def choose_device(name: str) -> torch.device:
    """The torch device for "cpu", "cuda" or "auto".

    Raises:
        SparsityError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise SparsityError(f'unknown device "{name}"; choose cpu, cuda or auto')
    if name == "cuda" and not torch.cuda.is_available():
        raise SparsityError("there is no CUDA device here; use --device cpu")
    return torch.device(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every benchmark has."""
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, into OUT/quick: does it run?")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--out", default=DEFAULT_FOLDER, help=f"folder for the result files (default {DEFAULT_FOLDER})")


def set_up(args: argparse.Namespace) -> torch.device:
    """The device to measure on, with the threads set, before anything records the environment.

    Quick results go to a folder of their own in ``args.out``, where nobody takes them for those of a whole run.

    Raises:
        SparsityError: for a number out of range (also of --rounds and --minutes, where there are), or a device that is
            not here.
    """
    for option in ("threads", "rounds"):
        if getattr(args, option, 1) < 1:
            raise SparsityError(f"--{option} must be at least 1")
    minutes = getattr(args, "minutes", None)
    if minutes is not None and not minutes > 0:
        raise SparsityError("--minutes must be above 0")
    if args.quick:
        args.out = str(Path(args.out) / "quick")
    return settle(choose_device(args.device), args.threads)


def settle(device: torch.device, threads: int) -> torch.device:
    """`device`, when this process is ready to measure on it."""
    torch.set_num_threads(threads)
    if device.type == "cpu":  # Compiling would remark that there is no driver.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return device


@contextmanager
def saved(what: str, device: torch.device, folder: str | Path) -> Iterator[Result]:
    """A result to fill; at the end, or when a measurement fails, it is printed, plotted and saved.

    Raises:
        SparsityError: at once, if `folder` cannot be written.
    """
    result = Result(what, device_name(device), folder=make_folder(Path(folder)))
    try:
        yield result
    except Exception as error:
        result.add(
            **{NOT_RUN: f"stopped by {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        )
        raise
    finally:
        print(result.table())
        path = result.save(folder)
        print(f"wrote {path}" + (f" and {picture.name}" if (picture := plot(result, path)) else ""))


CHARTS = {
    "masks": ("ns/weight", ("weights", "millions", "pattern", "dtype", "how")),
    "training": ("overhead", ("model", "optimizer", "launch", "variant")),
    "products": ("speedup", ("layer", "tokens", "dtype", "how", "launch")),
    "models": ("speedup", ("model", "how", "launch")),
}
"""What the picture of each benchmark shows, and what tells its bars apart."""


def plot(result: Result, path: Path) -> Path | None:
    """A bar for every measured row, its ceiling as a mark, as PNG beside `path`; None without matplotlib."""
    column, labels = CHARTS[result.what]
    rows = [row for row in result.rows if row.get(column) is not None]
    if not rows:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    shown = f", the first {MOST_BARS} of {len(rows)}" if len(rows) > MOST_BARS else ""
    rows = rows[:MOST_BARS][::-1]
    figure = Figure(figsize=(9, 1 + 0.22 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(rows)), [row[column] for row in rows])
    limited = [i for i, row in enumerate(rows) if row.get("ceiling") is not None]
    if limited:
        axes.plot([rows[i]["ceiling"] for i in limited], limited, "k|", markersize=9, label="ceiling")
        axes.legend()
    axes.set_yticks(range(len(rows)), [" ".join(str(row.get(label, "")) for label in labels) for row in rows], size=7)
    axes.margins(y=0.01)
    axes.set_xlabel(column)
    axes.set_title(f"{result.what}: {result.device}, torch {result.environment['torch']}{shown}", size=9)
    picture = path.with_suffix(".png")
    figure.savefig(picture)
    return picture


PAGE = Path(__file__).parent / "README.md"


TELLING: dict[str, dict[str, object]] = {
    "masks": {"how": "ours", "pattern": "2:4"},
    "training": {"variant": "SR-STE"},
    "products": {"how": "cusparselt, searched", "launch": "graph", "tokens": 4096},
    "models": {"launch": "compiled, graph"},
}
"""The rows of each benchmark that README.md shows, where a file has such."""


def draw(folder: str | Path = COMMITTED, page: Path = PAGE) -> None:
    """Write a page with all rows beside each file in `folder`, and the tables of `page` from the newest ones.

    The tables stand between ``<!-- masks -->`` and ``<!-- end -->``: of each device, `MOST_ROWS` of the `TELLING` rows.
    """
    newest: dict[tuple[str, str], Path] = {}
    for path in sorted(Path(folder).glob("*.json"), key=lambda path: path.stem.rsplit("_", 1)[-1]):
        result = Result.load(path)
        newest[result.what, result.device] = path
        picture = path.with_suffix(".png")
        parts = [f"# {result.what}, {result.device}", _about(result), result.table(markdown=True)]
        parts += [f"![{result.what}]({picture.name})"] if picture.exists() else []
        path.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    for what in CHARTS:
        parts = [_section(path) for (of, _), path in newest.items() if of == what]
        body = "\n\n".join(parts) or "No result is committed yet."
        marked = re.compile(f"(<!-- {what} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not marked.search(text):
            raise SparsityError(f"{page} has no place for {what}: <!-- {what} --> ... <!-- end -->")
        text = marked.sub(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)  # type: ignore[misc]
    page.write_text(text, encoding="utf-8")


def _about(result: Result) -> str:
    """Where a result comes from, as Markdown."""
    about = result.environment
    where = f"CUDA {about['cuda']}, driver {about['driver']}" if about.get("gpu") else f"{about['threads']} thread(s)"
    if about.get("gpu") and about.get("cusparselt"):
        where += f", cuSPARSELt {about['cusparselt']}"
    note = f". {about['note']}" if "note" in about else ""
    return (
        f"**{result.device}**, {where}, torch {about['torch']}, Python {about['python']}, {about['time'][:10]}, "
        f"commit {str(about['commit'])[:10]}: `{about['command']}`{note}"
    )


def _section(path: Path) -> str:
    result = Result.load(path)
    telling = TELLING[result.what].items()
    chosen = [row for row in result.rows if NOT_RUN not in row and all(row.get(key) == value for key, value in telling)]
    rows = (chosen or result.rows)[:MOST_ROWS]
    files = f"[all {len(result.rows):,} rows](results/{path.stem}.md), [JSON](results/{path.name})"
    return "\n\n".join([f"{_about(result)} ({files})", result.table(markdown=True, rows=rows)])


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Redraw benchmarks/README.md, and the pictures that a machine without matplotlib could not draw."""
    parser = make_parser("Redraw benchmarks/README.md from benchmarks/results/.")
    parser.parse_args(argv)
    for path in COMMITTED.glob("*.json"):
        if not path.with_suffix(".png").exists():
            plot(Result.load(path), path)
    draw()
    print(f"wrote {PAGE}")


def _cell(value: object) -> object:
    if isinstance(value, list):
        return " .. ".join(f"{v:.3g}" for v in value)
    return value


if __name__ == "__main__":
    raise SystemExit(main())
