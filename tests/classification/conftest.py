from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nm_sparsity.classification import configs
from nm_sparsity.classification.configs import ClassifierConfig


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tests of exact equality need the same order of sums, and the small models are fastest so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., ClassifierConfig]:
    """A digits run of 1 epoch in 10 steps; fields of the tree are given as ``optimizer__lr=...``."""

    def make(recipe: str = "digits_2to4", **changes: Any) -> ClassifierConfig:
        config = configs.get(recipe)
        config = replace(config, optimizer=replace(config.optimizer, warmup_epochs=0))
        config = replace(config, epochs=1, batch_size=107, log_every=1, folder=tmp_path / "run", device="cpu")
        if config.sparsity.method == "sr-ste":
            config = replace(config, sparsity=replace(config.sparsity, decay=1.0))
        for name, value in changes.items():
            branch, _, leaf = name.partition("__")
            config = replace(config, **{branch: replace(getattr(config, branch), **{leaf: value}) if leaf else value})
        return config

    return make


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """An image folder of 3 classes in ImageNet's layout: 4 images each to train on, 2 to validate on."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("n01", "n02", "n03")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (40, 52, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.JPEG")
    return tmp_path / "images"


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment for commands run as real processes."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
