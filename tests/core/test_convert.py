"""Layers become 2:4 where they gain: on a stand-in for cuSPARSELt, with a clock that says what the test wants."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nm_sparsity.core import SparsityError, finalize, sparsify
from nm_sparsity.core.deploy.acceleration import Acceleration
from nm_sparsity.core.deploy.backends import CuSparseLt
from nm_sparsity.core.deploy.cache import Cache, Problem
from nm_sparsity.core.deploy.convert import to_semi_structured
from nm_sparsity.core.deploy.cusparselt import Algorithm
from nm_sparsity.core.deploy.layers import SemiStructuredLinear
from nm_sparsity.core.deploy.measure import ROUNDS

CPU = torch.device("cpu")


class OnHost(CuSparseLt):
    """cuSPARSELt on a machine without a GPU."""

    def why_not_device(self, device: torch.device) -> str:
        return ""


def finalized(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    sparsify(model)
    finalize(model)
    return model.bfloat16().eval()


def clock_of(*speedups: float) -> Callable[..., float]:
    """A clock for which the 2:4 form of the first kind of layer is faster by the first of these, and so on."""

    def times() -> Iterator[float]:
        for speedup in speedups:
            for _ in range(1 + ROUNDS):
                yield from (speedup, 1.0)

    taken = times()

    def clock(call: Callable[[int], object], device: torch.device, calls: int) -> float:
        call(0)
        return next(taken)

    return clock


def convert(model: nn.Module, example: Any = None, **options: Any) -> Acceleration:
    return to_semi_structured(model, example, backend=OnHost(), algorithms=False, **options)


def close(model: nn.Module, dense: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=2e-2, atol=2e-2)


def test_a_layer_becomes_2_4_where_it_gains(stand_in: Path) -> None:
    model = finalized(nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(48, 10))
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 64).bfloat16()
    report = convert(model, x, clock=clock_of(1.5, 0.8, 1.01))
    assert report.converted == ("0.weight",)
    rows = {row.name: row for row in report.rows}
    assert [row.note for row in report.rows] == [
        "",
        "2:4 is slower",
        "2:4 is slower",  # of the same kind: measured once
        "2:4 gains nothing",
        "cusparselt needs multiples of 16 x 16",
    ]
    assert [rows[f"{i}.weight"].times.speedup for i in range(4)] == [1.5, 0.8, 0.8, 1.01]  # type: ignore[union-attr]
    assert {row.tokens for row in report.rows[:4]} == {6}
    text = str(report)
    assert "1.50x" in text
    assert text.endswith("1 of 5 weights run 2:4 on cusparselt; timed as launched (eager)")
    assert any(line.startswith("*.weight ") and "0.80x" in line for line in text.splitlines())
    close(model, dense, x)


def test_without_an_example_nothing_is_timed_and_the_report_says_so(stand_in: Path) -> None:
    def clock(*_: Any) -> float:
        raise AssertionError

    for example, options in ((None, {}), (torch.randn(4, 64).bfloat16(), {"measure": False})):
        model = finalized(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
        dense = copy.deepcopy(model)
        report = convert(model, example, clock=clock, **options)
        assert report.converted == ("0.weight", "2.weight")
        assert [row.tokens for row in report.rows] == ([1024] * 2 if example is None else [4] * 2)
        assert "nothing was measured: they may be slower than dense" in str(report)
        close(model, dense, torch.randn(4, 64).bfloat16())


def test_an_activation_behind_a_layer_joins_its_product(stand_in: Path) -> None:
    model = finalized(
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 64),
        nn.GELU("tanh"),
        nn.Linear(64, 32),
        nn.GELU(),
        nn.Conv2d(8, 4, 1),
    )[:-1]
    dense, x = copy.deepcopy(model), torch.randn(5, 64).bfloat16()
    assert convert(model, x, clock=clock_of(2, 2, 2)).converted == ("0.weight", "2.weight", "4.weight")
    kinds = [type(module) for module in model]
    sparse = SemiStructuredLinear
    assert kinds == [sparse, nn.Identity, sparse, nn.Identity, sparse, nn.GELU]  # the exact GELU is another function
    assert "2:4 by cusparselt, gelu_tanh" in repr(model[2])
    close(model, dense, x)


def test_an_activation_that_others_use_or_watch_stays(stand_in: Path) -> None:
    shared = nn.Linear(64, 64)
    relu = nn.ReLU()
    model = finalized(shared, nn.ReLU(), shared, nn.Linear(64, 64), relu, nn.Linear(64, 64), relu, nn.Linear(64, 32))
    model[3].register_forward_hook(lambda *_: None)
    dense, x = copy.deepcopy(model), torch.randn(5, 64).bfloat16()
    convert(model, x, clock=clock_of(2, 2, 2, 2))
    assert [isinstance(model[i], nn.ReLU) for i in (1, 4, 6)] == [True, True, False]
    close(model, dense, x)


def test_an_activation_stays_whose_layer_is_called_by_itself(stand_in: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = finalized(nn.Linear(64, 64), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            h = self.pair[0](x)
            y: Tensor = h + self.pair[1](h)
            return y

    model, x = Residual(), torch.randn(5, 64).bfloat16()
    dense = copy.deepcopy(model)
    assert convert(model, x, clock=clock_of(2)).converted == ("pair.0.weight",)
    close(model, dense, x)


@pytest.mark.parametrize("shown", [True, False], ids=["by the example", "without one"])
def test_an_activation_stays_whose_layer_is_called_alone_as_well(stand_in: Path, shown: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = finalized(nn.Linear(64, 64), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.ffn[0](x) + self.ffn(x)
            return y

    model, x = Both(), torch.randn(5, 64).bfloat16()
    dense = copy.deepcopy(model)
    assert convert(model, x if shown else None, clock=clock_of(2)).converted == ("ffn.0.weight",)
    close(model, dense, x)


def test_an_activation_that_the_library_refuses_stays(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_NO_GELU", "1")
    model = finalized(nn.Linear(64, 32), nn.GELU("tanh"))
    dense, x = copy.deepcopy(model), torch.randn(5, 64).bfloat16()
    assert convert(model, x, clock=clock_of(2)).converted == ("0.weight",)
    assert isinstance(model[1], nn.GELU)
    close(model, dense, x)


def test_convolutions_are_timed_on_their_own_strides(stand_in: Path) -> None:
    model = finalized(nn.Conv2d(32, 32, 1, stride=2), nn.ReLU(), nn.Conv2d(32, 16, 1))
    dense, x = copy.deepcopy(model), torch.randn(2, 32, 5, 5).bfloat16().to(memory_format=torch.channels_last)
    report = convert(model, x, clock=clock_of(2, 2))
    assert [row.tokens for row in report.rows] == [18, 18]
    assert len(report.converted) == 2
    close(model, dense, x)


class Two(nn.Module):
    """Calls one layer twice with other numbers of tokens, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y: Tensor = self.used(x).sum() + self.used(memory).sum()
        return y


@pytest.mark.parametrize("named", [False, True])
def test_examples_of_several_arguments(stand_in: Path, named: bool) -> None:
    model = finalized(Two())
    example = (torch.randn(3, 32).bfloat16(), torch.randn(20, 32).bfloat16())
    # Both inputs are timed and their times added.
    report = convert(
        model[0], dict(zip(("x", "memory"), example, strict=True)) if named else example, clock=clock_of(3, 1)
    )
    rows = {row.name: row for row in report.rows}
    assert rows["used.weight"].tokens == 23
    assert rows["used.weight"].times is not None
    assert rows["used.weight"].times.speedup == 2
    assert rows["unused.weight"].note == "the example does not reach it"
    assert report.converted == ("used.weight",)


def test_a_model_that_was_compiled_before_is_seen_through(stand_in: Path) -> None:
    model, x = finalized(nn.Linear(64, 32), nn.Linear(32, 32)), torch.randn(4, 64).bfloat16()
    dense = copy.deepcopy(model)
    model.compile(backend="eager")
    with torch.no_grad():
        model(x)
    assert convert(model, x, clock=clock_of(2, 2)).converted == ("0.weight", "1.weight")
    close(model, dense, x)


def test_a_layer_whose_forward_was_replaced_stays_dense(stand_in: Path) -> None:
    model, x = finalized(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(4, 64).bfloat16()
    model[0].forward = lambda x: 2 * nn.Linear.forward(model[0], x)
    dense = copy.deepcopy(model)
    report = convert(model, x, clock=clock_of(2))
    assert [row.note for row in report.rows] == ["Linear computes in its own way", ""]
    close(model, dense, x)


def test_under_autocast_a_layer_stays_dense(stand_in: Path) -> None:
    model = finalized(nn.Linear(32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        report = convert(model, torch.randn(3, 32))
    assert [row.note for row in report.rows] == ["its inputs are float32, its weight bfloat16"]


def test_what_the_library_refuses_or_computes_wrong_stays_dense(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(8, 64).bfloat16()
    for variable, note in (
        ("STAND_IN_WRONG", "its 2:4 product is wrong: relative error "),
        ("STAND_IN_REFUSES", "cusparseLtMatmulPlanInit: operation not supported (CUSPARSE_STATUS_NOT_SUPPORTED)"),
    ):
        monkeypatch.setenv(variable, "0")
        model = finalized(nn.Linear(64, 32))
        report = convert(model, x, clock=clock_of())
        assert report.rows[0].note.startswith(note)
        assert not report.converted
        assert type(model[0]) is nn.Linear


class Refusing(OnHost):
    """Does not compress weights of 48 rows, and says so as torch's calls do."""

    error: type[RuntimeError] = RuntimeError

    def compress(self, matrix: Tensor) -> Any:
        if len(matrix) == 48:
            raise self.error("CUDA error: operation not supported\nmore")
        return super().compress(matrix)


def test_a_layer_that_torch_refuses_does_not_keep_the_others_dense(stand_in: Path) -> None:
    model = finalized(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    dense, x = copy.deepcopy(model), torch.randn(8, 64).bfloat16()
    report = to_semi_structured(model, x, backend=Refusing(), algorithms=False, clock=clock_of(2))
    assert [row.note for row in report.rows] == ["CUDA error: operation not supported", ""]
    assert report.converted == ("2.weight",)
    close(model, dense, x)

    broken = Refusing()
    broken.error = torch.AcceleratorError  # after which the device runs nothing
    with pytest.raises(torch.AcceleratorError):
        to_semi_structured(dense, x, backend=broken, algorithms=False)
    assert type(dense[2]) is nn.Linear


def test_algorithms_come_from_the_cache(stand_in: Path) -> None:
    known = Cache(CPU)
    for tokens, algorithm in ((1, 3), (16, 1), (4096, 2)):
        known.found[str(Problem("bfloat16", "bfloat16", 32, 64, tokens, True, "relu"))] = Algorithm(algorithm)
    model = finalized(nn.Linear(64, 32), nn.ReLU())
    x = torch.randn(8, 64).bfloat16()
    to_semi_structured(model, x, backend=OnHost(), cache=known, clock=clock_of(2))
    assert model[0].algorithms == (1, 3, 1, -1, 16, 1, 1, -1, 4096, 2, 1, -1)
    model(x)
    model(x.repeat(100, 1))
    plans = [line for line in stand_in.read_text().splitlines() if line.startswith("plan")]
    assert plans[-2:] == ["plan 8 tokens, algorithm 1, split-k 1", "plan 800 tokens, algorithm 2, split-k 1"]


def test_a_default_algorithm_that_kills_is_not_run_here(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process would die of it: it is known from the cache, and no child can be asked for another."""
    monkeypatch.setenv("STAND_IN_DIES", "0")
    monkeypatch.setattr(sys, "executable", "")
    known = Cache(CPU)
    known.bad["bfloat16"] = {Algorithm()}
    model = finalized(nn.Linear(64, 32))
    report = to_semi_structured(model, torch.randn(8, 64).bfloat16(), backend=OnHost(), cache=known)
    assert [row.note for row in report.rows] == ["the default algorithm crashes or hangs here, and no other was found"]
    assert "the search for algorithms stopped" in str(report)


class OutOfMemory(OnHost):
    """Has memory for two weights."""

    left = 2

    def compress(self, matrix: Tensor) -> Any:
        if not self.left:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        self.left -= 1
        return super().compress(matrix)


def snapshot(model: nn.Module) -> list[Any]:
    return [(name, type(module), dict(module._parameters)) for name, module in model.named_modules()]


def test_a_failure_leaves_the_model_as_it_was(stand_in: Path) -> None:
    model = finalized(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 48))
    before, x = snapshot(model), torch.randn(4, 64).bfloat16()
    cases: list[tuple[Any, str]] = [
        (x[:, :60], "the model does not take the example inputs (4x60 torch.bfloat16): RuntimeError: "),
        (x.float(), "the model does not take the example inputs (4x64 torch.float32): RuntimeError: "),
        (x.to("meta"), "the example inputs are on meta and the model on cpu: move them there"),
        ((x, x), "the model does not take the example inputs (4x64 torch.bfloat16, 4x64 torch.bfloat16): TypeError: "),
        ({"y": 3}, "the model does not take the example inputs (no tensor): TypeError: "),
    ]
    for example, message in cases:
        with pytest.raises(SparsityError) as error:
            convert(model, example)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
    with pytest.raises(SparsityError, match='unknown launch "jit"; known: eager, graph'):
        convert(model, x, launch="jit")
    message = "out of memory on cpu while preparing 2:4 layers: CUDA out of memory. .* 2 GiB; the model is as it was"
    with pytest.raises(SparsityError, match=message):
        to_semi_structured(model, backend=OutOfMemory(), algorithms=False)
    after = snapshot(model)
    assert [(name, kind) for name, kind, _ in before] == [(name, kind) for name, kind, _ in after]
    assert all(a[name] is b[name] for (*_, a), (*_, b) in zip(before, after, strict=True) for name in a)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_converted_model_can_be_copied_pickled_and_compiled(stand_in: Path) -> None:
    model = finalized(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    x = torch.randn(4, 64).bfloat16()
    convert(model, x, clock=clock_of(2, 2))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        other = pickle.loads(pickle.dumps(model[0]))
        assert torch.equal(other(x), model[0](x))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
