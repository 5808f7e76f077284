from __future__ import annotations

from pathlib import Path

import pytest

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments.folders import make_folder


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
