"""Checkpoints: sparse as they stand, resumed exactly, averaged, read by any fairseq; and what is said of bad ones."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_tools import arguments, batches, environment, equal, in_subprocess, load, make_trainer, masked, shadow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nm_sparsity.core import CheckpointError, verify
from nm_sparsity.core.files.checkpoint import merge
from nm_sparsity.core.files.metadata import METADATA
from nm_sparsity.translation import trainer as trainer_module
from nm_sparsity.translation.average import average
from nm_sparsity.translation.evaluate import Options, evaluate, translate
from nm_sparsity.translation.plugin import install
from nm_sparsity.translation.prepare import Prepared, prepare
from nm_sparsity.translation.runs import load_run
from nm_sparsity.translation.trainer import EMA, copy, plain

Fairseq = Callable[[list[str]], None]


def sparse_names(payload: Any) -> list[str]:
    return [name for name, t in payload["model"].items() if ".layers." in name and t.dim() == 2]


@pytest.mark.slow
def test_a_checkpoint_is_sparse_as_it_stands(trained: Path) -> None:
    payload = load(trained / "checkpoint_last.pt")
    names = sparse_names(payload)
    assert len(names) == 26
    for name in names:
        assert torch.equal(payload["model"][name], masked(payload["model"][name], 2, 4))
        assert (payload["model"][name] == 0).float().mean() >= 0.5
    assert (payload["model"]["encoder.embed_tokens.weight"] == 0).float().mean() < 0.2
    assert len(verify(trained / "checkpoint_last.pt", "2:4").checked) == 26


def test_a_checkpoint_holds_the_dense_shadow_weights(corpus: Path, tmp_path: Path) -> None:
    trainer = make_trainer(arguments(corpus, tmp_path))
    trainer.begin_epoch(1)
    trainer.train_step(batches(trainer, 1))
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pt"), {"train_iterator": {"epoch": 1}})
    assert equal(shadow(tmp_path / "checkpoint.pt"), dict(trainer.get_model().state_dict()))


def test_progress_log_and_tensorboard_show_the_flips(trained: Path) -> None:
    log = (trained / "train.log").read_text()
    assert "sad=" in log
    assert "flip_rate=" in log
    assert f"decay_strength={round(2e-4 * 40 * 0.01, 6)}" in log  # lambda * sum(lr)
    assert "26 of" in log  # the table of sparse layers
    events = EventAccumulator(str(trained / "tensorboard" / "train_inner")).Reload()
    assert [point.step for point in events.Scalars("sad")] == list(range(5, 41, 5))
    assert events.Scalars("flip_rate")[0].value == pytest.approx(events.Scalars("sad")[0].value / 8192, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "counted"),
    [
        ("sr-ste", ["--nm-decay", "linear(0, 0.3)", "--nm-hyperparameters", "total_steps=6"], 15 / 6),
        ("asp", [], 6),
        ("ste", ["--nm-hyperparameters", "precondition=0.3,total_steps=6"], 4),
        ("s-ste", [], 6),
    ],
)
def test_resuming_is_exact(
    corpus: Path, tmp_path: Path, fairseq: Fairseq, method: str, options: Sequence[str], counted: float
) -> None:
    """Six updates in one go, and three and three: the same weights, bit for bit."""
    options = ["--nm-method", method, *options]
    fairseq(arguments(corpus, tmp_path / "once", "--max-update", "6", *options))
    for updates in ("3", "6"):
        fairseq(arguments(corpus, tmp_path / "twice", "--max-update", updates, *options))
    once, twice = (load(tmp_path / name / "checkpoint_last.pt") for name in ("once", "twice"))
    assert equal(*(shadow(tmp_path / name / "checkpoint_last.pt") for name in ("once", "twice")))
    states = [checkpoint["extra_state"][METADATA]["state"] for checkpoint in (once, twice)]
    assert states[0].keys() == states[1].keys()
    for name, memory in states[0].items():
        assert memory["lr_sum"] == states[1][name]["lr_sum"] == pytest.approx(counted * 0.01)
        if method == "asp":
            assert torch.equal(memory["state"]["mask"], states[1][name]["state"]["mask"])


@pytest.mark.parametrize("options", [["--nm-method", "s-ste"], ["--nm-method", "decaying"]], ids=lambda o: o[1])
def test_what_was_trained_is_what_is_scored(
    corpus: Path, tmp_path: Path, fairseq: Fairseq, options: Sequence[str]
) -> None:
    """Of a method whose values are no selection too, every reader computes with the values that the file holds."""
    run = tmp_path / "run"
    fairseq(arguments(corpus, run, "--max-update", "6", "--no-epoch-checkpoints", *options))
    held = load(run / "checkpoint_last.pt")["model"]
    model, _ = load_run(run / "checkpoint_last.pt", corpus)
    for name in sparse_names({"model": held}):
        layer, _, parameter = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(layer), parameter), held[name]), name
    evaluate(Options(run / "checkpoint_last.pt", data=corpus, beam=1))
    exported = average((run / "checkpoint_last.pt",), tmp_path / "exported.pt")
    assert equal(exported["model"], held)


def test_a_dense_checkpoint_of_fairseqs_own_is_a_start(corpus: Path, tmp_path: Path, fairseq: Fairseq) -> None:
    fairseq(arguments(corpus, tmp_path / "dense", "--max-update", "3", task="translation"))
    start = tmp_path / "dense" / "checkpoint_last.pt"
    trainer = make_trainer(arguments(corpus, tmp_path / "sparse", "--finetune-from-model", str(start)))
    assert trainer.get_num_updates() == 0
    dense = torch.load(start, weights_only=True)["model"]  # the plug-in makes fairseq's own options safe to load
    assert equal(dict(trainer.get_model().state_dict()), dict(dense))


def test_moving_averages_are_sparse_as_they_stand_and_resume(corpus: Path, tmp_path: Path, fairseq: Fairseq) -> None:
    options = ["--store-ema", "--ema-decay", "0.7"]
    fairseq(arguments(corpus, tmp_path, "--max-update", "4", *options))
    extra = load(tmp_path / "checkpoint_last.pt")["extra_state"]
    for name in sparse_names({"model": extra["ema"]}):
        assert torch.equal(extra["ema"][name], masked(extra["ema"][name], 2, 4))
    averaged = merge(extra["ema"], extra[EMA])
    trainer = make_trainer(arguments(corpus, tmp_path, "--max-update", "4", *options))
    assert equal(dict(trainer.ema.get_model().state_dict()), averaged)
    assert not equal(averaged, shadow(tmp_path / "checkpoint_last.pt"))
    exported = average((tmp_path / "checkpoint_last.pt",), tmp_path / "ema.pt", ema=True)
    assert equal(exported["model"], dict(extra["ema"]))


def test_averaging_masks_the_average_of_the_shadow_weights(corpus: Path, tmp_path: Path, fairseq: Fairseq) -> None:
    paths = []
    for updates in ("3", "6"):
        fairseq(arguments(corpus, tmp_path, "--max-update", updates))
        paths.append(tmp_path / f"{updates}.pt")
        shutil.copy(tmp_path / "checkpoint_last.pt", paths[-1])
    one, other = map(shadow, paths)
    result = average((paths[0], paths[1]), tmp_path / "average.pt")
    for name in one:
        mean = (one[name] + other[name]) / 2
        expected = masked(mean, 2, 4) if name in sparse_names(result) else mean
        torch.testing.assert_close(result["model"][name], expected, atol=1e-7, rtol=1e-6)
    assert len(verify(tmp_path / "average.pt", "2:4").checked) == 26
    with pytest.raises(CheckpointError, match="has no moving average; train with --store-ema"):
        average((paths[0],), tmp_path / "ema.pt", ema=True)


STOCK = """
import sys
sys.modules["nm_sparsity"] = None  # whoever imports it fails
from fairseq_cli.{module} import cli_main
sys.argv[0] = "fairseq-{module}"
cli_main()
"""


def stock(module: str, argv: list[str], **kwargs: Any) -> str:
    """The output of fairseq's command in a process that cannot import this package."""
    result = subprocess.run(
        [sys.executable, "-c", STOCK.format(module=module), *argv],
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.mark.slow
def test_a_fairseq_without_this_package_translates_the_same(corpus: Path, trained: Path, tmp_path: Path) -> None:
    model, task = load_run(trained / "checkpoint_best.pt", corpus)
    ours = translate(model, task, "test", beam=2, lenpen=1.0)
    average((trained / "checkpoint_best.pt",), tmp_path / "exported.pt")
    decoding = [
        "--beam",
        "2",
        "--max-len-a",
        "2",
        "--max-len-b",
        "20",
        "--remove-bpe",
        "sentencepiece",
        "--max-tokens",
        "8000",
        "--cpu",
    ]
    argv = [str(corpus / "bin"), "--required-batch-size-multiple", "1", *decoding]
    for path in (trained / "checkpoint_best.pt", tmp_path / "exported.pt"):
        output = stock("generate", [*argv, "--path", str(path)])
        found = {int(line[2:].split("\t")[0]): line.split("\t")[2] for line in output.splitlines() if line[:2] == "D-"}
        assert [found[i] for i in range(len(ours))] == ours
    # What reads the task from the file needs the exported one.
    validated = stock(
        "validate",
        [str(corpus / "bin"), "--path", str(tmp_path / "exported.pt"), "--max-tokens", "800", "--task", "translation"],
    )
    assert "valid on 'valid' subset | loss" in validated


@pytest.mark.slow
def test_the_stock_commands_with_our_user_dir(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """From a folder that has nothing to do with either."""
    user_dir = in_subprocess("nm_sparsity.translation", [], cwd=tmp_path).stdout.strip()
    common = [str(corpus / "bin"), "--user-dir", user_dir, "--path", str(trained / "checkpoint_best.pt"), "--cpu"]
    task = ["--task", "nm_translation"]
    validated = in_subprocess("fairseq_cli.validate", [*common, *task, "--max-tokens", "800"], cwd=tmp_path).stdout
    assert "valid on 'valid' subset | loss" in validated
    bpe = ["--bpe", "sentencepiece", "--sentencepiece-model", str(corpus / "spm.model")]
    spoken = in_subprocess("fairseq_cli.interactive", [*common, *task, *bpe], cwd=tmp_path, input="forty-two\n").stdout
    assert "D-0\t" in spoken


@pytest.mark.slow
def test_hydra(corpus: Path, tmp_path: Path) -> None:
    config = {
        "common": {"user_dir": str(Path(trainer_module.__file__).parent), "cpu": True, "no_progress_bar": True},
        "task": {"_name": "nm_translation", "data": str(corpus / "bin"), "nm_pattern": "1:4", "nm_exclude": "*.fc1"},
        "model": {
            "_name": "transformer",
            **{
                s: {"embed_dim": 16, "ffn_embed_dim": 32, "layers": 1, "attention_heads": 2}
                for s in ("encoder", "decoder")
            },
            "share_all_embeddings": True,
        },
        "criterion": {"_name": "cross_entropy"},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "fixed"},
        "dataset": {"max_tokens": 600, "num_workers": 0},
        "optimization": {"max_update": 2, "lr": [0.01]},
        "checkpoint": {"save_dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(json.dumps({"defaults": ["_self_"], **config}))  # JSON is YAML
    hydra = ["hydra.run.dir=" + str(tmp_path / "hydra"), "hydra.job_logging.disable_existing_loggers=false"]
    in_subprocess(
        "fairseq_cli.hydra_train", ["--config-dir", str(tmp_path), "--config-name", "run", *hydra], cwd=tmp_path
    )
    table = load(tmp_path / "run" / "checkpoint_last.pt")["extra_state"][METADATA]["layers"]
    assert {groups[0] for groups in table.values()} == {"1:4"}
    assert not any("fc1" in name for name in table)


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_parts_a_batch(corpus: Path, tmp_path: Path, fairseq: Fairseq) -> None:
    common = ["--max-update", "3", "--dropout", "0", "--nm-decay", "0.3", "--optimizer", "sgd", "--lr", "0.3"]
    fairseq(arguments(corpus, tmp_path / "one", "--update-freq", "2", *common))
    distributed = f"""--distributed-world-size 2 --distributed-no-spawn --distributed-backend gloo
        --distributed-init-method file://{tmp_path / "rendezvous"} --ddp-backend legacy_ddp""".split()
    argv = arguments(corpus, tmp_path / "two", *common, *distributed)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "fairseq_cli.train", *argv, "--distributed-rank", str(rank)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]
    one, two = (shadow(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_another_pattern(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "checkpoint_last.pt", tmp_path)
    with pytest.raises(CheckpointError, match=r"is 1:4 along dimensions \[1\] in this model and 2:4 along"):
        make_trainer(arguments(corpus, tmp_path, "--nm-pattern", "1:4"))


def test_a_checkpoint_of_another_model(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "checkpoint_last.pt", tmp_path)
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.0\.fc1\.weight has shape \(64, 16\)"):
        make_trainer(arguments(corpus, tmp_path, "--encoder-ffn-embed-dim", "64"))


def test_a_checkpoint_of_another_dictionary(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Of the same size, so that every shape fits."""
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    for language in ("en", "de"):
        dictionary = other / "bin" / f"dict.{language}.txt"
        lines = dictionary.read_text().splitlines()
        dictionary.write_text("\n".join(lines[::-1]) + "\n")
    average((trained / "checkpoint_last.pt",), tmp_path / "average.pt")
    for path in (trained / "checkpoint_last.pt", tmp_path / "average.pt"):
        assert load_run(path, corpus)
        with pytest.raises(CheckpointError, match="trained with another source and target dictionary"):
            load_run(path, other)
    payload = load(trained / "checkpoint_last.pt")
    payload["task_state"]["nm_dictionaries"]["source"] = "of another one"
    torch.save(payload, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt was trained with another dictionary than .*last\.pt"):
        average((trained / "checkpoint_last.pt", tmp_path / "other.pt"), tmp_path / "average.pt")
    shutil.copy(trained / "checkpoint_last.pt", tmp_path)
    with pytest.raises(CheckpointError, match="trained with another source and target dictionary"):
        make_trainer(arguments(other, tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_checkpoint(corpus: Path, trained: Path, tmp_path: Path, damage: str) -> None:
    whole = (trained / "checkpoint_last.pt").read_bytes()
    (tmp_path / "checkpoint_last.pt").write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"Hello")
    with pytest.raises(CheckpointError, match=r"checkpoint_last\.pt is (truncated or )?not a PyTorch checkpoint"):
        make_trainer(arguments(corpus, tmp_path))


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint(corpus: Path, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_last.pt"
    shutil.copy(trained / "checkpoint_last.pt", path)
    trainer = make_trainer(arguments(corpus, tmp_path))
    trainer.consolidate_optimizer()
    before = path.read_bytes()
    with full_disk(20_000), pytest.raises(CheckpointError, match=r"could not write .*the previous file"):
        trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1}})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_copies_of_checkpoints_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "best.pt", tmp_path / "last.pt"
    source.write_bytes(b"new" * 10_000)
    target.write_bytes(b"old")
    monkeypatch.setattr(trainer_module, "_written", {str(source)})

    def no_link(*_: object) -> None:
        raise OSError("this disk has no hard links")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.os, "link", no_link)
        with full_disk(5000), pytest.raises(CheckpointError, match=r"could not write .*last\.pt"):
            copy(str(source), str(target), overwrite=True)
        assert target.read_bytes() == b"old"
        assert copy(str(source), str(target), overwrite=True)
        assert target.read_bytes() == source.read_bytes()
    target.unlink()
    assert copy(str(source), str(target))
    assert copy(str(source), str(target))  # once more, onto itself
    assert target.stat().st_ino == source.stat().st_ino
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_runs_of_other_tasks_are_fairseqs_own(corpus: Path, tmp_path: Path, fairseq: Fairseq) -> None:
    install()
    fairseq(arguments(corpus, tmp_path, "--max-update", "2", task="translation"))
    payload = load(tmp_path / "checkpoint_last.pt")
    assert METADATA not in payload["extra_state"]
    assert "nm_dictionaries" not in payload["task_state"]
    make_trainer(arguments(corpus, tmp_path, "--max-update", "2", task="translation"))
    assert checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))["model"]
    best, last = (tmp_path / f"checkpoint_{name}.pt" for name in ("best", "last"))
    assert best.stat().st_ino != last.stat().st_ino  # a hard link would be ours


def test_plain_values_survive_safe_loading(tmp_path: Path) -> None:
    value = {"a": argparse.Namespace(b=np.float64(0.5), c=[np.int64(3)]), "d": (np.arange(3), "text", None)}
    torch.save(plain(value), tmp_path / "plain.pt")
    found = load(tmp_path / "plain.pt")
    assert found["a"] == {"b": 0.5, "c": [3]}
    assert found["d"][0].tolist() == [0, 1, 2]
    assert found["d"][1:] == ("text", None)


def test_the_same_text_prepared_again_has_the_same_dictionary(corpus: Path, tmp_path: Path) -> None:
    rows = [
        (a, b)
        for name in ("train", "valid", "test")
        for a, b in zip(*((corpus / f"{name}.{x}").read_text().splitlines() for x in ("en", "de")), strict=True)
    ]
    sizes = Prepared.read(corpus).sentences
    splits = {"train": rows[: sizes["train"]], "valid": rows[-40:-20], "test": rows[-20:]}
    prepare(splits, tmp_path / "again", corpus="number-words", languages=["en", "de"], vocabulary=120)
    one, other = (make_trainer(arguments(c, tmp_path)).task.state_dict() for c in (corpus, tmp_path / "again"))
    assert one == other
