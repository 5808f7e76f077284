"""Result files and the page drawn from them."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch

from nm_sparsity.benchmarks import report
from nm_sparsity.benchmarks.report import Result, draw, saved
from nm_sparsity.core import SparsityError


def example(what: str = "masks", device: str = "A Chip (TM) 9") -> Result:
    result = Result(what, device)
    result.environment |= {"time": "2026-01-02T03:04:05+00:00", "torch": "2.14.1+cu130", "commit": "0123456789abcdef"}
    result.rows = [
        {"weights": "w", "how": "ours", "ns/weight": 0.5, "quartiles": [0.4, 0.6]},
        {"weights": "w", "how": "triton", "not_run": "needs CUDA"},
    ]
    return result


def test_a_result_comes_back_and_its_name_says_what_it_is(tmp_path: Path) -> None:
    result = example()
    path = result.save(tmp_path / "new")
    assert path.name == "masks_a-chip-tm-9_2.14.1_2026-01-02-030405.json"
    assert Result.load(path) == result


def test_another_run_of_the_day_and_quick_ones_replace_nothing(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    for quick, time in (([], "03:04:05"), ([], "17:04:05"), (["--quick"], "20:04:05")):
        args = parser.parse_args(["--device", "cpu", "--out", str(tmp_path), *quick])
        report.set_up(args)
        result = example()
        result.environment["time"] = f"2026-01-02T{time}+00:00"
        result.save(args.out)
    assert [path.stem[-6:] for path in sorted(tmp_path.glob("*.json"))] == ["030405", "170405"]
    assert len(list(tmp_path.glob("quick/*.json"))) == 1


def test_the_table_shows_what_was_not_run() -> None:
    lines = example().table().splitlines()
    assert lines[0].split() == ["weights", "how", "ns/weight", "quartiles"]
    assert "0.4 .. 0.6" in lines[2]
    assert lines[3].endswith("not run: needs CUDA")


def test_the_page_shows_ten_telling_rows_and_links_all(tmp_path: Path) -> None:
    page, result = tmp_path / "README.md", example()
    page.write_text("\n".join(f"<!-- {what} -->\n<!-- end -->" for what in report.CHARTS).replace("-->\n<", "-->\n\n<"))
    ways = [{"how": how, "pattern": "2:4", "ns/weight": 1.0} for how in ("copy", "ours")]
    result.rows = [{"weights": f"w{i}", **way} for i in range(12) for way in ways]
    path = result.save(tmp_path / "results")
    draw(tmp_path / "results", page)
    text, whole = page.read_text(), path.with_suffix(".md").read_text()
    assert "| w9 " in text
    assert "| w10 " not in text
    assert "| copy" not in text
    assert f"[all 24 rows](results/{path.stem}.md)" in text
    assert whole.count("| ours") == whole.count("| copy") == 12


def test_rows_are_saved_as_they_come(tmp_path: Path) -> None:
    with saved("masks", torch.device("cpu"), tmp_path) as result:
        for weights in ("first", "second"):
            result.add(weights=weights)
            (path,) = tmp_path.glob("*.json")
            assert Result.load(path).rows == result.rows


def test_the_page_is_drawn_from_the_newest_file_of_each_device(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    blocks = "\n".join(f"<!-- {what} -->\nold\n<!-- end -->" for what in report.CHARTS)
    page.write_text(f"before\n{blocks}\nafter\n")
    old, new = example(), example()
    old.environment = {**old.environment, "time": "2025-01-02T03:04:05+00:00"}
    old.rows[0]["ns/weight"] = 77.0
    for result in (new, old, example(device="other")):
        result.save(tmp_path / "results")
    draw(tmp_path / "results", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "77" not in text
    assert text.count("(results/masks_") == 4  # two devices, page and file of each
    assert "commit 0123456789:" in text
    assert "| w       | ours" in text
    assert "old" not in text
    assert text.count("No result is committed yet.") == len(report.CHARTS) - 1
    draw(tmp_path / "results", page)
    assert page.read_text() == text  # redrawing changes nothing
    page.write_text("no place")
    with pytest.raises(SparsityError, match="has no place for masks"):
        draw(tmp_path / "results", page)


def test_the_projects_own_pages_are_up_to_date(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(report.PAGE.read_text())
    results = Path(shutil.copytree(report.COMMITTED, tmp_path / "results"))
    draw(results, page)
    assert page.read_text() == report.PAGE.read_text()
    for path in report.COMMITTED.glob("*.md"):
        assert (results / path.name).read_text() == path.read_text()


def test_a_failing_measurement_keeps_its_rows_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with saved("masks", torch.device("cpu"), tmp_path) as result:
            result.add(weights="w", how="ours")
            raise RuntimeError("out of memory\nmore")

    with pytest.raises(RuntimeError):
        fail()
    (path,) = tmp_path.glob("*.json")
    rows = Result.load(path).rows
    assert rows == [{"weights": "w", "how": "ours"}, {"not_run": "stopped by RuntimeError: out of memory"}]
    assert "not run: stopped by RuntimeError: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("what", report.CHARTS)
def test_pictures_are_drawn(tmp_path: Path, what: str) -> None:
    pytest.importorskip("matplotlib")
    result = Result(what, "chip", [{report.CHARTS[what][0]: 1.5, "ceiling": 2.0}, {"how": "x", "not_run": "why"}])
    picture = report.plot(result, tmp_path / "r.json")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert report.plot(Result(what, "chip"), tmp_path / "none.json") is None


def test_bad_files_and_devices(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{")
    with pytest.raises(SparsityError, match="is not a result file"):
        Result.load(tmp_path / "file")
    with pytest.raises(SparsityError, match="is not a result file"):
        Result.load(tmp_path / "none.json")
    with pytest.raises(SparsityError, match='unknown device "tpu"; choose cpu, cuda or auto'):
        report.choose_device("tpu")
