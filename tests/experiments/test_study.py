"""Studies of a task that trains nothing: its command writes scores that are known beforehand."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments import plots
from nm_sparsity.core.experiments.comparison import paired_difference, results_table
from nm_sparsity.core.experiments.conduct import conduct, study_command
from nm_sparsity.core.experiments.plots import Curve
from nm_sparsity.core.experiments.study import Column, Plot, Result, Run, Study, read_json

TRAINER = """
import json, pathlib, sys

options = dict(a[2:].split("=", 1) for a in sys.argv[1:] if "=" in a)
out, method, seed = pathlib.Path(options["out"]), options["method"], int(options["seed"])
with open("journal", "a") as journal:
    print(out.name, *sorted(set(sys.argv) & {"--resume"}), file=journal)
if "init-from" in options:
    assert (pathlib.Path(options["init-from"]) / "scores.json").is_file(), "its start is not finished"
print("step", int(options["steps"]) // 2, flush=True)
(out / "checkpoint").touch()
if pathlib.Path("fail").exists() and method == pathlib.Path("fail").read_text():
    sys.exit("the loss became nan")
test = {"dense": 90, "ste": 80, "sr-ste": 85, "asp": 88}[method] + 2 * seed + (seed == 1 and method == "ste")
val = {"0.1": 60 + 10 * (seed == 101), "0.2": 70, "0.4": 70}.get(options.get("decay"))
machine = {"time": f"2026-01-0{seed % 9 + 1}", "torch": "9.9", "commit": f"commit-of-seed-{seed}", "cpu": "Abacus"}
(out / "environment.json").write_text(json.dumps(machine))
(out / "finalized.pt").write_text(out.name)
(out / "scores.json").write_text(json.dumps({"test": test, "val": val, "nothing": None}))
"""


def _curve(run: Path) -> Curve:
    return [(0, 0.0), (1, read_json(run / "scores.json")["test"])]


@dataclass(frozen=True)
class Toy(Study):
    patterns: tuple[str, ...] = ("2:4",)
    seeds: tuple[int, ...] = (0, 1, 2)
    length: int = 10
    decays: tuple[float, ...] = (0.4, 0.1, 0.2)
    choosing_seeds: tuple[int, ...] = (100, 101)
    jobs: int = 2

    unit = "steps"
    result = "scores.json"
    checkpoint = "checkpoint"
    progress = r"^step (\d+)"
    columns = (Column("score", lambda r: r["test"]), Column("none", lambda r: r["nothing"]))
    plots = (Plot("curves.png", "step", "score", _curve),)

    @property
    def title(self) -> str:
        return "toy"

    def prepare(self) -> None:
        assert self.out.is_dir()

    def steps(self, method: str) -> int:
        return self.length // 2 if method == "asp" else self.length

    def commands(self, run: Run) -> list[list[str]]:
        return [["trainer", *self.options(run), f"--steps={run.steps}"]]

    def validation(self, run: Path) -> float:
        return float(read_json(run / "scores.json")["val"])

    def notes(self, results: list[Result]) -> list[str]:  # type: ignore[override]
        return [f"{len(results)} results."]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    (tmp_path / "trainer.py").write_text(TRAINER)
    return Toy(out=Path("out"))


def journal() -> list[str]:
    return Path("journal").read_text().splitlines()


def cells(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


def test_runs_are_done_once_and_those_first_that_others_start_from(toy: Toy) -> None:
    rows = conduct(toy)
    # dense, STE, three lambdas with two seeds; then SR-STE with the chosen one, ASP.
    done = journal()
    assert len(done) == len(set(done)) == 3 + 3 + 6 + 3 + 3
    assert {name.rpartition("-")[0] for name in done[:12]} == {"dense", "ste-2to4"} | {
        f"sr-ste-2to4-{decay}" for decay in (0.1, 0.2, 0.4)
    }
    assert {name.rpartition("-")[0] for name in done[12:]} == {"sr-ste-2to4-0.2", "asp-2to4"}
    table = cells(results_table(toy, rows, markdown=True))
    assert table[0] == ["method", "pattern", "steps", "seeds", "lambda", "score", "none"]
    # By hand: 90, 92, 94; 80, 83, 84; 85, 87, 89; 88, 90, 92.
    assert table[2:] == [
        ["dense", "-", "10", "3", "-", "92.0 ± 2.0", "-"],
        ["ste", "2:4", "10", "3", "-", "82.3 ± 2.1", "-"],
        ["sr-ste", "2:4", "10", "3", "0.2", "87.0 ± 2.0", "-"],
        ["asp", "2:4", "10 + 5", "3", "-", "90.0 ± 2.0", "-"],
    ]
    assert (toy.out / "finalized.pt").read_text() == "sr-ste-2to4-0.2-seed0"
    assert conduct(toy) == rows
    assert journal() == done


def test_lambda_is_the_best_on_validation_data_and_the_smallest_among_equals(toy: Toy) -> None:
    """Means over the choosing seeds are 65, 70, 70; test scores know nothing of lambda."""
    conduct(replace(toy, methods=("dense", "sr-ste"), patterns=("2:4", "1:8"), seeds=(0,)))
    choices = read_json(toy.out / "results.json")["choice of lambda"]
    assert [(c["pattern"], c["decay"], c["scores"]) for c in choices] == [
        (pattern, 0.2, {"0.1": 65, "0.2": 70, "0.4": 70}) for pattern in ("2:4", "1:8")
    ]
    report = (toy.out / "report.md").read_text()
    assert (
        "sr-ste at 1:8 is 0.2: the validation score was 65 at 0.1, 70 at 0.2, 70 at 0.4 (mean of seeds 100, 101)"
        in report
    )
    assert "# toy: 3 of 3 runs" in report


def test_a_single_lambda_needs_no_choice_and_no_waiting(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    conduct(replace(toy, methods=("dense", "sr-ste"), decays=(0.3,), seeds=(4,)))
    assert sorted(journal()) == ["dense-seed4", "sr-ste-2to4-0.3-seed4"]
    assert capsys.readouterr().out == "2 runs, 2 at a time; follow out/*/train.log\n"


def test_dense_runs_that_only_asp_needs_are_not_reported(toy: Toy) -> None:
    rows = conduct(replace(toy, methods=("asp",), seeds=(1,)))
    assert journal() == ["dense-seed1", "asp-2to4-seed1"]
    assert [row.method for row in rows] == ["asp"]


def test_versions_and_hardware_are_those_of_the_runs(toy: Toy) -> None:
    conduct(replace(toy, methods=("dense",), seeds=(0, 3)))
    report = (toy.out / "report.md").read_text()
    assert (
        "torch 9.9; Abacus, none cores, GPU none; commit commit-of-seed-0, commit-of-seed-3; begun 2026-01-01."
        in report
    )
    runs = read_json(toy.out / "results.json")["runs"]
    assert [run["environment"]["commit"] for run in runs] == ["commit-of-seed-0", "commit-of-seed-3"]
    assert runs[0]["commands"] == [["trainer", "--out=out/dense-seed0", "--method=dense", "--seed=0", "--steps=10"]]


def test_the_report_compares_seed_by_seed(toy: Toy) -> None:
    """STE minus dense is -10, -9, -10: mean -9.667, sample deviation 0.577, t = 4.303, half width 1.434."""
    conduct(replace(toy, methods=("dense", "ste", "asp")))
    table = cells((toy.out / "report.md").read_text())
    assert ["dense", "-", "90.0", "92.0", "94.0", "-", "-"] in table
    assert ["ste", "2:4", "80.0", "83.0", "84.0", "-9.7 (-11.1 .. -8.2)", "-"] in table
    # ASP minus STE is 8, 7, 8; ASP minus dense always -2.
    assert ["asp", "2:4", "88.0", "90.0", "92.0", "-2.0 (-2.0 .. -2.0)", "+7.7 (+6.2 .. +9.1)"] in table
    assert "9 results." in (toy.out / "report.md").read_text()
    assert (toy.out / "curves.png").stat().st_size > 5000


def test_the_score_over_density_is_drawn(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "draw", lambda path, panels, *_, **__: drawn.update({path.name: panels}))
    conduct(replace(toy, methods=("dense", "ste"), patterns=("2:4", "1:8")))
    (series,) = drawn["density.png"].values()
    assert series["dense"] == [[(0.125, score), (0.5, score)] for score in (90.0, 92.0, 94.0)]
    assert [[x for x, _ in curve] for curve in series["ste"]] == [[0.125, 0.5]] * 3
    assert [dict(curve)[0.5] for curve in series["ste"]] == [80.0, 83.0, 84.0]


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_paired_intervals_are_those_of_a_paired_t_test(count: int) -> None:
    ours = {seed: (seed * 7919 % 31) / 3 for seed in range(count)}
    theirs = {seed: (seed * 104729 % 29) / 3 for seed in range(-2, count)}
    middle, half = paired_difference(ours, theirs)
    interval = ttest_rel([ours[s] for s in ours], [theirs[s] for s in ours]).confidence_interval(0.95)
    assert half is not None
    assert (middle - half, middle + half) == pytest.approx((interval.low, interval.high))


def test_one_pair_has_a_difference_and_no_interval() -> None:
    assert paired_difference({0: 3.0, 1: 5.0}, {1: 4.0, 2: 9.0}) == (1.0, None)


def test_a_run_that_fails_shows_the_end_of_its_log_and_goes_on_later(toy: Toy) -> None:
    toy = replace(toy, methods=("dense", "ste"), seeds=(0,), jobs=1)
    Path("fail").write_text("ste")
    with pytest.raises(SparsityError) as caught:
        conduct(toy)
    first, *end = str(caught.value).splitlines()
    assert first.startswith("`python -m trainer --out=out/ste-2to4-seed0 --method=ste")
    assert first.endswith("failed; the end of out/ste-2to4-seed0/train.log:")
    assert end == ["  step 5", "  the loss became nan"]
    assert "# toy: 1 of 2 runs" in (toy.out / "report.md").read_text()
    Path("fail").unlink()
    conduct(toy)
    assert journal() == ["dense-seed0", "ste-2to4-seed0", "ste-2to4-seed0 --resume"]


def test_another_run_in_the_folder_is_refused(toy: Toy) -> None:
    toy = replace(toy, methods=("dense",), seeds=(0,))
    conduct(toy)
    with pytest.raises(
        SparsityError, match=r"out/dense-seed0 holds another run .--steps=10 instead of --steps=20.; rem"
    ):
        conduct(replace(toy, length=20))


def test_a_phase_may_have_a_length_of_its_own(toy: Toy) -> None:
    """What equal budgets are made of: half as long a dense run is another run, and what starts from it says so."""
    half = toy.run("dense", 0, steps=5)
    assert (half.name, half.budget) == ("dense-seed0-5steps", (5,))
    asp = replace(toy.run("asp", 0, "2:4"), start=half)
    assert asp.budget == (5, 5)
    assert f"--init-from=out/{half.name}" in toy.options(asp)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "a study needs a method, a seed"),
        ({"jobs": -1}, "jobs of 0 or more"),
        ({"length": 0}, "a length of at least 1"),
        ({"seeds": (0, 100)}, "seed 100 chooses lambda and so must not be among those reported"),
        ({"decays": ()}, "lambda needs at least one value"),
        ({"patterns": ("2-4",)}, 'pattern "2-4" is not of the form N:M'),
        ({"methods": ("sr-set",)}, 'unknown method "sr-set"'),
    ],
)
def test_studies_that_cannot_be_are_refused_at_once(changes: dict, message: str) -> None:
    with pytest.raises(SparsityError, match=message):
        Toy(**changes)


def test_the_command_takes_the_option_names_of_the_version_before(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    study_command(Toy, ["--folder", "elsewhere", "--workers=1", "--methods", "dense", "--seeds", "7"], "toy")
    shown = capsys.readouterr()
    assert "--workers is called --jobs now" in shown.err
    assert ["dense", "-", "10", "1", "-", "104.0", "-"] in [line.split() for line in shown.out.splitlines()]
    assert "More in elsewhere: report.md, results.json, curves.png, density.png" in shown.out
    assert read_json(Path("elsewhere/results.json"))["study"]["jobs"] == 1


def test_results_can_be_read_by_anyone(toy: Toy) -> None:
    conduct(replace(toy, methods=("dense",), seeds=(0,)))
    document = json.loads((toy.out / "results.json").read_text())
    assert document["study"]["seeds"] == [0]
    assert document["runs"][0]["result"] == {"test": 90, "val": None, "nothing": None}
