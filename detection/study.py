"""Compare methods and patterns over seeds: ``python -m nm_sparsity.detection.study fashion``.

Every run is trained, evaluated on the test split and kept in ``runs/study_NAME``; a stopped study goes on where it
was. After each run ``detection/results/NAME.json`` and ``NAME.md`` are written anew. SR-STE's lambda is chosen on the
validation split, with a seed that is not among those reported.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.command_line import command_line
from nm_sparsity.core.experiments.run import environment, write_json
from nm_sparsity.core.table import format_table
from nm_sparsity.detection import prepare

RESULTS = Path(__file__).parent / "results"
PATTERNS = ("2:4", "2:8")
DECAYS = (0.02, 0.1, 0.5)
CHOICE_SEED = 100


@dataclass(frozen=True)
class Experiment:
    """One training run: arguments of `nm_sparsity.detection.train`, and the run whose checkpoint it starts from."""

    name: str
    arguments: tuple[str, ...]
    start: str | None = None


@dataclass(frozen=True)
class Study:
    """A data set and the config and schedule for it."""

    config: str
    prepare: Callable[[Path], None]
    epochs: int

    def arguments(self, data: Path, seed: int) -> tuple[str, ...]:
        """What all runs share."""
        schedule = (f"train_cfg.max_epochs={self.epochs}", f"param_scheduler.1.T_max={self.epochs}")
        interval = f"train_cfg.val_interval={max(1, self.epochs // 6)}"
        return (self.config, *schedule, interval, "--data", str(data), "--seed", str(seed))


STUDIES = {
    "fashion": Study("tiny_mask_rcnn", lambda out: prepare.fashion(out, train=1600, val=200, size=128), 6),
}


def execute(experiments: Sequence[Experiment], folder: Path, processes: int) -> Iterator[str]:
    """Train and evaluate what is not there yet, `processes` at a time; yields the names as they finish.

    Raises:
        SparsityError: if a run fails; the end of its log is in the message.
    """
    with ThreadPoolExecutor(processes) as pool:
        for experiment in pool.map(lambda e: _one(e, folder), experiments):
            yield experiment.name


def _one(experiment: Experiment, folder: Path) -> Experiment:
    out = folder / experiment.name
    if not (out / "evaluation.json").exists():
        start = (f"load_from={_last_checkpoint(folder / experiment.start)}",) if experiment.start else ()
        resume = ("--resume",) if (out / "last_checkpoint").exists() else ()
        config, *options = experiment.arguments
        _python("train", config, *start, *options, "--out", str(out), *resume, log=out / "train.log")
        _python("evaluate", str(out), log=out / "evaluate.log")
    return experiment


def _last_checkpoint(run: Path) -> Path:
    return run / Path((run / "last_checkpoint").read_text().strip()).name


def _python(module: str, *arguments: str, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"nm_sparsity.detection.{module}", *arguments]
    with log.open("w") as file:
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode
    if status:
        end = "\n  ".join(log.read_text().splitlines()[-5:])
        raise SparsityError(f"`{' '.join(command[1:])}` failed; the end of {log}:\n  {end}")


def scalars(run: Path) -> list[dict[str, Any]]:
    """MMEngine's log of a run, in order: training lines have "loss", validation lines "coco/bbox_mAP"."""
    files = sorted(run.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def validation_ap(run: Path) -> float:
    """Box AP on the validation split after the last epoch; MMDetection logs none where it finds nothing."""
    return float([line for line in scalars(run) if "loss" not in line][-1].get("coco/bbox_mAP", 0.0))


def plan(study: Study, data: Path, seeds: Sequence[int], decay: float) -> list[Experiment]:
    """Dense, STE, SR-STE and ASP, which starts from the dense run of its seed; dense runs come first."""
    experiments = [Experiment(f"dense_{s}", (*study.arguments(data, s), "--method", "dense")) for s in seeds]
    for seed in seeds:
        shared = study.arguments(data, seed)
        for pattern in PATTERNS:
            name = f"{pattern.replace(':', 'to')}_{seed}"
            sparse = (*shared, "--pattern", pattern, "--method")
            experiments += [
                Experiment(f"ste_{name}", (*sparse, "ste")),
                Experiment(f"sr-ste_{name}", (*sparse, "sr-ste", "--decay", str(decay))),
                Experiment(f"asp_{name}", (*sparse, "asp"), f"dense_{seed}"),
            ]
    return experiments


def summarise(name: str, folder: Path, experiments: Sequence[Experiment], choice: dict[str, Any]) -> str:
    """Write what is finished to `RESULTS`; returns the Markdown table."""
    finished = [e.name for e in experiments if (folder / e.name / "evaluation.json").exists()]
    runs = {run: json.loads((folder / run / "evaluation.json").read_text()) for run in finished}
    groups: dict[str, list[dict[str, Any]]] = {}
    for run, result in runs.items():
        groups.setdefault(run.rsplit("_", 1)[0], []).append(result)
    kinds = [kind for kind in ("box", "mask") if any(kind in result for result in runs.values())]
    rows = [
        [
            *(group.partition("_")[0], group.partition("_")[2].replace("to", ":") or "-", len(results)),
            *(_spread([result[kind][number] for result in results]) for kind in kinds for number in ("AP", "AP50")),
        ]
        for group, results in groups.items()
    ]
    headers = ["method", "pattern", "seeds", *(f"{kind} {number}" for kind in kinds for number in ("AP", "AP50"))]
    table = format_table(headers, rows, markdown=True)
    write_json(RESULTS / f"{name}.json", {"choice of lambda": choice, "environment": environment(), "runs": runs})
    text = (
        f"# {name}\n\n`python -m nm_sparsity.detection.study {name}`: test split, mean ± standard deviation.\n"
        f"ASP goes on from the dense run, so it is trained for twice as long. lambda = {choice['decay']}, the best of "
        f"{choice['validation box AP']} (validation box AP by lambda, seed {CHOICE_SEED}).\n"
        f"Versions and hardware are in `{name}.json`, with all runs.\n\n{table}\n"
    )
    (RESULTS / f"{name}.md").write_text(text)
    return table


def _spread(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.1f}" + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")


def run_study(
    name: tyro.conf.Positional[Literal["fashion"]], seeds: tuple[int, ...] = (0, 1, 2), processes: int = 2
) -> None:
    """Run or continue a study.

    Args:
        name: the data set.
        seeds: one dense, two STE, two SR-STE and two ASP runs each.
        processes: runs at a time, of one thread each.
    """
    study, folder, data = STUDIES[name], Path("runs") / f"study_{name}", Path("data") / f"study_{name}"
    RESULTS.mkdir(exist_ok=True)
    if not (data / "annotations" / "instances_test.json").exists():
        study.prepare(data)
    shared = (*study.arguments(data, CHOICE_SEED), "--pattern", "2:4", "--method", "sr-ste", "--decay")
    choices = {decay: Experiment(f"choice_{decay}", (*shared, str(decay))) for decay in DECAYS}
    for finished in execute(list(choices.values()), folder, processes):
        print(finished, flush=True)
    by_decay = {decay: validation_ap(folder / experiment.name) for decay, experiment in choices.items()}
    decay = max(by_decay, key=lambda decay: by_decay[decay])
    choice = {"decay": decay, "validation box AP": by_decay}
    experiments = plan(study, data, seeds, decay)
    for phase in ([e for e in experiments if e.start is None], [e for e in experiments if e.start is not None]):
        for finished in execute(phase, folder, processes):
            print(finished, flush=True)
            table = summarise(name, folder, experiments, choice)
    print(table)


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    tyro.cli(run_study, args=arguments, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
