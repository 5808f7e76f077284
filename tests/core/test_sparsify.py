"""What is converted, what stays dense, and why; and every way to ask for it wrongly."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from nm_sparsity.core import (
    NMPattern,
    SparsityConfig,
    SparsityError,
    SparsityReport,
    VerificationError,
    finalize,
    make_method,
    satisfies,
    sparsify,
    unsparsify,
    verify,
)
from nm_sparsity.core.model.layers import SparseLayer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(
            nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1, groups=2)
        )
        self.up = nn.ConvTranspose2d(16, 8, 2)
        self.head = nn.Linear(8, 10)


def notes(report: SparsityReport) -> dict[str, tuple[str, str]]:
    return {w.name.removesuffix(".weight"): (w.pattern, w.note) for w in report.weights}


def test_channel_layout_takes_every_layer_whose_input_channels_divide() -> None:
    net = Net()
    parameters, keys = dict(net.named_parameters()), list(net.state_dict())
    report = sparsify(net, "2:4")
    assert notes(report) == {
        "stem": ("dense", "reduction size 3 is not divisible by 4"),
        "blocks.0": ("2:4", ""),
        "blocks.1": ("dense", "reduction size 1 is not divisible by 4"),
        "blocks.2": ("2:4", ""),
        "up": ("2:4", ""),
        "head": ("2:4", ""),
    }
    assert list(net.state_dict()) == keys
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert isinstance(net.head, nn.Linear)
    assert isinstance(net.head, SparseLayer)
    assert repr(net.head) == "SparseLinear(in_features=8, out_features=10, bias=True, 2:4)"


def test_kernel_layout_groups_whole_filters() -> None:
    net = Net()
    report = sparsify(net, "1:3", layout="kernel")
    assert notes(report)["stem"] == ("1:3", "")
    assert notes(report)["blocks.1"] == ("1:3", "")
    assert notes(report)["head"][0] == "dense"
    flat = net.stem.weight.detach().flatten(1)
    assert satisfies(flat, "1:3")
    finalize(net)
    verify(net, "1:3")


def test_a_group_of_a_transposed_convolution_stays_within_a_convolution_group() -> None:
    # 12 input channels in 2 groups of 6: groups of 4 would span both.
    report = sparsify(nn.Sequential(nn.ConvTranspose2d(12, 4, 2, groups=2), nn.Linear(4, 4)))
    assert report.weights[0].note == "reduction size 6 is not divisible by 4"


def test_report_adds_up_and_prints_aligned_and_as_json() -> None:
    report = sparsify(Net(), "1:4", exclude=["head"])
    sizes = {w.name: w.size for w in report.weights}
    kept = 16 * 8 * 9 / 4 + 16 * 8 / 4 + 16 * 8 * 4 / 4
    total = sum(p.numel() for p in Net().parameters())
    dropped = sum(sizes[n] for n in ("blocks.0.weight", "blocks.2.weight", "up.weight")) - kept
    assert report.sparse_density == 0.25
    assert report.model_density == pytest.approx(1 - dropped / total)
    lines = str(report).splitlines()
    assert lines[0].startswith("layer")
    assert 'excluded by "head"' in str(report)
    assert "3 of 6 weights sparse (sr-ste)" in lines[-1]
    parsed = json.loads(report.to_json())
    assert parsed["weights"][1]["shape"] == [16, 8, 3, 3]
    assert parsed["model_density"] == report.model_density


def test_globs_match_layers_and_ancestors_and_the_last_pattern_wins() -> None:
    report = sparsify(Net(), "2:4", patterns={"blocks": "1:4", "blocks.2": "dense", "h*": "1:8"}, exclude=["up"])
    assert [notes(report)[name][0] for name in ("blocks.0", "blocks.2", "head", "up")] == [
        "1:4",
        "dense",
        "1:8",
        "dense",
    ]
    report = sparsify(Net(), include=["blocks.*"])
    assert [w.name for w in report.sparse] == ["blocks.0.weight", "blocks.2.weight"]
    assert notes(report)["head"] == ("dense", "not included")


@pytest.mark.parametrize("arguments", [{"exclude": ["fc"]}, {"include": ["x.*"]}, {"patterns": {"layer9": "1:4"}}])
def test_a_glob_that_matches_nothing_raises_and_names_the_layers(arguments: dict[str, object]) -> None:
    net = Net()
    with pytest.raises(SparsityError, match=r"matches no layer of the model; its layers are stem, blocks\.0"):
        sparsify(net, **arguments)  # type: ignore[arg-type]
    assert type(net.head) is nn.Linear


def test_a_dtype_without_masks_stays_dense() -> None:
    found = notes(sparsify(nn.Sequential(nn.Linear(8, 8, dtype=torch.cfloat), nn.Linear(8, 8))))
    assert found["0"] == ("dense", "torch.complex64: masks need fp64, fp32, bf16 or fp16")


def test_remainder_error_names_layer_size_and_way_out() -> None:
    with pytest.raises(SparsityError, match=r"blocks\.0\.weight of shape .* cannot be 2:3: .*; exclude it"):
        sparsify(Net(), "2:3", remainder="error")
    with pytest.raises(SparsityError, match='remainder must be "dense" or "error"'):
        sparsify(Net(), remainder="ignore")


def test_a_model_with_nothing_to_convert_warns() -> None:
    with pytest.warns(UserWarning, match="converted no layer"):
        sparsify(nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        SparsityError, match='unknown method "srste"; known methods: asp, decaying, dense, s-ste, sr-ste, ste'
    ):
        sparsify(Net(), method="srste")
    with pytest.raises(SparsityError, match='method "ste" has no hyperparameter "decay"; it takes none'):
        sparsify(Net(), method="ste", decay=1.0)
    with pytest.raises(SparsityError, match=r'no hyperparameter "lambda_"; it takes decay'):
        sparsify(Net(), lambda_=1.0)
    with pytest.raises(SparsityError, match='unknown layout "nhwc"'):
        sparsify(Net(), layout="nhwc")
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SparsityError, match="finite number >= 0"):
            sparsify(Net(), decay=bad)
    with pytest.raises(SparsityError, match="not both"):
        sparsify(Net(), method=make_method("sr-ste"), decay=1.0)


def test_a_second_call_is_refused_also_on_a_part_and_after_finalize() -> None:
    net = Net()
    sparsify(net)
    for part in (net, net.blocks, nn.Sequential(net)):
        with pytest.raises(SparsityError, match="sparsified before"):
            sparsify(part)
    finalize(net)
    with pytest.raises(SparsityError, match="sparsified before"):
        sparsify(net)


def test_unsparsify_gives_back_the_shadow_weights() -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sparsify(net)
    unsparsify(net)
    assert type(net.head) is nn.Linear
    assert torch.equal(net.head.weight, before["head.weight"])
    sparsify(net, "1:4")
    finalize(net)
    zeros = net.head.weight == 0
    unsparsify(net)  # forgets what it was, and keeps its zeros
    assert torch.equal(net.head.weight == 0, zeros)
    sparsify(net, "1:8")
    unsparsify(net)
    with pytest.raises(SparsityError, match="cannot unsparsify Net: it was never sparsified"):
        unsparsify(net)


def test_finalize_writes_zeros_into_the_same_parameters() -> None:
    net = Net()
    sparsify(net, method="ste")
    parameter, masked = net.head._parameters["weight"], net.head.weight.detach().clone()
    report = finalize(net)
    assert type(net.head) is nn.Linear
    assert net.head.weight is parameter
    assert torch.equal(net.head.weight, masked)
    assert [w.name for w in report.weights] == ["blocks.0.weight", "blocks.2.weight", "up.weight", "head.weight"]
    with pytest.raises(SparsityError, match="finalized already"):
        finalize(net)


def test_finalize_of_a_model_that_was_never_sparsified() -> None:
    with pytest.raises(SparsityError, match="cannot finalize Net: it was never sparsified"):
        finalize(Net())


def test_dense_method_is_a_no_op_that_shares_every_path() -> None:
    net = Net()
    with warnings.catch_warnings(action="error"):
        report = sparsify(net, method="dense")
    assert type(net.head) is nn.Linear
    assert not report.sparse
    assert notes(report)["head"] == ("dense", 'method "dense"')
    before = net.head.weight.detach().clone()
    finalize(net)
    with pytest.raises(VerificationError, match="it was trained dense"):
        verify(net)
    assert torch.equal(net.head.weight, before)


def test_why_weights_stay_dense() -> None:
    net = nn.ModuleDict(
        {
            "embedding": nn.Embedding(16, 8),
            "tied": nn.Linear(8, 16),
            "lstm": nn.LSTM(8, 8),
            "weight_norm": parametrizations.weight_norm(nn.Linear(8, 8)),
            "lazy": nn.LazyLinear(8),
            "plain": nn.Linear(8, 8),
        }
    )
    net["tied"].weight = net["embedding"].weight
    net["plain"].requires_grad_(False)
    found = notes(sparsify(net))
    assert found["embedding"] == ("dense", "tied to an embedding; tied with tied.weight")
    assert found["lstm.weight_ih_l0"] == ("dense", "recurrent layer LSTM: not supported")
    assert found["weight_norm.parametrizations.weight.original1"][1].startswith("parametrized")
    assert found["lazy"][1].startswith("not initialised yet")
    assert found["plain"] == ("2:4", "masked, not trained (requires_grad is False)")


def test_old_weight_norm_stays_dense() -> None:
    with warnings.catch_warnings(action="ignore"):
        layer = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    found = notes(sparsify(nn.Sequential(layer, nn.Linear(8, 8))))
    assert found["0.weight_v"][1].startswith("weight_norm or spectral_norm")


def test_tied_layers_need_one_pattern() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    with pytest.raises(SparsityError, match=r"0\.weight and 1\.weight share one weight"):
        sparsify(net, patterns={"1": "1:4"})


def test_attention_is_sparse_in_its_packed_weight_too() -> None:
    net = nn.MultiheadAttention(16, 4, kdim=8, vdim=8)
    report = sparsify(net)
    assert [w.name for w in report.sparse] == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert [w.name for w in sparsify(nn.MultiheadAttention(16, 4)).sparse] == ["in_proj_weight", "out_proj.weight"]


def test_nan_and_inf_weights_do_not_spread() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        net[0].weight[0] = torch.tensor([float("inf"), float("nan"), 1, 2, 3, 4, 5, 6])
    sparsify(net, "2:4", method="ste")
    finalize(net)
    assert verify(net)
    assert torch.isfinite(net[0].weight[0, 2:]).all()


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(SparsityError, match="compiled already: call sparsify first"):
        sparsify(torch.compile(Net()))  # type: ignore[arg-type]


def test_config_is_the_call_as_data() -> None:
    config = SparsityConfig("1:4", decay=0.1, exclude=("head",), patterns={"up": "dense"})
    assert str(config.sparsify(Net())) == str(
        sparsify(Net(), "1:4", decay=0.1, exclude=["head"], patterns={"up": "dense"})
    )
    for wrong in ({"pattern": "4:2"}, {"method": "x"}, {"layout": "x"}, {"method": "ste", "decay": 1.0}):
        with pytest.raises(SparsityError):
            SparsityConfig(**wrong)  # type: ignore[arg-type]


def test_one_pattern_object_may_be_passed() -> None:
    assert sparsify(Net(), NMPattern(1, 8), method=make_method("ste")).sparse[0].pattern == "1:8"


@pytest.mark.parametrize("seed", ["0", "1", "2", "3"])
def test_of_two_reasons_the_report_gives_the_first_owners_whatever_the_hash_seed(seed: str) -> None:
    code = (
        "from torch import nn; from nm_sparsity import sparsify\n"
        "net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)); net[1].weight = net[0].weight\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "print(sparsify(net, exclude=['1', '0']).weights[0].note)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == 'excluded by "0"; tied with 1.weight\n'


def test_a_class_that_cannot_be_subclassed_leaves_the_model_as_it_was() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls) -> None:
            raise TypeError("no subclasses")

    net = nn.Sequential(nn.Linear(8, 8), Final(8, 8))
    with pytest.raises(TypeError, match="no subclasses"):
        sparsify(net, "2:4")
    assert [type(module) for module in net] == [nn.Linear, Final]
