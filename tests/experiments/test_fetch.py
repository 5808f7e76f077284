"""Packages are fetched through the real tools; only where they come from is ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments import fetch


def apt_get(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ``apt-get`` of our own in front of the system's."""
    folder.mkdir()
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_debian_packages_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "words"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: words\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: words\n"
    )
    (root / "usr/share").mkdir(parents=True)
    (root / "usr/share/words.txt").write_text("one two")
    subprocess.run(["dpkg-deb", "--build", str(root), str(tmp_path)], check=True, capture_output=True)
    apt_get(tmp_path / "bin", f'test "$*" = "download words" && cp {tmp_path}/words_1_all.deb .', monkeypatch)
    (tmp_path / "data" / "there").mkdir(parents=True)
    fetch.debian(["there", "words"], tmp_path / "data")
    assert (tmp_path / "data/words/usr/share/words.txt").read_text() == "one two"
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"there", "words"}
    (tmp_path / "bin" / "apt-get").write_text("#!/bin/sh\nexit 1")
    fetch.debian(["there", "words"], tmp_path / "data")


def test_a_machine_without_apt_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SparsityError, match=r"no apt-get on this machine; .*dpkg-deb -x .*/data/PACKAGE"):
        fetch.debian(["words"], tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_what_apt_says_last_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt_get(tmp_path / "bin", "echo 'reading' >&2; echo 'E: Unable to locate package words' >&2; exit 100", monkeypatch)
    with pytest.raises(SparsityError) as caught:
        fetch.debian(["words"], tmp_path / "data")
    first, second = str(caught.value).splitlines()
    assert first == "`apt-get download words` failed: E: Unable to locate package words"
    assert "apt-get update" in second
