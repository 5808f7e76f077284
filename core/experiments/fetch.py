"""Data that comes in packages, fetched and unpacked with the system's own tools and without root."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments.folders import make_folder


def debian(packages: Sequence[str], into: Path) -> None:
    """Download Debian packages and unpack each under ``into/PACKAGE``; those that are there already are kept.

    Raises:
        SparsityError: where there is no apt, it finds no such package, or `into` cannot be written, with the way out.
    """
    missing = [package for package in packages if not (into / package).is_dir()]
    if not missing:
        return
    way_out = f"unpack it elsewhere (dpkg-deb -x PACKAGE.deb {into}/PACKAGE) and copy the folder"
    with tempfile.TemporaryDirectory(dir=make_folder(into)) as temporary:
        folder = Path(temporary)
        _run(["apt-get", "download", *missing], folder, f"run `apt-get update` first (root), or {way_out}")
        for package in missing:
            (file,) = folder.glob(f"{package}_*.deb")
            _run(["dpkg-deb", "-x", file.name, package], folder, way_out)
            try:
                (folder / package).rename(into / package)
            except OSError:
                if not (into / package).is_dir():  # Another process may have been quicker.
                    raise


def _run(command: Sequence[str], folder: Path, way_out: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SparsityError(f"there is no {command[0]} on this machine; {way_out}") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SparsityError(f"`{' '.join(command)}` failed: {reason}\n  {way_out}") from None
