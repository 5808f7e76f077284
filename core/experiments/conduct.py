"""Doing the runs of a study: side by side, those first that others need, and none twice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from statistics import mean
from typing import Any, TextIO

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.command_line import gather_values, present_names
from nm_sparsity.core.experiments.comparison import DENSITY, Row, draw, results_table, write_report
from nm_sparsity.core.experiments.folders import held, make_folder
from nm_sparsity.core.experiments.run import FINALIZED, write_json
from nm_sparsity.core.experiments.study import COMMANDS, Choice, Choices, Run, Study, Variant


def conduct(study: Study) -> list[Row]:
    """Train and score what is not there yet; the results, which are also in the report, kept up to date after each run.

    Raises:
        SparsityError: if the data is missing, a folder holds another run, or a run fails, with the end of its log.
    """
    with held(study.out):
        return _conduct(study)


def _conduct(study: Study) -> list[Row]:
    study.prepare()
    candidates = study.candidates()
    trying = [run for by_decay in candidates.values() for runs in by_decay.values() for run in runs]
    choices = {key: choose(study, by_decay) for key, by_decay in candidates.items() if len(by_decay) == 1}
    known = study.runs(choices)
    # What others start from, and what lambda is chosen by, come first.
    first = [*(run.start for run in known if run.start), *trying, *(run for run in known if not run.start)]
    _execute(study, first, choices)
    choices = {key: choose(study, by_decay) for key, by_decay in candidates.items()}
    _execute(study, study.runs(choices), choices)
    rows = write_report(study, choices)
    draw(study, rows)
    if sparse := [row for row in rows if row.pattern]:
        example = next((row for row in sparse if Variant.parse(row.method).method == "sr-ste"), sparse[0])
        shutil.copyfile(study.out / example.runs[study.seeds[0]].name / FINALIZED, study.out / FINALIZED)
    return rows


def study_command(kind: type[Study], arguments: Sequence[str] | None, program: str) -> None:
    """The study that `arguments`, by default the command line's, describe: `show` it.

    Args:
        kind: the task's study, whose fields are the options.
        program: what the command is called in its help.

    Raises:
        SparsityError: as `conduct` does.
    """
    import tyro

    renamed = {"--folder": "--out", "--workers": "--jobs", "--processes": "--jobs"}
    given = present_names(sys.argv[1:] if arguments is None else arguments, renamed)
    given = gather_values(given, ("--methods", "--patterns", "--seeds", "--decays", "--choosing-seeds"))
    show(tyro.cli(kind, args=given, prog=program))


def show(study: Study) -> list[Row]:
    """Conduct `study`, print its table and where the rest lies; returns the rows of the table.

    Raises:
        SparsityError: as `conduct` does.
    """
    rows = conduct(study)
    print(f"\n{results_table(study, rows)}\n")
    print(*study.notes([result for row in rows for result in row.results.values()]), sep="\n")
    pictures = [*(plot.file for plot in study.plots), DENSITY]
    print(f"More in {study.out}: report.md, results.json, {', '.join(pictures)}\n")
    return rows


def choose(study: Study, candidates: Mapping[float, Sequence[Run]]) -> Choice:
    """The lambda with the best mean score of its finished runs on the validation data, the smallest among equals."""
    if len(candidates) == 1:
        return Choice(next(iter(candidates)), {})
    scores = {decay: mean(study.validation(study.out / run.name) for run in runs) for decay, runs in candidates.items()}
    return Choice(min(scores, key=lambda decay: (-scores[decay], decay)), scores)


def _execute(study: Study, runs: Iterable[Run], choices: Choices) -> None:
    from tqdm import tqdm

    todo = [run for run in dict.fromkeys(runs) if study.result_of(run) is None]
    jobs = study.jobs or len(os.sched_getaffinity(0))
    if todo:
        print(f"{len(todo)} runs, {min(jobs, len(todo))} at a time; follow {study.out}/*/train.log", flush=True)
    with (
        tqdm(total=sum(run.steps for run in todo), unit=study.unit, disable=not todo) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        futures = [pool.submit(_train, study, run, bar.update) for run in todo]
        try:
            for future in as_completed(futures):
                future.result()
                write_report(study, choices)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _train(study: Study, run: Run, advance: Callable[[int], Any]) -> None:
    folder, commands, done = make_folder(study.out / run.name), study.commands(run), 0
    write_json(folder / COMMANDS, commands)
    if study.checkpoint and (folder / study.checkpoint).exists():
        commands[0].append("--resume")
    with (folder / "train.log").open("a", encoding="utf-8") as log:
        for command in commands:
            for line in _lines(command, log):
                if found := re.search(study.progress, line):
                    advance(int(found[1]) - done)
                    done = int(found[1])
    advance(run.steps - done)


def _lines(command: Sequence[str], log: TextIO) -> Iterator[str]:
    """The lines that a Python module prints when it is run, which also go to `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    tail: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            tail = [*tail[-4:], line]
            yield line
    if process.returncode:
        end = "  ".join(tail).rstrip()
        raise SparsityError(f"`python -m {' '.join(command)}` failed; the end of {log.name}:\n  {end}")
