"""Dense, STE, SR-STE and ASP side by side: ``python -m nm_sparsity.classification.study RECIPE``.

SR-STE's lambda is chosen per pattern on the validation images; the test images are looked at once, at the end of each
run. Runs that are complete are not repeated, interrupted ones continue.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from nm_sparsity.classification import configs
from nm_sparsity.classification.configs import Config, difference
from nm_sparsity.classification.data import load_splits
from nm_sparsity.classification.evaluate import LATEST
from nm_sparsity.classification.train import SUMMARY, train
from nm_sparsity.core import SparsityConfig, SparsityError, Verification, verify
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.finalize import FINALIZED
from nm_sparsity.core.experiments.run import environment, read_metrics
from nm_sparsity.core.table import format_table


@dataclass(frozen=True)
class Study:
    """Which runs to compare."""

    recipe: tyro.conf.Positional[str] = "digits_dense"
    """The recipe whose data, model and optimizer all runs share."""
    folder: Path = Path("runs/study")
    """Where the runs, the report and the plots go."""
    patterns: tuple[str, ...] = ("2:4", "1:8")
    """The N:M patterns."""
    seeds: int = 3
    """Runs of each kind, seeded 0, 1, ..."""
    epochs: int = 30
    """Epochs of each run; ASP fine-tunes for as many after its dense run."""
    decays: tuple[float, ...] = (0.02, 0.1, 0.5)
    """The lambdas that SR-STE chooses from."""
    choosing_seeds: int = 2
    """Seeds whose mean validation accuracy chooses lambda."""
    log_every: int = 10
    """Steps between two comparisons of masks."""
    workers: int = 0
    """Runs at the same time; 0 is one a CPU core."""

    def __post_init__(self) -> None:
        if min(self.seeds, self.epochs, self.choosing_seeds, self.log_every) < 1 or self.workers < 0:
            raise SparsityError("seeds, epochs, choosing_seeds and log_every must be at least 1, workers at least 0")
        if self.choosing_seeds > self.seeds:
            raise SparsityError(f"choosing_seeds {self.choosing_seeds} must not be more than seeds {self.seeds}")

    def config(self, method: str, seed: int, pattern: str = "", decay: float | None = None) -> Config:
        """The run of `method` at `pattern` with `seed`."""
        base = configs.get(self.recipe)
        sparsity = SparsityConfig(method="dense", exclude=base.sparsity.exclude)
        if method != "dense":
            sparsity = replace(sparsity, method=method, pattern=pattern, decay=decay)
        words = [method, pattern.replace(":", "by"), "" if decay is None else f"{decay:g}", f"seed{seed}"]
        return replace(
            base,
            folder=self.folder / "-".join(filter(None, words)),
            sparsity=sparsity,
            epochs=self.epochs,
            seed=seed,
            log_every=self.log_every,
            init_from=self.config("dense", seed).folder if method == "asp" else None,
        )


@dataclass(frozen=True)
class Row:
    """One method at one pattern: its runs, one a seed."""

    method: str
    pattern: str
    epochs: str
    runs: list[dict[str, Any]]

    def mean(self, key: str) -> float:
        """The mean of `key` over the runs' summaries."""
        return statistics.mean(float(run[key]) for run in self.runs)

    def spread(self, key: str) -> float:
        """The standard deviation of `key` over the runs' summaries; 0 for a single run."""
        return statistics.stdev(float(run[key]) for run in self.runs) if len(self.runs) > 1 else 0.0


def conduct(study: Study) -> list[Row]:
    """Train what is not yet trained; write report.md, the plots and one finalized, verified checkpoint.

    Raises:
        SparsityError: for a missing data set, an unknown recipe, or a folder that holds runs of another study.
    """
    started = time.perf_counter()
    load_splits(configs.get(study.recipe).data)  # A missing data set is one message now, not one a run.
    seeds = range(study.seeds)
    tried = [
        study.config("sr-ste", seed, pattern, decay)
        for pattern in study.patterns
        for decay in study.decays
        for seed in range(study.choosing_seeds)
    ]
    dense = [study.config("dense", seed) for seed in seeds]
    ste = {pattern: [study.config("ste", seed, pattern) for seed in seeds] for pattern in study.patterns}
    first = [*dense, *_flat(ste), *tried]
    if there := sum(map(_complete, first)):
        print(f"{there} of the first {len(first)} runs are there already; remove {study.folder} to repeat them")
    _run(first, study, "dense, STE, choosing SR-STE's lambda")
    decays = {pattern: _best_decay(study, pattern) for pattern in study.patterns}
    sr_ste = {p: [study.config("sr-ste", seed, p, decays[p]) for seed in seeds] for p in study.patterns}
    asp = {p: [study.config("asp", seed, p) for seed in seeds] for p in study.patterns}
    _run([*_flat(sr_ste), *_flat(asp)], study, "SR-STE with that lambda, ASP from the dense runs")

    once, twice = str(study.epochs), f"{study.epochs} + {study.epochs}"
    rows = [Row("dense", "", once, [_summary(config) for config in dense])]
    for pattern in study.patterns:
        for name, runs, epochs in (("STE", ste, once), ("SR-STE", sr_ste, once), ("ASP", asp, twice)):
            rows.append(Row(name, pattern, epochs, [_summary(config) for config in runs[pattern]]))
    product = study.folder / FINALIZED
    shutil.copyfile(sr_ste[study.patterns[0]][0].folder / FINALIZED, product)
    _write_report(study, rows, decays, verify(product), time.perf_counter() - started)
    _plot(study, rows)
    return rows


def results_table(rows: list[Row], markdown: bool = False) -> str:
    """The comparison as aligned text or Markdown."""
    headers = (
        "pattern",
        "method",
        "epochs",
        "seeds",
        "test top-1 %",
        "density",
        "flips/weight",
        "lambda",
        "lambda*sum(lr)",
    )
    cells = []
    for row in rows:
        decay = row.runs[0]["config"]["sparsity"]["decay"]
        cells.append(
            (
                row.pattern or "-",
                row.method,
                row.epochs,
                len(row.runs),
                f"{row.mean('test/top1'):.2f} ± {row.spread('test/top1'):.2f}",
                row.mean("model_density"),
                None if row.method == "dense" else row.mean("flips_per_weight"),
                decay,
                row.mean("decay_strength") if row.method == "SR-STE" else None,
            )
        )
    return format_table(headers, cells, markdown=markdown)


def _flat(by_pattern: dict[str, list[Config]]) -> Iterable[Config]:
    return (config for runs in by_pattern.values() for config in runs)


def _run(todo: list[Config], study: Study, what: str) -> None:
    todo = [config for config in todo if not _complete(config)]
    if not todo:
        return
    workers = study.workers or len(os.sched_getaffinity(0))
    # Forking a process that has used torch can deadlock.
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(todo), unit="run", desc=what, file=sys.stdout) as bar,
        ProcessPoolExecutor(min(workers, len(todo)), context, torch.set_num_threads, (1,)) as pool,
    ):
        for future in as_completed([pool.submit(_train, config) for config in todo]):
            future.result()
            bar.update()


def _train(config: Config) -> None:
    train(replace(config, resume=(config.folder / LATEST).is_file()), progress=False)


def _complete(config: Config) -> bool:
    if not (config.folder / SUMMARY).is_file():
        return False
    changed = difference(Config.from_dict(_summary(config)["config"]), config)
    if changed:
        raise SparsityError(
            f"{config.folder} holds another run ({'; '.join(changed)}); remove it or choose another --folder"
        )
    return True


def _summary(config: Config) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((config.folder / SUMMARY).read_text(encoding="utf-8"))
    return summary


def _best_decay(study: Study, pattern: str) -> float:
    """The lambda with the best mean top-1 on the validation images, the smaller loss among equals."""

    def score(decay: float) -> tuple[float, float]:
        runs = [_summary(study.config("sr-ste", s, pattern, decay)) for s in range(study.choosing_seeds)]
        return statistics.mean(r["val/top1"] for r in runs), -statistics.mean(r["val/loss"] for r in runs)

    return max(study.decays, key=score)


def _write_report(
    study: Study, rows: list[Row], decays: dict[str, float], checked: Verification, seconds: float
) -> None:
    places = [json.loads(path.read_text(encoding="utf-8")) for path in study.folder.glob("*/environment.json")]

    def where(key: str) -> str:
        return ", ".join(sorted({str(place.get(key) or "none") for place in places}))

    groups = sum(check.groups for check in checked.checked)
    per_seed = [(row.pattern or "-", row.method, *(run["test/top1"] for run in row.runs)) for row in rows]
    trained = sum(run["seconds"] for row in rows for run in row.runs)
    images = rows[0].runs[0]["test/images"]
    text = [
        f"# {study.recipe}: dense, STE, SR-STE and ASP\n",
        results_table(rows, markdown=True),
        "",
        f"Test top-1 is the mean and standard deviation over {study.seeds} seeds, of the weights after the last epoch.",
        f"One of the {images:,} test images is {100 / images:.2f} points; differences of that size mean nothing.",
        "ASP's epochs are its dense run's plus its fine-tuning's. Density is that of the whole model.",
        f"Flips/weight is SAD per sparse weight summed over all steps, from every {study.log_every}th step.",
        f"SR-STE's lambda is the best of {', '.join(f'{d:g}' for d in study.decays)} on the validation images "
        f"(mean of {study.choosing_seeds} seeds): {', '.join(f'{d:g} at {p}' for p, d in decays.items())}.",
        "",
        f"`{study.folder / FINALIZED}` is SR-STE at {study.patterns[0]}, seed 0: {len(checked.checked)} weights with "
        f"{groups:,} groups verified, none breaks its pattern.",
        "",
        "![accuracy](accuracy.png)\n\n![SAD](sad.png)\n",
        "Test top-1 of each seed:\n",
        format_table(("pattern", "method", *(f"seed {seed}" for seed in range(study.seeds))), per_seed, markdown=True),
        "",
        f"Command: `{environment()['command']}`; {seconds:.0f} s for what was not there yet; "
        f"the runs above took {trained:.0f} s of training together.",
        f"Python {where('python')}, torch {where('torch')}, torchvision {where('torchvision')}; {where('cpu')}, "
        f"{where('cpu_cores')} cores, GPU {where('gpu')}; commit {where('commit')}; "
        f"begun {min(place['time'] for place in places)}.",
        "",
    ]
    (study.folder / "report.md").write_text("\n".join(text), encoding="utf-8")


def _plot(study: Study, rows: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for file, key, x, y in (
        ("accuracy.png", "val/top1", "epoch", "validation top-1 (%)"),
        ("sad.png", "flip_rate", "step", "SAD per sparse weight and step"),
    ):
        figure, axes = plt.subplots(
            1,
            len(study.patterns),
            figsize=(5 * len(study.patterns), 4),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, pattern in zip(axes[0], study.patterns, strict=True):
            for row in rows:
                if row.pattern not in ("", pattern) or (key == "flip_rate" and row.method == "dense"):
                    continue
                curves = [_curve(Path(run["config"]["folder"]), x, key) for run in row.runs]
                at = [point for point, _ in curves[0]]
                values = list(zip(*([value for _, value in curve] for curve in curves), strict=True))
                (line,) = axis.plot(at, [statistics.mean(v) for v in values], label=row.method)
                axis.fill_between(
                    at, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15
                )
            axis.set(title=f"{study.recipe} {pattern}, {study.seeds} seeds", xlabel=x, ylabel=y)
            if key == "flip_rate":
                axis.set_yscale("symlog", linthresh=1e-5)
            axis.legend()
        figure.savefig(study.folder / file, dpi=120)
        plt.close(figure)


def _curve(run: Path, x: str, key: str) -> list[tuple[float, float]]:
    return [(line[x], line[key]) for line in read_metrics(run) if key in line]


@command_line
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    study = tyro.cli(Study, args=arguments, prog="python -m nm_sparsity.classification.study")
    print(results_table(conduct(study)))
    print(f"\nreport, plots and checkpoint: {study.folder}")


if __name__ == "__main__":
    sys.exit(main())
