"""IDX files, wherever a command put them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from nm_sparsity.core import SparsityError
from nm_sparsity.core.experiments import fashion_mnist


def idx(values: np.ndarray) -> bytes:
    """The format as its authors describe it: two zeros, 8 for bytes, dimensions, sizes, values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def test_idx_files_round_trip_plain_and_gzipped(tmp_path: Path) -> None:
    expected = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    raw = idx(expected)
    (tmp_path / "plain").write_bytes(raw)
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(raw))
    for name in ("plain", "zipped.gz"):
        assert np.array_equal(fashion_mnist.read_idx(tmp_path / name), expected)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("short", idx(np.ones((3, 4)))[:-1]),
        ("shorter", b"\0\0\x08"),
        ("empty", b""),
        ("foreign", b"PNG" * 9),
        ("short.gz", gzip.compress(idx(np.ones((3, 4))), mtime=0)[:20]),
        ("plain.gz", b"no gzip"),
        ("damaged.gz", gzip.compress(bytes(1000), mtime=0)[:12] + b"\xff" * 20),
        ("missing", None),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SparsityError, match=rf"/{name} cannot be read \(.*\); fetch it again"):
        fashion_mnist.read_idx(tmp_path / name)


def test_files_are_found_anywhere_below_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 10)):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.full((n, 28, 28), n))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % 10))
    train, test = fashion_mnist.read(tmp_path)
    assert (train.images.shape, test.images.shape) == ((20, 28, 28), (10, 28, 28))
    assert (train.images == 20).all()
    assert test.labels.tolist() == list(range(10))
    assert test.labels.dtype == np.int64


@pytest.mark.skipif(fashion_mnist.INSTALLED.is_dir(), reason="Fashion-MNIST is installed on this machine")
def test_missing_files_are_named_with_the_commands_that_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SparsityError, match=r"no train-images-idx3-ubyte under .*; one of these gets") as caught:
        fashion_mnist.read(tmp_path)
    assert "apt-get download dataset-fashion-mnist" in str(caught.value)
    assert f"torchvision.datasets.FashionMNIST('{tmp_path}', download=True)" in str(caught.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SparsityError, match="there is no apt-get on this machine"):
        fashion_mnist.fetched()
