"""Training that goes past the optimizer hooks, and with them past the decay, is said aloud."""

from __future__ import annotations

import warnings
from collections.abc import MutableSet
from collections.abc import Set as AbstractSet

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from nm_sparsity.core.model import bank

STEPS = 10
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
        theirs = {id(p) for member, _ in weights for p in member.module._parameters.values()}
        if not grads or (not theirs & held and _is(scope.gradient, grads[0])):
            continue
        scope.gradient = TensorWeakRef(grads[0])
        scope.left_out += 1
        if scope.left_out == STEPS:
            warnings.warn(
                f"{len(grads)} sparse weights got gradients, but no optimizer that made the last {STEPS} steps holds "
                "them: neither they nor their decay are applied. Give model.parameters() to a torch.optim optimizer "
                "that does not copy or flatten them (layer.weight is the masked value and no nn.Parameter)",
                UserWarning,
                stacklevel=2,
            )


def _is(reference: TensorWeakRef | None, tensor: Tensor) -> bool:
    return reference is not None and reference() is tensor
