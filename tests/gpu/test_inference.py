"""2:4 inference on a GPU: products right, in graphs, compiled, on streams and in threads; conversion; bad input."""

from __future__ import annotations

import copy
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nm_sparsity import SparsityError, finalize, keep_largest, sparsify
from nm_sparsity.core.deploy import cusparselt, library
from nm_sparsity.core.deploy.backends import BACKENDS
from nm_sparsity.core.deploy.convert import to_semi_structured
from nm_sparsity.core.deploy.cusparselt import compress
from nm_sparsity.core.deploy.runner import Accelerated, accelerate

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.filterwarnings("default")  # what compilers remark
FP8 = torch.float8_e4m3fn
linear = torch.ops.nm_sparsity.linear_2to4


@pytest.fixture(autouse=True)
def needs_sparse_tensor_cores() -> None:
    if reason := BACKENDS["cusparselt"].why_not_device(DEVICE):
        pytest.skip(reason)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NM_SPARSITY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def operands(dtype: torch.dtype, tokens: int = 200, rows: int = 512, columns: int = 256) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    scale = 40 if dtype == torch.int8 else 1
    x = torch.randn(tokens, columns, device=DEVICE) * scale
    w = keep_largest(torch.randn(rows, columns, device=DEVICE) * scale, "2:4")
    return x.to(dtype), w.to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 0.01) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def has(dtype: torch.dtype) -> None:
    if dtype == FP8 and torch.cuda.get_device_capability(DEVICE) < (8, 9):
        pytest.skip("needs compute capability 8.9")


@pytest.mark.parametrize("dtype", cusparselt.OPERANDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 200, 4096])
def test_products_equal_the_dense_ones(dtype: torch.dtype, tokens: int) -> None:
    has(dtype)
    x, w = operands(dtype, tokens)
    packed, expected = compress(w), x.double() @ w.double().t()
    for out_dtype in cusparselt.OPERANDS[dtype].outputs:
        eight_bit = w.element_size() == 1
        bias = None if out_dtype == torch.int32 else torch.randn(512, device=DEVICE).to(out_dtype)
        alpha = 1e-3 if eight_bit and out_dtype != torch.int32 else 1.0
        y = linear(x, packed, bias, None, 512, alpha, "", out_dtype)
        assert y.dtype == out_dtype
        close(y, expected * alpha + (0 if bias is None else bias.double()))
        if out_dtype == torch.int32:
            assert torch.equal(y, expected.int())


def test_a_scale_for_each_output_of_int8() -> None:
    x, w = operands(torch.int8)
    scale = torch.rand(512, device=DEVICE) * 1e-3
    for out_dtype in (torch.float16, torch.bfloat16):
        y = linear(x, compress(w), None, scale, 512, 1.0, "", out_dtype)
        close(y, (x.double() @ w.double().t()) * scale.double())


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_epilogue(dtype: torch.dtype, activation: str) -> None:
    x, w = operands(dtype)
    bias = torch.randn(512, device=DEVICE).to(dtype)
    y = linear(x, compress(w), bias, None, 512, 1.0, activation)
    z = x.double() @ w.double().t() + bias.double()
    close(y, F.relu(z) if activation == "relu" else F.gelu(z, approximate="tanh"))


def test_the_packed_weight_is_torchs() -> None:
    """Both make it by the same library: each multiplies by the other's."""
    x, w = operands(torch.bfloat16)
    close(linear(x, torch._cslt_compress(w), None, None, 512), F.linear(x, w))
    close(BACKENDS["torch"].linear(x, compress(w), 512), F.linear(x, w))


def test_in_a_graph_on_streams_and_in_threads() -> None:
    x, w = operands(torch.bfloat16)
    packed, bias = compress(w), torch.randn(512, device=DEVICE).bfloat16()
    expected = F.linear(x, w, bias)
    static = x.clone()
    linear(static, packed, bias, None, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(static, packed, bias, None, 512)
    cusparselt.forget()  # a graph needs no plan any more
    for factor in (1, 2):
        static.copy_(x * factor)
        graph.replay()
        close(y, F.linear(x * factor, w, bias))

    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                found[i] = linear(x, packed, bias, None, 512)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y in found.values():
        close(y, expected)
    assert len(found) == 4


def test_compiled_without_a_break() -> None:
    x, w = operands(torch.bfloat16)
    packed = compress(w)

    def model(x: Tensor) -> Tensor:
        return F.silu(linear(x * 2, packed, None, None, 512))

    compiled = torch.compile(model, fullgraph=True)
    close(compiled(x), model(x))


def net(width: int = 1024, device: torch.device = DEVICE) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Linear(width, 4 * width),
        nn.GELU("tanh"),
        nn.Linear(4 * width, width),
        nn.ReLU(),
        nn.Linear(width, 60),
    ]
    model = nn.Sequential(*layers)
    sparsify(model)
    finalize(model)
    return model.bfloat16().to(device).eval()


@pytest.mark.parametrize("backend", ["cusparselt", "torch", "cutlass"])
def test_converted_models_give_the_same_answers(backend: str) -> None:
    if reason := BACKENDS[backend].why_not_device(DEVICE):
        pytest.skip(reason)
    model, x = net(), torch.randn(3, 100, 1024, device=DEVICE).bfloat16()
    with torch.no_grad():
        expected = model(x)
        report = to_semi_structured(model, x, measure=False, backend=backend, algorithms=False)
        assert report.converted == ("0.weight", "2.weight")
        close(model(x), expected, 0.02)
        close(copy.deepcopy(model)(x), expected, 0.02)


def test_only_what_gains_is_converted_and_both_times_are_said() -> None:
    """A product of one token loses or gains nothing worth; one of 4096 tokens and width 4096 gains in a graph."""
    for launch in ("eager", "graph"):
        model, x = net(), torch.randn(4096, 1024, device=DEVICE).bfloat16()
        dense = copy.deepcopy(model)
        report = to_semi_structured(model, x, launch=launch)
        print(report)
        for row in report.rows[:2]:
            assert row.times is not None
            assert row.runs == (row.times.speedup >= 1.02)
        with torch.no_grad():
            close(model(x), dense(x), 0.02)


def test_a_runner_runs_the_fastest_right_way() -> None:
    model, x = net(), torch.randn(2048, 1024, device=DEVICE).bfloat16()
    fast = accelerate(model, x)
    print(fast.report)
    with torch.no_grad():
        expected = model(x)
        close(fast(x), expected, 0.03)
        other = torch.randn(5, 1024, device=DEVICE).bfloat16()
        close(fast(other), model(other), 0.03)
        first = fast(x)
        fast(x * 2)
        close(first, expected, 0.03)  # what was given out is not overwritten
    times = {way.name: way.seconds for way in fast.report.ways}
    assert times[fast.report.runs] == min(times.values())


def in_a_graph(model: nn.Module, x: Tensor) -> Accelerated:
    """`model` accelerated by a clock for which everything is faster than what came before it."""
    falling = (0.9**n for n in itertools.count())
    fast = accelerate(model, x, clock=lambda call, device, calls: (call(0), next(falling))[1])
    assert "graph" in fast.report.runs
    return fast


def test_a_runner_keeps_the_memory_of_its_weights() -> None:
    model, x = net(), torch.randn(2048, 1024, device=DEVICE).bfloat16()
    with torch.no_grad():
        expected = model(x)
    fast = in_a_graph(model, x)
    model.cpu()
    torch.cuda.empty_cache()
    others = [torch.full_like(p, 9.0, device=DEVICE) for p in model.parameters() for _ in range(2)]
    close(fast(x), expected, 0.03)
    del others


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("device", [torch.device("cuda", 0), torch.device("cuda", 1)], ids=str)
def test_a_model_on_another_gpu_than_the_current_one(device: torch.device) -> None:
    model, x = net(device=device), torch.randn(2048, 1024, device=device).bfloat16()
    with torch.cuda.device(1 - device.index):
        fast = in_a_graph(model, x)
        with torch.no_grad():
            for other in (x, x * 2):
                close(fast(other), model(other), 0.03)
        assert torch.cuda.current_device() == 1 - device.index


def test_bad_input_is_one_line_and_changes_nothing() -> None:
    model, x = net(), torch.randn(4, 1024, device=DEVICE).bfloat16()
    training = nn.Sequential(nn.Linear(64, 64)).to(DEVICE)
    sparsify(training)
    cases: list[tuple[nn.Module, Any, str]] = [
        (training, x, "call finalize"),
        (net().float(), x.float(), "cusparselt has no float32: convert the model first"),
        (model, x.cpu(), "the example inputs are on cpu and the model on cuda:0"),
        (model, x[:, :9], "the model does not take the example inputs"),
    ]
    for which, example, message in cases:
        with pytest.raises(SparsityError, match=message):
            to_semi_structured(which, example)
        assert not any("SemiStructured" in type(module).__name__ for module in which.modules())
    with torch.no_grad():
        model(x)


def test_versions() -> None:
    print("cuSPARSELt", library.version())
    assert library.library().version >= library.OLDEST


def test_the_cache_was_filled(tmp_path: Path) -> None:
    """By the conversions before, in children."""
    from nm_sparsity.core.deploy.cache import Cache

    found = Cache(DEVICE).found
    assert any("4096x1024" in name for name in found)
    print({name: tuple(algorithm) for name, algorithm in found.items()})
