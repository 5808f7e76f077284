"""The search for algorithms, in children that die, hang and lie, with a stand-in for the library; and its cache."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from nm_sparsity.core.deploy import cache, child
from nm_sparsity.core.deploy import search as search_module
from nm_sparsity.core.deploy.cache import Cache, Problem, flat
from nm_sparsity.core.deploy.child import ChildError, answers
from nm_sparsity.core.deploy.cusparselt import Algorithm
from nm_sparsity.core.deploy.search import bin_of, search

CPU = torch.device("cpu")
PROBLEM = Problem("float16", "float16", 32, 32, 16, True, "relu")


def others(*changes: dict[str, object]) -> list[Problem]:
    return [PROBLEM._replace(**change) for change in changes]  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_fastest_right_one_is_found_once(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 1 is fast, 3 is refused, and 0 is as fast as 1 but wrong."""
    for name, value in {"FAST": 1, "REFUSES": 3, "SLOW_US": 20_000}.items():
        monkeypatch.setenv(f"STAND_IN_{name}", str(value))
    problems = [PROBLEM, *others({"dtype": "int8", "out_dtype": "int32", "bias": False, "activation": ""})]
    problems += others({"tokens": 1 << 40})
    found = search(problems, CPU, Cache(CPU))
    assert [found.algorithms[problem].id for problem in problems] == [1, 1, 0]
    (note,) = found.notes
    assert note.startswith("float16 32x32 float16 bias relu @1099511627776: not searched, ")
    assert "allocate" in note
    monkeypatch.setattr(sys, "executable", "")  # whatever is known needs no child
    again = search(problems[:2], CPU, Cache(CPU))
    assert again.algorithms == {problem: found.algorithms[problem] for problem in problems[:2]}
    assert not again.notes


@pytest.mark.slow
def test_what_is_wrong_kills_or_hangs_is_left_out(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WRONG": 0, "DIES": 1, "HANGS": 2}.items():
        monkeypatch.setenv(f"STAND_IN_{name}", str(value))
    problems = [PROBLEM, *others({"tokens": 64})]
    found = search(problems, CPU, known := Cache(CPU), patience=3.0)
    assert [found.algorithms[problem].id for problem in problems] == [3, 3]
    assert found.notes == [
        "float16: algorithm 1 is left out: it was ended by SIGABRT",
        "float16: algorithm 2 is left out: no answer for 3 s",
    ]
    assert known.bad == {"float16": {Algorithm(1), Algorithm(2)}}
    assert Cache(CPU).bad == known.bad


@pytest.mark.slow
def test_where_everything_is_wrong_the_default_stands_and_is_not_kept(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_WRONG", "0")
    monkeypatch.setenv("STAND_IN_ALGORITHMS", "1")
    found = search([PROBLEM], CPU, known := Cache(CPU))
    assert found.algorithms == {PROBLEM: Algorithm()}
    assert found.notes == [f"{PROBLEM}: not searched, no algorithm of cuSPARSELt computes it right"]
    assert not known.found


def test_without_a_child_the_default_runs_and_a_line_says_so(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, reason in (("", "does not know its own program"), ("/nowhere/python", "No such file or directory")):
        monkeypatch.setattr(sys, "executable", program)
        found = search([PROBLEM], CPU, known := Cache(CPU))
        assert found.algorithms == {PROBLEM: Algorithm()}
        (note,) = found.notes
        assert reason in note
        assert note.endswith("the default algorithm runs")
        assert not known.found


def test_tokens_go_by_bins() -> None:
    assert [bin_of(count) for count in (1, 2, 16, 1000, 4097, 10**6)] == [1, 16, 16, 1024, 16384, 65536]


def test_a_cache_comes_back_and_merges(stand_in: Path) -> None:
    first, second = Cache(CPU), Cache(CPU)
    first.found[str(PROBLEM)] = Algorithm(3, 2, 1)
    first.save()
    second.found[str(PROBLEM._replace(tokens=4096))] = Algorithm(5)
    second.bad["int8"] = {Algorithm(7)}
    second.save()
    known = Cache(CPU)
    assert list(known.bins(PROBLEM._replace(tokens=1))) == [(16, (3, 2, 1)), (4096, (5, 1, -1))]
    assert flat(known.bins(PROBLEM)) == (16, 3, 2, 1, 4096, 5, 1, -1)
    assert not list(known.bins(PROBLEM._replace(bias=False)))
    assert known.bad == {"int8": {Algorithm(7)}}
    assert known.path.parent == cache.folder()
    assert known.path.name.startswith("cpu-")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: "{", r"is damaged \(JSONDecodeError\)"),
        (lambda content: "[]", r"is damaged \(TypeError\)"),
        (lambda content: json.dumps({**content, "found": {"a": [1]}, "bad": 3}), r"is damaged \(AttributeError\)"),
        (lambda content: json.dumps({**content, "gpu": "NVIDIA H100"}), 'is of another gpu: "NVIDIA H100"'),
        (lambda content: json.dumps({**content, "cusparselt": "0.9.0"}), r'is of another cusparselt: "0\.9\.0"'),
        (lambda content: json.dumps({**content, "format": 99}), 'is of another format: "99"'),
    ],
)
def test_a_cache_that_cannot_be_used_is_one_warning_and_written_anew(stand_in: Path, change: object, why: str) -> None:
    known = Cache(CPU)
    known.found[str(PROBLEM)] = Algorithm(3)
    known.save()
    known.path.write_text(change(json.loads(known.path.read_text())))  # type: ignore[operator]
    with pytest.warns(UserWarning, match=f"^the cache of 2:4 algorithms .*json {why}; it will be written anew$"):
        other = Cache(CPU)
    assert not other.found
    other.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Cache(CPU).found


def test_a_cache_that_cannot_be_written_is_a_warning(stand_in: Path) -> None:
    with pytest.warns(UserWarning, match="was not saved: could not write /proc/none"):
        Cache(CPU, "/proc/none/cache.json").save()


def test_a_child_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {
        "failing": "import os; print('noise'); os.system('echo noise'); raise ValueError('what is\\nlong')",
        "killed": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
        "slow": "import time; time.sleep(60)",
    }
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {}
    for name, body in bodies.items():
        work = f"def work(request, answer):\n    answer(request + 1)\n    {body}\n"
        # Loaded by its path, so that torch is not imported each time.
        head = f"import runpy\nserve = runpy.run_path({child.__file__!r})['serve']\n"
        text = f"{head}{work}raise SystemExit(serve(work))\n"
        (tmp_path / f"{name}.py").write_text(text)
        got = []
        try:
            for answer in answers(name, 1, 1.0, first=60.0, quiet=True):
                got.append(answer)
        except ChildError as error:
            found[name] = str(error)
        assert got == [2]
    assert found == {
        "failing": "ValueError: what is",
        "killed": "it was ended by SIGILL",
        "slow": "no answer for 1 s",
    }
    with pytest.raises(ChildError, match="it ran out of time"):
        list(answers("slow", 1, 60.0, total=0.5, quiet=True))


def test_the_first_line_of_an_error() -> None:
    assert child.first_line(RuntimeError("one\ntwo")) == "one"
    assert child.first_line(KeyError()) == "KeyError"


def test_a_child_that_does_not_see_the_gpu_says_so() -> None:
    """As when `CUDA_VISIBLE_DEVICES` was changed since: devices go by their identity, not their number."""
    with pytest.raises(RuntimeError, match="the child does not see the GPU GPU-1234 among its"):
        search_module._device("GPU-1234")
    assert search_module._device(search_module._identity(CPU)) == CPU
