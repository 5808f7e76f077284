"""fairseq for tests: the smallest command lines, in this process or in others, and the oracle of masking."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

from nm_sparsity.core.files.checkpoint import merge
from nm_sparsity.core.files.metadata import METADATA
from nm_sparsity.translation.__main__ import USER_DIR

WIDTH = 16


def arguments(corpus: Path, save_dir: Path, *more: str, task: str = "nm_translation") -> list[str]:
    """fairseq-train's arguments for the smallest Transformer; later options win."""
    words = f"""{corpus / "bin"} --user-dir {USER_DIR} --save-dir {save_dir} --task {task} --arch transformer
        --encoder-layers 1 --decoder-layers 2 --encoder-embed-dim {WIDTH} --decoder-embed-dim {WIDTH}
        --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 --decoder-attention-heads 2
        --share-all-embeddings --optimizer adam --lr 0.01 --criterion label_smoothed_cross_entropy --cpu
        --label-smoothing 0.1 --max-tokens 600 --required-batch-size-multiple 1 --num-workers 0 --log-interval 5
        --no-progress-bar --no-epoch-checkpoints --max-update 10 --dropout 0.1 --seed 3"""
    return [*words.split(), *more]


def lm_arguments(corpus: Path, save_dir: Path, *more: str) -> list[str]:
    """The same for the smallest language model."""
    words = f"""{corpus / "bin"} --user-dir {USER_DIR} --save-dir {save_dir} --task nm_language_modeling
        --arch transformer_lm --decoder-layers 1 --decoder-embed-dim {WIDTH} --decoder-ffn-embed-dim 32
        --decoder-attention-heads 2 --share-decoder-input-output-embed --optimizer adam --lr 0.01 --cpu
        --tokens-per-sample 64 --max-tokens 600 --required-batch-size-multiple 1 --num-workers 0
        --no-progress-bar --no-epoch-checkpoints --max-update 4"""
    return [*words.split(), *more]


def environment() -> dict[str, str]:
    """For processes of fairseq's: they find this package however these tests do."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def in_subprocess(module: str, argv: list[str], *, status: int = 0, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module argv`` and hold its exit status."""
    result = subprocess.run(
        [sys.executable, "-m", module, *argv], capture_output=True, text=True, env=environment(), check=False, **kwargs
    )
    assert result.returncode == status, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def make_trainer(argv: list[str]) -> Trainer:
    """fairseq's Trainer as ``fairseq-train`` makes it, with its training data loaded and its checkpoint restored."""
    args = options.parse_args_and_arch(options.get_training_parser(), argv)
    cfg = convert_namespace_to_omegaconf(args)
    vars(checkpoint_utils.save_checkpoint).clear()
    utils.set_torch_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    checkpoint_utils.load_checkpoint(cfg.checkpoint, trainer)
    return trainer


def batches(trainer: Trainer, count: int) -> list[Any]:
    """The first `count` training batches."""
    iterator = trainer.get_train_iterator(epoch=1).next_epoch_itr(shuffle=False)
    return [batch for _, batch in zip(range(count), iterator, strict=False)]


def load(path: Path) -> Any:
    """As torch loads it without trust."""
    return torch.load(path, weights_only=True)


def shadow(path: Path) -> dict[str, torch.Tensor]:
    """The dense shadow weights in a checkpoint."""
    payload = load(path)
    return merge(payload["model"], payload["extra_state"][METADATA])


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def masked(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The oracle: `weight` (out, in) with the n largest of m kept, by a stable sort, written without our package."""
    groups = weight.detach().reshape(-1, m)
    order = groups.abs().argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(1, order[:, :n], True)
    return torch.where(keep, groups, 0.0).reshape(weight.shape)
