"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 and 10,000 pictures of clothes, 28 x 28, in ten classes."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.experiments import fetch

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts the files."""


@dataclass(frozen=True)
class Pictures:
    """One part of the data set."""

    images: NDArray[np.uint8]
    """(n, 28, 28), 0 is the background."""
    labels: NDArray[np.int64]
    """(n,), places in `CLASSES`."""


def read(folder: Path) -> tuple[Pictures, Pictures]:
    """The training and the test part, from IDX files anywhere under `folder` or from the installed Debian package.

    Raises:
        SparsityError: if they are nowhere, with the commands that get them, or damaged.
    """

    def part(name: str) -> Pictures:
        images, labels = (read_idx(_find(folder, f"{name}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
        return Pictures(images, labels.astype(np.int64))

    return part("train"), part("t10k")


def fetched() -> tuple[Pictures, Pictures]:
    """The same from the Debian package, which is downloaded for this once where it is not installed.

    Raises:
        SparsityError: where there is no apt, or it does not find the package.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if not INSTALLED.is_dir():
            fetch.debian([PACKAGE], Path(temporary))
        return read(Path(temporary))


def _find(folder: Path, name: str) -> Path:
    for root in (folder, INSTALLED):
        if found := sorted(root.rglob(f"{name}*")):
            return found[0]
    raise SparsityError(
        f"there is no {name} under {folder}; one of these gets Fashion-MNIST:\n"
        f"  mkdir -p {folder} && (cd {folder} && apt-get download {PACKAGE} && dpkg-deb -x {PACKAGE}_*.deb .)\n"
        f"  python -c \"import torchvision; torchvision.datasets.FashionMNIST('{folder}', download=True)\""
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of bytes, gzipped or not.

    Raises:
        SparsityError: if the file is cut short or of another format.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        if raw[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise SparsityError(f"{path} cannot be read ({error}); fetch it again") from None
