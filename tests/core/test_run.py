import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from nm_sparsity.core import SparsityConfig, SparsityError
from nm_sparsity.core.experiments.run import METRICS, Run, forget_metrics_after, read_metrics
from nm_sparsity.core.table import format_table


def test_a_run_folder_says_what_where_and_what_came_out(tmp_path: Path) -> None:
    with Run(tmp_path / "run", SparsityConfig(exclude=("fc",)), seed=7, packages=("pytest", "no-such-package")) as run:
        run.log(1, {"loss": 0.5, "phase": "warm-up"})
        run.log(2, {"loss": 0.25})
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["pattern"], config["exclude"]) == ("2:4", ["fc"])
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert (environment["torch"], environment["seed"]) == (torch.__version__, 7)
    assert environment["pytest"] == pytest.__version__
    assert "no-such-package" not in environment
    assert {"commit", "python", "cpu", "cpu_cores", "gpu", "command", "time"} <= set(environment)
    assert read_metrics(tmp_path / "run") == [{"step": 1, "loss": 0.5, "phase": "warm-up"}, {"step": 2, "loss": 0.25}]
    if find_spec("tensorboard"):
        assert list((tmp_path / "run").glob("events.out.tfevents*"))
    with Run(tmp_path / "run", None, resume=True) as run:
        run.log(3, {"loss": 0.1})
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("cut", ['{"step": 3, "lo', '{"step": 3', "\\x00\\x00", "3", "{}", '{"step": "x"}'])
def test_a_last_line_that_was_cut_off_is_no_obstacle(tmp_path: Path, cut: str) -> None:
    lines = [{"step": step, "loss": 1 / step} for step in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / METRICS).write_text(text + cut)
    assert read_metrics(tmp_path) == lines
    forget_metrics_after(tmp_path, 1)
    assert (tmp_path / METRICS).read_text() == text.splitlines()[0] + "\n"
    (tmp_path / METRICS).write_text(cut + "\n" + text)
    with pytest.raises(SparsityError, match=r"metrics\.jsonl, line 1 is damaged"):
        read_metrics(tmp_path)


def test_a_run_without_metrics_can_go_on(tmp_path: Path) -> None:
    forget_metrics_after(tmp_path, 7)
    assert read_metrics(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Run(None) as run:
        run.log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written_or_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SparsityError, match="cannot write the run folder"):
        Run(tmp_path / "file" / "run")
    with pytest.raises(SparsityError, match=r"is not a run folder: it has no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_tables_align_text_left_and_numbers_right() -> None:
    rows = [("a", 1, 0.5, None), ("long", 1000, None, True)]
    assert format_table(["name", "n", "x", "ok"], rows).splitlines() == [
        "name      n    x  ok",
        "----  -----  ---  ---",
        "a         1  0.5  -",
        "long  1,000    -  yes",
    ]
    assert format_table(["name", "n"], [("a", 1)], markdown=True).splitlines() == [
        "| name |   n |",
        "| ---- | --: |",
        "| a    |   1 |",
    ]
