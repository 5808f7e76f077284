"""One tiny prepared corpus and one tiny trained run for all tests of translation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nm_sparsity.translation import corpora
from nm_sparsity.translation.prepare import prepare, unique
from nm_sparsity.translation.stock import checkpoint_utils
from nm_sparsity.translation.stock import train as fairseq_train

sys.path.insert(0, str(Path(__file__).parent))
from fairseq_tools import arguments, in_subprocess

# What fairseq, and torch's TensorBoard writer, cause.
WARNINGS = (
    r"ignore:.torch\.jit\.script. is deprecated",
    r"ignore:.torch\.cuda\.amp\.",
    r"ignore:torch\.cuda\.amp\.",
    r"ignore:'pin_memory' argument is set as true but no accelerator",
    r"ignore:(?s).*\bhydra\b",
    r"ignore:Support for mismatched key_padding_mask and attn_mask",
    r"ignore:User provided device_type of 'cuda', but CUDA is not available",
    r"ignore:unclosed file.*preprocess.log:ResourceWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared parallel corpus: 300 lists of numbers."""
    out = tmp_path_factory.mktemp("corpus") / "number-words"
    rows = list(unique(corpora.number_words(300, seed=0)))
    prepare(rows, out, corpus="number-words", languages=["en", "de"], vocabulary=120, held_out=20)
    return out


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus for a language model."""
    out = tmp_path_factory.mktemp("text-corpus") / "text"
    rows = [(line,) for line in corpora.pydoc_topics(seed=0)[:300]]
    prepare(rows, out, corpus="pydoc-topics", languages=["text"], vocabulary=300, held_out=30)
    return out


@pytest.fixture
def fairseq(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """``fairseq-train`` in this process."""

    def run(argv: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["fairseq-train", *argv])
        vars(checkpoint_utils.save_checkpoint).clear()  # the best validation loss of an earlier run
        fairseq_train.cli_main()

    return run


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The save-dir of 40 updates of 2:4 SR-STE, with TensorBoard events."""
    save_dir = tmp_path_factory.mktemp("trained")
    argv = arguments(corpus, save_dir, "--max-update", "40", "--tensorboard-logdir", str(save_dir / "tensorboard"))
    result = in_subprocess("fairseq_cli.train", argv, cwd=save_dir)
    (save_dir / "train.log").write_text(result.stdout)
    return save_dir
