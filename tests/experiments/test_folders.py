from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.folders import appearing, held, make_folder


def test_folders_are_made_and_left_empty(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b") == make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("inside", ["", "sub"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SparsityError, match=r"cannot write to the folder .*/file.*: (File exists|Not a directory); "):
        make_folder(tmp_path / "file" / inside)


def test_a_folder_that_takes_no_files_is_named() -> None:
    """Not even root can make a file there."""
    with pytest.raises(SparsityError, match=r"cannot write to the folder /proc/self: .*; choose another place"):
        make_folder(Path("/proc/self"))


def test_a_folder_is_held_by_one_and_let_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder):
        said = rf"run is in use by process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-.*--out$"
        with pytest.raises(SparsityError, match=said), held(folder):
            pass
        with held(tmp_path / "another"):
            pass
    assert not list(tmp_path.iterdir()), "nothing was written, so nothing is left"
    with pytest.raises(KeyError), held(folder):
        (folder / "log").touch()
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["log"]
    with held(folder):
        pass


@pytest.mark.parametrize("rank", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_processes_that_train_together_hold_a_folder_once(
    tmp_path: Path, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rank, "0")
    with held(tmp_path):
        with pytest.raises(SparsityError, match="in use"), held(tmp_path):
            pass
        monkeypatch.setenv(rank, "1")
        with held(tmp_path):
            pass


def test_of_many_at_once_one_holds_a_folder(tmp_path: Path) -> None:
    inside: list[int] = []

    def enter(number: int) -> bool:
        try:
            with held(tmp_path):
                inside.append(number)
                assert len(inside) == 1
                inside.remove(number)
        except SparsityError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert any(list(pool.map(enter, range(400))))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_process_holds_nothing_even_where_its_worker_lives(tmp_path: Path) -> None:
    script = (
        "import multiprocessing, os, signal, sys, time\nfrom pathlib import Path\n"
        "from nm_sparsity.core.experiments.folders import held\n"
        "with held(Path(sys.argv[1])):\n"
        "    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    worker.start()\n    print(worker.pid, flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        with pytest.raises(SparsityError, match=f"in use by process {process.pid} "), held(tmp_path):
            pass
        process.kill()
        process.wait()
        os.kill(worker, 0)  # It is there, or this raises.
        with held(tmp_path):
            pass
        os.kill(worker, 9)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").touch()
    with appearing(tmp_path / "out") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "out").exists()
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(SparsityError, match=r"cannot write .*out: Directory not empty"), appearing(tmp_path / "out"):
        pass
    with pytest.raises(KeyError), appearing(tmp_path / "other"):
        raise KeyError
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out", "plain"}
    assert (tmp_path / "out.partial" / "precious").exists()
