from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from nm_sparsity.classification import configs, train
from nm_sparsity.classification.configs import IMAGENET, RECIPES, ClassifierConfig, OptimizerConfig
from nm_sparsity.classification.models import build
from nm_sparsity.classification.train import learning_rates
from nm_sparsity.core import Method, SparsityError
from nm_sparsity.core.experiments.recipes import difference
from nm_sparsity.core.methods import base


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_builds_what_its_name_says(name: str) -> None:
    config = configs.get(name)
    with torch.device("meta"):
        model = build(config.model, 1000 if name.startswith("resnet") else 10)
    report = config.sparsity.sparsify(model)
    if pattern := re.search(r"(\d+)to(\d+)", name):
        assert {w.pattern for w in report.sparse} == {f"{pattern[1]}:{pattern[2]}"}
        dense = [w.name for w in report.weights if not w.sparse]
        assert dense == ["conv1.weight", "fc.weight"]
    else:
        assert not report.sparse
    assert config.folder.name == name
    assert ClassifierConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
@pytest.mark.parametrize("pattern", ["dense", "2to4", "4to8", "1to4", "2to8", "1to16"])
def test_imagenet_recipes_are_the_papers(model: str, pattern: str) -> None:
    config = configs.get(f"{model}_{pattern}")
    assert (config.model, config.epochs, config.batch_size, config.data.image_size) == (model, 120, 256, 224)
    assert config.optimizer == OptimizerConfig("sgd", lr=0.1, momentum=0.9, weight_decay=5e-5, warmup_epochs=5)
    assert config.sparsity.layout == "channel"
    if pattern != "dense":
        assert (config.sparsity.method, config.sparsity.decay) == ("sr-ste", 2e-4)


@pytest.mark.parametrize("name", ["resnet50_2to4", "resnet50_2to4_finetune"])
def test_the_papers_lambda_has_strength_six_and_so_has_that_of_fine_tuning(name: str) -> None:
    config = configs.get(name)
    assert config.sparsity.decay is not None
    strength = config.sparsity.decay * sum(learning_rates(config, 1_281_167 // 256))
    assert strength == pytest.approx(6, rel=0.01)


def test_learning_rates_warm_up_linearly_and_fall_along_a_cosine() -> None:
    lr = learning_rates(ClassifierConfig(optimizer=OptimizerConfig(lr=0.4, warmup_epochs=2), epochs=10), 5)
    assert len(lr) == 50
    assert lr[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert lr[10] == pytest.approx(0.4)
    assert lr[30] == pytest.approx(0.2)
    assert lr[40] == pytest.approx(0.4 * math.cos(0.375 * math.pi) ** 2)
    assert 0 < lr[49] < 0.4 * 0.002


def test_a_run_shorter_than_its_warm_up_warms_up_for_a_tenth_of_it() -> None:
    config = replace(configs.get("resnet50_2to4"), epochs=2)
    assert config.optimizer.warmup_epochs == 5
    lr = learning_rates(config, 50)
    assert lr[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert lr[10] == 0.1
    assert lr[-1] < 1e-4


def test_an_unknown_recipe_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["resnet50_3to4"]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: unknown recipe "resnet50_3to4" (did you mean "resnet50_2to4"?); known recipes: ')
    assert all(name in error for name in RECIPES)


def test_print_config_shows_the_overridden_tree(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "--pattern",
        "1:8",
        "--optimizer.lr",
        "0.3",
        "--exclude",
        "fc",
        "conv1",
        "--ema",
        "0.9",
    ]
    with pytest.raises(SystemExit) as stop:
        train.main(["digits_2to4", "--print-config", *overrides])
    assert stop.value.code == 0
    config = ClassifierConfig.from_dict(json.loads(capsys.readouterr().out))
    assert (config.sparsity.pattern, config.optimizer.lr, config.ema) == ("1:8", 0.3, 0.9)
    assert config.sparsity.exclude == ("fc", "conv1")
    assert config.epochs == configs.get("digits_2to4").epochs


def test_a_printed_config_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "digits_2to4", "--pattern", "1:8", "--epochs", "3", "--resume")
    (tmp_path / "mine.json").write_text(json.dumps(config.to_dict()))
    again = printed(capsys, str(tmp_path / "mine.json"), "--seed", "5")
    assert again == replace(config, seed=5, resume=False)
    # A run folder stands for its own config, wherever it lies now.
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.json").rename(tmp_path / "run" / "config.json")
    assert printed(capsys, str(tmp_path / "run")) == replace(config, folder=tmp_path / "run", resume=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a config that --print-config or a run wrote"),
        ("[1]", "is not a config that --print-config or a run wrote"),
        ('{"epochs": "many"}', "is not a config that --print-config or a run wrote"),
        ('{"epoch": 3}', "ClassifierConfig has no field epoch; it has accumulation"),
        ('{"epochs": 0}', "epochs must be at least 1, found 0"),
        (None, "cannot read the config"),
    ],
)
def test_what_is_no_config_is_named(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "mine.json").write_text(text)
    assert train.main([str(tmp_path / "mine.json")]) == 1
    assert message in capsys.readouterr().err


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> ClassifierConfig:
    """The config that ``--print-config`` shows."""
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "--print-config"])
    assert stop.value.code == 0
    return ClassifierConfig.from_dict(json.loads(capsys.readouterr().out))


def test_another_method_leaves_the_recipes_hyperparameters_behind(capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("dense", "ste", "asp"):
        assert printed(capsys, "digits_2to4", "--method", method).sparsity.decay is None


@pytest.mark.parametrize("given", [["--method", "sr-ste"], ["--method=sr-ste"], ["--method=ste", "--method", "sr-ste"]])
def test_the_recipes_own_method_keeps_its_hyperparameters(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "digits_2to4", *given) == configs.get("digits_2to4")
    assert printed(capsys, "digits_2to4", *given, "--decay=0.3").sparsity.decay == 0.3


def test_a_lambda_among_the_hyperparameters_takes_the_place_of_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([], ["--method=sr-ste"]):
        found = printed(capsys, "digits_2to4", *given, "--hyperparameters", "decay=0.5").sparsity
        assert found.make_method().hyperparameters()["decay"] == 0.5


def test_a_method_of_ones_own_is_configured_like_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class Ramped(Method):
        name = "ramped"
        decay: float = 2e-4
        ramp: int = 1000

    monkeypatch.setitem(base._METHODS, "ramped", Ramped)
    config = printed(capsys, "digits_2to4", "--method", "ramped", "--decay", "0.5", "--hyperparameters", "ramp", "3")
    assert config.sparsity.make_method() == Ramped(decay=0.5, ramp=3)
    assert train.main(["digits_2to4", "--hyperparameters", "ramp", "3"]) == 1
    assert 'method "sr-ste" has no hyperparameter "ramp"; it takes decay' in capsys.readouterr().err


def test_names_of_the_version_before_still_work_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    old = ["digits_2by4", "--folder", "a", "--data.root=b", "--sparsity.pattern", "1:4", "--sparsity.exclude", "conv1"]
    new = ["digits_2to4", "--out", "a", "--data=b", "--pattern", "1:4", "--exclude", "conv1"]
    with pytest.raises(SystemExit):
        train.main([*old, "--print-config"])
    shown = capsys.readouterr()
    assert ClassifierConfig.from_dict(json.loads(shown.out)) == printed(capsys, *new)
    assert [line.split(";")[0] for line in shown.err.splitlines()] == [
        "digits_2by4 is called digits_2to4 now",
        "--folder is called --out now",
        "--data.root is called --data now",
        "--sparsity.pattern is called --pattern now",
        "--sparsity.exclude is called --exclude now",
    ]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--optimizer.lr=-1", "optimizer.lr must be above 0, found -1.0"),
        ("--optimizer.lr=nan", "optimizer.lr"),
        ("--optimizer.lr=fast", "optimizer.lr"),
        ("--optimizer.momentum=1", "optimizer.momentum"),
        ("--optimizer.momentum=0", "optimizer.momentum must be above 0 for nesterov"),
        ("--optimizer.weight-decay=-0.1", "optimizer.weight_decay"),
        ("--args=10", "--args takes a JSON list or object"),
        ("--args=[10]", "args must be left out for a model of torchvision"),
        ("--optimizer.clip-norm=0", "optimizer.clip_norm"),
        ("--optimizer.name=lion", "optimizer.name"),
        ("--epochs=0", "epochs must be at least 1"),
        ("--batch-size=0", "batch_size"),
        ("--accumulation=0", "accumulation"),
        ("--label-smoothing=1", "label_smoothing"),
        ("--ema=1", "ema"),
        ("--seed=-1", "seed"),
        ("--log-every=0", "log_every"),
        ("--checkpoint-every=-1", "checkpoint_every"),
        ("--data.image-size=4", "data.image_size"),
        ("--data.workers=-1", "data.workers"),
        ("--data.name=cifar", "data.name"),
        ("--amp=fp8", "amp"),
        ("--pattern=4:2", '"4:2"'),
        ("--pattern=0:4", '"0:4"'),
        ("--pattern=2-4", '"2-4"'),
        ("--method=magic", '"magic"'),
        ("--decay=-1", "decay"),
        ("--layout=row", "row"),
        ("--no-such-field=1", "--no-such-field"),
    ],
)
def test_overrides_out_of_range_are_named(override: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sys.exit(train.main(["digits_2to4", override]))
    assert stop.value.code in (1, 2)
    # The box around the message wraps its lines.
    error = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert named in error
    assert "Traceback" not in error


def test_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)


def test_a_config_file_of_another_version_is_refused() -> None:
    tree = {**configs.get("digits_2to4").to_dict(), "mixup": 0.2}
    with pytest.raises(SparsityError, match="ClassifierConfig has no field mixup; it has accumulation"):
        ClassifierConfig.from_dict(tree)


def test_two_configs_differ_in_what_makes_them_other_runs() -> None:
    config = configs.get("digits_2to4")
    other = replace(config, seed=1, device="cpu", folder=Path("elsewhere"))
    other = replace(other, sparsity=replace(other.sparsity, decay=None, hyperparameters={"decay": 0.5}))
    old = config.to_dict()
    del old["sparsity"]["hyperparameters"]  # as an older version wrote it
    for tree in (config.to_dict(), old):
        assert difference(tree, config) == []
        assert set(difference(tree, other)) == {
            "seed: 0 -> 1",
            "sparsity.decay: 0.1 -> None",
            "sparsity.hyperparameters.decay: None -> 0.5",
        }


def test_the_published_figures_are_the_documentations() -> None:
    """The table there has a row per model and pattern: dense, STE, SR-STE, ASP."""
    root = Path(__file__).resolve().parents[2]
    pages = [path.read_text(encoding="utf-8") for path in (root / "README.md", *root.glob("docs/results.md"))]
    published = {(model, pattern, method): top1 for model, pattern, method, top1 in IMAGENET if top1}
    shown = {}
    for name, pattern, *cells in re.findall(r"\| (ResNet-\d\d), (\d+:\d+) " + r"\|([^|\n]*)" * 4, "".join(pages)):
        model = name.lower().replace("-", "")
        for method, cell in zip(("dense", "ste", "sr-ste", "asp"), cells, strict=True):
            if cell.strip():
                shown[model, "" if method == "dense" else pattern, method] = float(cell)
    assert shown == published
