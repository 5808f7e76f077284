"""The report on a study: means, spreads and paired intervals over seeds, pictures, and where the runs ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from nm_sparsity.core.experiments import plots
from nm_sparsity.core.experiments.run import ENVIRONMENT, write_json
from nm_sparsity.core.experiments.study import Choice, Choices, Result, Run, Study, read_json
from nm_sparsity.core.pattern import NMPattern
from nm_sparsity.core.table import format_table

DENSITY = "density.png"
"""The picture of quality over density."""


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


def _seeds_table(study: Study, rows: Sequence[Row]) -> str:
    """The score of each seed, and the paired differences to dense and to the reference at the same pattern."""
    score = study.columns[0]
    by_seed = {
        (row.method, row.pattern): {s: v for s, r in row.results.items() if (v := score.value(r)) is not None}
        for row in rows
    }

    def minus(ours: Mapping[int, float], other: tuple[str, str]) -> str:
        theirs = by_seed.get(other, {})
        if theirs is ours or not ours.keys() & theirs.keys():
            return "-"
        middle, half = paired_difference(ours, theirs)
        low_and_high = () if half is None else (middle - half, middle + half)
        numbers = [f"{number:+.{score.digits}f}" for number in (middle, *low_and_high)]
        return f"{numbers[0]} ({' .. '.join(numbers[1:]) or 'one pair'})"

    headers = ["method", "pattern", *map(str, study.seeds), "minus dense", f"minus {study.reference}"]
    cells = [
        [
            *(method, pattern or "-"),
            *(f"{ours[seed]:.{score.digits}f}" if seed in ours else "-" for seed in study.seeds),
            *(minus(ours, ("dense", "")), minus(ours, (study.reference, pattern))),
        ]
        for (method, pattern), ours in by_seed.items()
    ]
    return format_table(headers, cells, markdown=True)


def write_report(study: Study, choices: Choices) -> list[Row]:
    """Write ``report.md`` and ``results.json`` of what is finished into the study's folder; returns its rows.

    Versions and hardware are what the runs recorded, wherever the report is written.
    """
    rows = read_rows(study, choices)
    runs = [
        {
            **asdict(run),
            "commands": study.commands(run),
            "environment": read_json(study.out / run.name / ENVIRONMENT),
            "result": row.results[seed],
        }
        for row in rows
        for seed, run in row.runs.items()
    ]
    chosen = [{"method": key[0], "pattern": key[1], **asdict(choice)} for key, choice in choices.items()]
    write_json(study.out / "results.json", {"study": asdict(study), "choice of lambda": chosen, "runs": runs})
    if runs:
        text = [
            f"# {study.title}: {len(runs)} of {len(study.runs(choices))} runs\n",
            results_table(study, rows, markdown=True),
            f"\nMeans ± sample standard deviations over seeds. {study.unit.capitalize()} of a method that starts from "
            "the dense run of its seed are that run's and its own.",
            *study.notes([run["result"] for run in runs]),
            *(_about_choice(study, *key, choice) for key, choice in choices.items()),
            f"\n{study.columns[0].header} by seed; paired differences with 95% intervals (Student's t):\n",
            _seeds_table(study, rows),
            "",
            *(f"![{plot.y}]({plot.file})\n" for plot in study.plots),
            f"![{study.columns[0].header} over density]({DENSITY})\n",
            _about_environments([run["environment"] for run in runs]),
            "The command of every run is in `results.json`, with everything that it measured.\n",
        ]
        (study.out / "report.md").write_text("\n".join(text), encoding="utf-8")
    return rows


def _about_choice(study: Study, method: str, pattern: str, choice: Choice) -> str:
    text = f"lambda of {method} at {pattern} is {choice.decay:g}"
    if choice.scores:
        found = ", ".join(f"{score:.4g} at {decay:g}" for decay, score in choice.scores.items())
        text += f": the validation score was {found} (mean of seeds {', '.join(map(str, study.choosing_seeds))})"
    return text + "."


def _about_environments(places: Sequence[Mapping[str, Any]]) -> str:
    """Where runs ran, as they recorded it; several values where they differ."""

    def values(key: str) -> str:
        return ", ".join(sorted({str(place.get(key) or "none") for place in places}))

    apart = ("command", "time", "seed", "threads", "cuda", "commit", "gpu", "cpu", "cpu_cores", "os")
    packages = dict.fromkeys(key for place in places for key in place if key not in apart)
    versions = ", ".join(f"{package} {values(package)}" for package in packages)
    begun = min(place["time"] for place in places)
    hardware = f"{values('cpu')}, {values('cpu_cores')} cores, GPU {values('gpu')}"
    return f"{versions}; {hardware}; commit {values('commit')}; begun {begun}."


def draw(study: Study, rows: Sequence[Row]) -> None:
    """Write the study's pictures into its folder."""
    for plot in study.plots:
        panels = {}
        for pattern in study.patterns or ("",):
            curves = {
                row.method: [curve for run in row.runs.values() if (curve := plot.curve(study.out / run.name))]
                for row in rows
                if row.pattern in ("", pattern)
            }
            title = f"{study.title} {pattern}, {len(study.seeds)} seeds"
            panels[title] = {method: found for method, found in curves.items() if found}
        plots.draw(study.out / plot.file, panels, plot.x, plot.y, plot.linear_below)
    _draw_over_density(study, rows)


def _draw_over_density(study: Study, rows: Sequence[Row]) -> None:
    """The first column's score over N / M, a line for each method; that of dense is level."""
    score = study.columns[0]
    density = {pattern: NMPattern.parse(pattern).density for pattern in study.patterns}
    points: dict[str, dict[int, dict[float, float]]] = {}
    for row in rows:
        for seed, result in row.results.items():
            if (value := score.value(result)) is not None:
                at = [density[row.pattern]] if row.pattern else list(density.values())
                points.setdefault(row.method, {}).setdefault(seed, {}).update(dict.fromkeys(at, value))
    series = {method: [sorted(curve.items()) for curve in seeds.values()] for method, seeds in points.items()}
    title = f"{study.title}, {len(study.seeds)} seeds"
    plots.draw(study.out / DENSITY, {title: series}, "density of the sparse weights, N/M", score.header, marker="o")
