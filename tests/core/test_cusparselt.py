"""The binding of cuSPARSELt, against a stand-in for the library that is compiled against its real header."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nm_sparsity.core import SparsityError, keep_largest
from nm_sparsity.core.deploy import cusparselt, library
from nm_sparsity.core.deploy.backends import BACKENDS
from nm_sparsity.core.deploy.cusparselt import compress
from nm_sparsity.core.deploy.library import CuSparseLtError

SOURCE = Path(__file__).parent.parent / "cusparselt_stand_in" / "stand_in.c"
TYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
linear = torch.ops.nm_sparsity.linear_2to4


def operands(dtype: torch.dtype, tokens: int = 10, rows: int = 64, columns: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = 40 if dtype == torch.int8 else 1
    x = torch.randn(tokens, columns, generator=generator) * scale
    w = keep_largest(torch.randn(rows, columns, generator=generator) * scale, "2:4")
    return x.to(dtype), w.to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 0.005) -> None:
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def alive() -> int:
    gc.collect()
    count: int = ctypes.CDLL(library.library().path).stand_in_alive()
    return count


def test_the_constants_are_the_headers(tmp_path: Path, compile_stand_in: Callable[..., Path]) -> None:
    lines = [f"long long value_{name} = {name};" for name in library.CONSTANTS]
    source = tmp_path / "constants.c"
    source.write_text("\n".join(['#include "cusparseLt.h"', *lines]), encoding="utf-8")
    found_in = ctypes.CDLL(str(compile_stand_in(tmp_path / "constants.so", source=source)))
    found = {name: ctypes.c_longlong.in_dll(found_in, f"value_{name}").value for name in library.CONSTANTS}
    assert found == library.CONSTANTS


def test_the_signatures_are_those_that_the_stand_in_was_compiled_with() -> None:
    text = re.sub(r"/\*.*?\*/", "", SOURCE.read_text(encoding="utf-8"), flags=re.DOTALL)
    kinds = {"int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32, "size_t": ctypes.c_size_t}
    for name, arguments in library.SIGNATURES.items():
        found = re.search(rf"cusparseStatus_t cusparseLt{name}\(([^)]*)\)", text)
        assert found, name
        types = [part.replace("const ", "").split() for part in found[1].split(",")]
        # A stream is a pointer; whatever is neither a pointer nor one of `kinds` is an enum or an int.
        expected = [
            ctypes.c_void_p
            if "*" in kind or "*" in rest[0] or kind == "cudaStream_t"
            else kinds.get(kind, ctypes.c_int)
            for kind, *rest in types
        ]
        assert arguments == expected, name


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_equal_the_dense_ones(stand_in: Path, dtype: torch.dtype) -> None:
    x, w = operands(dtype)
    packed = compress(w)
    share = 9 / 16 if w.element_size() == 2 else 10 / 16
    assert packed.dtype == dtype
    assert packed.shape == (64, 96 * share)
    expected = x.double() @ w.double().t()
    y = linear(x, packed, None, None, 64)
    assert y.dtype == cusparselt.OPERANDS[dtype].outputs[0]
    assert y.shape == (10, 64)
    if dtype == torch.int8:
        assert torch.equal(y, expected.int())
    close(y, expected)
    for out_dtype in cusparselt.OPERANDS[dtype].outputs:
        scale = torch.rand(64) * 1e-3
        scales = scale if w.element_size() == 1 and out_dtype != torch.int32 else None
        bias = torch.randn(64).to(out_dtype)
        y = linear(x, packed, bias, scales, 64, 1.0, "relu", out_dtype)
        result = F.relu(expected * (1 if scales is None else scale) + bias)
        assert y.dtype == out_dtype
        close(y, result)


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_bias_and_activation_run_in_the_product(stand_in: Path, dtype: torch.dtype, activation: str) -> None:
    x, w = operands(dtype)
    bias = torch.randn(64).to(dtype)
    y = linear(x, compress(w), bias, None, 64, 0.25, activation)
    z = 0.25 * (x.double() @ w.double().t()) + bias.double()
    close(y, F.relu(z) if activation == "relu" else F.gelu(z, approximate="tanh"))


@pytest.mark.parametrize(
    "shape", [(96,), (1, 96), (2, 3, 96), (0, 96), (3, 0, 96)], ids=lambda shape: "x".join(map(str, shape))
)
def test_any_leading_shape(stand_in: Path, shape: tuple[int, ...]) -> None:
    _, w = operands(torch.float16)
    x = torch.randn(shape).half()
    y = linear(x, compress(w), None, None, 64)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.linear(x, w), rtol=5e-3, atol=5e-3)


def test_any_strides_and_workspace(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_WORKSPACE", "4096")
    _, w = operands(torch.float16)
    packed = compress(w)
    for x in (torch.randn(8, 192)[:, :96], torch.randn(3, 96, 8).transpose(1, 2), torch.randn(8, 5, 96)[:, 0]):
        x = x.half()
        torch.testing.assert_close(linear(x, packed, None, None, 64), F.linear(x, w), rtol=5e-3, atol=5e-3)


def test_plans_are_made_once_for_each_product_and_destroyed_at_last(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = operands(torch.float16, tokens=16)
    packed, biases = compress(w), [torch.randn(64).half() for _ in range(2)]
    before = alive()  # the handle
    for _ in range(3):
        linear(x, packed, None, None, 64)
        linear(x[:9], packed, None, None, 64)  # of 16 rows too, when padded
        for bias in biases:
            close(linear(x, packed, bias, None, 64), F.linear(x.double(), w.double(), bias.double()))
        linear(x, packed, None, None, 64, 1.0, "relu")
        linear(x, packed, None, None, 64, 0.5)  # alpha is no part of a plan
        linear(x, packed, None, None, 64, 1.0, "", None, [64, 2, 1, -1])
    plans = [line for line in stand_in.read_text().splitlines() if line.startswith("plan")]
    assert plans == ["plan 16 tokens, algorithm 0, split-k 1"] * 4 + ["plan 16 tokens, algorithm 2, split-k 1"]
    monkeypatch.setattr(cusparselt, "MOST_PLANS", 4)
    linear(x[:8], packed, None, None, 64)
    assert alive() - before == 5 * 5  # three matrices, a selection and the plan itself, of each
    many = alive()
    linear(x[:1], packed, None, None, 64)
    linear(x.repeat(2, 1), packed, None, None, 64)
    assert alive() == many  # the least recently used one went
    path = library.library().path
    cusparselt.forget()
    gc.collect()
    assert ctypes.CDLL(path).stand_in_alive() == 0


def test_algorithms_go_by_the_number_of_tokens(stand_in: Path) -> None:
    _, w = operands(torch.float16)
    packed, algorithms = compress(w), [16, 1, 1, -1, 64, 2, 4, 1]
    for tokens in (1, 16, 17, 64, 65):
        linear(torch.randn(tokens, 96).half(), packed, None, None, 64, 1.0, "", None, algorithms)
    plans = [line.split(", ")[1:] for line in stand_in.read_text().splitlines() if line.startswith("plan")]
    assert plans == [["algorithm 1", "split-k 1"]] * 2 + [["algorithm 2", "split-k 4"]] * 3


def test_threads_have_plans_of_their_own(stand_in: Path) -> None:
    x, w = operands(torch.float16)
    packed, expected, found = compress(w), F.linear(x, w), [torch.empty(0)] * 4

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = linear(x, packed, None, None, 64)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y in found:
        torch.testing.assert_close(y, expected, rtol=5e-3, atol=5e-3)
    assert stand_in.read_text().count("plan") == 4
    assert alive() == 1  # what ended threads had is gone; this one's handle is left


def test_compiled_and_traced(stand_in: Path) -> None:
    x, w = operands(torch.float16)
    packed, bias = compress(w), torch.randn(64).half()
    torch.library.opcheck(
        linear, (x, packed, bias, None, 64, 1.0, "relu"), test_utils=("test_schema", "test_faketensor")
    )

    def model(x: Tensor) -> Tensor:
        return linear(x * 2, packed, bias, None, 64, 1.0, "relu").float() + 1

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (10, 3):
        torch.testing.assert_close(compiled(x[:tokens]), model(x[:tokens]))


def test_refusals_are_in_the_librarys_words(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = operands(torch.float16)
    packed, before = compress(w), alive()
    monkeypatch.setenv("STAND_IN_REFUSES", "0")
    with pytest.raises(CuSparseLtError, match=r"^cusparseLtMatmulPlanInit: operation not supported \(CUSPARSE_"):
        linear(x, packed, None, None, 64)
    assert alive() == before  # what was made of the plan is gone
    with pytest.raises(CuSparseLtError, match="cusparseLtStructuredDescriptorInit: operation not supported"):
        compress(w[:8])
    monkeypatch.setenv("STAND_IN_NO_DEVICE", "1")
    cusparselt.forget()
    with pytest.raises(CuSparseLtError, match="cusparseLtInit: initialization error"):
        compress(w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 96)}, "cuSPARSELt has no 2:4 product of float32; it has float16, bfloat16"),
        ({"x": torch.randn(2, 96).bfloat16()}, "the input is bfloat16 and the 2:4 weight float16: convert the input"),
        ({"bias": torch.randn(64)}, "the bias is float32 and the result float16"),
        ({"out_dtype": torch.float32}, "a 2:4 product of float16 gives float16, not float32"),
        ({"x": torch.randn(2, 80).half()}, "the input has 80 features, which do not fit the 2:4 weight of 64 outputs"),
        ({"out_features": 80}, "the input has 96 features, which do not fit the 2:4 weight of 80 outputs"),
        ({"bias": torch.randn(32).half()}, "bias and scale need one entry for each of 64 outputs"),
        ({"activation": "silu"}, 'unknown activation "silu"; known: relu, gelu_tanh'),
        ({"scale": torch.ones(64)}, "a vector of scales must be fp32, of 8-bit operands"),
    ],
)
def test_operands_that_do_not_fit(stand_in: Path, change: dict[str, object], message: str) -> None:
    x, w = operands(torch.float16)
    arguments = {"x": x, "packed": compress(w), "bias": None, "scale": None, "out_features": 64, **change}
    with pytest.raises(SparsityError, match=message):
        linear(**arguments)


def test_libraries_that_cannot_be_used(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile_stand_in: Callable[..., Path]
) -> None:
    assert library.version() == "0.8.1"
    monkeypatch.setenv("STAND_IN_VERSION", "702")
    cusparselt.forget()
    with pytest.raises(SparsityError, match=r"cuSPARSELt 0\.7\.2 \(.*\) is too old: at least 0\.8 is needed"):
        library.library()
    partial = compile_stand_in(tmp_path / "partial.so", "-DWITHOUT_COMPRESSION")
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(partial))
    with pytest.raises(SparsityError, match=r"partial\.so cannot be used .* it has no cusparseLtSpMMACompressedSize2"):
        library.library()
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(
        SparsityError, match=r"cuSPARSELt cannot be loaded .*torch for CUDA brings it, or name its file"
    ):
        library.library()
    assert library.version() is None


def test_the_library_of_torch_tells_its_version_without_a_gpu() -> None:
    cusparselt.forget()
    if library.version() is None:
        pytest.skip("this torch has no cuSPARSELt")
    assert library.library().version >= library.OLDEST


@pytest.mark.parametrize("features", [1008, 1040])
def test_features_that_hardly_differ_do_not_fit_either(stand_in: Path, features: int) -> None:
    _, w = operands(torch.float16, rows=1024, columns=1024)
    packed = compress(w)
    with pytest.raises(SparsityError, match="which do not fit the 2:4 weight of 1024 outputs"):
        linear(torch.randn(2, features).half(), packed, None, None, 1024, 1.0, "", None, [])


def test_a_bias_with_gaps_is_refused(stand_in: Path) -> None:
    x, w = operands(torch.float16)
    bias = torch.randn(64, 2).half()[:, 0]
    with pytest.raises(SparsityError, match="side by side"):
        linear(x, compress(w), bias, None, 64, 1.0, "", None, [])


def test_a_gradient_is_an_error_and_no_silent_zero(stand_in: Path) -> None:
    x, w = operands(torch.float16)
    packed, backend = compress(w), BACKENDS["cusparselt"]
    x.requires_grad_()
    y = backend.linear(x, packed, 64)
    close(y.detach(), x.detach() @ w.T)
    with pytest.raises(SparsityError, match="for inference and has no gradient"):
        y.sum().backward()
    with torch.no_grad():
        assert not backend.linear(x, packed, 64).requires_grad


@pytest.mark.parametrize("of", ["input", "bias"])
def test_a_compiled_gradient_is_an_error_too_and_inference_compiles(stand_in: Path, of: str) -> None:
    x, w = operands(torch.float16)
    packed, backend = compress(w), BACKENDS["cusparselt"]
    bias = torch.zeros(64, dtype=torch.float16)
    (x if of == "input" else bias).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def product(x: Tensor) -> Tensor:
        return backend.linear(x, packed, 64, bias) * 2

    y = product(x)
    close(y.detach(), 2 * x.detach() @ w.T)
    with pytest.raises(SparsityError, match="for inference and has no gradient"):
        y.sum().backward()
    with torch.no_grad():
        close(product(x), 2 * x @ w.T)
