"""The inference benchmark without a GPU: on fake CUDA tensors, against torch's own kernel signatures, and emulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from nm_sparsity.benchmarks import devices, float8, groups, inference, models, products, timing, whole_models
from nm_sparsity.benchmarks.devices import DTYPES, Product
from nm_sparsity.benchmarks.products import SPARSE, Unavailable
from nm_sparsity.benchmarks.report import Result
from nm_sparsity.core import SparsityError
from nm_sparsity.core.deploy.backends import Backend, CuSparseLt, Cutlass, TorchCuSparseLt
from nm_sparsity.core.deploy.clock import Call, CudaGraph

CPU = torch.device("cpu")
ALGORITHMS = (64, 3, 2, 1)


class FakeTorch(TorchCuSparseLt):
    """cuSPARSELt through torch on a GPU that is not there: weights without values, whose sizes torch checks."""

    def why_not_device(self, device: torch.device) -> str:
        return ""

    def compress(self, matrix: Tensor) -> Any:
        share = 9 / 16 if matrix.element_size() == 2 else 5 / 8
        return matrix.new_empty(len(matrix), int(matrix.shape[1] * share))


class FakeLt(CuSparseLt):
    """Our binding likewise; its op has a fake."""

    why_not_device = FakeTorch.why_not_device
    compress = FakeTorch.compress


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
    backends: dict[str, Backend] = {"cusparselt": FakeLt(), "torch": FakeTorch(), "cutlass": FakeCutlass()}
    outputs = {}
    with FakeTensorMode():
        x = torch.empty(tokens, 256, device="cuda", dtype=DTYPES[dtype])
        w = torch.empty(512, 256, device="cuda", dtype=DTYPES[dtype])
        for how in ("dense", *SPARSE):
            try:
                made = products.dense([x], [w])
                if how != "dense":
                    made = products.sparse(how, [x], [w], backends, ALGORITHMS)
                call, size = made
            except Unavailable as reason:
                outputs[how] = str(reason)
                continue
            y: Any = call(0)
            outputs[how] = f"{tuple(y.shape)} {y.dtype}"
            if "cusparselt" in how or "torch" in how:
                assert size == w.nbytes * (9 / 16 if w.element_size() == 2 else 5 / 8)
    kind = {"int8": torch.int32, "fp8": torch.bfloat16}.get(dtype, DTYPES[dtype])
    expected = dict.fromkeys(outputs, f"({tokens}, 512) {kind}")
    if dtype == "fp8":
        expected["cutlass"] = "cutlass has no float8_e4m3fn"
    assert outputs == expected


class EmulatedLt(CuSparseLt):
    """cuSPARSELt on the CPU: a "compressed" weight is the masked weight itself; keeps the products' algorithms."""

    constraints: Any = dict.fromkeys(
        (torch.float32, torch.bfloat16), SimpleNamespace(sparse_min_rows=1, sparse_min_cols=1)
    )

    def __init__(self) -> None:
        self.chosen: set[Any] = set()

    searched = False

    def why_not_device(self, device: torch.device) -> str:
        return ""

    def compress(self, matrix: Tensor) -> Any:
        return matrix.clone()

    def linear(
        self,
        x: Tensor,
        weight: Any,
        rows: int,
        bias: Any = None,
        activation: str = "",
        out_dtype: Any = None,
        algorithms: Any = (),
    ) -> Tensor:
        self.chosen.add(tuple(algorithms))
        y = x.float() @ weight.float().t()
        return (y if bias is None else y + bias).to(out_dtype or x.dtype)


class Refusing(EmulatedLt):
    def linear(self, *arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("CUDA error: operation not supported\nlong trace")


class Replay(CudaGraph):
    """A graph that calls its function once when it is replayed."""

    def __init__(self, call: Call, calls: int) -> None:
        self.calls, self.call = calls, call

    def __call__(self, i: int) -> None:
        self.call(i)


def machine(backend: CuSparseLt, **options: Any) -> products.Machine:
    backends = {"cusparselt": backend, "torch": TorchCuSparseLt(), "cutlass": Cutlass()}
    return products.Machine(CPU, None, backends, **options)


def rows_of(result: Result) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["how"], row["launch"]): row for row in result.rows}


def test_a_product_has_a_row_for_every_way() -> None:
    backend, result = EmulatedLt(), Result("products", "cpu")
    products.measure(result, "layer", Product(20, 64, 128), "bf16", machine(backend), 2, ALGORITHMS)
    rows = rows_of(result)
    assert [how for how, _ in rows] == ["dense", "cusparselt", "cusparselt, searched", "cutlass", "torch", SPARSE[2]]
    for how in ("cutlass", "torch", "torch, searched"):
        assert rows[how, "eager"]["not_run"] == "needs an NVIDIA GPU, found cpu"
    for how in ("dense", "cusparselt", "cusparselt, searched"):
        assert 0 < rows[how, "eager"]["error"] < 0.01
        assert rows[how, "eager"]["us"] > 0
    assert rows["dense", "eager"]["speedup"] is None
    assert rows["cusparselt", "eager"]["speedup"] > 0
    assert backend.chosen == {(), ALGORITHMS}
    result = Result("products", "cpu")
    products.measure(result, "layer", Product(20, 64, 128), "bf16", machine(backend), rounds=1)
    assert rows_of(result)["cusparselt, searched", "eager"]["not_run"] == "no algorithm was found for it"


def test_speed_ups_are_over_dense_with_the_same_launch_and_beside_the_ceiling() -> None:
    """By hand: 2:4 takes 3/4 of dense's time from Python, 2/3 of it in a graph."""

    def clock(call: Call, device: torch.device, calls: int) -> float:
        call(0)
        if call not in took:  # the first time, they come as they are listed; two warm-ups each, then three rounds
            took[call] = iter([next(once)] * 5)
        of_all = next(took[call])
        return of_all * call.calls if isinstance(call, Replay) else of_all

    times = {"dense": (40e-6, 15e-6), "cusparselt": (30e-6, 10e-6), "cusparselt, searched": (30e-6, 10e-6)}
    once = iter([seconds for pair in times.values() for seconds in pair])
    took: dict[Call, Iterator[float]] = {}
    result, product = Result("products", "h100"), Product(4096, 4096, 4096)
    h100 = replace(machine(EmulatedLt(), clock=clock, graph=Replay), known=devices.find("h100"))
    products.measure(result, "layer", replace(product, tokens=16), "bf16", h100, 3, ALGORITHMS)
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
    assert len(rows) == 9


def test_a_kernel_that_refuses_a_shape_is_a_row_not_a_crash() -> None:
    result = Result("products", "cpu")
    products.measure(result, "layer", Product(20, 64, 128), "bf16", machine(Refusing()), 1, ALGORITHMS)
    rows = rows_of(result)
    assert rows["cusparselt, searched", "eager"]["not_run"] == "CUDA error: operation not supported"
    assert rows["dense", "eager"]["us"] > 0


def test_where_2_4_begins_to_win() -> None:
    """By hand: at 16 tokens it wins by chance, from 512 on for good; another product never wins."""
    speedups = {1: 0.5, 16: 1.1, 128: 0.9, 512: 1.0, 4096: 1.5}
    head = {"layer": "a", "weight": "8x8", "dtype": "bf16", "launch": "graph", "how": SPARSE[-1]}
    rows: list[dict[str, Any]] = [{**head, "tokens": n, "speedup": speedup} for n, speedup in speedups.items()]
    rows += [
        {**head, "layer": "b", "tokens": 4096, "speedup": 0.9},
        {**head, "how": "torch", "tokens": 1, "speedup": 9},
    ]
    rows += [{**head, "tokens": 16384, "not_run": "out of memory"}]
    found = list(products.crossovers(rows))
    assert found == [{**head, "wins_from": "512 tokens"}, {**head, "layer": "b", "wins_from": "never"}]


def test_a_model_has_a_row_for_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = models.Workload(lambda: models.TextEncoder(1, 64, 2, 128, 32), (6,), 32)
    monkeypatch.setitem(models.WORKLOADS, "tiny", tiny)
    result = Result("models", "cpu")
    with torch.compiler.set_stance("force_eager"):
        whole_models.measure(result, "tiny", 2, "bf16", machine(EmulatedLt()), 2, timing.Budget())
    rows = rows_of(result)
    ways = ("dense", "cusparselt", whole_models.SPARSE[3])
    assert set(rows) == {
        *((how, launch) for how in ways for launch in ("eager", "compiled") if (how, launch) != (ways[2], "compiled")),
        ("cutlass", "eager"),
        ("torch", "eager"),
    }
    assert rows["cutlass", "eager"]["not_run"] == "cutlass is not available: needs an NVIDIA GPU, found cpu"
    for key in (("cusparselt", "eager"), ("cusparselt", "compiled")):
        assert rows[key]["sparse_layers"] == 5
        assert rows[key]["error"] < 1e-5
        assert rows[key]["speedup"] > 0
    assert rows[ways[2], "eager"]["sparse_layers"] <= 5


def refuse(*_: Any) -> Any:
    raise SparsityError("no fp8 here")


def test_a_gpu_without_fp8_has_rows_without_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a GPU the roofline has no peak to go by; whatever was measured is written all the same."""
    tiny = models.Workload(lambda: models.TextEncoder(1, 64, 2, 128, 32), (6,), 32)
    monkeypatch.setitem(models.WORKLOADS, "tiny", tiny)
    monkeypatch.setattr(float8, "to_semi_structured", refuse)
    result, a100 = Result("models", "a100"), replace(machine(EmulatedLt()), known=devices.find("a100"))
    with torch.compiler.set_stance("force_eager"):
        whole_models.measure(result, "tiny", 2, "fp8", a100, 1, timing.Budget())
    rows = rows_of(result)
    assert list(rows) == [("dense", "eager"), ("dense", "compiled"), ("cusparselt", "eager")]
    assert rows["cusparselt", "eager"]["not_run"] == "no fp8 here"
    assert {name: a100.known_for(name) is not None for name in DTYPES} == dict.fromkeys(DTYPES, True) | {"fp8": False}


def test_the_command_plans_what_the_gpu_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(groups, "run", lambda *_: [])
    monkeypatch.setattr(devices, "present", lambda device: devices.find("a100"))
    monkeypatch.setattr(whole_models, "MODELS", (("resnet50", 1, "fp8"), ("resnet50", 1, "bf16")))
    assert inference.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    fp8, bf16 = capsys.readouterr().out.split("\n\n")
    assert fp8.endswith("on a100\na100 has no tensor cores for fp8: they came with compute capability 8.9")
    assert "of 54 layers may pay" in bf16


def test_layers_that_are_alike_are_compiled_once() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = models.TextEncoder(3, 16, 2, 32, 12)
    tokens = torch.randint(12, (2, 4))
    call = whole_models.model_call(model, [tokens])
    expected = call(0)
    models.compile_layers(model, backend=backend)
    assert torch.equal(whole_models.launched(call, "eager", 1, machine(EmulatedLt()))(0), expected)
    assert not compiled
    assert torch.equal(call(0), expected)
    assert len(compiled) == 1


def test_everything_has_a_group_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    of_products = list(products.groups(cuda, False, list(DTYPES), 10))
    named = {(group.options["dtype"], name) for group in of_products for name, *_ in group.options["layers"]}
    for model, layers in models.LINEAR_SHAPES.items():
        assert {("bf16", f"{model} {layer}") for layer in layers} <= named
    assert {dtype for dtype, _ in named} == set(DTYPES)
    of_models = list(whole_models.groups(cuda, False, 10))
    assert ("llama-decode", 256, "bf16") in {tuple(group.label.values()) for group in of_models}
    assert ("llama-prefill", 1, "fp8") in {tuple(group.label.values()) for group in of_models}


def test_when_the_time_is_over_rows_say_so() -> None:
    result = Result("products", "cpu")
    products.run(result, CPU, [("a", 16, 16), ("b", 16, 16)], "bf16", (1, 16), minutes=1e-9)
    assert result.rows == [{"layer": "4 more products", "dtype": "bf16", "not_run": "out of time"}]


def test_the_reached_part_of_a_gain() -> None:
    assert products.reached(1.5, 2.0) == 0.5
    assert products.reached(0.5, 1.0) is None
    assert products.reached(1.2, None) is None


@pytest.mark.slow
def test_the_command_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--device", "cpu", "--only", "products", "--rounds", "1", "--out", str(tmp_path)]
    assert inference.main(arguments) == 0
    assert len(list(tmp_path.glob("quick/products_*.json"))) == 1
    assert "not run: needs an NVIDIA GPU, found cpu" in capsys.readouterr().out
    assert inference.main(["--rounds", "0"]) == 1
    assert "error: --rounds must be at least 1" in capsys.readouterr().err
