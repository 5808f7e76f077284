"""What is reported N:M computes N:M: what may use something else than its weight stays dense, with the reason."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from nm_sparsity.core import SparsityConfig, SparsityError, finalize, satisfies, sparsify, unsparsify, verify
from nm_sparsity.core.model.layers import sparse_layers


class Standardised(nn.Conv2d):
    """As timm's StdConv2d and mmcv's ConvWS2d."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Rounded(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.round(decimals=1), bias)


class Counted(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class AlsoCounted(Counted):
    """Inherits what it computes with."""


class Plain(nn.Linear):
    """Has nothing of its own that computes."""

    def extra_repr(self) -> str:
        return "plain"


class Doubling:
    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)  # type: ignore[misc]


class Doubled(Doubling, nn.Linear):
    pass


def mixed() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "standardised": Standardised(8, 8, 3),
            "rounded": Rounded(8, 8, 3),
            "counted": AlsoCounted(8, 8),
            "doubled": Doubled(8, 8),
            "plain": Plain(8, 8),
            "base": nn.Linear(8, 8),
        }
    )


def test_only_classes_that_are_known_or_trusted_become_sparse() -> None:
    report = sparsify(mixed())
    assert [w.name for w in report.sparse] == ["plain.weight", "base.weight"]
    for row in report.weights[:4]:
        assert "with a forward of its own: trust it if that takes the weight as it is" in row.note
        assert f"{__name__}:{type(mixed()[row.name.split('.')[0]]).__name__}" in row.note


@pytest.mark.parametrize("trusted", [Counted, AlsoCounted, f"{__name__}:Counted"])
def test_trust_is_given_by_class_or_name_and_inherited(trusted: Any) -> None:
    for report in (sparsify(mixed(), trust=[trusted]), SparsityConfig(trust=(trusted,)).sparsify(mixed())):
        assert [w.name for w in report.sparse] == ["counted.weight", "plain.weight", "base.weight"]


def test_trust_that_fits_nothing_is_told() -> None:
    with pytest.raises(SparsityError, match=r'trust names "my\.net:Conv", but no layer of the model is one'):
        sparsify(mixed(), trust=["my.net:Conv"])
    for wrong in (["Conv"], [7], [str], Counted, "a:B"):
        with pytest.raises(SparsityError, match="trust takes"):
            sparsify(mixed(), trust=wrong)  # type: ignore[arg-type]


def test_a_forward_that_was_replaced_on_the_object_needs_trust() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[0].forward = lambda x: F.linear(x, net[0].weight.cos())  # type: ignore[method-assign]
    report = sparsify(net)
    assert report.weights[0].note == "a Linear whose forward was replaced"
    assert [w.name for w in report.sparse] == ["1.weight"]
    unsparsify(net)
    assert len(sparsify(net, trust=[nn.Linear]).sparse) == 2


def test_a_layer_parametrized_in_anything_stays_dense() -> None:
    net = nn.Sequential(nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    parametrize.register_parametrization(net[0], "bias", nn.Identity())
    assert [w.name for w in sparsify(net).sparse] == ["2.weight"]
    parametrize.remove_parametrizations(net[0], "bias")
    assert type(net[0]) is nn.Linear


class Int8(Tensor):
    """A quantized weight as torchao makes them: 8-bit data that says it is float32."""

    data8: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, w: Tensor) -> "Int8":
        made: Int8 = torch.Tensor._make_wrapper_subclass(cls, w.shape, dtype=w.dtype)  # type: ignore[attr-defined]
        made.scale = w.detach().abs().amax(1, keepdim=True) / 127
        made.data8 = (w.detach() / made.scale).round().to(torch.int8)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = [a.data8 * a.scale if isinstance(a, Int8) else a for a in args]
        return func(*plain, **(kwargs or {}))


class Params4bit(nn.Parameter):
    """As bitsandbytes has it: a Parameter that packs itself when it goes to a GPU."""


@pytest.mark.parametrize(
    ("quantized", "kind"),
    [(lambda w: nn.Parameter(Int8(w), requires_grad=False), "Int8"), (lambda w: Params4bit(w.detach()), "Params4bit")],
)
def test_quantized_weights_stay_dense_and_do_not_replace_sparse_ones(quantized: Any, kind: str) -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.ones(1, 8)
    net[0].weight = quantized(net[0].weight)
    output = net[0](x)
    report = sparsify(net)
    assert report.weights[0].note == f"a {kind}: quantized, or otherwise no plain tensor"
    assert torch.equal(net[0](x), output)
    with pytest.raises(SparsityError, match=f"weight of a SparseLinear cannot become a {kind}: .*; finalize the model"):
        net[1].weight = quantized(net[1].get_parameter("weight"))
    finalize(net)
    assert [check.name for check in verify(net, "2:4").checks] == ["1.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization_aware_training_prepares_before_sparsify_and_ends_2to4() -> None:
    import torch.ao.quantization as ao

    def prepared(model: nn.Module) -> nn.Module:
        model.qconfig = ao.get_default_qat_qconfig("fbgemm")
        with warnings.catch_warnings(action="ignore"):
            return ao.prepare_qat(model.train())

    def net() -> nn.Sequential:
        return nn.Sequential(ao.QuantStub(), nn.Linear(8, 8), ao.DeQuantStub())

    sparse = net()
    sparsify(sparse)
    with pytest.raises(SparsityError, match="a SparseLinear cannot be prepared for quantization: finalize the model"):
        prepared(sparse)

    model = prepared(net())
    with pytest.warns(UserWarning, match="converted no layer"):
        assert "trust it" in sparsify(model).weights[0].note
    unsparsify(model)
    sparsify(model, trust=[type(model[1])], method="ste")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    finalize(model)
    verify(model, "2:4")
    with warnings.catch_warnings(action="ignore"):
        quantized = ao.convert(model.eval())
    assert satisfies(quantized[1].weight().dequantize(), "2:4")


def test_a_weight_tied_outside_of_what_is_sparsified_stays_dense() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "head": nn.Linear(8, 8)})
    model["head"].weight = model["encoder"][0].weight
    report, x = sparsify(model["encoder"]), torch.ones(1, 8)
    assert report.weights[0].note == "tied to a Linear outside of what was given to sparsify"
    output = model["head"](x)
    finalize(model["encoder"])
    assert torch.equal(model["head"](x), output)
    unsparsify(model["encoder"])
    assert [w.note for w in sparsify(model).sparse] == ["tied with head.weight", ""]


def test_what_else_holds_a_weight_is_no_tie() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    outer = nn.ModuleList([net])
    outer.append(outer)  # garbage that only the collector frees
    tied = nn.Linear(8, 8)
    tied.weight, tied.cycle = net[0].weight, [tied]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    del outer, tied
    assert len(sparsify(net).sparse) == 1
    assert optimizer.param_groups[0]["params"][0] is net[0]._parameters["weight"]
    assert len(list(sparse_layers(net))) == 1
