"""Scores, the finalized file, pictures, and the command lines."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.runner import Runner
from PIL import Image
from pycocotools.coco import COCO

from nm_sparsity.core import SparsityConfig, SparsityError, verify
from nm_sparsity.core.files.checkpoint import restore
from nm_sparsity.core.files.io import load
from nm_sparsity.detection import config as configs
from nm_sparsity.detection import evaluate, pictures, prepare, train
from nm_sparsity.detection.checkpoints import sparsity_of

README = Path(__file__).parents[2] / "detection" / "README.md"

ONE_EPOCH = ("train_cfg.max_epochs=1", "train_cfg.val_interval=99")


@pytest.fixture(scope="session")
def truth(data: Path) -> COCO:
    return COCO(str(data / "annotations" / "instances_test.json"))


def perfect(truth: COCO) -> evaluate.Detections:
    return [{**a, "segmentation": truth.annToRLE(a), "score": 0.9} for a in truth.anns.values()]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_scores_one(truth: COCO, kind: str) -> None:
    score = evaluate.score(truth, perfect(truth), kind, sorted(truth.cats))
    assert list(score.numbers) == list(evaluate.NUMBERS)
    assert score.numbers["AP"] == score.numbers["AP75"] == score.numbers["AR_100"] == pytest.approx(100)
    assert score.numbers["AP_large"] is None  # no object of 96 x 96 pixels in pictures of 64
    present = {truth.cats[a["category_id"]]["name"] for a in truth.anns.values()}
    assert score.classes == {
        c["name"]: pytest.approx(100) if c["name"] in present else None for c in truth.cats.values()
    }


def test_a_box_of_iou_0_6_counts_at_two_of_ten_thresholds(truth: COCO) -> None:
    """IoU 0.6 passes 0.5 and 0.55 (and 0.6, if rounding is kind): AP is 20 or 30 percent, AP75 is 0."""
    detections = perfect(truth)
    for detection in detections:
        x, y, width, height = detection["bbox"]
        detection["bbox"] = [x, y, width * 0.59, height]
    numbers = evaluate.score(truth, detections, "bbox", sorted(truth.cats)).numbers
    assert numbers["AP"] == pytest.approx(20, abs=2)
    assert numbers["AP50"] == pytest.approx(100)
    assert numbers["AP75"] == pytest.approx(0)


def test_mask_scores_do_not_depend_on_boxes(truth: COCO) -> None:
    detections = perfect(truth)
    for detection in detections:
        detection["bbox"] = [0.0, 0.0, 1.0, 1.0]
    assert evaluate.score(truth, detections, "segm", sorted(truth.cats)).numbers["AP"] == pytest.approx(100)


def test_nothing_found_scores_zero(truth: COCO) -> None:
    assert set(evaluate.score(truth, [], "bbox", sorted(truth.cats)).numbers.values()) == {0.0}


def test_evaluate_finalizes_verifies_and_draws(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    assert evaluate.main([str(run), "--pictures", "2"]) == 0
    printed = capsys.readouterr().out
    assert "31 weights are N:M; the finalized model scores the same" in printed
    result = json.loads((run / "evaluation.json").read_text())
    assert result["images"] == 4
    assert result["detections"] > 0
    for kind in ("box", "mask"):
        assert set(evaluate.NUMBERS) < set(result[kind])
        assert len(result[kind]["classes"]) == 10
    assert re.search(rf"^AP +{result['box']['AP']:.2f} +{result['mask']['AP']:.2f}$", printed, re.MULTILINE)
    assert f"wrote evaluation.json, predictions.png, finalized.pt into {run}" in printed
    assert verify(run / "finalized.pt", "2:4").checked
    with Image.open(run / "predictions.png") as picture:
        assert picture.size == (2 * 388, 2 * (384 + pictures.LINE + 4))
    # The finalized file scores the same, also as a bare state dict of shadow weights or without a run.
    expected = {key: result[key] for key in ("box", "mask", "detections")}
    again = evaluate.evaluate(run / "finalized.pt", pictures=0, out=tmp_path / "again")
    payload = load(run / "epoch_1.pth")
    shadow = {name: value.clone() for name, value in payload["state_dict"].items()}
    for name, dropped in payload["nm_sparsity"]["dropped"].items():
        assert not shadow[name][shadow[name] == 0].any()
        shadow[name].masked_scatter_(shadow[name] == 0, dropped)
    torch.save(shadow, tmp_path / "bare.pt")
    bare = evaluate.evaluate(tmp_path / "bare.pt", pictures=0, out=tmp_path / "bare", config=str(run))
    for found in (again, bare):
        assert {key: found[key] for key in expected} == expected
        assert found["verified"].startswith("31 weights")
    assert not (tmp_path / "finalized.pt").exists()


def test_the_evaluation_of_a_file_goes_where_it_is_told_and_over_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(evaluate, "predict", lambda model, loader: [])
    before = set(run.iterdir())
    for given in (["epoch_1.pth"], ["epoch_1.pth", f"--config={run}"]):
        assert evaluate.main([str(run / given[0]), *given[1:]]) == 0
        assert "nothing is written (--out FOLDER)" in capsys.readouterr().out
    assert set(run.iterdir()) == before
    arguments = [str(run / "epoch_1.pth"), f"--out={tmp_path / 'out'}", "--pictures=0"]
    assert evaluate.main(arguments) == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in kept} == {"evaluation.json", "finalized.pt"}
    assert evaluate.main(arguments) == 1
    assert f"{tmp_path}/out holds evaluation.json, finalized.pt already: choose another" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept


@pytest.mark.slow
def test_a_run_without_the_hook_is_evaluated(
    make_config: Callable[..., Any],
    run: Callable[..., Any],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(method="dense")
    config.custom_hooks = []
    run(config, tmp_path / "run")
    shutil.copy(trained / "epoch_1.pth", tmp_path / "run" / "finalized.pt")  # of a sparse run that was there before
    assert evaluate.main([str(tmp_path / "run")]) == 0
    assert "dense model: no pattern to verify" in capsys.readouterr().out
    assert not (tmp_path / "run" / "finalized.pt").exists()
    # Its checkpoint is scored as it stands, wherever it lies.
    sparse = shutil.copytree(trained, tmp_path / "sparse")
    elsewhere = evaluate.evaluate(sparse, tmp_path / "run" / "epoch_1.pth", pictures=0)
    assert not (sparse / "evaluation.json").exists()
    dense = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "verified" not in elsewhere
    assert all(elsewhere[key] == dense[key] for key in ("detections", "box", "mask"))


def test_a_stock_detector_finds_the_same_in_what_was_saved(trained: Path, data: Path) -> None:
    """`init_detector` with a config that knows no hook, on the checkpoint as it stands."""
    config = configs.read("tiny_mask_rcnn")
    configs.set_data(config, data)
    loader = Runner.build_dataloader(config.test_dataloader, seed=0)
    payload = load(trained / "epoch_1.pth")
    sparse = MODELS.build(config.model)
    SparsityConfig(pattern="2:4").sparsify(sparse)
    restore(sparse, payload["state_dict"], payload["nm_sparsity"])
    stock = init_detector(config, str(trained / "epoch_1.pth"), device="cpu")
    found, expected = evaluate.predict(stock, loader), evaluate.predict(sparse, loader)
    assert found == expected
    assert len(found) > 10
    assert (sparse.backbone.conv1._parameters["weight"] != 0).any()


def test_a_finalized_model_that_scores_differently_is_refused(
    trained: Path, tmp_path: Path, truth: COCO, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    results = iter([perfect(truth), []])
    monkeypatch.setattr(evaluate, "predict", lambda model, loader: next(results))
    with pytest.raises(SparsityError, match=r"finalize changed box from \{'AP': (100|99)\..* to \{'AP': 0\.0"):
        evaluate.evaluate(run, pictures=0)


def test_a_detector_that_finds_nothing_scores_zero_in_boxes_and_masks(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "predict", lambda model, loader: [])
    result = evaluate.evaluate(shutil.copytree(trained, tmp_path / "run"), pictures=0)
    assert result["box"]["AP"] == result["mask"]["AP"] == 0.0
    assert not (tmp_path / "run" / "predictions.png").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path)]) == 1
    assert "is not a run folder" in capsys.readouterr().err
    (tmp_path / "config.py").write_text("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'")
    assert evaluate.main([str(tmp_path)]) == 1
    assert "holds no checkpoint yet" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_ranks_train_one_model(data: Path, tmp_path: Path) -> None:
    """MMEngine's pytorch launcher, gloo: lambda is chosen and told once, the ranks end with the same weights, the file
    is 2:4, and a signal to one of them ends both after the same iteration."""
    worker = Path(__file__).parent / "two_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(worker), str(data), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("ranks agree") == 2
    assert result.stdout.count("lambda is") == result.stdout.count("stopped by SIGTERM in epoch 1 (iteration 0)") == 1
    assert result.stdout.count(f"ended with status {128 + signal.SIGTERM}") == 2
    assert len(verify(tmp_path / "epoch_1.pth", "2:4").checked) == 31


def test_a_folder_that_holds_a_run_is_left_alone(
    trained: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shared = ["tiny_mask_rcnn", "--data", str(data), "--out", str(run)]
    for more in ([], ["--pattern", "1:4"]):
        error = failure(capsys, *shared, *more)
        assert error == f"error: {run} holds a run already: continue it with --resume, or choose another --out\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    error = failure(capsys, *shared[:-1], str(tmp_path / "new"), "--resume")
    assert re.fullmatch(
        r"error: cannot resume: there is no .*/new/last_checkpoint; leave --resume out to start\n", error
    )


def test_a_run_cut_off_while_it_first_saved_has_one_way_out(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tiny_mask_rcnn", "--data", str(data), "--out", str(tmp_path)]
    (tmp_path / "epoch_1.pth").touch()
    fresh, resumed = failure(capsys, *arguments), failure(capsys, *arguments, "--resume")
    assert fresh == resumed
    assert re.search(r"holds epoch_1\.pth but no last_checkpoint, .* remove what is there and start without", fresh)


@pytest.mark.slow
def test_a_run_that_is_stopped_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    """SIGTERM ends it after an iteration, with status 143; its folder may have been moved when it is resumed."""
    module = [sys.executable, "-m", "nm_sparsity.detection.train", "tiny_mask_rcnn", f"--data={data}", "--pattern=2:4"]

    def start(out: Path, epochs: int, *more: str) -> subprocess.Popen[str]:
        overrides = [f"train_cfg.max_epochs={epochs}", "train_cfg.val_interval=999"]
        command = [*module, f"--out={out}", *more, *overrides]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with start(tmp_path / "run", 500) as process:
        assert process.stdout is not None
        head = next(line for line in process.stdout if line.startswith("writing"))
        next(line for line in process.stdout if "Saving checkpoint at 2 epochs" in line)
        process.terminate()
        rest = process.stdout.read()
    assert str(tmp_path / "run") in head
    assert process.returncode == 143
    stopped = r"stopped by SIGTERM in epoch \d+ \(iteration \d+\); the same command with --resume goes on from "
    assert re.search(stopped + r"\S*/run/epoch_\d+\.pth", rest)
    (tmp_path / "run").rename(tmp_path / "moved")
    done = int(re.search(r"epoch_(\d+)\.pth", (tmp_path / "moved" / "last_checkpoint").read_text())[1])  # type: ignore[index]
    with start(tmp_path / "moved", done + 1, "--resume") as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    assert f"resuming from {tmp_path}/moved/epoch_{done}.pth, written after {done} epochs" in output
    assert f"wrote {tmp_path}/moved/epoch_{done + 1}.pth; score it" in output


def test_a_missing_backbone_is_named_with_the_way_out(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = failure(capsys, "mask_rcnn_r50_fpn_1x_coco_2to4", "--data", str(data))
    assert "runs/resnet50_2to4/finalized.pt, with which the model starts, is not there" in error
    assert "model.backbone.init_cfg.checkpoint=PATH" in error
    assert "nm_sparsity.classification.train resnet50_2to4" in error


def test_dense_runs_of_the_command_are_plain_files_too(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = ["tiny_mask_rcnn", "--data", str(data), "--out", str(tmp_path / "run"), "train_cfg.max_epochs=1"]
    assert train.main([*shared, "train_cfg.val_interval=9"]) == 0
    console, (log,) = capfd.readouterr().out, (tmp_path / "run").glob("*/*.log")
    for noise in ("Config:\n", "System environment:", "Hooks will be executed", '"FileClient" will be deprecated'):
        assert noise in log.read_text()
        assert noise not in console
    assert "annotations into memory" not in console
    for news in ("Epoch(train) [1]", "Saving checkpoint at 1 epochs"):
        assert news in console
    payload = load(tmp_path / "run" / "epoch_1.pth")
    assert payload["nm_sparsity"]["method"] == "dense"
    assert not payload["nm_sparsity"]["layers"]
    with pytest.raises(SparsityError) as refused:
        verify(tmp_path / "run" / "epoch_1.pth", "2:4")
    assert "epoch_1.pth" in str(refused.value)


def test_print_config_shows_what_would_be_trained(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny_mask_rcnn", "--data", str(data), "--pattern", "1:4", "--decay", "0.3", "--print-config"]
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "pattern='1:4'" in printed
    for way in (["dense_until=0.1", "fix_at=0.5"], ["dense_until", "0.1", "fix_at", "0.5"]):
        assert train.main([*arguments, "--hyperparameters", *way]) == 0
        assert "hyperparameters=dict(dense_until='0.1', fix_at='0.5')" in capsys.readouterr().out
    assert "decay=0.3" in printed
    assert "num_classes=10" in printed


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert train.main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def hook_of(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> Any:
    """The NMSparseHook of the config that these arguments train."""
    assert train.main([*arguments, "--print-config"]) == 0
    (folder / "printed.py").write_text(capsys.readouterr().out)
    return sparsity_of(configs.read(str(folder / "printed.py")))


def sparse_config(folder: Path, **hook: Any) -> str:
    """A config of a user's that is sparse in a way of its own."""
    plugin, hooks = {"imports": [configs.PLUGIN]}, [{"type": "NMSparseHook", **hook}]
    lines = f"_base_ = '{configs.FOLDER}/tiny_mask_rcnn.py'", f"custom_imports = {plugin}", f"custom_hooks = {hooks}"
    (folder / "mine.py").write_text("\n".join(lines))
    return str(folder / "mine.py")


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ([], {}),
        (["--decay=auto"], {"decay": "auto"}),
        (["--pattern=1:4"], {"pattern": "1:4"}),
        (["--hyperparameters", "fix_at=0.5"], {"hyperparameters": {"fix_at": "0.5"}}),
        (["--method=sr-ste"], {}),
        (["--method=ste"], {"method": "ste", "decay": None, "hyperparameters": {}}),
        (["--method=dense"], {"method": "dense", "decay": None, "hyperparameters": {}}),
    ],
)
def test_what_is_given_changes_that_of_a_sparse_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], changed: dict[str, Any]
) -> None:
    options = {"pattern": "2:8", "decay": 0.3, "hyperparameters": {"dense_until": 0.1}, "layout": "kernel"}
    options |= {"exclude": ("backbone.conv1",), "patterns": {"neck.*": "1:4"}}
    mine = sparse_config(tmp_path, **options, interval=7, per_layer=True)
    hook = hook_of(capsys, tmp_path, mine, *given)
    assert hook.config == SparsityConfig(**{**options, **changed})
    assert (hook.interval, hook.per_layer) == (7, True)


def test_only_a_pattern_or_a_method_makes_a_dense_config_sparse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tiny_mask_rcnn", sparse_config(tmp_path, method="dense")):
        for given in (["--decay", "0.1"], ["--hyperparameters", "dense_until=0.1"]):
            message = f"the config is dense, to which {given[0]} means nothing: give --pattern or --method too"
            assert failure(capsys, name, *given) == f"error: {message}\n"
        found = hook_of(capsys, tmp_path, name, "--pattern", "1:4", "--decay", "0.1")
        assert found.config == SparsityConfig("1:4", "sr-ste", 0.1)


def test_the_seed_and_the_backends_of_a_config_are_kept(
    make_config: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    def config() -> Any:
        made = make_config()
        made.randomness = {"seed": 42, "diff_rank_seed": True}
        made.default_hooks.logger.interval = 1
        made.visualizer.vis_backends = [{"type": "TensorboardVisBackend", "save_dir": str(tmp_path / "board")}]
        return made

    folder = tmp_path / "run"
    assert run(config(), folder).seed == 42
    assert json.loads((folder / "config.json").read_text())["randomness"] == {"seed": 42, "diff_rank_seed": True}
    assert json.loads((folder / "environment.json").read_text())["seed"] == 42
    assert list((tmp_path / "board").rglob("events.out.tfevents*"))
    assert not list(folder.rglob("events.out.tfevents*"))
    assert list(folder.glob("*/vis_data/scalars.json"))
    with pytest.raises(SparsityError, match=r"randomness\.seed: 42 -> 1\)"):
        train.run(config(), folder, seed=1, resume=True)


def test_train_names_unknown_configs_and_bad_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a file nor one of faster_rcnn" in failure(capsys, "tiny_mask_rcn")
    assert "is not of the form key=value" in failure(capsys, "tiny_mask_rcnn", "train_cfg.max_epochs")
    assert 'pattern "2-4" is not of the form N:M' in failure(capsys, "tiny_mask_rcnn", "--pattern", "2-4")
    assert "cannot override" in failure(capsys, "tiny_mask_rcnn", "model.backbone.init_cfg.checkpoint=x.pth")
    assert "is not of the form key=value" in failure(capsys, "tiny_mask_rcnn", "=5")
    assert 'no entry "load_form"; did you mean "load_from"?' in failure(capsys, "tiny_mask_rcnn", "load_form=good.pth")
    assert 'did you mean "model"?' in failure(capsys, "tiny_mask_rcnn", "modle.backbone.depth=18")
    assert "it has no model" in failure(capsys, "tiny_mask_rcnn", "model=5")
    assert "custom_hooks must be a list" in failure(capsys, "tiny_mask_rcnn", "custom_hooks={a: 1}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim_wrapper.optimizer.type=AdamWX"], "cannot build optim_wrapper with .*AdamWX"),
        (["train_cfg.max_epochs=abc"], "cannot build train_dataloader or train_cfg: .*abc"),
        (["train_cfg.max_epoch=3"], r"EpochBasedTrainLoop.* got an unexpected keyword argument 'max_epoch'$"),
        (["train_dataloader.batch_size=0"], "cannot build train_dataloader or train_cfg: .*batch_size"),
        (["model.backbone.frozen_stages=x"], "cannot build model, hooks or work_dir: TypeError: .*'str'"),
        (["load_from=nothing.pth"], r"there is no checkpoint nothing\.pth"),
        (["--launcher", "pytorch"], "--launcher pytorch is for torchrun"),
        (["--data", __file__], "cannot read .*: Not a directory"),
        (["--out", __file__], f"cannot write to the folder .*{Path(__file__).name}: File exists"),
    ],
)
def test_mistakes_in_arguments_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    shared = ["tiny_mask_rcnn", "--data", str(data), "--out", str(tmp_path / "run")]
    error = failure(capsys, *shared, *arguments)
    assert re.search(message, error.strip()), error
    assert error.count("\n") == 1


def test_numbers_with_exponents_are_numbers() -> None:
    """For YAML, 2e-4 is text."""
    assert configs.read("tiny_mask_rcnn", ["optim_wrapper.optimizer.lr=2e-4"]).optim_wrapper.optimizer.lr == 2e-4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'\ndefault_scope = dict(a=1)", "TypeError"),
        ("model = undefined", "NameError"),
        ("raise ValueError('no')", "ValueError: no"),
        ("from mmengine.config import read_base\nwith read_base():\n    from .gone import *", "gone"),
    ],
)
def test_configs_that_cannot_be_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text(source)
    assert re.search(rf"cannot read the config .*bad\.py: .*{message}", failure(capsys, str(tmp_path / "bad.py")))


def test_going_on_densely_where_a_run_was_sparse_is_refused(
    trained: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    error = failure(capsys, "tiny_mask_rcnn", "--data", str(data), "--out", str(run), "--resume")
    assert "epoch_1.pth is 2:4 sparse, trained with sr-ste, but this config is dense; resume with" in error
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.fixture(scope="module")
def command_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a 2:4 run of one epoch, of the command."""
    run = tmp_path_factory.mktemp("command") / "run"
    assert train.main(["tiny_mask_rcnn", f"--data={data}", f"--out={run}", "--pattern=2:4", *ONE_EPOCH]) == 0
    return run


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        (["--pattern=1:4"], "sparsity.pattern: 2:4 -> 1:4"),
        (["--method=ste"], "sparsity.method: sr-ste -> ste"),
        (["--decay=0.5"], "sparsity.decay: None -> 0.5"),
        (["--seed=1"], "randomness.seed: 0 -> 1"),
        (["optim_wrapper.optimizer.lr=0.5"], r"optim_wrapper.optimizer.lr: \S+ -> 0.5"),
    ],
)
def test_a_resume_as_another_run_is_refused_and_writes_nothing(
    command_run: Path, data: Path, capsys: pytest.CaptureFixture[str], more: list[str], changed: str
) -> None:
    before = {path: path.read_bytes() for path in command_run.rglob("*") if path.is_file()}
    sparsity = [] if "--pattern=1:4" in more else ["--pattern=2:4"]
    error = failure(
        capsys, "tiny_mask_rcnn", f"--data={data}", f"--out={command_run}", "--resume", *sparsity, *more, *ONE_EPOCH
    )
    assert re.search(rf"run holds another run \(.*{changed}.*\): choose another folder with --out", error)
    assert {path: path.read_bytes() for path in command_run.rglob("*") if path.is_file()} == before


def test_the_same_command_has_nothing_left_to_resume(
    command_run: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(command_run, tmp_path / "run")
    arguments = ["tiny_mask_rcnn", f"--data={data}", f"--out={run}", "--method=sr-ste", "--resume"]
    assert train.main([*arguments, *ONE_EPOCH]) == 0
    assert "training ended after 1 epochs: nothing left to do" in capsys.readouterr().out
    assert train.main([*arguments, *ONE_EPOCH, "train_cfg.max_epochs=2"]) == 0
    assert "written after 1 epochs" in capsys.readouterr().out
    assert (run / "epoch_2.pth").is_file()


def test_train_names_configs_of_other_versions(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.py").write_text("model = dict()\ndata = dict()\noptimizer = dict()\ntotal_epochs = 12\n")
    assert "config of MMDetection 2 (it has data, optimizer, total_epochs)" in failure(capsys, str(tmp_path / "old.py"))
    (tmp_path / "other.py").write_text("model = dict()\n")
    assert "not an MMDetection training config" in failure(capsys, str(tmp_path / "other.py"))
    arguments = ("tiny_mask_rcnn", "model.type=MaskRCNNv9", "--data", str(data), "--out", str(tmp_path / "run"))
    error = failure(capsys, *arguments)
    assert "MaskRCNNv9 is not in the" in error
    assert "another MMDetection version" in error


def test_train_checks_its_data_first(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/train/000003.jpg").unlink()
    error = failure(capsys, "tiny_mask_rcnn", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"))
    assert "000003.jpg is missing" in error
    assert "no such annotation file" in failure(capsys, "tiny_mask_rcnn", "--data", str(tmp_path))


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "edit",
    [lambda d: d["categories"].reverse(), lambda d: d["categories"][3].update(name="drei")],
    ids=["other order", "other name"],
)
def test_categories_that_differ_between_splits_are_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], Any]
) -> None:
    """With a label for another category in each split, AP would be wrong in silence."""
    folder = shutil.copytree(data, tmp_path / "data")
    change(folder / "annotations" / "instances_val.json", edit)
    error = failure(capsys, "tiny_mask_rcnn", "--data", str(folder), "--out", str(tmp_path / "run"))
    assert re.search(r"instances_val\.json has the categories .* all splits need all of them, in the same order", error)


def test_data_without_masks_are_refused_for_a_mask_config_only(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val", "test"):
        file = folder / "annotations" / f"instances_{split}.json"
        change(file, lambda d: [annotation.pop("segmentation") for annotation in d["annotations"]])
    error = failure(capsys, "tiny_mask_rcnn", "--data", str(folder), "--out", str(tmp_path / "run"))
    assert re.search(r"\n  (\d+) of \1 annotations have no mask, which this config needs; train a detector of", error)
    assert len(error.splitlines()) == 2
    config = configs.read("tiny_faster_rcnn")
    configs.set_data(config, folder)
    configs.check_data(config)


def test_a_coco_2017_folder_is_data(tmp_path: Path, data: Path) -> None:
    folder = shutil.copytree(data, tmp_path / "coco")
    for split in ("train", "val"):
        (folder / split).rename(folder / f"{split}2017")
        (folder / f"annotations/instances_{split}.json").rename(folder / f"annotations/instances_{split}2017.json")
    config = configs.read("tiny_mask_rcnn")
    configs.set_data(config, folder)
    configs.check_data(config)
    assert config.train_dataloader.dataset.data_prefix["img"] == "train2017/"
    assert config.test_evaluator.ann_file == str(folder / "annotations/instances_val2017.json")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cityscapes/mask-rcnn_r50_fpn_1x_cityscapes", "CityscapesDataset"),
        ("pascal_voc/faster-rcnn_r50_fpn_1x_voc0712", "ConcatDataset"),
    ],
)
def test_data_for_a_config_of_another_kind_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    error = failure(capsys, f"mmdet::{name}.py", "--data", str(data))
    assert f"train has {kind} where CocoDataset is expected" in error


@pytest.mark.slow
def test_train_names_a_corrupt_picture(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    for picture in (tmp_path / "data/train").iterdir():
        picture.write_bytes(b"not a JPEG")
    arguments = ("tiny_mask_rcnn", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"))
    assert re.search(r"failed to load image: .*/00000\d\.jpg", failure(capsys, *arguments))


@pytest.mark.slow
def test_configs_can_be_read_and_pointed_at_data(data: Path) -> None:
    for name in configs.names():
        config = configs.read(name)
        configs.set_data(config, data)
        configs.check_data(config)
        assert config.model.roi_head.bbox_head.num_classes == 10
        assert config.test_dataloader.dataset.data_prefix["img"] == "test/"
    assert len(configs.names()) == 10


def test_prepare_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["composed", "--out", str(tmp_path), "--train", "2", "--val", "1", "--size", "64"]
    assert prepare.main(arguments) == 0
    assert capsys.readouterr().out.count("in 10 categories") == 3
