"""The planner's verdicts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nm_sparsity.benchmarks import devices, plan
from nm_sparsity.benchmarks.report import Result

H100 = devices.find("h100")


def of(model: nn.Module, inputs: torch.Tensor, **options: str) -> plan.Plan:
    return plan.plan(model, inputs, H100, **options)


def test_every_layer_has_a_verdict_and_the_model_a_ceiling() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1), nn.Flatten(), nn.Linear(64 * 16, 4096)
    )
    before = {name: type(module) for name, module in model.named_modules()}
    result = of(model, torch.randn(2048, 3, 8, 8))
    verdicts = [layer.verdict for layer in result.layers]
    assert "not divisible by 4" in verdicts[0]
    assert verdicts[1] == "no: torch has no 2:4 convolution but the plain 1 x 1"
    assert verdicts[2].startswith("no: at most 1.0")
    assert verdicts[3] == "may pay (not measured)"
    assert result.layers[3].product == devices.Product(2048, 4096, 1024)
    assert result.layers[1].product == devices.Product(2048 * 16, 64, 576, reuse=9)
    assert 1 < result.ceiling < result.hardware_ceiling < 2
    assert sum(layer.share for layer in result.layers) == pytest.approx(1)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_single_product_has_its_own_ceiling() -> None:
    result = of(nn.Linear(4096, 11008, bias=False), torch.empty(4096, 4096, device="meta"))
    assert result.ceiling == pytest.approx(2.0)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_sparser_patterns_gain_what_2_4_gains(pattern: str) -> None:
    result = of(nn.Linear(4096, 4096, bias=False), torch.empty(4096, 4096, device="meta"), pattern=pattern)
    assert result.ceiling == pytest.approx(2.0)


def test_a_stride_reads_more_and_groups_read_all() -> None:
    """By hand, 3 x 3 with 128 channels on 56 x 56, batch 256, fp16: bytes of the input, output and weight."""
    images = torch.empty(256, 128, 56, 56, device="meta")
    for stride, groups in ((1, 1), (2, 1), (2, 2)):
        conv = nn.Conv2d(128, 128, 3, stride, padding=1, groups=groups, bias=False, device="meta")
        (layer,) = of(conv, images).layers
        pixels = 256 * (56 // stride) ** 2
        moved = 2 * (256 * 128 * 56 * 56 + pixels * 128 + conv.weight.numel())
        flops = 2 * pixels * conv.weight.numel()
        expected = max(flops / H100.peak(2), moved / (H100.bandwidth * 1e12))
        assert layer.product.dense_seconds(H100) == pytest.approx(expected, rel=1e-3)
    patches = nn.Conv2d(128, 128, 16, 16, device="meta")
    assert of(patches, torch.empty(1, 128, 64, 64, device="meta")).layers[0].product.reuse == 1


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout()).train()
    model[1].eval()
    of(model, torch.randn(2, 64))
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "device", "reason"),
    [
        ({"pattern": "4:8"}, "h100", "the hardware runs only 2:4"),
        ({"pattern": "2:4"}, "v100", "v100 has no sparse tensor cores"),
        ({"pattern": "2:4", "exclude": ["0"]}, "h100", 'excluded by "0"'),
    ],
)
def test_why_not(options: dict[str, str], device: str, reason: str) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 18))
    result = plan.plan(model, torch.randn(8, 256), devices.find(device), **options)  # type: ignore[arg-type]
    assert result.layers[0].verdict == f"no: {reason}"
    assert result.ceiling == 1.0  # the second layer is too narrow for cuSPARSELt


def test_measurements_of_the_device_are_read(tmp_path: Path) -> None:
    rows = [
        {"tokens": 8, "weight": "256x128", "dtype": "bf16", "launch": launch, "how": how, "speedup": speedup}
        for launch, how, speedup in (
            ("eager", "cusparselt", 9.0),
            ("graph", "dense", None),
            ("graph", "cusparselt", 1.25),
            ("graph", "cusparselt, searched", 1.5),
        )
    ]
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        Result("products", name, rows if "H100" in name else []).save(tmp_path)
    assert plan.measurements(H100, "bf16", [tmp_path]).speedups == {(8, 256, 128): 1.5}
    assert not plan.measurements(H100, "int8", [tmp_path]).speedups
    assert not plan.measurements(devices.find("a100"), "bf16", [tmp_path]).speedups


def test_measurements_decide() -> None:
    """Two layers that the roofline gives the same time: by hand, Amdahl's law over the one that gains."""
    measured = plan.Measured({(1024, 4096, 4096): 0.8, (4096, 4096, 4096): 1.5, (16384, 4096, 4096): 1.6})
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 4096, bias=False))

    def at(tokens: int, exclude: list[str] | None = None) -> plan.Plan:
        inputs = torch.empty(tokens, 4096, device="meta")
        return plan.plan(model.to("meta"), inputs, H100, "2:4", "bf16", exclude or [], measured)

    verdicts = {tokens: at(tokens).layers[0].verdict for tokens in (1, 700, 1024, 4096, 12_000)}
    assert verdicts == {
        1: "may pay (not measured)",
        700: "does not pay: 0.80x (measured at 1,024 tokens); from 4,096 tokens on it does",
        1024: "does not pay: 0.80x (measured); from 4,096 tokens on it does",
        4096: "pays 1.50x (measured)",
        12_000: "pays 1.60x (measured at 16,384 tokens)",
    }
    assert at(4096).expected() == pytest.approx(1.5)
    assert at(4096, ["0"]).expected() == pytest.approx(1 / (0.5 + 0.5 / 1.5), rel=1e-3)
    assert at(1024).expected() == 1.0
    assert at(1024).batch_to_pay(3) == 12
    assert plan.Plan((), 1.0, 1.0, measured).batch_to_pay(1) is None
    assert "2 of 2 layers pay; the whole model gains 1.50x by what was measured for 2 of the 2 layers" in str(at(4096))
    assert "2 of 2 layers may pay\n" in str(at(1))


def test_known_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["resnet50", "--batch", "32", "--device", "h200"]) == 0
    text = capsys.readouterr().out
    expected = r"^layer4\.\*\.conv2 +2 +1,568 +512x4608 .* no: torch has no 2:4 convolution"
    assert re.search(expected, text, re.MULTILINE)
    assert re.search(r'^fc +1 +32 +1000x2048 .* no: excluded by "fc"$', text, re.MULTILINE)
    assert "at most 1.0" in text
    assert plan.main(["bert-large", "--json", "--batch", "8", "--device", "a100"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["layers"]) == 24 * 5
    assert 1.5 < result["ceiling"] < 2
    assert plan.main(["vit_b_16"]) == 0
    assert "nn.MultiheadAttention uses it outside of a layer" in capsys.readouterr().out


OWN = """
from torch import nn

def build(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64), nn.Linear(64, 64))

def text():
    return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 128))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user's in the current folder."""
    (tmp_path / "my_plans.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_plans", raising=False)


def test_a_model_of_ones_own(own: None, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--device", "rtx4090", "--json"]
    assert plan.main(["my_plans:build", "--args", "[256]", "--input", "512,64", "--exclude", "0", "3", *common]) == 0
    layers = {layer["layer"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert [layers["2.weight"][key] for key in ("tokens", "rows", "columns")] == [512, 64, 256]
    assert layers["0.weight"]["verdict"] == 'no: excluded by "0"'
    assert layers["3.weight"]["verdict"] == 'no: excluded by "3"'
    assert plan.main(["my_plans:text", "--input", "4,20", "--vocabulary", "100", "--device", "rtx4090"]) == 0
    text = capsys.readouterr().out
    assert "rtx4090: 165.2 TFLOP/s dense at 16 bits (330.4 at 2:4), 1.008 TB/s, as published" in text
    assert re.search(r"^1 +1 +80 +128x64 ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet50", "--args", "[10]"], '--args are those of your own package.module:function; "resnet50" takes none'),
        (["my_plans:build", "--args", "[256]"], "my_plans:build needs the shape of an input"),
        (["my_plans:build", "--args", "[256", "--input", "8,64"], "--args takes a JSON list"),
        (["my_plans:build", "--args", "256", "--input", "8,64"], "--args takes a JSON list"),
        (["my_plans:build", "--args", "[256]", "--input", "8;64"], "--input takes a shape such as 64,3,32,32;"),
        (["my_plans:build", "--args", "[256]", "--input", "8,-64"], "--input takes a shape"),
        (["my_plans:build", "--args", "[256]", "--input", "8,65"], "does not take an input of 8x65 (torch.float32)"),
        (["my_plans:build", "--input", "8,64"], 'cannot build "my_plans:build"'),
        (["my_plans:build", "--args", "[256]", "--input", "8,64", "--exclude", "nothing"], "nothing"),
        (["my_plans:text", "--input", "8,64", "--vocabulary", "0"], "--vocabulary must be at least 1"),
        (["resnet50", "--input", "1,3"], "the model does not take an input of 1x3"),
        (["alexnot"], 'unknown model "alexnot"'),
        (["resnet50", "--device", "tpu"], 'unknown device "tpu"; known: v100'),
        (["resnet50", "--dtype", "fp64"], 'unknown dtype "fp64"; known: fp16'),
        (["resnet50", "--device", "v100", "--dtype", "int8"], "v100 has no tensor cores for 8-bit operands"),
        (["resnet50", "--device", "a100", "--dtype", "fp8"], "a100 has no tensor cores for fp8"),
        (["resnet50", "--pattern", "4:2"], 'pattern "4:2" is not N:M'),
        (["resnet50", "--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_bad_arguments_give_one_line(
    own: None, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
