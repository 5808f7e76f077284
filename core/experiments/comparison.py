"""The report on a study: means, spreads and paired intervals over seeds, pictures, and where the runs ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from nm_sparsity.core.experiments import plots
from nm_sparsity.core.experiments.run import ENVIRONMENT, write_json
from nm_sparsity.core.experiments.study import Choice, Choices, Result, Run, Study, read_json
from nm_sparsity.core.table import format_table


@dataclass(frozen=True)
class Row:
    """The finished runs of one method at one pattern, by seed."""

    method: str
    pattern: str
    runs: Mapping[int, Run]
    results: Mapping[int, Result]


def read_rows(study: Study, choices: Choices) -> list[Row]:
    """What is finished, by method and pattern, in the order of the report."""
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for run in study.runs(choices):
        groups.setdefault((run.method, run.pattern), {})[run.seed] = run
    rows = []
    for (method, pattern), runs in groups.items():
        results = {seed: result for seed, run in runs.items() if (result := study.result_of(run)) is not None}
        if results:
            rows.append(Row(method, pattern, {seed: runs[seed] for seed in results}, results))
    return rows


def results_table(study: Study, rows: Sequence[Row], markdown: bool = False) -> str:
    """The comparison as aligned text or Markdown."""
    headers = ("method", "pattern", study.unit, "seeds", "lambda", *(column.header for column in study.columns))
    cells = []
    for row in rows:
        run, results = next(iter(row.runs.values())), list(row.results.values())
        budget = " + ".join(map(str, run.budget))
        numbers = (column.cell(results) for column in study.columns)
        cells.append((row.method, row.pattern or "-", budget, len(results), run.decay, *numbers))
    return format_table(headers, cells, markdown=markdown)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float | None]:
    """The mean of ours minus theirs over the seeds that both have, and the half width of its 95% interval.

    The interval is Student's for paired samples; ``None`` where there is one pair only.
    """
    from scipy.stats import t

    differences = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    count = len(differences)
    half = float(t.ppf(0.975, count - 1)) * stdev(differences) / count**0.5 if count > 1 else None
    return mean(differences), half


def _differences_table(study: Study, rows: Sequence[Row]) -> str:
    score = study.columns[0]
    by_seed = {
        (row.method, row.pattern): {s: v for s, r in row.results.items() if (v := score.value(r)) is not None}
        for row in rows
    }

    def cell(key: tuple[str, str], other: tuple[str, str]) -> str:
        ours, theirs = by_seed[key], by_seed.get(other, {})
        if key == other or not ours.keys() & theirs.keys():
            return "-"
        middle, half = paired_difference(ours, theirs)
        low_and_high = () if half is None else (middle - half, middle + half)
        numbers = [f"{number:+.{score.digits}f}" for number in (middle, *low_and_high)]
        return f"{numbers[0]} ({' .. '.join(numbers[1:]) or 'one pair'})"

    cells = [
        (method, pattern, cell((method, pattern), ("dense", "")), cell((method, pattern), (study.reference, pattern)))
        for method, pattern in by_seed
        if pattern
    ]
    return format_table(("method", "pattern", "minus dense", f"minus {study.reference}"), cells, markdown=True)


def _seeds_table(study: Study, rows: Sequence[Row]) -> str:
    cells = [
        (
            row.method,
            row.pattern or "-",
            *(study.columns[0].cell([row.results[s]] if s in row.results else []) for s in study.seeds),
        )
        for row in rows
    ]
    headers = ("method", "pattern", *(f"seed {seed}" for seed in study.seeds))
    return format_table(headers, cells, markdown=True)


def write_report(study: Study, choices: Choices) -> list[Row]:
    """Write ``report.md`` and ``results.json`` of what is finished into the study's folder; returns its rows.

    Versions and hardware are what the runs recorded, wherever the report is written.
    """
    rows = read_rows(study, choices)
    finished = [(run, row.results[seed]) for row in rows for seed, run in row.runs.items()]
    environments = {run.name: read_json(study.out / run.name / ENVIRONMENT) for run, _ in finished}
    write_json(
        study.out / "results.json",
        {
            "study": asdict(study),
            "choice of lambda": [
                {"method": method, "pattern": pattern, **asdict(choice)}
                for (method, pattern), choice in choices.items()
            ],
            "runs": [
                {
                    **asdict(run),
                    "commands": study.commands(run),
                    "environment": environments[run.name],
                    "result": result,
                }
                for run, result in finished
            ],
        },
    )
    if not rows:
        return rows
    score = study.columns[0].header
    text = [
        f"# {study.title}: {len(finished)} of {len(study.runs(choices))} runs\n",
        results_table(study, rows, markdown=True),
        "",
        f"Means ± sample standard deviations over seeds. {study.unit.capitalize()} of a method that starts from the "
        "dense run of its seed are that run's and its own.",
        *study.notes([result for _, result in finished]),
        *(_about_choice(study, *key, choice) for key, choice in choices.items()),
        "",
        f"Paired differences of {score} over seeds, with 95% intervals (Student's t):\n",
        _differences_table(study, rows),
        "",
        f"{score} of each seed:\n",
        _seeds_table(study, rows),
        "",
        *(f"![{plot.y}]({plot.file})\n" for plot in study.plots),
        *_about_environments(list(environments.values())),
        "The command of every run is in `results.json`, with everything that it measured.",
        "",
    ]
    (study.out / "report.md").write_text("\n".join(text), encoding="utf-8")
    return rows


def _about_choice(study: Study, method: str, pattern: str, choice: Choice) -> str:
    text = f"lambda of {method} at {pattern} is {choice.decay:g}"
    if choice.scores:
        found = ", ".join(f"{score:.4g} at {decay:g}" for decay, score in choice.scores.items())
        text += f": the validation score was {found} (mean of seeds {', '.join(map(str, study.choosing_seeds))})"
    return text + "."


def _about_environments(places: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the runs recorded of where they ran; several values where they differ."""
    apart = {"command", "time", "seed", "threads", "cuda", "commit", "gpu", "cpu", "cpu_cores", "os"}

    def values(key: str) -> str:
        return ", ".join(sorted({str(place.get(key) or "none") for place in places}))

    versions = ", ".join(
        f"{key} {values(key)}" for key in dict.fromkeys(k for p in places for k in p) if key not in apart
    )
    hardware = f"{values('cpu')}, {values('cpu_cores')} cores, GPU {values('gpu')}"
    begun = min(place["time"] for place in places)
    return [f"{versions}; {hardware}; commit {values('commit')}; begun {begun}."]


def draw(study: Study, rows: Sequence[Row]) -> None:
    """Write the study's pictures into its folder."""
    for plot in study.plots:
        panels = []
        for pattern in study.patterns or ("",):
            curves = {
                row.method: [plot.curve(study.out / run.name) for run in row.runs.values()]
                for row in rows
                if row.pattern in ("", pattern)
            }
            title = f"{study.title} {pattern}, {len(study.seeds)} seeds"
            drawn = {method: [curve for curve in found if curve] for method, found in curves.items() if any(found)}
            panels.append(plots.Panel(title, plot.x, plot.y, drawn, plot.linear_below))
        plots.draw(study.out / plot.file, panels)
