"""Training that goes past the optimizer hooks, and with them past the decay, is said aloud."""

from __future__ import annotations

from collections.abc import MutableSet
from collections.abc import Set as AbstractSet

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from nm_sparsity.core.model import bank
from nm_sparsity.core.model.strength import warn_left_out

_SAID_AT = {10**k for k in range(1, 10)}
"""After so many steps without its weights a model is reported."""


def alert() -> bool:
    """Whether models with sparse weights ran with gradients in this thread since its last optimizer step."""
    return bool(bank.trained())


def look(held: AbstractSet[int], complete: MutableSet[bank.Scope]) -> None:
    """Count, at a step of an optimizer that holds the parameters with the ids `held`, the weights that it leaves out.

    `complete` collects the scopes of which it leaves none out, for as long as it holds the same.
    Only models that this thread has run since its last step are looked at. A weight is left out if it has a gradient
    and the optimizer holds other parameters of its model (biases, say), or none of them and the gradient is a new
    tensor at every step: something else consumes it then. A model that accumulates while another steps keeps its own.
    """
    scopes = bank.trained()
    bank.forget_trained()
    for scope in scopes:
        if scope in complete:
            scope.left_out = 0
            continue
        weights = [(member, w) for member in scope.members if (w := member.shadow) is not None and w.requires_grad]
        left = [(m, w) for m, w in weights if id(w) not in held]
        if not left:
            complete.add(scope)
            continue
        grads = [w.grad for member, w in left if w.grad is not None and not member.state.stepped]
        theirs = {id(p) for member, _ in weights for p in member.parameters.values()}
        if not grads or (not theirs & held and _is(scope.gradient, grads[0])):
            continue
        scope.gradient = TensorWeakRef(grads[0])
        scope.left_out += 1
        if scope.left_out in _SAID_AT:
            warn_left_out(len(grads), scope.left_out)


def _is(reference: TensorWeakRef | None, tensor: Tensor) -> bool:
    return reference is not None and reference() is tensor
