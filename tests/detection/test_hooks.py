"""`NMSparseHook` within MMEngine's Runner: what it starts from, trains, logs, saves, resumes and refuses."""

from __future__ import annotations

import copy
import json
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import PretrainedInit
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from nm_sparsity.core import CheckpointError, SparsityConfig, SparsityError, finalize, nm_mask, verify
from nm_sparsity.core.experiments.command_line import Stopped
from nm_sparsity.core.files.io import load, save
from nm_sparsity.detection.hooks import NMSparseHook

Make = Callable[..., Any]
State = dict[str, Tensor]


@HOOKS.register_module()
class Snapshots(Hook):  # type: ignore[misc]
    """Keeps the weights before training and after every iteration."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.states: list[State] = []

    def _take(self, runner: Any) -> None:
        self.states.append({name: value.clone() for name, value in runner.model.state_dict().items()})

    def before_train(self, runner: Any) -> None:
        self._take(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._take(runner)


def snapshots(run: Make, config: Any) -> list[State]:
    config.custom_hooks.append({"type": "Snapshots"})
    runner = run(config)
    return next(hook.states for hook in runner.hooks if isinstance(hook, Snapshots))


def runner_of(config: Any, folder: Path, **entries: Any) -> Any:
    config.merge_from_dict({"work_dir": str(folder), **entries})
    config.merge_from_dict({"experiment_name": str(folder), "visualizer": {"name": str(folder)}})
    return Runner.from_cfg(config)


def assert_same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def sparse_names(checkpoint: dict[str, Any]) -> list[str]:
    return list(checkpoint["nm_sparsity"]["layers"])


@pytest.mark.slow
def test_initial_weights_are_the_dense_models(make_config: Make, run: Make) -> None:
    dense = snapshots(run, make_config(method="dense"))[0]
    sparse = snapshots(run, make_config(method="sr-ste"))[0]
    assert_same(dense, sparse)
    assert sparse["rpn_head.rpn_conv.weight"].std().item() == pytest.approx(0.01, rel=0.05)  # MMDetection's own


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "optim_wrapper.accumulative_counts=1",
        "optim_wrapper.accumulative_counts=2",
        "optim_wrapper.clip_grad={max_norm: 0.1}",
    ],
)
def test_decay_is_nominal(make_config: Make, run: Make, override: str) -> None:
    """One step with lambda differs from one without by exactly -lr * lambda * dropped weights."""
    count = 2 if override.endswith("2") else 1
    states = {decay: snapshots(run, make_config("tiny_mask_rcnn", override, decay=decay)) for decay in (0.0, 10.0)}
    before, without, with_decay = states[0.0][0], states[0.0][count], states[10.0][count]
    for name in ("backbone.layer1.0.conv1.weight", "roi_head.bbox_head.shared_fcs.0.weight"):
        dropped = before[name] * ~nm_mask(before[name], "2:4")
        torch.testing.assert_close(with_decay[name] - without[name], -0.01 * 10.0 * dropped, atol=2e-8, rtol=1e-4)


def test_checkpoint_is_sparse_as_it_stands(trained: Path) -> None:
    checked = verify(trained / "epoch_1.pth", "2:4").checked
    assert len(checked) == 31
    state = load(trained / "epoch_1.pth")["state_dict"]
    assert (state["backbone.layer1.0.conv1.weight"] == 0).float().mean().item() == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("hook", [None, {"type": "EMAHook", "momentum": 0.1}], ids=["plain", "ema"])
@pytest.mark.parametrize(
    "sparsity",
    [
        {"method": "sr-ste"},
        {"method": "asp"},
        {"method": "decaying", "hyperparameters": {"gamma": "linear(1, 0)", "total_steps": 4}},
    ],
    ids=lambda sparsity: sparsity["method"],
)
def test_resume_is_exact(make_config: Make, run: Make, tmp_path: Path, sparsity: Any, hook: Any) -> None:
    def config(epochs: int) -> Any:
        made = make_config(**sparsity)
        made.train_cfg.max_epochs = epochs
        made.custom_hooks += [copy.deepcopy(hook)] if hook else []
        return made

    run(config(2), tmp_path / "straight")
    run(config(1), tmp_path / "resumed")
    run(config(2), tmp_path / "resumed", resume=True)
    straight, resumed = (load(tmp_path / name / "epoch_2.pth") for name in ("straight", "resumed"))
    assert_same(straight["state_dict"], resumed["state_dict"])
    assert_same(straight["nm_sparsity"]["dropped"], resumed["nm_sparsity"]["dropped"])
    if hook:
        assert_same(straight["ema_state_dict"], resumed["ema_state_dict"])
    verify(tmp_path / "resumed" / "epoch_2.pth", "2:4")


def test_ema_averages_the_shadow_weights(make_config: Make, run: Make, tmp_path: Path) -> None:
    config = make_config(method="sr-ste")
    config.custom_hooks.append({"type": "EMAHook", "momentum": 0.25})
    start, first, second = snapshots(lambda made: run(made, tmp_path / "ema"), config)
    checkpoint = load(tmp_path / "ema" / "epoch_1.pth")
    name = "neck.fpn_convs.0.conv.weight"
    average = 0.75 * first[name] + 0.25 * second[name]  # the first update copies
    mask = nm_mask(average, "2:4")
    torch.testing.assert_close(checkpoint["state_dict"][name], average * mask)
    torch.testing.assert_close(checkpoint["nm_sparsity"]["dropped"][name], average[~mask])
    assert torch.equal(checkpoint["ema_state_dict"][f"module.{name}"], second[name])
    assert not torch.equal(start[name], second[name])


@pytest.mark.slow
def test_asp_fixes_the_masks_of_the_dense_checkpoint(make_config: Make, run: Make, tmp_path: Path) -> None:
    run(make_config(method="dense"), tmp_path / "dense")
    dense = load(tmp_path / "dense" / "epoch_1.pth")["state_dict"]
    run(make_config("tiny_mask_rcnn", f"load_from={tmp_path}/dense/epoch_1.pth", method="asp"), tmp_path / "asp")
    pruned = load(tmp_path / "asp" / "epoch_1.pth")
    for name in sparse_names(pruned):
        pattern, dims = pruned["nm_sparsity"]["layers"][name]
        assert torch.equal(pruned["state_dict"][name] != 0, nm_mask(dense[name], pattern, tuple(dims))), name


def test_frozen_stages_are_masked_and_not_trained(make_config: Make, run: Make) -> None:
    config = make_config("tiny_mask_rcnn", "model.backbone.frozen_stages=1", method="sr-ste")
    states = snapshots(run, config)
    name = "backbone.layer1.0.conv1.weight"
    assert torch.equal(states[0][name], states[-1][name])
    assert not torch.equal(states[0]["backbone.layer2.0.conv1.weight"], states[-1]["backbone.layer2.0.conv1.weight"])
    checkpoint = load(Path(config.work_dir) / "epoch_1.pth")
    assert torch.equal(checkpoint["state_dict"][name], states[0][name] * nm_mask(states[0][name], "2:4"))


def test_fuse_conv_bn_after_finalize(make_config: Make, run: Make) -> None:
    from mmcv.cnn import fuse_conv_bn

    model = run(make_config(method="sr-ste")).model.eval()
    picture = torch.rand(1, 3, 64, 64)
    expected = model.backbone(picture)
    finalize(model)
    fused = fuse_conv_bn(model.backbone)
    verify(fused, "2:4")
    for a, b in zip(fused(picture), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_include_exclude_and_patterns_reach_core(make_config: Make, run: Make) -> None:
    options = {"include": ("backbone.*",), "exclude": ("backbone.layer1",), "patterns": {"backbone.layer3": "1:4"}}
    runner = run(make_config(**options))
    hook = next(hook for hook in runner.hooks if isinstance(hook, NMSparseHook))
    assert hook.report is not None
    patterns = {weight.name.rsplit(".", 1)[0]: weight.pattern for weight in hook.report.weights}
    assert patterns["backbone.layer1.0.conv1"] == patterns["neck.fpn_convs.0.conv"] == "dense"
    assert patterns["backbone.layer2.0.conv1"] == "2:4"
    assert patterns["backbone.layer3.0.conv1"] == "1:4"


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_sad_and_flip_rate_reach_the_log(make_config: Make, run: Make, tmp_path: Path, count: int) -> None:
    """With gradient accumulation, the step that is measured comes an iteration later."""
    config = make_config("tiny_mask_rcnn", f"optim_wrapper.accumulative_counts={count}", method="sr-ste")
    config.optim_wrapper.optimizer.lr = 0.5
    config.custom_hooks[0].update(interval=1, per_layer=True)
    config.default_hooks.logger.interval = 1
    config.log_level = "INFO"
    states = snapshots(lambda made: run(made, tmp_path / "run"), config)
    (scalars,) = (tmp_path / "run").glob("*/vis_data/scalars.json")
    last = [json.loads(line) for line in scalars.read_text().splitlines()][-1]
    before = states[0] if count == 2 else states[1]
    name = "backbone.layer2.0.conv1.weight"
    sad = (nm_mask(before[name], "2:4") ^ nm_mask(states[2][name], "2:4")).sum().item()
    assert last[f"sad_{name}"] == sad > 0
    assert last["sad"] == sum(value for key, value in last.items() if key.startswith("sad_"))
    assert last["flip_rate"] == pytest.approx(last["sad"] / 982_880)
    (events,) = (tmp_path / "run").glob("*/vis_data/events.out.tfevents*")
    board = EventAccumulator(str(events)).Reload()
    for key in ("sad", "flip_rate"):
        assert board.Scalars(key)[-1].value == pytest.approx(last[key])
    (log,) = (tmp_path / "run").glob("*/*.log")
    assert log.read_text().count("sparse model:") == 1


def test_testing_leaves_the_model_dense(make_config: Make, trained: Path, tmp_path: Path) -> None:
    """What is tested is what the file holds: `tools/test.py` needs no hook."""
    runner = runner_of(make_config(pattern="2:4"), tmp_path, load_from=str(trained / "epoch_1.pth"))
    runner.test()
    assert type(runner.model.backbone.conv1) is torch.nn.Conv2d
    assert_same(dict(runner.model.state_dict()), load(trained / "epoch_1.pth")["state_dict"])


@pytest.mark.slow
def test_a_pretrained_backbone_is_loaded_before_conversion(
    make_config: Make, run: Make, trained: Path, tmp_path: Path
) -> None:
    """From a file such as nm_sparsity.classification writes: a classifier's names, and its table of sparse weights."""
    state = load(trained / "epoch_1.pth")["state_dict"]
    backbone = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    payload = {"state_dict": {**backbone, "fc.bias": torch.zeros(1000)}, "config": {"arch": "resnet18"}}
    payload["nm_sparsity"] = {"format": 1, "method": "sr-ste", "layers": {"layer1.0.conv1.weight": ["2:4", [1]]}}
    save(tmp_path / "finalized.pt", payload)
    config = make_config(method="sr-ste")
    config.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": f"{tmp_path}/finalized.pt"}
    start = snapshots(run, config)[0]
    assert_same({name: start[f"backbone.{name}"] for name in backbone}, backbone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="AmpOptimWrapper needs a GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_amp(make_config: Make, run: Make, dtype: str) -> None:
    states = {}
    for decay in (0.0, 10.0):
        config = make_config(
            "tiny_mask_rcnn", "optim_wrapper.type=AmpOptimWrapper", f"optim_wrapper.dtype={dtype}", decay=decay
        )
        states[decay] = snapshots(run, config)
    name = "backbone.layer1.0.conv1.weight"
    dropped = states[0.0][0][name] * ~nm_mask(states[0.0][0][name], "2:4")
    torch.testing.assert_close(states[10.0][1][name] - states[0.0][1][name], -0.1 * dropped, atol=1e-7, rtol=1e-2)


class RunsCode:
    def __reduce__(self) -> Any:
        return (Path("code_ran").touch, ())


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("where", ["load_from", "Pretrained", PretrainedInit], ids=["load_from", "name", "class"])
def test_a_pickle_with_code_is_not_loaded(
    make_config: Make, run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, sparse: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": RunsCode()}))
    torch.save({"state_dict": {}, "meta": RunsCode()}, tmp_path / "evil_zip.pth")
    for name in ("evil.pth", "evil_zip.pth"):
        config = make_config(method="sr-ste")
        if not sparse:
            config.custom_hooks = []
        if where == "load_from":
            config.load_from = name
        else:
            config.model.backbone.init_cfg = {"type": where, "checkpoint": name}
        with pytest.raises(CheckpointError, match=name):
            run(config, tmp_path / "run")
    assert not (tmp_path / "code_ran").exists()


@pytest.mark.parametrize("mode", ["test", "val"])
def test_a_pickle_with_code_is_not_tested(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "meta": RunsCode()}, "evil.pth")
    config = make_config(pattern="2:4")
    config.val_dataloader, config.val_evaluator = config.test_dataloader, config.test_evaluator
    config.val_cfg = {"type": "ValLoop"}
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        getattr(runner_of(config, tmp_path, load_from="evil.pth"), mode)()
    assert not (tmp_path / "code_ran").exists()


def test_a_file_without_any_name_of_the_model_is_refused(make_config: Make, run: Make, tmp_path: Path) -> None:
    """MMEngine would only warn, and ASP would prune random weights."""
    torch.save({"conv1.weight": torch.zeros(32, 3, 7, 7)}, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match=r"no name in .*backbone\.pth is one of MaskRCNN's .*init_cfg"):
        run(make_config("tiny_mask_rcnn", f"load_from={tmp_path}/backbone.pth", method="asp"))


@pytest.mark.slow
def test_resuming_another_pattern_is_refused(make_config: Make, run: Make, tmp_path: Path) -> None:
    run(make_config(pattern="2:4"), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"cannot resume: .* is 1:4 along .* 2:4 along"):
        runner_of(make_config(pattern="1:4"), tmp_path / "run", resume=True).train()


def test_a_second_hook_is_refused(make_config: Make, run: Make) -> None:
    config = make_config(pattern="2:4")
    config.custom_hooks.append({"type": "NMSparseHook", "pattern": "1:4"})
    with pytest.raises(SparsityError, match="more than once"):
        run(config)


def test_fsdp_is_refused(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    runner = runner_of(make_config(pattern="2:4"), tmp_path)
    runner.model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(runner.model)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    with pytest.raises(SparsityError, match=r"sharded by FSDP .* MMDistributedDataParallel"):
        runner.call_hook("before_run")


def test_options_are_checked_when_the_config_is_built() -> None:
    with pytest.raises(SparsityError, match=r"no option lamda; it takes pattern, method, decay"):
        NMSparseHook(lamda=1e-4)
    with pytest.raises(SparsityError, match=r"5:4"):
        NMSparseHook(pattern="5:4")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("exclude", "backbone.conv1", "a list of globs"),
        ("patterns", "1:4", "globs and their patterns"),
        ("decay", {}, "a number or a schedule"),
        ("layout", 5, "text"),
        ("interval", "a", "a number of iterations"),
        ("interval", -1, "0 .* or more"),
    ],
)
def test_options_of_the_wrong_type_are_named(option: str, value: Any, expected: str) -> None:
    with pytest.raises(SparsityError, match=rf"NMSparseHook: {option} is {value!r}, expected {expected}"):
        NMSparseHook(**{option: value})


def test_none_is_the_default() -> None:
    options = ("pattern", "decay", "include", "exclude", "patterns")
    assert NMSparseHook(**dict.fromkeys(options)).config == SparsityConfig()


def test_unmatched_globs_are_refused(make_config: Make, run: Make) -> None:
    with pytest.raises(SparsityError, match="bakcbone"):
        run(make_config(include=("bakcbone.*",)))


def test_every_hyperparameter_reaches_the_method() -> None:
    hook = NMSparseHook(method="sr-ste", hyperparameters={"decay": "0.25"})
    assert hook.config.make_method().hyperparameters() == {"decay": 0.25}
    with pytest.raises(SparsityError, match='"sr-ste" has no hyperparameter "ramp"'):
        NMSparseHook(hyperparameters={"ramp": 3})
    with pytest.raises(SparsityError, match="hyperparameters is 3, expected names and values"):
        NMSparseHook(hyperparameters=3)


@HOOKS.register_module()
class PressCtrlC(Hook):  # type: ignore[misc]
    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter == 2:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_a_run_after_the_iteration_and_is_one_line(
    make_config: Make, run: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    config.custom_hooks.append({"type": "PressCtrlC"})
    config.train_cfg.max_epochs = 3
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Stopped):
            run(config, tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    stopped = "interrupted in epoch 2 (iteration 2); the same command with --resume goes on from "
    assert capfd.readouterr().out.splitlines()[-1] == f"{stopped}{tmp_path}/run/epoch_1.pth"


@HOOKS.register_module()
class LoseTheLoaders(Hook):  # type: ignore[misc]
    """What SIGTERM does to a whole process group: it ends the processes that load the data, too."""

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")


def test_a_signal_that_ends_the_loaders_too_is_one_line(
    make_config: Make, run: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    config.custom_hooks.append({"type": "LoseTheLoaders"})
    with pytest.raises(SystemExit) as ended:
        run(config, tmp_path / "run")
    assert ended.value.code == 128 + signal.SIGTERM
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM in epoch 1 (iteration 0); nothing is saved yet")
