"""Effective lambda equals nominal lambda under everything that touches gradients between backward and step."""

import copy
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from nm_sparsity.core import SparsityError, decay_strength, finalize, nm_mask, satisfies, sparsify, sparsity_state
from nm_sparsity.core.model.layers import sparse_weights
from nm_sparsity.core.model.strength import warn_if_strength_is_weak

LAMBDA, LR = 0.5, 0.25


def make_net(method: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 4, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsify(net, "2:4", method=method, **({"decay": LAMBDA} if method == "sr-ste" else {}))
    return net


def loss_of(net: nn.Module, seed: int = 1) -> Tensor:
    x = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(seed))
    return net(x).square().mean()


Step = Callable[[nn.Module, torch.optim.Optimizer], None]


def effective_lambda(step: Step, make_optimizer: Any = torch.optim.SGD) -> Tensor:
    """What one SGD step of sr-ste decays dropped weights by beyond what the same step of ste does, per weight."""
    after = {}
    for method in ("ste", "sr-ste"):
        net = make_net(method)
        before = [p.detach().clone() for p in net.parameters()]
        step(net, make_optimizer(net.parameters(), lr=LR))
        after[method] = list(net.parameters())
    found = []
    for w, ste, sr_ste in zip(before, after["ste"], after["sr-ste"], strict=True):
        difference = (ste.detach().double() - sr_ste.detach().double()) / LR
        if w.dim() < 2:
            assert torch.equal(ste, sr_ste)
            continue
        dropped = ~nm_mask(w, "2:4")
        assert not difference[~dropped].any(), "kept weights must not decay"
        # Weighted over all dropped weights: single tiny ones carry rounding of the subtraction.
        found.append((difference * w)[dropped].sum() / w[dropped].double().square().sum())
    return torch.stack(found)


def plain(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(net).backward()
    optimizer.step()


def scaled(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(net)).backward()
    scaler.step(optimizer)
    scaler.update()


def scaled_and_clipped(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(net)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    scaler.step(optimizer)
    scaler.update()


def accumulated(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(4):
        (loss_of(net, seed) / 4).backward()
    optimizer.step()


def clipped(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(net).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()


def closure(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def backward() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    assert optimizer.step(backward) is not None


def closure_by_keyword(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def backward() -> Tensor:
        loss = loss_of(net)
        loss.backward()
        return loss

    optimizer.step(closure=backward)  # type: ignore[call-overload]


def accumulated_with_closure(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Lightning's accumulate_grad_batches: the last part's backward runs inside step and adds to the others."""
    for seed in range(3):
        (loss_of(net, seed) / 4).backward()

    def last() -> Tensor:
        loss = loss_of(net, 3) / 4
        loss.backward()
        return loss

    optimizer.step(last)


def after_a_failed_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(net).backward()

    def broken() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(broken)
    optimizer.zero_grad()
    plain(net, optimizer)


def nested(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    class Outer(torch.optim.Optimizer):
        """Calls another optimizer inside its step, as ZeroRedundancyOptimizer and SAM do."""

        def __init__(self) -> None:
            super().__init__(optimizer.param_groups, {"lr": LR})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            optimizer.step()

    loss_of(net).backward()
    Outer().step()


@pytest.mark.parametrize(
    "step",
    [
        plain,
        scaled,
        scaled_and_clipped,
        accumulated,
        clipped,
        closure,
        closure_by_keyword,
        accumulated_with_closure,
        after_a_failed_step,
        nested,
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_effective_lambda_is_the_nominal_one(step: Step, fused: bool) -> None:
    found = effective_lambda(step, lambda params, lr: torch.optim.SGD(params, lr=lr, fused=fused))
    torch.testing.assert_close(found, torch.full_like(found, LAMBDA), rtol=1e-6, atol=0)


def test_scaled_fused_adamw_equals_unscaled() -> None:
    """AdamW preconditions the term, so compare whole runs: five steps with and without loss scaling."""
    final = []
    for fused, use_scaler in ((False, False), (True, True), (True, False), (False, True)):
        net = make_net("sr-ste")
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=use_scaler)
        for seed in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, seed)).backward()
            scaler.step(optimizer)
            scaler.update()
        final.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    for other in final[1:]:
        torch.testing.assert_close(other, final[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"decay": "linear(0, 1)"}, {"fix_at": 0.5}, {"dense_until": 0.3}, {"precondition": 0.3}, {"precondition": "auto"}],
    ids=str,
)
def test_a_run_is_the_same_with_steps_in_it_that_a_fused_optimizer_skips(options: dict[str, Any]) -> None:
    final = []
    for overflows in ((), (1, 2, 5)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 4, 8))
        sparsify(net, "2:4", total_steps=8, **options)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for seed in range(8):
            for factor in (torch.inf, 1.0) if seed in overflows else (1.0,):
                optimizer.zero_grad()
                scaler.scale(loss_of(net, seed) * factor).backward()
                scaler.step(optimizer)
                scaler.update()
        memory = next(sparse_weights(net))[2].memory
        final.append((list(net.parameters()), decay_strength(net), memory.get("held"), memory.get("log_change")))
    (weights, *rest), (others, *other_rest) = final
    for w, other in zip(weights, others, strict=True):
        torch.testing.assert_close(w, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rest, other_rest)


def test_lbfgs_sees_the_gradient_of_the_decayed_objective() -> None:
    """While the masks stay, the term is the gradient of lambda/2 |(1-E) W|^2: LBFGS on that objective is the oracle."""
    net = nn.Sequential(nn.Linear(8, 8, bias=False).double())
    (w,) = net.parameters()
    twin = w.detach().clone().requires_grad_()
    dropped = ~nm_mask(w, "2:4")
    sparsify(net, "2:4", decay=1.0)

    def ours() -> Tensor:
        w.grad = torch.zeros_like(w)
        return w.new_zeros(())

    def oracle() -> Tensor:
        twin.grad = torch.where(dropped, twin.detach(), 0)
        return w.new_zeros(())

    for parameter, objective in ((w, ours), (twin, oracle)):
        torch.optim.LBFGS([parameter], lr=0.5, max_iter=5).step(objective)
    torch.testing.assert_close(w, twin, rtol=0, atol=1e-14)


def test_a_weight_shared_by_two_layers_decays_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    report = sparsify(net, "2:4", decay=LAMBDA)
    assert [w.note for w in report.weights] == ["tied with 1.weight"]
    (w,) = net.parameters()
    before, dropped = w.detach().clone(), ~nm_mask(w, "2:4")
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    torch.testing.assert_close(w.detach()[dropped], before[dropped] * (1 - LR * LAMBDA))


def test_a_gradient_that_is_rewritten_behind_autograds_back_decays_in_every_step() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    sparsify(net, "2:4", decay=LAMBDA)
    (w,) = net.parameters()
    before, dropped = w.detach().clone(), ~nm_mask(w, "2:4")
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    w.grad = torch.zeros_like(w)
    for _ in range(3):
        w.grad.data.zero_()
        optimizer.step()
    torch.testing.assert_close(w.detach()[dropped], before[dropped] * (1 - LR * LAMBDA) ** 3)


def test_an_optimizer_that_chooses_its_own_learning_rate() -> None:
    class Adaptive(torch.optim.SGD):
        """Has no learning rate in its groups, like Adafactor with relative steps."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.param_groups[0]["lr"] = LR
            super().step()
            self.param_groups[0]["lr"] = None

    net = make_net("sr-ste")
    optimizer = Adaptive(net.parameters(), lr=LR)
    optimizer.param_groups[0]["lr"] = None
    plain(net, optimizer)
    assert decay_strength(net) is None


@pytest.mark.slow
def test_a_model_unpickled_in_a_fresh_process_decays(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    sparsify(net, "2:4", decay=LAMBDA)
    torch.save(net, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "net = torch.load(sys.argv[1], weights_only=False)\n"
        "(w,) = net.parameters(); before = w.detach().clone(); w.grad = torch.zeros_like(w)\n"
        "torch.optim.SGD(net.parameters(), lr=0.25).step()\n"
        "assert not torch.equal(w, before)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_an_optimizer_built_before_sparsify_works() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    sparsify(net, "2:4", decay=LAMBDA)
    (w,) = net.parameters()
    before, dropped = w.detach().clone(), ~nm_mask(w, "2:4")
    w.grad = torch.zeros_like(w)
    optimizer.step()
    torch.testing.assert_close(w.detach()[dropped], before[dropped] * (1 - LR * LAMBDA))


def test_an_optimizer_that_does_not_hold_the_weights_is_reported() -> None:
    net = make_net("sr-ste")
    copies = [p.detach().clone().requires_grad_() for p in net.parameters()]
    optimizer = torch.optim.SGD(copies, lr=LR)
    with pytest.warns(UserWarning, match="3 sparse weights got gradients, but no optimizer"):
        for _ in range(10):
            net.zero_grad()
            loss_of(net).backward()
            optimizer.step()


def test_a_model_that_is_trained_no_more_is_not_reported() -> None:
    done, copied = make_net("sr-ste"), make_net("sr-ste")
    plain(done, torch.optim.SGD(done.parameters(), lr=0.01))
    loss_of(copied).backward()
    other = make_net("sr-ste")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
    for _ in range(15):
        plain(other, optimizer)


def test_two_optimizers_that_take_turns_are_not_reported() -> None:
    first, second = make_net("sr-ste"), make_net("sr-ste")
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (first, second)]
    for _ in range(15):
        for net, optimizer in zip((first, second), optimizers, strict=True):
            loss_of(net).backward()
            optimizer.step()


def test_a_model_that_accumulates_while_another_steps_is_not_reported() -> None:
    slow, fast = make_net("sr-ste"), make_net("sr-ste")
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (slow, fast)]
    for _ in range(15):
        loss_of(slow).backward()
        optimizers[1].zero_grad()
        loss_of(fast).backward()
        optimizers[1].step()
    optimizers[0].step()


def test_groups_of_what_layers_hand_out_are_reported() -> None:
    """Grouping by ``isinstance(m.weight, nn.Parameter)``, as detectors do, leaves every sparse weight out."""
    net = make_net("sr-ste")
    held = [p for m in net.modules() for p in (getattr(m, "weight", None), getattr(m, "bias", None))]
    optimizer = torch.optim.SGD([p for p in held if isinstance(p, nn.Parameter)], lr=LR)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(net).backward()
            optimizer.step()

    for steps, told in ((10, 10), (90, 100)):  # not once and for all
        with pytest.warns(UserWarning, match=f"3 sparse weights got gradients, but no .* the last {told} steps holds"):
            train(steps)
    train(1)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="3 sparse weights got gradients, but no .* the last 101 steps holds"):
        finalize(net)


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_the_decay_shrinks_weights_under_maximize_too(make_optimizer: Any, fused: bool) -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    sparsify(net, "2:4", decay=LAMBDA)
    (w,) = net.parameters()
    before, dropped = w.detach().clone(), ~nm_mask(w, "2:4")
    optimizer = make_optimizer(net.parameters(), lr=0.001, maximize=True, weight_decay=0.0, fused=fused)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert (w.detach()[dropped].abs() < before[dropped].abs()).all()
    assert torch.equal(w.detach()[~dropped], before[~dropped])


def test_the_decay_comes_after_a_users_own_hook_that_clips() -> None:
    net = nn.Sequential(nn.Linear(16, 16, bias=False))
    sparsify(net, "2:4", decay=50.0)
    (w,) = net.parameters()
    before, dropped = w.detach().clone(), ~nm_mask(w, "2:4")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(2):  # also a hook that is registered later
        optimizer.register_step_pre_hook(lambda *_: (nn.utils.clip_grad_norm_(net.parameters(), 1.0), None)[1])
        w.grad = torch.zeros_like(w)
        optimizer.step()
    torch.testing.assert_close(w.detach()[dropped], before[dropped] * 0.5**2)


@pytest.mark.parametrize("method", ["sr-ste", "asp"])
def test_an_optimizer_of_another_model_inside_a_closure_is_treated(method: str) -> None:
    torch.manual_seed(0)
    net, other = make_net(method), nn.Linear(4, 4)
    inner, outer = torch.optim.SGD(net.parameters(), lr=LR), torch.optim.SGD(other.parameters(), lr=LR)

    def closure() -> Tensor:
        plain(net, inner)
        outer.zero_grad()
        loss = other(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    for _ in range(2):
        outer.step(closure)
    if method == "sr-ste":
        assert decay_strength(net) == pytest.approx(2 * LAMBDA * LR)
    else:
        assert all(satisfies(p, "2:4") for p in net.parameters() if p.dim() > 1)


def test_steps_that_move_nothing_count_nothing() -> None:
    net = make_net("sr-ste")
    torch.optim.SGD(net.parameters(), lr=LR).step()  # no gradients
    assert decay_strength(net) is None
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    for inf in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(net) * (float("inf") if inf else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert decay_strength(net) == (None if inf else pytest.approx(LAMBDA * LR))


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("method", ["sr-ste", "asp"])
def test_the_step_that_makes_optimizer_states_changes_nothing(method: str, tensor_lr: bool) -> None:
    """torch.distributed.checkpoint makes it, with learning rate 0 and gradients of zeros."""
    found = []
    for template in (False, True):
        net = make_net(method)
        lr = torch.tensor(1e-3) if tensor_lr else 1e-3
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, capturable=False, foreach=not tensor_lr)
        if template:
            get_state_dict(net, optimizer)
            assert all(not state["exp_avg"].any() for state in optimizer.state.values())
        net.load_state_dict({k: v.flip(-1) for k, v in net.state_dict().items()})
        plain(net, optimizer)
        found.append(torch.cat([p.detach().flatten() != 0 for p in net.parameters()]))
    assert torch.equal(*found)


def test_a_learning_rate_that_is_a_tensor_is_added_up_beside_it() -> None:
    net = make_net("sr-ste")
    lr = torch.tensor(LR)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        plain(net, optimizer)
        lr.mul_(0.5)
    assert decay_strength(net) == pytest.approx(LAMBDA * LR * (1 + 0.5 + 0.25))
    net[2].weight.requires_grad = False
    net[2]._parameters["weight"].grad = None
    loss_of(net).backward()
    optimizer.step()
    state = {name: memory["lr_sum"] for name, memory in sparsity_state(net).items()}
    assert state == pytest.approx({"0.weight": LR * 1.875, "2.weight": LR * 1.75, "4.weight": LR * 1.875})


def test_an_optimizer_of_some_weights_counts_for_those_alone() -> None:
    """After one of all, whose sums lie side by side where the learning rate is a tensor."""
    net = make_net("sr-ste")
    for held in (net, net[2]):
        optimizer = torch.optim.SGD(held.parameters(), lr=torch.tensor(LR))
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    state = {name: float(memory["lr_sum"]) for name, memory in sparsity_state(net).items()}
    assert state == pytest.approx({"0.weight": LR, "2.weight": 2 * LR, "4.weight": LR})


def test_a_copied_layer_counts_for_itself() -> None:
    """Its sum is no longer one of those that lie side by side."""
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    sparsify(net, decay=LAMBDA)
    for place in (None, 2, 0):
        if place is not None:
            net[place] = copy.deepcopy(net[1])
        optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(LR))
        net(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert [float(memory["lr_sum"]) for memory in sparsity_state(net).values()] == pytest.approx([3 * LR] * 3)


@pytest.mark.parametrize("shared", [False, True])
def test_threads_that_train_and_make_models_do_not_meet(shared: bool) -> None:
    """At a switch interval of a microsecond; each thread's result equals the one it has alone."""

    def train(seed: int) -> Tensor:
        torch.manual_seed(0)
        net = make_net("sr-ste") if shared else copy.deepcopy(template)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            loss_of(net, seed).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    template = make_net("sr-ste")
    alone = [train(seed) for seed in range(3)]
    stop = threading.Event()

    def make() -> None:
        while not stop.is_set():
            copy.deepcopy(template)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    maker = threading.Thread(target=make)
    try:
        maker.start()
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(train, range(3)))
    finally:
        stop.set()
        maker.join()
        sys.setswitchinterval(before)
    if not shared:
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b)


def test_optimizers_of_parts_that_take_turns_are_not_reported() -> None:
    net = make_net("sr-ste")
    weights = [p for p in net.parameters() if p.dim() > 1]
    biases = [p for p in net.parameters() if p.dim() == 1]
    optimizers = [torch.optim.Adam(biases, lr=0.01), torch.optim.SGD(weights, lr=0.01)]
    for _ in range(15):
        net.zero_grad()
        loss_of(net).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_a_subclass_that_calls_its_base_steps_once() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # the base class has hooks of its own from here on
    net = make_net("asp")
    optimizer = Own(net.parameters(), lr=LR, momentum=0.9)
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()
    assert all(satisfies(p, "2:4") for p in net.parameters() if p.dim() > 1)
    assert {memory["lr_sum"] for memory in sparsity_state(net).values()} == {2 * LR}


def test_a_compiled_step_decays() -> None:
    nets = [make_net("sr-ste"), make_net("sr-ste")]
    optimizers = [torch.optim.SGD(net.parameters(), lr=LR) for net in nets]
    compiled = torch.compile(lambda: optimizers[1].step(), backend="aot_eager")
    for net, step in zip(nets, (optimizers[0].step, compiled), strict=True):
        loss_of(net).backward()
        step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert decay_strength(nets[1]) == pytest.approx(LAMBDA * LR)


def test_half_precision_weights_are_warned_about() -> None:
    net = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    with pytest.warns(UserWarning, match="half precision"):
        sparsify(net)


def test_decay_strength_is_lambda_times_the_sum_of_learning_rates() -> None:
    net = make_net("sr-ste")
    assert decay_strength(net) is None
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        plain(net, optimizer)
        schedule.step()
    assert decay_strength(net) == pytest.approx(LAMBDA * LR * (1 + 0.5 + 0.25))
    assert decay_strength(make_net("ste")) is None
    net = make_net("sr-ste")
    nested(net, torch.optim.SGD(net.parameters(), lr=LR))
    assert decay_strength(net) == pytest.approx(LAMBDA * LR), "an optimizer inside an optimizer makes one step"


def test_training_that_no_optimizer_hook_saw_is_reported() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    sparsify(net, decay=1.0)
    net(torch.randn(2, 8)).sum().backward()  # stepped by an engine of its own
    with pytest.warns(UserWarning, match="no torch.optim optimizer stepped them"):
        finalize(net)


def test_a_decay_too_weak_to_matter_is_warned_about() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    sparsify(net, decay=1e-4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"lambda \* sum\(lr\) is 1e-05"):
        finalize(net)
    with warnings.catch_warnings(action="error"):
        warn_if_strength_is_weak(6.0)
        net = nn.Sequential(nn.Linear(8, 8))
        sparsify(net, decay=1e-4)
        net(torch.randn(2, 8)).sum().backward()
        torch.optim.AdamW(net.parameters()).step()
        finalize(net)  # Adam divides the term by the gradient's size: the same number says nothing


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"decay": "linear(0, 0.5)"}, 0.5 * sum(t / 20 for t in range(20))),
        ({"decay": "step(0, 0.5, 0.9)"}, 0.5 * 2),
        ({"decay": "exponential(0.1, 0.4, 0, 0.5)"}, sum(0.1 * 4 ** min(t / 10, 1) for t in range(20))),
        ({"decay": 0.5, "dense_until": 0.75}, 0.5 * 5),
        ({"decay": "linear(0, 0)"}, None),
    ],
    ids=str,
)
def test_the_strength_is_that_of_the_lambda_at_each_step(options: dict[str, Any], expected: float | None) -> None:
    """Without data gradients, a dropped weight shrinks by the product of 1 - lambda * lr over the steps."""
    net = nn.Sequential(nn.Linear(8, 4, bias=False))
    sparsify(net, "2:4", total_steps=20, **options)
    w = net.get_parameter("0.weight")
    dropped, before = ~nm_mask(w, "2:4"), w.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        (net(torch.ones(1, 8)) * 0).sum().backward()
        optimizer.step()
    strength = decay_strength(net)
    assert strength == (None if expected is None else pytest.approx(expected * 1e-3, rel=1e-4))
    shrunk = -(w.detach() / before)[dropped].log().mean()
    assert float(shrunk) == pytest.approx(strength or 0.0, rel=2e-2, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({"method": "ste", "fix_at": 0.5}, 4, "fix_at came to no end"),
        ({"method": "ste", "fix_at": 0.5}, 5, "fix_at came to no end"),
        ({"method": "ste", "fix_at": 0.5}, 6, None),
        ({"decay": "linear(1, 2)"}, 9, "decay came to no end"),
        ({"decay": "linear(1, 2)"}, 10, None),
        ({"decay": "linear(1, 2)"}, 11, "what was planned over the run ended before it"),
        ({"decay": "linear(1, 2, 0, 0.5)", "fix_at": 0.8}, 4, "decay, fix_at came to no end"),
        ({"decay": "linear(1, 2, 0, 0.5)", "fix_at": 0.8}, 5, "fix_at came to no end"),
        ({"decay": 1.0}, 20, None),  # nothing depends on the length
    ],
)
def test_finalize_tells_of_a_run_of_another_length(options: dict[str, Any], steps: int, said: str | None) -> None:
    net = nn.Linear(8, 4)
    sparsify(net, "2:4", total_steps=10, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for _ in range(steps):
        net(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        finalize(net)
    begin = f"the weights were trained for {steps} optimizer steps and total_steps is 10: "
    assert [str(warning.message) for warning in found] == ([] if said is None else [begin + said])


def test_a_gradient_from_before_the_weight_grew_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 4, bias=False))
    sparsify(net, "2:4", decay=LAMBDA)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    net(torch.randn(2, 8)).sum().backward()
    (weight,) = net.parameters()
    weight.data = torch.randn(1024, 8)
    with pytest.raises(SparsityError, match=r"shape \(4, 8\) does not go with a weight of \(1024, 8\)"):
        optimizer.step()


def test_groups_that_are_made_later_are_seen() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    sparsify(net, "2:4", decay=LAMBDA)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for way in ("one", "two", "one"):
        if way == "two":  # the same parameters in the same order
            optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "maximize": True})
        elif len(optimizer.param_groups) > 1:
            optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        for p, w in zip(net.parameters(), before, strict=True):
            expected = torch.where(nm_mask(w, "2:4"), w, (1 - LR * LAMBDA) * w)
            torch.testing.assert_close(p.detach(), expected)


def test_equal_methods_of_two_runs_have_steps_of_their_own() -> None:
    nets = [nn.Linear(8, 8), nn.Linear(8, 8)]
    optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], lr=LR)
    for step in range(15):
        if step in (0, 7):
            sparsify(nets[step > 0], "2:4", method="ste", fix_at=0.5, total_steps=10)
        optimizer.zero_grad()
        sum(net(torch.ones(1, 8)).sum() for net in nets).backward()
        optimizer.step()
        late = nets[1].get_parameter("weight")
        assert satisfies(late, "2:4") == (step >= 7 + 5)


def test_what_takes_the_place_of_a_closure_is_left_alone() -> None:
    class Told(torch.optim.SGD):
        def step(self, loss: float | None = None) -> None:  # type: ignore[override]
            self.loss = loss
            super().step()

    net = nn.Linear(8, 8)
    sparsify(net, "2:4", decay=LAMBDA)
    optimizer = Told(net.parameters(), lr=LR)
    net(torch.randn(2, 8)).sum().backward()
    optimizer.step(0.5)
    assert optimizer.loss == 0.5
