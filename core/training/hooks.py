"""Where sparse training touches the optimizer: right before and after each update, with no call of the user's.

Global step hooks of ``torch.optim`` find, at each step of any optimizer, the shadow weights that it holds. By then the
gradient has been accumulated, reduced over ranks, unscaled and clipped, so lambda keeps its nominal value.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from nm_sparsity.core.errors import SparsityError
from nm_sparsity.core.methods import WeightState
from nm_sparsity.core.model import layers

_UNHELD_STEPS = 10
_unheld: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Shadow weight -> optimizer steps since which it got new gradients and no stepping optimizer held it."""
_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Gradient -> its version when `_unheld` counted it: a model that is not trained any more is no mistake."""


class _Held(NamedTuple):
    param: nn.Parameter
    state: WeightState
    lr: float | Tensor


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _is_nested():
        return None
    held = _held(optimizer)
    with torch.no_grad():
        for _, sparse, lr in held:
            sparse.lr_sum = sparse.lr_sum + lr
            sparse.preconditioned |= not isinstance(optimizer, torch.optim.SGD)
    _warn_unheld(held)
    positional = len(args) > 1  # args[0] is the optimizer itself
    closure = args[1] if positional else kwargs.get("closure")
    if closure is None:
        _treat(optimizer, held)
        return None

    def treated_closure() -> Any:
        # The backward pass runs inside step (Lightning, LBFGS, SAM), and may add to gradients from before.
        loss = closure()
        _treat(optimizer, _held(optimizer))
        return loss

    if positional:
        return (args[0], treated_closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": treated_closure}


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        for param, sparse, _ in _held(optimizer):
            w = _local(param, sparse)
            if w.numel():
                sparse.method.after_step(w, sparse)


def _is_nested() -> bool:
    """Whether an optimizer steps inside another's step (ZeroRedundancyOptimizer, SAM), which was treated already.

    Read off the call stack: a flag would be left behind by a step that raises.
    """
    frame = sys._getframe(2)  # the wrapper that torch.optim puts around every optimizer's step
    wrapper = frame.f_code
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code is wrapper:
            return True
    return False


def _treat(optimizer: Optimizer, held: list[_Held]) -> None:
    """Let each method change the gradients of the weights that `optimizer` holds."""
    # A fused optimizer divides by the loss scale inside step.
    scale = getattr(optimizer, "grad_scale", None)
    scale = 1.0 if scale is None else scale
    with torch.no_grad():
        for param, sparse, _ in held:
            if param.grad is None:
                continue
            w, grad = _local(param, sparse), _local(param.grad, sparse)
            if w.element_size() < 4:
                _warn_half()
            if w.numel():
                sparse.method.before_step(w, grad, sparse, scale)


def _held(optimizer: Optimizer) -> list[_Held]:
    lr = {id(p): group.get("lr") or 0.0 for group in optimizer.param_groups for p in group["params"]}
    return [_Held(param, sparse, lr[id(param)]) for param, sparse in _live_weights() if id(param) in lr]


def _live_weights() -> Iterator[tuple[nn.Parameter, WeightState]]:
    """Every shadow weight alive, once also when several modules share it."""
    seen: set[int] = set()
    for layer in list(layers.registry):
        for name, sparse in layer.nm_weights.items():
            param = layer._parameters.get(name)
            if param is not None and id(param) not in seen:
                seen.add(id(param))
                yield param, sparse


def _local(t: Tensor, sparse: WeightState) -> Tensor:
    """`t` itself or, of a sharded one, what this rank holds: whole rows, or an error."""
    if not isinstance(t, DTensor):
        return t
    if any(not (p == Replicate() or p == Shard(0)) for p in t.placements) or 0 in sparse.dims:
        raise SparsityError(
            f"a sparse weight of shape {tuple(t.shape)} is sharded as {t.placements}, across its groups: "
            "shard it along dimension 0 (fully_shard's default), and exclude transposed convolutions"
        )
    return t.to_local()


def _warn_unheld(held: list[_Held]) -> None:
    holds = {id(param) for param, _, _ in held}
    lost = 0
    for param, _ in _live_weights():
        grad = param.grad
        if id(param) in holds:
            _unheld.pop(param, None)
        elif grad is not None and param.requires_grad and _seen.get(grad) != grad._version:
            _seen[grad] = grad._version
            _unheld[param] = _unheld.get(param, 0) + 1
            lost += _unheld[param] == _UNHELD_STEPS
    if lost:
        warnings.warn(
            f"{lost} sparse weights got gradients, but no optimizer that made the last {_UNHELD_STEPS} steps holds "
            "them: neither they nor their decay are applied. Give model.parameters() to a torch.optim optimizer "
            "that does not copy or flatten them",
            UserWarning,
            stacklevel=2,
        )


@cache
def _warn_half() -> None:
    warnings.warn(
        "an optimizer steps half-precision sparse weights, which rounds the decay of dropped weights away: "
        "keep fp32 weights and train under autocast",
        UserWarning,
        stacklevel=2,
    )


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
