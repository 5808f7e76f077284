"""Acceleration, tested without a GPU: torch's own compressed tensors on the CPU with only their product emulated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS as TorchCutlass
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from nm_sparsity.core import SparsityError, VerificationError, finalize, keep_largest, sparsify
from nm_sparsity.core.deploy import cusparselt, library
from nm_sparsity.core.deploy.backends import BACKENDS, CuSparseLt, Cutlass, choose_backend
from nm_sparsity.core.deploy.candidates import why_not_layer
from nm_sparsity.core.deploy.convert import to_semi_structured
from nm_sparsity.core.deploy.layers import SemiStructuredConv2d, SemiStructuredLinear
from nm_sparsity.core.deploy.onnx import to_onnx


class Emulated(TorchCutlass):
    """torch's compressed weight on the CPU: compression and dispatch are torch's own, the product decompresses."""

    @staticmethod
    def read(x: Tensor) -> Tensor:
        """The input as the kernel reads it."""
        return x

    @classmethod
    def _validate_device_dim_dtype_shape(cls, original_tensor: Tensor) -> None:
        pass

    def _mm(self, dense: Tensor, *, bias: Tensor | None = None, should_transpose_dense: bool = False) -> Tensor:  # type: ignore[override]
        weight = sparse_semi_structured_to_dense_cutlass(self.packed, self.meta)
        x = dense if should_transpose_dense else dense.t()  # newer and older versions of torch
        out = self.read(x).float() @ weight.t().float()
        out = (out if bias is None else out + bias.float()).to(dense.dtype)
        return out if should_transpose_dense else out.t()


class BySizes(Emulated):
    """Reads its input by its sizes, whatever the strides say, as cuSPARSELt does."""

    @staticmethod
    def read(x: Tensor) -> Tensor:
        return torch.as_strided(x, x.shape, (x.shape[1], 1))


class OnCPU(Cutlass):
    """CUTLASS on a machine without a GPU."""

    def __init__(self, tensor: type[Emulated] = Emulated) -> None:
        self.tensor = tensor

    def why_not_device(self, device: torch.device) -> str:
        return ""


class OnHost(CuSparseLt):
    """cuSPARSELt on a machine without a GPU: with the stand-in that computes on the host's memory."""

    def why_not_device(self, device: torch.device) -> str:
        return ""


def finalized(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sparsify(model, "2:4", **options)
    finalize(model)
    return model.half().eval()


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.Conv2d(64, 64, 1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 96, (1, 1), padding="same", bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def test_output_equals_the_masked_dense_model() -> None:
    model = finalized(net(), exclude=["6"])
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 9, 9).half()
    report = to_semi_structured(model, backend=OnCPU())
    assert report.backend == "cutlass"
    assert report.converted == ("1.weight", "3.weight")
    assert {type(model[1]), type(model[3])} == {SemiStructuredConv2d}
    notes = {row.name: row.note for row in report.rows}
    assert "no 2:4 convolution" in notes["0.weight"]
    assert "multiples of 32 x 64" in notes["6.weight"]
    assert "2 of 4 weights run 2:4 on cutlass" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=2e-3, atol=2e-3)
        one, images = x[0], model[1](model[0](x))
        torch.testing.assert_close(model[1](model[0](one)), images[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_linear_takes_any_leading_shape_and_strides(shape: tuple[int, ...]) -> None:
    model = finalized(nn.Sequential(nn.Linear(64, 32)))
    dense, x = copy.deepcopy(model), torch.randn(shape).half()
    to_semi_structured(model, backend=OnCPU())
    assert type(model[0]) is SemiStructuredLinear
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=2e-3, atol=2e-3)
        if len(shape) == 3:
            x = torch.randn(shape[1], shape[0], 64).half().transpose(0, 1)
            torch.testing.assert_close(model(x), dense(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(8, 5, 64)[:, 0],
        lambda: torch.randn(8, 128)[:, :64],
        lambda: torch.randn(3, 64, 4).transpose(1, 2),
    ],
    ids=["class token", "half of the features", "transposed"],
)
def test_the_product_gets_its_rows_without_gaps(make: Any) -> None:
    model = finalized(nn.Sequential(nn.Linear(64, 32)))
    dense, x = copy.deepcopy(model), make().half()
    to_semi_structured(model, backend=OnCPU(BySizes))
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=2e-3, atol=2e-3)
        images = torch.randn(2, 128, 2, 2).half().to(memory_format=torch.channels_last)[:, :64]
        conv = finalized(nn.Sequential(nn.Conv2d(64, 32, 1, stride=2)))
        dense = copy.deepcopy(conv)
        to_semi_structured(conv, backend=OnCPU(BySizes))
        torch.testing.assert_close(conv(images), dense(images), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_works_under_compile() -> None:
    model = finalized(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)))
    dense, x = copy.deepcopy(model), torch.randn(4, 64).half()
    to_semi_structured(model, backend=OnCPU())
    with torch.no_grad():
        result = torch.compile(model, backend="aot_eager")(x)
        torch.testing.assert_close(result, dense(x), rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # in the dense model's fast path
def test_transformer_layers_leave_their_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = finalized(nn.TransformerEncoder(layer, 2)).float()
    model.half()
    dense, x = copy.deepcopy(model), torch.randn(2, 5, 64).half()
    report = to_semi_structured(model, backend=OnCPU())
    assert len(report.converted) == 4
    assert all("linear" in name for name in report.converted)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    with torch.no_grad():
        expected, result = dense(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(result[~padding], expected[~padding], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_compression_loses_nothing_that_is_2_4(dtype: torch.dtype) -> None:
    w = keep_largest(torch.randn(64, 128), "2:4")
    w = (w * 50).to(dtype) if dtype == torch.int8 else w.to(dtype)
    packed, meta = sparse_semi_structured_from_dense_cutlass(w)
    assert packed.shape == (64, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), w)


def test_a_weight_that_is_not_2_4_is_refused_by_name() -> None:
    model = finalized(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    with torch.no_grad():
        model[1].weight[0, :3] = 1.0
    with pytest.raises(VerificationError, match=r"1\.weight is not 2:4 .* 1 of 1,024 groups"):
        to_semi_structured(model, backend=OnCPU())
    assert type(model[0]) is nn.Linear  # nothing was converted before the refusal


def test_other_zeros_than_2_4_are_refused_and_dense_layers_left() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    with torch.no_grad():
        model[0].weight[:, :32] = 0
    with pytest.raises(VerificationError, match=r"0\.weight is not 2:4"):
        to_semi_structured(model, backend=OnCPU())
    report = to_semi_structured(model[1], backend=OnCPU())
    assert [row.note for row in report.rows] == ["dense"]
    other = nn.Sequential(nn.Linear(64, 64))
    sparsify(other, "4:8")
    finalize(other)
    report = to_semi_structured(other.half(), backend=OnCPU())
    assert [row.note for row in report.rows] == ["4:8: the hardware runs only 2:4"]


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:2"])
def test_sparser_patterns_run_as_2_4(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    sparsify(model, pattern)
    finalize(model)
    assert to_semi_structured(model.half(), backend=OnCPU()).converted == ("0.weight",)
    other = nn.Sequential(nn.Linear(64, 64))
    sparsify(other, pattern)
    finalize(other)
    with torch.no_grad():
        other[0].weight[0, :3] = 1.0
    with pytest.raises(VerificationError, match=r"0\.weight is not 2:4"):
        to_semi_structured(other.half(), backend=OnCPU())


def test_a_model_in_a_dtype_that_the_backend_has_not() -> None:
    model = finalized(nn.Sequential(nn.Linear(64, 64))).float()
    with pytest.raises(
        SparsityError, match=r"cusparselt has no float32: convert the model first, with model\.bfloat16"
    ):
        to_semi_structured(model, backend=OnHost())


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnCall(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = super().__call__(x) * 2
        return y


class OwnProduct(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


@pytest.mark.parametrize(
    ("module", "dtype", "backend", "expected"),
    [
        (nn.Linear(64, 64), torch.float32, "cusparselt", "cusparselt has no float32"),
        (nn.Linear(64, 8), torch.float16, "cusparselt", "multiples of 16 x 16"),
        (nn.Linear(48, 64), torch.bfloat16, "cutlass", "multiples of 32 x 64"),
        (nn.Linear(48, 48), torch.bfloat16, "cusparselt", ""),
        (nn.Conv2d(64, 64, 3), torch.float16, "cusparselt", "no 2:4 convolution"),
        (nn.Conv2d(64, 64, 1, groups=2), torch.float16, "cusparselt", "no 2:4 convolution"),
        (nn.Conv2d(64, 64, 1, padding=1), torch.float16, "cusparselt", "no 2:4 convolution"),
        (nn.ConvTranspose2d(64, 64, 1), torch.float16, "cusparselt", "no 2:4 ConvTranspose2d"),
        (nn.Conv1d(64, 64, 1), torch.float16, "cusparselt", "no 2:4 Conv1d"),
        (OwnForward(64, 64), torch.float16, "cusparselt", "OwnForward computes in its own way"),
        (OwnCall(64, 64), torch.float16, "cusparselt", "OwnCall computes in its own way"),
        (OwnProduct(64, 64, 1), torch.float16, "cusparselt", "OwnProduct computes in its own way"),
        (nn.MultiheadAttention(64, 4).out_proj, torch.float16, "cusparselt", "MultiheadAttention uses it"),
    ],
)
def test_why_a_layer_stays_dense(module: nn.Module, dtype: torch.dtype, backend: str, expected: str) -> None:
    weight: Any = module.weight
    found = why_not_layer(module, "weight", weight.shape, dtype, BACKENDS[backend])
    assert expected in found
    assert bool(expected) == bool(found)


def test_without_a_gpu_it_says_what_is_needed() -> None:
    model = finalized(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(SparsityError, match="cannot be accelerated here: needs an NVIDIA GPU, found cpu"):
        to_semi_structured(model)
    with pytest.raises(SparsityError, match='unknown backend "cuda"; known: auto, cusparselt, torch, cutlass'):
        to_semi_structured(model, backend="cuda")
    with pytest.raises(SparsityError, match="must be on one device, found none"):
        to_semi_structured(nn.ReLU())
    training = nn.Sequential(nn.Linear(64, 64))
    sparsify(training)
    with pytest.raises(SparsityError, match="call finalize"):
        to_semi_structured(training)


@pytest.mark.parametrize(
    ("capability", "backend", "expected"),
    [
        ((7, 5), "cusparselt", "compute capability 8.0 or newer), and this GPU has 7.5"),
        ((8, 6), "cutlass", ""),
        ((9, 0), "cutlass", "on compute capability 8.x only, and this GPU has 9.0"),
        ((9, 0), "torch", ""),
    ],
)
def test_what_a_gpu_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], backend: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert expected in BACKENDS[backend].why_not_device(torch.device("cuda"))
    if capability == (7, 5):
        with pytest.raises(SparsityError, match="2:4 cannot be accelerated here: needs sparse Tensor Cores"):
            choose_backend("auto", torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    monkeypatch.setenv(library.LIBRARY_VARIABLE, "/nowhere.so")
    cusparselt.forget()
    if capability == (9, 0):
        with pytest.raises(
            SparsityError, match=r"cannot be loaded .* without cuSPARSELt; torch's CUTLASS kernels run on"
        ):
            choose_backend("auto", torch.device("cuda"))


@pytest.mark.slow
def test_onnx_keeps_the_zeros_and_the_answers(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = finalized(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))).float()
    model[1].train()
    x = torch.randn(3, 8, 3, 3)
    path = to_onnx(model, (x,), tmp_path / "new" / "model.onnx")
    assert [layer.training for layer in model] == [False, True, False, False]  # as it was
    (result,) = onnxruntime.InferenceSession(str(path)).run(None, {onnx.load(path).graph.input[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(result), model(x), rtol=1e-4, atol=1e-5)
    weights = [torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in onnx.load(path).graph.initializer]
    zeros = sorted(int((w == 0).sum()) for w in weights if w.dim() > 1)
    assert zeros == sorted(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.slow
def test_a_model_that_torch_cannot_export_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(SparsityError, match=r"torch cannot export Branching to ONNX: .*data-dependent") as error:
        to_onnx(Branching(8, 8), (torch.ones(2, 8),), tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model.onnx").exists()


def test_onnx_refuses_a_model_in_training(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model)
    with pytest.raises(SparsityError, match="call finalize"):
        to_onnx(model, (torch.randn(1, 8),), tmp_path / "m.onnx")
