"""verify, and the console script over it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nm_sparsity.core import SparsityError, VerificationError, finalize, sparsify, verify
from nm_sparsity.core.__main__ import main
from nm_sparsity.core.files import checkpoint, io
from nm_sparsity.core.files.metadata import Metadata


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 6))


def finalized() -> nn.Sequential:
    net = make()
    sparsify(net, "2:4", method="ste", exclude=["3"], patterns={"2": "1:4"})
    finalize(net)
    return net


def ours(path: Path) -> Path:
    net = make()
    sparsify(net, "2:4", exclude=["3"])
    state, metadata = checkpoint.split(net)
    io.save(path, {"state_dict": state, "nm_sparsity": metadata, "epoch": 3})
    return path


def test_the_table_of_the_model_is_the_truth() -> None:
    result = verify(finalized(), "2:4")
    assert [(c.name, c.pattern, c.groups, c.violations) for c in result.checks] == [
        ("0.weight", "2:4", 8 * 8 * 9 // 4, 0),
        ("2.weight", "1:4", 16, 0),
    ]
    assert "2 weights checked, 0 violate" in str(result)


def test_a_violation_names_layer_and_count() -> None:
    net = finalized()
    with torch.no_grad():
        net[2].weight[0, :3] = 1.0
        net[2].weight[5] = 1.0
    with pytest.raises(VerificationError, match=r"1 of 2 weights break their pattern(.|\n)*2\.weight +1:4 +16 +3"):
        verify(net)


def test_not_finalized_never_sparsified_and_another_pattern() -> None:
    net = make()
    with pytest.raises(SparsityError, match="never sparsified; give verify a pattern"):
        verify(net)
    with pytest.raises(VerificationError, match="3 of 3"):
        verify(net, "2:4")
    sparsify(net)
    with pytest.raises(VerificationError, match=r"not finalized.*shadow weights; call finalize"):
        verify(net)
    with pytest.raises(VerificationError, match=r"was sparsified at 1:4, 2:4, which is not 1:16: 0\.weight"):
        verify(finalized(), "1:16")


def test_an_inner_model_and_a_wrapper_are_found() -> None:
    outer = nn.Sequential(finalized())
    assert [c.name for c in verify(outer).checks] == ["0.0.weight", "0.2.weight"]
    assert len(verify(torch.compile(outer)).checks) == 2  # type: ignore[arg-type]


def test_files_with_and_without_a_table(tmp_path: Path) -> None:
    assert len(verify(ours(tmp_path / "ours.pt"), "2:4").checked) == 2
    shadow = make()
    torch.save(shadow.state_dict(), tmp_path / "shadow.pt")
    with pytest.raises(VerificationError, match="3 of 3 weights break"):
        verify(tmp_path / "shadow.pt", "2:4")
    with pytest.raises(SparsityError, match="no table of sparse weights; give a pattern"):
        verify(tmp_path / "shadow.pt")
    torch.save({"model": finalized().state_dict()}, tmp_path / "engine.pt")
    result = verify({"a": torch.zeros(4, 8), "b": torch.ones(4, 6), "c": torch.ones(3)}, "2:4")
    assert [(c.name, c.skipped) for c in result.checks] == [("a", ""), ("b", "reduction size 6 is not divisible by 4")]


def test_what_checks_nothing_does_not_pass(tmp_path: Path) -> None:
    dense = {"a.weight": torch.randn(8, 8), "b.bias": torch.zeros(3)}
    entry = {"format": 1, "method": "dense", "hyperparameters": {}, "layout": "channel", "layers": {}}
    nothing: dict[str, Any] = {
        "a pattern that fits nothing": lambda: verify(dense, "2:7"),
        "all excluded": lambda: verify(dense, "2:4", exclude=["*"]),
        "an empty state dict": lambda: verify({"state_dict": {}}, "2:4"),
        "only a bias": lambda: verify({"b.bias": torch.zeros(3)}, "2:4"),
        "only an embedding": lambda: verify({"embed_tokens.weight": torch.zeros(8, 8)}, "2:4"),
        "whole numbers": lambda: verify({"a.weight": torch.zeros(8, 8, dtype=torch.int8)}, "2:4"),
        "no values": lambda: verify({"a.weight": torch.zeros(8, 8, device="meta")}, "2:4"),
        "a dense run": lambda: verify({"state_dict": dense, "nm_sparsity": entry}),
        "a dense run, asked": lambda: verify({"state_dict": dense, "nm_sparsity": entry}, "2:4"),
        "a model without eligible layers": lambda: verify(nn.Sequential(nn.Linear(5, 5)), "2:4"),
        "a model without layers": lambda: verify(nn.ReLU(), "2:4"),
    }
    for case, check in nothing.items():
        with pytest.raises(VerificationError, match=r"nothing is verified|has no sparse weight"):
            print(case, check())


def test_every_pattern_must_imply_the_one_that_is_asked_for(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    sparsify(net, "2:4", patterns={"0": "6:8"}, method="ste")
    finalize(net)
    io.save(tmp_path / "net.pt", {"state_dict": net.state_dict(), "nm_sparsity": Metadata.of(net).to_dict()})
    for target in (net, tmp_path / "net.pt"):
        assert len(verify(target).checked) == 2
        assert len(verify(target, "6:8").checked) == 2, "two in each four are at most four in each eight"
        with pytest.raises(VerificationError, match=r"at 6:8, which is not 2:4: 0\.weight$"):
            verify(target, "2:4")
    assert len(verify(finalized(), "2:4").checked) == 2, "one in each four is at most two in each four"


@pytest.mark.parametrize("option", ["include", "exclude", "patterns"])
def test_globs_are_for_files_without_a_table_and_must_match(tmp_path: Path, option: str) -> None:
    def globs(glob: str) -> Any:
        return {option: {glob: "dense"} if option == "patterns" else [glob]}

    path = ours(tmp_path / "ours.pt")
    for target in (path, finalized()):
        with pytest.raises(SparsityError, match="carries a table of its sparse weights; include, exclude and patterns"):
            verify(target, **globs("2"))
    with pytest.raises(SparsityError, match=r'"typo\*" matches no layer'):
        verify({"a.weight": torch.zeros(8, 8)}, "2:4", **globs("typo*"))


def test_a_guess_by_name_gives_way_to_a_glob() -> None:
    """Time embeddings of diffusion models, say, are linear layers."""
    state = {"time.embed.weight": torch.ones(8, 8), "out.weight": torch.zeros(8, 8)}
    result = verify(state, "2:4")
    assert [check.skipped for check in result.checks] == ["an embedding, by its name: include it if it is none", ""]
    with pytest.raises(VerificationError, match="1 of 2 weights break"):
        verify(state, "2:4", patterns={"time": "2:4"})


def test_nothing_sparse_does_not_pass() -> None:
    net = nn.Sequential(nn.Linear(6, 6))
    with pytest.warns(UserWarning, match="converted no layer"):
        sparsify(net)
    finalize(net)
    with pytest.raises(VerificationError, match="has no sparse weight"):
        verify(net, "2:4")


def test_weights_that_are_meant_to_be_dense_can_be_excluded(tmp_path: Path) -> None:
    state = {"body.weight": torch.zeros(4, 8), "head.weight": torch.ones(4, 8)}
    with pytest.raises(VerificationError, match=r"head\.weight"):
        verify(state, "2:4")
    assert [c.skipped for c in verify(state, "2:4", exclude=["head"]).checks] == ["", 'excluded by "head"']


def test_console_verify_exits_0_1_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(ours(tmp_path / "ours.pt"))]) == 0
    assert "2 weights checked, 0 violate" in capsys.readouterr().out
    torch.save(make().state_dict(), tmp_path / "shadow.pt")
    assert main(["verify", str(tmp_path / "shadow.pt"), "--pattern", "2:4"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: 3 of 3 weights break their pattern:")
    assert main(["verify", str(tmp_path / "none.pt")]) == 1
    assert main(["verify", str(tmp_path / "ours.pt"), "--pattern", "4:2"]) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["frobnicate"])


def test_console_finalize_drops_what_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ours(tmp_path / "ours.pt")
    assert main(["finalize", str(source), str(tmp_path / "final.pt")]) == 0
    final = io.load(tmp_path / "final.pt")
    assert "dropped" not in final["nm_sparsity"]
    assert all(torch.equal(v, final["state_dict"][k]) for k, v in io.load(source)["state_dict"].items())
    assert (tmp_path / "final.pt").stat().st_size < source.stat().st_size

    torch.save(make().state_dict(), tmp_path / "shadow.pt")
    output = tmp_path / "masked.pt"
    assert main(["finalize", str(tmp_path / "shadow.pt"), str(output)]) == 1
    assert "say which pattern" in capsys.readouterr().err
    assert not output.exists()
    assert main(["finalize", str(tmp_path / "shadow.pt"), str(output), "--pattern", "2:4", "--exclude", "3"]) == 0
    masked = io.load(output)
    assert set(masked["nm_sparsity"]["layers"]) == {"0.weight", "2.weight"}
    assert torch.equal(masked["state_dict"]["3.weight"], make()[3].weight)
    assert main(["verify", str(output)]) == 0


def test_console_inspect_counts_flops_like_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "resnet18", "--exclude", "fc", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    weights = {w["name"]: w for w in report["weights"]}
    assert weights["layer1.0.conv1.weight"]["flops"] == 2 * 64 * 64 * 9 * 56 * 56
    assert weights["layer4.0.downsample.0.weight"]["flops"] == 2 * 512 * 256 * 7 * 7
    assert weights["fc.weight"]["note"] == 'excluded by "fc"'
    sparse = sum(w["flops"] for w in report["weights"] if w["pattern"] == "2:4")
    assert report["flops"] - report["sparse_flops"] == sparse / 2
    assert report["flops"] == pytest.approx(2 * 1.814e9, rel=1e-3), "torchvision documents 1.81 GMACs"


def test_console_inspect_counts_attention(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "vit_b_16"]) == 0
    out = capsys.readouterr().out
    mflops = 2 * 197 * 768 * 768 / 1e6
    line = next(line for line in out.splitlines() if "layer_0.self_attention.out_proj" in line)
    assert f"{mflops:.4g}" in line
    line = next(line for line in out.splitlines() if "layer_0.self_attention.in_proj" in line)
    assert f"{3 * mflops:.4g}" in line
    total = 35.1  # torchvision documents 17.56 GMACs for ViT-B/16
    assert f"{total:.1f}" in out.splitlines()[-1]


def test_console_inspect_bad_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "resnet51"]) == 1
    assert 'unknown model "resnet51"; torchvision has' in capsys.readouterr().err
    assert main(["inspect", "no.such:thing"]) == 1
    assert 'cannot build "no.such:thing"' in capsys.readouterr().err
    assert main(["inspect", "collections:OrderedDict"]) == 1
    assert "expected a torch.nn.Module" in capsys.readouterr().err
    assert main(["inspect", "torch.nn:Linear"]) == 1
    assert "missing 2 required positional arguments" in capsys.readouterr().err
    assert main(["inspect", "resnet18", "--input", "1,2"]) == 1
    assert "does not take an input of [1, 2]" in capsys.readouterr().err
    assert main(["inspect", "maskrcnn_resnet50_fpn"]) == 0
    assert "FLOPs not counted: the model does not take" in capsys.readouterr().err


def test_console_inspect_of_a_detector_fetches_no_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "maskrcnn_resnet50_fpn", "--input", "none"]) == 0
    assert "roi_heads.mask_head.0.0" in capsys.readouterr().out


@pytest.mark.slow
def test_console_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "nm_sparsity.core", "inspect", "alexnet", "--pattern", "1:4", "--input", "none"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "reduction size 3 is not divisible by 4" in run.stdout


def test_a_bare_weight_whose_inputs_may_be_in_dimension_0_is_hinted_at() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(8, 12, 3), nn.Flatten(), nn.Linear(8, 8))
    sparsify(net, "2:4", method="ste", exclude=["2"])
    finalize(net)
    assert verify(net).checked
    with pytest.raises(VerificationError) as refused:
        verify(net.state_dict(), "2:4")
    transposed, linear = str(refused.value).splitlines()[3:5]
    assert transposed.startswith("0.weight")
    assert transposed.endswith(
        "it is 2:4 along dimension 0, as in a transposed convolution or Conv1D: give verify the "
        "model, which tells, or exclude it"
    )
    assert linear.startswith("2.weight")
    assert "dimension 0" not in linear


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_told_as_such(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(4, 4))
    net[1].weight = nn.Parameter(nested)
    report = sparsify(net, "2:4", method="ste")
    assert [row.note for row in report.weights] == ["", "a nested tensor"]
    finalize(net)
    assert [check.name for check in verify(net).checks] == ["0.weight"]
    found = verify({"a": net[0].weight.data, "b": nested}, "2:4")
    assert [(check.name, check.skipped) for check in found.checks] == [("a", ""), ("b", "it is a nested tensor")]


def test_a_tensor_that_claims_more_than_it_holds_is_not_counted() -> None:
    with pytest.raises(VerificationError, match="it is expanded"):
        verify({"w": torch.zeros(1).expand(2**23, 2**23)}, "2:4")
