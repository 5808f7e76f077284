from __future__ import annotations

import json
import math
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nm_sparsity.classification import evaluate
from nm_sparsity.classification import train as train_module
from nm_sparsity.classification.configs import ClassifierConfig
from nm_sparsity.classification.train import Trainer, learning_rates, train
from nm_sparsity.core import CheckpointError, NMPattern, SparsityError, verify
from nm_sparsity.core.experiments import command_line
from nm_sparsity.core.experiments.run import read_metrics
from nm_sparsity.core.files.io import load, save
from nm_sparsity.core.files.metadata import METADATA, find_parts

Tiny = Callable[..., ClassifierConfig]


def losses(config: ClassifierConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(config.folder) if "loss" in line]


def interrupt_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the user press Ctrl-C in the step after `steps` steps."""
    step, done = Trainer._step, iter(range(steps))

    def interrupted(self: Trainer, parts: list[tuple[Tensor, Tensor]], lr: float) -> Tensor:
        if next(done, None) is None:
            raise KeyboardInterrupt
        return step(self, parts, lr)

    patch.setattr(Trainer, "_step", interrupted)


@pytest.fixture(autouse=True)
def _at_a_terminal() -> Iterator[None]:
    """Ctrl-C is heard, also where tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop_in(patch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Let the user press Ctrl-C in each step of these numbers, the first one being 1."""
    step = Trainer._step

    def pressed(self: Trainer, parts: list[tuple[Tensor, Tensor]], lr: float) -> Tensor:
        if self.position.step + 1 in numbers:
            signal.raise_signal(signal.SIGINT)
        return step(self, parts, lr)

    patch.setattr(Trainer, "_step", pressed)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_a_run_ends_with_a_finalized_verified_model_of_the_same_accuracy(tiny: Tiny) -> None:
    config = tiny("digits_1to8", sparsity__decay=1.0, epochs=2)
    summary = train(config)
    assert summary["steps"] == 20
    assert summary["finalized/top1"] == summary["test/top1"] > 30
    assert summary["test/images"] == summary["val/images"] == 360
    assert summary["sparse_density"] == 0.125
    assert len(verify(config.folder / "finalized.pt", "1:8").checked) == summary["verified_weights"] == 8
    verify(config.folder / "latest.pt", "1:8")
    for name in ("config.json", "environment.json", "summary.json", "best.pt"):
        assert (config.folder / name).is_file()
    lines = [line for line in read_metrics(config.folder) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 21))
    last = lines[-1]
    layers = [key for key in last if key.startswith("sad/")]
    assert len(layers) == 8
    assert last["sad"] == sum(last[key] for key in layers)
    assert last["flip_rate"] == last["sad"] / summary["sparse_weights"]
    assert {"lr", "images_per_s", "epoch"} <= last.keys()
    assert [line["val/top1"] for line in read_metrics(config.folder) if "val/top1" in line][-1] == summary["val/top1"]


def test_the_imagenet_recipe_trains_on_image_folders(tiny: Tiny, folders: Path) -> None:
    config = tiny("resnet18_2to4", data__root=folders, data__image_size=32, data__workers=0, batch_size=6)
    summary = train(config)
    assert (summary["steps"], summary["test/images"], summary["verified_weights"]) == (2, 6, 19)
    assert summary["finalized/top1"] == summary["test/top1"]


def test_a_dense_run_shares_every_path(tiny: Tiny) -> None:
    summary = train(tiny("digits_dense"))
    assert summary["finalized/top1"] == summary["test/top1"]
    assert (summary["model_density"], summary["verified_weights"], summary["flip_rate"]) == (1, 0, None)


RESUMED: dict[str, dict[str, Any]] = {
    "sr-ste": {},
    "ste, AdamW, accumulation, clipping, moving average": {
        "sparsity__decay": None,
        "sparsity__method": "ste",
        "optimizer__name": "adamw",
        "optimizer__lr": 0.003,
        "optimizer__clip_norm": 0.5,
        "batch_size": 104,
        "accumulation": 2,
        "ema": 0.8,
    },
    "held second moment and a moving average": {
        "sparsity__decay": None,
        "sparsity__method": "s-ste",
        "sparsity__hyperparameters": {"precondition": "0.3"},
        "optimizer__name": "adamw",
        "optimizer__lr": 0.003,
        "ema": 0.8,
    },
    "fading masks, fixed later": {
        "sparsity__decay": None,
        "sparsity__method": "decaying",
        "sparsity__hyperparameters": {"gamma": "cosine(1, 0, 0.1, 0.6)", "fix_at": 0.8},
    },
    "asp with loss scaling": {"sparsity__decay": None, "sparsity__method": "asp", "amp": "fp16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_ten_steps_equal_five_and_five_after_an_interruption(
    case: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = RESUMED[case]
    if case.startswith("asp"):
        dense = tiny("digits_dense", folder=tmp_path / "dense")
        train(dense)
        changes = {**changes, "init_from": dense.folder}
    whole = tiny(**changes, checkpoint_every=5, folder=tmp_path / "whole")
    parts = replace(whole, folder=tmp_path / "parts")
    expected = train(whole)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 7)
        train(parts)
    assert load(parts.folder / "latest.pt")["training"]["position"]["step"] == 5
    torch.manual_seed(99)
    found = train(replace(parts, resume=True))

    for name in ("latest.pt", "finalized.pt"):
        one, other = load(whole.folder / name), load(parts.folder / name)
        for payload in (one, other):
            del payload["config"]
            payload.get("training", {"position": {}})["position"].pop("seconds", None)
        assert one.keys() == other.keys()
        assert equal(one, other)
    assert losses(parts) == losses(whole)
    for key in ("test/loss", "val/loss", "flip_rate"):
        assert found[key] == expected[key]


def test_a_run_stopped_within_epochs_and_after_their_last_steps_is_the_same_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(epochs=2, ema=0.8, folder=tmp_path / "whole")
    parts = replace(whole, folder=tmp_path / "parts")
    train(whole)
    with monkeypatch.context() as patch:
        stop_in(patch, 10, 13, 20)
        for resume in (False, True, True):
            with pytest.raises(KeyboardInterrupt):
                train(replace(parts, resume=resume))
    train(replace(parts, resume=True))

    def kept(config: ClassifierConfig) -> list[Any]:
        files = [load(config.folder / name) for name in ("latest.pt", "best.pt")]
        lines = [line for line in read_metrics(config.folder) if "loss" in line or "train/loss" in line]
        for payload in files:
            del payload["config"], payload["training"]["position"]["seconds"]
        return [*files, *({name: line[name] for name in line if name != "images_per_s"} for line in lines)]

    assert equal(kept(parts), kept(whole))
    assert len(kept(parts)) == 2 + 20 + 2


@pytest.mark.parametrize(("start", "kind"), [("init_from", Path), ("pretrained", str)])
def test_a_run_resumes_without_what_it_started_from(
    start: str, kind: type, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny("digits_dense", folder=tmp_path / "dense")
    train(dense)
    source = dense.folder / "finalized.pt"
    whole = tiny("digits_2to4_asp", folder=tmp_path / "whole", **{start: kind(source)})
    parts = replace(whole, folder=tmp_path / "parts")
    expected = train(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, 4)
        train(parts)
    source.unlink()
    found = train(replace(parts, resume=True))
    assert (found["test/loss"], found["flip_rate"]) == (expected["test/loss"], 0)
    with pytest.raises(SparsityError, match=r"finalized\.pt"):
        train(replace(parts, folder=tmp_path / "new"))


def test_dropout_resumes_too(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, classes: int, arguments: object) -> torch.nn.Module:
        torch.manual_seed(3)
        fc = torch.nn.Linear(16, classes)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.Dropout(0.5), torch.nn.Sequential(fc)
        )

    monkeypatch.setattr(train_module, "build", build)
    whole = tiny(checkpoint_every=5, folder=tmp_path / "whole", sparsity__exclude=())
    parts = replace(whole, folder=tmp_path / "parts")
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 6)
        train(parts)
    train(replace(parts, resume=True))
    assert losses(parts) == losses(whole)


def test_a_resume_needs_no_metrics_and_refuses_damage(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(checkpoint_every=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 6)
        train(config)
    (config.folder / "metrics.jsonl").unlink()
    latest = config.folder / "latest.pt"
    whole = load(latest)
    training = whole["training"]
    weights = {name: torch.full_like(w, torch.nan) for name, w in whole["state_dict"].items() if w.is_floating_point()}
    for damaged in (
        5,
        {**whole, "config": None},
        {**whole, "training": []},
        {**whole, "training": {**training, "position": {"step": "x"}}},
        {**whole, "training": {**training, "position": {"stop": 1}}},
        {**whole, "training": {**training, "optimizer": {"state": {}}}},
        {**whole, "training": {**training, "generators": [torch.zeros(3)]}},
        {**whole, "state_dict": {**whole["state_dict"], **weights}},
        {key: value for key, value in whole.items() if key != METADATA},
    ):
        save(latest, damaged)
        with pytest.raises(SparsityError):
            train(replace(config, resume=True))
    save(latest, whole)
    train(replace(config, resume=True))
    assert [line["step"] for line in read_metrics(config.folder) if "loss" in line] == [6, 7, 8, 9, 10]


def test_golden_losses(tmp_path: Path) -> None:
    """30 steps of 2:4 SR-STE; a drift means that training changed.

    Rounding (two threads, NHWC) moves the losses by up to 1%; without the decay they are up to 10% lower.
    """
    command, *golden = (Path(__file__).parent / "golden_losses.txt").read_text().splitlines()
    arguments = shlex.split(command.partition("classification.train ")[2])
    assert train_module.main([*arguments, f"--out={tmp_path}"]) == 0
    found = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    assert found == pytest.approx([float(loss) for loss in golden], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_sr_ste_moves_masks_less_than_ste(pattern: str, tiny: Tiny, tmp_path: Path) -> None:
    """The paper's claim (section 4) on the demo's model, at the lambda * sum(lr) of its ImageNet run; two seeds."""
    rates = {}
    for method in ("ste", "sr-ste"):
        for seed in (0, 1):
            config = tiny(
                epochs=8,
                batch_size=64,
                log_every=2,
                seed=seed,
                folder=tmp_path / f"{method}{seed}",
                sparsity__pattern=pattern,
                sparsity__decay=None,
                sparsity__method=method,
            )
            if method == "sr-ste":
                strength = (Trainer(config, torch.device("cpu"), progress=False).strength or 0) / 2e-4
                config = replace(config, sparsity=replace(config.sparsity, decay=6 / strength))
            summary = train(config)
            if method == "sr-ste":
                assert summary["decay_strength"] == pytest.approx(6)
            rates[method, seed] = summary["flips_per_weight"]
    assert max(rates["sr-ste", 0], rates["sr-ste", 1]) < 0.7 * min(rates["ste", 0], rates["ste", 1])


@pytest.mark.slow
def test_mixed_precision_layout_and_accumulation_change_little(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny(optimizer__lr=0.05, batch_size=104, folder=tmp_path / "base")
    train(base)
    for name, changes, tolerance in (
        ("bf16", {"amp": "bf16"}, 0.05),
        ("fp16", {"amp": "fp16"}, 0.02),
        ("nhwc", {"channels_last": True}, 1e-3),
        ("parts", {"accumulation": 2}, 0.15),  # batch norm sees half as many images
    ):
        config = replace(base, folder=tmp_path / name, **changes)
        train(config)
        assert losses(config) == pytest.approx(losses(base), rel=tolerance)
        if name != "nhwc":
            assert losses(config) != losses(base)
    assert losses(base)[-1] < 0.95 * losses(base)[0]


def test_the_moving_average_is_what_is_evaluated_and_finalized(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[str, Tensor]] = []
    step = Trainer._step

    def recorded(self: Trainer, *args: Any) -> Tensor:
        loss = step(self, *args)
        steps.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return loss

    monkeypatch.setattr(Trainer, "_step", recorded)
    config = tiny("digits_dense", ema=0.75)
    train(config)
    average = steps[0]["fc.weight"]
    for state in steps[1:]:
        average = 0.75 * average + 0.25 * state["fc.weight"]
    found = load(config.folder / "finalized.pt")["state_dict"]["fc.weight"]
    assert torch.allclose(found, average, atol=1e-6)
    assert not torch.allclose(found, steps[-1]["fc.weight"], atol=1e-4)


def test_asp_keeps_the_largest_of_the_dense_run_and_never_moves_its_mask(tiny: Tiny, tmp_path: Path) -> None:
    dense = tiny("digits_dense", folder=tmp_path / "dense")
    train(dense)
    config = tiny("digits_2to4_asp", init_from=dense.folder, ema=0.9)
    summary = train(config)
    assert summary["flip_rate"] == 0
    start = load(dense.folder / "finalized.pt")["state_dict"]["layer3.0.conv2.weight"]
    end = load(config.folder / "finalized.pt")["state_dict"]["layer3.0.conv2.weight"]
    largest = torch.zeros_like(start).unflatten(1, (-1, 4))
    order = start.abs().unflatten(1, (-1, 4)).argsort(dim=2, descending=True, stable=True)[:, :, :2]
    largest.scatter_(2, order, 1.0)
    assert torch.equal(end != 0, largest.flatten(1, 2) != 0)


def test_asp_needs_a_trained_dense_model(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match=r"asp prunes a trained dense model: train one .* --init-from RUN"):
        train(tiny("digits_2to4_asp"))
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        train(tiny("digits_2to4_asp", init_from=tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is it a run folder"):
        train(tiny("digits_2to4_asp", init_from=tmp_path / "empty"))


def test_fine_tuning_starts_from_a_file(tiny: Tiny, tmp_path: Path) -> None:
    dense = tiny("digits_dense", epochs=3, folder=tmp_path / "dense")
    before = train(dense)
    tuned = tiny(
        pretrained=str(dense.folder / "finalized.pt"),
        optimizer__lr=0.01,
        sparsity__decay=3.0,
        folder=tmp_path / "tuned",
    )
    summary = train(tuned)
    assert losses(tuned)[0] < 0.6 * losses(dense)[0]
    assert summary["test/top1"] > before["test/top1"] - 10


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(
    checkpoint_every: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def diverging(self: Trainer, parts: list[tuple[Tensor, Tensor]], lr: float) -> Tensor:
        return step(self, parts, math.inf if self.position.step == 13 else lr)

    monkeypatch.setattr(Trainer, "_step", diverging)
    config = tiny(epochs=3, checkpoint_every=checkpoint_every)
    # The update of step 14 breaks the weights: a checkpoint of them is refused, else the next loss shows it.
    seen = "weights became infinite or NaN by step 14" if checkpoint_every else "loss became nan by step 15"
    with pytest.raises(SparsityError, match=rf"the {seen}; .*latest\.pt holds the last good state\. "):
        train(config)
    kept = load(config.folder / "latest.pt")
    assert all(value.isfinite().all() for value in kept["state_dict"].values())
    assert kept["training"]["position"]["step"] == (13 if checkpoint_every else 10)


def test_folders_are_never_overwritten_and_only_the_same_run_resumes(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match="cannot resume: there is no"):
        train(tiny(resume=True))
    train(tiny())
    before = (tiny().folder / "latest.pt").read_bytes()
    with pytest.raises(SparsityError, match=r"holds a run already: continue it with --resume, or choose another --out"):
        train(tiny())
    with pytest.raises(SparsityError, match=r"of a run with another config .seed: 0 -> 1"):
        train(tiny(resume=True, seed=1))
    assert (tiny().folder / "latest.pt").read_bytes() == before
    (tiny().folder / "latest.pt").write_bytes(before[: len(before) // 2])
    with pytest.raises(CheckpointError, match=r"latest\.pt is truncated"):
        train(tiny(resume=True))


def test_a_complete_run_resumes_to_its_summary(tiny: Tiny) -> None:
    expected = train(tiny())
    found = train(tiny(resume=True))
    assert found["test/loss"] == expected["test/loss"]


def test_a_weak_lambda_is_said_at_the_start(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match=r"lambda \* sum\(lr\) is 0\.000"):
        train(tiny(sparsity__decay=2e-4))
    assert "lambda * sum(lr) of the planned 10 steps: 0.0001" in capsys.readouterr().out


def test_checkpoints_hold_the_masked_weights_under_dense_names(tiny: Tiny) -> None:
    config = tiny(ema=0.5)
    train(config)
    state, metadata = find_parts(load(config.folder / "latest.pt"), "latest.pt")
    assert metadata is not None
    pattern = NMPattern.parse("2:4")
    weight = state["layer2.0.conv1.weight"]
    assert int((weight.unflatten(1, (-1, pattern.m)) != 0).sum(2).max()) <= pattern.n
    assert len(metadata.layers) == 8


MINE = """
from torch import nn

def build(classes, width=16):
    layers = [nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(width, classes))

def broken(classes):
    return nn.Linear(7, classes)
"""


def test_a_model_of_ones_own_trains_and_no_file_decides_what_code_runs(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_classifier.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    config = tiny(model="my_classifier:build", args='{"classes": 10, "width": 8}', sparsity__exclude=("5",))
    summary = train(config)
    assert (summary["verified_weights"], summary["finalized/top1"]) == (1, summary["test/top1"])
    assert load(config.folder / "finalized.pt")["state_dict"]["2.weight"].shape == (8, 8, 3, 3)
    assert evaluate.main([str(config.folder), "--device=cpu", "--json"]) == 1
    assert "which is code: say that it may run with --model my_classifier:build" in capsys.readouterr().err
    assert evaluate.main([str(config.folder), "--device=cpu", "--json", "--model=my_classifier:build"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == summary["test/top1"]
    for model, arguments, message in (
        ("my_classifier:build", "[3]", r"gives \(1, 3\) for an image, expected \(1, 10\)"),
        ("my_classifier:build", "[]", r'cannot build "my_classifier:build": .*missing 1 required'),
        ("my_classifier:broken", "[10]", r"does not take images \(1, 3, 8, 8\): "),
        ("no_such_module:build", "[10]", r'cannot build "no_such_module:build": No module named'),
    ):
        with pytest.raises(SparsityError, match=message):
            train(tiny(model=model, args=arguments, folder=tmp_path / "other"))


def test_a_pattern_that_converts_nothing_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(SparsityError, match=r"nothing of .* is sparse at 2:4"):
        train(tiny(sparsity__include=("fc",), sparsity__exclude=("fc",)))


def test_a_longer_run_takes_over_where_a_shorter_one_ended(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(epochs=1))
    capsys.readouterr()
    summary = train(tiny(epochs=3, resume=True))
    out = capsys.readouterr().out
    assert f"resuming after step 10 of 30 (epoch 1 of 3) from {tiny().folder}/latest.pt" in out
    assert "was planned for 1 epochs and takes 3 now" in out
    assert summary["steps"] == 30
    rates = [line["lr"] for line in read_metrics(tiny().folder) if "lr" in line]
    assert rates[10:] == pytest.approx(learning_rates(tiny(epochs=3), 10)[10:])
    with pytest.raises(SparsityError, match=r"has trained 3 epochs already, more than --epochs 2"):
        train(tiny(epochs=2, resume=True))


def test_the_console_says_how_it_goes_and_an_interrupted_run_how_it_goes_on(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(epochs=2, log_every=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 13)
        train(config)
    lines = capsys.readouterr().out.splitlines()
    assert f"after every epoch, latest.pt into {config.folder}" in lines[1]
    pattern = r"step (\d+)/20: loss .*, lr .*, .* images/s, .* left"
    steps = [int(found[1]) for line in lines if (found := re.fullmatch(pattern, line))]
    assert steps == [4, 8, 12]
    line = lines[-1].removeprefix("interrupted after step 13 of 20 (epoch 1.3 of 2); after step 10 it goes on with ")
    module, *arguments = line.split()[2:]
    assert module == "nm_sparsity.classification.train"
    assert train_module.main(arguments) == 0
    assert len(losses(config)) == 5


@pytest.mark.parametrize(("times", "saved"), [(1, 14), (2, 10)], ids=["once saves", "twice ends at once"])
def test_ctrl_c_is_one_line(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], times: int, saved: int
) -> None:
    step, steps = Trainer._step, iter(range(1, 99))

    def pressed(self: Trainer, parts: list[tuple[Tensor, Tensor]], lr: float) -> Tensor:
        if next(steps) == 14:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return step(self, parts, lr)

    monkeypatch.setattr(Trainer, "_step", pressed)
    monkeypatch.setattr(command_line, "ECHO", 0.0)  # the second one comes later
    monkeypatch.setattr(train_module.RECIPES, "from_command_line", lambda *_: (tiny(epochs=2), []))
    assert train_module.main([]) == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert load(tiny().folder / "latest.pt")["training"]["position"]["step"] == saved
    shown = capfd.readouterr()
    assert shown.out.count("interrupted") == 1
    assert f"; after step {saved} it goes on with python" in shown.out.splitlines()[-1]
    assert "interrupted" not in shown.err


def test_what_was_not_measured_is_not_a_number(tiny: Tiny) -> None:
    summary = train(tiny(log_every=50))
    assert (summary["flip_rate"], summary["flips_per_weight"]) == (None, None)


def test_lambda_is_chosen_from_the_learning_rates_and_a_resume_keeps_it(tiny: Tiny) -> None:
    config = tiny("digits_2to4", sparsity__decay="auto", epochs=2)
    summary = train(config)
    chosen = json.loads((config.folder / "decay.json").read_text())["decay"]
    assert chosen * sum(learning_rates(config, 10)) == pytest.approx(6, rel=5e-3)
    assert summary["config"]["sparsity"]["decay"] == chosen
    assert load(config.folder / "latest.pt")[METADATA]["hyperparameters"]["decay"] == chosen
    longer = train(replace(config, epochs=3, resume=True))  # whose learning rates add up to more
    assert longer["config"]["sparsity"]["decay"] == chosen
    (config.folder / "decay.json").write_text("{}")
    with pytest.raises(SparsityError, match=r"decay\.json is damaged"):
        train(replace(config, epochs=3, resume=True))


def test_under_adamw_probes_choose_lambda(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny("digits_2to4", sparsity__decay="auto", optimizer__name="adamw", optimizer__lr=2e-3, epochs=2)
    train(config)
    choice = json.loads((config.folder / "decay.json").read_text())
    said = capsys.readouterr().out
    assert said.startswith(f"lambda is {choice['decay']:g}: {choice['reason']}")
    assert said.count("epoch 1/2") == 1  # of the run; probes are silent
    assert choice["decay"] == min(
        map(float, choice["ratios"]), key=lambda decay: abs(choice["ratios"][f"{decay}"] - 0.775)
    )
