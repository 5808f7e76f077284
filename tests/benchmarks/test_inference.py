"""The inference benchmark without a GPU: on fake CUDA tensors, against torch's own kernel signatures, and emulated."""

from __future__ import annotations

import math
from pathlib import Path
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
from nm_sparsity.core.deploy import convert

CPU = torch.device("cpu")


def fake_compress(w: Tensor, backend: str) -> Any:
    """What torch's compression gives, without values."""
    rows, columns = w.shape
    if backend == "cutlass":
        per_entry, kind = (32, torch.int32) if w.dtype == torch.int8 else (16, torch.int16)
        meta = torch.empty(rows, columns // per_entry, dtype=kind, device=w.device)
        return SparseSemiStructuredTensorCUTLASS(w.shape, w[:, : columns // 2], meta, None, None, None)
    share = 9 / 16 if w.element_size() == 2 else 5 / 8
    packed = torch.empty(rows, int(columns * share), dtype=w.dtype, device=w.device)
    return SparseSemiStructuredTensorCUSPARSELT(w.shape, packed, None, None, None, None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
@pytest.mark.parametrize("tokens", [1, 32, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_fits_the_kernels_of_torch(monkeypatch: pytest.MonkeyPatch, dtype: str, tokens: int) -> None:
    """Fake CUDA tensors run torch's own shape and dtype checks of the very calls that a GPU would get."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(convert, "why_not_backend", lambda backend, device: "")
    monkeypatch.setattr(convert, "compress", fake_compress)
    monkeypatch.setattr(convert, "search_algorithm", lambda *args, **options: (3, 2, 1))
    outputs = {}
    with FakeTensorMode():
        x = torch.empty(tokens, 256, device="cuda", dtype=DTYPES[dtype])
        w = torch.empty(512, 256, device="cuda", dtype=DTYPES[dtype])
        for how in ("dense", *SPARSE):
            try:
                call, _ = inference.dense([x], [w]) if how == "dense" else inference.sparse(how, [x], [w])
            except Unavailable as reason:
                outputs[how] = str(reason)
                continue
            y: Any = call(0)
            outputs[how] = f"{tuple(y.shape)} {y.dtype}"
    kind = {"int8": torch.int32, "fp8": torch.bfloat16}.get(dtype, DTYPES[dtype])
    expected = dict.fromkeys(outputs, f"({tokens}, 512) {kind}")
    if dtype == "fp8":
        expected["cutlass"] = "cutlass has no float8_e4m3fn"
    assert outputs == expected


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_pretended_h100_rows_have_ceilings_and_graphs(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The whole GPU path on fake CUDA tensors; only the clock and the comparison of values are replaced."""

    class Graph(timing.CudaGraph):
        def __init__(self, call: timing.Call, calls: int) -> None:
            self.calls, self.call = calls, call

        def __call__(self, i: int) -> None:
            self.call(i)

    def sample(call: timing.Call, device: torch.device, calls: int) -> float:
        call(0)
        return 1e-5 if isinstance(call, Graph) else 4e-5

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(convert, "compress", fake_compress)
    monkeypatch.setattr(convert, "search_algorithm", lambda *args, **options: (3, 2, 1))
    monkeypatch.setattr(inference, "CudaGraph", Graph)
    monkeypatch.setattr(inference, "relative_error", lambda found, reference: 0.0)
    monkeypatch.setattr(timing, "sample", sample)
    monkeypatch.setattr(timing, "copies_beyond_cache", lambda size, device: 2)
    monkeypatch.setattr(devices, "present", lambda: devices.find("h100"))
    result, product = Result("products", "h100"), Product(4096, 4096, 4096, DTYPES[dtype].itemsize)
    with FakeTensorMode():
        inference.measure_product(result, "layer", product, dtype, torch.device("cuda"), rounds=3)
    rows = {(row["how"], row["launch"]): row for row in result.rows}
    assert "8.x only, and this GPU has 9.0" in rows["cutlass", "eager"]["not_run"]
    for how in ("cusparselt", "cusparselt, searched"):
        for launch, us in (("eager", 40.0), ("graph", 10.0)):
            row = rows[how, launch]
            assert row["us"] == pytest.approx(us)
            assert (row["speedup"], row["ceiling"], row["gain"]) == (1.0, 2.0, 0.0)
            share = 9 / 16 if DTYPES[dtype].itemsize == 2 else 5 / 8
            assert row["weight_MB"] == pytest.approx(share * rows["dense", launch]["weight_MB"])
    assert rows["dense", "graph"]["us"] == pytest.approx(10.0)
    assert len(rows) == 7


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """cuSPARSELt on the CPU: "compressed" is the masked weight itself; keeps the options of each product."""
    products: list[dict[str, Any]] = []

    def cslt_sparse_mm(packed: Tensor, dense: Tensor, **options: Any) -> Tensor:
        known = {argument.name for argument in torch.ops.aten._cslt_sparse_mm.default._schema.arguments}
        assert set(options) <= known
        products.append(options)
        y = (packed.float() @ dense.float()).to(options.get("out_dtype") or dense.dtype)
        return y.t() if options["transpose_result"] else y

    def unavailable(backend: str, device: torch.device) -> str:
        return "" if backend == "cusparselt" else "no CUTLASS in this test"

    class Packed(Tensor):
        """A weight with the attribute that torch's compressed tensors have."""

    def compress(w: Tensor, backend: str) -> Tensor:
        packed = w.clone()
        packed.packed = packed  # type: ignore[attr-defined]
        return packed

    monkeypatch.setattr(convert, "why_not_backend", unavailable)
    monkeypatch.setattr(convert, "compress", compress)
    monkeypatch.setattr(convert, "search_algorithm", lambda *args, **options: (3, 2, 1))
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cslt_sparse_mm)
    return products


def test_a_product_has_a_row_for_every_way(emulated: list[dict[str, Any]]) -> None:
    result = Result("products", "cpu")
    inference.measure_product(result, "layer", Product(20, 64, 128), "bf16", CPU, rounds=2)
    rows = {row["how"]: row for row in result.rows}
    assert list(rows) == ["dense", "cusparselt", "cusparselt, searched", "cutlass"]
    assert rows["cutlass"]["not_run"] == "no CUTLASS in this test"
    for how in ("dense", "cusparselt", "cusparselt, searched"):
        assert 0 < rows[how]["error"] < 0.01
        assert rows[how]["us"] > 0
    assert rows["dense"]["speedup"] is None
    assert rows["cusparselt"]["speedup"] > 0
    searched = [options for options in emulated if options["alg_id"] == 3]
    assert searched
    assert all((options["split_k"], options["split_k_mode"]) == (2, 1) for options in searched)


def test_a_kernel_that_refuses_a_shape_is_a_row_not_a_crash(
    emulated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("CUDA error: operation not supported\nlong trace")

    monkeypatch.setattr(torch, "_cslt_sparse_mm", refuse)
    result = Result("products", "cpu")
    inference.measure_product(result, "layer", Product(20, 64, 128), "bf16", CPU, rounds=1)
    rows = {row["how"]: row for row in result.rows}
    assert rows["cusparselt, searched"]["not_run"] == "CUDA error: operation not supported"
    assert rows["cusparselt"]["speedup"] > 0


def test_a_model_has_a_row_for_every_way(emulated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    setup = models.Workload(lambda: models.TextEncoder(1, 64, 2, 128, 32), (6,), 32)
    monkeypatch.setattr(models, "WORKLOADS", {"tiny": setup})
    monkeypatch.setattr(convert, "_fastest_algorithm", lambda weight, bias, tokens: 3)
    monkeypatch.setattr(convert, "_check_dtypes", lambda model, backend: None)
    monkeypatch.setattr(
        convert, "why_not_layer", lambda module, *args: "" if isinstance(module, torch.nn.Linear) else "no"
    )
    monkeypatch.setattr(models, "compile_layers", lambda model: None)
    result = Result("models", "cpu")
    inference.measure_model(result, "tiny", 2, CPU, 2, timing.Budget())
    rows = {(row["how"], row["launch"]): row for row in result.rows}
    assert set(rows) == {
        *((how, launch) for how in ("dense", *inference.SPARSE[1:]) for launch in ("eager", "compiled")),
        ("cutlass", "eager"),
    }
    assert rows["cutlass", "eager"]["not_run"] == "cutlass is not available: no CUTLASS in this test"
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
    with pytest.MonkeyPatch.context() as patch:
        real = torch.compile
        patch.setattr(torch, "compile", lambda target, **options: real(target, backend=backend))
        models.compile_layers(model)
    assert torch.equal(inference._launched(call, "eager", 1)(0), expected)
    assert not compiled
    assert torch.equal(call(0), expected)
    assert len(compiled) == 1


def test_the_products_of_whole_models_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "present", lambda: devices.find("h100"))
    cases = list(inference._products(torch.device("cuda"), False, ["fp16", "fp8"]))
    assert cases[0] == ("bert-large attention", "fp16", Product(4096, 1024, 1024))
    assert ("vit-l layers.*.feed_forward.0", "fp16", Product(64 * 196, 4096, 1024)) in cases
    assert {dtype for _, dtype, product in cases[:72] if product.tokens in (4096, 1024)} == {"fp16", "fp8"}


def test_when_the_time_is_over_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = timing.Budget(0.0)
    monkeypatch.setattr(timing.time, "monotonic", lambda: math.inf)
    result = Result("products", "cpu")
    inference.run_products(result, CPU, True, ["bf16"], 1, budget)
    assert result.rows[0]["not_run"].startswith("needs an NVIDIA GPU")
    assert result.rows[1:] == [{"layer": "4 more products", "not_run": "out of time"}]
    result = Result("models", "cpu")
    inference.run_models(result, CPU, True, 1, budget)
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
