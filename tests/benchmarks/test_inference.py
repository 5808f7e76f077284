"""The inference benchmark without a GPU: on fake CUDA tensors, against torch's own kernel signatures, and emulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from nm_sparsity.benchmarks import devices, inference, models, timing
from nm_sparsity.benchmarks.devices import DTYPES, Product
from nm_sparsity.benchmarks.inference import SPARSE, Unavailable
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.core.deploy.backends import Choice, CuSparseLt, Cutlass

CPU = torch.device("cpu")


class FakeLt(CuSparseLt):
    """cuSPARSELt on a GPU that is not there: weights without values, whose shapes and dtypes torch checks."""

    def why_not_device(self, device: torch.device) -> str:
        return ""

    def compress(self, matrix: Tensor) -> Any:
        share = 9 / 16 if matrix.element_size() == 2 else 5 / 8
        packed = matrix.new_empty(len(matrix), int(matrix.shape[1] * share))
        return SparseSemiStructuredTensorCUSPARSELT(matrix.shape, packed, None, None, None, None)

    def search(self, weight: Any, x: Tensor, bias: Any = None, out_dtype: Any = None) -> Choice:
        return 3, 2, 1


class FakeCutlass(Cutlass):
    """CUTLASS likewise."""

    def why_not_device(self, device: torch.device) -> str:
        return ""

    def compress(self, matrix: Tensor) -> Any:
        per_entry, kind = (32, torch.int32) if matrix.dtype == torch.int8 else (16, torch.int16)
        meta = torch.empty(len(matrix), matrix.shape[1] // per_entry, dtype=kind, device=matrix.device)
        return SparseSemiStructuredTensorCUTLASS(matrix.shape, matrix[:, ::2], meta, None, None, None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
@pytest.mark.parametrize("tokens", [1, 32, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_fits_the_kernels_of_torch(monkeypatch: pytest.MonkeyPatch, dtype: str, tokens: int) -> None:
    """Fake CUDA tensors run torch's own shape and dtype checks of the very calls that a GPU would get."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backends = {"cusparselt": FakeLt(), "cutlass": FakeCutlass()}
    outputs = {}
    with FakeTensorMode():
        x = torch.empty(tokens, 256, device="cuda", dtype=DTYPES[dtype])
        w = torch.empty(512, 256, device="cuda", dtype=DTYPES[dtype])
        for how in ("dense", *SPARSE):
            try:
                call, size = inference.dense([x], [w]) if how == "dense" else inference.sparse(how, [x], [w], backends)
            except Unavailable as reason:
                outputs[how] = str(reason)
                continue
            y: Any = call(0)
            outputs[how] = f"{tuple(y.shape)} {y.dtype}"
            if "cusparselt" in how:
                assert size == w.nbytes * (9 / 16 if w.element_size() == 2 else 5 / 8)
    kind = {"int8": torch.int32, "fp8": torch.bfloat16}.get(dtype, DTYPES[dtype])
    expected = dict.fromkeys(outputs, f"({tokens}, 512) {kind}")
    if dtype == "fp8":
        expected["cutlass"] = "cutlass has no float8_e4m3fn"
    assert outputs == expected


class Packed(Tensor):
    """A weight with the attribute that torch's compressed tensors have."""

    packed: Tensor


class EmulatedLt(CuSparseLt):
    """cuSPARSELt on the CPU: a "compressed" weight is the masked weight itself; keeps the choice of each product."""

    constraints: Any = dict.fromkeys(
        (torch.float32, torch.bfloat16), SimpleNamespace(sparse_min_rows=1, sparse_min_cols=1)
    )

    def __init__(self) -> None:
        self.choices: list[Choice] = []

    def why_not_device(self, device: torch.device) -> str:
        return ""

    def compress(self, matrix: Tensor) -> Any:
        weight = matrix.clone().as_subclass(Packed)
        weight.packed = matrix
        return weight

    def search(self, weight: Any, x: Tensor, bias: Any = None, out_dtype: Any = None) -> Choice:
        return 3, 2, 1

    def product(self, weight: Any, x: Tensor, out_dtype: Any = None, choice: Choice = (0, 1, -1)) -> Tensor:
        self.choices.append(choice)
        return (x.float() @ weight.packed.float().t()).to(out_dtype or x.dtype)


class Refusing(EmulatedLt):
    def product(self, weight: Any, x: Tensor, out_dtype: Any = None, choice: Choice = (0, 1, -1)) -> Tensor:
        raise RuntimeError("CUDA error: operation not supported\nlong trace")


class Replay(timing.CudaGraph):
    """A graph that calls its function once when it is replayed."""

    def __init__(self, call: timing.Call, calls: int) -> None:
        self.calls, self.call = calls, call

    def __call__(self, i: int) -> None:
        self.call(i)


def machine(backend: CuSparseLt, **options: Any) -> inference.Machine:
    return inference.Machine(CPU, None, {"cusparselt": backend, "cutlass": Cutlass()}, **options)


def rows_of(result: Result) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["how"], row["launch"]): row for row in result.rows}


def test_a_product_has_a_row_for_every_way() -> None:
    backend, result = EmulatedLt(), Result("products", "cpu")
    inference.measure_product(result, "layer", Product(20, 64, 128), "bf16", machine(backend), rounds=2)
    rows = rows_of(result)
    assert [how for how, _ in rows] == ["dense", "cusparselt", "cusparselt, searched", "cutlass"]
    assert rows["cutlass", "eager"]["not_run"] == "needs an NVIDIA GPU, found cpu"
    for how in ("dense", "cusparselt", "cusparselt, searched"):
        assert 0 < rows[how, "eager"]["error"] < 0.01
        assert rows[how, "eager"]["us"] > 0
    assert rows["dense", "eager"]["speedup"] is None
    assert rows["cusparselt", "eager"]["speedup"] > 0
    assert set(backend.choices) == {(3, 2, 1)}


def test_speed_ups_are_over_dense_with_the_same_launch_and_beside_the_ceiling() -> None:
    """By hand: 2:4 takes 3/4 of dense's time from Python, 2/3 of it in a graph."""

    def clock(call: timing.Call, device: torch.device, calls: int) -> float:
        call(0)
        of_all = next(took)
        return of_all * call.calls if isinstance(call, Replay) else of_all

    times = {"dense": (40e-6, 15e-6), "cusparselt": (30e-6, 10e-6), "cusparselt, searched": (30e-6, 10e-6)}
    once = [seconds for pair in times.values() for seconds in pair]
    took = iter([seconds for seconds in once for _ in range(2)] + once * 3)  # two warm-ups each, then three rounds
    result, product = Result("products", "h100"), Product(4096, 4096, 4096)
    h100 = replace(machine(EmulatedLt(), clock=clock, graph=Replay), known=devices.find("h100"))
    inference.measure_product(result, "layer", replace(product, tokens=16), "bf16", h100, rounds=3)
    rows = rows_of(result)
    ceiling = replace(product, tokens=16).ceiling(devices.find("h100"))
    for how in ("cusparselt", "cusparselt, searched"):
        for launch, us, speedup in (("eager", 30.0, 4 / 3), ("graph", 10.0, 1.5)):
            row = rows[how, launch]
            assert row["us"] == pytest.approx(us)
            assert row["speedup"] == pytest.approx(speedup)
            assert row["ceiling"] == ceiling
            assert row["gain"] == pytest.approx((speedup - 1) / (ceiling - 1))
    assert rows["dense", "graph"]["us"] == pytest.approx(15.0)
    assert len(rows) == 7


def test_a_kernel_that_refuses_a_shape_is_a_row_not_a_crash() -> None:
    result = Result("products", "cpu")
    inference.measure_product(result, "layer", Product(20, 64, 128), "bf16", machine(Refusing()), rounds=1)
    rows = rows_of(result)
    assert rows["cusparselt, searched", "eager"]["not_run"] == "CUDA error: operation not supported"
    assert rows["cusparselt", "eager"]["speedup"] > 0


def test_a_model_has_a_row_for_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = models.Workload(lambda: models.TextEncoder(1, 64, 2, 128, 32), (6,), 32)
    monkeypatch.setitem(models.WORKLOADS, "tiny", tiny)
    result = Result("models", "cpu")
    with torch.compiler.set_stance("force_eager"):
        inference.measure_model(result, "tiny", 2, machine(EmulatedLt()), 2, timing.Budget())
    rows = rows_of(result)
    assert set(rows) == {
        *((how, launch) for how in ("dense", *inference.SPARSE[1:]) for launch in ("eager", "compiled")),
        ("cutlass", "eager"),
    }
    assert rows["cutlass", "eager"]["not_run"] == "cutlass is not available: needs an NVIDIA GPU, found cpu"
    for key in (("cusparselt", "eager"), ("cusparselt, searched", "compiled")):
        assert rows[key]["sparse_layers"] == 5
        assert rows[key]["error"] < 1e-5
        assert rows[key]["speedup"] > 0


def test_layers_that_are_alike_are_compiled_once() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = models.TextEncoder(3, 16, 2, 32, 12)
    tokens = torch.randint(12, (2, 4))
    call = inference.model_call(model, [tokens])
    expected = call(0)
    models.compile_layers(model, backend=backend)
    assert torch.equal(inference._launched(call, "eager", 1, machine(EmulatedLt()))(0), expected)
    assert not compiled
    assert torch.equal(call(0), expected)
    assert len(compiled) == 1


@pytest.mark.slow
def test_the_products_of_whole_models_are_measured_too() -> None:
    h100 = inference.Machine(torch.device("cuda"), devices.find("h100"))
    cases = list(inference._products(h100, False, ["fp16", "fp8"]))
    assert cases[0] == ("bert-large attention", "fp16", Product(4096, 1024, 1024))
    assert ("vit-l layers.*.feed_forward.0", "fp16", Product(64 * 196, 4096, 1024)) in cases
    assert {dtype for _, dtype, product in cases[:72] if product.tokens in (4096, 1024)} == {"fp16", "fp8"}


def test_when_the_time_is_over_rows_say_so() -> None:
    budget = timing.Budget(1.0, now=iter([0.0, 61.0, 61.0]).__next__)
    result = Result("products", "cpu")
    inference.run_products(result, inference.Machine.of(CPU), True, ["bf16"], 1, budget)
    assert result.rows[0]["not_run"].startswith("needs an NVIDIA GPU")
    assert result.rows[1:] == [{"layer": "4 more products", "not_run": "out of time"}]
    result = Result("models", "cpu")
    inference.run_models(result, inference.Machine.of(CPU), True, 1, budget)
    assert result.rows[0] == {"model": "transformer-base", "batch": 1, "not_run": "out of time"}


def test_the_reached_part_of_a_gain() -> None:
    assert inference.reached(1.5, 2.0) == 0.5
    assert inference.reached(0.5, 1.0) is None
    assert inference.reached(1.2, None) is None


def test_the_command_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--device", "cpu", "--only", "products", "--rounds", "1", "--out", str(tmp_path)]
    assert inference.main(arguments) == 0
    assert len(list(tmp_path.glob("products_*.json"))) == 1
    assert "not run: needs an NVIDIA GPU, found cpu" in capsys.readouterr().out
    assert inference.main(["--rounds", "0"]) == 1
    assert "error: --rounds must be at least 1" in capsys.readouterr().err
