"""The runner on a CPU: there is no CUDA graph, everything else is as on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nm_sparsity.core import SparsityError, finalize, sparsify
from nm_sparsity.core.deploy import runner
from nm_sparsity.core.deploy.backends import CuSparseLt
from nm_sparsity.core.deploy.cache import Cache, Problem
from nm_sparsity.core.deploy.cusparselt import Algorithm
from nm_sparsity.core.deploy.measure import ROUNDS, Input
from nm_sparsity.core.deploy.runner import accelerate

CPU = torch.device("cpu")


class OnHost(CuSparseLt):
    """cuSPARSELt on a machine without a GPU."""

    def why_not_device(self, device: torch.device) -> str:
        return ""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.linear(x)
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"y": x * scale, "n": x.argmax(-1)}


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    sparsify(model)
    finalize(model)
    return model.bfloat16()


def known() -> Cache:
    """A cache that needs no search."""
    cache = Cache(CPU)
    for tokens in (16, 64):
        cache.found[str(Problem("bfloat16", "bfloat16", 32, 32, tokens, True))] = Algorithm()
    return cache


def clock_of(layer: float, *ways: float) -> Callable[..., float]:
    """A layer's speed-up, then seconds of the ways in the order of the report."""

    def times() -> Iterator[float]:
        for _ in range(1 + ROUNDS):
            yield from (layer, 1.0)
        while True:
            yield from ways

    taken = times()
    return lambda call, device, calls: (call(0), next(taken))[1]


def fast_compiler(model: nn.Module) -> None:
    """Compiles without a compiler."""
    model.compile(backend="eager", fullgraph=True)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found["y"], expected["y"], rtol=3e-2, atol=3e-2)


def test_the_fastest_right_way_runs_and_the_model_stays(stand_in: Path) -> None:
    model, x = net(), torch.randn(10, 32).bfloat16()
    before = dict(model.named_parameters())
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    options: dict[str, Any] = {"backend": OnHost(), "cache": known(), "compiler": fast_compiler}
    fast = accelerate(model, x, clock=clock_of(2.0, 4e-3, 3e-3, 2e-3), **options)
    assert fast.report.runs == "2:4, compiled"
    assert fast.report.speedup == pytest.approx(1.5)
    assert len(fast.report.layers.converted) == 4
    text = str(fast.report)
    assert "Net, bfloat16, inputs 10x32, on cpu" in text
    assert "1.50x over the fastest dense way" in text
    assert "blocks.*.linear.weight" in text
    same(fast(x), expected)
    assert not fast(x)["y"].requires_grad
    for other in (torch.randn(3, 32).bfloat16(), x):
        with torch.no_grad():
            same(fast(other, scale=2.0), model(other, scale=2.0))
    assert all(p is before[name] for name, p in model.named_parameters())
    assert model.training

    slower = accelerate(model, x, clock=clock_of(2.0, 4e-3, 2e-3, 3e-3), **options)
    assert slower.report.runs == "dense, compiled"
    assert slower.report.speedup == 1.0
    none = accelerate(model, x, clock=clock_of(0.5, 4e-3, 2e-3), **options)
    assert [way.name for way in none.report.ways] == ["dense, eager", "dense, compiled"]


def test_several_shapes_and_named_inputs(stand_in: Path) -> None:
    model = net()
    examples = [{"x": torch.randn(n, 32).bfloat16()} for n in (10, 40)]
    options: dict[str, Any] = {"backend": OnHost(), "cache": known(), "compiler": fast_compiler}
    fast = accelerate(model, examples, clock=clock_of(2.0, 4e-3, 3e-3, 2e-3), **options)
    assert "inputs 10x32; 40x32" in str(fast.report)
    for example in examples:
        with torch.no_grad():
            same(fast(**example), model(**example))
    with pytest.raises(SparsityError, match="at least one example"):
        accelerate(model, [], **options)


def test_a_way_that_is_wrong_or_does_not_compile_does_not_run(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), torch.randn(10, 32).bfloat16()
    options: dict[str, Any] = {"backend": OnHost(), "cache": known()}

    def wrong(variant: nn.Module) -> None:
        variant.blocks[0].linear.bias = nn.Parameter(torch.full((32,), 3.0).bfloat16())  # type: ignore[union-attr,index]

    fast = accelerate(model, x, clock=clock_of(2.0, 4e-3, 3e-3, 2e-3), compiler=wrong, **options)
    assert fast.report.runs == "dense, eager"
    assert [note.partition(":")[0] for note in fast.report.notes] == ["dense, compiled", "2"]
    assert all("so it does not run" in note for note in fast.report.notes)
    with torch.no_grad():
        same(fast(x), model(x))

    def failing(variant: nn.Module) -> None:
        raise RuntimeError("no compiler\nhere")

    fast = accelerate(model, x, clock=clock_of(2.0, 4e-3), compiler=failing, **options)
    assert fast.report.runs == "dense, eager"
    assert fast.report.notes[0] == "dense, compiled: does not run here: RuntimeError: no compiler"


@pytest.mark.parametrize("layer", [2.0, 0.5], ids=["2:4", "dense"])
def test_what_runs_stays_as_it_is_when_the_model_is_cast(stand_in: Path, layer: float) -> None:
    model, x = net(), torch.randn(10, 32).bfloat16()
    options: dict[str, Any] = {"backend": OnHost(), "cache": known(), "compiler": fast_compiler}
    fast = accelerate(model, x, clock=clock_of(layer, 4e-3, 3e-3, *([2e-3] if layer > 1 else [])), **options)
    assert fast.report.runs == ("2:4, compiled" if layer > 1 else "dense, compiled")
    expected = fast(x)
    model.float()
    same(fast(x), expected)


def test_repeated_blocks_are_compiled_as_one() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = net()
    runner.compile_blocks(model)
    assert [block._compiled_call_impl is not None for block in model.blocks] == [True] * 4  # type: ignore[union-attr]
    assert model._compiled_call_impl is None
    small = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    runner.compile_blocks(small)
    assert small._compiled_call_impl is not None


def test_a_model_that_is_more_than_its_repeated_blocks_is_compiled_as_a_whole() -> None:
    unequal = nn.Sequential(*(nn.Sequential(*(Block() for _ in range(count))) for count in (3, 4)))
    pairs = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(4))
    for model in (unequal, nn.Sequential(nn.Linear(4, 4), pairs)):
        runner.compile_blocks(model)
        assert model._compiled_call_impl is not None
        assert all(module._compiled_call_impl is None for module in model.modules() if module is not model)


def test_bad_input_is_one_line(stand_in: Path) -> None:
    model, x = net(), torch.randn(10, 32).bfloat16()
    with pytest.raises(SparsityError, match="2:4 cannot be accelerated here: needs an NVIDIA GPU, found cpu"):
        accelerate(model, x)
    with pytest.raises(SparsityError, match="the model does not take the example inputs"):
        accelerate(model, x[:, :3], backend=OnHost())
    training = Net()
    sparsify(training)
    with pytest.raises(SparsityError, match="call finalize"):
        accelerate(training, torch.randn(10, 32), backend=OnHost())


class Hidden:
    """An output that nobody looks into."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


def test_outputs_that_cannot_be_compared_are_refused(stand_in: Path) -> None:
    class Hiding(Net):
        def forward(self, x: Tensor) -> Any:
            return Hidden(super().forward(x)["y"]), x

    model = Hiding()
    sparsify(model)
    finalize(model)
    with pytest.raises(SparsityError, match="the model gives a Hidden, in which outputs cannot be compared"):
        accelerate(model.bfloat16(), torch.randn(4, 32, dtype=torch.bfloat16), backend=OnHost())


class Ending(nn.Module):
    """A model and what is done to its output."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.end = net(), end

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(self.net(x)["y"])
        return y


def test_outputs_that_are_not_finite_are_compared_too(stand_in: Path) -> None:
    def end(y: Tensor) -> Tensor:
        y = y.masked_fill(torch.arange(32) % 2 == 0, -torch.inf)
        return y.masked_fill(torch.arange(32) % 4 == 0, torch.nan)

    options: dict[str, Any] = {"backend": OnHost(), "cache": known(), "compiler": lambda variant: None}
    fast = accelerate(Ending(end), torch.randn(10, 32).bfloat16(), clock=clock_of(2.0, 4e-3, 3e-3, 2e-3), **options)
    assert fast.report.runs == "2:4, compiled"
    assert all(way.error < 0.02 for way in fast.report.ways)

    expected = torch.tensor([1.0, -torch.inf, torch.nan])
    assert runner._error(expected, expected) == 0.0
    for other in ([1.0, torch.inf, torch.nan], [1.0, 0.0, torch.nan], [1.0, -torch.inf, 0.0], [torch.inf] * 3):
        assert runner._error(torch.tensor(other), expected) == torch.inf
    assert runner._error(torch.tensor([torch.nan, 0.0]), torch.tensor([1.0, 0.0])) == torch.inf


def test_outputs_that_change_from_call_to_call_are_refused(stand_in: Path) -> None:
    model, x = Ending(torch.randn_like), torch.randn(10, 32).bfloat16()
    options: dict[str, Any] = {"backend": OnHost(), "cache": known(), "compiler": lambda variant: None}
    with pytest.raises(SparsityError, match="Ending gives other outputs for the same inputs at the next call"):
        accelerate(model, x, clock=clock_of(2.0, 4e-3, 3e-3, 2e-3), **options)


def test_only_what_its_text_tells_may_be_in_a_graph() -> None:
    def signature(*args: Any) -> Any:
        return runner._signature(args, {})

    x = torch.zeros(2)
    assert signature(x, 1, [None, "a", {"k": torch.int8}]) == signature(x + 1, 1, [None, "a", {"k": torch.int8}])
    assert signature(x, 1) != signature(x, True)
    assert signature(x, SimpleNamespace(x=x)) is None


def test_inputs_that_lie_in_memory_several_times_are_imitated() -> None:
    for t in (torch.zeros(3, 1).expand(3, 4), torch.zeros(2, 5).t(), torch.zeros(0, 4), torch.zeros(())):
        made = Input(tuple(t.shape), t.stride(), t.dtype).random(CPU)
        assert (made.shape, made.stride()) == (t.shape, t.stride())
