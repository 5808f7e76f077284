"""What only real processes can show: torchrun, a kill in the middle of a save, a disk that is full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nm_sparsity.classification.configs import ClassifierConfig
from nm_sparsity.classification.train import train
from nm_sparsity.core.experiments.run import read_metrics
from nm_sparsity.core.files.io import load

Tiny = Callable[..., ClassifierConfig]
TRAIN, EVALUATE = "nm_sparsity.classification.train", "nm_sparsity.classification.evaluate"
DIGITS = ["digits_2to4", "--device=cpu", "--batch-size=104", "--epochs=1", "--log-every=1", "--decay=1"]


def torchrun(environment: dict[str, str], module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_and_evaluate_like_one(
    tiny: Tiny, tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    torchrun(environment, TRAIN, *DIGITS, f"--out={two}", "--ema=0.5")
    alone = tiny(batch_size=104, accumulation=2, optimizer__warmup_epochs=1.0, ema=0.5, folder=one)
    train(alone)
    # Two parts of a batch on one process see what two processes see, batch norm's statistics included.
    for name, rel in (("loss", 1e-4), ("sad", 0.02)):
        found = [line[name] for line in read_metrics(two) if name in line]
        expected = [line[name] for line in read_metrics(one) if name in line]
        assert len(found) == 10
        assert found == pytest.approx(expected, rel=rel)
    trained = [load(run / "latest.pt")["training"]["model"]["state_dict"] for run in (two, one)]
    for name, value in trained[0].items():
        # Each process averages its own running statistics over as many steps as there are, and they take the mean;
        # one process with two parts averages over twice as many. Only the weights are the same.
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(value, trained[1][name], atol=1e-4), name

    summary = json.loads((two / "summary.json").read_text())
    assert summary["test/images"] == 360
    sharded = json.loads(torchrun(environment, EVALUATE, str(two), "--device=cpu", "--json"))
    done = subprocess.run(
        [sys.executable, "-m", EVALUATE, str(two), "--device=cpu", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    single = json.loads(done.stdout)
    assert sharded == {**single, "loss": pytest.approx(single["loss"], rel=1e-6)}
    assert single["top1"] == summary["test/top1"]


KILLED = """
import os, sys, time
from nm_sparsity.classification import train

save, fsync, saves = train.save, os.fsync, 0

def counted(path, payload):
    global saves
    saves += 1
    save(path, payload)

def slow(file):
    if saves == 3:
        print("saving", flush=True)
        time.sleep(600)
    fsync(file)

train.save, os.fsync = counted, slow
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_loses_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    arguments = [*DIGITS, "--checkpoint-every=2"]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments, f"--out={run}"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "saving" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert load(run / "latest.pt")["training"]["position"]["step"] == 4

    command = [sys.executable, "-m", TRAIN, *arguments]
    subprocess.run([*command, f"--out={run}", "--resume"], env=environment, check=True, capture_output=True)
    subprocess.run([*command, f"--out={whole}"], env=environment, check=True, capture_output=True)
    found, expected = (load(folder / "finalized.pt")["state_dict"] for folder in (run, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path, environment: dict[str, str]) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    arguments = [*DIGITS, "--epochs=3"]
    process = subprocess.Popen(
        [sys.executable, "-m", TRAIN, *arguments, f"--out={run}"], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 13/"):
        assert process.poll() is None
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    step = load(run / "latest.pt")["training"]["position"]["step"]
    assert 13 <= step < 30
    assert f"stopped by SIGTERM after step {step} of 30" in out
    command = out.splitlines()[-1].partition("goes on with ")[2].split()
    assert command == ["python", "-m", TRAIN, str(run), "--resume"]
    subprocess.run([sys.executable, *command[1:]], env=environment, check=True, capture_output=True)
    subprocess.run(
        [sys.executable, "-m", TRAIN, *arguments, f"--out={whole}"], env=environment, check=True, capture_output=True
    )
    found, expected = (load(folder / "finalized.pt")["state_dict"] for folder in (run, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_sigterm_to_all_processes_of_a_run_saves_too(tmp_path: Path, environment: dict[str, str]) -> None:
    """As timeout sends it: to the run, and again to its group, with the process that loads its images."""
    process = subprocess.Popen(
        [sys.executable, "-m", TRAIN, *DIGITS, "--epochs=90", "--data.workers=1", f"--out={tmp_path / 'run'}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 13/"):
        assert process.poll() is None
    process.terminate()
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    step = load(tmp_path / "run" / "latest.pt")["training"]["position"]["step"]
    assert out.splitlines()[-1].startswith(f"stopped by SIGTERM after step {step} of 900 ")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # none is left


FULL = """
import resource, sys
from nm_sparsity.classification import train

save, saves = train.save, 0

def save_until_full(path, payload):
    global saves
    saves += 1
    if saves == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(path, payload)

train.save = save_until_full
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, environment: dict[str, str]) -> None:
    """The system refuses to write more than 100 kB into a file, from the third checkpoint on."""
    run = tmp_path / "run"
    arguments = [*DIGITS, "--checkpoint-every=2", f"--out={run}"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert f"error: could not write {run}/latest.pt" in done.stderr
    assert "Traceback" not in done.stderr
    assert load(run / "latest.pt")["training"]["position"]["step"] == 4
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_users_mistake_shows_no_traceback(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        TRAIN,
        "fashion_mnist_2to4",
        f"--data={tmp_path}",
        f"--out={tmp_path / 'run'}",
    ]
    if Path("/usr/share/datasets/fashion-mnist").exists():
        command = [sys.executable, "-m", TRAIN, "digits_2to5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def as_written(commands: str, folder: Path, environment: dict[str, str]) -> str:
    """What the commands of a page print in `folder`; they must succeed."""
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=folder,
        env={**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_readme_trains_on_ones_own_images_as_written(
    folders: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """With fewer and smaller images and epochs."""
    text = (Path(__file__).resolve().parents[2] / "classification" / "README.md").read_text(encoding="utf-8")
    commands = text.partition("```sh\n")[2].partition("```")[0]
    small = "--batch-size 6 --epochs 1 --data.image-size 32 --data.workers 0"
    assert "--batch-size 32 --epochs 30" in commands
    folders.rename(tmp_path / "my-images")
    printed = as_written(commands.replace("--batch-size 32 --epochs 30", small), tmp_path, environment)
    assert printed.count("my-images/val/n0") == 6
    assert "19 weights checked, 0 violate their pattern" in printed


@pytest.mark.slow
def test_the_readme_trains_ones_own_model_as_written(tmp_path: Path, environment: dict[str, str]) -> None:
    text = (Path(__file__).resolve().parents[2] / "classification" / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Your own model\n")[2]
    (tmp_path / "mine.py").write_text(section.partition("```python\n")[2].partition("```")[0])
    commands = section.partition("```sh\n")[2].partition("```")[0].replace("--out", "--epochs 1 --out")
    printed = as_written(commands, tmp_path, environment)
    assert "1 sparse weights verified" in printed
    assert "most often mistaken for" in printed
