"""Recipes and the command that trains them: what it hands to fairseq, where it stops, and what it goes on from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_tools import arguments, environment, equal, load, make_trainer, shadow

from nm_sparsity.core import CheckpointError, SparsityConfig, SparsityError
from nm_sparsity.core.experiments.command_line import STOPS
from nm_sparsity.translation import recipes, train
from nm_sparsity.translation.plugin import NMTranslationTask

Fairseq = Callable[[list[str]], None]

SMALL = [
    *("--encoder-layers", "1", "--decoder-layers", "1", "--max-tokens", "600", "--cpu"),
    *("--log-interval", "1", "--lr-scheduler", "fixed", "--warmup-updates", "0"),
]


def updates(checkpoint: Path) -> int:
    """The updates that made a checkpoint."""
    count: int = load(checkpoint)["optimizer_history"][-1]["num_updates"]
    return count


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> recipes.TransformerConfig:
    """A run of our command that SIGTERM, sent twice as timeout does it, ended after some updates."""
    config = replace(recipes.get("tiny_number_words"), data=corpus, folder=tmp_path_factory.mktemp("stopped") / "run")
    where = ["--data", str(config.data), "--out", str(config.folder)]
    with subprocess.Popen(
        [sys.executable, "-m", "nm_sparsity.translation.train", "tiny_number_words", *where, *SMALL],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            assert "fairseq_cli.train" not in line  # with the whole config, and the whole model
            if "num_updates=3" in line:
                break
        process.send_signal(signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at update" in rest
    log = (config.folder / "fairseq.log").read_text()
    assert "| fairseq_cli.train | {" in log
    assert "stopped by SIGTERM at update" in log
    return config


@pytest.mark.slow
def test_resuming_after_sigterm_is_exact(stopped: recipes.TransformerConfig, tmp_path: Path, fairseq: Fairseq) -> None:
    shutil.copytree(stopped.folder, tmp_path / "stopped")
    done = updates(stopped.folder / "checkpoint_last.pt")
    assert 3 <= done < 100
    for name in ("stopped", "straight"):
        config = replace(stopped, folder=tmp_path / name)
        fairseq([*config.arguments(), *SMALL, "--max-update", str(done + 2)])
    assert equal(*(shadow(tmp_path / name / "checkpoint_last.pt") for name in ("stopped", "straight")))


def test_a_run_records_its_config_as_data(stopped: recipes.TransformerConfig) -> None:
    written = json.loads((stopped.folder / recipes.CONFIG).read_text())
    assert written["config"]["sparsity"]["pattern"] == "2:4"
    assert written["options"] == SMALL
    assert written["corpus"]["languages"] == ["en", "de"]
    assert recipes.recorded(stopped.folder) == stopped.to_dict()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sparsity": SparsityConfig(decay=0.02)}, r"sparsity.decay: 0\.0002 -> 0\.02"),
        (
            {"sparsity": SparsityConfig(method="ste")},
            r"sparsity.method: sr-ste -> ste; sparsity.decay: 0\.0002 -> None",
        ),
        ({"seed": 2}, "seed: 1 -> 2"),
        ({"init_from": Path(__file__)}, "init_from: None -> "),
    ],
)
def test_a_folder_with_another_run(stopped: recipes.TransformerConfig, change: dict, named: str) -> None:
    before = (stopped.folder / recipes.CONFIG).read_text()
    with pytest.raises(SparsityError, match=rf"holds another run \({named}.*choose another folder with --out"):
        train.train(replace(stopped, **change))
    assert (stopped.folder / recipes.CONFIG).read_text() == before


@pytest.mark.parametrize("option", ["--max-updat=9", "--fp16"])
def test_a_run_does_not_go_on_with_what_was_refused(
    stopped: recipes.TransformerConfig, tmp_path: Path, option: str
) -> None:
    """By fairseq, which does not know it, or by our task."""
    begun = replace(stopped, folder=shutil.copytree(stopped.folder, tmp_path / "begun"))
    before = (begun.folder / recipes.CONFIG).read_text()
    for config in (begun, replace(stopped, folder=tmp_path / "new")):
        with pytest.raises((SystemExit, SparsityError)):
            train.train(config, [*SMALL, option])
    assert (begun.folder / recipes.CONFIG).read_text() == before
    assert not (tmp_path / "new" / recipes.CONFIG).exists()


def test_a_run_that_has_begun_does_not_need_what_it_started_from(tmp_path: Path) -> None:
    config = replace(recipes.get("tiny_number_words"), folder=tmp_path / "run", init_from=tmp_path / "dense")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / recipes.BEST).touch()
    assert str(tmp_path / "dense" / recipes.BEST) in config.arguments()
    (tmp_path / "dense").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        config.arguments()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / recipes.LAST).touch()
    assert "--finetune-from-model" not in config.arguments()


def test_fairseqs_own_command_resumes_no_other_method(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "checkpoint_last.pt", tmp_path)
    for changed, named in (["--nm-method", "ste"], "ste"), (["--nm-decay", "0.5"], "sr-ste and decay 0.5"):
        with pytest.raises(CheckpointError, match=f"of a run with sr-ste and decay 0.0002, not {named}: choose"):
            make_trainer(arguments(corpus, tmp_path, *changed))


def test_a_finished_run_trains_no_further(
    corpus: Path, trained: Path, tmp_path: Path, fairseq: Fairseq, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(trained / "checkpoint_last.pt", tmp_path)
    caplog.set_level("INFO")
    for limits, expected in (["40"], 40), (["20"], 40), (["99", "--max-epoch", "1"], 40), (["41"], 41):
        caplog.clear()
        fairseq(arguments(corpus, tmp_path, "--max-update", *limits))
        assert updates(tmp_path / "checkpoint_last.pt") == expected
        assert ("training ended after 40 updates: nothing left to do" in caplog.text) == (expected == 40)


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_a_recipe_is_a_command_line_that_fairseq_takes(name: str) -> None:
    recipe = replace(recipes.get(name), seed=7)
    args = options.parse_args_and_arch(options.get_training_parser(), recipe.arguments())
    cfg = convert_namespace_to_omegaconf(args)
    assert cfg.task.nm_pattern == "2:4"
    assert cfg.common.seed == 7
    assert cfg.dataset.required_batch_size_multiple == 1
    assert cfg.checkpoint.save_dir == f"runs/{name}"
    if "tiny" in name:  # fairseq's language models keep 512 at both ends unless told
        widths = {key: value for key, value in vars(args).items() if key.startswith("decoder_") and "put_dim" in key}
        assert set(widths.values()) == {128}


def test_the_paper_setting_is_vaswanis_base() -> None:
    fairseq = recipes.get("transformer_base_wmt14_2to4").fairseq
    assert (fairseq["adam-betas"], fairseq["warmup-updates"], fairseq["label-smoothing"]) == ("(0.9, 0.98)", 4000, 0.1)
    # The sum of learning rates that the recipe's lambda is chosen by.
    total = 7e-4 * (sum(t / 4000 for t in range(4000)) + sum((4000 / t) ** 0.5 for t in range(4000, 100_000)))
    assert total == pytest.approx(24, abs=0.5)


def from_command_line(*arguments: str) -> tuple[recipes.TransformerConfig, list[str]]:
    return recipes.RECIPES.from_command_line(arguments, "train", "fairseq-train's options")


def test_overrides_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    config, more = from_command_line(
        "tiny_number_words", "--method", "ste", "--pattern", "1:4", "--max-update", "7", "--cpu"
    )
    assert (config.sparsity.method, config.sparsity.pattern, config.sparsity.decay) == ("ste", "1:4", None)
    assert more == ["--max-update", "7", "--cpu"]
    with pytest.raises(SparsityError, match="unknown recipe"):
        from_command_line("tiny_numbers")
    assert not capsys.readouterr().err
    old, _ = from_command_line("tiny_number_words", "--run", "a", "--sparsity.method=ste", "--sparsity.pattern", "1:4")
    assert old == replace(config, folder=Path("a"))
    assert "--run is called --out now" in capsys.readouterr().err


def test_print_config_shows_the_run_without_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["tiny_number_words", "--beam", "3", "--print-config"])
    assert stop.value.code == 0
    expected = replace(recipes.get("tiny_number_words"), beam=3)
    assert json.loads(capsys.readouterr().out) == expected.to_dict()


def test_our_options_take_none_of_fairseqs() -> None:
    ours = {"--out", "--resume", "--init-from", "--data", "--beam", "--lenpen"}
    ours |= {f"--{field.name}" for field in fields(SparsityConfig)}
    theirs = set(options.get_training_parser()._option_string_actions)
    assert "--max-update" in theirs
    assert not ours & theirs


def test_bad_starts_are_named(corpus: Path, tmp_path: Path) -> None:
    asp = SparsityConfig(method="asp")
    with pytest.raises(SparsityError, match="not a prepared corpus"):
        train.train(recipes.TransformerConfig(data=tmp_path, folder=tmp_path / "run"))
    with pytest.raises(SparsityError, match="asp prunes a trained dense model: name its run with --init-from"):
        train.train(recipes.TransformerConfig(data=corpus, folder=tmp_path / "run", sparsity=asp))
    with pytest.raises(SparsityError, match="there is no checkpoint"):
        train.train(
            recipes.TransformerConfig(data=corpus, folder=tmp_path / "run", sparsity=asp, init_from=tmp_path / "no.pt")
        )
    with pytest.raises(CheckpointError, match=r"cannot resume: .* holds no checkpoint_last\.pt; leave --resume out"):
        train.train(recipes.TransformerConfig(data=corpus, folder=tmp_path / "run", resume=True))
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(SparsityError, match=r"cannot write to the folder .*file: File exists"):
        train.train(recipes.TransformerConfig(data=corpus, folder=tmp_path / "file"))


@pytest.mark.slow
def test_lambda_is_chosen_by_probes(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(recipes.get("tiny_number_words"), data=corpus, folder=tmp_path / "run")
    config = replace(config, sparsity=SparsityConfig(decay="auto"))
    train.train(config, [*SMALL, "--max-update", "8"])
    choice = json.loads((config.folder / "decay.json").read_text())
    assert choice["ratios"]
    said = capsys.readouterr().out
    assert said.startswith(f"lambda is {choice['decay']:g}: {choice['reason']}")
    assert said.count("fairseq-train ") == 1  # probes are silent
    there = load(config.folder / "checkpoint_last.pt")["extra_state"]["nm_sparsity"]
    assert there["hyperparameters"]["decay"] == choice["decay"]
    assert there["hyperparameters"].get("total_steps") is None
    train.train(config, [*SMALL, "--max-update", "10"])  # goes on with the lambda that was chosen
    assert updates(config.folder / "checkpoint_last.pt") == 10
    with pytest.raises(SparsityError, match="let one device choose"):
        train.train(replace(config, folder=tmp_path / "other"), [*SMALL, "--distributed-world-size", "2"])


def test_ctrl_c_saves_and_ends(
    corpus: Path, tmp_path: Path, fairseq: Fairseq, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, steps = NMTranslationTask.train_step, iter(range(1, 99))

    def pressed(self: NMTranslationTask, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(NMTranslationTask, "train_step", pressed)
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOPS}
    caplog.set_level("INFO")
    try:
        with pytest.raises(SystemExit) as left:
            fairseq(arguments(corpus, tmp_path))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert left.value.code == 128 + signal.SIGINT
    assert updates(tmp_path / "checkpoint_last.pt") == 3
    assert caplog.text.count("interrupted at update 3; the same command resumes from") == 1


TWO_DEVICES = """
import torch
torch.cuda.device_count = lambda: 2
torch.cuda.is_available = lambda: False  # which may ask for the count
torch.cuda.get_device_name = lambda device: "none"
"""


@pytest.mark.slow
def test_the_processes_that_fairseq_starts_log_once(corpus: Path, tmp_path: Path) -> None:
    """One for each device; here they compute on the CPU."""
    (tmp_path / "sitecustomize.py").write_text(TWO_DEVICES)
    where = ["--data", str(corpus), "--out", str(tmp_path / "run")]
    processes = ["--distributed-world-size", "2", "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]
    run = subprocess.run(
        [sys.executable, "-m", train.__name__, "tiny_number_words", *where, *SMALL, "--max-update", "2", *processes],
        env={**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for line in ("weights sparse (sr-ste)", "num_updates=2,", "valid on 'valid' subset"):
        assert run.stdout.count(line) == 1
    assert "training on 2 devices" in (tmp_path / "run" / "fairseq.log").read_text()
