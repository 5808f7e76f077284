"""Methods and patterns over seeds on one corpus: ``python -m nm_sparsity.translation.study``.

Every run is a folder; a run that has its evaluation is not repeated, one that was cut off goes on from its checkpoint,
and the report is written anew after each. ASP starts from the dense run of its seed and trains half as long again.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.run import environment
from nm_sparsity.core.table import format_table
from nm_sparsity.translation import PACKAGES, recipes
from nm_sparsity.translation.evaluate import EVALUATION
from nm_sparsity.translation.prepare import prepare_corpus

matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass(frozen=True)
class Study:
    """Which runs."""

    recipe: str = "tiny_libreoffice"
    """The recipe of all runs."""
    folder: Path = Path("runs/study-libreoffice")
    """Where the runs and the report go."""
    methods: tuple[str, ...] = ("dense", "ste", "sr-ste", "asp")
    """Beside dense, each at every pattern."""
    patterns: tuple[str, ...] = ("2:4", "1:4")
    """N:M."""
    seeds: int = 2
    """Runs of each."""
    jobs: int = 2
    """Runs at a time, one core each."""
    fairseq: tuple[str, ...] = field(default_factory=tuple)
    """More of fairseq-train's options, for all runs."""


@dataclass(frozen=True)
class Run:
    """One of them."""

    method: str
    pattern: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder in the study's."""
        sparse = "" if self.method == "dense" else f"-{self.pattern.replace(':', 'by')}"
        return f"{self.method}{sparse}-seed{self.seed}"


def runs(study: Study) -> list[Run]:
    """All runs, those first that others start from."""
    seeds = range(1, study.seeds + 1)
    dense = [Run("dense", "", seed) for seed in seeds if "dense" in study.methods or "asp" in study.methods]
    return dense + [
        Run(method, pattern, seed)
        for method in study.methods
        if method != "dense"
        for pattern in study.patterns
        for seed in seeds
    ]


def conduct(study: Study) -> list[dict[str, Any]]:
    """Do what is not done yet; the evaluations of all runs, with method, pattern and seed.

    Raises:
        SparsityError: if a run fails, with the end of its log, or the recipe is of a language model.
    """
    recipe = recipes.get(study.recipe)
    if recipe.fairseq["task"] != "nm_translation":
        raise SparsityError(f"{study.recipe} is a language model; a study compares translations")
    if not recipe.data.exists():
        print(f"preparing {recipe.data.name}", flush=True)
        prepare_corpus(recipe.data.name, recipe.data)
    todo = runs(study)
    updates = int(recipe.fairseq["max-update"])
    total = sum(_updates(run, updates) for run in todo)
    with tqdm(total=total, unit="update", smoothing=0.05) as bar, ThreadPoolExecutor(study.jobs) as pool:
        for phase in (True, False):
            # ASP needs the dense runs; the others do not wait for it.
            chosen = [run for run in todo if (run.method != "asp") is phase]
            list(pool.map(lambda run: _conduct_one(study, recipe, run, updates, bar), chosen))
    return results(study)


def _updates(run: Run, updates: int) -> int:
    return updates // 2 if run.method == "asp" else updates


_report_lock = threading.Lock()


def _conduct_one(study: Study, recipe: recipes.Config, run: Run, updates: int, bar: Any) -> None:
    folder = study.folder / run.name
    mine, done = _updates(run, updates), 0
    if not (folder / EVALUATION).exists():
        arguments = [study.recipe, "--run", str(folder), "--seed", str(run.seed), "--sparsity.method", run.method]
        if run.method != "dense":
            arguments += ["--sparsity.pattern", run.pattern]
        if run.method == "sr-ste":
            arguments += ["--sparsity.decay", str(recipe.sparsity.decay)]
        if run.method == "asp":
            arguments += ["--init-from", str(study.folder / Run("dense", "", run.seed).name)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "train.log").open("a") as log:
            for line in _lines("train", [*arguments, "--max-update", str(mine), *study.fairseq], log):
                if found := re.search(r"num_updates=(\d+)", line):
                    bar.update(int(found[1]) - done)
                    done = int(found[1])
            for _ in _lines("evaluate", [str(folder)], log):
                pass
    bar.update(mine - done)
    with _report_lock:
        write_report(study)


def _lines(module: str, arguments: Sequence[str], log: Any) -> Any:
    """The lines that a command of ours prints, which also go to `log`."""
    command = [sys.executable, "-m", f"nm_sparsity.translation.{module}", *arguments]
    tail: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            tail = [*tail[-4:], line]
            yield line
    if process.returncode:
        raise SparsityError(f"{' '.join(command)} ended with status {process.returncode}:\n{''.join(tail)}")


def results(study: Study) -> list[dict[str, Any]]:
    """The evaluations there are so far."""
    found = []
    for run in runs(study):
        path = study.folder / run.name / EVALUATION
        if path.exists():
            found.append({**vars(run), "run": run.name, **json.loads(path.read_text())})
    return found


def results_table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """Means over seeds, and each seed's BLEU."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["pattern"]), []).append(row)
    table = [
        (
            method,
            pattern or "-",
            len(group),
            f"{statistics.mean(r['bleu'] for r in group):.1f}",
            " ".join(f"{r['bleu']:.1f}" for r in group),
            f"{statistics.mean(r['chrf'] for r in group):.1f}",
            f"{statistics.mean(r['exact'] for r in group):.1f}",
        )
        for (method, pattern), group in groups.items()
    ]
    headers = ("method", "pattern", "seeds", "BLEU", "BLEU of each", "chrF", "exact %")
    return format_table(headers, table, markdown=markdown)


def write_report(study: Study) -> None:
    """``report.md`` and ``results.json`` in the study's folder, of the runs that are done."""
    rows = results(study)
    if not rows:
        return
    recipe = recipes.get(study.recipe)
    where = environment(packages=PACKAGES)
    versions = ", ".join(
        f"{name} {where[name]}" for name in ("python", "torch", "ve-fairseq", "sentencepiece", "commit")
    )
    text = [
        f"# {study.recipe}: {len(rows)} of {len(runs(study))} runs",
        "",
        results_table(rows, markdown=True),
        "",
        f"Test set of {rows[0]['sentences']} sentences, beam {recipe.beam}; {rows[0]['bleu_signature']}.",
        f"SR-STE's lambda is {recipe.sparsity.decay}, seeds count from 1."
        + (" ASP starts from the dense run of its seed and trains half as long again." * ("asp" in study.methods)),
        "",
        f"`{where['command']}`  ",
        f"{versions}; {where['cpu']}, {study.jobs} runs at a time on one core each.",
        "",
    ]
    (study.folder / "report.md").write_text("\n".join(text))
    (study.folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n")


def curve(run: Path, subset: str, name: str) -> tuple[list[int], list[float]]:
    """(updates, values) of a figure in a run's TensorBoard events: subset ``train_inner``, ``train`` or ``valid``."""
    events = EventAccumulator(str(run / "tensorboard" / subset)).Reload()
    if name not in events.Tags()["scalars"]:
        return [], []
    points = events.Scalars(name)
    return [point.step for point in points], [point.value for point in points]


def plot(study: Study) -> list[Path]:
    """Learning curves and SAD of the first seed of every run, as PNG."""
    paths = []
    for file, subset, name, label in (
        ("learning-curves.png", "valid", "nll_loss", "validation loss, bits a piece"),
        ("sad.png", "train_inner", "sad", "SAD of one update"),
    ):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for run in runs(study):
            steps, values = curve(study.folder / run.name, subset, name)
            if run.seed == 1 and steps:
                axes.plot(steps, values, label=f"{run.method} {run.pattern}")
        axes.set(xlabel="update", ylabel=label)
        axes.legend()
        axes.grid(alpha=0.3)
        paths.append(study.folder / file)
        figure.savefig(paths[-1], dpi=120)
        pyplot.close(figure)
    return paths


@command_line
def main() -> None:
    """The command line."""
    study = tyro.cli(Study, prog="python -m nm_sparsity.translation.study", description=__doc__)
    rows = conduct(study)
    plot(study)
    print(f"\n{results_table(rows)}\n\nMore in {study.folder}/report.md")


if __name__ == "__main__":
    sys.exit(main())
